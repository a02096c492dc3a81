"""N-gram embeddings, and networks that learn what others answer."""

import dataclasses

import pytest
import torch
from torch.nn.utils.rnn import pad_packed_sequence

from namernn_fast.names import (
    RECIPES,
    NameClassifier,
    Recipe,
    encode_names,
    fit,
    load_checkpoint,
    split,
)
from namernn_fast.names import __main__ as cli
from namernn_fast.names.dataset import embedded_sample
from namernn_fast.names.distillation import distilled, made_up_names
from namernn_fast.names.ngrams import NgramEmbedding
from namernn_fast.names.prediction import logits
from namernn_fast.names.text import ALPHABET

NAMES = ["frank", "li", "o", "o'neal", "de la cruz"]
SMALL = {"embedding_size": 8, "hidden_size": 12}


@pytest.fixture(scope="module")
def parts():
    return split(embedded_sample())


@pytest.fixture(scope="module")
def teacher(parts):
    return fit(parts, Recipe(epochs=1, model=SMALL)).checkpoint.model


def padded(names):
    encoded = encode_names(names)
    return pad_packed_sequence(encoded.pack(torch.arange(len(names))), batch_first=True)


def by_definition(table, name, place, unknown=()):
    """The sum of the three n-grams' rows around one character, spelled out."""
    symbols = len(ALPHABET) + 2
    mark, hidden = len(ALPHABET), len(ALPHABET) + 1

    def symbol(at):
        if not 0 <= at < len(name):
            return mark
        return hidden if at in unknown else ALPHABET.index(name[at])

    before, here, after = (symbol(place + offset) for offset in (-1, 0, 1))
    return (
        table.before.weight[before * symbols + here]
        + table.after.weight[here * symbols + after]
        + table.around.weight[((before * symbols + here) * symbols + after) % 8192]
    )


def test_ngram_embeddings_are_those_of_the_definition():
    table = NgramEmbedding(4)
    ids, lengths = padded(NAMES)
    unknown = torch.zeros_like(ids, dtype=torch.bool)
    unknown[0, 2] = unknown[3, 0] = True
    found, hidden = table(ids, lengths), table(ids, lengths, unknown)
    for row, name in enumerate(NAMES):
        dropped = unknown[row].nonzero().flatten().tolist()
        for place in range(len(name)):
            torch.testing.assert_close(found[row, place], by_definition(table, name, place))
            torch.testing.assert_close(
                hidden[row, place], by_definition(table, name, place, dropped)
            )


def test_padding_and_packing_make_no_difference_to_ngrams():
    torch.manual_seed(0)
    model = NameClassifier(5, 8, 12, bidirectional=True, pooling="last+mean+max", ngrams=True)
    model.eval()
    ids, lengths = padded(NAMES)
    wanted = model(ids, lengths)
    past_the_end = torch.arange(ids.shape[1]) >= lengths.unsqueeze(1)
    torch.testing.assert_close(model(ids.masked_fill(past_the_end, 7), lengths), wanted)
    torch.testing.assert_close(model(encode_names(NAMES).pack(torch.arange(len(NAMES)))), wanted)
    for row, name in enumerate(NAMES):
        alone = encode_names([name])
        torch.testing.assert_close(model(alone.pack(torch.tensor([0])))[0], wanted[row])
        states = model.states(alone.characters)
        assert states.shape == (len(name), 24)
        torch.testing.assert_close(states[-1, :12], model_last_state(model, ids, lengths, row))


def model_last_state(model, ids, lengths, row):
    """The last state of the first direction, from which the linear layer's input begins."""
    seen = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(ids, lengths)
    hook.remove()
    return seen[0][row, :12]


def test_dropped_characters_leave_no_trace_in_training():
    torch.manual_seed(0)
    model = NameClassifier(3, 8, 12, ngrams=True, character_dropout=1.0)
    first, second = (model(*padded([name])) for name in ("abc", "xyz"))
    assert torch.equal(first, second)
    model.eval()
    assert not torch.equal(model(*padded(["abc"])), model(*padded(["xyz"])))


