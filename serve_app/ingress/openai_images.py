"""`POST /v1/images/generations`: OpenAI's images schema, for its own client libraries.

`seed`, `loras`, `steps`, `guidance_scale` and `negative_prompt` come as extra body fields. A field that changes
nothing here (`user`, `quality`, ...) is taken; one that would promise another picture is refused by name.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from serve_app.ingress.native.bodies import MODEL, LoraReference, reads, takes
from serve_app.ingress.native.calls import context_of
from serve_app.ingress.native.views import View
from serve_app.ingress.pictures import drawn
from serve_app.job_types.context import Services

_SIDE = "(1[6-9]|[2-9][0-9]|[1-9][0-9]{2}|[1-3][0-9]{3}|40[0-8][0-9]|409[0-6])"
SIZE = rf"^(auto|{_SIDE}x{_SIDE})$"
FORMATS = {"png": "png", "jpeg": "jpg", "webp": "webp"}


class ImagesCreate(BaseModel):
    """`size` is WIDTHxHEIGHT or `auto`, the model's own. No `seed` is a random one, told in the reply."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "prompt": "a large red star on a blue background",
                    "model": "tiny",
                    "n": 1,
                    "size": "64x64",
                    "response_format": "b64_json",
                    "seed": 1,
                    "steps": 6,
                    "loras": [{"id": "train_0123456789ab", "scale": 0.8}],
                }
            ]
        },
    )

    prompt: str = Field(min_length=1, max_length=2000, pattern=r"\S")
    model: str | None = Field(default=None, pattern=MODEL)
    n: int | None = Field(default=None, ge=1, le=10)
    size: str | None = Field(default=None, pattern=SIZE, examples=["1024x1024", "auto"])
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    steps: int | None = Field(default=None, ge=1, le=500)
    guidance_scale: float | None = Field(default=None, ge=0.0, le=50.0)
    negative_prompt: str | None = Field(default=None, max_length=2000)
    loras: tuple[LoraReference, ...] = Field(default=(), max_length=8)
    # Taken, and without effect.
    user: str | None = Field(default=None, max_length=500)
    safety_identifier: str | None = Field(default=None, max_length=500)
    moderation: Literal["low", "auto"] | None = None
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100)
    partial_images: int | None = Field(default=None, ge=0, le=3)
    background: Literal["opaque", "auto"] | None = None
    stream: Literal[False] | None = None

    def payload(self) -> dict[str, Any]:
        """As the input of the job type `generate`."""
        size: dict[str, int] = {}
        if self.size not in (None, "auto"):
            width, height = map(int, str(self.size).split("x"))
            size = {"width": width, "height": height}
        fields = {
            "prompt": self.prompt,
            "model": self.model,
            "num_images": self.n,
            "output_format": FORMATS[self.output_format or "png"],
            "seed": self.seed,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "loras": [lora.model_dump() for lora in self.loras],
            "wait": True,
            **size,
        }
        return {name: value for name, value in fields.items() if value is not None}


class ImageData(View):
    """`url` or `b64_json`, as was asked; `seed` makes the same picture again."""

    url: str | None = None
    b64_json: str | None = None
    revised_prompt: str | None = None
    seed: int | None = None


class ImagesReply(View):
    """`created` is in seconds since 1970."""

    created: int
    output_format: str
    data: list[ImageData]


def openai_router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/images", tags=["openai"])

    @router.post("/generations", openapi_extra=takes(ImagesCreate), response_model_exclude_none=True)
    async def create_images(
        request: Request, asked: Annotated[ImagesCreate, Depends(reads(ImagesCreate))]
    ) -> ImagesReply:
        """Draw pictures and answer with them. A client that goes away cancels the work."""
        images = await drawn(services, await context_of(request), asked.payload())
        in_body = asked.response_format == "b64_json"
        return ImagesReply(
            created=int(services.clock().timestamp()),
            output_format=asked.output_format or "png",
            data=[await _data(services, stored, in_body=in_body) for stored in images],
        )

    return router


async def _data(services: Services, stored: dict[str, Any], *, in_body: bool) -> ImageData:
    if in_body:
        picture = await services.store.get(stored["key"], expected_sha256=stored.get("sha256"))
        return ImageData(b64_json=base64.b64encode(picture).decode(), seed=stored.get("seed"))
    url = await services.store.presign_get(
        stored["key"], expires_s=services.limits.url_expires_s, filename=stored.get("filename")
    )
    return ImageData(url=url, seed=stored.get("seed"))
