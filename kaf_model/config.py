"""Every setting once: what the networks, the slices and the trainings are made from.

Each class is a frozen pydantic model that refuses unknown keys. The command line, the forms of the
plugin and the header of a checkpoint are made from these fields, so a description here is also a
help text and a tooltip. Presets named after the paper reproduce its published settings.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kaf_model.presets import AUGMENTATIONS, PresetName, preset_values

KAF_FIELDS = frozenset(
    {
        "kaf_levels",
        "embedding_width",
        "heads",
        "attention_blocks",
        "diffusion_channels",
        "kaf_start",
        "position_reference",
    }
)
"""Settings of the model that only KAF layers have."""

Architecture = Literal["kaf-unet", "unet", "unet-c2", "fcn", "kaf-fcn", "swin-unetr", "swin-unet"]

Orientation = Literal["fixed", "best", "average"]


class Settings(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def override(self, **values: Any) -> Self:
        """Return a validated copy with some fields replaced."""
        return type(self).model_validate({**self.model_dump(), **values})


class SliceConfig(Settings):
    """How a volume becomes network-ready slices."""

    spacing: float | None = Field(
        1.5,
        gt=0,
        description="In-plane pixel size in mm to which slices are resampled; none keeps the source's.",
    )
    clip_percentiles: tuple[float, float] = Field(
        (1.0, 99.0), description="Intensities of a volume are clipped at these percentiles, then z-scored."
    )
    context: int | None = Field(
        None,
        ge=0,
        description="Slices above, and as many below, that the network reads with each slice. With none a finetuning "
        "that starts afresh reads two where slices lie hardly farther apart than pixels and at least eight are "
        "labelled; all else reads none.",
    )
    context_step: float | None = Field(
        None,
        gt=0,
        description="Distance in mm between slices that are read together; none takes the next ones, in a finetuning "
        "that starts afresh those at the distance that the slices of the labelled volumes have.",
    )

    @field_validator("clip_percentiles")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 100:
            raise ValueError(f"clip_percentiles must be 0 <= low < high <= 100, got {value}")
        return value

    @property
    def input_slices(self) -> int:
        """How many slices the network reads to segment one."""
        return 2 * (self.context or 0) + 1


class KeypointConfig(Settings):
    """Which keypoints of a slice are detected."""

    detector: Literal["sift", "superpoint"] = Field("sift", description="Keypoint detector.")
    superpoint_weights: str = Field(
        "magic-leap-community/superpoint",
        description="SuperPoint: folder with its weights, or a name that is already in the local cache.",
    )
    max_keypoints: int = Field(
        1024, gt=0, description="At most this many keypoints a slice are kept, strongest response first."
    )
    contrast_threshold: float = Field(
        0.04, ge=0, description="SIFT: lowest contrast of a keypoint; lower finds more."
    )
    edge_threshold: float = Field(
        10.0, gt=0, description="SIFT: edge-likeness above which a keypoint is dropped."
    )
    sigma: float = Field(1.6, gt=0, description="SIFT: blur of the first octave, in pixels.")


class CorrespondenceConfig(Settings):
    """Which keypoints of two neighbouring slices are taken for the same anatomy (paper, section 3.2)."""

    radius: float = Field(30.0, gt=0, description="Largest Manhattan distance in pixels.")
    ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Lowe's ratio: best over second-best descriptor distance; none turns it off.",
    )


class ModelConfig(Settings):
    """Architecture of the network."""

    architecture: Architecture = Field(
        "kaf-unet",
        description="KAF-UNet, the plain UNet, the UNet with doubled channels (c2) of the paper's Table 7, the FCN "
        "with and without KAF layers of its Table 9, Swin UNETR or Swin-Unet. A finetuning that starts afresh with the "
        "preset small takes unet unless this is given.",
    )
    num_classes: int = Field(2, ge=2, description="Classes including the background.")
    input_slices: int = Field(
        1, gt=0, description="Slices that are read to segment one; set by the context of the slices."
    )
    start_channels: int = Field(16, gt=0, description="Channels of the first encoder block.")
    kaf_levels: tuple[int, ...] = Field(
        (3, 4), description="Encoder blocks (1 is the finest, 4 the coarsest) that carry a KAF layer."
    )
    embedding_width: int = Field(64, gt=0, description="Width of the keypoint embeddings.")
    heads: int = Field(4, gt=0, description="Heads of each attention block.")
    attention_blocks: int = Field(4, ge=0, description="Self-attention blocks in each KAF layer.")
    diffusion_channels: int = Field(64, gt=0, description="Channels between the two diffusion convolutions.")
    kaf_start: float = Field(
        1.0,
        ge=0,
        description="Factor on the random weights that a KAF layer's last convolution starts from. Near 0 the network "
        "starts as the plain UNet and learns to use its keypoints, which few steps need; published: 1.",
    )
    decoder: Literal["wide", "narrow"] = Field(
        "wide",
        description="Channels of the centre and the decoder: those of the encoder's maps with their KAF maps, as "
        "published, or those without, which is half the work.",
    )
    position_reference: float | None = Field(
        None,
        gt=0,
        description="Length in pixels by which keypoint positions are scaled before they are encoded; none takes "
        "the longer side of the slice, as published, which makes the code depend on the crop.",
    )

    @field_validator("kaf_levels")
    @classmethod
    def _levels(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if sorted(set(value)) != list(value) or not set(value) <= {1, 2, 3, 4}:
            raise ValueError(f"kaf_levels must be ascending, distinct and within 1..4, got {value}")
        return value

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.embedding_width % self.heads:
            raise ValueError(f"embedding_width {self.embedding_width} must divide by heads {self.heads}")
        if self.reads_keypoints and not self.kaf_levels:
            plain = self.architecture.removeprefix("kaf-")
            raise ValueError(
                f"a {self.architecture} needs at least one of kaf_levels; choose architecture '{plain}' for none"
            )
        if self.architecture.startswith("swin") and self.start_channels % 12:
            raise ValueError(
                f"start_channels of a {self.architecture} must divide by 12, got {self.start_channels}; "
                "published: 48 for swin-unetr, 96 for swin-unet"
            )
        return self

    @property
    def reads_keypoints(self) -> bool:
        """Whether the network has KAF layers."""
        return self.architecture.startswith("kaf-")

    @classmethod
    def preset(cls, name: PresetName, **overrides: Any) -> ModelConfig:
        """Return a named architecture, any field overridden by keyword.

        Args:
            name: `small` (two CPU cores), `base` (a workstation), `paper-acdc` or `paper-chd` (published).
            **overrides: Fields to replace, e.g. `num_classes=8`.

        Raises:
            ValueError: On an unknown preset or field.
        """
        return cls.model_validate({**preset_values("model", name), **overrides})

    @classmethod
    def fresh(cls, name: PresetName, *, gpu: bool = False, **overrides: Any) -> ModelConfig:
        """Return the architecture that a finetuning from random weights takes unless told otherwise.

        That of the preset, but for `small` the plain UNet: from random weights it is ahead in a few minutes (see the
        results in the README), on CPUs with half of the channels. Another `architecture` is as wide as the preset
        says.

        Args:
            name: A preset.
            gpu: Whether an NVIDIA GPU trains.
            **overrides: Fields to replace.
        """
        fresh = preset_values("fresh", name, gpu=gpu)
        if overrides.get("architecture", fresh.get("architecture")) != fresh.get("architecture"):
            fresh = {}
        return cls.preset(name, **{**fresh, **overrides})


class AugmentConfig(Settings):
    """How training slices are moved and changed. Spatial changes move image, labels and points alike."""

    crop: tuple[int, int] | None = Field(
        (128, 128),
        description="Height and width in pixels of what the network sees; none keeps the slice's size.",
    )
    spatial_probability: float = Field(
        0.9,
        ge=0,
        le=1,
        description="Chance that a slice is rotated, scaled and deformed; else it is only cropped and mirrored.",
    )
    mirror: bool = Field(False, description="Mirror each axis with chance one half.")
    rotation: float = Field(
        30.0, ge=0, le=180, description="Rotation is drawn from plus or minus this, degrees."
    )
    scale: tuple[float, float] = Field((0.75, 1.3), description="Magnification is drawn from this range.")
    elastic_alpha: tuple[float, float] = Field(
        (0.0, 250.0), description="Strength of the elastic deformation."
    )
    elastic_sigma: tuple[float, float] = Field((9.0, 14.0), description="Smoothness of it, in pixels.")
    intensity_probability: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Chance of each change of gamma, brightness, contrast, noise, blur and resolution.",
    )
    gamma: tuple[float, float] = Field((0.7, 1.5), description="Exponent on intensities scaled to 0..1.")
    brightness: float = Field(0.3, ge=0, description="Largest shift, in standard deviations of the volume.")
    contrast: tuple[float, float] = Field((0.7, 1.3), description="Factor about the slice's mean.")
    noise: float = Field(0.15, ge=0, description="Largest standard deviation of additive Gaussian noise.")
    blur: tuple[float, float] = Field((0.5, 1.0), description="Sigma of a Gaussian blur, pixels.")
    low_resolution: tuple[float, float] = Field(
        (1.0, 2.0), description="Factor of simulated coarser sampling."
    )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in (
            "scale",
            "elastic_alpha",
            "elastic_sigma",
            "gamma",
            "contrast",
            "blur",
            "low_resolution",
        ):
            low, high = getattr(self, name)
            positive = name in ("scale", "elastic_sigma", "gamma", "blur")
            lowest = 1.0 if name == "low_resolution" else 0.0
            if low > high or low < lowest or (positive and low == 0):
                bound = "above 0" if positive else f"at least {lowest:g}"
                raise ValueError(f"{name} must be a range (low, high) with low {bound}, got {(low, high)}")
        if self.crop is not None and min(self.crop) < 1:
            raise ValueError(f"crop must be at least 1 x 1 pixels, got {self.crop}")
        return self

    @classmethod
    def preset(cls, name: Literal["strong", "paper", "none"], **overrides: Any) -> AugmentConfig:
        """Return named ranges: `strong` (default), `paper` (the published implementation's), `none` (crop only)."""
        if name not in AUGMENTATIONS:
            raise ValueError(
                f"unknown augmentation preset {name!r}; choose one of {', '.join(AUGMENTATIONS)}"
            )
        return cls.model_validate({**AUGMENTATIONS[name], **overrides})


def _check_halves(name: str, crop: tuple[int, int] | None) -> None:
    if crop is not None and (min(crop) < 16 or any(side % 16 for side in crop)):
        raise ValueError(f"networks halve their input four times: {name} must divide by 16, got {crop}")


class TrainingConfig(Settings):
    """What pretraining and finetuning share."""

    steps: int | None = Field(None, gt=0, description="Optimiser steps to train.")
    epochs: float | None = Field(None, gt=0, description="Passes over all training slices to train.")
    time_budget: float | None = Field(
        None, gt=0, description="Seconds to train; the budget that ends first counts."
    )
    batch_size: int = Field(
        10, gt=0, description="Slices (finetuning) or pairs of slices (pretraining) a step."
    )
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="Optimiser.")
    learning_rate: float = Field(2e-3, gt=0, description="Highest learning rate; it falls along a cosine.")
    learning_rate_floor: float = Field(
        0.0, ge=0, lt=1, description="Last learning rate, as a part of the highest."
    )
    warmup: float = Field(
        0.02, ge=0, lt=1, description="Part of the training in which the learning rate rises."
    )
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    gradient_clip: float | None = Field(
        5.0, gt=0, description="Largest norm of the gradient; none leaves it."
    )
    recompute: bool = Field(
        False,
        description="Compute activations again in the backward pass instead of keeping them (activation "
        "checkpointing): less memory, a third more time, the same result.",
    )
    checkpoint_every: float = Field(
        60.0, gt=0, description="Seconds between checkpoints written while training."
    )
    seed: int = Field(0, ge=0, description="Seed of weights, sampling and augmentation.")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="Augmentation.")

    @model_validator(mode="after")
    def _some_budget(self) -> Self:
        if self.steps is None and self.epochs is None and self.time_budget is None:
            raise ValueError("training needs a budget: give steps, epochs or time_budget (seconds)")
        _check_halves("crop", self.augment.crop)
        return self


