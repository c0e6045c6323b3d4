"""The FUSE session: our own mount, attached to pyfuse3; the unmount; the abort.

We mount ourselves, since pyfuse3's own mount cannot set `max_read`: as root with mount(2), else fusermount3 hands the
descriptor over. Nothing here touches the mount from the event loop: mount and unmount flush through the daemon.
"""

from __future__ import annotations

import array
import errno
import os
import select
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from lazymem.errors import EnvironmentRefusedError, MountError
from lazymem.fs import mountinfo
from lazymem.fs.syscalls import system_call

if TYPE_CHECKING:
    import pyfuse3  # with trio behind it, a tenth of a second: `lazymem umount` needs neither

MAX_READ_BYTES = 128 * 1024
"""Largest READ the kernel may send. A guest that touches one page inside a huge-page hint waits for the whole request
around it: with 1 MiB it would wait for a whole MiB."""

MAX_READ_WITHOUT_ROOT_BYTES = 256 * 1024
"""An answer of pyfuse3's crosses a socket pair (`channel`), whose buffer only root can make as large as it likes."""

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOATIME = 2, 4, 8, 1024
_UMOUNT_NOFOLLOW = 8
_CONNECTIONS = Path("/sys/fs/fuse/connections")

_FLAG_OPTIONS = {"nosuid": 0, "nodev": 0, "noexec": 0, "noatime": 0, "rw": 0, "ro": 1}
"""Options that are mount flags, with the bit each adds to what we set anyway."""

_KERNEL_OPTIONS = ("allow_other", "max_read", "blksize")


class MountOptions(Struct, frozen=True):
    """Checked `-o` options. `flags` for mount(2); `allow_other` as FUSE means it."""

    allow_other: bool = False
    flags: int = 0
    max_read_bytes: int = MAX_READ_BYTES

    @classmethod
    def parse(cls, texts: list[str]) -> MountOptions:
        """From `-o` arguments (each may hold several, separated by commas).

        Raises:
            MountError: an option that means nothing here.
        """
        allow_other, flags, max_read = False, 0, MAX_READ_BYTES
        for option in (part for text in texts for part in text.split(",") if part):
            name, _, value = option.partition("=")
            if name == "allow_other":
                allow_other = True
            elif name == "max_read" and value.isdigit() and 4096 <= int(value) <= 1 << 20:
                max_read = int(value)
            elif name in _FLAG_OPTIONS and not value:
                flags |= _FLAG_OPTIONS[name]
            else:
                known = "allow_other, max_read=BYTES (4096 to 1048576), " + ", ".join(_FLAG_OPTIONS)
                raise MountError(f"unknown mount option {option!r}; known: {known}")
        return cls(allow_other, flags, max_read)

    def kernel_text(self) -> str:
        text = f"max_read={self.max_read_bytes},default_permissions"
        return text + (",allow_other" if self.allow_other else "")


def mount(path: str, source: str, options: MountOptions) -> int:
    """Mount at `path` and return the `/dev/fuse` descriptor (close-on-exec, blocking).

    Raises:
        MountError, EnvironmentRefusedError: with the kernel's or fusermount3's reason.
    """
    if os.geteuid() == 0:
        return _mount_as_root(path, source, options)
    return _mount_by_helper(path, source, options)


def _mount_as_root(path: str, source: str, options: MountOptions) -> int:
    descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,{options.kernel_text()}"
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_NOATIME | options.flags
    try:
        system_call("mount", os.fsencode(source), os.fsencode(path), b"fuse.lazymem", flags, data.encode())
    except OSError as error:
        os.close(descriptor)
        if error.errno == errno.EPERM:
            raise EnvironmentRefusedError(
                "no right to mount (CAP_SYS_ADMIN): run as root, or as a user with fusermount3"
            ) from error
        raise MountError(f"cannot mount on {path}: {error.strerror}") from error
    return descriptor


