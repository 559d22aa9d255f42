"""A generation's request with the pictures it starts from, understood as a whole or refused with all its problems."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve_app.collaborators import GenerationPlan
from serve_app.errors import InvalidRequest
from serve_app.inference.plan import STRENGTH, StartingPoint
from serve_app.validation.start_pictures import StartPictures
from serve_app.validation.validator import Validator
from train_jobs.errors import Problem

PICTURE_FIELDS = ("init_image", "mask")


class Generations:
    def __init__(self, validator: Validator, pictures: StartPictures) -> None:
        self._validator = validator
        self._pictures = pictures

    async def plan(self, tenant: str, process_id: str, payload: dict[str, Any]) -> GenerationPlan:
        """Stores the pictures below `process_id` where nothing is wrong.

        Raises InvalidRequest, ConfigInvalid, ModelNotServed, StorageError.
        """
        named = named_pictures(payload)
        problems: list[Problem] = []
        plan: GenerationPlan | None = None
        try:
            plan = await asyncio.to_thread(self._validator.generation, payload)
        except InvalidRequest as invalid:
            problems += invalid.problems
        if plan is not None and not named:
            return plan
        with tempfile.TemporaryDirectory(prefix="raylora-start-") as folder:
            checked, wrong = await self._pictures.check(tenant, named, Path(folder))
            if plan is None or wrong:
                raise InvalidRequest([*problems, *wrong])
            stored = await self._pictures.store(tenant, process_id, checked)
        start = StartingPoint(**stored, strength=STRENGTH if plan.strength is None else plan.strength)
        return replace(plan, start=start)


def named_pictures(payload: Mapping[str, Any]) -> dict[str, str]:
    """The fields that name a picture, and what is in them. What is no text is the validator's to refuse."""
    texts = {field: payload.get(field) for field in PICTURE_FIELDS}
    return {field: text for field, text in texts.items() if isinstance(text, str) and text}
