"""Which network interface of this machine leads to another machine. Imports no torch, and sends nothing."""

from __future__ import annotations

import ipaddress
import socket

import psutil

_DISCARD = 9
"""The port that is named where none is meant: nothing is sent there."""


def source_address(host: str) -> str | None:
    """Returns the address from which this machine would speak to `host`; None without a way, or without such a name."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, _DISCARD, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(address)  # of a datagram socket: the kernel looks up the route, and no more
            return str(sock.getsockname()[0])
    except (OSError, UnicodeError):  # the latter of a name that cannot be one
        return None


def is_loopback(address: str) -> bool:
    """Tells whether an IP address means the machine itself, as 127.0.1.1 does, Debian's for its own host name."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """Returns the name of the interface that has this IP address, any of 127.0.0.0/8 being the loopback's."""
    wanted = "127.0.0.1" if is_loopback(address) and ":" not in address else address.partition("%")[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == wanted for one in addresses):
            return str(name)
    return None
