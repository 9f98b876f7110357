"""The pages in a real browser; skipped where there is no Chromium."""

import base64
import io
import json
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from importlib.resources import files

import browser
import httpx
import pytest
from PIL import Image
from running import metric, serving
from selenium.webdriver.common.keys import Keys
from sqlalchemy import select
from worker_threads import worker_threads

from distill import methods
from service.app import create_app
from service.engine.simulator import Simulator
from service.jobs.batches.workflow import MAX_LINES
from service.jobs.fine_tuning.events import record_event, record_log_lines
from service.jobs.fine_tuning.run_log import LogLine
from service.jobs.jobs import Jobs
from service.jobs.tables import JobEventRow, JobRow
from service.settings import Settings

pytestmark = browser.needed
KEY = "key-of-ann-in-tests"
BODY = "return import('/web/request.js').then((request) => request.body())"
SNIPPET = """return Promise.all([import('/web/snippets.js'), import('/web/request.js')])
  .then(([snippets, request]) => snippets[arguments[0]](request.body()))"""
EXAMPLES = ("a red circle", "two <b>stars</b> 🌟")
CARD = replace(Simulator().info, description="A model of plain colors.", examples=EXAMPLES)
NO_STORAGE = """for (const name of ["localStorage", "sessionStorage"]) {
  Object.defineProperty(window, name, { get() { throw new DOMException("", "SecurityError"); } });
}"""
OPEN = "for (const each of [...document.querySelectorAll('main details')].slice(0, 3)) each.open = true"
# The text area is not displayed meanwhile, because it would lay out all lines.
MANY_LINES = """const area = document.getElementById("prompts");
  area.hidden = arguments[0] > 0; area.value = "x\\n".repeat(arguments[0]); area.dispatchEvent(new Event("input"))"""


def button(page, text: str):
    """Return the first button with a text."""
    return next(each for each in page.find("button") if each.text == text)


def alt(page, selector: str = "#images img") -> str:
    """Return the alternative text of the first image, if there is one."""
    images = page.find(selector)
    return images[0].get_attribute("alt") if images else ""


def clear(page) -> None:
    page.find("#prompt")[0].send_keys(Keys.CONTROL, "a")
    page.find("#prompt")[0].send_keys(Keys.DELETE)


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
        page.find(".timing summary")[0].click()
        assert "encode" in page.text("#legend")
        page.find("#dice")[0].click()
        page.until(
            lambda: page.find("#images img") and "seed 1)" not in page.find("#images img")[0].get_attribute("alt")
        )
        page.find("#history li:last-child button")[0].click()
        page.until(lambda: "(seed 1)" in page.find("#images img")[0].get_attribute("alt"))
        image = page.find("#images img")[0].get_attribute("src").partition(",")[2]
        copied = page.driver.execute_script(SNIPPET, "curl")
        answer = subprocess.run(copied, shell=True, check=True, capture_output=True)
        assert json.loads(answer.stdout)["data"][0]["b64_json"] == image
        copied = page.driver.execute_script(SNIPPET, "python")
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
        page.until(lambda: page.driver.execute_script(BODY)["lora"]["scale"] == 0.5)
        page.until(lambda: len(page.find("#history li")) >= 3)
        for kind in ("python", "curl"):
            assert '"lora":{"name":"sketch","scale":0.5}' in page.driver.execute_script(SNIPPET, kind)
        shown = page.driver.execute_script("return [...document.querySelectorAll('#history img')].map((i) => i.src)")
        assert len(set(shown)) == len(shown)
        page.find("#history li:last-child button")[0].click()
        assert "lora" not in page.driver.execute_script(BODY)
        kept = len(page.find("#history li"))
        page.find("#model option[value=second]")[0].click()
        page.until(lambda: len(page.find("#history li")) > kept)  # so that the next request alone finds no model
        assert httpx.delete(f"{url}/v1/admin/models/second").status_code == 200
        page.find("#prompt")[0].send_keys("b")
        page.until(lambda: "this server has no model second" in page.text("#status"))  # and draws by the other
        assert page.driver.execute_script(BODY)["model"] == "simulator"
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
        for name in ("", "jobs", "batches", "docs"):
            page.driver.get(f"{url}/{name}")
            page.until(lambda: page.find("nav [aria-current]"))
            assert page.driver.execute_script("return document.documentElement.scrollWidth") == 390
        page.until(lambda: page.find("[id*=generations] summary"))
        page.find("[id*=generations] summary")[0].click()
        page.until(lambda: "One of the model's adapters." in page.text("#reference"))  # fields of objects in objects
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_script("localStorage.clear()")
        refused = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NO_STORAGE})
        page.driver.get(f"{url}/#prompt=a&model=gone&seed=5")
        page.until(lambda: len(page.find("#history li")) == 1)  # of the page, where the browser keeps nothing
        assert alt(page) == "a (seed 5)"
        assert "this server has no model gone" in page.text("#status")
        page.find("#theme")[0].click()
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", refused)
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
        page.until(lambda: "needs a data folder" in page.text("#trouble"))
        assert not page.find("#none")[0].is_displayed()  # nobody knows whether there are batches
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
        assert "Line 1" in page.find("#batches li")[1].text
        assert "2 of 2 prompts" in page.find("#batches li")[0].text
        button(page, "Answers").click()
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
        assert page.text("#curves").endswith("0.00498 to 1, now 0.00498")
        assert page.text("#events").endswith("It begins.")
        assert "Try the student" not in page.text("#actions")
        with jobs.database.begin() as session:
            job = session.get_one(JobRow, "ftjob-1")
            record_log_lines(session, job, [metrics(1616, 0.25)])
            record_event(session, job, "It ends.")
        page.until(lambda: len(page.find("#events li")) == 2)
        assert page.text("#curves").endswith("now 0.25")
        assert page.text("#events").split("\n")[0].endswith("It ends.")
        assert page.errors() == []
    jobs.database.close()


