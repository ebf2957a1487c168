"""The networks that are compared, as configurations of one shared interface (paper, Tables 1, 7 and 9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kaf_model.config import Architecture, ModelConfig


@dataclass(frozen=True)
class Network:
    """A network of the comparison.

    Attributes:
        name: Its name in tables.
        paper: Where it was published.
        architecture: What builds it.
        widths: Start channels for recipes with fewer than 32, and as published for the others; None keeps
            those of the recipe.
    """

    name: str
    paper: str
    architecture: Architecture
    widths: tuple[int, int] | None = None

    def configure(self, model: ModelConfig) -> ModelConfig:
        """The network in the size of a recipe's model: levels, heads and classes are kept where they apply."""
        channels = model.start_channels
        if self.widths is not None:
            channels = self.widths[channels >= 32]
        return model.override(architecture=self.architecture, start_channels=channels)


_UNET = "Ronneberger et al., MICCAI 2015"
_FCN = "Long et al., CVPR 2015"
_KAF = "the paper, section 3.1"

NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "unet": Network("UNet", _UNET, "unet"),
        "unet-c2": Network("UNet (c2)", "the paper, Table 7", "unet-c2"),
        "kaf-unet": Network("KAF-UNet", _KAF, "kaf-unet"),
        "fcn": Network("FCN", _FCN, "fcn"),
        "kaf-fcn": Network("KAF-FCN", f"{_FCN}; the paper, Table 9", "kaf-fcn"),
        "swin-unetr": Network("SwinUNETR", "Tang et al., CVPR 2022", "swin-unetr", (24, 48)),
        "swin-unet": Network("Swin-Unet", "Cao et al., ECCV Workshops 2022", "swin-unet", (48, 96)),
    }
)
"""Networks by the name that the command line takes."""
