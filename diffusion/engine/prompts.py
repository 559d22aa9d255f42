"""Encoded prompts: each distinct text once, remembered, with the text encoder's LoRAs of whoever asked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from diffusion.engine.admission import Admission, Cost
from diffusion.engine.lora_slots import LoraSlots
from diffusion.engine.packed import FileStamp
from diffusion.engine.sample import Sample
from diffusion.engine.slot_table import Combo
from diffusion.errors import InsufficientMemory
from diffusion.families.base import Family, TextEmbeds

CACHE_BYTES_MAX = 64 * 2**20
ROWS_MAX = 16
"""Prompts in one call of the text encoder."""
KIND = "encode"
Key = tuple[str, tuple[tuple[FileStamp, float], ...]]


class Prompts:
    """One per engine; what it remembers holds only while the text encoders' own weights stay as they are."""

    def __init__(
        self, family: Family, slots: LoraSlots, admission: Admission, *, cache_bytes_max: int = CACHE_BYTES_MAX
    ) -> None:
        self._family, self._slots, self._admission = family, slots, admission
        self._bytes_max = cache_bytes_max
        self._cache: OrderedDict[Key, TextEmbeds] = OrderedDict()
        denoiser = family.denoiser
        self._encoders = [name for name, module in family.lora_components.items() if module is not denoiser]

    def encode(self, samples: Sequence[Sample]) -> list[TextEmbeds]:
        """The rows of each sample: its negative prompt where it has one, then its prompt.

        Raises InsufficientMemory where a prompt is known not to fit, torch.OutOfMemoryError where one showed not to.
        """
        combos = [self._encoder_combo(sample.combo) for sample in samples]
        keys = [[_key(text, combo) for text in s.texts] for s, combo in zip(samples, combos, strict=True)]
        wanted = {key: combo for own, combo in zip(keys, combos, strict=True) for key in own}
        found = {key: self._cache[key] for key in wanted if key in self._cache}
        missing = [key for key in wanted if key not in found]
        while missing:
            count = self._admission.admits(KIND, min(len(missing), ROWS_MAX), Cost)
            found |= self._part(missing[:count], wanted)
            missing = missing[count:]
        self._remember(found)
        return [TextEmbeds.cat([found[key] for key in own]) for own in keys]

    def _part(self, part: Sequence[Key], combos: Mapping[Key, Combo]) -> dict[Key, TextEmbeds]:
        """In halves where memory did not suffice."""
        if len(part) == 1:
            shortage = self._admission.refusal(KIND, Cost)
            if shortage is not None and shortage.needed_bytes is not None and shortage.free_bytes is not None:
                raise InsufficientMemory(shortage.needed_bytes, shortage.free_bytes, "a prompt")
        try:
            with self._admission.learning(KIND, len(part)):
                embeds = self._encode([text for text, _ in part], [combos[key] for key in part])
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        else:
            # Copies: a view that is remembered would keep all prompts of the call in memory.
            return {key: embeds.rows([row]) for row, key in enumerate(part)}
        # Outside the except clause: a traceback would keep the failed call's tensors alive.
        self._admission.memory.give_back()
        half = len(part) // 2
        return self._part(part[:half], combos) | self._part(part[half:], combos)

    def _encode(self, texts: Sequence[str], combos: Sequence[Combo]) -> TextEmbeds:
        if any(combos):
            for name in self._encoders:
                self._slots.arrange(name, combos)
        else:
            self._slots.release(self._encoders)
        return self._family.encode_prompts(texts)

    def _encoder_combo(self, combo: Combo) -> Combo:
        return tuple((a, scale) for a, scale in combo if not a.components.isdisjoint(self._encoders))

    def _remember(self, found: dict[Key, TextEmbeds]) -> None:
        for key, embeds in found.items():
            self._cache[key] = embeds
            self._cache.move_to_end(key)
        total_bytes = sum(_size_bytes(embeds) for embeds in self._cache.values())
        while total_bytes > self._bytes_max:
            _, embeds = self._cache.popitem(last=False)
            total_bytes -= _size_bytes(embeds)


def _key(text: str, combo: Combo) -> Key:
    return text, tuple((adapter.stamp, scale) for adapter, scale in combo)


def _size_bytes(embeds: TextEmbeds) -> int:
    return sum(tensor.nbytes for tensor in embeds.tensors().values())