def test_a_stranger_is_shown_what_the_model_draws_and_finds_it_again(page, tmp_path):
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    other = replace(CARD, name="teacher", examples=())
    models = [Simulator(0, 0, info=replace(CARD, owner="teacher")), Simulator(0, 0, info=other)]
    with serving(create_app(Settings(data=None), worker_threads(*models))) as url:
        page.driver.get(url)
        page.until(lambda: alt(page) == "a red circle (seed 1)")  # drawn without a touch
        assert page.text(".intro").endswith("\nA model of plain colors.")
        width = page.find("#images img")[0].size["width"]
        assert width % 64 == 0  # whole screen pixels
        assert width > 64
        page.find("#chips button")[1].click()
        page.until(lambda: alt(page) == "two <b>stars</b> 🌟 (seed 1)")
        assert not page.find("b")  # text of users is no markup
        page.find("#beside option[value=teacher]")[0].click()
        page.until(lambda: alt(page, "#others img") == alt(page))
        assert "teacher (teacher)" in page.text("#beside")

        page.find("#n")[0].clear()
        page.find("#n")[0].send_keys("2")
        page.until(lambda: len(page.find("#images img")) == 2)
        page.until(lambda: len(page.find("#history li")) == 3)
        button(page, "Save all").click()
        button(page, "Save").click()
        page.until(lambda: {file.suffix for file in tmp_path.iterdir()} == {".zip", ".png"})
        (saved,) = tmp_path.glob("*.png")
        page.until(lambda: saved.stat().st_size)
        with zipfile.ZipFile(tmp_path / "images.zip") as archive:
            assert archive.testzip() is None
            names = sorted(archive.namelist())
            assert names == ["two-b-stars-b-1.png", "two-b-stars-b-2.png"]
            assert archive.read(names[0]) == saved.read_bytes()
            with Image.open(io.BytesIO(archive.read(names[1]))) as second:
                second.load()
                assert json.loads(second.info["fgm-settings"])["seed"] == 2

        page.find("#images .frame")[0].click()
        before = page.find("#lens img")[0].size["width"]
        page.find("#smaller")[0].click()
        assert page.find("#lens img")[0].size["width"] < before
        page.find("#close")[0].click()

        link = page.driver.current_url
        assert "seed=1" in link.partition("#")[2]  # after the #: servers and proxies do not see prompts
        page.driver.get("about:blank")
        page.driver.get(link)
        page.until(lambda: alt(page) == "two <b>stars</b> 🌟 (seed 1)")
        assert len(page.find("#history li")) == 3  # which survives the reload
        clear(page)
        assert page.text("#why").startswith("The prompt is empty")
        assert page.find("#draw")[0].get_attribute("aria-disabled") == "true"
        page.find("#saved")[0].send_keys(str(saved))
        page.until(lambda: page.find("#prompt")[0].get_attribute("value") == "two <b>stars</b> 🌟")
        page.find("#saved")[0].send_keys(str(tmp_path / "images.zip"))
        page.until(lambda: page.text("#status").startswith("This is not a PNG"))
        assert page.errors() == []


def test_images_appear_during_typing_and_after_the_server_is_back(page):
    typing = """window.typing = setInterval(() => {
      const prompt = document.getElementById("prompt");
      prompt.value += "a";
      prompt.dispatchEvent(new Event("input", { bubbles: true }));
    }, 40);"""
    with serving(create_app(Settings(data=None), worker_threads(Simulator(0.2, 0)))) as url:
        page.driver.get(url)
        page.until(lambda: page.find("#model option"))
        page.driver.execute_script(typing)
        page.until(lambda: alt(page))  # though no pause between two keys is as long as an image takes
        first = alt(page)
        page.until(lambda: alt(page) != first)
        page.driver.execute_script("clearInterval(window.typing)")
        last = page.find("#prompt")[0].get_attribute("value")
        page.until(lambda: alt(page) == f"{last} (seed 1)")
    page.find("#prompt")[0].send_keys(" later")
    page.until(lambda: "does not answer. Trying again" in page.text("#status"))
    with serving(create_app(Settings(data=None), worker_threads(Simulator(0, 0))), port=int(url.rpartition(":")[2])):
        page.until(lambda: alt(page) == f"{last} later (seed 1)")
        assert "Trying again" not in page.text("#status")
    page.errors()  # of the requests without an answer


