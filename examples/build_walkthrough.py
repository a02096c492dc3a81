"""Builds the walk-through as a notebook and as a page that works offline and without scripts.

`python examples/build_walkthrough.py` runs examples/walkthrough.py and writes
build/walkthrough/walkthrough.ipynb and walkthrough.html. It needs the extra `walkthrough`.
"""

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

# This template replaces nbconvert's own, which loads RequireJS, MathJax and Mermaid from the
# network. The code of a cell with the tag "drawing" is folded until the reader opens it. The
# metadata `alt` of a cell is the alternative text of its figure.
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
math { font-family: "STIX Two Math", "Cambria Math", "DejaVu Math TeX Gyre", math; }
math[display=block] { margin: 0.8em 0; }
summary { color: #666; cursor: pointer; font-family: var(--jp-ui-font-family); padding: 0.3rem; }
</style>
{%- endblock -%}
{%- block input_group -%}
{%- if 'drawing' in cell.metadata.get('tags', ()) -%}
<details><summary>The code of this figure</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock -%}
{%- block data_png scoped -%}
<div class="jp-RenderedImage jp-OutputArea-output">
<img alt="{{ cell.metadata.alt | escape_html }}"
  src="data:image/png;base64,{{ output.data['image/png'] | escape_html }}">
</div>
{%- endblock -%}
"""


class MathRenderer(IPythonRenderer):
    """Renders formulas as MathML, which browsers draw without scripts."""

    def inline_math(self, body: str) -> str:
        return latex2mathml.converter.convert(body)

    def block_math(self, body: str) -> str:
        return latex2mathml.converter.convert(body, display="block")


class PageExporter(HTMLExporter):
    """Exports a notebook as one self-contained page."""

    @pass_context
    def markdown2html(self, context, source):
        return MarkdownWithMath(renderer=MathRenderer(escape=False)).render(source)


def run(source: Path) -> NotebookNode:
    """Runs a program with `# %%` cells, and returns it as a notebook with outputs and figures.

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
    # Run the kernel in the folder of the checkout, so that the checkout's package is imported.
    resources = {"metadata": {"path": str(ROOT)}}
    quiet = ["--log-level=ERROR"]  # the kernel warns that its sockets are not encrypted
    options = {"kernel_name": "python3", "extra_arguments": quiet, "timeout": 600}
    NotebookClient(notebook, resources=resources, **options).execute()
    return notebook


def page(notebook: NotebookNode) -> str:
    """Returns the notebook as HTML.

    Raises:
        ValueError: the page would need scripts, or a figure has no alternative text.
    """
    exporter = PageExporter(
        template_file="walkthrough.html.j2",
        extra_loaders=[DictLoader({"walkthrough.html.j2": TEMPLATE})],
    )
    html, _ = exporter.from_notebook_node(notebook)
    for unwanted in ("<script", '<img alt=""'):
        if unwanted in html:
            raise ValueError(f"the page holds {unwanted}")
    return html


def main(folder: Path = FOLDER) -> None:
    """Builds the notebook and the page in `folder`."""
    notebook = run(SOURCE)
    html = page(notebook)
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / "walkthrough.ipynb")
    (folder / "walkthrough.html").write_text(html, encoding="utf-8")
    print(f"wrote {folder}/walkthrough.ipynb and {folder}/walkthrough.html")


if __name__ == "__main__":
    main()
