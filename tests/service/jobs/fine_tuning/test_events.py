"""Events and checkpoints of a job in the database."""

from sqlalchemy import select

from service.jobs.database import Database
from service.jobs.fine_tuning.events import record_checkpoint, record_log_lines
from service.jobs.fine_tuning.run_log import LogLine
from service.jobs.tables import JobCheckpointRow, JobEventRow, JobRow


def test_a_line_is_recorded_once_and_an_evaluation_is_added_to_its_checkpoint(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    database.migrate()
    texts = {"owner": "ann", "status": "running", "model": "tiny", "training_file": "file-1"}
    facts = {"seed": 1, "hyperparameters": {}, "distillation": {}, "result_files": [], "created_at": 1}
    early = [LogLine("metrics", images, {"images": images, "gap": 2.0}) for images in (8, 16)]
    late = [LogLine("evaluation", images, {"images": images, "overall": images / 32}) for images in (16, 24)]
    alarm = LogLine("alarm", 16, {"images": 16, "name": "collapse", "message": "less guidance"})
    with database.begin() as session:
        job = JobRow(id="ftjob-1", **texts, **facts, images_seen=0, images_total=32)
        session.add(job)
        session.flush()
        record_log_lines(session, job, early)
        record_checkpoint(session, job, 16, {"gap": 1.0})
        record_log_lines(session, job, [*early, *late, *early, alarm])
        assert job.images_seen == 24
    with database.begin() as session:
        (checkpoint,) = session.scalars(select(JobCheckpointRow))
        assert checkpoint.metrics == {"step": 16, "gap": 1.0, "overall": 0.5}
        events = list(session.scalars(select(JobEventRow).order_by(JobEventRow.number)))
    assert [(event.number, event.message) for event in events] == [
        (1, "Images seen: 8 of 32"),
        (2, "Images seen: 16 of 32"),
        (3, "Student evaluated: 16 of 32"),
        (4, "Student evaluated: 24 of 32"),
        (5, "Alarm collapse: less guidance"),
    ]
    assert [event.type for event in events] == ["metrics"] * 4 + ["message"]
    assert events[1].data == {"step": 16, "total_steps": 32, "images": 16, "gap": 2.0}
    database.close()
