"""A Sphinx extension: formulas as MathML, executed programs, links that leave docs."""

import jupytext
import latex2mathml.converter
from docutils import nodes
from nbformat import NotebookNode, v4
from sphinx.application import Sphinx

# Files outside of docs that are pages of the site as well. Links name the files, so
# that they work in a checkout.
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
    """Returns the notebook of a program in percent cells, as MyST-NB is to show it.

    The first cell, which is not shown, puts the embedded sample of names in the place of the data
    set. The code of drawings is folded away, and each figure has its description.
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


def link_to_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Makes links to files that are pages of the site into links to these pages."""
    up = "../" * docname.count("/")
    for file, page in PAGES.items():
        source[0] = source[0].replace(f"]({up}{file}", f"]({up}{page}")


_attributes: dict[str, list[str]] = {}


def keep_attribute(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Keeps the docstring of an attribute: Napoleon takes what precedes a colon for a type."""
    if what in ("attribute", "data", "property"):
        _attributes[name] = lines[:]


def restore_attribute(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Puts the docstring of an attribute back."""
    if name in _attributes:
        lines[:] = _attributes.pop(name)


def visit_math(self, node: nodes.math) -> None:
    """Writes a formula in a line of text as MathML."""
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self, node: nodes.math_block) -> None:
    """Writes a formula in a paragraph of its own as MathML."""
    self.body.append(latex2mathml.converter.convert(node.astext(), display="block"))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Tells Sphinx of the functions of this file."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("source-read", link_to_pages)
    app.connect("autodoc-process-docstring", keep_attribute, priority=400)  # Napoleon has 500
    app.connect("autodoc-process-docstring", restore_attribute, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
