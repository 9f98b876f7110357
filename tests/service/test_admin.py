"""Models loaded and unloaded by their administrator, over HTTP."""

import base64
import io
import json

import httpx
import openai
import pytest
from PIL import Image

from service.keys import KeyFile


@pytest.fixture
def students(tmp_path):
    for name in ("one", "two", "none"):
        (tmp_path / "students" / name).mkdir(parents=True)
    for name in ("one", "two"):
        (tmp_path / "students" / name / "onestep.json").write_text(json.dumps({"name": f"student-{name}"}))
    (tmp_path / "onestep.json").write_text(json.dumps({"name": "outside"}))
    return tmp_path / "students"


def test_a_student_comes_serves_and_goes(serve, connect, students):
    url = serve(students=students)
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


def test_an_adapter_comes_is_asked_for_and_goes(serve, connect, students):
    (students / "none" / "pytorch_lora_weights.safetensors").touch()
    url = serve(students=students)
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
def test_what_is_no_student_of_ours_is_refused(serve, students, body, param):
    url = serve(students=students)
    answer = httpx.post(f"{url}/v1/admin/models", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert len(httpx.get(f"{url}/v1/models").json()["data"]) == 1


def test_only_keys_of_the_scope_may(serve, students, tmp_path):
    keys = KeyFile(tmp_path / "keys.json")
    url = serve(students=students, keys_file=tmp_path / "keys.json")
    for scope, status in (("generate", 403), ("jobs", 403), ("admin", 200)):
        headers = {"authorization": f"Bearer {keys.create(scope, [scope])}"}
        assert httpx.get(f"{url}/v1/admin/models", headers=headers).status_code == status
        assert httpx.post(f"{url}/v1/admin/models", json={"folder": "one"}, headers=headers).status_code == status
    assert httpx.get(f"{url}/v1/admin/models").status_code == 401
