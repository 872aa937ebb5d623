"""A cache and archives of the tests' own, and a local server that plays good and failing mirrors."""

import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from synthetic_archives import cifar_members, sha256, tar_gz

from semanticfl_ref.data import download as fetch


@pytest.fixture(scope="session")
def cifar() -> bytes:
    return tar_gz(cifar_members())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A download cache of the test's own."""
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    for name in fetch.ARCHIVES:
        monkeypatch.delenv(f"SEMANTICFL_URL_{name.upper()}", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(fetch, "TIMEOUT_SECONDS", 5.0)
    return tmp_path / "cache" / "data"


@pytest.fixture
def publish(monkeypatch):
    """Make a small archive the published one, served from the given addresses."""

    def make(content: bytes, *urls: str, name: str = "cifar10"):
        archive = replace(
            fetch.ARCHIVES[name], size=len(content), sha256=sha256(content), urls=urls
        )
        monkeypatch.setitem(fetch.ARCHIVES, name, archive)
        return archive

    return make


@pytest.fixture
def mirror(cifar):
    """`mirror(kind)` is an address that serves the archive well or ill; `mirror.asked` lists (kind,
    Range header).
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
            body = cifar if kind != "wrong" else bytes(len(cifar))
            start = int(wanted.split("=")[1].rstrip("-")) if wanted else 0
            if kind == "no-resume":
                start = 0
            if kind == "elsewhere" and start:
                return self.answer(
                    206,
                    body[start + 7 :],
                    {"Content-Range": f"bytes {start + 7}-{len(body) - 1}/{len(body)}"},
                )
            piece = len(cifar) // 3 if kind == "breaks" else 1000 if kind == "stingy" else None
            extra = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
            self.answer(206 if start else 200, body[start:], extra, piece)

        def answer(self, status, body, extra=None, piece=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in (extra or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:piece])  # fewer bytes than announced: the connection breaks off

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
def no_sockets(monkeypatch):
    """Any attempt to open a connection or look up a name fails the test."""
    import socket

    def forbidden(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