class PretrainConfig(TrainingConfig):
    """Self-supervised pretraining (paper, section 3.2)."""

    steps: int | None = Field(2000, gt=0, description="Optimiser steps to train.")
    weight_pcl: float = Field(1.0, ge=0, description="w1: weight of L_PCL on the bottleneck (Eq. 3).")
    weight_global: float = Field(
        1.0, ge=0, description="w2: weight of L_global on keypoint features (Eq. 3)."
    )
    weight_local: float = Field(
        0.01, ge=0, description="w3: weight of L_local, the keypoint matching (Eq. 3)."
    )
    temperature: float = Field(0.1, gt=0, description="Temperature of the contrastive losses (Eq. 1).")
    contrastive_scale: float = Field(
        1.0, gt=0, description="Factor on both contrastive losses; published: temperature / 0.07."
    )
    position_threshold: float = Field(
        0.35, gt=0, le=1, description="Slices closer than this (0..1 along the volume) are a positive pair."
    )
    neighbour_range: float = Field(
        0.18,
        gt=0,
        le=1,
        description="The second view is a slice within this part of the volume, never itself.",
    )
    projection_width: int = Field(512, gt=0, description="Width of the global embeddings.")
    normalised_head: bool = Field(
        True,
        description="Batch normalisation in the head of the bottleneck; published: none, which takes thousands of "
        "steps to tell slices apart.",
    )
    matching_rounds: int = Field(2, ge=0, description="Rounds of self- and cross-attention before matching.")
    sinkhorn_iterations: int = Field(
        100, ge=0, description="Iterations of the optimal transport; 0 takes a dual softmax instead."
    )
    sinkhorn_tolerance: float = Field(
        0.0,
        ge=0,
        description="Change of the transport's potentials below which it stops early; 0 never does.",
    )
    matched_weight: float = Field(
        0.45, ge=0, description="Weight of the mean over matched keypoints in L_local."
    )
    unmatched_weight: float = Field(1.0, ge=0, description="Weight of the mean over unmatched keypoints.")
    correspondences: CorrespondenceConfig = Field(
        default_factory=CorrespondenceConfig, description="Which keypoints of two slices count as the same."
    )

    @classmethod
    def preset(cls, name: PresetName, **overrides: Any) -> PretrainConfig:
        """Return the named pretraining settings, any field overridden by keyword."""
        return cls.model_validate({**preset_values("pretrain", name), **overrides})


