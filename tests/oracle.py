"""The oracle, which computes any layer in higher precision with plain loops over time steps.

The loops compute in float64, or in long double for float64 layers. torch.autograd computes the
gradients.
"""

import copy

import numpy as np
import torch
from kinds import EQUATION_KINDS, VARIANTS, kind_of
from plain import plain

EQUATIONS = tuple(
    name if len(kind.cell.nonlinearities) == 1 else f"{name} {act}".removeprefix("rnn ")
    for name, kind in {**VARIANTS, **EQUATION_KINDS}.items()
    for act in kind.cell.nonlinearities
)
"""The cells and variants with each of their nonlinearities. See `cases.layer_of`."""


class Rounding:
    """Defines how the oracle rounds numbers. This base class rounds nothing."""

    def numbers(self, values):
        """Rounds numbers that a layer stores in its dtype: inputs, states and saved tensors."""
        return values

    def computed(self, values):
        """Rounds intermediate results, which a layer keeps in the precision of its sums."""
        return values

    def sums(self, values, squares, count):
        """Rounds sums of `count` terms. `squares()` returns the sums of the squared terms."""
        return values


class Nudges(Rounding):
    """Moves each number up or down at random, by about the largest error that rounding causes.

    A number moves by one unit in the last place. Zeros and infinities do not move. A sum of K terms
    moves by `sum_eps / 2 * sqrt(K / 2)` times the root of the sum of its squared terms. This is
    about the error of adding the terms one by one, because the partial sums have K / 2 terms on
    average. Splitting a sum into lanes, chains or trees makes the partial sums smaller, and so the
    error is smaller, too.

    Args:
        eps: The machine epsilon of the layer's dtype.
        tiny: The smallest normal number of the layer's dtype. Smaller numbers all have the same
            unit in the last place.
        sum_eps: The machine epsilon of the dtype in which sums are computed.
        seed: The seed of the random directions.
    """

    def __init__(self, eps, tiny, sum_eps, seed):
        self.eps, self.tiny, self.sum_eps = eps, tiny, sum_eps
        self.generator = np.random.default_rng(seed)

    def _signs(self, values):
        return 2 * self.generator.integers(2, size=values.shape) - 1

    def _moved(self, values, eps):
        moving = np.isfinite(values) & (values != 0)
        last_place = eps * np.maximum(np.abs(values), self.tiny)
        return values + np.where(moving, last_place, 0) * self._signs(values)

    def numbers(self, values):
        return self._moved(values, self.eps)

    def computed(self, values):
        return self._moved(values, self.sum_eps)

    def sums(self, values, squares, count):
        squares = squares()
        squares = np.where(np.isfinite(squares), squares, 0)
        return values + self.sum_eps / 2 * np.sqrt(count / 2 * squares) * self._signs(values)


def sigmoid(x):
    """Returns 1 / (1 + exp(-x)), with a small relative error for any x."""
    small = np.exp(-np.abs(x))
    return np.where(x < 0, small, 1) / (1 + small)


class Precise(torch.Tensor):
    """A tensor of long double numbers, stored as the sum of two float64 tensors.

    NumPy runs the operators in `COMPUTES`. Other operators run on each float64 tensor.

    Args:
        high: The numbers in float64.
        low: The rounding errors of `high`, or None if `high` is exact.
        rounding: Rounds the results of operators.
        is_computed: True for intermediate results, which keep the precision of sums.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, high, low, rounding, is_computed=False):
        tensor = torch.Tensor._make_wrapper_subclass(cls, high.shape, dtype=high.dtype)
        tensor.high, tensor.low = high, low
        tensor.rounding, tensor.is_computed = rounding, is_computed
        return tensor

    @classmethod
    def of(cls, array, rounding, is_computed=False):
        """Converts an array to a `Precise` tensor."""
        high, low = array.astype(np.float64), None
        if array.dtype != np.float64:
            low = np.where(np.isfinite(high), array - high, 0).astype(np.float64)
            low = torch.from_numpy(low)
        return cls(torch.from_numpy(high), low, rounding, is_computed)

    @property
    def array(self):
        """The numbers as a NumPy array."""
        high = self.high.numpy()
        return high if self.low is None else high.astype(np.longdouble) + self.low.numpy()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        name, kwargs = operator._opname, kwargs or {}
        listed = args[0] if isinstance(args[0], list | tuple) else args
        tensors = [a for a in listed if isinstance(a, cls)]
        rounding = tensors[0].rounding
        if name in COMPUTES:
            if name == "mm" and not torch.is_grad_enabled():
                # Some kernels round the gradients of pre-activations before multiplying them.
                args = [a.stored() if a.is_computed else a for a in args]
            arrays = [as_array(a) for a in args]
            array = COMPUTES[name](rounding, *arrays, **kwargs)
            result = cls.of(np.asarray(array), rounding, is_computed=True)
            return args[0].copy_(result) if name.endswith("_") else result
        high = operator(*[part_of(a, "high") for a in args], **kwargs)
        low = None
        if tensors[0].low is not None:
            low = operator(*[part_of(a, "low") for a in args], **kwargs)
        if name.endswith("_"):
            return args[0]
        is_computed = any(a.is_computed for a in tensors)
        if isinstance(high, torch.Tensor):
            return cls(high, low, rounding, is_computed)
        lows = [None] * len(high) if low is None else low
        return [cls(*both, rounding, is_computed) for both in zip(high, lows, strict=True)]

    def stored(self):
        """Returns the numbers rounded to the layer's dtype."""
        return Precise.of(self.rounding.numbers(self.array), self.rounding)


