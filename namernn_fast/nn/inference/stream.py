"""`Stream` runs a prepared module frame by frame, and keeps the states between frames."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, empty, empty_like, is_grad_enabled
from torch.autograd.graph import increment_version

from ...call import given, tokens
from ...call.checks import check_real
from ...call.options import batch_invariant_is_on, precision_bits
from ...cells import called_with, only
from ...machine.context import (
    functorch_is_active,
    is_compiling,
    is_exporting,
    is_jit_tracing,
    is_transformed,
    is_unobserved,
)
from ...machine.torch_private import _assert_async, is_wrapper
from ...ops import BATCH_INVARIANT, state_sizes
from ...prepared_ops import (
    as_mask,
    check_integers,
    check_mask,
    check_rows,
    checked_rows,
    list_of_rows,
    step,
)
from ..states import states_in
from .direct import try_step
from .saving import Temporary

Rows = Sequence[int] | Sequence[bool] | Tensor
"""Distinct indices of sequences, in any order; or a bool mask (batch), True for these sequences."""


class Stream:
    """A batch of sequences that a prepared module reads frame by frame. See `PreparedLayer.stream`.

    A stream owns the states of its sequences, which start as zeros, and updates them in place. The
    states share no memory with arguments and results. If a CPU kernel runs, the states of a 16-bit
    layer are float32. `refresh` of the prepared module changes the weights of its streams, but not
    their states. A call that raises an error leaves all states unchanged.

    Only one thread at a time may use a stream, but several threads may each use a different stream
    of the same prepared module. A stream computes no gradients.

    Args:
        prepared: the prepared module, which must have one direction.
        batch: the number of sequences.

    Example:
        >>> from namernn_fast import FusedLSTM
        >>> stream = FusedLSTM(8, 16).prepare().stream(batch=4)
        >>> stream(torch.randn(4, 8)).shape
        torch.Size([4, 16])
        >>> stream(torch.randn(2, 8), rows=[3, 1]).shape
        torch.Size([2, 16])
    """

    def __init__(self, prepared: Any, batch: int) -> None:
        if type(batch) is not int or batch < 0:
            raise ValueError(f"batch must be an integer of at least 0, got {batch!r}")
        rnn = prepared._layer._recurrent
        if getattr(rnn, "bidirectional", False):
            raise ValueError("a stream needs one direction: the second starts at the last frame")
        self._prepared, self._batch, self._panels = prepared, batch, prepared._panels
        self._options = 0
        self._is_step_module = not hasattr(rnn, "num_layers")
        self._takes_ids = rnn is not prepared._layer
        self._is_direct = self._panels is not None and self._takes_ids == self._panels.has_table
        weight = rnn._weights()[0]
        like = {"dtype": weight.dtype, "device": weight.device}
        widths = state_sizes(rnn._cell, rnn._weights())
        with torch.inference_mode(False):  # so that the states can be updated in any mode
            if self._panels is not None:
                like["device"] = self._panels.tensor.device
                self._options = self._panels.options | precision_bits(self._panels.cell)
            self._rows = torch.empty(batch, widths[0], **like)
            if self._panels is not None and weight.dtype != torch.float64:
                like["dtype"] = torch.float32
            size = getattr(rnn, "num_layers", 1), batch
            self._states = [torch.zeros(*size, width, **like) for width in widths]

    def __call__(
        self,
        frame: Tensor,
        rows: Rows | None = None,
        out: Tensor | None = None,
        **inputs: Tensor | None,
    ) -> Tensor:
        """Advances the sequences by one or more steps.

        Args:
            frame: (batch, input_size) for one step. For several steps (steps, batch, input_size),
                or (batch, steps, input_size) with batch_first. For a token layer, token ids in
                these shapes without the last dimension.
            rows: the indices of the sequences to advance, in the order of the batch of frame, or a
                bool mask (batch) that is True for these sequences; None for all. Other sequences
                keep their states.
            out: the tensor to write the output to.
            inputs: other inputs of the cell: `noise` of a leaky layer, shaped like frame, with
                num_layers * hidden_size features.

        Returns:
            The output of the last layer, shaped like frame, but with the features of h: `out` if it
            is given, else a new tensor.

        Raises:
            RuntimeError: the shape, dtype or device of frame or out does not match; rows repeat or
                are out of range; a token id is out of range (IndexError without a table); an
                argument requires a gradient; a torch.func transform is active; the call is
                exported; the prepared module was converted.
            TypeError: frame or out is not a tensor, frame does not hold token ids, or rows are
                neither integers nor bools.
            ValueError: the mask has another shape.
        """
        panels, options = self._panels, self._options
        if batch_invariant_is_on():
            options |= BATCH_INVARIANT
        beside = self._beside(frame, given(**inputs)) if inputs else []
        if (
            self._is_direct
            and panels is self._prepared._panels
            and is_unobserved()
            and (
                out is None or (type(out) is Tensor and not out.requires_grad and not out.is_neg())
            )
        ):
            if rows is not None:
                rows = list_of_rows(rows, self._batch)
            if out is not None:
                output = out
            elif rows is None:
                output = empty_like(self._rows)
            else:
                output = empty(len(rows), self._rows.shape[1], dtype=self._rows.dtype)
            if try_step(
                panels.cell,
                [panels.tensor],
                frame,
                options,
                self._states,
                in_place=True,
                output=output,
                rows=rows,
                inputs=beside,
            ):
                if out is not None and not out.is_inference():
                    increment_version(out)
                return output
        return self._run(frame, rows, out, options, beside)

    def _beside(self, frame: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
        """Checks the arguments for `Cell.inputs`; returns them in the dtype and device of frame."""
        rnn = self._prepared._layer
        cell = rnn._cell
        for name in inputs:
            whose = called_with(name) or (cell.name if name in cell.input_names else "")
            if not whose:
                known = only(cell.input_names)
                raise TypeError(f"a stream of {cell.name} takes no argument {name!r}{known}")
            if self._takes_ids or name not in cell.input_names:
                raise ValueError(f"{name} needs a {whose} layer that reads features")
        beside = []
        for described in cell.inputs if inputs else ():
            name, size = described.name, described.features(rnn.hidden_size)
            if name not in inputs:
                beside.append(described.zeros(frame, rnn.hidden_size))
                continue
            more = inputs[name]
            shape = (*frame.shape[:-1], len(self._states[0]) * size)
            is_tensor = isinstance(more, Tensor)
            if not is_tensor or more.shape not in (shape, (*shape[:-1], size)):
                got = tuple(more.shape) if is_tensor else type(more).__name__
                raise RuntimeError(f"{name} must have shape {shape}, got {got}")
            check_real(name, more)
            beside.append(more.to(frame))
        return beside

    def reset(self, rows: Rows | None = None) -> None:
        """Zeroes the states of the given sequences, or of all sequences.

        Args:
            rows: as in a call.

        Raises:
            RuntimeError, TypeError, ValueError: as in a call.
        """
        mask = None if rows is None else as_mask(rows)
        if mask is not None:
            check_mask(mask, self._batch)
            if mask.is_cpu and not is_compiling() and not mask.any():
                return  # saves several microseconds at most steps of an actor
            for state in self._states:
                state.masked_fill_(mask.to(state.device)[:, None], 0)
            return
        places = slice(None) if rows is None else self._places(rows)
        for state in self._states:
            state[:, places] = 0

    @property
    def states(self) -> Any:
        """A copy of all states, structured like the last states of the prepared module."""
        states = [*map(Tensor.clone, self._states)]
        if self._is_step_module:
            states = [state[0] for state in states]
        return states[0] if len(states) == 1 else tuple(states)

    @states.setter
    def states(self, states: Any) -> None:
        given = states_in(states)
        wanted = [state.shape[1 if self._is_step_module else 0 :] for state in self._states]
        shapes = [getattr(state, "shape", type(state).__name__) for state in given]
        if shapes != wanted:
            raise RuntimeError(f"states must have the shapes {wanted}, got {shapes}")
        new = [*map(torch.empty_like, self._states)]
        for state, source in zip(new, given, strict=True):
            state.copy_(source.detach().reshape(state.shape))
        self._update(new)

    def fork(self) -> "Stream":
        """Returns a new stream of the same prepared module, with a copy of the states."""
        other = Stream(self._prepared, self._batch)
        other._update(self._states)
        other._options = self._options
        return other

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._prepared!r}, batch={self._batch})"

    def _update(self, states: list[Tensor]) -> None:
        """Copies `states` into the states of this stream."""
        for held, state in zip(self._states, states, strict=True):
            held.copy_(state)

    def __reduce__(self) -> Any:
        return _stream, (self._prepared, self._batch, Temporary(self.states))

    def _run(
        self,
        frame: Tensor,
        rows: Rows | None,
        out: Tensor | None,
        options: int,
        beside: list[Tensor],
    ) -> Tensor:
        """Runs a call that the fast path does not support."""
        panels = self._panels
        self._check(frame, out, beside)
        places = None if rows is None else self._places(rows, frame)
        if panels is None:
            output, states = self._run_layer(frame, places, beside)
        else:
            embedding = self._prepared._embedding
            if embedding is not None:
                frame = frame.long() if panels.has_table else F.embedding(frame, embedding)
            # Writing to `out` may fail, so update copies of the states until `out` is written.
            states = self._states if out is None else [*map(Tensor.clone, self._states)]
            cell, tensor = panels.cell, panels.tensor
            output = step(cell.number, tensor, states, frame, places, beside, options, cell.program)
        if out is not None:
            output = out.copy_(output)
        if states is not self._states:
            self._update(states)
        return output

    def _check(self, frame: Tensor, out: Tensor | None, beside: list[Tensor]) -> None:
        """Checks the properties that the operator cannot check, before any state changes."""
        if not isinstance(frame, Tensor) or not isinstance(out, Tensor | None):
            got = type(frame).__name__, type(out).__name__
            raise TypeError(f"frame must be a Tensor, and out a Tensor or None, got {got}")
        read = [frame, *beside, *([] if self._panels is None else [self._panels.tensor])]
        for tensor in read if not is_compiling() else ():
            # Cloning some wrappers, such as the result of a collective, returns a plain tensor.
            if is_wrapper(tensor) and is_wrapper(tensor.clone()):
                # A wrapper may run an operator twice, which would advance the states twice.
                raise TypeError(
                    "a stream keeps plain states, so its frames and weights must be plain tensors, "
                    f"got a {type(tensor).__name__}"
                )
        if is_exporting() or is_jit_tracing():
            _refuse("cannot be exported: export the layer, which takes and returns its states")
        if functorch_is_active():
            _refuse("keeps its states, which torch.func transforms do not support: call the layer")
        if is_transformed() or (
            is_grad_enabled()
            and any(
                tensor.requires_grad
                for tensor in (frame, *beside, *([out] if out is not None else []))
            )
        ):
            _refuse("computes no gradients: call the layer")
        device, dtype = self._rows.device, self._rows.dtype
        weight = self._prepared._layer._weights()[-1]
        if self._panels is not self._prepared._panels or weight.dtype != dtype:
            _refuse("ends when its prepared module is converted: make a new stream")
        if self._takes_ids:
            tokens.check_types(frame, weight)
        if frame.device != device:
            raise RuntimeError(f"frame must be on {device}, got {frame.device}")
        shape = *(frame.shape if self._takes_ids else frame.shape[:-1]), self._rows.shape[1]
        if out is not None and (out.shape, out.dtype, out.device) != (shape, dtype, device):
            raise RuntimeError(
                f"out must have shape {shape} and dtype {dtype}, on {device}, got "
                f"{tuple(out.shape)} and {out.dtype}, on {out.device}"
            )

    def _places(self, rows: Rows, frame: Tensor | None = None) -> Tensor:
        """Returns `rows` as a tensor. Checks them here or, if compiled, in the compiled program.

        Args:
            rows: indices; or a mask, of which the frame has the True sequences.
            frame: the frame.
        """
        device = self._rows.device
        if is_compiling():
            mask = as_mask(rows)
            if mask is not None and frame is not None:
                check_mask(mask, self._batch)
                one_step = frame.dim() == (1 if self._takes_ids else 2)
                batch_first = not self._is_step_module and self._prepared.batch_first
                # A compiler knows the shape of the frame, but not the values of the mask.
                count = frame.shape[0 if one_step or batch_first else 1]
                error = f"rows must be a mask with {count} True, one for each sequence of frame"
                _assert_async(mask.sum() == count, error)
                rows = torch.nonzero_static(mask.to(device), size=count).flatten()
            if isinstance(rows, list | tuple):
                check_integers(rows)
            return checked_rows(torch.as_tensor(rows, device=device), self._batch)  # type: ignore[no-any-return]
        rows = list_of_rows(rows, self._batch)
        check_rows(rows, self._batch)
        return torch.as_tensor(rows, dtype=torch.int64, device=device)

    def _as_sequence(self, frame: Tensor) -> Tensor:
        """Converts a frame to the input of the prepared module."""
        if self._is_step_module or frame.dim() == (2 if self._takes_ids else 3):
            return frame
        return frame.unsqueeze(1 if self._prepared.batch_first else 0)

    def _run_layer(
        self, frame: Tensor, places: Tensor | None, beside: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Computes the output and the new states with the layer, because no kernel can run."""
        layer, held = self._prepared._layer, self._states
        hx: Any
        states = [state if places is None else state.index_select(1, places) for state in held]
        is_step = frame.dim() == (1 if self._takes_ids else 2)
        inputs = dict(zip(layer._cell.input_names, beside, strict=False))
        if self._is_step_module:
            rows, outputs = [state[0] for state in states], []
            frames = [frame] if is_step else frame.unbind()
            for k, row in enumerate(frames):
                hx = rows[0] if len(rows) == 1 else tuple(rows)
                of_row = {name: more if is_step else more[k] for name, more in inputs.items()}
                rows = [*states_in(layer(row, hx, **of_row))]
                outputs.append(rows[0])
            output = outputs[0] if is_step else torch.stack(outputs)
            states = [state.unsqueeze(0) for state in rows]
        else:
            hx = states[0] if len(states) == 1 else tuple(states)
            inputs = {name: self._as_sequence(more) for name, more in inputs.items()}
            output, hx = layer(self._as_sequence(frame), hx, **inputs)
            shape = frame.shape if self._takes_ids else frame.shape[:-1]
            output, states = output.reshape(*shape, self._rows.shape[1]), [*states_in(hx)]
        if places is not None:
            pairs = zip(held, states, strict=True)
            states = [old.index_copy(1, places, new) for old, new in pairs]
        return output, states


def _stream(prepared: Any, batch: int, states: Temporary) -> Stream:
    stream = Stream(prepared, batch)
    stream.states = states.value
    return stream


def _refuse(why: str) -> NoReturn:
    raise RuntimeError(f"a stream {why}")
