"""API keys: their storage and scopes, and the checks of a server without keys."""

import json
import os
import stat

import httpx
import pytest
from running import until
from typer.testing import CliRunner

from service import cli
from service.errors import StartError
from service.http import keys
from service.http.keys import ApiKey, KeyFile, find

SCOPES = ("generate", "jobs", "admin")


def test_a_key_is_found_by_its_token_and_stored_as_a_hash(tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    token = file.create("ann", ["generate", "admin"])
    other = file.create("bob", ["jobs"])
    stored = KeyFile(tmp_path / "keys.json").read()
    assert find(stored, token).owner == "ann"
    assert find(stored, token).scopes == {"generate", "admin"}
    assert find(stored, other).owner == "bob"
    assert find(stored, token + "x") is None
    assert find([ApiKey.of(text, "weak", SCOPES) for text in ("", "short", "\n")], "") is None
    assert find([ApiKey.of("short", "weak", SCOPES)], "short") is None
    text = (tmp_path / "keys.json").read_text()
    (tmp_path / "keys.json").write_text(text, encoding="utf-8-sig")  # by an editor that puts a mark first
    assert KeyFile(tmp_path / "keys.json").read() == stored
    assert token not in text
    assert token.removeprefix("fgm-") not in text
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600
    with pytest.raises(StartError, match="ann"):
        file.create("ann", ["generate"])


def test_a_server_reloads_its_key_file_and_checks_scopes(serve, tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    tokens = {scope: file.create(scope, [scope]) for scope in ("generate", "jobs")}
    url = serve(data=tmp_path, http={"keys_file": tmp_path / "keys.json"})

    def ask(token, method="GET", path="models"):
        return httpx.request(method, f"{url}/v1/{path}", headers={"authorization": f"Bearer {token}"})

    def status(token):
        return ask(token).status_code

    assert status(tokens["generate"]) == 200
    assert status(tokens["jobs"]) == 403
    guarded = [("GET", "files/file-1"), ("DELETE", "files/file-1"), ("GET", "files/file-1/content")]
    guarded += [("GET", "batches/batch_1"), ("POST", "batches/batch_1/cancel"), ("DELETE", "models/ft:scenes::1")]
    parts = ("", "/events", "/checkpoints", "/sample", "/log", "/report")
    guarded += [("GET", f"fine_tuning/jobs/ftjob-1{part}") for part in parts]
    guarded += [
        ("GET", "batches/batch_1/images"),
        ("GET", "fine_tuning/choices"),
        ("DELETE", "fine_tuning/jobs/ftjob-1"),
    ]
    guarded += [("POST", f"fine_tuning/jobs/ftjob-1/{act}") for act in ("cancel", "pause", "resume")]
    guarded += [(method, path) for path in ("files", "batches", "fine_tuning/jobs") for method in ("GET", "POST")]
    for method, path in guarded:
        refused = ask(tokens["generate"], method, path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope"), path
    assert ask(tokens["jobs"], "GET", "files").json()["data"] == []
    assert ask(tokens["jobs"], "DELETE", "models/ft:scenes::1").status_code == 404
    assert status("fgm-wrong") == 401
    file.revoke("generate")
    assert status(tokens["generate"]) == 401
    file.revoke("jobs")  # the last one, which opens the server to nobody
    assert status(tokens["generate"]) == 401


def contents(key, **other):
    return json.dumps({"keys": [vars(key) | {"scopes": sorted(key.scopes), "created": 0} | other]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"keys": [{"owner": "a"}]}',
        contents(ApiKey.of("t", "a", []), scopes=["everything"]),
        contents(ApiKey.of("t", "a", []), digest="not SHA-256"),
        contents(ApiKey.of("t", "", [])),
        contents(ApiKey.of("", "a", SCOPES)),
        '{"keys": [], "more": ' + "[" * 100_000,
    ],
)
def test_an_invalid_key_file_is_named(tmp_path, text):
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(StartError, match=r"keys\.json is not a file of API keys"):
        KeyFile(tmp_path / "keys.json").read()


def test_while_a_key_file_does_not_answer_the_last_keys_stay_valid(serve, tmp_path):
    path = tmp_path / "keys.json"
    token = KeyFile(path).create("ann", SCOPES)
    url = serve(http={"keys_file": path})

    def status(key):
        return httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    assert status(token) == 200
    path.unlink()
    os.mkfifo(path)  # whoever opens it waits, as on a mount that hangs
    assert [status(token), status(token), status(f"{token}x")] == [200, 200, 401]
    assert httpx.get(f"{url}/healthz").status_code == 200
    os.close(os.open(path, os.O_WRONLY))
    path.unlink()
    path.write_text("{}")
    until(lambda: status(token) == 503)  # it answers again, and is no key file: nobody is let in
    path.unlink()
    assert status(token) == 401


def test_a_key_file_that_never_answers_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "START_SECONDS", 0.1)
    os.mkfifo(tmp_path / "keys.json")
    with pytest.raises(StartError, match=r"keys\.json cannot be read: its file system does not answer"):
        KeyFile(tmp_path / "keys.json").read_at_start()
    os.close(os.open(tmp_path / "keys.json", os.O_WRONLY))


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic Og==", "Bearer key of ann"])
def test_a_request_without_a_credential_is_refused(serve, tmp_path, header):
    KeyFile(tmp_path / "keys.json").create("ann", SCOPES)
    headers = {} if header is None else {"authorization": header}
    refused = httpx.get(f"{serve(http={'keys_file': tmp_path / 'keys.json'})}/v1/models", headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_an_empty_key_file_refuses_every_request(serve, tmp_path):
    url = serve(http={"keys_file": tmp_path / "keys.json"})
    assert httpx.get(f"{url}/v1/models").status_code == 401
    token = KeyFile(tmp_path / "keys.json").create("ann", SCOPES)
    assert httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {token}"}).status_code == 200


@pytest.mark.parametrize("name", [" ", "two\nlines", "not UTF-8 \udcff"])
def test_a_key_needs_a_name(tmp_path, name):
    with pytest.raises(StartError, match="needs a name"):
        KeyFile(tmp_path / "keys.json").create(name, ["generate"])
    assert not (tmp_path / "keys.json").exists()


def test_keys_are_managed_from_the_command_line(tmp_path):
    def run(*words):
        done = CliRunner().invoke(cli.app, ["keys", *words, "--keys-file", str(tmp_path / "keys.json")])
        assert done.exit_code == 0, done.output
        return done.output

    token = run("create", "ann", "--scope", "generate", "--scope", "admin").strip()
    assert find(KeyFile(tmp_path / "keys.json").read(), token).owner == "ann"
    assert run("list").startswith("ann\tadmin,generate\t20")
    run("revoke", "ann")
    assert run("list") == ""
    for command in (["list"], ["revoke", "ann"]):
        missing = tmp_path / "other" / "keys.json"
        done = CliRunner().invoke(cli.app, ["keys", *command, "--keys-file", str(missing)])
        assert isinstance(done.exception, StartError)
        assert f"there is no {missing}" in str(done.exception)
        assert f"keys create NAME --keys-file {missing}" in str(done.exception)
        assert not missing.parent.exists()


def test_without_keys_the_server_listens_on_the_loopback_only():
    done = CliRunner().invoke(cli.app, ["serve", "--device", "simulator", "--host", "0.0.0.0"])
    assert isinstance(done.exception, StartError)
    assert "--open-to-all" in str(done.exception)


def test_open_to_all_does_not_replace_the_keys_of_a_file(tmp_path):
    file = str(tmp_path / "keys.json")
    done = CliRunner().invoke(cli.app, ["serve", "--host", "0.0.0.0", "--open-to-all", "--keys-file", file])
    assert isinstance(done.exception, StartError)
    assert f"{file} (http.keys_file) has no key" in str(done.exception)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"origin": "https://evil.example"}, "origin_not_allowed"),
        ({"origin": "null"}, "origin_not_allowed"),
        ({"host": "evil.example", "origin": "http://evil.example"}, "host_not_allowed"),
        ({"host": "evil.example"}, "host_not_allowed"),
    ],
)
def test_without_keys_pages_of_other_origins_are_refused(serve, tmp_path, headers, code):
    url = serve(data=tmp_path)
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.txt", b"a red circle\n")}}
    refused = httpx.post(f"{url}/v1/files", headers=headers, **form)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, code)
    assert httpx.post(f"{url}/v1/files", headers={"origin": url}, **form).status_code == 200


