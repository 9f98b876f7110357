"""new names: requested actions of jobs, and fields of their `distillation`"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

OPTIONS = {
    "checkpointing": "gradient_checkpointing",
    "prompts": "max_prompts",
    "guidance": "guidance_scale",
    "student_rate": "student_lr",
    "fake_rate": "fake_lr",
    "warmup": "warmup_images",
    "decay": "decay_images",
    "patience": "early_stopping_patience",
}


def upgrade() -> None:
    """To this revision."""
    # No batch mode: it replaces the table, and SQLite then deletes the events and checkpoints that refer to its rows.
    op.execute("ALTER TABLE jobs RENAME COLUMN wish TO requested_action")
    connection = op.get_bind()
    jobs = sa.table("jobs", sa.column("id", sa.Text()), sa.column("distillation", sa.JSON()))
    for job_id, options in connection.execute(sa.select(jobs.c.id, jobs.c.distillation)).all():
        renamed = {OPTIONS.get(name, name): value for name, value in options.items()}
        connection.execute(jobs.update().where(jobs.c.id == job_id).values(distillation=renamed))
