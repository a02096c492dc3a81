"""What the GPU benchmark compares: layers with the same parameters and the same input.

Each module takes the input and returns a tuple that holds only the output, so a training step
computes the gradients of all parameters from a gradient at the output. Rivals import their packages
when they are made. A module that needs its weights in another layout keeps them in that layout.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._pytree import tree_map

import namernn_fast
from benchmarks.cpu.equations import TIMED as EQUATIONS
from benchmarks.harness.grid import DENSE, MODES, PACKED, Workload

CUDNN, RESETS, SLSTM, EQUATION = "torch's layers", "resets", "sLSTM", "norms and equations"
LOOP, COMPILED, OURS = "loop", "compiled loop", "ours"
TF32, FLOAT32, BFLOAT16 = "tf32", "float32", "bfloat16"
HEADS = 4
RESET_SHARE = 0.03
NAMES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}


@dataclass(frozen=True)
class Contest(Workload):
    """One comparison of several modules."""

    group: str = CUDNN
    precision: str = TF32

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == BFLOAT16 else torch.float32

    @property
    def sizes(self) -> tuple[int, int]:
        return self.input_size, self.hidden_size


def contests(
    group: str, cells: tuple[str, ...], shapes: list[tuple[Any, ...]], precision: str = TF32
) -> list[Contest]:
    """Returns a contest for each shape (family, batch, hidden_size, seq_len), cell and mode."""
    return [
        Contest(family, mode, batch, hidden, hidden, steps, cell, group, precision)
        for family, batch, hidden, steps in shapes
        for cell in cells
        for mode in MODES
    ]


OF_TORCH = [
    (DENSE, 64, 128, 128),
    (DENSE, 64, 512, 128),
    (DENSE, 1, 512, 128),
    (DENSE, 1024, 256, 128),
    (PACKED, 64, 256, 128),
]
# The most informative contests come first, because the run may stop at its deadline.
CONTESTS = (
    *contests(CUDNN, tuple(NAMES), OF_TORCH),
    *contests(RESETS, ("gru", "lstm"), [(DENSE, 128, 256, 128), (DENSE, 128, 512, 128)]),
    *contests(SLSTM, ("slstm",), [(DENSE, 16, 512, 128)], BFLOAT16),
    *contests(
        EQUATION,
        ("layer_norm_lstm", "minimal_gated", "peephole_lstm"),
        [(DENSE, 64, 256, 64)],
    ),
    *contests(CUDNN, tuple(NAMES), OF_TORCH, BFLOAT16),
    *contests(CUDNN, tuple(NAMES), OF_TORCH[:2], FLOAT32),
)


def name_of(dtype: torch.dtype) -> str:
    """Returns the name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")


class OutputOf(nn.Module):
    """Returns the output of a layer without its last states."""

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x: Any) -> tuple[Any]:
        return (self.layer(x, **self.options)[0],)


class StepLoop(nn.Module):
    """Calls a layer of torch for every step, and clears the states where an episode starts."""

    def __init__(self, layer: nn.RNNBase, reset: Tensor) -> None:
        super().__init__()
        self.layer, self.reset = layer, reset

    def forward(self, x: Tensor) -> tuple[Tensor]:
        outputs, states = [], None
        for row, starts in zip(x.split(1, 1), self.reset.unbind(1), strict=True):
            states = tree_map(partial(torch.mul, ~starts[:, None]), states) if outputs else None
            output, states = self.layer(row, states)
            outputs.append(output)
        return (torch.cat(outputs, 1),)


class TorchRL(nn.Module):
    """A recurrent module of torchrl; x is (batch, seq_len, features)."""

    def __init__(self, contest: Contest, backend: str, reset: Tensor) -> None:
        from torchrl import modules

        super().__init__()
        self.reset = reset
        self.module = getattr(modules, f"{NAMES[contest.cell]}Module")(
            *contest.sizes,
            in_key="x",
            out_key="y",
            default_recurrent_mode=True,
            recurrent_backend=backend,
            recurrent_matmul_precision="tf32" if contest.precision == TF32 else "ieee",
        )

    def forward(self, x: Tensor) -> tuple[Tensor]:
        from tensordict import TensorDict

        given = {"x": x, "is_init": self.reset.unsqueeze(-1)}
        return (self.module(TensorDict(given, self.reset.shape))["y"],)


