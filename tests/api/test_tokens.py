"""Compares calls on ids and on embedding rows, and tests `last_state` and shared prefixes."""

import pytest
import torch
import torch.nn.functional as F
from kinds import flat, needs_extension, said_of, states_of, tensors_in
from layouts import check_derivatives, gradients, tensors_of
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from namernn_fast import batch_invariant, last_state, ops
from namernn_fast.machine import availability
from namernn_fast.testing import ErrorBudget, assert_within_budget

V, D, H, T, B = 6, 4, 5, 7, 6
STACK = {"num_layers": 2, "bidirectional": True}
OPTIONS = (
    {},
    STACK,
    {"nonlinearity": "relu", "bias": False, "num_layers": 2},
    {"bias": False, "bidirectional": True},
)
LENGTHS = (3, T, 0, 1, T, 4)
LAYOUTS = ("dense", "unbatched", "lengths", "packed", "packed unsorted", "jagged", "reset")
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def calls(monkeypatch):
    """Records the options of every operator call."""
    found = []
    original = ops.forward_untraced
    monkeypatch.setattr(ops, "forward_untraced", lambda *a: found.append(a[5]) or original(*a))
    return found


def arranged(layout, ids, lengths, batch_first=False):
    """Converts ids (seq_len, batch) to a layout, and returns them with the layout's arguments."""
    sequences = [ids[:length, b] for b, length in enumerate(lengths)]
    some = [sequence for sequence in sequences if len(sequence)]
    if layout == "unbatched":
        return ids[:, 0], {}
    if layout == "packed":
        return pack_sequence(sorted(some, key=len, reverse=True)), {}
    if layout == "packed unsorted":
        return pack_sequence(some, enforce_sorted=False), {}
    if layout == "jagged":
        return torch.nested.nested_tensor(sequences, layout=torch.jagged), {}
    more = {}
    if layout == "lengths":
        past = torch.arange(len(ids))[:, None] >= torch.tensor(lengths)
        ids = ids.masked_fill(past, -(2**62))
        more["lengths"] = lengths
    elif layout == "reset":
        reset = torch.rand(ids.shape) < 0.3
        more["reset"] = reset.T if batch_first else reset
    return ids.T if batch_first else ids, more


def rows_of(input, embedding, padding_idx=None):
    """Replaces the ids of an input, in any layout, with their embedding rows."""
    if isinstance(input, PackedSequence):
        return input._replace(data=rows_of(input.data, embedding, padding_idx))
    if input.is_nested:
        rows = rows_of(input.values(), embedding, padding_idx)
        return torch.nested.nested_tensor_from_jagged(rows, input.offsets())
    return F.embedding(input.masked_fill(input < 0, 0), embedding, padding_idx)


def layer_and_embedding(kind, vocabulary=V, dtype=torch.float64, **options):
    layer = kind.layer(D, H, dtype=dtype, **kind.known(options))
    return layer, torch.randn(vocabulary, D, dtype=dtype, requires_grad=True)


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("rows", [(V, None), (V, 2), (V, -1), (99, 3)], ids=str)
def test_ids_match_embedding_rows_in_every_layout(kind, path, layout, options, batch_first, rows):
    """Results and gradients are the same for ids as for their rows, with and without a table."""
    vocabulary, padding_idx = rows
    layer, embedding = layer_and_embedding(kind, vocabulary, batch_first=batch_first, **options)
    ids = torch.randint(vocabulary, (T, B))
    input, more = arranged(layout, ids, LENGTHS, batch_first)
    states = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = {"unbatched": (), "packed": (5,), "packed unsorted": (5,)}.get(layout, (B,))
    some = kind.states(torch.randn, states, *batch, H, dtype=torch.float64, requires_grad=True)
    of_ids = {"embedding": embedding, "padding_idx": padding_idx, **more}
    for hx in (None, some):
        leaves = [embedding, *layer.parameters(), *tensors_in(hx)]
        results = layer(input, hx, **of_ids)
        wanted = layer(rows_of(input, embedding, padding_idx), hx, **more)
        assert type(results[0]) is type(wanted[0])
        results, wanted = tensors_of(results), tensors_of(wanted)
        last = tensors_in(layer.last_state(input, hx, **of_ids))
        for got, expected in ((results, wanted), (last, wanted[1:])):
            torch.testing.assert_close(got, expected, **EXACT)
            torch.testing.assert_close(gradients(got, leaves), gradients(expected, leaves), **EXACT)
        with torch.no_grad():
            torch.testing.assert_close(tensors_of(layer(input, hx, **of_ids)), results, **EXACT)
            last = tensors_in(layer.last_state(input, hx, **of_ids))
        torch.testing.assert_close(last, results[1:], **EXACT)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("method", ["forward", "last_state"])
