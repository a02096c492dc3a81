"""Folding: converts names to strings over a small alphabet.

A folded name is in lower case. ASCII letters, a few signs, and the accented letters of the folding
are kept. Every other character is decomposed (NFD) and loses its marks, or is replaced with its
entry in `SPELLINGS`. A character that has no spelling in ASCII is dropped.
"""

from __future__ import annotations

import codecs
import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .text import InputError, escaped

_SIGNS = " .,;'"
_KEPT = frozenset(string.ascii_letters + _SIGNS)
_KEPT_BY_VERSION = {2: _KEPT, 3: _KEPT | {"-"}}  # version 3 later replaces hyphens with spaces
_ASCII_ALPHABET = string.ascii_lowercase + _SIGNS

MAX_NAME_LENGTH = 1000
"""The maximum length of a name, in characters; the longest name in the data has 20."""

MAX_LETTERS = 96
"""The maximum number of accented letters in a folding; each takes one of 128 non-ASCII bytes."""

_LOWER_CASE_SPELLINGS = {
    **dict.fromkeys("’‘ʼ´`", "'"),  # signs that are typed instead of an apostrophe
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
    **dict.fromkeys("\u00a0\u2007\u202f", " "),  # no-break spaces
    **dict.fromkeys("\u2010\u2011\u2013", "-"),  # hyphens, and the en dash typed as a hyphen
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
"""The ASCII spelling of characters that Unicode does not decompose into ASCII letters."""

_SPELL = str.maketrans(SPELLINGS)
_NOT_ASCII = re.compile("[^\x00-\x7f]+")
_OFTEN_SPELLED = 4  # longest run of characters whose spelling is cached


def _readable(names: Sequence[str]) -> Sequence[str]:
    """Returns `names` with each name that is too long replaced by an empty string."""
    if max(map(len, names)) <= MAX_NAME_LENGTH:
        return names
    return [name if len(name) <= MAX_NAME_LENGTH else "" for name in names]


def _is_accented(letter: str) -> bool:
    """Returns whether a folding can keep `letter`.

    The letter must be in lower case and composed (NFC), and have an ASCII spelling.
    """
    return (
        not letter.isascii()
        and letter.isalpha()
        and letter == letter.lower() == unicodedata.normalize("NFC", letter)
        and not _KEPT.isdisjoint(_spelled(letter, ""))
    )


def _has_outer_spaces(lines: bytes) -> bool:
    """Returns whether a line starts or ends with a space."""
    ends = lines[:1] + lines[-1:]
    return b" \n" in lines or b"\n " in lines or b" " in ends


def _spelled(text: str, letters: str) -> str:
    """Returns `text` spelled in ASCII and `letters`; drops characters without such a spelling."""
    if letters and not {*letters}.isdisjoint(text.lower()):
        return "".join(c.lower() if c.lower() in letters else _spelled(c, "") for c in text)
    decomposed = unicodedata.normalize("NFD", text).translate(_SPELL)
    # Combining marks are not ASCII, so encoding to ASCII drops them.
    return decomposed.encode("ascii", "ignore").decode("ascii")


_spelled_again = functools.lru_cache(4096)(_spelled)


@dataclass(frozen=True)
class Folding:
    """A way to fold names; a model needs the folding that it was trained with.

    Args:
        letters: the accented letters to keep, in lower case; each must have an ASCII spelling.
        version: 3, which replaces a hyphen with a space and repeated spaces with one space; or 2,
            which drops hyphens and keeps no accented letters.

    Raises:
        ValueError: `letters` or `version` is invalid.

    Example:
        >>> Folding("àś").fold("Ślusàrski-Müller"), ASCII.fold("Ślusàrski-Müller")
        ('ślusàrski muller', 'slusarskimuller')
    """

    letters: str = ""
    version: int = 3

    def __post_init__(self) -> None:
        letters = self.letters
        if type(self.version) is not int or self.version not in (2, 3):
            raise ValueError(f"the version of a folding must be 2 or 3, not {self.version!r:.50}")
        if not isinstance(letters, str) or len(letters) > MAX_LETTERS:
            raise ValueError(f"a folding keeps a string of at most {MAX_LETTERS} letters")
        if letters and self.version == 2:
            raise ValueError("a folding of version 2 keeps no accented letters")
        if len(set(letters)) != len(letters) or not all(map(_is_accented, letters)):
            raise ValueError(f"letters that a folding cannot keep: {letters!r:.200}")

    @property
    def alphabet(self) -> str:
        """The characters of folded names; the id of a character is its index here."""
        return _ASCII_ALPHABET + self.letters

    @property
    def plain(self) -> Folding:
        """A folding of this version that keeps no accented letters."""
        return Folding("", self.version)

    @functools.cached_property
    def plain_ids(self) -> list[int]:
        """For each character of the alphabet, the id of the character without its marks."""
        return [_ASCII_ALPHABET.index(ASCII.fold(c)[:1] or c) for c in self.alphabet]

    def fold(self, name: str) -> str:
        """Returns the folded `name`, a string over the alphabet that may be empty.

        Characters with neither a spelling nor a decomposition in ASCII (digits, other scripts) are
        dropped; `dropped` returns these characters. Leading and trailing spaces are dropped too,
        because eight Korean rows of the data have such spaces by mistake, and a model would learn
        to recognise Korean by the spaces.
        """
        return self._decoded(self.fold_lines([name]))

    def fold_usable(self, names: Sequence[str]) -> list[str]:
        """Returns the folded `names`, with an empty string for each unusable name."""
        return self._decoded(self.fold_lines(_readable(names))).split("\n") if names else []

    def fold_all(self, names: Sequence[str]) -> bytes:
        """Returns the result of `fold_lines`, or raises an error if a name is unusable.

        Raises:
            InputError: a name is unusable; the message describes the first unusable name.
        """
        lines = self.fold_lines(_readable(names))
        if b"\n\n" in b"\n%b\n" % lines:
            raise InputError(why_unusable(names[lines.split(b"\n").index(b"")]) or "")
        return lines

    def fold_lines(self, names: Sequence[str]) -> bytes:
        """Returns the folded `names` as the lines of one text, with one byte per character.

        For speed, Python code runs once per run of non-ASCII characters, not once per name.
        """
        tables = _tables(self)
        text = "\n".join(names)
        if text.count("\n") >= len(names):  # a name contains a newline, which folding drops
            text = "\n".join([name.replace("\n", "") for name in names])
        if text.isascii():
            lines = text.encode("ascii")
        else:
            # NFC composes a letter and the mark after it into one character.
            text = unicodedata.normalize("NFC", text) if self.letters else text
            lines = self._encoded(_NOT_ASCII.sub(self._spelled_run, text))
        lines = lines.translate(tables.lower, tables.dropped)
        if self.version > 2:
            while b"  " in lines:
                lines = lines.replace(b"  ", b" ")
        if _has_outer_spaces(lines):
            # Names rarely start or end with several spaces, so the slow path is rarely needed.
            lines = lines.replace(b" \n", b"\n").replace(b"\n ", b"\n")
            if _has_outer_spaces(lines):
                lines = b"\n".join(map(bytes.strip, lines.split(b"\n")))
        return lines

    def ids(self, lines: bytes) -> bytes:
        """Returns the ids, one byte each, of the characters in a result of `fold_lines`."""
        return lines.translate(_tables(self).ids, b"\n")

    def joined(self, texts: Iterable[str]) -> bytes:
        """Returns already folded names in the format of `fold_lines`.

        Raises:
            UnicodeEncodeError: a text contains a character that is not in the alphabet.
        """
        return self._encoded("\n".join(texts))

    def dropped(self, name: str) -> str:
        """Returns the characters of `name` that `fold` drops, in order.

        Combining marks on a kept letter are not returned, nor are leading and trailing spaces. A
        letter with its marks is returned as one character if Unicode has such a character (NFC).
        """
        kept_characters = _KEPT_BY_VERSION[self.version]
        if name.isascii():  # fast path
            return "".join(c for c in name.strip() if c not in kept_characters and c != "`")
        lost = []
        on_kept_letter = False
        for character in unicodedata.normalize("NFC", name.strip()):
            spelled = unicodedata.normalize("NFD", character).translate(_SPELL)
            kept = not kept_characters.isdisjoint(spelled)
            if not kept and not (on_kept_letter and unicodedata.combining(character)):
                lost.append(character)
            on_kept_letter = kept or (on_kept_letter and unicodedata.combining(character) > 0)
        return "".join(lost)

    def _spelled_run(self, run: re.Match[str]) -> str:
        """Calls `_spelled` for a run of non-ASCII characters; caches the results of short runs.

        Most names have at most one non-ASCII letter, and only a few such letters occur, so short
        runs repeat. Long runs would only fill the cache.
        """
        text = run[0]
        spelled = _spelled_again if len(text) <= _OFTEN_SPELLED else _spelled
        return spelled(text, self.letters)

    def _encoded(self, text: str) -> bytes:
        if text.isascii():
            return text.encode("ascii")
        return codecs.charmap_encode(text, "strict", _tables(self).codes)[0]

    def _decoded(self, lines: bytes) -> str:
        return codecs.charmap_decode(lines, "strict", _tables(self).characters)[0]


ASCII = Folding(version=2)
"""The folding of models without accented letters, which also decides splits and duplicates."""


class _Tables(NamedTuple):
    """Tables that fold, encode and decode the bytes of many names at once."""

    lower: bytes
    """Maps each kept byte to the byte that it becomes."""
    dropped: bytes
    """The bytes that are dropped before `lower` is applied."""
    ids: bytes
    characters: str
    """The character of each byte: ASCII, then the accented letters."""
    codes: Any
    """Maps characters to bytes."""


@functools.lru_cache(64)
def _tables(folding: Folding) -> _Tables:
    accented = bytes(range(128, 128 + len(folding.letters)))
    capitals, small = string.ascii_uppercase.encode(), string.ascii_lowercase.encode()
    hyphen = b"" if folding.version == 2 else b"-"
    kept = {*map(ord, _KEPT_BY_VERSION[folding.version]), *b"`\n"}
    characters = "".join(map(chr, range(128))) + folding.letters
    return _Tables(
        lower=bytes.maketrans(capitals + b"`" + hyphen, small + b"'" + b" " * len(hyphen)),
        dropped=bytes({*range(128)} - kept),
        ids=bytes.maketrans(
            _ASCII_ALPHABET.encode() + accented, bytes(range(len(folding.alphabet)))
        ),
        characters=characters,
        codes=codecs.charmap_build(characters.ljust(256, "\ufffe")),
    )


def letters_of(names: Iterable[str], least: int = 1) -> str:
    """Returns the accented letters that occur in at least `least` of the `names`, in Unicode order.

    If there are more than `MAX_LETTERS`, only the most frequent letters are returned.
    """
    counts = Counter(
        letter
        for name in names
        if not name.isascii()
        for letter in {*unicodedata.normalize("NFC", name).lower()}
        if _is_accented(letter)
    )
    often = sorted(counts, key=lambda letter: (-counts[letter], letter))[:MAX_LETTERS]
    return "".join(sorted(letter for letter in often if counts[letter] >= least))


def why_unusable(name: str) -> str | None:
    """Returns the reason why no language can be predicted for `name`, or None if it is usable.

    A name is usable if it is not too long and every folding keeps at least one of its characters.
    """
    if len(name) > MAX_NAME_LENGTH:
        return f"a name of {len(name):,} characters: at most {MAX_NAME_LENGTH:,} are read"
    if not name or name.isspace():
        return "the name is empty"
    if not ASCII.fold(name):
        return (
            f"'{escaped(name)}' has no character that the model reads: it reads Latin letters, "
            f"with or without accents, and the signs {' '.join(_SIGNS.strip())}"
        )
    return None
