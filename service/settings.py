"""`Settings` of the server, in groups. `settings_reader` reads them."""

import json
import os
from collections.abc import Collection
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from distill.options import SHIPPED_STUDENT, RuntimeOptions
from service.errors import StartError, without_credentials
from service.files import prepare_data_folder
from service.observability.logs import LogFormat
from service.setting_types import (
    SHIPPED_TEACHER,
    AbsolutePath,
    ApiKey,
    ArtifactSecret,
    Bytes,
    Count,
    DataFolder,
    Devices,
    JobDevices,
    Location,
    Network,
    Origin,
    RateLimit,
    Seconds,
    ServedStudent,
    Student,
    Teacher,
    Url,
    WebhookSecret,
)

PREFIX = "SERVICE_"  # of environment variables


def _state_folder() -> Path:
    """The default data folder, in the state directory of the XDG Base Directory Specification."""
    try:
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fgm-service"
    except RuntimeError:
        raise StartError("data: this user has no home folder; name a folder with --data, or `none`") from None


class _Group(BaseModel):
    """A group of settings: a table in the TOML file, `SERVICE_GROUP__NAME` in the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class WebhookEndpoint(_Group):
    """A URL that is called when batches and jobs end, and the secret that signs the calls."""

    url: Url
    secret: WebhookSecret


class EngineSettings(_Group):
    """Devices, worker processes, batching and caches."""

    devices: Devices = "auto"  # cpu, simulator, or GPUs as cuda:0,cuda:1; auto: GPUs but those of jobs, else the CPU
    workers_per_device: Count = 1
    cpu_threads: Count | None = None  # of each stage of a worker; none divides the cores among the workers
    max_batch: Count = 16  # images in one batch
    batching_window_seconds: Annotated[float, Field(ge=0)] = 0.0  # how long an idle worker waits for more images
    target_p95_seconds: Seconds | None = None  # caps batches so that p95 latency holds when all workers are busy
    tuning_seconds: Annotated[float, Field(ge=0)] = 60.0  # longest search for the fastest `runtime`; 0 does not search
    profiles_folder: AbsolutePath | None = None  # measured batch times; what is missing is measured at the start
    on_demand_adapters: Annotated[int, Field(ge=0)] = 8  # LoRA adapters of `models_folder`, loaded for requests
    on_demand_students: Annotated[int, Field(ge=0)] = 0  # the same of students
    simulated_profile: AbsolutePath | None = None  # profile that `devices = "simulator"` simulates
    max_queued_images: Annotated[int, Field(ge=10)] = 512  # the largest request must fit
    max_queued_images_per_key: Annotated[int, Field(ge=10)] | None = None
    request_timeout_seconds: Seconds = 60.0  # from arrival to response, if the request names none
    batch_timeout_seconds: Seconds = 120.0  # a worker whose batch takes longer is replaced
    heartbeat_timeout_seconds: Seconds = 30.0  # a worker that sends nothing for this long is replaced
    prompt_cache_bytes: Bytes = 256 << 20  # prompt embeddings, in memory shared by all workers
    result_cache_bytes: Bytes = 64 << 20  # finished images, by prompt, seed and size


class HttpSettings(_Group):
    """Address, access, limits of requests and connections."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000  # 0 picks a free one
    public_url: Url | None = None  # base of links in responses; none takes the request's own
    trusted_proxies: tuple[Network, ...] = ("127.0.0.1", "::1")
    # addresses and networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are trusted; "*" is all
    cors_origins: tuple[Origin, ...] = ()  # origins of web pages that may call the server
    api_keys: tuple[ApiKey, ...] = ()  # in addition to the file's; scopes generate and jobs
    keys_file: AbsolutePath | None = None  # made by `fgm-service keys create`
    open_to_all: bool = False  # listen beyond the loopback without keys
    rate_limit: RateLimit | None = None  # images per key: "100/minute; 5000/day"
    max_body_bytes: Count = 1 << 20
    max_realtime_sessions: Annotated[int, Field(ge=0)] = 256
    realtime_idle_seconds: Seconds = 300.0  # a realtime session without a request for this long is closed
    idempotency_cache_bytes: Bytes = 256 << 20  # responses kept for an Idempotency-Key
    keep_alive_seconds: Count = 75  # how long a connection stays open between requests
    drain_seconds: Count = 30  # how long accepted requests may take after SIGTERM


class ImageSettings(_Group):
    """Checks, encoding, metadata and storage of images."""

    unsupported_fields: Literal["refuse", "warn"] = "refuse"  # of image requests; warn ignores and names them
    encode_threads: Count = 2  # that encode PNG, JPEG and WebP
    safety: str | None = None  # check of images: "nudenet", or "package.module:Class" of your own
    provenance: Literal["none", "origin", "prompt"] = "origin"  # metadata: software, model and seed; also the prompt
    c2pa_certificates: AbsolutePath | None = None  # PEM chain, the signer's own first; with c2pa_key images are signed
    c2pa_key: AbsolutePath | None = None
    c2pa_algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = "es256"
    c2pa_timestamp_url: str | None = None  # authority that dates the signatures
    artifacts: Location | None = None  # folder or fsspec URL of images sent as links; none is a folder in `data`
    artifact_link_seconds: Count = 3600  # how long such a link is valid
    artifact_secret: ArtifactSecret | None = None  # signs the links; none generates one and keeps it in `data`


