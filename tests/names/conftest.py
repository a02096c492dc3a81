"""Fixtures for tests of the names application: cache, data, a server, the command line."""

import http.server
import os
import threading
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from namernn_fast.names import __main__ as cli
from namernn_fast.names import dataset
from namernn_fast.names.sample import SAMPLE

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "python -m namernn_fast.names"
REAL = Path(os.environ.get("NAMERNN_FAST_DATA") or ROOT.parent / "shared" / "data" / "names")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Run on one thread, because more threads do not speed up models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Return the path of an empty cache, unset NAMERNN_FAST_DATA and bypass proxies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NAMERNN_FAST_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "namernn_fast"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Return the path of a file that the tests of a module overwrite."""
    return tmp_path_factory.mktemp("overwritten") / "file"


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
    """Return a function that writes {language: text or bytes} as a folder of names."""

    def make(files, name="names"):
        folder = tmp_path / name
        folder.mkdir()
        for language, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            (folder / f"{language}.txt").write_bytes(content)
        return folder

    return make


@pytest.fixture
def homeless(monkeypatch):
    """Imitate a user without a home folder, as in services and containers."""
    home = mock.Mock(side_effect=RuntimeError("Could not determine home directory."))
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(
        Path, "expanduser", lambda path: home() if str(path).startswith("~") else path
    )
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)


@pytest.fixture
def make_zip(tmp_path):
    """Return a function that writes {member: text or bytes} as a zip."""

    def make(members, compression=zipfile.ZIP_DEFLATED):
        path = tmp_path / "names.zip"
        with zipfile.ZipFile(path, "w", compression) as file:
            for member, content in members.items():
                file.writestr(member, content)
        return path

    return make


@pytest.fixture
def serve():
    """Return a function that starts a server on 127.0.0.1 and returns its URL.

    `respond(handler)` answers each request, and the function's attribute `requests` counts them.
    """
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
    start.stop = threading.Event()
    yield start
    start.stop.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def make_data(make_folder):
    """Return a function that writes the sample to a folder, which then counts as real data."""
    texts = {language: "\n".join(names) for language, names in SAMPLE.items()}
    return lambda name="names": make_folder(texts, name)


@pytest.fixture
def folder(make_data):
    return make_data()


@pytest.fixture
def call(capsys):
    """Return a function that runs a command and returns the exit code, the output and errors."""

    def call(*argv):
        code = cli.main(list(map(str, argv)))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def run(call):
    """Return a function that runs a command, checks the exit code, and returns (output, errors)."""

    def run(*argv, code=0, **options):
        found, out, err = call(*argv, **options)
        assert found == code, err
        return out, err

    return run


@pytest.fixture
def fails(run):
    """Return a function that runs a failing command and returns the error message.

    The function asserts that the message is a single line and that there is no other output.
    """

    def fails(*argv, code=2, **options):
        out, err = run(*argv, code=code, **options)
        assert out == ""
        start, _, message = err.partition(": error: ")
        assert start == PROGRAM
        assert message.count("\n") == 1
        return message.removesuffix("\n")

    return fails


@pytest.fixture
def offline(monkeypatch):
    """Make downloads fail without a retry, by using an invalid URL."""
    monkeypatch.setattr(dataset, "DATA_URL", "nowhere")
