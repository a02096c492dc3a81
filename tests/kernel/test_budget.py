"""The error budget: correct results keep it, however a rival rounds, and faulty ones exceed it."""

import pytest
import torch
from cases import Case
from torch.nn.functional import pad

from namernn_fast import FusedRNN
from namernn_fast.testing import BudgetError, ErrorBudget

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (D, H, T, B)
SHAPES = [(16, 48, 5, 1), (64, 64, 8, 16), (20, 33, 5, 70), (8, 24, 100, 2)]


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rival_that_is_exactly_rounded_fails_no_correct_result(shape, dtype, num_layers):
    budget = ErrorBudget(dtype)
    for seed in range(2):
        case = Case(*shape, {"num_layers": num_layers, "bias": seed > 0}, seed=seed)
        ours = case.run(FusedRNN, dtype)
        for name, exact in case.run_oracle(dtype).items():
            budget.add(name, ours[name], torch.from_numpy(exact.astype(float)).to(dtype), exact)
    budget.check()


class Faulty(torch.nn.RNN):
    """One layer in float64, with results rounded once. Each subclass adds one fault."""

    def forward(self, x, hx):
        self.weights = [p.double() for p in self.parameters()]
        self.states = [hx[0].double()]
        for t, x_t in enumerate(x.double()):
            self.states.append(self.activation(self.sums(t, x_t, self.states[-1])))
        output = torch.stack(self.states[1:])
        return output.to(x.dtype), output[-1:].to(x.dtype)

    def sums(self, t, x, h):
        weight_ih, weight_hh, bias_ih, bias_hh = self.weights
        return x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh

    def activation(self, z):
        return z.tanh()


class LostTerm(Faulty):
    """One sum of one step lacks a product: the one with the largest effect on a state."""

    def sums(self, t, x, h):
        z = super().sums(t, x, h)
        if t != 1:
            return z
        terms = h[:, None, :] * self.weights[1]
        felt = (terms * (1 - z.tanh() ** 2)[..., None]).abs()
        return z - torch.where(felt == felt.max(), terms, 0).sum(-1)


class LostBias(Faulty):
    """One element of a bias is missing."""

    def sums(self, t, x, h):
        bias = self.weights[2]
        return super().sums(t, x, h) - torch.where(bias.abs() == bias.abs().max(), bias, 0)


class StaleState(Faulty):
    """One sequence computes one step from a state that is one step too old."""

    def sums(self, t, x, h):
        if t == 2:
            h = torch.cat([self.states[-2][:1], h[1:]])
        return super().sums(t, x, h)


class RoundedProduct(Faulty):
    """In each sum of the first unit, one product is rounded to bfloat16."""

    def sums(self, t, x, h):
        products = h[:, :1] * self.weights[1][:1, 0]
        errors = (products.bfloat16().double() - products).detach()
        return super().sums(t, x, h) + pad(errors, (0, self.hidden_size - 1))


class RoundedWeights(Faulty):
    """Recurrent weights are rounded to bfloat16."""

    def sums(self, t, x, h):
        return super().sums(t, x, h) + h @ (self.weights[1].bfloat16() - self.weights[1]).detach().T


class CoarseTanh(Faulty):
    """The activation errs by up to 64 units in the last place of 1, or 8 in 16 bits."""

    def activation(self, z):
        eps = torch.finfo(self.weight_hh_l0.dtype).eps
        step = eps * (128 if eps < 1e-6 else 16)
        h = z.tanh()
        return h + ((h / step).round() * step - h).detach()


class LostRow(Faulty):
    """The gradient of the recurrent weights lacks one row of one step."""

    def sums(self, t, x, h):
        z = super().sums(t, x, h)
        if t != 1:
            return z
        row = h[:1] @ self.weights[1].T
        lost = h[:1] @ self.weights[1].detach().T - row
        return torch.cat([z[:1] + lost, z[1:]])


class StaleGradient(Faulty):
    """In the gradient of one step's sums, one row is that of the next step."""

    def sums(self, t, x, h):
        z = super().sums(t, x, h)
        if z.requires_grad and t in (1, 2):
            z.register_hook(lambda grad: self.exchange(t, grad))
        return z

    def exchange(self, t, grad):
        if t == 2:
            self.kept = grad[:1]
            return grad
        return torch.cat([self.kept, grad[1:]])


ANYWHERE = (LostTerm, LostBias, StaleState, CoarseTanh, LostRow, StaleGradient)


@pytest.mark.parametrize("shape", [(5, 7, 6, 3), *SHAPES], ids=str)
@pytest.mark.parametrize(
    ("dtype", "fault"),
    [
        (dtype, fault)
        for dtype in DTYPES
        for fault in (*ANYWHERE, *((RoundedProduct, RoundedWeights) if dtype.itemsize > 2 else ()))
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_fault_is_found(shape, dtype, fault):
    """The rival is the layer without a fault, so nothing depends on the machine."""
    case = Case(*shape)
    rounded, faulty = case.run(Faulty, dtype), case.run(fault, dtype)
    budget = ErrorBudget(dtype)
    reference = case.run_oracle(dtype)
    for name, exact in reference.items():
        budget.add(name, rounded[name], rounded[name], exact)
    budget.check()
    for name, exact in reference.items():
        budget.add(name, faulty[name], rounded[name], exact)
    with pytest.raises(BudgetError, match="exceeds its budget"):
        budget.check()
