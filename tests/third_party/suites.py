"""The test suites that `run.py` runs: tests of other libraries that use a recurrent layer."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Checkout:
    """Test files that are in a library's repository but not in its package.

    Attributes:
        repository: owner/name.
        tag: the release that the test files belong to.
        paths: the files and folders to fetch.
        package: the folder in site-packages to copy the first path into. Empty if no test needs
            files from that folder.
    """

    repository: str
    tag: str
    paths: tuple[str, ...]
    package: str = ""


@dataclass(frozen=True)
class Suite:
    """Some tests of a library. Each suite is one row of the report's table.

    Attributes:
        library: the name of the library's package.
        version: the release, which is pinned so that runs are comparable.
        tests: the arguments for pytest. `{sources}` is replaced by the checkout's folder.
        extras: the optional dependencies of the package to install, such as `[torch]`.
        needs: other packages that the tests need.
        checkout: the source of the test files if the package does not include them.
        environment: environment variables. `{site}` is replaced by the site-packages folder.
    """

    library: str
    version: str
    tests: tuple[str, ...]
    extras: str = ""
    needs: tuple[str, ...] = ()
    checkout: Checkout | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def requirements(self) -> tuple[str, ...]:
        return (f"{self.library}{self.extras}=={self.version}", *self.needs)


FORECASTING = "darts.tests.models.forecasting"
NEURALFORECAST_MODELS = ("deepar", "dilated_rnn", "gru", "lstm", "rnn", "stemgnn", "tft")
STANZA = "stanza.tests"
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
        # With newer pandas or statsmodels, tests unrelated to recurrent layers fail.
        needs=("onnx", "onnxruntime", "onnxscript", "pandas<3", "statsmodels<0.15"),
        checkout=Checkout("unit8co/darts", "0.46.1", ("darts/tests",), "darts/tests"),
    ),
    Suite(
        "opacus",
        "1.6.0",
        ("--pyargs", "opacus.tests.dp_layers.dp_rnn_test"),
        needs=("hypothesis",),
    ),
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
            # The test file of 1.1.0 also works for later releases, which have the same interface.
            "speechbrain/speechbrain",
            "v1.1.0",
            ("tests/unittests/test_RNN.py", "conftest.py"),
        ),
    ),
    Suite(
        "torchrl",
        "0.13.3",
        # Tests of parallel environments take minutes, because they start many processes.
        ("{sources}/test/modules/test_rnn.py", "-k", "not parallel"),
        checkout=Checkout(
            "pytorch/rl",
            "v0.13.3",
            (
                "test/conftest.py",
                "test/modules/conftest.py",
                "test/modules/_modules_common.py",
                "test/modules/test_rnn.py",
            ),
        ),
    ),
    Suite(
        "sb3-contrib",
        "2.8.0",
        (
            "{sources}/tests/test_lstm.py",
            "{sources}/tests/test_cnn.py",
            "{sources}/tests/test_deterministic.py",
            "-k",
            # Skip the performance test, which trains for minutes.
            "(test_lstm or Recurrent) and not performance",
        ),
        checkout=Checkout("Stable-Baselines-Team/stable-baselines3-contrib", "v2.8.0", ("tests",)),
    ),
    Suite(
        "stanza",
        "1.14.0",
        (
            "--pyargs",
            f"{STANZA}.classifiers.test_classifier",
            f"{STANZA}.constituency.test_lstm_model",
            f"{STANZA}.depparse.test_parser",
            f"{STANZA}.depparse.transition.test_train",
            f"{STANZA}.lemma.test_lemma_trainer",
            f"{STANZA}.lemma_classifier.test_lemma_classifier_training",
            f"{STANZA}.mwt.test_character_classifier",
            f"{STANZA}.mwt.test_mwt_training",
            f"{STANZA}.ner.test_ner_training",
            f"{STANZA}.pos.test_tagger",
            f"{STANZA}.tokenization.test_tokenizer_training",
            "-k",
            # Skip tests that download models, and tests that repeat test_train and take minutes.
            "not bert and not xlnet and not peft and not charlm "
            "and not augment and not merge and not save_each and not cutoff and not multiple_files",
        ),
        needs=("peft",),
        # The tests read word vectors from the folder `in`.
        checkout=Checkout(
            "stanfordnlp/stanza", "v1.14.0", ("stanza/tests/data",), "stanza/tests/in"
        ),
        environment={"STANZA_TEST_HOME": "{site}/stanza/tests"},
    ),
    Suite(
        "neuralforecast",
        "3.2.0",
        (
            *(f"{{sources}}/tests/test_models/test_{model}.py" for model in NEURALFORECAST_MODELS),
            "{sources}/tests/test_common/test_scalers.py",
            "{sources}/tests/test_core.py",
            "{sources}/tests/test_losses/test_iqloss.py",
            "{sources}/tests/test_simulate.py",
            "-k",
            # Skip tests of automatic tuning, because their Ray processes lack the fused layers.
            "not auto and (test_models or rnn or iqloss or scaler or insample_diff or save_load_no "
            "or checkpointing or baserecurrent or explainability or recurrent)",
        ),
        needs=("gitpython", "polars", "s3fs"),
        checkout=Checkout("Nixtla/neuralforecast", "v3.2.0", ("tests",)),
    ),
)
