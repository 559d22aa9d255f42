"""A client of the RunPod-compatible surface, as the command line and the demo use it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from serve_app.cli.patience import Patience

ENDPOINT = "local"
FINAL_PROCESS_STATES = frozenset({"completed", "failed", "cancelled"})
UNENDED_JOBS = frozenset({"IN_QUEUE", "IN_PROGRESS"})
# What changes nothing, and may be asked again as it is.
READS = frozenset({"health", "process_status", "processes", "download"})
PASSING_STATUSES = frozenset({429, 502, 503, 504})
CONNECT_S = 5.0
# A connection that has silently died is given up after these two.
HELD_MAX_S = 30.0
REPLY_MARGIN_S = 30.0
DOWNLOAD_CHUNK_BYTES = 1 << 20
INVALID = "Invalid request: "

T = TypeVar("T")


class ApiError(Exception):
    """The server refused or failed a request; ``code`` is its stable code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class NotNow(ApiError):
    """The server cannot answer at present, or what stands between; ``retry_after_s`` where it said when it can."""

    def __init__(self, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(code, message)
        self.retry_after_s = retry_after_s


class Unreachable(ApiError):
    def __init__(self, url: str) -> None:
        super().__init__("unreachable", f"Nothing answers on {url}. Start an instance with `raylora up`.")


class WrongKey(ApiError):
    def __init__(self) -> None:
        super().__init__(
            "unauthorized",
            "The server does not accept this API key. Set RAYLORA_API_KEY to the one that `raylora up` printed.",
        )


class Unusable(ApiError):
    """What the user gave, a configuration or a folder, cannot be used as it is."""


class NoKey(ApiError):
    def __init__(self, home: Path) -> None:
        super().__init__(
            "no_api_key",
            f"No API key: {home} has none yet. Start an instance with `raylora up`, or set RAYLORA_API_KEY.",
        )


class ApiClient:
    """Synchronous calls of one server. Raises ApiError and nothing of httpx.

    With ``patience`` a server that has answered before may be away for a while: what can be asked again is. POSTs that
    start or store something carry an Idempotency-Key, so that they do it once.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        patience: Patience | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._base_url = base_url
        self._patience = patience
        self._has_answered = False
        self._http = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(330.0, connect=CONNECT_S),
            transport=transport,
        )

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, type_: str, /, wait_s: float = 300.0, **fields: Any) -> dict[str, Any]:
        """Run one job of ``type_`` to its end and return its output."""
        body = {"input": {"type": type_, **fields}}
        keys = [_new_key()]

        def ask() -> dict[str, Any]:
            headers = {} if type_ in READS else _keyed(keys[-1])
            reply = self._send("POST", f"/v2/{ENDPOINT}/runsync", wait_s=wait_s, json=body, headers=headers)
            try:
                return _output_of(reply, wait_s, NotNow if type_ in READS else ApiError)
            except NotNow:
                # A job that has failed stays so under its key.
                keys.append(_new_key())
                raise

        return self._patiently(ask)

    def start(self, type_: str, /, wait_s: float = 300.0, **fields: Any) -> dict[str, Any]:
        """Like ``call``, for work that is costly to do twice: its outcome can be asked for long after it has ended."""
        body, headers = {"input": {"type": type_, **fields}}, _keyed(_new_key())
        with self._begun():
            job = self._patiently(lambda: self._send("POST", f"/v2/{ENDPOINT}/run", json=body, headers=headers))
            path, until_s = f"/v2/{ENDPOINT}/status-sync/{job['id']}", time.monotonic() + wait_s
            reply = job
            while reply.get("status") in UNENDED_JOBS and time.monotonic() < until_s:
                reply = self._patiently(lambda: self._send("GET", path, wait_s=min(wait_s, HELD_MAX_S)))
        return _output_of(reply, wait_s)

    def get(self, path: str) -> dict[str, Any]:
        return self._patiently(lambda: self._send("GET", path))

    def create_key(self, name: str, tenant: str | None) -> dict[str, Any]:
        """The new key with its text, which is never shown again."""
        return self._send("POST", "/v1/keys", json={"name": name} | ({} if tenant is None else {"tenant": tenant}))

    def revoke_key(self, key_id: str) -> dict[str, Any]:
        return self._send("DELETE", f"/v1/keys/{quote(key_id, safe='')}")

    def continue_training(self, training_id: str, steps: int | None) -> dict[str, Any]:
        """The new training, which goes on from that one's newest checkpoint, to `steps` in all."""
        body, headers = {} if steps is None else {"steps": steps}, _keyed(_new_key())
        path = f"/v1/trainings/{quote(training_id, safe='')}/continue"
        with self._begun():
            accepted = self._patiently(lambda: self._send("POST", path, json=body, headers=headers))
        training: dict[str, Any] = accepted["training"]
        return training

    def process(self, process_id: str) -> dict[str, Any]:
        """The process object. Raises ApiError for an id that this key does not see."""
        process = self.call("process_status", wait_s=HELD_MAX_S, process_id=process_id)
        if process.get("status") == "not_found":
            raise ApiError("process_not_found", f"There is no process {process_id}. `raylora jobs` lists them.")
        return process

    def processes(self, limit: int) -> Iterator[dict[str, Any]]:
        """Newest first, over as many pages as ``limit`` needs."""
        cursor: str | None = None
        left = limit
        while left > 0:
            query: dict[str, Any] = {"limit": min(left, 100)} | ({"cursor": cursor} if cursor else {})
            page = self.call("processes", **query)
            yield from page["processes"]
            left -= len(page["processes"])
            cursor = page.get("next_cursor")
            if not cursor or not page["processes"]:
                return

    def follow(
        self, process_id: str, on_change: Callable[[dict[str, Any]], None], *, interval_s: float = 0.5
    ) -> dict[str, Any]:
        """Poll a process until it ended and return its last object; ``on_change`` sees each one."""
        while True:
            process = self.process(process_id)
            on_change(process)
            if process["status"] in FINAL_PROCESS_STATES:
                return process
            time.sleep(interval_s)

    def fetch(self, url: str, target: Path) -> int:
        """Stream a presigned URL into a file, which appears only when whole. Returns its size in bytes."""
        return self._patiently(lambda: self._fetch(url, target))

    def _fetch(self, url: str, target: Path) -> int:
        draft = target.with_name(f".{target.name}.part")
        try:
            with httpx.stream("GET", url, timeout=httpx.Timeout(60.0), follow_redirects=False) as response:
                if response.status_code not in {200, 206}:
                    message = f"The file store answered {response.status_code}."
                    if response.status_code in PASSING_STATUSES:
                        raise NotNow("download_failed", message, _retry_after_s(response))
                    raise ApiError("download_failed", message)
                with draft.open("wb") as file:
                    for chunk in response.iter_bytes(DOWNLOAD_CHUNK_BYTES):
                        file.write(chunk)
            draft.replace(target)
        except httpx.HTTPError as exc:
            raise NotNow("download_failed", f"The download of {target.name} broke off. Run it again.") from exc
        except OSError as exc:
            raise ApiError("output_unwritable", f"{target} cannot be written: {exc.strerror}.") from exc
        finally:
            draft.unlink(missing_ok=True)
        return target.stat().st_size

    def _patiently(self, ask: Callable[[], T]) -> T:
        return ask() if self._patience is None else self._patience.of(ask, self._passes)

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """What was asked for once may have been heard, though nothing came back."""
        try:
            yield
        except (NotNow, Unreachable) as exc:
            if self._has_answered:
                exc.add_note("It may have begun all the same: `raylora jobs` lists what has.")
            raise

    def _passes(self, error: BaseException) -> bool:
        """Nothing that listens is a server that comes back, if there was one."""
        return isinstance(error, NotNow) or (isinstance(error, Unreachable) and self._has_answered)

    def _send(self, method: str, path: str, *, wait_s: float | None = None, **options: Any) -> dict[str, Any]:
        """``wait_s``: how long the server may hold the request until there is something to say."""
        if wait_s is not None:
            options |= {
                "params": {"wait": int(wait_s * 1000)},
                "timeout": httpx.Timeout(wait_s + REPLY_MARGIN_S, connect=CONNECT_S),
            }
        try:
            response = self._http.request(method, path, **options)
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            raise Unreachable(self._base_url) from exc
        except httpx.HTTPError as exc:
            self._has_answered = True
            raise NotNow("connection_failed", f"The connection to {self._base_url} broke off.") from exc
        self._has_answered = True
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise WrongKey
        reply = _json_of(response)
        if response.status_code in PASSING_STATUSES or (response.is_error and "retry-after" in response.headers):
            unread = "unavailable", f"{self._base_url} answered {response.status_code}."
            code, message = _reason(reply) if isinstance(reply, dict) else unread
            raise NotNow(code, message, _retry_after_s(response))
        if reply is None or (response.is_error and not isinstance(reply, dict)):
            raise ApiError("bad_reply", f"{self._base_url} is not a raylora server.")
        if response.is_error:
            raise ApiError(*_reason(reply))
        return reply if isinstance(reply, dict) else {"output": reply}


def _new_key() -> str:
    return uuid.uuid4().hex


def _keyed(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


def _json_of(response: httpx.Response) -> Any:
    """None where it is no JSON."""
    try:
        return response.json()
    except ValueError:
        return None


def _retry_after_s(response: httpx.Response) -> float | None:
    """The server gives it in seconds; None also for a date, which only others do."""
    try:
        return float(response.headers.get("retry-after", ""))
    except ValueError:
        return None


def _output_of(
    reply: dict[str, Any], wait_s: float, unfinished: Callable[[str, str], ApiError] = ApiError
) -> dict[str, Any]:
    """Of a job that has ended well. Raises ApiError; NotNow where the job's failure passes by itself."""
    output = reply.get("output")
    if reply.get("status") == "FAILED" or "error" in reply:
        again_s = output.get("retry_after_s") if isinstance(output, dict) else None
        raise ApiError(*_reason(reply)) if again_s is None else NotNow(*_reason(reply), retry_after_s=again_s)
    if reply.get("status") != "COMPLETED":
        raise unfinished("not_finished", f"The job is {reply.get('status')} after {wait_s:.0f} s.")
    return output if isinstance(output, dict) else {"output": output}


def _reason(reply: dict[str, Any]) -> tuple[str, str]:
    """(code, message) of an error reply of any of the server's surfaces, with what validation found."""
    output = reply.get("output")
    details = output if isinstance(output, dict) else {}
    message = str(
        reply.get("error") or reply.get("detail") or reply.get("title") or details.get("error") or "the job failed"
    )
    code = str(reply.get("code") or details.get("error_type") or details.get("code") or "job_failed")
    problems = reply.get("validation_errors") or details.get("validation_errors") or []
    shown = [
        f"{problem.get('path')}: {problem.get('message')}" if isinstance(problem, dict) else str(problem)
        for problem in problems
    ]
    # The server's own sentence lists them too, in one line.
    repeats = message.removeprefix(INVALID) == "; ".join(shown)
    return code, "\n  ".join([INVALID.strip() if repeats and shown else message, *shown])
