"""The error budget: correct results keep it, however a rival rounds, and faulty ones exceed it."""

import functools

import pytest
import torch
from cases import CELLS, FUSED, TORCH, Case
from kinds import KINDS, tensors_in
from torch.nn.functional import pad

from namernn_fast.testing import BudgetError, ErrorBudget

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (D, H, T, B)
SHAPES = [(16, 48, 5, 1), (64, 64, 8, 16), (20, 33, 5, 70), (8, 24, 100, 2)]


@pytest.mark.covering(2)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_rival_that_is_exactly_rounded_fails_no_correct_result(cell, shape, dtype, num_layers):
    budget = ErrorBudget(dtype)
    for seed in range(2):
        options = {"num_layers": num_layers, "bias": seed > 0}
        case = Case(*shape, options, seed=seed, cell=cell)
        ours = case.run(FUSED[cell], dtype)
        for name, exact in case.run_oracle(dtype).items():
            budget.add(name, ours[name], torch.from_numpy(exact.astype(float)).to(dtype), exact)
    budget.check()


class Faulty:
    """One layer in float64, with results rounded once. Each subclass adds one fault.

    A base of a class that inherits from torch's layer, too; see `faulty`. A state of an LSTM is h
    and c side by side.
    """

    def forward(self, x, hx):
        size = self.hidden_size
        self.weights = [p.double() for p in self.parameters()]
        self.states = [torch.cat([h[0].double() for h in tensors_in(hx)], 1)]
        for t, x_t in enumerate(x.double()):
            before = self.states[-1]
            sums = self.sums(t, x_t, before[:, :size])
            self.states.append(self.state(t, *sums, before))
        states = torch.stack(self.states[1:]).to(x.dtype)
        last = states[-1:].split(size, -1)
        return states[..., :size], last if isinstance(hx, tuple) else last[0]

    def sums(self, t, x, h):
        """Returns the sums of the input and those of the state before."""
        weight_ih, weight_hh, bias_ih, bias_hh = self.weights
        return x @ weight_ih.T + bias_ih, h @ weight_hh.T + bias_hh

    def state(self, t, of_x, of_h, h):
        if self.mode == "LSTM":
            i, f, g, o = (of_x + of_h).chunk(4, 1)
            i, f, o = (self.activation(torch.sigmoid, gate) for gate in (i, f, o))
            c = f * h.chunk(2, 1)[1] + i * self.activation(torch.tanh, g)
            return torch.cat([o * self.activation(torch.tanh, c), c], 1)
        if self.mode != "GRU":
            return self.activation(torch.tanh, of_x + of_h)
        (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, 1), of_h.chunk(3, 1)
        r = self.activation(torch.sigmoid, x_r + h_r)
        z = self.activation(torch.sigmoid, x_z + h_z)
        n = self.activation(torch.tanh, x_n + r * h_n)
        return n + z * (h - n)

    def activation(self, function, z):
        return function(z)

    def derivative(self, t, of_x, of_h):
        """Returns how much each sum of the state before changes a state."""
        of_h = of_h.detach().requires_grad_()
        with torch.enable_grad():
            total = self.state(t, of_x.detach(), of_h, self.states[-1].detach()).sum()
        return torch.autograd.grad(total, of_h)[0]


class LostTerm(Faulty):
    """One sum of one step lacks a product: the one with the largest effect on a state."""

    def sums(self, t, x, h):
        of_x, of_h = super().sums(t, x, h)
        if t != 1:
            return of_x, of_h
        terms = h[:, None, :] * self.weights[1]
        felt = (terms * self.derivative(t, of_x, of_h)[..., None]).abs()
        return of_x, of_h - torch.where(felt == felt.max(), terms, 0).sum(-1)


