"""Names as text and as tensors: folding to ASCII, character ids, and packed batches.

A name is folded as the names data set is customarily read: decomposed (NFD), its combining marks
dropped, only ASCII letters and a few signs kept, in lower case. `SPELLINGS` adds the usual spelling
of letters that Unicode does not decompose. A folded name is a string over `ALPHABET`, and the id of
a character is its index there.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_SIGNS = " .,;'"
_KEPT = frozenset(string.ascii_letters + _SIGNS)

ALPHABET = string.ascii_lowercase + _SIGNS
"""The characters of folded names; the id of a character is its index here."""

FOLDING_VERSION = 2
"""Changes whenever `fold` does: a model understands the folding that it was trained with."""

MAX_NAME_LENGTH = 1000
"""The longest name that is read, in characters; the longest in the data has 20."""

MAX_LANGUAGES = 500
"""The most languages that data or a model may have."""

_MAX_LANGUAGE_LENGTH = 50

_LOWER_CASE_SPELLINGS = {
    **dict.fromkeys("’‘ʼ´`", "'"),  # signs that are typed for an apostrophe
    "ß": "ss",
    "ł": "l",
    "ø": "o",
    "æ": "ae",
    "œ": "oe",
    "đ": "d",
    "ð": "d",
    "þ": "th",
    "ħ": "h",
    "ı": "i",
    "ŧ": "t",
    **dict.fromkeys("\u00a0\u2007\u202f", " "),  # blanks at which a line may not break
}

SPELLINGS = {
    **_LOWER_CASE_SPELLINGS,
    **{
        letter.upper(): spelling.capitalize()
        for letter, spelling in _LOWER_CASE_SPELLINGS.items()
        if letter.upper() not in (letter, spelling.upper())
    },
    "ẞ": "Ss",
}
"""What is written in ASCII for characters that Unicode does not decompose into ASCII letters."""

_SPELL = str.maketrans(SPELLINGS)
_DROP_FROM_ASCII = str.maketrans(
    {code: None for code in range(128) if chr(code) not in _KEPT}
    | {ord("`"): "'"}
    | {ord(capital): capital.lower() for capital in string.ascii_uppercase}
)
_IDS = bytes.maketrans(ALPHABET.encode("ascii"), bytes(range(len(ALPHABET))))


class InputError(ValueError):
    """A path, file, name or option that the caller gave cannot be used; the message says why."""


def fold(name: str) -> str:
    """Returns `name` as a string over `ALPHABET`, which may be empty.

    `"Ślusàrski"` becomes `"slusarski"` and `"Strauß"` becomes `"strauss"`. Characters with neither
    a spelling nor a decomposition in ASCII (digits, hyphens, other scripts) are dropped: `dropped`
    tells which. So are blanks at either end: in the data eight Korean rows have them by a typing
    slip, and a model would tell the language by them.
    """
    if name.isascii():  # a shortcut to the result of the general way
        return name.translate(_DROP_FROM_ASCII).strip()
    spelled = unicodedata.normalize("NFD", name).translate(_SPELL)
    # Combining marks are not ASCII, so keeping ASCII drops them.
    return "".join(character for character in spelled if character in _KEPT).lower().strip()


def dropped(name: str) -> str:
    """Returns the characters of `name` that leave no trace in `fold(name)`, in their order.

    A combining mark is no such character where it stands on a letter that is kept, nor is a blank
    at either end of the name. A letter with its marks is returned as one character where Unicode
    has one (NFC).
    """
    lost = []
    on_kept_letter = False
    for character in unicodedata.normalize("NFC", name.strip()):
        spelled = unicodedata.normalize("NFD", character).translate(_SPELL)
        kept = not _KEPT.isdisjoint(spelled)
        if not kept and not (on_kept_letter and unicodedata.combining(character)):
            lost.append(character)
        on_kept_letter = kept or (on_kept_letter and unicodedata.combining(character) > 0)
    return "".join(lost)


def why_unusable(name: str) -> str | None:
    """Returns why no language can be told for `name`, or None if one can."""
    if len(name) > MAX_NAME_LENGTH:
        return f"a name of {len(name):,} characters: at most {MAX_NAME_LENGTH:,} are read"
    if not fold(name):
        return (
            f"'{escaped(name)}' holds no usable character: letters from A to Z, plain or accented, "
            f"and {_SIGNS.strip()} are"
        )
    return None


def is_language(name: object) -> bool:
    """Returns whether `name` can be the name of a language: printable, neither empty nor long."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= _MAX_LANGUAGE_LENGTH
        and name.isprintable()
        and not name.isspace()
    )


