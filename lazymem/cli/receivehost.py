"""What `lazymem receive` does on its host: checks, the mount, the emulator. Both outlive the command that started them.

The emulator is a session of its own, so that neither a signal to the command nor its death reaches it; what it says on
stderr goes to a file that the command shows as it grows.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from msgspec import Struct

from lazymem.cli.exitcode import maybe_noted
from lazymem.cli.status import read_status
from lazymem.cli.umount import end_mount
from lazymem.cli.vm_options import VmOptions, parse_command_line
from lazymem.errors import (
    BusyError,
    EnvironmentRefusedError,
    LazymemError,
    MonitorError,
    MountError,
    ServerRefusedError,
    StoreError,
    UsageError,
)
from lazymem.fs import hostmemory, mountinfo
from lazymem.fs.holders import STANDS, find_holders
from lazymem.handover.arriving import WAITS, ArrivingGuest, boot_id
from lazymem.handover.messages import Offer
from lazymem.pages import PAGE_SIZE
from lazymem.settings import Endpoint, TcpEndpoint, TlsSettings, default_cache_dir, escaped_server
from lazymem.snapshot.manifest import emulator_of
from lazymem.store.candidatewriter import CandidateWriter
from lazymem.tls.options import tls_words
from lazymem.vm.qemurecorded import has_generation, maybe_generation

LOG_NAME = "emulator.log"
_MOUNT_LOG_NAME = "mount.log"
_MADE_BY_NAME = "made-by.json"
_SOCKETS_PREFIX = "lazymem-"
_START_SECONDS = 60.0
_END_SECONDS = 1.0
"""For an emulator whose guest never ran: it has nothing to store, and may wait for a page that never comes."""

_KILLED_SECONDS = 10.0
_UNMOUNT_SECONDS = 10.0
"""For a QEMU whose lazymem-vm was killed to go, too."""
_COMPLAINT_BYTES = 2000
_RUN_ATTRIBUTE = "user.lazymem.run"

_FIGURES = {
    "wire_received_bytes": "wire_received_bytes",
    "demand_faults": "demand_faults",
    "wait_p50_seconds": "demand_wait_p50_seconds",
    "wait_p99_seconds": "demand_wait_p99_seconds",
    "pages_demanded": "pages_demanded",
    "pages_prefetched": "pages_prefetched",
    "pages_written": "pages_written",
    "pages_total": "pages_total",
    "candidates_used": "candidates_used",
    "candidates_refused": "candidates_refused",
}
"""The report's names, and the mount status's."""

_EXIT_CODE_NAME = "exit-code"

GONE_CODE = 255
"""Of an emulator that was killed while nobody was there to see how. One that ended by itself has noted it."""


class Wanted(Struct, frozen=True):
    """The command line. `words`: lazymem-vm's options; `more`: QEMU's, behind a ``--``."""

    mountpoint: Path
    cache: Path | None
    mount_options: tuple[str, ...]
    words: tuple[str, ...]
    more: tuple[str, ...]
    force: bool = False
    tls: TlsSettings | None = None


class ReceiveHost:
    """Fits `handover.arrival.Host`."""

    def __init__(self, mountpoint: Path, folder: Path) -> None:
        """`folder`: the journal's, where the logs go."""
        self.mountpoint = mountpoint
        self.log = folder / LOG_NAME
        self._mount_log = folder / _MOUNT_LOG_NAME
        self._process: subprocess.Popen[bytes] | None = None
        self._handover = ""
        self.pid = 0
        self.began = ""
        self.sockets = Path()
        self.monitor = Path()
        self._shown = 0
        self.is_end_unknown = False
        """The emulator has ended, and nobody knows how."""

    # ---- before anything is begun

    def check(self, offer: Offer, wanted: Wanted) -> None:
        """
        Raises:
            LazymemError: this host cannot take that guest.
        """
        if offer.boot_id == boot_id():
            ram = os.path.realpath(offer.ram_path)
            if ram == str(self.mountpoint / "pc.ram") or Path(ram).is_relative_to(self.mountpoint):
                raise MountError(f"the guest's RAM already is {offer.ram_path}, on this very host: name another folder")
        if wanted.force:
            return
        cache = wanted.cache or default_cache_dir()
        free, available = _free_bytes(cache), _available_bytes()
        if free < offer.ram_bytes:
            raise StoreError(
                f"the guest has {offer.ram_bytes >> 20} MiB of RAM and {cache} has room for {free >> 20} MiB: name "
                "another --cache, or say --force (a guest whose RAM is mostly zeros needs less)"
            )
        if available < offer.ram_bytes:
            raise EnvironmentRefusedError(
                f"the guest has {offer.ram_bytes >> 20} MiB of RAM and this host, or this process's control group, "
                f"{max(0, int(available)) >> 20} MiB to spare; with --force it runs from the disk"
            )

    # ---- the mount and the emulator

    def mount(
        self, endpoint: Endpoint, offer: Offer, wanted: Wanted, maybe_candidates: CandidateWriter | None = None
    ) -> None:
        """With `maybe_candidates` the mount has them open when this returns, and their names are gone.

        Raises:
            MountError: lazymem-mount said no.
        """
        self._handover = offer.handover
        command = [sys.executable, "-m", "lazymem.cli.mount", _server(endpoint, offer.handover), str(self.mountpoint)]
        command += ["--log", str(self._mount_log), "--prefetch", "all"]
        command += [] if wanted.cache is None else ["--cache", str(wanted.cache)]
        for option in wanted.mount_options:
            command += ["-o", option]
        command += [] if maybe_candidates is None else ["--candidates", str(maybe_candidates.folder)]
        if wanted.tls is not None and isinstance(endpoint, TcpEndpoint):
            command += tls_words(wanted.tls)
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise MountError(done.stderr.strip().removeprefix("lazymem-mount: ") or "lazymem-mount failed")
        if maybe_candidates is not None:
            maybe_candidates.forget_name()

    def make_sockets(self) -> Path:
        """A folder for the emulator's sockets, by whose name it is found, too."""
        self.sockets = Path(tempfile.mkdtemp(prefix=_SOCKETS_PREFIX))
        return self.sockets

    def start(self, offer: Offer, wanted: Wanted) -> ArrivingGuest:
        """The emulator, waiting for its state: it has touched no RAM.

        Raises:
            LazymemError: it does not start; what it said is in the text.
        """
        words, options = command_line(offer, wanted, self.mountpoint / "pc.ram", self.sockets)
        self.monitor = options.qmp if _is_ours(options) and options.qmp is not None else self.sockets / "qmp"
        self.log.write_bytes(b"")
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lazymem.cli.vm", *words], stderr=output, start_new_session=True
            )
        self.pid, self.began = self._process.pid, _began(self._process.pid)
        return self._wait_waiting()

    def _wait_waiting(self) -> ArrivingGuest:
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while True:
            if (code := self._process.poll()) is not None:
                raise MonitorError(f"the emulator ended with status {code}: {self.complaint()}")
            with contextlib.suppress(MonitorError):
                guest = ArrivingGuest(self.monitor)
                if guest.status() == WAITS:
                    return guest
                guest.close()
            if time.monotonic() > deadline:
                raise MonitorError(f"the emulator does not wait for its state: {self.complaint()}")
            time.sleep(0.01)

    def adopt(self, handover: str, pid: int, began: str, monitor: Path, sockets: Path) -> None:
        """The mount of that hand-over, and the emulator, that an earlier command started. `pid` 0: it did not come
        so far as to say which, if any."""
        self._handover = handover
        self.pid, self.began, self.monitor, self.sockets = pid, began, monitor, sockets
        if not pid and (found := _maybe_emulator_with(sockets)) is not None:
            self.pid, self.began = found, _began(found)
        with contextlib.suppress(OSError):
            self._shown = self.log.stat().st_size

    # ---- as `arrival.Host`

    def is_mounted(self) -> bool:
        try:
            return bool(os.getxattr(self.mountpoint, _RUN_ATTRIBUTE))
        except OSError:
            return False

    def read_ahead(self, pages: list[int]) -> None:
        """No more than these: the kernel would bring 128 KiB around what an emulator touches."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self.mountpoint / "pc.ram", os.O_RDONLY | os.O_CLOEXEC)
            try:
                for page in pages:
                    os.posix_fadvise(descriptor, page * PAGE_SIZE, PAGE_SIZE, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def is_whole(self) -> bool:
        try:
            return json.loads(os.getxattr(self.mountpoint, _RUN_ATTRIBUTE))["whole"] is True
        except (OSError, ValueError, KeyError):
            return False

    def maybe_not_kept(self) -> str | None:
        try:
            found = json.loads(os.getxattr(self.mountpoint, _RUN_ATTRIBUTE)).get("not_kept_because")
        except (OSError, ValueError):
            return None
        return None if found is None else str(found)

    def figures(self) -> dict[str, Any]:
        try:
            status = read_status(str(self.mountpoint))
        except LazymemError:
            return {}
        restarts = (status.get("survival") or {}).get("restarts") or 0
        return {name: status.get(theirs) for name, theirs in _FIGURES.items()} | {"mount_restarts": restarts}

    def maybe_exit_code(self) -> int | None:
        if self._process is not None:
            code = self._process.poll()
            return code if code is None or code >= 0 else 128 - code
        if self.pid and _began(self.pid) == self.began:
            return None
        noted = maybe_noted(self.sockets / _EXIT_CODE_NAME) if _is_socket_folder(self.sockets) else None
        self.is_end_unknown = noted is None
        return GONE_CODE if noted is None else noted

    def maybe_reader(self) -> str | None:
        mounted = mountinfo.maybe_mount_at(str(self.mountpoint))
        if mounted is None or not self._is_mount_ours():
            return None
        found = find_holders(mounted.device, str(self.mountpoint))
        others = [holder for holder in found if holder.how != STANDS and not self._is_of_emulator(holder.pid)]
        return ", ".join(map(str, others)) or None

    def _is_of_emulator(self, pid: int) -> bool:
        """Its session is the emulator's own: a QEMU, whose lazymem-vm was killed, goes in a moment."""
        with contextlib.suppress(ProcessLookupError):
            return os.getsid(pid) == self.pid
        return True

    def complaint(self) -> str:
        try:
            lines = self.log.read_bytes()[-_COMPLAINT_BYTES:].decode(errors="replace").splitlines()
        except OSError:
            return ""
        return " / ".join(line.strip() for line in lines if line.strip())

    def show(self) -> None:
        """What the emulator has said since the last time."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(self._shown)
            text = file.read()
            self._shown += len(text)
            sys.stderr.write(text.decode(errors="replace"))
            sys.stderr.flush()

    def signal(self, number: int) -> None:
        """To the emulator, if it lives."""
        if self.maybe_exit_code() is None and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def end_emulator(self) -> None:
        for number, seconds in ((signal.SIGTERM, _END_SECONDS), (signal.SIGKILL, _KILLED_SECONDS)):
            self.signal(number)
            deadline = time.monotonic() + seconds
            while self.pid and self.maybe_exit_code() is None and time.monotonic() < deadline:
                time.sleep(0.01)

    # ---- the end

    def clean_up(self, *, whole: bool = False) -> None:
        """No emulator, no mount, no socket of ours is left.

        A mount that is not `whole` is of no use to anybody once its guest is gone, and its connection is aborted: an
        ordinary unmount waits for pages on their way, which may never come.

        Raises:
            LazymemError: somebody uses the mount.
        """
        self.end_emulator()
        if _is_socket_folder(self.sockets):
            shutil.rmtree(self.sockets, ignore_errors=True)
        deadline = time.monotonic() + _UNMOUNT_SECONDS
        while self._is_mount_ours():
            try:
                end_mount(str(self.mountpoint), force=not whole)
            except BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _is_mount_ours(self) -> bool:
        """Whether what is mounted there is this hand-over's RAM: another mount may have a guest of its own."""
        mounted = mountinfo.maybe_mount_at(str(self.mountpoint))
        if mounted is None or not mounted.is_ours or not self._handover:
            return False
        return mounted.source.endswith(f"/{self._handover}")