def test_prompts_become_a_batch_a_gallery_and_a_zip_file(page, tmp_path):
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    with serving(create_app(Settings(data=tmp_path / "data"), worker_threads(Simulator(0, 0)))) as url:
        page.driver.get(f"{url}/batches")
        page.until(lambda: page.find("#model option"))
        page.driver.execute_script(MANY_LINES, MAX_LINES + 1)
        assert f"{MAX_LINES:,} prompts at most, these are {MAX_LINES + 1:,}" in page.text("#why")
        page.driver.execute_script(MANY_LINES, 0)
        page.find("#start")[0].click()
        assert page.text("#why") == "Type some prompts, or choose a file of requests."
        page.find("#prompts")[0].send_keys("a red circle\n\n<i>two</i> stars\n")
        page.find("#start")[0].click()
        page.until(lambda: page.find("#batches .completed"))
        assert "a red circle and 1 more" in page.text("#batches")
        button(page, "Show images").click()
        page.until(lambda: len(page.find("#gallery img")) == 2)
        loaded = "return [...document.querySelectorAll('#gallery img')].every((image) => image.naturalWidth === 64)"
        page.until(lambda: page.driver.execute_script(loaded))
        assert page.text("#gallery") == "1 a red circle\n2 <i>two</i> stars"
        button(page, "Images as ZIP").click()
        page.until(lambda: list(tmp_path.glob("*.zip")))
        (made,) = tmp_path.glob("*.zip")
        page.until(lambda: zipfile.is_zipfile(made))
        with zipfile.ZipFile(made) as archive:
            assert archive.testzip() is None
            names = [name.partition(" seed")[0] for name in archive.namelist()]
            assert names == ["00001 a red circle", "00002 _i_two_i_ stars"]
        accessible(page, url)
        assert page.errors() == []


def accessible(page, url: str) -> None:
    """Check every page with axe-core, on a wide light screen and on a narrow dark one."""
    axe = (files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    shown = {"": "#model option", "batches": "#batches li", "jobs": "#preset option", "docs": "#reference details"}
    for width, theme in ((1280, "light"), (390, "dark")):
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 400}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        page.driver.execute_script("localStorage.setItem('theme', arguments[0])", theme)
        for name, selector in shown.items():
            page.driver.get(f"{url}/{name}")
            page.until(lambda selector=selector: page.find(selector))
            page.driver.execute_script(OPEN)
            assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
            found = page.driver.execute_script(f"{axe}; return window.axe.run()")
            assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]] == [], name
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_job_is_chosen_from_what_the_server_offers_and_deleted(page, tmp_path):
    settings = Settings(
        data=tmp_path, jobs={"devices": "none", "teachers": {"scenes": "scenes", "gone": str(tmp_path / "gone")}}
    )
    app = create_app(settings, worker_threads(Simulator(0, 0)))
    with serving(app) as url:
        page.driver.get(f"{url}/jobs")
        page.until(lambda: page.find("#preset option"))
        assert page.find("#preset")[0].get_attribute("value") == "scenes"
        assert {each.get_attribute("value") for each in page.find("#method option")} == {"", *methods.names()}
        page.find("#model option[value=gone]")[0].click()
        assert "is not on this server" in page.text("#why")
        page.find("#model option[value=scenes]")[0].click()
        page.find("#budget")[0].send_keys("512")
        assert "A budget of 512 images is 1 step of 512." in page.text("#noise")
        page.find("#suffix")[0].send_keys("first")
        page.find("#prompts")[0].send_keys("a red circle")
        page.find("#start")[0].click()
        page.until(lambda: page.find("#phases [aria-current]"))  # from the first second
        assert page.text("#name") == page.text("#jobs strong") == "first"
        assert "is 1 step of 512" in page.text("#alarms")
        created = httpx.get(f"{url}/v1/fine_tuning/jobs").json()["data"][0]["id"]
        report = httpx.get(f"{url}/v1/fine_tuning/jobs/{created}/report")
        assert (report.status_code, report.json()["error"]["code"]) == (404, "no_report")
        button(page, "Cancel").click()
        page.until(lambda: page.find("#jobs .cancelled"))
        page.until(lambda: "Delete" in page.text("#actions"))
        button(page, "Delete").click()
        page.driver.switch_to.alert.accept()
        page.until(lambda: page.find("#none")[0].is_displayed())
        assert httpx.get(f"{url}/v1/fine_tuning/jobs").json()["data"] == []
        jobs = app.state.jobs
        with jobs.database.read() as session:
            (kept,) = session.scalars(select(JobRow))  # until no server serves its student any more
        for task in jobs.periodic_tasks:
            task(int(time.time()) + 61)
        with jobs.database.read() as session:
            assert list(session.scalars(select(JobRow))) == list(session.scalars(select(JobEventRow))) == []
        assert not (tmp_path / "distillations" / kept.id).exists()
        assert page.errors() == []