class PseudoLabelConfig(Settings):
    """Learning from unlabelled slices by the sure predictions of the averaged model (self-training)."""

    share: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Part of each batch that is pseudo-labelled; 0 learns from labelled slices alone.",
    )
    start: float = Field(
        0.25, ge=0, le=1, description="Part of the training after which the first slices are pseudo-labelled."
    )
    every: float = Field(
        0.15, gt=0, le=1, description="Part of the training after which pseudo-labels are renewed."
    )
    least_dice: float = Field(
        0.7,
        ge=0,
        le=1,
        description="Soft Dice on the slices it learns from (if the loss has it) from which on the model is good "
        "enough to label others: of one that is not, it would learn its mistakes.",
    )
    least_found: float = Field(
        0.25,
        ge=0,
        description="What has to be found of each structure, on average over the slices of a volume, as a part of what "
        "completely labelled slices show of it: a volume in which the model finds less teaches it to find nothing.",
    )
    slices: int = Field(
        200,
        gt=0,
        description="About how many slices are pseudo-labelled at a time; fewer in short trainings.",
    )
    least_slices: int = Field(
        50,
        ge=1,
        description="With fewer unlabelled slices there are no pseudo-labels, those of volumes with finished slices "
        "aside: of a few slices the model learns its own mistakes.",
    )
    propagation: float = Field(
        4.0,
        ge=0,
        description="Weight of what finished slices say of the other slices of their volume; 0 leaves it to the model.",
    )
    registered: int = Field(
        40,
        ge=0,
        description="At most this many volumes without labels are labelled by registration instead, where two or more "
        "are labelled throughout, those fit each other, and slices lie at most two pixels apart; 0 labels none so.",
    )
    atlases: int = Field(
        3, ge=2, description="At most this many labelled volumes are registered to each of the others."
    )
    least_agreement: float = Field(
        0.7,
        ge=0,
        le=1,
        description="Dice of the labels of those labelled volumes with what they bring to each other, below which none "
        "is labelled by registration.",
    )
    volumes: int = Field(100, gt=0, description="At most this many volumes without labels are used.")
    confidence: float = Field(
        0.9, ge=0, le=1, description="Pixels of lower probability are left out, as if nobody had painted."
    )


