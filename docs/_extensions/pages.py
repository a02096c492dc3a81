"""A Sphinx extension for MathML formulas, executed programs and links to files outside docs."""

import itertools
import re

import jupytext
import latex2mathml.converter
from docutils import nodes
from nbformat import NotebookNode, v4
from sphinx.application import Sphinx

from benchmarks.harness.paths import RESULTS
from benchmarks.report.sections import built

# Files outside docs that are also pages of the site. Links use the file names, so that the links
# work in a checkout.
PAGES = {
    "../CHANGELOG.md": "changelog.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../examples/walkthrough.py": "walkthrough.nb.py",
    "../namernn_fast/names/pretrained/MODEL_CARD.md": "model_card.md",
}

WITHOUT_DATA = """
from namernn_fast import names
from namernn_fast.names.dataset import embedded_sample

names.load_names = embedded_sample
"""


def read_program(text: str) -> NotebookNode:
    """Converts a program with `# %%` cells to a notebook for MyST-NB.

    A hidden first cell replaces the data set with the embedded sample of names. Code that draws
    figures is folded, and each figure gets its alternative text.
    """
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    for cell in notebook.cells:
        tags = cell.metadata.setdefault("tags", [])
        if "drawing" in tags:
            tags.append("hide-input")
        if "alt" in cell.metadata:
            cell.metadata["mystnb"] = {"image": {"alt": cell.metadata["alt"]}}
    notebook.cells.insert(0, v4.new_code_cell(WITHOUT_DATA, metadata={"tags": ["remove-cell"]}))
    return notebook


def fill_tables(app: Sphinx, docname: str, source: list[str]) -> None:
    """Fills the sections of pages that show recorded benchmarks.

    Such a page depends on the records, so that an incremental build shows the latest ones.
    """
    filled = built(docname, source[0])
    if filled != source[0]:
        source[0] = filled
        for path in sorted(RESULTS.rglob("*.json")):
            app.env.note_dependency(str(path))


def link_to_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replaces links to files that are pages of the site with links to these pages."""
    up = "../" * docname.count("/")
    for file, page in PAGES.items():
        source[0] = source[0].replace(f"]({up}{file}", f"]({up}{page}")


_attributes: dict[str, list[str]] = {}


def keep_attribute(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Saves an attribute's docstring, because Napoleon would read text before a colon as a type."""
    if what in ("attribute", "data", "property"):
        _attributes[name] = lines[:]


def restore_attribute(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Restores the docstring that `keep_attribute` saved, after Napoleon has changed it."""
    if name in _attributes:
        lines[:] = _attributes.pop(name)


# Matches the vanilla cell's equation in a line of a docstring, with or without backticks.
_EQUATION = re.compile(r"`?\bh(?:_t|') = (?:act|tanh)\(.*? b_hh\)`?")
# Matches a line of an indented block of equations, as in the docstring of the GRU.
_LINE_OF_BLOCK = re.compile(r"\s+(\w+) = (.+)")


def as_formula(equation: str) -> str:
    """Converts an equation in a docstring to LaTeX."""
    formula = re.sub(r"_(\w\w)", r"_{\1}", equation)
    formula = re.sub(r"\b(act|sigmoid)\b", r"\\operatorname{\1}", formula)
    return formula.replace("tanh", r"\tanh").replace("*", r"\odot")


def typeset_equations(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Replaces equations in a docstring, which are plain text for `help()`, with formulas.

    An equation is either part of a line, or in an indented block after a line that ends in `::`.
    """
    for i, line in enumerate(lines):
        if found := _EQUATION.search(line):
            formula = as_formula(found[0].strip("`"))
            lines[i] = f"{line[: found.start()]}:math:`{formula}`{line[found.end() :]}"
    for start in range(len(lines) - 2, 0, -1):
        if not (lines[start - 1].endswith("::") and _LINE_OF_BLOCK.fullmatch(lines[start + 1])):
            continue
        equations = itertools.takewhile(bool, map(_LINE_OF_BLOCK.fullmatch, lines[start + 1 :]))
        rows = [as_formula(f"{left} &= {right}") for left, right in map(re.Match.groups, equations)]
        lines[start - 1] = lines[start - 1][:-1]
        block = "".join([r"\begin{split} ", r" \\ ".join(rows), r" \end{split}"])
        lines[start : start + 1 + len(rows)] = ["", ".. math::", "", f"   {block}"]


def visit_math(self, node: nodes.math) -> None:
    """Writes an inline formula as MathML."""
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self, node: nodes.math_block) -> None:
    """Writes a displayed formula as MathML."""
    self.body.append(latex2mathml.converter.convert(node.astext(), display="block"))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the functions of this file with Sphinx."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("source-read", fill_tables)
    app.connect("source-read", link_to_pages)
    app.connect("autodoc-process-docstring", typeset_equations, priority=300)
    app.connect("autodoc-process-docstring", keep_attribute, priority=400)  # before Napoleon
    app.connect("autodoc-process-docstring", restore_attribute, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
