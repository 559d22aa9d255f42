"""The LoRAs an engine has loaded onto its family's modules: cached by file, few at a time, off outside ``active``."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn

from diffusion.adapter import adapter_layers, inject_adapter, remove_adapter
from diffusion.engine.request import LoraRef
from diffusion.errors import LoraInvalid
from diffusion.families.base import Family
from diffusion.lora import LoraLayer, fit_layers, read_lora

FileStamp = tuple[str, int, int]
"""Path, modification time in nanoseconds and size in bytes: another file under the same name is another LoRA."""


class LoraPool:
    """Keeps up to ``loras_max`` adapters; the least recently used one leaves first.

    Adapters that someone else put on the modules (one in training) are switched off inside ``active`` and are back,
    with their gradients, after it. Files are read in whole; errors leave the pool and the modules as they were.
    """

    def __init__(self, family: Family, loras_max: int = 4) -> None:
        self._family = family
        self._loras_max = loras_max
        self._names: OrderedDict[FileStamp, str] = OrderedDict()
        self._loads_total = 0

    def __len__(self) -> int:
        return len(self._names)

    @contextmanager
    def active(self, loras: Sequence[LoraRef]) -> Iterator[None]:
        """Inside, the family's modules answer with exactly these LoRAs. Raises LoraInvalid, LoraMismatch.

        The same file given twice counts with the sum of its scales.
        """
        before = _Snapshot(self._family)
        try:
            scales: dict[str, float] = {}
            stamps = [_stamp(lora.path) for lora in loras]
            for lora, stamp in zip(loras, stamps, strict=True):
                name = self._names.get(stamp) or self._load(stamp)
                self._names.move_to_end(stamp)
                scales[name] = scales.get(name, 0.0) + lora.scale
            self._evict(keep=set(stamps))
            _switch(self._family, scales)
            yield
        finally:
            before.restore()

    def clear(self) -> None:
        """Take every adapter of the pool off the modules."""
        self._evict(keep=set(), loras_max=0)

    def _load(self, stamp: FileStamp) -> str:
        fitted = fit_layers(read_lora(Path(stamp[0])), self._family.lora_components)
        self._loads_total += 1
        name = f"pool_{self._loads_total}"
        try:
            for component, layers in fitted.items():
                _inject(self._family.lora_components[component], name, layers)
        except BaseException:
            self._remove(name)
            raise
        self._names[stamp] = name
        return name

    def _evict(self, keep: set[FileStamp], loras_max: int | None = None) -> None:
        excess = len(self._names) - (self._loras_max if loras_max is None else loras_max)
        for stamp in [stamp for stamp in self._names if stamp not in keep][: max(0, excess)]:
            self._remove(self._names.pop(stamp))

    def _remove(self, name: str) -> None:
        for component in self._family.lora_components.values():
            remove_adapter(component, name)


class _Snapshot:
    """Which adapters are on, and which parameters want gradients, to put back."""

    def __init__(self, family: Family) -> None:
        self._family = family
        layers = [layer for component in family.lora_components.values() for layer in adapter_layers(component)]
        self._states = [(layer, list(layer.active_adapters), bool(layer.disable_adapters)) for layer in layers]
        self._gradients = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]

    def restore(self) -> None:
        _switch(self._family, {})
        for layer, active, disabled in self._states:
            layer.enable_adapters(not disabled)
            layer.set_adapter(active, inference_mode=True)
        for parameter, requires_grad in self._gradients:
            parameter.requires_grad_(requires_grad)


def _stamp(path: Path) -> FileStamp:
    try:
        status = path.stat()
    except OSError as exc:
        raise LoraInvalid("the file does not exist") from exc
    return str(path), status.st_mtime_ns, status.st_size


def _switch(family: Family, scales: Mapping[str, float]) -> None:
    """Exactly these adapters on, at these scales; with none, the layers call their base layer and nothing else."""
    for component in family.lora_components.values():
        for layer in adapter_layers(component):
            layer.enable_adapters(bool(scales))
            layer.set_adapter(list(scales), inference_mode=True)
            for name, scale in scales.items():
                layer.set_scale(name, scale)


def _inject(component: nn.Module, name: str, layers: Mapping[str, LoraLayer]) -> None:
    """What diffusers' ``load_lora_adapter`` does, for any module and with alphas from any file format."""
    weight: Any = next(component.parameters())
    state = {}
    for path, layer in layers.items():
        state[f"{path}.lora_A.weight"] = layer.A.to(weight.device, weight.dtype)
        state[f"{path}.lora_B.weight"] = layer.B.to(weight.device, weight.dtype)
    inject_adapter(component, name, _config(layers), state)


def _config(layers: Mapping[str, LoraLayer]) -> LoraConfig:
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(layers),
        rank_pattern={f"^{re.escape(path)}": layer.rank for path, layer in layers.items() if layer.rank != rank},
        alpha_pattern={f"^{re.escape(path)}": layer.alpha for path, layer in layers.items() if layer.alpha != alpha},
        inference_mode=True,
    )
