"""What `lazymem send` and `lazymem receive` share: how they speak to the terminal, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from lazymem.errors import LazymemError, StoreError


def plain(text: str) -> str:
    """`text`, some of which the other side wrote, with nothing in it that a terminal would act on."""
    return "".join([mark if mark.isprintable() else " " if mark in "\n\t" else "?" for mark in text])


def say(program: str, line: str) -> None:
    """Whether or not anybody reads it: a closed terminal is no reason to leave a guest standing."""
    with suppress(OSError):
        print(f"{program}: {plain(line)}", file=sys.stderr, flush=True)


def ended(program: str, work: Callable[[], int], what: str) -> int:
    """The exit code of `work`, its errors said. `what`: what an error of the system without a file's name is about."""
    try:
        return work()
    except LazymemError as error:
        say(program, str(error))
        return error.exit_code
    except OSError as error:
        say(program, str(StoreError(f"{error.filename or what}: {error.strerror}")))
        return StoreError.exit_code
    except KeyboardInterrupt:
        return 130
