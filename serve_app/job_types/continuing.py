"""A new training that goes on where an ended one stopped: more steps, or the rest of a cancelled one's."""

from __future__ import annotations

from serve_app.errors import InvalidRequest, TrainingNotEnded
from serve_app.job_types.context import Following, JobContext, Services
from serve_app.job_types.train import queue_training
from storage.job_record import JobRecord
from storage.job_state import JobState
from storage.keys import Keys
from storage.objects import ObjectInfo, ObjectStore
from train_jobs.checkpoint_state import STATE
from train_jobs.errors import Problem
from train_jobs.spec import TrainSpec


async def whole_checkpoints(store: ObjectStore, keys: Keys, process_id: str) -> dict[int, list[tuple[str, ObjectInfo]]]:
    """The files of a training's whole checkpoints, by step, ascending. Raises StorageError."""
    prefix = keys.checkpoints_prefix(process_id)
    steps: dict[int, list[tuple[str, ObjectInfo]]] = {}
    for info in await store.list(prefix):
        step, _, name = info.key.removeprefix(prefix).partition("/")
        if step.isdigit():
            steps.setdefault(int(step), []).append((name, info))
    return {step: files for step, files in sorted(steps.items()) if STATE in {name for name, _ in files}}


async def continue_from(services: Services, context: JobContext, record: JobRecord, steps: int | None) -> Following:
    """Queue a training with the spec of `record`, from its newest checkpoint to `steps` in all; None: its own number.

    Raises TrainingNotEnded unless it has ended, InvalidRequest where no checkpoint is kept or nothing is left to do,
    ModelNotServed, DatasetNotFound, StorageError, JobError.
    """
    if not record.state.is_terminal:
        raise TrainingNotEnded
    spec = TrainSpec.model_validate(record.request)
    kept = await whole_checkpoints(services.store, services.keys_of(record.tenant), record.id)
    if not kept:
        message = "this training has no checkpoint to go on from; start it anew"
        raise InvalidRequest([Problem("training_id", message, "no_checkpoint")])
    done, total = max(kept), spec.train.steps if steps is None else steps
    if total <= done:
        message = f"must be more than the {done} that are done: it is the number of steps in all"
        raise InvalidRequest([Problem("steps", message, "invalid_value")])
    # A validation that ended the training early would end this one before its first step.
    ended_early = record.state is JobState.COMPLETED and done < spec.train.steps
    validation = spec.validation
    if validation is not None and ended_early:
        validation = validation.model_copy(update={"patience": None})
    train = spec.train.model_copy(update={"steps": total})
    more = spec.model_copy(update={"train": train, "validation": validation, "continues": record.id})
    plan = await services.validation.training_spec(more.model_dump(mode="json"))
    return await queue_training(services, context, plan, waits=True)