class FlashRNN(namernn_fast.FusedSLSTM):
    """Runs flashrnn on the parameters of a `FusedSLSTM`."""

    def forward(self, x: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        from flashrnn import flashrnn

        weight_ih, weight_hh, bias_ih, bias_hh = self.parameters()
        size = weight_hh.shape[1]
        states, _ = flashrnn(
            linear(x, weight_ih, bias_ih).transpose(0, 1).unflatten(-1, (4, HEADS, size)),
            weight_hh.view(4, HEADS, size, size),
            bias_hh.view(4, HEADS, size),
            function="slstm",
            backend="cuda_fused" if x.is_cuda else "vanilla",
            dtype=name_of(x.dtype),
        )
        return (states[0].flatten(2).transpose(0, 1),)


class XLSTM(nn.Module):
    """The sLSTM of the package xlstm, with the parameters of `reference`."""

    def __init__(self, contest: Contest, reference: nn.Module) -> None:
        from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

        super().__init__()
        self.weight_ih_l0, weight_hh, self.bias_ih_l0, bias_hh = (
            nn.Parameter(value.detach().clone()) for value in reference.parameters()
        )
        config = sLSTMCellConfig(
            hidden_size=contest.hidden_size,
            num_heads=HEADS,
            batch_size=contest.batch,
            backend="cuda" if weight_hh.is_cuda else "vanilla",
            dtype=name_of(contest.dtype),
            input_shape="SBGNH",
            output_shape="SBH",
        )
        self.cell = sLSTMCell(config).to(weight_hh)
        recurrent = weight_hh.detach().unflatten(0, (4, HEADS, -1)).permute(1, 3, 0, 2)
        bias = bias_hh.detach().view(4, HEADS, -1).transpose(0, 1)
        self.cell._recurrent_kernel_.data.copy_(self.cell._recurrent_kernel_ext2int(recurrent))
        self.cell._bias_.data.copy_(self.cell._bias_ext2int(bias))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.cell(linear(x, self.weight_ih_l0, self.bias_ih_l0))[0],)


def entries(contest: Contest, device: str) -> tuple[str, nn.Module, dict[str, Any]]:
    """Returns the reference, by name and as a module, and functions that make the other modules.

    The reference is torch's layer or a Python loop. A copy of it in float64 is the oracle.
    """
    sizes, name = contest.sizes, NAMES.get(contest.cell, "")
    layer, of_torch = getattr(namernn_fast, f"Fused{name}", None), getattr(nn, name, None)
    if contest.group == CUDNN:
        return f"nn.{name}", OutputOf(of_torch(*sizes)), {OURS: lambda: OutputOf(layer(*sizes))}
    if contest.group == RESETS:
        reset = torch.rand(contest.batch, contest.seq_len or 1) < RESET_SHARE
        reset[0, -1] = True  # at least one, in a dry run too
        reset = reset.to(device)
        reference: nn.Module = StepLoop(of_torch(*sizes, batch_first=True), reset)
        makers: dict[str, Any] = {
            OURS: lambda: OutputOf(layer(*sizes, batch_first=True), reset=reset)
        }
        for backend in ("triton", "scan", "pad"):
            makers[f"torchrl, {backend}"] = partial(TorchRL, contest, backend, reset)
        return LOOP, reference, makers
    cell, heads = EQUATIONS[contest.cell], {"heads": HEADS} if contest.group == SLSTM else {}
    reference = OutputOf(cell.loop(*sizes, **heads)).to(device, contest.dtype)
    makers = {OURS: lambda: OutputOf(cell.layer(*sizes, **heads))}
    if contest.group == SLSTM:
        makers["flashrnn"] = lambda: FlashRNN(*sizes, **heads)
        makers["xlstm"] = partial(XLSTM, contest, reference)
    else:
        how = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "eager"}
        makers[COMPILED] = lambda: torch.compile(OutputOf(cell.loop(*sizes)), **how)
    return LOOP, reference, makers
