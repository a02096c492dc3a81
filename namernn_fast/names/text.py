"""Checks names that a caller passes, and escapes text for output."""

from __future__ import annotations

import json
from collections.abc import Iterable

MAX_LANGUAGES = 500
"""The maximum number of languages in the data or in a model."""

_MAX_LANGUAGE_LENGTH = 50


class InputError(ValueError):
    """A path, file, name or option that the caller gave cannot be used; the message says why."""


def is_language(name: object) -> bool:
    """Returns whether `name` is valid for a language: printable, not blank and not too long."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= _MAX_LANGUAGE_LENGTH
        and name.isprintable()
        and not name.isspace()
    )


def escaped(text: str) -> str:
    """Returns `text` with an escape such as `\\x1b` for each character that is not printable.

    Control characters, line separators, text-direction marks and lone surrogates could change what
    a terminal or a page shows, or break a line of output in two.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def quoted(text: str) -> str:
    """Returns `text` as a JSON string that keeps printable characters as they are.

    Strict parsers reject lone surrogates, so each one is replaced with the text of its escape.
    """
    if text.isprintable():
        text = text.replace("\\", r"\\").replace('"', r"\"")
        return f'"{text}"'
    return escaped_json(json.dumps(text, ensure_ascii=False))


def escaped_json(text: str) -> str:
    """Returns the JSON `text` with an escape for each character that is not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _json_escape(c) for c in text)


def _json_escape(character: str) -> str:
    if "\ud800" <= character <= "\udfff":
        return "\\" + ascii(character)[1:-1]
    # JSON allows an unescaped tab only between tokens, where a space has the same meaning.
    return " " if character == "\t" else json.dumps(character)[1:-1]


def check_names(names: Iterable[str]) -> list[str]:
    """Returns `names` as a list of strings, without checking that they are usable.

    Raises:
        TypeError: `names` is a string (each letter would count as a name), is not iterable, or
            contains something other than strings.
    """
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise TypeError(f"names must be a list of strings, not {type(names).__name__}")
    names = list(names)
    if not {*map(type, names)} <= {str}:  # fast even for many names
        for place, name in enumerate(names):
            if not isinstance(name, str):
                raise TypeError(f"names must hold strings, but names[{place}] is {name!r:.100}")
    return names
