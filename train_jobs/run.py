"""The driver of a training, as a program: what `ray job submit` starts.

    python -m train_jobs.run --process-id train_0123456789ab
    python -m train_jobs.run --config my_training.yaml

Ends with 0 when the training completed, 1 when it failed, 2 when the request is invalid, 130 when it was stopped.
SIGINT cancels the training; SIGTERM interrupts it, so that another attempt continues from its checkpoint. Either way
the current step is finished and a checkpoint kept. A second signal ends the program at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tenacity import Retrying, before_sleep_log, retry_if_exception_type, stop_after_attempt, wait_fixed

from storage.actor import NAMESPACE, StorageClient
from storage.arrow_files import arrow_files
from storage.blocking_jobs import BlockingJobs
from storage.counters import CLEANUP_FAILURES, Counters
from storage.errors import JobError, JobNotFound, StorageError
from storage.job_record import JobRecord, NewJob
from storage.job_state import JobKind
from storage.jobs_config import JobsConfig
from storage.keys import Keys
from storage.objects import ObjectStore
from storage.patience import PatientStore
from storage.ray_counters import RayCounters
from train_jobs.aitoolkit import parse_train_yaml
from train_jobs.board import RunBoard, StopReason
from train_jobs.config_check import check_tracking
from train_jobs.driver import Driver, ExitCode
from train_jobs.errors import ConfigInvalid, TrainingError, TrainingInterrupted
from train_jobs.failures import find_training_error
from train_jobs.interfaces import NamedInterfaceConfig
from train_jobs.launcher import SUBMISSION_ID_ENV
from train_jobs.local_datasets import upload_local_datasets
from train_jobs.spec import TrainSpec, WorkersSpec
from train_jobs.spec_json import spec_from_json
from train_jobs.worker import WorkerConfig, train_worker

logger = logging.getLogger(__name__)

BOARD_TIMEOUT_S = 10.0
JOIN_ATTEMPTS_MAX = 3
JOIN_INTERVAL_S = 2.0
WORKER_FAILURES_MAX = 2
RESIZE_INTERVAL_S = 600.0
"""More workers cost what was trained since the last checkpoint, so they are not looked for all the time."""
KEPT_FOLDER = ".cache/raylora/kept"


class BoardHandle:
    """The driver's end of the board's actor."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def latest(self) -> tuple[int, dict[str, Any]]:
        reports, progress = ray.get(self.actor.latest.remote(), timeout=BOARD_TIMEOUT_S)
        return reports, progress

    def ask_to_stop(self, reason: StopReason) -> None:
        ray.get(self.actor.ask_to_stop.remote(reason), timeout=BOARD_TIMEOUT_S)

    def waiting(self, is_waiting: bool) -> None:
        """Of Ray Train's controller, which has its own copy of this. Waits for no answer: nothing hangs on it."""
        self.actor.waiting.remote(is_waiting)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        join_cluster(lambda: ray.init(address="auto", namespace=NAMESPACE, ignore_reinit_error=True))
        jobs = BlockingJobs()
        config = jobs.cluster_config()
        owner = f"driver:{submission_id() or os.getpid()}:{secrets.token_hex(4)}"
        if args.process_id is not None:
            record = jobs.adopt(args.process_id, owner, submission_id=submission_id())
        else:
            record = _record_of_config(jobs, config, args, owner)
        return int(_run(jobs, config, record, owner))
    except ConfigInvalid as invalid:
        for problem in invalid.problems:
            say(f"{problem.path or 'config'}: {problem.message}")
        return int(ExitCode.INVALID)
    except ConnectionError:
        logger.exception("no Ray cluster could be joined")
        say("failed (cluster_unreachable)")
        return int(ExitCode.FAILED)
    except JobNotFound:
        say("there is no such job")
        return int(ExitCode.INVALID)
    except (TrainingError, JobError, StorageError) as error:
        logger.exception("the training could not be started")
        say(f"failed ({error.code})")
        return int(ExitCode.FAILED)
    finally:
        ray.shutdown()