def _mount_by_helper(path: str, source: str, options: MountOptions) -> int:
    """Ask fusermount3 (setuid) to mount; it sends the descriptor back over a socket (`_FUSE_COMMFD`)."""
    if options.max_read_bytes > MAX_READ_WITHOUT_ROOT_BYTES:
        raise MountError(
            f"without root max_read can be {MAX_READ_WITHOUT_ROOT_BYTES} at most: leave it out, or be root"
        )
    helper = shutil.which("fusermount3")
    if helper is None:
        raise EnvironmentRefusedError("fusermount3 is missing: install the package fuse3, or run as root")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        name = source.replace("\\", "\\\\").replace(",", "\\,")  # a comma would begin another option
        text = f"{options.kernel_text()},nosuid,nodev,noexec,noatime,fsname={name},subtype=lazymem"
        if options.flags & 1:
            text += ",ro"
        result = subprocess.run(
            [helper, "-o", text, "--", path],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if result.returncode:
            raise MountError(f"cannot mount on {path}: {result.stderr.strip() or 'fusermount3 failed'}")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[:4])
    if not descriptors:
        raise MountError(f"cannot mount on {path}: fusermount3 handed no descriptor over")
    os.set_inheritable(descriptors[0], False)
    return int(descriptors[0])


def attach(operations: pyfuse3.Operations, descriptor: int) -> None:
    """Bind pyfuse3 to a descriptor that gives requests and takes answers; `pyfuse3.main` then serves it."""
    import pyfuse3

    pyfuse3.init(operations, f"/dev/fd/{descriptor}", set())


def detach() -> None:
    """Give pyfuse3's session up without unmounting; the mount is unmounted by `unmount`, or is gone already."""
    import pyfuse3

    pyfuse3.close(unmount=False)


def is_over(descriptor: int) -> bool:
    """Whether the connection is over: unmounted or aborted. Does not block."""
    gone = select.poll()
    gone.register(descriptor, 0)
    return bool(gone.poll(0))


def wait_gone(descriptor: int) -> None:
    """Block until the connection over `descriptor` is over: unmounted or aborted. For a thread."""
    gone = select.poll()
    gone.register(descriptor, 0)  # errors only, which cannot be masked: requests do not wake this
    gone.poll()


def unmount(path: str, *, lazy: bool = False, apart: bool = False) -> bool:
    """Unmount `path`; False when it is busy. Blocking, and the kernel flushes through the daemon meanwhile: call it
    from a thread, never on the event loop.

    `apart`: in a process of its own, where there is a program for it. A thread of the daemon that waits for the daemon
    cannot be killed, and neither can then the daemon, wholly: systemd would wait for its end, and start no next one.

    Raises:
        MountError: any other refusal.
    """
    if os.geteuid() != 0:
        return _unmount_by_helper(["fusermount3", "-u"], path, lazy=lazy)
    if apart and shutil.which("umount") is not None:
        return _unmount_by_helper(["umount"], path, lazy=lazy)
    try:
        system_call("umount2", os.fsencode(path), _UMOUNT_NOFOLLOW | (2 if lazy else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno == errno.EINVAL:  # no mount there: somebody was faster
            return True
        raise MountError(f"cannot unmount {path}: {error.strerror}") from error
    return True


def _unmount_by_helper(program: list[str], path: str, *, lazy: bool) -> bool:
    lazily = {"umount": "-l", "fusermount3": "-z"}[program[0]]
    command = [*program, *([lazily] if lazy else []), "--", path]
    environ = {**os.environ, "LC_ALL": "C"}  # what is busy is told in words
    try:
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False, env=environ)
    except OSError as error:  # it went away since the mount, or no process can be made now
        raise MountError(f"cannot run {program[0]} to unmount {path}: {error.strerror}") from error
    if result.returncode and mountinfo.maybe_mount_at(path) is not None:
        if "busy" in result.stderr.lower():
            return False
        raise MountError(f"cannot unmount {path}: {result.stderr.strip()}")
    return True


def abort(device_minor: int) -> None:
    """End one connection by force: every waiting request fails, and whoever maps a missing page gets SIGBUS.

    Raises:
        MountError: fusectl is not mounted, or not permitted.
    """
    try:
        (_CONNECTIONS / str(device_minor) / "abort").write_text("1")
    except OSError as error:
        raise MountError(f"cannot abort FUSE connection {device_minor}: {error.strerror}") from error
