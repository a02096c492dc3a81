"""Tests Captum's methods on recurrent classifiers, which Captum's own tests do not cover.

`run.py` runs this file twice: with torch's own `torch.nn.RNN`, and with the fused class bound to
that name. Each test checks what a method's documentation promises, or that its results are finite.
"""

import captum.attr as attr
import pytest
import torch
from captum.concept import TCAV, Concept
from captum.influence import NaiveInfluenceFunction, TracInCP, TracInCPFast
from torch import nn


class States(nn.Module):
    """A recurrent layer that returns only its output.

    Captum's layer methods need the batch dimension first, but h_n has it second.
    """

    def __init__(self, nonlinearity, layers, bidirectional):
        super().__init__()
        self.rnn = nn.RNN(5, 4, layers, nonlinearity, bidirectional=bidirectional, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class Classifier(nn.Module):
    """Classifies a sequence by the mean output of a recurrent layer."""

    def __init__(self, nonlinearity="tanh", layers=1, bidirectional=False):
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.states = States(nonlinearity, layers, bidirectional)
        self.head = nn.Linear(4 * (1 + bidirectional), 2)

    def forward(self, x):
        return self.head(self.states(self.embed(x)).mean(1))


CLASSIFIERS = [{}, {"nonlinearity": "relu"}, {"layers": 2, "bidirectional": True}]


@pytest.fixture(params=CLASSIFIERS, ids=["tanh", "relu", "two-layers-bidirectional"])
def model(request):
    torch.manual_seed(0)
    return Classifier(**request.param).eval()


@pytest.fixture
def x():
    return torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))


# Methods that explain the input, each with the arguments that the method needs.
INPUT_METHODS = {
    "DeepLift": {},
    "DeepLiftShap": {"baselines": torch.zeros(3, 6, 3)},
    "Deconvolution": {},
    "FeatureAblation": {},
    "FeaturePermutation": {},
    "GradientShap": {"baselines": torch.zeros(3, 6, 3)},
    "GuidedBackprop": {},
    "InputXGradient": {},
    "IntegratedGradients": {"n_steps": 8},
    "KernelShap": {"n_samples": 10},
    "Lime": {"n_samples": 10},
    "Occlusion": {"sliding_window_shapes": (2, 3)},
    "Saliency": {},
    "ShapleyValueSampling": {"n_samples": 2},
}


@pytest.mark.parametrize("name", INPUT_METHODS)
@pytest.mark.filterwarnings("ignore")
def test_input_attributions_are_finite(name, model, x):
    method = getattr(attr, name)(model)
    x = x[:1] if name in ("KernelShap", "Lime") else x  # KernelShap and Lime take one example
    result = method.attribute(x, target=1, **INPUT_METHODS[name])
    assert result.shape[1:] == x.shape[1:]
    assert result.isfinite().all()


def test_saliency_is_the_absolute_gradient(model, x):
    x = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    torch.testing.assert_close(attr.Saliency(model).attribute(x, target=1), expected.abs())


def test_integrated_gradients_sum_to_the_change_of_the_score(model, x):
    result = attr.IntegratedGradients(model).attribute(x, target=1, n_steps=200)
    change = model(x)[:, 1] - model(torch.zeros_like(x))[:, 1]
    torch.testing.assert_close(result.sum((1, 2)).float(), change, atol=5e-3, rtol=0)


LAYER_METHODS = {
    "InternalInfluence": {"n_steps": 4},
    "LayerActivation": {},
    "LayerConductance": {"n_steps": 4},
    "LayerDeepLift": {},
    "LayerFeatureAblation": {},
    "LayerGradCam": {},
    "LayerGradientShap": {"baselines": torch.zeros(3, 6, 3)},
    "LayerGradientXActivation": {},
    "LayerIntegratedGradients": {"n_steps": 4},
}


@pytest.mark.parametrize("name", LAYER_METHODS)
@pytest.mark.filterwarnings("ignore")
def test_layer_attributions_are_finite(name, model, x):
    method = getattr(attr, name)(model, model.states)
    arguments = dict(LAYER_METHODS[name])
    if name != "LayerActivation":
        arguments["target"] = 1
    result = method.attribute(x, **arguments)
    assert result.shape[:2] == (2, 6) or name == "LayerGradCam"
    assert result.isfinite().all()


def test_layer_activation_returns_the_results_of_the_layer(model, x):
    rnn = model.states.rnn
    shown = attr.LayerActivation(model, rnn).attribute(x)
    torch.testing.assert_close(shown, rnn(model.embed(x)))


@pytest.mark.parametrize("name", ["NeuronGradient", "NeuronDeepLift", "NeuronFeatureAblation"])
@pytest.mark.filterwarnings("ignore")
def test_neuron_attributions_have_the_shape_of_the_input(name, model, x):
    method = getattr(attr, name)(model, model.embed)
    assert method.attribute(x, neuron_selector=(2, 3)).shape == x.shape


def test_noise_tunnels_keep_the_shape_of_the_input(model, x):
    tunnel = attr.NoiseTunnel(attr.Saliency(model))
    assert tunnel.attribute(x, nt_samples=3, target=1).shape == x.shape


@pytest.fixture
def influence(model, tmp_path):
    """Saves a checkpoint, and returns the arguments that all influence methods share."""
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")

    def load(module, path):
        module.load_state_dict(torch.load(path))
        return 1.0

    generator = torch.Generator().manual_seed(2)
    examples = torch.randn(8, 6, 3, generator=generator), torch.arange(8) % 2
    return {
        "train_dataset": torch.utils.data.TensorDataset(*examples),
        "checkpoints_load_func": load,
        "loss_fn": nn.CrossEntropyLoss(reduction="none"),
        "batch_size": 4,
    }


@pytest.mark.parametrize("method", [TracInCP, TracInCPFast])
def test_influences_by_gradients_are_finite(method, model, x, influence, tmp_path):
    influence["checkpoints"] = [str(tmp_path / "checkpoint.pt")]
    if method is TracInCPFast:
        influence["final_fc_layer"] = model.head
        influence["loss_fn"] = nn.CrossEntropyLoss(reduction="sum")
    scores = method(model, **influence).influence((x, torch.tensor([0, 1])))
    assert scores.shape == (2, 8)
    assert scores.isfinite().all()


def test_influences_by_second_derivatives_are_finite(model, x, influence, tmp_path):
    influence["checkpoint"] = str(tmp_path / "checkpoint.pt")
    tracing = NaiveInfluenceFunction(model, **influence, show_progress=False)
    scores = tracing.influence((x, torch.tensor([0, 1])))
    assert scores.shape == (2, 8)
    assert scores.isfinite().all()


def test_concept_scores_are_finite(model, x, tmp_path):
    loaders = [torch.utils.data.DataLoader(torch.randn(12, 6, 3) + k, batch_size=4) for k in (0, 1)]
    concepts = [Concept(k, f"concept {k}", loader) for k, loader in enumerate(loaders)]
    tcav = TCAV(model, ["embed"], save_path=str(tmp_path))
    (scores,) = tcav.interpret(x, [concepts], target=1).values()
    assert scores["embed"]["sign_count"].isfinite().all()