class LostBias(Faulty):
    """One element of a bias is missing: of that of the last gate, if there are gates."""

    def sums(self, t, x, h):
        of_x, of_h = super().sums(t, x, h)
        bias = self.weights[2][-self.hidden_size :]
        lost = torch.where(bias.abs() == bias.abs().max(), bias, 0)
        return of_x - pad(lost, (of_x.shape[1] - self.hidden_size, 0)), of_h


class StaleState(Faulty):
    """One sequence computes the sums of one step from a state that is one step too old."""

    def sums(self, t, x, h):
        if t == 2:
            h = torch.cat([self.states[-2][:1, : self.hidden_size], h[1:]])
        return super().sums(t, x, h)


class RoundedProduct(Faulty):
    """In each of the last sums, one product is rounded to bfloat16."""

    def sums(self, t, x, h):
        of_x, of_h = super().sums(t, x, h)
        products = h[:, :1] * self.weights[1][-1:, 0]
        errors = (products.bfloat16().double() - products).detach()
        return of_x, of_h + pad(errors, (of_h.shape[1] - 1, 0))


class RoundedWeights(Faulty):
    """Recurrent weights are rounded to bfloat16."""

    def sums(self, t, x, h):
        of_x, of_h = super().sums(t, x, h)
        errors = (self.weights[1].bfloat16() - self.weights[1]).detach()
        return of_x, of_h + h @ errors.T


class Coarse(Faulty):
    """One function errs by up to 64 units in the last place of 1, or 8 in 16 bits."""

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
    """The gradient of the recurrent weights lacks a row of one step: that of the largest state."""

    def sums(self, t, x, h):
        of_x, of_h = super().sums(t, x, h)
        if t != 1:
            return of_x, of_h
        sizes = h.detach().norm(dim=1, keepdim=True)
        lost = h @ (self.weights[1].detach() - self.weights[1]).T
        return of_x, of_h + torch.where(sizes == sizes.max(), lost, 0.0)


class StaleGradient(Faulty):
    """In the gradients of one step's sums, one row is that of the next step."""

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
    """The reset gate scales the product with the state before, but not the bias of the sum."""

    def state(self, t, of_x, of_h, h):
        r = torch.sigmoid((of_x + of_h).chunk(3, 1)[0])
        bias = self.weights[3].chunk(3)[2]
        return super().state(t, of_x + pad(bias - r * bias, (2 * bias.numel(), 0)), of_h, h)


class StalePart(Faulty):
    """The gate that keeps a state, or c, keeps one of a sequence that is one step too old."""

    def state(self, t, of_x, of_h, h):
        if t == 2:
            h = torch.cat([self.states[-2][:1], h[1:]])
        return super().state(t, of_x, of_h, h)


class LostPart(Faulty):
    """In one step no gradient flows through the state, or c, that the gate of a sequence keeps."""

    def state(self, t, of_x, of_h, h):
        if t == 1:
            h = torch.cat([h[:1].detach(), h[1:]])
        return super().state(t, of_x, of_h, h)


ANYWHERE = (LostTerm, LostBias, StaleState, CoarseTanh, LostRow, StaleGradient)
WITH_GATES = (CoarseSigmoid, StalePart, LostPart)


def faulty(cell, fault=Faulty):
    """Returns torch's layer with a fault."""
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
            *([BiasPastReset] if KINDS[cell].spec.separate_bias_hh else ()),
        )
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_fault_is_found(shape, cell, dtype, fault):
    """The rival is the layer without a fault, so nothing depends on the machine."""
    case = Case(*shape, cell=cell)
    rounded, faulty_results = (case.run(faulty(cell, of), dtype) for of in (Faulty, fault))
    budget = ErrorBudget(dtype)
    reference = case.run_oracle(dtype)
    for name, exact in reference.items():
        budget.add(name, rounded[name], rounded[name], exact)
    budget.check()
    for name, exact in reference.items():
        budget.add(name, faulty_results[name], rounded[name], exact)
    with pytest.raises(BudgetError, match="exceeds its budget"):
        budget.check()
