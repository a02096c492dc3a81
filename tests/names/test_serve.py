"""The web server: every endpoint, limit, header and error; batching; sockets; signals; the page."""

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from namernn_fast import names
from namernn_fast.names.serving import batching, requests, running, server
from namernn_fast.names.serving.answers import MAX_STATES_LENGTH, Answers

LANGUAGES = ("Czech", "German", "Irish", "Korean", "Polish")
DATA = {"source": "the folder \x1b[31m/names", "rows": 7, "sha256": "0" * 64, "is_sample": False}
LOCAL = "http://localhost"
LONGEST = "a" * MAX_STATES_LENGTH
JSON = {"Content-Type": "application/json"}
HANG = 300
"""Seconds after which something hangs, however busy the machine is."""


def network(seed=0, **options):
    torch.manual_seed(seed)
    return names.NameClassifier(len(LANGUAGES), 4, 6, **options)


def predictor_of(model, info=None):
    info = {"split": {"data": DATA}} if info is None else info
    return names.Predictor(names.Checkpoint(model, LANGUAGES, info))


@pytest.fixture(scope="module", autouse=True)
def _patience():
    """Limits of time that no test reaches unless it sets them itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "KEEP_ALIVE_SECONDS", 10 * HANG)
        patch.setattr(running, "HEADER_SECONDS", 10 * HANG)
        patch.setattr(requests, "BODY_SECONDS", 10 * HANG)
        yield


@pytest.fixture(scope="module")
def predictor():
    return predictor_of(network())


@contextlib.contextmanager
def client_of(model):
    app = server.application(predictor_of(model))
    with TestClient(app, LOCAL, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def client():
    with client_of(network()) as client:
        yield client


def expected(predictor, name, top):
    [best] = predictor.predict([name], top)
    return [
        {"language": language, "probability": round(probability, 6)}
        for language, probability in best
    ]


# The API


@pytest.mark.parametrize("options", [{}, {"top": 1}, {"top": 1000}])
def test_many_names_at_once(client, predictor, options):
    given = ["Frank", "Ślusàrski", "Иванов", "O-Neal", "x" * 1001, " Kim "]
    results = client.post("/predict", json={"names": given, **options}).json()["results"]
    assert [result["name"] for result in results] == given
    for name, result in zip(given, results, strict=True):
        if name in ("Иванов", "x" * 1001):
            assert set(result) == {"name", "error"}
        else:
            assert result["languages"] == expected(predictor, name, options.get("top", 3))
    assert results[2]["error"].startswith("'Иванов' holds no usable character: ")
    assert results[4]["error"] == "a name of 1,001 characters: at most 1,000 are read"
    assert [result.get("dropped") for result in results] == ["", "", None, "-", None, ""]


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}])
def test_states(options):
    model = network(**options)
    with client_of(model) as client:
        answer = client.post("/states", json={"name": "Fra-ñk"}).json()
    predictor = predictor_of(model)
    assert (answer["name"], "".join(answer["characters"])) == ("Fra-ñk", "frank")
    assert (answer["dropped"], answer["languages"]) == ("-", list(LANGUAGES))
    states = torch.tensor(answer["states"])
    probabilities = torch.tensor(answer["probabilities"])
    torch.testing.assert_close(states, predictor.states("frank")[1], rtol=0, atol=5.1e-4)
    of_prefixes = predictor.prefix_probabilities("frank")
    torch.testing.assert_close(probabilities, of_prefixes, rtol=0, atol=1e-6)


def test_an_ensemble_has_no_states():
    with client_of(names.NameEnsemble([network(0), network(1)])) as client:
        answer = client.post("/states", json={"name": "Kim"}).json()
        model = client.get("/health").json()["model"]
    assert answer["states"] is None
    assert len(answer["probabilities"]) == 3
    assert (model["networks"], model["options"], model["has_states"]) == (2, None, False)


def test_health(client):
    health = client.get("/health").json()
    assert (health["status"], health["languages"]) == ("ok", list(LANGUAGES))
    assert health["model"]["parameters"] == sum(value.numel() for value in network().parameters())
    assert health["model"]["options"] == network().config
    source = r"the folder \x1b[31m/names"
    assert health["data"] == {"source": source, "rows": 7, "is_sample": False}
    limits = {"body_bytes": 262144, "names": 1000, "name_length": 1000, "states_length": 64}
    assert health["limits"] == limits


@pytest.mark.parametrize(
    ("info", "data"),
    [
        ({"split": 3}, (None, None, False)),
        ({"split": {"data": []}}, (None, None, False)),
        ({"split": {"data": {"source": 1, "rows": True}}}, (None, None, False)),
        ({"split": {"data": {"source": "x" * 999, "is_sample": True}}}, ("x" * 300, None, True)),
    ],
)
def test_the_record_of_the_data_is_not_trusted(info, data):
    described = Answers(predictor_of(network(), info)).description()["data"]
    assert tuple(described.values()) == data


def check_headers(response):
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize(
    ("method", "path", "host", "status"),
    [
        ("GET", "/", "localhost:8000", 200),
        ("GET", "/app.js", "127.0.0.1", 200),
        ("GET", "/health", "[::1]:8000", 200),
        # A page whose host name comes to point at this machine is refused (DNS rebinding).
        ("GET", "/health", "localhost.evil.example", 400),
        ("GET", "/health", "", 400),
        ("GET", "/predict/", "localhost", 404),
        ("GET", "/..%2fserver.py", "localhost", 404),
        ("OPTIONS", "/predict", "localhost", 405),
    ],
)
def test_routes(client, method, path, host, status):
    response = client.request(method, path, headers={"Host": host}, follow_redirects=False)
    assert response.status_code == status
    assert status < 404 or response.json()["field"] == {404: "path", 405: "method"}[status]
    assert response.headers.get("Allow") == ("POST" if status == 405 else None)
    check_headers(response)


def test_an_unforeseen_failure_tells_nothing(monkeypatch):
    def fail(self, names, top):
        raise RuntimeError("a secret")

    monkeypatch.setattr(Answers, "predict", fail)
    with client_of(network()) as client:
        response = client.post("/predict", json={"names": ["Kim"]})
    assert response.status_code == 500
    assert response.json() == {"error": "the server failed; its log says why"}
    check_headers(response)


# Bodies

BIG = "9" * 45
NAMES = "a list of at most 1000 strings"
TOP = "a whole number from 1 to 1000"


@pytest.mark.parametrize(
    ("body", "status", "field", "got", "takes"),
    [
        ("", 400, "body", None, "JSON"),
        ("[" * 200_000, 400, "body", None, "JSON"),
        ("1" * 5000, 400, "body", None, "JSON"),
        ('{"names": [NaN]}', 400, "body", "text that is no JSON (NaN is no JSON)", "JSON"),
        ('{"a\\n": 1, "a\\n": 2}', 400, "body", None, "JSON"),
        (b"\xff", 400, "body", "bytes that are no UTF-8 (invalid start byte)", "JSON"),
        ("null", 422, "body", "null", "a JSON object"),
        ("{}", 422, "names", "nothing", NAMES),
        ('{"names": "Kim"}', 422, "names", "the string 'Kim'", NAMES),
        (json.dumps({"names": ["a"] * 1001}), 422, "names", "a list of 1,001", NAMES),
        ('{"names": ["a", {}]}', 422, "names[1]", "an object", "a string"),
        (f'{{"names": [{BIG}]}}', 422, "names[0]", f"the number {BIG[:39]}…", "a string"),
        ('{"names": [], "top": true}', 422, "top", "true", TOP),
        ('{"names": [], "top": 3.0}', 422, "top", "the number 3.0", TOP),
        ('{"names": [], "top": 0}', 422, "top", "the number 0", TOP),
        ('{"names": [], "top": 1001}', 422, "top", "the number 1001", TOP),
        ('{"names": [], "to\\u0000p": 3}', 422, "to\\x00p", "an unknown field", "names or top"),
    ],
)
def test_a_bad_body_says_what_is_wrong(client, body, status, field, got, takes):
    response = client.post("/predict", content=body, headers=JSON)
    answer = response.json()
    assert (response.status_code, answer["field"], answer["takes"]) == (status, field, takes)
    assert got in (None, answer["got"])
    assert answer["error"] == f"{field}: got {answer['got']}, takes {takes}"
    assert len(response.content) < 700


@pytest.mark.parametrize(
    ("body", "field", "error"),
    [
        ({"name": None}, "name", "name: got null, takes a string"),
        ({"names": []}, "names", "names: got an unknown field, takes name"),
        ({"name": LONGEST + "a"}, "name", "a name of 65 characters: states are told of at most 64"),
        ({"name": "123"}, "name", "'123' holds no usable character: "),
    ],
)
def test_a_bad_body_for_states(client, body, field, error):
    response = client.post("/states", json=body)
    assert (response.status_code, response.json()["field"]) == (422, field)
    assert response.json()["error"].startswith(error)
    assert client.post("/states", json={"name": LONGEST}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"Content-Type": 'Application/JSON; charset="UTF-8"'}, None),
        ({}, "Content-Type"),
        # The type that a foreign page may send without asking the server first.
        ({"Content-Type": "text/plain"}, "Content-Type"),
        ({"Content-Type": "application/json; charset=latin-1"}, "Content-Type"),
        ({**JSON, "Content-Encoding": "gzip"}, "Content-Encoding"),
    ],
)
def test_types_of_body(client, headers, field):
    body = b'{"names": []}'.ljust(requests.MAX_BODY_BYTES)
    response = client.post("/predict", content=body, headers=headers)
    assert response.status_code == (200 if field is None else 415)
    assert response.json().get("field") == field


async def _unread():
    pytest.fail("the body was read")


async def _endless():
    return {"type": "http.request", "body": b" " * 2**16, "more_body": True}


async def _late():
    await asyncio.sleep(HANG)


async def _left():
    return {"type": "http.disconnect"}


@pytest.mark.parametrize(
    ("receive", "declared", "status", "got"),
    [
        (_unread, b"262145", 413, "262145 bytes"),
        (_unread, b"9" * 5000, 413, f"{'9' * 39}… bytes"),
        (_endless, None, 413, "more"),
        (_late, None, 408, "no end of it in 0.05 seconds"),
        (_left, None, 400, "an end too soon"),
    ],
)
def test_a_body_that_is_not_read_to_its_end(predictor, monkeypatch, receive, declared, status, got):
    monkeypatch.setattr(requests, "BODY_SECONDS", 0.05 if receive is _late else HANG)
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    headers += [] if declared is None else [(b"content-length", declared)]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b""}
    received, sent = 0, []

    async def at_most_five():
        nonlocal received
        received += 1
        assert received <= 5
        return await receive()

    async def send(message):
        sent.append(message)

    app = server.application(predictor)
    asyncio.run(app({**scope, "headers": headers}, at_most_five, send))
    answer = json.loads(sent[1]["body"])
    assert (sent[0]["status"], answer["field"], answer["got"]) == (status, "body", got)


# Every code point, lone surrogates included.
ANY_NAME = st.text(st.characters(exclude_categories=()), max_size=80)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | ANY_NAME,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "names", "top"]) | ANY_NAME, inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60)
@given(found=st.lists(ANY_NAME, max_size=5))
def test_any_names(client, found):
    response = client.post("/predict", content=json.dumps({"names": found}), headers=JSON)
    assert response.status_code == 200
    # Controls of text direction travel as escapes.
    assert response.content.isascii()
    results = response.json()["results"]
    assert [result["name"] for result in results] == found
    assert all(("error" in result) != ("languages" in result) for result in results)
    for name in found[:1]:
        response = client.post("/states", content=json.dumps({"name": name}), headers=JSON)
        assert response.status_code == (422 if "error" in response.json() else 200)


@given(
    body=st.binary(max_size=60) | ANY_JSON.map(json.dumps),
    path=st.sampled_from(["/predict", "/states"]),
)
def test_any_bodies(client, body, path):
    response = client.post(path, content=body, headers=JSON)
    assert response.status_code == 200 or 400 <= response.status_code < 500
    assert response.status_code == 200 or isinstance(response.json()["error"], str)


# Models that fail


def test_a_damaged_model_is_known_before_it_serves():
    model = network()
    model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(names.InputError, match="not finite"):
        server.application(predictor_of(model))


def test_a_name_on_which_the_model_fails_does_not_hurt_others():
    """The weights of "z" are infinite, so that only names with a "z" have no finite result."""
    model = network(nonlinearity="relu")
    model.embedding.weight.data[names.encode("z")] = float("inf")
    given = ["Kim", "Zhang", "Frank", "Zorn", "Li"]
    with client_of(model) as client:
        results = client.post("/predict", json={"names": given}).json()["results"]
        assert client.post("/states", json={"name": "Zorn"}).status_code == 422
    assert [result["name"] for result in results] == given
    for result in results:
        assert ("not finite" in result.get("error", "")) == result["name"].startswith("Z")


# Batching


class Model:
    """A model that waits until it is released, and counts its calls."""

    def __init__(self):
        self.calls = []
        self.started = threading.Event()
        self.released = threading.Event()

    def predict(self, names, top):
        self.started.set()
        assert self.released.wait(HANG)
        self.calls.append((list(names), top))
        if "bad" in names:
            raise RuntimeError("bad")
        return [
            {"name": name, "languages": list(range(top))} for name in names if name != "forgotten"
        ]


def batched(questions, max_names=batching.MAX_BATCH_NAMES, cancelled=None):
    """Ask `questions` while the model is busy with a first name; return results and calls.

    `cancelled` is the place of a question that is given up before the model is free, -1 for the
    first name, which the model is answering.
    """
    model = Model()

    async def ask():
        batcher = batching.Batcher(model.predict, max_names)
        tasks = [asyncio.create_task(batcher.predict(["first"], 1))]
        await asyncio.to_thread(model.started.wait, HANG)
        tasks += [asyncio.create_task(batcher.predict(*question)) for question in questions]
        await asyncio.sleep(0)
        if cancelled is not None:
            tasks[cancelled + 1].cancel()
            await asyncio.sleep(0)
        model.released.set()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), HANG)
        batcher.close()
        return results[1:]

    return asyncio.run(ask()), model.calls[1:]


def test_requests_gather_while_the_model_is_busy():
    questions = [([f"{place}-{part}" for part in range(place)], place + 1) for place in range(30)]
    results, calls = batched(questions)
    assert calls == [([name for names, _ in questions for name in names], 30)]
    for (asked, top), answers in zip(questions, results, strict=True):
        assert [answer["name"] for answer in answers] == asked
        assert all(answer["languages"] == list(range(top)) for answer in answers)


@pytest.mark.parametrize("bad", ["bad", "forgotten"])
def test_a_failing_request_does_not_hurt_others(bad):
    results, calls = batched([(["a", "b"], 1), ([bad], 1), (["c"], 1)])
    assert len(calls) == 4
    assert [answer["name"] for answer in results[0] + results[2]] == ["a", "b", "c"]
    assert isinstance(results[1], RuntimeError)
    results, calls = batched([([bad], 1)])
    assert len(calls) == 1
    assert isinstance(results[0], RuntimeError)


def test_calls_of_the_model_are_bounded():
    results, calls = batched([(["a"] * 3, 1), (["b"] * 3, 1), (["c"] * 9, 1), (["d"], 1)], 6)
    assert [len(names) for names, _ in calls] == [6, 9, 1]
    assert [len(answers) for answers in results] == [3, 3, 9, 1]


def test_a_request_that_is_given_up():
    """Nothing is asked for it, or the answer that is under way is dropped."""
    results, calls = batched([(["a"], 1), (["b"], 1), (["c"], 1)], cancelled=1)
    assert calls == [(["a", "c"], 1)]
    assert isinstance(results[1], asyncio.CancelledError)
    assert [answer["name"] for answer in results[2]] == ["c"]
    results, calls = batched([(["a"], 1)], cancelled=-1)
    assert [answer["name"] for answer in results[0]] == ["a"]


def test_concurrent_requests_share_calls_of_the_model(predictor, monkeypatch):
    calls = []
    app = server.application(predictor)
    best = expected(predictor, "Frank", 3)
    ask = names.Predictor.probabilities
    monkeypatch.setattr(
        names.Predictor,
        "probabilities",
        lambda self, names: calls.append(len(names)) or ask(self, names),
    )

    async def load():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=LOCAL) as client:
            return await asyncio.gather(
                *(client.post("/predict", json={"names": pair}) for pair in pairs)
            )

    pairs = [[f"Kim {chr(97 + n % 26)}", "Frank"] for n in range(40)]
    for pair, response in zip(pairs, asyncio.run(load()), strict=True):
        results = response.json()["results"]
        assert [result["name"] for result in results] == pair
        assert results[1]["languages"] == best
    assert sum(calls) == 80
    assert len(calls) <= 20


# Sockets and signals


@contextlib.contextmanager
def served(predictor):
    """Serve in a thread, and yield the port."""
    uvicorn_server = running.server(server.application(predictor))
    with running.listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=uvicorn_server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            uvicorn_server.should_exit = True
            thread.join(HANG)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def port(predictor):
    with served(predictor) as port:
        yield port


def connected(port):
    return socket.create_connection(("127.0.0.1", port), HANG)


def read_answer(connection):
    """Read one response from a socket."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


