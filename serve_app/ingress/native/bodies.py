"""What the routes of `/v1` take, and how a body becomes it.

Bodies are read strictly, as JSON: "1" is no number here, an unknown field is an error, and 1.0 is a whole number, as in
JSON Schema. So what the OpenAPI document says about a body is all there is to know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from serve_app.errors import InvalidRequest
from serve_app.ingress.envelope import read_object
from serve_app.names import TENANT_PATTERN
from serve_app.policy import Policy
from serve_app.validation.file_checks import EXTENSIONS, FILE_BYTES_MAX, TOTAL_BYTES_MAX
from serve_app.validation.staged import OVER_SIZE, ZIP, is_over_size
from train_jobs.field_problems import problems_of
from train_jobs.spec import DATASET_PATTERN, MODEL_ALIAS_PATTERN, MODEL_ID_PATTERN, STEPS_MAX, TrainSpec

B = TypeVar("B", bound=BaseModel)


def _ending_in(endings: Sequence[str]) -> dict[str, Any]:
    """The schema of a file's name: a pattern without flags, which JSON Schema does not have."""
    alternatives = ("".join(f"[{letter}{letter.upper()}]" for letter in ending) for ending in endings)
    return {"pattern": rf"\.({'|'.join(alternatives)})$"}


POLICY_MIN_S = 5.0
POLICY_MAX_S = 7 * 24 * 3600.0
LORA_BYTES_MAX = 4 * 1024**3

MODEL = f"{MODEL_ALIAS_PATTERN}|{MODEL_ID_PATTERN}"
"""The pattern of a model's name here, or of a Hugging Face id."""
PICTURE = "Base64, a data URL, an https URL, or the key of one of your files (`s3_key`)."

TINY_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEUlEQVR42mP8z4AdMDEMKQkAzUEBD7t4NqoAAAAASUVORK5CYII="
"""A red picture of 8 x 8 pixels in base64, for examples."""

# A number that is written with a point or an exponent, and may be a whole one.
_WHOLE = re.compile(rb"[\s:,\[]-?\d[\d.]*(?:\.0|[eE])")
_DATASET_FILES, _UPLOAD_FILES = _ending_in(EXTENSIONS), _ending_in((*EXTENSIONS, ZIP))
REGISTERED: list[type[BaseModel]] = []
"""The models of all bodies, for the OpenAPI document."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class PolicyFields(Body):
    """How long the work may take and wait, in seconds; low priority runs when nothing else waits."""

    timeout_s: float | None = Field(default=None, ge=POLICY_MIN_S, le=POLICY_MAX_S)
    ttl_s: float | None = Field(default=None, ge=POLICY_MIN_S, le=POLICY_MAX_S)
    low_priority: bool = False

    def policy(self) -> Policy:
        return Policy(execution_timeout_s=self.timeout_s, ttl_s=self.ttl_s, low_priority=self.low_priority)


class TrainingCreate(PolicyFields):
    """Exactly one of `spec` and `config`. `config` is an ai-toolkit configuration: YAML text, or the same as JSON."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["spec"], "properties": {"spec": {"type": "object"}}},
                {"required": ["config"], "properties": {"config": {"type": ["string", "object"]}}},
            ],
            "examples": [
                {
                    "spec": {
                        "name": "my-zib",
                        "model": "tiny",
                        "datasets": [{"dataset": "zib", "resolutions_px": [64]}],
                        "network": {"rank": 4},
                        "train": {"steps": 200, "batch_size": 4, "learning_rate": 0.003},
                    }
                }
            ],
        }
    )

    spec: TrainSpec | None = None
    config: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_one_of_them(self) -> TrainingCreate:
        if (self.spec is None) == (self.config is None):
            raise ValueError("give either spec or config")
        return self


