"""Every setting of the HTTP side, each with its one default.

Precedence: constructor arguments, then the environment (``RAYLORA_<FIELD>``), then the file named by
``RAYLORA_CONFIG`` (TOML, or YAML by its suffix), then the defaults below. Nothing else reads the environment.
"""

from __future__ import annotations

import os
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
    YamlConfigSettingsSource,
)

from serve_app.names import StoragePrefix, Tenant
from serve_app.webhook_secrets import MARK as WEBHOOK_MARK
from serve_app.webhook_secrets import WebhookSecrets, decoded
from storage.jobs_config import JobsConfig
from storage.settings import BreakerSettings, RecordsSettings, S3Settings, SweepSettings

CONFIG_FILE_VARIABLE = "RAYLORA_CONFIG"
# A name or an address; what has colons is one of IPv6.
HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
TENANT_KEY_LENGTH_MIN = 16
TINY_MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny" / "model"
MIB = 1024 * 1024
TRAINING_WORKERS_MAX = 16
Rounded = Literal["float8", "int8", "nf4"]


Origin = Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?$")]


class SettingsIncomplete(ValueError):
    """The settings lack something without which this part cannot start; the text names the field."""


class RequestLimits(BaseModel):
    """Sizes and waits at the HTTP edge. Sizes and waits follow RunPod's published limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_body_bytes_max: int = Field(default=10 * MIB, gt=0)
    runsync_body_bytes_max: int = Field(default=20 * MIB, gt=0)
    other_body_bytes_max: int = Field(default=1 * MIB, gt=0)
    runsync_wait_default_s: float = Field(default=90.0, gt=0)
    # The Python client gives up on /stream after 10 s.
    stream_wait_default_s: float = Field(default=5.0, gt=0)
    wait_min_s: float = Field(default=1.0, gt=0)
    wait_max_s: float = Field(default=300.0, gt=0)
    # The JavaScript client gives up on /run after 3 s and would submit again.
    run_answer_s: float = Field(default=2.0, gt=0)
    quick_job_timeout_s: float = Field(default=600.0, gt=0)
    same_body_window_s: float = Field(default=10.0, ge=0)
    idempotency_kept_s: float = Field(default=24 * 3600.0, gt=0)
    run_result_kept_s: float = Field(default=1800.0, gt=0)
    runsync_result_kept_s: float = Field(default=60.0, ge=60)
    url_expires_s: int = Field(default=3600, gt=0)


class WebhookSettings(BaseModel):
    """`secret`: of the webhooks of `default_tenant`, "whsec_" and base64, as receivers configure it.

    Without it, and for every other tenant in any case, secrets are derived from the instance's API key
    (`serve_app.webhook_secrets`).

    `any_address` also allows http and private addresses, for installations whose receivers are beside them; it holds
    for files that an upload names by URL too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    secret: SecretStr | None = None
    any_address: bool = False
    timeout_s: float = Field(default=10.0, gt=0, le=30.0)

    @field_validator("secret")
    @classmethod
    def _is_a_secret(cls, value: SecretStr | None) -> SecretStr | None:
        text = "" if value is None else value.get_secret_value()
        if value is not None and not (text.startswith(WEBHOOK_MARK) and decoded(text)):
            raise ValueError(f"must be {WEBHOOK_MARK} followed by base64")
        return value


class OperationLimit(BaseModel):
    """Calls of one key: `amount` within the window, `concurrent` at the same time (None: any number)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    amount: int = Field(gt=0)
    concurrent: int | None = Field(default=None, gt=0)


class RateLimitSettings(BaseModel):
    """Per key. The numbers are the ones that RunPod publishes; `other` is for routes that RunPod does not have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window_s: int = Field(default=10, gt=0)
    run: OperationLimit = OperationLimit(amount=1000, concurrent=200)
    runsync: OperationLimit = OperationLimit(amount=2000, concurrent=400)
    status: OperationLimit = OperationLimit(amount=2000, concurrent=400)
    stream: OperationLimit = OperationLimit(amount=2000, concurrent=400)
    cancel: OperationLimit = OperationLimit(amount=100, concurrent=20)
    purge: OperationLimit = OperationLimit(amount=2)
    other: OperationLimit = OperationLimit(amount=2000, concurrent=400)

    def of(self, operation: str) -> OperationLimit:
        limit: OperationLimit = getattr(self, operation)
        return limit


