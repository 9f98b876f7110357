"""The API's requests and responses: OpenAI's names and types, with our extensions marked."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.errors import InvalidRequest
from service.setting_types import MODEL_NAME

# Fields that a server may ignore: the images are those of a request without them.
IGNORABLE_FIELDS = {"quality", "style", "background", "moderation", "output_compression", "partial_images"}
IGNORABLE_FIELDS |= {"user", "size", "steps"}
FIELD_ADVICE = {
    "extra_body": "put the fields in it at the top level of the request",
    "seed": "leave seed out for a random one",
    "size": "give auto or WIDTHxHEIGHT, or leave size out",
    "steps": "leave steps out for one step",
    "style": "the model has no choice of styles",
}  # by field: the fix, if pydantic's message does not name it
PATTERN_ADVICE = {
    "suffix": "give 1 to 64 letters, digits, dots, hyphens or underscores",
    "name": "give 1 to 128 letters, digits, dots, hyphens, underscores or colons, and begin with a letter or digit",
    "preset": "GET /v1/fine_tuning/choices lists them",
    "method": "GET /v1/fine_tuning/choices lists them",
}  # by field: what its pattern allows
MAX_NAMED_FIELDS = 16  # maximum number of unsupported fields that a warning names
MAX_NAME_CHARACTERS = 64  # of each
MAX_ID_CHARACTERS = 64  # of the id that a client gives a message of a realtime session
OutputFormat = Literal["png", "jpeg", "webp"]
PriorityName = Literal["interactive", "batch"]
Decoder = Literal["full", "small"]
SIZE = "WIDTHxHEIGHT, one of the model's `sizes`; `auto`, the default, is its first one."
COMPRESSION = "Quality of jpeg and webp; 100 by default."
NEUTRAL = "Has no effect here."
STEPS = "Extension. Network evaluations per image, at most the model's `max_steps`; 1 by default."


class RequestModel(BaseModel):
    """An object that clients send: unknown fields and values of other types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _not_blank(prompt: str) -> str:
    if not prompt.strip():
        raise PydanticCustomError("blank_prompt", "Input is blank; describe an image")
    return prompt


Prompt = Annotated[
    str,
    Field(
        max_length=32_000,
        examples=["a red circle left of a blue star"],
        json_schema_extra={"minLength": 1, "pattern": r"\S"},
    ),
    AfterValidator(_not_blank),
]


class LoraChoice(RequestModel):
    """An adapter of the model, and its scale."""

    name: Annotated[str, Field(min_length=1, max_length=128, description="One of the model's `adapters`.")]
    scale: Annotated[float, Field(ge=-4, le=4, description="Its strength; 0 is the model without it.")] = 1.0