class TrainingContinue(PolicyFields):
    """`steps` is the number of steps in all, those that are done included; left out, it is the first training's own."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"steps": 400}]})

    steps: int | None = Field(default=None, ge=1, le=1_000_000)


FIRST_BLOCK_CACHE = (
    "Lossy and faster: a step whose first block adds nearly what it added in the last whole step, up to this relative "
    "difference (0.05 to 0.2 are usual), reuses the other blocks' work of then. 0 is exact; left out, the server's own "
    "setting counts. Only for transformers (FLUX.1, FLUX.2, SD 3, Qwen-Image, Z-Image)."
)


class LoraReference(Body):
    """`id` of an adapter here: a training's, or an imported one's. With `step` it is that of the training's checkpoint
    at that step, also while it runs."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")
    step: int | None = Field(default=None, ge=0, le=STEPS_MAX, exclude_if=lambda step: step is None)
    scale: float = Field(default=1.0, ge=-8.0, le=8.0)


class GenerationCreate(PolicyFields):
    """`num_images` pictures of one prompt; picture `i` uses seed `seed + i`. What is left out is the model's own.

    With an `init_image` they start from that picture, resized to `width` x `height`; of these, what is left out follows
    from the picture: its own size, at most 1536 on the longer side, or its proportions where one side is given, rounded
    down to what the model makes. `strength` is the share of the steps that is done. With a `mask`, resized likewise,
    only where it is light is anything changed.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["init_image"], "properties": {"init_image": {"type": "string"}}},
                {"properties": {"mask": {"type": "null"}, "strength": {"type": "null"}}},
            ],
            "examples": [
                {
                    "prompt": "a large red star on a blue background",
                    "width": 64,
                    "height": 64,
                    "num_inference_steps": 6,
                    "seed": 1,
                    "loras": [{"id": "train_0123456789ab", "scale": 0.8}],
                }
            ],
        }
    )

    prompt: str = Field(min_length=1, max_length=2000, pattern=r"\S")
    negative_prompt: str = Field(default="", max_length=2000)
    model: str | None = Field(default=None, pattern=MODEL)
    width: int | None = Field(default=None, ge=16, le=4096)
    height: int | None = Field(default=None, ge=16, le=4096)
    num_inference_steps: int | None = Field(default=None, ge=1, le=500)
    guidance_scale: float | None = Field(default=None, ge=0.0, le=50.0)
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    num_images: int = Field(default=1, ge=1, le=64)
    scheduler: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_+-]{1,50}$")
    first_block_cache: float | None = Field(default=None, ge=0.0, le=1.0, description=FIRST_BLOCK_CACHE)
    output_format: Literal["png", "jpg", "webp"] = "png"
    loras: tuple[LoraReference, ...] = Field(default=(), max_length=8)
    init_image: str | None = Field(default=None, min_length=1, repr=False, description=PICTURE)
    mask: str | None = Field(default=None, min_length=1, repr=False, description=f"Needs an `init_image`. {PICTURE}")
    strength: float | None = Field(default=None, gt=0.0, le=1.0, description="Needs an `init_image`; 0.8 by default.")

    def payload(self) -> dict[str, Any]:
        """As the input of the job type `generate`."""
        fields = self.model_dump(mode="json", exclude={"timeout_s", "ttl_s", "low_priority"}, exclude_none=True)
        return {**fields, "wait": True}


class ApiKeyCreate(Body):
    """A key that speaks for `tenant`, the caller's own by default. `name` is for people, to tell keys apart."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "studio", "tenant": "ada"}]})

    name: str = Field(min_length=1, max_length=100, pattern=r"\S")
    tenant: str | None = Field(default=None, pattern=TENANT_PATTERN)


class DatasetFileCreate(Body):
    """A picture, or its caption under the same name with `.txt`. `content` is base64.

    A file's name is letters and digits of any script, spaces and plain punctuation.
    """

    filename: str = Field(min_length=1, max_length=200, json_schema_extra=_DATASET_FILES)
    content: str = Field(repr=False, json_schema_extra={"contentEncoding": "base64"})


