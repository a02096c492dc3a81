"""The Starlette application: routes, error responses and headers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..folding import MAX_NAME_LENGTH
from ..prediction import Predictor
from ..text import InputError
from . import requests
from .batching import Batcher
from .responder import MAX_STATES_LENGTH, JsonObject, Responder

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""The host names by which a browser on this machine reaches the server."""

HEADERS = {
    # The page may load only its own files. Chromium also forbids it to parse strings as HTML.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Names are personal data, so browsers and proxies must not store responses.
    "Cache-Control": "no-store",
}

_PAGE = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/drawing.js": ("drawing.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_PATHS = ("/", "/predict", "/states", "/health")


def application(predictor: Predictor, allowed_hosts: Sequence[str] = LOCAL_HOSTS) -> ASGIApp:
    """Returns the web application.

    Args:
        predictor: the model.
        allowed_hosts: the host names that clients may use. This check prevents DNS rebinding, in
            which an attacker makes the host name of a malicious page resolve to this machine.

    Raises:
        InputError: a probability is not finite.
    """
    endpoints = _Endpoints(Responder(predictor))
    routes = [
        Route("/predict", endpoints.predict, methods=["POST"]),
        Route("/states", endpoints.states, methods=["POST"]),
        Route("/health", endpoints.health, methods=["GET"]),
        *(_page_route(path, *file) for path, file in _PAGE.items()),
    ]
    guard = Middleware(_HostCheck, allowed_hosts=allowed_hosts)
    # Typed as Any, because Starlette's annotations require handlers that accept every Exception.
    handlers: Any = {HTTPException: _refused, Exception: _failed}
    inner = Starlette(
        routes=routes, middleware=[guard], exception_handlers=handlers, lifespan=endpoints.lifespan
    )
    inner.router.redirect_slashes = False
    # Wrap Starlette, because its response to an unexpected error bypasses middleware.
    return _WithHeaders(inner)


class _Endpoints:
    """The endpoints of the API."""

    def __init__(self, responder: Responder) -> None:
        self._responder = responder
        self._batcher = Batcher(responder.predict)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Ends the worker thread when the server stops, after the last response."""
        yield
        self._batcher.close()

    async def predict(self, request: Request) -> Response:
        """Responds to `POST /predict` with the languages of names."""
        values = await requests.read_object(request, ("names", "top"))
        names, top = requests.names_of(values), requests.top_of(values)
        return _json({"results": await self._batcher.predict(names, top)})

    async def states(self, request: Request) -> Response:
        """Responds to `POST /states` with the states and probabilities for one name."""
        values = await requests.read_object(request, ("name",))
        name = requests.required(values, "name", str, "a string")
        try:
            return _json(await self._batcher.call(self._responder.states, name))
        except InputError as error:
            return _json({"error": str(error), "field": "name"}, 422)

    async def health(self, request: Request) -> Response:
        """Responds to `GET /health` with a description of the model, and the limits."""
        limits = {
            "body_bytes": requests.MAX_BODY_BYTES,
            "names": requests.MAX_NAMES,
            "name_length": MAX_NAME_LENGTH,
            "states_length": MAX_STATES_LENGTH,
        }
        return _json({"status": "ok", **self._responder.description(), "limits": limits})


class _HostCheck:
    """Rejects requests for hosts that are not allowed.

    Responds in JSON, whereas Starlette's own response is plain text.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str]) -> None:
        self._app = app
        self._allowed = allowed_hosts
        self._check = TrustedHostMiddleware(_accept, list(allowed_hosts), www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: list[Message] = []

        async def record(message: Message) -> None:
            refusal.append(message)

        await self._check(scope, receive, record)
        if not refusal:
            await self._app(scope, receive, send)
            return
        host = requests.shortened(Headers(scope=scope).get("host", ""))
        error = requests.FieldError(
            "Host", f"'{host}'", " or ".join(dict.fromkeys(self._allowed)), 400
        )
        await _json(error.content, error.status_code)(scope, receive, send)


async def _accept(scope: Scope, receive: Receive, send: Send) -> None:
    """Does nothing, as the inner application of a middleware that only rejects requests."""


class _WithHeaders:
    """Adds HEADERS to every response, including error responses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _page_route(path: str, file: str, media_type: str) -> Route:
    content = resources.files(__package__).joinpath("page").joinpath(file).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return Route(path, page, methods=["GET"])


def _json(values: JsonObject, status_code: int = 200) -> Response:
    # Only ASCII, so that text-direction marks and lone surrogates are sent as escapes.
    content = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Response(content, status_code, media_type="application/json")


async def _refused(request: Request, error: HTTPException) -> Response:
    """Responds to an invalid request."""
    headers = error.headers or {}
    if error.status_code == 404:
        path = requests.shortened(request.scope["path"])
        error = requests.FieldError("path", f"'{path}'", " or ".join(_PATHS), 404)
    elif error.status_code == 405:
        method = requests.shortened(request.method)
        error = requests.FieldError("method", f"'{method}'", str(headers.get("Allow")), 405)
    content = error.content if isinstance(error, requests.FieldError) else {"error": error.detail}
    response = _json(content, error.status_code)
    response.headers.update(headers)
    return response


async def _failed(request: Request, error: Exception) -> Response:
    """Responds to a request that made the server fail; uvicorn logs the error."""
    return _json({"error": "the server failed; its log says why"}, 500)
