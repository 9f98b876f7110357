"""Settings of the server: command line, then `SERVICE_*` environment variables, then a TOML file, then defaults."""

import base64
import difflib
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal

import limits
from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    TypeAdapter,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from distill.options import SHIPPED_STUDENT, RuntimeOptions
from service.errors import StartError
from service.http.keys import KEY_CHARACTERS, check_token
from service.observability.logs import LogFormat

SHIPPED_TEACHER = "scenes"  # what `distill run` calls it, and its preset
HUB_MODEL = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?", re.ASCII)  # owner/name or owner/name@revision
PREFIX = "SERVICE_"  # of environment variables
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"  # pattern of a model's name
COMMAND_VARIABLES = ("SERVICE_CONFIG", "SERVICE_KEY")  # variables for options of commands, which are not settings
# What Kubernetes sets for Services named `service` or `service-...`, as NAME=VALUE: SERVICE_PORT=tcp://10.0.0.1:80,
# SERVICE_PORT_80_TCP_ADDR=10.0.0.1, SERVICE_SERVICE_HOST=10.0.0.1, SERVICE_API_SERVICE_PORT_HTTP=80
_SERVICE_LINK = re.compile(
    r"SERVICE_(\w+_)?(SERVICE_HOST=.*|SERVICE_PORT(_\w+)?=.*|PORT=\w+://.*|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?=.*)",
    re.IGNORECASE | re.DOTALL,
)


def _checked_by(check: Callable[[Any], object]) -> AfterValidator:
    """Return a validator that keeps a value as it is, unless `check` raises ValueError."""

    def keep(value: Any) -> Any:
        check(value)
        return value

    return AfterValidator(keep)


_Count = Annotated[int, Field(ge=1)]
_Seconds = Annotated[float, Field(gt=0)]
_Bytes = Annotated[int, Field(ge=0)]
_Location = Annotated[str, AfterValidator(lambda text: text if "://" in text else str(Path(text).absolute()))]
_Teacher = Annotated[str, AfterValidator(lambda text: _teacher(text))]
_Path = Annotated[Path, AfterValidator(Path.absolute)]  # means the same in every process
_DataFolder = Annotated[_Path | None, BeforeValidator(lambda given: None if given == "none" else given)]
_Url = Annotated[str, Field(pattern=r"^https?://[^\s/]\S*$"), _checked_by(TypeAdapter(AnyHttpUrl).validate_python)]
_Network = Annotated[str, _checked_by(lambda text: text == "*" or ipaddress.ip_network(text))]
_ApiKey = Annotated[SecretStr, _checked_by(lambda key: check_token(key.get_secret_value()))]
_ORIGIN = re.compile(r"\*|[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@]+")


@dataclass(frozen=True)
class Student:
    """A student folder, and the name that it is served by; None is the student's own."""

    folder: Path
    name: str | None = None

    def __str__(self) -> str:
        return str(self.folder) if self.name is None else f"{self.name}={self.folder}"


def _student(given: Any) -> Any:
    """Read `FOLDER` or `NAME=FOLDER`. A folder with an equals sign in its own name is given as ./a=b."""
    if not isinstance(given, str | Path):
        return given
    name, equals, folder = str(given).partition("=")
    if not equals or "/" in name:
        return Student(Path(given).absolute())
    if not re.fullmatch(MODEL_NAME, name) or not folder:
        raise ValueError(
            f"{given!s} is no NAME=FOLDER: a name has at most 128 letters, digits and . _ : -, and begins with a "
            "letter or digit"
        )
    return Student(Path(folder).absolute(), name)


_Student = Annotated[Student, BeforeValidator(_student), PlainSerializer(str)]


def _teacher(text: str) -> str:
    """The shipped teacher and models of the hub as they are; folders by their absolute path."""
    path = Path(os.path.expanduser(text))
    if path.suffix == ".safetensors":
        raise ValueError(f"{text} is a single file, and jobs take folders and models of the hub")
    is_hub_model = HUB_MODEL.fullmatch(text) is not None and not path.exists()
    return text if text == SHIPPED_TEACHER or is_hub_model else str(path.absolute())


