"""What files and batches look like on the wire: OpenAI's names and types."""

from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema
from starlette.datastructures import UploadFile

from service.schemas import ImageRequest

Endpoint = Literal["/v1/images/generations"]
Purpose = Literal["batch", "batch_output", "fine-tune", "fine-tune-results"]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\x00]*$")],
        Annotated[str, StringConstraints(max_length=512, pattern=r"^[^\x00]*$")],
    ],
    Field(max_length=16, description="Up to 16 pairs that are kept and given back."),
]


class Upload(BaseModel):
    """The form of `POST /v1/files`."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    file: Annotated[UploadFile, WithJsonSchema({"type": "string", "format": "binary"})]
    purpose: Annotated[Literal["batch", "fine-tune"], Field(description="`batch` or `fine-tune`.")]
    anchor: Annotated[Literal["created_at"] | None, Field(alias="expires_after[anchor]")] = None
    seconds: Annotated[int | None, Field(alias="expires_after[seconds]", ge=3600, le=2_592_000)] = None


class FileObject(BaseModel):
    """A file. Its bytes are at `/v1/files/{id}/content`."""

    id: str
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    object: Literal["file"] = "file"
    purpose: Purpose
    status: Literal["processed"] = "processed"


class FileDeleted(BaseModel):
    """That a file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Expiry(BaseModel):
    """How long something lasts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class BatchRequest(BaseModel):
    """`POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: Annotated[str, Field(description="A file of purpose `batch`: one request a line.")]
    endpoint: Endpoint
    completion_window: Annotated[Literal["24h"], Field(description="What is not made by then is reported as expired.")]
    metadata: Metadata | None = None
    output_expires_after: Annotated[
        Expiry | None, Field(description="How long the output and error files are kept; until deleted if not given.")
    ] = None


class BatchLine(BaseModel):
    """One line of a batch's input file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    custom_id: Annotated[str, Field(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: Endpoint
    body: ImageRequest


class BatchError(BaseModel):
    """Why a batch failed."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(BaseModel):
    """All reasons, or the first hundred."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """Lines, answered lines, and lines that came to an error."""

    total: int
    completed: int
    failed: int


class CachedTokens(BaseModel):
    """None are."""

    cached_tokens: int = 0


class ReasoningTokens(BaseModel):
    """None are."""

    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    """Text tokens in, latent patches out, over all lines so far."""

    input_tokens: int
    input_tokens_details: CachedTokens = CachedTokens()
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int


class BatchObject(BaseModel):
    """A batch; its times are there once they have come."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, Any] | None = None


Item = TypeVar("Item", FileObject, BatchObject)


class Page(BaseModel, Generic[Item]):
    """Some of a list; `after` = `last_id` asks for the rest while `has_more`."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: Sequence[Item], has_more: bool) -> "Page[Item]":
        """A page of these."""
        return cls(
            data=list(data),
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=has_more,
        )
