"""Checkpoint files: round trips, refusals, and files that are never half written."""

import errno
import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from kaf_model import checkpoint as module
from kaf_model.checkpoint import (
    FORMAT,
    Checkpoint,
    CheckpointError,
    ClassLabel,
    Model,
    count_parameters,
    cpu_weights,
    load_checkpoint,
    load_header,
    load_matching,
    load_model,
    load_tensors,
    save_checkpoint,
    save_tensors,
)
from kaf_model.config import KeypointConfig, ModelConfig, SliceConfig
from kaf_model.unet import build_network

CONFIG = ModelConfig(start_channels=2, embedding_width=4, heads=2, attention_blocks=1, num_classes=3)


def model(seed=0):
    torch.manual_seed(seed)
    network = build_network(CONFIG)
    network.encoder.blocks[0][1].running_mean.normal_()
    return Model(
        network.eval(),
        CONFIG,
        SliceConfig(spacing=0.9, clip_percentiles=(0.5, 99.5)),
        KeypointConfig(max_keypoints=77),
        (ClassLabel(0, "background"), ClassLabel(5, "Ventrículo «izq.»"), ClassLabel(200, "aorta")),
        {"num_volumes": 2, "median_spacing_mm": [8.0, 1.5, 1.5]},
        ({"stage": "pretraining", "steps": 10}, {"stage": "finetuning", "steps": 20}),
    )


def test_a_round_trip_keeps_everything(tmp_path):
    saved = model()
    path = saved.save(tmp_path / "new folder" / "model.safetensors")
    loaded = load_model(path)
    assert (loaded.config, loaded.slices, loaded.keypoints) == (saved.config, saved.slices, saved.keypoints)
    assert loaded.classes == saved.classes
    assert loaded.statistics == saved.statistics
    assert loaded.history == saved.history
    assert not loaded.network.training
    assert loaded.device == torch.device("cpu")
    for name, value in saved.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], value)
    images, points = torch.randn(1, 1, 48, 64), torch.rand(1, 5, 2) * 40
    assert torch.equal(loaded.network(images, points), saved.network(images, points))
    versions = load_checkpoint(path).versions
    assert versions["torch"] == torch.__version__
    assert "python" in versions


def test_saving_what_was_loaded_changes_nothing(tmp_path):
    first = load_checkpoint(model().save(tmp_path / "first.safetensors"))
    second = load_checkpoint(save_checkpoint(tmp_path / "second.safetensors", first))
    assert second.describe() == first.describe()
    assert all(torch.equal(second.weights[name], value) for name, value in first.weights.items())


def test_the_description_is_json_and_counts(tmp_path):
    checkpoint = model().checkpoint()
    described = json.loads(json.dumps(checkpoint.describe()))
    assert described["parameters"] == sum(p.numel() for p in build_network(CONFIG).parameters())
    assert described["parameters"] == count_parameters(checkpoint.weights)
    flags = {"one_piece": False, "together": False}
    assert described["classes"][1] == {"value": 5, "name": "Ventrículo «izq.»", **flags}
    assert described["model"]["start_channels"] == 2
    assert described["format"] == FORMAT


def test_weights_are_copies():
    network = build_network(CONFIG)
    weights = cpu_weights(network)
    with torch.no_grad():
        network.head.weight.add_(1)
    assert not torch.equal(weights["head.weight"], network.head.weight)


def header_of(path):
    return load_header(path)


def test_broken_and_foreign_files(tmp_path):
    good = model().save(tmp_path / "good.safetensors")

    def refused(name, message, load=load_checkpoint):
        with pytest.raises(CheckpointError, match=message) as error:
            load(tmp_path / name)
        assert name in str(error.value)

    refused("nothing.safetensors", "no checkpoint at")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    refused("empty.safetensors", "is broken or no safetensors file")
    (tmp_path / "text.safetensors").write_text("hello, this is not a checkpoint at all")
    refused("text.safetensors", "is broken or no safetensors file")
    content = good.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    refused("cut.safetensors", "is broken or no safetensors file")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    refused("foreign.safetensors", "was not written by napari-kaf")
    torch.save({"a": torch.zeros(1)}, tmp_path / "theirs.pth")
    refused("theirs.pth", "kaf import")
    save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {"resume": {}})
    refused("other.safetensors", "is no checkpoint of a model")
    save_tensors(tmp_path / "newer.safetensors", {}, {**header_of(good), "format": FORMAT + 1})
    refused("newer.safetensors", f"has format {FORMAT + 1}.*update napari-kaf")
    unknown = {**header_of(good), "model": {"surprise": 1}}
    save_tensors(tmp_path / "unknown.safetensors", {}, unknown)
    refused("unknown.safetensors", "surprise")
    save_checkpoint(tmp_path / "bare.safetensors", replace(model().checkpoint(), weights={}))
    refused("bare.safetensors", "do not fit its own configuration", load=load_model)
    (tmp_path / "folder.safetensors").mkdir()
    refused("folder.safetensors", "no checkpoint at")


def test_pretrained_weights_cannot_segment_yet(tmp_path):
    whole = model().checkpoint()
    weights = {name: value for name, value in whole.weights.items() if name.startswith("encoder.")}
    path = save_checkpoint(
        tmp_path / "p.safetensors", replace(whole, kind="pretrained", weights=weights, classes=())
    )
    assert load_checkpoint(path).kind == "pretrained"
    with pytest.raises(CheckpointError, match="finetune it on labelled slices first"):
        load_model(path)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), safetensors.SafetensorError("io")]
)
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = model(seed=1).save(tmp_path / "model.safetensors")
    before = path.read_bytes()

    def full(tensors, file, metadata):
        file.write_bytes(b"the first half of a ch")
        raise error

    monkeypatch.setattr(module.safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="choose another place with room on it"):
        model(seed=2).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_setting_that_never_did_anything_is_passed_over(tmp_path):
    path = model().save(tmp_path / "model.safetensors")
    header = load_header(path)
    header["slices"]["divisor"] = 16
    save_tensors(tmp_path / "old.safetensors", load_tensors(path), header)
    assert load_model(tmp_path / "old.safetensors").slices == model().slices


def test_an_interruption_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = model(seed=1).save(tmp_path / "model.safetensors")
    before = path.read_bytes()

    def interrupted(tensors, file, metadata):
        file.write_bytes(b"the first half of a ch")
        raise KeyboardInterrupt

    monkeypatch.setattr(module.safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(seed=2).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_loading_says_what_it_took_and_what_it_left():
    source, target = build_network(CONFIG), build_network(CONFIG.override(num_classes=5))
    fresh = target.head.weight.detach().clone()
    report = load_matching(target, source.state_dict())
    assert report.initialised == ["head.weight"]
    assert str(report) == f"loaded {len(source.state_dict()) - 1} tensors; 1 keep their random start (head)"
    assert torch.equal(target.head.weight, fresh)
    assert torch.equal(target.decoder.blocks[0][0].weight, source.decoder.blocks[0][0].weight)
    encoder = load_matching(build_network(CONFIG), source.state_dict(), prefix="encoder.")
    assert all(name.startswith("encoder.") for name in encoder.loaded)
    assert "keep their random start (decoder, head)" in str(encoder)
    assert str(load_matching(build_network(CONFIG), source.state_dict())).startswith("loaded all")


def test_kinds_are_kept():
    checkpoint = Checkpoint("pretrained", {}, CONFIG, SliceConfig(), KeypointConfig())
    assert checkpoint.describe()["kind"] == "pretrained"
    assert checkpoint.describe()["parameters"] == 0
