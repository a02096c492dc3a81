"""Tests the web server, from its endpoints and limits to its shutdown and web page."""

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
from unittest import mock

import httpx
import pytest
import torch
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from namernn_fast import names
from namernn_fast.names.serving import batching, requests, running, server
from namernn_fast.names.serving.responder import MAX_STATES_LENGTH, Responder

LANGUAGES = ("Czech", "German", "Irish", "Korean", "Polish")
SPLIT = {
    "names": {"train": 5},
    "data": {"source": "the folder \x1b[31m/names", "rows": 7, "is_sample": False},
}
LOCAL = "http://localhost"
LONGEST = "a" * MAX_STATES_LENGTH
JSON = {"Content-Type": "application/json"}
HANG = 300
"""Seconds after which a test counts as hanging, even on a busy machine."""


def network(seed=0, **options):
    torch.manual_seed(seed)
    return names.NameClassifier(len(LANGUAGES), 4, 6, **options)


def predictor_of(model, split=SPLIT):
    return names.Predictor(names.Checkpoint(model, LANGUAGES, {"split": split}))


@pytest.fixture(scope="module", autouse=True)
def _patience():
    """Raise all time limits, so that a test exceeds only the limits that it lowers."""
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("KEEP_ALIVE_SECONDS", "HEADER_SECONDS", "SHUTDOWN_SECONDS"):
            patch.setattr(running, limit, 10 * HANG)
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
    return [{"language": language, "probability": round(value, 6)} for language, value in best]


@pytest.mark.parametrize("options", [{}, {"top": 1}, {"top": 1000}])
def test_many_names_are_predicted_in_one_request(client, predictor, options):
    asked = ["Frank", "Ślusàrski", "Иванов", "O-Neal", "x" * 1001, " Kim "]
    results = client.post("/predict", json={"names": asked, **options}).json()["results"]
    assert [result["name"] for result in results] == asked
    assert results.pop(4)["error"] == "a name of 1,001 characters: at most 1,000 are read"
    assert results.pop(2)["error"].startswith("'Иванов' has no character that the model reads: ")
    assert [result["dropped"] for result in results] == ["", "", "-", ""]
    for result in results:
        best = expected(predictor, result["name"], options.get("top", 3))
        assert result["languages"] == best


@pytest.mark.parametrize(
    "model",
    [
        network(),
        network(bidirectional=True),
        names.NameEnsemble([network(0), network(1)]),  # an ensemble has no states
    ],
    ids=["network", "bidirectional", "ensemble"],
)
def test_states_and_prefix_probabilities_are_returned(model):
    with client_of(model) as client:
        answer = client.post("/states", json={"name": "Fra-ñk"}).json()
        described = client.get("/health").json()["model"]
    predictor = predictor_of(model)
    assert (answer["name"], "".join(answer["characters"])) == ("Fra-ñk", "frank")
    assert (answer["dropped"], answer["languages"]) == ("-", list(LANGUAGES))
    probabilities = torch.tensor(answer["probabilities"])
    of_prefixes = predictor.prefix_probabilities("frank")
    torch.testing.assert_close(probabilities, of_prefixes, rtol=0, atol=1e-6)
    if described["has_states"]:
        states = torch.tensor(answer["states"])
        torch.testing.assert_close(states, predictor.states("frank")[1], rtol=0, atol=5.1e-4)
    else:
        assert answer["states"] is described["options"] is None
        assert described["networks"] == 2


def test_health_describes_the_model_and_the_limits(client):
    parameters = sum(value.numel() for value in network().parameters())
    options = network().config
    assert client.get("/health").json() == {
        "status": "ok",
        "model": {"networks": 1, "parameters": parameters, "options": options, "has_states": True},
        "languages": list(LANGUAGES),
        "weak_languages": [],
        "data": {
            "source": r"the folder \x1b[31m/names",
            "rows": 7,
            "training_names": 5,
            "is_sample": False,
        },
        "limits": {"body_bytes": 262144, "names": 1000, "name_length": 1000, "states_length": 64},
    }


