"""A student that a request asked for, while others ask for room."""

import asyncio
import json

from engines import make, run

from service.engine.backend import Simulator
from service.engine.engine import Engine
from service.engine.launch import local
from service.guest import Guest


def test_a_guest_stays_until_the_requests_that_use_it_are_answered(tmp_path):
    (tmp_path / "onestep.json").write_text(json.dumps({"name": "second"}))

    async def test(engine: Engine) -> None:
        await engine.load(tmp_path)
        guest = Guest(engine, "second")
        with guest.kept():
            leaving = asyncio.create_task(guest.__del__())  # as Ray does to make room
            await asyncio.sleep(0)
            await make(engine, 5, model="second")
            assert not leaving.done()
        await leaving
        assert [*engine.cards] == ["simulator"]

    run(local(Simulator(0, 0)), test)
