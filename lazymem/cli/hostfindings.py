"""What this host has of what lazymem needs, or is better with: one function a subject, each giving findings. Blocking.

Everything is looked at below `Host.root` and through `Host`'s fields, so a test can be another host.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lazymem.cli.host import Finding, Host, State
from lazymem.errors import LazymemError
from lazymem.fs import checks, ownfile
from lazymem.settings import default_cache_dir

_CAP_IPC_LOCK, _CAP_SYS_ADMIN, _CAP_SYS_RESOURCE, _CAP_PERFMON = 14, 21, 24, 38
_KVM_GET_API_VERSION, _KVM_API_VERSION = 0xAE00, 12

MIN_MOUNT_DESCRIPTORS = 64
"""A mount that does nothing has 35 open; more are for connections that are renewed, readers, and a recording."""

MIN_DESCRIPTORS = 1024
"""A server needs one or two a client; this many is what every distribution gives."""

MIN_FILE_BYTES = 64 << 20
"""The RAM of the smallest guests. The files of fetched and of written pages are as long as the guest's RAM."""

MIN_LOCKED_BYTES = 8 << 20
"""What a kernel gives by itself since Linux 5.16. A page map has a byte a page: enough for two of 16 GiB of RAM."""

MIN_CACHE_BYTES = 1 << 30

MIN_QEMU = (4, 0)
"""The first with x-ignore-shared, without which the RAM is in the stream."""

_COMMAND_SECONDS = 10.0


def examine(host: Host) -> list[Finding]:
    """All findings, those that a mount cannot do without first."""
    return [found for look in _LOOKS for found in look(host)]


def kernel(host: Host) -> Iterator[Finding]:
    try:
        checks.check_kernel(host.release)
    except LazymemError as error:
        yield Finding("kernel", State.MISSING, str(error), "boot a newer kernel")
        return
    yield Finding("kernel", State.OK, host.release)
    maybe_hindered_by = checks.maybe_no_resend(host.release)
    if maybe_hindered_by is None:
        yield Finding("killed daemon", State.OK, "another one goes on with the mount, its guest waits for a moment")
    else:
        yield Finding(
            "killed daemon",
            State.LACKING,
            f"is the guest's end: {maybe_hindered_by} (FUSE_NOTIFY_RESEND)",
            "boot Linux 6.9 or newer",
        )


def fuse_device(host: Host) -> Iterator[Finding]:
    device = host.root / "dev/fuse"
    try:
        checks.check_fuse_device(str(device))
    except LazymemError as error:
        text, _, mend = str(error).partition(": ")
        yield Finding("/dev/fuse", State.MISSING, text, mend or "give this user, or this container, the right to it")
        return
    yield Finding("/dev/fuse", State.OK, "can be opened" if host.uid == 0 else "is there")


def right_to_mount(host: Host) -> Iterator[Finding]:
    if host.uid == 0 and host.can(_CAP_SYS_ADMIN):
        yield Finding("right to mount", State.OK, "root, with CAP_SYS_ADMIN")
        return
    if host.uid == 0:
        mend = "run the container with --cap-add SYS_ADMIN --device /dev/fuse"
        yield Finding("right to mount", State.MISSING, "root without CAP_SYS_ADMIN", mend)
        return
    maybe_helper = host.which("fusermount3")
    if maybe_helper is None:
        mend = "install the package fuse3, or run as root"
        yield Finding("right to mount", State.MISSING, "not root, and there is no fusermount3", mend)
    elif not os.stat(maybe_helper).st_mode & stat.S_ISUID:
        mend = f"chmod u+s {maybe_helper}, or install the package fuse3 again"
        yield Finding("right to mount", State.MISSING, f"{maybe_helper} is not setuid root", mend)
    else:
        yield Finding("right to mount", State.OK, maybe_helper)
        yield from _as_a_user(host)


def _as_a_user(host: Host) -> Iterator[Finding]:
    if not re.search(r"^\s*user_allow_other\b", host.text("etc/fuse.conf"), re.MULTILINE):
        yield Finding(
            "-o allow_other",
            State.LACKING,
            "only root may let others see a mount",
            "put the line user_allow_other into /etc/fuse.conf, if an emulator of another user is to map the RAM",
        )
    if "fusermount3 " in host.text("sys/kernel/security/apparmor/profiles"):
        yield Finding(
            "AppArmor",
            State.LACKING,
            "a profile says where fusermount3 may mount",
            "mount below your home or /mnt, or add the place to /etc/apparmor.d/local/fusermount3",
        )


