"""Tests what the benchmark of the names classifier counts, checks, times and reports."""

import argparse
import functools
import json
import pickle
import sys
from unittest import mock

import pytest
import torch

from benchmarks.harness import peak
from benchmarks.harness.processes import in_new_process
from benchmarks.names import classifier, data, gate, memory, work
from benchmarks.names.classifier_report import report
from benchmarks.names.data import Corpus
from benchmarks.names.programs import (
    EMBEDDING,
    HIDDEN,
    PROGRAMS,
    SETTINGS,
    Application,
    WithTorch,
    starting_weights,
)
from benchmarks.names.stopwatch import PARTS, REST, TOTAL, time_training
from namernn_fast.names import ASCII
from namernn_fast.names.dataset import embedded_sample
from namernn_fast.testing import BudgetError

SMALL = classifier.Effort(corpus=None, batches=(16, 1024), steps=8, made_up=300)


@pytest.fixture(scope="module", autouse=True)
def _sample():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "names", embedded_sample)
        yield


@pytest.fixture(scope="module")
def corpus():
    return Corpus.of_data()


@pytest.fixture(scope="module")
def weights(corpus):
    return starting_weights(len(corpus.languages))


@pytest.mark.parametrize(
    ("names", "batch_size", "count", "size"),
    [(365, 16, 1, 352), (365, 182, 1, 364), (20_074, 16, 19, 1024), (20_074, 1024, 9, 2048)],
)
def test_timed_parts_of_an_epoch_contain_whole_batches(names, batch_size, count, size):
    parts = classifier.stretches(torch.arange(names), batch_size)
    assert [len(part) for part in parts] == [size] * count
    assert torch.equal(torch.cat(parts), torch.arange(count * size))


def test_states_are_counted_with_and_without_shared_prefixes():
    counts = work.count(["b", "abc", "abd", "bb", "abc"])  # prefixes: a, ab, abc, abd, b, bb
    wanted = {"batches": 1, "names": 5, "characters": 12, "prefixes": 6, "firsts": 2}
    assert counts == wanted
    twice = work.count_batches([["b", "abc", "abd", "bb", "abc"]] * 2)
    assert twice == {key: 2 * value for key, value in wanted.items()}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_minimum_time_follows_from_the_multiply_adds(program):
    shares = program is Application
    texts, languages = ["abc", "abd", "b"], 5
    states = set()
    forward = 0
    for name, text in enumerate(texts):
        for end in range(1, len(text) + 1):
            key = text[:end] if shares else (name, end)
            if key not in states and end > 1:
                forward += HIDDEN * HIDDEN
            states.add(key)
            forward += 0 if shares else EMBEDDING * HIDDEN
        forward += HIDDEN * languages
    forward += len(ASCII.alphabet) * EMBEDDING * HIDDEN if shares else 0
    for training_too, passes in ((False, 1), (True, 3)):
        found = work.floor(work.count(texts), languages, training_too, program, peak=2e9)
        assert found == pytest.approx(passes * forward / 1e9)


def ids_and_labels(batch):
    packed, labels, *_ = batch
    return packed.data, packed.batch_sizes, labels


def test_all_programs_get_the_same_batches(corpus, weights):
    order = torch.randperm(len(corpus.names))[:50]
    found = [
        [ids_and_labels(batch) for batch in program.batches(order, 16)]
        for program in (program_class(corpus, weights) for program_class in PROGRAMS)
    ]
    for batches in zip(*found, strict=True):
        for theirs, ours in zip(*batches, strict=True):
            assert torch.equal(theirs, ours)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_torch_settings_do_not_change_losses(corpus, weights, settings):
    program = functools.partial(WithTorch, settings=settings)
    gate.check_losses(program, corpus, weights, 100, 5)


class SlightlyWrong(Application):
    def train(self, batches):
        loss, accuracy = super().train(batches)
        return loss * (1 + 2e-6), accuracy


class OtherBatches(Application):
    def batches(self, order, batch_size):
        for batch in super().batches(order, batch_size):
            yield batch._replace(targets=batch.targets.roll(1))


@pytest.mark.parametrize("wrong", [SlightlyWrong, OtherBatches])
def test_wrong_losses_raise_an_error(corpus, weights, wrong):
    gate.check_losses(Application, corpus, weights, 16, 5)
    with pytest.raises(BudgetError, match="losses, batches of 16: error"):
        gate.check_losses(wrong, corpus, weights, 16, 5)


def test_wrong_labels_raise_an_error(corpus, weights):
    class Wrong(Application):
        def label(self, names):
            labels = super().label(names)
            labels[3] = next(other for other in corpus.languages if other != labels[3])
            return labels

    after = gate.check_losses(Application, corpus, weights, 64, 5)
    gate.check_labels(Application(corpus, after), corpus, corpus.names)
    with pytest.raises(BudgetError, match=r"the score of \w+ for '\w+' is .* below"):
        gate.check_labels(Wrong(corpus, after), corpus, corpus.names[:10])


