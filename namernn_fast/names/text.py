"""Names as text: folding to ASCII, what folding drops, escapes for output.

A name is folded as the names data set is customarily read: decomposed (NFD), its combining marks
dropped, only ASCII letters and a few signs kept, in lower case. `SPELLINGS` adds the usual spelling
of letters that Unicode does not decompose. A folded name is a string over `ALPHABET`.
"""

from __future__ import annotations

import functools
import json
import re
import string
import unicodedata
from collections.abc import Iterable, Sequence

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
_KEEP_DROPPED = dict.fromkeys([*map(ord, _KEPT), ord("`")])

_NOT_ASCII = re.compile("[^\x00-\x7f]+")
_OFTEN_SPELLED = 4  # longest run of characters whose spelling is cached

# For folding many ASCII names at once, as the lines of one text: newlines stay.
_LOWER = bytes.maketrans(
    string.ascii_uppercase.encode("ascii") + b"`", string.ascii_lowercase.encode("ascii") + b"'"
)
_DROPPED_BYTES = bytes({*range(128)}.difference(map(ord, _KEPT), b"`\n"))


class InputError(ValueError):
    """A path, file, name or option that the caller gave cannot be used; the message says why."""


def fold(name: str) -> str:
    """Returns `name` as a string over `ALPHABET`, which may be empty.

    `"Ślusàrski"` becomes `"slusarski"` and `"Strauß"` becomes `"strauss"`. Characters with neither
    a spelling nor a decomposition in ASCII (digits, hyphens, other scripts) are dropped; `dropped`
    returns them. So are blanks at either end: eight Korean rows of the data have them by mistake,
    and a model would recognise the language by them.

    Example:
        >>> fold("Ślusàrski"), fold("O’Neal")
        ('slusarski', "o'neal")
    """
    if not name.isascii():
        name = _NOT_ASCII.sub(_spelled_run, name)
    return name.translate(_DROP_FROM_ASCII).strip()


def fold_lines(names: Sequence[str]) -> bytes:
    """Returns the folded `names` as the lines of one text, in ASCII.

    The result is `"\\n".join(map(fold, names))`. Python code runs once per run of characters that
    are not ASCII, not once per name.
    """
    text = "\n".join(names)
    if text.count("\n") >= len(names):  # a name holds a newline, which folding drops
        text = "\n".join([name.replace("\n", "") for name in names])
    if not text.isascii():
        # Characters are decomposed and spelled independently of the ASCII around them.
        text = _NOT_ASCII.sub(_spelled_run, text)
    lines = text.encode("ascii").translate(_LOWER, _DROPPED_BYTES)
    if _has_blanks(lines):
        # Most such names have one blank, so few need the slow path.
        lines = lines.replace(b" \n", b"\n").replace(b"\n ", b"\n")
        if _has_blanks(lines):
            lines = b"\n".join(map(bytes.strip, lines.split(b"\n")))
    return lines


def fold_usable(names: Sequence[str]) -> list[str]:
    """Returns the folded `names`, an empty one for each that is unusable (see `why_unusable`)."""
    return fold_lines(readable(names)).decode("ascii").split("\n") if names else []


def readable(names: Sequence[str]) -> Sequence[str]:
    """Returns `names` with an empty one for each that is too long."""
    if max(map(len, names)) <= MAX_NAME_LENGTH:
        return names
    return [name if len(name) <= MAX_NAME_LENGTH else "" for name in names]


def _has_blanks(lines: bytes) -> bool:
    """Returns whether a line begins or ends with a blank."""
    ends = lines[:1] + lines[-1:]
    return b" \n" in lines or b"\n " in lines or b" " in ends


def _spelled(text: str) -> str:
    """Returns `text` spelled and decomposed into ASCII, without what has neither."""
    decomposed = unicodedata.normalize("NFD", text).translate(_SPELL)
    # Combining marks are not ASCII, so keeping ASCII drops them.
    return decomposed.encode("ascii", "ignore").decode("ascii")


_spelled_again = functools.lru_cache(4096)(_spelled)


def _spelled_run(run: re.Match[str]) -> str:
    """Returns a run of characters that are not ASCII as `_spelled` does.

    Most names have one such letter, and there are few of them. Long runs would fill the cache.
    """
    text = run[0]
    return _spelled_again(text) if len(text) <= _OFTEN_SPELLED else _spelled(text)


def dropped(name: str) -> str:
    """Returns the characters of `name` that `fold` drops, in order.

    A combining mark on a letter that is kept does not count, nor does a blank at either end. A
    letter with its marks is returned as one character if Unicode has one (NFC).
    """
    if name.isascii():  # a shortcut to the result of the general way
        return name.strip().translate(_KEEP_DROPPED)
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
    """Returns why no language can be predicted for `name`, or None if one can."""
    if len(name) > MAX_NAME_LENGTH:
        return f"a name of {len(name):,} characters: at most {MAX_NAME_LENGTH:,} are read"
    if not fold(name):
        return (
            f"'{escaped(name)}' has no character that the model reads: it reads the letters A to "
            f"Z, with or without accents, and {' '.join(_SIGNS.strip())}"
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


def quoted(text: str) -> str:
    """Returns a JSON string of `text`, in which printable characters stand as they are.

    A lone surrogate, which strict readers refuse, becomes the text of its escape.
    """
    if text.isprintable():
        text = text.replace("\\", r"\\").replace('"', r"\"")
        return f'"{text}"'
    return escaped_json(json.dumps(text, ensure_ascii=False))


def escaped_json(text: str) -> str:
    """Returns JSON with an escape for each character in it that is not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _json_escape(c) for c in text)


def _json_escape(character: str) -> str:
    if "\ud800" <= character <= "\udfff":
        return "\\" + ascii(character)[1:-1]
    # JSON allows an unescaped tab only between tokens, where a blank does as well.
    return " " if character == "\t" else json.dumps(character)[1:-1]


def check_names(names: Iterable[str]) -> list[str]:
    """Returns `names` as a list of strings, without checking that they are usable.

    Raises:
        TypeError: `names` is a string, whose letters would be taken for names, is not iterable, or
            holds anything but strings.
    """
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise TypeError(f"names must be a list of strings, not {type(names).__name__}")
    names = list(names)
    if not {*map(type, names)} <= {str}:  # fast even for many names
        for place, name in enumerate(names):
            if not isinstance(name, str):
                raise TypeError(f"names must hold strings, but names[{place}] is {name!r:.100}")
    return names