BODY = b'{"names": ["Kim"]}'
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def begin_request(connection):
    """Send the head of a request, and return when the server waits for its body."""
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\n"
    head += "Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n"
    connection.sendall(head.encode())
    assert connection.recv(2**16).startswith(b"HTTP/1.1 100")


@pytest.mark.parametrize("begin", [b"", b"GET / HTTP/1.1\r\nA: b"])
def test_a_connection_without_a_request_is_closed(port, monkeypatch, begin):
    if not begin:
        monkeypatch.setattr(running, "HEADER_SECONDS", 0.3)
    with connected(port) as connection:
        if begin:
            # After a whole request too; a byte now and then does not help.
            connection.sendall(HEALTH)
            assert read_answer(connection)[0] == 200
            monkeypatch.setattr(running, "HEADER_SECONDS", 0.3)
            connection.sendall(begin)
        connection.settimeout(0.1)
        with contextlib.suppress(ConnectionError):
            for _ in range(10 * HANG):
                with contextlib.suppress(TimeoutError):
                    assert connection.recv(2**16) == b""
                    break
                connection.sendall(b"x" if begin else b"")
            else:
                pytest.fail("the server keeps the connection")


def test_a_slow_body_is_not_cut_by_the_limit_on_the_head(port, monkeypatch):
    """The limit, which runs from when the connection is made, ends with the head."""
    made = []
    connection_made = running._Protocol.connection_made

    def recorded(self, transport):
        connection_made(self, transport)
        made.append((self, self._overdue is not None))

    monkeypatch.setattr(running._Protocol, "connection_made", recorded)
    with connected(port) as connection:
        begin_request(connection)
        ((protocol, was_limited),) = made
        assert was_limited
        assert protocol._overdue is None
        connection.sendall(BODY)
        assert read_answer(connection)[0] == 200


