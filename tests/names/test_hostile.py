"""Tests that damaged and hostile checkpoints are rejected quickly or load as ordinary models."""

import json
import os
import struct

import bounds
import pytest
import torch
from bounds import LEFT_OUT
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from namernn_fast.names import Checkpoint, InputError, NameClassifier, Predictor, tensor_files
from namernn_fast.names.checkpoint import KIND, load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = NameClassifier(3, 2, 3, bidirectional=True)
    info = {"split": {"data": {"is_sample": True}}}
    return Checkpoint(model, ("Basque", "Welsh", "Maori"), info)


@pytest.fixture(scope="module")
def tiny_bytes(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "names.safetensors"
    save_checkpoint(path, tiny)
    return path.read_bytes()


@pytest.fixture
def write(tiny, tiny_bytes, path):
    """Returns a function that changes weights and values in the file of the tiny checkpoint."""
    path.write_bytes(tiny_bytes)
    tensors, values = load(tiny_bytes), tensor_files.read_values(path, KIND)

    def write(weights=(), **changes):
        content = bounds.changed(values, changes)
        tensor_files.write_tensors(path, KIND, bounds.changed(tensors, dict(weights)), content)

    return write


def refusal(path):
    return bounds.refusal(load_checkpoint, path)


def test_special_files_and_huge_files_are_rejected(tmp_path):
    assert refusal(tmp_path / "none") == "there is no such file"
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", "/dev/zero"):
        assert refusal(path) == "not a regular file"
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 20 * 10**9)
    assert refusal(path) == "too large: 20,000,000,000 bytes, but at most 268,435,456 are read"


class Harm:
    def __reduce__(self):
        return open, ("harm", "w")


def test_a_pickle_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "names.safetensors"
    torch.save(Harm(), path)
    assert refusal(path).startswith("not a readable safetensors file (")
    assert list(tmp_path.iterdir()) == [path]


def test_invalid_checkpoint_options_are_rejected(write, path, tiny):
    odd = (True, 1.5, "x", None, [], {}, -1, float("nan"), float("inf"), 10**9, 10**400)
    for option, value in tiny.model.config.items():
        for other in odd:
            if not (type(other) is type(value) is bool or other is value):
                write(model={**tiny.model.config, option: other})
                assert refusal(path).startswith("not a checkpoint that this version can read (")


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("model", [LEFT_OUT, [], 3, "three", [[]], {"secret": 1}, {"num_classes": 3}]),
        ("model", [[{"num_layers": 16}] * 64, [{"num_layers": 1}] * 65]),
        ("alphabet", [LEFT_OUT, "abc", 3]),
        ("folding", [LEFT_OUT, 1]),
        (
            "languages",
            [LEFT_OUT, [], "ABC", {"A": 1, "B": 2, "C": 3}, [1, 2, 3], ["A", "B", "B"]],
        ),
        ("languages", [["A", "B", odd] for odd in ("", " ", "\x1b[2J", "two\nlines")]),
        ("languages", [["A", "B", odd] for odd in ("\u202eleft", "\ud800", "C" * 51)]),
        ("languages", [[f"language {i}" for i in range(501)]]),
        (
            "unusual",
            [
                LEFT_OUT,
                {},
                *({"longest": odd} for odd in (0, -1, 1001, 2.0, True, None, "9")),
            ],
        ),
    ],
)
def test_invalid_checkpoint_values_are_rejected(write, path, name, odd):
    for value in odd:
        write(**{name: value})
        assert refusal(path).startswith("not a checkpoint that this version can read (")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("classifier.bias", torch.ones(4), "the tensor '{}' has the shape (4,), not (3,)"),
        ("classifier.bias", LEFT_OUT, "the tensor '{}' has the shape None, not (3,)"),
        ("odd", torch.ones(1), "the tensor '{}' has the shape (1,), not None"),
        ("unusual", LEFT_OUT, "the tensor '{}' has the shape None, not (32, 32, 32)"),
        *(
            ("classifier.bias", torch.tensor([0, odd, 0]), "the weight {} is not finite")
            for odd in (float("nan"), float("inf"), -float("inf"))
        ),
        *(
            ("classifier.bias", torch.ones(3).to(dtype), f"the weight {{}} has the dtype {dtype}")
            for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
        ),
    ],
    ids=str,
)
def test_invalid_checkpoint_weights_are_rejected(write, path, name, value, reason):
    write({name: value})
    assert refusal(path) == reason.format(name)


