"""The Linux guest: a kernel and a static busybox from the distribution, and an initrd built around them.

It fills a file in its tmpfs, says that file's checksum, and then answers lines on its serial port; so whoever moved it
can ask whether its memory is still the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lazymem.demo import cpio
from lazymem.errors import EnvironmentRefusedError

PARTS_FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "linux-guest"
"""Where `make setup` unpacks a kernel and busybox on machines that have no usable ones: in the checkout, wherever the
command runs. (Of an install without a checkout there is no such folder.)"""

KERNEL_OPTIONS = "console=ttyS0 quiet panic=-1 mitigations=off"
"""`panic=-1`: with QEMU's -no-reboot a guest that fails ends at once instead of hanging a test."""

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=90% tmpfs /tmp
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo
random=8 text=8
for word in $(cat /proc/cmdline); do
    case $word in lazymem.random=*) random=${word#*=};; lazymem.text=*) text=${word#*=};; esac
done
dd if=/dev/urandom of=/tmp/data bs=1M count=$random 2>/dev/null
yes "memory that compresses well" | dd bs=1M count=$text iflag=fullblock 2>/dev/null >>/tmp/data
checksum() { sha256sum | cut -c 1-64; }
echo "lazymem ready $(checksum </tmp/data)"
count=0
while read -r command argument; do
    case $command in
        sum) echo "sum $(checksum </tmp/data)";;
        read) echo "read $argument $(head -c $((argument * 1048576)) /tmp/data | checksum)";;
        tick) count=$((count + 1)); echo "tick $count";;
        write) echo "$argument" >>/tmp/data; sync; echo "written $(checksum </tmp/data)";;
        show) echo "show $(tr -s ' \\n' '  ' <"$argument")";;
        poweroff) echo "bye"; poweroff -f;;
        *) echo "unknown $command";;
    esac
done
"""
"""Commands, one a line: `sum`, `read MIB`, `tick`, `write TEXT`, `show FILE`, `poweroff`; answered by a line each."""


@dataclass(frozen=True, slots=True)
class LinuxGuest:
    """What `-kernel`, `-initrd` and `-append` need."""

    kernel: Path
    initrd: Path
    append: str = KERNEL_OPTIONS


def build(folder: Path, random_mib: int = 8, text_mib: int = 8, boot: Path = Path("/boot")) -> LinuxGuest:
    """The guest, its initrd written into `folder`; its file holds so many MiB of random and of repeated bytes.

    Raises:
        EnvironmentRefusedError: there is no readable kernel or no static busybox; the text says what to install.
    """
    kernel = find_kernel(boot)
    initrd = folder / "lazymem-initrd"
    initrd.write_bytes(initrd_archive(find_busybox()))
    return LinuxGuest(kernel, initrd, f"{KERNEL_OPTIONS} lazymem.random={random_mib} lazymem.text={text_mib}")


def initrd_archive(busybox: Path) -> bytes:
    """The initrd's bytes: busybox, the init script and empty mount points."""
    folders = [cpio.folder(name) for name in ("bin", "dev", "proc", "sys", "tmp")]
    return cpio.archive(
        [*folders, cpio.program("bin/busybox", busybox.read_bytes()), cpio.program("init", INIT.encode())]
    )


def find_kernel(boot: Path = Path("/boot")) -> Path:
    """The newest small (cloud) kernel that can be read, else the newest of any kind.

    Raises:
        EnvironmentRefusedError: none.
    """
    everything = [*PARTS_FOLDER.glob("vmlinuz-*"), *boot.glob("vmlinuz-*")]
    readable = [path for path in everything if os.access(path, os.R_OK)]
    if not readable:
        raise EnvironmentRefusedError(
            f"no readable kernel in {boot} for the Linux guest: run `make setup`, or install linux-image-cloud-amd64"
        )
    return max(readable, key=lambda path: ("-cloud-" in path.name, path.stat().st_mtime))


def find_busybox() -> Path:
    """A busybox that needs no shared libraries.

    Raises:
        EnvironmentRefusedError: none.
    """
    candidates = (PARTS_FOLDER / "busybox", Path("/bin/busybox"), Path("/usr/bin/busybox"))
    for path in candidates:
        if _is_static(path):
            return path
    raise EnvironmentRefusedError("no static busybox for the Linux guest: run `make setup`, or install busybox-static")


def _is_static(path: Path) -> bool:
    """An ELF file that asks for no dynamic loader (whose path would stand near the file's start)."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return head.startswith(b"\x7fELF") and b"/ld-" not in head
