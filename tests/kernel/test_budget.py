"""Tests that the error budget accepts correct results and rejects results with a planted fault."""

import functools

import pytest
import torch
from cases import CELLS, DTYPES, FUSED, TORCH, Case
from kinds import KINDS, tensors_in
from torch.nn.functional import pad

from namernn_fast.testing import BudgetError, ErrorBudget

# (input_size, hidden_size, seq_len, batch)
SHAPES = [(16, 48, 5, 1), (64, 64, 8, 16), (20, 33, 5, 70), (8, 24, 100, 2)]


@pytest.mark.covering(2)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_correct_results_meet_the_budget_if_the_baseline_is_exact(cell, shape, dtype, num_layers):
    budget = ErrorBudget(dtype)
    for seed in range(2):
        options = {"num_layers": num_layers, "bias": seed > 0}
        case = Case(*shape, options, seed=seed, cell=cell)
        ours = case.run(FUSED[cell], dtype)
        for name, exact in case.run_oracle(dtype).items():
            budget.add(name, ours[name], torch.from_numpy(exact.astype(float)).to(dtype), exact)
    budget.check()


class Faulty:
    """A layer that computes in float64 and rounds only its results. Each subclass adds a fault.

    `faulty` combines this class with torch's layer. A cell's states are concatenated: [h, c].
    """

    def forward(self, x, hx):
        size = self.hidden_size
        self.weights = [p.double() for p in self.parameters()]
        self.states = [torch.cat([h[0].double() for h in tensors_in(hx)], 1)]
        for t, x_t in enumerate(x.double()):
            previous = self.states[-1]
            sums = self.sums(t, x_t, previous[:, :size])
            self.states.append(self.state(t, *sums, previous))
        states = torch.stack(self.states[1:]).to(x.dtype)
        last = states[-1:].split(size, -1)
        return states[..., :size], last if isinstance(hx, tuple) else last[0]

    def sums(self, t, x, h):
        """Returns the input and recurrent terms of the pre-activations."""
        weight_ih, weight_hh, bias_ih, bias_hh = self.weights[:4]
        return x @ weight_ih.T + bias_ih, h @ weight_hh.T + bias_hh

    def state(self, t, x_sums, h_sums, h):
        if self.mode == "LSTM":
            i, f, g, o = (x_sums + h_sums).chunk(4, 1)
            i, f, o = (self.activation(torch.sigmoid, gate) for gate in (i, f, o))
            c = f * h.chunk(2, 1)[1] + i * self.activation(torch.tanh, g)
            return torch.cat([o * self.activation(torch.tanh, c), c], 1)
        if len(self.weights) > 4:
            a = torch.sigmoid(self.weights[4])
            v = (1 - a) * h.chunk(2, 1)[1] + a * (x_sums + h_sums)
            return torch.cat([self.activation(torch.tanh, v), v], 1)
        if self.mode != "GRU":
            return self.activation(torch.tanh, x_sums + h_sums)
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x_sums.chunk(3, 1), h_sums.chunk(3, 1)
        r = self.activation(torch.sigmoid, x_r + h_r)
        z = self.activation(torch.sigmoid, x_z + h_z)
        n = self.activation(torch.tanh, x_n + r * h_n)
        return n + z * (h - n)

    def activation(self, function, z):
        return function(z)

    def derivative(self, t, x_sums, h_sums):
        """Returns the gradient of the sum of the new states with respect to `h_sums`."""
        h_sums = h_sums.detach().requires_grad_()
        with torch.enable_grad():
            total = self.state(t, x_sums.detach(), h_sums, self.states[-1].detach()).sum()
        return torch.autograd.grad(total, h_sums)[0]


class LostTerm(Faulty):
    """In one step, one pre-activation lacks the product that changes the state the most."""

    def sums(self, t, x, h):
        x_sums, h_sums = super().sums(t, x, h)
        if t != 1:
            return x_sums, h_sums
        terms = h[:, None, :] * self.weights[1]
        effects = (terms * self.derivative(t, x_sums, h_sums)[..., None]).abs()
        return x_sums, h_sums - torch.where(effects == effects.max(), terms, 0).sum(-1)


class LostBias(Faulty):
    """The largest element of the bias (of the last gate's bias, if there are gates) is dropped."""

    def sums(self, t, x, h):
        x_sums, h_sums = super().sums(t, x, h)
        bias = self.weights[2][-self.hidden_size :]
        lost = torch.where(bias.abs() == bias.abs().max(), bias, 0)
        return x_sums - pad(lost, (x_sums.shape[1] - self.hidden_size, 0)), h_sums


class StaleState(Faulty):
    """In one step, one sequence computes its pre-activations from the state of two steps ago."""

    def sums(self, t, x, h):
        if t == 2:
            h = torch.cat([self.states[-2][:1, : self.hidden_size], h[1:]])
        return super().sums(t, x, h)


