"""The program that `bits` runs for each revision.

    python -m tools.revisions.digest KERNEL KERNEL DTYPE...

It calls the cells in the given dtypes, on one thread and on two, and prints a digest of each result
as JSON. It calls nothing unless the library uses the given kernels for float32 and bfloat16.
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
from tools.revisions.probes import LAYERS, SECOND_ORDER, Probe, all_probes

NON_FINITE = (torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e-42)
CHOOSES_NONLINEARITY, HAS_TWO_STATES = ("rnn", "leaky"), ("lstm", "leaky")
OPTIONS = ("bias", "batch_first", "dropout", "bidirectional", "batch_invariant")


def digest(tensor: Tensor) -> str:
    """Returns a digest of a tensor's dtype, shape and bits.

    All NaNs count as equal, because the compiler chooses which operand's bits a NaN inherits.
    """
    tensor = tensor.detach()
    tensor = tensor.masked_fill(tensor.isnan(), torch.nan).contiguous()
    bits = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""
    about = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(about + bits).hexdigest()[:16]


class Draws:
    """Random tensors, determined by the probe's name and the order of the draws."""

    def __init__(self, probe: Probe):
        seed = hashlib.sha256(probe.name.encode()).digest()[:7]
        self.generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        self.probe = probe
        self.dtype = getattr(torch, probe.dtype)

    def normal(self, *shape: int) -> Tensor:
        """Returns standard normal values, not contiguous if the probe is `strided`."""
        *outer, features = shape
        wide = torch.randn(*outer, (1 + self.probe.strided) * features, generator=self.generator)
        return wide.to(self.dtype)[..., :: 1 + self.probe.strided]

    def weight(self, shape: torch.Size) -> Tensor:
        """Returns a random parameter, scaled as in a new layer, or far larger to saturate tanh."""
        scale = 30 if self.probe.values == "saturated" else 1
        bound = scale * self.probe.sizes.hidden_size**-0.5
        return ((torch.rand(shape, generator=self.generator) * 2 - 1) * bound).to(self.dtype)

    def lengths(self, least: int) -> Tensor:
        """Returns random lengths of the batch's sequences; one sequence has the full length."""
        _, _, steps, batch = self.probe.sizes
        lengths = torch.randint(least, steps + 1, (batch,), generator=self.generator)
        lengths[batch // 2] = steps
        return lengths

    def input(self, steps: int, batch: int) -> Tensor:
        """Returns a random input `(seq_len, batch, input_size)`; some values may be non-finite."""
        features = self.probe.sizes.input_size
        input = self.normal(steps, batch, features)
        if self.probe.values == "non-finite":
            for value in NON_FINITE:
                row = int(torch.randint(steps * batch, (1,), generator=self.generator))
                input[row // batch, row % batch, row % features] = value
        return input


def options_of(probe: Probe) -> dict:
    """Returns the options that both the probe's module and its function take."""
    names = ("nonlinearity", *OPTIONS) if probe.cell in CHOOSES_NONLINEARITY else OPTIONS
    return {name: getattr(probe, name) for name in names}


def prepare_layer(probe: Probe, draws: Draws) -> torch.nn.Module:
    """Returns the layer of a probe, with random parameters."""
    sizes, name = probe.sizes[:2], LAYERS[probe.cell]
    if probe.call == "cell":
        nonlinearity = (probe.nonlinearity,) if probe.cell in CHOOSES_NONLINEARITY else ()
        step_module = getattr(namernn_fast, f"{name}Cell")
        layer = step_module(*sizes, probe.bias, *nonlinearity, dtype=draws.dtype)
    else:
        module = getattr(namernn_fast, name)
        layer = module(*sizes, probe.num_layers, dtype=draws.dtype, **options_of(probe))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(draws.weight(parameter.shape))
    return layer.requires_grad_(probe.wants("weights"))


def prepare_input(probe: Probe, draws: Draws) -> tuple[Tensor, Tensor | PackedSequence, dict]:
    """Returns a random leaf, the input made from this leaf, and the call's keyword arguments."""
    _, _, steps, batch = probe.sizes
    if probe.layout == "jagged":
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), draws.lengths(0).cumsum(0)])
        rows = draws.input(int(offsets[-1]), 1)[:, 0].requires_grad_(probe.wants("input"))
        return rows, torch.nested.nested_tensor_from_jagged(rows, offsets), {}

    def arranged(tensor: Tensor) -> Tensor:
        if probe.layout == "unbatched":
            return tensor[:, 0]
        return tensor.transpose(0, 1) if probe.batch_first else tensor

    leaf = arranged(draws.input(steps, batch))
    if probe.call == "cell":
        leaf = leaf[0]
    if probe.batch_first and not probe.strided:
        leaf = leaf.contiguous()
    leaf = leaf.detach().requires_grad_(probe.wants("input"))
    options = {}
    if probe.reset:
        options["reset"] = arranged(torch.rand(steps, batch, generator=draws.generator) < 0.2)
    if probe.noise:
        directions = probe.num_layers * (1 + probe.bidirectional)
        noise = arranged(draws.normal(steps, batch, directions * probe.sizes.hidden_size))
        options["noise"] = noise[0] if probe.call == "cell" else noise
    if probe.layout == "lengths":
        options["lengths"] = draws.lengths(0)
    elif probe.layout.startswith("packed"):
        lengths, is_sorted = draws.lengths(1), probe.layout == "packed"
        if is_sorted:
            lengths = lengths.sort(descending=True).values
        return leaf, pack_padded_sequence(leaf, lengths, probe.batch_first, is_sorted), options
    return leaf, leaf, options