def part_of(argument, name):
    """Replaces each tensor in an operator's argument with its `high` or its `low` tensor."""
    if isinstance(argument, list | tuple):
        return [part_of(item, name) for item in argument]
    if isinstance(argument, Precise):
        return getattr(argument, name)
    is_zero = name == "low" and isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return torch.zeros_like(argument) if is_zero else argument


def as_array(argument):
    """Converts a `Precise` tensor to a NumPy array. Returns any other argument unchanged."""
    if isinstance(argument, Precise):
        return argument.array
    return argument.numpy() if isinstance(argument, torch.Tensor) else argument


def _addmm(rounding, bias, a, b):
    return rounding.sums(bias + a @ b, lambda: a**2 @ b**2, a.shape[1])


def _sum(rounding, a, dims=None, keepdim=False, dtype=None):
    dims = None if dims is None else tuple(dims)
    total = np.asarray(a.sum(dims, keepdims=keepdim))
    count = a.size // max(1, total.size)
    return rounding.sums(total, lambda: (a * a).sum(dims, keepdims=keepdim), count)


def _add(rounding, a, b, alpha=1):
    return rounding.computed(a + b if alpha == 1 else a + alpha * b)


def _tanh(rounding, a):
    return rounding.computed(np.tanh(a))


def _relu(rounding, a):
    return np.maximum(a, 0)


def _embedding_gradient(rounding, grad, ids, count, padding_idx, scale_grad_by_freq):
    table = np.zeros((count, grad.shape[-1]), grad.dtype)
    np.add.at(table, ids[ids != padding_idx], grad[ids != padding_idx])
    return table


def _comparison(compare):
    return lambda rounding, a, b: compare(a, b)


def _masked_fill(rounding, a, mask, value):
    return np.where(mask != 0, value, a)


COMPUTES = {
    "add": _add,
    "add_": _add,
    "addmm": _addmm,
    "clamp": lambda rounding, a, low=None, high=None: np.clip(a, low, high),
    "div": lambda rounding, a, b: a / b,
    "embedding_dense_backward": _embedding_gradient,
    "eq": _comparison(np.equal),
    "exp": lambda rounding, a: np.exp(a),
    "ge": _comparison(np.greater_equal),
    "le": _comparison(np.less_equal),
    "logaddexp": lambda rounding, a, b: rounding.computed(np.logaddexp(a, b)),
    "lt": _comparison(np.less),
    "masked_fill": _masked_fill,
    "masked_fill_": _masked_fill,
    "maximum": lambda rounding, a, b: np.maximum(a, b),
    "mm": lambda rounding, a, b: _addmm(rounding, 0, a, b),
    "mul": lambda rounding, a, b: a * b,
    "ne": _comparison(np.not_equal),
    "neg": lambda rounding, a: -a,
    "ones_like": lambda rounding, a, **options: np.ones_like(a),
    "relu": _relu,
    "relu_": _relu,
    "rsub": lambda rounding, a, b: b - a,
    "sigmoid": lambda rounding, a: rounding.computed(sigmoid(a)),
    "sigmoid_backward": lambda rounding, grad, y: rounding.computed(grad * (y * (1 - y))),
    "sub": lambda rounding, a, b: a - b,
    "sum": _sum,
    "tanh": _tanh,
    "tanh_": _tanh,
    "tanh_backward": lambda rounding, grad, y: rounding.computed(grad * (1 - y * y)),
    # The derivative of relu at NaN is 1, as in torch.
    "threshold_backward": lambda rounding, grad, y, _: np.where(y <= 0, 0, grad),
    "where": lambda rounding, condition, a, b: np.where(condition != 0, a, b),
}