class RoundedProduct(Faulty):
    """In the last pre-activation of each row, one product is rounded to bfloat16."""

    def sums(self, t, x, h):
        x_sums, h_sums = super().sums(t, x, h)
        products = h[:, :1] * self.weights[1][-1:, 0]
        errors = (products.bfloat16().double() - products).detach()
        return x_sums, h_sums + pad(errors, (h_sums.shape[1] - 1, 0))


class RoundedWeights(Faulty):
    """The recurrent weights are rounded to bfloat16."""

    def sums(self, t, x, h):
        x_sums, h_sums = super().sums(t, x, h)
        errors = (self.weights[1].bfloat16() - self.weights[1]).detach()
        return x_sums, h_sums + h @ errors.T


class Coarse(Faulty):
    """The error of one activation function is up to 64 ulp of 1, or 8 ulp for 16-bit dtypes."""

    def activation(self, function, z):
        h = function(z)
        if function is not self.coarse:
            return h
        eps = torch.finfo(self.weight_hh_l0.dtype).eps
        step = eps * (128 if eps < 1e-6 else 16)
        return h + ((h / step).round() * step - h).detach()


class CoarseTanh(Coarse):
    coarse = torch.tanh


class CoarseSigmoid(Coarse):
    coarse = torch.sigmoid


class LostRow(Faulty):
    """In one step, the row with the largest state adds nothing to the gradient of weight_hh."""

    def sums(self, t, x, h):
        x_sums, h_sums = super().sums(t, x, h)
        if t != 1:
            return x_sums, h_sums
        sizes = h.detach().norm(dim=1, keepdim=True)
        lost = h @ (self.weights[1].detach() - self.weights[1]).T
        return x_sums, h_sums + torch.where(sizes == sizes.max(), lost, 0.0)


class StaleGradient(Faulty):
    """In one step, one sequence's gradient of the pre-activations is the next step's gradient."""

    def sums(self, t, x, h):
        self.kept = {} if t == 0 else self.kept
        both = super().sums(t, x, h)
        for which, sums in enumerate(both):
            if sums.requires_grad and t in (1, 2):
                sums.register_hook(functools.partial(self.exchange, t, which))
        return both

    def exchange(self, t, which, grad):
        if t == 2:
            self.kept[which] = grad[:1]
            return grad
        return torch.cat([self.kept[which], grad[1:]])


class BiasPastReset(Faulty):
    """A GRU's reset gate scales weight_hh @ h but not bias_hh."""

    def state(self, t, x_sums, h_sums, h):
        r = torch.sigmoid((x_sums + h_sums).chunk(3, 1)[0])
        bias = self.weights[3].chunk(3)[2]
        return super().state(t, x_sums + pad(bias - r * bias, (2 * bias.numel(), 0)), h_sums, h)


class StalePart(Faulty):
    """In one step, one sequence's gate carries over the state (an LSTM's c) of two steps ago."""

    def state(self, t, x_sums, h_sums, h):
        if t == 2:
            h = torch.cat([self.states[-2][:1], h[1:]])
        return super().state(t, x_sums, h_sums, h)


class LostPart(Faulty):
    """In one step, one sequence passes no gradient through its gate to the previous h (or c)."""

    def state(self, t, x_sums, h_sums, h):
        if t == 1:
            h = torch.cat([h[:1].detach(), h[1:]])
        return super().state(t, x_sums, h_sums, h)


ANYWHERE = (LostTerm, LostBias, StaleState, CoarseTanh, LostRow, StaleGradient)
WITH_GATES = (CoarseSigmoid, StalePart, LostPart)


def faulty(cell, fault=Faulty):
    """Returns a subclass of torch's layer with the given fault."""
    return type(fault.__name__, (fault, TORCH[cell]), {})


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    ("cell", "shape", "dtype", "fault"),
    [
        (cell, shape, dtype, fault)
        for cell in CELLS
        for shape in [(5, 7, 6, 3), *SHAPES]
        for dtype in DTYPES
        for fault in (
            *ANYWHERE,
            *((RoundedProduct, RoundedWeights) if dtype.itemsize > 2 else ()),
            *(WITH_GATES if KINDS[cell].gates > 1 else ()),
            *([BiasPastReset] if KINDS[cell].cell.separate else ()),
        )
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_every_fault_exceeds_the_error_budget(shape, cell, dtype, fault):
    """The baseline is the layer without the fault, so results do not depend on the machine."""
    case = Case(*shape, cell=cell)
    rounded, faulty_results = (case.run(faulty(cell, base), dtype) for base in (Faulty, fault))
    budget = ErrorBudget(dtype)
    reference = case.run_oracle(dtype)
    for name, exact in reference.items():
        budget.add(name, rounded[name], rounded[name], exact)
    budget.check()
    for name, exact in reference.items():
        budget.add(name, faulty_results[name], rounded[name], exact)
    with pytest.raises(BudgetError, match="exceeds its budget"):
        budget.check()
