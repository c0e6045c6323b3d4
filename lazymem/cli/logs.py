"""Where a daemon's log goes: the terminal or journal in front, a file or syslog in the background. Never page bytes."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from lazymem.errors import UsageError

SYSLOG_SOCKET = "/dev/log"


def set_up(program: str, *, in_front: bool, verbose: bool, file: Path | None) -> None:
    """Send log records of this process where they belong.

    Raises:
        UsageError: `file` cannot be written.
    """
    handler: logging.Handler
    if file is not None:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(f"cannot write the log file {file}: {error.strerror}") from error
        handler = logging.StreamHandler(os.fdopen(descriptor, "w", buffering=1))
        handler.setFormatter(logging.Formatter(f"%(asctime)s {program}[%(process)d]: %(levelname)s: %(message)s"))
    elif in_front:
        handler = logging.StreamHandler()
        begin = "\r\x1b[2K" if sys.stderr.isatty() else ""  # over a line of progress
        handler.setFormatter(logging.Formatter(f"{begin}{program}: %(message)s"))
    elif os.path.exists(SYSLOG_SOCKET):
        from logging.handlers import SysLogHandler  # brings pickle along

        handler = SysLogHandler(SYSLOG_SOCKET)
        handler.setFormatter(logging.Formatter(f"{program}[%(process)d]: %(message)s"))
    else:
        handler = logging.NullHandler()
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    logging.getLogger("pyfuse3").setLevel(logging.WARNING)


def descriptors() -> tuple[int, ...]:
    """What the log needs open, for a child that closes everything else."""
    found = []
    for handler in logging.getLogger().handlers:
        file = getattr(handler, "stream", None) or getattr(handler, "socket", None)
        if file is not None:
            found.append(file.fileno())
    return tuple(found)
