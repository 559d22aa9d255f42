"""Commands, and what they print. ``--json`` prints one JSON object on standard output and nothing else there.

Exit codes: 0 done, 1 the job or the command failed, 2 wrong usage or configuration, 3 nothing answers,
4 the key is not accepted, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from serve_app.cli.client import ApiClient, NotNow, Unreachable
from serve_app.cli.console import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    AsJson,
    Failure,
    connect,
    emit,
    err,
    out,
    reported,
    say,
    status_of,
)
from serve_app.cli.doctor import diagnose
from serve_app.cli.operating import breaker, keys, sweep
from serve_app.cli.progress import training_progress
from serve_app.cli.trainings import check_training, prepare_training
from serve_app.demo.run import run_demo
from serve_app.settings import Settings
from serve_app.stack import control
from serve_app.stack.errors import AlreadyRunning
from serve_app.stack.instance import Instance

app = typer.Typer(
    name="raylora",
    help="Train LoRA adapters and serve diffusion images with them, on your own GPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(keys, name="keys")
app.command()(breaker)
app.command()(sweep)


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
        if instance.supervisor() is not None:
            # Before its key is replaced by one that it does not know.
            raise AlreadyRunning(instance.home)
        key, first = instance.ensure_api_key(settings.api_key)
        with err.status("starting") as status:
            state = control.start(
                instance,
                while_pid=None if detach else os.getpid(),
                on_stage=lambda stage: status.update(stage),
            )
        emit(
            as_json,
            {
                "http_url": state.http_url, "dashboard_url": state.dashboard_url, "home": str(instance.home),
                "api_key_file": str(instance.api_key_file), "log_file": str(instance.log_file),
            },
        )  # fmt: skip
        if not as_json:
            shown = key.get_secret_value() if first else f"in {instance.api_key_file}"
            out.print(
                Panel.fit(
                    Text(
                        f"HTTP           {state.http_url}\nAPI key        {shown}\n"
                        f"Ray dashboard  {state.dashboard_url}\nData           {instance.home}\n"
                        f"Log            {instance.log_file}"
                    ),
                    title="raylora is ready",
                )
            )
    if detach:
        return
    # The one object on standard output is written.
    with reported(as_json=False):
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
        emit(as_json, {"home": str(instance.home), "ended_hard": forced})
        if not as_json:
            say(f"stopped {instance.home}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is missing or wrong, and what to do about it."""
    with reported(as_json):
        settings = Settings()
        findings = diagnose(settings)
        emit(as_json, {"ok": all(f.ok for f in findings), "checks": [f.__dict__ for f in findings]})
        if not as_json:
            for finding in findings:
                mark = "[green]ok   [/]" if finding.ok else "[red]wrong[/]"
                advice = f"\n      {finding.advice}" if finding.advice else ""
                out.print(f"{mark} {escape(f'{finding.name}: {finding.found}{advice}')}")
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
    with reported(as_json), connect(Settings(), is_patient=True) as client:
        body = prepare_training(client, config, on_upload=lambda text: None if as_json else err.print(text))
        accepted = client.start("train", config=body)
        process_id = accepted["process_id"]
        if not as_json:
            for warning in accepted.get("warnings", []):
                err.print(Text(f"warning: {_line(warning)}", style="yellow"))
        _see_through(client, process_id, accepted, detach=detach, as_json=as_json)