def test_a_model_is_not_built_if_its_file_is_too_small(write, path, tiny):
    largest = {"embedding_size": 4096, "hidden_size": 4096, "num_layers": 64, "bidirectional": True}
    write(model={**tiny.model.config, **largest})
    assert refusal(path).endswith("'classifier.weight' has the shape (3, 6), not (3, 8192)")


HEADER = 2**10  # roughly the size of the header of the tiny checkpoint


def with_header(header, body=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize(
    "header",
    [
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(2**17)},
        {"__metadata__": {KIND: "[" + "[]," * 2**20 + "[]]"}},
        b"[" * 2**22,
    ],
    ids=["tensors", "lists", "depth"],
)
def test_a_large_header_is_not_parsed(path, header):
    path.write_bytes(with_header(header))
    assert refusal(path) == "not a readable safetensors file (its header is too large)"


def test_parsing_the_largest_allowed_header_takes_little_memory_and_time(path):
    for item in ("[],", "{},", "1,", '"a",'):
        count = (tensor_files.MAX_HEADER_BYTES - 99) // len(json.dumps(item)[1:-1])
        path.write_bytes(with_header({"__metadata__": {KIND: "[" + item * count + "0]"}}))
        assert refusal(path) == f"expected a '{KIND}' file"
    values = '{"languages": [' + "[]," * 49_000 + "0]}"
    path.write_bytes(with_header({"__metadata__": {KIND: values}}))
    assert refusal(path).startswith("not a checkpoint that this version can read (")
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for count in (0, 2**13):
        path.write_bytes(with_header({f"t{i}": entry for i in range(count)}))
        assert refusal(path) == f"expected a '{KIND}' file"


@pytest.mark.parametrize("depth", [40, 900, 10**5])
def test_deeply_nested_values_are_rejected(path, depth):
    path.write_bytes(with_header({"__metadata__": {KIND: '{"a":' * depth + "1" + "}" * depth}}))
    assert refusal(path) in ("its values are nested more than 32 deep", f"expected a '{KIND}' file")


def test_a_damaged_safetensors_file_is_rejected(path, tiny_bytes):
    sizes = [*range(0, HEADER, 61), *range(HEADER, len(tiny_bytes), 2**12)]
    torn = (tiny_bytes[:size] for size in sizes)
    for content in (b"text\n", b"\0" * 8, b"\xff" * 99, tiny_bytes + b"\0", *torn):
        path.write_bytes(content)
        assert refusal(path).startswith("not a readable safetensors file (")


@given(st.data())
def test_loading_changed_bytes_returns_a_model_or_raises_an_error(path, tiny_bytes, data):
    content = bytearray(tiny_bytes)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, HEADER) | st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with bounds.bounded():
        try:
            loaded = load_checkpoint(path)
            [answer] = Predictor(loaded).predict(["Kim"])
        except InputError:
            return
    assert {language for language, _ in answer} <= set(loaded.languages)
    assert all(0 <= probability <= 1 for _, probability in answer)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=9,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "F4", "F8_E8M0", "C64", "X"]) | values,
        "shape": st.lists(st.integers(-1, 2**64), max_size=3) | values,
        "data_offsets": st.lists(st.integers(0, 2**64), max_size=2) | values,
    }
)
headers = st.dictionaries(st.text(max_size=9), entries | values, max_size=3)


@given(
    st.binary(max_size=99)
    | st.builds(with_header, values | headers, st.binary(max_size=99))
    | st.builds(lambda m: with_header({"__metadata__": {KIND: json.dumps(m)}}), values)
)
def test_loading_arbitrary_bytes_raises_an_error(path, content):
    path.write_bytes(content)
    refusal(path)
