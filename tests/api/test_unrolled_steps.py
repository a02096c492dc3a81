"""Tests that steps in `unrolled()` blocks have the results and gradients of single steps."""

import contextlib
import gc
import threading

import pytest
import torch
from kinds import KINDS, TRIED_EQUATIONS, needs_extension
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from namernn_fast import explain, ops, step_autograd
from namernn_fast.nn.base import step_module
from namernn_fast.nn.states import map_states, states_in
from namernn_fast.step_autograd import PackedSteps
from namernn_fast.testing import assert_within_budget

pytestmark = needs_extension
T, B, D, H = 5, 3, 4, 6


@pytest.fixture(autouse=True)
def unroll_all_sizes(monkeypatch):
    monkeypatch.setattr(step_module, "MIN_UNROLLED", 0)
    monkeypatch.setattr(step_autograd, "_CHUNK", 2 * B)


class Loop:
    """A loop over a step module, with random tensors: the input, states and other inputs."""

    def __init__(self, kind, dtype=torch.float64, batch=B, features=D, hidden=H, bias=True):
        torch.manual_seed(0)
        heads = {"heads": 2} if kind.cell.can_have_heads else {}
        self.kind = kind
        self.module = kind.step_module(features, hidden, bias, dtype=dtype, **heads)

        def drawn(*size):
            return torch.randn(*size, dtype=dtype, requires_grad=True)

        self.x = drawn(T, batch, features)
        self.states = [drawn(batch, hidden) for _ in kind.cell.states]
        self.inputs = {i.name: drawn(T, batch, i.features(hidden)) for i in kind.cell.inputs}
        self.gradient = torch.randn(T, batch, hidden, dtype=dtype)

    @property
    def hx(self):
        return tuple(self.states) if len(self.states) > 1 else self.states[0]

    @property
    def leaves(self):
        named = {f"state {k}": state for k, state in enumerate(self.states)}
        return {"x": self.x, **named, **self.inputs, **dict(self.module.named_parameters())}

    def step(self, t, hx):
        return self.module(self.x[t], hx, **{name: v[t] for name, v in self.inputs.items()})

    def run(self, unrolled, hx=None, steps=range(T)):
        """Returns the outputs of steps and the last states."""
        outputs, hx = [], self.hx if hx is None else hx
        with self.module.unrolled() if unrolled else contextlib.nullcontext():
            for t in steps:
                hx = self.step(t, hx)
                outputs.append(states_in(hx)[0])
        return torch.stack(outputs), hx

    def gradients(self, results, **options):
        output, hx = results
        tensors = [output, *states_in(hx)]
        grads = [self.gradient[: len(output)], *map(torch.ones_like, states_in(hx))]
        named = self.leaves
        found = torch.autograd.grad(tensors, [*named.values()], grads, **options)
        return dict(zip(named, found, strict=True))

    def check(self, found, wanted=None):
        if wanted is None:
            wanted = self.gradients(self.run(False))
        assert_within_budget(found, wanted, wanted)


def gradient_functions(tensor):
    """Returns the names of the functions in the graph of a tensor."""
    found, nodes = set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [following for following, _ in node.next_functions]
    return {node.name() for node in found}


@pytest.mark.kinds(*KINDS, *TRIED_EQUATIONS, "slstm")
@pytest.mark.parametrize("bias", [True, False])
def test_loops_have_the_results_and_gradients_of_single_steps(kind, bias):
    loop = Loop(kind, bias=bias)
    results = loop.run(True)
    torch.testing.assert_close(results, loop.run(False))
    names = gradient_functions(results[0])
    assert {"FusedStepBackward", "_WeightGradientsBackward"} <= names
    loop.check(loop.gradients(results))
    alone = Loop(kind, bias=bias, batch=0)
    loop.check(alone.gradients(alone.run(True)), alone.gradients(alone.run(False)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "features", "hidden"), [(1, 33, 64), (19, 7, 34)])
def test_loops_meet_the_error_budget(kind, dtype, batch, features, hidden):
    """The budget comes from torch's cell, or a plain loop, in this dtype and in float64."""
    ours = Loop(kind, dtype, batch, features, hidden)
    found = {}
    for name, dtype_of_loop in (("ours", dtype), ("theirs", dtype), ("oracle", torch.float64)):
        loop = Loop(kind, dtype_of_loop, batch, features, hidden)
        if name != "ours":
            loop.module = kind.nn_step_module(features, hidden, dtype=dtype_of_loop)
        loop.module.load_state_dict(ours.module.state_dict())
        for tensor, value in zip(loop.leaves.values(), ours.leaves.values(), strict=True):
            tensor.data.copy_(value)
        loop.gradient = ours.gradient.to(dtype_of_loop)
        output, hx = loop.run(name == "ours")
        gradients = loop.gradients((output, hx))
        results = {f"last {k}": state.detach() for k, state in enumerate(states_in(hx))}
        results |= {f"grad {key}": gradient for key, gradient in gradients.items()}
        found[name] = {"output": output.detach(), **results}
    assert_within_budget(found["ours"], found["theirs"], found["oracle"])


