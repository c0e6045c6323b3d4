"""What a test needs root for: as root, or by a sudo that asks for no password."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess


@functools.cache
def maybe_as_root() -> tuple[str, ...] | None:
    """What to put before a command so that root runs it; None where we cannot become root."""
    if os.geteuid() == 0:
        return ()
    if shutil.which("sudo") is None:
        return None
    allowed = subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0
    return ("sudo", "-n") if allowed else None


@functools.cache
def user_namespaces() -> bool:
    """Whether an ordinary user may make namespaces (Ubuntu from 24.04 on says no)."""
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


@functools.cache
def maybe_as_own_root() -> tuple[str, ...] | None:
    """What to put before a command so that it is root where it may mount, with a `/run` of its own: this machine's, or
    that of a user namespace, whose root does to a FUSE mount what the other does, and turns no knob in `/sys`.

    None where neither goes.
    """
    root = maybe_as_root()
    if root is not None:
        return root
    if not user_namespaces():
        return None
    script = 'mount -t tmpfs tmpfs /run && exec "$@"'
    return ("unshare", "-rm", "--propagation", "slave", "sh", "-c", script, "sh")


_MOUNTS = """
cd /mnt
mount -t tmpfs tmpfs .
cd /mnt
mkdir upper work root groups
mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work overlay root
mount -t cgroup2 cgroup groups
mkdir "groups/$0"
rmdir "groups/$0"
"""


@functools.cache
def root_may_mount() -> bool:
    """Whether root can mount, an overlay over all of this machine too, and make control groups of version 2."""
    root = maybe_as_root()
    if root is None:
        return False
    command = [*root, "unshare", "-m", "--propagation", "private", "sh", "-ec", _MOUNTS, f"lazymem-{os.getpid()}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


_NO_BYTE_CODE = ("env", "PYTHONDONTWRITEBYTECODE=1")
"""Root's byte code in a user's checkout would be in the user's way."""


def maybe_own_network() -> list[str] | None:
    """What to put before a command so that its network is its own, with the loopback down. None where denied."""
    root = maybe_as_root()
    if root is not None:
        return [*root, *_NO_BYTE_CODE, "unshare", "-n"]
    return ["unshare", "-rn"] if user_namespaces() else None


def maybe_own_mount_namespace(propagation: str) -> list[str] | None:
    """What to put before a command so that it has a mount namespace to itself, and could look at pid 1's.

    As root; else within a user namespace, with processes of its own, where a shell is pid 1. None where neither goes.
    """
    alone = ["unshare", "-m", "--propagation", propagation]
    root = maybe_as_root()
    if root is not None:
        return [*root, *_NO_BYTE_CODE, *alone]
    if user_namespaces():
        script = '"$@"; exit $?'
        return ["unshare", "-rm", "--fork", "--pid", "--mount-proc", "sh", "-c", script, "sh", *alone]
    return None


NOBODY = 65534


def root_may_become_nobody() -> bool:
    """Not the root of a user namespace, which knows no other user."""
    with open("/proc/self/uid_map", encoding="ascii") as lines:
        maps = [line.split() for line in lines]
    return any(int(first) <= NOBODY < int(first) + int(count) for first, _, count in maps)
