"""Saves the training state to a file after each epoch, so that training can resume."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from .tensor_files import MAX_BYTES, read_tensors, read_values, write_tensors
from .text import InputError

# A state contains the weights of finished networks. For the network in training, it contains four
# tensors per weight: the weight, its value in the best epoch, and the optimizer's two moments.
MAX_STATE_BYTES = 4 * MAX_BYTES

KIND = "namernn_fast.names training 1"

_log = logging.getLogger(__name__)


def check_is_state(path: Path) -> None:
    """Raises an InputError if the file at `path` is not a training state.

    A new training run would replace the file and finally remove it.
    """
    try:
        read_values(path, KIND, max_bytes=MAX_STATE_BYTES)
    except InputError as error:
        raise InputError(f"{error}; --force overwrites the file") from error


class StateFile:
    """The file that holds the state of a training run; it is replaced after each epoch.

    Args:
        path: the path of the file.
        identity: plain values that must be the same when training resumes as when it started.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path = Path(path)
        self.is_kept = False
        """Whether the file contains a state of this training run."""
        self._identity = json.loads(json.dumps(identity))  # as it is read back from a file
        self._kept: dict[int, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def read(self) -> None:
        """Reads the state to resume from.

        Raises:
            InputError: there is no state, or the state belongs to another training run.
            OSError: the file could not be read.
        """
        if not self.path.exists():
            raise InputError(f"{self.path}: there is no unfinished training to resume")
        tensors, values = read_tensors(self.path, KIND, max_bytes=MAX_STATE_BYTES)
        try:
            differing = list(_differences(values["identity"], self._identity))
            self._kept = {
                int(member): (below(f"{member}.", tensors), plain)
                for member, plain in values["members"].items()
            }
            if not self._kept:
                raise ValueError("no network")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self.path}: not a training state") from error
        if differing:
            raise InputError(
                f"{self.path}: the unfinished training was started with {'; '.join(differing)}; "
                "--resume needs the same data and options as the interrupted command"
            )
        self.is_kept = True

    def of_member(self, member: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Returns the saved tensors and plain values of a member, or None if it has no state."""
        return self._kept.get(member)

    def write(self, member: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Replaces the state of a member; logs a warning if the file cannot be written."""
        self._kept[member] = (tensors, values)
        named = {
            f"{number}.{name}": value
            for number, (kept, _) in self._kept.items()
            for name, value in kept.items()
        }
        content = {
            "identity": self._identity,
            "members": {str(number): plain for number, (_, plain) in self._kept.items()},
        }
        try:
            write_tensors(self.path, KIND, named, content, max_bytes=MAX_STATE_BYTES)
            self.is_kept = True
        except (OSError, InputError) as error:
            _log.warning(
                "the state of the training could not be written (%s); training continues", error
            )

    def remove(self) -> None:
        """Removes the file after training has finished."""
        self.path.unlink(missing_ok=True)


def _differences(kept: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Yields a description of each difference between two dicts of plain values."""
    if isinstance(kept, dict) and isinstance(wanted, dict):
        for key in sorted({*kept, *wanted}):
            yield from _differences(kept.get(key), wanted.get(key), f"{name} {key}".strip())
    elif kept != wanted:
        yield f"{name} {kept!r:.80}, not {wanted!r:.80}"


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Selects the tensors whose names start with `prefix`, and removes `prefix` from the names."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