def test_any_language_with_the_top_score_counts_as_correct(corpus, weights):
    class Last(WithTorch):
        def label(self, names):
            scores = self.scores(names).flip(1)
            return [self.languages[-1 - place] for place in scores.argmax(1).tolist()]

    equal = {name: value.clone() for name, value in weights.items()}
    for name in ("classifier.weight", "classifier.bias"):
        equal[name][:] = equal[name][:1]
    last = Last(corpus, equal)
    assert last.label(corpus.names[:5]) != WithTorch(corpus, equal).label(corpus.names[:5])
    gate.check_labels(last, corpus, corpus.names[:5])


@pytest.mark.parametrize("program_class", PROGRAMS)
def test_every_part_of_a_training_loop_is_timed(corpus, weights, program_class):
    recorded = []
    parts = torch.arange(96).split(48)
    train = classifier.trainer(program_class(corpus, weights), parts, 16, recorded)
    for _ in range(3):
        train()
    assert len(recorded) == 3
    for seconds in recorded:
        assert seconds.keys() == {*PARTS, REST, TOTAL}
        assert 0 < sum(seconds[part] for part in PARTS) < seconds[TOTAL]
    epoch = classifier.epoch_seconds(recorded, 10)
    assert epoch[TOTAL] == 10 * sorted(seconds[TOTAL] for seconds in recorded)[1]


def test_timing_a_loop_that_bypasses_the_hooks_raises_an_error(corpus, weights):
    class Sly(WithTorch):
        name = "sly"

        def train(self, batches):
            for names, _ in batches:
                self.model.forward(names)

    with pytest.raises(RuntimeError, match="the hooks missed a part of sly's training"):
        time_training(Sly(corpus, weights), torch.arange(32), 16)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_peak_memory_of_a_call_excludes_earlier_allocations():
    size = 64 * 2**20
    kept = torch.ones(size // 4)
    assert peak.peak_above(lambda: None) < size // 8
    # A high peak in one call does not affect the measured peak of the next call.
    peak.peak_above(lambda: torch.ones(size))
    found = peak.peak_above(lambda: torch.ones(size // 4))
    assert size * 0.95 < found < size * 1.1
    del kept


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_new_process_does_not_inherit_peak_memory():
    size = 512 * 2**20
    kept = torch.ones(size // 4)
    fresh = in_new_process(peak.peak_bytes)
    assert 0 < fresh < peak.peak_bytes() - size // 2
    del kept


@pytest.fixture
def run(threads, monkeypatch):
    """Returns a function that runs the whole benchmark in this process; see `classifier.run`."""

    def here(task, *arguments):
        return task(*pickle.loads(pickle.dumps(arguments)))

    def call(count, wrong):
        threads(count)
        monkeypatch.setattr(memory, "in_new_process", here)
        options = argparse.Namespace(threads=count, quick=True, record=True)
        machine = {"cpu": "a CPU", "threads": count, "torch": "2.13"}
        document = {"machine": machine, **classifier.run(options, SMALL, wrong)}
        return json.loads(json.dumps(document))

    return call


@pytest.mark.slow
def test_a_run_times_and_reports_every_program(run):
    document = run(2, [])
    for count in (1, 2):
        trained = [row for row in document["training"] if row["threads"] == count]
        assert [row["program"] for row in trained] == [program.name for program in PROGRAMS]
        assert {row["batch"] for row in trained} == {16}  # there are too few names for 1024
        assert all(row["floor"] > 0 < row["seconds"][TOTAL] for row in trained)
        labelled = [row for row in document["labels"] if row["threads"] == count]
        assert {row["names"] for row in labelled} == {document["names"], 300 if count == 2 else 100}
    text = report(document)
    for program in PROGRAMS:
        assert text.count(f"| {program.name} ") >= 4
    for title in ("An epoch of training", "From strings to labels", "Memory"):
        assert f"**{title}**" in text
    assert "1 thread(s): epoch" in text
    assert "2 thread(s): time" in text
    assert "the small embedded sample of names" in text


@pytest.mark.covering(0)
@pytest.mark.parametrize(
    ("check", "untimed", "kept"),
    [("check_losses", "training", "labels"), ("check_labels", "labels", "training")],
)
def test_a_wrong_result_prevents_only_its_own_timing(check, untimed, kept, run, monkeypatch):
    monkeypatch.setattr(gate, check, mock.Mock(side_effect=BudgetError("planted")))
    wrong = []
    document = run(1, wrong)
    assert [failure.partition(": ")[2] for failure in wrong] == ["planted"]
    assert not document[untimed]
    assert document[kept]
    assert "**Memory**" in report(document)
