"""What a training is asked to do: frozen, validated, plain JSON.

Units are in the names: sizes are `_px`, counts have none, rates are per sample unless said otherwise.
No torch here: the HTTP ingress imports this module.
"""

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
# Not "." and "..", which mean other folders. JSON Schema has no way to say it shorter that pydantic can read.
DATASET_PATTERN = r"^(\.{0,2}[A-Za-z0-9_-][A-Za-z0-9._-]{0,149}|\.{3}[A-Za-z0-9._-]{0,147})$"
UPLOAD_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9-]{0,99}$"
SUBJECT_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,149}$"
MODEL_ALIAS_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
MODEL_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
STEPS_MAX = 1_000_000
LORA_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"
SCHEDULER_PATTERN = r"^[A-Za-z0-9_+-]{1,50}$"
# What W&B takes as the name of a project.
WANDB_NAME_PATTERN = r"^[^/\\#?%:\x00-\x1f]{1,128}$"
PROMPT_MAX = 2000
SEED_MAX = 2**63 - 1

Prompt = Annotated[str, Field(max_length=PROMPT_MAX)]
Seed = Annotated[int, Field(ge=0, le=SEED_MAX)]
SidePx = Annotated[int, Field(ge=16, le=4096)]


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class DatasetSpec(Spec):
    """One folder of pictures with captions.

    `dataset` names an uploaded dataset; `local_path` is a folder on this machine and is only accepted from the
    command line, which uploads it and fills in `dataset` before anything runs. `upload_id` pins one upload; without
    it the newest finished one is used.

    A caption is dropped, which is to train with `dropped_caption` for it, at the rate of `caption_dropout_rate`. Each
    picture is used once more for every kind of flip asked for. `shuffle_tokens`, `keep_tokens` and
    `token_dropout_rate` are about the parts of a caption between commas. Regularisation pictures take turns with the
    others, and get no trigger word in front of their captions. A mask says where the loss counts, black (or
    transparent) parts by `mask_min_value`: `mask_dataset` names an uploaded dataset with a picture of the same name,
    whose upload `mask_upload_id` pins; `alpha_mask` takes the pictures' own transparency.
    """

    dataset: str | None = Field(default=None, max_length=150, pattern=DATASET_PATTERN)
    upload_id: str | None = Field(default=None, pattern=UPLOAD_ID_PATTERN)
    local_path: str | None = Field(default=None, max_length=4096)
    resolutions_px: tuple[SidePx, ...] = Field(default=(512,), min_length=1, max_length=8)
    trigger_word: str | None = Field(default=None, max_length=100)
    default_caption: str | None = Field(default=None, max_length=PROMPT_MAX)
    caption_ext: str = Field(default=".txt", pattern=r"^\.[A-Za-z0-9]{1,10}$")
    caption_dropout_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    dropped_caption: str = Field(default="", max_length=100)
    repeats: int = Field(default=1, ge=1, le=10_000)
    flip_x: bool = False
    flip_y: bool = False
    shuffle_tokens: bool = False
    keep_tokens: int = Field(default=0, ge=0, le=1000)
    token_dropout_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    is_regularisation: bool = False
    loss_multiplier: float = Field(default=1.0, ge=0.0, le=1000.0)
    mask_dataset: str | None = Field(default=None, max_length=150, pattern=DATASET_PATTERN)
    mask_upload_id: str | None = Field(default=None, pattern=UPLOAD_ID_PATTERN)
    alpha_mask: bool = False
    invert_mask: bool = False
    mask_min_value: float = Field(default=0.0, ge=0.0, le=1.0)
    buckets: bool = True
    bucket_step_px: int = Field(default=64, ge=8, le=512)

    @model_validator(mode="after")
    def _has_one_source(self) -> "DatasetSpec":
        if (self.dataset is None) == (self.local_path is None):
            raise ValueError("give the name of an uploaded dataset")
        return self

    @property
    def label(self) -> str:
        """How messages name this dataset: never a whole path."""
        return self.dataset if self.dataset is not None else PurePosixPath(self.local_path or "").name


