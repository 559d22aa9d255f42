"""Every dataset of a training: those trained on, the one for validation, and the masks of each. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from train_jobs.spec import DatasetSpec, TrainSpec


def dataset_names(spec: TrainSpec) -> tuple[str, ...]:
    """The uploaded datasets that it reads, each once."""
    used = [name for dataset in spec.all_datasets for name in (dataset.dataset, dataset.mask_dataset)]
    return tuple(dict.fromkeys(name for name in used if name is not None))


def pinned(spec: TrainSpec, uploads: Mapping[str, str]) -> TrainSpec:
    """With the upload of each dataset that names none. `uploads`: one for every name of `dataset_names`."""
    return with_datasets(spec, [_pinned(dataset, uploads) for dataset in spec.all_datasets])


def with_datasets(spec: TrainSpec, datasets: Sequence[DatasetSpec]) -> TrainSpec:
    """With others in the places of its `all_datasets`, one for each and in that order."""
    trained = spec.model_copy(update={"datasets": tuple(datasets[: len(spec.datasets)])})
    if spec.validation is None or spec.validation.dataset is None:
        return trained
    validation = spec.validation.model_copy(update={"dataset": datasets[-1]})
    return trained.model_copy(update={"validation": validation})


def _pinned(dataset: DatasetSpec, uploads: Mapping[str, str]) -> DatasetSpec:
    change: dict[str, str] = {}
    if dataset.dataset is not None and dataset.upload_id is None:
        change["upload_id"] = uploads[dataset.dataset]
    if dataset.mask_dataset is not None and dataset.mask_upload_id is None:
        change["mask_upload_id"] = uploads[dataset.mask_dataset]
    return dataset.model_copy(update=change)
