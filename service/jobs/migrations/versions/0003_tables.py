"""tables of files, batches and jobs; earlier revisions were never released"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = None


def upgrade() -> None:
    """To this revision. There is no way back: a backup is restored instead."""
    op.create_table(
        "batches",
        *_texts("id", "owner", "status", "endpoint", "input_file_id", "completion_window", "links"),
        *_integers("output_seconds", nullable=True),
        *_json("details", nullable=True),
        *_texts("model", nullable=True),
        *_json("errors", nullable=True),
        *_texts("output_file_id", "error_file_id", nullable=True),
        *_integers("created_at", "expires_at"),
        *_integers("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", nullable=True),
        *_integers("cancelling_at", "cancelled_at", nullable=True),
        *_integers("total", "completed", "failed", "input_tokens", "output_tokens"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    _index("batches", "owner", "created_at", "id")
    _index("batches", "status")
    op.create_table(
        "executors", *_texts("id"), *_integers("beats"), sa.PrimaryKeyConstraint("id", name=op.f("pk_executors"))
    )
    op.create_table(
        "files",
        *_texts("id", "owner", "purpose", "filename"),
        *_integers("bytes", "created_at"),
        *_integers("expires_at", nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
    )
    _index("files", "expires_at")
    _index("files", "owner", "created_at", "id")
    op.create_table(
        "jobs",
        *_texts("id", "owner", "status"),
        *_texts("wish", nullable=True),
        *_integers("starts", default="0"),
        *_texts("model", "training_file"),
        *_texts("validation_file", "suffix", nullable=True),
        *_integers("seed"),
        *_json("hyperparameters"),
        *_json("method", nullable=True),
        *_json("distillation"),
        *_json("details", "error", nullable=True),
        *_texts("fine_tuned_model", nullable=True),
        *_integers("deleted_at", nullable=True),
        *_json("result_files"),
        *_integers("created_at"),
        *_integers("finished_at", "estimated_finish", nullable=True),
        *_integers("images_seen", default="0"),
        *_integers("images_total", nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    _index("jobs", "owner", "created_at", "id")
    _index("jobs", "status")
    op.create_table(
        "webhook_deliveries",
        *_texts("id"),
        sa.Column("url", sa.Text(), nullable=False, server_default=""),
        *_texts("owner", "type", "subject"),
        *_integers("created_at", "attempts"),
        *_integers("next_at", "delivered_at", nullable=True),
        *_texts("last_error", nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_deliveries")),
    )
    _index("webhook_deliveries", "next_at")
    op.create_table(
        "batch_lines",
        *_texts("batch_id"),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("failed", sa.Boolean(), nullable=False),
        *_texts("answer"),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_batch_lines_batch_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("batch_id", "number", name=op.f("pk_batch_lines")),
    )
    op.create_table(
        "job_checkpoints",
        *_texts("id", "job_id"),
        *_integers("step_number", "created_at"),
        *_texts("model"),
        *_json("metrics"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_checkpoints_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_checkpoints")),
    )
    _index("job_checkpoints", "job_id", "step_number")
    op.create_table(
        "job_events",
        *_texts("id", "job_id"),
        *_integers("number", "created_at"),
        *_texts("level", "type", "message"),
        *_json("data", nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_events_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_events")),
    )
    _index("job_events", "job_id", "number")


def _texts(*names: str, nullable: bool = False) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text(), nullable=nullable) for name in names]


def _integers(*names: str, nullable: bool = False, default: str | None = None) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger(), nullable=nullable, server_default=default) for name in names]


def _json(*names: str, nullable: bool = False) -> list[sa.Column[object]]:
    return [sa.Column(name, sa.JSON(none_as_null=True), nullable=nullable) for name in names]


def _index(table: str, *columns: str) -> None:
    op.create_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table, list(columns))
