"""Unix sockets that root made are removed at the server's end, however it ends, although it is not root by then.

A process stays root for it: this file as a program. It hears nothing from the server but its end, and knows what to
remove from before, so who takes the server over gains nothing by it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

Bound = tuple[Path, int]
"""A socket's path, and its inode."""


def remove_own(path: Path, inode: int) -> None:
    """Remove our socket, unless another one took its name."""
    with contextlib.suppress(OSError):
        if path.lstat().st_ino == inode:
            path.unlink()


@contextlib.contextmanager
def removed_after_us(sockets: Iterable[Bound]) -> Iterator[None]:
    """They are removed when the block, or this process, ends.

    Raises:
        EnvironmentRefusedError: no process or no descriptor to be had.
    """
    words = [word for path, inode in sockets for word in (str(path.absolute()), str(inode))]
    if not words:
        yield
        return
    try:
        sweeper = subprocess.Popen(
            [sys.executable, "-I", __file__, *words],
            stdin=subprocess.PIPE,  # which ends with us
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        from lazymem.errors import EnvironmentRefusedError  # not of this file as a program, which needs nothing

        raise EnvironmentRefusedError(f"cannot see to the unix sockets' end: {error.strerror}") from error
    with sweeper:
        yield


def main(words: Sequence[str]) -> None:
    """Wait for the end of our input, then remove what `words` name: paths and inodes in turns."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the server, whose end is ours
    os.read(0, 1)
    for path, inode in zip(words[::2], words[1::2], strict=True):
        remove_own(Path(path), int(inode))


if __name__ == "__main__":
    main(sys.argv[1:])
