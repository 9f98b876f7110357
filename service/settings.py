"""Settings of the server: command line, then `SERVICE_*` environment variables, then a TOML file, then defaults."""

import base64
import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import limits
from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from distill.options import RuntimeOptions
from service.errors import StartError
from service.http.keys import KEY_CHARACTERS, check_token
from service.observability.logs import LogFormat

SHIPPED_TEACHER = "scenes"  # what `distill run` calls it, and its preset
PREFIX = "SERVICE_"  # of environment variables
COMMAND_VARIABLES = ("SERVICE_CONFIG", "SERVICE_KEY")  # variables for options of commands, which are not settings
# What Kubernetes sets for Services named `service` or `service-...`, as NAME=VALUE: SERVICE_PORT=tcp://10.0.0.1:80,
# SERVICE_PORT_80_TCP_ADDR=10.0.0.1, SERVICE_SERVICE_HOST=10.0.0.1, SERVICE_API_SERVICE_PORT_HTTP=80
_SERVICE_LINK = re.compile(
    r"SERVICE_(\w+_)?(SERVICE_HOST=.*|SERVICE_PORT(_\w+)?=.*|PORT=\w+://.*|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?=.*)",
    re.IGNORECASE | re.DOTALL,
)

_Count = Annotated[int, Field(ge=1)]
_Seconds = Annotated[float, Field(gt=0)]
_Bytes = Annotated[int, Field(ge=0)]
_HTTP_URL = TypeAdapter(AnyHttpUrl)
_ORIGIN = re.compile(r"\*|[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@]+")


def _url(text: str) -> str:
    _HTTP_URL.validate_python(text)  # raises ValidationError; a string is kept, for its own slashes
    return text


_Url = Annotated[str, Field(pattern=r"^https?://[^\s/]\S*$"), AfterValidator(_url)]


def _each_gpu_once(devices: str) -> str:
    names = devices.split(",")
    if names[0] != "cpu" and len(set(names)) < len(names):
        raise ValueError("a GPU is named twice")
    return devices


def _network(text: str) -> str:
    if text != "*":
        ipaddress.ip_network(text)  # raises ValueError
    return text


def _rates(text: str) -> str:
    limits.parse_many(text)  # raises ValueError
    return text


def _origin(origin: str) -> str:
    if origin != "null" and not _ORIGIN.fullmatch(origin):
        raise ValueError(f"{origin!r} is no origin; write scheme://host or scheme://host:port, with * for any host")
    return origin.lower()  # as browsers send it


def _api_key(key: SecretStr) -> SecretStr:
    check_token(key.get_secret_value())
    return key


def _artifact_secret(secret: SecretStr) -> SecretStr:
    if len(secret) < KEY_CHARACTERS:
        raise ValueError(f"a secret has at least {KEY_CHARACTERS} characters")
    return secret


_ApiKey = Annotated[SecretStr, AfterValidator(_api_key)]
_ArtifactSecret = Annotated[SecretStr, AfterValidator(_artifact_secret)]