def test_health_returns_null_for_unknown_facts_about_the_data():
    split = {"data": {"source": "x" * 999, "is_sample": True}}
    described = Responder(predictor_of(network(), split)).description()["data"]
    assert tuple(described.values()) == ("x" * 300, None, None, True)


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
        # To prevent DNS rebinding, reject foreign host names that resolve to this machine.
        ("GET", "/health", "localhost.evil.example", 400),
        ("GET", "/health", "", 400),
        ("GET", "/predict/", "localhost", 404),
        ("GET", "/..%2fserver.py", "localhost", 404),
        ("OPTIONS", "/predict", "localhost", 405),
    ],
)
def test_hosts_paths_and_methods_are_checked(client, method, path, host, status):
    response = client.request(method, path, headers={"Host": host}, follow_redirects=False)
    assert response.status_code == status
    fields = {400: "Host", 404: "path", 405: "method"}
    assert status < 400 or response.json()["field"] == fields[status]
    assert response.headers.get("Allow") == ("POST" if status == 405 else None)
    check_headers(response)


def test_an_unexpected_failure_reveals_no_details(monkeypatch):
    monkeypatch.setattr(Responder, "predict", mock.Mock(side_effect=RuntimeError("a secret")))
    with client_of(network()) as client:
        response = client.post("/predict", json={"names": ["Kim"]})
    assert response.status_code == 500
    assert response.json() == {"error": "the server failed; its log says why"}
    check_headers(response)


BIG = "9" * 45
NAMES = "a list of at most 1000 strings"
TOP = "a whole number from 1 to 1000"


@pytest.mark.parametrize(
    ("body", "status", "field", "got", "takes"),
    [
        ("[" * 200_000, 400, "body", None, "JSON"),
        ("1" * 5000, 400, "body", None, "JSON"),
        ('{"names": [NaN]}', 400, "body", "text that is not JSON (NaN is not JSON)", "JSON"),
        ('{"a\\n": 1, "a\\n": 2}', 400, "body", None, "JSON"),
        (b"\xff", 400, "body", "bytes that are not UTF-8 (invalid start byte)", "JSON"),
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
        ('{"name": null}', 422, "name", "null", "a string"),
        ('{"name": "a", "top": 1}', 422, "top", "an unknown field", "name"),
    ],
)
def test_the_error_for_an_invalid_body_says_what_is_wrong(client, body, status, field, got, takes):
    path = "/states" if '{"name":' in str(body) else "/predict"
    response = client.post(path, content=body, headers=JSON)
    answer = response.json()
    assert (response.status_code, answer["field"], answer["takes"]) == (status, field, takes)
    assert got in (None, answer["got"])
    assert answer["error"] == f"{field}: got {answer['got']}, takes {takes}"
    assert len(response.content) < 700


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (LONGEST, None),
        (LONGEST + "a", "a name of 65 characters: states are returned for at most 64"),
        ("123", "'123' has no character that the model reads: "),
    ],
)
def test_states_requires_a_short_and_usable_name(client, name, error):
    response = client.post("/states", json={"name": name})
    assert response.status_code == (422 if error else 200)
    assert error is None or response.json()["error"].startswith(error)
    assert response.json().get("field") == ("name" if error else None)


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"Content-Type": 'Application/JSON; charset="UTF-8"'}, None),
        ({}, "Content-Type"),
        # Other websites may send this content type without a CORS preflight request.
        ({"Content-Type": "text/plain"}, "Content-Type"),
        ({"Content-Type": "application/json; charset=latin-1"}, "Content-Type"),
        ({**JSON, "Content-Encoding": "gzip"}, "Content-Encoding"),
    ],
)
def test_only_uncompressed_utf_8_json_is_accepted(client, headers, field):
    body = b'{"names": []}'.ljust(requests.MAX_BODY_BYTES)
    response = client.post("/predict", content=body, headers=headers)
    assert response.status_code == (200 if field is None else 415)
    assert response.json().get("field") == field


BLANKS = {"type": "http.request", "body": b" " * 2**16, "more_body": True}


