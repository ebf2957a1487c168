"""The starts that are compared: random weights, the paper's pretraining, and those it is compared with (Table 1).

All are pretrained on the same encoder, augmentation, budget and optimiser, those of the recipe, by the
loop of `pretext`; a start adds which views it draws and what it learns from them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning_fabric import Fabric

from kaf_model.benchmark.starts.caid import Caid
from kaf_model.benchmark.starts.glcl import GlobalContrast, GlobalLocalContrast
from kaf_model.benchmark.starts.pirl import Pirl
from kaf_model.benchmark.starts.rotation import RotationPrediction
from kaf_model.benchmark.starts.simclr import SimCLR
from kaf_model.config import Recipe
from kaf_model.keypoints import KeypointCache
from kaf_model.pretext import Pretext, PretrainResult, train_pretext
from kaf_model.pretrain import KeypointAugmented
from kaf_model.progress import Progress
from kaf_model.volume import Unreadable, Volume


@dataclass(frozen=True)
class Start:
    """A start of the comparison.

    Attributes:
        name: Its name in tables.
        paper: Where it was published.
        pretext: What it learns from; None learns nothing and leaves the weights random.
        overrides: Settings of the recipe's pretraining that make it what it is.
    """

    name: str
    paper: str
    pretext: Pretext | None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def pretrain(
        self,
        recipe: Recipe,
        volumes: Iterable[Volume | Unreadable | str | Path],
        output: str | Path,
        *,
        resume: bool = False,
        device: str = "auto",
        fabric: Fabric | None = None,
        cache: KeypointCache | None = None,
    ) -> Generator[Progress, None, PretrainResult | None]:
        """Pretrain the encoder of `recipe.model`; see `pretrain.pretrain` for stopping, resuming and errors.

        Yields:
            Progress with the losses of each step.

        Returns:
            The encoder, whose `path` is to be given to `finetune` as its start; None for random weights.
        """
        if self.pretext is None:
            return None
        return (
            yield from train_pretext(
                self.pretext,
                recipe.model,
                volumes,
                recipe.pretrain.override(**self.overrides),
                slices=recipe.slices,
                keypoints=recipe.keypoints,
                output=output,
                resume=resume,
                device=device,
                fabric=fabric,
                cache=cache,
            )
        )


_PCL_ALONE = {"weight_pcl": 1.0, "weight_global": 0.0, "weight_local": 0.0}
_CHAITANYA = "Chaitanya et al., NeurIPS 2020"

STARTS: Mapping[str, Start] = MappingProxyType(
    {
        "random": Start("Random", "none", None),
        "kaf": Start("KAF-SSL", "the paper, section 3.2", KeypointAugmented()),
        "pcl": Start("PCL", "Zeng et al., MICCAI 2021", KeypointAugmented(), _PCL_ALONE),
        "simclr": Start("SimCLR", "Chen et al., ICML 2020", SimCLR()),
        "glcl-global": Start("GLCL-global", _CHAITANYA, GlobalContrast()),
        "glcl-full": Start("GLCL-full", _CHAITANYA, GlobalLocalContrast()),
        "rotation": Start("Rotation", "Gidaris et al., ICLR 2018", RotationPrediction()),
        "pirl": Start("PIRL", "Misra and van der Maaten, CVPR 2020", Pirl()),
        "caid": Start("CAiD", "Taher et al., MIDL 2022", Caid()),
    }
)
"""Starts by the name that the command line takes."""
