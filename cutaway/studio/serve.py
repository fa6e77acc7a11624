"""Serve a studio: bind, print the address that lets one browser in, and run until interrupted."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from ipaddress import ip_address

import uvicorn

from cutaway.core.refuse import Keyword, Refused
from cutaway.studio.folder import Folder
from cutaway.studio.guard import Guard
from cutaway.studio.server import Studio, create

LOCAL = "127.0.0.1"


def serve(
    folder: Folder, sources: Mapping[str, str], host: str = LOCAL, port: int = 0, ready: Callable[[str], None] = print
) -> None:
    """Serve until interrupted.

    Args:
        sources: the models, by the names that they have on the page.
        host: the address to bind; any other than 127.0.0.1 lets other machines ask.
        port: the port; 0 takes a free one.
        ready: called with the address that lets one browser in.

    Raises:
        Refused: the address cannot be bound.
    """
    listener = bind(host, port)
    port = listener.getsockname()[1]
    guard = Guard(create(Studio(folder, sources)), allowed(host, port))
    shown = "127.0.0.1" if host in ("0.0.0.0", LOCAL) else host
    ready(f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/{guard.link()}")
    config = uvicorn.Config(
        guard, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2
    )
    uvicorn.Server(config).run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        Refused: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sends at once only over these
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        why = f"it cannot be bound ({getattr(error, 'strerror', None) or error})"
        raise Refused(Keyword("port", port), why, "leave it out, and a free one is taken") from error
    return listener


def allowed(host: str, port: int) -> list[str]:
    """Return the values of `Host` that mean this server."""
    names = ["127.0.0.1", "localhost", "[::1]"]
    if host == "0.0.0.0":
        names += [
            socket.gethostname(),
            *{a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)},
        ]
    elif host not in names:
        names.append(f"[{host}]" if ":" in host else host)
    return [f"{n}:{port}" for n in names]


def is_local(host: str) -> bool:
    """Return True if only this machine can ask at an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
