"""The training losses, one file a loss."""

from kaf_model.losses.contrastive import positional_contrastive_loss
from kaf_model.losses.matching import matching_loss
from kaf_model.losses.segmentation import IGNORED, cross_entropy, soft_dice

__all__ = [
    "IGNORED",
    "cross_entropy",
    "matching_loss",
    "positional_contrastive_loss",
    "soft_dice",
]
