"""Sources of settings, their precedence, and the errors of wrong ones."""

import json
import logging
import os
import re
from pathlib import Path

import httpx
import pytest

from service.engine.launch import serving_devices, worker_processes
from service.errors import StartError
from service.observability.logs import JsonFormatter
from service.settings import SHIPPED_STUDENT, Settings, keys
from service.settings_reader import read_settings

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def _without_the_suites_group(monkeypatch):
    """A group in the environment would hide a file that sets a value in its place."""
    monkeypatch.delenv("SERVICE_ENGINE__TUNING_SECONDS")


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path, monkeypatch):
    file = tmp_path / "service.toml"
    file.write_text("""
        [engine]
        max_batch = 2
        max_queued_images = 20
        [http]
        port = 1
        cors_origins = ["https://a.example"]
    """)
    monkeypatch.setenv("SERVICE_ENGINE__MAX_QUEUED_IMAGES", "30")
    monkeypatch.setenv("SERVICE_HTTP__PORT", "2")
    monkeypatch.setenv("service_runtime__batch_buckets", "[4, 1]")
    settings = read_settings({"http": {"port": 3}}, file)
    assert settings.runtime.batch_buckets == (1, 4)
    assert (settings.engine.max_batch, settings.engine.max_queued_images, settings.http.port) == (2, 30, 3)
    assert settings.http.cors_origins == ("https://a.example",)
    assert settings.http.drain_seconds == 30


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("engine.max_batsch = 2", r"no setting 'engine.max_batsch'; did you mean 'engine.max_batch'\?"),
        ("max_batch = 2", r"no setting 'max_batch'; did you mean 'engine.max_batch'\?"),
        ("engin.max_batch = 2", r"no setting 'engin'; did you mean 'engine"),
        ("engine = 2", "engine is a group of settings"),
        ("engine.max_batch = 0", r"engine.max_batch \(SERVICE_ENGINE__MAX_BATCH\)"),
        ("engine.max_batch = ", "TOML"),
        ('http.rate_limit = "often"', "http.rate_limit"),
        ('jobs.devices = "cuda:0,cuda:0"', "twice"),
        ('jobs.webhooks = [{url = "https://a.example"}]', "jobs.webhooks"),
        ('observability.log_format = "xml"', "observability.log_format"),
        ('http.trusted_proxies = ["proxy"]', "http.trusted_proxies"),
        ('http.trusted_proxies = ["10.0.0.1/8"]', "http.trusted_proxies"),
        ('http.public_url = "http://[::1"', "http.public_url"),
        ("http.keep_alive_seconds = 0", "http.keep_alive_seconds"),
        ('runtime.precision = "fp8"', "runtime.precision"),
    ],
)
def test_a_wrong_key_is_named(tmp_path, text, named):
    file = tmp_path / "service.toml"
    file.write_text(text)
    with pytest.raises(StartError, match=named):
        read_settings({}, file)


def test_the_documentation_lists_every_setting_once():
    rows = re.findall(r"^\| (`.*?) \| ", (DOCS / "operations.md").read_text(), re.MULTILINE)
    listed = [key for row in rows for key in re.findall(r"`([a-z0-9_.]+)`", row) if "." in key or key in keys()]
    assert sorted(listed) == sorted(keys())


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_settings_files_in_the_documentation_are_valid(page, tmp_path):
    for number, block in enumerate(re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)):
        file = tmp_path / f"{number}.toml"
        file.write_text(block)
        read_settings({}, file)


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("SERVICE_HTTP__KEY_FILE", "SERVICE_HTTP__KEYS_FILE"),
        ("SERVICE_HTTP_KEYS_FILE", "SERVICE_HTTP__KEYS_FILE"),
        ("SERVICE_MODEL", "SERVICE_MODELS"),
        ("SERVICE_MAX_BATCH", "SERVICE_ENGINE__MAX_BATCH"),
        ("service_model", "SERVICE_MODELS"),
        ("Service_Http__Key_File", "SERVICE_HTTP__KEYS_FILE"),
        ("SERVICE_METRICS_PORT", "docs/operations.md"),
        ("SERVICE_", "docs/operations.md"),
    ],
)
def test_a_variable_that_is_no_setting_is_named(monkeypatch, variable, nearest):
    monkeypatch.setenv(variable, "9000")
    with pytest.raises(StartError, match=rf"{variable};.*{nearest}"):
        read_settings({})


