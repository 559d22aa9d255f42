"""What all commands share: where they print, how they end, and whom they ask."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.text import Text

from serve_app.cli.client import ApiClient, ApiError, NoKey, Unreachable, Unusable, WrongKey
from serve_app.cli.patience import Patience
from serve_app.settings import Settings, SettingsIncomplete
from serve_app.stack.errors import InstanceError, NotRunning
from serve_app.stack.instance import Instance
from storage.errors import JobError, StorageError
from storage.listening import url_of
from train_jobs.field_problems import problems_of

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_KEY, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

out = Console()
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


class Failure(Exception):
    """Ends the command with a message, a stable code and an exit status. ``details`` go with them into the JSON."""

    def __init__(self, code: str, message: str, status: int, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code, self.status, self.details = code, status, details or {}


@contextmanager
def reported(as_json: bool) -> Iterator[None]:
    """Turn every expected error into one clear message and its exit status."""
    try:
        yield
    except Failure as exc:
        _give_up(exc.code, _text_of(exc), exc.status, as_json, exc.details)
    except (ApiError, InstanceError, StorageError, JobError) as exc:
        _give_up(exc.code, _text_of(exc), status_of(exc), as_json)
    except SettingsIncomplete as exc:
        _give_up("settings_invalid", str(exc), EXIT_USAGE, as_json)
    except SettingsError as exc:
        # Without its cause, which repeats the value: that may hold a key.
        named = re.search(r'field "(\w+)"', str(exc))
        setting = f"RAYLORA_{named[1].upper()}" if named else "A setting"
        _give_up("settings_invalid", f"{setting} is not valid JSON.", EXIT_USAGE, as_json)
    except ValidationError as exc:
        problems = problems_of(exc, Settings)
        lines = [f"{_variable(p.path)}: {p.message}" if p.path else p.message for p in problems]
        _give_up("settings_invalid", "A setting is wrong.\n" + "\n".join(lines), EXIT_USAGE, as_json)


def _variable(path: str) -> str:
    return f"RAYLORA_{path.replace('.', '__').upper()}"


def status_of(error: Exception) -> int:
    """The exit status of a command that an error ends."""
    if isinstance(error, NoKey | Unreachable | NotRunning):
        return EXIT_UNREACHABLE
    if isinstance(error, Unusable):
        return EXIT_USAGE
    return EXIT_KEY if isinstance(error, WrongKey) else EXIT_FAILED


def _text_of(error: Exception) -> str:
    """With what was noted on it on its way."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def _give_up(
    code: str, message: str, status: int, as_json: bool, details: Mapping[str, Any] = MappingProxyType({})
) -> None:
    if as_json:
        print(json.dumps({**details, "error": message, "code": code}))  # noqa: T201  # the command's output
    else:
        err.print(Text(message, style="red"), soft_wrap=True)
    raise typer.Exit(status)


def emit(as_json: bool, value: dict[str, Any]) -> None:
    if as_json:
        # At once: `up` goes on for as long as its instance.
        print(json.dumps(value), flush=True)  # noqa: T201  # the command's output


def say(text: str) -> None:
    """A line of the command's result as it is: paths with brackets in them, and no line folded within a name."""
    out.print(Text(text), soft_wrap=True)


def connect(settings: Settings, *, is_patient: bool = False) -> ApiClient:
    """A client for the instance of these settings. Raises NoKey where none is known.

    `is_patient`: one that waits for a server that is away for a while, and says so on standard error.
    """
    instance = Instance(settings.home)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    try:
        if key is None and instance.api_key_file.exists():
            key = instance.api_key_file.read_text().strip()
        state = instance.read_state()
    except OSError as exc:
        message = f"{instance.home} cannot be read by this user. Set RAYLORA_HOME to a folder of your own."
        raise Failure("home_unusable", message, EXIT_USAGE) from exc
    if not key:
        raise NoKey(instance.home)
    url = state.http_url if state else url_of(settings.host, settings.port)
    patience = Patience(lambda text: err.print(Text(text, style="yellow"))) if is_patient else None
    return ApiClient(url, key, patience=patience)
