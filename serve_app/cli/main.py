"""Commands, and what they print. ``--json`` prints one JSON object on standard output and nothing else there.

Exit codes: 0 done, 1 the job or the command failed, 2 wrong usage or configuration, 3 nothing answers,
4 the key is not accepted, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from serve_app.cli import cluster
from serve_app.cli.client import ApiClient, ApiError, NoKey, Unreachable, WrongKey
from serve_app.cli.doctor import diagnose
from serve_app.cli.keys import keys_table
from serve_app.cli.progress import training_progress
from serve_app.cli.trainings import check_training, prepare_training
from serve_app.demo.run import run_demo
from serve_app.settings import Settings, SettingsIncomplete
from serve_app.stack import control
from serve_app.stack.errors import InstanceError, NotRunning
from serve_app.stack.instance import Instance
from storage.breaker import BreakerMode
from storage.errors import JobError, StorageError

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_KEY, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

app = typer.Typer(
    name="raylora",
    help="Train LoRA adapters and serve diffusion images with them, on your own GPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
keys = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
app.add_typer(keys, name="keys")
out = Console()
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


class BreakerChoice(StrEnum):
    OPEN = "open"
    CLOSED = "closed"
    AUTO = "auto"

    @property
    def mode(self) -> BreakerMode:
        modes = {"open": BreakerMode.FORCED_OPEN, "closed": BreakerMode.FORCED_CLOSED, "auto": BreakerMode.AUTOMATIC}
        return modes[self.value]


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
        lines = [
            f"RAYLORA_{'__'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in exc.errors(include_input=False)
        ]
        _give_up("settings_invalid", "A setting is wrong.\n" + "\n".join(lines), EXIT_USAGE, as_json)


def _give_up(code: str, message: str, status: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": message, "code": code}))  # noqa: T201  # the command's output
    else:
        err.print(Text(message, style="red"))
    raise typer.Exit(status)


def _emit(as_json: bool, value: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(value))  # noqa: T201  # the command's output


def _connect(settings: Settings) -> ApiClient:
    """A client for the instance of these settings. Raises NoKey where none is known."""
    instance = Instance(settings.home)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    if key is None and instance.api_key_file.exists():
        key = instance.api_key_file.read_text().strip()
    if not key:
        raise NoKey(instance.home)
    state = instance.read_state()
    url = state.http_url if state else f"http://{settings.host}:{settings.port}"
    return ApiClient(url, key)


@app.command()
def up(
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Return when ready and keep running.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start storage, Ray and the HTTP application, and keep them running until stopped."""
    with reported(as_json):
        settings = Settings()
        instance = Instance(settings.home)
        instance.prepare()
        key, first = instance.ensure_api_key(settings.api_key)
        with err.status("starting") as status:
            state = control.start(
                instance,
                while_pid=None if detach else os.getpid(),
                on_stage=lambda stage: status.update(stage),
            )
        _emit(as_json, {"http_url": state.http_url, "dashboard_url": state.dashboard_url, "home": str(instance.home)})
        if not as_json:
            shown = key.get_secret_value() if first else f"in {instance.api_key_file}"
            out.print(
                Panel.fit(
                    f"HTTP           {state.http_url}\nAPI key        {shown}\n"
                    f"Ray dashboard  {state.dashboard_url}\nData           {instance.home}\n"
                    f"Log            {instance.log_file}",
                    title="raylora is ready",
                )
            )
        if detach:
            return
        err.print("Ctrl-C stops it.")
        _hold(instance)


def _hold(instance: Instance) -> None:
    """Wait for Ctrl-C or SIGTERM, or for the instance's own end, then end everything."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while instance.supervisor() is not None:
            time.sleep(0.5)
    except KeyboardInterrupt:
        err.print("stopping")
        control.stop(instance, missing_ok=True)
        return
    control.stop(instance, missing_ok=True)
    raise Failure("stopped", f"The instance ended by itself. The log is {instance.log_file}.", EXIT_FAILED)


@app.command()
def down(as_json: AsJson = False) -> None:
    """End what `raylora up` started on this RAYLORA_HOME, and nothing else."""
    with reported(as_json):
        settings = Settings()
        instance = Instance(settings.home)
        forced = control.stop(instance)
        _emit(as_json, {"home": str(instance.home), "ended_hard": forced})
        if not as_json:
            out.print(f"stopped {instance.home}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is missing or wrong, and what to do about it."""
    with reported(as_json):
        settings = Settings()
        findings = diagnose(settings)
        _emit(as_json, {"ok": all(f.ok for f in findings), "checks": [f.__dict__ for f in findings]})
        if not as_json:
            for finding in findings:
                mark = "[green]ok   [/]" if finding.ok else "[red]wrong[/]"
                out.print(
                    f"{mark} {finding.name}: {finding.found}" + (f"\n      {finding.advice}" if finding.advice else "")
                )
        if not all(f.ok for f in findings):
            raise typer.Exit(EXIT_FAILED)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="An ai-toolkit YAML file.", exists=True, dir_okay=False)],
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Return once it is queued.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Say what each key would do, and start nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload the configuration's local data sets and train a LoRA."""
    if check:
        _show_check(config, as_json)
        return
    with reported(as_json), _connect(Settings()) as client:
        body = prepare_training(client, config, on_upload=lambda text: None if as_json else err.print(text))
        accepted = client.call("train", config=body)
        process_id = accepted["process_id"]
        if not as_json:
            for warning in accepted.get("warnings", []):
                err.print(Text(f"warning: {_line(warning)}", style="yellow"))
            err.print(f"training {process_id}")
        if detach:
            _emit(as_json, accepted)
            return
        process = _follow(client, process_id, as_json)
        if not as_json:
            out.print(f"{process_id}: {process['status']}. `raylora download {process_id}` fetches the LoRA.")