class DatasetCreate(Body):
    """Files of one data set. With `replace` false, files of its newest upload stay beside these."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "zib",
                    "trigger_word": "zib",
                    "files": [
                        {"filename": "1.png", "content": TINY_PNG},
                        {"filename": "1.txt", "content": "YSB6aWI="},
                    ],
                }
            ]
        }
    )

    name: str = Field(pattern=r"^[a-zA-Z0-9_][a-zA-Z0-9_-]{0,99}$")
    trigger_word: str | None = Field(default=None, max_length=100)
    replace: bool = True
    files: tuple[DatasetFileCreate, ...] = Field(min_length=1, max_length=100)

    def payload(self) -> dict[str, Any]:
        """As the input of the job type `upload_training_data`."""
        return {
            "training_name": self.name,
            "dataset_folder": self.name,
            "trigger_word": self.trigger_word,
            "cleanup_existing": self.replace,
            "files": [file.model_dump() for file in self.files],
        }


class UploadFileCreate(Body):
    """A file to come; only a zip may be over 100 MB. `sha256` in hex, checked where it is given."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"size_bytes": {"maximum": FILE_BYTES_MAX}}},
                {"properties": {"filename": _ending_in((ZIP,))}},
            ]
        }
    )

    filename: str = Field(min_length=1, max_length=200, json_schema_extra=_UPLOAD_FILES)
    size_bytes: int = Field(ge=1, le=TOTAL_BYTES_MAX)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @field_validator("size_bytes")
    @classmethod
    def _is_a_size_of_its_kind(cls, size_bytes: int, info: ValidationInfo) -> int:
        if is_over_size(info.data.get("filename", ""), size_bytes):
            raise ValueError(OVER_SIZE)
        return size_bytes


class UploadCreate(Body):
    """Files of one data set, to be sent beside the request; 500 MB in all."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"name": "zib", "trigger_word": "zib", "files": [{"filename": "zib.zip", "size_bytes": 81_234}]}
            ]
        }
    )

    name: str = Field(pattern=r"^[a-zA-Z0-9_][a-zA-Z0-9_-]{0,99}$")
    trigger_word: str | None = Field(default=None, max_length=100)
    replace: bool = True
    files: tuple[UploadFileCreate, ...] = Field(min_length=1, max_length=100)

    def payload(self) -> dict[str, Any]:
        """As the input of the job type `create_upload`."""
        return {
            "training_name": self.name,
            "dataset_folder": self.name,
            "trigger_word": self.trigger_word,
            "cleanup_existing": self.replace,
            "files": [
                {"filename": file.filename, "size": file.size_bytes, "sha256": file.sha256} for file in self.files
            ],
        }


class LoraImportCreate(Body):
    """An adapter file to come: safetensors, under the names of diffusers, peft, kohya, ai-toolkit, ComfyUI or LyCORIS.
    `sha256` in hex, checked where given. The file is checked against `base_model` where that is a model served here."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "paper-cut", "filename": "paper-cut.safetensors", "size_bytes": 37_866_432}]
        }
    )

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    filename: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,150}\.safetensors$")
    size_bytes: int = Field(ge=1, le=LORA_BYTES_MAX)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    base_model: str | None = Field(default=None, max_length=200)
    trigger_word: str | None = Field(default=None, max_length=100)


def reads(kind: type[B]) -> Callable[[Request], Awaitable[B]]:
    """A dependency: the request's body as `kind`. Raises BodyInvalid, InvalidRequest with every problem."""
    if kind not in REGISTERED:
        REGISTERED.append(kind)

    async def read(request: Request) -> B:
        body = await request.body()
        document = read_object(body)
        if _WHOLE.search(body):
            body = json.dumps(_with_integers(document)).encode()
        try:
            return kind.model_validate_json(body, strict=True)
        except ValidationError as invalid:
            raise InvalidRequest(problems_of(invalid, kind)) from None

    return read


def _with_integers(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, dict):
        return {name: _with_integers(item) for name, item in value.items()}
    return [_with_integers(item) for item in value] if isinstance(value, list) else value


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a body of this kind."""
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


DATASET_NAME = DATASET_PATTERN
