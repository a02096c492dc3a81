"""Tests that code in pages and docstrings runs, and that links in pages resolve."""

import doctest
import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest
import torch

import namernn_fast
from namernn_fast.nn.weights import CLASSES

ROOT = Path(__file__).parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("namernn_fast/**/*.md")]
}
EXPORTING = {"docs/guides/export.md", "docs/names.md"}  # pages that export to ONNX, which is slow
WITH_CODE = [
    pytest.param(name, marks=pytest.mark.slow if name in EXPORTING else ())
    for name, text in sorted(PAGES.items())
    if "```python" in text
]
MODULES = [
    "testing",
    *(f"names.{name}" for name in ("dataset", "encoding", "folding", "prediction")),
]


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_in_a_page_runs(page):
    """Runs the Python blocks of a page in order, and compares the results of `>>>` lines."""
    sybil = pytest.importorskip("sybil")
    markdown = pytest.importorskip("sybil.parsers.markdown")
    if page in EXPORTING:
        pytest.importorskip("onnxscript")
    parsers = [markdown.PythonCodeBlockParser(doctest_optionflags=FLAGS), markdown.SkipParser()]
    for example in sybil.Sybil(parsers).parse(ROOT / page).examples():
        example.evaluate()


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module):
    ran = doctest.testmod(importlib.import_module(f"namernn_fast.{module}"), optionflags=FLAGS)
    assert ran.attempted
    assert not ran.failed


@pytest.mark.parametrize("name", ["explain", "recurrent_cell", "replace_rnn", "Stream", *CLASSES])
def test_examples_of_public_names_run(name):
    """`doctest.testmod` skips these examples, because the names' __module__ is `namernn_fast`."""
    public = getattr(namernn_fast, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(public, name)
    test.globs = {**vars(namernn_fast), "torch": torch}
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test)
    assert runner.tries
    assert not runner.failures


VANILLA = r"h_t = \operatorname{act}(x_t W_{ih}^T + b_{ih} + h_{t-1} W_{hh}^T + b_{hh})"
GRU = (
    r"\begin{split} r &= \operatorname{sigmoid}(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\ "
    r"z &= \operatorname{sigmoid}(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\ "
    r"n &= \tanh(W_{in} x_t + b_{in} + r \odot (W_{hn} h_{t-1} + b_{hn})) \\ "
    r"h_t &= (1 - z) \odot n + z \odot h_{t-1} \end{split}"
)


@pytest.mark.parametrize(
    ("name", "formula"),
    [("FusedRNN", VANILLA), ("rnn", VANILLA), ("FusedGRU", GRU)],
)
def test_equations_in_docstrings_are_converted_to_formulas(name, formula):
    """The documentation site must show MathML instead of the source of an equation."""
    for package in ("jupytext", "latex2mathml", "sphinx"):  # installed for `make docs ONLY=test`
        pytest.importorskip(package)
    pages = runpy.run_path(str(ROOT / "docs" / "_extensions" / "pages.py"))
    lines = inspect.getdoc(getattr(namernn_fast, name)).splitlines()
    pages["typeset_equations"](None, "", name, None, None, lines)
    typeset = "\n".join(lines)
    assert f":math:`{formula}`" in typeset or f"\n\n.. math::\n\n   {formula}\n\n" in typeset
    assert not any(re.match(r"\s+\w+ = ", line) for line in lines)


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]+`", "code", text, flags=re.DOTALL)


def places(text):
    """Returns the anchors that GitHub creates for the headings of a Markdown page."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_to_files_and_headings_resolve(page):
    """Checks relative links. Links to other sites are not checked."""
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(PAGES[page])):
        if not link.startswith(("https:", "http:")):
            file, _, place = link.partition("#")
            target = (ROOT / page).parent / file if file else ROOT / page
            assert target.exists(), link
            assert not place or place in places(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", sorted(PAGES))
def test_code_blocks_with_a_python_session_are_marked_as_python(page):
    """`>>>` lines in a block that is not marked as Python would not be tested."""
    assert not re.search(r"^```(?!python)\w*\n>>>", PAGES[page], flags=re.MULTILINE)


def test_check_site_reports_faults(tmp_path):
    page = "<h1 id='here'>{}</h1>"
    outside = "<img src='//x.org/a.png'><a href='https://x.org'>no request</a>"
    (tmp_path / "good.html").write_text(page.format("<a href='faulty.html#here'>good</a>"))
    (tmp_path / "faulty.html").write_text(
        page.format(f"<a href='good.html#there'></a><a href='gone.html'></a>{outside}")
    )
    (tmp_path / "site.css").write_text("@import url('https://x.org/font.css');")
    findings = runpy.run_path(str(ROOT / "docs" / "check_site.py"))["findings"]
    assert list(findings(tmp_path)) == [
        "faulty.html: fetches //x.org/a.png",
        "faulty.html: leads to good.html#there, which has no such anchor",
        "faulty.html: leads to gone.html, which does not exist",
        "site.css: fetches https://x.org/font.css",
    ]
