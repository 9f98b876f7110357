"""What an administrator loaded comes back when the server starts again, and nothing that was unloaded does."""

import asyncio
import json

import httpx
import pytest
from engines import run
from running import serving
from worker_threads import worker_threads

from service.app import create_app
from service.engine.engine import Engine
from service.engine.loaded_models import LoadedModelStore, StoredAdapter, StoredModels, StoredStudent
from service.engine.simulator import Simulator
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
    loaded_models = LoadedModelStore(tmp_path)
    for name in ("late", "unloaded", "one"):
        loaded_models.add(StoredStudent(name, name))
    loaded_models.add(StoredAdapter("late", "style", "a"))

    async def test(engine: Engine) -> None:
        await loaded_models.restore(engine.catalog, students)
        assert [*engine.catalog.models] == ["simulator", "one"]
        trying = asyncio.create_task(loaded_models.retry(engine.catalog, students, pause=0.01))
        loaded_models.remove("unloaded")
        (students / "one").rename(students / "late")
        await trying
        assert [*engine.catalog.models] == ["simulator", "one", "late"]
        assert [*engine.catalog.models["late"].adapters] == ["a"]

    run(worker_threads(Simulator(0, 0)), test)


def test_a_folder_that_is_gone_is_told_and_kept_for_the_next_start(students, tmp_path, caplog):
    loaded_models = LoadedModelStore(tmp_path)
    loaded_models.add(StoredStudent("gone", "first"))
    with serving(create_app(Settings(data=tmp_path, models_folder=students), worker_threads(Simulator(0, 0)))) as url:
        assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["simulator"]
    assert "first" in caplog.text
    assert "no student 'gone'" in caplog.text
    loaded_models.add(StoredStudent("one", "first"))
    assert loaded_models.read().students == (StoredStudent("one", "first"),)


def test_a_model_takes_its_adapters_along(tmp_path):
    loaded_models = LoadedModelStore(tmp_path)
    for each in (StoredStudent("one", "m"), StoredAdapter("m", "style", "a"), StoredAdapter("n", "style", "a")):
        loaded_models.add(each)
    loaded_models.remove("m")
    assert LoadedModelStore(tmp_path).read() == StoredModels((), (StoredAdapter("n", "style", "a"),))


def test_a_file_that_is_no_list_of_models_is_named(tmp_path):
    (tmp_path / "models.json").write_text('{"students": 3}')
    with pytest.raises(StartError, match=r"models\.json is no list of loaded models"):
        LoadedModelStore(tmp_path)


def test_without_a_data_folder_nothing_is_kept():
    loaded_models = LoadedModelStore(None)
    loaded_models.add(StoredStudent("one", "m"))
    assert loaded_models.read() == StoredModels()
