"""Distillation jobs of a server, from the shell: what `distill submit`, `jobs`, `logs` and `cancel` say over REST.

The server speaks OpenAI's formats: files and fine-tuning jobs. Nothing of it is imported here.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import httpx2

from distill.errors import AwayError, RemoteError

Resource = dict[str, Any]

ENDED = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 1.0
RECONNECT_SECONDS = 300.0  # that a server may be away while a job is followed
AWAY = (502, 503, 504)  # what a server says that is busy or starts, and a proxy in front of one that does not answer


class Server:
    """A server at `url`, asked with an API key where it wants one; `with` closes the connection."""

    def __init__(self, url: str, key: str | None = None) -> None:
        if key and not key.isascii():
            raise RemoteError("the API key holds letters that a header cannot; copy it again")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        timeout = httpx2.Timeout(60, connect=5, write=600)
        try:
            self._http = httpx2.Client(base_url=f"{url.rstrip('/')}/v1/", headers=headers, timeout=timeout)
        except httpx2.InvalidURL as error:
            raise RemoteError(f"{url} is no address of a server ({error}); write it as http://127.0.0.1:8000") from None
        self._url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(self, prompts: Path, job: Mapping[str, Any]) -> Resource:
        """A new job on a file of prompts, by the fields of `POST /v1/fine_tuning/jobs`; null ones are left out.

        Raises RemoteError, as all that follow; what the server refuses leaves no file there.
        """
        file = self._upload(prompts)
        given = {name: value for name, value in job.items() if value is not None}
        try:
            return self._ask("POST", "fine_tuning/jobs", json={**given, "training_file": file})
        except AwayError:
            raise  # it may have begun the job all the same
        except RemoteError:
            with contextlib.suppress(RemoteError):
                self._ask("DELETE", f"files/{file}")
            raise

    def job(self, name: str) -> Resource:
        """One job."""
        return self._ask("GET", f"fine_tuning/jobs/{name}")

    def jobs(self, limit: int) -> list[Resource]:
        """The newest jobs first, at most so many."""
        return list(self._ask("GET", "fine_tuning/jobs", params={"limit": limit})["data"])

    def cancel(self, name: str) -> Resource:
        """End a job."""
        return self._ask("POST", f"fine_tuning/jobs/{name}/cancel")

    def events(self, name: str, after: str | None = None) -> list[Resource]:
        """What a job has told since the event `after`, or from its beginning; the oldest first."""
        found: list[Resource] = []
        page: Resource = {"has_more": True}
        while page["has_more"]:
            params = {"limit": 100, **({"after": found[-1]["id"]} if found else {})}
            page = self._ask("GET", f"fine_tuning/jobs/{name}/events", params=params)
            for event in page["data"]:  # the newest first
                if event["id"] == after:
                    return found[::-1]
                found.append(event)
        return found[::-1]

    def follow(self, name: str) -> Iterator[tuple[Resource, list[Resource]]]:
        """The job with its new events, every second until it has ended; a server that restarts is waited for."""
        last, heard = None, time.monotonic()
        while True:
            try:
                job = self.job(name)  # before its events: what an ended job told is all there
                events = self.events(name, last)
            except AwayError:
                if time.monotonic() - heard > RECONNECT_SECONDS:
                    raise
            else:
                heard = time.monotonic()
                last = events[-1]["id"] if events else last
                yield job, events
                if job["status"] in ENDED:
                    return
            time.sleep(POLL_SECONDS)

    def _upload(self, prompts: Path) -> str:
        """The id of a file of prompts on the server."""
        try:
            with prompts.open("rb") as file:
                return str(self._ask("POST", "files", data={"purpose": "fine-tune"}, files={"file": file})["id"])
        except OSError as error:
            raise RemoteError(f"{prompts} cannot be read: {error.strerror}; name a file of prompts") from None

    def _ask(self, method: str, path: str, **parts: Any) -> Resource:
        try:
            answer = self._http.request(method, path, **parts)
        except httpx2.TransportError as error:
            raise AwayError(
                f"no server answers at {self._url} ({error}); start one with `fgm-service serve`, or name another "
                "with --server"
            ) from None
        try:
            body = answer.json()
            if answer.is_success:
                return dict(body)
            said = f"{body['error']['message']} ({answer.status_code})"
        except (ValueError, TypeError, KeyError, RecursionError):
            said = f"an answer of status {answer.status_code} that is none of this service's; is it the right address?"
        kind = AwayError if answer.status_code in AWAY else RemoteError
        raise kind(f"{self._url} says: {said}")