def test_variables_that_kubernetes_sets_for_services_are_left_alone(tmp_path, monkeypatch):
    for name, value in {
        "SERVICE_PORT": "tcp://10.0.0.1:80",
        "SERVICE_PORT_80_TCP": "tcp://10.0.0.1:80",
        "SERVICE_PORT_80_TCP_ADDR": "10.0.0.1",
        "SERVICE_SERVICE_HOST": "10.0.0.1",
        "SERVICE_SERVICE_PORT_HTTP": "80",
        "SERVICE_API_PORT": "tcp://10.0.0.1:80",
        "SERVICE_API_SERVICE_PORT": "80",
        "SERVICE_CONFIG": "used by the commands",
    }.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "service.toml"
    file.write_text("http.port = 1234")
    assert read_settings({}, file).http.port == 1234
    assert read_settings({}).http.port == 8000


def test_a_byte_order_mark_is_skipped_and_another_encoding_is_named(tmp_path):
    file = tmp_path / "service.toml"
    file.write_text("engine.max_batch = 2", encoding="utf-8-sig")
    assert read_settings({}, file).engine.max_batch == 2
    file.write_text("max_batch = 2", encoding="utf-16")
    with pytest.raises(StartError, match="not UTF-8"):
        read_settings({}, file)


def test_a_user_without_a_home_is_asked_for_a_data_folder(monkeypatch):
    for name in ("HOME", "XDG_STATE_HOME", "SERVICE_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2_000_000_000)  # as in a container: no account has this number
    with pytest.raises(StartError, match="data: this user has no home folder"):
        read_settings({})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StartError, match=r"nowhere\.toml"):
        read_settings({}, tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("devices", "job_devices", "gpus", "serving"),
    [
        ("auto", "cpu", 2, ["cuda:0", "cuda:1"]),
        ("auto", "cuda:1", 2, ["cuda:0"]),
        ("auto", "cuda:1,cuda:0", 3, ["cuda:2"]),
        ("auto", "cpu", 0, ["auto"]),
        ("cuda:0, cuda:2", "cuda:1,cuda:3", 4, ["cuda:0", "cuda:2"]),
        ("cpu", "cpu", 0, ["cpu"]),
        ("cuda:0", "cuda:1", None, ["cuda:0"]),
    ],
)
def test_gpus_of_jobs_do_not_serve(devices, job_devices, gpus, serving):
    assert (
        serving_devices(read_settings({"engine": {"devices": devices}, "jobs": {"devices": job_devices}}), gpus)
        == serving
    )


@pytest.mark.parametrize(
    ("devices", "job_devices", "gpus"),
    [("cuda:0,cuda:1", "cuda:1", 2), ("cuda", "cuda:0", 2), ("auto", "cuda:0", 1), ("auto", "cuda:0,cuda:1", 2)],
)
def test_a_gpu_to_serve_and_to_train_on_is_refused_by_both_settings(devices, job_devices, gpus):
    with pytest.raises(StartError, match=r"engine\.devices\b") as refused:
        serving_devices(read_settings({"engine": {"devices": devices}, "jobs": {"devices": job_devices}}), gpus)
    assert f"jobs.devices ({job_devices})" in str(refused.value)