def test_dropout_masks_match_embedded_rows(kind, path, batch_first, method):
    layer, embedding = layer_and_embedding(
        kind, num_layers=3, dropout=0.5, bidirectional=True, batch_first=batch_first
    )
    ids = torch.randint(V, (T, B))

    def call(*arguments, **more):
        torch.manual_seed(3)
        results = getattr(layer, method)(*arguments, **more)
        return results if method == "forward" else (results,)

    found = call(ids, embedding=embedding)
    wanted = call(F.embedding(ids, embedding))
    leaves = [embedding, *layer.parameters()]
    torch.testing.assert_close(found, wanted, **EXACT)
    torch.testing.assert_close(gradients(found, leaves), gradients(wanted, leaves), **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(call(ids, embedding=embedding), found, **EXACT)


@pytest.mark.covering(0)
def test_derivatives_of_token_calls_are_correct(kind, path):
    """Checks first and second derivatives with respect to embedding, states and weights."""
    layer, embedding = layer_and_embedding(kind, 3, **STACK)
    ids, lengths = torch.randint(3, (4, 3)), torch.tensor([4, 0, 3])
    hx = kind.states(torch.randn, 4, 3, H, dtype=torch.float64, requires_grad=True)
    leaves, spec = tree_flatten((embedding, hx, dict(layer.named_parameters())))

    def run(*leaves):
        embedding, hx, parameters = tree_unflatten(leaves, spec)
        more = {"embedding": embedding, "lengths": lengths}
        return flat(torch.func.functional_call(layer, parameters, (ids, hx), more))

    # Torch's own operator needs only gradcheck's fast mode.
    fast = kind.without_kernel == "torch" and path == "reference"
    check_derivatives(run, leaves, fast_mode=fast)


def second_derivatives(results, leaves):
    """Returns the gradients of a loss's squared gradient norm. The loss sums squared results."""
    loss = sum(result.square().sum() for result in tree_leaves(results))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)


def test_second_derivatives_match_with_a_padding_row(kind, path):
    layer, embedding = layer_and_embedding(kind, **STACK)
    ids = torch.randint(V, (T, B))
    leaves = [embedding, *layer.parameters()]
    got = second_derivatives(layer(ids, embedding=embedding, padding_idx=1), leaves)
    wanted = second_derivatives(layer(F.embedding(ids, embedding, 1)), leaves)
    torch.testing.assert_close(got, wanted, **EXACT)


def test_the_table_gets_a_gradient_only_if_needed(kind, path):
    layer, embedding = layer_and_embedding(kind)
    ids = torch.randint(V, (T, B))
    layer.requires_grad_(False)
    output, _ = layer(ids, embedding=embedding)
    output.sum().backward()
    assert embedding.grad is not None
    assert not layer(ids, embedding=embedding.detach())[0].requires_grad
    layer.weight_ih_l0.requires_grad_()
    flat(layer(ids, embedding=embedding.detach()))[1].sum().backward()
    assert layer.weight_ih_l0.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [20, 2000])
def test_autocast_casts_the_embedding_and_weights(kind, path, dtype, vocabulary):
    """Calls on ids and calls on rows cast alike, and their errors stay within the budget."""
    ours, theirs = kind.twins(16, 32, num_layers=2)
    embedding = torch.randn(vocabulary, 16)
    ids = torch.randint(vocabulary, (9, 40))
    with torch.autocast("cpu", dtype):
        got = flat(ours(ids, embedding=embedding))
        # If oneDNN has no LSTM in 16 bits, nn.LSTM raises an error.
        with torch.backends.mkldnn.flags(enabled=False):
            rival = flat(theirs(F.embedding(ids, embedding)))
        state = tensors_in(ours.last_state(ids, embedding=embedding))
    wanted = torch.float32 if kind.autocasts_only_products else dtype
    assert {result.dtype for result in (*got, *state)} == {wanted}
    torch.testing.assert_close(state, got[1:], rtol=0, atol=0)
    exact = flat(theirs.double()(F.embedding(ids, embedding).double()))
    budget = ErrorBudget(dtype)
    for name, results in enumerate(zip(got, rival, exact, strict=True)):
        budget.add(name, *results)
    budget.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [4, 5])