def join_cluster(connect: Callable[[], object], *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Join the cluster that this program was started on, and try again where it does not answer in time.

    Ray gives a driver one minute to find its node, which a busy machine may not keep to. Raises ConnectionError after
    JOIN_ATTEMPTS_MAX attempts.
    """
    Retrying(
        stop=stop_after_attempt(JOIN_ATTEMPTS_MAX),
        wait=wait_fixed(JOIN_INTERVAL_S),
        retry=retry_if_exception_type(ConnectionError),
        before_sleep=before_sleep_log(logger, logging.WARNING),
        sleep=sleep,
        reraise=True,
    )(connect)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train_jobs.run", description="Run one training on this cluster.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--process-id", help="a training whose record exists")
    source.add_argument("--config", type=Path, help="an ai-toolkit YAML, or a JSON spec; local folders are uploaded")
    parser.add_argument("--tenant", default="default", help="whose training it is, with --config")
    parser.add_argument("--name", help="the name of the result, with --config")
    return parser.parse_args(argv)


def _record_of_config(jobs: BlockingJobs, config: JobsConfig, args: argparse.Namespace, owner: str) -> JobRecord:
    """Read the file, upload its folders, and create the record, which is ours from the start."""
    spec = read_config(args.config)
    if args.name:
        spec = spec_from_json(TrainSpec, spec.model_dump() | {"name": args.name}, paths_allowed=True)
    if spec.model not in config.models and Path(spec.model).is_dir():
        spec = spec.model_copy(update={"model": str(Path(spec.model).resolve())})
    captioning = spec.captioning
    if captioning is not None and captioning.model not in config.models and Path(captioning.model).is_dir():
        named = captioning.model_copy(update={"model": str(Path(captioning.model).resolve())})
        spec = spec.model_copy(update={"captioning": named})
    check_tracking(spec, has_key=config.wandb_api_key is not None)
    keys = Keys(config.s3.prefix, args.tenant)
    store = StorageClient(config.s3, config.breaker)
    spec = asyncio.run(upload_local_datasets(store, keys, spec, now=datetime.now(UTC)))
    record = jobs.create(
        NewJob(
            kind=JobKind.TRAINING,
            tenant=args.tenant,
            request=spec.model_dump(mode="json"),
            source="ray",
            submission_id=submission_id(),
            owner=owner,
        )
    )
    say(f"process {record.id}")
    return record


def read_config(path: Path) -> TrainSpec:
    """A local config file: JSON by its suffix, else ai-toolkit YAML. Raises ConfigInvalid."""
    try:
        text = path.read_bytes()
        if path.suffix.lower() == ".json":
            value = json.loads(text)
            if isinstance(value, dict) and "job" not in value:
                return spec_from_json(TrainSpec, value, paths_allowed=True)
            text = json.dumps(value).encode()
    except (OSError, ValueError):
        raise ConfigInvalid([{"path": "", "message": "the file cannot be read", "code": "unreadable"}]) from None
    parsed = parse_train_yaml(text, datasets_are_local=True)
    for warning in parsed.warnings:
        say(f"note: {warning.path}: {warning.message}")
    for ignored in parsed.ignored:
        logger.info("%s is ignored: %s", ignored.path, ignored.reason)
    return parsed.spec


def _run(jobs: BlockingJobs, config: JobsConfig, record: JobRecord, owner: str) -> ExitCode:
    record = jobs.start(record.id, owner, worker_id=ray.get_runtime_context().get_node_id())
    # On the driver's own node: on a worker's it would be lost with it, and tell the others that the driver is gone.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(RunBoard).options(num_cpus=0, scheduling_strategy=here).remote()
    scaling = scaling_for(config, ray.cluster_resources(), TrainSpec.model_validate(record.request).workers)
    work = WorkerConfig(
        process_id=record.id,
        tenant=record.tenant,
        spec=record.request,
        models=dict(config.models),
        # Only this machine's command line makes records of another source than HTTP.
        paths_allowed=record.source != "http",
        s3=config.s3,
        breaker=config.breaker,
        use_gpu=bool(scaling.use_gpu),
        workers=scaling.max_workers,
        wandb_api_key=config.wandb_api_key,
        kept_folder=str(Path.home() / KEPT_FOLDER),
        reads_older=record.tenant == config.reads_older,
    )

    store = StorageClient(config.s3, config.breaker)
    patient = PatientStore(store, tell=BoardHandle(board).waiting)
    train_files = Keys(config.s3.prefix, record.tenant).ray_train_prefix(record.id)

    def fit() -> dict[str, Any]:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"config": work, "board": board},
            torch_config=NamedInterfaceConfig(),
            scaling_config=scaling,
            run_config=RunConfig(
                name=f"{record.id}-{record.attempt}",
                storage_path=train_files.rstrip("/"),
                storage_filesystem=arrow_files(patient, train_files),
                failure_config=FailureConfig(max_failures=WORKER_FAILURES_MAX),
            ),
        )
        result: dict[str, Any] = trainer.fit().return_value or {}
        return result

    driver = Driver(jobs, record.id, owner, BoardHandle(board), fit, explain=explain, say=say)
    _on_signals(driver)
    try:
        return driver.run()
    finally:
        asyncio.run(remove_train_files(store, train_files, RayCounters()))


async def remove_train_files(store: ObjectStore, prefix: str, counters: Counters) -> None:
    """What Ray Train wrote in this and earlier attempts. The training's own checkpoints lie elsewhere.

    A failure is logged and counted, and costs the training nothing.
    """
    try:
        await store.delete_many([info.key for info in await store.list(prefix)])
    except StorageError as error:
        counters.add(CLEANUP_FAILURES, resource="ray_train_files")
        logger.warning("the files of Ray Train were left behind (%s)", error.code)


def scaling_for(config: JobsConfig, resources: dict[str, float], workers: WorkersSpec | None = None) -> ScalingConfig:
    """Workers of one GPU each where the cluster has GPUs, else on CPUs; a setting overrides that.

    A range of `workers` makes the training elastic: Ray Train starts as many as there is room for, also after some were
    lost, and looks now and then whether there is room for more.
    """
    gpus = config.gpus_per_training_worker
    if gpus is None:
        gpus = 1.0 if resources.get("GPU", 0) >= 1 else 0.0
    per_worker = {"CPU": config.cpus_per_training_worker} | ({"GPU": gpus} if gpus > 0 else {})
    count: int | tuple[int, int] = config.training_workers
    if workers is not None:
        count = workers.max if workers.min == workers.max else (workers.min, workers.max)
    return ScalingConfig(
        num_workers=count, use_gpu=gpus > 0, resources_per_worker=per_worker,
        elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
    )  # fmt: skip


def explain(error: BaseException) -> TrainingError:
    """What a failed `fit` is called in the record. The error itself goes to the log only."""
    logger.error("the training ended with an error", exc_info=error)
    workers = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    known = find_training_error([error, *workers])
    if known is not None:
        return known
    if workers and not any(hasattr(worker, "_base_exc") for worker in workers):
        return TrainingInterrupted()
    return TrainingInterrupted() if isinstance(error, ray.exceptions.RayActorError) else TrainingError()


def submission_id() -> str | None:
    """The id of the Ray job this program runs in; None when nobody submitted it."""
    own = os.environ.get(SUBMISSION_ID_ENV)
    if own:
        return own
    try:
        metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    except (ValueError, AttributeError):
        return None
    found = metadata.get("job_submission_id")
    return str(found) if found else None


def _on_signals(driver: Driver) -> None:
    def handle(number: int, _frame: FrameType | None) -> None:
        # From now on the default: a second signal is meant to end this program at once.
        signal.signal(number, lambda *_: os._exit(int(ExitCode.STOPPED)))
        driver.stop("cancelled" if number == signal.SIGINT else "interrupted")

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


def say(line: str) -> None:
    """A line for people, on standard output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
