"""Bodies as they arrive: bytes to a checked envelope."""

import json
import re
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app.errors import BodyInvalid, InvalidRequest
from serve_app.outbound import url_problem
from serve_app.policy import Policy
from serve_app.settings import WebhookSettings
from train_jobs.errors import Problem
from train_jobs.field_problems import problems_of

POLICY_MIN_MS = 5_000
POLICY_MAX_MS = 7 * 24 * 3600 * 1000
S3_CONFIG_IGNORED = "s3Config was ignored: this server stores the results itself, and the output says where"
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")

# A lone half of a surrogate pair: valid JSON, but no text; it would fail far from here.
_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class PolicyFields(BaseModel):
    """RunPod's names; times in ms."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    executionTimeout: int | None = Field(default=None, ge=POLICY_MIN_MS, le=POLICY_MAX_MS)
    ttl: int | None = Field(default=None, ge=POLICY_MIN_MS, le=POLICY_MAX_MS)
    lowPriority: bool = False


class RunEnvelope(BaseModel):
    model_config = ConfigDict(extra="ignore")

    input: dict[str, Any]
    policy: PolicyFields | None = None
    webhook: str | None = None
    # Holds the client's secrets: nothing of it is kept, or told.
    s3Config: dict[str, Any] | None = Field(default=None, repr=False)

    def warnings(self) -> tuple[str, ...]:
        """Of what is taken and does nothing: a client that names a bucket expects its results there."""
        return () if self.s3Config is None else (S3_CONFIG_IGNORED,)

    def job_policy(self) -> Policy:
        fields = self.policy
        if fields is None:
            return Policy()
        return Policy(
            execution_timeout_s=None if fields.executionTimeout is None else fields.executionTimeout / 1000,
            ttl_s=None if fields.ttl is None else fields.ttl / 1000,
            low_priority=fields.lowPriority,
        )


def read_envelope(body: bytes, webhooks: WebhookSettings) -> RunEnvelope:
    """The body of /run and /runsync. Raises BodyInvalid, InvalidRequest with every problem found."""
    document = read_object(body)
    document = {name: value for name, value in document.items() if value is not None}
    try:
        envelope = RunEnvelope.model_validate(document)
    except ValidationError as invalid:
        raise InvalidRequest(problems_of(invalid, RunEnvelope)) from None
    refused = []
    if envelope.webhook is not None:
        problem = url_problem(envelope.webhook, any_address=webhooks.any_address)
        refused += [] if problem is None else [Problem("webhook", problem, "invalid_value")]
    if refused:
        raise InvalidRequest(refused)
    return envelope


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises BodyInvalid; NaN, infinities and lone surrogates are not JSON here."""
    try:
        document = _DECODER.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
        if _MAYBE_SURROGATE.search(body):
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise BodyInvalid("the body is not valid JSON") from None
    if not isinstance(document, dict):
        raise BodyInvalid("the body must be a JSON object")
    return document


def read_idempotency_key(value: str | None) -> str | None:
    """Raises BodyInvalid for a key that could not be stored."""
    if value is not None and not IDEMPOTENCY_KEY.fullmatch(value):
        raise BodyInvalid("Idempotency-Key must be 1 to 255 printable ASCII characters")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


# `json.loads` makes one for each call that has options.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
