"""Where objects lie.

    <prefix>/<tenant>/datasets/<folder>/<upload_id>/<filename>
    <prefix>/<tenant>/staging/<upload_id>/<filename>
    <prefix>/<tenant>/loras/<lora_id>/{<filename>,manifest.json}
    <prefix>/<tenant>/processes/<process_id>/{lora,checkpoints/<step>,samples,images,logs,inputs,ray-train}/...
    <prefix>/<tenant>/kept/<kind>/<sha256>                   results of caching, shared by trainings
    <prefix>/processes/<process_id>.json                     mirror of a job record, all tenants
    <prefix>/probes/<token>                                  written and removed to try a server out
    <prefix>/{dataset,datasets,results}/...                  of the system before this one, only read

Every part is one validated segment, so a key cannot leave its tenant; every prefix ends with "/", so `matt`
never matches `matt2`. Pure: no I/O.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from storage.errors import InvalidKey

SEGMENT_BYTES_MAX = 200
KEY_BYTES_MAX = 1024
STEM_BYTES_MAX = 180
STEP_DIGITS = 9
MANIFEST_NAME = "manifest.json"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_FOLDER = re.compile(r"[A-Za-z0-9._-]+")
_PUNCTUATION_OF_FILES = frozenset(" ._-+=@,()[]!'&~")
PUNCTUATION_SHOWN = " ".join(sorted(_PUNCTUATION_OF_FILES - {" "}))
_SHA256 = re.compile(r"[0-9a-f]{64}")
_EXTENSION = re.compile(r"[A-Za-z0-9]{1,10}")
_OLDER_DATASETS = ("dataset", "datasets")
_OLDER_RESULTS = "results"
_SIBLINGS_OF_TENANTS = frozenset({"processes", "probes", *_OLDER_DATASETS, _OLDER_RESULTS})


def check_name(value: str, what: str) -> str:
    """An identifier as one segment: ASCII letters, digits, ``. _ -``, not starting with a dot or a dash.

    Raises InvalidKey.
    """
    if not _NAME.fullmatch(value):
        raise InvalidKey(value, f"{what} must be letters, digits, '.', '_' or '-' and start with a letter or digit")
    return _bounded(value, what)


def check_tenant(value: str) -> str:
    """A tenant's name as one segment, and none of those that lie beside tenants. Raises InvalidKey."""
    if check_name(value, "a tenant").lower() in _SIBLINGS_OF_TENANTS:
        raise InvalidKey(value, "this tenant's name is reserved")
    return value


def check_storage_prefix(value: str) -> str:
    """What all keys begin with: segments like names. Raises InvalidKey."""
    for segment in value.split("/"):
        check_name(segment, "a prefix's segment")
    return value


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC), for where names enter: macOS sends them decomposed (NFD)."""
    return unicodedata.normalize("NFC", name)


def check_folder(value: str) -> str:
    """A data set's folder as one segment: ASCII letters, digits, ``. _ -``, whatever it starts with.

    Raises InvalidKey, also for ``.`` and ``..``, which mean other folders.
    """
    if not _FOLDER.fullmatch(value) or value in {".", ".."}:
        raise InvalidKey(value, "a folder must be letters, digits, '.', '_' or '-', and not '.' or '..'")
    return _bounded(value, "a folder")


def check_filename(value: str) -> str:
    """A file's name as one segment: letters and digits of any script, plain punctuation, no leading dot.

    It is to be `composed` already, and is not changed here. Compatibility forms (full-width dots and slashes) are
    refused: some servers write them for the plain ones. Raises InvalidKey.
    """
    if not value or value != value.strip() or value.startswith("."):
        raise InvalidKey(value, "a filename must not be empty, start with a dot or have spaces around it")
    if unicodedata.normalize("NFKC", value) != value:
        raise InvalidKey(value, _not_normal(value))
    refused = next((character for character in value if not _allowed_in_filename(character)), None)
    if refused is not None:
        raise InvalidKey(
            value, f"a filename must not hold {refused!r}: letters, digits, spaces and {PUNCTUATION_SHOWN} only"
        )
    return _bounded(value, "a filename")


def storable_stem(stem: str) -> str:
    """`stem` as part of a name that `check_filename` takes: what it would refuse becomes `_`, and the end is cut."""
    plain = unicodedata.normalize("NFKC", stem)
    kept = "".join(character if _allowed_in_filename(character) else "_" for character in plain).strip()
    return (kept if kept and not kept.startswith(".") else f"_{kept}").encode()[:STEM_BYTES_MAX].decode(errors="ignore")


def check_key(key: str) -> str:
    """Any key that can be sent to any backend, older layouts included. Raises InvalidKey."""
    if len(_utf8(key)) > KEY_BYTES_MAX:
        raise InvalidKey(key, f"a key must be at most {KEY_BYTES_MAX} bytes")
    for segment in key.split("/"):
        if segment in {"", ".", ".."}:
            raise InvalidKey(key, "a key must have no empty or relative segments")
        if "\\" in segment or not segment.isprintable():
            raise InvalidKey(key, "a key must have no backslash or control characters")
        _bounded(segment, "a segment")
    return key


def check_prefix(prefix: str) -> str:
    """A listing's prefix: a key followed by "/". Raises InvalidKey."""
    if not prefix.endswith("/"):
        raise InvalidKey(prefix, "a prefix must end with '/'")
    check_key(prefix[:-1])
    return prefix