def _each_gpu_once(devices: str) -> None:
    names = devices.split(",")
    if names[0] != "cpu" and len(set(names)) < len(names):
        raise ValueError("a GPU is named twice")


def _origin(origin: str) -> str:
    if origin != "null" and not _ORIGIN.fullmatch(origin):
        raise ValueError(f"{origin!r} is no origin; write scheme://host or scheme://host:port, with * for any host")
    return origin.lower()  # as browsers send it


_JobDevices = Annotated[str, Field(pattern=r"^(none|cpu(,cpu)*|cuda:\d+(,cuda:\d+)*)$"), _checked_by(_each_gpu_once)]


def _artifact_secret(secret: SecretStr) -> None:
    if len(secret) < KEY_CHARACTERS:
        raise ValueError(f"a secret has at least {KEY_CHARACTERS} characters")


_ArtifactSecret = Annotated[SecretStr, _checked_by(_artifact_secret)]


def _webhook_secret(secret: SecretStr) -> None:
    text = secret.get_secret_value()
    if not text.startswith("whsec_") or len(base64.b64decode(text.removeprefix("whsec_"), validate=True)) < 24:
        raise ValueError("a secret is whsec_ and the Base64 of at least 24 random bytes")


def _state_folder() -> Path:
    """Where programs keep what should outlive them and is no setting, as the XDG base directories have it."""
    try:
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fgm-service"
    except RuntimeError:
        raise StartError("data: this user has no home folder; name a folder with --data, or `none`") from None


class _Group(BaseModel):
    """A group of settings: a table in the TOML file, `SERVICE_GROUP__NAME` in the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class WebhookEndpoint(_Group):
    """A URL that is called when batches and jobs end, and the secret that signs the calls."""

    url: _Url
    secret: Annotated[SecretStr, _checked_by(_webhook_secret)]


class EngineSettings(_Group):
    """Devices, worker processes, batching and caches."""

    devices: str = "auto"  # cpu, simulator, or GPUs as cuda:0,cuda:1; auto: all GPUs but those of jobs, else the CPU
    workers_per_device: _Count = 1
    cpu_threads: _Count | None = None  # of each stage of a worker; none divides the cores among the workers
    max_batch: _Count = 16  # images in one batch
    batching_window_seconds: Annotated[float, Field(ge=0)] = 0.0  # how long an idle worker waits for more images
    target_p95_seconds: _Seconds | None = None  # caps batches so that p95 latency holds when all workers are busy
    tuning_seconds: Annotated[float, Field(ge=0)] = 60.0  # longest search for the fastest `runtime`; 0 does not search
    profiles_folder: _Path | None = None  # measured batch times; what is missing is measured at the start
    on_demand_adapters: Annotated[int, Field(ge=0)] = 8  # LoRA adapters of `models_folder`, loaded for requests
    on_demand_students: Annotated[int, Field(ge=0)] = 0  # the same of students
    simulated_profile: _Path | None = None  # profile that `devices = "simulator"` imitates
    max_queued_images: Annotated[int, Field(ge=10)] = 512  # the largest request must fit
    max_queued_images_per_key: Annotated[int, Field(ge=10)] | None = None
    request_timeout_seconds: _Seconds = 60.0  # from arrival to answer, if the request names none
    batch_timeout_seconds: _Seconds = 120.0  # a worker whose batch takes longer is replaced
    heartbeat_timeout_seconds: _Seconds = 30.0  # a worker that sends nothing for this long is replaced
    prompt_cache_bytes: _Bytes = 256 << 20  # prompt embeddings, in memory shared by all workers
    result_cache_bytes: _Bytes = 64 << 20  # finished images, by prompt, seed and size


class HttpSettings(_Group):
    """Address, access, limits of requests and connections."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000  # 0 picks a free one
    public_url: _Url | None = None  # base of links in answers; none takes the request's own
    trusted_proxies: tuple[_Network, ...] = ("127.0.0.1", "::1")
    # addresses and networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are used; "*" is all
    cors_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()  # other origins whose pages may call
    api_keys: tuple[_ApiKey, ...] = ()  # in addition to the file's; scopes generate and jobs
    keys_file: _Path | None = None  # made by `fgm-service keys create`
    open_to_all: bool = False  # listen beyond the loopback without keys
    rate_limit: Annotated[str, _checked_by(limits.parse_many)] | None = None  # images per key: "100/minute; 5000/day"
    max_body_bytes: _Count = 1 << 20
    max_realtime_sessions: Annotated[int, Field(ge=0)] = 256
    realtime_idle_seconds: _Seconds = 300.0  # a realtime session without a request for this long is closed
    idempotency_cache_bytes: _Bytes = 256 << 20  # answers kept for an Idempotency-Key
    keep_alive_seconds: _Count = 75  # how long a connection stays open between requests
    drain_seconds: _Count = 30  # time that accepted requests get after SIGTERM


