"""The `input` of the job types with many fields, as schemas. What is not listed is a warning, not an error."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from storage.keys import composed
from train_jobs.generate_spec import Guidance, PictureCount, Share, Steps
from train_jobs.spec import DATASET_PATTERN, LORA_ID_PATTERN, STEPS_MAX, SidePx

FILES_MAX = 100

Filename = Annotated[
    str,
    Field(min_length=1, max_length=200),
    BeforeValidator(lambda value: composed(value) if isinstance(value, str) else value),
]
"""Every file's name that a request brings, in the one form that is stored and compared."""


class LoraChoice(BaseModel):
    """An adapter: `id` of the training it comes from, or `path` of its file within the tenant's storage. With `step` it
    is that of the training's checkpoint at that step, also while it runs."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    id: str | None = Field(default=None, pattern=LORA_ID_PATTERN)
    step: int | None = Field(default=None, ge=0, le=STEPS_MAX)
    path: str | None = Field(default=None, min_length=1, max_length=1200)
    scale: float = Field(default=1.0, ge=-8.0, le=8.0)

    @model_validator(mode="after")
    def _has_one_source(self) -> "LoraChoice":
        if (self.id is None) == (self.path is None):
            raise ValueError("give either id or path")
        if self.step is not None and self.id is None:
            raise ValueError("step needs the id of a training")
        return self


class GeneratePayload(BaseModel):
    """The `prompt` form. `lora` and `model_path` are the short forms of one entry of `loras`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())

    type: Literal["generate"] | None = None
    wait: bool | None = None
    prompt: str = Field(min_length=1, max_length=2000)
    negative_prompt: str | None = None
    model: str | None = None
    width: SidePx | None = None
    height: SidePx | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    seed: int | None = None
    num_images: PictureCount | None = None
    scheduler: str | None = None
    first_block_cache: Share | None = None
    output_format: str | None = None
    loras: list[LoraChoice] = Field(default_factory=list, max_length=8)
    lora: LoraChoice | None = None
    model_path: str | None = Field(default=None, min_length=1, max_length=1200)
    init_image: str | None = Field(default=None, min_length=1, repr=False)
    mask: str | None = Field(default=None, min_length=1, repr=False)
    strength: float | None = Field(default=None, gt=0.0, le=1.0)

    @field_validator("lora", mode="before")
    @classmethod
    def _a_text_is_an_id(cls, value: Any) -> Any:
        return {"id": value} if isinstance(value, str) else value

    @field_validator("loras", mode="before")
    @classmethod
    def _texts_are_ids(cls, value: Any) -> Any:
        if value is None:
            return []
        return [{"id": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value

    def choices(self) -> list[LoraChoice]:
        """All adapters named in any of the three ways."""
        short = [] if self.lora is None else [self.lora]
        by_path = [] if self.model_path is None else [LoraChoice(path=self.model_path)]
        return [*self.loras, *short, *by_path]


class UploadFile(BaseModel):
    """One file, its bytes in base64."""

    model_config = ConfigDict(extra="allow")

    filename: Filename
    content: str | None = Field(default=None, repr=False)
    url: str | None = None
    content_type: str | None = Field(default=None, max_length=100)


class DatasetFields(BaseModel):
    """Which dataset an upload makes."""

    model_config = ConfigDict(extra="allow")

    training_name: str = Field(pattern=r"^[a-zA-Z0-9_-]+$", max_length=100)
    dataset_folder: str | None = Field(default=None, pattern=DATASET_PATTERN, max_length=150)
    trigger_word: str | None = Field(default=None, max_length=100)
    cleanup_existing: bool = True

    @property
    def folder(self) -> str:
        return self.dataset_folder or self.training_name


class UploadPayload(DatasetFields):
    type: Literal["upload_training_data", "upload_training_files"] | None = None
    files: list[UploadFile] = Field(min_length=1, max_length=FILES_MAX)


class StagedFile(BaseModel):
    """A file that is to be PUT; `sha256` in hex, checked where it is given."""

    model_config = ConfigDict(extra="allow")

    filename: Filename
    size: int = Field(gt=0)
    content_type: str | None = Field(default=None, max_length=100)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class CreateUploadPayload(DatasetFields):
    type: Literal["create_upload"] | None = None
    files: list[StagedFile] = Field(min_length=1, max_length=FILES_MAX)


class FinalizePayload(BaseModel):
    model_config = ConfigDict(extra="allow")

    token: str = Field(min_length=1, max_length=100)
