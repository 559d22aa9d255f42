"""`POST /v1/hf/{model}`: the text-to-image call of Hugging Face's InferenceClient. The reply is the picture itself.

The client is given this route's URL as its model; it posts `{"inputs", "parameters"}` to it and opens the bytes that
come back.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from serve_app.errors import GenerationFailed
from serve_app.ingress.native.bodies import MODEL, LoraReference, reads, takes
from serve_app.ingress.native.calls import context_of
from serve_app.ingress.pictures import drawn
from serve_app.job_types.context import Services

_BYTES = {"schema": {"type": "string", "format": "binary"}}
PICTURE: dict[int | str, dict[str, Any]] = {200: {"description": "The picture.", "content": {"image/png": _BYTES}}}


class HuggingFaceParameters(BaseModel):
    """`loras` is an addition of this server; the client passes it as `extra_body={"parameters": {...}}`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    negative_prompt: str | None = Field(default=None, max_length=2000)
    width: int | None = Field(default=None, ge=16, le=4096)
    height: int | None = Field(default=None, ge=16, le=4096)
    num_inference_steps: int | None = Field(default=None, ge=1, le=500)
    guidance_scale: float | None = Field(default=None, ge=0.0, le=50.0)
    scheduler: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_+-]{1,50}$")
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    loras: tuple[LoraReference, ...] = Field(default=(), max_length=8)


class TextToImage(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [
                {
                    "inputs": "a large red star on a blue background",
                    "parameters": {"width": 64, "height": 64, "num_inference_steps": 6, "seed": 1},
                }
            ]
        },
    )

    inputs: str = Field(min_length=1, max_length=2000, pattern=r"\S")
    parameters: HuggingFaceParameters = HuggingFaceParameters()

    def payload(self, model: str) -> dict[str, Any]:
        """As the input of the job type `generate`."""
        fields = self.parameters.model_dump(mode="json", exclude_none=True)
        return {**fields, "prompt": self.inputs, "model": model, "wait": True}


def huggingface_router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/hf", tags=["huggingface"])

    @router.post("/{model:path}", openapi_extra=takes(TextToImage), response_class=Response, responses=PICTURE)
    async def text_to_image(
        request: Request,
        model: Annotated[str, Path(pattern=MODEL)],
        asked: Annotated[TextToImage, Depends(reads(TextToImage))],
    ) -> Response:
        """Draw one picture of a model: an alias of this server, or a Hugging Face id that it serves."""
        images = await drawn(services, await context_of(request), asked.payload(model))
        if not images:
            raise GenerationFailed("The generation left no picture")
        stored = images[0]
        picture = await services.store.get(stored["key"], expected_sha256=stored.get("sha256"))
        headers = {"X-Seed": str(stored["seed"])} if "seed" in stored else {}
        return Response(picture, media_type=str(stored.get("content_type") or "image/png"), headers=headers)

    return router
