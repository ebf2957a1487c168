"""Settings: presets, refusals, and the way through JSON."""

import pytest
from pydantic import BaseModel, ValidationError

from kaf_model.config import (
    KAF_FIELDS,
    AugmentConfig,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    Recipe,
    SegmentConfig,
    SliceConfig,
)
from kaf_model.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    recipe = Recipe.preset(name)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.model == ModelConfig.preset(name)
    assert recipe.pretrain == PretrainConfig.preset(name)
    assert recipe.finetune == FinetuneConfig.preset(name)


def test_the_papers_settings():
    acdc, chd = Recipe.preset("paper-acdc"), Recipe.preset("paper-chd")
    assert (acdc.model.start_channels, chd.model.start_channels) == (48, 32)
    assert (acdc.model.num_classes, chd.model.num_classes) == (4, 8)
    assert (acdc.slices.spacing, chd.slices.spacing) == (1.25, None)
    assert (acdc.slices.clip_percentiles, chd.slices.clip_percentiles) == ((0, 100), (1, 99))
    assert (acdc.pretrain.position_threshold, chd.pretrain.position_threshold) == (0.35, 0.1)
    assert (acdc.pretrain.neighbour_range, chd.pretrain.neighbour_range) == (0.18, 0.05)
    assert (acdc.finetune.learning_rate, chd.finetune.learning_rate) == (5e-4, 5e-5)
    assert (acdc.finetune.epochs, chd.finetune.epochs) == (200, 100)
    assert (acdc.pretrain.augment.crop, chd.pretrain.augment.crop) == ((352, 352), (512, 512))
    assert (acdc.model.position_reference, chd.model.position_reference) == (352, None)
    assert acdc.finetune.augment == acdc.pretrain.augment
    assert chd.finetune.augment.spatial_probability == 0
    for recipe in (acdc, chd):
        model, pretrain, finetune = recipe.model, recipe.pretrain, recipe.finetune
        assert (model.embedding_width, model.heads, model.attention_blocks) == (256, 4, 12)
        assert model.kaf_levels == (1, 2, 3, 4)
        assert (pretrain.optimizer, pretrain.learning_rate, pretrain.momentum) == ("sgd", 0.002, 0.9)
        assert (pretrain.weight_decay, pretrain.epochs, pretrain.batch_size) == (1e-5, 50, 32)
        assert (pretrain.learning_rate_floor, pretrain.warmup) == (0, 0)
        assert (pretrain.weight_pcl, pretrain.weight_global, pretrain.weight_local) == (1, 1, 0.01)
        assert (pretrain.matched_weight, pretrain.unmatched_weight) == (0.45, 1.0)
        assert pretrain.contrastive_scale == pytest.approx(0.1 / 0.07)
        assert (finetune.optimizer, finetune.weight_decay, finetune.batch_size) == ("adam", 1e-5, 10)
        assert (finetune.learning_rate_floor, finetune.loss) == (0.1, "cross-entropy")
        assert pretrain.correspondences.radius == 30


def test_any_field_can_be_overridden():
    config = ModelConfig.preset("paper-chd", num_classes=3, attention_blocks=16)
    assert (config.num_classes, config.attention_blocks, config.start_channels) == (3, 16, 32)
    assert config.override(heads=2).heads == 2
    assert config.heads == 4
    assert AugmentConfig.preset("none", crop=None).crop is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(chanels=3), "chanels"),
        (lambda: ModelConfig.preset("small", surprise=1), "surprise"),
        (lambda: ModelConfig.preset("tiny"), "unknown preset 'tiny'; choose one of small"),
        (lambda: AugmentConfig.preset("weak"), "unknown augmentation preset 'weak'"),
        (lambda: ModelConfig(embedding_width=10, heads=4), "embedding_width 10 must divide by heads 4"),
        (lambda: ModelConfig(kaf_levels=()), "architecture 'unet' for none"),
        (lambda: ModelConfig(kaf_levels=(3, 2)), "ascending"),
        (lambda: ModelConfig(kaf_levels=(0, 2)), "within 1..4"),
        (lambda: ModelConfig(num_classes=1), "num_classes"),
        (lambda: ModelConfig().override(num_classes=0), "num_classes"),
        (lambda: SliceConfig(clip_percentiles=(99, 1)), "low < high"),
        (lambda: SliceConfig(spacing=0), "spacing"),
        (lambda: FinetuneConfig(steps=None), "training needs a budget"),
        (lambda: FinetuneConfig(augment={"crop": (100, 128)}), r"divide by 16, got \(100, 128\)"),
        (lambda: FinetuneConfig(early_crop=(64, 40)), r"early_crop must divide by 16, got \(64, 40\)"),
        (lambda: FinetuneConfig(early_crop=(0, 64)), "early_crop must divide by 16"),
        (lambda: SegmentConfig(batch_size=0), "batch_size"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_only_kaf_layers_have_are_settings_of_the_model():
    assert set(ModelConfig.model_fields) > KAF_FIELDS


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig().heads = 3


def test_every_field_explains_itself():
    """Forms, help texts and tooltips are made from the descriptions."""

    def check(model: type[BaseModel]):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert field.description.endswith("."), f"{model.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)

    check(Recipe)
