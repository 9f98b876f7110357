"""Servers over a simulator, and the real client."""

import contextlib
import resource
from collections.abc import Callable, Iterator

import openai
import pytest
from running import serving
from worker_threads import worker_threads

from service.app import create_app
from service.engine.backend import Backend
from service.engine.simulator import Simulator
from service.settings import Settings


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Start a server over a backend, with settings; returns its base URL."""
    with contextlib.ExitStack() as stack:

        def start(backend: Backend | None = None, **settings) -> str:
            return stack.enter_context(
                serving(create_app(Settings(**settings), worker_threads(backend or Simulator())))
            )

        yield start


@pytest.fixture
def connect() -> Iterator[Callable[..., openai.OpenAI]]:
    """Create the real client for a base URL. It does not retry, so that tests see every answer."""
    with contextlib.ExitStack() as stack:

        def client(url: str, key: str = "none") -> openai.OpenAI:
            return stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0))

        yield client


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Set the maximum size of files of this process, including shared memory."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
