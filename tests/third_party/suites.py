"""The suites of `run.py`: libraries, the origin of their tests, the files that use a layer."""

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Checkout:
    """Test files that a library keeps in its repository and leaves out of its packages.

    Attributes:
        repository: owner/name.
        tag: the release that the test files belong to.
        paths: the files and folders to take.
        package: the folder within the installed library that its tests are imported from, and
            that gets a copy of the first path; empty if the tests do not import each other.
    """

    repository: str
    tag: str
    paths: tuple[str, ...]
    package: str = ""


@dataclass(frozen=True)
class Suite:
    """A library and some of its tests: one row of the table.

    Attributes:
        library: the name of its package.
        version: the release, which is fixed so that two runs can be compared.
        tests: the arguments of pytest; `{sources}` stands for the folder of the checkout.
        origin: who wrote the tests, for the table.
        extras: the extras of its package to install, such as `[torch]`.
        needs: packages that its tests import.
        checkout: where the test files come from if the package has none.
    """

    library: str
    version: str
    tests: tuple[str, ...]
    origin: str = "its own"
    extras: str = ""
    needs: tuple[str, ...] = ()
    checkout: Checkout | None = None

    @property
    def key(self) -> str:
        """The common part of the names of its result files."""
        return f"{self.library}-{self.origin.replace(' ', '-')}"

    @property
    def requirements(self) -> tuple[str, ...]:
        return (f"{self.library}{self.extras}=={self.version}", *self.needs)


def written_here(library: str, version: str, *needs: str) -> Suite:
    """Returns a suite of this folder, for uses of a layer that a library's own tests lack."""
    file = HERE / f"{library}_with_rnn.py"
    return Suite(library, version, (str(file),), origin="written here", needs=needs)


FORECASTING = "darts.tests.models.forecasting"
SUITES = (
    Suite(
        "darts",
        "0.46.1",
        (
            "--pyargs",
            f"{FORECASTING}.test_RNN",
            f"{FORECASTING}.test_block_RNN",
            f"{FORECASTING}.test_ptl_trainer",
            f"{FORECASTING}.test_torch_forecasting_model",
            "darts.tests.explainability.test_torch_explainer",
            "darts.tests.optional_deps.test_onnx",
        ),
        extras="[torch]",
        # With newer pandas or statsmodels, tests fail that have nothing to do with a layer.
        needs=("onnx", "onnxruntime", "onnxscript", "pandas<3", "statsmodels<0.15"),
        checkout=Checkout("unit8co/darts", "0.46.1", ("darts/tests",), "darts/tests"),
    ),
    Suite(
        "opacus",
        "1.6.0",
        (
            "--pyargs",
            "opacus.tests.dp_layers.dp_rnn_test",
        ),
        needs=("hypothesis",),
    ),
    written_here("opacus", "1.6.0"),
    Suite(
        "speechbrain",
        "1.1.2",
        (
            "{sources}/tests/unittests/test_RNN.py",
            "--doctest-modules",
            "--pyargs",
            "speechbrain.nnet.RNN",
            "speechbrain.lobes.models.RNNLM",
            "speechbrain.lobes.models.CRDNN",
            "speechbrain.decoders.seq2seq",
        ),
        checkout=Checkout(
            # The test file of 1.1.0 fits later releases, whose layer has the same interface.
            "speechbrain/speechbrain",
            "v1.1.0",
            ("tests/unittests/test_RNN.py", "conftest.py"),
        ),
    ),
    written_here("captum", "0.9.0", "scikit-learn"),
    written_here("skorch", "1.4.0", "safetensors"),
)
