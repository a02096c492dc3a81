"""Times whole applications: `python -m benchmarks.cpu.applications [--record]`.

Each application runs as its users would run it, with torch's layer and after a call of
`replace_rnn`. The two programs alternate. RecurrentPPO also runs with the policy of
`examples/recurrent_ppo.py`, which resets states instead of looping over steps, and its roll-outs
run with prepared layers. Torchrl's modules are compared with a layer that uses `reset_to=`. Nothing
is timed unless the loss or the values match torch's layer within the error budget. Needs
`pip install ".[bench-applications]"`.
"""

import logging
import runpy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

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


def replay(cell: str, replace: Replace, with_reset_to: bool = False) -> Run:
    """Returns a function that trains a layer on sequences of three episodes each.

    Each episode starts from a stored state. Without `with_reset_to`, torchrl's module splits the
    sequences and pads the pieces, as its `recurrent_backend="pad"` does.
    """
    from tensordict import TensorDict
    from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

    torch.manual_seed(0)
    steps, batch, features, hidden = 64, 32, 64, 128
    observations, targets = torch.randn(batch, steps, features), torch.randn(batch, steps, hidden)
    begins = torch.zeros(batch, steps, dtype=torch.bool)
    begins[:, 0] = True
    for row in begins:
        row[1 + torch.randperm(steps - 1)[:2]] = True
    options = {"input_size": features, "hidden_size": hidden, "in_key": "x", "out_key": "y"}
    options["recurrent_backend"] = "pad"  # the default
    module = (LSTMModule if cell == "lstm" else GRUModule)(**options)
    rnn = replace(getattr(module, cell))
    states = {key: torch.randn(batch, steps, 1, hidden) for key in module.in_keys[1:-1]}
    optimizer = torch.optim.Adam(rnn.parameters())

    def call() -> torch.Tensor:
        if with_reset_to:
            reset_to = tuple(states.values()) if cell == "lstm" else states[module.in_keys[1]]
            return rnn(observations, reset=begins, reset_to=reset_to)[0]
        with set_recurrent_mode(True):
            given = {"x": observations, "is_init": begins.unsqueeze(-1), **states}
            return module(TensorDict(given, [batch, steps]))["y"]

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(call(), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


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
    *(
        program(
            f"torchrl: {cell.upper()}Module (`pad`), with `reset_to=`",
            "a training step",
            "torchrl",
            partial(replay, cell),
            partial(replay, cell, replace_rnn, with_reset_to=True),
        )
        for cell in ("gru", "lstm")
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


def caption(document: dict[str, Any]) -> str:
    """Explains each program's baseline, and the last column."""
    versions = {row["name"]: row.get("version") for row in document["rows"]}
    torchrl = next((found for name, found in versions.items() if name.startswith("torchrl")), None)
    return (
        "float32. `before` is torch's layer; for the torchrl rows it is torchrl's module with "
        f'`recurrent_backend="pad"`, the default of {torchrl or "versions 0.13 and 0.14"}; its '
        "other backends were not timed. The two programs take turns; 95 % is the interval of the "
        "ratio of their medians."
    )


STUDY = BeforeAfter(
    name="applications",
    description=__doc__,
    cases=PROGRAMS,
    table=lambda rows: columns.table(rows, COLUMNS),
    caption=caption,
    by=(),
    seconds=60.0,
    page=PERFORMANCE,
)

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Lightning warns about loaders without workers
    STUDY.main()
