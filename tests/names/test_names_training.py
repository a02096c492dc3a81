"""The split, the training loop and the checkpoints."""

import errno
import pickle
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from namernn_fast import FusedRNN
from namernn_fast.names import (
    InputError,
    NameClassifier,
    NamesData,
    batches,
    evaluate,
    fit,
    fold,
    load_checkpoint,
    predict,
    read_names,
    save_checkpoint,
    split,
    train_step,
)
from namernn_fast.names.dataset import embedded_sample
from namernn_fast.names.text import ALPHABET

SAMPLE = embedded_sample()
SMALL = {"embedding_size": 16, "hidden_size": 32}


def pairs(side):
    """The (folded name, language) pairs of one side of a split."""
    names = (
        "".join(ALPHABET[i] for i in ids)
        for ids in side.names.characters.split(side.names.lengths.tolist())
    )
    return list(zip(names, side.labels.tolist(), strict=True))


def check_split(data, held_out):
    train, held = map(pairs, split(data, held_out=held_out, seed=3))
    distinct = {(fold(name), language) for name, language in data.rows}
    assert sorted(train + held) == sorted(distinct)
    for language, count in Counter(language for _, language in distinct).items():
        assert Counter(language for _, language in held)[language] == round(held_out * count)
    return train, held


def test_the_split_of_the_sample():
    train, held = check_split(SAMPLE, 0.25)
    assert (train, held) == tuple(map(pairs, split(SAMPLE, held_out=0.25, seed=3)))
    assert held != pairs(split(SAMPLE, held_out=0.25, seed=4)[1])


def test_no_real_name_is_on_both_sides(real_folder):
    train, held = check_split(read_names(real_folder), 0.2)
    assert len(train) + len(held) == 17_993


def few(*rows):
    languages = tuple(f"language {i}" for i in range(1 + max(i for _, i in rows)))
    return NamesData("a few names", languages, rows)


def test_small_languages_are_on_both_sides_and_repeats_count_once():
    data = few(("Pugh", 0), ("PUGH", 0), ("Price", 0), ("Púgh ", 0), ("Etxe", 1), ("Agirre", 1))
    train, held = map(pairs, split(data, held_out=0.01))
    assert [language for _, language in train] == [language for _, language in held] == [0, 1]
    train, held = map(pairs, split(data, held_out=0.99))
    assert [language for _, language in train] == [language for _, language in held] == [0, 1]


def test_the_same_string_under_two_languages_is_two_names():
    data = few(("Pugh", 0), ("Price", 0), ("Pugh", 1), ("Price", 1))
    assert sorted(map(len, map(pairs, split(data, held_out=0.5)))) == [2, 2]


def test_odd_splits_are_refused():
    for share in (0, 1, -1, float("nan")):
        with pytest.raises(InputError) as error:
            split(SAMPLE, held_out=share)
        assert str(error.value) == f"the held-out share must be between 0 and 1, not {share}"
    with pytest.raises(InputError, match=r"^a few names: too few names to hold any out$"):
        split(few(("Pugh", 0), ("Pugh", 1)))


def test_batches_hold_every_name_once_with_its_label():
    train, _ = split(SAMPLE)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    seen = []
    for names, labels in batches(train, order, 50):
        assert names.sorted_indices is None
        assert len(labels) == names.batch_sizes[0] <= 50
        padded, lengths = nn.utils.rnn.pad_packed_sequence(names, batch_first=True)
        for ids, length, label in zip(padded, lengths, labels, strict=True):
            seen.append(("".join(ALPHABET[i] for i in ids[:length]), int(label)))
    assert sorted(seen) == sorted(pairs(train))


def figures(history):
    return [replace(epoch, seconds=0) for epoch in history]


@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True, "num_layers": 2, "dropout": 0.3, "clip_norm": 1.0}],
    ids=["plain", "elaborate"],
)
@pytest.mark.parametrize("rnn_class", [FusedRNN, nn.RNN])
def test_a_seed_fixes_every_bit(rnn_class, options):
    def run(seed):
        return fit(SAMPLE, epochs=2, seed=seed, rnn_class=rnn_class, **SMALL, **options)

    torch.manual_seed(1)
    first = run(7)
    state = torch.get_rng_state()
    second = run(7)
    assert torch.equal(torch.get_rng_state(), state)
    assert figures(first.history) == figures(second.history)
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value)
    assert figures(run(8).history) != figures(first.history)


