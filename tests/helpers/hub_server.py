"""A Hugging Face Hub on the loopback: the part of its protocol by which a model is resolved, listed and fetched."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class HubServer:
    """Models by id: a folder for each commit, and commits by the name of a branch or tag."""

    url: str = ""
    commits: dict[str, dict[str, Path]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)  # ids whose files need the token
    token: str = "hf_test"
    stalled: str = ""  # a file of which only half is sent, until `resume`
    reached: threading.Event = field(default_factory=threading.Event)  # the half was sent
    resume: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str]] = field(default_factory=list)  # (method, path)

    def publish(self, model: str, folder: Path, *names: str) -> str:
        """Serve a folder as the newest commit of a model, under these branches or tags; returns the commit."""
        commit = hashlib.sha1(f"{model}{len(self.commits.get(model, ()))}".encode()).hexdigest()
        self.commits.setdefault(model, {})[commit] = folder
        for name in names or ("main",):
            self.refs.setdefault(model, {})[name] = commit
        return commit

    def fetched(self) -> list[str]:
        """The files whose content was requested so far, in the order of their names."""
        return sorted(path.partition("/resolve/")[2].partition("/")[2] for method, path in self.requests
                      if method == "GET" and "/resolve/" in path)  # fmt: skip


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Serve an empty hub until the end of the block."""
    hub = HubServer()

    class Handler(_Handler):
        server_hub = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.server_hub, urlsplit(self.path).path
        hub.requests.append((self.command, unquote(path)))
        words = [unquote(word) for word in path.strip("/").split("/")]  # a revision is one word
        api = words[:2] == ["api", "models"]
        words = words[2:] if api else words
        model, (kind, name), rest = "/".join(words[:2]), [*words[2:4], "revision", "main"][:2], "/".join(words[4:])
        allowed = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if model not in hub.commits:
            return self._refuse(401, "RepoNotFound")
        commit = hub.refs[model].get(name, name)
        if commit not in hub.commits[model]:
            return self._refuse(404, "RevisionNotFound")
        folder = hub.commits[model][commit]
        if api and kind == "revision":
            return self._send(json.dumps({"id": model, "sha": commit}).encode())
        if api:
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            return self._send(json.dumps([_entry(file, folder) for file in files]).encode())
        if model in hub.gated and not allowed:
            return self._refuse(403 if "Authorization" in self.headers else 401, "GatedRepo")
        if not (folder / rest).is_file():
            return self._refuse(404, "EntryNotFound")
        size = (folder / rest).stat().st_size
        content = (folder / rest).read_bytes() if size < 1 << 30 else b""  # a file of holes has a size alone
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        headers["X-Linked-Size"] = str(size)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        return self._send(content[start:], headers, 206 if start else 200, stalls=rest == hub.stalled)

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def _send(
        self, content: bytes, headers: dict[str, str] | None = None, status: int = 200, stalls: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if stalls:
            self.wfile.write(content[: len(content) // 2])
            self.server_hub.reached.set()
            self.server_hub.resume.wait()
            self.close_connection = True
            return
        self.wfile.write(content)


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    """A file as the hub lists it."""
    oid = hashlib.sha1(str(file).encode()).hexdigest()
    return {"type": "file", "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size, "oid": oid}
