"""`/v1/admin`: models that are loaded and unloaded at run time."""

import base64
import io
import json

import httpx
import openai
import pytest
from PIL import Image
from typer.testing import CliRunner

from service import cli
from service.errors import StartError
from service.http.keys import KeyFile


@pytest.fixture
def students(tmp_path):
    for name in ("one", "two", "none"):
        (tmp_path / "students" / name).mkdir(parents=True)
    for name in ("one", "two"):
        (tmp_path / "students" / name / "onestep.json").write_text(json.dumps({"name": f"student-{name}"}))
    (tmp_path / "onestep.json").write_text(json.dumps({"name": "outside"}))
    return tmp_path / "students"


def test_a_student_is_loaded_served_and_unloaded(serve, connect, students):
    url = serve(models_folder=students)
    models = f"{url}/v1/admin/models"
    listed = httpx.get(models).json()
    assert [model["id"] for model in listed["data"]] == ["simulator"]
    assert listed["data"][0]["sizes"] == ["64x64", "128x64"]
    assert listed["folders"] == ["one", "two"]
    assert httpx.post(models, json={"folder": "one"}).json()["id"] == "student-one"
    assert httpx.post(models, json={"folder": "two", "name": "ft:a:b:1"}).json()["id"] == "ft:a:b:1"
    client = connect(url)
    assert [model.id for model in client.models.list()] == ["simulator", "student-one", "ft:a:b:1"]
    assert client.images.generate(prompt="a", model="ft:a:b:1", extra_body={"seed": 1}).data[0].seed == 1
    assert httpx.delete(f"{models}/ft:a:b:1").json() == {"id": "ft:a:b:1", "object": "model", "deleted": True}
    assert [model.id for model in client.models.list()] == ["simulator", "student-one"]


def test_an_adapter_is_loaded_used_and_unloaded(serve, connect, students):
    (students / "none" / "pytorch_lora_weights.safetensors").touch()
    url = serve(models_folder=students)
    assert httpx.get(f"{url}/v1/admin/models").json()["adapter_folders"] == ["none"]
    adapter = {"model": "simulator", "folder": "none", "name": "style"}
    assert httpx.post(f"{url}/v1/admin/adapters", json=adapter).json()["adapters"] == ["style"]
    client = connect(url)
    styled = client.images.generate(prompt="a", extra_body={"seed": 1, "lora": {"name": "style", "scale": 0.5}})
    plain = client.images.generate(prompt="a", extra_body={"seed": 501})
    assert styled.data[0].seed == 1
    assert pixel(styled) == pixel(plain)  # as a simulator has it
    gone = httpx.delete(f"{url}/v1/admin/adapters/style", params={"model": "simulator"})
    assert gone.json() == {"id": "style", "object": "adapter", "deleted": True}
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", extra_body={"lora": {"name": "style"}})
    assert (caught.value.param, caught.value.code) == ("lora.name", "adapter_not_found")


def pixel(answer):
    return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).getpixel((0, 0))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"folder": "none"}, "folder"),
        ({"folder": ".."}, "folder"),
        ({"folder": "../students/one"}, "folder"),
        ({"folder": "/etc"}, "folder"),
        ({"folder": "one", "name": "simulator"}, "name"),
        ({"folder": "one", "name": "a/../b"}, "name"),
        ({"folder": "one", "device": "cpu"}, "device"),
        ({}, "folder"),
    ],
)
def test_an_unknown_folder_is_refused(serve, students, body, param):
    url = serve(models_folder=students)
    answer = httpx.post(f"{url}/v1/admin/models", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert len(httpx.get(f"{url}/v1/models").json()["data"]) == 1


def test_only_keys_with_the_admin_scope_are_accepted(serve, students, tmp_path):
    keys = KeyFile(tmp_path / "keys.json")
    url = serve(models_folder=students, http={"keys_file": tmp_path / "keys.json"})
    for scope, status in (("generate", 403), ("jobs", 403), ("admin", 200)):
        headers = {"authorization": f"Bearer {keys.create(scope, [scope])}"}
        assert httpx.get(f"{url}/v1/admin/models", headers=headers).status_code == status
        assert httpx.post(f"{url}/v1/admin/models", json={"folder": "one"}, headers=headers).status_code == status
    assert httpx.get(f"{url}/v1/admin/models").status_code == 401


def shell(url, *words, key=None):
    given = ["--key", key] if key else []
    done = CliRunner().invoke(cli.app, ["models", *words, "--url", url, *given])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_models_are_loaded_and_unloaded_from_the_command_line(serve, connect, students):
    (students / "none" / "pytorch_lora_weights.safetensors").touch()
    (students / "ink.safetensors").touch()
    url = serve(aliases={"gpt-image-1": "simulator"}, models_folder=students)
    assert shell(url, "load", "one") == "student-one is loaded.\n"
    assert shell(url, "load", "two", "--name", "new") == "new is loaded.\n"
    assert shell(url, "load-adapter", "none", "--model", "new", "--name", "style") == "Adapters of new: style.\n"
    assert shell(url, "load-adapter", "none", "--model", "new") == "Adapters of new: style, none.\n"
    assert shell(url, "load-adapter", "ink", "--model", "new") == "Adapters of new: style, none, ink.\n"
    assert [line.split() for line in shell(url, "list").splitlines()] == [
        ["student", "sizes", "adapters", "aliases"],
        ["simulator", "64x64,128x64", "-", "gpt-image-1"],
        ["student-one", "64x64,128x64", "-", "-"],
        ["new", "64x64,128x64", "style,none,ink", "-"],
        ["students", "to", "load:", "one,", "two"],
        ["adapters", "to", "load:", "ink,", "none"],
    ]
    known = {model.id: (model.sizes, model.adapters) for model in connect(url).models.list()}
    assert known["gpt-image-1"] == (["64x64", "128x64"], [])
    assert known["new"][1] == ["style", "none", "ink"]
    assert shell(url, "unload-adapter", "style", "--model", "new") == "style of new is unloaded.\n"
    assert shell(url, "unload", "student-one") == "student-one is unloaded.\n"
    assert [model.id for model in connect(url).models.list()] == ["simulator", "new", "gpt-image-1"]


def test_an_error_of_the_server_is_one_sentence_on_the_command_line(serve, students):
    url = serve(models_folder=students)
    for said, *words in (
        ("no student 'other'; it has one, two", "load", "other"),
        ("no model 'other'", "unload", "other"),
        ("the only model", "unload", "simulator"),
        ("no adapter 'one'", "load-adapter", "one", "--model", "simulator"),
        ("no adapter 'other'", "unload-adapter", "other", "--model", "simulator"),
    ):
        with pytest.raises(StartError, match=said):
            shell(url, *words)


def test_the_command_line_names_a_missing_key_and_an_unreachable_server(serve, students, tmp_path):
    keys = KeyFile(tmp_path / "keys.json")
    url = serve(models_folder=students, http={"keys_file": tmp_path / "keys.json"})
    assert shell(url, "list", key=keys.create("root", ["admin"])).startswith("student")
    for key in (None, keys.create("ann", ["generate"])):
        with pytest.raises(StartError, match="pass a key with the scope admin by --key"):
            shell(url, "list", key=key)
    for wrong in ("http://127.0.0.1:9", "http://", "nowhere"):
        with pytest.raises(StartError, match=r"--url selects another|no valid URL"):
            shell(wrong, "list")
