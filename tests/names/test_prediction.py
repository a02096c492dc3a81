"""Tests that `Predictor` bounds its batches, and predicts names independently of their batch."""

from pathlib import Path

import pytest
import torch
from bounds import bounded
from torch import nn

from namernn_fast import names as api
from namernn_fast.names import InputError, NameClassifier, Predictor, encode_names, load, prediction
from namernn_fast.names.folding import why_unusable
from namernn_fast.names.sample import SAMPLE

LANGUAGES = ("Basque", "Welsh", "Maori")
SMALL = {"embedding_size": 6, "hidden_size": 10}
SHARING = {"embedding_size": 8, "hidden_size": 48}
MANY = [name for names in SAMPLE.values() for name in names]


def predictor(seed=0, **options):
    torch.manual_seed(seed)
    return Predictor(api.Checkpoint(NameClassifier(3, **(SMALL | options)), LANGUAGES, {}))


def ensemble():
    members = [
        predictor(seed, bidirectional=bool(seed), pooling=pooling).checkpoint.model
        for seed, pooling in enumerate(("last", "last+mean+max"))
    ]
    return Predictor(api.Checkpoint(api.NameEnsemble(members), LANGUAGES, {}))


@pytest.fixture(scope="module")
def asked():
    return predictor()


@pytest.fixture
def batches(monkeypatch):
    """Return a list that records (number of names, steps) for every batch of a model."""
    seen = []

    def watched(self, names, forward=NameClassifier.forward):
        seen.append((int(names.batch_sizes[0]), len(names.batch_sizes)))
        return forward(self, names)

    monkeypatch.setattr(NameClassifier, "forward", watched)
    return seen


def test_batches_have_a_bounded_number_of_characters(batches):
    names = ["Kim", "x" * 1000, "Papadopoulos", "Li"] * 1500 + ["y" * 1000]
    predictor(pooling="last+mean+max").probabilities(names)
    assert sum(rows for rows, _ in batches) == len(names)
    assert max(rows * steps for rows, steps in batches) <= 16_384
    # Each batch contains names of similar length, so there is almost no padding.
    assert len(batches) <= sum(map(len, names)) / 16_384 + 100


def test_batches_that_share_prefixes_exclude_long_names(batches):
    predictor(**SHARING).languages_of(["Kim", "x" * 1000, "Papadopoulos", "y" * 33] * 1000)
    assert [batch for batch in batches if batch[1] <= 32] == [(2000, 12)]
    assert all(rows * steps <= 16_384 for rows, steps in batches if steps > 32)
    assert sum(rows for rows, _ in batches) == 4000


