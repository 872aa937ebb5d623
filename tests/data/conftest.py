"""A cache per test, a small archive, and a local server that plays good and failing mirrors."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from synthetic_archives import cifar_members, sha256, tar_gz

from semanticfl_ref.data import download


@pytest.fixture(scope="session")
def cifar() -> bytes:
    """A small archive in CIFAR-10's format."""
    return tar_gz(cifar_members())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The test's own download cache."""
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    for name in download.ARCHIVES:
        monkeypatch.delenv(f"SEMANTICFL_URL_{name.upper()}", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 5.0)
    return tmp_path / "cache" / "data"


@pytest.fixture
def publish(monkeypatch) -> Callable[..., download.Archive]:
    """`publish(content, *urls)` makes a small archive the published one, served from there."""

    def make(content: bytes, *urls: str, name: str = "cifar10") -> download.Archive:
        archive = replace(
            download.ARCHIVES[name], size=len(content), sha256=sha256(content), urls=urls
        )
        monkeypatch.setitem(download.ARCHIVES, name, archive)
        return archive

    return make


@pytest.fixture
def mirror(cifar) -> Iterator[Callable[[str], str]]:
    """`mirror(kind)` is an address that serves the archive well or badly.

    `mirror.asked` lists the requests as (kind, Range header).
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            kind, wanted = self.path.strip("/"), self.headers.get("Range")
            asked.append((kind, wanted))
            if kind == "missing":
                return self.send_error(404)
            if kind == "full-range":
                return self.send_error(416) if wanted else self.answer(200, cifar)
            body = bytes(len(cifar)) if kind == "wrong" else cifar
            start = int(wanted.split("=")[1].rstrip("-")) if wanted else 0
            if kind == "no-resume":
                start = 0
            if kind == "elsewhere" and start:
                return self.answer(206, body, first=start + 7)
            sent = {"breaks": len(cifar) // 3, "stingy": 1000}.get(kind)
            self.answer(206 if start else 200, body, first=start, sent=sent)

        def answer(self, status: int, body: bytes, first: int = 0, sent: int | None = None):
            """Announce the body from a byte on; send fewer bytes to break the connection."""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) - first))
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            self.wfile.write(body[first:][:sent])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()

    def address(kind: str) -> str:
        return f"http://127.0.0.1:{server.server_port}/{kind}"

    address.asked = asked
    yield address
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def no_sockets(monkeypatch) -> None:
    """Any attempt to open a connection or to look up a host fails the test."""
    import socket

    def forbidden(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