class FinetuneConfig(TrainingConfig):
    """Supervised training on a few labelled slices."""

    steps: int | None = Field(1200, gt=0, description="Optimiser steps to train.")
    loss: Literal["dice+cross-entropy", "cross-entropy"] = Field(
        "dice+cross-entropy", description="Dice plus cross-entropy, or cross-entropy alone as in the paper."
    )
    foreground: float = Field(
        0.33, ge=0, le=1, description="Part of the crops that are centred on a labelled structure."
    )
    early_crop: tuple[int, int] | None = Field(
        None,
        description="Height and width in pixels of the crops that the training begins with; smaller ones make more "
        "steps in the same time. None takes those of the augmentation throughout; so do networks that read keypoints, "
        "which small crops show too few of.",
    )
    early_part: float = Field(
        0.75, ge=0, le=1, description="Part of the training that has crops of that size."
    )
    encoder_learning_rate: float = Field(
        1.0, ge=0, description="Learning rate of pretrained parts, as a part of the others'; 0 freezes them."
    )
    averaging: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="Decay of the running average of the weights that is kept; 0 keeps the last.",
    )
    pseudo_labels: PseudoLabelConfig = Field(
        default_factory=PseudoLabelConfig, description="Learning from unlabelled slices."
    )
    holdout: float = Field(
        0.0, ge=0, lt=1, description="Part of the labelled slices held out to measure Dice while training."
    )
    holdout_every: int = Field(50, gt=0, description="Steps between measurements on held-out slices.")

    @model_validator(mode="after")
    def _early_crop_halves(self) -> Self:
        _check_halves("early_crop", self.early_crop)
        return self

    @classmethod
    def preset(cls, name: PresetName, *, gpu: bool = False, **overrides: Any) -> FinetuneConfig:
        """Return the named finetuning settings, on an NVIDIA GPU perhaps others, any field overridden by keyword."""
        return cls.model_validate({**preset_values("finetune", name, gpu=gpu), **overrides})


