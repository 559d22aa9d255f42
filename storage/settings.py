"""Settings of the storage layer. Read from the environment elsewhere, in one place; here they are only data."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

MIB = 1024 * 1024


class S3Settings(BaseModel):
    """How to reach the objects.

    `endpoint_url` None means AWS. `public_endpoint_url` is what clients can reach and what presigned URLs are
    signed for; None means `endpoint_url`. Missing keys mean the usual AWS credential chain, with backend "aws"
    only. `deadline_s` bounds an operation with all its calls and attempts, `attempt_timeout_s` one attempt; both grow
    by size / `throughput_min_bytes_per_s` where a body is moved. `bytes_in_flight_max` bounds what a storage actor has
    of each of these at one time: files on their way, objects being read, requests of its node.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint_url: str | None = None
    public_endpoint_url: str | None = None
    region: str = "us-east-1"
    bucket: str = "raylora"
    prefix: str = "raylora"
    access_key_id: SecretStr | None = None
    secret_access_key: SecretStr | None = None
    backend: Literal["rclone", "moto", "aws"] = "rclone"

    # A connection to a server nearby takes no time, but this process may have to wait for a busy machine.
    connect_timeout_s: float = Field(default=5.0, gt=0)
    read_timeout_s: float = Field(default=10.0, gt=0)
    attempt_timeout_s: float = Field(default=30.0, gt=0)
    deadline_s: float = Field(default=120.0, gt=0)
    health_deadline_s: float = Field(default=5.0, gt=0)
    throughput_min_bytes_per_s: int = Field(default=MIB, gt=0)

    attempts_max: int = Field(default=4, ge=1)
    backoff_initial_s: float = Field(default=0.1, ge=0)
    backoff_max_s: float = Field(default=5.0, ge=0)
    retry_budget: int = Field(default=500, ge=0)

    max_concurrency: int = Field(default=64, ge=1)
    multipart_threshold_bytes: int = Field(default=16 * MIB, ge=1)
    part_size_bytes: int = Field(default=16 * MIB, ge=5 * MIB)
    parts_in_flight: int = Field(default=4, ge=1)
    bytes_in_flight_max: int = Field(default=128 * MIB, ge=1)


class BreakerSettings(BaseModel):
    """The breaker opens at `failure_threshold` consecutive failures and lets one probe through after `recovery_s`.

    A probe that has not ended after `probe_timeout_s` is given up and another one may go. `shared` asks storage
    actors to obey the cluster-wide breaker as well as their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    failure_threshold: int = Field(default=5, ge=1)
    recovery_s: float = Field(default=60.0, gt=0)
    probe_timeout_s: float = Field(default=60.0, gt=0)
    shared: bool = True
    sync_interval_s: float = Field(default=1.0, gt=0)


class RecordsSettings(BaseModel):
    """Where the job records are: a SQLAlchemy URL of SQLite or PostgreSQL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str


DAY_S = 24 * 3600.0


class SweepSettings(BaseModel):
    """How long what nobody needs is kept, in seconds; None keeps it for ever. A sweep runs every `interval_s`.

    Results and samples count from the end of their process. The others count from the last sign of life: a presigned
    upload that was never used (`staging`), a data set's or an imported adapter's files without a manifest
    (`unfinished`; also Ray Train's own files of a process that has ended), latents, texts and captions that trainings
    share and can make again (`kept`), a multipart upload (`multipart`), a file that the embedded server left when it
    was killed (`temporary`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    interval_s: float = Field(default=3600.0, gt=0)
    results_ttl_s: float | None = Field(default=None, gt=0)
    samples_ttl_s: float | None = Field(default=None, gt=0)
    staging_ttl_s: float | None = Field(default=DAY_S, gt=0)
    unfinished_ttl_s: float | None = Field(default=DAY_S, gt=0)
    kept_ttl_s: float | None = Field(default=30 * DAY_S, gt=0)
    multipart_ttl_s: float | None = Field(default=DAY_S, gt=0)
    temporary_ttl_s: float | None = Field(default=DAY_S, gt=0)
