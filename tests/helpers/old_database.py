"""A database of an earlier version of the service, with a job."""

from argparse import Namespace

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, select, text

from service.jobs.database import MIGRATIONS, Database
from service.jobs.fine_tuning.options import DistillationOptions
from service.jobs.tables import JobEventRow, JobRow

BEFORE = "0003"  # the revision before requested actions and options were renamed


def add_old_job(url: str) -> None:
    """Create the tables of the earlier version, and a running job with a request to pause, with an event."""
    config = Config(cmd_opts=Namespace(x=[f"database={url}"]))
    config.set_main_option("script_location", str(MIGRATIONS))
    command.upgrade(config, BEFORE)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO jobs (id, owner, status, wish, model, training_file, seed, hyperparameters, distillation, "
                "result_files, created_at) VALUES ('ftjob-1', 'ann', 'running', 'pause', 'tiny', 'file-1', 1, '{}', "
                ":options, '[]', 1)"
            ),
            {"options": '{"preset": "scenes", "prompts": 1000, "student_rate": 1e-5, "patience": 2, "batch": 8}'},
        )
        connection.execute(
            text(
                "INSERT INTO job_events (id, job_id, number, created_at, level, type, message) "
                "VALUES ('ftevent-1-1', 'ftjob-1', 1, 1, 'info', 'message', 'The job runs.')"
            )
        )
    engine.dispose()


def check_upgraded(database: Database) -> None:
    """Check that the migrated job and its event are complete."""
    with database.read() as session:
        job = session.get_one(JobRow, "ftjob-1")
        assert (job.status, job.requested_action) == ("running", "pause")
        options = DistillationOptions.model_validate(job.distillation)
        assert (options.max_prompts, options.student_lr, options.early_stopping_patience) == (1000, 1e-5, 2)
        assert [event.message for event in session.scalars(select(JobEventRow))] == ["The job runs."]
