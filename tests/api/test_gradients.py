"""Tests backward passes with hooks, under transforms, and after tensors have changed."""

import itertools

import pytest
import torch
from kinds import flat, for_variants, tensors_in
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from namernn_fast import torch_operators

XS = torch.randn(2, 6, 3), torch.randn(5, 9, 3)
RESET = torch.tensor([[False, True]] * 6).T


@pytest.mark.parametrize("change", [torch.relu_, lambda o: o[0].zero_(), nn.Dropout(inplace=True)])
def test_error_for_a_changed_output_suggests_a_copy(kind, change):
    output, _ = kind.layer(3, 4)(XS[0])
    change(output)
    with pytest.raises(RuntimeError, match=r"Change a copy: output\.clone\(\)"):
        output.sum().backward()


@for_variants
def test_hooks_of_unused_results_do_not_run(kind, path):
    """As with `nn.RNN`, these hooks are skipped. Given None, hooks such as `clamp` would fail."""
    layer, called, counted = kind.layer(3, 4, 2), [], []
    for used in range(1 + len(kind.cell.states)):
        if (
            used
            and path == "reference"
            and torch_operators.has_operator(kind.cell)
            and kind.has_cell_state
        ):
            continue  # nn.LSTM's output and last states come from one operator
        results = flat(layer(XS[0]))
        for number, result in enumerate(results):
            result.register_hook(lambda grad, number=number: called.append((number, grad.shape)))
        torch.autograd.graph.register_multi_grad_hook(results, counted.append)
        results[used].sum().backward()
        assert called == [(used, results[used].shape)]
        assert [grad is not None for grad in counted[0]] == [
            number == used for number in range(len(results))
        ]
        called.clear()
        counted.clear()


def test_hooks_of_results_change_gradients_and_can_be_removed(kind):
    layer, called = kind.layer(3, 4), []
    x = XS[0].clone().requires_grad_()
    results = flat(layer(x))
    removed = results[1].register_hook(called.append)
    results[1].register_hook(lambda grad: grad * 0)
    removed.remove()
    results[1].sum().backward()
    assert not called
    assert not x.grad.any()


@for_variants
def test_lazily_negated_gradients_of_results_are_resolved(kind):
    grads = []
    for module in kind.twins(3, 1):
        results = flat(module(XS[0]))
        torch.manual_seed(1)
        terms = []
        for result in results:
            w = torch.randn(result.shape, dtype=torch.complex64)
            # The gradient of the imaginary part is lazily negated.
            terms.append((torch.complex(torch.zeros_like(result), result).conj() * w).real.sum())
        grads.append(torch.autograd.grad(sum(terms), [*module.parameters()]))
    torch.testing.assert_close(*grads)


@for_variants
@pytest.mark.parametrize("names", [("bias_ih_l0", "bias_hh_l1"), ("weight_ih_l0",)])
def test_unneeded_weights_may_change_before_backward(kind, names):
    """As with `nn.RNN`, biases and weight_ih_l0 may change if no needed gradient reads them.

    `nn.LSTM` allows these changes only without oneDNN.
    """
    ours, theirs = kind.twins(3, 4, 2)
    for module in (ours, theirs):
        with torch.backends.mkldnn.flags(enabled=False):
            output, _ = module(XS[0])
        with torch.no_grad():
            for name in names:
                getattr(module, name).add_(1)
        output.sum().backward()
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    output, _ = ours(XS[0])
    with torch.no_grad():
        getattr(ours, names[0]).add_(1)
    with pytest.raises(RuntimeError, match="changed in place since the forward pass"):
        torch.autograd.grad(output.sum(), ours.weight_hh_l0, create_graph=True)


def assign_data(tensors):
    for tensor in tensors:
        tensor.data = torch.full_like(tensor, 0.5)


