"""Files, batches and jobs on the wire, with OpenAI's names and types."""

from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema
from starlette.datastructures import UploadFile

from service.jobs.fine_tuning.options import MAX_COUNT, Count, DistillationOptions
from service.jobs.tables import Table
from service.schemas import ImageRequest, RequestModel

Endpoint = Literal["/v1/images/generations"]
Purpose = Literal["batch", "batch_output", "fine-tune", "fine-tune-results"]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\x00]*$")],
        Annotated[str, StringConstraints(max_length=512, pattern=r"^[^\x00]*$")],
    ],
    Field(max_length=16, description="Up to 16 pairs, which responses return."),
]


class Upload(BaseModel):
    """The form of `POST /v1/files`."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    file: Annotated[UploadFile, WithJsonSchema({"type": "string", "format": "binary"})]
    purpose: Annotated[Literal["batch", "fine-tune"], Field(description="`batch` or `fine-tune`.")]
    anchor: Annotated[Literal["created_at"] | None, Field(alias="expires_after[anchor]")] = None
    seconds: Annotated[int | None, Field(alias="expires_after[seconds]", ge=3600, le=2_592_000)] = None


class RowObject(BaseModel):
    """An object that stands for a row of the database."""

    @classmethod
    def of(cls, row: Table, **others: Any) -> Self:
        """Return the object of a row: the columns that are named like its fields, and the other fields."""
        known = {name: getattr(row, name) for name in cls.model_fields if hasattr(row, name)}
        return cls.model_validate(known | others)


class FileObject(RowObject):
    """A file. Its bytes are at `/v1/files/{id}/content`."""

    id: str
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    object: Literal["file"] = "file"
    purpose: Purpose
    status: Literal["processed"] = "processed"


class Expiry(RequestModel):
    """The lifetime of a file."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class BatchRequest(RequestModel):
    """`POST /v1/batches`."""

    input_file_id: Annotated[str, Field(description="A file of purpose `batch`: one request a line.")]
    endpoint: Endpoint
    completion_window: Annotated[Literal["24h"], Field(description="Lines that are not answered by then expire.")]
    metadata: Metadata | None = None
    output_expires_after: Annotated[
        Expiry | None, Field(description="Lifetime of the output and error files; unlimited by default.")
    ] = None


class BatchLine(RequestModel):
    """One line of a batch's input file."""

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
    """The first hundred errors of a batch."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """Numbers of lines: all, successful, and failed."""

    total: int
    completed: int
    failed: int


class BatchUsage(BaseModel):
    """Text tokens in and latent patches out, of all lines so far."""

    input_tokens: int
    input_tokens_details: dict[Literal["cached_tokens"], Literal[0]] = {"cached_tokens": 0}
    output_tokens: int
    output_tokens_details: dict[Literal["reasoning_tokens"], Literal[0]] = {"reasoning_tokens": 0}
    total_tokens: int


class BatchObject(RowObject):
    """A batch. Times are null until they are reached."""

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


BATCH_SIZE = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_COUNT}, {"enum": ["auto", None]}]}


def _none_if_auto(given: object) -> object:
    return None if given == "auto" else given


class Hyperparameters(RequestModel):
    """OpenAI's hyperparameters; `distillation` has more."""

    # No union with "auto", whose errors would name the part of the union beside the field.
    batch_size: Annotated[Count | None, BeforeValidator(_none_if_auto), WithJsonSchema(BATCH_SIZE)] = None
    n_epochs: Annotated[Literal["auto"] | None, Field(description="The budget is `distillation.images`.")] = None
    learning_rate_multiplier: Annotated[
        Literal["auto"] | None, Field(description="See `distillation.student_lr` and `fake_lr`.")
    ] = None


class Supervised(RequestModel):
    """OpenAI's method, of which only the batch size is used."""

    hyperparameters: Hyperparameters | None = None


