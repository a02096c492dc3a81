"""Tests that the walk-through runs as plain Python and that its figures can be drawn."""

import runpy
import warnings

import pytest
import torch

# Import matplotlib before a fixture replaces the cache folder, or it would search for fonts again.
matplotlib = pytest.importorskip("matplotlib", reason="the walk-through draws with matplotlib")
matplotlib.use("agg")
plt = pytest.importorskip("matplotlib.pyplot")

FIGURES = 11


def walk(root, monkeypatch):
    """Runs the walk-through, checks that all figures can be laid out, and returns its variables."""
    shown = []

    def show():
        shown.append(plt.gcf())
        plt.gcf().draw_without_rendering()  # computes the layout, unlike Agg's `show`
        plt.close()

    monkeypatch.setattr(plt, "show", show)
    with matplotlib.rc_context(), warnings.catch_warnings(), torch.random.fork_rng():
        # matplotlib warns about characters that no font has, and layouts that do not fit.
        warnings.simplefilter("error", UserWarning)
        variables = runpy.run_path(str(root / "examples" / "walkthrough.py"))
    assert len(shown) == FIGURES
    assert not plt.get_fignums()
    return variables


@pytest.mark.slow
def test_the_walkthrough_runs_on_the_real_data(root, real_folder, monkeypatch):
    monkeypatch.setenv("NAMERNN_FAST_DATA", str(real_folder))
    assert not walk(root, monkeypatch)["data"].is_sample


@pytest.mark.slow
def test_the_walkthrough_runs_without_a_network(root, offline, monkeypatch, capsys):
    assert walk(root, monkeypatch)["data"].is_sample
    assert "made with the embedded sample of the data set" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_is_self_contained(root, tmp_path, monkeypatch, real_folder):
    for module in ("ipykernel", "jupytext", "latex2mathml", "nbconvert"):
        pytest.importorskip(module, reason=f"building the page needs {module}")
    monkeypatch.setenv("NAMERNN_FAST_DATA", str(real_folder))
    build = runpy.run_path(str(root / "examples" / "build_walkthrough.py"))
    build["main"](tmp_path)
    html = (tmp_path / "walkthrough.html").read_text(encoding="utf-8")
    assert "<math" in html
    assert html.count('src="data:image/png') == html.count("<img ") == FIGURES
    assert 'alt="The states of run' in html
    assert "<script" not in html
    assert (tmp_path / "walkthrough.ipynb").is_file()
