"""Other implementations of the layers, each with the weights of torch's layer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness.grid import FORWARD, Workload
from namernn_fast.bench.machine import held_to
from namernn_fast.bench.race import TimedCall
from namernn_fast.bench.timed_calls import Gradients
from namernn_fast.cells import CELLS, GRU, LSTM, VANILLA


@dataclass(frozen=True)
class Problem:
    """A workload with its weights, its input and its gradients."""

    workload: Workload
    baseline: nn.RNNBase
    input: Tensor
    gradients: Gradients
    """The gradients of `output` and of each last state, in training."""
    states: tuple[Tensor, ...] = ()
    """The initial states, (1, batch, hidden_size), which only the ONNX runtimes read."""

    @property
    def hx(self) -> Any:
        """The initial states as torch's layers take them: a tensor or a tuple of tensors."""
        return self.states if len(self.states) > 1 else self.states[0]

    @property
    def weights(self) -> list[np.ndarray]:
        """The weights as arrays: weight_ih, weight_hh, bias_ih and bias_hh."""
        return [p.detach().numpy() for p in self.baseline.parameters()]


Rival = Callable[[Problem, int], TimedCall]
"""Creates a call from a problem and a number of threads. In inference the call returns h_n. In
training it returns the gradients of weight_ih, weight_hh and the sum of the biases, or, for a GRU,
of weight_ih, weight_hh, bias_ih and bias_hh."""


def _rnn_in_place(problem: Problem) -> TimedCall:
    weight_ih, weight_hh, bias_ih, bias_hh = problem.baseline.parameters()
    w_x, w_h, bias = weight_ih.t(), weight_hh.t(), (bias_ih + bias_hh).detach()
    steps, batch, _ = problem.input.shape

    def call() -> Tensor:
        z = torch.addmm(bias, problem.input.flatten(0, 1), w_x).view(steps, batch, -1)
        h = z[0].tanh_()
        for t in range(1, steps):
            h = z[t].addmm_(h, w_h).tanh_()
        return h

    return call


def _gru_in_place(problem: Problem) -> TimedCall:
    weight_ih, weight_hh, bias_ih, bias_hh = (p.detach() for p in problem.baseline.parameters())
    w_x, w_h = weight_ih.t(), weight_hh.t()
    steps, batch, _ = problem.input.shape
    hidden = problem.workload.hidden_size
    # The input projection can include bias_hh of both gates, but not bias_hh of the new state.
    bias_x = bias_ih.clone()
    bias_x[: 2 * hidden] += bias_hh[: 2 * hidden]
    bias_h = torch.cat([torch.zeros(2 * hidden), bias_hh[2 * hidden :]])

    def call() -> Tensor:
        sums = torch.addmm(bias_x, problem.input.flatten(0, 1), w_x).view(steps, batch, -1)
        h = torch.zeros(batch, hidden)
        for t in range(steps):
            products = torch.addmm(bias_h, h, w_h)
            gates = sums[t, :, : 2 * hidden].add_(products[:, : 2 * hidden]).sigmoid_()
            r, z = gates.chunk(2, 1)
            new = torch.addcmul(sums[t, :, 2 * hidden :], r, products[:, 2 * hidden :]).tanh_()
            h = torch.lerp(new, h, z)
        return h

    return call


def _lstm_in_place(problem: Problem) -> TimedCall:
    weight_ih, weight_hh, bias_ih, bias_hh = (p.detach() for p in problem.baseline.parameters())
    w_x, w_h, bias = weight_ih.t(), weight_hh.t(), bias_ih + bias_hh
    steps, batch, _ = problem.input.shape
    hidden = problem.workload.hidden_size

    def call() -> Tensor:
        sums = torch.addmm(bias, problem.input.flatten(0, 1), w_x).view(steps, batch, -1)
        h, c = torch.zeros(2, batch, hidden)
        for t in range(steps):
            gates, g, o = sums[t].addmm_(h, w_h).split((2 * hidden, hidden, hidden), 1)
            i, f = gates.sigmoid_().chunk(2, 1)
            c.mul_(f).addcmul_(i, g.tanh_())
            h = torch.tanh(c).mul_(o.sigmoid_())
        return h

    return call


def _rnn_in_numpy(problem: Problem) -> TimedCall:
    weight_ih, weight_hh, bias_ih, bias_hh = problem.weights
    x, w_x, w_h, bias = problem.input.numpy(), weight_ih.T, weight_hh.T, bias_ih + bias_hh

    def call() -> np.ndarray:
        z = x @ w_x + bias
        h = np.tanh(z[0], out=z[0])
        for t in range(1, len(x)):
            z[t] += h @ w_h
            h = np.tanh(z[t], out=z[t])
        return h

    return call


def _apply_sigmoid(values: np.ndarray) -> None:
    """Computes (1 + tanh(v / 2)) / 2 in place. This form of the sigmoid cannot overflow."""
    values *= 0.5
    np.tanh(values, out=values)
    values += 1
    values *= 0.5


