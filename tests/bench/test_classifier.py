"""Tests what the races of the names classifier count, check, time and report."""

import argparse
import dataclasses
import json
import sys

import pytest
import torch

from benchmarks.classifier import effort, gate, made_up, run, training, work
from benchmarks.classifier.application import Application
from benchmarks.classifier.made_up import ORDER, Imitation
from benchmarks.classifier.program import EMBEDDING, HIDDEN, Corpus, starting_weights
from benchmarks.classifier.report import report
from benchmarks.classifier.rivals import PROGRAMS
from benchmarks.classifier.stopwatch import PARTS, REST, TOTAL, Stopwatch
from benchmarks.classifier.with_torch import SETTINGS, WithTorch
from benchmarks.classifier.with_torch import fold as user_fold
from benchmarks.harness import peak, surnames
from benchmarks.harness.processes import in_new_process
from namernn_fast.names import ASCII
from namernn_fast.names.dataset import embedded_sample
from namernn_fast.testing import BudgetError

SMALL = dataclasses.replace(effort.TRIAL, batches=(16,), gate={16: 8}, many=300, fewer=100)


@pytest.fixture(autouse=True)
def _sample(monkeypatch):
    monkeypatch.setattr(surnames, "names", embedded_sample)


@pytest.fixture(scope="module")
def corpus():
    """Returns the corpus of the embedded sample of names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surnames, "names", embedded_sample)
        return Corpus.of_data()


@pytest.fixture(scope="module")
def weights(corpus):
    return starting_weights(len(corpus.languages))


def test_the_embedded_sample_is_enough_for_a_whole_run(corpus):
    whole = effort.effort_of(argparse.Namespace(quick=False, seconds=2.0, record=True))
    fitted = whole.within(len(corpus.names))
    assert fitted.batches == (16, 64)
    for batch in fitted.batches:
        for stretch in (fitted.stretch, fitted.stretch // 2):
            course = training.Course(len(corpus.names), batch, stretch)
            assert course.stretches
    assert whole.within(20_074) == whole


def test_made_up_names_look_like_the_data(corpus):
    imitation = Imitation(corpus.names)
    names = imitation.draw(3000)
    assert names == imitation.draw(3000) != imitation.draw(3000, seed=1)
    assert len(names) == 3000
    known = {" " * ORDER + ASCII.fold(name) + "$" for name in corpus.names}
    known = {text[at : at + ORDER + 1] for text in known for at in range(len(text) - ORDER)}
    for name in names:
        text = " " * ORDER + ASCII.fold(name) + "$"
        assert 0 < len(name) == len(ASCII.fold(name)) <= imitation.longest
        if len(name) < imitation.longest:
            assert {text[at : at + ORDER + 1] for at in range(len(text) - ORDER)} <= known
    for has in (str.isascii, lambda name: name[0].isupper(), lambda name: len(name) > 7):
        theirs, ours = (sum(map(has, some)) / len(some) for some in (corpus.names, names))
        assert ours == pytest.approx(theirs, abs=0.05)


def test_names_are_made_up_in_chunks(corpus, monkeypatch):
    monkeypatch.setattr(made_up, "CHUNK", 4)
    assert len(Imitation(corpus.names).draw(9)) == 9


@pytest.mark.parametrize("texts", [["ab"], ["ab", "ab", "abc"], ["b", "abc", "abd", "bb", "abc"]])
def test_states_are_counted_with_and_without_shared_prefixes(texts):
    beginnings = {text[:end] for text in texts for end in range(1, len(text) + 1)}
    counts = work.count(texts)
    firsts = sum(len(beginning) == 1 for beginning in beginnings)
    assert counts == work.Counts(len(texts), sum(map(len, texts)), len(beginnings), firsts)
    twice = work.count_batches([texts, texts])
    assert twice == work.Counts(*(2 * value for value in dataclasses.astuple(counts)))


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_floor_counts_the_multiply_adds_of_the_formula(program):
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


def ids_and_labels(program, batch):
    if isinstance(program, Application):
        packed, labels = batch.names, batch.targets
    else:
        packed, labels = batch
    return packed.data, packed.batch_sizes, labels


def test_all_programs_get_the_same_batches(corpus, weights):
    order = torch.randperm(len(corpus.names))[:50]
    found = [
        [ids_and_labels(program, batch) for batch in program.batches(order, 16)]
        for program in (program_class(corpus, weights) for program_class in PROGRAMS)
    ]
    for batches in zip(*found, strict=True):
        for theirs, ours in zip(*batches, strict=True):
            assert torch.equal(theirs, ours)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_do_not_change_losses(corpus, weights, settings):
    wanted = gate.losses(WithTorch(corpus, weights), corpus, 100, 5)
    found = gate.losses(WithTorch(corpus, weights, settings), corpus, 100, 5)
    torch.testing.assert_close(found, wanted)


def test_the_users_program_folds_names_like_the_application():
    names = ["O`Neill", "Strauß", "ŁÓDŹ", " Ø. d'Æ ", "Nguyễn", "Ş1-2", "İı", "A\u00a0B"]
    assert [*map(user_fold, names)] == [*map(ASCII.fold, names)]


class SlightlyWrong(Application):
    name = "wrong"

    def train(self, batches):
        loss, accuracy = super().train(batches)
        return loss * (1 + 2e-6), accuracy


class OtherBatches(Application):
    name = "wrong"

    def batches(self, order, batch_size):
        for batch in super().batches(order, batch_size):
            yield batch._replace(targets=batch.targets.roll(1))


@pytest.mark.parametrize("wrong", [SlightlyWrong, OtherBatches])
def test_the_gate_finds_wrong_losses(corpus, weights, wrong):
    gate.check_losses(PROGRAMS, corpus, weights, 16, 5)
    with pytest.raises(BudgetError, match="wrong, batches of 16: losses: error"):
        gate.check_losses([*PROGRAMS, wrong], corpus, weights, 16, 5)


def test_the_gate_finds_wrong_labels(corpus, weights):
    class Wrong(Application):
        name = "wrong"

        def label(self, names):
            labels = super().label(names)
            labels[3] = next(other for other in corpus.languages if other != labels[3])
            return labels

    after = gate.check_losses(PROGRAMS, corpus, weights, 64, 5)
    programs = {program_class: program_class(corpus, after) for program_class in PROGRAMS}
    gate.check_labels(programs, corpus, corpus.names)
    programs[Wrong] = Wrong(corpus, after)
    with pytest.raises(BudgetError, match=r"wrong: \w+ for '\w+' has a score"):
        gate.check_labels(programs, corpus, corpus.names[:10])


def test_any_language_with_the_top_score_counts_as_right(corpus, weights):
    class Last(WithTorch):
        name = "last of equals"

        def label(self, names):
            scores = self.scores(names).flip(1)
            return [self.languages[-1 - place] for place in scores.argmax(1).tolist()]

    equal = {name: value.clone() for name, value in weights.items()}
    for name in ("classifier.weight", "classifier.bias"):
        equal[name][:] = equal[name][:1]
    programs = {program_class: program_class(corpus, equal) for program_class in (WithTorch, Last)}
    first, last = (program.label(corpus.names[:5]) for program in programs.values())
    assert first != last
    gate.check_labels(programs, corpus, corpus.names[:5])


def test_a_stopwatch_times_the_parts_of_every_loop(corpus, weights):
    for program_class in PROGRAMS:
        course = training.Course(len(corpus.names), 16, 48)
        train, watch = course.runner(program_class(corpus, weights))
        for _ in range(len(course.stretches) + 1):
            train()
        assert len(watch.recorded) == len(course.stretches) + 1
        for recorded in watch.recorded:
            assert recorded.keys() == {*PARTS, REST, TOTAL}
            assert 0 < sum(recorded[part] for part in PARTS) < recorded[TOTAL]
        epoch = training.medians(watch.recorded, 10)
        assert epoch[TOTAL] >= 10 * min(recorded[TOTAL] for recorded in watch.recorded)


def test_a_loop_that_bypasses_the_hooks_is_not_timed(corpus, weights):
    class Sly(WithTorch):
        name = "sly"

        def train(self, batches):
            for names, _ in batches:
                self.model.forward(names)

    watch = Stopwatch(Sly(corpus, weights))
    with pytest.raises(RuntimeError, match="sly trains past the hooks"):
        watch.train(torch.arange(32), 16)


def test_a_course_needs_enough_names_for_a_stretch():
    with pytest.raises(ValueError, match="30 names are fewer than the 32 of a stretch"):
        training.Course(30, 16, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_peak_of_a_call_excludes_earlier_allocations():
    size = 64 * 2**20
    kept = torch.ones(size // 4)
    assert peak.peak_above(lambda: None) < size // 8
    # A peak does not hide a later, lower peak.
    peak.peak_above(lambda: torch.ones(size))
    found = peak.peak_above(lambda: torch.ones(size // 4))
    assert size * 0.95 < found < size * 1.1
    del kept


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_fresh_process_does_not_inherit_the_peak_of_its_parent():
    size = 512 * 2**20
    kept = torch.ones(size // 4)
    fresh = in_new_process(peak.peak_bytes)
    assert 0 < fresh < peak.peak_bytes() - size // 2
    del kept


def test_a_run_times_and_reports_every_program(threads):
    threads(2)
    options = argparse.Namespace(threads=2)
    document = json.loads(json.dumps(run.run(options, SMALL, [])))
    for count in (1, 2):
        trained = [row for row in document["training"] if row["threads"] == count]
        assert [row["program"] for row in trained] == [program.name for program in PROGRAMS]
        assert {row["batch"] for row in trained} == {16}
        assert all(row["floor"] > 0 < row["seconds"][TOTAL] for row in trained)
        labelled = [row for row in document["labels"] if row["threads"] == count]
        names = {row["names"] for row in labelled}
        assert names == {document["names"], SMALL.many if count == 2 else SMALL.fewer}
    machine = {"cpu": "a CPU", "threads": 2, "torch": "2.13"}
    text = report({"machine": machine, **document})
    for program in PROGRAMS:
        assert text.count(f"| {program.name} ") >= 4
    for title in ("An epoch of training, 2", "From strings to labels, 1", "Memory"):
        assert f"**{title}" in text
    assert "the small embedded sample of names" in text


@pytest.mark.parametrize(
    ("check", "untimed", "kept"),
    [
        ("check_losses", "training", "labels"),
        ("check_labels", "labels", "training"),
    ],
)
def test_a_wrong_result_does_not_stop_other_timings(check, untimed, kept, threads, monkeypatch):
    def planted(*_):
        raise BudgetError("planted")

    threads(1)
    monkeypatch.setattr(gate, check, planted)
    wrong = []
    document = run.run(argparse.Namespace(threads=1), SMALL, wrong)
    assert [failure.partition(": ")[2] for failure in wrong] == ["planted"]
    assert not document[untimed]
    assert document[kept]
    machine = {"cpu": "a CPU", "threads": 1, "torch": "2.13"}
    assert "**Memory**" in report({"machine": machine, **document})
