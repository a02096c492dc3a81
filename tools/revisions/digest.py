"""The program that `bits` runs for each revision: prints digests of the results of every case.

Only the public interface of the library is used, and `ops.cpu_kernel`, which tells the instruction
set. The first line printed names the kernels for float32 and bfloat16. The second line is JSON:
for each case and number of threads, a digest for each result.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import namernn_fast
from namernn_fast import FusedRNN, FusedRNNCell, ops, rnn
from tools.revisions.cases import SECOND_ORDER, Case, all_cases

HUGE = 3e38


def digest(tensor: Tensor) -> str:
    """Returns a digest of a tensor's dtype, shape and bits.

    Every NaN counts as the same NaN: which operand's bits a NaN inherits is the compiler's choice.
    """
    tensor = tensor.detach()
    tensor = tensor.masked_fill(tensor.isnan(), torch.nan).contiguous()
    bits = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""
    about = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(about + bits).hexdigest()[:16]


class Draws:
    """Random tensors that depend on a case's name and the order in which they are drawn."""

    def __init__(self, case: Case):
        seed = hashlib.sha256(case.name.encode()).digest()[:7]
        self.generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        self.case = case
        self.dtype = getattr(torch, case.dtype)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values, with the strides that the case wants."""
        *outer, features = shape
        wide = torch.randn(*outer, (1 + self.case.strided) * features, generator=self.generator)
        return wide.to(self.dtype)[..., :: 1 + self.case.strided]

    def weight(self, shape: torch.Size, hidden_size: int) -> Tensor:
        """Values of a parameter: those of a new layer, or far larger where tanh is to saturate."""
        bound = hidden_size**-0.5 * (30 if self.case.values == "saturated" else 1)
        return ((torch.rand(shape, generator=self.generator) * 2 - 1) * bound).to(self.dtype)

    def lengths(self, least: int) -> Tensor:
        """Lengths of the batch's sequences, of which one has all steps."""
        steps, batch = self.case.sizes[2:]
        lengths = torch.randint(least, steps + 1, (batch,), generator=self.generator)
        lengths[batch // 2] = steps
        return lengths

    def input(self, steps: int, batch: int, features: int) -> Tensor:
        """An input (steps, batch, features), with the values that the case wants."""
        input = self.normal(steps, batch, features)
        if self.case.values == "non-finite":
            for value in (torch.inf, -torch.inf, torch.nan, HUGE, -HUGE, 1e-42):
                row = int(torch.randint(steps * batch, (1,), generator=self.generator))
                input[row // batch, row % batch, row % features] = value
        return input

    def resets(self) -> Tensor:
        """Resets (steps, batch), of which a fifth is set."""
        steps, batch = self.case.sizes[2:]
        return torch.rand(steps, batch, generator=self.generator) < 0.2


@dataclass
class Call:
    """Everything that a call needs."""

    leaf: Tensor
    """The tensor that gets the gradient of the input."""
    input: Tensor | PackedSequence
    options: dict[str, Tensor]
    """The keyword arguments of the call."""


def prepare_input(case: Case, draws: Draws) -> Call:
    """Draws the input of a case, in the case's layout."""
    input_size, _, steps, batch = case.sizes
    wants_input = case.wanted in ("all", "input", SECOND_ORDER)
    if case.layout == "jagged":
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), draws.lengths(0).cumsum(0)])
        rows = draws.input(int(offsets[-1]), 1, input_size)[:, 0].requires_grad_(wants_input)
        return Call(rows, torch.nested.nested_tensor_from_jagged(rows, offsets), {})
    leaf = draws.input(steps, batch, input_size)
    if case.layout == "unbatched":
        leaf = leaf[:, 0]
    elif case.batch_first:
        leaf = leaf.transpose(0, 1) if case.strided else leaf.transpose(0, 1).contiguous()
    leaf = leaf.detach().requires_grad_(wants_input)
    call = Call(leaf, leaf, {})
    if case.reset:
        reset = draws.resets()
        if case.layout == "unbatched":
            reset = reset[:, 0]
        elif case.batch_first:
            reset = reset.transpose(0, 1)
        call.options["reset"] = reset
    if case.layout == "lengths":
        call.options["lengths"] = draws.lengths(0)
    elif case.layout.startswith("packed"):
        lengths, is_sorted = draws.lengths(1), case.layout == "packed"
        if is_sorted:
            lengths = lengths.sort(descending=True).values
        call.input = pack_padded_sequence(leaf, lengths, case.batch_first, is_sorted)
    return call


def prepare_layer(case: Case, draws: Draws) -> torch.nn.Module:
    """Makes the layer of a case, with drawn parameters."""
    sizes = case.sizes[:2]
    if case.call == "cell":
        layer = FusedRNNCell(*sizes, case.bias, case.nonlinearity, dtype=draws.dtype)
    else:
        layer = FusedRNN(
            *sizes,
            case.num_layers,
            case.nonlinearity,
            case.bias,
            case.batch_first,
            case.dropout,
            case.bidirectional,
            batch_invariant=case.batch_invariant,
            dtype=draws.dtype,
        )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(draws.weight(parameter.shape, case.sizes.hidden_size))
    return layer.requires_grad_(case.wanted in ("all", "weights", SECOND_ORDER))


