"""torch.compile for a family's denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffusion.errors import SettingNotSupported
from diffusion.families.base import Family

GRAPHS_MAX = 128


def compile_denoiser(family: Family, backend: str) -> None:
    """The repeated blocks only: compile time falls several times at the same speed (diffusers' regional compilation).

    Raises SettingNotSupported for a denoiser that names no such blocks.
    """
    compile_blocks = getattr(family.denoiser, "compile_repeated_blocks", None)
    if compile_blocks is None:
        raise SettingNotSupported("compile", "this model's denoiser has no repeated blocks")
    compile_blocks(backend=backend, dynamic=False)


@contextmanager
def many_graphs() -> Iterator[None]:
    """Around calls of a compiled denoiser, on the thread that makes them: each thread has a setting of its own.

    A block is compiled once for each size of batch and level of the model; past the limit it would silently run
    uncompiled.
    """
    config = torch._dynamo.config
    with config.patch(recompile_limit=max(config.recompile_limit, GRAPHS_MAX)):
        yield