class JobMethod(RequestModel):
    """The method of a job: another place for its hyperparameters or its `distillation` object."""

    type: Literal["supervised", "distillation"]
    supervised: Supervised | None = None
    distillation: DistillationOptions | None = None


class JobRequest(RequestModel):
    """`POST /v1/fine_tuning/jobs`: distill a teacher on prompts, and serve the student."""

    model: Annotated[str, Field(description="A teacher of the server.", examples=["scenes"])]
    training_file: Annotated[str, Field(description="Prompts: a file of purpose `fine-tune`.")]
    validation_file: Annotated[None, Field(description="Not supported.")] = None
    suffix: Annotated[
        str | None, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="Part of the student's name.")
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**31, description="Random by default.")] | None = None
    metadata: Metadata | None = None
    hyperparameters: Hyperparameters | None = None
    method: JobMethod | None = None
    integrations: Annotated[None, Field(description="Not supported.")] = None
    distillation: Annotated[DistillationOptions | None, Field(description="Extension. The preset and its changes.")] = (
        None
    )


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class JobHyperparameters(BaseModel):
    """The hyperparameters of a job; `auto` is the value of the preset."""

    batch_size: int | Literal["auto"]
    n_epochs: Literal["auto"] = "auto"
    learning_rate_multiplier: Literal["auto"] = "auto"


class JobMade(BaseModel):
    """The method of a job with its options."""

    type: Literal["distillation"] = "distillation"
    distillation: dict[str, Any]


class JobObject(RowObject):
    """A distillation job. `name`, `phase` and its progress, `images_seen` of `images_total`, are extensions."""

    id: str
    name: Annotated[str, Field(description="The name that its student has or will have.")]
    phase: Annotated[
        Literal["starting", "encoding", "sampling", "training", "exporting"] | None,
        Field(description="What a running job does: `encoding` prompts, `sampling` the teacher's images, ..."),
    ] = None
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None
    estimated_finish: int | None
    fine_tuned_model: Annotated[str | None, Field(description="The student, until it is deleted.")]
    finished_at: int | None
    hyperparameters: JobHyperparameters
    images_seen: int
    images_total: int | None
    integrations: None = None
    metadata: dict[str, Any] | None
    method: JobMade
    model: str
    organization_id: Annotated[str, Field(description="The name of the API key.")]
    result_files: Annotated[list[str], Field(description="The metrics of a job that has succeeded, as CSV.")]
    seed: int
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    trained_tokens: None = None
    training_file: str
    validation_file: None = None


class TeacherChoice(BaseModel):
    """A teacher of the server. One that is not `available` was not fetched, or its folder is gone."""

    name: str
    available: bool


class PresetChoice(BaseModel):
    """A preset of `distill run`, with its budget, batch and method, and the server's teachers that it is made for."""

    name: str
    description: str
    teachers: list[str]
    method: str
    images: int
    batch: int


class MethodChoice(BaseModel):
    """A distillation method."""

    name: str
    description: str


class JobChoices(BaseModel):
    """What a job is chosen from. Budgets of fewer than `min_steps` batches give blur or noise."""

    teachers: list[TeacherChoice]
    presets: list[PresetChoice]
    methods: list[MethodChoice]
    max_images: Annotated[int | None, Field(description="Largest budget in images.")]
    max_seconds: Annotated[float | None, Field(description="Largest budget in seconds.")]
    min_steps: int


class JobEventObject(RowObject):
    """An event of a job. `data` has the metrics of a `metrics` event."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] | None


class JobCheckpointObject(RowObject):
    """A checkpoint of a job with its metrics. The student is that of the best or the last one."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, Any]
    step_number: Annotated[int, Field(description="Images seen.")]


Item = TypeVar("Item", FileObject, BatchObject, JobObject, JobEventObject, JobCheckpointObject)


class Page(BaseModel, Generic[Item]):
    """A page of a list. If `has_more`, `after` = `last_id` requests the next one."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: Sequence[Item], has_more: bool) -> "Page[Item]":
        return cls(
            data=list(data),
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=has_more,
        )
