"""The pages in a real browser; skipped where there is no Chromium."""

import base64
import json
import subprocess
import sys

import browser
import httpx
import pytest
from PIL import Image
from running import metric, serving
from selenium.webdriver.common.keys import Keys
from worker_threads import worker_threads

from service.app import create_app
from service.engine.simulator import Simulator
from service.jobs.fine_tuning.events import record_event, record_log_lines
from service.jobs.fine_tuning.run_log import LogLine
from service.jobs.jobs import Jobs
from service.jobs.tables import JobRow
from service.settings import Settings

pytestmark = browser.needed
KEY = "key-of-ann-in-tests"


@pytest.fixture(scope="module")
def opened():
    with browser.browsing() as page:
        yield page


@pytest.fixture
def page(opened):
    """A page without errors in its console."""
    yield opened
    opened.driver.get("about:blank")  # it may ask a server that is gone
    opened.errors()


def test_images_appear_while_typing_and_are_restored_from_the_history(page, tmp_path):
    with serving(create_app(Settings(), worker_threads(Simulator(0, 0)))) as url:
        page.driver.get(url)
        page.until(lambda: page.find("#model option"))
        page.find("#prompt")[0].send_keys("a red circle")
        page.until(lambda: any(i.get_attribute("alt") == "a red circle (seed 1)" for i in page.find("#images img")))
        assert metric(url, "requests_total", route="/v1/realtime/images", status="200") >= 1
        assert "encode" in page.text("#legend")
        page.find("#dice")[0].click()
        page.until(
            lambda: page.find("#images img") and "seed 1)" not in page.find("#images img")[0].get_attribute("alt")
        )
        page.find("#history li:last-child button")[0].click()
        page.until(lambda: "(seed 1)" in page.find("#images img")[0].get_attribute("alt"))
        image = page.find("#images img")[0].get_attribute("src").partition(",")[2]
        copied = page.driver.execute_script("return curl()")
        answer = subprocess.run(copied, shell=True, check=True, capture_output=True)
        assert json.loads(answer.stdout)["data"][0]["b64_json"] == image
        copied = page.driver.execute_script("return python()")
        subprocess.run([sys.executable, "-c", copied], check=True, cwd=tmp_path)
        assert (tmp_path / "1.png").read_bytes() == base64.b64decode(image)
        assert page.errors() == []
    without_sockets = Settings(http={"max_realtime_sessions": 0})
    with serving(create_app(without_sockets, worker_threads(Simulator(0, 0)))) as url:
        page.driver.get(url)
        page.until(lambda: page.find("#model option"))
        page.find("#prompt")[0].send_keys("a red circle")
        page.until(lambda: any(i.get_attribute("alt") == "a red circle (seed 1)" for i in page.find("#images img")))
        assert metric(url, "requests_total", route="/v1/images/generations", status="200") >= 1
        page.errors()  # the refused socket is one


def test_an_adapter_and_its_scale_are_chosen_and_copied(page, tmp_path):
    (tmp_path / "sketch").mkdir()
    (tmp_path / "sketch" / "pytorch_lora_weights.safetensors").touch()
    (tmp_path / "sketch" / "onestep.json").write_text('{"name": "second"}')
    with serving(create_app(Settings(data=None, models_folder=tmp_path), worker_threads(Simulator(0, 0)))) as url:
        page.driver.get(url)
        page.until(lambda: page.find("#model option"))
        assert [option.text for option in page.find("#size option")] == ["auto", "64x64", "128x64"]
        assert not page.find("#adapter")[0].is_displayed()
        adapter = {"model": "simulator", "folder": "sketch", "name": "sketch"}
        assert httpx.post(f"{url}/v1/admin/adapters", json=adapter).status_code == 200
        page.find("#size")[0].send_keys("128x64")
        page.find("#model")[0].send_keys(Keys.SHIFT)  # which looks for what has come since
        page.until(lambda: page.find("#adapter option[value=sketch]"))
        assert httpx.post(f"{url}/v1/admin/models", json={"folder": "sketch"}).status_code == 200
        page.driver.execute_script("document.dispatchEvent(new Event('visibilitychange'))")  # as a tab that is back
        page.until(lambda: page.find("#model option[value=second]"))
        chosen = [page.find(field)[0].get_attribute("value") for field in ("#model", "#size")]
        assert chosen == ["simulator", "128x64"]
        page.find("#prompt")[0].send_keys("a")
        page.until(lambda: len(page.find("#history li")) == 1)
        page.find("#adapter")[0].send_keys("sketch")
        page.until(lambda: len(page.find("#history li")) == 2)
        page.find("#scale")[0].clear()
        page.find("#scale")[0].send_keys("0.5")
        page.until(lambda: page.driver.execute_script("return body().lora.scale") == 0.5)
        page.until(lambda: len(page.find("#history li")) >= 3)
        assert '"lora": {"name":"sketch","scale":0.5}' in page.driver.execute_script("return python()")
        assert '"lora":{"name":"sketch","scale":0.5}' in page.driver.execute_script("return curl()")
        shown = page.driver.execute_script("return [...document.querySelectorAll('#history img')].map((i) => i.src)")
        assert len(set(shown)) == len(shown)
        page.find("#history li:last-child button")[0].click()
        assert page.driver.execute_script("return body().lora") is None
        assert page.errors() == []


