"""The thread that loads models. Stages and replies: test_dispatcher, test_supervisor and test_catalog."""

import os
import sys
import threading
from queue import Queue

import pytest

from service.engine.worker import LOADING_NICE, _change


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a priority is that of the whole process")
@pytest.mark.parametrize(("nice", "loading"), [(0, LOADING_NICE), (LOADING_NICE + 5, LOADING_NICE + 5)])
def test_loading_gives_way_to_the_stages_and_never_takes_a_priority_that_the_server_lacks(nice, loading):
    found = []

    def load() -> None:
        def own() -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(nice, own()))
        expected = max(loading, own())
        changes = Queue()
        changes.put(None)
        _change(None, {}, None, None, changes)
        found.append((own(), expected))

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    ((has, expected),) = found
    assert has == expected
