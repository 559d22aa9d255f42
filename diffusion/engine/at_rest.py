"""Modules as pictures need them: in eval mode, without an adapter that is being trained; and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusion.adapter import adapter_layers
from diffusion.families.base import Family


@contextmanager
def at_rest(family: Family) -> Iterator[None]:
    """Inside, no module drops out and no peft adapter is on. After it, modes, adapters and gradients are as before."""
    components = family.lora_components.values()
    training = [module for component in components for module in component.modules() if module.training]
    layers = [layer for component in components for layer in adapter_layers(component)]
    states = [(layer, list(layer.active_adapters), bool(layer.disable_adapters)) for layer in layers]
    gradients = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for module in training:
        module.training = False
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, active, disabled in states:
            layer.enable_adapters(not disabled)
            layer.set_adapter(active, inference_mode=True)
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
        for module in training:
            module.training = True
