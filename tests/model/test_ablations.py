"""The ablations of the paper's Tables 2 and 8 are settings: each changes what it says and nothing else."""

import pytest
import torch

from kaf_model.config import ModelConfig, PretrainConfig
from kaf_model.pretrain import PretrainingNetwork
from kaf_model.unet import build_network

TABLE_2 = {  # "#T" counts layers of two attention blocks each
    "A": {"architecture": "unet"},
    "B": {"attention_blocks": 18, "kaf_levels": (1, 2, 3)},
    "C": {"attention_blocks": 18, "kaf_levels": (1, 2, 4)},
    "D": {"attention_blocks": 18, "kaf_levels": (1, 3, 4)},
    "E": {"attention_blocks": 18, "kaf_levels": (2, 3, 4)},
    "F": {"attention_blocks": 18},
    "G": {"attention_blocks": 12},
    "H": {"attention_blocks": 6},
}
BLOCK = 4 * (256 * 256 + 256) + 512 * 512 + 512 + 2 * 512 + 512 * 256 + 256
"""Parameters of an attention block: query, key, value and merge, then the MLP with its normalisation."""


def build(row):
    with torch.device("meta"):
        return build_network(ModelConfig.preset("paper-acdc", **TABLE_2[row]))


def size(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_table_2_inserts_layers_at_the_levels_it_says():
    for row, levels in {"A": "", "B": "123", "C": "124", "D": "134", "E": "234", "F": "1234"}.items():
        network = build(row)
        assert "".join(network.encoder.kaf_layers) == levels
        assert {len(layer.attention) for layer in network.encoder.kaf_layers.values()} <= {18}


def test_table_2_counts_attention_blocks():
    full, six, three = (size(build(row)) for row in "FGH")
    assert full - six == 4 * 6 * BLOCK
    assert six - three == 4 * 6 * BLOCK


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ((1, 0, 0), {"bottleneck_head"}),
        ((0, 1, 0), {"keypoint_projection", "keypoint_head"}),
        ((1, 1, 0), {"bottleneck_head", "keypoint_projection", "keypoint_head"}),
        ((1, 1, 0.001), {"bottleneck_head", "keypoint_projection", "keypoint_head", "matcher"}),
        ((0, 1, 0.08), {"keypoint_projection", "keypoint_head", "matcher"}),
        ((0, 0, 1), {"keypoint_projection", "matcher"}),
    ],
)
def test_table_8_and_the_end_of_table_2_weigh_the_losses(weights, parts):
    names = ("weight_pcl", "weight_global", "weight_local")
    training = PretrainConfig.preset("paper-chd", **dict(zip(names, weights, strict=True)))
    with torch.device("meta"):
        network = PretrainingNetwork(ModelConfig.preset("paper-chd"), training)
    assert {name for name, _ in network.named_children()} == {"encoder"} | parts