def test_connections_are_bounded(predictor, monkeypatch):
    monkeypatch.setattr(running, "MAX_CONNECTIONS", 2)
    with served(predictor) as port, connected(port) as held:
        held.sendall(HEALTH)
        assert read_answer(held)[0] == 200
        with connected(port) as refused:
            refused.sendall(HEALTH)
            assert refused.recv(2**16).startswith(b"HTTP/1.1 503 ")


def test_a_request_that_does_not_end_does_not_keep_the_server(predictor, monkeypatch):
    monkeypatch.setattr(running, "SHUTDOWN_SECONDS", 0.3)
    connection = socket.socket()
    with served(predictor) as port:
        connection.connect(("127.0.0.1", port))
        begin_request(connection)
    connection.close()


@pytest.fixture(scope="module")
def checkpoint(predictor, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "names.safetensors"
    names.save_checkpoint(path, predictor.checkpoint)
    return path


def test_a_request_in_flight_is_answered_when_the_server_is_told_to_stop(root, checkpoint):
    """As a process: the port is printed, SIGTERM waits for the answer, and the exit code is 0."""
    code = (
        "import sys; from namernn_fast.names.__main__ import main;"
        "assert sys.modules.keys().isdisjoint(['starlette', 'uvicorn']);"  # extras, not needed yet
        "from namernn_fast.names.serving import requests, running;"
        f"running.SHUTDOWN_SECONDS = running.HEADER_SECONDS = requests.BODY_SECONDS = {HANG};"
        "sys.exit(main(['serve', '--port', '0', '--checkpoint', sys.argv[1]]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(checkpoint)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    port = int(line.removeprefix("serving at http://127.0.0.1:").partition("/")[0])
    with connected(port) as connection:
        begin_request(connection)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(ConnectionRefusedError):
            for _ in range(20 * HANG):
                connected(port).close()
                time.sleep(0.05)
            pytest.fail("the server goes on accepting connections")
        assert process.poll() is None
        connection.sendall(BODY)
        status, answer = read_answer(connection)
        assert (status, answer["results"][0]["name"]) == (200, "Kim")
    out, err = process.communicate(timeout=HANG)
    assert (process.returncode, out, err.count("\n")) == (0, "", 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_ends_well_on_a_signal(predictor, number):
    app = server.application(predictor)

    async def interrupted(scope, receive, send):
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), number)
        await app(scope, receive, send)

    handlers = [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)]
    running.run(interrupted, running.listen("127.0.0.1", 0))
    assert [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_before_the_server_has_started(predictor, monkeypatch):
    """The server starts, sees the signal, and ends."""
    ask = running.server

    def interrupted(app):
        made = ask(app)
        run = made.run
        made.run = lambda **options: (os.kill(os.getpid(), signal.SIGTERM), run(**options))
        return made

    monkeypatch.setattr(running, "server", interrupted)
    running.run(server.application(predictor), running.listen("127.0.0.1", 0))


# The command


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--host", host) for host in ("\x1b", "a" * 64, "", "300.1.1.1")),
        *(("--allowed-host", name) for name in ("", "*.", "a*", "http://a", "a:80", "::1", "\x1b")),
    ],
)
def test_hosts_that_are_none(fails, option, value):
    code, message = fails("serve", "--port", 0, option, value)
    assert code == 2
    assert message.startswith(option)
    assert message.isprintable()


