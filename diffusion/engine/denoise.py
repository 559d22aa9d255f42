"""One denoiser call for a batch of pictures, each with its own LoRAs; in halves where memory does not suffice."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from diffusion.engine.lora_slots import LoraSlots
from diffusion.engine.memory import BatchLimits
from diffusion.engine.sample import Sample
from diffusion.families.base import Family, TextEmbeds


class Denoiser:
    """``fixed_shapes``: batches are padded to powers of two with rows that nobody looks at, for compiled modules."""

    def __init__(self, family: Family, slots: LoraSlots, limits: BatchLimits, *, fixed_shapes: bool) -> None:
        self._family, self._slots, self._limits = family, slots, limits
        self._fixed = fixed_shapes
        self._name = next(name for name, module in family.lora_components.items() if module is family.denoiser)
        self._texts: tuple[list[TextEmbeds], TextEmbeds] | None = None
        self.calls_total = 0

    def predict(self, samples: Sequence[Sample], *, table: Hashable) -> list[Tensor | None]:
        """The answer for each sample, ``[rows, C, H, W]``; None for one that does not fit even alone."""
        limit = self._limits.of(table)
        if len(samples) > limit:
            chunks = [samples[first : first + limit] for first in range(0, len(samples), limit)]
            return [answer for chunk in chunks for answer in self.predict(chunk, table=table)]
        try:
            answers: list[Tensor | None] = list(self._call(samples, table))
        except torch.OutOfMemoryError:
            self._limits.ran_out(table, len(samples))
        else:
            self._limits.fitted(table, len(samples))
            return answers
        # Outside the except clause: a traceback would keep the failed call's tensors alive.
        self._texts = None
        torch.cuda.empty_cache()  # does nothing where there is no CUDA
        if len(samples) == 1:
            return [None]
        return self.predict(samples, table=table)

    def _call(self, samples: Sequence[Sample], table: Hashable) -> Sequence[Tensor]:
        self.calls_total += 1
        rows = [sample.rows for sample in samples]
        uniform = min(rows) == max(rows)
        # A slot covers all rows of a picture where every picture has as many; else each row has its own.
        combos = [s.combo for s in samples for _ in range(1 if uniform else s.rows)]
        padding = 0
        if self._fixed:
            padding = (1 << (len(combos) - 1).bit_length()) - len(combos)
            combos += [()] * padding
            padding *= rows[0] if uniform else 1
        self._slots.arrange(self._name, combos, table=table)
        latents_BCHW = torch.cat([sample.denoiser_input() for sample in samples])
        per_sample = torch.tensor([[float(s.timestep), s.request.guidance_scale] for s in samples])
        # [samples, 2] -> one per row, in one transfer
        per_row = per_sample.repeat_interleave(torch.tensor(rows), dim=0).to(self._family.device)
        text = self._text(samples)
        if padding:
            latents_BCHW, per_row = _padded(latents_BCHW, padding), _padded(per_row, padding)
            text = TextEmbeds(**{name: _padded(tensor, padding) for name, tensor in text.tensors().items()})
        timesteps_B, guidance_B = per_row.unbind(1)
        predictions_BCHW = self._family.predict(latents_BCHW, timesteps_B, text, guidance_B=guidance_B)
        return torch.split(predictions_BCHW[: sum(rows)], rows)

    def _text(self, samples: Sequence[Sample]) -> TextEmbeds:
        """Stacked anew only when the batch has changed."""
        parts = [sample.text for sample in samples if sample.text is not None]
        if self._texts is None or list(map(id, parts)) != list(map(id, self._texts[0])):
            self._texts = (parts, TextEmbeds.cat(parts))
        return self._texts[1]

    def forget(self) -> None:
        """Let go of the last batch's prompts."""
        self._texts = None


def _padded(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor[-1:].expand(rows, *tensor.shape[1:])])