def escaped(text: str) -> str:
    """Returns `text` with an escape such as `\\x1b` for each character that is not printable.

    Control characters, line separators, the controls of text direction and lone surrogates could
    change what a terminal or a page shows, or break a line of output in two.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True)
class EncodedNames:
    """Names as one run of character ids, ready to be cut into packed batches."""

    characters: Tensor
    """int64 (sum of the names' lengths), the ids of the names one after another"""
    starts: Tensor
    """int64 (number of names), where each name begins in `characters`"""
    lengths: Tensor
    """int64 (number of names), each at least 1"""

    def __len__(self) -> int:
        return len(self.lengths)

    def by_length(self, indices: Tensor) -> Tensor:
        """Returns `indices`, int64 (batch), sorted from the longest name to the shortest."""
        return indices[self.lengths[indices].argsort(descending=True, stable=True)]

    def pack(self, indices: Tensor, device: str | torch.device = "cpu") -> PackedSequence:
        """Returns names as a packed batch of character ids.

        The result equals `torch.nn.utils.rnn.pack_sequence(names, enforce_sorted=False)`, except
        that `sorted_indices` is None where the names are already sorted from the longest to the
        shortest (see `by_length`), so that no state need be reordered.

        Args:
            indices: int64 (batch), of the names.
            device: of the result.

        Raises:
            ValueError: `indices` is empty.
            IndexError: an index is out of range.
        """
        if len(indices) == 0:
            raise ValueError("a batch holds at least one name")
        lengths, order = self.lengths[indices].sort(descending=True, stable=True)
        starts = self.starts[indices][order]
        steps = torch.arange(int(lengths[0])).unsqueeze(1)
        present = steps < lengths  # (longest name, batch)
        data = self.characters[(steps + starts)[present]]
        batch_sizes = present.sum(1)
        in_order = torch.equal(order, torch.arange(len(order)))
        packed = PackedSequence(data, batch_sizes, None if in_order else order)
        return packed.to(device)  # type: ignore[arg-type]  # typed as if for a dtype alone


def check_names(names: Iterable[str]) -> list[str]:
    """Returns `names` as a list of strings; whether they are usable is not looked at.

    Raises:
        TypeError: `names` is a string, which would be taken for its letters, or is not iterable,
            or holds something else than strings.
    """
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise TypeError(f"names must be a list of strings, not {type(names).__name__}")
    names = list(names)
    for place, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"names must hold strings, but names[{place}] is {name!r:.100}")
    return names


def encode_names(names: Iterable[str]) -> EncodedNames:
    """Folds `names` and returns their character ids.

    Raises:
        TypeError: as of `check_names`.
        InputError: there is no name, or a name is unusable (see `why_unusable`).
    """
    names = check_names(names)
    if not names:
        raise InputError("no names were given")
    for name in names:
        if reason := why_unusable(name):
            raise InputError(reason)
    return encode_folded([fold(name) for name in names])


def encode_folded(texts: Sequence[str]) -> EncodedNames:
    """Returns the character ids of names that `fold` has returned, none of them empty."""
    ids = bytearray("".join(texts).encode("ascii").translate(_IDS))
    lengths = torch.tensor([len(text) for text in texts])
    return EncodedNames(
        characters=torch.frombuffer(ids, dtype=torch.uint8).long(),
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
    )


def encode(name: str) -> Tensor:
    """Returns the character ids of one name: int64 (length of the folded name).

    Raises:
        InputError: the name is unusable.
    """
    return encode_names([name]).characters