def probe_object(prefix: str, token: str) -> str:
    """An object of no tenant. Raises InvalidKey."""
    return check_key(f"{prefix}/probes/{check_name(token, 'a token')}")


def _is_key(text: str) -> bool:
    try:
        check_key(text)
    except InvalidKey:
        return False
    return True


def _not_normal(value: str) -> str:
    if unicodedata.normalize("NFC", value) != value:
        return "a filename must be in Unicode's composed form (NFC)"
    special = next((character for character in value if unicodedata.normalize("NFKC", character) != character), value)
    return f"a filename must not hold {special!r}, a special form of plain characters: write those"


def _allowed_in_filename(character: str) -> bool:
    return character in _PUNCTUATION_OF_FILES or unicodedata.category(character)[0] in "LMN"


def _bounded(segment: str, what: str) -> str:
    if len(_utf8(segment)) > SEGMENT_BYTES_MAX:
        raise InvalidKey(segment, f"{what} must be at most {SEGMENT_BYTES_MAX} bytes")
    return segment


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidKey(text, "a key must be valid Unicode") from error


@dataclass(frozen=True)
class Place:
    """What an object belongs to: the process, upload, adapter or probe `name`; what is kept by hash, to itself.

    `folder` of data sets only.
    """

    kind: Literal["processes", "staging", "datasets", "loras", "kept", "probes"]
    tenant: str
    name: str
    folder: str = ""


def place_of(prefix: str, key: str) -> Place | None:
    """The reverse of `Keys`; None for what `Keys` does not make, such as older layouts and mirrored records."""
    if not key.startswith(f"{prefix}/"):
        return None
    match key.removeprefix(f"{prefix}/").split("/"):
        case ["probes", name]:
            return Place("probes", "", name)
        case [tenant, *_] if tenant.lower() in _SIBLINGS_OF_TENANTS:
            return None
        case [tenant, "processes" | "staging" as kind, name, _, *_]:
            return Place("processes" if kind == "processes" else "staging", tenant, name)
        case [tenant, "datasets", folder, name, _]:
            return Place("datasets", tenant, name, folder)
        case [tenant, "loras", name, _]:
            return Place("loras", tenant, name)
        case [tenant, "kept", _, name]:
            return Place("kept", tenant, name)
    return None


def owner_of(prefix: str, key: str) -> str:
    """What an object belongs to, in words for a log, which holds no keys: a key has names in it that users gave."""
    place = place_of(prefix, key)
    return "something else" if place is None else f"{place.kind} {place.name}"


