"""Models that are loaded and unloaded while the engine serves. Workers are simulators; test_student has real ones."""

import asyncio
import json
import os
import signal
import threading
from dataclasses import replace

import pytest
from engines import Gate, is_of, make, run, value
from worker_threads import start_thread, worker_threads

from service.engine.batcher import Priority
from service.engine.catalog import adapters_in, students_in
from service.engine.engine import Engine
from service.engine.launch import SharedMemory, Worker, WorkerPool, worker_processes
from service.engine.simulator import Simulator
from service.errors import InvalidRequest, NotFound, StartError, Unavailable
from service.settings import Settings


@pytest.fixture
def folder(tmp_path):
    """Create a folder that a simulator accepts as a student."""
    (tmp_path / "onestep.json").write_text(json.dumps({"name": "second"}))
    return tmp_path


def test_a_model_is_loaded_and_serves_while_another_one_is_at_work(folder):
    gate = Gate()

    async def test(engine: Engine) -> None:
        running = asyncio.create_task(make(engine, 0))
        assert (await engine.catalog.load(folder)).name == "second"
        assert (await engine.catalog.load(folder, "ft:teacher:suffix:1")).name == "ft:teacher:suffix:1"
        assert [*engine.catalog.models] == ["simulator", "second", "ft:teacher:suffix:1"]
        waiting = [asyncio.create_task(make(engine, 7, model=name)) for name in engine.catalog.models]
        gate.open.set()
        for made in [running, *waiting]:
            await made
        assert all(is_of(made.result(), 7) for made in waiting)

    run(worker_threads(gate, workers=2), test)


def test_a_worker_that_is_replaced_has_what_was_loaded_and_not_what_was_unloaded(folder):
    pool = worker_processes(Settings(engine={"devices": "simulator"}))

    async def test(engine: Engine) -> None:
        await engine.catalog.load(folder)
        await engine.catalog.unload("simulator")
        (old,) = engine.supervisor.processes
        os.kill(old, signal.SIGKILL)
        assert is_of(await make(engine, 3, model="second"), 3)
        assert engine.supervisor.processes != [old]
        await engine.catalog.load(folder, "simulator")  # refused by a worker that still has one
        assert [*engine.catalog.models] == ["second", "simulator"]

    metrics = run(pool, test)
    assert value(metrics, "worker_restarts_total", reason="died") == 1


def test_batches_hold_one_adapter_at_one_scale_and_a_replaced_worker_has_them(folder):
    (folder / "pytorch_lora_weights.safetensors").touch()
    pool = worker_processes(Settings(engine={"devices": "simulator"}))

    async def test(engine: Engine) -> None:
        await engine.catalog.load(folder)
        await engine.catalog.load_adapter("second", folder, "style")
        assert [*engine.catalog.models["second"].adapters] == ["style"]
        with pytest.raises(InvalidRequest, match="already"):
            await engine.catalog.load_adapter("second", folder, "style")
        with pytest.raises(InvalidRequest, match="simulator has no adapter 'style'"):
            await make(engine, 1, adapter="style")
        for _ in range(2):
            scales = [None, 0.5, 1.0] * 4
            asked = [
                make(engine, seed, model="second", adapter=scale and "style", scale=scale or 1.0)
                for seed, scale in enumerate(scales)
            ]
            for seed, (scale, image) in enumerate(zip(scales, await asyncio.gather(*asked), strict=True)):
                assert is_of(image, seed + int(1000 * (scale or 0)))
            os.kill(engine.supervisor.processes[0], signal.SIGKILL)
        await engine.catalog.unload("second", "style")
        assert not engine.catalog.models["second"].adapters

    run(pool, test, engine={"result_cache_bytes": 0})


