"""The process that is an instance: ``python -m serve_app.stack.supervisor``.

It starts the embedded S3 server, Ray and the Serve application, waits, and ends exactly what it started. It is a
session of its own, so a Ctrl-C in the terminal reaches the command line first, which then asks it to stop.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from serve_app.ingress.middleware import PROXY_ENVIRONMENT
from serve_app.ingress.replies import SURFACES, lost_body, refused_body
from serve_app.settings import Settings
from serve_app.shutdown import TRAINING_S, instance_s
from serve_app.stack.background import Background
from serve_app.stack.checks import DASHBOARD_HOST, check, check_port
from serve_app.stack.errors import AlreadyRunning, ClusterInUse, InstanceError, StartFailed, StorageNotShared
from serve_app.stack.haproxy import environment
from serve_app.stack.instance import INSTANCE_VARIABLE, Instance, InstanceState, Phase
from serve_app.stack.ports import remembered
from serve_app.stack.probing import CapabilityProbe
from storage.embedded import EmbeddedS3
from storage.listening import is_loopback, url_of
from storage.objects import StoreMaintenance

if TYPE_CHECKING:
    from cluster.membership import Membership

logger = logging.getLogger("raylora.supervisor")

# Unix socket paths end at 107 bytes and Ray puts about 70 of its own behind this folder.
RAY_FOLDER_MAX_CHARS = 36
RAY_OPTIONS: dict[str, Any] = {"namespace": "raylora", "log_to_driver": False, "configure_logging": False}


class Supervisor:
    """Starts, watches and stops one instance. Ends on SIGTERM or SIGINT, or when the process ``while_pid`` does."""

    def __init__(self, settings: Settings, instance: Instance, while_pid: int | None = None) -> None:
        self._settings = settings
        self._instance = instance
        self._owner = psutil.Process(while_pid) if while_pid else None
        self._asked = threading.Event()
        self._ray_address: str | None = None
        self._dashboard_url = url_of(DASHBOARD_HOST, settings.dashboard_port)
        self._submissions: list[str] = []
        self._s3_is_near = False
        self._doors: Path | None = None
        self._capabilities: dict[str, bool] | None = None
        self._capabilities_found = threading.Event()
        self._cleanup = ExitStack()

    def run(self) -> None:
        """Run until asked to stop. Raises InstanceError when the instance cannot start."""
        self._install_signals()
        with self._instance.lock():
            stale = self._instance.end_processes()
            if stale:
                logger.warning("ended %d processes that an earlier run of this instance left behind", stale)
            try:
                self._start()
                if not self._should_stop():
                    self._write("ready", "ready")
                while not self._should_stop():
                    time.sleep(0.5)
                    self._show_capabilities()
                self._write("stopping", "stopping")
            finally:
                self._stop()
            self._instance.clear_state()

    def _show_capabilities(self) -> None:
        if self._capabilities_found.is_set():
            self._capabilities_found.clear()
            self._write("ready", "ready")

    def report_failure(self, error: InstanceError) -> None:
        """Leave the reason where the command line that waits for the start reads it."""
        self._write("failed", "failed", error)

    def _install_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._asked.set())

    def _should_stop(self) -> bool:
        return self._asked.is_set() or (self._owner is not None and not self._owner.is_running())

    def _start(self) -> None:
        settings = self._settings
        for stage, step in (
            ("checking", self._check),
            ("starting the watchdog", self._start_watchdog),
            ("starting storage", self._start_storage),
            ("starting Ray", self._start_ray),
            ("starting the application", self._start_application),
        ):
            if self._should_stop():
                return
            self._write("starting", stage)
            started_at = time.monotonic()
            step()
            logger.info("%s took %.1f s", stage, time.monotonic() - started_at)
        logger.info("listening on %s:%d", settings.host, settings.port)

    def _write(self, phase: Phase, stage: str, error: InstanceError | None = None) -> None:
        settings = self._settings
        self._instance.write_state(
            InstanceState(
                pid=os.getpid(),
                pid_created_at=psutil.Process().create_time(),
                phase=phase,
                stage=stage,
                http_url=url_of(settings.host, settings.port),
                dashboard_url=self._dashboard_url,
                ray_address=self._ray_address,
                storage_capabilities=self._capabilities,
                stop_timeout_s=instance_s(settings.drain_s),
                error_code=error.code if error else None,
                error_message=str(error) if error else None,
            )
        )

    def _check(self) -> None:
        check(self._settings, self._instance.home)

    def _start_watchdog(self) -> None:
        watchdog = subprocess.Popen(
            [sys.executable, "-m", "serve_app.stack.watchdog", str(self._instance.home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

        def dismiss() -> None:
            try:
                watchdog.communicate("done\n", timeout=10)
            except subprocess.TimeoutExpired:
                logger.warning("the watchdog did not end by itself")
                watchdog.kill()

        self._cleanup.callback(dismiss)
        self._cleanup.callback(self._end_leftovers, watchdog.pid)

    def _end_leftovers(self, watchdog_pid: int) -> None:
        ended = self._instance.end_processes(spare=frozenset({watchdog_pid}))
        if ended:
            logger.warning("ended %d processes that had outlived Ray's own shutdown", ended)

    def _start_storage(self) -> None:
        settings = self._settings
        if not settings.uses_embedded_s3():
            return
        check_port(settings.s3_port or 0, "RAYLORA_S3_PORT", settings.s3_host, "RAYLORA_S3_HOST")
        server = EmbeddedS3(
            self._instance.s3_folder,
            settings.s3_port or remembered(self._instance.home / "s3-port", settings.s3_host),
            host=settings.s3_host,
            public_endpoint_url=settings.s3_public_endpoint_url,
            bucket=settings.s3_bucket,
            prefix=settings.s3_prefix,
        )
        server.start()
        self._cleanup.callback(server.stop)
        self._s3_is_near = is_loopback(settings.s3_host)
        self._settings = settings.with_s3(server.settings())

    def _start_ray(self) -> None:
        if self._settings.ray_address is None:
            self._start_own_ray(self._settings)
        else:
            self._join_ray(self._settings.ray_address)
        # Ray's driver installs a SIGTERM handler of its own, which would end this process without a shutdown.
        self._install_signals()

    def _start_own_ray(self, settings: Settings) -> None:
        # Read by Serve's proxy when it starts: it strips headers that no client may set, before any replica sees them.
        os.environ.update(PROXY_ENVIRONMENT)
        folder = ray_folder(self._instance.home)
        if settings.http_proxy == "haproxy":
            self._doors = folder / "haproxy"
            lost = {beginning: lost_body(beginning) for beginning in SURFACES}
            os.environ.update(environment(self._doors, host=settings.host, lost=lost, refused=refused_body()))
        import ray

        from serve_app.stack.ray_node import start_head

        start_head(
            include_dashboard=True,
            dashboard_host=DASHBOARD_HOST,
            dashboard_port=settings.dashboard_port,
            object_store_memory=settings.object_store_bytes,
            _temp_dir=str(folder),
            **RAY_OPTIONS,
        )
        self._cleanup.callback(ray.shutdown)
        self._ray_address = str(ray.get_runtime_context().gcs_address)

    def _join_ray(self, address: str) -> None:
        """Raises ClusterInUse, StorageNotShared."""
        import ray

        from cluster.membership import ClusterTakenError, Membership, nodes_alive

        joined = ray.init(address=address, **RAY_OPTIONS)
        self._cleanup.callback(ray.shutdown)
        self._ray_address = str(ray.get_runtime_context().gcs_address)
        if joined.dashboard_url:
            self._dashboard_url = f"http://{joined.dashboard_url}"
        else:
            logger.warning("the cluster has no dashboard, without which no training can be started")
        if self._s3_is_near and nodes_alive() > 1:
            raise StorageNotShared(nodes_alive())
        try:
            membership = Membership.join(str(self._instance.home))
        except ClusterTakenError as error:
            raise ClusterInUse(error.home) from error
        self._cleanup.callback(membership.leave)
        # An instance that was killed leaves its actors, with the settings of then.
        membership.end_actors()
        self._cleanup.callback(membership.end_actors)
        self._cleanup.callback(self._end_trainings, membership)

    def _end_trainings(self, membership: Membership) -> None:
        from serve_app.stack import trainings
        from train_jobs.launcher import RayJobLauncher

        membership.end_jobs_actor()
        trainings.end(self._submissions, RayJobLauncher(self._dashboard_url), timeout_s=TRAINING_S)

    def _start_application(self) -> None:
        from serve_app.stack.serving import Serving
        from storage.actor import StorageClient
        from storage.jobs_actor import ensure_jobs_actor
        from train_jobs.launcher import RayJobLauncher

        settings = self._settings
        storage = StorageClient(settings.s3(), settings.breaker())
        asyncio.run(storage.ensure_bucket())
        ensure_jobs_actor(settings.jobs_config(), RayJobLauncher(self._dashboard_url))
        serving = Serving(settings, doors=self._doors, shared=settings.ray_address is not None)
        self._cleanup.callback(serving.stop)
        serving.start()
        self._cleanup.callback(self._excuse_trainings)
        self._start_probe(storage)
        self._start_sweeps()

    def _excuse_trainings(self) -> None:
        from serve_app.stack import trainings

        self._submissions = trainings.excuse()

    def _start_probe(self, storage: StoreMaintenance) -> None:
        probe = Background("capabilities", CapabilityProbe(storage.capabilities, self._note_capabilities).run)
        probe.start()
        self._cleanup.callback(probe.stop)

    def _note_capabilities(self, found: dict[str, bool]) -> None:
        """From the probe's thread; the state file is the main thread's to write."""
        self._capabilities = found
        self._capabilities_found.set()

    def _start_sweeps(self) -> None:
        from serve_app.stack.sweeping import PeriodicSweeps, sweeper_of
        from storage.ray_counters import RayCounters

        counters = RayCounters()
        sweeper = sweeper_of(self._settings, self._instance, counters)
        sweeps = PeriodicSweeps(sweeper.run, self._settings.sweep.interval_s, counters)
        sweeps.start()
        self._cleanup.callback(sweeps.stop)

    def _stop(self) -> None:
        """Undo the start in reverse. A step that fails is logged and the rest still runs."""
        while True:
            try:
                self._cleanup.close()
            except Exception:
                # ExitStack has already removed the failing callback; the others must still run.
                logger.exception("a step of the shutdown failed")
                continue
            return


def ray_folder(home: Path) -> Path:
    """Where Ray keeps its session: inside the instance, or a short link to it where the path would be too long.

    Raises PermissionError where another user has put something in the link's place.
    """
    inside = home / "ray"
    inside.mkdir(exist_ok=True, mode=0o700)
    if len(str(inside)) <= RAY_FOLDER_MAX_CHARS:
        return inside
    digest = hashlib.sha256(str(home).encode()).hexdigest()[:10]
    short = Path(tempfile.gettempdir()) / f"rl-{os.getuid()}-{digest}"
    if short.is_symlink() and short.readlink() != inside:
        short.unlink()
    if not short.exists():
        short.symlink_to(inside)
    if short.lstat().st_uid != os.getuid() or not short.is_symlink():
        raise PermissionError(f"{short} is not this user's link")
    return short


def configure_logging(instance: Instance) -> None:
    handler = RotatingFileHandler(instance.log_file, maxBytes=10 * 2**20, backupCount=3)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run one raylora instance in this process.")
    parser.add_argument("--while-pid", type=int, help="stop when this process ends")
    args = parser.parse_args()
    # Ray writes its cluster token and its logs with the process's own mask.
    os.umask(0o077)
    settings = Settings()
    instance = Instance(settings.home)
    instance.prepare()
    configure_logging(instance)
    key, _ = instance.ensure_api_key(settings.api_key)
    settings = settings.model_copy(update={"api_key": key, "home": instance.home})
    os.environ[INSTANCE_VARIABLE] = str(instance.home)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # `python` in a submitted job's command must be this environment's, also where nobody activated it.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    supervisor = Supervisor(settings, instance, args.while_pid)
    try:
        supervisor.run()
    except AlreadyRunning:
        # The state file is the other supervisor's.
        logger.exception("not started")
        return 1
    except InstanceError as exc:
        logger.exception("the instance did not start")
        supervisor.report_failure(exc)
        return 1
    except Exception as exc:
        logger.exception("the instance did not start")
        supervisor.report_failure(StartFailed(type(exc).__name__, instance.log_file))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