def namespace(host: Host) -> Iterator[Finding]:
    try:
        checks.check_namespace(os.getcwd())
    except LazymemError as error:
        text, _, mend = str(error).partition(": ")
        yield Finding("mount namespace", State.MISSING, text, mend)
    else:
        yield Finding("mount namespace", State.OK, "others see what is mounted here")


def tuning(host: Host) -> Iterator[Finding]:
    """What `fs/tuning` turns: without it a guest's writes are slowed by a factor of fifty."""
    bdi, connections = host.root / "sys/class/bdi", host.root / "sys/fs/fuse/connections"
    if host.uid != 0:
        yield Finding(
            "dirty throttle", State.LACKING, "only root may lift it: a guest's writes will be slow", "mount as root"
        )
    elif not bdi.is_dir() or not _is_writable(host.root / "sys"):
        yield Finding(
            "dirty throttle",
            State.LACKING,
            f"{bdi} cannot be written: a guest's writes will be slow",
            "mount /sys read-write (a container: --privileged; a systemd unit: no ProtectKernelTunables=)",
        )
    else:
        yield Finding("dirty throttle", State.OK, "can be lifted for each mount")
    if connections.is_dir() and any(connections.iterdir()):
        yield Finding("fusectl", State.OK, str(connections))
    elif host.uid != 0 and not os.path.ismount(connections):
        mend = f"mount -t fusectl none {connections}"
        yield Finding("fusectl", State.LACKING, "is not mounted: background slots stay at 12, --force cannot end", mend)
    else:
        yield Finding("fusectl", State.OK, "is mounted when it is needed")


def _is_writable(path: Path) -> bool:
    try:
        return not os.statvfs(path).f_flag & os.ST_RDONLY
    except OSError:
        return False


def ahead_of_the_guest(host: Host) -> Iterator[Finding]:
    if host.version < ownfile.MIN_KERNEL or not host.can(_CAP_SYS_ADMIN):
        yield Finding(
            "filling ahead",
            State.LACKING,
            "held pages go to the kernel only when touched, write-back comes in large pieces"
            " (open_tree(2): CAP_SYS_ADMIN; Linux 5.16)",
            "mount as root",
        )
    else:
        yield Finding("filling ahead", State.OK, "held pages go into the kernel's cache before they are touched")
    if host.version < (5, 6) or not host.can(_CAP_SYS_RESOURCE):
        yield Finding(
            "write-back",
            State.LACKING,
            "the daemon's writes may be held back for dirt of its guest (PR_SET_IO_FLUSHER: CAP_SYS_RESOURCE)",
            "run the daemon with CAP_SYS_RESOURCE (a container: --cap-add SYS_RESOURCE)",
        )
    else:
        yield Finding("write-back", State.OK, "the daemon's writes are not held back for dirt of its guest")


def touched_pages(host: Host) -> Iterator[Finding]:
    if host.may_count_faults():
        yield Finding("touched pages", State.OK, "the kernel tells which page a guest waits for (without KVM)")
        return
    yield Finding(
        "touched pages",
        State.LACKING,
        "the kernel does not tell which page a guest waits for: over fast links it waits for others, too"
        " (perf_event_open(2))",
        _mend_of_counting(host),
    )


def _mend_of_counting(host: Host) -> str:
    if host.can(_CAP_SYS_ADMIN) or host.can(_CAP_PERFMON):
        return "let it through (a container: a seccomp profile that allows perf_event_open)"
    return "mount as root, or sysctl kernel.perf_event_paranoid=2"


def limits(host: Host) -> Iterator[Finding]:
    """What a shell or a unit may have lowered (`ulimit`)."""
    yield _open_files(host.descriptors)
    yield _file_size(host.file_bytes)
    if host.can(_CAP_IPC_LOCK) or not 0 <= host.locked_bytes < MIN_LOCKED_BYTES:
        yield Finding("locked memory", State.OK, "the map of pages stays in memory")
    else:
        yield Finding(
            "locked memory",
            State.LACKING,
            f"{host.locked_bytes >> 10} KiB allowed: a failing disk may end a daemon that looks at its map of pages",
            f"ulimit -l {MIN_LOCKED_BYTES >> 10}, or LimitMEMLOCK= in the unit",
        )