def test_keyboard_shortcuts_themes_and_small_screens(page):
    with serving(create_app(Settings(data=None), worker_threads(Simulator(0, 0)))) as url:
        page.driver.get(url)
        page.until(lambda: page.find("#model option"))
        page.find("#live")[0].click()
        page.find("#prompt")[0].send_keys("a red circle")
        assert not page.find("#images img")
        page.find("#prompt")[0].send_keys(Keys.CONTROL, Keys.ENTER)
        page.until(lambda: len(page.find("#history li")) == 1)
        page.find("#prompt")[0].send_keys(Keys.ALT, "s")
        page.until(lambda: len(page.find("#history li")) == 2)
        assert page.find("#seed")[0].get_attribute("value") != "1"
        ground = "return getComputedStyle(document.body).backgroundColor"
        before = page.driver.execute_script(ground)
        page.find("#theme")[0].click()
        assert page.driver.execute_script(ground) != before
        phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        for name in ("", "jobs", "batches"):
            page.driver.get(f"{url}/{name}")
            page.until(lambda: page.find("nav [aria-current]"))
            assert page.driver.execute_script("return document.documentElement.scrollWidth") == 390
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_script("localStorage.clear()")
        page.driver.get("about:blank")
        page.errors()  # of the lists that a server without a data folder lacks


def test_a_key_is_asked_for_where_it_is_needed(page):
    with serving(create_app(Settings(data=None, http={"api_keys": (KEY,)}), worker_threads(Simulator(0, 0)))) as url:
        page.driver.get(url)
        page.until(lambda: page.find("#access[open]"))
        assert "API key" in page.text("#status")
        page.find("#key")[0].send_keys(KEY, Keys.ENTER)
        page.until(lambda: page.find("#model option"))
        page.find("#prompt")[0].send_keys("a red circle")
        page.until(lambda: page.find("#images img"))
        assert not page.find("#key")[0].is_displayed()
        page.driver.get(f"{url}/batches")
        page.until(lambda: page.find("#none")[0].is_displayed())
        assert page.text("nav [aria-current]") == "Batches"
        page.driver.get("about:blank")
        page.errors()  # of what was asked without the key


def test_a_batch_is_started_watched_and_downloaded(page, tmp_path):
    body = {"prompt": "a red circle", "seed": 1}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/images/generations", "body": body}
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(f"{json.dumps(line)}\n{json.dumps(line | {'custom_id': 'b'})}\n")
    bad.write_text("no request\n")
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    with serving(create_app(Settings(data=tmp_path / "data"), worker_threads(Simulator(0, 0)))) as url:
        page.driver.get(f"{url}/batches")
        for file, status in ((bad, "failed"), (good, "completed")):
            page.find("#file")[0].send_keys(str(file))
            page.find("#form button.main")[0].click()
            page.until(lambda status=status: page.find(f"#batches li:first-child .{status}"))
        assert "line 1" in page.find("#batches li")[1].text
        assert "2 of 2 lines" in page.find("#batches li")[0].text
        page.find("#batches li:first-child .buttons button")[0].click()
        page.until(lambda: list(tmp_path.glob("batch_*.jsonl")))
        (answers,) = tmp_path.glob("batch_*.jsonl")
        page.until(lambda: answers.read_text().count("\n") == 2)
        assert {json.loads(each)["custom_id"] for each in answers.read_text().splitlines()} == {"a", "b"}
        assert page.errors() == []


def metrics(images: int, gap: float) -> LogLine:
    return LogLine("metrics", images, {"images": images, "gap": gap})


def test_a_long_job_is_drawn_whole_and_a_deleted_student_is_not_offered(page, tmp_path):
    jobs = Jobs(tmp_path, Settings())
    jobs.database.migrate()
    grid = tmp_path / "distillations" / "ftjob-1" / "run" / "samples" / "000001608.png"
    grid.parent.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(grid)
    texts = {"owner": "127.0.0.1", "status": "succeeded", "model": "tiny", "training_file": "file-1"}
    facts = {"seed": 1, "hyperparameters": {"batch_size": 8}, "distillation": {}, "result_files": [], "created_at": 1}
    with jobs.database.begin() as session:
        job = JobRow(id="ftjob-1", **texts, **facts, starts=0, images_seen=0)
        session.add(job)
        record_event(session, job, "It begins.")
        record_log_lines(session, job, [metrics(8 * i, 1 / i) for i in range(1, 202)])
    with serving(create_app(Settings(data=tmp_path), worker_threads(Simulator(0, 0)))) as url:
        page.driver.get(f"{url}/jobs")
        page.until(lambda: page.find("#curves polyline"))
        assert len(page.find("#curves polyline")[0].get_attribute("points").split()) == 201
        assert page.text("#curves").endswith("0.00498 to 1.00, now 0.00498")
        assert page.text("#events").endswith("It begins.")
        assert not page.find("#actions a")
        with jobs.database.begin() as session:
            job = session.get_one(JobRow, "ftjob-1")
            record_log_lines(session, job, [metrics(1616, 0.25)])
            record_event(session, job, "It ends.")
        page.until(lambda: len(page.find("#events li")) == 2)
        assert page.text("#curves").endswith("now 0.250")
        assert page.text("#events").split("\n")[0].endswith("It ends.")
        assert page.errors() == []
    jobs.database.close()