def command_line(offer: Offer, wanted: Wanted, ram: Path, sockets: Path) -> tuple[list[str], VmOptions]:
    """lazymem-vm's command line for that guest, and what it comes to.

    Raises:
        UsageError: the user's own options make no sense here.
        ServerRefusedError: the source tells of an emulator that makes none.
    """
    for option in ("-pcram-file", "-incoming", "-mem-file", "-exit-code-file"):
        if any(word.lstrip("-").partition("=")[0] == option[1:] for word in wanted.words):
            raise UsageError(f"{option} is what lazymem receive itself says to the emulator: leave it out")
    words = ["-m", f"{offer.ram_bytes >> 10}K", "--pcram-file", str(ram), "-incoming", "defer", "-S"]
    words += ["-qmp", f"unix:{sockets}/qmp", "--exit-code-file", f"{sockets}/{_EXIT_CODE_NAME}"]
    more = list(wanted.more)
    if offer.emulator.get("name") == "qemu":
        made_by = sockets / _MADE_BY_NAME
        made_by.write_text(json.dumps({"emulator": _checked(offer.emulator)}))
        words += ["--engine", "qemu", "--made-by", str(made_by)]
        if (guid := maybe_generation(offer.emulator.get("options") or ())) is not None and not has_generation(more):
            more += ["-device", f"vmgenid,guid={guid}"]
    words += wanted.words
    options = parse_command_line([*words, *(["--", *more] if more else [])])
    if not _is_ours(options) and options.qmp != sockets / "qmp":
        # QEMU's monitors serve one client each: the user's is the user's.
        more += ["-qmp", f"unix:{sockets}/qmp,server=on,wait=off"]
    return [*words, *(["--", *more] if more else [])], options