@pytest.mark.parametrize(
    ("messages", "declared", "status", "got"),
    [
        ([], b"262145", 413, "262145 bytes"),
        ([], b"9" * 5000, 413, f"{'9' * 39}… bytes"),
        ([BLANKS] * 5, b"0", 413, "more"),
        ([None], b"0", 408, "no end of it in 0.05 seconds"),
        ([{"type": "http.disconnect"}], b"0", 400, "an incomplete body"),
    ],
)
def test_incomplete_and_oversized_bodies_are_rejected(
    predictor, monkeypatch, messages, declared, status, got
):
    """The server responds after `messages`. None stands for a client that sends nothing."""
    monkeypatch.setattr(requests, "BODY_SECONDS", 0.05 if status == 408 else HANG)
    headers = {b"host": b"localhost", b"content-type": b"application/json"}
    headers[b"content-length"] = declared
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b""}
    scope["headers"] = list(headers.items())
    coming, sent = iter(messages), []

    async def receive():
        message = next(coming)
        return message or await asyncio.sleep(HANG)

    async def send(message):
        sent.append(message)

    asyncio.run(server.application(predictor)(scope, receive, send))
    answer = json.loads(sent[1]["body"])
    assert (sent[0]["status"], answer["field"], answer["got"]) == (status, "body", got)


# Text of any code points, including lone surrogates.
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
def test_any_name_gets_a_prediction_or_an_error(client, found):
    response = client.post("/predict", content=json.dumps({"names": found}), headers=JSON)
    assert response.status_code == 200
    # Non-ASCII characters, such as text-direction marks, are escaped.
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
def test_any_body_gets_a_result_or_a_client_error(client, body, path):
    response = client.post(path, content=body, headers=JSON)
    assert response.status_code == 200 or 400 <= response.status_code < 500
    assert response.status_code == 200 or isinstance(response.json()["error"], str)


def test_a_damaged_model_is_rejected_before_serving():
    model = network()
    model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(names.InputError, match="not finite"):
        server.application(predictor_of(model))


def test_a_failing_name_does_not_affect_other_names():
    """The embedding of "z" is infinite, so only names that contain "z" have non-finite results."""
    model = network(nonlinearity="relu")
    model.embedding.weight.data[names.encode("z")] = float("inf")
    asked = ["Kim", "Zhang", "Frank", "Zorn", "Li"]
    with client_of(model) as client:
        results = client.post("/predict", json={"names": asked}).json()["results"]
        assert client.post("/states", json={"name": "Zorn"}).status_code == 422
    assert [result["name"] for result in results] == asked
    for result in results:
        assert ("not finite" in result.get("error", "")) == result["name"].startswith("Z")


class Model:
    """A model that waits for `released`, fails for the name "!" and returns no result for "?"."""

    def __init__(self):
        self.calls = []
        self.started = threading.Event()
        self.released = threading.Event()

    def predict(self, names, top):
        self.started.set()
        assert self.released.wait(HANG)
        self.calls.append(f"{''.join(names)} {top}")
        if "!" in names:
            raise RuntimeError
        return [{"name": name, "languages": list(range(top))} for name in names if name != "?"]


