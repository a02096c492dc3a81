"""Trains with differential privacy: Opacus clips the gradient of each sample and adds noise.

    python examples/privacy.py

The script computes per-sample gradients with `torch.func.vmap` over `torch.func.grad`, as Opacus
does, and checks them against a loop over samples. After training it prints the accuracy and the
spent privacy budget according to Opacus. It takes a few seconds. If you release a model, train it
with Opacus' `secure_mode`. Install Opacus with `pip install "namernn_fast[examples]"`.
"""

try:
    from opacus import PrivacyEngine
except ModuleNotFoundError as error:
    advice = "run: pip install 'namernn_fast[examples]'"
    raise SystemExit(f"{error.name} is not installed; {advice}") from error

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from namernn_fast import FusedRNN

SAMPLES, STEPS, HIDDEN, DELTA = 2048, 9, 16, 1e-4


class LastState(FusedRNN):
    """A layer with one input tensor and one output tensor, as the hooks of Opacus require.

    The hooks would silently drop `lengths`, so gradients would be wrong. `grad_sample_mode="ew"`
    also works with a plain `FusedRNN`, but runs the operators of `nn.RNN`.
    """

    def forward(self, x):
        return self.last_state(x)[-1]


def loss_of(model, parameters, x, label):
    """Returns the loss of one sample of shape (STEPS, 1)."""
    scores = functional_call(model, parameters, x[None])
    return nn.functional.cross_entropy(scores, label[None])


def gradients_of_samples(model, x, labels):
    """Returns the per-sample gradients of each parameter, computed by vmap and by a loop."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    by_vmap = vmap(grad(loss_of, argnums=1), (None, None, 0, 0))(model, parameters, x, labels)
    by_loop = []
    for one_x, label in zip(x, labels, strict=True):
        loss = loss_of(model, dict(model.named_parameters()), one_x, label)
        by_loop.append(torch.autograd.grad(loss, list(model.parameters())))
    return list(by_vmap.values()), [torch.stack(parts) for parts in zip(*by_loop, strict=True)]


def main():
    """Compares the gradients, and trains the model."""
    torch.set_num_threads(1)  # more threads do not help in a model this small
    torch.manual_seed(0)
    x = torch.randint(2, (2 * SAMPLES, STEPS, 1)) * 2.0 - 1.0
    labels = (x.sum((1, 2)) > 0).long()  # 1 if the values 1 outnumber the values -1
    model = nn.Sequential(LastState(1, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 2))
    by_vmap, by_loop = gradients_of_samples(model, x[:32], labels[:32])
    torch.testing.assert_close(by_vmap, by_loop)
    print("gradients of 32 samples: vmap and a loop agree")

    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        data_loader=DataLoader(TensorDataset(x[:SAMPLES], labels[:SAMPLES]), batch_size=64),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    nn.functional.cross_entropy(model(x[:32]), labels[:32]).backward()
    torch.testing.assert_close([p.grad_sample for p in model.parameters()], by_loop)
    print("gradients of 32 samples: Opacus and a loop agree")
    optimizer.zero_grad()

    for _ in range(4):
        for batch, answers in loader:
            nn.functional.cross_entropy(model(batch), answers).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        right = (model(x[SAMPLES:]).argmax(1) == labels[SAMPLES:]).double().mean()
    print(f"accuracy on other samples: {right:.3f}")
    print(f"privacy spent: epsilon {engine.get_epsilon(DELTA):.2f} at delta {DELTA}")


if __name__ == "__main__":
    main()
