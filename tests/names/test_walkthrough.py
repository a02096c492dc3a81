"""The walk-through runs as plain Python: its assertions hold, and its figures can be drawn."""

import runpy
import warnings

import pytest
import torch

from namernn_fast.names import DownloadError, dataset

# Imported before the cache of a test is empty, where matplotlib would look for fonts anew.
matplotlib = pytest.importorskip("matplotlib", reason="the walk-through draws with matplotlib")
matplotlib.use("agg")
plt = pytest.importorskip("matplotlib.pyplot")
FIGURES = 9


@pytest.fixture
def walk(root, monkeypatch):
    """Runs the walk-through; returns its variables and the number of figures shown."""

    def run():
        shown = []

        def show():
            shown.append(plt.gcf())
            plt.gcf().canvas.draw()  # which a notebook does, and Agg's own `show` does not
            plt.close()

        monkeypatch.setattr(plt, "show", show)
        with matplotlib.rc_context(), warnings.catch_warnings(), torch.random.fork_rng():
            # matplotlib warns of a character that no font has, and of a layout that does not fit.
            warnings.simplefilter("error", UserWarning)
            variables = runpy.run_path(str(root / "examples" / "walkthrough.py"))
        assert not plt.get_fignums()
        return variables, len(shown)

    return run


def test_walkthrough_of_the_data_set(walk, real_folder, monkeypatch):
    monkeypatch.setenv("NAMERNN_FAST_DATA", str(real_folder))
    variables, figures = walk()
    assert not variables["data"].is_sample
    assert figures == FIGURES


def test_walkthrough_without_a_network(walk, monkeypatch, capsys):
    def no_network(url, path):
        raise DownloadError("there is no network")

    monkeypatch.setattr(dataset, "download_names", no_network)
    variables, figures = walk()
    assert variables["data"].is_sample
    assert figures == FIGURES
    assert "the embedded sample, not the data set" in capsys.readouterr().out