def test_matrix_products_get_contiguous_operands(kind, path, width, dtype, monkeypatch):
    """Slices must be copied, because in 16 bits oneDNN may read past the ends of their rows."""

    def product(rows, weight):
        assert rows.is_contiguous()
        assert weight.is_contiguous()
        return linear(rows, weight)

    linear = F.linear
    monkeypatch.setattr(F, "linear", product)
    layer = kind.layer(width, 8, dtype=dtype)
    ids, rows = torch.randint(V, (T, 9)), torch.randn(V, width, dtype=dtype)
    wide = torch.full((V, width + 3), torch.nan, dtype=dtype)
    wide[:, :width] = rows
    results = flat(layer(ids, embedding=wide[:, :width]))
    assert all(map(torch.equal, results, flat(layer(ids, embedding=rows))))


def test_autocast_does_not_change_float64(kind, path):
    layer, embedding = layer_and_embedding(kind)
    ids = torch.randint(V, (T, B))
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = layer(ids, embedding=embedding), layer(F.embedding(ids, embedding))
    torch.testing.assert_close(got, wanted)


def test_batch_invariant_token_calls_match_rows_bit_for_bit(kind):
    """Ids and rows give bit-identical results, which do not depend on the batch size."""
    layer, embedding = kind.layer(16, 64), torch.randn(20, 16)
    ids = torch.randint(20, (9, 70))
    with torch.no_grad(), batch_invariant():
        output, *last = flat(layer(ids, embedding=embedding))
        assert torch.equal(output, layer(F.embedding(ids, embedding))[0])
        for size in (1, 2, 13):
            assert torch.equal(layer(ids[:, :size], embedding=embedding)[0], output[:, :size])
            alone = layer.last_state(ids[:, :size], embedding=embedding)
            for got, wanted in zip(tensors_in(alone), last, strict=True):
                assert torch.equal(got, wanted[:, :size])


@pytest.mark.parametrize("options", [{}, STACK], ids=str)
@pytest.mark.parametrize("layout", ["dense", "unbatched", "lengths", "packed unsorted", "jagged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_last_state_of_rows_is_bit_identical_to_a_full_call(kind, path, options, layout, dtype):
    """A full call computes the output and the last state."""
    layer, embedding = layer_and_embedding(kind, dtype=dtype, **options)
    input, more = arranged(layout, torch.randint(V, (T, B)), LENGTHS)
    rows = rows_of(input, embedding.detach())
    for training in (False, True):
        with torch.set_grad_enabled(training):
            last, wanted = tensors_in(layer.last_state(rows, **more)), flat(layer(rows, **more))[1:]
        assert all(map(torch.equal, last, wanted))
    leaves = [*layer.parameters()]
    assert all(map(torch.equal, gradients(last, leaves), gradients(wanted, leaves)))


def test_last_state_skips_the_output_in_inference(kind, calls):
    layer, embedding = layer_and_embedding(kind)
    ids = torch.randint(V, (T, B))
    layer.last_state(ids, embedding=embedding)
    with torch.no_grad():
        layer.last_state(ids, embedding=embedding)
        layer.last_state(F.embedding(ids, embedding))
    assert [bool(options & ops.LAST_STATE) for options in calls] == [False, True, True]


def alike(sequences, vocabulary=9, longest=12):
    """Returns ids of shape (longest, sequences) and lengths; many sequences share prefixes."""
    generator = torch.Generator().manual_seed(sequences)
    stems = torch.randint(vocabulary, (7, longest), generator=generator)
    ids = stems[torch.randint(7, (sequences,), generator=generator)]
    kept = torch.randint(longest + 1, (sequences, 1), generator=generator)
    tails = torch.randint(vocabulary, ids.shape, generator=generator)
    ids = torch.where(torch.arange(longest) < kept, ids, tails)
    lengths = torch.randint(longest + 1, (sequences,), generator=generator)
    lengths[0] = longest
    return ids.T.contiguous(), lengths.tolist()


@pytest.mark.covering(1)
@needs_extension
@pytest.mark.parametrize("layout", ["dense", "lengths", "packed", "packed unsorted", "jagged"])
@pytest.mark.parametrize("sequences", [1, 5, 300])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 3}, {"nonlinearity": "relu", "bias": False}], ids=str
)
def test_sharing_prefixes_does_not_change_results(kind, layout, sequences, options, threads):
    """Last states and gradients stay the same for any number of threads."""
    batch_first = layout == "lengths"
    input, more = arranged(layout, *alike(sequences), batch_first)
    options = kind.known(options)
    layer = kind.nn_layer(6, 40, dtype=torch.float64, **options)
    embedding = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    more |= {k: v for k, v in options.items() if k != "num_layers"}
    more |= {"batch_first": batch_first, "embedding": embedding, "padding_idx": 4}
    more["cell"] = kind.passed
    weights = [*layer.parameters()]
    results = []
    for share, before, after in ((False, 1, 1), (True, 1, 2), (True, 2, 1), (None, 2, 2)):
        threads(before)
        h_n = last_state(input, None, weights, share_prefixes=share, **more)
        with torch.no_grad():
            inferred = last_state(input, None, weights, share_prefixes=share, **more)
        threads(after)
        results.append((h_n, inferred, gradients((h_n,), (embedding, *weights))))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **EXACT)