def named_results(probe: Probe, returned) -> dict[str, Tensor]:
    """Returns the tensors that a layer or a step module returned, by name."""
    found = {}
    if probe.call != "cell":
        output, returned = returned
        if isinstance(output, PackedSequence):
            output = output.data
        found["output"] = output.values() if output.is_nested else output
    last = returned if isinstance(returned, tuple) else (returned,)
    return found | dict(zip(("h_n", "c_n"), last, strict=False))


def results(probe: Probe) -> dict[str, Tensor]:
    """Returns the results of a probe by name: its outputs and all wanted gradients."""
    draws = Draws(probe)
    layer = prepare_layer(probe, draws)
    leaf, input, options = prepare_input(probe, draws)
    outer = (probe.sizes.batch,) * (probe.layout != "unbatched")
    if probe.call != "cell":
        outer = (probe.num_layers * (1 + probe.bidirectional), *outer)
    states = {}
    for name in ("hx", "cx") if probe.cell in HAS_TWO_STATES else ("hx",):
        if probe.hx:
            state = draws.normal(*outer, probe.sizes.hidden_size)
            states[name] = state.requires_grad_(probe.wants("hx"))
    hx = tuple(states.values()) if "cx" in states else states.get("hx")
    autocast = contextlib.nullcontext()
    if probe.autocast:
        autocast = torch.autocast("cpu", getattr(torch, probe.autocast))
    torch.manual_seed(0)  # for dropout
    with autocast:
        if probe.call == "function":
            function = getattr(namernn_fast, probe.cell)
            options |= options_of(probe)
            returned = function(input, hx, [*layer.parameters()], training=True, **options)
        else:
            returned = layer(input, hx, **options)
    found = named_results(probe, returned)
    leaves = {"input": leaf, **states, **dict(layer.named_parameters())}
    leaves = {k: v for k, v in leaves.items() if v.requires_grad}
    return found | gradients(probe, draws, found, leaves) if leaves else found


def gradients(
    probe: Probe, draws: Draws, found: dict[str, Tensor], leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns gradients of the results with respect to the leaves, of first or second order."""
    chosen = [v for k, v in found.items() if probe.given in (k, "both", "sums")] or [found["h_n"]]
    if probe.given == "sums":
        grad_outputs = [torch.ones((), dtype=v.dtype).expand(v.shape) for v in chosen]
    else:
        grad_outputs = [draws.normal(*v.shape).to(v.dtype) for v in chosen]
    twice = probe.wanted == SECOND_ORDER
    inputs = list(leaves.values())
    first = torch.autograd.grad(chosen, inputs, grad_outputs, create_graph=twice, allow_unused=True)
    named = dict(zip((f"grad_{k}" for k in leaves), first, strict=True))
    if twice:
        squares = sum((g.float() ** 2).sum() for g in first if g is not None)
        second = torch.autograd.grad(squares, inputs, allow_unused=True)
        named |= dict(zip((f"grad_grad_{k}" for k in leaves), second, strict=True))
    return {k: v for k, v in named.items() if v is not None}


def digests_of(probe: Probe) -> dict[str, str]:
    """Returns a digest of each result of a probe, or the exception it raises."""
    try:
        return {name: digest(tensor) for name, tensor in results(probe).items()}
    except Exception as error:  # one failing probe must not hide the others
        return {"raised": f"{type(error).__name__}: {error}"}


def main() -> None:
    kernels, dtypes = sys.argv[1:3], sys.argv[3:]
    digests = {}
    # Check this first: an ATen operator might use instructions that the processor does not support.
    if [ops.cpu_kernel(), ops.cpu_kernel(torch.bfloat16)] == kernels:
        # Fill unwritten results with NaN instead of arbitrary memory.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for probe in all_probes():
                if (probe.autocast or probe.dtype) in dtypes:
                    digests[f"{probe.name}, threads={threads}"] = digests_of(probe)
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