class NetworkSpec(Spec):
    """The adapter: `alpha / rank` scales its output, as in kohya and peft. `alpha` defaults to `rank`. `dora` learns
    the length of each output's weights too (Liu et al. 2024).

    `targets`: the attention's layers, or `all` that trainers usually adapt (the feed-forward networks' too, and
    FLUX.1's modulations), or those of ai-toolkit (see `diffusion.families.base.LoraTargets`); of these the layers whose
    name holds a part in `only_if_contains` (when there is one) and none in `ignore_if_contains`. `conv_rank` adapts the
    convolutions of a UNet too. `pretrained` is the key of an adapter to begin from and `pretrained_sha256` (hex) what
    its bytes must have, by default what was recorded of them; `initial` is what else it begins with (see
    `diffusion.adapter.attach_lora`).

    `lokr` and `loha` (Yeh et al. 2023) take no dropout. `lokr_factor` is the side of LoKr's smaller matrix, -1 for
    about the square root of the layer's; with `lokr_full_rank` the larger one is whole, a UNet's convolutions are
    adapted too, and rank and alpha have no say.
    """

    type: Literal["lora", "dora", "lokr", "loha"] = "lora"
    rank: int = Field(default=16, ge=1, le=1024)
    alpha: float | None = Field(default=None, gt=0.0, le=4096.0)
    targets: Literal["attention", "all", "ai_toolkit"] = "all"
    conv_rank: int | None = Field(default=None, ge=1, le=1024)
    conv_alpha: float | None = Field(default=None, gt=0.0, le=4096.0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    only_if_contains: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(default=(), max_length=64)
    ignore_if_contains: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(
        default=(), max_length=64
    )
    pretrained: str | None = Field(default=None, max_length=1024, pattern=r"\.safetensors$")
    pretrained_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    lokr_factor: Annotated[int, Field(ge=-1, le=65_536)] = -1
    lokr_full_rank: bool = True
    initial: Literal["gaussian", "uniform"] = "gaussian"

    @model_validator(mode="after")
    def _has_no_dropout_in_vain(self) -> "NetworkSpec":
        if self.type in ("lokr", "loha") and self.dropout > 0:
            raise ValueError(f"{self.type} has no dropout")
        return self

    @field_validator("lokr_factor")
    @classmethod
    def _is_a_side(cls, lokr_factor: int) -> int:
        if lokr_factor == 0:
            raise ValueError("must be -1 or at least 1")
        return lokr_factor

    @property
    def alpha_effective(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha


class ScheduleSpec(Spec):
    """Learning rate over the steps.

    constant: `factor` times the rate for the first `total_steps`, then the rate. cosine: half a cosine down to
    `min_learning_rate` over `total_steps`. linear: from `start_factor` to `end_factor` times the rate over
    `total_steps`. constant_with_warmup: rises from zero over `warmup_steps`, then stays. cosine_with_restarts: cosine
    again every `total_steps`. step: times `gamma` every `step_size`. `total_steps` defaults to the training's.
    """

    type: Literal["constant", "cosine", "linear", "constant_with_warmup", "cosine_with_restarts", "step"] = "constant"
    step_size: int = Field(default=1000, ge=1, le=1_000_000)
    gamma: float = Field(default=0.1, gt=0.0, le=1.0)
    total_steps: int | None = Field(default=None, ge=1, le=1_000_000)
    warmup_steps: int = Field(default=0, ge=0, le=1_000_000)
    start_factor: float = Field(default=1.0, gt=0.0, le=1.0)
    end_factor: float = Field(default=0.0, ge=0.0, le=1.0)
    min_learning_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    factor: float = Field(default=1.0, gt=0.0, le=1.0)


class OptimizerSpec(Spec):
    """AdamW: decoupled weight decay (Loshchilov & Hutter 2019). Prodigy finds the rate: `d_coef` scales its guess.

    `adamw8bit` is AdamW in full precision where there is no GPU or no bitsandbytes.
    """

    type: Literal["adamw", "adamw8bit", "adam", "adafactor", "prodigy", "lion"] = "adamw"
    d_coef: float = Field(default=1.0, gt=0.0, le=1000.0)
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    eps: float = Field(default=1e-8, gt=0.0, le=1e-1)
    weight_decay: float = Field(default=0.01, ge=0.0, le=10.0)


class TimestepSpec(Spec):
    """Which noise levels are trained (see `diffusion.families.base.NoiseLevels`), and how much each counts in the
    loss of a flow model (see `diffusion.families.flow_weights`)."""

    kind: Literal["sigmoid", "linear", "shift"] = "sigmoid"
    bias: Literal["balanced", "content", "style"] = "balanced"
    first: int = Field(default=0, ge=0, le=999)
    last: int = Field(default=999, ge=0, le=999)
    weighting: Literal["none", "bell", "measured"] = "none"

    @model_validator(mode="after")
    def _is_a_range(self) -> "TimestepSpec":
        if self.first > self.last:
            raise ValueError("the first timestep must not come after the last")
        return self


class OptimizeSpec(Spec):
    """The training itself. One step is one optimizer update: `batch_size * gradient_accumulation` samples a worker.

    `min_snr_gamma`: loss weights of Hang et al. 2023. `noise_offset`: std of a per-channel constant added to the noise.
    `ema_decay`: an average of the weights is kept, and is what previews show and the result holds. With
    `train_text_encoder` the text encoders get adapters too, at their own rate if one is given: those of them that
    `trained_text_encoders` counts. `bypass_guidance_embedding` trains FLUX.1 dev as if it knew no guidance scale.
    `regularisation_weight` multiplies the loss of regularisation pictures.
    `strategy`: with several workers each holds the whole model (ddp), or a share of the denoiser's weights (fsdp).
    """

    steps: int = Field(default=1000, ge=1, le=STEPS_MAX)
    batch_size: int = Field(default=1, ge=1, le=256)
    gradient_accumulation: int = Field(default=1, ge=1, le=1024)
    learning_rate: float = Field(default=1e-4, gt=0.0, le=10.0)
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    max_grad_norm: float = Field(default=1.0, gt=0.0, le=1e6)
    min_snr_gamma: float | None = Field(default=None, gt=0.0, le=1000.0)
    noise_offset: float = Field(default=0.0, ge=0.0, le=1.0)
    dtype: Literal["bf16", "fp32"] = "bf16"
    seed: Seed = 42
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    train_text_encoder: bool = False
    trained_text_encoders: tuple[Literal[1, 2], ...] = Field(default=(1, 2), max_length=2)
    bypass_guidance_embedding: bool = False
    text_encoder_learning_rate: float | None = Field(default=None, gt=0.0, le=10.0)
    timesteps: TimestepSpec = TimestepSpec()
    regularisation_weight: float = Field(default=1.0, ge=0.0, le=1000.0)
    gradient_checkpointing: bool = False
    compile: bool = False
    strategy: Literal["ddp", "fsdp"] = "ddp"

    @model_validator(mode="after")
    def _is_not_compiled_in_parts(self) -> "OptimizeSpec":
        if self.strategy == "fsdp" and self.compile:
            raise ValueError("a model that is split over workers (fsdp) cannot be compiled")
        return self

    @model_validator(mode="after")
    def _fits_prodigy(self) -> "OptimizeSpec":
        rate = self.text_encoder_learning_rate
        if self.optimizer.type == "prodigy" and rate is not None and rate != self.learning_rate:
            raise ValueError("Prodigy finds one rate for everything: the text encoder cannot have its own")
        return self


class ValidationSpec(Spec):
    """The loss on pictures that are not trained on, at fixed noise: every so many updates, and at the end.

    They are an uploaded dataset of their own, or a `share` of the training pictures. The checkpoint with the lowest
    loss is kept and marked; after `patience` losses in a row above it the training ends early, and the result is the
    adapter as it was at the lowest. `places` of 0..1 lie on the way from noise to picture.
    """

    dataset: DatasetSpec | None = None
    share: float = Field(default=0.1, gt=0.0, le=0.9)
    every_steps: int = Field(default=100, ge=1, le=1_000_000)
    patience: int | None = Field(default=None, ge=1, le=10_000)
    places: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], ...] = Field(
        default=(0.125, 0.375, 0.625, 0.875), min_length=1, max_length=32
    )


