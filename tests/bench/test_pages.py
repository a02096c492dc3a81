"""Tests that tables in the documentation match the recorded results."""

import functools

import pytest

from benchmarks.harness.paths import BUILT
from benchmarks.names import study
from benchmarks.names.study_report import card
from benchmarks.report.sections import SECTIONS, built, recorded
from namernn_fast.names import load
from namernn_fast.names.checkpoint import pretrained_checkpoint

site_page = functools.cache(built)


@pytest.mark.parametrize(
    ("results", "section"), [pytest.param(*found, id=found[1].name) for found in SECTIONS]
)
def test_a_section_matches_the_recorded_results(results, section):
    begin, end = f"<!-- {section.name}: begin -->\n", f"\n<!-- {section.name}: end -->"
    page = section.page.read_text(encoding="utf-8")
    if section.page in BUILT:
        assert begin + end[1:] in page
        page = site_page(section.page.stem, page)
    assert page.partition(begin)[2].partition(end)[0] == section.report(recorded(results))


def test_the_model_card_matches_the_recorded_results():
    size = pretrained_checkpoint().stat().st_size
    letters = load().folding.letters
    assert study.CARD.read_text(encoding="utf-8") == card(recorded("names"), size, letters)