def precise(tensor, dtype, rounding=None):
    """Rounds a tensor to `dtype`, and converts it to the higher precision of the oracle."""
    if rounding is None and dtype.itemsize < 8:
        return tensor.to(dtype, copy=True).double()
    array = tensor.to(dtype).double().numpy()
    array = array.astype(np.longdouble if dtype.itemsize == 8 else np.float64)
    rounding = Rounding() if rounding is None else rounding
    return Precise.of(rounding.numbers(array), rounding)


def numbers_of(tensor):
    """Returns the numbers of a tensor as a NumPy array."""
    return tensor.array if isinstance(tensor, Precise) else tensor.detach().numpy()


class Stores:
    """A mixin that rounds the output of every step to the layer's dtype."""

    def _make_step(self, weights):
        step, size = super()._make_step(weights), self.proj_size or self.hidden_size

        def stored(sums, states):
            states = step(sums, states)
            return torch.cat([Store.apply(states[:, :size]), states[:, size:]], 1)

        return stored


class Store(torch.autograd.Function):
    """Rounds numbers to the layer's dtype. Passes their gradient on unrounded."""

    @staticmethod
    def forward(_, values):
        return values.stored()

    @staticmethod
    def backward(_, grad):
        return grad


def layer_like(module, weights, *mixins):
    """Returns a plain-loop layer with the options of `module` (torch's or fused) and `weights`."""
    plain_class = plain(kind_of(module).classes[0])
    layer = copy.copy(module)
    layer.__class__ = type("Oracle", (*mixins, plain_class), {})
    layer._parameters = dict(zip(module._parameters, weights, strict=True))
    return layer


def stored_for_backward():
    """Returns a context manager that makes autograd round saved tensors to the layer's dtype."""

    def pack(tensor):
        is_computed = isinstance(tensor, Precise) and tensor.is_computed
        return tensor.stored() if is_computed else tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


class NotesKinks:
    """A mixin that records whether float32 rounding may flip the sign of a relu's argument.

    Let r be the root of the sum of the argument's squared terms. The sign may flip if the argument
    is at most 8 * eps * r. If r is subnormal, because states decay without input, the smallest
    normal number replaces r. An argument of exactly zero is assumed to be a sum of zeros, which
    rounding does not change.
    """

    near_a_kink = False

    def _sums(self, x, weights):
        biases = [weights[name] for name in ("bias_ih", "bias_hh") if name in weights]
        squares = x**2 @ weights["weight_ih"].T ** 2 + sum(b**2 for b in biases)
        return torch.cat([super()._sums(x, weights), squares], -1)

    def _make_step(self, weights):
        step, precision = super()._make_step(weights), torch.finfo(torch.float32)
        # In a leaky cell, the argument of relu is share * sums + (1 - share) * c + noise.
        share = weights["rate"].sigmoid() if "rate" in weights else 1
        with_tanh = self._cell.make_step(weights, nonlinearity="tanh", in_place=False)

        def noting(sums, states):
            sums, squares, *noise = sums.split(self.hidden_size, -1)
            h, *others = states.split(self.hidden_size, -1)
            terms = [*((1 - share) * state for state in others), *noise]
            squares = share**2 * (squares + h**2 @ weights["weight_hh"].T ** 2)
            squares = squares + sum(term**2 for term in terms)
            sums = torch.cat([sums, *noise], -1)
            z = with_tanh(sums, states)[:, : self.hidden_size].atanh()
            smallest = 8 * precision.eps * squares.sqrt().clamp(min=precision.tiny)
            near = (z.abs() <= smallest) & z.isfinite() & (z != 0)
            self.near_a_kink |= bool(near.any())
            return step(sums, states)

        return noting
