"""The classifier: which states it reads, and that its two recurrent layers are interchangeable."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from namernn_fast import FusedRNN
from namernn_fast.names import (
    Checkpoint,
    InputError,
    NameClassifier,
    NameEnsemble,
    Predictor,
    encode,
    encode_names,
)
from namernn_fast.names.sample import SAMPLE

NAMES = [name for names in SAMPLE.values() for name in names]
OPTIONS = [
    {},
    {"bidirectional": True},
    {"num_layers": 2, "nonlinearity": "relu"},
    {"num_layers": 2, "bidirectional": True},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=str)


def classifier(rnn_class, **options):
    torch.manual_seed(5)
    return NameClassifier(18, 16, 24, rnn_class=rnn_class, **options)


def one_by_one(model, names):
    """The definition: each name alone, unpacked, and the state after its last character read."""
    logits = []
    for name in names:
        output, _ = model.rnn(model.embedding(encode(name).unsqueeze(1)))
        forward, *backward = output.chunk(model.num_directions, 2)
        last = torch.cat([forward[-1], *(states[0] for states in backward)], 1)
        logits.append(model.classifier(last))
    return torch.cat(logits)


@options
def test_the_two_layers_have_the_same_weights_from_the_same_seed(options):
    fused, plain = (classifier(kind, **options) for kind in (FusedRNN, nn.RNN))
    assert type(fused.rnn) is FusedRNN
    assert type(plain.rnn) is nn.RNN
    assert list(fused.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[name], value)
    assert fused.config == plain.config


@options
def test_logits_and_gradients_are_those_of_the_definition(options, within_budget):
    plain = classifier(nn.RNN, **options)
    fused = classifier(FusedRNN, **options)
    oracle = classifier(nn.RNN, **options).double()
    encoded = encode_names(NAMES)
    indices = torch.randperm(len(NAMES), generator=torch.Generator().manual_seed(1))
    chosen = [NAMES[i] for i in indices]
    logits = {
        fused: fused(encoded.pack(indices)),
        plain: plain(encoded.pack(indices)),
        oracle: one_by_one(oracle, chosen),
    }
    assert logits[fused].shape == (len(NAMES), 18)
    assert logits[fused].dtype == torch.float32
    within_budget(logits[fused], logits[plain], logits[oracle])
    weight = torch.randn(len(NAMES), 18, generator=torch.Generator().manual_seed(2))
    for output in logits.values():
        (output * weight).sum().backward()
    for ours, nn_rnn, exact in zip(*(model.parameters() for model in logits), strict=True):
        within_budget(ours.grad, nn_rnn.grad, exact.grad)


def test_a_pack_sequence_of_ones_own_is_as_good():
    model = classifier(FusedRNN)
    names = ["Li", "Papadopoulos", "Kim"]
    own = pack_sequence([encode(name) for name in names], enforce_sorted=False)
    assert torch.equal(model(own), model(encode_names(names).pack(torch.arange(3))))


def test_other_input_is_refused():
    ids = encode("Frank")
    packed = encode_names(["Frank"]).pack(torch.arange(1))
    model = classifier(FusedRNN)
    with pytest.raises(TypeError) as error:
        model(ids)
    assert str(error.value) == (
        "names must be a PackedSequence, or a tensor with a tensor of lengths, not "
        "Tensor with NoneType"
    )
    with pytest.raises(TypeError, match=r"^lengths go with padded ids, not with a PackedSequence$"):
        model(packed, torch.tensor([5]))


@pytest.mark.parametrize("rnn_class", [FusedRNN, nn.RNN])
def test_the_layers_own_refusals_come_through(rnn_class):
    with pytest.raises(ValueError, match="sigmoid"):
        classifier(rnn_class, nonlinearity="sigmoid")


def padded(names):
    """Padded ids (batch, longest) and lengths (batch)."""
    encoded = encode_names(names)
    packed = encoded.pack(torch.arange(len(names)))
    return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0], encoded.lengths


@pytest.mark.parametrize("pooling", ["last", "last+mean+max"])
@pytest.mark.parametrize("rnn_class", [FusedRNN, nn.RNN])
@pytest.mark.parametrize("options", [*OPTIONS, {"ngrams": True}], ids=str)
def test_padded_names_are_as_good_as_packed_ones(options, rnn_class, pooling):
    model = classifier(rnn_class, **options, pooling=pooling)
    names = NAMES[::17]
    expected = model(encode_names(names).pack(torch.arange(len(names))))
    ids, lengths = padded(names)
    torch.testing.assert_close(model(ids, lengths), expected, rtol=0, atol=2e-6)
    # The padding may be longer than need be, and of any characters.
    wider = torch.nn.functional.pad(ids, (0, 3))
    junk = torch.where(torch.arange(wider.shape[1]) < lengths.unsqueeze(1), wider, 30)
    torch.testing.assert_close(model(junk, lengths), expected, rtol=0, atol=2e-6)


@options
def test_pooling_is_that_of_the_definition(options):
    model = classifier(nn.RNN, **options, pooling="last+mean+max")
    names = ("Li", "Papadopoulos", "O'Neal")
    found = model(encode_names(names).pack(torch.arange(3)))
    for name, scores in zip(names, found, strict=True):
        output, h_n = model.rnn(model.embedding(encode(name).unsqueeze(1)))
        last = h_n[-model.num_directions :].flatten()
        read = torch.cat([last, output.mean(0)[0], output.amax(0)[0]])
        torch.testing.assert_close(scores, model.classifier(read))


def test_an_ensemble_averages_logits():
    members = [classifier(FusedRNN), classifier(FusedRNN, bidirectional=True)]
    packed = encode_names(NAMES[:9]).pack(torch.arange(9))
    expected = (members[0](packed) + members[1](packed)) / 2
    torch.testing.assert_close(NameEnsemble(members)(packed), expected)
    assert NameEnsemble(members).config == [member.config for member in members]


def test_character_dropout_zeroes_whole_characters():
    model = classifier(nn.RNN, character_dropout=0.5)
    packed = encode_names(NAMES).pack(torch.arange(len(NAMES)))
    rows = model._embed(packed.data)
    zero = (rows == 0).all(1)
    assert 0.45 < zero.double().mean() < 0.55
    assert torch.equal(rows[~zero], model.embedding(packed.data)[~zero])
    model.eval()
    assert torch.equal(model._embed(packed.data), model.embedding(packed.data))


@pytest.mark.parametrize("pooling", ["last", "last+mean+max"])
@pytest.mark.parametrize("is_padded", [False, True])
@options
def test_a_dropped_character_is_one_for_both_layers(options, is_padded, pooling, within_budget):
    """From the same seed the same characters are unknown, as ids or as rows of zeros."""
    results = []
    packed = encode_names(NAMES).pack(torch.arange(len(NAMES)))
    weight = torch.randn(len(NAMES), 18, generator=torch.Generator().manual_seed(2))
    for kind, dtype in (
        (FusedRNN, torch.float32),
        (nn.RNN, torch.float32),
        (nn.RNN, torch.float64),
    ):
        model = classifier(kind, **options, character_dropout=0.3, pooling=pooling).to(dtype)
        names = padded(NAMES) if is_padded else (packed,)
        torch.manual_seed(8)
        logits = model(*names)
        torch.manual_seed(9)
        assert not torch.equal(model(*names), logits)
        (logits * weight).sum().backward()
        results.append((logits, *(parameter.grad for parameter in model.parameters())))
    for values in zip(*results, strict=True):
        within_budget(*values)


def test_the_fused_layer_is_given_ids(monkeypatch):
    """No character is embedded, but for n-grams."""

    def embedded(*_):
        raise AssertionError("a character was embedded")

    monkeypatch.setattr(nn.Embedding, "forward", embedded)
    packed = encode_names(NAMES).pack(torch.arange(len(NAMES)))
    for pooling in ("last", "last+mean+max"):
        for options in OPTIONS:
            model = classifier(FusedRNN, **options, pooling=pooling, character_dropout=0.1)
            assert model(packed).isfinite().all()
            assert model.states(encode("Frank")).isfinite().all()
            assert model.shares_prefixes() == (
                pooling == "last" and not options.get("bidirectional", False)
            )
    for other in (classifier(nn.RNN), classifier(FusedRNN, ngrams=True)):
        assert not other.shares_prefixes()
        with pytest.raises(AssertionError, match=r"^a character was embedded$"):
            other(packed)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_is_exported_to_onnx_for_any_batch_and_length():
    """One export of an ensemble of both poolings, of one direction and of two."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    members = [
        classifier(FusedRNN, bidirectional=True),
        classifier(FusedRNN, num_layers=2),
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