KINDS = [{}, {"num_layers": 2}, {"bidirectional": True}, {"pooling": "last+mean+max"}]
KINDS += [{"ngrams": True}, {"rnn_class": nn.RNN}, None]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("characters", [64, 65_536])
def test_predictions_do_not_depend_on_the_batch_size(options, characters, monkeypatch):
    """Names are shuffled and repeated, and some are long. If `options` is None, use an ensemble."""
    asked = ensemble() if options is None else predictor(**SHARING, **options)
    names = [*MANY[::2], "x" * 1000, "x" * 33, "y" * 32, "y"]
    alone = {name: asked.probabilities([name]) for name in names}
    order = torch.randperm(3 * len(names), generator=torch.Generator().manual_seed(4)) // 3
    names = [names[place] for place in order.tolist()]
    alone = torch.cat([alone[name] for name in names])
    monkeypatch.setattr(prediction, "_SHARED_CHARACTERS", characters)
    monkeypatch.setattr(prediction, "_BATCH_CHARACTERS", characters)
    together = asked.probabilities(names)
    assert (together.dtype, together.requires_grad) == (torch.float32, False)
    assert (together - alone).abs().max() <= 1e-6
    values = together.amax(1)
    for top in (1, 2, 99):
        best = together.topk(min(top, 3))
        assert asked.predict(names, top) == [
            [(LANGUAGES[place], value) for place, value in zip(*row, strict=True)]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    # Two languages may be equally probable up to rounding, so compare probabilities, not languages.
    labels = torch.tensor([LANGUAGES.index(language) for language in asked.languages_of(names)])
    assert (values - together.gather(1, labels.unsqueeze(1))[:, 0]).max() <= 1e-6


def test_an_empty_list_of_names_is_accepted_but_top_0_is_rejected(asked):
    assert asked.predict([]) == asked.languages_of([]) == []
    assert asked.probabilities([]).shape == (0, 3)
    with pytest.raises(ValueError, match=r"^top must be at least 1, not 0$"):
        asked.predict(["Frank"], 0)


def test_predicting_many_names_needs_memory_only_for_the_results(asked):
    encoded = encode_names(["Papadopoulos"] * 40_000)
    with bounded(mebibytes=16):
        prediction.probabilities(asked.checkpoint.model, encoded)


@pytest.mark.parametrize("asked", [predictor(), ensemble()], ids=["one", "ensemble"])
def test_prefixes_are_predicted_like_whole_names(asked):
    found = asked.prefix_probabilities("Zoë D'")
    # Folding drops a trailing space from a name, so no whole name equals the prefix "zoe ".
    expected = asked.probabilities(["zoe d'"[:end] for end in (1, 2, 3, 5, 6)])
    assert found.shape == (6, 3)
    assert (found[[0, 1, 2, 4, 5]] - expected).abs().max() <= 1e-6


def test_the_last_state_determines_the_answer(asked):
    text, states = asked.states("Ślusàrski")
    assert text == "slusarski"
    assert states.shape == (9, 10)
    assert not states.requires_grad
    answer = asked.checkpoint.model.classifier(states[-1]).softmax(0)
    assert (answer - asked.probabilities(["Ślusàrski"])[0]).abs().max() <= 1e-6
    assert predictor(bidirectional=True).states("Li")[1].shape == (2, 20)
    with pytest.raises(TypeError, match=r"^an ensemble has no single state"):
        ensemble().states("Li")


@pytest.mark.parametrize(
    ("ask", "asked"),
    [
        (Predictor.predict, ["Kim"]),
        (Predictor.languages_of, ["Kim"]),
        (Predictor.prefix_probabilities, "Kim"),
        (Predictor.states, "Kim"),
    ],
)
def test_non_finite_results_raise_an_error(ask, asked):
    broken = predictor(nonlinearity="relu")
    for value in broken.checkpoint.model.parameters():
        nn.init.constant_(value, 3e38)
    with pytest.raises(InputError, match=r"^the model is damaged: its \w+ are not finite"):
        ask(broken, asked)


@pytest.mark.parametrize("names", ["Frank", b"Frank", None, ["Frank", 7], [["Frank"]]])
def test_names_of_the_wrong_type_are_rejected(asked, names):
    asks = [asked.predict, asked.probabilities, asked.languages_of]
    asks += [asked.states, asked.prefix_probabilities] if isinstance(names, list) else []
    for ask in asks:
        with pytest.raises(TypeError, match=r"^names must "):
            ask(names)


@pytest.mark.parametrize(
    "name",
    ["x" * 10_000, "ﷺ" * 1000, "e" + "\u0301" * 999, "-" * 999 + "a", "æ" * 1000, "李", "\ud800"],
    ids=range(7),
)
def test_extreme_names_get_a_prediction_or_an_error(asked, name):
    reason = why_unusable(name)
    with bounded():
        if reason is None:
            [answer] = asked.predict([name], 3)
            assert sum(value for _, value in answer) == pytest.approx(1, abs=1e-5)
            assert asked.states(name)[0] == asked.folding.fold(name)
            return
        asks = [asked.states, lambda name: asked.predict(["Kim", name])]
        for ask in (*asks, lambda name: asked.languages_of(["Kim", name])):
            with pytest.raises(InputError) as error:
                ask(name)
            assert str(error.value) == reason


def test_load_defaults_to_the_pretrained_model(asked, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrained = load(api.pretrained_checkpoint()).predict(["Kim"])
    for path in ("pretrained", cache / "names.safetensors"):
        api.save_checkpoint(path, asked.checkpoint)
    for model in ((), ("pretrained",)):
        assert load(*model).predict(["Kim"]) == pretrained
    for model in ("./pretrained", Path("pretrained"), cache / "names.safetensors"):
        assert load(model).predict(["Kim"]) == asked.predict(["Kim"]) != pretrained
