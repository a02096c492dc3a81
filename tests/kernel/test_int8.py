"""Tests layers with 8-bit weights against an oracle that computes with the same integers."""

import io

import numpy as np
import operators
import oracle
import pytest
import torch
from cases import CELLS, FUSED, layer_of
from kinds import KINDS, flat, map_states, needs_extension, tensors_in
from layouts import calls_of, tensors_of
from torch.overrides import TorchFunctionMode

from namernn_fast import ops, prepared_ops
from namernn_fast.call import int8
from namernn_fast.nn.inference import prepared as prepared_module

pytestmark = [needs_extension, pytest.mark.covering(1)]

EQUATIONS = [equation for equation in oracle.EQUATIONS if layer_of(equation)[0] in KINDS]
SIZES = ((1, 1), (3, 130), (70, 64), (65, 129), (300, 8), (256, 96))


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def scale_of(row, least=0):
    """Returns the quantization scale of a row of float32 numbers, computed as in the kernel."""
    largest = np.maximum(np.abs(row).max(initial=0), np.float32(least))
    if not np.isfinite(largest):
        return np.float32(np.nan)
    scale = np.float32(largest / np.float32(127))
    scale = (scale.view(np.int32) & ~0x7F).view(np.float32)
    return scale if scale >= 2.0**-107 else np.float32(0)


def integers(row, scale):
    """Returns a row divided by its scale and rounded to integers."""
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    return np.rint(row * inverse)


def rounded_input(row):
    """Quantizes and dequantizes an input row, which the kernel splits into two rows of integers."""
    row = row.astype(np.float32)
    scale = scale_of(row)
    first = integers(row, scale)
    fine = np.float32(scale / np.float32(254))
    second = integers((row - first.astype(np.float32) * scale).astype(np.float32), fine)
    return first * np.float64(scale) + second * np.float64(fine)


def rounded_state(row):
    """Quantizes and dequantizes a row of a state, which becomes one row of integers."""
    row = row.astype(np.float32)
    scale = scale_of(row, 1)
    return integers(row, scale) * np.float64(scale)


def by_rows(rounded, rows):
    return torch.from_numpy(np.apply_along_axis(rounded, -1, rows.numpy()))


