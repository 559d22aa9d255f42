"""What a generation is asked to do: frozen, validated, plain JSON. No torch here: the HTTP ingress imports this."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from train_jobs.spec import LORA_ID_PATTERN, SCHEDULER_PATTERN, STEPS_MAX, Prompt, Seed, SidePx, Spec, check_model_name

Steps = Annotated[int, Field(ge=1, le=500)]
Guidance = Annotated[float, Field(ge=0.0, le=50.0)]
PictureCount = Annotated[int, Field(ge=1, le=64)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class LoraUse(Spec):
    """A trained adapter by id, and how strongly it is applied. `step` names that of a training's checkpoint."""

    id: str = Field(pattern=LORA_ID_PATTERN)
    step: int | None = Field(default=None, ge=0, le=STEPS_MAX, exclude_if=lambda step: step is None)
    scale: float = Field(default=1.0, ge=-8.0, le=8.0)


class GenerateSpec(Spec):
    """Pictures to make: `num_images` for each prompt. Picture `i` of all uses seed `seed + i`; no seed is random.

    No `width` or `height` is the model's own. `first_block_cache` is the threshold up to which a step reuses an earlier
    one's blocks, 0 for none; None is the server's own.
    """

    prompts: tuple[Prompt, ...] = Field(min_length=1, max_length=64)
    negative_prompt: Prompt = ""
    model: str | None = Field(default=None, max_length=200)
    width: SidePx | None = None
    height: SidePx | None = None
    num_inference_steps: Steps = 30
    guidance_scale: Guidance = 7.5
    seed: Seed | None = None
    num_images: PictureCount = 1
    scheduler: str | None = Field(default=None, pattern=SCHEDULER_PATTERN)
    first_block_cache: Share | None = None
    loras: tuple[LoraUse, ...] = Field(default=(), max_length=8)
    output_format: Literal["png", "jpg", "webp"] = "png"

    @field_validator("model")
    @classmethod
    def _model_is_a_name(cls, model: str | None) -> str | None:
        reason = None if model is None else check_model_name(model, paths_allowed=False)
        if reason is not None:
            raise ValueError(reason)
        return model

    @model_validator(mode="after")
    def _is_bounded(self) -> "GenerateSpec":
        if len(self.prompts) * self.num_images > 64:
            raise ValueError("prompts times num_images may be at most 64")
        if any(not p.strip() for p in self.prompts):
            raise ValueError("a prompt cannot be empty")
        return self
