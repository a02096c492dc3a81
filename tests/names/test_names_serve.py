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
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from namernn_fast import names
from namernn_fast.names import __main__ as cli
from namernn_fast.names.serving import batching, requests, running, server
from namernn_fast.names.serving.answers import MAX_STATES_LENGTH, Answers

LANGUAGES = ("Czech", "German", "Irish", "Korean", "Polish")
DATA = {"source": "the folder \x1b[31m/names", "rows": 7, "sha256": "0" * 64, "is_sample": False}
LOCAL = "http://localhost"
LONGEST = "a" * MAX_STATES_LENGTH
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


@pytest.fixture(scope="module")
def client(predictor):
    app = server.application(predictor)
    with TestClient(app, LOCAL, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def checkpoint(predictor, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "names.safetensors"
    names.save_checkpoint(path, predictor.checkpoint)
    return path


@contextlib.contextmanager
def client_of(model, info=None):
    app = server.application(predictor_of(model, info))
    with TestClient(app, LOCAL, raise_server_exceptions=False) as client:
        yield client


def expected(predictor, name, top):
    [best] = predictor.predict([name], top)
    return [
        {"language": language, "probability": round(probability, 6)}
        for language, probability in best
    ]


# The API


def test_many_names_at_once(client, predictor):
    given = ["Frank", "Ślusàrski", "Иванов", "O-Neal", "x" * 1001, " Kim "]
    results = client.post("/predict", json={"names": given}).json()["results"]
    assert [result["name"] for result in results] == given
    for name, result in zip(given, results, strict=True):
        if name in ("Иванов", "x" * 1001):
            assert set(result) == {"name", "error"}
        else:
            assert result["languages"] == expected(predictor, name, 3)
    assert results[2]["error"].startswith("'Иванов' holds no usable character: ")
    assert results[4]["error"] == "a name of 1,001 characters: at most 1,000 are read"
    assert [result.get("dropped") for result in results] == ["", "", None, "-", None, ""]


@pytest.mark.parametrize("top", [1, 2, 5, 1000])
def test_top(client, predictor, top):
    [result] = client.post("/predict", json={"names": ["Kim"], "top": top}).json()["results"]
    assert result["languages"] == expected(predictor, "Kim", top)


def test_no_names_have_no_results(client):
    response = client.post("/predict", json={"names": []})
    assert (response.status_code, response.json()) == (200, {"results": []})


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


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (LONGEST + "a", "a name of 65 characters: states are told of at most 64"),
        ("123", "'123' holds no usable character: "),
    ],
)
def test_states_of_a_name_that_has_none(client, name, error):
    response = client.post("/states", json={"name": name})
    assert (response.status_code, response.json()["field"]) == (422, "name")
    assert response.json()["error"].startswith(error)
    assert client.post("/states", json={"name": LONGEST}).status_code == 200


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
        ({}, (None, None, False)),
        ({"split": 3}, (None, None, False)),
        ({"split": {"data": []}}, (None, None, False)),
        ({"split": {"data": {"source": 1, "rows": True}}}, (None, None, False)),
        ({"split": {"data": {"source": "x" * 999, "is_sample": True}}}, ("x" * 300, None, True)),
    ],
)
def test_the_record_of_the_data_is_not_trusted(info, data):
    described = Answers(predictor_of(network(), info)).description()["data"]
    assert tuple(described.values()) == data


