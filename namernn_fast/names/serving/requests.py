"""Reads request bodies of limited size within a time limit, and checks every JSON field.

The functions that return a field raise a `FieldError` if the field is missing or invalid.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping
from typing import Any, NoReturn, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from ..text import escaped

MAX_BODY_BYTES = 256 * 1024
MAX_NAMES = 1000
MAX_TOP = 1000
BODY_SECONDS = 10.0
"""How long the body of a request may take to arrive."""

_JSON = "application/json"
Value = TypeVar("Value")


class FieldError(HTTPException):
    """A field of a request is invalid.

    Args:
        field: the field, as a path such as "names[2]", or "body" for the whole body.
        got: a description of what the field contains.
        takes: a description of what the field must contain.
        status_code: the status code of the response.
    """

    def __init__(self, field: str, got: str, takes: str, status_code: int = 422) -> None:
        super().__init__(status_code, f"{field}: got {got}, takes {takes}")
        self.content = {"error": self.detail, "field": field, "got": got, "takes": takes}


async def read_object(request: Request, fields: Collection[str]) -> Mapping[str, Any]:
    """Returns the JSON object in the body of a request.

    Args:
        request: a request whose body has not been read.
        fields: the names of the fields that the object may contain.

    Raises:
        HTTPException: the headers or the body are invalid (status 400, 408, 413, 415 or 422).
    """
    _check_headers(request)
    content = await _read(request)
    try:
        text = content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise FieldError(
            "body", f"bytes that are not UTF-8 ({error.reason})", "JSON", 400
        ) from None
    # JSON that is nested too deeply raises a RecursionError, and a number with too many digits
    # raises a ValueError.
    except (ValueError, RecursionError) as error:
        reason = escaped(str(error))[:200]
        raise FieldError("body", f"text that is not JSON ({reason})", "JSON", 400) from None
    if not isinstance(value, dict):
        raise FieldError("body", described(value), "a JSON object")
    for field in value:
        if field not in fields:
            raise FieldError(shortened(field), "an unknown field", " or ".join(fields))
    return value


def names_of(values: Mapping[str, Any]) -> list[str]:
    """Returns the field "names": a list of at most `MAX_NAMES` strings."""
    takes = f"a list of at most {MAX_NAMES} strings"
    names = required(values, "names", list, takes)
    if len(names) > MAX_NAMES:
        raise FieldError("names", described(names), takes)
    for place, name in enumerate(names):
        if not isinstance(name, str):
            raise FieldError(f"names[{place}]", described(name), "a string")
    return names


def top_of(values: Mapping[str, Any]) -> int:
    """Returns the field "top": a whole number from 1 to `MAX_TOP`, or 3 if the field is missing."""
    top = values.get("top", 3)
    # True is an int in Python, but not a number in JSON.
    if type(top) is not int or not 1 <= top <= MAX_TOP:
        raise FieldError("top", described(top), f"a whole number from 1 to {MAX_TOP}")
    return top


def described(value: Any) -> str:
    """Returns a short description of a JSON value, with printable characters only."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return f"the string '{shortened(value)}'"
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    if isinstance(value, dict):
        return "an object"
    return f"the number {shortened(str(value))}"


def shortened(text: str) -> str:
    """Returns `text` truncated and escaped, for an error message."""
    return escaped(text if len(text) <= 40 else f"{text[:39]}…")


def required(values: Mapping[str, Any], field: str, kind: type[Value], takes: str) -> Value:
    """Returns a field of the type `kind`; `takes` describes the valid values in errors."""
    value = values.get(field)
    if not isinstance(value, kind):
        raise FieldError(field, described(value) if field in values else "nothing", takes)
    return value


def _check_headers(request: Request) -> None:
    content_type = request.headers.get("content-type", "")
    kind, _, parameters = content_type.partition(";")
    charset = parameters.replace(" ", "").replace('"', "").lower()
    if kind.strip().lower() != _JSON or charset not in ("", "charset=utf-8"):
        got = f"'{shortened(content_type)}'" if content_type else "nothing"
        raise FieldError("Content-Type", got, _JSON, 415)
    if encoding := request.headers.get("content-encoding"):
        raise FieldError("Content-Encoding", f"'{shortened(encoding)}'", "nothing", 415)


async def _read(request: Request) -> bytes:
    """Returns the body of a request; raises an error if the body is too large or too slow."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > MAX_BODY_BYTES:
        raise _too_large(f"{shortened(declared)} bytes")
    try:
        return await asyncio.wait_for(_read_stream(request), BODY_SECONDS)
    except (asyncio.TimeoutError, TimeoutError):
        late = f"no end of it in {BODY_SECONDS:g} seconds"
        raise FieldError("body", late, "a body that arrives in time", 408) from None
    except ClientDisconnect:
        # The client has disconnected, so nobody reads this response.
        raise FieldError("body", "an incomplete body", "a complete body", 400) from None


async def _read_stream(request: Request) -> bytes:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise _too_large("more")
    return bytes(content)


def _too_large(got: str) -> FieldError:
    return FieldError("body", got, f"at most {MAX_BODY_BYTES:,} bytes", 413)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the fields of a JSON object as a dict; raises an error if a field occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field '{shortened(twice)}' is given twice")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
