"""Students and adapters that requests asked for, while others ask for room. Workers are simulators."""

import asyncio
import json

import pytest
from engines import is_of, make, run

from service.engine.backend import Simulator
from service.engine.engine import Engine
from service.engine.guest import Guests
from service.engine.launch import worker_threads
from service.errors import InvalidRequest, NotFound, StartError


@pytest.fixture
def folder(tmp_path):
    """A student `second`, adapters `sketch` and `ink`, and folders that look like both and are neither."""
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "onestep.json").write_text(json.dumps({"name": "any"}))
    for name in ("sketch", "ink"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytorch_lora_weights.safetensors").touch()
    return tmp_path


def served(engine: Engine) -> dict[str, list[str]]:
    return {name: [*info.adapters] for name, info in engine.models.items()}


def test_a_guest_stays_until_the_requests_that_use_it_are_answered(folder):
    async def test(engine: Engine) -> None:
        guest = await Guests(engine, folder).load("second")
        with guest.kept():
            leaving = asyncio.create_task(guest.__del__())  # as Ray does to make room
            await asyncio.sleep(0)
            await make(engine, 5, model="second")
            assert not leaving.done()
        await leaving
        assert served(engine) == {"simulator": []}

    run(worker_threads(Simulator(0, 0)), test)


def test_a_guest_leaves_though_the_request_that_wants_its_room_is_given_up(folder):
    async def test(engine: Engine) -> None:
        guest = await Guests(engine, folder).load("second+sketch")
        with guest.kept():
            leaving = asyncio.create_task(guest.__del__())
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.sleep(0)
            assert not leaving.done()  # for as long as Ray's lock must be held
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert served(engine) == {"simulator": []}

    run(worker_threads(Simulator(0, 0)), test)


def test_a_student_stays_while_one_of_its_adapters_does(folder):
    async def test(engine: Engine) -> None:
        guests = Guests(engine, folder)
        sketch = await guests.load("second+sketch")
        ink = await guests.load("second+ink")
        assert served(engine) == {"simulator": [], "second": ["sketch", "ink"]}
        assert is_of(await make(engine, 5, model="second", adapter="sketch", scale=0.5), 505)
        await sketch.__del__()
        alone = await guests.load("second")
        await ink.__del__()
        assert served(engine) == {"simulator": [], "second": []}
        await alone.__del__()
        assert served(engine) == {"simulator": []}
        await (await guests.load("second+ink")).__del__()
        assert served(engine) == {"simulator": []}

    run(worker_threads(Simulator(0, 0)), test)


def test_an_adapter_comes_to_a_model_that_is_always_there_and_leaves_it_behind(folder):
    async def test(engine: Engine) -> None:
        guests = Guests(engine, folder)
        guest = await guests.load("simulator+sketch")
        assert served(engine) == {"simulator": ["sketch"]}
        await guest.__del__()
        assert served(engine) == {"simulator": []}

    run(worker_threads(Simulator(0, 0)), test)


@pytest.mark.parametrize(
    "text", ["simulator", "nobody", "sketch", "nobody+sketch", "second+nothing", "second+", "+sketch", "../second", "+"]
)
def test_what_is_there_already_or_nowhere_is_no_wish(folder, text):
    async def test(engine: Engine) -> None:
        guests = Guests(engine, folder)
        assert await guests.wish(text) is None
        with pytest.raises(NotFound):
            await guests.load(text)
        assert await Guests(engine, None).wish("second") is None

    run(worker_threads(Simulator(0, 0)), test)


def test_of_what_cannot_be_loaded_nothing_stays(folder, monkeypatch):
    def refuse(simulator, name, folder):
        raise StartError(f"{name} is for another network")

    monkeypatch.setattr(Simulator, "add_adapter", refuse)

    async def test(engine: Engine) -> None:
        guests = Guests(engine, folder)
        for text in ("simulator+ink", "second+ink"):
            with pytest.raises(InvalidRequest, match="ink is for another network"):
                await guests.load(text)
        assert served(engine) == {"simulator": []}
        assert await guests.wish("second") == ("second", None)

    run(worker_threads(Simulator(0, 0)), test)


def test_an_administrator_may_be_first_to_load_and_to_unload(folder):
    async def test(engine: Engine) -> None:
        guests = Guests(engine, folder)
        await engine.load_adapter("simulator", folder / "sketch", "sketch")
        await (await guests.load("simulator+sketch")).__del__()
        assert served(engine) == {"simulator": ["sketch"]}

        both = [await guests.load(text) for text in ("second", "second+ink")]
        await engine.unload("second")
        for guest in both:
            await guest.__del__()
        assert [await guests.wish(text) for text in ("second", "second+ink")] == [("second", None), ("second", "ink")]
        await guests.load("second")
        await engine.unload("simulator")

    run(worker_threads(Simulator(0, 0)), test)