def test_a_port_that_is_taken(fails):
    with running.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        code, message = fails("serve", "--port", port)
    assert code == 1
    assert message.startswith(f"127.0.0.1 port {port}: Address already in use")


@pytest.fixture
def commanded(run, monkeypatch):
    """Run the command without serving; return its client, the address, and standard error."""

    def commanded(*options):
        found = []
        monkeypatch.setattr(running, "run", lambda app, listener: found.append(app))
        code, out, err = run("serve", "--port", 0, *options)
        assert code == 0
        return TestClient(found[0], LOCAL), out.removeprefix("serving at "), err

    return commanded


@pytest.mark.parametrize(
    ("options", "said", "statuses"),
    [
        (
            [],
            "clients must ask by one of the host names localhost, 127.0.0.1, [::1]; "
            "--allowed-host NAME adds the name of this machine\n",
            {"localhost": 200, "0.0.0.0": 400, "names.example": 400},
        ),
        (["--allowed-host", "*.example"], "", {"localhost": 200, "names.example": 200}),
    ],
)
def test_every_address_needs_names(commanded, options, said, statuses):
    client, url, err = commanded("--host", "0.0.0.0", *options)
    assert url.startswith("http://localhost:")
    assert err == said
    for host, status in statuses.items():
        assert client.get("/health", headers={"Host": host}).status_code == status