@pytest.mark.parametrize(
    ("asked", "max_names", "given_up", "calls", "answers"),
    [
        (["", "a", "bc", "def"], 99, None, ["abcdef 4"], ["", "a", "bc", "def"]),
        (["aaa", "bbb", "ccccccccc", "d"], 6, None, ["aaabbb 2", "ccccccccc 3", "d 4"], None),
        # If a call with several requests fails, each request is retried alone.
        (["ab", "!", "c"], 99, None, ["ab!c 3", "ab 1", "! 2", "c 3"], ["ab", "RuntimeError", "c"]),
        (["ab", "?", "c"], 99, None, ["ab?c 3", "ab 1", "? 2", "c 3"], ["ab", "RuntimeError", "c"]),
        (["!"], 99, None, ["! 1"], ["RuntimeError"]),
        # A request that is cancelled before its call is not computed. If it is cancelled during the
        # call, its result is dropped.
        (["a", "b", "c"], 99, 2, ["ac 3"], ["a", "CancelledError", "c"]),
        (["a"], 99, 0, ["a 1"], ["a"]),
    ],
)
def test_requests_are_batched_while_the_model_is_busy(asked, max_names, given_up, calls, answers):
    """Each letter is a name. Request k asks for k languages.

    Request 0 is an exception: it asks for 9 languages and keeps the model busy. The request with
    the index `given_up` is cancelled before the model is free.
    """
    model = Model()

    async def ask():
        batcher = batching.Batcher(model.predict, max_names)
        tasks = [asyncio.create_task(batcher.predict("x", 9))]
        await asyncio.to_thread(model.started.wait, HANG)
        for top, letters in enumerate(asked, 1):
            tasks.append(asyncio.create_task(batcher.predict(letters, top)))
        await asyncio.sleep(0)
        if given_up is not None:
            tasks[given_up].cancel()
            await asyncio.sleep(0)
        model.released.set()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), HANG)
        batcher.close()
        return results[1:]

    results = asyncio.run(ask())
    assert model.calls == ["x 9", *calls]
    for top, (answer, result) in enumerate(zip(answers or asked, results, strict=True), 1):
        if isinstance(result, BaseException):
            assert type(result).__name__ == answer
        else:
            assert result == [{"name": letter, "languages": list(range(top))} for letter in answer]


def test_concurrent_requests_share_model_calls(predictor, monkeypatch):
    watched = mock.create_autospec(Responder.predict, side_effect=Responder.predict)
    monkeypatch.setattr(Responder, "predict", watched)
    pairs = [[f"Kim {chr(97 + n % 26)}", "Frank"] for n in range(40)]

    async def load():
        transport = httpx.ASGITransport(server.application(predictor))
        async with httpx.AsyncClient(transport=transport, base_url=LOCAL) as client:
            asked = [client.post("/predict", json={"names": pair}) for pair in pairs]
            return await asyncio.gather(*asked)

    for pair, response in zip(pairs, asyncio.run(load()), strict=True):
        assert [result["name"] for result in response.json()["results"]] == pair
    assert sum(len(call.args[1]) for call in watched.call_args_list) == 80
    assert watched.call_count <= 20


@contextlib.contextmanager
def served(predictor):
    """Run a server in a thread, yield its port, and check that it stops in time."""
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