def test_a_key_is_read_from_the_headers_of_other_clients(serve):
    key = "a-key-for-these-tests"
    url = serve(http={"api_keys": [key]})
    for headers, status in (
        ({"api-key": key}, 200),  # Azure's
        ({"x-api-key": key}, 200),
        ({"authorization": "Basic YTpi", "api-key": key}, 200),
        ({"authorization": "Bearer", "x-api-key": key}, 200),
        ({"authorization": "Bearer another-key-for-tests", "api-key": key}, 401),
        ({"api-key": "another-key-for-tests"}, 401),
        ({"api-key": "", "x-api-key": ""}, 401),
        ({"x-key": key}, 401),
    ):
        answer = httpx.get(f"{url}/v1/models", headers=headers)
        assert answer.status_code == status, headers
        if status == 401:
            assert "`api-key: KEY`" in answer.json()["error"]["message"]


def test_origins_and_hosts_of_the_settings_are_accepted(serve):
    url = serve(http={"cors_origins": ["https://friend.example"], "public_url": "https://images.example/"})
    for headers in (
        {"origin": "https://friend.example"},
        {"host": "images.example", "origin": "https://images.example"},
    ):
        answer = httpx.post(f"{url}/v1/images/generations", headers=headers, json={"prompt": "x"})
        assert answer.status_code == 200