class SaveSpec(Spec):
    """Checkpoints: every so many steps, the newest `keep` of them kept. `dtype` is the exported adapter's."""

    every_steps: int = Field(default=250, ge=1, le=1_000_000)
    keep: int = Field(default=4, ge=1, le=1000)
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"


class PreviewSpec(Spec):
    """One preview picture. Empty fields take the values of the `SampleSpec` it stands in."""

    prompt: Prompt
    negative_prompt: Prompt | None = None
    width_px: SidePx | None = None
    height_px: SidePx | None = None
    seed: Seed | None = None
    guidance_scale: float | None = Field(default=None, ge=0.0, le=50.0)
    steps: int | None = Field(default=None, ge=1, le=500)
    lora_scale: float | None = Field(default=None, ge=-8.0, le=8.0)


class SampleSpec(Spec):
    """Preview pictures during the training; made by the serving engine, so a preview is what will be served."""

    previews: tuple[PreviewSpec, ...] = Field(default=(), max_length=64)
    every_steps: int = Field(default=250, ge=1, le=1_000_000)
    start_step: int = Field(default=0, ge=0, le=1_000_000)
    at_start: bool = True
    negative_prompt: Prompt = ""
    width_px: SidePx = 512
    height_px: SidePx = 512
    seed: Seed = 42
    walk_seed: bool = False
    guidance_scale: float = Field(default=7.0, ge=0.0, le=50.0)
    steps: int = Field(default=20, ge=1, le=500)
    lora_scale: float = Field(default=1.0, ge=-8.0, le=8.0)
    scheduler: str | None = Field(default=None, pattern=SCHEDULER_PATTERN)
    format: Literal["jpg", "png", "webp"] = "jpg"


