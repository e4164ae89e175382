"""Where a server can listen."""

from __future__ import annotations

import ipaddress
import os
import socket

from ..errors import InputError


def check_address(host: str, port: int) -> int:
    """The port itself where a server can listen there, a free one for 0.

    Raises:
        InputError: no such host, or the port is taken or out of range.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port: expected 0 to 65535, received {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"host: there is none called {host!r} here") from error
    with socket.socket(family, kind, protocol) as listener:
        if os.name == "posix":  # a server that has just ended leaves its port in waiting
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise InputError(f"port: cannot listen at {in_url(host)}:{port}: {error.strerror}; try another --port") from error
        return int(listener.getsockname()[1])


def in_url(host: str) -> str:
    """A host as it stands before ``:port``: an IPv6 address has colons of its own and goes into brackets."""
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Whether a server that listens there is reached from this machine alone; not where the host is unknown."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return bool(found) and all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)
    except (OSError, UnicodeError, ValueError):
        return False
