"""Tests skorch's estimators with a recurrent layer, which skorch's own tests do not cover.

`run.py` runs this file twice: with torch's own `torch.nn.RNN`, and with the fused class bound to
that name.
"""

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import Checkpoint, EarlyStopping, Freezer, GradientNormClipping, LRScheduler
from skorch.helper import SkorchDoctor, SliceDict
from skorch.utils import to_tensor
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 7, 3)).astype("float32")
Y = (X.sum((1, 2)) > 0).astype("int64")
LENGTHS = RNG.integers(1, 8, 40)


class Classifier(nn.Module):
    """Classifies a sequence, which may be padded, by the last state of a recurrent layer."""

    def __init__(self, nonlinearity="tanh", hidden=6, layers=1, dropout=0.0, classes=2):
        super().__init__()
        self.rnn = nn.RNN(3, hidden, layers, nonlinearity, batch_first=True, dropout=dropout)
        self.head = nn.Linear(hidden, classes)

    def forward(self, data, lengths=None):
        if lengths is not None:
            data = pack_padded_sequence(data, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(data)[1][-1])


class Stepper(nn.Module):
    """Classifies a sequence by the last state of an `nn.RNNCell`."""

    def __init__(self, hidden=6):
        super().__init__()
        self.cell = nn.RNNCell(3, hidden)
        self.head = nn.Linear(hidden, 2)

    def forward(self, data):
        state = None
        for row in data.unbind(1):
            state = self.cell(row, state)
        return self.head(state)


def make_net(module=Classifier, **options):
    torch.manual_seed(0)
    defaults = {"criterion": nn.CrossEntropyLoss, "lr": 0.2, "max_epochs": 5, "verbose": 0}
    return NeuralNetClassifier(module, **{**defaults, **options})


@pytest.fixture
def net():
    return make_net().fit(X, Y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"module__nonlinearity": "relu"},
        {"module__layers": 2, "module__dropout": 0.2},
        {"module": Stepper},
        {"optimizer": torch.optim.LBFGS, "lr": 0.1},
        {"optimizer": torch.optim.Adam, "lr": 0.01, "iterator_train__shuffle": True},
    ],
    ids=["tanh", "relu", "layers", "cell", "lbfgs", "adam"],
)
def test_training_lowers_the_loss(options):
    losses = make_net(**{"max_epochs": 10, **options}).fit(X, Y).history[:, "train_loss"]
    assert losses[-1] < losses[0]


def test_padded_sequences_may_have_any_length():
    inputs = SliceDict(data=X, lengths=LENGTHS)
    net = make_net().fit(inputs, Y)
    assert net.predict_proba(inputs).shape == (40, 2)


def test_to_tensor_accepts_a_packed_sequence(net):
    packed = pack_padded_sequence(torch.tensor(X), LENGTHS, batch_first=True, enforce_sorted=False)
    output, _ = net.module_.rnn(to_tensor(packed, device="cpu"))
    assert output.data.shape == (LENGTHS.sum(), 6)


def test_a_regressor_trains_and_predicts():
    torch.manual_seed(0)
    net = NeuralNetRegressor(Classifier, module__classes=1, max_epochs=3, verbose=0)
    net.fit(X, X.sum((1, 2)).reshape(-1, 1))
    assert net.predict(X).shape == (40, 1)


def test_partial_fit_continues_training(net):
    assert len(net.partial_fit(X, Y).history) == 10


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_predict_the_same(net, duplicate):
    np.testing.assert_array_equal(duplicate(net).predict_proba(X), net.predict_proba(X))


@pytest.mark.parametrize("safe", [False, True], ids=["torch", "safetensors"])
def test_saved_parameters_predict_the_same(net, safe, tmp_path):
    files = {"f_params": tmp_path / "parameters", "use_safetensors": safe}
    net.save_params(**files)
    loaded = make_net().initialize()
    loaded.load_params(**files)
    np.testing.assert_array_equal(loaded.predict_proba(X), net.predict_proba(X))


def test_a_clone_trains_the_same(net):
    torch.manual_seed(0)
    other = clone(net).fit(X, Y)
    np.testing.assert_allclose(other.predict_proba(X), net.predict_proba(X), rtol=1e-4)


def test_set_params_rebuilds_the_module(net):
    net.set_params(module__hidden=9)
    assert net.module_.rnn.hidden_size == 9


def test_grid_search_trains_every_candidate():
    grid = {"module__nonlinearity": ["tanh", "relu"], "module__hidden": [4, 8]}
    search = GridSearchCV(make_net(train_split=None), grid, cv=2, error_score="raise")
    assert search.fit(X, Y).best_score_ > 0


def test_cross_validation_predicts_every_sample():
    assert cross_val_predict(make_net(), X, Y, cv=2).shape == (40,)


def test_a_pipeline_trains_and_predicts():
    pipeline = make_pipeline(FunctionTransformer(lambda x: x * 2), make_net())
    assert pipeline.fit(X, Y).predict(X).shape == (40,)


def test_callbacks_do_not_prevent_training(tmp_path):
    callbacks = [
        ("checkpoint", Checkpoint(dirname=tmp_path, load_best=True)),
        ("stopping", EarlyStopping()),
        ("clipping", GradientNormClipping(0.5)),
        ("schedule", LRScheduler("StepLR", step_size=2)),
    ]
    assert make_net(callbacks=callbacks).fit(X, Y).predict(X).shape == (40,)


def test_a_frozen_layer_does_not_change():
    net = make_net(callbacks=[Freezer("rnn.*")]).initialize()
    initial = net.module_.rnn.weight_hh_l0.clone()
    net.partial_fit(X, Y)
    torch.testing.assert_close(net.module_.rnn.weight_hh_l0, initial, atol=0, rtol=0)


def test_the_doctor_sees_the_layer():
    doctor = SkorchDoctor(make_net(max_epochs=2))
    doctor.fit(X, Y)
    assert any("rnn" in name for name in doctor.activation_recs_["module"][0])
    assert any("rnn" in name for name in doctor.gradient_recs_["module"][0])


def test_a_compiled_module_trains_and_predicts():
    assert make_net(compile=True, max_epochs=2).fit(X, Y).predict(X).shape == (40,)