@pytest.mark.parametrize(
    ("devices", "job_devices", "gpus", "sentence"),
    [
        ("cuda", "cpu", 0, "engine.devices names cuda, and CUDA's driver shows 0 GPUs here"),
        ("cuda:0, cuda:1,cuda:2", "cpu", 1, "engine.devices names cuda:1, cuda:2, and CUDA's driver shows 1 GPUs"),
        ("cpu", "cuda:0", 0, "jobs.devices names cuda:0, and CUDA's driver shows 0 GPUs here"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_before_torch_is_imported(devices, job_devices, gpus, sentence):
    with pytest.raises(StartError, match=sentence):
        serving_devices(read_settings({"engine": {"devices": devices}, "jobs": {"devices": job_devices}}), gpus)


@pytest.mark.parametrize(
    "key", ["", "short", " " * 20, "a key with spaces in it", "${KEY_OF_ANN_UNSET}", "sixteen-letters\n"]
)
def test_an_empty_or_short_key_is_refused(monkeypatch, key):
    monkeypatch.setenv("SERVICE_HTTP__API_KEYS", json.dumps(["key-of-ann-in-tests", key]))
    with pytest.raises(StartError, match=r"SERVICE_HTTP__API_KEYS.*at least 16 characters"):
        read_settings({})


def test_an_empty_database_is_refused(monkeypatch):
    monkeypatch.setenv("SERVICE_JOBS__DATABASE", "")
    with pytest.raises(StartError, match="SERVICE_JOBS__DATABASE"):
        read_settings({})


@pytest.mark.parametrize("origin", ["https://a.example/", "a.example", "https://a.example/page", "", "https://"])
def test_what_no_page_can_have_for_its_origin_is_refused(origin):
    with pytest.raises(StartError, match=r"cors_origins.*is not an origin; write scheme://host"):
        read_settings({"http": {"cors_origins": (origin,)}})


@pytest.mark.parametrize("secret", ["", "short"])
def test_an_empty_or_short_secret_of_links_is_refused(monkeypatch, secret):
    monkeypatch.setenv("SERVICE_IMAGES__ARTIFACT_SECRET", secret)
    with pytest.raises(StartError, match=r"SERVICE_IMAGES__ARTIFACT_SECRET.*at least 16 characters"):
        read_settings({})


def test_students_have_names(monkeypatch):
    monkeypatch.setenv("SERVICE_MODELS", f'["{SHIPPED_STUDENT}", "mine={SHIPPED_STUDENT}"]')
    settings = read_settings({})
    assert settings.students() == ["scenes-one-step", "mine"]
    assert [model.name for model in worker_processes(settings).models] == [None, "mine"]
    assert Settings(**dict(settings)).models == settings.models  # as replicas receive them
    assert f"models = ['{SHIPPED_STUDENT}', 'mine={SHIPPED_STUDENT}']" in settings.lines()
    odd = read_settings({"models": ("./a=b", "/runs/a=b")}).models
    assert [(each.name, each.folder) for each in odd] == [(None, Path("a=b").absolute()), (None, Path("/runs/a=b"))]


def test_printed_settings_hide_secrets():
    settings = read_settings(
        {
            "http": {"api_keys": ("hunter2hunter2hunter2",)},
            "images": {"artifact_secret": "hunter2hunter2hunter2", "artifacts": "ftp://ann:hunter2@host/images"},
            "engine": {"max_batch": 5},
        }
    )
    lines = settings.lines()
    assert "engine.max_batch = 5" in lines
    assert "images.artifacts = ftp://**********@host/images" in lines
    assert not any(line.startswith("engine.devices") for line in lines)  # a default
    assert "hunter2" not in "".join(lines)


def test_a_log_record_is_one_json_object():
    record = logging.LogRecord("service", logging.INFO, "", 0, "%s done", ("a",), None)
    record.request_id = "req_1"
    line = JsonFormatter().format(record)
    told = json.loads(line)
    assert "\n" not in line
    assert (told["message"], told["level"], told["request_id"]) == ("a done", "info", "req_1")


@pytest.mark.parametrize("told", [False, True])
def test_requests_are_logged_with_their_prompt_only_where_told(serve, caplog, told):
    caplog.set_level(logging.INFO)
    url = serve(observability={"log_prompts": told})
    body = {"prompt": "my secret prompt", "user": "customer-7"}
    answer = httpx.post(f"{url}/v1/images/generations", json=body)
    httpx.get(f"{url}/healthz")  # the server has gone on since: the line is written
    (record,) = [record for record in caplog.records if getattr(record, "user", None) == "customer-7"]
    assert record.request_id == answer.headers["x-request-id"]
    assert "/v1/images/generations 200" in record.getMessage()
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert [json.loads(line)["prompt"] for line in lines if "secret" in line] == ["my secret prompt"] * told
