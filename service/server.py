"""uvicorn's server, which a second signal ends at once."""

import signal
from types import FrameType

import uvicorn


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT drains; the second ends the process, whatever it waits for."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for each signal. Workers and jobs see that the process is gone, and end too."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)