@needs_extension
@pytest.mark.parametrize("layout", ["lengths", "packed unsorted"])
def test_shared_prefixes_keep_the_error_budget(kind, layout):
    input, more = arranged(layout, *alike(400))
    theirs = kind.nn_layer(24, 96, num_layers=2)
    embedding = torch.randn(9, 24, requires_grad=True)
    exact = kind.nn_layer(24, 96, num_layers=2, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    precise = embedding.detach().double().requires_grad_()

    def results(last, leaves):
        return dict(enumerate((*tensors_in(last), *gradients(last, leaves))))

    def plain(layer, embedding):
        return kind.run(rows_of(input, embedding), None, [*layer.parameters()], **more)[1]

    weights = [*theirs.parameters()]
    shared = last_state(
        input, None, weights, cell=kind.passed, embedding=embedding, share_prefixes=True, **more
    )
    ours = results(shared, (embedding, *weights))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(availability, "HAS_EXTENSION", False)
        rival = results(plain(theirs, embedding), (embedding, *weights))
        expected = results(plain(exact, precise), (precise, *exact.parameters()))
    assert_within_budget(ours, rival, expected)


@needs_extension
def test_sharing_prefixes_does_not_change_second_derivatives(kind):
    ids, lengths = alike(150)
    layer = kind.layer(4, 33, dtype=torch.float64)
    embedding = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for share in (True, False):
        h_n = layer.last_state(ids, lengths=lengths, embedding=embedding, share_prefixes=share)
        results.append(second_derivatives([h_n], [embedding, *layer.parameters()]))
    torch.testing.assert_close(*results, **EXACT)


@needs_extension
def test_large_calls_share_prefixes_by_default(kind, calls):
    """Sharing is the default in training and in inference."""
    embedding = torch.randn(9, 4)

    def shares(ids, layer, share=None):
        found = []
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                layer.last_state(ids, embedding=embedding, share_prefixes=share)
            found.append(bool(calls.pop() & ops.SHARE_PREFIXES))
        assert found[0] == found[1]
        return found[0]

    wide, thin, first = kind.layer(4, 32), kind.layer(4, 31), kind.layer(4, 32, batch_first=True)
    many, few, single = (torch.randint(9, (5, batch)) for batch in (128, 127, 1))
    for layer, ids in ((wide, few), (thin, many), (wide, single)):
        assert not shares(ids, layer)
        assert shares(ids, layer, share=True)
    assert shares(many, wide)
    assert not shares(many, wide, share=False)
    assert shares(many, kind.layer(4, 32, num_layers=2, dropout=0.5).eval())
    assert shares(many, kind.layer(4, 32, dropout=0.5))  # dropout acts between layers
    assert shares(many.T, first)
    assert not shares(many, first)
    assert shares(pack_sequence([*many.T]), wide)
    assert not shares(pack_sequence([single[:, 0]]), wide)
    assert shares(torch.nested.nested_tensor([*many.T], layout=torch.jagged), wide)
    with torch.autocast("cpu", torch.bfloat16):
        stays_float = kind.autocasts_only_products
        assert shares(many, wide) == stays_float


@pytest.mark.parametrize(
    ("options", "more", "text"),
    [
        ({"bidirectional": True}, {}, "the second direction starts at the ends of sequences"),
        ({}, {"hx": torch.zeros(1, 128, 32)}, "hx gives each sequence its own initial state"),
        ({}, {"reset": torch.zeros(5, 128, dtype=torch.bool)}, "reset restarts sequences"),
        ({"num_layers": 2, "dropout": 0.5}, {}, "dropout between layers is drawn for each"),
        ({"dtype": torch.bfloat16}, {}, "in float32 and float64, not in torch.bfloat16"),
        ({"batch_invariant": True}, {}, "batch_invariant rules out a table"),
    ],
)
def test_impossible_prefix_sharing_raises_an_error(kind, options, more, text, calls):
    """Unless `share_prefixes=True` is given, the call runs without sharing."""
    layer = kind.layer(D, 32, **options)
    more = more | {"hx": states_of(kind, more["hx"])} if "hx" in more else more
    more |= {"embedding": torch.randn(V, D, dtype=layer.weight_ih_l0.dtype)}
    ids = torch.randint(V, (5, 128))
    with pytest.raises(ValueError, match=f"share_prefixes=True is impossible here: .*{text}"):
        layer.last_state(ids, share_prefixes=True, **more)
    layer.last_state(ids, **more)
    assert not any(options & ops.SHARE_PREFIXES for options in calls)


def test_embedding_rows_cannot_share_prefixes(kind, monkeypatch):
    layer, embedding = layer_and_embedding(kind)
    with pytest.raises(ValueError, match="is impossible here: embedding is None, so input does"):
        layer.last_state(torch.randn(T, B, D, dtype=torch.float64), share_prefixes=True)
    monkeypatch.setattr(availability, "HAS_EXTENSION", False)
    with pytest.raises(ValueError, match=r"is impossible here: the C\+\+ extension was not"):
        layer.last_state(torch.randint(V, (T, B)), embedding=embedding, share_prefixes=True)


@pytest.mark.parametrize("wrong", [V, -1, 2**40])
@pytest.mark.parametrize("vocabulary", [V, 99])
@pytest.mark.parametrize("method", ["forward", "last_state"])
def test_error_locates_an_id_out_of_range(kind, path, wrong, vocabulary, method):
    """An IndexError names the step and the sequence of a bad id, in every layout."""
    layer, embedding = layer_and_embedding(kind, vocabulary)
    wrong = vocabulary if wrong == V else wrong
    ids = torch.zeros(T, B, dtype=torch.int64)
    ids[3, 2] = wrong
    packed = pack_sequence([*ids.T[1:]])
    jagged = torch.nested.nested_tensor([ids[:1, 0], ids[:0, 0], ids[:, 2]], layout=torch.jagged)
    first = kind.layer(D, H, batch_first=True, dtype=torch.float64)
    dropped = kind.layer(D, H, num_layers=2, dropout=0.5, dtype=torch.float64)
    text = f"^input must hold ids from 0 to {vocabulary - 1}, got {wrong} at step 3 of sequence "
    for run, input, more, sequence in (
        (layer, ids, {}, "2$"),
        (first, ids.T, {}, "2$"),
        (dropped, ids, {}, "2$"),
        (layer, ids[:, 2], {}, "0$"),
        (layer, ids, {"lengths": [1, 1, 4, 1, 1, 1]}, "2$"),
        (layer, packed, {}, "1$"),
        (layer, jagged, {}, "2$"),
    ):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(IndexError, match=text + sequence):
                getattr(run, method)(input, embedding=embedding, **more)
    # Ids in padding are ignored.
    getattr(layer, method)(ids, lengths=[T, T, 3, T, T, T], embedding=embedding)


IDS = torch.zeros(T, B, dtype=torch.int64)
ROWS = torch.zeros(V, D)
FEATURES = torch.zeros(T, B, D)
SIZES = torch.tensor([4, 3])
PACKED_FEATURES = PackedSequence(torch.zeros(7, D), SIZES)
JAGGED_2D = torch.nested.nested_tensor([IDS], layout=torch.jagged)


@pytest.mark.parametrize("method", ["forward", "last_state"])
@pytest.mark.parametrize(
    ("input", "more", "error", "text"),
    [
        (IDS, {"embedding": [1.0]}, TypeError, "embedding must be a Tensor or None, got list"),
        (FEATURES, {}, TypeError, "token ids, int32 or int64, if embedding is given, got torch"),
        (PACKED_FEATURES, {}, TypeError, "token ids, int32 or int64, .* got torch.float32"),
        ([1], {}, TypeError, "input must be a Tensor or a PackedSequence, got"),
        (IDS, {"embedding": ROWS[:, :3]}, ValueError, r"shape \(vocabulary, 4\), got \(6, 3\)"),
        (IDS, {"embedding": ROWS[0]}, ValueError, r"\(vocabulary, 4\), got \(4,\)"),
        (IDS, {"embedding": ROWS.double()}, ValueError, "dtype of the weights, torch.float32"),
        (IDS, {"embedding": ROWS.to("meta")}, ValueError, "one device, got .* embedding on meta"),
        (IDS, {"padding_idx": V}, ValueError, r"between -6 and 5 \(embedding has 6 rows\), got 6"),
        (IDS, {"padding_idx": -7}, ValueError, "between -6 and 5 .*, got -7"),
        (FEATURES, {"padding_idx": 1, "embedding": None}, ValueError, "needs embedding, which is"),
        (IDS[None], {}, ValueError, "must have 1 or 2 dimensions, got 3"),
        (IDS[0, 0], {}, ValueError, "must have 1 or 2 dimensions, got 0"),
        (IDS, {"embedding": None}, ValueError, "dtype .*int64.* Token ids need embedding="),
        (IDS[0], {"embedding": None}, ValueError, "2D or 3D, got 1D .* Token ids need"),
        (IDS[:0], {}, RuntimeError, "Expected sequence length to be larger"),
        (IDS, {"hx": torch.zeros(1, H)}, RuntimeError, "2-D input, hx should be 3-D but got 2-D"),
        (IDS[:, 0], {"hx": torch.zeros(1, 1, H)}, RuntimeError, "1-D input, hx should be 2-D but"),
        (IDS, {"hx": torch.zeros(1, 3, H)}, RuntimeError, r"\(1, 6, 5\), got \[1, 3, 5\]"),
        (IDS, {"hx": torch.zeros(1, B, H).double()}, RuntimeError, "dtype of the table, .*float32"),
        (IDS, {"lengths": [T] * 5}, RuntimeError, "one length for each of the 6 sequences"),
        (IDS, {"lengths": [T] * 5 + [T + 1]}, RuntimeError, "lengths must be between 0 and 7"),
        (IDS, {"reset": torch.zeros(B, T) > 0}, RuntimeError, r"shape \(7, 6\), got \(6, 7\)"),
        (PackedSequence(IDS, SIZES), {}, RuntimeError, "input must have 1 dimensions, got 2"),
        (JAGGED_2D, {}, ValueError, r"must be \(batch, jagged steps\), got 3 dimensions"),
    ],
)
def test_invalid_token_input_is_rejected(kind, path, input, more, error, text, method):
    layer = kind.layer(D, H)
    if kind.without_kernel == "torch" and path == "reference":  # the operator gets rows, not ids
        text = text.replace("dtype of the table", "dtype of input")
    if "hx" in more:
        text = said_of(kind, text)
        more = more | {"hx": states_of(kind, more["hx"])}
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=text):
            getattr(layer, method)(input, **{"embedding": ROWS, **more})
    layer.last_state(IDS, embedding=ROWS)  # the layer still works after the error


def test_empty_batches_are_accepted(kind, path):
    layer, embedding = layer_and_embedding(kind, **STACK)
    ids = IDS[:, :0]
    output, *last = flat(layer(ids, embedding=embedding))
    assert output.shape == (T, 0, 2 * H)
    alone = tensors_in(layer.last_state(ids, embedding=embedding))
    assert all(state.shape == (4, 0, H) for state in (*last, *alone))
    output.sum().backward()
    nobody = torch.nested.nested_tensor([IDS[:0, 0]] * 2, layout=torch.jagged)
    last = layer.last_state(nobody, embedding=embedding)
    assert not any(state.any() for state in tensors_in(last))


def test_embedding_must_not_change_before_backward(kind, path):
    """Autograd reports an in-place change of an embedding that a gradient needs."""
    layer, embedding = layer_and_embedding(kind)
    ids = torch.randint(V, (T, B))
    output, _ = layer(ids, embedding=embedding)
    (wanted,) = torch.autograd.grad(output.sum(), embedding, retain_graph=True)
    with torch.no_grad():
        embedding.add_(1)
    if kind.without_kernel == "torch" and path == "reference":  # it read a copy of the rows
        output.sum().backward()
        assert torch.equal(embedding.grad, wanted)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