class Keys:
    """The keys of one tenant. Every method raises InvalidKey for a part that may not be one.

    `reads_older`: what the system before this one, which knew no tenants, has left is this tenant's to read.
    """

    def __init__(self, prefix: str, tenant: str, *, reads_older: bool = False) -> None:
        self._prefix = check_storage_prefix(prefix)
        self.tenant = check_tenant(tenant)
        self.tenant_prefix = f"{self._prefix}/{tenant}/"
        self._reads_older = reads_older

    def owns(self, key: str) -> bool:
        """Whether `key` is a usable key of this tenant."""
        return _is_key(key) and key.startswith(self.tenant_prefix)

    def may_read(self, key: str) -> bool:
        """Whether `key` is this tenant's, or of the older layout and so for it to read."""
        older = (*self.older_datasets_prefixes(), *self.older_results_prefixes())
        return self.owns(key) or (_is_key(key) and key.startswith(older))

    def older_datasets_prefixes(self, folder: str | None = None) -> tuple[str, ...]:
        """Of all data sets of the older layout, or of the one in `folder`. Empty where they are not to be read."""
        if not self._reads_older:
            return ()
        below = "" if folder is None else f"{check_folder(folder)}/"
        return tuple(f"{self._prefix}/{name}/{below}" for name in _OLDER_DATASETS)

    def older_results_prefixes(self) -> tuple[str, ...]:
        return (f"{self._prefix}/{_OLDER_RESULTS}/",) if self._reads_older else ()

    def datasets_prefix(self) -> str:
        return f"{self.tenant_prefix}datasets/"

    def dataset_manifests_prefix(self, folder: str) -> str:
        """Below it are the uploads of a folder: their files and, last of all written, their manifests."""
        return f"{self.datasets_prefix()}{check_folder(folder)}/"

    def dataset_file(self, folder: str, upload_id: str, filename: str) -> str:
        if check_filename(filename).lower() == MANIFEST_NAME:
            raise InvalidKey(filename, f"{MANIFEST_NAME} is reserved")
        return f"{self._upload(folder, upload_id)}{filename}"

    def dataset_manifest(self, folder: str, upload_id: str) -> str:
        return f"{self._upload(folder, upload_id)}{MANIFEST_NAME}"

    def stagings_prefix(self) -> str:
        return f"{self.tenant_prefix}staging/"

    def staging_prefix(self, upload_id: str) -> str:
        return f"{self.stagings_prefix()}{check_name(upload_id, 'an upload id')}/"

    def staging_file(self, upload_id: str, filename: str) -> str:
        """Where a presigned upload lands before it is verified."""
        if check_filename(filename).lower() == MANIFEST_NAME:
            raise InvalidKey(filename, f"{MANIFEST_NAME} is reserved")
        return f"{self.staging_prefix(upload_id)}{filename}"

    def staging_manifest(self, upload_id: str) -> str:
        """What an upload promised to bring."""
        return f"{self.staging_prefix(upload_id)}{MANIFEST_NAME}"

    def loras_prefix(self) -> str:
        """Adapters that were brought in, not trained here."""
        return f"{self.tenant_prefix}loras/"

    def imported_lora_file(self, lora_id: str, filename: str) -> str:
        if check_filename(filename).lower() == MANIFEST_NAME:
            raise InvalidKey(filename, f"{MANIFEST_NAME} is reserved")
        return f"{self.loras_prefix()}{check_name(lora_id, 'an adapter id')}/{filename}"

    def imported_lora_manifest(self, lora_id: str) -> str:
        return f"{self.loras_prefix()}{check_name(lora_id, 'an adapter id')}/{MANIFEST_NAME}"

    def process_prefix(self, process_id: str) -> str:
        return f"{self.tenant_prefix}processes/{check_name(process_id, 'a process id')}/"

    def lora_file(self, process_id: str, filename: str) -> str:
        return f"{self.process_prefix(process_id)}lora/{check_filename(filename)}"

    def checkpoints_prefix(self, process_id: str) -> str:
        return f"{self.process_prefix(process_id)}checkpoints/"

    def checkpoint_file(self, process_id: str, step: int, filename: str) -> str:
        """`step` is zero-padded, so that key order is step order."""
        return f"{self.checkpoints_prefix(process_id)}{_number(step, STEP_DIGITS)}/{check_filename(filename)}"

    def samples_prefix(self, process_id: str) -> str:
        return f"{self.process_prefix(process_id)}samples/"

    def sample_image(self, process_id: str, step: int, index: int, ext: str) -> str:
        name = f"{_number(step, STEP_DIGITS)}_{_number(index, 4)}.{_extension(ext)}"
        return f"{self.samples_prefix(process_id)}{name}"

    def training_log(self, process_id: str, name: str) -> str:
        return f"{self.process_prefix(process_id)}logs/{check_filename(name)}"

    def ray_train_prefix(self, process_id: str) -> str:
        """Ray Train's own files, of use to nobody once its run has ended."""
        return f"{self.process_prefix(process_id)}ray-train/"

    def images_prefix(self, process_id: str) -> str:
        return f"{self.process_prefix(process_id)}images/"

    def image(self, process_id: str, index: int, sha256: str, ext: str) -> str:
        """The content's hash is in the key, so an image is never overwritten by another one."""
        if not _SHA256.fullmatch(sha256):
            raise InvalidKey(sha256, "a sha256 must be 64 lower-case hex digits")
        return f"{self.images_prefix(process_id)}{_number(index, 4)}_{sha256}.{_extension(ext)}"

    def kept(self, kind: str, sha256: str) -> str:
        """A result kept for later runs, by the hash of what it was made from."""
        if not _SHA256.fullmatch(sha256):
            raise InvalidKey(sha256, "a sha256 must be 64 lower-case hex digits")
        return f"{self.tenant_prefix}kept/{check_name(kind, 'a kind')}/{sha256}"

    def inputs_prefix(self, process_id: str) -> str:
        """Pictures that a generation starts from."""
        return f"{self.process_prefix(process_id)}inputs/"

    def input_picture(self, process_id: str, role: str, sha256: str, ext: str) -> str:
        """`role`: what the request calls it, such as `mask`."""
        if not _SHA256.fullmatch(sha256):
            raise InvalidKey(sha256, "a sha256 must be 64 lower-case hex digits")
        return f"{self.inputs_prefix(process_id)}{check_name(role, 'a role')}_{sha256}.{_extension(ext)}"

    def process_records_prefix(self) -> str:
        """The mirror of the job records, of all tenants."""
        return f"{self._prefix}/processes/"

    def process_record(self, process_id: str) -> str:
        return f"{self.process_records_prefix()}{check_name(process_id, 'a process id')}.json"

    def _upload(self, folder: str, upload_id: str) -> str:
        return f"{self.dataset_manifests_prefix(folder)}{check_name(upload_id, 'an upload id')}/"


def _number(value: int, digits: int) -> str:
    if not 0 <= value < 10**digits:
        raise InvalidKey(str(value), f"a number must be between 0 and {10**digits - 1}")
    return f"{value:0{digits}d}"


def _extension(ext: str) -> str:
    plain = ext.removeprefix(".")
    if not _EXTENSION.fullmatch(plain):
        raise InvalidKey(ext, "an extension must be 1 to 10 letters or digits")
    return plain.lower()
