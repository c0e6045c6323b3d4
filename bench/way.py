"""What a way to have another host's RAM here is: a server's end, started before any clock runs, and a mount."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.images import Image
from bench.links import Through

START_SECONDS = 60.0
COMMAND_SECONDS = 300.0
STATUS_XATTR = "user.lazymem.status"


class WayError(RuntimeError):
    """A way did not start, or gave other bytes than the image has."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server's end."""

    address: str
    pid: int


@dataclass(slots=True)
class Mount:
    """A way's file here. `started`: perf_counter when its command was started; `daemon_pid` serves it, if anybody."""

    ram: Path
    started: float
    ready_seconds: float
    daemon_pid: int | None = None
    is_lazymem: bool = False
    extra: dict[str, float] = field(default_factory=dict)

    def status(self) -> dict[str, Any]:
        """lazymem's own figures."""
        found: dict[str, Any] = json.loads(os.getxattr(self.ram.parent, STATUS_XATTR))
        return found


Serve = Callable[[Image, Path], AbstractContextManager[Server]]
MountIt = Callable[[Through, Image, Path], AbstractContextManager[Mount]]


@dataclass(frozen=True, slots=True)
class Variant:
    """A way of lazymem's, with or without what protects it. The commands' own default: a supervisor, and no TLS.
    Nobody but the benchmark can do without verification (`bench/unverified`)."""

    suffix: str
    title: str
    tls: bool = False
    supervised: bool = True
    verified: bool = True
    forked: bool = False
    """By a fork server that runs already, like the page server."""


PLAIN = Variant("", "")
VARIANTS = (
    PLAIN,
    Variant("+tls", ", TLS", tls=True),
    Variant("+unsupervised", ", no supervisor", supervised=False),
    Variant("+tls+unsupervised", ", TLS, no supervisor", tls=True, supervised=False),
    Variant("+unverified", ", nothing verified", verified=False),
)

FORKED = Variant("+forked", ", from a fork server", forked=True)
"""No matter of protection, so in nobody's table of costs."""

ALL_VARIANTS = (*VARIANTS, FORKED)

NO_MOUNT = tuple(variant for variant in VARIANTS if variant.supervised and variant.verified)
"""Of what makes no mount of its own, so that there is nothing to supervise (or it cannot be told to do without)."""


@dataclass(frozen=True, slots=True)
class Way:
    """`serve(image, folder)` on the other host, `mount(through, image, folder)` on this one."""

    name: str
    title: str
    serve: Serve
    mount: MountIt
    variant: Variant = PLAIN
    is_lazymem: bool = False

    @property
    def base(self) -> str:
        """The name of the way that it is a variant of."""
        return self.name.removesuffix(self.variant.suffix)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Poll each half millisecond. Raises WayError when the time is up."""
    give_up = time.perf_counter() + seconds
    while not condition():
        if time.perf_counter() > give_up:
            raise WayError(f"waited {seconds:g} s for {what}")
        time.sleep(0.0005)


def unmount(point: Path) -> None:
    """Raises WayError: it stays busy."""
    give_up = time.perf_counter() + START_SECONDS
    command = ["umount", str(point)] if os.geteuid() == 0 else ["fusermount3", "-u", str(point)]
    while os.path.ismount(point):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and time.perf_counter() > give_up:
            raise WayError(f"cannot unmount {point}: {done.stderr.strip()}")
        if done.returncode:
            time.sleep(0.02)


def run_to_end(command: list[str]) -> None:
    """Raises WayError with the command's words when it fails, or takes longer than any link needs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise WayError(f"{command[0]} did not end in {COMMAND_SECONDS:g} s") from None
    if done.returncode:
        raise WayError(f"{command[0]}: {done.stderr.strip()}")


def copy_sparse(source: Path, target: Path) -> None:
    """By cp(1), which clones where the file system can and keeps holes where not."""
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", str(source), str(target)], check=True)
