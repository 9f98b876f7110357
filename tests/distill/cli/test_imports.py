"""The garbage collector is paused during imports only."""

import gc

import pytest

from distill.cli.imports import collector_paused


@pytest.mark.parametrize("before", [True, False])
def test_the_collector_is_paused_and_then_as_before_also_after_an_error(before):
    found = []

    def fail() -> None:
        with collector_paused():
            with collector_paused():
                found.append(gc.isenabled())
            found.append(gc.isenabled())
            raise ImportError

    if not before:
        gc.disable()
    try:
        with pytest.raises(ImportError):
            fail()
        assert [*found, gc.isenabled()] == [False, False, before]
    finally:
        gc.enable()
