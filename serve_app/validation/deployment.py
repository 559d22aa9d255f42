"""The Serve shell of validation: CPU replicas, so that no request's bytes hold up the ingress loop."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from serve_app.outbound import Outbound
from serve_app.refusals import log_refusals_in_one_line
from serve_app.settings import Settings
from serve_app.validation.service import ValidationService
from serve_app.validation.sources import FETCH_TIMEOUT_S
from serve_app.validation.validator import Validator
from storage.actor import StorageClient
from storage.keys import Keys


class Validation(ValidationService):
    def __init__(self, settings: Settings) -> None:
        log_refusals_in_one_line()
        s3 = settings.s3()
        super().__init__(
            Validator(
                settings.models,
                settings.default_model,
                has_wandb_key=settings.wandb_api_key is not None,
                workers_max=settings.training_workers_max,
            ),
            StorageClient(s3, settings.breaker()),
            _keys_of(s3.prefix),
            bucket=s3.bucket,
            clock=_now,
            outbound=Outbound(any_address=settings.webhooks.any_address, timeout_s=FETCH_TIMEOUT_S),
            url_expires_s=settings.limits.url_expires_s,
            models=settings.models,
        )


def _now() -> datetime:
    return datetime.now(UTC)


def _keys_of(prefix: str) -> Callable[[str], Keys]:
    return lambda tenant: Keys(prefix, tenant)
