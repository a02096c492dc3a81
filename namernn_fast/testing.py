"""The error budget: how far a result may deviate from the result of a more precise oracle.

A fused kernel sums in a different order than `torch.nn.RNN`, so their bits differ, and a fixed
tolerance is too loose for short sequences and too tight for long ones. Instead, the budget requires
that the fused result is about as accurate as the result of `torch.nn.RNN`. The error of a result is
its largest absolute distance from an oracle that computes in higher precision:

    err(ours) <= 2 * max(err(nn.RNN), c * eps * max|ref|) + eps * max|ref|

`eps` is the unit in the last place of 1 in the dtype of the results, and `ref` the oracle's result.
If torch's settings allow products of float32 numbers in lower precision, `eps` is the unit in the
last place of the numbers that are multiplied: 2^-7 for `medium`, 2^-15 for `high`.
The error of `nn.RNN` depends on luck and on the summation order of this machine's BLAS, so it
counts as at least `c` units in the last place of the largest value: 16 in float32 and float64, and
1.5 in 16 bits and in lower precision. So a correct result stays within its budget even if `nn.RNN`
is exact, unless the terms of its sums nearly cancel in all elements. If they do, compare several
draws of the result under one name.

`assert_within_budget` makes a single comparison; an `ErrorBudget` collects the errors of many.
`check_cell` compares the layer of a cell that you wrote with its function.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from .nn.states import states_in

if TYPE_CHECKING:
    import numpy as np

    from .nn import RecurrentCell

__all__ = ["BudgetError", "ErrorBudget", "assert_within_budget", "check_cell", "max_error"]

# `c` by the size of the dtype in bytes. Correct results are off by up to 8 units in the last place
# of the largest value in float32 (over 700 steps), and by up to 1.3 in 16 bits. A single fault
# causes errors of at least 50 units in float32 (a tanh that is off by 1e-5, a product rounded to 16
# bits) and of 10 units in 16 bits (a lost term).
_UNITS = {8: 16.0, 4: 16.0, 2: 1.5}
NEARBY = 4
"""The number of perturbed copies of its arguments with which `check_cell` runs the oracle."""
Precision: TypeAlias = Literal["highest", "high", "medium"]
"""The precision of float32 products, as `torch.set_float32_matmul_precision` names it."""
# `eps` of a float32 number rounded to bfloat16, and to the sum of two bfloat16 numbers.
_LOWER_EPS = {"medium": 2.0**-7, "high": 2.0**-15}


class BudgetError(AssertionError):
    """A result is further from the oracle than its error budget allows."""


@dataclass
class _Extremes:
    """The largest absolute errors and the largest value in all draws of one named result."""

    ours: float = 0.0
    theirs: float = 0.0
    reference: float = 0.0
    nearby: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    """The largest distance that each sample of perturbed inputs caused; see `add_nearby`."""


class ErrorBudget:
    """Collects the errors of named results and checks the error budget of each name.

    The budget of a name is `err(ours) <= 2 * max(err(nn.RNN), c * eps * max|ref|) + eps * max|ref|`
    with c = 16, or 1.5 for 16-bit types. All draws of one name count as one tensor.

    Args:
        dtype: The floating-point type of the results, which determines `eps`. For results below the
            smallest normal number of `dtype`, the unit in the last place of that number applies.
        floor: An absolute error that is always allowed.
        units: The value of `c`; default: 16, or 1.5 for 16-bit types and in lower precision.
        precision: The precision of float32 products, which other dtypes ignore.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        floor: float = 0.0,
        units: float | None = None,
        precision: Precision = "highest",
    ):
        lower = dtype == torch.float32 and precision != "highest"
        default_units = _UNITS[2 if lower else dtype.itemsize]
        self.units = default_units if units is None else units
        self.eps: float = _LOWER_EPS[precision] if lower else torch.finfo(dtype).eps
        self.tiny: float = torch.finfo(dtype).tiny
        self.floor = floor
        self.results: dict[Hashable, _Extremes] = defaultdict(_Extremes)

    def add(
        self, name: Hashable, ours: Tensor, theirs: Tensor, reference: Tensor | np.ndarray
    ) -> None:
        """Adds one draw of the result `name`.

        Args:
            name: The result that the draw belongs to.
            ours, theirs: The result under test and the result of `nn.RNN`.
            reference: The oracle's result, in higher precision than `dtype`: a tensor, or a NumPy
                array if float64 is not precise enough.

        Raises:
            BudgetError: if the shapes differ, or if there is a NaN in a result.
        """
        seen = self.results[name]
        try:
            seen.ours = max(seen.ours, max_error(ours, reference))
            seen.theirs = max(seen.theirs, max_error(theirs, reference))
        except BudgetError as error:
            raise BudgetError(f"{name}: {error}") from None
        seen.reference = max(seen.reference, _largest(reference))

    def add_nearby(
        self,
        name: Hashable,
        sample: int,
        nearby: Tensor | np.ndarray,
        reference: Tensor | np.ndarray,
    ) -> None:
        """Adds one draw of the oracle's result for randomly perturbed inputs.

        Use this for cases that amplify rounding, such as the derivatives of saturated units. The
        error of `nn.RNN` then counts as at least the root mean square, over samples, of each
        sample's largest distance from the oracle. A single sample's distance depends on luck.
        """
        distances = self.results[name].nearby
        distances[sample] = max(distances[sample], _largest(nearby - reference))

    def exceeded(self) -> list[str]:
        """Returns a sentence for each name whose error exceeds its budget."""
        return [
            f"{name}: error {seen.ours:.3g} exceeds its budget {self.allowed(name):.3g}"
            for name, seen in self.results.items()
            if not seen.ours <= self.allowed(name)
        ]

    def check(self) -> None:
        """Raises `BudgetError` if an error exceeds its budget, or if no results were added."""
        if not self.results:
            raise BudgetError("no results were compared")
        if exceeded := self.exceeded():
            raise BudgetError("; ".join(exceeded))

    def allowed(self, name: Hashable) -> float:
        """Returns the largest error that the budget of `name` allows."""
        seen = self.results[name]
        squares = [distance * distance for distance in seen.nearby.values()]
        nudged = math.sqrt(statistics.fmean(squares or [0.0]))
        last_place = self.eps * max(seen.reference, self.tiny)
        return 2 * max(seen.theirs, nudged, self.units * last_place) + last_place + self.floor


