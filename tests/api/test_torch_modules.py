"""Runs checks of PyTorch's test_modules.py on fused modules, with PyTorch's own inputs."""

import copy
import functools
import io
import itertools
import pickle

import pytest
import torch
from kinds import map_states
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves, tree_map_only

from namernn_fast.nn.replacing import PLAIN
from namernn_fast.testing import assert_within_budget

pytestmark = [pytest.mark.covering(1), pytest.mark.usefixtures("fused_steps")]

FUSED = {plain: fused for fused, plain in PLAIN.items()}
LAYERS = [cls for cls in FUSED if issubclass(cls, torch.nn.RNNBase)]
ENTRIES = {cls: next(info for info in module_db if info.module_cls is cls) for cls in FUSED}


def cases(*dtypes):
    """Parametrizes a test over the modules, dtypes and modes of torch's own module tests."""
    chosen = [
        (base, dtype, training)
        for base, info in ENTRIES.items()
        for dtype in dtypes or info.dtypes
        for training in ((True, False) if info.train_and_eval_differ else (True,))
    ]
    names = [f"{case[0].__name__}-{case[1]}-{'train' if case[2] else 'eval'}" for case in chosen]
    return pytest.mark.parametrize(("base", "dtype", "training"), chosen, ids=names)


def samples_of(base, dtype, training, requires_grad=False):
    """Returns torch's sample inputs for a module."""
    info = ENTRIES[base]
    extra = {"with_packed_sequence": True} if base in LAYERS else {}
    options = {"device": "cpu", "dtype": dtype, "requires_grad": requires_grad} | extra
    samples = info.module_inputs_func(info, training=training, **options)
    assert samples
    return samples


def pairs(base, dtype, training, requires_grad=False, in_a_batch=True):
    """Yields a fused module, torch's module with equal weights, and arguments for both.

    Args:
        in_a_batch: also yields a batch of three for each sample that is not packed.
    """
    for sample in samples_of(base, dtype, training, requires_grad):
        made, args = sample.constructor_input, sample.forward_input.args
        theirs = base(*made.args, **made.kwargs, dtype=dtype).train(training)
        ours = FUSED[base](*made.args, **made.kwargs, dtype=dtype).train(training)
        with torch.no_grad():  # `nn.RNN.load_state_dict` fails if conversions swap parameters
            for target, source in zip(ours.parameters(), theirs.parameters(), strict=True):
                target.copy_(source)
        yield ours, theirs, args
        if in_a_batch and not isinstance(args[0], PackedSequence):
            states_dim = 1 if base in LAYERS else 0
            dims = (0 if made.kwargs.get("batch_first") else states_dim, states_dim)

            def batch(t, dim):
                batched = torch.stack([t, -t, t.flip(-1)], dim)
                return batched.detach().requires_grad_(requires_grad)

            given = zip(args, dims, strict=False)
            batched = (map_states(arg, functools.partial(batch, dim=dim)) for arg, dim in given)
            yield ours, theirs, tuple(batched)


def tensors(*trees):
    return [t for t in tree_leaves(trees) if isinstance(t, Tensor) and t.is_floating_point()]


def changed(tree, change=torch.clone):
    """Applies `change` to the floating-point tensors of a tree, but not to integer batch_sizes."""

    def leaf(t):
        return change(t.detach()).requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return tree_map_only(Tensor, leaf, tree)


def run(module, args, grads=None):
    """Returns the outputs, and the gradients of all arguments and parameters that require them."""
    outputs = tensors(module(*args))
    inputs = [t for t in tensors(args, list(module.parameters())) if t.requires_grad]
    grads = grads or [torch.ones_like(t) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def non_contiguous(t):
    return t.repeat_interleave(2, dim=-1)[..., ::2]


def recorder(calls):
    """Returns a hook that appends its arguments, except the module, to `calls`."""
    return lambda _, *seen: calls.append(seen)


def described(module):
    return [
        (name, type(p), p.shape, p.stride(), p.dtype, p.device, p.requires_grad)
        for name, p in module.named_parameters()
    ]


@pytest.fixture(params=[True, False], ids=["swap", "set"])
def swap(request):
    """True if conversions swap a parameter's contents instead of setting its `data`."""
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(False)


@cases()
def test_factory_arguments_apply_to_every_parameter(base, dtype, training):
    """`dtype`, `device` and `torch.device` as a context apply to every parameter."""
    for sample in samples_of(base, dtype, training)[::3]:  # neighbors differ only in call arguments
        made = sample.constructor_input
        for device, context in itertools.product(("cpu", "meta", None), ("cpu", "meta")):
            with torch.device(context):
                ours, theirs = (
                    cls(*made.args, **made.kwargs, device=device, dtype=dtype).train(training)
                    for cls in (FUSED[base], base)
                )
            assert described(ours) == described(theirs)
            assert {p.device.type for p in ours.parameters()} == {device or context}
            assert {p.dtype for p in ours.parameters()} == {dtype}


@cases()
def test_modules_move_to_another_device_and_back(base, dtype, training):
    samples = pairs(base, dtype, training, in_a_batch=False)
    for ours, theirs, args in itertools.islice(samples, 0, None, 5 if base in LAYERS else 1):
        before, weights = ours(*args), copy.deepcopy(ours.state_dict())
        there = changed(args, lambda t: t.to("meta"))
        outputs = []
        for module in (ours.to("meta"), theirs.to("meta")):
            outputs.append([(t.shape, t.dtype, t.device) for t in tensors(module(*there))])
        assert outputs[0] == outputs[1]
        assert described(ours) == described(theirs)
        mixed = [args, (args[0], *there[1:]), (there[0], *args[1:])][: 2 * len(args) - 1]
        for module in (ours, theirs):
            # Without a bias, torch accepts a packed batch with weights on another device.
            for wrong in [] if isinstance(args[0], PackedSequence) else mixed:
                with pytest.raises(RuntimeError, match="device"):
                    module(*wrong)
        ours.to_empty(device="cpu").load_state_dict(weights)
        assert_close(ours(*args), before, rtol=0, atol=0)


@cases()
def test_copies_print_and_compute_the_same(base, dtype, training):
    """Deep-copied, saved and pickled modules print and compute the same as the original."""
    for ours, theirs, args in pairs(base, dtype, training, in_a_batch=False):
        assert repr(ours) == f"Fused{theirs!r}"
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        saved = torch.load(file, weights_only=False)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), saved):
            assert repr(twin) == repr(ours)
            assert twin.training is training
            assert described(twin) == described(ours)
            assert_close(twin(*args), ours(*args), rtol=0, atol=0)