def check_model_name(model: str, *, paths_allowed: bool) -> str | None:
    """Why `model` cannot name a base model, or None. A path is only accepted where `paths_allowed`."""
    if re.fullmatch(MODEL_ALIAS_PATTERN, model) or re.fullmatch(MODEL_ID_PATTERN, model):
        return None
    if paths_allowed and model and "\0" not in model:
        return None
    return "must be a model's name here or a Hugging Face id such as org/name; paths and URLs are not accepted"


class CaptioningSpec(Spec):
    """Captions for pictures without a text of their own, with `overwrite` for all, by an image-to-text model, which is
    named as a base model is. `prompt` is what it is asked (models of the BLIP kind go on from it). `prefix` and
    `suffix` are put around what it says as they are written.
    """

    model: str = Field(min_length=1, max_length=4096)
    prompt: Prompt | None = None
    prefix: str = Field(default="", max_length=500)
    suffix: str = Field(default="", max_length=500)
    max_new_tokens: int = Field(default=75, ge=1, le=1024)
    overwrite: bool = False


class QuantizeSpec(Spec):
    """Frozen weights in one byte each, see `diffusion.quantized`; None leaves them. `exclude` are patterns of layer
    names (`*` and `?`) that stay as they are. The adapter is always trained in full precision."""

    denoiser: Literal["float8", "int8", "int4"] | None = None
    text_encoders: Literal["float8", "int8", "int4"] | None = None
    exclude: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(default=(), max_length=64)

    @property
    def is_on(self) -> bool:
        return self.denoiser is not None or self.text_encoders is not None


class WorkersSpec(Spec):
    """How many workers train together: `max` where the cluster has room for them, and never less than `min`.

    A step is `max` workers' samples also where fewer train, so that the result does not depend on how many do. When
    workers are lost, the training goes on from its last checkpoint with those that the cluster has room for.
    """

    min: int = Field(default=1, ge=1, le=1024)
    max: int = Field(default=1, ge=1, le=1024)

    @model_validator(mode="after")
    def _is_a_range(self) -> "WorkersSpec":
        if self.min > self.max:
            raise ValueError("min must not be above max")
        return self


class WandbSpec(Spec):
    """The run at Weights & Biases that gets the training's numbers. `run` defaults to the training's name. The key is
    the installation's, never the request's."""

    project: str = Field(default="ai-toolkit", pattern=WANDB_NAME_PATTERN)
    run: str | None = Field(default=None, pattern=WANDB_NAME_PATTERN)


class TrainSpec(Spec):
    """A whole LoRA training. `model` is an alias the server knows or a Hugging Face id `org/name`.

    `family` is what the author takes the model for; a model of another family is then refused. Without `workers` there
    are as many as the instance is set to. `continues` is the id of a training of the same owner, from whose newest
    checkpoint this one goes on, to `train.steps` in all.
    """

    name: str = Field(pattern=NAME_PATTERN)
    model: str = Field(min_length=1, max_length=4096)
    datasets: tuple[DatasetSpec, ...] = Field(min_length=1, max_length=32)
    network: NetworkSpec = NetworkSpec()
    quantize: QuantizeSpec = QuantizeSpec()
    train: OptimizeSpec = OptimizeSpec()
    save: SaveSpec = SaveSpec()
    sample: SampleSpec = SampleSpec()
    validation: ValidationSpec | None = None
    captioning: CaptioningSpec | None = None
    workers: WorkersSpec | None = None
    wandb: WandbSpec | None = None
    family: str | None = Field(default=None, pattern=r"^[a-z0-9_]{1,40}$")
    trigger_word: str | None = Field(default=None, max_length=100)
    subject_id: str | None = Field(default=None, pattern=SUBJECT_PATTERN)
    continues: str | None = Field(default=None, pattern=r"^train_[0-9a-f]{12}$")

    @model_validator(mode="after")
    def _can_be_quantized(self) -> "TrainSpec":
        if self.quantize.is_on and self.network.type == "dora":
            raise ValueError("a quantised model cannot carry a DoRA, which needs its weights' lengths")
        return self

    @model_validator(mode="after")
    def _can_be_sharded(self) -> "TrainSpec":
        if self.train.strategy == "fsdp" and self.quantize.is_on:
            raise ValueError("a quantised model cannot be split over workers (fsdp): choose one of the two")
        if self.train.strategy == "fsdp" and self.network.type == "dora":
            raise ValueError("a model that is split over workers (fsdp) cannot carry a DoRA, which needs whole weights")
        return self

    @property
    def all_datasets(self) -> tuple[DatasetSpec, ...]:
        """Those trained on, then the one for validation."""
        own = self.validation.dataset if self.validation is not None else None
        return (*self.datasets, own) if own is not None else self.datasets
