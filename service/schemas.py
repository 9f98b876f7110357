"""What goes over the wire: OpenAI's names and types, with our extensions marked."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

OutputFormat = Literal["png", "jpeg", "webp"]


class LoraChoice(BaseModel):
    """An adapter of the model, and how much of it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1, max_length=128)]
    scale: Annotated[float, Field(ge=-4, le=4)] = 1.0


class ImageRequest(BaseModel):
    """`POST /v1/images/generations`. Fields that a one-step student cannot honour take their neutral value only."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=32_000, examples=["a red circle left of a blue star"])]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")] | None = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None, Field(description="`url` answers with links that expire.")
    ] = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: None = None
    stream: Annotated[bool | None, Field(description="Answer with one server-sent event, for n = 1.")] = None
    partial_images: (
        Annotated[
            int, Field(ge=0, le=3, description="At most so many come before the image; one step has none to show.")
        ]
        | None
    ) = None
    user: Annotated[str, Field(max_length=256, description="Kept in the server's log.")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**53, description="Extension. Image i of n uses seed + i.")] | None = None
    priority: Annotated[
        Literal["interactive", "batch"] | None, Field(description="Extension. Bulk work waits for interactive work.")
    ] = None
    lora: Annotated[LoraChoice | None, Field(description="Extension. An adapter that the model has.")] = None
    timeout: (
        Annotated[
            float, Field(ge=0.1, le=3600, description="Extension. Seconds in which the images must be made, else none.")
        ]
        | None
    ) = None


class ImageData(BaseModel):
    """One image, as Base64 or as a link. `seed` is an extension: it makes the image again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class TokenDetails(BaseModel):
    """Tokens by kind."""

    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Text tokens in (start and end included), latent patches out."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class ImagesResponse(BaseModel):
    """`warnings` is an extension, present when there is something to warn of."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    size: str
    usage: Usage
    warnings: list[str] | None = None


class ImageCompleted(BaseModel):
    """The one event of a stream. `seed` and `warnings` are extensions."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    b64_json: str
    created_at: int
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    size: str
    usage: Usage
    seed: int
    warnings: list[str] | None = None


class Model(BaseModel):
    """One student, or another name of one. `sizes` and `adapters` are extensions: what `size` and `lora` may name."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str
    sizes: list[str]
    adapters: list[str]


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class SessionStart(BaseModel):
    """May open a realtime session. The key is for browsers, which cannot send it in a header."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["session.start"]
    api_key: Annotated[str, Field(max_length=512)] | None = None
    frames: Literal["base64", "binary"] | None = None


class RealtimeRequest(ImageRequest):
    """Images for the prompt as it stands now; what is left out of the fields is what has no meaning here."""

    type: Literal["images.generate"]
    id: Annotated[str, Field(max_length=64, description="Comes back in the answer.")] | None = None
    response_format: Literal["b64_json"] | None = None
    stream: Literal[False] | None = None
    partial_images: Annotated[int, Field(ge=0, le=0)] | None = None


class StudentToLoad(BaseModel):
    """`POST /v1/admin/models`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    folder: Annotated[str, Field(min_length=1, max_length=255, description="One of `folders` of the list.")]
    name: Annotated[
        str | None,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$", description="To serve it by; its own if not given."),
    ] = None


class AdapterToLoad(BaseModel):
    """`POST /v1/admin/adapters`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    folder: Annotated[str, Field(min_length=1, max_length=255, description="One of `adapter_folders` of the list.")]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$", description="To ask for it by.")]


class LoadedModel(Model):
    """A model as an administrator sees it."""

    aliases: Annotated[list[str], Field(description="Its further names.")]
    digest: Annotated[str, Field(description="Of the files.")]
    computed: Annotated[
        str, Field(description="Precision, blocks, kernels, replaced parts: with the same digest too, the same images.")
    ]


class LoadedModels(BaseModel):
    """What is served, and the names of the folders that may be loaded."""

    object: Literal["list"] = "list"
    data: list[LoadedModel]
    folders: list[str]
    adapter_folders: list[str]


class ModelDeleted(BaseModel):
    """A model that is served no more. Its files stay."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class AdapterDeleted(BaseModel):
    """An adapter that may be asked for no more. Its file stays."""

    id: str
    object: Literal["adapter"] = "adapter"
    deleted: Literal[True] = True


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """What every refusal looks like."""

    error: ErrorBody
