"""Tests that the classifier matches its definition, with FusedRNN and with nn.RNN."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from namernn_fast import FusedRNN
from namernn_fast.names import (
    ASCII,
    NameClassifier,
    NameEnsemble,
    encode,
    encode_names,
)
from namernn_fast.names.model import NgramEmbedding
from namernn_fast.names.sample import SAMPLE
from namernn_fast.testing import assert_within_budget

NAMES = [name for names in SAMPLE.values() for name in names]
OPTIONS = [
    {**options, "pooling": pooling}
    for pooling in ("last", "last+mean+max")
    for options in (
        {},
        {"bidirectional": True},
        {"num_layers": 2, "nonlinearity": "relu"},
        {"num_layers": 2, "bidirectional": True},
        {"bidirectional": True, "ngrams": True},
    )
]
options = pytest.mark.parametrize("options", OPTIONS, ids=str)
KINDS = ((FusedRNN, torch.float32), (nn.RNN, torch.float32), (nn.RNN, torch.float64))


def classifier(rnn_class, **options):
    torch.manual_seed(5)
    return NameClassifier(18, 16, 24, rnn_class=rnn_class, **options)


def packed(names):
    return encode_names(names).pack(torch.arange(len(names)))


def padded(names):
    """Return padded ids (batch, max_length) and lengths (batch,)."""
    return pad_packed_sequence(packed(names), batch_first=True)


def read(model, states):
    """Return the input to the linear layer, computed from the states after each character."""
    forward, *backward = states.chunk(model.num_directions, 1)
    last = [forward[-1], *(each[0] for each in backward)]
    rest = [] if model.config["pooling"] == "last" else [states.mean(0), states.amax(0)]
    return torch.cat([*last, *rest])


def one_by_one(model, names):
    """Return the logits of names by definition, computed for one name at a time."""
    logits = []
    for name in names:
        ids = encode(name)
        embedded = model.embedding(ids)
        if model.ngrams:
            embedded = embedded + model.ngrams(ids.unsqueeze(0), torch.tensor([len(ids)]))[0]
        logits.append(model.classifier(read(model, model.rnn(embedded)[0])))
    return torch.stack(logits)


def results(model, logits):
    """Return, by name, the logits and the gradients of a weighted sum of the logits."""
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight).sum().backward()
    return {"logits": logits} | {name: each.grad for name, each in model.named_parameters()}


@options
def test_logits_and_gradients_match_the_definition(options):
    """With the same seed, FusedRNN and nn.RNN have the same initial weights."""
    models = fused, plain, oracle = [classifier(kind, **options).to(dtype) for kind, dtype in KINDS]
    assert [type(model.rnn) for model in models] == [FusedRNN, nn.RNN, nn.RNN]
    assert fused.config == plain.config
    torch.testing.assert_close(dict(fused.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    names = NAMES[::3]
    logits = [fused(packed(names)), plain(packed(names)), one_by_one(oracle, names)]
    # The budget comes from nn.RNN's error, so a fault in both classifiers would not exceed it.
    torch.testing.assert_close(logits[1].double(), logits[2], rtol=0, atol=1e-5)
    assert_within_budget(*map(results, models, logits))


@options
@pytest.mark.parametrize("rnn_class", [FusedRNN, nn.RNN])
def test_padded_and_packed_names_have_the_same_logits(options, rnn_class):
    model = classifier(rnn_class, **options)
    names = NAMES[::17]
    expected = model(packed(names))
    unsorted = pack_sequence([encode(name) for name in names], enforce_sorted=False)
    # The last bits of nn.RNN depend on where its rows are.
    atol = 0 if rnn_class is FusedRNN else 2e-6
    torch.testing.assert_close(model(unsorted), expected, rtol=0, atol=atol)
    # The padding may be longer than necessary and contain any ids.
    ids, lengths = padded(names)
    wider = nn.functional.pad(ids, (0, 3))
    junk = torch.where(torch.arange(wider.shape[1]) < lengths.unsqueeze(1), wider, 30)
    for padded_ids in (ids, wider, junk):
        torch.testing.assert_close(model(padded_ids, lengths), expected, rtol=0, atol=2e-6)


@options
def test_the_states_of_a_name_determine_its_logits(options):
    model = classifier(FusedRNN, **options)
    states = model.states(encode("Frank"))
    torch.testing.assert_close(model.classifier(read(model, states)), model(packed(["Frank"]))[0])


def test_forward_rejects_invalid_input():
    model = classifier(FusedRNN)
    for names, lengths in ((encode("Frank"), None), (packed(["Frank"]), torch.tensor([5]))):
        with pytest.raises(TypeError, match=r"^names must be|^lengths must be None"):
            model(names, lengths)


@pytest.mark.parametrize("options", [{"nonlinearity": "sigmoid"}, {"pooling": "mean"}])
def test_invalid_classifier_options_are_rejected(options):
    with pytest.raises(ValueError, match=next(iter(options.values()))):
        classifier(FusedRNN, **options)


def test_an_ensemble_averages_logits():
    members = [classifier(FusedRNN), classifier(FusedRNN, bidirectional=True)]
    names = packed(NAMES[:9])
    expected = (members[0](names) + members[1](names)) / 2
    torch.testing.assert_close(NameEnsemble(members)(names), expected)
    assert NameEnsemble(members).config == [member.config for member in members]
    with pytest.raises(ValueError, match=r"^an ensemble must have at least one member$"):
        NameEnsemble([])


def test_character_dropout_zeroes_whole_characters():
    model = classifier(nn.RNN, character_dropout=0.5)
    ids = packed(NAMES).data
    rows = model._embed(ids)
    zero = (rows == 0).all(1)
    assert 0.45 < zero.double().mean() < 0.55
    assert torch.equal(rows[~zero], model.embedding(ids)[~zero])
    model.eval()
    assert torch.equal(model._embed(ids), model.embedding(ids))


@options
@pytest.mark.parametrize("given", [packed, padded], ids=["packed", "padded"])
def test_both_layers_drop_the_same_characters(options, given):
    """With the same seed, FusedRNN and nn.RNN drop the same characters."""
    found = []
    names = padded(NAMES) if given is padded else (packed(NAMES),)
    for kind, dtype in KINDS:
        model = classifier(kind, **options, character_dropout=0.3).to(dtype)
        torch.manual_seed(8)
        logits = model(*names)
        torch.manual_seed(9)
        assert not torch.equal(model(*names), logits)
        found.append(results(model, logits))
    assert_within_budget(*found)


def test_the_fused_layer_reads_ids_instead_of_embeddings(monkeypatch):
    """Only classifiers with n-grams or nn.RNN embed characters before the recurrent layer."""
    embedded = mock.Mock(side_effect=AssertionError("a character was embedded"))
    monkeypatch.setattr(nn.Embedding, "forward", embedded)
    names = packed(NAMES)
    for options in OPTIONS:
        if "ngrams" not in options:
            model = classifier(FusedRNN, **options, character_dropout=0.1)
            assert model(names).isfinite().all()
            assert model.states(encode("Frank")).isfinite().all()
            one_way = model.num_directions == 1
            assert model.shares_prefixes() == (one_way and options["pooling"] == "last")
    for other in (classifier(nn.RNN), classifier(FusedRNN, ngrams=True)):
        assert not other.shares_prefixes()
        with pytest.raises(AssertionError, match=r"^a character was embedded$"):
            other(names)


def test_ngram_embeddings_match_the_definition():
    """By definition, a character's embedding is the sum of the embeddings of three n-grams."""
    names = ["frank", "li", "o", "o'neal", "de la cruz"]
    table = NgramEmbedding(4, len(ASCII.alphabet))
    ids, lengths = padded(names)
    unknown = torch.zeros_like(ids, dtype=torch.bool)
    unknown[0, 2] = unknown[3, 0] = True
    symbols = len(ASCII.alphabet) + 2
    mark, hidden = len(ASCII.alphabet), len(ASCII.alphabet) + 1
    for dropped in (None, unknown):
        found = table(ids, lengths, dropped)
        for row, name in enumerate(names):
            seen = [ASCII.alphabet.index(character) for character in name]
            if dropped is not None:
                seen = [hidden if dropped[row, i] else id for i, id in enumerate(seen)]
            around = [mark, *seen, mark]
            for place in range(len(name)):
                before, here, after = around[place : place + 3]
                expected = (
                    table.before.weight[before * symbols + here]
                    + table.after.weight[here * symbols + after]
                    + table.around.weight[((before * symbols + here) * symbols + after) % 8192]
                )
                torch.testing.assert_close(found[row, place], expected)


def test_dropped_characters_do_not_affect_ngrams():
    model = classifier(FusedRNN, ngrams=True, character_dropout=1.0)
    assert torch.equal(model(packed(["abc"])), model(packed(["xyz"])))
    model.eval()
    assert not torch.equal(model(packed(["abc"])), model(packed(["xyz"])))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_is_exported_to_onnx_for_any_batch_and_length():
    """The test exports an ensemble with both poolings, and with one and two directions."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    members = [
        classifier(FusedRNN, num_layers=2, bidirectional=True),
        classifier(FusedRNN, pooling="last+mean+max", ngrams=True),
    ]
    model = NameEnsemble(members).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        model,
        padded(["Frank", "Papadopoulos", "Li"]),
        dynamo=True,
        verbose=False,
        input_names=["names", "lengths"],
        dynamic_shapes={"names": {0: dynamic, 1: dynamic}, "lengths": {0: dynamic}},
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for names in (["Li"], ["A", "B"], ["Kim", "Papageorgiou"] * 9, NAMES):
        ids, lengths = padded(names)
        [found] = session.run(None, {"names": ids.numpy(), "lengths": lengths.numpy()})
        expected = model(ids, lengths).detach()
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=2e-6)