def test_what_cannot_be_loaded_is_said_and_changes_nothing(folder, tmp_path):
    async def test(engine: Engine) -> None:
        with pytest.raises(InvalidRequest, match="nowhere is not a student folder"):
            await engine.catalog.load(tmp_path / "nowhere")
        for name in ("simulator", "alias"):
            with pytest.raises(InvalidRequest, match=f"'{name}' is taken"):
                await engine.catalog.load(folder, name)
        await engine.catalog.load(folder)
        with pytest.raises(InvalidRequest, match="'second' is loaded already"):
            await engine.catalog.load(folder)
        assert [*engine.catalog.models] == ["simulator", "second"]
        assert is_of(await make(engine, 1, model="second"), 1)

    run(worker_threads(Simulator(0, 0)), test, aliases={"alias": "simulator"})


def test_what_one_worker_cannot_load_none_keeps(folder):
    whole = worker_threads(Simulator(0, 0))

    def load(order):
        if order.folder is None:
            return Simulator(0, 0)
        raise StartError("too little memory here")

    def poor(models) -> Worker:
        return start_thread("poor", models, load, 30, SharedMemory())

    async def test(engine: Engine) -> None:
        for _ in range(2):  # the second would find the name taken, had the first left anything
            with pytest.raises(InvalidRequest, match="too little memory here"):
                await engine.catalog.load(folder)
        assert [*engine.catalog.models] == ["simulator"]

    run(WorkerPool([*whole.launches, poor], whole.models), test)


def test_unloading_finishes_what_was_accepted_and_forgets_what_was_cached(folder):
    gate = Gate()

    async def test(engine: Engine) -> None:
        with pytest.raises(InvalidRequest, match="only model"):
            await engine.catalog.unload("simulator")
        await engine.catalog.load(folder)
        accepted = [asyncio.create_task(make(engine, seed)) for seed in range(3)]
        await asyncio.sleep(0)
        leaving = asyncio.create_task(engine.catalog.unload("simulator"))
        await asyncio.sleep(0)
        with pytest.raises(NotFound):
            await make(engine, 9)
        assert not leaving.done()
        gate.open.set()
        await leaving
        assert [is_of(await made, seed) for seed, made in enumerate(accepted)] == [True] * 3
        assert [*engine.catalog.models] == ["second"]
        with pytest.raises(NotFound):
            await engine.catalog.unload("simulator")

    metrics = run(worker_threads(gate), test, engine={"max_batch": 1})
    assert value(metrics, "images_total", model="simulator") == 3


def test_unloading_does_not_wait_behind_all_that_is_interactive(folder):
    gate = Gate()

    made = []

    async def keep(seed: int, image) -> None:
        await image
        made.append(seed)

    async def test(engine: Engine) -> None:
        await engine.catalog.load(folder)
        images = [make(engine, seed, priority=Priority.BULK) for seed in range(4)]
        images += [make(engine, seed, model="second") for seed in range(4, 8)]
        asked = [asyncio.create_task(keep(seed, image)) for seed, image in enumerate(images)]
        await asyncio.sleep(0)
        leaving = asyncio.create_task(engine.catalog.unload("simulator"))
        await asyncio.sleep(0)
        gate.open.set()
        await leaving
        await asyncio.gather(*asked)

    run(worker_threads(gate), test, engine={"max_batch": 1})
    assert made == [*range(8)]


def test_an_image_of_a_model_that_left_is_made_anew_when_it_is_back(folder):
    async def test(engine: Engine) -> None:
        for name in ("simulator", "second", "second"):
            if name not in engine.catalog.models:
                await engine.catalog.load(folder)
            await make(engine, 5, model=name)
            if name != "simulator":
                await engine.catalog.unload(name)
        await make(engine, 5)

    metrics = run(worker_threads(Simulator(0, 0)), test)
    assert value(metrics, "images_total", model="second") == 2
    assert value(metrics, "cache_hits_total", cache="result") == 1  # the other model's stayed


def test_draining_waits_for_no_worker_that_is_loading(folder):
    loading, release = threading.Event(), threading.Event()
    simulator = Simulator(0, 0)

    def load(order):
        if order.folder is not None:
            loading.set()
            assert release.wait(30)
        return simulator

    def launch(models) -> Worker:
        return start_thread("slow", models, load, 30, SharedMemory())

    async def test(engine: Engine) -> None:
        waiting = asyncio.create_task(engine.catalog.load(folder))
        await asyncio.to_thread(loading.wait, 30)
        await engine.drain()
        with pytest.raises(Unavailable):
            await waiting

    run(WorkerPool([launch], worker_threads(simulator).models), test)
    assert not release.is_set()
    release.set()