@for_variants
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("what", ["weights", "input", "constant input", "input of a graph", "hx"])
def test_gradient_ignores_data_assigned_after_forward(kind, what, create_graph):
    """As with `nn.RNN`, the gradient uses the values that the forward pass has read."""
    results = []
    for module in kind.twins(3, 4, 2, dtype=torch.float64):
        x = XS[0].transpose(0, 1).double().requires_grad_(what != "constant input")
        hx = kind.states(torch.zeros, 2, 2, 4, dtype=torch.float64, requires_grad=True)
        input = x * 1 if what == "input of a graph" else x
        wanted = [*tensors_in(hx), *module.parameters(), *([x] if x.requires_grad else [])]
        output, _ = module(input, hx)
        assign_data({"weights": module.parameters(), "hx": tensors_in(hx)}.get(what, [input]))
        gradients = torch.autograd.grad(output.square().sum(), wanted, create_graph=create_graph)
        if create_graph:
            penalty = sum(gradient.square().sum() for gradient in gradients)
            gradients += torch.autograd.grad(penalty, wanted)
        results.append(gradients)
    torch.testing.assert_close(*results)


def test_gradient_ignores_a_dtype_conversion_after_forward(kind):
    x, module = XS[0].clone().requires_grad_(), kind.layer(3, 4, 2)
    (wanted,) = torch.autograd.grad(module(x)[0].sum(), x)
    output, _ = module(x)
    module.double()
    output.sum().backward()
    assert torch.equal(x.grad, wanted)


@pytest.mark.parametrize("padding_idx", [None, 1])
def test_token_gradient_ignores_data_assigned_after_forward(kind, padding_idx):
    module = kind.tokens(5, 3, 4, padding_idx=padding_idx)
    ids = torch.arange(10).remainder(5).view(5, 2)
    wanted = torch.autograd.grad(module(ids)[0].square().sum(), list(module.parameters()))
    output, _ = module(ids)
    assign_data(module.parameters())
    gradients = torch.autograd.grad(output.square().sum(), list(module.parameters()))
    torch.testing.assert_close(gradients, wanted)


def test_vjp_under_transforms_ignores_data_assigned_after_forward(kind):
    results = []
    for module in kind.twins(3, 4, dtype=torch.float64):
        output, _ = module(XS[0].transpose(0, 1).double())
        wanted = list(module.parameters())
        assign_data(wanted)

        def pull_back(vector, output=output, wanted=wanted):
            return torch.autograd.grad(output, wanted, vector, retain_graph=True)

        vectors = torch.stack([torch.ones_like(output), output.detach()])
        results.append(torch.vmap(pull_back)(vectors))
        results[-1] += torch.func.jvp(pull_back, (vectors[0],), (vectors[1],))[1]
        results[-1] += torch.autograd.grad(output, wanted, vectors, is_grads_batched=True)
    torch.testing.assert_close(*results)


def test_tensors_from_a_finished_transform_are_accepted(kind):
    outlived = []
    torch.func.grad(lambda x: (outlived.append(x), x.sum())[1])(XS[0])
    module = kind.layer(3, 4)
    torch.testing.assert_close(module(outlived[0]), module(XS[0]))


@for_variants
def test_needed_weights_must_not_change_before_backward(kind):
    ours = kind.layer(3, 4, 2)
    last = ["weight_hr_l0"] if kind.bits else [f"{own.name}_l0" for own in kind.cell.own]
    for name in ("weight_hh_l0", "weight_ih_l1", *last):
        output, _ = ours(XS[0])
        with torch.no_grad():
            getattr(ours, name).add_(1)
        with pytest.raises(RuntimeError, match="reads its output, its input, hx, reset_to and we"):
            output.sum().backward()
    output, _ = ours(XS[0].clone().requires_grad_())
    with torch.no_grad():
        ours.weight_ih_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@for_variants
def test_vjp_under_transforms_matches_torchs_layer(kind):
    """Forward mode and torch.func can differentiate the backward pass."""
    vector, tangent = torch.randn(2, 6, 2, 4, dtype=torch.float64)
    results = []
    for module in kind.twins(3, 4, 2, dtype=torch.float64):
        x = XS[0].transpose(0, 1).double().requires_grad_()
        output, _ = module(x)
        vector, tangent = (v[..., : output.shape[-1]] for v in (vector, tangent))
        inputs = (x, *module.parameters())

        def pull_back(vector, output=output, inputs=inputs):
            return torch.autograd.grad(output, inputs, vector, create_graph=True)

        def penalty(vector, pull_back=pull_back):
            return sum(gradient.square().sum() for gradient in pull_back(vector))

        with forward_ad.dual_level():
            duals = pull_back(forward_ad.make_dual(vector, tangent))
            results.append([forward_ad.unpack_dual(dual).tangent for dual in duals])
        results[-1] += torch.func.jvp(pull_back, (vector,), (tangent,))[1]
        results[-1].append(torch.func.grad(penalty)(vector))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("batch_first", [False, True])
def test_results_under_no_grad_may_be_changed_in_place(kind, path, batch_first):
    """Results must not be views: autograd forbids in-place changes to views made under no_grad."""
    leaf = torch.ones((), requires_grad=True)
    for dropout in (0.0, 0.5):
        module = kind.layer(3, 4, 2, batch_first=batch_first, dropout=dropout)
        ids = {"input": torch.zeros(6, 2, dtype=torch.int64), "embedding": torch.zeros(5, 3)}
        results = []
        with torch.no_grad():
            for arguments in ({"input": XS[0]}, ids):
                results += flat(module(**arguments)) + tensors_in(module.last_state(**arguments))
        for result in results:
            result += leaf


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.usefixtures("steps")
def test_states_of_a_step_may_be_changed_in_place(kind, with_grad):
    """As with torch's cells, programs may `detach_` a state to truncate backpropagation."""
    cell = kind.step_module(3, 64)
    leaf = torch.ones((), requires_grad=True)
    for x, change in itertools.product(
        (torch.randn(64, 3), torch.randn(2, 3)), (torch.Tensor.detach_, lambda h: h.add_(leaf))
    ):
        with torch.set_grad_enabled(with_grad):
            states = cell(x)
        for state in tensors_in(states):
            assert not state._is_view()
            assert state.requires_grad == with_grad
            change(state)
            assert state.requires_grad == (change is not torch.Tensor.detach_)
    if with_grad:
        sum(state.sum() for state in tensors_in(cell(x, cell(x)))).backward()
        assert cell.weight_hh.grad is not None


@pytest.mark.parametrize("what", ["batch_sizes", "indices", "lengths", "reset", "offsets"])
def test_layout_tensors_may_come_from_inference_mode(kind, path, what):
    """Tensors that describe the batch layout may be created in inference mode, as with `nn.RNN`."""
    module, lengths = kind.layer(3, 4), torch.tensor([2, 1, 2, 2, 1, 2])
    results = []
    for mode in (False, True):
        with torch.inference_mode(mode):
            made = {"lengths": lengths.clone(), "reset": RESET.clone()}
            packed = pack_padded_sequence(XS[0], lengths, enforce_sorted=False)
            offsets = torch.tensor([0, 2, 6])
        x, data = XS[0].clone(), packed.data.clone()
        if what in made:
            output, _ = module(x, **{what: made[what]})
        elif what == "offsets":
            jagged = torch.nested.nested_tensor_from_jagged(x[0], offsets)
            output = module(jagged)[0].values()
        else:
            more = packed[2:] if what == "indices" else ()
            output = module(PackedSequence(data, packed.batch_sizes, *more))[0].data
        results.append(torch.autograd.grad(output.sum(), list(module.parameters())))
    torch.testing.assert_close(*results)


def test_bias_may_come_from_inference_mode(kind):
    module = kind.layer(3, 4)
    with torch.inference_mode():
        bias = torch.zeros(kind.gates * 4)
    module._parameters["bias_ih_l0"] = bias
    module(XS[0])[0].sum().backward()
    assert module.weight_hh_l0.grad is not None