def _is_ours(options: VmOptions) -> bool:
    return options.engine != "qemu"


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    try:
        emulator_of(entry)
    except (LazymemError, KeyError, TypeError, AttributeError) as error:
        raise ServerRefusedError(f"the source does not tell which emulator its guest runs in: {error}") from error
    return entry


def _server(endpoint: Endpoint, name: str) -> str:
    text = str(endpoint)
    return escaped_server(f"{text}:/{name}" if text.startswith("unix:") else f"{text}/{name}")


def _began(pid: int) -> str:
    """When a process began (ticks since boot): with its number, which process it is. Empty: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _is_socket_folder(path: Path) -> bool:
    """Whether `ReceiveHost.make_sockets` can have made it."""
    return path.is_absolute() and path.name.startswith(_SOCKETS_PREFIX)


def _maybe_emulator_with(sockets: Path) -> int | None:
    """The lazymem-vm whose command line names something in that folder, which is this hand-over's alone.

    Without a folder there is none: every command line holds an empty path, or ".", somewhere.
    """
    if not _is_socket_folder(sockets):
        return None
    inside = os.fsencode(sockets) + b"/"
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"lazymem.cli.vm" in words and any(inside in word for word in words):
                    return int(entry.name)
    return None


def _free_bytes(folder: Path) -> int:
    """For us, on the disk where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _available_bytes() -> float:
    """Memory that this host, and each control group that this process is in, would still give."""
    return hostmemory.room_bytes(0)