@pytest.mark.parametrize(("runtime_fingerprint", "hits"), [("fp32", 1), ("bf16", 0)])
def test_models_share_images_of_the_same_files_computed_alike(runtime_fingerprint, hits):
    async def test(engine: Engine) -> None:
        assert is_of(await make(engine, 1, model="a"), 1)
        assert is_of(await make(engine, 1, model="b"), 1)

    info = replace(Simulator().info, name="a", digest="d", runtime_fingerprint="fp32")
    twin = replace(info, name="b", runtime_fingerprint=runtime_fingerprint)
    metrics = run(worker_threads(Simulator(0, 0, info=info), Simulator(0, 0, info=twin)), test)
    assert value(metrics, "cache_hits_total", cache="result") == hits


@pytest.fixture
def students(tmp_path):
    """Students `one` and `two`, adapters `sketch` and `ink`, and a folder that is neither."""
    folder = tmp_path / "students"
    for name in ("one", "two", "sketch", "ink", "empty"):
        (folder / name).mkdir(parents=True)
    for name in ("one", "two"):
        (folder / name / "onestep.json").write_text(json.dumps({"name": "any"}))
    for name in ("sketch", "ink"):
        (folder / name / "pytorch_lora_weights.safetensors").touch()
    return folder


def test_files_and_folders_with_one_file_are_adapters_and_models_are_not(students):
    (students / "chalk.safetensors").touch()
    (students / "empty" / "any.safetensors").touch()
    assert adapters_in(students).keys() == {"sketch", "ink", "chalk", "empty"}
    assert adapters_in(students)["chalk"] == students / "chalk.safetensors"
    (students / "empty" / "config.json").touch()
    (students / "one" / "weights.safetensors").touch()
    (students / "one" / "more.safetensors").touch()
    assert adapters_in(students).keys() == {"sketch", "ink", "chalk"}
    assert students_in(students).keys() == {"one", "two"}
    assert students_in(None) == {}


def loaded(engine: Engine) -> dict[str, list[str]]:
    return {name: [*info.adapters] for name, info in engine.catalog.models.items()}


async def used(engine: Engine, model: str | None, adapter: str | None = None) -> None:
    async with engine.catalog.use(model, adapter):
        pass


async def leaving(engine: Engine, model: str) -> None:
    """Wait until another request waits for a student's room."""
    while not engine.catalog._on_demand[model, None].leaving:
        await asyncio.sleep(0)


def test_students_and_adapters_are_loaded_on_demand_and_the_least_recently_used_makes_room(students):
    async def test(engine: Engine) -> None:
        async with engine.catalog.use("one", "sketch") as info:
            assert (info.name, [*info.adapters]) == ("one", ["sketch"])
            assert is_of(await make(engine, 5, model="one", adapter="sketch", scale=0.5), 505)
        await used(engine, "one", "ink")
        await used(engine, "one", "sketch")
        await used(engine, None, "sketch")  # of the default model
        assert loaded(engine) == {"simulator": ["sketch"], "one": ["sketch"]}
        assert engine.catalog.on_demand == {"one", "one+sketch", "simulator+sketch"}
        await used(engine, "two")
        assert loaded(engine) == {"simulator": ["sketch"], "two": []}
        await used(engine, "alias", "ink")
        assert loaded(engine) == {"simulator": ["sketch"], "two": ["ink"]}

    room = {"on_demand_students": 1, "on_demand_adapters": 2}
    run(worker_threads(Simulator(0, 0)), test, models_folder=students, aliases={"alias": "two"}, engine=room)


