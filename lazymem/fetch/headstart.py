"""A connection that is begun before there is an event loop: its first round trips pass while modules are loaded.

Only where that takes nobody's time: to the one server that there is, whose host needs no look-up. Whatever goes wrong
here, the usual way finds as well, and says.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lazymem.settings import LinkSettings, ServerAddress, UnixEndpoint

if TYPE_CHECKING:
    from lazymem.wire.connection import ClientConnection


class HeadStart:
    """Made by `maybe_head_start`. Of no use in a forked child."""

    def __init__(self, address: ServerAddress, name: str, connecting: socket.socket, *, plain: bool) -> None:
        """`plain`: without TLS, ahead of which nothing is said."""
        self.address = address
        self.name = name
        """Of the snapshot, as asked for."""
        self.connecting = connecting
        self.maybe_greeted: ClientConnection | None = None
        """That has said hello."""
        self._plain = plain
        self._pid = os.getpid()

    def say_hello(self) -> None:
        """Once, and if it is connected. Loads the wire's modules."""
        from lazymem.wire.connection import ClientConnection
        from lazymem.wire.messages import Hello

        waiting = select.poll()
        waiting.register(self.connecting, select.POLLOUT)
        if not self._plain or self.maybe_greeted is not None:
            return
        if waiting.poll(0) != [(self.connecting.fileno(), select.POLLOUT)]:
            return
        connection = ClientConnection()
        hello = connection.send(Hello(self.name))
        with contextlib.suppress(OSError):  # who goes on with it sees that
            if self.connecting.send(hello) == len(hello):
                self.maybe_greeted = connection

    def is_for(self, address: ServerAddress, name: str) -> bool:
        return self._pid == os.getpid() and (self.address, self.name) == (address, name)

    def close(self) -> None:
        """Where nobody goes on with it. In a child the descriptor is another one's by now."""
        if self._pid == os.getpid():
            self.connecting.close()


def maybe_head_start(servers: Sequence[ServerAddress], name: str, link: LinkSettings) -> HeadStart | None:
    """Returns at once. `name`: of the snapshot, as asked for; empty: the server's only one."""
    if len(servers) != 1:
        return None
    address = servers[0]
    with contextlib.suppress(OSError, UnicodeError), contextlib.ExitStack() as opened:
        family: int
        at: object
        if isinstance(address.endpoint, UnixEndpoint):
            family, at = socket.AF_UNIX, address.endpoint.path
        else:
            host, port = address.endpoint.host, address.endpoint.port
            flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
            family, _, _, _, at = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)[0]
        connecting = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        opened.callback(connecting.close)
        if connecting.connect_ex(at) in (0, errno.EINPROGRESS):
            opened.pop_all()
            return HeadStart(address, name, connecting, plain=link.tls is None)
    return None