@app.command("continue")
def continue_(
    process_id: str,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps in all, those that are done included; else the training's own.")
    ] = None,
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Return once it is queued.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train on from the newest checkpoint of a training that has ended: for more steps, or the rest of a cancelled one."""
    with reported(as_json), _connect(Settings()) as client:
        training = client.continue_training(process_id, steps)
        if not as_json:
            err.print(f"training {training['id']}")
        if detach:
            _emit(as_json, training)
            return
        process = _follow(client, training["id"], as_json)
        if not as_json:
            out.print(f"{training['id']}: {process['status']}. `raylora download {training['id']}` fetches the LoRA.")


def _show_check(config: Path, as_json: bool) -> None:
    """One line a key, then the run; exit status 2 for a file that would be refused."""
    with reported(as_json):
        report = check_training(config, lambda: _connect(Settings()))
        found = report.found
        _emit(as_json, report.as_json())
        if not as_json:
            for key in found["keys"]:
                out.print(
                    Text(
                        f"{key['verdict']:9} {key['path'] or config.name}" + (f": {key['note']}" if key["note"] else "")
                    ),
                    soft_wrap=True,
                )
            for name, value in (found["run"] or {}).items():
                shown = json.dumps(value) if isinstance(value, list | dict) else value
                out.print(Text(f"{name}: {shown}"), soft_wrap=True)
            if report.unchecked is not None:
                err.print(Text(f"not checked: the server's models, data sets and limits. {report.unchecked}", "yellow"))
        if not found["accepted"]:
            raise typer.Exit(EXIT_USAGE)


def _line(warning: Any) -> str:
    return f"{warning.get('path')}: {warning.get('message')}" if isinstance(warning, dict) else str(warning)


def _follow(client: ApiClient, process_id: str, as_json: bool) -> dict[str, Any]:
    """Show progress until the process ended. Ctrl-C leaves it running and says how to go on."""
    try:
        with training_progress(err, enabled=not as_json) as update:
            process = client.follow(process_id, update)
    except KeyboardInterrupt:
        err.print(f"\n{process_id} goes on. `raylora jobs` shows it; `raylora cancel {process_id}` stops it.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    _emit(as_json, process)
    if process["status"] != "completed":
        raise Failure(
            "job_failed",
            f"{process_id} is {process['status']}: {process.get('error') or 'no reason given'}",
            EXIT_FAILED,
        )
    return process


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument()],
    lora: Annotated[
        list[str] | None, typer.Option("--lora", help="ID or ID:SCALE; may be given more than once.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the picture goes.")] = Path("out.png"),
    negative_prompt: Annotated[str, typer.Option("--negative-prompt")] = "",
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own size by default.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own size by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=500)] = None,
    guidance: Annotated[float | None, typer.Option(min=0, max=50)] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    model: Annotated[str | None, typer.Option(help="A model's name on the server.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a picture, with LoRAs by the ids of their trainings."""
    with reported(as_json), _connect(Settings()) as client:
        fields: dict[str, Any] = {
            "width": width, "height": height, "num_inference_steps": steps, "guidance_scale": guidance,
            "seed": seed, "model": model, "negative_prompt": negative_prompt or None,
        }  # fmt: skip
        loras = [_lora(text) for text in lora or []]
        _check_folder(output)
        reply = client.call(
            "generate", prompt=prompt, loras=loras, wait=True, output_format=_format_of(output),
            **{name: value for name, value in fields.items() if value is not None},
        )  # fmt: skip
        image = reply["images"][0]
        client.fetch(image["url"], output)
        _emit(as_json, {"output": str(output), "seed": image.get("seed"), "process_id": reply.get("process_id")})
        if not as_json:
            out.print(f"{output} (seed {image.get('seed')})")