class AutoscalingSettings(BaseModel):
    """Inference replicas by work: one for every `generations_target` generations that wait or run.

    None for `generations_target` is the number of pictures in a batch: what is more than that waits. The count is
    averaged over `averaged_over_s`; it must ask for more replicas for `grow_after_s`, and for fewer for
    `shrink_after_s`. A `replicas_min` of 0 keeps no replica while nobody asks; the first generation then starts one at
    once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas_min: int = Field(default=1, ge=0)
    replicas_max: int = Field(ge=1)
    generations_target: int | None = Field(default=None, ge=1)
    averaged_over_s: float = Field(default=30.0, gt=10)
    grow_after_s: float = Field(default=10.0, ge=0)
    shrink_after_s: float = Field(default=300.0, ge=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> AutoscalingSettings:
        if self.replicas_min > self.replicas_max:
            raise ValueError("replicas_min must not be above replicas_max")
        return self


class Settings(BaseSettings):
    """The whole configuration of one installation; frozen and picklable, so it travels to every replica as it is."""

    model_config = SettingsConfigDict(
        env_prefix="RAYLORA_", env_nested_delimiter="__", frozen=True, extra="forbid", hide_input_in_errors=True
    )

    home: Path = Field(default_factory=lambda: Path.home() / ".raylora")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, gt=0, lt=65536)
    # "haproxy" answers several times as fast as Serve's own proxy; see serve_app/stack/haproxy.py for what it opens.
    http_proxy: Literal["serve", "haproxy"] = "serve"
    dashboard_port: int = Field(default=8265, gt=0, lt=65536)
    # None: the instance starts a Ray of its own. "auto" or HOST:PORT: it joins a cluster that runs already.
    ray_address: str | None = None
    object_store_bytes: int = Field(default=512 * MIB, ge=80 * MIB)

    api_key: SecretStr | None = None
    # Origins whose pages may call this server from a browser: `https://studio.example.com`. Never all of them.
    cors_origins: tuple[Origin, ...] = ()
    default_tenant: Tenant = "default"
    # Further tenants by name, each with its key: their jobs, files and adapters are apart from all others'.
    tenant_keys: dict[Tenant, SecretStr] = Field(default_factory=dict)

    models: dict[str, str] = Field(default_factory=lambda: {"tiny": str(TINY_MODEL)}, min_length=1)
    default_model: str = "tiny"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    gpus_per_replica: float | None = Field(default=None, ge=0)
    gpus_per_training_worker: float | None = Field(default=None, ge=0)
    training_workers: int = Field(default=1, ge=1)
    # What one request may ask for; a training with fewer workers than it asked for takes as much longer.
    training_workers_max: int = Field(default=TRAINING_WORKERS_MAX, ge=1)
    training_slots: int = Field(default=1, ge=1)
    # For trainings that ask for Weights & Biases; also by the name that wandb itself reads.
    wandb_api_key: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("wandb_api_key", "raylora_wandb_api_key")
    )
    ingress_replicas: int = Field(default=1, ge=1)
    validation_replicas: int = Field(default=1, ge=1)
    inference_replicas: int = Field(default=1, ge=1)
    # None: always `inference_replicas`.
    autoscaling: AutoscalingSettings | None = None
    # More than a batch holds, so that the downloads and uploads of some overlap the denoising of others.
    generations_per_replica: int = Field(default=16, ge=1)
    pictures_per_batch: int = Field(default=8, ge=1)
    # One: the VAE's activations, not the denoiser's, are the peak of memory.
    pictures_per_decode: int = Field(default=1, ge=1)
    # True: always in tiles, which differ a little where they meet. Otherwise only what does not fit whole.
    vae_tiling: bool = False
    # Models kept loaded in one replica, and what must be free beside a model's weights before it is loaded on a GPU.
    models_loaded_max: int = Field(default=2, ge=1)
    required_mb: int = Field(default=8192, ge=0)
    # True: a model that does not fit whole is still loaded, and its parts take turns on the GPU.
    cpu_offload: bool = False
    compile_models: bool = False
    # What the weights of the linear layers of every model are rounded to when it is loaded.
    quantize: Rounded | None = None
    quantize_text_encoders: Rounded | None = None
    # Of generations that leave it open, on models with blocks to leave out. 0: every step runs whole.
    first_block_cache: float = Field(default=0.0, ge=0.0, le=1.0)
    # One iteration of the engine that lasts longer is a device that hangs: the replica is replaced.
    engine_stuck_after_s: float = Field(default=600.0, gt=0)
    # Adapters in a replica's memory, and on its disk.
    adapter_memory_bytes_max: int = Field(default=2 * 1024 * MIB, ge=0)
    lora_cache_bytes_max: int = Field(default=20 * 1024 * MIB, gt=0)
    # What a generation may still take, at the least, when its replica or the server is told to stop; afterwards it is
    # queued again. See serve_app/shutdown.py for how long the server then takes.
    drain_s: float = Field(default=30.0, ge=0)
    # Generations that wait; beyond them a request is refused with 429 and told when to come again. A tenant may have as
    # many waiting as there are places left: half of them if no other has any.
    generation_queue_max: int = Field(default=1000, ge=1)

    s3_backend: Literal["rclone", "moto", "aws"] = "rclone"
    s3_endpoint_url: str | None = None
    s3_public_endpoint_url: str | None = None
    s3_bucket: str = "raylora"
    s3_prefix: StoragePrefix = "raylora"
    s3_region: str = "us-east-1"
    s3_access_key_id: SecretStr | None = None
    s3_secret_access_key: SecretStr | None = None
    # Of the embedded server. Elsewhere it is reached by an address of this machine, and `s3_public_endpoint_url`.
    s3_host: str = "127.0.0.1"
    # None: a free port, chosen at the first start and kept, so that signed URLs outlive a restart.
    s3_port: int | None = Field(default=None, gt=0, lt=65536)
    records_url: str | None = None

    training_timeout_s: float = Field(default=7200.0, gt=0)
    generation_timeout_s: float = Field(default=600.0, gt=0)
    job_attempts_max: int = Field(default=3, ge=1)
    limits: RequestLimits = Field(default_factory=RequestLimits)
    rate_limits: RateLimitSettings = Field(default_factory=RateLimitSettings)
    webhooks: WebhookSettings = Field(default_factory=WebhookSettings)
    sweep: SweepSettings = Field(default_factory=SweepSettings)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings, *_file_source(settings_cls))

    @field_validator("host")
    @classmethod
    def _is_a_host(cls, host: str) -> str:
        if not HOST.fullmatch(host):
            raise ValueError("must be a host's name or an IP address, without a port")
        return host

    @field_validator("quantize", "quantize_text_encoders")
    @classmethod
    def _package_for_rounding_is_there(cls, rounded: Rounded | None) -> Rounded | None:
        package, extra = ("bitsandbytes", "nf4") if rounded == "nf4" else ("torchao", "quantized")
        if rounded is not None and find_spec(package) is None:
            raise ValueError(f"{rounded} needs {package}: install raylora[{extra}] on every node, or leave this unset")
        return rounded

    @model_validator(mode="after")
    def _each_tenant_has_a_key_of_its_own(self) -> Settings:
        given = [key.get_secret_value() for key in self.keys_by_tenant().values()]
        if self.default_tenant in self.tenant_keys or len(set(given)) < len(given):
            raise ValueError("tenant_keys must name other tenants than default_tenant, each with a key of its own")
        if any(len(key) < TENANT_KEY_LENGTH_MIN for key in self.tenant_keys.values()):
            raise ValueError(f"a key in tenant_keys must have at least {TENANT_KEY_LENGTH_MIN} characters")
        return self

    @model_validator(mode="after")
    def _default_model_is_listed(self) -> Settings:
        if self.default_model not in self.models:
            raise ValueError(f"default_model {self.default_model!r} is not one of models: {sorted(self.models)}")
        return self

    @model_validator(mode="after")
    def _an_s3_server_is_named_whole(self) -> Settings:
        keys = {"_ACCESS_KEY_ID": self.s3_access_key_id, "_SECRET_ACCESS_KEY": self.s3_secret_access_key}
        missing = [f"RAYLORA_S3{name}" for name, value in keys.items() if value is None]
        if missing and not self.uses_embedded_s3():
            raise ValueError(
                f"an S3 server of your own needs {' and '.join(missing)}; the embedded one is used where none of "
                "RAYLORA_S3_ENDPOINT_URL, _ACCESS_KEY_ID, _SECRET_ACCESS_KEY and _BACKEND is set"
            )
        return self

    def keys_by_tenant(self) -> dict[str, SecretStr]:
        """Who may call: `api_key`, where it is known, speaks for `default_tenant`."""
        first = {} if self.api_key is None else {self.default_tenant: self.api_key}
        return {**first, **self.tenant_keys}

    def replicas_max(self) -> int:
        """Inference replicas that there can be."""
        return self.inference_replicas if self.autoscaling is None else self.autoscaling.replicas_max

    def may_rest(self) -> bool:
        """Whether there can be times without any inference replica."""
        return self.autoscaling is not None and self.autoscaling.replicas_min == 0

    def uses_embedded_s3(self) -> bool:
        """True where no S3 server is named, so that the stack starts its own on ``s3_port``."""
        named = (self.s3_endpoint_url, self.s3_access_key_id, self.s3_secret_access_key)
        return self.s3_backend == "rclone" and all(value is None for value in named)

    def with_s3(self, s3: S3Settings) -> Settings:
        """These settings pointing at ``s3``: how the stack hands over the server that it started."""
        return self.model_copy(
            update={
                "s3_backend": s3.backend,
                "s3_endpoint_url": s3.endpoint_url,
                "s3_public_endpoint_url": s3.public_endpoint_url,
                "s3_bucket": s3.bucket,
                "s3_prefix": s3.prefix,
                "s3_region": s3.region,
                "s3_access_key_id": s3.access_key_id,
                "s3_secret_access_key": s3.secret_access_key,
            }
        )

    def s3(self) -> S3Settings:
        """Where objects live. Raises SettingsIncomplete where no credentials are set (embedded server not started)."""
        if self.s3_access_key_id is None or self.s3_secret_access_key is None:
            raise SettingsIncomplete("s3_access_key_id and s3_secret_access_key are not set")
        return S3Settings(
            backend=self.s3_backend,
            endpoint_url=self.s3_endpoint_url,
            public_endpoint_url=self.s3_public_endpoint_url,
            bucket=self.s3_bucket,
            prefix=self.s3_prefix,
            region=self.s3_region,
            access_key_id=self.s3_access_key_id,
            secret_access_key=self.s3_secret_access_key,
        )

    def breaker(self) -> BreakerSettings:
        return BreakerSettings()

    def records(self) -> RecordsSettings:
        return RecordsSettings(url=self.records_url or f"sqlite:///{self.home / 'records.db'}")

    def webhook_secrets(self) -> WebhookSecrets:
        """What webhooks are signed with. Raises SettingsIncomplete where there is no API key to derive it from."""
        if self.api_key is None:
            raise SettingsIncomplete("api_key is not set")
        set_one = self.webhooks.secret
        given = {} if set_one is None else {self.default_tenant: decoded(set_one.get_secret_value())}
        return WebhookSecrets(self.api_key.get_secret_value().encode(), given)

    def jobs_config(self) -> JobsConfig:
        """What the jobs actor starts with. Raises SettingsIncomplete like ``s3``."""
        return JobsConfig(
            records=self.records(),
            s3=self.s3(),
            breaker=self.breaker(),
            models=self.models,
            training_slots=self.training_slots,
            training_workers=self.training_workers,
            gpus_per_training_worker=self.gpus_per_training_worker,
            wandb_api_key=self.wandb_api_key,
            reads_older=self.default_tenant,
        )


def _file_source(settings_cls: type[BaseSettings]) -> tuple[PydanticBaseSettingsSource, ...]:
    """The source for the file that RAYLORA_CONFIG names; a named file that is missing is an error, not a default."""
    name = os.environ.get(CONFIG_FILE_VARIABLE)
    if not name:
        return ()
    path = Path(name).expanduser()
    if not path.is_file():
        raise SettingsIncomplete(f"{CONFIG_FILE_VARIABLE} names a file that does not exist")
    is_yaml = path.suffix in {".yaml", ".yml"}
    try:
        if is_yaml:
            return (YamlConfigSettingsSource(settings_cls, yaml_file=path),)
        return (TomlConfigSettingsSource(settings_cls, toml_file=path),)
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError):
        # Without the cause, which may repeat a line that holds a key.
        raise SettingsIncomplete(f"{path} is not valid {'YAML' if is_yaml else 'TOML'}") from None
