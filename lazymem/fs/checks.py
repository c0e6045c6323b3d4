"""What the mount needs from this host, found at start and refused with the reason (rule 10)."""

from __future__ import annotations

import contextlib
import os
import re
import stat

from lazymem.errors import EnvironmentRefusedError, MountError
from lazymem.fs import mountinfo

MIN_KERNEL = (5, 4)
"""Shared writable maps of FUSE files came much earlier; below this no long-term kernel is alive to test on."""


MIN_RESEND_KERNEL = (6, 9)
"""The first that sends a killed daemon's requests again (`fuseabi.NOTIFY_RESEND`). With an older one a guest would wait
for ever for each page that the daemon was asked for when it died; so there its death is the mount's end, at once."""


def kernel_version(release: str) -> tuple[int, int]:
    """The first two numbers of uname's release; (0, 0) where it has none."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def check_kernel(release: str | None = None) -> None:
    """Raises EnvironmentRefusedError below `MIN_KERNEL`."""
    release = release if release is not None else os.uname().release
    if kernel_version(release) < MIN_KERNEL:
        raise EnvironmentRefusedError(
            f"kernel {release} is too old: lazymem needs {MIN_KERNEL[0]}.{MIN_KERNEL[1]} or newer for its FUSE mounts"
        )


def maybe_no_resend(release: str | None = None) -> str | None:
    """Why a mount cannot outlive its daemon on this host; None: it can."""
    release = release if release is not None else os.uname().release
    if kernel_version(release) >= MIN_RESEND_KERNEL:
        return None
    first = ".".join(map(str, MIN_RESEND_KERNEL))
    return f"kernel {release} cannot send a killed daemon's requests again, {first} could"


def check_fuse_device(device: str = "/dev/fuse") -> None:
    """Without root, fusermount3 opens the device, so its rights are not ours to check.

    Raises:
        EnvironmentRefusedError: `device` is missing, no device, or cannot be opened.
    """
    try:
        mode = os.stat(device).st_mode
        if not stat.S_ISCHR(mode):
            raise EnvironmentRefusedError(f"{device} is not a device: load the fuse module, or pass the device in")
        if os.geteuid() == 0:
            os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError as error:
        raise EnvironmentRefusedError(
            f"there is no {device}: run 'modprobe fuse', or give the container --device {device}"
        ) from error
    except OSError as error:
        raise EnvironmentRefusedError(f"cannot open {device}: {error.strerror}") from error


def check_mount_point(path: str) -> None:
    """`path` (from `mountinfo.real_path`) must be an existing folder with nothing mounted on it.

    Raises:
        MountError: missing, no folder, or something is mounted there.
    """
    mounted = mountinfo.maybe_mount_at(path)
    if mounted is not None:
        raise MountError(f"{path} is busy: {mounted.fs_type} ({mounted.source}) is mounted there; unmount it first")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise MountError(f"the mount point {path} does not exist: create the folder first") from error
    except OSError as error:
        raise MountError(f"cannot look at the mount point {path}: {error.strerror}") from error
    if not stat.S_ISDIR(mode):
        raise MountError(f"the mount point {path} is not a folder")


def check_namespace(path: str) -> None:
    """Refuse to mount where nobody else would see it.

    A service manager's sandbox options give a daemon a mount namespace of its own: its mount works, for itself only.
    A namespace is fine when pid 1, or anybody outside our own line of processes, is in it, or when the mount point
    lies on a mount that is shared with pid 1's namespace (same peer group).

    Raises:
        EnvironmentRefusedError: nobody else is in this mount namespace.
    """
    ours = os.readlink("/proc/self/ns/mnt")
    first = _maybe_namespace("1")
    if first == ours or (first is not None and _propagates(path)):
        return
    if first is None and _maybe_namespace(str(os.getppid())) in (None, ours):
        return  # an ordinary user sees into his own processes only, and nothing that he sees speaks against it
    others = [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid()]
    if any(_maybe_namespace(pid) == ours for pid in others):
        return
    raise EnvironmentRefusedError(
        "this process has a mount namespace to itself, so nobody else would see the mount: "
        "start it outside of it (in a systemd unit, without PrivateTmp=, ProtectSystem= and their like)"
    )


def _propagates(path: str) -> bool:
    """Whether a mount below `path` appears in pid 1's namespace too."""
    group = mountinfo.mount_holding(path).peer_group
    if group is None:
        return False
    with contextlib.suppress(OSError):
        theirs = mountinfo.parse(mountinfo.read("1"))
        return any(mount.peer_group == group for mount in theirs)
    return False


def _maybe_namespace(pid: str) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:  # gone, or not ours to see
        return None
