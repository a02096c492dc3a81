"""Tests that Opacus computes per-sample gradients of a model with `torch.nn.RNN`.

Opacus' own tests use `torch.nn.RNN` only as a reference for Opacus' `DPRNN`. `run.py` runs this
file with torch's own class, and again with the fused class under the name `torch.nn.RNN`.
"""

import pytest
import torch
from opacus import PrivacyEngine
from opacus.layers import DPRNN
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

X = torch.randn(8, 6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 2


class Classifier(nn.Module):
    """Classifies a sequence by the last state of a recurrent layer."""

    def __init__(self, layers=1, bidirectional=False):
        super().__init__()
        self.rnn = nn.RNN(3, 4, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(4 * (1 + bidirectional), 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@pytest.fixture(params=[{}, {"layers": 2, "bidirectional": True}], ids=["one", "two-bidirectional"])
def model(request):
    torch.manual_seed(0)
    return Classifier(**request.param)


def test_the_opacus_validator_accepts_the_model(model):
    assert not ModuleValidator.validate(model)


def test_per_sample_gradients_match_the_gradients_of_each_sample(model):
    """Compares Opacus' per-sample gradients with gradients of each sample's loss.

    Only Opacus' mode `ew` supports layers that return a tuple.
    """
    engine = PrivacyEngine()
    private, optimizer, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(X, Y), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="ew",
        loss_reduction="sum",
    )
    loss = nn.CrossEntropyLoss(reduction="sum")
    loss(private(X), Y).backward()
    per_sample = [parameter.grad_sample for parameter in model.parameters()]
    optimizer.step()

    torch.manual_seed(0)
    plain = Classifier(model.rnn.num_layers, model.rnn.bidirectional)
    for sample in range(len(X)):
        losses = loss(plain(X[sample : sample + 1]), Y[sample : sample + 1])
        expected = torch.autograd.grad(losses, list(plain.parameters()))
        torch.testing.assert_close([part[sample] for part in per_sample], list(expected))


def test_dprnn_with_the_weights_of_the_layer_matches_the_layer(model):
    """A `DPRNN` with the parameters of `torch.nn.RNN` returns the same results."""
    rnn = model.rnn
    private = DPRNN(3, 4, rnn.num_layers, batch_first=True, bidirectional=rnn.bidirectional)
    private.load_state_dict(rnn.state_dict())
    torch.testing.assert_close(private(X), rnn(X))