def _open_files(allowed: int) -> Finding:
    mend = f"ulimit -n {MIN_DESCRIPTORS}, or LimitNOFILE= in the unit"
    if 0 <= allowed < MIN_MOUNT_DESCRIPTORS:
        return Finding("open files", State.MISSING, f"{allowed} allowed: too few for a mount", mend)
    if 0 <= allowed < MIN_DESCRIPTORS:
        return Finding("open files", State.LACKING, f"{allowed} allowed: few clients at a time", mend)
    return Finding("open files", State.OK, f"{allowed} allowed" if allowed >= 0 else "any number allowed")


def _file_size(allowed_bytes: int) -> Finding:
    if allowed_bytes < 0:
        return Finding("file size", State.OK, "no limit")
    state = State.LACKING if allowed_bytes >= MIN_FILE_BYTES else State.MISSING
    detail = f"{allowed_bytes >> 20} MiB allowed: no guest with more RAM can be mounted"
    return Finding("file size", state, detail, "ulimit -f unlimited, or LimitFSIZE=infinity in the unit")


def cache_folder(host: Host) -> Iterator[Finding]:
    path = default_cache_dir()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not os.access(there, os.W_OK):
        yield Finding("cache", State.LACKING, f"{there} cannot be written", "name another folder with --cache")
        return
    space = os.statvfs(there)
    free = space.f_bavail * space.f_frsize
    if free < MIN_CACHE_BYTES:
        mend = "make room, or name another folder with --cache: fetched pages need as much as the guest's RAM"
        yield Finding("cache", State.LACKING, f"{free >> 20} MiB free for {path}", mend)
    else:
        yield Finding("cache", State.OK, f"{free >> 30} GiB free for {path}")


def kvm(host: Host) -> Iterator[Finding]:
    device = host.root / "dev/kvm"
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        mend = "switch virtualisation on in the firmware, or nested in the outer host; lazymem-vm needs none"
        yield Finding("/dev/kvm", State.LACKING, "is missing: QEMU emulates in software", mend)
        return
    except OSError as error:
        mend = "add the user to the group kvm, or pass the device in"
        yield Finding("/dev/kvm", State.LACKING, f"cannot be opened: {error.strerror}", mend)
        return
    version = -1
    with contextlib.suppress(OSError):
        version = fcntl.ioctl(descriptor, _KVM_GET_API_VERSION, 0)
    os.close(descriptor)
    if version != _KVM_API_VERSION:
        yield Finding("/dev/kvm", State.LACKING, "does not answer as KVM does: QEMU emulates in software")
    else:
        yield Finding("/dev/kvm", State.OK, "answers (whether a guest boots on it, only a guest can tell)")


def qemu(host: Host) -> Iterator[Finding]:
    maybe_path = host.which("qemu-system-x86_64")
    if maybe_path is None:
        mend = "install the package qemu-system-x86; lazymem-vm works without"
        yield Finding("QEMU", State.LACKING, "there is no qemu-system-x86_64", mend)
        return
    try:
        done = subprocess.run(
            [maybe_path, "--version"], capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS
        )
        found = re.search(r"version (\d+)\.(\d+)", done.stdout)
    except (OSError, subprocess.TimeoutExpired):
        found = None
    if found is None:
        yield Finding("QEMU", State.LACKING, f"{maybe_path} does not say its version", "install it again")
    elif (int(found[1]), int(found[2])) < MIN_QEMU:
        yield Finding(
            "QEMU",
            State.LACKING,
            f"{found[1]}.{found[2]} cannot leave the RAM out of its stream",
            "install 4.0 or newer",
        )
    else:
        yield Finding("QEMU", State.OK, f"{found[1]}.{found[2]} ({maybe_path})")


def systemd(host: Host) -> Iterator[Finding]:
    if (host.root / "run/systemd/system").is_dir():
        yield Finding("systemd", State.OK, "runs: the units in deploy/ can be used")
    else:
        yield Finding("systemd", State.LACKING, "does not run here: start the commands by hand, or by another manager")


_LOOKS = (
    kernel,
    fuse_device,
    right_to_mount,
    namespace,
    tuning,
    ahead_of_the_guest,
    touched_pages,
    limits,
    cache_folder,
    kvm,
    qemu,
    systemd,
)