def _lora(text: str) -> dict[str, Any]:
    name, _, scale = text.partition(":")
    try:
        return {"id": name, "scale": float(scale) if scale else 1.0}
    except ValueError:
        raise Failure("bad_lora", f"--lora {text}: the scale after the colon must be a number.", EXIT_USAGE) from None


def _format_of(output: Path) -> str:
    known = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
    if output.suffix.lower() not in known:
        raise Failure("bad_output", f"{output.name}: the name must end in .png, .jpg or .webp.", EXIT_USAGE)
    return known[output.suffix.lower()]


def _check_folder(output: Path) -> None:
    """Before any work whose result could not be put there."""
    folder = output if output.is_dir() else output.parent
    if not folder.is_dir():
        raise Failure("bad_output", f"There is no folder {folder}. Make it, or name another with -o.", EXIT_USAGE)
    if not os.access(folder, os.W_OK):
        raise Failure("bad_output", f"{folder} cannot be written. Name another folder with -o.", EXIT_USAGE)


@app.command()
def jobs(limit: Annotated[int, typer.Option(min=1, max=1000)] = 20, as_json: AsJson = False) -> None:
    """List trainings and generations, newest first."""
    with reported(as_json), _connect(Settings()) as client:
        processes = list(client.processes(limit))
        _emit(as_json, {"processes": processes})
        if as_json:
            return
        table = Table(Column("id", no_wrap=True), "type", "status", "progress", "created", "error")
        for process in processes:
            step, total = process.get("step"), process.get("total_steps")
            created = datetime.fromisoformat(str(process["created_at"])).astimezone().strftime("%Y-%m-%d %H:%M:%S")
            table.add_row(
                process["id"], process["type"], process["status"], f"{step}/{total}" if total else "",
                created, Text(str(process.get("error") or "")),
            )  # fmt: skip
        out.print(table)


@app.command()
def cancel(process_id: str, as_json: AsJson = False) -> None:
    """Stop a training or a generation; a training keeps its last checkpoint."""
    with reported(as_json), _connect(Settings()) as client:
        reply = client.call("cancel", process_id=process_id)
        _emit(as_json, reply)
        if not as_json:
            out.print(str(reply.get("message")))


@app.command()
def download(
    process_id: str,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder or file; the current folder by default.")
    ] = Path(),
    as_json: AsJson = False,
) -> None:
    """Fetch the LoRA of a completed training."""
    with reported(as_json), _connect(Settings()) as client:
        _check_folder(output)
        reply = client.call("download", process_id=process_id)
        target = output / Path(reply["filename"]).name if output.is_dir() else output
        size = client.fetch(reply["url"], target)
        _emit(as_json, {"output": str(target), "size_bytes": size})
        if not as_json:
            out.print(f"{target} ({size / 1e6:.2f} MB)")


@app.command()
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
        _emit(as_json, state)
        if not as_json:
            detail = f": {state['detail']}" if state["detail"] else ""
            out.print(f"{state['breaker']} ({state['breaker_mode']}){detail}")


@app.command()
def sweep(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove stored objects that nobody needs any more, by the RAYLORA_SWEEP settings."""
    with reported(as_json):
        report = cluster.sweep(Settings(), dry_run=dry_run)
        _emit(as_json, report.as_json())
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
    with reported(as_json), _connect(Settings()) as client:
        made = client.create_key(name, tenant)
        _emit(as_json, made)
        if not as_json:
            out.print(Text(f"{made['key']}  ({made['id']}, tenant {made['tenant']}; it is not shown again)"))


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List the keys that were made, newest first."""
    with reported(as_json), _connect(Settings()) as client:
        found = client.get("/v1/keys")
        _emit(as_json, {"keys": found["items"]})
        if not as_json:
            out.print(keys_table(found["items"]))


@keys.command("revoke")
def revoke_key(key_id: str, as_json: AsJson = False) -> None:
    """Refuse a key from now on; it takes up to two seconds everywhere."""
    with reported(as_json), _connect(Settings()) as client:
        revoked = client.revoke_key(key_id)
        _emit(as_json, revoked)
        if not as_json:
            out.print(Text(f"{revoked['id']} is revoked"))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the contact sheet and the LoRA go.")] = Path(
        "demo-result"
    ),
    as_json: AsJson = False,
) -> None:
    """Train a LoRA on a small data set, draw with it before and after, and show the difference."""
    with reported(as_json):
        _emit(as_json, run_demo(output, err if as_json else out))


def main() -> None:
    """Entry point of the ``raylora`` command."""
    # Ctrl-C during start-up must run the clean-up paths, as SIGTERM from a process manager must.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(EXIT_INTERRUPTED)