def predictor(**options):
    languages = tuple(f"language {i}" for i in range(18))
    return Predictor(Checkpoint(classifier(FusedRNN, **options), languages, {}))


def test_probabilities_are_in_the_order_of_the_names():
    asked = predictor(num_layers=2, dropout=0.5)
    probabilities = asked.probabilities(["Li", "Papadopoulos", "Kim"])
    assert probabilities.shape == (3, 18)
    assert not probabilities.requires_grad
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    model = asked.checkpoint.model
    assert not model.training
    encoded = encode_names(["Li", "Papadopoulos", "Kim"])
    assert torch.equal(probabilities, model(encoded.pack(torch.arange(3))).softmax(1))
    assert not torch.equal(probabilities[0], probabilities[2])


def test_predict_gives_the_best_languages_first():
    asked = predictor()
    probabilities = asked.probabilities(["Li", "Kim"])
    for top in (1, 3, 18, 99):
        answers = asked.predict(["Li", "Kim"], top)
        for answer, row in zip(answers, probabilities, strict=True):
            values, places = row.topk(min(top, 18))
            assert answer == [
                (asked.languages[i], value)
                for i, value in zip(places.tolist(), values.tolist(), strict=True)
            ]


def test_predict_refuses_what_it_cannot_read():
    asked = predictor()
    with pytest.raises(InputError, match=r"^'李' holds no usable character"):
        asked.predict(["Frank", "李"])
    with pytest.raises(ValueError, match=r"^top must be at least 1, not 0$"):
        asked.predict(["Frank"], 0)
    assert asked.predict([]) == []
    assert asked.probabilities([]).shape == (0, 18)