def _webhook_secret(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value()
    if not text.startswith("whsec_") or len(base64.b64decode(text.removeprefix("whsec_"), validate=True)) < 24:
        raise ValueError("a secret is whsec_ and the Base64 of at least 24 random bytes")
    return secret


class Endpoint(BaseModel):
    """Who is told when batches and jobs end, and the secret that it knows the server by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: _Url
    secret: Annotated[SecretStr, AfterValidator(_webhook_secret)]


def _none(given: object) -> object:
    return None if given == "none" else given


def _state_folder() -> Path:
    """Where programs keep what should outlive them and is no setting, as the XDG base directories have it."""
    try:
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fgm-service"
    except RuntimeError:
        raise StartError("data: this user has no home folder; name a folder with --data, or `none`") from None


class Settings(BaseSettings):
    """Everything that the server depends on. Lists are JSON in the environment: SERVICE_MODELS='["a", "b"]'."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid")
    stored: ClassVar[Mapping[str, Any]] = {}  # what the TOML file holds

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000  # 0 picks a free one
    models: tuple[Path, ...] = ()  # student folders; none is the student that ships
    students: Path | None = None  # folder whose student folders may be loaded by /v1/admin/models
    aliases: dict[str, str] = {}  # further names: {"gpt-image-1": "scenes-student"}
    devices: str = "auto"  # cpu, simulator, or GPUs as cuda:0,cuda:1; auto is all GPUs but those of jobs, or the CPU
    replicas: _Count = 1  # workers on each device
    threads: _Count | None = None  # CPU threads of each stage of a worker; none shares the cores out
    runtime: RuntimeOptions = RuntimeOptions()
    simulate: Path | None = None  # profile whose model and times the simulator plays
    max_batch: _Count = 16  # images in one call of the network
    p95_seconds: _Seconds | None = None  # batches are kept so small that a request met by a full device is this fast
    profiles: Path | None = None  # folder of measured times; made where it has none of a device and model
    queue_limit: Annotated[int, Field(ge=10)] = 512  # images waiting at most; the largest request must fit
    queue_limit_per_key: Annotated[int, Field(ge=10)] | None = None  # the same for each API key; none is no less
    unsupported: Literal["refuse", "warn"] = "refuse"  # unsupported fields of image requests; warn ignores them
    timeout_seconds: _Seconds = 60.0  # from arrival to answer, where a request does not say; refused if it cannot be
    linger_seconds: Annotated[float, Field(ge=0)] = 0.0  # what a lone image waits for company while nothing runs
    worker_silence_seconds: _Seconds = 30.0  # a worker that says nothing for so long is replaced
    batch_timeout_seconds: _Seconds = 120.0  # a worker whose batch takes longer is replaced
    prompt_cache_bytes: _Bytes = 256 << 20  # embeddings of prompts, in memory that all workers share
    result_cache_bytes: _Bytes = 64 << 20  # images kept for requests of the same prompt, seed and size
    encode_threads: _Count = 2
    max_body_bytes: _Count = 1 << 20
    body_seconds: _Count = 30  # time in which a body must arrive
    api_keys: tuple[_ApiKey, ...] = ()  # in addition to the file's; scopes generate and jobs
    keys_file: Path | None = None  # made by `fgm-service keys create`
    open_to_all: bool = False  # listen beyond the loopback without keys
    rate_limit: Annotated[str, AfterValidator(_rates)] | None = None  # images of one key: "100/minute; 5000/day"
    cors_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()  # web pages of other origins that may call
    public_url: _Url | None = None  # how clients reach the server, for links; none takes the request's own
    trusted_proxies: tuple[Annotated[str, AfterValidator(_network)], ...] = ("127.0.0.1", "::1")
    # addresses and networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed; "*" is all
    keep_alive_seconds: _Count = 75  # how long a connection stays open between requests
    artifacts: str | None = None  # folder or fsspec URL of images given as links; none is one in the data folder
    artifact_seconds: _Count = 3600  # how long such a link lasts
    artifact_secret: _ArtifactSecret | None = None  # signs the links; none draws one, and keeps it in the data folder
    safety: str | None = None  # check of images: "nudenet", or "package.module:Class" of one's own
    provenance: Literal["none", "origin", "prompt"] = "origin"  # said in images: software, model and seed; the prompt
    c2pa_certificates: Path | None = None  # PEM chain, the signer's own first; with c2pa_key images are signed
    c2pa_key: Path | None = None
    c2pa_algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = "es256"
    c2pa_timestamp_url: str | None = None  # authority that dates the signatures
    data: Annotated[Path | None, BeforeValidator(_none)] = Field(default_factory=_state_folder)  # `none` keeps nothing
    database: Annotated[SecretStr, Field(min_length=1)] | None = (
        None  # postgresql://user:password@host/name; none is SQLite in the data folder
    )
    max_file_bytes: _Count = 200 << 20  # of one upload
    file_quota_bytes: _Count = 10 << 30  # of all files of one key
    upload_seconds: _Count = 600  # time in which an upload must arrive
    batch_link_seconds: _Count = 7 * 86_400  # how long links to the images of batches last
    batch_lines_at_once: _Count = 64  # of each batch; what waits for a device and is lost to a kill
    unfinished_batches_per_key: _Count = 50
    job_silence_seconds: _Seconds = 20.0  # the workflows of a server that is silent for so long are taken over
    realtime_limit: Annotated[int, Field(ge=0)] = 256  # realtime sessions that are open at once
    realtime_idle_seconds: _Seconds = 300.0  # a session that asks for nothing for so long is closed
    teachers: dict[str, str] = {SHIPPED_TEACHER: SHIPPED_TEACHER}  # folders by name that jobs distill; that one ships
    job_devices: Annotated[
        str, Field(pattern=r"^(none|cpu(,cpu)*|cuda:\d+(,cuda:\d+)*)$"), AfterValidator(_each_gpu_once)
    ] = "cpu"  # of jobs, a process each
    job_nice: Annotated[int, Field(ge=0, le=19)] = 10  # how far the processes of jobs stand back for the others
    job_students: _Count = 4  # students of jobs that are served, those made last
    jobs_per_key: _Count = 8  # jobs of one key that have not ended
    max_job_images: _Count | None = None  # longest budget of a job in images seen; none sets no bound
    max_job_seconds: _Seconds | None = None  # the same in seconds of training
    webhooks: tuple[Endpoint, ...] = ()  # told when batches and jobs end: [{"url": ..., "secret": "whsec_..."}]
    replay_seconds: _Count = 3600  # how long an Idempotency-Key is remembered
    replay_bytes: _Bytes = 256 << 20
    otlp_endpoint: _Url | None = None  # base URL of an OpenTelemetry collector that spans go to; none makes no spans
    log_prompts: bool = False  # in the line of each request that was understood
    log_format: LogFormat = "json"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_seconds: _Count = 30  # time that running requests get after SIGTERM

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Given values win over the environment, and that over the file. Kubernetes' own variables are removed."""
        assert isinstance(env_settings, EnvSettingsSource)
        variables = env_settings.env_vars.items()
        env_settings.env_vars = {name: value for name, value in variables if not _is_service_link(name, value or "")}
        return init_settings, env_settings, InitSettingsSource(settings_cls, dict(cls.stored))

    def check_aliases(self, models: Collection[str]) -> None:
        """Raises StartError for an alias of a model that is not loaded."""
        for alias, name in self.aliases.items():
            if name not in models:
                raise StartError(f"aliases: {alias!r} stands for {name!r}, which is not loaded; there are {[*models]}")

    def lines(self) -> list[str]:
        """The settings as they stand, secrets masked."""
        return [f"{name} = {value}" for name, value in self.model_dump(mode="json").items()]


