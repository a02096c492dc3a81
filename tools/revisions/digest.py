"""The program that `bits` runs for each revision.

    python -m tools.revisions.digest KERNEL KERNEL KINDS DTYPE...

It prints JSON: a digest of each result of each call of these kinds of layers, separated by commas,
in these dtypes, on one thread and on two. It makes no calls unless the given kernels are those in
use for float32 and bfloat16.
"""

import contextlib
import ctypes
import hashlib
import json
import sys

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import namernn_fast
from namernn_fast import ops
from tools.revisions.cases import LAYERS, SECOND_ORDER, Case, all_cases

NON_FINITE = (torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e-42)
OPTIONS = ("bias", "batch_first", "dropout", "bidirectional", "batch_invariant")
# By kind: the module, the module for a step, and the function. Older revisions lack some kinds.
CALLABLES = {
    kind: tuple(getattr(namernn_fast, name, None) for name in (layer, f"{layer}Cell", kind))
    for kind, layer in LAYERS.items()
}


def digest(tensor: Tensor) -> str:
    """Returns a digest of a tensor's dtype, shape and bits.

    All NaNs count as equal: the compiler chooses which operand's bits a NaN inherits.
    """
    tensor = tensor.detach()
    tensor = tensor.masked_fill(tensor.isnan(), torch.nan).contiguous()
    bits = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""
    about = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(about + bits).hexdigest()[:16]


class Draws:
    """Random tensors, determined by a case's name and the order of the draws."""

    def __init__(self, case: Case):
        seed = hashlib.sha256(case.name.encode()).digest()[:7]
        self.generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        self.case = case
        self.dtype = getattr(torch, case.dtype)

    def normal(self, *shape: int) -> Tensor:
        """Returns standard normal values, strided if the case says so."""
        *outer, features = shape
        wide = torch.randn(*outer, (1 + self.case.strided) * features, generator=self.generator)
        return wide.to(self.dtype)[..., :: 1 + self.case.strided]

    def weight(self, shape: torch.Size) -> Tensor:
        """Returns values of a parameter: as in a new layer, or far larger to saturate tanh."""
        scale = 30 if self.case.values == "saturated" else 1
        bound = scale * self.case.sizes.hidden_size**-0.5
        return ((torch.rand(shape, generator=self.generator) * 2 - 1) * bound).to(self.dtype)

    def lengths(self, least: int) -> Tensor:
        """Returns random lengths of the batch's sequences; one sequence has all steps."""
        _, _, steps, batch = self.case.sizes
        lengths = torch.randint(least, steps + 1, (batch,), generator=self.generator)
        lengths[batch // 2] = steps
        return lengths

    def input(self, steps: int, batch: int) -> Tensor:
        """Returns an input `(seq_len, batch, input_size)` with the kind of values of the case."""
        features = self.case.sizes.input_size
        input = self.normal(steps, batch, features)
        if self.case.values == "non-finite":
            for value in NON_FINITE:
                row = int(torch.randint(steps * batch, (1,), generator=self.generator))
                input[row // batch, row % batch, row % features] = value
        return input

    def resets(self) -> Tensor:
        """Returns resets `(seq_len, batch)`; a fifth of them is set."""
        _, _, steps, batch = self.case.sizes
        return torch.rand(steps, batch, generator=self.generator) < 0.2


def options_of(case: Case) -> dict:
    """Returns the options of a case that its module and its function share."""
    names = ("nonlinearity", *OPTIONS) if case.kind == "rnn" else OPTIONS
    return {name: getattr(case, name) for name in names}


def prepare_layer(case: Case, draws: Draws) -> torch.nn.Module:
    """Returns the layer of a case, with drawn parameters."""
    sizes = case.sizes[:2]
    module, cell, _ = CALLABLES[case.kind]
    if case.call == "cell":
        nonlinearity = (case.nonlinearity,) if case.kind == "rnn" else ()
        layer = cell(*sizes, case.bias, *nonlinearity, dtype=draws.dtype)
    else:
        layer = module(*sizes, case.num_layers, dtype=draws.dtype, **options_of(case))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(draws.weight(parameter.shape))
    return layer.requires_grad_(case.wants("weights"))


def prepare_input(case: Case, draws: Draws) -> tuple[Tensor, Tensor | PackedSequence, dict]:
    """Returns a drawn leaf, the input made from it, and the call's keyword arguments."""
    _, _, steps, batch = case.sizes
    if case.layout == "jagged":
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), draws.lengths(0).cumsum(0)])
        rows = draws.input(int(offsets[-1]), 1)[:, 0].requires_grad_(case.wants("input"))
        return rows, torch.nested.nested_tensor_from_jagged(rows, offsets), {}

    def arranged(tensor: Tensor) -> Tensor:
        if case.layout == "unbatched":
            return tensor[:, 0]
        return tensor.transpose(0, 1) if case.batch_first else tensor

    leaf = arranged(draws.input(steps, batch))
    if case.call == "cell":
        leaf = leaf[0]
    if case.batch_first and not case.strided:
        leaf = leaf.contiguous()
    leaf = leaf.detach().requires_grad_(case.wants("input"))
    options = {"reset": arranged(draws.resets())} if case.reset else {}
    if case.layout == "lengths":
        options["lengths"] = draws.lengths(0)
    elif case.layout.startswith("packed"):
        lengths, is_sorted = draws.lengths(1), case.layout == "packed"
        if is_sorted:
            lengths = lengths.sort(descending=True).values
        return leaf, pack_padded_sequence(leaf, lengths, case.batch_first, is_sorted), options
    return leaf, leaf, options


