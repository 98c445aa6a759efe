"""A stand-in for the Hugging Face hub on 127.0.0.1: as much of its HTTP interface as a fetch of one model meets.

In: folders of files by repository name, and faults to play.  Out: an endpoint for HF_ENDPOINT, and what it was asked for.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """Repositories and faults, which a test may change while the server runs."""

    folders: dict[str, Path]
    endpoint: str = ""
    commits: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})  # branch or tag -> commit
    renamed: dict[str, str] = field(default_factory=dict)  # old name -> new name
    gated: set[str] = field(default_factory=set)
    status: int = 0  # every answer, when it is not 0
    cuts: dict[str, int] = field(default_factory=dict)  # file -> how many more answers stop half way
    asked: list[str] = field(default_factory=list)  # "GET /api/models/…" in order
    ranges: list[str] = field(default_factory=list)  # Range headers of resumed files

    def files(self, repository: str) -> dict[str, bytes]:
        folder = self.folders[repository]
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run until the block ends."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.status:
            return self._send(self.hub.status, b"{}")
        for old, new in self.hub.renamed.items():
            if f"/{old}/" in path + "/":
                return self._send(307, b"", {"Location": self.path.replace(old, new)})
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"]:
            return self._information("/".join(words[2:4]), words[5] if words[4:5] == ["revision"] else "main")
        return self._file("/".join(words[:2]), words[3], "/".join(words[4:]), body)

    def _information(self, repository: str, revision: str) -> None:
        if repository not in self.hub.folders:
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        commit = self._commit(revision)
        if commit is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        rows = [{"rfilename": name, "size": len(content)} for name, content in self.hub.files(repository).items()]
        return self._send(200, json.dumps({"id": repository, "sha": commit, "siblings": rows}).encode())

    def _file(self, repository: str, revision: str, name: str, body: bool) -> None:
        if repository in self.hub.gated:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        content = self.hub.files(repository)[name]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self._commit(revision) or ""}
        start = 0
        if asked := self.headers.get("Range"):
            self.hub.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = body and self.hub.cuts.get(name, 0) > 0
        if cut:
            self.hub.cuts[name] -= 1
        return self._send(206 if start else 200, content[start:], headers, body=body, cut=cut)

    def _commit(self, revision: str) -> str | None:
        return revision if revision in self.hub.commits.values() else self.hub.commits.get(revision)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, *, body: bool = True, cut: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = True