def read_response(connection):
    """Read one response from a socket, and return its status and JSON."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


BODY = b'{"names": ["Kim"]}'
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def begin_request(connection):
    """Send the header of a request, and wait until the server asks for the body."""
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\n"
    head += "Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n"
    connection.sendall(head.encode())
    assert connection.recv(2**16).startswith(b"HTTP/1.1 100")


@pytest.mark.parametrize("begin", [b"", b"GET / HTTP/1.1\r\nA: b"])
def test_a_connection_without_a_request_is_closed(port, monkeypatch, begin):
    """Covers an idle connection, and a second request whose header arrives byte by byte."""
    if not begin:
        monkeypatch.setattr(running, "HEADER_SECONDS", 0.3)
    with connected(port) as connection:
        if begin:
            connection.sendall(HEALTH)
            assert read_response(connection)[0] == 200
            monkeypatch.setattr(running, "HEADER_SECONDS", 0.3)
            connection.sendall(begin)
        connection.settimeout(0.1)
        with contextlib.suppress(ConnectionError):
            for _ in range(10 * HANG):
                with contextlib.suppress(TimeoutError):
                    assert connection.recv(2**16) == b""
                    return
                connection.sendall(b"x" if begin else b"")
            pytest.fail("the server keeps the connection open")


def test_the_header_time_limit_does_not_apply_to_bodies(port, monkeypatch):
    """The limit applies from the start of a connection until the header is complete."""
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
        assert read_response(connection)[0] == 200


def test_the_number_of_connections_is_limited(predictor, monkeypatch):
    monkeypatch.setattr(running, "MAX_CONNECTIONS", 2)
    with served(predictor) as port, connected(port) as held:
        held.sendall(HEALTH)
        assert read_response(held)[0] == 200
        with connected(port) as refused:
            refused.sendall(HEALTH)
            assert refused.recv(2**16).startswith(b"HTTP/1.1 503 ")


def test_an_unfinished_request_does_not_block_shutdown(predictor, monkeypatch):
    monkeypatch.setattr(running, "SHUTDOWN_SECONDS", 0.3)
    with socket.socket() as connection, served(predictor) as port:
        connection.connect(("127.0.0.1", port))
        begin_request(connection)


def test_a_stopping_server_completes_open_requests(root):
    """The process prints its port, completes the response after SIGTERM, and exits with code 0."""
    code = (
        "import sys; from namernn_fast.names.__main__ import main;"
        "assert sys.modules.keys().isdisjoint(['starlette', 'uvicorn']);"  # loaded only by `serve`
        "from namernn_fast.names.serving import requests, running;"
        f"running.SHUTDOWN_SECONDS = running.HEADER_SECONDS = requests.BODY_SECONDS = {HANG};"
        "sys.exit(main(['serve', '--port', '0']))"
    )
    argv, pipe = [sys.executable, "-c", code], subprocess.PIPE
    process = subprocess.Popen(argv, cwd=root, stdout=pipe, stderr=pipe, text=True)
    line = process.stdout.readline()
    port = int(line.removeprefix("serving at http://127.0.0.1:").partition("/")[0])
    with connected(port) as connection:
        begin_request(connection)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(ConnectionRefusedError):
            for _ in range(20 * HANG):
                connected(port).close()
                time.sleep(0.05)
            pytest.fail("the server still accepts connections")
        assert process.poll() is None
        connection.sendall(BODY)
        status, content = read_response(connection)
        assert (status, content["results"][0]["name"]) == (200, "Kim")
    out, err = process.communicate(timeout=HANG)
    assert (process.returncode, out, err) == (0, "", "")


def test_open_browser_connections_do_not_delay_shutdown(predictor):
    """Keeps open a used connection, an unused connection, and a connection with half a request."""
    # On exit, `served` stops the server while connections are open. This must not take too long.
    with contextlib.ExitStack() as open_connections, served(predictor) as port:
        used, _, half = (open_connections.enter_context(connected(port)) for _ in range(3))
        used.sendall(HEALTH)
        assert read_response(used)[0] == 200
        half.sendall(HEALTH[:20])


@pytest.mark.parametrize("moment", ["run", "main_loop"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_restores_the_handlers(predictor, monkeypatch, moment, number):
    """The signal arrives before uvicorn installs its signal handlers, or while uvicorn serves."""
    method = getattr(uvicorn.Server, moment)

    def interrupted(self, **options):
        os.kill(os.getpid(), number)
        return method(self, **options)

    monkeypatch.setattr(uvicorn.Server, moment, interrupted)
    handlers = [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)]
    running.run(server.application(predictor), running.listen("127.0.0.1", 0))
    assert [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--host", host) for host in ("\x1b", "a" * 64, "", "300.1.1.1")),
        *(("--allowed-host", name) for name in ("", "*.", "a*", "http://a", "a:80", "::1", "\x1b")),
    ],
)
def test_invalid_host_names_are_rejected(fails, option, value):
    message = fails("serve", "--port", 0, option, value)
    assert message.startswith(option)
    assert message.isprintable()


def test_a_port_in_use_is_an_error(fails):
    with running.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        message = fails("serve", "--port", port, code=1)
    assert message.startswith(f"127.0.0.1 port {port}: Address already in use")


@pytest.mark.parametrize(
    ("options", "address", "asked", "status"),
    [
        (["--host", "0.0.0.0"], "localhost", "localhost", 200),
        (["--host", "0.0.0.0"], "localhost", "0.0.0.0", 400),
        (["--host", "0.0.0.0"], "localhost", "names.example", 400),
        (["--host", "0.0.0.0", "--allowed-host", "*.example"], "localhost", "names.example", 200),
        (["--host", "::1"], "[::1]", "[::1]:8000", 200),
    ],
)
def test_clients_must_use_an_allowed_host_name(run, monkeypatch, options, address, asked, status):
    if "::1" in options:
        try:
            running.listen("::1", 0).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
    found = []
    monkeypatch.setattr(running, "run", lambda app, listener: found.append(app))
    out, err = run("serve", "--port", 0, *options)
    advised = options == ["--host", "0.0.0.0"]
    assert ("--allowed-host NAME adds" in err, bool(err)) == (advised, advised)
    assert out.startswith(f"serving at http://{address}:")
    response = TestClient(found[0], LOCAL).get("/health", headers={"Host": asked})
    assert response.status_code == status


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and os.path.exists("/usr/bin/chromedriver")):
        pytest.skip("chromium and /usr/bin/chromedriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    flags = "headless=new no-sandbox disable-gpu disable-dev-shm-usage no-first-run disable-sync "
    flags += "disable-background-networking disable-component-update force-prefers-reduced-motion"
    for flag in (*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService("/usr/bin/chromedriver")
    driver = webdriver.Chrome(options, service)
    driver.set_script_timeout(HANG)
    yield driver
    driver.quit()


class Page:
    def __init__(self, driver, port, query=""):
        self.driver = driver
        driver.get(f"http://127.0.0.1:{port}/{query}")

    def type(self, text):
        field = self.driver.find_element("id", "name")
        field.clear()
        field.send_keys(text)

    def ask(self, script):
        return self.driver.execute_script(f"return {script}")

    def wait(self, script):
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, HANG, 0.05).until(lambda _: self.ask(script), script)

    def text(self, element):
        return self.ask(f"document.getElementById('{element}').textContent")


@pytest.fixture
def page(browser, port):
    page = Page(browser, port)
    yield page
    assert browser.get_log("browser") == []


READING = "!document.getElementById('reading').hidden && reading && reading.name"


@pytest.mark.slow
def test_the_page_updates_bars_and_plots_while_typing(page, predictor):
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
    # In the heat map, positive states have warm colors and negative states have cold colors.
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
    trained = r"trained on 5 names of the folder \x1b[31m/names, which has 7 rows."
    assert page.text("model").endswith(trained)
    assert page.ask("document.getElementById('sample').hidden")
    assert "A surname is not an ethnicity" in page.ask("document.body.textContent")


@pytest.mark.slow
def test_a_hostile_name_is_shown_as_text(page):
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


@pytest.mark.slow
def test_the_page_reports_unusable_and_long_names(page):
    page.type("123")
    problem = page.wait("document.getElementById('problem').textContent")
    said = "This name cannot be read: '123' has no character that the model reads"
    assert problem.startswith(said)
    assert page.ask("document.getElementById('answers').hidden")
    page.type(LONGEST + "a")
    page.wait("document.getElementById('problem').hidden && document.querySelector('#bars li')")
    page.wait("document.getElementById('reading').hidden")
    assert not page.ask("document.getElementById('too-long').hidden")
    page.type("Kim")
    page.wait(f"({READING}) === 'Kim'")
    assert page.ask("document.getElementById('too-long').hidden")


@pytest.mark.slow
def test_a_link_with_a_name_fills_in_the_input(browser, port):
    page = Page(browser, port, "?name=O%E2%80%99Neal+Ana")
    page.wait(f"({READING}) === 'O’Neal Ana'")
    assert page.ask("document.getElementById('name').value") == "O’Neal Ana"


@pytest.mark.slow
@pytest.mark.parametrize("path", ["predict", "states"])
def test_the_page_shows_the_result_for_the_latest_name(page, path):
    """The response to the earlier name arrives after the response to the latest name."""
    # WebDriver waits for the promise. It may run a script twice, so this one stores nothing.
    after_late, at_the_end = page.ask(
        "(async (known) => {"
        " const shown = () => [reading.name, byId('bars').innerHTML];"
        " let afterLate;"
        " window.fetch = async (asked, options) => {"
        "  const response = await known(asked, {...options, signal: undefined});"
        f"  if (asked === '{path}' && options.body.includes('Early')) {{"
        "   await tell('Late'); afterLate = shown(); }"
        "  return response; };"
        " await tell('Early');"
        " return [afterLate, shown()];"
        "})(window.fetch)"
    )
    assert after_late[0] == "Late"
    assert at_the_end == after_late


@pytest.mark.slow
def test_examples_can_be_selected_by_keyboard_in_a_narrow_window(page, browser):
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
