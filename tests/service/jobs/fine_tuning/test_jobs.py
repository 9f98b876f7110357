"""Distillation jobs with the real client, from a file of prompts to an image of the student."""

import base64
import contextlib
import csv
import io
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import browser
import httpx
import numpy as np
import openai
import psutil
import pytest
from fine_tuning import ENDLESS, SERVE, TINY, add_job, event_messages, server, submit, until, upload
from PIL import Image
from receiver import SECRET, receiving
from running import serving
from worker_threads import worker_threads

from distill.pipeline import OneStepPipeline
from service.app import create_app
from service.engine.simulator import Simulator
from service.http.keys import ApiKey
from service.jobs.fine_tuning.run_process import SUPERVISOR
from service.jobs.jobs import Jobs
from service.jobs.tables import FileRow, JobRow
from service.settings import Settings

KEYS = ("key-of-ann-in-tests", "key-of-bob-in-tests")


@contextlib.contextmanager
def killed_server(data: Path, teachers: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Run a server in its own process and kill it at the end. Yields its process id and URL."""
    given = {
        "SERVICE_JOBS__TEACHERS": json.dumps(teachers),
        "SERVICE_JOBS__TAKEOVER_SECONDS": "1",
        "SERVICE_JOBS__NICE": "0",
    }
    command = [*SERVE, "--data", str(data)]
    with subprocess.Popen(command, env=os.environ | given, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.:]+", line)))
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield process.pid, url
        finally:
            process.kill()


def pixels(client: openai.OpenAI, model: str) -> np.ndarray:
    answer = client.images.generate(model=model, prompt="a red circle", extra_body={"seed": 7})
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))


def test_a_job_succeeds_after_kills_of_its_run_and_server(teacher, tmp_path, connect, subtests):
    data, teachers = tmp_path / "data", {"tiny": str(teacher)}
    with killed_server(data, teachers) as (process, url):
        client = connect(url)
        why = {"why": "test", '"a".b\\[0]': "é"}
        job = submit(client, upload(client), TINY, suffix="mine", seed=3, metadata=why)
        assert (job.status, job.result_files) == ("validating_files", [])
        assert (job.fine_tuned_model, job.seed, job.metadata) == (None, 3, why)
        assert job.method.distillation["preset"] == "scenes-debug"
        until(client, job, lambda job: job.images_seen)
        (run,) = [child for child in psutil.Process(process).children(recursive=True) if _distills(child)]
        run.kill()
        until(client, job, lambda job: any("status 137" in message for message in event_messages(client, job)))
        seen = client.fine_tuning.jobs.retrieve(job.id).images_seen
        until(client, job, lambda job: job.images_seen > seen and job.estimated_finish)

    with receiving(200) as receiver:
        webhooks = [{"url": receiver.url, "secret": SECRET}]
        with server(data, teachers, webhooks=webhooks) as url:
            client = connect(url)
            job = until(client, job, lambda job: job.status == "succeeded")
            assert job.fine_tuned_model == f"ft:tiny:mine:{job.id.removeprefix('ftjob-')}"
            assert (job.images_seen, job.images_total, job.error) == (480, 480, None)
            assert job.finished_at >= job.created_at
            model = client.models.retrieve(job.fine_tuned_model)
            student = OneStepPipeline.load(data / "distillations" / job.id / "run" / "student")
            image = pixels(client, model.id)
            assert np.array_equal(image, student(["a red circle"], [7]).numpy()[0])

            events = client.fine_tuning.jobs.list_events(job.id, limit=25)  # in pages
            metrics = [event.data for event in events if event.type == "metrics"]
            steps = [data["step"] for data in metrics if "gap" in data]
            assert steps == list(range(480, 0, -8))  # each line once, newest first
            checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
            assert checkpoints[0].step_number == checkpoints[0].metrics.step == 480
            assert checkpoints[0].metrics.gap > 0
            evaluated = {data["step"]: data["kernel"] for data in metrics if "kernel" in data}
            assert list(evaluated) == [480, *range(448, 0, -64)]
            assert checkpoints[0].metrics.kernel == evaluated[480]
            assert client.fine_tuning.jobs.list(metadata=why).data[0].id == job.id
            for pair in ({"why": "other"}, {'a"b': "c"}):
                assert client.fine_tuning.jobs.list(metadata=pair).data == []
            for pairs in ({"\0": ""}, {"why": "\0"}, {str(number): "" for number in range(17)}):
                with pytest.raises(openai.BadRequestError, match="16 pairs") as refused:
                    client.fine_tuning.jobs.list(metadata=pairs)
                assert refused.value.param == "metadata"

            (results,) = (client.files.retrieve(name) for name in job.result_files)
            assert (results.purpose, results.filename) == ("fine-tune-results", f"{job.id}_results.csv")
            rows = list(csv.DictReader(io.StringIO(client.files.content(results.id).text)))
            assert [int(row["step"]) for row in rows if row["gap"]] == list(range(8, 481, 8))
            assert float(rows[-1]["gap"]) == checkpoints[0].metrics.gap

            receiver.wait(1)
            headers, body = receiver.received[0]
            event = client.webhooks.unwrap(body, headers, secret=SECRET)
            assert (event.type, event.data.id) == ("fine_tuning.job.succeeded", job.id)
    with server(data, teachers) as url:
        client = connect(url)
        assert np.array_equal(pixels(client, model.id), image)
        with subtests.test("its pages"):
            _pages_show(job, model.id, url, data, teacher)
        assert client.models.delete(model.id).deleted
        for ask in (client.models.retrieve, client.models.delete):
            with pytest.raises(openai.NotFoundError):
                ask(model.id)
        job = client.fine_tuning.jobs.retrieve(job.id)
        assert (job.status, job.fine_tuned_model) == ("succeeded", None)


def _pages_show(job, model: str, url: str, data: Path, teacher: Path) -> None:
    """Check that the Jobs page shows the job, and that the playground uses its student."""
    if not browser.available:
        pytest.skip(browser.NEEDED)
    with browser.browsing() as page:
        page.driver.get(f"{url}/jobs")
        page.until(lambda: page.find("#one .succeeded"))
        assert page.text("#name") == page.text("#jobs strong")
        page.until(lambda: page.find("#grid img") and page.find("#grid img")[0].get_property("naturalWidth"))
        assert len(page.find("#curves svg")) >= 3
        assert "Kernel distance" in page.text("#scores")
        log = httpx.get(f"{url}/v1/fine_tuning/jobs/{job.id}/log")
        with ThreadPoolExecutor(4) as threads:  # a server writes one report at a time
            reports = threads.map(lambda _: httpx.get(f"{url}/v1/fine_tuning/jobs/{job.id}/report", timeout=60), "four")
            by_status = {response.status_code: response for response in reports}
        assert set(by_status) == {200, 429}
        report, refused = by_status[200], by_status[429]
        assert refused.json()["error"]["code"] == "report_in_progress"
        assert int(refused.headers["retry-after"]) == 5
        assert log.status_code == 200
        assert "480" in report.text
        assert not [path for path in (str(data), str(teacher)) if path in log.text + report.text]
        assert report.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
        page.find("#actions a")[0].click()
        page.until(lambda: page.find("#model option") and page.find("#model")[0].get_property("value") == model)
        page.find("#prompt")[0].send_keys("a red circle")
        page.until(lambda: page.find("#images img"))
        assert page.errors() == []


@browser.needed
def test_a_job_is_created_and_cancelled_on_its_page(teacher, tmp_path):
    with server(tmp_path, {"tiny": str(teacher)}) as url, browser.browsing() as page:
        page.driver.get(f"{url}/jobs")
        page.until(lambda: page.find("#none")[0].is_displayed())
        page.until(lambda: page.find("#preset option"))
        page.find("#preset option[value=scenes-debug]")[0].click()
        for field, text in {"prompts": "a red circle\na blue square", "budget": "1000000"}.items():
            page.find(f"#{field}")[0].send_keys(text)
        page.find("#form button.main")[0].click()
        page.until(lambda: page.find("#one .running"))
        assert page.find("#phases [aria-current]")
        (cancel,) = (button for button in page.find("#actions button") if button.text == "Cancel")
        cancel.click()
        page.until(lambda: page.find("#one .cancelled"))
        page.until(lambda: "The job is cancelled." in page.text("#events"))
        page.until(lambda: page.text("#actions") == "Delete")
        assert [head.text for head in page.find("#jobs .pill")] == ["cancelled"]


def _distills(process: psutil.Process) -> bool:
    words = process.cmdline()
    return "distill.cli" in words and SUPERVISOR not in words


def test_jobs_wait_in_line_and_are_paused_resumed_and_cancelled(teacher, tmp_path, connect):
    with server(tmp_path, {"tiny": str(teacher)}, max_jobs_per_key=3) as url:
        client = connect(url)
        jobs = client.fine_tuning.jobs
        file = upload(client)
        first = submit(client, file, ENDLESS)
        until(client, first, lambda job: job.images_seen)
        second, third = (submit(client, file, ENDLESS) for _ in range(2))
        with pytest.raises(openai.RateLimitError, match="3 of your jobs") as refused:
            submit(client, file, ENDLESS)
        assert refused.value.code == "job_quota_exceeded"
        assert [job.id for job in jobs.list(limit=1)] == [third.id, second.id, first.id]
        assert jobs.pause(second.id).status == "paused"
        assert jobs.resume(second.id).status == "queued"
        assert [jobs.cancel(each.id).status for each in (second, third)] == ["cancelled"] * 2
        with pytest.raises(openai.BadRequestError, match="cancelled already"):
            jobs.resume(third.id)

        jobs.pause(first.id)
        paused = until(client, first, lambda job: job.status == "paused")
        assert paused.estimated_finish is None
        assert jobs.checkpoints.list(first.id, limit=1).data[0].step_number == paused.images_seen
        assert jobs.resume(first.id).status == "queued"
        jobs.cancel(first.id)
        until(client, first, lambda job: job.status == "cancelled")
        assert event_messages(client, first)[0] == "The job is cancelled."
        assert len(list(client.models.list())) == 1

        for text in ('"a red circle"\n{"caption"', '"a red circle"\n' + "[" * 100_000):
            job = submit(client, upload(client, text), TINY)
            error = until(client, job, lambda job: job.status == "failed").error
            assert (error.code, error.param) == ("invalid_training_file", "training_file")
            assert error.message.startswith("prompts.jsonl line 2 is not JSON")
            assert "The job is running." not in event_messages(client, job)
    assert not (tmp_path / "distillations" / first.id).exists()


def test_only_the_owner_deletes_a_student_and_its_files_go_a_minute_later(serve, connect, tmp_path):
    url = serve(data=tmp_path, http={"api_keys": KEYS})
    ann, bob = (connect(url, key) for key in KEYS)
    jobs = Jobs(tmp_path, Settings())
    add_job(jobs, 1, "succeeded", owner=ApiKey.of_settings(KEYS[0]).owner, fine_tuned_model="ft:tiny::1")
    student = tmp_path / "distillations" / "ftjob-1" / "run" / "student"
    student.mkdir(parents=True)
    assert ann.fine_tuning.jobs.retrieve("ftjob-1").fine_tuned_model == "ft:tiny::1"
    for client, model in ((bob, "ft:tiny::1"), (ann, "simulator")):
        with pytest.raises(openai.PermissionDeniedError) as refused:
            client.models.delete(model)
        assert refused.value.code == "not_your_model"
    with pytest.raises(openai.NotFoundError):
        ann.models.delete("ft:tiny::2")
    assert ann.models.delete("ft:tiny::1").deleted
    assert ann.fine_tuning.jobs.retrieve("ftjob-1").fine_tuned_model is None
    now = int(time.time())
    for moment, left in ((now, True), (now + 61, False)):
        jobs.fine_tuning._workflow.remove_deleted(moment)
        assert student.exists() == left
    jobs.database.close()


def test_a_cancelled_or_failed_job_has_no_student(jobs):
    for number, status in enumerate(("cancelled", "failed")):
        name = add_job(jobs, number, "running", fine_tuned_model="made before the server died")
        with jobs.database.begin() as session:
            jobs.fine_tuning._workflow.end(session, session.get_one(JobRow, name), status, "It ends.")
        assert jobs.fine_tuning.get("ann", name).fine_tuned_model is None
    assert jobs.students._newest() == {}


def test_the_files_of_an_ended_job_are_removed_after_a_restart(jobs):
    names = [add_job(jobs, number, status) for number, status in enumerate(("succeeded", "cancelled", "failed"))]
    for name in names:
        jobs.fine_tuning._workflow._run(f"{name}.0")
    left = [path.relative_to(jobs.folder / "distillations") for path in jobs.folder.glob("distillations/**/*/")]
    assert {str(path) for path in left} >= {f"{names[0]}/run", f"{names[2]}/run/checkpoints"}
    assert not {f"{names[0]}/run/checkpoints", names[1]} & {str(path) for path in left}


def test_an_unexpected_error_fails_the_job(jobs):
    name = add_job(jobs, 1, "validating_files")
    facts = {"owner": "ann", "purpose": "fine-tune", "bytes": 1, "created_at": 1}
    with jobs.database.begin() as session:
        session.add(FileRow(id="file-1", filename="prompts.txt\0", **facts))  # no path can hold it
    jobs.fine_tuning._workflow._validate(f"{name}.files")
    job = jobs.fine_tuning.get("ann", name)
    assert (job.status, job.error["code"]) == ("failed", "server_error")


@pytest.fixture(scope="module")
def refusing(tmp_path_factory) -> Iterator[str]:
    """A server with two keys, a limit of budgets, and a teacher that does not exist. It runs until the module ends."""
    folder = tmp_path_factory.mktemp("refusing")
    (folder / "model_index.json").write_text("{}")  # as every teacher in a folder has
    teachers = {"tiny": str(folder), "gone": "/nowhere"}
    settings = Settings(data=folder, jobs={"teachers": teachers, "max_images_per_job": 1000}, http={"api_keys": KEYS})
    with serving(create_app(settings, worker_threads(Simulator()))) as url:
        yield url


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "gone"}, openai.NotFoundError, "model"),
        ({"distillation": {"preset": "scenes", "rnak": 8}}, openai.BadRequestError, "distillation.rnak"),
        ({"distillation": {"preset": "../../x"}}, openai.BadRequestError, "distillation.preset"),
        ({"distillation": {"preset": "a.yaml"}}, openai.BadRequestError, "distillation.preset"),
        ({"distillation": {"preset": "scenes", "method": "gan"}}, openai.BadRequestError, "distillation.method"),
        ({"distillation": {"preset": "scenes", "images": 999, "rank": 8}}, openai.BadRequestError, "distillation.rank"),
        (
            {"distillation": {"preset": "scenes", "images": 999, "batch": 8, "micro_batch": 3}},
            openai.BadRequestError,
            "distillation",
        ),
        ({"hyperparameters": {"batch_size": 10**12}}, openai.BadRequestError, "hyperparameters.batch_size"),
        ({"hyperparameters": {"batch_size": "large"}}, openai.BadRequestError, "hyperparameters.batch_size"),
        ({"distillation": {}}, openai.BadRequestError, "distillation.preset"),
        ({"distillation": {"images": 8, "seconds": 8.0}}, openai.BadRequestError, "distillation"),
        ({"distillation": {"preset": "scenes"}}, openai.BadRequestError, "distillation"),
        ({"distillation": {"preset": "scenes", "images": 1001}}, openai.BadRequestError, "distillation.images"),
        ({"distillation": {"preset": "scenes", "seconds": 8.0}}, openai.BadRequestError, "distillation.seconds"),
        ({"distillation": {"preset": "scenes", "images": 8, "batch": 9}}, openai.BadRequestError, "distillation.batch"),
        ({"hyperparameters": {"n_epochs": 3}}, openai.BadRequestError, "hyperparameters.n_epochs"),
        (
            {"distillation": {"preset": "scenes", "batch": 8}, "hyperparameters": {"batch_size": 4}},
            openai.BadRequestError,
            "batch_size",
        ),
        (
            {
                "hyperparameters": {"batch_size": 4},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 8}}},
            },
            openai.BadRequestError,
            "hyperparameters",
        ),
        ({"steps": 3}, openai.BadRequestError, "steps"),
    ],
)
def test_an_invalid_job_is_refused_by_field(refusing, connect, fields, error, param):
    client = connect(refusing, KEYS[0])
    given = {"model": "tiny", "distillation": {"preset": "scenes", "images": 1000}, "training_file": None} | fields
    given["training_file"] = given["training_file"] or upload(client)
    with pytest.raises(error) as refused:
        client.post("/fine_tuning/jobs", body=given, cast_to=object)
    assert refused.value.param == param


def test_an_unsuitable_training_file_is_refused(refusing, connect):
    client = connect(refusing, KEYS[0])
    knobs = {"preset": "scenes", "images": 1000}
    with pytest.raises(openai.BadRequestError, match="purpose"):
        submit(client, upload(client, purpose="batch"), knobs)
    for name in ("prompts.png", "prompts.jsonl.gz", "prompts"):
        with pytest.raises(openai.BadRequestError, match=r"\.jsonl"):
            submit(client, upload(client, name=name), knobs)
    with pytest.raises(openai.NotFoundError):
        submit(connect(refusing, KEYS[1]), upload(client), knobs)


@pytest.mark.parametrize("call", ["retrieve", "cancel", "pause", "resume", "list_events"])
def test_unknown_jobs_and_jobs_of_other_owners_are_not_found(refusing, connect, call):
    for name in ("ftjob-none", "x\0y", "ö"):
        with pytest.raises(openai.NotFoundError):
            getattr(connect(refusing, KEYS[1]).fine_tuning.jobs, call)(name)
