"""Students of jobs in the engine."""

import contextlib
import json
import sqlite3

from engines import run
from fine_tuning import add_job
from worker_threads import worker_threads

from service.engine.engine import Engine
from service.engine.simulator import Simulator
from service.jobs import sqlite
from service.jobs.fine_tuning.job_folder import JobFolder
from service.jobs.fine_tuning.students import Students
from service.jobs.jobs import Jobs
from service.settings import Settings


def test_the_newest_students_are_served(jobs):
    add_job(jobs, 1, "succeeded", fine_tuned_model="paused for long", finished_at=90)
    add_job(jobs, 2, "succeeded", fine_tuned_model="first", finished_at=20)
    add_job(jobs, 3, "succeeded", fine_tuned_model="second", finished_at=30)
    assert jobs.students._newest().keys() == {"paused for long", "second"}
    add_job(jobs, 4, "running", fine_tuned_model="about to end", created_at=0)
    assert jobs.students._newest().keys() == {"paused for long", "about to end"}


def test_a_student_that_cannot_be_loaded_is_retried_and_its_job_has_events(jobs):
    record = "onestep.json"
    for number in (1, 2):
        name = add_job(jobs, number, "succeeded", fine_tuned_model=f"student {number}", finished_at=3 - number)
        JobFolder.of(jobs.folder, name).student.mkdir()
    (JobFolder.of(jobs.folder, name).student / record).write_text(json.dumps({"name": "any"}))
    now = 0.0
    students = Students(jobs.database, jobs.folder, 2, lambda: now)

    def events() -> list[tuple[str, str]]:
        return [(event.level, event.message) for event in jobs.fine_tuning.events("ann", "ftjob-1", None, 10)[0]]

    async def test(engine: Engine) -> None:
        nonlocal now
        await students.start(engine.catalog)
        assert [*engine.catalog.models] == ["simulator", "student 2"]  # one that fails keeps no other from its place
        ((level, message),) = events()
        assert level == "warn"
        assert "could not be loaded and is not served yet; loading is tried again: its folder is no" in message
        assert str(jobs.folder) not in message
        folder = JobFolder.of(jobs.folder, "ftjob-1").student
        pauses = []
        for _ in range(9):  # each pause is twice the one before, up to the longest
            pauses.append(students._failures["student 1"].due - now)
            now += pauses[-1]
            await students._sync()
        assert pauses == [5, 10, 20, 40, 80, 160, 320, 600, 600]
        assert len(events()) == 1  # the same reason is reported once
        (folder / record).write_text(json.dumps({"name": "any"}))
        await students._sync()
        assert "student 1" not in engine.catalog.models  # its next attempt is not due yet
        now += 600
        await students._sync()
        assert "student 1" in engine.catalog.models
        assert events()[0] == ("info", "The student is loaded and served now.")
        await students.stop()

    run(worker_threads(Simulator()), test)


def test_an_event_is_recorded_after_an_outage_of_the_database(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.05)
    jobs = Jobs(tmp_path, Settings())
    jobs.database.migrate()
    add_job(jobs, 1, "succeeded", fine_tuned_model="student", finished_at=1)  # its folder is missing

    def events() -> list[str]:
        return [event.message for event in jobs.fine_tuning.events("ann", "ftjob-1", None, 10)[0]]

    async def test(engine: Engine) -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # nobody else can write
            await jobs.students.start(engine.catalog)
            assert events() == []
        await jobs.students._sync()
        (message,) = events()
        assert message.startswith("The student could not be loaded")
        await jobs.students.stop()

    run(worker_threads(Simulator()), test)
    jobs.database.close()