def _gru_in_numpy(problem: Problem) -> TimedCall:
    weight_ih, weight_hh, bias_ih, bias_hh = problem.weights
    x, w_x, w_h, hidden = problem.input.numpy(), weight_ih.T, weight_hh.T, len(weight_hh) // 3

    def call() -> np.ndarray:
        sums = x @ w_x + bias_ih
        h = np.zeros((x.shape[1], hidden), x.dtype)
        for z in sums:
            products = h @ w_h + bias_hh
            gates, new = z[:, : 2 * hidden], z[:, 2 * hidden :]
            gates += products[:, : 2 * hidden]
            _apply_sigmoid(gates)
            new += gates[:, :hidden] * products[:, 2 * hidden :]
            np.tanh(new, out=new)
            h = new + gates[:, hidden:] * (h - new)
        return h

    return call


def _lstm_in_numpy(problem: Problem) -> TimedCall:
    weight_ih, weight_hh, bias_ih, bias_hh = problem.weights
    x, w_x, w_h, bias = problem.input.numpy(), weight_ih.T, weight_hh.T, bias_ih + bias_hh
    hidden = problem.workload.hidden_size

    def call() -> np.ndarray:
        sums = x @ w_x + bias
        h, c = np.zeros((2, x.shape[1], hidden), x.dtype)
        for z in sums:
            z += h @ w_h
            gates, g, o = np.split(z, (2 * hidden, 3 * hidden), axis=1)
            _apply_sigmoid(gates)
            _apply_sigmoid(o)
            c *= gates[:, hidden:]
            c += gates[:, :hidden] * np.tanh(g, out=g)
            h = o * np.tanh(c)
        return h

    return call


def _rnn_step_in_jax(w_h: Any, bias_h: Any, states: Any, sums: Any) -> tuple[Any, Any]:
    import jax.numpy as jnp

    (h,) = states
    h = jnp.tanh(sums + h @ w_h.T)
    return (h,), h


def _gru_step_in_jax(w_h: Any, bias_h: Any, states: Any, sums: Any) -> tuple[Any, Any]:
    import jax.numpy as jnp
    from jax.nn import sigmoid

    (h,) = states
    from_x, from_h = (jnp.split(value, 3, axis=-1) for value in (sums, h @ w_h.T + bias_h))
    r, z = (sigmoid(from_x[gate] + from_h[gate]) for gate in (0, 1))
    new = jnp.tanh(from_x[2] + r * from_h[2])
    h = new + z * (h - new)
    return (h,), h