BIG = "9" * 45
BAD_BODIES = [
    ("", 400, "body", "text that is no JSON (Expecting value: line 1 column 1 (char 0))", "JSON"),
    ("[" * 200_000, 400, "body", None, "JSON"),
    ("1" * 5000, 400, "body", None, "JSON"),
    ('{"names": [NaN]}', 400, "body", "text that is no JSON (NaN is no JSON)", "JSON"),
    ('{"a\\n": 1, "a\\n": 2}', 400, "body", None, "JSON"),
    (b"\xff", 400, "body", "bytes that are no UTF-8 (invalid start byte)", "JSON"),
    ('{"names": ["a"]}'.encode("utf-16"), 400, "body", None, "JSON"),
    ("[]", 422, "body", "a list of 0", "a JSON object"),
    ("null", 422, "body", "null", "a JSON object"),
    ("{}", 422, "names", "nothing", "a list of at most 1000 strings"),
    ('{"names": "Kim"}', 422, "names", "the string 'Kim'", "a list of at most 1000 strings"),
    (json.dumps({"names": ["a"] * 1001}), 422, "names", "a list of 1,001", None),
    ('{"names": ["a", {}]}', 422, "names[1]", "an object", "a string"),
    (f'{{"names": [{BIG}]}}', 422, "names[0]", f"the number {BIG[:39]}…", "a string"),
    ('{"names": [], "top": true}', 422, "top", "true", "a whole number from 1 to 1000"),
    ('{"names": [], "top": 3.0}', 422, "top", "the number 3.0", None),
    ('{"names": [], "top": 0}', 422, "top", "the number 0", None),
    ('{"names": [], "top": 1001}', 422, "top", "the number 1001", None),
    ('{"names": [], "top": "\\u202e"}', 422, "top", "the string '\\u202e'", None),
    ('{"names": [], "to\\u0000p": 3}', 422, "to\\x00p", "an unknown field", "names or top"),
]


@pytest.mark.parametrize(("body", "status", "field", "got", "takes"), BAD_BODIES)
def test_a_bad_body_says_what_is_wrong(client, body, status, field, got, takes):
    response = client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    answer = response.json()
    assert (response.status_code, answer["field"]) == (status, field)
    assert got in (None, answer["got"])
    assert takes in (None, answer["takes"])
    assert answer["error"] == f"{field}: got {answer['got']}, takes {answer['takes']}"
    assert len(response.content) < 700


@pytest.mark.parametrize(
    ("body", "field", "got"),
    [({}, "name", "nothing"), ({"name": None}, "name", "null"), ({"names": []}, "names", None)],
)
def test_a_bad_body_for_states(client, body, field, got):
    response = client.post("/states", json=body)
    assert (response.status_code, response.json()["field"]) == (422, field)
    assert got in (None, response.json()["got"])


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({}, "Content-Type"),
        # The type that a foreign page may send without asking the server first.
        ({"Content-Type": "text/plain"}, "Content-Type"),
        ({"Content-Type": "application/json; charset=latin-1"}, "Content-Type"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "Content-Encoding"),
    ],
)
def test_other_types_of_body(client, headers, field):
    response = client.post("/predict", content=b'{"names": []}', headers=headers)
    assert (response.status_code, response.json()["field"]) == (415, field)


def test_json_in_utf8_may_say_so(client):
    headers = {"Content-Type": 'Application/JSON; charset="UTF-8"'}
    assert client.post("/predict", content=b'{"names": []}', headers=headers).status_code == 200


