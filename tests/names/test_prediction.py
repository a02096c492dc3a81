"""Prediction: bounded batches, the order of the names, and whatever people take for a name."""

from pathlib import Path

import pytest
import torch
from bounds import bounded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from namernn_fast.names import (
    Checkpoint,
    InputError,
    NameClassifier,
    NameEnsemble,
    Predictor,
    encode_names,
    fold,
    load,
    prediction,
    pretrained_checkpoint,
    save_checkpoint,
)
from namernn_fast.names.sample import SAMPLE
from namernn_fast.names.text import dropped, escaped, why_unusable

LANGUAGES = ("Basque", "Welsh", "Maori")
SMALL = {"embedding_size": 6, "hidden_size": 10}
SHARING = {"embedding_size": 8, "hidden_size": 48}
MANY = [name for names in SAMPLE.values() for name in names]


def predictor(seed=0, **options):
    torch.manual_seed(seed)
    return Predictor(Checkpoint(NameClassifier(3, **(SMALL | options)), LANGUAGES, {}))


def ensemble():
    members = [
        predictor(seed, bidirectional=bool(seed), pooling=pooling).checkpoint.model
        for seed, pooling in enumerate(("last", "last+mean+max"))
    ]
    return Predictor(Checkpoint(NameEnsemble(members), LANGUAGES, {}))


@pytest.fixture(scope="module")
def asked():
    return predictor()


class Watched(nn.Module):
    """A model that notes how many rows and steps each of its batches has."""

    def __init__(self, model):
        super().__init__()
        self.model, self.batches = model, []

    def forward(self, names):
        self.batches.append((int(names.batch_sizes[0]), len(names.batch_sizes)))
        return self.model(names)


def test_batches_have_a_bounded_number_of_characters(asked):
    names = ["Kim", "x" * 1000, "Papadopoulos", "Li"] * 1500 + ["y" * 1000]
    watched = Watched(asked.checkpoint.model)
    prediction.probabilities(watched, encode_names(names))
    assert sum(rows for rows, _ in watched.batches) == len(names)
    assert max(rows * steps for rows, steps in watched.batches) <= 16_384
    # Names of alike length are together: hardly a batch is padded.
    assert len(watched.batches) <= sum(map(len, names)) / 16_384 + 100


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2},
        {"bidirectional": True},
        {"pooling": "last+mean+max"},
        {"ngrams": True},
        {"rnn_class": nn.RNN},
        None,
    ],
    ids=str,
)
@pytest.mark.parametrize("characters", [64, 65_536])
def test_answers_do_not_depend_on_batches(options, characters, monkeypatch):
    """In any order, with repeats, and with long names among them; None is an ensemble."""
    asked = ensemble() if options is None else predictor(**SHARING, **options)
    names = [*MANY[::2], "x" * 1000, "x" * 33, "y" * 32, "y"]
    alone = {name: asked.probabilities([name]) for name in names}
    order = torch.randperm(3 * len(names), generator=torch.Generator().manual_seed(4)) // 3
    names = [names[place] for place in order.tolist()]
    alone = torch.cat([alone[name] for name in names])
    monkeypatch.setattr(prediction, "_SHARED_CHARACTERS", characters)
    monkeypatch.setattr(prediction, "_BATCH_CHARACTERS", characters)
    together = asked.probabilities(names)
    assert together.dtype == torch.float32
    assert (together - alone).abs().max() <= 1e-6
    values, places = together.max(1)
    assert asked.predict(names, 1) == [
        [(LANGUAGES[place], value)]
        for place, value in zip(places.tolist(), values.tolist(), strict=True)
    ]
    # Two languages may be as probable as each other but for rounding.
    told = torch.tensor([LANGUAGES.index(language) for language in asked.languages_of(names)])
    assert (values - together.gather(1, told.unsqueeze(1))[:, 0]).max() <= 1e-6
    assert torch.equal(prediction.most_probable(asked.checkpoint.model, encode_names(names)), told)


def test_a_long_name_has_a_batch_of_its_own_where_names_share(monkeypatch):
    asked = predictor(**SHARING)
    seen = []

    def watched(self, names, forward=NameClassifier.forward):
        seen.append((int(names.batch_sizes[0]), len(names.batch_sizes)))
        return forward(self, names)

    monkeypatch.setattr(NameClassifier, "forward", watched)
    asked.languages_of(["Kim", "x" * 1000, "Papadopoulos", "y" * 33] * 1000)
    short = [batch for batch in seen if batch[1] <= 32]
    assert short == [(2000, 12)]
    assert all(rows * steps <= 16_384 for rows, steps in seen if steps > 32)
    assert sum(rows for rows, _ in seen) == 4000


def test_languages_come_without_a_name_too():
    assert predictor().languages_of([]) == []
    with pytest.raises(InputError, match=r"^'李' holds no usable character"):
        predictor().languages_of(["Frank", "李"])


def test_many_names_take_no_memory_but_their_results(asked):
    encoded = encode_names(["Papadopoulos"] * 40_000)
    with bounded(mebibytes=16):
        prediction.probabilities(asked.checkpoint.model, encoded)
    with bounded(mebibytes=16):
        prediction.most_probable(asked.checkpoint.model, encoded)


@pytest.mark.parametrize("asked", [predictor(), ensemble()], ids=["one", "ensemble"])
def test_prefixes_are_asked_as_names_are(asked):
    found = asked.prefix_probabilities("Zoë D'")
    assert found.shape == (6, 3)
    # A blank at the end of a name is dropped, but not at the end of a prefix.
    for end in (1, 2, 3, 5, 6):
        expected = asked.probabilities(["zoe d'"[:end]])[0]
        assert (found[end - 1] - expected).abs().max() <= 1e-6


def test_states_lead_to_the_answer(asked):
    model = asked.checkpoint.model
    text, states = asked.states("Ślusàrski")
    assert text == "slusarski"
    assert states.shape == (9, 10)
    assert not states.requires_grad
    answer = model.classifier(states[-1]).softmax(0)
    assert (answer - asked.probabilities(["Ślusàrski"])[0]).abs().max() <= 1e-6
    assert predictor(bidirectional=True).states("Li")[1].shape == (2, 20)
    with pytest.raises(TypeError, match=r"^an ensemble has no single state"):
        ensemble().states("Li")


def test_results_that_are_not_finite_are_an_error():
    broken = predictor(nonlinearity="relu")
    for value in broken.checkpoint.model.parameters():
        nn.init.constant_(value, 3e38)
    for ask, what in (
        (broken.predict, "probabilities"),
        (broken.languages_of, "probabilities"),
        (broken.probabilities, "probabilities"),
        (lambda names: broken.prefix_probabilities(names[0]), "probabilities"),
        (lambda names: broken.states(names[0]), "states"),
    ):
        with pytest.raises(InputError) as error:
            ask(["Kim"])
        assert str(error.value) == f"the model gives {what} that are not finite: it is damaged"


@pytest.mark.parametrize("names", ["Frank", b"Frank", None, ["Frank", 7], [["Frank"]]])
def test_wrong_types_are_refused(asked, names):
    asks = [asked.predict, asked.probabilities, asked.languages_of]
    asks += [asked.states, asked.prefix_probabilities] if isinstance(names, list) else []
    for ask in asks:
        with pytest.raises(TypeError, match=r"^names must "):
            ask(names)


ODD = [
    "",
    " ",
    "x" * 10_000,
    "李",
    "\0\x1b[31m",
    "\u202eright to left",
    "שלום",
    "\ud800",
    "\U0010ffff",
    "ﷺ" * 1000,
    "e" + "\u0301" * 999,
    "-" * 999 + "a",
    "æ" * 1000,
]


def check_any_name(asked, name):
    reason = why_unusable(name)
    if reason is None:
        assert 0 < len(fold(name)) <= 2 * len(name)
        answer = asked.predict([name], 3)[0]
        assert sum(probability for _, probability in answer) == pytest.approx(1, abs=1e-5)
        assert asked.states(name)[0] == fold(name)
    else:
        assert escaped(reason) == reason
        for ask in (lambda: asked.predict(["Kim", name]), lambda: asked.states(name)):
            with pytest.raises(InputError) as error:
                ask()
            assert str(error.value) == reason
    assert escaped(dropped(name)).isprintable()


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_odd_names(asked, name):
    with bounded():
        check_any_name(asked, name)


@given(st.text(st.characters()) | st.text(st.characters(max_codepoint=0x24F)))
def test_any_text_has_an_answer_or_a_reason(asked, name):
    check_any_name(asked, name)


def test_the_model_is_the_pretrained_one_unless_another_is_named(
    asked, cache, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    pretrained = load(pretrained_checkpoint()).predict(["Kim"])
    for path in ("pretrained", cache / "names.safetensors"):
        save_checkpoint(path, asked.checkpoint)
    for model in ((), ("pretrained",)):
        assert load(*model).predict(["Kim"]) == pretrained
    for model in ("./pretrained", Path("pretrained"), cache / "names.safetensors"):
        assert load(model).predict(["Kim"]) == asked.predict(["Kim"]) != pretrained


def test_the_pretrained_model_needs_no_home_folder(homeless):
    assert load().predict(["Nguyen"], top=1)[0][0][0] == "Vietnamese"