def test_ipv6(commanded):
    try:
        running.listen("::1", 0).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 ({error})")
    client, url, _ = commanded("--host", "::1")
    assert url.startswith("http://[::1]:")
    assert client.get("/health", headers={"Host": "[::1]:8000"}).status_code == 200


# The page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and os.path.exists("/usr/bin/chromedriver")):
        pytest.skip("chromium and /usr/bin/chromedriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--force-prefers-reduced-motion",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService("/usr/bin/chromedriver")
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


class Page:
    """The page in the browser."""

    def __init__(self, driver, port):
        self.driver = driver
        driver.get(f"http://127.0.0.1:{port}/")

    def type(self, text):
        field = self.driver.find_element("id", "name")
        field.clear()
        field.send_keys(text)

    def ask(self, script):
        return self.driver.execute_script(f"return {script}")

    def wait(self, script):
        for _ in range(20 * HANG):
            if found := self.ask(script):
                return found
            time.sleep(0.05)
        pytest.fail(f"never true: {script}")

    def text(self, element):
        return self.ask(f"document.getElementById('{element}').textContent")


@pytest.fixture
def page(browser, port):
    page = Page(browser, port)
    yield page
    assert browser.get_log("browser") == []


READING = "!document.getElementById('reading').hidden && reading && reading.name"


def test_the_page_shows_bars_and_the_path_while_one_types(page, predictor):
    page.type("Frank")
    page.wait(f"({READING}) === 'Frank'")
    shown = page.ask(
        "[...document.querySelectorAll('#bars li')].map(item => [item.children[0].textContent, "
        "item.children[2].textContent, parseFloat(item.querySelector('.fill').style.width)])"
    )
    best = expected(predictor, "Frank", 6)
    assert [language for language, _, _ in shown] == [answer["language"] for answer in best]
    for (_, text, width), answer in zip(shown, best, strict=True):
        assert width == pytest.approx(100 * answer["probability"], abs=0.01)
        assert float(text.removesuffix(" %")) == pytest.approx(width, abs=0.51)
    assert page.ask("[states.width, states.height]") == [5, 6]
    letters = "[...document.querySelectorAll('#lines .character')].map(x => x.textContent).join('')"
    assert page.ask(letters) == "frank"
    assert page.ask("document.querySelectorAll('#lines polyline').length") == 5
    assert page.ask("document.querySelectorAll('#table tbody tr').length") == 5
    # The heat map is warm where a state is positive, and cold where it is negative.
    pixels = "[...states.getContext('2d').getImageData(0, 0, 5, 6).data]"
    warm = page.ask(
        f"{pixels}.map((_, i, all) => all[i] > all[i + 2]).filter((_, i) => i % 4 === 0)"
    )
    values = page.ask("unitOrder(reading.states, 1).map(unit => reading.states.map(h => h[unit]))")
    assert warm == [value > 0 for row in values for value in row]
    assert sorted(map(tuple, values)) == sorted(zip(*page.ask("reading.states"), strict=True))
    assert page.wait("document.getElementById('summary').textContent").startswith("Frank: ")
    page.wait("document.getElementById('model').textContent")
    assert "one network of 1 layer with 6 units" in page.text("model")
    assert r"7 names from the folder \x1b[31m/names" in page.text("model")
    assert page.ask("document.getElementById('sample').hidden")
    assert "A surname is not an ethnicity" in page.ask("document.body.textContent")


def test_a_hostile_name_shows_as_text(page):
    hostile = "<img src=x onerror=alert(1)>"
    page.type(hostile)
    page.wait(f"({READING}) === {json.dumps(hostile)}")
    assert page.ask("document.images.length") == 0
    assert page.text("read") == "Not read: < = = ( 1 ) >"
    assert page.wait("document.getElementById('summary').textContent").startswith(hostile)
    page.ask(r"(tell('\u202eKim\ud800 \u05d0-'), 0)")
    page.wait("document.getElementById('summary').textContent.includes('Kim')")
    assert page.text("read") == "Not read: U+202E U+D800 \u05d0 -"
    assert page.ask("document.querySelector('#read bdi') !== null")


def test_names_that_cannot_be_read(page):
    page.type("123")
    problem = page.wait("document.getElementById('problem').textContent")
    assert problem.startswith("This name cannot be read: '123' holds no usable character")
    assert page.ask("document.getElementById('answers').hidden")
    page.type(LONGEST + "a")
    page.wait("document.getElementById('problem').hidden && document.querySelector('#bars li')")
    page.wait("document.getElementById('reading').hidden")


@pytest.mark.parametrize("path", ["predict", "states"])
def test_the_latest_name_wins(page, path):
    """The answer to an earlier name arrives later."""
    page.ask(
        "(window.known = window.fetch, window.fetch = async (...asked) => {"
        " const response = await window.known(asked[0], {...asked[1], signal: undefined});"
        f" if (asked[0] === '{path}' && asked[1].body.includes('Early'))"
        "  await new Promise(done => setTimeout(done, 900)).then(() => window.late = true);"
        " return response; }, tell('Early'), setTimeout(tell, 300, 'Late'), 0)"
    )
    page.wait("window.late")
    page.wait(f"({READING}) === 'Late'")
    time.sleep(0.1)
    assert page.ask(READING) == "Late"


def test_an_example_is_chosen_by_the_keyboard_in_a_narrow_window(page, browser):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        page.ask("document.querySelector('#examples button:nth-of-type(3)').focus()")
        browser.switch_to.active_element.send_keys("\ue007")  # Enter
        page.wait(f"({READING}) === 'Ślusàrski'")
        assert page.ask("document.documentElement.scrollWidth") == 360
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
