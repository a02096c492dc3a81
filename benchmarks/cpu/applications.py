"""Times whole applications: `python -m benchmarks.cpu.applications [--record]`.

Each application runs as its users would run it, with torch's layer and after a call of
`replace_rnn`. The two programs alternate. RecurrentPPO also runs with the policy of
`examples/recurrent_ppo.py`, which resets states instead of looping over steps, and its roll-outs
run with prepared layers. The world model loops over a cell in torch's operators, or over a fused
step module in an `unrolled()` block. Nothing is timed unless the loss or the values are within the
error budget. Needs `pip install "namernn_fast[bench-applications]"`.
"""

import logging
import runpy
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from benchmarks.cpu.world_model import world_model
from benchmarks.harness import columns
from benchmarks.harness.grid import FORWARD, TRAINING
from benchmarks.harness.paths import PERFORMANCE, ROOT
from benchmarks.harness.precise import make_precise
from benchmarks.harness.turns import AFTER, BEFORE, BeforeAfter, Program, Run
from namernn_fast import prepare_rnn, replace_rnn

Replace = Callable[[nn.Module], nn.Module]
ROLLOUT_STEPS = 128


def forecaster(replace: Replace) -> Run:
    """Returns a function that trains a forecasting model of darts for an epoch."""
    from darts import TimeSeries
    from darts.models import BlockRNNModel

    for name in ("darts", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(0)
    wave = torch.sin(0.2 * torch.arange(2000.0)) + 0.1 * torch.randn(2000)
    series = TimeSeries.from_values(wave.numpy())
    quiet = ("progress_bar", "model_summary")
    trainer = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    model = BlockRNNModel(
        input_chunk_length=96,
        output_chunk_length=24,
        model="LSTM",
        hidden_dim=64,
        n_rnn_layers=2,
        random_state=0,
        pl_trainer_kwargs=trainer | {f"enable_{what}": False for what in quiet},
    )
    model.fit(series, epochs=1)  # builds the network
    replace(model.model)

    def epoch() -> float:
        model.fit(series, epochs=1)
        return model.model.trainer.callback_metrics["train_loss"].item()

    return epoch


class Tagger(nn.Module):
    """Scores the tags of each word of a sentence with a bidirectional LSTM of two layers."""

    def __init__(self, words: int, tags: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 100)
        self.rnn = nn.LSTM(100, 200, num_layers=2, bidirectional=True)
        self.head = nn.Linear(400, tags)

    def forward(self, sentences: PackedSequence) -> torch.Tensor:
        embedded = sentences._replace(data=self.embedding(sentences.data))
        return self.head(self.rnn(embedded)[0].data)


def tagger(replace: Replace) -> Run:
    """Returns a function that trains a tagger of packed sentences for an epoch."""
    torch.manual_seed(0)
    words, tags, batch = 5000, 17, 32
    lengths = torch.distributions.LogNormal(3.0, 0.5).sample((1024,)).clamp(3, 80).long().tolist()
    sentences = [torch.randint(words, (length,)) for length in lengths]
    batches = [
        pack_sequence(sentences[at : at + batch], enforce_sorted=False)
        for at in range(0, len(sentences), batch)
    ]
    model = Tagger(words, tags)
    replace(model)
    optimizer = torch.optim.Adam(model.parameters())

    def epoch() -> float:
        total = 0.0
        for packed in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(packed), packed.data % tags)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total / len(batches)

    return epoch


def agent(replace: Replace, with_resets: bool = False) -> Run:
    """Returns a function that runs a roll-out and an update of sb3-contrib's RecurrentPPO."""
    example = runpy.run_path(str(ROOT / "examples" / "recurrent_ppo.py"))
    policy = example["FusedPolicy"] if with_resets else "MlpLstmPolicy"
    model = example["agent"](policy, learning_rate=3e-4)
    replace(model.policy)
    steps = example["STEPS"] * example["ENVIRONMENTS"]

    def update() -> float:
        model.learn(steps, reset_num_timesteps=False)
        return model.logger.name_to_value["train/loss"]

    return update


def rollout(environments: int, replace: Replace) -> Run:
    """Returns a function that collects a RecurrentPPO roll-out and returns its value estimates."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    cart_pole = runpy.run_path(str(ROOT / "examples" / "recurrent_ppo.py"))["cart_pole"]
    envs = make_vec_env(cart_pole, environments, seed=0)
    model = RecurrentPPO("MlpLstmPolicy", envs, n_steps=ROLLOUT_STEPS, seed=0, device="cpu")
    replace(model.policy)
    _, callback = model._setup_learn(10**9)

    def run() -> torch.Tensor:
        model.collect_rollouts(envs, callback, model.rollout_buffer, ROLLOUT_STEPS)
        return torch.from_numpy(model.rollout_buffer.values.copy())

    return run


unchanged = nn.Identity()


def program(
    name: str,
    timed: str,
    package: str,
    make: Callable[[Replace], Run],
    after: Callable[[], Run] | None = None,
    mode: str = TRAINING,
) -> Program:
    """Returns a program to time. `after` makes its fused variant; by default, `make` does."""
    before, ours, exact = (partial(make, each) for each in (unchanged, replace_rnn, make_precise))
    return Program(name, before, after or ours, exact, {"timed": timed}, package, mode)


UPDATE = "a roll-out and an update"
WITH_RESETS = partial(agent, unchanged, with_resets=True)
PROGRAMS = (
    program("darts: BlockRNNModel", "an epoch", "darts", forecaster),
    program("a tagger of packed sentences", "an epoch", "torch", tagger),
    program("sb3-contrib: RecurrentPPO", UPDATE, "sb3_contrib", agent),
    program("the same, with `reset=`", UPDATE, "sb3_contrib", agent, WITH_RESETS),
    *(
        program(
            f"{n} environments, with `prepare_rnn`",
            "a roll-out",
            "sb3_contrib",
            partial(rollout, n),
            partial(rollout, n, prepare_rnn),
            FORWARD,
        )
        for n in (8, 64)
    ),
    Program(
        "a world model of Dreamer, with `unrolled()`",
        partial(world_model, is_fused=False),
        partial(world_model, is_fused=True),
        partial(world_model, is_fused=False, dtype=torch.float64),
        {"timed": "a training step"},
    ),
)
COLUMNS = (
    columns.key("application", "name"),
    columns.text("timed", "timed"),
    columns.time(BEFORE, "before"),
    columns.time(AFTER, "fused layer"),
    columns.over(BEFORE, AFTER),
    columns.interval(BEFORE),
)


STUDY = BeforeAfter(
    name="applications",
    description=__doc__,
    cases=PROGRAMS,
    table=lambda rows: columns.table(rows, COLUMNS),
    caption=lambda _: (
        "float32. The two programs take turns; 95 % is the interval of the ratio of their medians."
    ),
    by=(),
    seconds=60.0,
    page=PERFORMANCE,
)

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Lightning warns about loaders without workers
    STUDY.main()