def test_parts_of_a_graph_can_be_differentiated_in_any_order(kind):
    """No rows of one backward pass reach another pass."""
    loop = Loop(kind)
    wanted = loop.gradients(loop.run(False, steps=range(2)), retain_graph=True)
    with loop.module.unrolled():
        first = loop.run(False, steps=range(2))
        rest = loop.run(False, first[1], range(2, T))
        loop.check(loop.gradients(first, retain_graph=True), wanted)
        only_x = torch.autograd.grad(rest[0].sum(), loop.x, retain_graph=True)
        whole = torch.cat([first[0], rest[0]]), rest[1]
        loop.check(loop.gradients(whole, retain_graph=True))
    loop.check(loop.gradients(whole, retain_graph=True))
    again = torch.autograd.grad(rest[0].sum(), loop.x)
    torch.testing.assert_close(again, only_x)


def test_weights_without_gradients_get_none(kind):
    loop = Loop(kind)
    wanted = loop.gradients(loop.run(False))
    for name, parameter in loop.module.named_parameters():
        parameter.requires_grad_(False)
        results = loop.run(True)
        parameter.requires_grad_(True)
        needed = {key: value for key, value in loop.leaves.items() if key != name}
        found = torch.autograd.grad(
            [results[0], *states_in(results[1])],
            [*needed.values()],
            [loop.gradient, *map(torch.ones_like, states_in(results[1]))],
        )
        loop.check(dict(zip(needed, found, strict=True)), {key: wanted[key] for key in needed})


def test_truncated_chunks_and_optimizer_steps_inside_a_block(kind):
    """Each chunk trains with the weights that the previous chunk's step left behind."""
    trained = []
    for unrolled in (False, True):
        for options in ({}, {"fused": True}):
            loop = Loop(kind)
            optimizer = torch.optim.Adam(loop.module.parameters(), lr=0.1, **options)
            with loop.module.unrolled() if unrolled else contextlib.nullcontext():
                hx = loop.hx
                for steps in (range(2), range(2, 4), range(4, T)):
                    hx = map_states(hx, torch.Tensor.detach)
                    optimizer.zero_grad()
                    output, hx = loop.run(False, hx, steps)
                    (output**2).sum().backward()
                    optimizer.step()
            trained.append(loop.module.state_dict())
    for found in trained[1:]:
        torch.testing.assert_close(found, trained[0])


