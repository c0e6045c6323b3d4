"""What a running emulator says about itself over its monitor: its RAM file, machine, disks, migration. Reads only.

Works with QEMU >= 7.2 and with lazymem-vm, which answers a part of it; what an emulator does not know is None.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from msgspec import Struct

from lazymem.errors import EnvironmentRefusedError, MonitorError, RamFileError
from lazymem.snapshot.manifest import RAM_BLOCK, Emulator
from lazymem.vm.qmpclient import QmpClient
from lazymem.vm.savestate import CAPABILITY

CANNOT_SAVE_WITH = frozenset(
    {
        "background-snapshot",
        "block",
        "colo",
        "compress",
        "mapped-ram",
        "multifd",
        "postcopy-ram",
        "rdma-pin-all",
        "x-colo",
        "xbzrle",
    }
)
"""Migration capabilities that change what the save stream looks like or who may read it."""

_RECORDED_OPTIONS = frozenset(
    {"-accel", "-cpu", "-device", "-enable-kvm", "-global", "-icount", "-m", "-M", "-machine", "-nodefaults", "-rtc"}
    | {"-smp", "-vga", "-no-hpet", "-no-acpi"}
)
"""What a resume has to repeat. An allowlist: other options may hold passwords, and a manifest is published."""

_ALONE = frozenset({"-enable-kvm", "-nodefaults", "-no-hpet", "-no-acpi"})


class RamBacking(Struct, frozen=True):
    """The file that is the guest's RAM, as this process can open it. `share`: the guest's writes are in the file."""

    path: Path
    size_bytes: int
    share: bool


def ram_backing(qmp: QmpClient) -> RamBacking:
    """The guest's RAM file.

    Raises:
        RamFileError: the RAM is not one file that has a name, or not all of the file.
    """
    devices = qmp.command("query-memdev")
    if not devices:
        raise RamFileError(
            "the guest's RAM is not a file: start QEMU with -object memory-backend-file,id=pc.ram,"
            "size=SIZE,mem-path=FILE,share=on -machine ...,memory-backend=pc.ram"
        )
    names = [str(device.get("id")) for device in devices]
    if names != [RAM_BLOCK]:
        raise RamFileError(
            f"the guest's RAM is in memory backends {', '.join(names)}; a snapshot knows one, with id={RAM_BLOCK}"
        )
    path = _property(qmp, "mem-path")
    if not path:
        raise RamFileError("the guest's RAM backend has no mem-path: it is not a file that can be snapshot")
    if _property(qmp, "offset"):
        raise RamFileError("the guest's RAM starts inside its file (offset=); a snapshot needs a file of its own")
    found = RamBacking(_seen_from_here(qmp, str(path)), int(devices[0]["size"]), _property(qmp, "share") is True)
    _check_file(found, qmp.peer_pid)
    return found


def _property(qmp: QmpClient, name: str) -> Any:
    return qmp.maybe_command("qom-get", path=f"/objects/{RAM_BLOCK}", property=name)


def _seen_from_here(qmp: QmpClient, path: str) -> Path:
    """The real path: a relative one is relative to the emulator's folder."""
    if os.path.isabs(path):
        return Path(os.path.realpath(path))
    if qmp.peer_pid is None:
        raise RamFileError(f"the RAM file {path} is relative to a folder that cannot be seen from here")
    try:
        return Path(os.path.realpath(f"/proc/{qmp.peer_pid}/cwd/{path}"))
    except OSError as error:
        raise RamFileError(f"the RAM file {path} is relative to a folder that cannot be read: {error}") from error


def _check_file(ram: RamBacking, pid: int | None) -> None:
    try:
        status = ram.path.stat()
    except OSError as error:
        raise RamFileError(f"cannot look at the RAM file {ram.path}: {error.strerror}") from error
    if ram.path.is_dir():
        raise RamFileError(f"the guest's RAM is an unnamed file in the folder {ram.path}; name a file in mem-path")
    if not ram.path.is_file():
        raise RamFileError(f"the guest's RAM {ram.path} is not a regular file")
    if status.st_size < ram.size_bytes:
        raise RamFileError(f"the RAM file {ram.path} has {status.st_size} bytes, the guest's RAM {ram.size_bytes}")
    inodes = _mapped_inodes(pid)
    if ram.share and inodes is not None and status.st_ino not in inodes:
        raise RamFileError(f"{ram.path} is not the file that the guest maps: it was removed or replaced meanwhile")