@app.command("continue")
def continue_(
    process_id: str,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps in all, those that are done included; else the training's own.")
    ] = None,
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Return once it is queued.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train on from the newest checkpoint of an ended training: for more steps, or the rest of a cancelled one."""
    with reported(as_json), connect(Settings(), is_patient=True) as client:
        training = client.continue_training(process_id, steps)
        accepted = {**training, "process_id": training["id"]}
        _see_through(client, training["id"], accepted, detach=detach, as_json=as_json)


def _show_check(config: Path, as_json: bool) -> None:
    """One line a key, then the run; exit status 2 for a file that would be refused."""
    with reported(as_json):
        report = check_training(config, lambda: connect(Settings()))
        found = report.found
        emit(as_json, report.as_json())
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


def _see_through(client: ApiClient, process_id: str, accepted: dict[str, Any], *, detach: bool, as_json: bool) -> None:
    """What follows once a training is queued; ``accepted`` is all there is to print in JSON where nobody waits."""
    if detach:
        emit(as_json, accepted)
        if not as_json:
            say(f"{process_id} is queued. `raylora jobs` shows it.")
        return
    if not as_json:
        err.print(f"training {process_id}")
    process = _follow(client, process_id, as_json)
    if not as_json:
        say(f"{process_id}: {process['status']}. `raylora download {process_id}` fetches the LoRA.")


def _follow(client: ApiClient, process_id: str, as_json: bool) -> dict[str, Any]:
    """Show progress until the process ended. Ctrl-C leaves it running and says how to go on, as does a lost server."""
    again = f"`raylora jobs` shows it; `raylora cancel {process_id}` stops it."
    mine = {"process_id": process_id}
    try:
        with training_progress(err, enabled=not as_json) as update:
            process = client.follow(process_id, update)
    except KeyboardInterrupt:
        raise Failure("interrupted", f"{process_id} goes on. {again}", EXIT_INTERRUPTED, mine) from None
    except (NotNow, Unreachable) as exc:
        raise Failure(exc.code, f"{exc}\n{process_id} may go on. {again}", status_of(exc), mine) from exc
    if process["status"] != "completed":
        reason = f"{process_id} is {process['status']}: {process.get('error') or 'no reason given'}"
        raise Failure("job_failed", reason, EXIT_FAILED, process)
    emit(as_json, process)
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
    with reported(as_json), connect(Settings(), is_patient=True) as client:
        fields: dict[str, Any] = {
            "width": width, "height": height, "num_inference_steps": steps, "guidance_scale": guidance,
            "seed": seed, "model": model, "negative_prompt": negative_prompt or None,
        }  # fmt: skip
        loras = [_lora(text) for text in lora or []]
        _check_folder(output)
        reply = client.start(
            "generate", prompt=prompt, loras=loras, wait=True, output_format=_format_of(output),
            **{name: value for name, value in fields.items() if value is not None},
        )  # fmt: skip
        image = reply["images"][0]
        client.fetch(image["url"], output)
        emit(as_json, {"output": str(output), "seed": image.get("seed"), "process_id": reply.get("process_id")})
        if not as_json:
            say(f"{output} (seed {image.get('seed')})")


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


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise Failure("bad_output", f"{output} cannot be made. Name another folder with -o.", EXIT_USAGE) from None
    _check_folder(output)


@app.command()
def jobs(limit: Annotated[int, typer.Option(min=1, max=1000)] = 20, as_json: AsJson = False) -> None:
    """List trainings and generations, newest first."""
    with reported(as_json), connect(Settings()) as client:
        processes = list(client.processes(limit))
        emit(as_json, {"processes": processes})
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
    with reported(as_json), connect(Settings()) as client:
        reply = client.call("cancel", process_id=process_id)
        emit(as_json, reply)
        if not as_json:
            say(str(reply.get("message")))


@app.command()
def download(
    process_id: str,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder or file; the current folder by default.")
    ] = Path(),
    as_json: AsJson = False,
) -> None:
    """Fetch the LoRA of a completed training."""
    with reported(as_json), connect(Settings()) as client:
        _check_folder(output)
        if not output.is_dir() and not output.suffix:
            message = f"There is no folder {output}. Make it, or name a file: {output}.safetensors."
            raise Failure("bad_output", message, EXIT_USAGE)
        reply = client.call("download", process_id=process_id)
        target = output / Path(reply["filename"]).name if output.is_dir() else output
        size = client.fetch(reply["url"], target)
        emit(as_json, {"output": str(target), "size_bytes": size})
        if not as_json:
            say(f"{target} ({size / 1e6:.2f} MB)")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the contact sheet and the LoRA go.")] = Path(
        "demo-result"
    ),
    as_json: AsJson = False,
) -> None:
    """Train a LoRA on a small data set, draw with it before and after, and show the difference."""
    with reported(as_json):
        _make_folder(output)
        emit(as_json, run_demo(output, Settings(), err if as_json else out))


def main() -> None:
    """Entry point of the ``raylora`` command."""
    # Ctrl-C during start-up must run the clean-up paths, as SIGTERM from a process manager must.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(EXIT_INTERRUPTED)