def _lstm_step_in_jax(w_h: Any, bias_h: Any, states: Any, sums: Any) -> tuple[Any, Any]:
    import jax.numpy as jnp
    from jax.nn import sigmoid

    h, c = states
    i, f, g, o = jnp.split(sums + h @ w_h.T, 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    h = sigmoid(o) * jnp.tanh(c)
    return (h, c), h


class ByHand(NamedTuple):
    """A layer of one cell, written by hand for each rival that has no recurrent layers."""

    in_place: Callable[[Problem], TimedCall]
    in_numpy: Callable[[Problem], TimedCall]
    step_in_jax: Callable[..., tuple[Any, Any]]
    """Returns the next states and h, from weight_hh, bias_hh (if it is separate), the states (h,)
    or (h, c), and the projection of x_t."""


BY_HAND = {
    VANILLA.name: ByHand(_rnn_in_place, _rnn_in_numpy, _rnn_step_in_jax),
    GRU.name: ByHand(_gru_in_place, _gru_in_numpy, _gru_step_in_jax),
    LSTM.name: ByHand(_lstm_in_place, _lstm_in_numpy, _lstm_step_in_jax),
}


def in_place_loop(problem: Problem, threads: int) -> TimedCall:
    """A loop over PyTorch operators with as little overhead as a user can achieve."""
    return BY_HAND[problem.workload.cell].in_place(problem)


def numpy_loop(problem: Problem, threads: int) -> TimedCall:
    """A loop over in-place NumPy operations."""
    return BY_HAND[problem.workload.cell].in_numpy(problem)


def jax_scan(problem: Problem, threads: int) -> TimedCall:
    """Compiled `jax.lax.scan` or, in training, its vector-Jacobian product with the gradients."""
    import jax
    import jax.numpy as jnp

    cell = CELLS[problem.workload.cell]
    weight_ih, weight_hh, bias_ih, bias_hh = map(jnp.asarray, problem.weights)
    biases = (bias_ih, bias_hh) if cell.separate else (bias_ih + bias_hh, None)
    x, parameters = jnp.asarray(problem.input.numpy()), (weight_ih, weight_hh, *biases)
    zeros = jnp.zeros((problem.workload.batch, problem.workload.hidden_size))
    start = (zeros,) * len(cell.states)

    def run(parameters, x):
        w_x, w_h, bias, bias_h = parameters
        step = partial(BY_HAND[cell.name].step_in_jax, w_h, bias_h)
        return jax.lax.scan(step, start, x @ w_x.T + bias, unroll=min(8, len(x)))

    def train(parameters, x, gradients):
        _, pull_back = jax.vjp(lambda parameters: run(parameters, x), parameters)
        return pull_back(gradients)[0]

    if problem.workload.mode == FORWARD:
        forward = jax.jit(run)
        return lambda: jax.block_until_ready(forward(parameters, x))[0][0]
    grad_output, *grad_states = (jnp.asarray(value.numpy()) for value in problem.gradients)
    gradients = tuple(value[0] for value in grad_states), grad_output
    backward = jax.jit(train)

    def call() -> list[Any]:
        found = jax.block_until_ready(backward(parameters, x, gradients))
        return [gradient for gradient in found if gradient is not None]

    return call


STATES = ("initial_h", "initial_c")
"""ONNX's names of the initial states."""


def _arrays(problem: Problem) -> list[np.ndarray]:
    """Returns the input and the initial states."""
    return [tensor.numpy() for tensor in (problem.input, *problem.states)]


def onnx_model(problem: Problem) -> bytes:
    """Returns an ONNX model with one recurrent node. Its outputs are Y and Y_h."""
    from onnx import TensorProto, helper, numpy_helper

    node, hidden = CELLS[problem.workload.cell].torch.onnx, problem.workload.hidden_size
    steps, batch, size = problem.input.shape
    inputs = {"X": [steps, batch, size]}
    for name, state in zip(STATES, problem.states, strict=False):
        inputs[name] = [*state.shape]
    order = np.arange(len(node.gates) * hidden).reshape(-1, hidden)[[*node.gates]].ravel()
    weight_ih, weight_hh, bias_ih, bias_hh = (value[order] for value in problem.weights)
    initializers = {"W": weight_ih[None], "R": weight_hh[None]}
    initializers["B"] = np.concatenate([bias_ih, bias_hh])[None]
    graph = helper.make_graph(
        [
            helper.make_node(
                node.operator,
                ["X", "W", "R", "B", "", *STATES[: len(problem.states)]],
                ["Y", "Y_h"],
                hidden_size=hidden,
                **node.attributes,
            )
        ],
        problem.workload.cell,
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in inputs.items()],
        [
            helper.make_tensor_value_info("Y", TensorProto.FLOAT, [steps, 1, batch, hidden]),
            helper.make_tensor_value_info("Y_h", TensorProto.FLOAT, [1, batch, hidden]),
        ],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def new_session(model: bytes, threads: int) -> Any:
    """Returns an onnxruntime session for an ONNX model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options)


def bound_session(
    session: Any, problem: Problem
) -> tuple[Callable[[], None], dict[str, np.ndarray]]:
    """Returns a function that runs a session on bound arrays, and these arrays by name."""
    steps, batch, _ = problem.input.shape
    last = np.empty((1, batch, problem.workload.hidden_size), np.float32)
    bound = dict(zip(("X", *STATES), _arrays(problem), strict=False))
    bound |= {"Y_h": last, "Y": np.empty((steps, *last.shape), np.float32)}
    binding = session.io_binding()
    for name, array in bound.items():
        bind = binding.bind_output if name.startswith("Y") else binding.bind_input
        bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    def run(alive: object = bound) -> None:  # keeps the arrays alive, which the binding does not
        session.run_with_iobinding(binding)

    return run, bound


def onnxruntime(problem: Problem, threads: int) -> TimedCall:
    """onnxruntime on an `RNN`, `GRU` or `LSTM` node, with bound input and outputs."""
    run, bound = bound_session(new_session(onnx_model(problem), threads), problem)

    def call() -> Any:
        run()
        return bound["Y_h"]

    return call


def openvino(problem: Problem, threads: int) -> TimedCall:
    """OpenVINO on an `RNN`, `GRU` or `LSTM` node, in float32, with bound input and outputs."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    model = core.compile_model(core.read_model(onnx_model(problem), b""), "CPU", settings)
    request = model.create_infer_request()
    outputs = [np.empty([*output.shape], np.float32) for output in model.outputs]
    for bind, arrays in (
        (request.set_input_tensor, _arrays(problem)),
        (request.set_output_tensor, outputs),
    ):
        for i, array in enumerate(arrays):
            bind(i, openvino.Tensor(array, shared_memory=True))

    def call(alive: object = problem) -> Any:  # keeps the arrays alive, which the request does not
        request.infer()
        return outputs[1]

    return call


ERROR = 1e-4
"""Other implementations round differently; a wrong formula has a far larger error."""
RIVALS: dict[str, tuple[str, Rival]] = {
    "PyTorch in place": ("torch", in_place_loop),
    "NumPy": ("numpy", numpy_loop),
    "JAX": ("jax", jax_scan),
    "onnxruntime": ("onnxruntime", onnxruntime),
    "OpenVINO": ("openvino", openvino),
}
"""Rivals by name: the package each needs, and the function that creates its call."""
HELD = ("PyTorch in place",)
"""The rivals that `ATEN_CPU_CAPABILITY` holds to a lower instruction set, too."""
TRAINED = ("JAX",)
"""The rivals that also train."""


def is_available(name: str) -> bool:
    """Returns whether a rival is installed and uses the same instruction set as the kernels."""
    is_equal = name in HELD or held_to() is None
    return is_equal and find_spec(RIVALS[name][0]) is not None