@cases()
def test_state_dicts_load_into_the_other_module(base, dtype, training):
    """A saved `state_dict` of either module loads into the other, and the hooks of both run."""
    for modules in pairs(base, dtype, training, in_a_batch=False):
        args = modules[2]
        for source, target in itertools.permutations(modules[:2]):
            calls = []
            hook = recorder(calls)
            source.register_state_dict_pre_hook(hook)
            source.register_state_dict_post_hook(hook)
            target.register_load_state_dict_pre_hook(hook)
            target.register_load_state_dict_post_hook(hook)
            with torch.no_grad():
                next(source.parameters()).add_(1)
            file = io.BytesIO()
            torch.save(source.state_dict(), file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
            assert target.load_state_dict(loaded) == ([], [])
            assert len(calls) == 4
            assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
            assert_close(target(*args), source(*args))


@cases()
def test_hooks_see_the_same_values_as_in_torch(base, dtype, training):
    for *modules, args in pairs(base, dtype, training, requires_grad=True):
        seen = []
        for module in modules:
            calls = []
            hook = recorder(calls)
            module.register_forward_pre_hook(hook)
            module.register_forward_hook(hook)
            module.register_full_backward_pre_hook(hook)
            module.register_full_backward_hook(hook)
            seen.append((run(module, changed(args)), tensors(calls)))
            assert len(calls) == 4
        assert_close(seen[0], seen[1])


@pytest.mark.covering(0)
@cases()
def test_non_contiguous_tensors_match_torch(base, dtype, training):
    """Results match for tensors with any strides, and are contiguous if torch's results are."""
    for ours, theirs, args in pairs(base, dtype, training, requires_grad=True):
        grads = [torch.randn_like(t) for t in tensors(theirs(*args))]
        wanted = run(theirs, args, grads)
        all_args = (args, changed(args, non_contiguous))
        all_grads = (grads, changed(grads, non_contiguous))
        assert not any(t.is_contiguous() for t in tensors(all_args[1], all_grads[1]))
        precise = None
        if base not in (torch.nn.RNN, torch.nn.RNNCell) and dtype == torch.float32:
            double = copy.deepcopy(theirs).double()
            precise = run(double, changed(args, Tensor.double), [g.double() for g in grads])
        for pair in itertools.product(all_args, all_grads):
            got = run(ours, *pair)
            if precise is None:
                assert_close(got, wanted)
            else:  # rounding differs by more than the tolerances of assert_close
                assert_within_budget(*(dict(enumerate(r)) for r in (got, wanted, precise)))
            for result, expected in zip(got, wanted, strict=True) if pair[0] is args else ():
                assert result.is_contiguous() or not expected.is_contiguous()


@cases(torch.float32)
@pytest.mark.parametrize("with_grad", [True, False])
def test_conversions_keep_the_parameter_objects(swap, base, dtype, training, with_grad):
    """Parameters stay the same objects through conversions, even after a backward pass."""
    for ours, theirs, args in pairs(base, dtype, training, in_a_batch=False):
        converted = []
        for module in (ours, theirs):
            sum(t.sum() for t in tensors(module(*args))).backward()
            if not with_grad:
                module.zero_grad()
            before = list(module.parameters())
            for other in (torch.float64, dtype):
                module.to(other)
                assert all(p is q for p, q in zip(module.parameters(), before, strict=True))
                assert {p.dtype for p in before} == {other}
                assert {p.grad.dtype for p in before if with_grad} <= {other}
            converted.append((tensors(module(*args)), [p.grad for p in before if with_grad]))
        assert_close(*converted)