class JobSettings(_Group):
    """Files, batches, fine-tuning jobs and webhooks."""

    database: Annotated[SecretStr, Field(min_length=1)] | None = None
    # postgresql://user:password@host/name; none is SQLite in `data`
    max_file_bytes: Count = 200 << 20  # of one upload
    max_file_bytes_per_key: Count = 10 << 30  # of all files of one key
    upload_timeout_seconds: Count = 600  # time in which an upload must arrive
    max_batches_per_key: Count = 50  # unfinished ones
    concurrent_lines_per_batch: Count = 64  # computed at once; a killed server computes them again
    batch_link_seconds: Count = 7 * 86_400  # how long links to the images of batches are valid
    takeover_seconds: Seconds = 20.0  # after which other servers resume the work of a server that is silent
    teachers: dict[str, Teacher] = {SHIPPED_TEACHER: SHIPPED_TEACHER}  # folders and models of the hub, by name
    devices: JobDevices = "cpu"  # one process each; none leaves jobs to other servers
    nice: Annotated[int, Field(ge=0, le=19)] = 10  # nice value of job processes
    max_jobs_per_key: Count = 8  # unfinished ones
    max_images_per_job: Count | None = None  # largest budget of a job in training images
    max_seconds_per_job: Seconds | None = None  # largest budget of a job in seconds of training
    max_served_students: Count = 4  # newest students of jobs
    webhooks: tuple[WebhookEndpoint, ...] = ()  # called when batches and jobs end


class ObservabilitySettings(_Group):
    """Logs and traces."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat | Literal["auto"] = "auto"  # auto: text on a terminal, else json
    log_prompts: bool = False  # in the log line of every valid request
    otlp_endpoint: Url | None = None  # base URL of an OpenTelemetry collector; none makes no traces


class Settings(BaseSettings):
    """All settings of the server. Lists are JSON in the environment: SERVICE_MODELS='["a", "b"]'."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid")

    models: tuple[ServedStudent, ...] = ()
    # student folders, or name=folder; the first is the default; empty is the shipped student
    models_folder: AbsolutePath | None = None  # students and adapters in it may be loaded at run time
    aliases: dict[str, str] = {}  # further names of models: {"gpt-image-1": "scenes-student"}
    data: DataFolder = Field(default_factory=_state_folder)  # folder of files, batches and jobs; `none` stores nothing
    runtime: RuntimeOptions = RuntimeOptions()
    engine: EngineSettings = EngineSettings()
    http: HttpSettings = HttpSettings()
    images: ImageSettings = ImageSettings()
    jobs: JobSettings = JobSettings()
    observability: ObservabilitySettings = ObservabilitySettings()

    def students(self) -> list[str]:
        """Return the names of `models`, or of the shipped student. Reads no weights.

        Raises StartError for a folder that is not a student, and for two students of one name.
        """
        found: dict[str, Student] = {}
        for student in self.models or (Student(SHIPPED_STUDENT),):
            own = _own_name(student.folder)
            name = student.name or own
            if name in found:
                raise StartError(
                    f"models: {found[name].folder} and {student.folder} are both named {name!r}; give one of them "
                    "another name, as --model NAME=FOLDER"
                )
            found[name] = student
        return [*found]

    def check_paths(self) -> None:
        """Check what the workers read besides models, and create the data folder. Raises StartError."""
        folder, decoder = self.engine.profiles_folder, self.runtime.decoder
        if folder is not None and folder.exists() and not folder.is_dir():
            raise StartError(f"engine.profiles_folder: {folder} is a file; name a folder")
        if isinstance(decoder, Path) and not (decoder / "config.json").is_file():
            raise StartError(
                f"runtime.decoder: {decoder} has no config.json; give auto, full, small, or the folder of an "
                "AutoencoderTiny"
            )
        if self.data is not None:
            prepare_data_folder(self.data)

    def check_aliases(self, models: Collection[str]) -> None:
        """Raise StartError for an alias of a model that is not loaded."""
        for alias, name in self.aliases.items():
            if name not in models:
                raise StartError(f"aliases: {alias!r} stands for {name!r}, which is not loaded; there are {[*models]}")

    def lines(self) -> list[str]:
        """Return the settings that differ from their defaults as `key = value`, secrets masked."""
        own, defaults = self.model_dump(mode="json"), type(self).model_construct().model_dump(mode="json")
        found = []
        for key in keys():
            value, default = (reduce(getitem, key.split("."), values) for values in (own, defaults))
            if value != default:
                found.append(without_credentials(f"{key} = {value}"))
        return found


def _own_name(folder: Path) -> str:
    """Return the name in a student's record."""
    if not folder.is_dir():
        raise StartError(f"model {folder}: there is no such folder; give the folder of a student")
    try:
        return str(json.loads((folder / "onestep.json").read_text(encoding="utf-8"))["name"])
    except FileNotFoundError:
        raise StartError(f"model {folder}: it has no onestep.json; give the folder of a student") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StartError(f"{folder / 'onestep.json'} is not a student's record ({error}); export it again") from None


def keys(kind: type[BaseModel] | None = None, prefix: str = "") -> list[str]:
    """Keys of all settings, those of groups as `group.name`."""
    found: list[str] = []
    for name, field in (kind or Settings).model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            found += keys(group, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found