def test_made_up_names_come_from_the_training_part(parts):
    names = made_up_names(parts, 500, seed=3)
    assert names == made_up_names(parts, 500, seed=3) != made_up_names(parts, 500, seed=4)
    assert len(names) == 500
    assert all(0 < len(name) <= 20 for name in names)
    marked = [f"^^{text}$" for text in parts.train.texts]
    known = {text[place : place + 3] for text in marked for place in range(len(text) - 2)}
    for name in names:
        whole = f"^^{name}$" if len(name) < 20 else f"^^{name}"
        assert {whole[i : i + 3] for i in range(len(whole) - 2)} <= known


def test_a_teacher_labels_the_training_part_and_made_up_names(parts, teacher):
    lesson = distilled(parts, teacher, 300)
    texts = set(lesson.train.texts)
    assert len(texts) == len(lesson.train) > len(set(parts.train.texts))
    assert texts > set(parts.train.texts)
    assert texts.isdisjoint({*parts.validation.texts, *parts.test.texts})
    torch.testing.assert_close(
        lesson.train.labels, logits(teacher, encode_names(lesson.train.texts)).softmax(1)
    )
    assert lesson.validation is parts.validation
    assert lesson.info == {**parts.info, "made_up": 300}
    torch.testing.assert_close(lesson.priors(), lesson.train.labels.double().mean(0))


def test_a_student_learns_what_its_teacher_answers(parts, teacher):
    lesson = distilled(parts, teacher, 100)
    recipe = RECIPES["distilled"].changed(epochs=15, batch_size=32, model=SMALL)
    student = fit(lesson, recipe).checkpoint.model
    answers = [logits(model, lesson.train.names).argmax(1) for model in (teacher, student)]
    assert (answers[0] == answers[1]).float().mean() > 0.8


def test_the_command_line_takes_a_teacher_of_its_own_split_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("namernn_fast.names.commands.train.load_names", sample)
    big, small = tmp_path / "big.safetensors", tmp_path / "small.safetensors"
    sizes = ["--embedding-size", "8", "--hidden-size", "12", "--epochs", "1"]
    train = ["train", *sizes, "--checkpoint"]
    assert cli.main([*train, str(big), "--ngrams", "--pooling", "last+mean+max"]) == 0
    assert load_checkpoint(big).model.config["ngrams"]
    taught = [str(small), "--teacher", str(big), "--recipe", "distilled", "--made-up", "50"]
    assert cli.main([*train, *taught]) == 0
    assert load_checkpoint(small).info["split"]["made_up"] == 50
    assert len(load_checkpoint(small).info["split"]["teacher"]) == 64
    capsys.readouterr()
    for wrong, reason in (
        ([*taught, "--split-seed", "1"], "the teacher was trained on another split"),
        ([str(small), "--teacher", "pretrained"], "the teacher was trained on another split"),
        ([str(small), "--recipe", "distilled"], "--recipe distilled goes with --teacher"),
        ([str(small), "--made-up", "9"], "--made-up goes with --teacher"),
    ):
        assert cli.main([*train, *wrong]) == 2
        assert reason in capsys.readouterr().err


def test_a_training_is_not_resumed_with_another_teacher(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("namernn_fast.names.commands.train.load_names", sample)
    sizes = ["--embedding-size", "8", "--hidden-size", "12"]
    teachers = [tmp_path / f"teacher{seed}.safetensors" for seed in (0, 1)]
    for seed, path in enumerate(teachers):
        options = ["--epochs", "1", "--seed", str(seed), "--checkpoint", str(path)]
        assert cli.main(["train", *sizes, *options]) == 0
    small = tmp_path / "small.safetensors"
    lesson = ["train", *sizes, "--recipe", "distilled", "--made-up", "20", "--epochs", "2"]
    lesson += ["--checkpoint", str(small), "--teacher"]

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        reporter = "namernn_fast.names.commands.train._reporter"
        patch.setattr(reporter, lambda recipe: interrupted)
        assert cli.main([*lesson, str(teachers[0])]) == 130
    capsys.readouterr()
    assert cli.main([*lesson, str(teachers[1]), "--resume"]) == 2
    assert "teacher" in capsys.readouterr().err
    assert cli.main([*lesson, str(teachers[0]), "--resume"]) == 0


def sample(path, *, allow_sample):
    assert path is None
    assert allow_sample
    return dataclasses.replace(embedded_sample(), source="the sample")