def read_settings(given: Mapping[str, Any], file: Path | None = None) -> Settings:
    """Settings with some given. Raises StartError naming the key or variable that is wrong."""
    _check_variables()
    kind = Settings
    if file is not None:
        contents = _read_toml(file)

        class FromFile(Settings):
            stored = contents

        kind = FromFile
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]  # the input may be a key
        raise StartError(_complaint(first["loc"], first["type"], first["msg"])) from None
    except SettingsError as error:
        raise StartError(f'{error}; lists are JSON, for example SERVICE_MODELS=\'["one", "two"]\'') from None


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
    """Environment variables of all settings."""
    return [_variable(key) for key in keys()]


def _variable(key: str, prefix: str = PREFIX) -> str:
    return prefix + key.replace(".", "__").upper()


def _check_variables() -> None:
    """Raise StartError for an environment variable that looks like a setting but is not one."""
    known = {*variables(), *COMMAND_VARIABLES}
    for name, value in os.environ.items():
        upper = name.upper()  # variables of settings are read in either case
        if upper.startswith(PREFIX) and upper not in known and not _is_service_link(name, value):
            close = difflib.get_close_matches(upper.removeprefix(PREFIX), (_variable(key, "") for key in keys()), 1)
            advice = f"did you mean {PREFIX}{close[0]}?" if close else "docs/operations.md lists the settings"
            raise StartError(f"there is no setting for the variable {name}; {advice}")


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes set this variable, for a Service whose name begins with `service`."""
    return _SERVICE_LINK.fullmatch(f"{name}={value}") is not None


def _complaint(location: tuple[int | str, ...], kind: str, message: str) -> str:
    """One sentence for an error of pydantic, which names the key and the variable, or the nearest key."""
    known = keys()
    path = ".".join(str(part) for part in location)
    key = next((key for key in known if f"{path}.".startswith(f"{key}.")), None)
    if key is not None:
        return f"{key} ({_variable(key)}): {message.removeprefix('Value error, ')}"
    if kind != "extra_forbidden":  # a value in the place of a group
        return f"{path}: {message}"
    close = difflib.get_close_matches(path, known, 1)
    return f"there is no setting {path!r}" + (f"; did you mean {close[0]!r}?" if close else "")
