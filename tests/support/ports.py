"""TCP ports of this host that are a test's own, also while nobody listens there: for who comes back at its address.

The kernel gives a port that nobody has to the next one who asks for any, and tests run beside others that do.
"""

from __future__ import annotations

import os
import socket
import weakref


class KeptPort:
    """`number`, bound on 127.0.0.1 and not listened at, for as long as this object lives. Whoever sets SO_REUSEADDR, as
    servers do, can listen there; who connects meanwhile is refused as at any port where nobody listens."""

    def __init__(self, number: int = 0) -> None:
        """`number` 0: the kernel chooses. No one may listen there just now."""
        with socket.socket() as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(("127.0.0.1", number))
            self.number: int = made.getsockname()[1]
            self._close = weakref.finalize(self, os.close, made.detach())
