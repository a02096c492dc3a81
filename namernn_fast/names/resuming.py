"""The state of a training, kept in a file at the end of each epoch, from which it can go on."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from .tensor_files import read_tensors, write_tensors
from .text import InputError

_KIND = "namernn_fast.names training 1"

_log = logging.getLogger(__name__)


class StateFile:
    """The file of a training's state, which is replaced at the end of each epoch.

    Args:
        path: of the file.
        identity: plain values that a training must have in common with one that it goes on from.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path = Path(path)
        self.history: list[dict[str, Any]] = []
        self._identity = identity
        self._kept: dict[int, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def read(self) -> None:
        """Reads the state, from which the training then goes on.

        Raises:
            InputError: there is no state, or it belongs to another training.
            OSError: the disk failed.
        """
        if not self.path.exists():
            raise InputError(f"{self.path}: there is no unfinished training to resume")
        tensors, values = read_tensors(self.path, _KIND)
        try:
            for name, wanted in self._identity.items():
                if values["identity"][name] != wanted:
                    raise InputError(
                        f"{self.path}: the unfinished training has another {name}, "
                        f"{values['identity'][name]}, not {wanted}"
                    )
            self.history = list(values["history"])
            self._kept = {
                int(member): (_of_member(member, tensors), plain)
                for member, plain in values["members"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.path}: not a state of a training") from error

    def of_member(self, member: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Returns the tensors and plain values that `write` was given for a member, or None."""
        return self._kept.get(member)

    def write(
        self,
        member: int,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
        history: list[dict[str, Any]],
    ) -> None:
        """Replaces the state of a member; logs a warning and goes on where the disk fails."""
        self.history = history
        self._kept[member] = (tensors, values)
        named = {
            f"{number}.{name}": value
            for number, (kept, _) in self._kept.items()
            for name, value in kept.items()
        }
        content = {
            "identity": self._identity,
            "history": history,
            "members": {str(number): plain for number, (_, plain) in self._kept.items()},
        }
        try:
            write_tensors(self.path, _KIND, named, content)
        except OSError as error:
            _log.warning("the state of the training could not be kept (%s); going on", error)

    def remove(self) -> None:
        """Removes the file; the training is finished."""
        self.path.unlink(missing_ok=True)


def _of_member(member: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{member}."
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
