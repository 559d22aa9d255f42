"""Which of a model's layers a module of a LoRA file is for. Names and shapes alone, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from diffusion.errors import LoraMismatch
from diffusion.lora_keys import DENOISER, shown, target_of
from diffusion.original_names import Layers, joined_names
from diffusion.sgm_names import sgm_names

Shapes = Mapping[str, Sequence[int]]
"""``[out, in, ...]`` of the weights of the layers that can carry an adapter, by path in their component."""
_CLIP = "text_model."


class LayerNames:
    """Of one component: every name that a file may have for its layers."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._names = {path.replace(".", "_"): Layers((path,)) for path in shapes}
        for path in shapes:
            # transformers 5 dropped a level of CLIP's paths, which files may or may not have.
            if path.startswith(_CLIP):
                self._add(path.removeprefix(_CLIP), Layers((path,)))
            elif path.startswith("encoder.layers."):
                self._add(f"{_CLIP}{path}", Layers((path,)))
        for path, name in sgm_names(shapes).items():
            self._add(name, Layers((path,)))
        for name, layers in joined_names(shapes).items():
            self._add(name, layers)

    def _add(self, name: str, layers: Layers) -> None:
        """A name of the model's own goes before."""
        self._names.setdefault(name.replace(".", "_"), layers)

    def find(self, path: str) -> Layers | None:
        """``path`` has dots, or underscores in their place."""
        return self._names.get(path.replace(".", "_"))

    def shape(self, path: str) -> tuple[int, ...] | None:
        """Of the weight that a file has a module ``path`` for, ``[out, in, ...]``: of all its layers together."""
        layers = self.find(path)
        if layers is None:
            return None
        outs = sum(self._shapes[at][0] for at in layers.paths)
        return outs, *self._shapes[layers.paths[0]][1:]

    def __iter__(self) -> Iterator[str]:
        """With underscores."""
        return iter(self._names)


def component_of(module: str, components: Sequence[str]) -> tuple[str, str]:
    """The component that a module of a file is for, of a model that has these, its denoiser first; and the path there.

    Raises LoraInvalid, and LoraMismatch where the model has no such component.
    """
    target = target_of(module)
    if target.component == DENOISER:
        return components[0], target.path
    if target.component not in components:
        raise LoraMismatch(f"it adapts {target.component!r} ({shown(module)}), which this model does not have")
    return target.component, target.path
