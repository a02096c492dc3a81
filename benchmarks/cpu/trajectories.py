"""Times training on many trajectories: `python -m benchmarks.cpu.trajectories [--record]`.

The rivals are the recurrent modules of torchrl with each backend that runs on a CPU, eager and
compiled. Ours are the modules of `examples/torchrl_modules.py`, torchrl's modules after a call of
`replace_rnn`, and a layer with `reset=` and `reset_to=`. Each row of a batch has three
trajectories, which start from stored states. Needs
`pip install "namernn_fast[bench-applications]"`.
"""

import importlib.metadata
import runpy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.harness import columns
from benchmarks.harness.columns import BATCH
from benchmarks.harness.grid import TRAINING, Workload
from benchmarks.harness.paths import PERFORMANCE, ROOT
from benchmarks.harness.study import Calls, Document, Study, grid
from namernn_fast import replace_rnn
from namernn_fast.testing import assert_within_budget

TRAJECTORIES = 3
EAGER: dict[str, dict[str, Any]] = {
    "pad": {"recurrent_backend": "pad"},
    "pad, Python": {"recurrent_backend": "pad", "python_based": True},
    "scan": {"recurrent_backend": "scan"},
    "scan, recompute": {"recurrent_backend": "scan", "recurrent_recompute": "full"},
}
COMPILED = {f"{name}, compiled": EAGER[name] for name in EAGER if name != "pad, Python"}
"""Compiling torchrl's Python cells takes four minutes."""
RIVALS = EAGER | COMPILED
SWAPPED, PACKED, RESET = "`replace_rnn`", "our module", "`reset_to=`"


@dataclass(frozen=True)
class Batch:
    """Observations and targets (batch, steps, features), first steps, and stored states by key."""

    observations: Tensor
    targets: Tensor
    is_init: Tensor
    states: dict[str, Tensor]


def draw(case: Workload, keys: list[str], dtype: torch.dtype) -> Batch:
    """Returns the batch of a case, in which each row has `TRAJECTORIES` trajectories."""
    torch.manual_seed(1)
    assert case.seq_len is not None
    shape = case.batch, case.seq_len
    is_init = torch.zeros(shape, dtype=torch.bool)
    for row in is_init:
        row[0] = row[1 + torch.randperm(case.seq_len - 1)[: TRAJECTORIES - 1]] = True
    observations = torch.randn(*shape, case.input_size).to(dtype)
    targets = torch.randn(*shape, case.hidden_size).to(dtype)
    states = {key: torch.randn(*shape, 1, case.hidden_size).to(dtype) for key in keys}
    return Batch(observations, targets, is_init, states)


def module_of(case: Workload, prefix: str = "", **options: Any) -> Any:
    """Returns a recurrent module of torchrl, or ours if `prefix` is `Fused`.

    The weights depend only on the case.
    """
    from torchrl import modules

    example = runpy.run_path(str(ROOT / "examples" / "torchrl_modules.py")) if prefix else {}
    name = f"{prefix}{case.cell.upper()}Module"
    torch.manual_seed(0)
    return (example.get(name) or getattr(modules, name))(
        case.input_size,
        case.hidden_size,
        in_key="x",
        out_key="y",
        default_recurrent_mode=True,
        **options,
    )


def of_module(module: Any, batch: Batch) -> Tensor:
    """Returns the output of a module of torchrl."""
    from tensordict import TensorDict

    given = {"x": batch.observations, "is_init": batch.is_init.unsqueeze(-1), **batch.states}
    return module(TensorDict(given, batch.is_init.shape))["y"]


def of_layer(layer: Any, batch: Batch) -> Tensor:
    """Returns the output of a layer with `reset=`."""
    states = tuple(batch.states.values())
    reset_to = states if len(states) > 1 else states[0]
    return layer(batch.observations, reset=batch.is_init, reset_to=reset_to)[0]


def step(module: nn.Module, run: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """Runs a training step without the optimizer. Returns the output."""
    module.zero_grad()
    output = run(batch)
    mse_loss(output, batch.targets).backward()
    return output.detach()


def results(module: nn.Module, training_step: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Returns the output and the gradients of a training step."""
    found = {"output": training_step()}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        found[name.rpartition(".")[2]] = parameter.grad.clone()
    return found


def calls(case: Workload) -> Calls:
    """Returns the training steps of all rivals and of our layers, after an error check."""
    torch.compiler.reset()  # a new compilation for each case
    modules = {name: module_of(case, **options) for name, options in RIVALS.items()}
    modules[SWAPPED] = replace_rnn(module_of(case))
    modules[PACKED] = module_of(case, "Fused")
    modules[RESET] = replace_rnn(getattr(module_of(case), case.cell))
    keys = modules[PACKED].in_keys[1:-1]
    batch = draw(case, keys, torch.float32)
    named: dict[str, Callable[[], Tensor]] = {}
    for name, module in modules.items():
        run = partial(of_layer if name == RESET else of_module, module)
        named[name] = partial(step, module, torch.compile(run) if name in COMPILED else run, batch)
    precise = module_of(case).double()
    exact = partial(step, precise, partial(of_module, precise), draw(case, keys, torch.float64))
    expected = results(precise, exact)
    theirs = results(modules["pad"], named["pad"])
    for name in (SWAPPED, PACKED, RESET):
        assert_within_budget(results(modules[name], named[name]), theirs, expected)
    return named


COLUMNS = (
    columns.key("module", lambda row: f"{row['cell'].upper()}Module"),
    columns.key("T", "seq_len"),
    BATCH,
    columns.key("H", "hidden_size"),
    *map(columns.time, RIVALS),
    columns.time(SWAPPED),
    columns.time(PACKED),
    columns.time(RESET),
    columns.over(RIVALS, PACKED, "our module over the best"),
    columns.over(RIVALS, RESET, "`reset_to=` over the best"),
)


def versions() -> Document:
    """Returns the version of torchrl."""
    return {"torchrl": importlib.metadata.version("torchrl")}


STUDY = Study(
    name="trajectories",
    description=__doc__,
    cases=grid(
        [(64, 64, 64, 32), (64, 128, 64, 32), (64, 512, 50, 16)], ["gru", "lstm"], [TRAINING]
    ),
    calls=calls,
    table=lambda rows: columns.table(rows, COLUMNS),
    caption=lambda document: (
        f"torchrl {document['torchrl']}; float32, forward and backward, 64 features. Each row of a "
        f"batch has {TRAJECTORIES} trajectories. The columns before {SWAPPED} are the backends of "
        "torchrl's modules; `triton` needs a GPU, and `auto` is `pad`, or `scan` when compiled."
    ),
    by=("threads",),
    facts=versions,
    few=lambda case: case.hidden_size == 128,
    ours=PACKED,
    one_thread_too=True,
    seconds=1.0,
    max_rounds=20,
    page=PERFORMANCE,
)

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torchrl's own
    STUDY.main()