def forward(case: Case, layer: torch.nn.Module, call: Call, hx: Tensor | None) -> dict[str, Tensor]:
    """Calls the library in the way that the case names."""
    if case.dropout:
        torch.manual_seed(0)
    autocast = contextlib.nullcontext()
    if case.autocast:
        autocast = torch.autocast("cpu", getattr(torch, case.autocast))
    with autocast:
        if case.call == "function":
            output, h_n = rnn(
                call.input,
                hx,
                list(layer.parameters()),
                nonlinearity=case.nonlinearity,
                bias=case.bias,
                batch_first=case.batch_first,
                dropout=case.dropout,
                bidirectional=case.bidirectional,
                training=True,
                batch_invariant=case.batch_invariant,
                **call.options,
            )
        else:
            output, h_n = layer(call.input, hx, **call.options)
    if isinstance(output, PackedSequence):
        output = output.data
    return {"output": output.values() if output.is_nested else output, "h_n": h_n}


def run(case: Case) -> dict[str, str]:
    """Runs a case.

    Returns:
        A digest for each result: the outputs and every gradient that is wanted. A call that raises
        has its exception for its only result.
    """
    try:
        return {name: digest(tensor) for name, tensor in results(case).items()}
    except Exception as error:  # every case is reported, whatever another case does
        return {"raised": f"{type(error).__name__}: {error}"}


def results(case: Case) -> dict[str, Tensor]:
    """Returns the results of a case by name."""
    draws = Draws(case)
    layer, hidden_size = prepare_layer(case, draws), case.sizes.hidden_size
    call = prepare_input(case, draws)
    wants_hx = case.wanted in ("all", "hx", SECOND_ORDER)
    if case.call == "cell":
        call.leaf = call.input = call.leaf.detach()[0].requires_grad_(call.leaf.requires_grad)
        outer = call.input.shape[:-1]
    else:
        states = case.num_layers * (1 + case.bidirectional)
        outer = (states,) if case.layout == "unbatched" else (states, case.sizes.batch)
    hx = draws.normal(*outer, hidden_size).requires_grad_(wants_hx) if case.hx else None
    if case.call == "cell":
        found = {"h_n": layer(call.input, hx)}
    else:
        found = forward(case, layer, call, hx)
    leaves = {"input": call.leaf, "hx": hx, **dict(layer.named_parameters())}
    leaves = {k: v for k, v in leaves.items() if v is not None and v.requires_grad}
    if not leaves:
        return found
    return found | gradients(case, draws, found, leaves)


def gradients(
    case: Case, draws: Draws, found: dict[str, Tensor], leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Differentiates the results by the leaves, once or twice."""
    chosen = [v for k, v in found.items() if case.given in (k, "both", "sums")] or [found["h_n"]]
    if case.given == "sums":
        given = [torch.ones((), dtype=v.dtype).expand(v.shape) for v in chosen]
    else:
        given = [draws.normal(*v.shape).to(v.dtype) for v in chosen]
    twice = case.wanted == SECOND_ORDER
    inputs = list(leaves.values())
    first = torch.autograd.grad(chosen, inputs, given, create_graph=twice, allow_unused=True)
    named = dict(zip((f"grad_{k}" for k in leaves), first, strict=True))
    if twice:
        squares = sum((g.float() ** 2).sum() for g in first if g is not None)
        second = torch.autograd.grad(squares, inputs, allow_unused=True)
        named |= dict(zip((f"grad_grad_{k}" for k in leaves), second, strict=True))
    return {k: v for k, v in named.items() if v is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="folder of the library")
    parser.add_argument("--kernels", nargs=2, required=True, help="for float32 and bfloat16")
    parser.add_argument("--dtypes", nargs="+", required=True)
    parser.add_argument("--threads", type=int, nargs="+", required=True)
    options = parser.parse_args()
    own = Path(namernn_fast.__file__).resolve().parent
    if own != (options.library / "namernn_fast").resolve():
        raise SystemExit(f"the library of {options.library} was wanted, got {own}")
    # Before any ATen operator, which might use instructions that the processor does not have.
    kernels = [ops.cpu_kernel(), ops.cpu_kernel(torch.bfloat16)]
    print(json.dumps(kernels), flush=True)
    if kernels != options.kernels:
        return
    # A result that is left unwritten holds NaN, not what was there by chance.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    cases = [case for case in all_cases() if (case.autocast or case.dtype) in options.dtypes]
    digests = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for case in cases:
            digests[f"{case.name}, threads={threads}"] = run(case)
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
