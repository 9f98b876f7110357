"""The types of settings: what a value may be, and what it means."""

import base64
import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import limits
from pydantic import AfterValidator, AnyHttpUrl, BeforeValidator, Field, PlainSerializer, SecretStr, TypeAdapter

from service.http.keys import KEY_CHARACTERS, check_token

SHIPPED_TEACHER = "scenes"  # what `distill run` calls it, and its preset
HUB_MODEL = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?", re.ASCII)  # owner/name or owner/name@revision
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"  # pattern of a model's name
_ORIGIN = re.compile(r"\*|[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@]+")


def _checked_by(check: Callable[[Any], object]) -> AfterValidator:
    """Return a validator that keeps a value as it is, unless `check` raises ValueError."""

    def keep(value: Any) -> Any:
        check(value)
        return value

    return AfterValidator(keep)


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
            f"{given!s} is not NAME=FOLDER: a name has at most 128 letters, digits and . _ : -, and begins with a "
            "letter or digit"
        )
    return Student(Path(folder).absolute(), name)


def _teacher(text: str) -> str:
    """The shipped teacher and models of the hub as they are; folders by their absolute path."""
    path = Path(os.path.expanduser(text))
    if path.suffix == ".safetensors":
        raise ValueError(f"{text} is a single file, and jobs take folders and models of the hub")
    is_hub_model = HUB_MODEL.fullmatch(text) is not None and not path.exists()
    return text if text == SHIPPED_TEACHER or is_hub_model else str(path.absolute())


def _serving_devices(devices: str) -> None:
    if not re.fullmatch(r"auto|simulator|mps|(cpu|cuda(:\d+)?)( *, *(cpu|cuda:\d+))*", devices.strip()):
        raise ValueError(f"there is no {devices!r}; give auto, cpu, simulator, or GPUs as cuda:0,cuda:1")


def _job_devices(devices: str) -> None:
    if not re.fullmatch(r"none|cpu(,cpu)*|cuda:\d+(,cuda:\d+)*", devices):
        raise ValueError(f"there is no {devices!r}; give cpu, GPUs as cuda:1,cuda:2, or none")
    names = devices.split(",")
    if names[0] != "cpu" and len(set(names)) < len(names):
        raise ValueError("a GPU is named twice")


def _origin(origin: str) -> str:
    if origin != "null" and not _ORIGIN.fullmatch(origin):
        raise ValueError(f"{origin!r} is not an origin; write scheme://host or scheme://host:port, with * for any host")
    return origin.lower()  # as browsers send it


def _artifact_secret(secret: SecretStr) -> None:
    if len(secret) < KEY_CHARACTERS:
        raise ValueError(f"a secret has at least {KEY_CHARACTERS} characters")


def _webhook_secret(secret: SecretStr) -> None:
    text = secret.get_secret_value()
    if not text.startswith("whsec_") or len(base64.b64decode(text.removeprefix("whsec_"), validate=True)) < 24:
        raise ValueError("a secret is whsec_ and the Base64 of at least 24 random bytes")


Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Bytes = Annotated[int, Field(ge=0)]
Location = Annotated[str, AfterValidator(lambda text: text if "://" in text else str(Path(text).absolute()))]
Teacher = Annotated[str, AfterValidator(_teacher)]
AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]  # means the same in every process
DataFolder = Annotated[AbsolutePath | None, BeforeValidator(lambda given: None if given == "none" else given)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s/]\S*$"), _checked_by(TypeAdapter(AnyHttpUrl).validate_python)]
Network = Annotated[str, _checked_by(lambda text: text == "*" or ipaddress.ip_network(text))]
ApiKey = Annotated[SecretStr, _checked_by(lambda key: check_token(key.get_secret_value()))]
ServedStudent = Annotated[Student, BeforeValidator(_student), PlainSerializer(str)]
Devices = Annotated[str, _checked_by(_serving_devices)]
JobDevices = Annotated[str, _checked_by(_job_devices)]
ArtifactSecret = Annotated[SecretStr, _checked_by(_artifact_secret)]
Origin = Annotated[str, AfterValidator(_origin)]
RateLimit = Annotated[str, _checked_by(limits.parse_many)]  # 100/minute; 5000/day
WebhookSecret = Annotated[SecretStr, _checked_by(_webhook_secret)]
