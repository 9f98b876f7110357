"""REST client for the distillation jobs of a server: what `distill submit`, `jobs`, `logs` and `cancel` use.

The server has OpenAI's API for files and fine-tuning jobs. The package of the server is not imported.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import httpx2

from distill.errors import RemoteError, ServerUnavailableError

Resource = dict[str, Any]

ENDED = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 1.0
RECONNECT_SECONDS = 300.0  # how long `follow` retries while the server is unavailable
UNAVAILABLE = (502, 503, 504)  # statuses of a busy or starting server, and of a proxy without its server


class JobsClient:
    """A client of the server at `url`, with an API key if the server needs one; `with` closes the connection."""

    def __init__(self, url: str, key: str | None = None) -> None:
        if key and not key.isascii():
            raise RemoteError("the API key contains characters that a header cannot hold; copy it again")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        timeout = httpx2.Timeout(60, connect=5, write=600)
        try:
            self._http = httpx2.Client(base_url=f"{url.rstrip('/')}/v1/", headers=headers, timeout=timeout)
        except httpx2.InvalidURL as error:
            raise RemoteError(f"{url} is not a server address ({error}); write it as http://127.0.0.1:8000") from None
        self._url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(self, prompts: Path, job: Mapping[str, Any]) -> Resource:
        """Upload a file of prompts and create a job; `job` holds fields of `POST /v1/fine_tuning/jobs`.

        Like all methods, raises RemoteError. If the server refuses the job, the uploaded file is deleted.
        """
        file = self._upload(prompts)
        fields = {name: value for name, value in job.items() if value is not None}
        try:
            return self._request("POST", "fine_tuning/jobs", json={**fields, "training_file": file})
        except ServerUnavailableError:
            raise  # the job may have been created
        except RemoteError:
            with contextlib.suppress(RemoteError):
                self._request("DELETE", f"files/{file}")
            raise

    def job(self, name: str) -> Resource:
        """Retrieve a job."""
        return self._request("GET", f"fine_tuning/jobs/{name}")

    def jobs(self, limit: int) -> list[Resource]:
        """List at most `limit` jobs, newest first."""
        return list(self._request("GET", "fine_tuning/jobs", params={"limit": limit})["data"])

    def cancel(self, name: str) -> Resource:
        """Cancel a job."""
        return self._request("POST", f"fine_tuning/jobs/{name}/cancel")

    def events(self, name: str, after: str | None = None) -> list[Resource]:
        """List the events of a job after the event `after`, or all, oldest first."""
        found: list[Resource] = []
        page: Resource = {"has_more": True}
        while page["has_more"]:
            params = {"limit": 100, **({"after": found[-1]["id"]} if found else {})}
            page = self._request("GET", f"fine_tuning/jobs/{name}/events", params=params)
            for event in page["data"]:  # newest first
                if event["id"] == after:
                    return found[::-1]
                found.append(event)
        return found[::-1]

    def follow(self, name: str) -> Iterator[tuple[Resource, list[Resource]]]:
        """Yield the job and its new events every second until it has ended; retry while the server is unavailable."""
        last, reached = None, time.monotonic()
        while True:
            try:
                job = self.job(name)  # before its events, so that all events of an ended job are there
                events = self.events(name, last)
            except ServerUnavailableError:
                if time.monotonic() - reached > RECONNECT_SECONDS:
                    raise
            else:
                reached = time.monotonic()
                last = events[-1]["id"] if events else last
                yield job, events
                if job["status"] in ENDED:
                    return
            time.sleep(POLL_SECONDS)

    def _upload(self, prompts: Path) -> str:
        """Upload a file of prompts and return its id."""
        try:
            with prompts.open("rb") as file:
                return str(self._request("POST", "files", data={"purpose": "fine-tune"}, files={"file": file})["id"])
        except OSError as error:
            raise RemoteError(f"{prompts} cannot be read: {error.strerror}; name a file of prompts") from None

    def _request(self, method: str, path: str, **parts: Any) -> Resource:
        try:
            response = self._http.request(method, path, **parts)
        except httpx2.TransportError as error:
            raise ServerUnavailableError(
                f"no server answers at {self._url} ({error}); start one with `fgm-service serve`, or give another "
                "address with --url"
            ) from None
        try:
            body = response.json()
            if response.is_success:
                return dict(body)
            message = f"{body['error']['message']} ({response.status_code})"
        except (ValueError, TypeError, KeyError, RecursionError):
            message = f"a response of status {response.status_code} in another format; check the address"
        kind = ServerUnavailableError if response.status_code in UNAVAILABLE else RemoteError
        raise kind(f"{self._url} answered: {message}")