def test_a_change_in_place_inside_a_block_packs_the_weights_again(kind):
    results = []
    for unrolled in (False, True):
        loop = Loop(kind)
        with loop.module.unrolled() if unrolled else contextlib.nullcontext():
            output, _ = loop.run(False)
            output.sum().backward()
            with torch.no_grad():
                for parameter in loop.module.parameters():
                    parameter.mul_(0.5)
            results.append(loop.run(False)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_inside_a_block(kind, use_reentrant):
    loop = Loop(kind)

    def chunk(start, *states):
        hx = states if len(states) > 1 else states[0]
        output, hx = loop.run(False, hx, range(start, min(start + 2, T)))
        return output, *states_in(hx)

    with loop.module.unrolled():
        outputs, states = [], loop.states
        for start in range(0, T, 2):
            output, *states = checkpoint(chunk, start, *states, use_reentrant=use_reentrant)
            outputs.append(output)
        tensors = [torch.cat(outputs), *states]
        torch.autograd.backward(tensors, [loop.gradient, *map(torch.ones_like, states)])
    # A reentrant checkpoint gives no gradients to tensors that are not its arguments.
    found = {name: leaf.grad for name, leaf in loop.leaves.items() if leaf.grad is not None}
    assert len(found) > len(loop.states)
    wanted = loop.gradients(loop.run(False))
    loop.check(found, {name: wanted[name] for name in found})


def test_saved_tensor_hooks_may_replace_saved_tensors(kind):
    loop, packed = Loop(kind), []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = loop.run(True)
    assert packed
    loop.check(loop.gradients(results))


class Seen(TorchDispatchMode):
    """Collects the names of all operators."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.names.add(operator.name())
        return operator(*arguments, **keywords or {})


@pytest.mark.parametrize("unrolled", [True, False])
def test_modes_see_operators_in_both_passes(kind, fused_steps, unrolled):
    """Without modes, both passes skip torch's dispatcher."""
    loop = Loop(kind)
    wanted = loop.gradients(loop.run(False))
    with Seen() as seen:
        results = loop.run(unrolled)
    loop.check(loop.gradients(results), wanted)
    assert ("namernn_fast::forward" in seen.names) == (
        unrolled or kind.gates > 1 or not kind.cell.torch
    )
    results = loop.run(unrolled)
    with Seen() as seen:
        loop.check(loop.gradients(results), wanted)


@pytest.mark.parametrize("batched", [False, True])
def test_higher_order_and_batched_gradients(kind, batched):
    """Each step then multiplies for itself, with operators that can be differentiated again."""
    found = []
    for unrolled in (False, True):
        loop = Loop(kind)
        results = loop.run(unrolled)
        if batched:
            grads = torch.stack([loop.gradient, 2 * loop.gradient])
            found.append(
                torch.autograd.grad(
                    results[0], [*loop.leaves.values()], grads, is_grads_batched=True
                )
            )
            continue
        gradients = loop.gradients(results, create_graph=True)
        total = sum((gradient**2).sum() for gradient in gradients.values())
        found.append(torch.autograd.grad(total, [*loop.leaves.values()]))
    named = [dict(zip(Loop(kind).leaves, gradients, strict=True)) for gradients in found]
    assert_within_budget(named[1], named[0], named[0])


def test_two_loops_at_once_and_blocks_within_blocks(kind):
    loop = Loop(kind)
    other = [state.detach() * 0.5 for state in loop.states]
    other = tuple(other) if len(other) > 1 else other[0]
    results = []
    for unrolled in (False, True):
        with loop.module.unrolled() if unrolled else contextlib.nullcontext():
            first, second, outputs = loop.hx, other, []
            for t in range(T):
                first = loop.step(t, first)
                with loop.module.unrolled() if unrolled else contextlib.nullcontext():
                    second = loop.step(t, second)
                outputs.append(states_in(first)[0] + states_in(second)[0])
            results.append(loop.gradients((torch.stack(outputs), first)))
    loop.check(*results[::-1])


def test_threads_with_a_block_each(kind):
    loop, found = Loop(kind), {}

    def work(k):
        found[k] = loop.gradients(loop.run(True))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gradients in found.values():
        loop.check(gradients)
    assert len(found) == 4


def test_transforms_run_steps_as_without_a_block(kind):
    loop = Loop(kind)
    parameters = dict(loop.module.named_parameters())

    def loss(parameters):
        with loop.module.unrolled():
            hx = loop.hx
            for t in range(2):
                rest = {name: v[t] for name, v in loop.inputs.items()}
                hx = torch.func.functional_call(loop.module, parameters, (loop.x[t], hx), rest)
            return states_in(hx)[0].sum()

    found = torch.func.grad(loss)(parameters)
    output, _ = loop.run(False, steps=range(2))
    wanted = torch.autograd.grad(output[-1].sum(), [*parameters.values()])
    torch.testing.assert_close([*found.values()], [*wanted])


@pytest.mark.slow
def test_loops_in_a_block_can_be_compiled(kind):
    torch._dynamo.reset()
    loop = Loop(kind, torch.float32)
    output, _ = torch.compile(lambda: loop.run(True), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(output, loop.run(False)[0])


def test_outputs_may_be_changed_in_place(kind):
    """As with torch's GRU and LSTM cells. The next step reads the new values."""
    loop = Loop(kind)
    with loop.module.unrolled():
        changed = loop.step(0, loop.hx)
        states_in(changed)[0].mul_(0.5)
        found = states_in(loop.step(1, changed))[0]
    h, *rest = states_in(loop.step(0, loop.hx))
    scaled = (0.5 * h, *rest) if rest else 0.5 * h
    wanted = states_in(loop.step(1, scaled))[0]
    leaves = [*loop.leaves.values()]
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves)
    )


@pytest.mark.covering(0)
def test_packed_weights_are_freed_with_the_graph(kind):
    gc.collect()
    before = sum(isinstance(thing, PackedSteps) for thing in gc.get_objects())
    loop = Loop(kind)
    results = loop.run(True)
    loop.gradients(results)
    del results
    gc.collect()
    assert sum(isinstance(thing, PackedSteps) for thing in gc.get_objects()) == before


def test_explain_reports_the_kernel_inside_a_block(kind):
    module, x = kind.step_module(4, 300), torch.randn(2, 4)
    with module.unrolled():
        assert explain(module, x).path == f"cpu {ops.cpu_kernel()}"