def _mapped_inodes(pid: int | None) -> set[int] | None:
    """Inode numbers of what the process maps shared; None where that may not be read."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return None
    # address, permissions ("rw-s"), offset, device, inode, path. Devices are not compared: btrfs tells others in stat.
    fields = [line.split(maxsplit=5) for line in lines]
    return {int(field[4]) for field in fields if field[1].endswith("s")} if fields else None


def writable_disks(qmp: QmpClient) -> list[str]:
    """Names of the drives whose medium the guest may write."""
    drives = qmp.maybe_command("query-block") or []
    return [
        str(drive.get("device") or drive.get("qdev") or "unnamed")
        for drive in drives
        if drive.get("inserted") and not drive["inserted"].get("ro", False)
    ]


def describe(qmp: QmpClient) -> Emulator:
    """Name, version, versioned machine type (an alias such as `pc` resolved) and CPU model of the emulator."""
    answer = qmp.command("query-version")
    numbers, package = answer["qemu"], str(answer.get("package", ""))
    version = f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}"
    machine = qmp.maybe_command("qom-get", path="/machine", property="type")
    name = "lazymem-vm" if "lazymem" in package else "qemu"
    return Emulator(
        name=name,
        version=f"{version} ({package})" if package else version,
        machine=None if machine is None else str(machine).removesuffix("-machine"),
        cpu=_cpu_model(qmp),
        options=recorded_options(_command_line(qmp.peer_pid)) if name == "qemu" else (),
    )


def _cpu_model(qmp: QmpClient) -> str | None:
    cpus = qmp.maybe_command("query-cpus-fast")
    if not cpus:
        return None
    kind = qmp.maybe_command("qom-get", path=cpus[0]["qom-path"], property="type")
    return None if kind is None else str(kind).removesuffix("-cpu").removesuffix("-x86_64").removesuffix("-i386")


def _command_line(pid: int | None) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def recorded_options(command: list[str]) -> tuple[str, ...]:
    """The options of a QEMU command line that a resume has to repeat, in order, with one dash."""
    kept: list[str] = []
    for position, word in enumerate(command[1:], start=1):
        option = word[1:] if word.startswith("--") else word
        if option in _ALONE:
            kept.append(option)
        elif option in _RECORDED_OPTIONS and position + 1 < len(command):
            kept += [option, command[position + 1]]
    return tuple(kept)


def refuse_other_migration(qmp: QmpClient) -> None:
    """Raises MonitorError when the guest is already on its way elsewhere, or set up so that it cannot be saved."""
    status = (qmp.command("query-migrate") or {}).get("status")
    if status in ("setup", "active", "device", "pre-switchover", "postcopy-active", "cancelling", "wait-unplug"):
        raise MonitorError(f"the guest is being migrated ({status}); try again when that is over")
    on = {entry["capability"] for entry in qmp.maybe_command("query-migrate-capabilities") or [] if entry["state"]}
    unfit = sorted(on & CANNOT_SAVE_WITH)
    if unfit:
        raise MonitorError(f"the guest's migration capabilities {', '.join(unfit)} are on; a snapshot needs them off")


def refuse_incapable(qmp: QmpClient) -> None:
    """
    Raises:
        EnvironmentRefusedError: it would send all of RAM along.
    """
    known = {entry["capability"] for entry in qmp.maybe_command("query-migrate-capabilities") or []}
    if CAPABILITY not in known:
        raise EnvironmentRefusedError(
            f"this emulator cannot leave RAM that is a file out of what it sends ({CAPABILITY}): use QEMU 7.2 or newer"
        )


def run_state(qmp: QmpClient) -> str:
    """The guest's run state, one that a snapshot can be made in.

    Raises:
        MonitorError: it still waits for its own state, or has crashed or ended.
    """
    status = str(qmp.command("query-status")["status"])
    if status not in ("running", "paused", "postmigrate", "suspended"):
        raise MonitorError(f"the guest is {status!r}; a snapshot needs one that runs or is paused")
    return status