class SegmentConfig(Settings):
    """How a trained model is applied to a volume."""

    batch_size: int | None = Field(
        None, gt=0, description="Slices a forward pass; none takes 8, on an NVIDIA GPU 64."
    )
    flips: bool = Field(False, description="Average over mirrored copies of each slice (4 times the work).")
    orientation: Orientation = Field(
        "best",
        description="Segment slices as they lie (fixed), turned to the angle at which the model contradicts itself "
        "least on three slices of the volume (best), or averaged over that angle and 30 degrees either way "
        "(average, three times the work). Volumes with finished slices are segmented as they lie, and "
        "so are, or averaged about that, those that labelled volumes are registered to.",
    )
    largest_component: Literal["learned", "all", "none"] = Field(
        "learned",
        description="Keep only the largest connected piece of the classes that were in one piece wherever they "
        "were labelled, and of those that were in one piece together only what still is (learned); the largest "
        "of all classes (all); or everything (none).",
    )
    propagation: float = Field(
        4.0,
        ge=0,
        description="Weight of what finished slices of the same volume say of the others, against the network; 0 "
        "leaves it to the network.",
    )
    registration: float = Field(
        3.0,
        ge=0,
        description="Weight of what labelled volumes bring that are registered to a volume, where there are such, "
        "against the network; 0 registers none.",
    )
    atlases: int = Field(
        3, ge=2, description="At most this many labelled volumes are registered to a volume."
    )
    least_agreement: float = Field(
        0.7,
        ge=0,
        le=1,
        description="Dice of the labels of those labelled volumes with what they bring to each other, below which none "
        "is registered.",
    )
    probabilities: bool = Field(False, description="Also return the probability of each class.")
    uncertainty: bool = Field(False, description="Also return the entropy of the class probabilities, 0..1.")

    @field_validator("largest_component", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return "none" if value is None else value  # YAML and --set read none as nothing


class Recipe(Settings):
    """All settings of one preset: the tree that `--preset`, `--config` and `--set` work on."""

    slices: SliceConfig = Field(default_factory=SliceConfig, description="Preprocessing.")
    keypoints: KeypointConfig = Field(default_factory=KeypointConfig, description="Keypoint detection.")
    model: ModelConfig = Field(
        default_factory=ModelConfig,
        description="Architecture. Finetuning with `small`, from random weights and given none of these, takes a plain "
        "UNet with start_channels 8.",
    )
    pretrain: PretrainConfig = Field(default_factory=PretrainConfig, description="Pretraining.")
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig, description="Finetuning.")
    segment: SegmentConfig = Field(default_factory=SegmentConfig, description="Segmentation.")

    @model_validator(mode="after")
    def _input_slices(self) -> Self:
        if self.model.input_slices not in (1, self.slices.input_slices):
            raise ValueError(
                f"model.input_slices is set by slices.context, here to {self.slices.input_slices}; set that instead, "
                f"got {self.model.input_slices}"
            )
        return self

    @classmethod
    def preset(cls, name: PresetName, *, gpu: bool = False) -> Recipe:
        """Return every setting of a named preset, on an NVIDIA GPU perhaps others."""
        return cls.model_validate({part: preset_values(part, name, gpu=gpu) for part in cls.model_fields})
