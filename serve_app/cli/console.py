"""What all commands share: where they print, how they end, and whom they ask."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.text import Text

from serve_app.cli.client import ApiClient, ApiError, NoKey, Unreachable, WrongKey
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
    """Ends the command with a message, a stable code and an exit status."""

    def __init__(self, code: str, message: str, status: int) -> None:
        super().__init__(message)
        self.code, self.status = code, status


@contextmanager
def reported(as_json: bool) -> Iterator[None]:
    """Turn every expected error into one clear message and its exit status."""
    try:
        yield
    except Failure as exc:
        _give_up(exc.code, str(exc), exc.status, as_json)
    except (NoKey, Unreachable) as exc:
        _give_up(exc.code, str(exc), EXIT_UNREACHABLE, as_json)
    except WrongKey as exc:
        _give_up(exc.code, str(exc), EXIT_KEY, as_json)
    except (ApiError, InstanceError) as exc:
        _give_up(exc.code, str(exc), EXIT_UNREACHABLE if isinstance(exc, NotRunning) else EXIT_FAILED, as_json)
    except (StorageError, JobError) as exc:
        _give_up(exc.code, str(exc), EXIT_FAILED, as_json)
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


def _give_up(code: str, message: str, status: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": message, "code": code}))  # noqa: T201  # the command's output
    else:
        err.print(Text(message, style="red"))
    raise typer.Exit(status)


def emit(as_json: bool, value: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(value))  # noqa: T201  # the command's output


def connect(settings: Settings) -> ApiClient:
    """A client for the instance of these settings. Raises NoKey where none is known."""
    instance = Instance(settings.home)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    if key is None and instance.api_key_file.exists():
        key = instance.api_key_file.read_text().strip()
    if not key:
        raise NoKey(instance.home)
    state = instance.read_state()
    url = state.http_url if state else url_of(settings.host, settings.port)
    return ApiClient(url, key)