class ImageSettings(_Group):
    """Checks, encoding, labels and storage of images."""

    unsupported_fields: Literal["refuse", "warn"] = "refuse"  # of image requests; warn ignores and names them
    encode_threads: _Count = 2  # that encode PNG, JPEG and WebP
    safety: str | None = None  # check of images: "nudenet", or "package.module:Class" of your own
    provenance: Literal["none", "origin", "prompt"] = "origin"  # metadata: software, model and seed; also the prompt
    c2pa_certificates: _Path | None = None  # PEM chain, the signer's own first; with c2pa_key images are signed
    c2pa_key: _Path | None = None
    c2pa_algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = "es256"
    c2pa_timestamp_url: str | None = None  # authority that dates the signatures
    artifacts: _Location | None = None  # folder or fsspec URL of images sent as links; none is a folder in `data`
    artifact_link_seconds: _Count = 3600  # how long such a link is valid
    artifact_secret: _ArtifactSecret | None = None  # signs the links; none generates one and keeps it in `data`


class JobSettings(_Group):
    """Files, batches, fine-tuning jobs and webhooks."""

    database: Annotated[SecretStr, Field(min_length=1)] | None = None
    # postgresql://user:password@host/name; none is SQLite in `data`
    max_file_bytes: _Count = 200 << 20  # of one upload
    max_file_bytes_per_key: _Count = 10 << 30  # of all files of one key
    upload_timeout_seconds: _Count = 600  # within which an upload must arrive
    max_batches_per_key: _Count = 50  # unfinished ones
    concurrent_lines_per_batch: _Count = 64  # that are being made at once; a killed server makes them again
    batch_link_seconds: _Count = 7 * 86_400  # how long links to the images of batches are valid
    takeover_seconds: _Seconds = 20.0  # after which other servers resume the work of a server that is silent
    teachers: dict[str, _Teacher] = {SHIPPED_TEACHER: SHIPPED_TEACHER}  # folders and models of the hub, by name
    devices: _JobDevices = "cpu"  # one process each; none leaves jobs to other servers
    nice: Annotated[int, Field(ge=0, le=19)] = 10  # nice value of job processes
    max_jobs_per_key: _Count = 8  # unfinished ones
    max_images_per_job: _Count | None = None  # largest budget of a job in training images
    max_seconds_per_job: _Seconds | None = None  # largest budget of a job in seconds of training
    max_served_students: _Count = 4  # students of jobs, the latest ones
    webhooks: tuple[WebhookEndpoint, ...] = ()  # called when batches and jobs end


