"""Options of the whole suite."""

from __future__ import annotations

import pytest
from hypothesis import settings

# Nothing is held to a time here: hypothesis' deadline for an example would be.
settings.register_profile("raylora", deadline=None)
settings.load_profile("raylora")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mixes", type=int, default=6, help="random request mixes that the engine is tried with")
