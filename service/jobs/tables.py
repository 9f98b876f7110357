"""Rows of files, batches and jobs. Times are whole seconds since 1970; owners are the names of API keys."""

from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, MetaData, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ENDED = ("completed", "succeeded", "failed", "expired", "cancelled")  # final statuses of batches and jobs
# What clients request of a job. One that is to be deleted has ended, and no client sees it any more.
PAUSE, CANCEL, DELETE = "pause", "cancel", "delete"


class Table(DeclarativeBase):
    """The base of all tables, with names of constraints for migrations."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy's own form)
        int: BigInteger,
        str: Text,
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
    }


class OwnedTable(Table):
    """A row that clients see by its id, if they are its owner."""

    __abstract__ = True
    noun: ClassVar[str]
    path: ClassVar[str]  # of the list of its rows

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    created_at: Mapped[int]


class FileRow(OwnedTable):
    """A file whose bytes are in the files folder under its id."""

    __tablename__ = "files"
    __table_args__ = (Index(None, "owner", "created_at", "id"), Index(None, "expires_at"))
    noun, path = "file", "/v1/files"

    purpose: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int]
    expires_at: Mapped[int | None]


class BatchRow(OwnedTable):
    """A bulk batch. Its counts change in the transactions that add answers."""

    __tablename__ = "batches"
    __table_args__ = (Index(None, "owner", "created_at", "id"), Index(None, "status"))
    noun, path = "batch", "/v1/batches"

    status: Mapped[str]
    endpoint: Mapped[str]
    input_file_id: Mapped[str]
    completion_window: Mapped[str]
    links: Mapped[str]  # the URL by which its client reaches the server
    output_seconds: Mapped[int | None]  # lifetime of its files
    details: Mapped[dict[str, Any] | None]  # `metadata` on the wire, which SQLAlchemy reserves
    model: Mapped[str | None]
    errors: Mapped[list[Any] | None]
    output_file_id: Mapped[str | None]
    error_file_id: Mapped[str | None]
    expires_at: Mapped[int]
    in_progress_at: Mapped[int | None]
    finalizing_at: Mapped[int | None]
    completed_at: Mapped[int | None]
    failed_at: Mapped[int | None]
    expired_at: Mapped[int | None]
    cancelling_at: Mapped[int | None]
    cancelled_at: Mapped[int | None]
    total: Mapped[int] = mapped_column(default=0)
    completed: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    input_tokens: Mapped[int] = mapped_column(default=0)
    output_tokens: Mapped[int] = mapped_column(default=0)


class AnswerRow(Table):
    """The answer to one line of a batch. Its key makes it unique. Deleted when the files are written."""

    __tablename__ = "batch_lines"

    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # from 1, as editors count
    failed: Mapped[bool]
    answer: Mapped[str]  # the line of the output or error file


class JobRow(OwnedTable):
    """A distillation job, as `fine_tuning.job` on the wire."""

    __tablename__ = "jobs"
    __table_args__ = (Index(None, "owner", "created_at", "id"), Index(None, "status"))
    noun, path = "job", "/v1/fine_tuning/jobs"

    status: Mapped[str]
    requested_action: Mapped[str | None]  # until it has happened
    starts: Mapped[int] = mapped_column(default=0, server_default="0")  # after the first one; each start is a workflow
    model: Mapped[str]
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    suffix: Mapped[str | None]
    seed: Mapped[int]
    hyperparameters: Mapped[dict[str, Any]]
    method: Mapped[dict[str, Any] | None]
    distillation: Mapped[dict[str, Any]]
    details: Mapped[dict[str, Any] | None]  # `metadata` on the wire
    error: Mapped[dict[str, Any] | None]
    fine_tuned_model: Mapped[str | None]
    deleted_at: Mapped[int | None]  # of the student; the name above is removed with its files
    result_files: Mapped[list[Any]]
    finished_at: Mapped[int | None]
    estimated_finish: Mapped[int | None]
    images_seen: Mapped[int] = mapped_column(default=0, server_default="0")
    images_total: Mapped[int | None]

    @property
    def stem(self) -> str:
        """The part that the ids of its events, checkpoints and files share."""
        return self.id.removeprefix("ftjob-")

    @property
    def student(self) -> str:
        return f"ft:{self.model}:{self.suffix or ''}:{self.stem}"


class JobEventRow(Table):
    """An event of a job. Events are ordered by `number`."""

    __tablename__ = "job_events"
    __table_args__ = (Index(None, "job_id", "number"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    number: Mapped[int]
    created_at: Mapped[int]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]


class JobCheckpointRow(Table):
    """A checkpoint of a job and its metrics."""

    __tablename__ = "job_checkpoints"
    __table_args__ = (Index(None, "job_id", "step_number"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    step_number: Mapped[int]
    created_at: Mapped[int]
    model: Mapped[str]
    metrics: Mapped[dict[str, Any]]


class DeliveryRow(Table):
    """A webhook event for one endpoint, added in the transaction that ends a batch or job."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (Index(None, "next_at"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    url: Mapped[str] = mapped_column(server_default="")  # of the endpoint; its secret is in the settings
    owner: Mapped[str]
    type: Mapped[str]
    subject: Mapped[str]  # id of the batch or job
    created_at: Mapped[int]
    attempts: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[int | None]  # None if delivery has ended
    delivered_at: Mapped[int | None]
    last_error: Mapped[str | None]


class ExecutorRow(Table):
    """A running server process. If `beats` stops increasing, other servers take over its workflows."""

    __tablename__ = "executors"

    id: Mapped[str] = mapped_column(primary_key=True)
    beats: Mapped[int]
