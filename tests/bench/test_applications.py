"""Tests the benchmarks of whole programs, with stub programs that only return a result."""

import argparse
import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from benchmarks.cpu import applications
from benchmarks.harness.precise import make_precise
from benchmarks.harness.turns import Program
from namernn_fast.testing import BudgetError

STUDY = applications.STUDY


def program(before, after, exact=2.0):
    """Returns a stub program with three versions, which return the given results."""
    makers = (lambda result=result: lambda: result for result in (before, after, exact))
    return Program("tagger", *makers, {"timed": "an epoch"})


def test_a_row_records_every_round_of_both_versions():
    row = STUDY.measure_program(program(2.0, 2.0 + 2**-20), seconds=0.0)
    assert [len(row["seconds"][role]) for role in ("before", "after")] == [3, 3]
    assert row["difference"] == 2**-20


@pytest.mark.parametrize("wrong", [2.0 + 2**-16, torch.tensor([2.0, 2.0, 2.0 + 2**-16])])
def test_a_program_with_wrong_results_is_not_timed(wrong):
    same = torch.full_like(torch.as_tensor(wrong), 2.0)
    with pytest.raises(BudgetError, match=r"result: error 1\.53e-05 exceeds its budget"):
        STUDY.measure_program(program(same, wrong, same), seconds=0.0)


def test_precise_layers_compute_in_float64_and_return_float32():
    torch.manual_seed(0)
    x, layer = torch.randn(50, 3, 4), torch.nn.LSTM(4, 8)
    precise, exact = make_precise(copy.deepcopy(layer)), copy.deepcopy(layer).double()
    output, states = precise(x, (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)))
    wanted, wanted_states = exact(x.double())
    for found, value in zip((output, *states), (wanted, *wanted_states), strict=True):
        assert torch.equal(found, value.float())
    assert not torch.equal(output, layer(x)[0])
    packed = pack_sequence([x[:, 0], x[:9, 1]])
    assert torch.equal(precise(packed)[0].data, exact(packed.double())[0].data.float())


def test_missing_packages_and_wrong_programs_do_not_stop_other_programs(monkeypatch, capsys):
    right, wrong = program(2.0, 2.0), []
    others = [replace(right, package="not_installed"), program(2.0, 3.0), right]
    study = replace(STUDY, cases=others)
    rows = study.run(argparse.Namespace(threads=1, quick=True), wrong)
    assert [row["name"] for row in rows] == ["tagger"]
    assert len(wrong) == 1
    assert wrong[0].startswith("tagger: result: error 1 exceeds its budget")
    assert "not_installed is not installed" in capsys.readouterr().out