class RoundedStates(TorchFunctionMode):
    """Quantizes and dequantizes states before they are multiplied by weights."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        place = {"addmm": 1, "linear": 0}.get(function.__name__)
        if place is not None:
            args = [*args]
            args[place] = by_rows(rounded_state, args[place])
        return function(*args, **kwargs or {})


class EightBits:
    """A mixin that makes a plain-loop layer quantize inputs and states before products."""

    def _sums(self, x, weights):
        return super()._sums(by_rows(rounded_input, x), weights)

    def _make_step(self, weights):
        step = super()._make_step(weights)

        def of_rounded(sums, states):
            with RoundedStates():
                return step(sums, states)

        return of_rounded


def oracle_of(layer):
    """Returns a float64 layer with quantized weights that also quantizes inputs and states."""
    weights = [weight.numpy().copy() for weight in layer.parameters()]
    for weight in weights:
        for row in weight if weight.ndim == 2 else ():
            scale = scale_of(row)
            row[:] = integers(row, scale) * scale
    return oracle.layer_like(layer, [torch.from_numpy(w).double() for w in weights], EightBits)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 5, 7, 17, 33])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_single_int8_step_matches_the_oracle(equation, sizes, batch, bias):
    """States match for rows of any scale, up to rounding errors of the sums and the gates."""
    cell, options = layer_of(equation)
    layer = FUSED[cell](*sizes, bias=bias, **options).eval()
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(1, batch, sizes[0], generator=generator)
    x *= torch.tensor([1.0, 1e-3, 0, 1e-36, 7.0])[torch.arange(batch) % 5][:, None]
    states = torch.rand, 1, batch, sizes[1]
    hx = KINDS[cell].states(*states, generator=generator)
    hx = map_states(hx, lambda state: (2 * state - 1) * torch.tensor([[1.0], [3]])[[batch % 2]])
    _, last = layer.prepare(torch.int8)(x, hx)
    _, wanted = oracle_of(layer)(x.double(), map_states(hx, torch.Tensor.double))
    last = map_states(last, torch.Tensor.double)
    torch.testing.assert_close(last, wanted, rtol=3e-6, atol=3e-6)


LARGEST_INPUT = 127 * 254
"""If a row of inputs has this largest magnitude, its scale is 254 and its finer scale is 1."""


@pytest.mark.parametrize("batch", [1, 3, 20, 40])
@pytest.mark.parametrize("sizes", [(1, 1), (67, 130), (700, 70)], ids=str)
def test_int8_products_are_summed_exactly(sizes, batch):
    """Every sum is an integer that float32 holds exactly, and relu returns the sum unchanged.

    Weights and states have scales of 1. The first input of each row sets the finer scale of the
    inputs to 1.
    """
    generator = torch.Generator().manual_seed(0)
    layer = FUSED["rnn"](*sizes, nonlinearity="relu", bias=False)

    def draw(*shape, largest=127):
        numbers = torch.randint(-127, 128, shape, generator=generator)
        numbers[..., 0] = largest * (1 - 2 * torch.randint(2, shape[:-1], generator=generator))
        return numbers

    weights = [draw(*weight.shape) for weight in layer.parameters()]
    for parameter, weight in zip(layer.parameters(), weights, strict=True):
        parameter.copy_(weight)
    x, hx = draw(2, batch, sizes[0], largest=LARGEST_INPUT), draw(1, batch, sizes[1])
    output = layer.prepare(torch.int8)(x.float(), hx.float())[0]
    want = (x[0] @ weights[0].T + hx[0] @ weights[1].T).clamp(min=0)
    assert torch.equal(output[0], want.float())


@pytest.mark.parametrize("features", [512, 640, 896, 1536])
def test_the_largest_int8_sums_do_not_overflow(features):
    """With these sizes, float32 holds all intermediate sums exactly."""
    layer = FUSED["rnn"](features, features, nonlinearity="relu", bias=False)
    for parameter in layer.parameters():
        parameter.fill_(127)
    state = 127 * 512  # a scale of 512
    x = torch.full((1, 7, features), -float(LARGEST_INPUT))
    hx = torch.full((1, 7, features), float(state))
    output = layer.prepare(torch.int8)(x, hx)[0]
    want = torch.full_like(output, features * 127 * (state - LARGEST_INPUT))
    assert torch.equal(output, want)


@pytest.mark.covering(2)
@pytest.mark.parametrize("features", [(5, 8), (70, 100)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bias": False}, {"num_layers": 3, "bidirectional": True}],
    ids=str,
)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_int8_results_of_whole_sequences_match_the_oracle(equation, options, features, threads):
    """The tolerance is large because states that differ in one bit may quantize differently."""
    cell, more = layer_of(equation)
    layer = FUSED[cell](*features, batch_first=True, **options, **more).eval()
    prepared, exact = layer.prepare(torch.int8), oracle_of(layer)
    for count in (1, 2):
        threads(count)
        for name, arguments, more in calls_of(layer, torch.float32):
            if name not in ("dense", "lengths"):
                continue
            (x, hx), lengths = arguments, more.get("lengths")
            results = prepared(x, hx, lengths)
            x, hx = x.transpose(0, 1).double(), map_states(hx, torch.Tensor.double)
            output, last = exact._time_major(x, hx, lengths=lengths)
            wanted = output.transpose(0, 1), *tensors_in(last)
            for got, want in zip(flat(results), wanted, strict=True):
                torch.testing.assert_close(got.double(), want, atol=0.02, rtol=0)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_int8_results_are_bit_identical_for_any_layout_batch_and_threads(cell, options, threads):
    layer = FUSED[cell](20, 70, **options).eval()
    prepared = layer.prepare(torch.int8)
    calls = {name: (arguments, more) for name, arguments, more in calls_of(layer, torch.float32)}
    (x, hx), more = calls["lengths"]
    lengths, reset = more["lengths"], more["reset"]
    threads(2)
    output, last = prepared(x, hx, lengths, reset=reset)
    threads(1)
    for b, length in enumerate(lengths.tolist()):
        if length:
            one = map_states(hx, lambda state, b=b: state[:, b : b + 1])
            alone = prepared(x[:length, b : b + 1], one, reset=reset[:length, b : b + 1])
            assert torch.equal(alone[0][:, 0], output[:length, b])
            for state, wanted in zip(tensors_in(alone[1]), tensors_in(last), strict=True):
                assert torch.equal(state[:, 0], wanted[:, b])
    padded, _ = prepared(x, hx, lengths.clamp(min=1))
    packed, jagged = (prepared(*calls[name][0]) for name in ("packed", "jagged"))
    assert torch.equal(torch.nn.utils.rnn.pad_packed_sequence(packed[0])[0], padded)
    padded, wanted = prepared(x, hx, lengths)
    rows = [padded[:n, b] for b, n in enumerate(lengths.tolist())]
    assert torch.equal(tensors_of(jagged)[0], torch.cat(rows))
    for last in (jagged[1], prepared.last_state(x, hx, lengths)):
        assert all(map(torch.equal, tensors_in(last), tensors_in(wanted)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["input", "state"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_non_finite_input_or_state_makes_its_sequence_nan(equation, where, bad):
    cell, options = layer_of(equation)
    prepared = FUSED[cell](20, 70, **options).prepare(torch.int8)
    x, hx = torch.randn(4, 9, 20), KINDS[cell].states(torch.zeros, 1, 9, 70)
    clean = prepared(x, hx)[0]
    first = 2 if where == "input" else 0
    (x if where == "input" else tensors_in(hx)[0])[first, 5, 3] = bad
    output = prepared(x, hx)[0]
    others = torch.arange(9) != 5
    assert output[first:, 5].isnan().all()
    assert torch.equal(output[:, others], clean[:, others])
    assert torch.equal(output[:first], clean[:first])


@pytest.mark.parametrize("cell", CELLS)
def test_a_non_finite_weight_makes_its_hidden_unit_nan(cell):
    layer = FUSED[cell](20, 70)
    layer.weight_hh_l0[7, 3] = torch.inf
    x = torch.randn(3, 2, 20)
    output = layer.prepare(torch.int8)(x)[0]
    assert output[0, :, 7].isnan().all()
    assert not output[0, :, torch.arange(70) != 7].isnan().any()
    assert output[1:].isnan().all()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_loading_a_state_dict_does_not_quantize_weights_again(cell, sizes):
    """Loading keeps the integers and scales, which match `integers` and `scale_of` above."""
    layer = FUSED[cell](*sizes)
    for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
        size = min(len(weight), 7)
        weight[:size] *= torch.tensor([0, 1e-38, 1e-31, 1e-20, 1e30, 3e38, torch.nan])[:size, None]
    state, again = layer.prepare(torch.int8).state_dict(), layer.prepare(torch.int8)
    again.load_state_dict(state)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight.nan_to_num(7), state[name].nan_to_num(7)), name
    for name in ("weight_ih_l0", "weight_hh_l0"):
        weight = getattr(layer, name).numpy()
        scales = np.array([scale_of(row) for row in weight])
        want = [integers(row, scale) for row, scale in zip(weight, scales, strict=True)]
        np.testing.assert_array_equal(state[f"{name}_scale"], scales)
        finite = np.isfinite(scales)
        np.testing.assert_array_equal(state[f"{name}_int8"][finite], np.array(want)[finite])


@pytest.mark.parametrize("cell", CELLS)
def test_int8_weights_take_about_a_quarter_of_the_memory(cell):
    """Measures the prepared layer, its state_dict and its pickle, for at least 256 hidden units."""
    for size in (256, 512):
        layer = FUSED[cell](size, size)
        full, rounded = layer.prepare(), layer.prepare(torch.int8)
        assert rounded._panels.tensor.nbytes <= 0.27 * full._panels.tensor.nbytes
        for saved in (lambda m: m.state_dict(), lambda m: m):
            files = io.BytesIO(), io.BytesIO()
            for file, module in zip(files, (rounded, full), strict=True):
                torch.save(saved(module), file)
            assert files[0].tell() <= 0.27 * files[1].tell()


@pytest.mark.parametrize("shape", [(32, 4, 256), (50, 16, 40)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_int8_results_are_close_to_float_results(cell, shape):
    layer = FUSED[cell](shape[2], 256)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for got, wanted in zip(flat(layer.prepare(torch.int8)(x)), flat(layer(x)), strict=True):
        assert (got - wanted).abs().max() < 0.016


@pytest.mark.parametrize("with_table", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_a_token_table_is_not_quantized(cell, with_table, monkeypatch):
    if not with_table:
        monkeypatch.setattr(prepared_module, "MOST_TABLE_BYTES", 0)
    model = KINDS[cell].tokens(31, 12, 40).eval()
    prepared, ids = model.prepare(torch.int8), torch.randint(31, (17, 9))
    rows = model.rnn.prepare(torch.int8)(model.embedding(ids))[0]
    assert prepared._panels.has_table == with_table
    assert ("rnn.weight_ih_l0" in prepared.state_dict()) == with_table
    got = prepared(ids)[0]
    torch.testing.assert_close(got, rows, atol=0.03 if with_table else 0, rtol=0)
    torch.testing.assert_close(got, model(ids)[0], atol=0.03, rtol=0)
    stream = prepared.stream(9)
    assert torch.equal(torch.stack([stream(frame) for frame in ids]), got)
    with pytest.raises(ValueError, match="share_prefixes=True is impossible here"):
        prepared.last_state(ids, share_prefixes=True)


def test_int8_layers_reject_an_input_size_whose_sums_overflow_32_bits():
    most = (2**31 - 1) // (255 * 127)
    FUSED["rnn"](most, 1).prepare(torch.int8)
    layer = FUSED["rnn"](most + 1, 1)
    with pytest.raises(
        ValueError, match=f"8-bit weights take at most {most} inputs, got {most + 1}"
    ):
        layer.prepare(torch.int8)
    options = layer.prepare()._panels.options | ops.INT8
    with pytest.raises(RuntimeError, match=f"at most {most} inputs of a layer, got {most + 1}"):
        prepared_ops.prepare(0, [*layer.parameters()], [1, most + 1, 1, 0, 1, 1], options)


@pytest.mark.parametrize("cell", CELLS)
def test_operators_reject_int8_arguments_that_do_not_match(cell):
    layer, x = FUSED[cell](8, 16), torch.randn(3, 2, 8)
    prepared = layer.prepare(torch.int8)
    panels, number = prepared._panels, layer._cell.number
    floats = layer.prepare()._panels
    wrong = "prepared must come from namernn_fast::prepare on a processor with the kernels"
    for tensor, options in ((floats.tensor, panels.options), (panels.tensor[:-64], panels.options)):
        call = number, x, (), tensor, panels.sizes, None, None, options, 0
        with pytest.raises(RuntimeError, match=wrong):
            operators.forward_prepared(*call)
    weights = [*layer.parameters()]
    with pytest.raises(RuntimeError, match="options must not set INT8 without prepared weights"):
        operators.forward(number, x, (), weights, None, None, panels.options, 0)
    double = [weight.double() for weight in weights]
    with pytest.raises(RuntimeError, match="8-bit weights need inputs in float32"):
        prepared_ops.prepare(number, double, panels.sizes, panels.options)


def test_quantizing_dequantized_weights_changes_nothing():
    weight = torch.randn(400, 70) * 10.0 ** torch.randint(-39, 39, (400, 1))
    weight[::3] = weight[::3].sign() * 127 * 2.0**-107 * (1 + 2.0 ** -torch.arange(134.0)[:, None])
    named = {"w": weight}
    int8.to_integers(named, ["w"])
    pair = named["w_int8"], named["w_scale"]
    assert not int8.to_weights(named, ["w"])
    assert named.keys() == {"w"}
    for first, second in zip(pair, int8.quantize(named["w"]), strict=True):
        assert torch.equal(first, second)