def results(case: Case) -> dict[str, Tensor]:
    """Returns the results of a case by name: the outputs and every wanted gradient."""
    draws = Draws(case)
    layer = prepare_layer(case, draws)
    leaf, input, options = prepare_input(case, draws)
    outer = (case.sizes.batch,) * (case.layout != "unbatched")
    if case.call != "cell":
        outer = (case.num_layers * (1 + case.bidirectional), *outer)
    states = {}
    for name in ("hx", "cx") if case.kind == "lstm" else ("hx",):
        if case.hx:
            state = draws.normal(*outer, case.sizes.hidden_size)
            states[name] = state.requires_grad_(case.wants("hx"))
    hx = tuple(states.values()) if "cx" in states else states.get("hx")
    autocast = contextlib.nullcontext()
    if case.autocast:
        autocast = torch.autocast("cpu", getattr(torch, case.autocast))
    torch.manual_seed(0)  # for dropout
    with autocast:
        if case.call == "function":
            _, _, function = CALLABLES[case.kind]
            options |= options_of(case)
            returned = function(input, hx, [*layer.parameters()], training=True, **options)
        else:
            returned = layer(input, hx, **options)
    found = {}
    if case.call != "cell":
        output, returned = returned
        if isinstance(output, PackedSequence):
            output = output.data
        found["output"] = output.values() if output.is_nested else output
    last = returned if isinstance(returned, tuple) else (returned,)
    found |= zip(("h_n", "c_n"), last, strict=False)
    leaves = {"input": leaf, **states, **dict(layer.named_parameters())}
    leaves = {k: v for k, v in leaves.items() if v.requires_grad}
    return found | gradients(case, draws, found, leaves) if leaves else found


def gradients(
    case: Case, draws: Draws, found: dict[str, Tensor], leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the gradients of the results with respect to the leaves, first or second order."""
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


def digests_of(case: Case) -> dict[str, str]:
    """Returns a digest of each result of a case, or the exception it raises."""
    try:
        return {name: digest(tensor) for name, tensor in results(case).items()}
    except Exception as error:  # one failing case must not hide the others
        return {"raised": f"{type(error).__name__}: {error}"}


def main() -> None:
    *kernels, kinds, dtypes = *sys.argv[1:4], sys.argv[4:]
    digests = {}
    # Checked before any ATen operator runs, which might use unsupported instructions.
    if [ops.cpu_kernel(), ops.cpu_kernel(torch.bfloat16)] == kernels:
        # Unwritten results contain NaN instead of arbitrary memory.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for case in all_cases(kinds.split(",")):
                if (case.autocast or case.dtype) in dtypes:
                    digests[f"{case.name}, threads={threads}"] = digests_of(case)
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