def test_what_a_request_uses_stays_until_it_is_answered_and_others_wait(students):
    async def test(engine: Engine) -> None:
        async with engine.catalog.use("one"):
            waiting = asyncio.create_task(used(engine, "two"))
            await leaving(engine, "one")
            again = asyncio.create_task(used(engine, "one"))  # not before `two`, so that nobody waits without end
            await asyncio.sleep(0)
            await make(engine, 5, model="one")
            assert not waiting.done()
            assert not again.done()
        await waiting
        await again
        assert loaded(engine) == {"simulator": [], "one": []}

        async with engine.catalog.use("one"):
            waiting = asyncio.create_task(used(engine, "two"))
            await leaving(engine, "one")
            waiting.cancel()  # nobody wants its room any more
            await asyncio.wait([waiting])
            await used(engine, "one")
        assert loaded(engine) == {"simulator": [], "one": []}

    run(worker_threads(Simulator(0, 0)), test, models_folder=students, engine={"on_demand_students": 1})


@pytest.mark.parametrize("name", ["nobody", "sketch", "empty", "", ".", "../students/one", "one+sketch"])
def test_names_without_a_folder_of_a_student_are_unknown(students, name):
    async def test(engine: Engine) -> None:
        with pytest.raises(NotFound):
            await used(engine, name)
        with pytest.raises(InvalidRequest, match="it has"):
            await used(engine, "simulator", name + "one")
        assert loaded(engine) == {"simulator": []}

    run(worker_threads(Simulator(0, 0)), test, models_folder=students, engine={"on_demand_students": 1})


@pytest.mark.parametrize("folder", [True, False])
def test_without_room_for_them_or_a_folder_nothing_is_loaded_on_demand(students, folder):
    async def test(engine: Engine) -> None:
        with pytest.raises(NotFound):
            await used(engine, "one")
        with pytest.raises(InvalidRequest) as caught:
            await used(engine, "simulator", "ink")
        assert (caught.value.param, caught.value.code) == ("lora.name", "adapter_not_found")

    room = 0 if folder else 3
    options = {"on_demand_students": room, "on_demand_adapters": room}
    run(worker_threads(Simulator(0, 0)), test, models_folder=students if folder else None, engine=options)


def test_of_what_cannot_be_loaded_on_demand_nothing_stays_and_no_path_is_shown(students, monkeypatch):
    def refuse(simulator, name, folder):
        raise StartError(f"adapter {folder}: it is for another network")

    monkeypatch.setattr(Simulator, "add_adapter", refuse)

    async def test(engine: Engine) -> None:
        with pytest.raises(InvalidRequest, match="adapter ink: it is for another network") as caught:
            await used(engine, "simulator", "ink")
        assert caught.value.param == "lora.name"
        (students / "one" / "onestep.json").write_text("{}")
        with pytest.raises(InvalidRequest, match="one is not a student folder") as caught:
            await used(engine, "one")
        assert caught.value.param == "model"
        assert loaded(engine) == {"simulator": []}
        assert not engine.catalog.on_demand

    run(worker_threads(Simulator(0, 0)), test, models_folder=students, engine={"on_demand_students": 1})


def test_a_broken_adapter_displaces_none_and_is_read_again_only_when_its_folder_has_changed(students, monkeypatch):
    loads = []

    def add(simulator, name, folder):
        loads.append(name)
        if name == "ink" and not (students / "ink" / "mended").exists():
            raise StartError("it is broken")
        add_adapter(simulator, name, folder)

    add_adapter = Simulator.add_adapter
    monkeypatch.setattr(Simulator, "add_adapter", add)

    async def test(engine: Engine) -> None:
        await used(engine, "simulator", "sketch")
        for _ in range(3):
            with pytest.raises(InvalidRequest, match="it is broken") as caught:
                await used(engine, "simulator", "ink")
            assert (caught.value.param, caught.value.code) == ("lora.name", "model_not_loadable")
            assert loaded(engine) == {"simulator": ["sketch"]}
        (students / "ink" / "mended").touch()
        await used(engine, "simulator", "ink")
        assert loaded(engine) == {"simulator": ["ink"]}
        assert loads == ["sketch", "ink", "ink"]

    run(worker_threads(Simulator(0, 0)), test, models_folder=students, engine={"on_demand_adapters": 1})


