"""Models that an administrator loaded are loaded again when the server restarts, and unloaded ones are not."""

import asyncio
import json

import httpx
import pytest
from engines import run
from running import serving
from worker_threads import worker_threads

from service.app import create_app
from service.engine.engine import Engine
from service.engine.simulator import Simulator
from service.engine.stored_models import StoredModel, StoredModels
from service.errors import StartError
from service.settings import Settings


@pytest.fixture
def students(tmp_path):
    for name in ("one", "two", "style"):
        (tmp_path / "students" / name).mkdir(parents=True)
    for name in ("one", "two"):
        (tmp_path / "students" / name / "onestep.json").write_text(json.dumps({"name": f"student-{name}"}))
    (tmp_path / "students" / "style" / "pytorch_lora_weights.safetensors").touch()
    return tmp_path / "students"


def test_models_and_adapters_come_back(students, tmp_path):
    def started():
        settings = Settings(data=tmp_path / "data", models_folder=students, engine={"devices": "simulator"})
        return serving(create_app(settings, worker_threads(Simulator(0, 0))))

    with started() as url:
        models, adapters = f"{url}/v1/admin/models", f"{url}/v1/admin/adapters"
        for body in ({"folder": "one", "name": "first"}, {"folder": "two"}):
            assert httpx.post(models, json=body).status_code == 200
        for name in ("a", "b"):
            body = {"model": "first", "folder": "style", "name": name}
            assert httpx.post(adapters, json=body).status_code == 200
        assert httpx.delete(f"{adapters}/a", params={"model": "first"}).status_code == 200
        assert httpx.delete(f"{models}/student-two").status_code == 200
        assert httpx.post(adapters, json={"model": "simulator", "folder": "style", "name": "c"}).status_code == 200
    with started() as url:
        loaded = httpx.get(f"{url}/v1/admin/models").json()["data"]
        assert {model["id"]: model["adapters"] for model in loaded} == {"simulator": ["c"], "first": ["b"]}


def test_what_could_not_be_restored_is_tried_again(students, tmp_path):
    stored_models = StoredModels(tmp_path)
    for name in ("late", "unloaded", "one"):
        stored_models.add(StoredModel(name, name))
    stored_models.add(StoredModel("style", "late", "a"))

    async def test(engine: Engine) -> None:
        await stored_models.restore(engine.catalog, students)
        assert [*engine.catalog.models] == ["simulator", "one"]
        trying = asyncio.create_task(stored_models.retry(engine.catalog, students, first_pause=0.01))
        stored_models.remove("unloaded")
        (students / "one").rename(students / "late")
        await trying
        assert [*engine.catalog.models] == ["simulator", "one", "late"]
        assert [*engine.catalog.models["late"].adapters] == ["a"]

    run(worker_threads(Simulator(0, 0)), test)


def test_a_folder_that_is_gone_is_told_and_kept_for_the_next_start(students, tmp_path, caplog):
    stored_models = StoredModels(tmp_path)
    stored_models.add(StoredModel("gone", "first"))
    with serving(create_app(Settings(data=tmp_path, models_folder=students), worker_threads(Simulator(0, 0)))) as url:
        assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["simulator"]
    assert "first" in caplog.text
    assert "no student 'gone'" in caplog.text
    stored_models.add(StoredModel("one", "first"))
    assert stored_models.read() == [StoredModel("one", "first")]


def test_a_model_takes_its_adapters_along(tmp_path):
    stored_models = StoredModels(tmp_path)
    for each in (StoredModel("one", "m"), StoredModel("style", "m", "a"), StoredModel("style", "n", "a")):
        stored_models.add(each)
    stored_models.remove("m")
    assert StoredModels(tmp_path).read() == [StoredModel("style", "n", "a")]


def test_a_file_that_is_no_list_of_models_is_named(tmp_path):
    (tmp_path / "models.json").write_text('{"students": 3}')
    with pytest.raises(StartError, match=r"models\.json is not a list of loaded models"):
        StoredModels(tmp_path)


def test_without_a_data_folder_nothing_is_kept():
    stored_models = StoredModels(None)
    stored_models.add(StoredModel("one", "m"))
    assert stored_models.read() == []