class ImageRequest(RequestModel):
    """`POST /v1/images/generations`. Fields without a meaning for the models accept their neutral value only.

    With the validation context `{"unsupported": "warn"}`, unknown fields and unsupported values of IGNORABLE_FIELDS are
    left out, with a warning that names them.
    """

    prompt: Prompt
    model: Annotated[str | None, Field(description="A name of `GET /v1/models`; its first one by default.")] = None
    n: Annotated[int, Field(ge=1, le=10, description="Number of images; 1 by default.")] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description=SIZE)] | None = None
    response_format: Annotated[Literal["b64_json", "url"] | None, Field(description="`url`: links that expire.")] = None
    output_format: Annotated[OutputFormat | None, Field(description="`png` by default.")] = None
    output_compression: Annotated[int, Field(ge=0, le=100, description=COMPRESSION)] | None = None
    quality: Annotated[Literal["auto", "standard"] | None, Field(description=NEUTRAL)] = None
    background: Annotated[Literal["auto", "opaque"] | None, Field(description=NEUTRAL)] = None
    moderation: Annotated[Literal["auto", "low"] | None, Field(description="`low` blocks less.")] = None
    style: Annotated[None, Field(description="Not supported.")] = None
    stream: Annotated[bool | None, Field(description="Answer with one server-sent event, for n = 1.")] = None
    partial_images: Annotated[int, Field(ge=0, le=3, description="Accepted; none are sent.")] | None = None
    user: Annotated[str, Field(max_length=256, description="Written to the server's log.")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**53, description="Extension. Image i of n uses seed + i.")] | None = None
    priority: Annotated[PriorityName | None, Field(description="Extension. `batch` waits for interactive work.")] = None
    lora: Annotated[LoraChoice | None, Field(description="Extension. An adapter of the model.")] = None
    timeout: Annotated[float, Field(ge=0.1, le=3600, description="Extension. Limit in seconds.")] | None = None
    steps: Annotated[int, Field(ge=1, description=STEPS)] | None = None
    _warnings: list[str] | None = PrivateAttr(None)

    @property
    def warnings(self) -> list[str] | None:
        """Deviations from the request; None if they are errors."""
        return self._warnings

    def reject(self, field: str, message: str) -> None:
        """Warn that a field is ignored, or raise InvalidRequest if that is an error."""
        if self._warnings is None:
            raise InvalidRequest(f"{field}: {message}", field, "invalid_value")
        self._warnings.append(f"{field} is ignored: {message}")

    @model_validator(mode="wrap")
    @classmethod
    def _ignore_unsupported(cls, given: Any, validate: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if not isinstance(given, dict) or (info.context or {}).get("unsupported") != "warn":
            return validate(given)
        warnings = []
        if given.get("seed") == -1:
            given = {**given, "seed": None}
            warnings.append("seed -1 is a random seed here; leave seed out for one")
        try:
            made = validate(given)
        except ValidationError as error:
            unsupported = _ignorable(error)
            made = validate({name: value for name, value in given.items() if name not in unsupported})
            named = list(unsupported.items())[:MAX_NAMED_FIELDS]
            warnings += [f"{_escaped(name)} is ignored: {reason}" for name, reason in named]
            if more := len(unsupported) - len(named):
                warnings.append(f"{more} more fields are ignored")
        made._warnings = warnings
        return made


def _ignorable(error: ValidationError) -> dict[str, str]:
    """Return the invalid fields that may be ignored, and the reasons."""
    fields: dict[str, str] = {}
    for each in error.errors(include_input=False, include_url=False):
        name, *within = map(str, each["loc"] or [""])  # the location is empty for a name that is not valid text
        if each["type"] == "extra_forbidden" and not within:
            fields[name] = FIELD_ADVICE.get(name, "there is no such field")
        elif name in IGNORABLE_FIELDS:
            fields.setdefault(name, FIELD_ADVICE.get(name, each["msg"]))
    return fields


def _escaped(name: str) -> str:
    """Return a field's name from a client, safe for headers and logs."""
    return ascii(name[:MAX_NAME_CHARACTERS])[1:-1]


class ImageData(BaseModel):
    """One image, as Base64 or as a link. `seed` is an extension: it reproduces the image."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class TokenDetails(BaseModel):
    """Tokens by kind."""

    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Input text tokens (start and end included) and output latent patches."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class ImagesResponse(BaseModel):
    """The response. Extensions: `decoder`, what made the pixels, and `warnings`, present if there are any."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    size: str
    usage: Usage
    decoder: Decoder
    warnings: list[str] | None = None


class ImageCompleted(BaseModel):
    """The one event of a stream. `decoder`, `seed` and `warnings` are extensions."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    b64_json: str
    created_at: int
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    size: str
    usage: Usage
    decoder: Decoder
    seed: int
    warnings: list[str] | None = None


class Model(BaseModel):
    """One student, or another name of one. All fields after `owned_by`, its teacher, are extensions.

    `sizes`, `adapters` and `max_steps` are the values of `size`, `lora` and `steps` that the model supports. `decoder`
    is what makes the pixels: `full`, the model's VAE, or `small`.
    """

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str
    sizes: list[str]
    adapters: list[str]
    max_steps: int
    decoder: Decoder
    description: Annotated[str, Field(description="What the model's card says of it.")] = ""
    examples: Annotated[list[str], Field(description="Prompts of the card.")] = []


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Model]


class SessionStart(RequestModel):
    """The optional first message of a realtime session. `api_key` is for browsers, which cannot send the header."""

    type: Literal["session.start"]
    api_key: Annotated[str, Field(max_length=512)] | None = None
    frames: Literal["base64", "binary"] | None = None


class RealtimeRequest(ImageRequest):
    """A request of a realtime session. Links, streams and partial images have no meaning here."""

    type: Literal["images.generate"]
    id: Annotated[str, Field(max_length=MAX_ID_CHARACTERS, description="Returned in the answer.")] | None = None
    response_format: Literal["b64_json"] | None = None
    stream: Literal[False] | None = None
    partial_images: Annotated[int, Field(ge=0, le=0)] | None = None


_Folder = Annotated[str, Field(min_length=1, max_length=255)]
_ModelName = Annotated[str, Field(pattern=f"^{MODEL_NAME}$")]


class StudentToLoad(RequestModel):
    """`POST /v1/admin/models`."""

    folder: Annotated[_Folder, Field(description="One of `folders` of the list.")]
    name: Annotated[_ModelName | None, Field(description="The name to serve it by; its own by default.")] = None


class AdapterToLoad(RequestModel):
    """`POST /v1/admin/adapters`."""

    model: str
    folder: Annotated[_Folder, Field(description="One of `adapter_folders` of the list.")]
    name: Annotated[_ModelName, Field(description="The name in `lora`.")]


class LoadedModel(Model):
    """A model as an administrator sees it."""

    aliases: Annotated[list[str], Field(description="Other names of the model.")]
    digest: Annotated[str, Field(description="Digest of the model's files.")]
    runtime_fingerprint: Annotated[
        str, Field(description="Precision, blocks, kernels, replaced parts: with the same digest too, the same images.")
    ]


class LoadedModels(BaseModel):
    """The served models, and the names of the folders that can be loaded."""

    object: Literal["list"] = "list"
    data: list[LoadedModel]
    folders: list[str]
    adapter_folders: list[str]


class Deleted(BaseModel):
    """A file or job that is deleted, or a model or adapter that is unloaded."""

    id: str
    object: Literal["file", "model", "adapter", "fine_tuning.job"]
    deleted: Literal[True] = True


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorBody
