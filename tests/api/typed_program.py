"""A user's program, which tests/api/test_typing.py checks in mypy's strict mode and runs.

`mistakes` never runs. The check fails unless mypy reports an error on each of its marked lines.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import namernn_fast
from namernn_fast import (
    FusedGRU,
    FusedGRUCell,
    FusedLSTM,
    FusedLSTMCell,
    FusedRNN,
    FusedRNNCell,
    TokenGRU,
    TokenLSTM,
    TokenRNN,
    batch_invariant,
    empty_cache,
    explain,
    gru,
    last_state,
    lstm,
    memory_reserved,
    replace_rnn,
    restore_rnn,
    rnn,
)
from namernn_fast.testing import ErrorBudget, assert_within_budget, max_error


class Tagger(nn.Module):
    """A user's model, with a fused layer and a linear head."""

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layer = FusedRNN(3, 4, bidirectional=True, device=device, dtype=torch.float32)
        self.head = nn.Linear(8, 2, device=device)

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Returns scores of shape (seq_len, batch, 2)."""
        output, _ = self.layer(input, lengths=lengths)
        return torch.relu(self.head(output))


def use_modules(
    layer: FusedRNN | FusedGRU,
    reader: TokenRNN | TokenGRU,
    cell: FusedRNNCell | FusedGRUCell,
    input: Tensor,
    packed: PackedSequence,
    ids: Tensor,
) -> None:
    """Calls modules with input (seq_len, batch, 3), packed (rows, 3) and ids (seq_len, batch)."""
    output, h_n = layer(input)
    assert_type(output, Tensor)
    assert_type(h_n, Tensor)
    resets = torch.zeros(5, 2, dtype=torch.bool)
    assert_type(
        layer(input, h_n, reset=resets, reset_to=h_n.expand(5, 1, 2, 4)), tuple[Tensor, Tensor]
    )
    assert_type(layer(packed), tuple[PackedSequence, Tensor])
    assert_type(layer.forward(packed), tuple[PackedSequence, Tensor])
    for lengths in (torch.tensor([5, 2]), [5, 2], (5, 2), np.array([5, 2])):
        assert_type(layer(input, lengths=lengths), tuple[Tensor, Tensor])
    assert_type(layer.last_state(packed), Tensor)
    assert_type(layer.batch_invariant, bool)
    assert_type(layer.weight_ih_l0, Tensor | nn.Module)  # as in nn.RNN

    assert_type(reader(ids), tuple[Tensor, Tensor])
    assert_type(reader(pack_sequence([ids[:, 0]])), tuple[PackedSequence, Tensor])
    assert_type(reader.last_state(ids, share_prefixes=False), Tensor)
    assert_type(reader.embedding, nn.Embedding)
    assert_type(reader.rnn, FusedRNN | FusedGRU)
    assert_type(cell(input[0], cell(input[0])), Tensor)


def use_lstms(input: Tensor, packed: PackedSequence, ids: Tensor) -> None:
    """Calls the modules and functions for LSTMs with the same kinds of input as `use_modules`."""
    layer = FusedLSTM(3, 4, 1, False, batch_invariant=True)
    output, (h_n, c_n) = layer(input)
    assert_type(output, Tensor)
    assert_type(c_n, Tensor)
    assert_type(layer(packed), tuple[PackedSequence, tuple[Tensor, Tensor]])
    assert_type(layer(input, (h_n, c_n), [5, 2]), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(layer.last_state(packed), tuple[Tensor, Tensor])
    assert_type(FusedLSTM(3, 4, proj_size=2)(input)[0], Tensor)

    reader = TokenLSTM(7, 3, 4, proj_size=2, padding_idx=0)
    assert_type(reader(ids), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(reader.last_state(ids), tuple[Tensor, Tensor])
    assert_type(reader.rnn, FusedLSTM)

    cell = FusedLSTMCell(3, 4, bias=False)
    assert_type(cell(input[0], cell(input[0])), tuple[Tensor, Tensor])

    weights = list(FusedLSTM(3, 4).parameters())
    assert_type(lstm(input, None, weights), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(lstm(packed, (h_n[:, :2], c_n), weights, projections=False)[0], PackedSequence)
    assert_type(last_state(packed, None, weights, cell="lstm"), tuple[Tensor, Tensor])
    assert_type(explain(layer, input, (h_n, c_n)).path, str)
    assert_type(replace_rnn(nn.LSTM(3, 4), cells=("lstm",)), nn.LSTM)
    assert_type(restore_rnn(layer), nn.LSTM)
    assert_type(restore_rnn(cell), nn.LSTMCell)


def use_functions(input: Tensor, packed: PackedSequence, ids: Tensor) -> None:
    """Calls the functions with the same kinds of input as `use_modules`."""
    layer = FusedRNN(3, 4)
    weights = list(layer.parameters())
    assert_type(rnn(input, None, weights), tuple[Tensor, Tensor])
    assert_type(rnn(packed, None, weights), tuple[PackedSequence, Tensor])
    assert_type(rnn(ids, None, weights, embedding=torch.randn(7, 3)), tuple[Tensor, Tensor])
    assert_type(last_state(packed, None, weights), Tensor)
    with batch_invariant():
        layer(input)
    empty_cache()
    assert_type(memory_reserved(), int)

    assert_type(replace_rnn(nn.RNN(3, 4)), nn.RNN)
    assert_type(replace_rnn(Tagger()), Tagger)
    assert_type(restore_rnn(layer), nn.RNN)
    assert_type(restore_rnn(FusedRNNCell(3, 4)), nn.RNNCell)
    assert_type(restore_rnn(Tagger()), Tagger)

    weights = list(FusedGRU(3, 4).parameters())
    assert_type(gru(input, None, weights), tuple[Tensor, Tensor])
    assert_type(gru(packed, None, weights), tuple[PackedSequence, Tensor])
    assert_type(last_state(packed, None, weights, cell="gru"), Tensor)
    assert_type(replace_rnn(nn.GRU(3, 4), cells=("gru",)), nn.GRU)
    assert_type(restore_rnn(FusedGRU(3, 4)), nn.GRU)
    assert_type(restore_rnn(FusedGRUCell(3, 4)), nn.GRUCell)

    explained = explain(FusedRNN(3, 4), packed)
    assert_type(explained.path, str)
    assert_type(explained.why_not, dict[str, str])
    assert_type(explained.shortcuts, tuple[str, ...])
    assert_type(namernn_fast.__version__, str)

    assert_type(max_error(input, input.double()), float)
    assert_within_budget({"output": input}, {"output": input}, {"output": input.double()})
    budget = ErrorBudget(torch.float32)
    budget.add("output", input, input, input.double().numpy())
    assert_type(budget.exceeded(), list[str])


def use_either(input: Tensor | PackedSequence) -> Tensor | PackedSequence:
    """Calls a layer with an input whose type is a union."""
    output, h_n = FusedRNN(3, 4)(input)
    assert_type(h_n, Tensor)
    return output


def mistakes(input: Tensor, packed: PackedSequence, model: nn.Sequential) -> None:
    """Makes mistakes. For each, mypy must report the error code in the comment on its line."""
    layer = FusedRNN(3, 4)
    FusedRNN("3", 4)  # type: ignore[arg-type]
    FusedRNN(3, 4, nonlinearity=torch.tanh)  # type: ignore[arg-type]
    FusedRNN(3, 4, proj_size=2)  # type: ignore[arg-type]
    FusedRNN(3)  # type: ignore[call-arg]
    TokenRNN(7, 3, 4, padding_idx="0")  # type: ignore[arg-type]
    layer([1.0, 2.0])  # type: ignore[type-var]
    layer(input, lenghts=[5, 2])  # type: ignore[arg-type]
    layer(input, lengths=[5.0, 2.0])  # type: ignore[list-item]
    layer(packed)[0].relu()  # type: ignore[attr-defined]
    layer.last_state(input, share_prefixes="yes")  # type: ignore[arg-type]
    FusedRNNCell(3, 4)(packed)  # type: ignore[arg-type]
    rnn(input, None, layer.state_dict())  # type: ignore[arg-type]
    last_state(input, None)  # type: ignore[call-overload]
    explain(layer, None)  # type: ignore[arg-type]
    replace_rnn(model.state_dict())  # type: ignore[call-overload]
    restored: FusedRNN = restore_rnn(layer)  # type: ignore[assignment]
    FusedGRU(3, 4, nonlinearity="tanh")  # type: ignore[arg-type]
    TokenGRU(7, 3, 4, nonlinearity="tanh")  # type: ignore[call-arg]
    gru(input, None, [], nonlinearity="tanh")  # type: ignore[call-arg]
    FusedLSTM(3, 4)(input, input)  # type: ignore[arg-type]
    FusedLSTM(3, 4).last_state(input).relu()  # type: ignore[attr-defined]
    lstm(input, input, [])  # type: ignore[arg-type]
    last_state(input, None, [], cell="sru")  # type: ignore[call-overload]
    replace_rnn(model, cells=("sru",))  # type: ignore[arg-type]
    max_error(input)  # type: ignore[call-arg]
    namernn_fast.__version__ += 1  # type: ignore[operator]
    del restored


def main() -> None:
    """Runs every function above except `mistakes`."""
    input, ids = torch.randn(5, 2, 3), torch.randint(7, (5, 2))
    packed = pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    rnns = FusedRNN(3, 4, 1, "relu", batch_invariant=True), TokenRNN(7, 3, 4, padding_idx=0)
    use_modules(*rnns, FusedRNNCell(3, 4, nonlinearity="relu"), input, packed, ids)
    grus = FusedGRU(3, 4, 1, False, batch_invariant=True), TokenGRU(7, 3, 4, padding_idx=0)
    use_modules(*grus, FusedGRUCell(3, 4, bias=False), input, packed, ids)
    use_lstms(input, packed, ids)
    use_functions(input, packed, ids)
    use_either(packed)
    Tagger("cpu")(input, torch.tensor([5, 2]))


if __name__ == "__main__":
    main()