def assert_within_budget(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    precision: Precision = "highest",
    nearby: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Checks the error budget of named results, with one draw for each name.

    Args:
        ours, theirs: The results under test and the results of `nn.RNN`, in one dtype.
        reference: The oracle's results, in higher precision than that dtype.
        precision: The precision of float32 products, which other dtypes ignore.
        nearby: The oracle's results for arguments with rounding errors, as in `add_nearby`.

    Raises:
        BudgetError: if an error exceeds its budget, or if names or shapes differ.

    Example:
        >>> x = torch.linspace(-3, 3, 7)
        >>> exact = {"tanh": x.double().tanh()}
        >>> assert_within_budget({"tanh": x.tanh()}, {"tanh": x.tanh()}, exact)
        >>> assert_within_budget({"tanh": x.tanh() + 0.25}, {"tanh": x.tanh()}, exact)
        Traceback (most recent call last):
        namernn_fast.testing.BudgetError: tanh: error 0.25 exceeds its budget ...
    """
    if not ours.keys() == theirs.keys() == reference.keys():
        raise BudgetError(f"expected results {[*reference]}, got {[*ours]} and {[*theirs]}")
    budget = ErrorBudget(next(iter(theirs.values())).dtype, precision=precision)
    for name, exact in reference.items():
        budget.add(name, ours[name], theirs[name], exact)
        for sample, results in enumerate(nearby):
            budget.add_nearby(name, sample, results[name], exact)
    budget.check()


def check_cell(
    cell: RecurrentCell, *, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> None:
    """Checks the error budget of a cell's layer, compared with a loop over the cell's function.

    Compares output, last states and the gradients of all arguments and parameters, for layers of
    several sizes with random parameters and inputs. The oracle runs the loop in float64.

    Args:
        cell: The cell, from `recurrent_cell`.
        dtype: The dtype of the layers: float32, bfloat16 or float16.
        seed: The seed of the random numbers.
        options: More arguments of `cell.layer`, such as initial values of parameters. A parameter
            without initial values is drawn around 0, and inputs from a normal distribution.

    Raises:
        BudgetError: if the layer is less accurate than its budget allows. At points where the
            function has no derivative, such as the kink of relu, the gradients may also differ
            because of rounding: try another seed.
        ValueError: if dtype is not one of the above.

    Example:
        >>> from namernn_fast import recurrent_cell
        >>> @recurrent_cell(gates=2)
        ... def minimal_gated(x, u, h):
        ...     f = torch.sigmoid(x[0] + u[0])
        ...     return h + f * (torch.tanh(x[1] + f * u[1]) - h)
        >>> check_cell(minimal_gated)
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    generator = torch.Generator().manual_seed(seed)
    budget = ErrorBudget(dtype)
    with torch.random.fork_rng(devices=[]):  # the modules draw their parameters from this generator
        torch.manual_seed(seed)
        _add_results(cell, budget, dtype, generator, options)
    budget.check()


def _add_results(
    cell: RecurrentCell,
    budget: ErrorBudget,
    dtype: torch.dtype,
    generator: torch.Generator,
    options: dict[str, Any],
) -> None:
    """Adds the results of layers of several sizes to the budget. The arguments are as above."""
    for features, hidden, steps, batch, layers in ((3, 6, 9, 4, 1), (8, 36, 12, 5, 2)):
        sizes, both = (features, hidden, layers), options | {"bidirectional": layers > 1}
        exact = cell.loop(*sizes, **both, dtype=torch.float64)
        for parameter in exact.parameters():
            noise = torch.rand(parameter.shape, dtype=torch.float64, generator=generator) - 0.5
            parameter.data += noise * hidden**-0.5
            parameter.data = parameter.to(dtype).double()  # all layers have the same parameters
        models = (
            exact,
            cell.loop(*sizes, **both, dtype=dtype),
            cell.layer(*sizes, **both, dtype=dtype),
        )
        for model in models[1:]:
            model.load_state_dict(exact.state_dict())
        described, parts = exact._cell, len(exact._all_weights)
        shapes = [(steps, batch, features), *[(parts, batch, hidden)] * len(described.states)]
        shapes += [(steps, batch, i.features(hidden) * parts) for i in described.inputs]
        drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        results = [_results(model, drawn) for model in models]
        for name, reference in results[0].items():
            _, theirs, ours = (found[name] for found in results)
            budget.add(name, ours, theirs, reference)
        # Norms and long sequences amplify rounding: measure how much, with values that are off by
        # one unit in the last place.
        for sample in range(NEARBY):
            found = _results(*nudged(exact, drawn, dtype, generator))
            for name, reference in results[0].items():
                budget.add_nearby(name, sample, found[name], reference)


def nudged(
    model: torch.nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Any, list[Tensor]]:
    """Returns copies of an oracle and its inputs, each value off by one unit in the last place.

    Args:
        model: An oracle in float64.
        inputs: Its inputs.
        dtype: The dtype of the results under test.
        generator: Draws the signs of the errors.
    """

    def nudge(values: Tensor) -> Tensor:
        signs = 2 * torch.randint(2, values.shape, generator=generator) - 1
        return values.double() * (1 + signs * torch.finfo(dtype).eps)

    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = nudge(parameter.data)
    return model, [*map(nudge, inputs)]


def _results(model: Any, drawn: list[Tensor]) -> dict[str, Tensor]:
    """Returns the results and the gradients of a layer, by name."""
    dtype = next(model.parameters()).dtype
    cell = model._cell
    x, *rest = (tensor.to(dtype).requires_grad_() for tensor in drawn)
    states, beside = rest[: len(cell.states)], rest[len(cell.states) :]
    hx: Any = tuple(states) if len(states) > 1 else states[0]
    output, last = model(x, hx, **dict(zip(cell.input_names, beside, strict=True)))
    names = [f"last {state.name}" for state in cell.states]
    found = {"output": output} | dict(zip(names, states_in(last), strict=True))
    # Different weights for all elements, the same in each layer.
    weights = [torch.linspace(-1, 1, r.numel()).view(r.shape).to(dtype) for r in found.values()]
    leaves = {"input": x} | {f"hx[{i}]": state for i, state in enumerate(states)}
    leaves |= dict(zip(cell.input_names, beside, strict=True)) | dict(model.named_parameters())
    grads = torch.autograd.grad([*found.values()], [*leaves.values()], weights, allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: value.detach() for name, value in found.items()}


def max_error(actual: Tensor, reference: Tensor | np.ndarray) -> float:
    """Returns the largest absolute distance of `actual` from `reference`.

    Raises:
        BudgetError: if the shapes differ, or if there is a NaN in `actual` or `reference`.
    """
    if actual.shape != reference.shape:
        raise BudgetError(f"expected shape {tuple(reference.shape)}, got {tuple(actual.shape)}")
    # float32 represents every value of the 16-bit types, and NumPy has no bfloat16.
    actual = actual.detach().to("cpu", torch.promote_types(actual.dtype, torch.float32))
    if isinstance(reference, Tensor):
        error = _largest(actual.to(reference.dtype) - reference.detach().cpu())
    else:
        error = _largest(actual.numpy().astype(reference.dtype) - reference)
    if math.isnan(error):
        raise BudgetError("NaN in a result or in its reference")
    return error


def _largest(values: Tensor | np.ndarray) -> float:
    """Returns the largest absolute value, NaN if any value is NaN, and 0 for no values."""
    if isinstance(values, Tensor):
        return float(values.detach().abs().max()) if values.numel() else 0.0
    return float(abs(values).max(initial=0))