def test_the_loss_falls_and_the_history_is_complete():
    told = []
    fitted = fit(SAMPLE, epochs=3, batch_size=32, report=told.append, **SMALL)
    assert type(fitted.model.rnn) is FusedRNN
    assert fitted.languages == SAMPLE.languages
    assert fitted.history == tuple(told)
    assert [epoch.number for epoch in told] == [1, 2, 3]
    assert told[0].train_loss > told[1].train_loss > told[2].train_loss
    assert told[0].held_out_loss > told[2].held_out_loss
    assert told[2].train_accuracy > told[0].train_accuracy
    assert all(epoch.seconds > 0 for epoch in told)
    assert str(
        replace(
            told[0],
            train_loss=2,
            train_accuracy=0.5,
            held_out_loss=1.5,
            held_out_accuracy=0.25,
            seconds=1.26,
        )
    ) == ("epoch 1: train loss 2.0000, accuracy 50.0%; held-out loss 1.5000, accuracy 25.0%; 1.3 s")


def test_real_names_are_told_better_than_by_guessing_the_commonest(real_folder):
    data = read_names(real_folder)
    fitted = fit(data, epochs=1, batch_size=128, lr=3e-3, embedding_size=32, hidden_size=64)
    _, held = split(data)
    commonest = held.labels.bincount().max().item() / len(held)
    assert fitted.history[-1].held_out_accuracy > commonest
    indices = predict(fitted.model, ["Yamashita", "Kovalevsky"]).argmax(1)
    assert [data.languages[i] for i in indices] == ["Japanese", "Russian"]


def test_steps_are_those_of_nn_rnn_within_rounding(within_budget):
    """Losses and logits of several runs together, since one step may round luckily."""
    train, _ = split(SAMPLE)
    results = {}
    for kind, dtype in (
        (FusedRNN, torch.float32),
        (nn.RNN, torch.float32),
        (nn.RNN, torch.float64),
    ):
        values = []
        for seed in range(6):
            torch.manual_seed(seed)
            model = NameClassifier(18, rnn_class=kind, **SMALL).to(dtype)
            # Not Adam: its first step has the size of the learning rate even where the gradient is
            # rounding alone.
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            order = torch.randperm(len(train))
            steps = list(batches(train, order, 64))
            values += [train_step(model, optimizer, *step, clip_norm=1.0)[0] for step in steps]
            values += [model(names).detach().flatten() for names, _ in steps]
        results[kind, dtype] = torch.hstack(values)
    within_budget(*results.values())


