"""Builds the walk-through as a notebook and as a page that needs neither a network nor scripts.

`python examples/build_walkthrough.py` runs examples/walkthrough.py and writes
build/walkthrough/walkthrough.ipynb and walkthrough.html. It needs the extra `walkthrough`.
"""

import sys
from pathlib import Path

import jupytext
import latex2mathml.converter
import nbformat
from jinja2 import DictLoader, pass_context
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "examples" / "walkthrough.py"
FOLDER = ROOT / "build" / "walkthrough"

# The templates of nbconvert load scripts from a network: RequireJS, MathJax and Mermaid. The page
# needs none of them. Prompts and the width of the window are left out too.
TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}
<style>
body.jp-Notebook { max-width: 60rem; margin: 0 auto; padding: 1rem; }
.jp-InputPrompt, .jp-OutputPrompt { display: none; }
.jp-RenderedMarkdown { font-size: 1rem; line-height: 1.5; }
math { font-size: 1.1em; }
math[display=block] { margin: 0.8em 0; }
</style>
{%- endblock -%}
"""


class MathRenderer(IPythonRenderer):
    """Renders formulas as MathML, which browsers draw by themselves."""

    def inline_math(self, body: str) -> str:
        return latex2mathml.converter.convert(body)

    def block_math(self, body: str) -> str:
        return latex2mathml.converter.convert(body, display="block")


class PageExporter(HTMLExporter):
    """Exports a notebook as one page with everything in it."""

    @pass_context
    def markdown2html(self, context, source):
        return MarkdownWithMath(renderer=MathRenderer(escape=False)).render(source)


def run(source: Path) -> NotebookNode:
    """Returns the notebook of a program in percent cells, with its outputs and figures.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = jupytext.read(source)
    notebook.metadata["title"] = "A recurrent network, from one formula to a surname's language"
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    # The kernel is told where the notebook's own package is, whatever is installed.
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    return notebook


def describe_figures(notebook: NotebookNode) -> None:
    """Gives each figure the cell's `alt` as its alternative text.

    Raises:
        ValueError: a cell draws a figure and has no `alt`.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                if "alt" not in cell.metadata:
                    raise ValueError(f"a figure has no alternative text: {cell.source[:60]!r}")
                output.metadata["alt"] = cell.metadata["alt"]


def page(notebook: NotebookNode) -> str:
    """Returns the notebook as HTML.

    Raises:
        ValueError: the page would load something from elsewhere.
    """
    exporter = PageExporter(
        template_file="walkthrough.html.j2",
        extra_loaders=[DictLoader({"walkthrough.html.j2": TEMPLATE})],
    )
    html, _ = exporter.from_notebook_node(notebook)
    if "<script" in html:
        raise ValueError("the page has a script")
    return html


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    notebook = run(SOURCE)
    describe_figures(notebook)
    nbformat.write(notebook, FOLDER / "walkthrough.ipynb")
    (FOLDER / "walkthrough.html").write_text(page(notebook), encoding="utf-8")
    print(f"wrote {FOLDER}/walkthrough.ipynb and .html")


if __name__ == "__main__":
    sys.exit(main())