class ObservabilitySettings(_Group):
    """Logs and traces."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat | Literal["auto"] = "auto"  # auto: text on a terminal, else json
    log_prompts: bool = False  # in the log line of every valid request
    otlp_endpoint: _Url | None = None  # base URL of an OpenTelemetry collector; none makes no traces


class Settings(BaseSettings):
    """All settings of the server. Lists are JSON in the environment: SERVICE_MODELS='["a", "b"]'."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid")

    models: tuple[_Student, ...] = ()
    # student folders, or name=folder; the first is the default; none is the student that ships
    models_folder: _Path | None = None  # students and adapters in it may be loaded at run time
    aliases: dict[str, str] = {}  # further names of models: {"gpt-image-1": "scenes-student"}
    data: _DataFolder = Field(default_factory=_state_folder)  # `none` keeps nothing
    runtime: RuntimeOptions = RuntimeOptions()
    engine: EngineSettings = EngineSettings()
    http: HttpSettings = HttpSettings()
    images: ImageSettings = ImageSettings()
    jobs: JobSettings = JobSettings()
    observability: ObservabilitySettings = ObservabilitySettings()

    def students(self) -> list[str]:
        """Return the names of `models`, or of the shipped student. Reads no weights.

        Raises StartError for a folder that is no student, and for two students of one name.
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
                found.append(f"{key} = {value}")
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
        raise StartError(f"{folder / 'onestep.json'} is no student's record ({error}); export it again") from None


class _Environment(EnvSettingsSource):
    """Settings in the environment. A list that is not JSON is named."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError as error:
            known = next(key for key in keys() if key.rpartition(".")[2] == field_name)
            example = f'{_variable(known)}=\'["one", "two"]\''
            raise StartError(f"{known} ({_variable(known)}): {error}; lists are JSON, as {example}") from None


def read_settings(given: Mapping[str, Any], file: Path | None = None) -> Settings:
    """Read the settings: the given ones (by group) win over the environment, and that over the TOML file.

    Raises StartError naming the key or variable that is wrong.
    """
    _check_variables()
    stored = {} if file is None else _read_toml(file)
    try:
        return Settings(**_merged(_merged(stored, _Environment(Settings)()), given))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]  # the input may be a key
        raise StartError(_complaint(first["loc"], first["type"], first["msg"])) from None


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        name: _merged(below[name], group)
        for name, group in above.items()
        if isinstance(group, Mapping) and isinstance(below.get(name), Mapping)
    }
    return {**below, **above, **nested}


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))  # accepts a byte order mark
    except OSError as error:
        raise StartError(f"the settings file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StartError(f"{file} is not UTF-8; save it in that encoding") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise StartError(f"{file} is not TOML: {error}") from None


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


def variables() -> list[str]:
    return [_variable(key) for key in keys()]


def _variable(key: str, prefix: str = PREFIX) -> str:
    return prefix + key.replace(".", "__").upper()


def _check_variables() -> None:
    """Raise StartError for an environment variable that looks like a setting but is not one."""
    known = {*variables(), *COMMAND_VARIABLES}
    for name, value in os.environ.items():
        upper = name.upper()  # variables of settings are read in either case
        if upper.startswith(PREFIX) and upper not in known and not _SERVICE_LINK.fullmatch(f"{name}={value}"):
            close = _nearest(upper.removeprefix(PREFIX).lower().replace("__", "."))
            advice = f"did you mean {_variable(close)}?" if close else "docs/operations.md lists the settings"
            raise StartError(f"there is no setting for the variable {name}; {advice}")


def _complaint(location: tuple[int | str, ...], kind: str, message: str) -> str:
    """One sentence for an error of pydantic, which names the key and the variable, or the nearest key."""
    path = ".".join(str(part) for part in location)
    key = next((key for key in keys() if f"{path}.".startswith(f"{key}.")), None)
    if kind == "extra_forbidden":
        close = _nearest(path, [] if "." in path else list(Settings.model_fields))
        return f"there is no setting {path!r}" + (f"; did you mean {close!r}?" if close else "")
    if key is not None:
        return f"{key} ({_variable(key)}): {message.removeprefix('Value error, ')}"
    return f"{path} is a group of settings: a table in the file, {path}.NAME on the command line"


def _nearest(key: str, groups: Collection[str] = ()) -> str | None:
    """Return the key that a wrong one probably means: one of the same name in another group, or one spelled alike."""
    name = key.rpartition(".")[2]
    same = [known for known in keys() if known.rpartition(".")[2] == name]
    return next(iter([*same, *difflib.get_close_matches(key, [*keys(), *groups], 1)]), None)