def test_the_gradient_is_clipped_on_request():
    def moved(clip_norm):
        torch.manual_seed(0)
        model = NameClassifier(18, **SMALL)
        before = nn.utils.parameters_to_vector(model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        step = next(iter(batches(train, torch.arange(len(train)), 64)))
        train_step(model, optimizer, *step, clip_norm=clip_norm)
        return (nn.utils.parameters_to_vector(model.parameters()) - before).norm()

    train, _ = split(SAMPLE)
    free = moved(None)
    assert moved(free / 2) < free
    assert torch.equal(moved(2 * free), free)


def test_train_step_tells_the_loss_and_hits_before_the_step():
    train, _ = split(SAMPLE)
    model = NameClassifier(18, **SMALL)
    names, labels = next(iter(batches(train, torch.arange(len(train)), 64)))
    logits = model(names)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss, hits = train_step(model, optimizer, names, labels)
    assert torch.equal(loss, F.cross_entropy(logits, labels))
    assert hits == (logits.argmax(1) == labels).sum()
    assert not loss.requires_grad
    assert not torch.equal(model(names), logits)


def test_evaluate_is_the_mean_over_names():
    _, held = split(SAMPLE)
    model = NameClassifier(18, rnn_class=nn.RNN, num_layers=2, dropout=0.5, **SMALL).double()
    loss, accuracy = evaluate(model, held)
    assert not model.training
    logits = model(held.names.pack(torch.arange(len(held))))
    expected = F.cross_entropy(logits, held.labels).item()
    # Sums of this many terms, in another order.
    terms = len(held) + SMALL["hidden_size"]
    assert abs(loss - expected) <= terms * torch.finfo(torch.float64).eps * expected
    assert accuracy == (logits.argmax(1) == held.labels).double().mean().item()


def test_a_loss_that_is_not_finite_ends_the_run():
    with pytest.raises(RuntimeError) as error:
        fit(SAMPLE, epochs=3, lr=1e30, nonlinearity="relu", **SMALL)
    assert "try a smaller learning rate" in str(error.value)


def test_progress_is_shown_on_a_terminal_alone(capsys, monkeypatch):
    fit(SAMPLE, epochs=1, progress=True, **SMALL)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fit(SAMPLE, epochs=1, **SMALL)
    assert capsys.readouterr().err == ""
    fit(SAMPLE, epochs=1, progress=True, **SMALL)
    assert "epoch 1/1:   0%" in capsys.readouterr().err


def test_the_bar_alone_needs_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert len(fit(SAMPLE, epochs=1, **SMALL).history) == 1
    with pytest.raises(ModuleNotFoundError) as error:
        fit(SAMPLE, epochs=1, progress=True, **SMALL)
    assert str(error.value) == "tqdm is not installed; run: pip install 'namernn_fast[names]'"


@pytest.fixture(scope="module")
def fitted():
    return fit(SAMPLE, epochs=1, bidirectional=True, num_layers=2, dropout=0.2, **SMALL)


@pytest.mark.parametrize("rnn_class", [FusedRNN, nn.RNN])
def test_a_checkpoint_brings_the_model_back(fitted, tmp_path, rnn_class):
    path = tmp_path / "new" / "names.pt"
    save_checkpoint(path, fitted)
    model, languages = load_checkpoint(path, rnn_class=rnn_class)
    assert list(path.parent.iterdir()) == [path]
    assert languages == fitted.languages
    assert type(model.rnn) is rnn_class
    assert model.config == fitted.model.config
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in fitted.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    if rnn_class is FusedRNN:
        assert torch.equal(predict(model, ["Kim"]), predict(fitted.model, ["Kim"]))


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(fitted, tmp_path, monkeypatch):
    path = tmp_path / "names.pt"
    path.write_bytes(b"the old one")

    def full(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, fitted)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def refusal(path):
    with pytest.raises(InputError) as error:
        load_checkpoint(path)
    start, _, advice = str(error.value).partition("; ")
    assert advice == "run `python -m namernn_fast.names train` first"
    return start


def test_no_checkpoint(tmp_path):
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: there is no checkpoint here"
    assert refusal(tmp_path) == f"{tmp_path}: there is no checkpoint here"


def test_a_damaged_checkpoint(fitted, tmp_path):
    path = tmp_path / "names.pt"
    save_checkpoint(path, fitted)
    whole = path.read_bytes()
    for content in (b"", b"text\n", whole[: len(whole) // 2], whole[:-1], whole[100:]):
        path.write_bytes(content)
        assert refusal(path) == f"{path}: not a checkpoint of namernn_fast.names"


def changed(content, **changes):
    return {**content, **changes}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: None,
        lambda content: [],
        lambda content: torch.zeros(3),
        lambda content: content["state_dict"],
        lambda content: {k: v for k, v in content.items() if k != "config"},
        lambda content: changed(content, format="namernn_fast.names 0"),
        lambda content: changed(content, alphabet=ALPHABET[::-1]),
        lambda content: changed(content, languages=content["languages"][1:]),
        lambda content: changed(content, languages=["\x1b[2J", *content["languages"][1:]]),
        lambda content: changed(content, languages=list(range(18))),
        lambda content: changed(content, languages=3),
        lambda content: changed(content, config=changed(content["config"], hidden_size=2**20)),
        lambda content: changed(content, config=changed(content["config"], hidden_size="32")),
        lambda content: changed(content, config=changed(content["config"], odd=1)),
        lambda content: changed(content, config=changed(content["config"], bidirectional=False)),
        lambda content: changed(content, state_dict={}),
        lambda content: changed(
            content, state_dict={k: v.double() for k, v in content["state_dict"].items()}
        ),
        lambda content: changed(
            content, state_dict={k: v * float("nan") for k, v in content["state_dict"].items()}
        ),
    ],
)
def test_another_checkpoint(fitted, tmp_path, change):
    path = tmp_path / "names.pt"
    save_checkpoint(path, fitted)
    torch.save(change(torch.load(path, weights_only=True)), path)
    assert refusal(path) == f"{path}: not a checkpoint of namernn_fast.names"


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "save", [torch.save, lambda harm, path: path.write_bytes(pickle.dumps(harm))]
)
def test_a_checkpoint_runs_no_code(tmp_path, save):
    path = tmp_path / "names.pt"
    save(Harm(str(tmp_path / "harm")), path)
    assert refusal(path) == f"{path}: not a checkpoint of namernn_fast.names"
    assert list(tmp_path.iterdir()) == [path]
