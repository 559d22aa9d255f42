"""One denoiser call for a batch of pictures, each with its own LoRAs; in parts where memory does not suffice."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from diffusion.engine.admission import Admission, BatchLimits, Cost, Shortage
from diffusion.engine.first_block import ShortFamily, WatchedFamily
from diffusion.engine.lora_slots import LoraSlots
from diffusion.engine.sample import Sample
from diffusion.engine.slot_table import Combo
from diffusion.families.base import Family, TextEmbeds

Answer = TypeVar("Answer", bound=Tensor | None)
Call = Callable[[Sequence[Sample], Hashable], Sequence[Answer]]

WHOLE, FIRST_BLOCK = "whole", "first block"
TEXT_LENGTH_MIN = 64


class Denoiser:
    """``fixed_shapes``, for compiled modules: batches are padded to powers of two with rows that nobody looks at, and
    prompts that differ in length with tokens that their mask keeps out of sight."""

    def __init__(
        self, family: Family, slots: LoraSlots, limits: BatchLimits, admission: Admission, *, fixed_shapes: bool
    ) -> None:
        self._family, self._slots, self._limits, self._admission = family, slots, limits, admission
        self._fixed = fixed_shapes
        self._name = next(name for name, module in family.lora_components.items() if module is family.denoiser)
        self._texts: tuple[list[TextEmbeds], TextEmbeds] | None = None
        self.calls_total = 0

    def predict(self, samples: Sequence[Sample], *, table: Hashable) -> list[Tensor | Shortage]:
        """The answer for each sample, ``[rows, C, H, W]``; a Shortage for one that does not fit even alone.

        Samples with a block cache are first asked with their first block only; those for which that does not do join
        the others.
        """
        asked = [sample for sample in samples if sample.blocks is not None and sample.blocks.rest is not None]
        short = zip(asked, self._in_parts(FIRST_BLOCK, self._short, asked, table), strict=True)
        answers: dict[Sample, Tensor | Shortage] = {s: answer for s, answer in short if isinstance(answer, Tensor)}
        whole = [sample for sample in samples if sample not in answers]
        answers |= zip(whole, self._in_parts(WHOLE, self._whole, whole, table), strict=True)
        return [answers[sample] for sample in samples]

    def _in_parts(
        self, kind: str, call: Call[Answer], samples: Sequence[Sample], table: Hashable
    ) -> list[Answer | Shortage]:
        """As many at once as memory is expected to suffice for."""
        answers: list[Answer | Shortage] = []
        while len(answers) < len(samples):
            rest = samples[len(answers) :][: self._limits.of(table)]
            count = self._admission.admits(kind, len(rest), partial(self._cost, rest, (table, kind)))
            answers += self._part(kind, call, rest[:count], table)
        return answers

    def _part(
        self, kind: str, call: Call[Answer], samples: Sequence[Sample], table: Hashable, *, last_try: bool = False
    ) -> list[Answer | Shortage]:
        if len(samples) == 1:
            shortage = self._admission.refusal(kind, partial(self._cost, samples, (table, kind)))
            if shortage is not None:
                return [shortage]
        try:
            answers: list[Answer | Shortage] = list(call(samples, (table, kind)))
        except torch.OutOfMemoryError:
            self._limits.ran_out(table, len(samples))
        else:
            self._limits.fitted(table, len(samples))
            return answers
        # Outside the except clause: a traceback would keep the failed call's tensors alive.
        self._texts = None
        self._admission.memory.give_back()
        if len(samples) > 1:
            return self._in_parts(kind, call, samples, table)
        # Once more: what was missing may only have been in too many pieces, which are gone.
        return [self._admission.ran_out()] if last_try else self._part(kind, call, samples, table, last_try=True)

    def _whole(self, samples: Sequence[Sample], table: Hashable) -> Sequence[Tensor]:
        if all(sample.blocks is None for sample in samples):
            return self._call(WHOLE, samples, table, self._family)
        watched = WatchedFamily(self._family, self._family.picture_tokens(samples[0].shape))
        answers = self._call(WHOLE, samples, table, watched.family)
        rows = [sample.rows for sample in samples]
        firsts, rests = (torch.split(tensor[: sum(rows)], rows) for tensor in (watched.first, watched.rest))
        for sample, first_BLD, rest_BLD in zip(samples, firsts, rests, strict=True):
            if sample.blocks is not None:
                sample.blocks.remember(first_BLD, rest_BLD)
        return answers

    def _short(self, samples: Sequence[Sample], table: Hashable) -> Sequence[Tensor | None]:
        """None for a sample that must run whole."""
        caches = [sample.blocks for sample in samples if sample.blocks is not None]
        rest_BLD = torch.cat([cache.rest for cache in caches if cache.rest is not None])
        short = ShortFamily(self._family, self._family.picture_tokens(samples[0].shape), rest_BLD)
        answers = self._call(FIRST_BLOCK, samples, table, short.family)
        rows = [sample.rows for sample in samples]
        firsts = torch.split(short.first[: sum(rows)], rows)
        changes = [cache.change(first_BLD) for cache, first_BLD in zip(caches, firsts, strict=True)]
        # All in one answer: each that is asked for alone waits for the device.
        told = torch.stack(changes).tolist()
        reused = [change <= cache.threshold for cache, change in zip(caches, told, strict=True)]
        for cache, reuses in zip(caches, reused, strict=True):
            cache.steps_reused += reuses
        return [answer if reuses else None for answer, reuses in zip(answers, reused, strict=True)]

    def _call(self, kind: str, samples: Sequence[Sample], table: Hashable, family: Family) -> Sequence[Tensor]:
        self.calls_total += 1
        rows = [sample.rows for sample in samples]
        combos, padding = self._combos(samples)
        self._slots.arrange(self._name, combos, table=table)
        with self._admission.learning(kind, (sum(rows) + padding) * math.prod(samples[0].shape)):
            latents_BCHW = torch.cat([sample.denoiser_input() for sample in samples])
            conditions_B2 = torch.cat([sample.conditions for sample in samples])
            if padding:
                latents_BCHW, conditions_B2 = _padded(latents_BCHW, padding), _padded(conditions_B2, padding)
            timesteps_B, guidance_B = conditions_B2.unbind(1)
            text = self._text(samples, padding)
            predictions_BCHW = family.predict(latents_BCHW, timesteps_B, text, guidance_B=guidance_B)
        return torch.split(predictions_BCHW[: sum(rows)], rows)

    def _combos(self, samples: Sequence[Sample]) -> tuple[list[Combo], int]:
        """What each slot holds, and the rows that are added for a fixed shape."""
        rows = [sample.rows for sample in samples]
        uniform = min(rows) == max(rows)
        # A slot covers all rows of a picture where every picture has as many; else each row has its own.
        combos = [s.combo for s in samples for _ in range(1 if uniform else s.rows)]
        if not self._fixed:
            return combos, 0
        padding = (1 << (len(combos) - 1).bit_length()) - len(combos)
        return [*combos, *[()] * padding], padding * (rows[0] if uniform else 1)

    def _cost(self, samples: Sequence[Sample], table: Hashable, count: int) -> Cost:
        """Of a call of the first ``count``."""
        combos, padding = self._combos(samples[:count])
        rows = sum(sample.rows for sample in samples[:count]) + padding
        return Cost(rows * math.prod(samples[0].shape), self._slots.growth_bytes(self._name, combos, table=table))

    def _text(self, samples: Sequence[Sample], padding: int) -> TextEmbeds:
        """Stacked anew only when the batch has changed, which ``padding`` rows belong to."""
        parts = [sample.text for sample in samples if sample.text is not None]
        if self._texts is None or list(map(id, parts)) != list(map(id, self._texts[0])):
            self._texts = (parts, self._stacked(parts, padding))
        return self._texts[1]

    def _stacked(self, parts: Sequence[TextEmbeds], padding: int) -> TextEmbeds:
        text = TextEmbeds.cat(parts)
        if self._fixed and text.mask_BL is not None:
            text = text.padded_to(_text_length(text.hidden_BLD.shape[1]))
        if not padding:
            return text
        return TextEmbeds(**{name: _padded(tensor, padding) for name, tensor in text.tensors().items()})

    def forget(self) -> None:
        """Let go of the last batch's prompts."""
        self._texts = None


def _padded(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor[-1:].expand(rows, *tensor.shape[1:])])


def _text_length(tokens: int) -> int:
    """One of few lengths that is no smaller: powers of two. A picture has thousands of tokens beside them."""
    return max(TEXT_LENGTH_MIN, 1 << (tokens - 1).bit_length())
