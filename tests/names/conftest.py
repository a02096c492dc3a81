"""What the tests of the application share: an empty world, real data, folders, zips, a server."""

import http.server
import os
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from namernn_fast import testing

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("NAMERNN_FAST_DATA") or ROOT.parent / "shared" / "data" / "names")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no data named, and no proxy between the tests and their own server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NAMERNN_FAST_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "namernn_fast"


@pytest.fixture
def root():
    return ROOT


@pytest.fixture(scope="session")
def real_folder():
    if not REAL.is_dir():
        pytest.skip(f"the names data set is not at {REAL}; set NAMERNN_FAST_DATA")
    return REAL


@pytest.fixture
def make_folder(tmp_path):
    """Write {language: text or bytes} as a folder of names."""

    def make(files, name="names"):
        folder = tmp_path / name
        folder.mkdir()
        for language, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            (folder / f"{language}.txt").write_bytes(content)
        return folder

    return make


@pytest.fixture
def make_zip(tmp_path):
    """Write {member: text or bytes} as a zip."""

    def make(members, compression=zipfile.ZIP_DEFLATED):
        path = tmp_path / "names.zip"
        with zipfile.ZipFile(path, "w", compression) as file:
            for member, content in members.items():
                file.writestr(member, content)
        return path

    return make


@pytest.fixture
def serve():
    """Serve `respond(handler)` on 127.0.0.1 and return the address; `serve.requests` counts."""
    stop = threading.Event()
    servers = []

    def start(respond):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                start.requests += 1
                respond(self)

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/data.zip"

    start.requests = 0
    start.stop = stop
    yield start
    stop.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def within_budget():
    """Check that ours is about as near to the float64 oracle as nn.RNN is."""

    def check(ours, nn_rnn, oracle):
        testing.assert_within_budget({"result": ours}, {"result": nn_rnn}, {"result": oracle})

    return check
