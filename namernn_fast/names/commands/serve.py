"""`serve`: a web page and an API that predict the languages of names."""

from __future__ import annotations

import argparse
import ipaddress
import re
from typing import Any

from ..files import require
from ..text import InputError, escaped
from .arguments import add_model, load_predictor, number, say
from .arguments import add_parser as add_command

_PORT = number(int, "a port from 0 to 65535", lambda value: 0 <= value < 2**16)


def add_parser(commands: Any) -> None:
    """Adds the command `serve` to the command line."""
    parser = add_command(commands, "serve", run, "serve a web page and an API")
    add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 means every address"
    )
    parser.add_argument("--port", type=_PORT, default=8000, help="the port; 0 means any free port")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another host name that clients may use, such as names.example; * allows any",
    )


def run(arguments: argparse.Namespace) -> None:
    """Serves requests until a signal stops the process."""
    for package in ("starlette", "uvicorn"):
        require(package)
    # Imported here because both modules need the extra `serve`.
    from ..serving import running
    from ..serving.server import LOCAL_HOSTS, application

    hosts = [*LOCAL_HOSTS, *_host_names(arguments)]
    predictor = load_predictor(arguments)
    app = application(predictor, hosts)
    with running.listen(arguments.host, arguments.port) as listener:
        print(f"serving at {running.url(listener)} (Ctrl-C stops)", flush=True)
        if _is_every_address(arguments.host) and not arguments.allowed_host:
            say(
                f"clients must use one of the host names {', '.join(LOCAL_HOSTS)}; "
                "--allowed-host NAME adds the name of this machine"
            )
        running.run(app, listener)


def _host_names(arguments: argparse.Namespace) -> list[str]:
    """Returns the host names that the options allow."""
    names = list(arguments.allowed_host)
    for name in names:
        # Starlette raises an AssertionError for some invalid names.
        if not re.fullmatch(r"\*|(\*\.)?[\w.-]+|\[[0-9A-Fa-f:.]+\]", name):
            raise InputError(
                f"--allowed-host takes a host name without a port, [IPv6], *.NAME or *, "
                f"not '{escaped(name)}'"
            )
    if not _is_every_address(arguments.host):
        host = arguments.host
        names.append(f"[{host}]" if ":" in host else host)
    return names


def _is_every_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
