"""A client of the RunPod-compatible surface, as the command line and the demo use it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

ENDPOINT = "local"
FINAL_PROCESS_STATES = frozenset({"completed", "failed", "cancelled"})
DOWNLOAD_CHUNK_BYTES = 1 << 20
INVALID = "Invalid request: "


class ApiError(Exception):
    """The server refused or failed a request; ``code`` is its stable code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Unreachable(ApiError):
    def __init__(self, url: str) -> None:
        super().__init__("unreachable", f"Nothing answers on {url}. Start an instance with `raylora up`.")


class WrongKey(ApiError):
    def __init__(self) -> None:
        super().__init__(
            "unauthorized",
            "The server does not accept this API key. Set RAYLORA_API_KEY to the one that `raylora up` printed.",
        )


class NoKey(ApiError):
    def __init__(self, home: Path) -> None:
        super().__init__(
            "no_api_key",
            f"No API key: {home} has none yet. Start an instance with `raylora up`, or set RAYLORA_API_KEY.",
        )


class ApiClient:
    """Synchronous calls of one server. Raises ApiError and nothing of httpx."""

    def __init__(self, base_url: str, api_key: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self._base_url = base_url
        self._http = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(330.0, connect=5.0),
            transport=transport,
        )

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, type_: str, /, wait_s: float = 300.0, **fields: Any) -> dict[str, Any]:
        """Run one job of ``type_`` to its end and return its output."""
        body = {"input": {"type": type_, **fields}}
        reply = self._send("POST", f"/v2/{ENDPOINT}/runsync", json=body, params={"wait": int(wait_s * 1000)})
        if reply.get("status") == "FAILED" or "error" in reply:
            raise ApiError(*_reason(reply))
        if reply.get("status") != "COMPLETED":
            raise ApiError("not_finished", f"The job is {reply.get('status')} after {wait_s:.0f} s.")
        output = reply.get("output")
        return output if isinstance(output, dict) else {"output": output}

    def get(self, path: str) -> dict[str, Any]:
        return self._send("GET", path)

    def create_key(self, name: str, tenant: str | None) -> dict[str, Any]:
        """The new key with its text, which is never shown again."""
        return self._send("POST", "/v1/keys", json={"name": name} | ({} if tenant is None else {"tenant": tenant}))

    def revoke_key(self, key_id: str) -> dict[str, Any]:
        return self._send("DELETE", f"/v1/keys/{quote(key_id, safe='')}")

    def continue_training(self, training_id: str, steps: int | None) -> dict[str, Any]:
        """The new training, which goes on from that one's newest checkpoint, to `steps` in all."""
        body = {} if steps is None else {"steps": steps}
        accepted = self._send("POST", f"/v1/trainings/{quote(training_id, safe='')}/continue", json=body)
        training: dict[str, Any] = accepted["training"]
        return training

    def process(self, process_id: str) -> dict[str, Any]:
        """The process object. Raises ApiError for an id that this key does not see."""
        process = self.call("process_status", process_id=process_id)
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
        draft = target.with_name(f".{target.name}.part")
        try:
            with httpx.stream("GET", url, timeout=httpx.Timeout(60.0), follow_redirects=False) as response:
                if response.status_code not in {200, 206}:
                    raise ApiError("download_failed", f"The file store answered {response.status_code}.")
                with draft.open("wb") as file:
                    for chunk in response.iter_bytes(DOWNLOAD_CHUNK_BYTES):
                        file.write(chunk)
            draft.replace(target)
        except httpx.HTTPError as exc:
            raise ApiError("download_failed", f"The download of {target.name} broke off. Run it again.") from exc
        except OSError as exc:
            raise ApiError("output_unwritable", f"{target} cannot be written: {exc.strerror}.") from exc
        finally:
            draft.unlink(missing_ok=True)
        return target.stat().st_size

    def _send(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **options)
        except httpx.ConnectError as exc:
            raise Unreachable(self._base_url) from exc
        except httpx.HTTPError as exc:
            raise ApiError("connection_failed", f"The connection to {self._base_url} broke off.") from exc
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise WrongKey
        try:
            reply = response.json()
        except ValueError as exc:
            raise ApiError("bad_reply", f"{self._base_url} is not a raylora server.") from exc
        if response.is_error:
            raise ApiError(*_reason(reply))
        return reply if isinstance(reply, dict) else {"output": reply}


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
