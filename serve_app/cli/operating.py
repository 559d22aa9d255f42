"""Commands of whoever runs an instance: its storage breaker, its clean-up, its API keys."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from serve_app.cli import cluster
from serve_app.cli.console import EXIT_FAILED, AsJson, connect, emit, err, out, reported, say
from serve_app.cli.keys import print_keys
from serve_app.settings import Settings
from storage.breaker import BreakerMode

keys = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)


class BreakerChoice(StrEnum):
    OPEN = "open"
    CLOSED = "closed"
    AUTO = "auto"

    @property
    def mode(self) -> BreakerMode:
        modes = {"open": BreakerMode.FORCED_OPEN, "closed": BreakerMode.FORCED_CLOSED, "auto": BreakerMode.AUTOMATIC}
        return modes[self.value]


def breaker(
    mode: Annotated[
        BreakerChoice | None,
        typer.Argument(help="open: no S3 request goes out. closed: every one does. auto: the breaker decides."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the storage circuit breaker of the whole cluster, or decide for it. Run it where the instance runs."""
    with reported(as_json):
        state = cluster.breaker(Settings(), None if mode is None else mode.mode)
        emit(as_json, state)
        if not as_json:
            detail = f": {state['detail']}" if state["detail"] else ""
            say(f"{state['breaker']} ({state['breaker_mode']}){detail}")


def sweep(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove stored objects that nobody needs any more, by the RAYLORA_SWEEP settings."""
    with reported(as_json):
        report = cluster.sweep(Settings(), dry_run=dry_run)
        emit(as_json, report.as_json())
        if not as_json:
            table = Table("what", "groups", "objects", "bytes")
            for kind, total in report.totals().items():
                table.add_row(kind, *(str(total[name]) for name in ("groups", "objects", "size_bytes")))
            out.print(table)
            for failure in report.failures:
                err.print(Text(f"not removed: {failure.kind} of {failure.resource} ({failure.code})", style="red"))
        if report.failures:
            raise typer.Exit(EXIT_FAILED)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What tells it from other keys.")],
    tenant: Annotated[
        str | None, typer.Option(help="Whom it speaks for; the instance's own tenant by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once."""
    with reported(as_json), connect(Settings()) as client:
        made = client.create_key(name, tenant)
        emit(as_json, made)
        if not as_json:
            say(f"{made['key']}  ({made['id']}, tenant {made['tenant']}; it is not shown again)")


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List the keys that were made, newest first."""
    with reported(as_json), connect(Settings()) as client:
        found = client.get("/v1/keys")
        emit(as_json, {"keys": found["items"]})
        if not as_json:
            print_keys(out, found["items"])


@keys.command("revoke")
def revoke_key(key_id: str, as_json: AsJson = False) -> None:
    """Refuse a key from now on; it takes up to two seconds everywhere."""
    with reported(as_json), connect(Settings()) as client:
        revoked = client.revoke_key(key_id)
        emit(as_json, revoked)
        if not as_json:
            say(f"{revoked['id']} is revoked")
