"""Runs the application under uvicorn, with limits on connections and a clean shutdown."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..text import InputError, escaped

MAX_CONNECTIONS = 512
"""The maximum number of connections at a time; further connections get status 503."""
KEEP_ALIVE_SECONDS = 5
SHUTDOWN_SECONDS = 10
"""How long requests in flight may take once the server has been told to stop."""
HEADER_SECONDS = 10.0
"""How long the head of a request may take to arrive."""
_STOPPING = (signal.SIGINT, signal.SIGTERM)


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket.

    Args:
        host: a name or an address of this machine.
        port: a port, or 0 for any free port.

    Raises:
        InputError: there is no such host.
        OSError: the port is taken or not allowed.
    """
    try:
        # getaddrinfo raises a UnicodeError if a label of the name is empty or too long.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError, ValueError) as error:
        raise InputError(f"--host {escaped(host)!r}: no address of this machine") from error
    family, _, _, _, address = found[0]
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise OSError(f"{escaped(host)} port {port}: {error.strerror or error}") from error


def url(listener: socket.socket) -> str:
    """Returns the URL at which a browser on this machine reaches the server."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def server(app: ASGIApp) -> uvicorn.Server:
    """Returns a uvicorn server with timeouts and a limited number of connections."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)


def run(app: ASGIApp, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM; requests in flight are completed first."""
    uvicorn_server = server(app)
    with _stopped_by_signals(uvicorn_server):
        uvicorn_server.run(sockets=[listener])


@contextmanager
def _stopped_by_signals(uvicorn_server: uvicorn.Server) -> Iterator[None]:
    """Lets the process end normally when a signal stops the server.

    Uvicorn handles signals while it runs, and raises the signal again after it has stopped. The
    handlers set here ignore the second signal, and stop a server that is still starting.
    """

    def stop(number: int, frame: Any) -> None:
        uvicorn_server.should_exit = True

    previous = {number: signal.signal(number, stop) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Protocol(H11Protocol):
    """Closes a connection if the head of a request does not arrive in time.

    Uvicorn itself would wait forever, so clients that send nothing could use up all connections.
    """

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()
        else:
            self._stop_expecting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._overdue is None:
            self._overdue = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_expecting(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