def asked_directly(app, headers, receive):
    """Call the application as a server does, and return the status and the answer."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b""}
    fixed = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    asyncio.run(app({**scope, "headers": fixed + headers}, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def note(checkpoint):
    """What is said of a model that is not the pretrained one."""
    return (
        f"the model is {checkpoint}, not the pretrained one: training date not recorded, "
        "test accuracy not recorded\n"
    )


@pytest.fixture(scope="module")
def app(predictor):
    return server.application(predictor)


def test_a_body_that_is_declared_too_large_is_not_read(app):
    async def receive():
        pytest.fail("the body was read")

    for size in (b"262145", b"9" * 5000):
        status, answer = asked_directly(app, [(b"content-length", size)], receive)
        assert (status, answer["takes"]) == (413, "at most 262,144 bytes")


def test_a_body_that_turns_out_too_large_is_not_read_to_its_end(app):
    chunks = 0

    async def receive():
        nonlocal chunks
        chunks += 1
        return {"type": "http.request", "body": b" " * 2**16, "more_body": True}

    status, answer = asked_directly(app, [], receive)
    assert (status, answer["field"], answer["got"], chunks) == (413, "body", "more", 5)


def test_a_body_at_the_limit(client):
    body = b'{"names": ["Kim"]}'.ljust(requests.MAX_BODY_BYTES)
    headers = {"Content-Type": "application/json"}
    assert client.post("/predict", content=body, headers=headers).status_code == 200


def test_a_body_that_does_not_arrive(app, monkeypatch):
    monkeypatch.setattr(requests, "BODY_SECONDS", 0.05)

    async def receive():
        await asyncio.sleep(HANG)

    status, answer = asked_directly(app, [], receive)
    assert (status, answer["got"]) == (408, "no end of it in 0.05 seconds")


def test_a_client_that_leaves(app):
    async def receive():
        return {"type": "http.disconnect"}

    assert asked_directly(app, [], receive)[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/predict", {"POST"}),
        ("PUT", "/states", {"POST"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("OPTIONS", "/predict", {"POST"}),
        ("DELETE", "/", {"GET", "HEAD"}),
    ],
)
def test_other_methods(client, method, path, allowed):
    response = client.request(method, path)
    assert (response.status_code, response.json()["got"]) == (405, f"'{method}'")
    assert set(response.headers["Allow"].split(", ")) == allowed
    assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("path", ["/nix", "/predict/", "/page/app.js", "/..%2fserver.py"])
def test_other_paths(client, path):
    response = client.get(path, follow_redirects=False)
    assert (response.status_code, response.json()["field"]) == (404, "path")


def test_head(client):
    response = client.head("/health")
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 200), ("GET", "/app.js", 200), ("GET", "/health", 200), ("GET", "/nix", 404)],
)
def test_headers(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    check_headers(response)


def check_headers(response):
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["Cache-Control"] == "no-store"


def test_an_unforeseen_failure_tells_nothing(predictor, monkeypatch):
    def fail(self, names, top):
        raise RuntimeError("a secret")

    monkeypatch.setattr(Answers, "predict", fail)
    with client_of(network()) as client:
        response = client.post("/predict", json={"names": ["Kim"]})
    assert response.status_code == 500
    assert response.json() == {"error": "the server failed; its log says why"}
    check_headers(response)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("", 400),
    ],
)
def test_hosts(client, host, status):
    """A page whose host name comes to point at this machine is refused (DNS rebinding)."""
    response = client.get("/health", headers={"Host": host})
    assert response.status_code == status
    check_headers(response)


def test_answers_are_ascii(client):
    name = "\u202e<b>Kim\ud800\x00\u2028é"
    for path, body in (("/predict", {"names": [name]}), ("/states", {"name": name})):
        response = client.post(
            path, content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 200
        assert response.content.isascii()
        assert response.headers["Content-Type"] == "application/json"
        answer = response.json()
        result = answer["results"][0] if path == "/predict" else answer
        assert result["name"] == name
        assert result["dropped"] == "\u202e<>\ud800\x00\u2028"


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


@settings(deadline=None, max_examples=60)
@given(found=st.lists(ANY_NAME, max_size=5))
def test_fuzzed_names(client, predictor, found):
    headers = {"Content-Type": "application/json"}
    response = client.post("/predict", content=json.dumps({"names": found}), headers=headers)
    assert response.status_code == 200
    results = response.json()["results"]
    assert [result["name"] for result in results] == found
    assert all(("error" in result) != ("languages" in result) for result in results)
    for name in found[:1]:
        response = client.post("/states", content=json.dumps({"name": name}), headers=headers)
        assert response.status_code in (200, 422)
        assert ("error" in response.json()) == (response.status_code == 422)


@settings(deadline=None, max_examples=100)
@given(
    body=st.binary(max_size=60) | ANY_JSON.map(json.dumps),
    path=st.sampled_from(["/predict", "/states"]),
)
def test_fuzzed_bodies(client, body, path):
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200 or 400 <= response.status_code < 500
    assert response.status_code == 200 or isinstance(response.json()["error"], str)


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
        return [{"name": name, "languages": list(range(top))} for name in names]


def batched(questions, max_names=batching.MAX_BATCH_NAMES, cancelled=None):
    """Ask for a first name, and for `questions` while the model is busy with the first name."""
    model = Model()

    async def ask():
        batcher = batching.Batcher(model.predict, max_names)
        first = asyncio.create_task(batcher.predict(["first"], 1))
        await asyncio.to_thread(model.started.wait, HANG)
        tasks = [asyncio.create_task(batcher.predict(*question)) for question in questions]
        await asyncio.sleep(0)
        if cancelled is not None:
            tasks[cancelled].cancel()
            await asyncio.sleep(0)
        model.released.set()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
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


def test_a_failing_request_does_not_hurt_others():
    results, calls = batched([(["a", "b"], 1), (["bad"], 1), (["c"], 1)])
    assert len(calls) == 4
    assert [answer["name"] for answer in results[0] + results[2]] == ["a", "b", "c"]
    assert isinstance(results[1], RuntimeError)
    results, calls = batched([(["bad"], 1)])
    assert len(calls) == 1
    assert isinstance(results[0], RuntimeError)


def test_answers_that_are_too_few_are_an_error():
    async def ask():
        batcher = batching.Batcher(lambda names, top: [])
        with pytest.raises(RuntimeError, match="0 answers to 1 names"):
            await batcher.predict(["Kim"], 1)
        batcher.close()

    asyncio.run(ask())


def test_calls_of_the_model_are_bounded():
    results, calls = batched([(["a"] * 3, 1), (["b"] * 3, 1), (["c"] * 9, 1), (["d"], 1)], 6)
    assert [len(names) for names, _ in calls] == [6, 9, 1]
    assert [len(answers) for answers in results] == [3, 3, 9, 1]


def test_a_request_that_nobody_waits_for_is_not_answered():
    results, calls = batched([(["a"], 1), (["b"], 1), (["c"], 1)], cancelled=1)
    assert calls == [(["a", "c"], 1)]
    assert isinstance(results[1], asyncio.CancelledError)
    assert [answer["name"] for answer in results[2]] == ["c"]


def test_a_request_that_is_given_up_while_the_model_answers_it():
    model = Model()

    async def ask():
        batcher = batching.Batcher(model.predict)
        tasks = [asyncio.create_task(batcher.predict([name], 1)) for name in ("a", "b")]
        await asyncio.to_thread(model.started.wait, HANG)
        tasks[0].cancel()
        await asyncio.sleep(0)
        model.released.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        batcher.close()
        return results

    cancelled, answers = asyncio.run(ask())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert [answer["name"] for answer in answers] == ["b"]


def test_concurrent_requests_share_calls_of_the_model(predictor, monkeypatch):
    calls = []
    ask = names.Predictor.probabilities
    monkeypatch.setattr(
        names.Predictor,
        "probabilities",
        lambda self, names: calls.append(len(names)) or ask(self, names),
    )

    async def load():
        transport = httpx.ASGITransport(server.application(predictor))
        async with httpx.AsyncClient(transport=transport, base_url=LOCAL) as client:
            bodies = [{"names": [f"Kim {chr(97 + n % 26)}", "Frank"]} for n in range(40)]
            found = await asyncio.gather(*(client.post("/predict", json=b) for b in bodies))
        return bodies, found

    bodies, found = asyncio.run(load())
    for body, response in zip(bodies, found, strict=True):
        results = response.json()["results"]
        assert [result["name"] for result in results] == body["names"]
        assert results[1]["languages"] == expected(predictor, "Frank", 3)
    # Two more calls than those of the requests: the first of `application`, and of `expected`.
    assert calls[0] == 1
    assert sum(calls) == 1 + 80 + 40
    assert len(calls) - 1 - 40 <= 20


# Sockets, signals and the command


@contextlib.contextmanager
def served(app):
    """Serve in a thread, and yield the port."""
    uvicorn_server = running.server(app)
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
    with served(server.application(predictor)) as port:
        yield port


def read_answer(connection):
    """Read one response from a socket."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


