"""The content of errors."""

import pytest

from service.errors import Overloaded, to_openai


@pytest.mark.parametrize("seconds", [0, -1, 1e-9])
def test_retry_after_is_never_zero(seconds):
    error = Overloaded("full", seconds, "queue_full")
    headers = to_openai(error)[2]
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("1", "100")
    assert error.message == "full; try again in 0.1 s"
