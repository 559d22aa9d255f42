"""Reading a model's weights before they are loaded, so that the system has them in memory by then.

diffusers and transformers change settings of the whole process while they load (the default dtype, how modules take
parameters), so that nothing else may run on the replica meanwhile: it is not to wait for a disk as well.
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import psutil

from diffusion.errors import DiffusionError
from diffusion.families import family_of

logger = logging.getLogger(__name__)

READ_BYTES = 8 * 2**20
COPIES = 2
"""A part's weights in memory while it is loaded: as the system keeps the file, and as tensors."""


def read_ahead(folder: str) -> None:
    """Nothing where memory has no room. What is wrong with the folder is said by loading it."""
    try:
        files = weight_files(Path(folder).expanduser())
        size_bytes = sum(file.stat().st_size for file in files)
        if COPIES * size_bytes > psutil.virtual_memory().available:
            logger.info("a model is loaded from disk: memory has no room for its %d bytes twice", size_bytes)
            return
        for file in files:
            _read(file)
    except DiffusionError as error:
        logger.warning("a model was not read ahead: %s", error.code)
    except OSError as error:
        logger.warning("a model was not read ahead: %s", errno.errorcode.get(error.errno or 0, "unknown"))


def weight_files(folder: Path) -> list[Path]:
    """Those that are loaded: a variant, which nobody asks for, has a second dot in its name.

    Raises ModelNotFound, UnsupportedModel.
    """
    parts = family_of(folder).weights
    return sorted(file for part in parts for file in (folder / part).glob("*.safetensors") if "." not in file.stem)


def _read(file: Path) -> None:
    buffer = memoryview(bytearray(READ_BYTES))
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass
