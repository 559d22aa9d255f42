"""The `input` of RunPod's calls by job type, for the OpenAPI document: made of the models that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from serve_app.ingress.native.bodies import TINY_PNG
from serve_app.job_types.bulk import BulkDownload, DeleteResults
from serve_app.job_types.processes import ProcessChoice, ProcessesPayload
from serve_app.job_types.stored_files import FileChoice, FolderChoice, KeyChoice
from serve_app.job_types.train import TrainPayload
from serve_app.validation.payloads import CreateUploadPayload, FinalizePayload, GeneratePayload, UploadPayload
from serve_app.validation.validator import SPEC_FIELDS
from train_jobs.generate_spec import GenerateSpec

REFERENCES = "#/components/schemas/{model}"
_TRAINING = {
    "job": "extension",
    "config": {
        "name": "zib",
        "process": [
            {
                "type": "sd_trainer",
                "network": {"type": "lora", "linear": 4, "linear_alpha": 4},
                "datasets": [{"folder_path": "zib", "resolution": 64}],
                "train": {"steps": 200, "batch_size": 4, "lr": 0.003},
                "model": {"name_or_path": "tiny"},
            }
        ],
    },
}
_GENERATION = """\
job: generate
config:
  name: star
  process:
    - type: to_folder
      generate: {prompts: [a large red star], width: 64, height: 64, seed: 1}
      model: {name_or_path: tiny}
"""
_CONFIG = {name: TrainPayload.model_json_schema()["properties"][name] for name in ("config", "yaml_config")}
_HAS_CONFIG = [{"required": [name], "properties": {name: {"type": ["string", "object"]}}} for name in _CONFIG]


@dataclass(frozen=True)
class _Input:
    """What one job type takes. `types`: its names; `model`: what reads it, None where it takes nothing."""

    types: tuple[str, ...]
    description: str
    example: dict[str, Any]
    model: type[BaseModel] | None = None


_INPUTS: dict[str, _Input] = {
    "RunpodHealthInput": _Input(("health",), "The state of every part of the server.", {}),
    "RunpodTrainInput": _Input(
        ("train", "train_with_yaml"),
        "Train an adapter: an ai-toolkit configuration as `config` or `yaml_config`, YAML text or the same as JSON. "
        "With `check` it is only reported on, key by key; with `wait` the job lasts as long as the training.",
        {"config": _TRAINING, "wait": True},
        TrainPayload,
    ),
    "RunpodGenerateInput": _Input(
        ("generate",),
        "Draw pictures. `lora` and `model_path` are the short forms of one entry of `loras`.",
        {"prompt": "a large red star", "width": 64, "height": 64, "seed": 1},
        GeneratePayload,
    ),
    "RunpodGenerateConfigInput": _Input(
        ("generate",), "Draw pictures by an ai-toolkit `generate` configuration.", {"config": _GENERATION}
    ),
    "RunpodUploadInput": _Input(
        ("upload_training_data", "upload_training_files"),
        "Store a data set whose files are in the request, each as base64 `content` or an https `url`.",
        {
            "training_name": "zib",
            "trigger_word": "zib",
            "files": [{"filename": "1.png", "content": TINY_PNG}, {"filename": "1.txt", "content": "YSB6aWI="}],
        },
        UploadPayload,
    ),
    "RunpodCreateUploadInput": _Input(
        ("create_upload",),
        "Begin to store a data set beside the request: a URL for a PUT of each file.",
        {"training_name": "zib", "files": [{"filename": "zib.zip", "size": 81_234}]},
        CreateUploadPayload,
    ),
    "RunpodFinalizeUploadInput": _Input(
        ("finalize_upload",),
        "Check what was PUT, and make it the data set.",
        {"token": "20260102T030405000000Z-0123abcd"},
        FinalizePayload,
    ),
    "RunpodProcessesInput": _Input(
        ("processes",), "Trainings and generations, newest first.", {"status": "running", "limit": 20}, ProcessesPayload
    ),
    "RunpodProcessInput": _Input(
        ("process_status", "cancel", "download"),
        "One training or generation: its state, its end, or URLs of its files.",
        {"process_id": "train_0123456789ab"},
        ProcessChoice,
    ),
    "RunpodModelsInput": _Input(("lora", "list_models"), "The adapters of this key.", {}),
    "RunpodDownloadByKeyInput": _Input(
        ("download_by_key",),
        "A URL for a stored file.",
        {"s3_key": "raylora/default/processes/gen_0123456789ab/images/1.png"},
        KeyChoice,
    ),
    "RunpodDownloadFileInput": _Input(
        ("download_file",),
        "A stored file's bytes in base64; a URL where they are over 5 MB.",
        {"file_path": "raylora/default/processes/gen_0123456789ab/images/1.png"},
        FileChoice,
    ),
    "RunpodBulkDownloadInput": _Input(
        ("bulk_download",),
        "URLs for the files of several processes, and for all of them as a zip.",
        {"process_ids": ["train_0123456789ab"], "include_images": False},
        BulkDownload,
    ),
    "RunpodListFilesInput": _Input(
        ("list_files",), "Stored adapters and pictures below a folder.", {"path": "processes"}, FolderChoice
    ),
    "RunpodDatasetFoldersInput": _Input(("list_dataset_folders",), "The names of this key's data sets.", {}),
    "RunpodDeleteResultsInput": _Input(
        ("delete_results",),
        "Delete adapters, samples or pictures; of one process where `process_id` is given.",
        {"result_type": "samples", "process_id": "train_0123456789ab"},
        DeleteResults,
    ),
}


def input_examples() -> list[dict[str, Any]]:
    """One `input` for each of the schemas."""
    return [_example(one) for one in _INPUTS.values()]


def input_schemas() -> dict[str, Any]:
    """The schemas by name, with those that they refer to. Fields that are not named are allowed: they are ignored."""
    helpers: dict[str, Any] = {}
    made = {name: _schema(name, one, helpers) for name, one in _INPUTS.items()}
    return {**helpers, **made}


def input_reference() -> dict[str, Any]:
    """The schema of `input`. A discriminator could not tell the prompt that has no `type`."""
    return {
        "description": "`type` names the job type; a `prompt` without one is `generate`.",
        "anyOf": [{"$ref": REFERENCES.format(model=name)} for name in _INPUTS],
    }


def _example(one: _Input) -> dict[str, Any]:
    return {"type": one.types[0], **one.example}


def _schema(name: str, one: _Input, helpers: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = {} if one.model is None else one.model.model_json_schema(ref_template=REFERENCES)
    helpers |= read.get("$defs", {})
    required = [*read.get("required", []), *([] if one.model is GeneratePayload else ["type"])]
    fields = {**read.get("properties", {}), "type": {"type": "string", "enum": list(one.types)}}
    if one.model is GeneratePayload:
        fields |= _bounded(fields) | _loras(fields)
    if name == "RunpodGenerateConfigInput":
        fields |= _CONFIG | {"wait": {"type": ["boolean", "null"]}}
    return {
        "type": "object",
        "title": name,
        "description": one.description,
        "required": required,
        "properties": fields,
        **({"oneOf": _HAS_CONFIG} if _CONFIG.keys() <= fields.keys() else {}),
        "additionalProperties": True,
        "examples": [_example(one)],
    }


def _loras(properties: dict[str, Any]) -> dict[str, Any]:
    """A text where an adapter is expected is its id."""
    text = {"type": "string", "minLength": 1, "maxLength": 200}
    loras, lora = properties["loras"], properties["lora"]
    items = {"anyOf": [loras["items"], text]}
    return {"loras": {**loras, "items": items}, "lora": {**lora, "anyOf": [*lora["anyOf"], text]}}


def _bounded(properties: dict[str, Any]) -> dict[str, Any]:
    """The fields of a prompt that a generation's spec bounds, which the model hands on as they are."""
    bounds = GenerateSpec.model_json_schema()["properties"]
    shown = {}
    for name in SPEC_FIELDS:
        choices = [choice for choice in bounds[name].get("anyOf", [bounds[name]]) if choice != {"type": "null"}]
        kept = [{key: value for key, value in choice.items() if key not in ("default", "title")} for choice in choices]
        shown[name] = {**properties[name], "anyOf": [*kept, {"type": "null"}]}
    shown["seed"]["anyOf"].append({"const": -1, "description": "Any."})
    shown["output_format"]["anyOf"].append({"const": "jpeg", "description": "The same as jpg."})
    return shown
