"""A pretrained model with one of the inputs that its package gives it."""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from namernn_fast import prepare_rnn, replace_rnn
from namernn_fast.bench.race import timed
from namernn_fast.testing import BudgetError, max_error

TORCH, FUSED, PREPARED, STREAM, INT8 = "torch", "fused", "prepared", "stream", "int8"
TOLERANCE = 1e-4
"""The largest difference in float32, as a fraction of the largest score."""


@dataclass(frozen=True)
class Case:
    """A model with one of its inputs: a row of the table.

    Attributes:
        name: What is computed.
        layer: The recurrent layer.
        shape: The shape of the layer's input.
        module: The model with torch's recurrent layers, in eval mode.
        run: Computes the model's scores; the module may have other recurrent layers.
        decide: Returns what a user reads off the scores: labels, or yes and no; None for a layer
            in the middle of a model.
        stream: Like `run`, with streams of the module's prepared layers, if the model runs step by
            step.
    """

    name: str
    layer: str
    shape: str
    module: nn.Module
    run: Callable[[nn.Module], Tensor]
    decide: Callable[[Tensor], Tensor] | None = None
    stream: Callable[[nn.Module], Tensor] | None = None

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        """Returns the calls by name; int8 only if it rounds a layer of the model."""
        modules = {TORCH: self.module, FUSED: replace_rnn(copy.deepcopy(self.module))}
        modules[PREPARED] = prepare_rnn(copy.deepcopy(modules[FUSED]))
        rounded = prepare_rnn(copy.deepcopy(modules[FUSED]), torch.int8)
        if any(getattr(module, "dtype", None) == torch.int8 for module in rounded.modules()):
            modules[INT8] = rounded
        found = {name: lambda module=module: self.run(module) for name, module in modules.items()}
        if self.stream is not None:
            stream, prepared = self.stream, modules[PREPARED]
            found[STREAM] = lambda: stream(prepared)
        return found

    def share(self) -> float:
        """Returns the share of the time of a call that torch's recurrent layers take."""
        inside, started = 0.0, 0.0

        def enter(*_: object) -> None:
            nonlocal started
            started = time.perf_counter()

        def leave(*_: object) -> None:
            nonlocal inside
            inside += time.perf_counter() - started

        layers = [m for m in self.module.modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)]
        hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
        hooks += [layer.register_forward_hook(leave) for layer in layers]
        whole = timed(lambda: self.run(self.module))
        for hook in hooks:
            hook.remove()
        return inside / whole

    def changed(self, calls: dict[str, Callable[[], Tensor]]) -> dict[str, int]:
        """Returns the number of decisions, and how many torch's layer takes differently, by call.

        Raises:
            BudgetError: scores differ by more than TOLERANCE; those of int8 may.
        """
        scores = {name: call() for name, call in calls.items()}
        theirs = scores.pop(TORCH)
        limit = TOLERANCE * float(theirs.abs().max())
        for name, ours in scores.items():
            error = max_error(ours, theirs)
            if name != INT8 and not error <= limit:
                raise BudgetError(f"{name}: scores differ by {error:.2g}, more than {limit:.2g}")
        if self.decide is None:
            return {}
        expected = self.decide(theirs)
        counts = {name: int((self.decide(s) != expected).sum()) for name, s in scores.items()}
        return {"of": expected.numel()} | counts


class Package(NamedTuple):
    """A package on the index whose wheel contains weights."""

    name: str
    licence: str
    cases: Callable[[], Iterable[Case]]
    """Reads the weights from the unpacked wheel."""


def best_of(scores: Tensor) -> Tensor:
    """Returns the label with the largest score, in the last dimension."""
    return scores.argmax(-1)


def above_half(scores: Tensor) -> Tensor:
    """Returns whether each probability is above one half."""
    return scores > 0.5


def load(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Loads the weights of a module, which may come with others, and returns it in eval mode."""
    names = module.state_dict().keys()
    module.load_state_dict({name: weights[name] for name in names})
    return module.eval()