def test_what_an_administrator_loads_stays_and_what_one_unloads_is_loaded_again(students):
    async def test(engine: Engine) -> None:
        catalog = engine.catalog
        await used(engine, "one", "sketch")
        with pytest.raises(InvalidRequest, match="taken"):
            await catalog.load(students / "two", "one")
        await catalog.load(students / "one", "one")
        await catalog.load_adapter("one", students / "sketch", "sketch")
        with pytest.raises(InvalidRequest, match="already"):
            await catalog.load_adapter("one", students / "sketch", "sketch")
        await used(engine, "two", "ink")
        assert loaded(engine) == {"simulator": [], "one": ["sketch"], "two": ["ink"]}
        await catalog.unload("two")
        await used(engine, "two", "ink")
        await catalog.unload("two", "ink")
        await used(engine, "two", "ink")
        assert loaded(engine) == {"simulator": [], "one": ["sketch"], "two": ["ink"]}
        await catalog.unload("one")
        await catalog.unload("simulator")
        await used(engine, "one")  # the last model cannot make room
        assert loaded(engine) == {"two": ["ink"], "one": []}

    room = {"on_demand_students": 1, "on_demand_adapters": 1}
    run(worker_threads(Simulator(0, 0)), test, models_folder=students, engine=room)


class SlowLoader(Simulator):
    """Delays the load of an adapter until it is opened. Like a student, it removes only an adapter that it has."""

    def __init__(self):
        super().__init__(0, 0)
        self.loads, self.entered, self.open = 0, threading.Event(), threading.Event()

    def add_adapter(self, name, folder):
        self.loads += 1
        self.entered.set()
        assert self.open.wait(60)
        super().add_adapter(name, folder)

    def remove_adapter(self, name):
        assert name in self.info.adapters
        super().remove_adapter(name)


def test_a_client_that_changes_its_mind_while_an_adapter_loads_does_not_begin_the_load_anew(students):
    loader = SlowLoader()

    async def test(engine: Engine) -> None:
        asked = [asyncio.create_task(used(engine, "simulator", "ink"))]
        await asyncio.to_thread(loader.entered.wait)
        for _ in range(3):
            asked[-1].cancel()
            asked.append(asyncio.create_task(used(engine, "simulator", "ink")))
            await asyncio.sleep(0)
            asked[0].cancel()
        loader.open.set()
        await asyncio.wait(asked)
        assert [task.cancelled() for task in asked] == [True, True, True, False]
        assert loader.loads == 1
        await used(engine, "simulator", "sketch")
        assert loaded(engine) == {"simulator": ["sketch"]}

    run(worker_threads(loader), test, models_folder=students, engine={"on_demand_adapters": 1})


def test_while_an_adapter_loads_unknown_names_are_refused_and_other_models_serve(students):
    loader = SlowLoader()

    async def test(engine: Engine) -> None:
        loading = asyncio.create_task(used(engine, "simulator", "ink"))
        await asyncio.to_thread(loader.entered.wait)
        with pytest.raises(NotFound):
            await used(engine, "nobody")
        with pytest.raises(InvalidRequest, match="no adapter 'nobody'"):
            await used(engine, "simulator", "nobody")
        async with engine.catalog.use(None):
            assert is_of(await make(engine, 5), 5)
        assert not loading.done()
        loader.open.set()
        await loading

    run(worker_threads(loader), test, models_folder=students)


def test_what_an_administrator_loads_while_it_should_make_room_stays(students):
    async def test(engine: Engine) -> None:
        async with engine.catalog.use("one"):
            waiting = asyncio.create_task(used(engine, "two"))
            await leaving(engine, "one")
            await engine.catalog.load(students / "one", "one")
        await waiting
        assert loaded(engine) == {"simulator": [], "one": [], "two": []}

    run(worker_threads(Simulator(0, 0)), test, models_folder=students, engine={"on_demand_students": 1})
