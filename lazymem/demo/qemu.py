"""The command line of a stock QEMU whose RAM is a file: the source's and the destination's. Pure."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from lazymem.demo.linuxguest import LinuxGuest

PROGRAM = "qemu-system-x86_64"


def find_qemu() -> Path | None:
    """The installed emulator, or None."""
    found = shutil.which(PROGRAM)
    return Path(found) if found else None


@dataclass(frozen=True, slots=True)
class QemuOptions:
    """One QEMU. `ram` is the file that is its RAM; sockets are unix sockets' paths (under 108 bytes).

    `serial` is a socket on which somebody already listens, so that no output is lost; `qmp` is made by QEMU.
    """

    ram: Path
    ram_bytes: int
    qmp: Path
    serial: Path | None
    guest: LinuxGuest | None = None
    share: bool = True
    incoming: str | None = None
    paused: bool = False
    machine: str = "pc"
    more: tuple[str, ...] = field(default=())

    def command(self) -> list[str]:
        """The whole command line. Software emulation (tcg): /dev/kvm may exist and still not boot a guest."""
        memory = (
            f"memory-backend-file,id=pc.ram,size={self.ram_bytes},mem-path={_escaped(self.ram)},"
            f"share={'on' if self.share else 'off'}"
        )
        parts = [PROGRAM, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", "tcg"]
        parts += ["-machine", f"{self.machine},memory-backend=pc.ram", "-m", f"{self.ram_bytes >> 20}M"]
        parts += ["-object", memory, "-qmp", f"unix:{_escaped(self.qmp)},server=on,wait=off"]
        parts += ["-serial", f"unix:{_escaped(self.serial)}" if self.serial else "null"]
        if self.guest:
            parts += [
                "-kernel",
                str(self.guest.kernel),
                "-initrd",
                str(self.guest.initrd),
                "-append",
                self.guest.append,
            ]
        if self.incoming:
            parts += ["-incoming", self.incoming]
        if self.paused:
            parts.append("-S")
        return [*parts, *self.more]


def _escaped(path: Path) -> str:
    """In QEMU's option lists a comma in a value is written twice."""
    return str(path).replace(",", ",,")