def begin_request(connection, body):
    """Send the head of a request, and return when the server waits for its body."""
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n"
    connection.sendall(head.encode())
    assert connection.recv(2**16).startswith(b"HTTP/1.1 100")


def wait_until_refused(port):
    with contextlib.suppress(ConnectionRefusedError):
        for _ in range(20 * HANG):
            socket.create_connection(("127.0.0.1", port), HANG).close()
            time.sleep(0.05)
        pytest.fail("the server goes on accepting connections")


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def posted(connection, *given):
    body = json.dumps({"names": given})
    connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_nothing_is_lost_under_load(port):
    def client(number):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
        for turn in range(20):
            name = f"Kim {chr(97 + number)}{chr(97 + turn)}"
            status, answer = posted(connection, name, "123")
            assert status == 200
            assert [result["name"] for result in answer["results"]] == [name, "123"]
        connection.close()
        return 20

    with ThreadPoolExecutor(10) as pool:
        assert sum(pool.map(client, range(10))) == 200


def test_a_large_body_is_refused_on_a_socket(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
    status, answer = posted(connection, "a" * 300_000)
    assert (status, answer["field"]) == (413, "body")
    # What is left of the body does not pass for the next request.
    assert posted(connection, "Kim")[0] == 200
    connection.close()


@pytest.mark.parametrize("begin", [b"", b"POST /predict HTT", b"GET / HTTP/1.1\r\nA: b"])
def test_a_connection_without_a_request_is_closed(predictor, monkeypatch, begin):
    if not begin:
        monkeypatch.setattr(running, "HEADER_SECONDS", 0.7)
    with (
        served(server.application(predictor)) as port,
        socket.create_connection(("127.0.0.1", port), HANG) as connection,
    ):
        if begin:
            # After a whole request too; a byte now and then does not help.
            connection.sendall(HEALTH)
            assert read_answer(connection)[0] == 200
            monkeypatch.setattr(running, "HEADER_SECONDS", 0.7)
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


def test_a_slow_body_is_not_cut_by_the_limit_on_the_head(predictor, monkeypatch):
    """The limit, which runs from when the connection is made, ends with the head."""
    made = []
    connection_made = running._Protocol.connection_made

    def recorded(self, transport):
        connection_made(self, transport)
        made.append((self, self._overdue is not None))

    monkeypatch.setattr(running._Protocol, "connection_made", recorded)
    body = b'{"names": ["Kim"]}'
    with (
        served(server.application(predictor)) as port,
        socket.create_connection(("127.0.0.1", port), HANG) as connection,
    ):
        begin_request(connection, body)
        ((protocol, was_limited),) = made
        assert was_limited
        assert protocol._overdue is None
        connection.sendall(body)
        assert read_answer(connection)[0] == 200


def test_connections_are_bounded(predictor, monkeypatch):
    monkeypatch.setattr(running, "MAX_CONNECTIONS", 2)
    with (
        served(server.application(predictor)) as port,
        socket.create_connection(("127.0.0.1", port), HANG) as held,
    ):
        held.sendall(HEALTH)
        assert read_answer(held)[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 503
        connection.close()


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
    body = b'{"names": ["Kim"]}'
    with socket.create_connection(("127.0.0.1", port), HANG) as connection:
        begin_request(connection, body)
        process.send_signal(signal.SIGTERM)
        wait_until_refused(port)
        assert process.poll() is None
        connection.sendall(body)
        status, answer = read_answer(connection)
        assert (status, answer["results"][0]["name"]) == (200, "Kim")
    out, err = process.communicate(timeout=HANG)
    assert (process.returncode, out, err) == (0, "", note(checkpoint))


def test_a_request_that_does_not_end_does_not_keep_the_server(predictor, monkeypatch):
    monkeypatch.setattr(running, "SHUTDOWN_SECONDS", 0.3)
    connection = socket.socket()
    with served(server.application(predictor)) as port:
        connection.connect(("127.0.0.1", port))
        begin_request(connection, b"{}")
    connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_well_on_a_signal(checkpoint, capsys, monkeypatch, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    listen = running.listen
    ports = []

    def recorded(*address):
        listener = listen(*address)
        ports.append(listener.getsockname()[1])
        return listener

    def ask_and_stop():
        for _ in range(20 * HANG):
            with contextlib.suppress(OSError, IndexError):
                connection = http.client.HTTPConnection("127.0.0.1", ports[0], timeout=HANG)
                connection.request("GET", "/health", headers={"Host": "names.example"})
                statuses.append(connection.getresponse().status)
                connection.close()
                os.kill(os.getpid(), number)
                return
            time.sleep(0.05)

    monkeypatch.setattr(running, "listen", recorded)
    statuses = []
    thread = threading.Thread(target=ask_and_stop)
    thread.start()
    options = ["--checkpoint", str(checkpoint), "--allowed-host", "*.example", "--host", "0.0.0.0"]
    assert cli.main(["serve", "--port", "0", *options]) == 0
    thread.join()
    assert statuses == [200]
    assert capsys.readouterr() == (
        f"serving at http://localhost:{ports[0]}/ (Ctrl-C stops)\n",
        note(checkpoint),
    )
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


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


@pytest.fixture
def fails(capsys, checkpoint):
    def fails(*options):
        code = cli.main(["serve", "--checkpoint", str(checkpoint), *options])
        out, err = capsys.readouterr()
        assert out == ""
        err = err.removeprefix(note(checkpoint))
        assert err.count("\n") == 1
        return code, err.strip().partition(": error: ")[2]

    return fails


def test_a_port_that_is_taken(fails):
    with running.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        code, message = fails("--port", str(port))
    assert code == 1
    assert message.startswith(f"127.0.0.1 port {port}: Address already in use")


@pytest.mark.parametrize("host", ["nowhere.invalid", "\x1b", "a" * 64, "", "300.1.1.1"])
def test_hosts_that_are_none(fails, host):
    code, message = fails("--host", host, "--port", "0")
    assert code in (1, 2)
    assert message.startswith("--host ")


@pytest.mark.parametrize("name", ["", "*.", "a*", "*a", "http://a", "a:80", "a b", "::1", "\x1b"])
def test_allowed_hosts_that_are_none(fails, name):
    code, message = fails("--allowed-host", name)
    assert code == 2
    assert message.startswith("--allowed-host takes a host name without a port, ")
    assert message.isprintable()


@pytest.mark.parametrize("port", ["-1", "65536", "x", ""])
def test_ports_that_are_none(capsys, port):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--port", port])
    assert f"'{port}' is not a port from 0 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package(fails, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    advice = f"{package} is not installed; run: pip install 'namernn_fast[serve]'"
    assert fails() == (1, advice)


def commanded(monkeypatch, *options):
    """Run the command without serving, and return (application, address)."""
    found = []

    def run(app, listener):
        found.append((app, running.url(listener)))

    monkeypatch.setattr(running, "run", run)
    assert cli.main(["serve", "--port", "0", *options]) == 0
    return found[0]


def test_every_address_needs_names(checkpoint, monkeypatch, capsys):
    options = ["--checkpoint", str(checkpoint), "--host", "0.0.0.0"]
    app, url = commanded(monkeypatch, *options)
    assert url.startswith("http://localhost:")
    assert capsys.readouterr().err == note(checkpoint) + (
        "clients must ask by one of the host names localhost, 127.0.0.1, [::1]; "
        "--allowed-host NAME adds the name of this machine\n"
    )
    with TestClient(app, LOCAL) as client:
        for host, status in (("localhost", 200), ("0.0.0.0", 400), ("192.0.2.1", 400)):
            assert client.get("/health", headers={"Host": host}).status_code == status


def test_ipv6(checkpoint, monkeypatch):
    try:
        running.listen("::1", 0).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 ({error})")
    app, url = commanded(monkeypatch, "--checkpoint", str(checkpoint), "--host", "::1")
    assert url.startswith("http://[::1]:")
    with TestClient(app, LOCAL) as client:
        assert client.get("/health", headers={"Host": "[::1]:8000"}).status_code == 200


def test_a_model_of_the_sample_is_announced(tmp_path, monkeypatch, capsys):
    path = tmp_path / "names.safetensors"
    sample = predictor_of(network(), {"split": {"data": {**DATA, "is_sample": True}}})
    names.save_checkpoint(path, sample.checkpoint)
    app, _ = commanded(monkeypatch, "--checkpoint", str(path))
    assert "the small embedded sample" in capsys.readouterr().err
    with TestClient(app, LOCAL) as client:
        assert client.get("/health").json()["data"]["is_sample"] is True


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


def test_the_page_says_which_model_speaks(page):
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


def test_what_is_not_read_is_spelled_out(page):
    page.ask(r"(tell('\u202eKim\ud800 \u05d0-'), 0)")
    page.wait("document.getElementById('read').textContent")
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
