"""Writes pages of a mount as a guest does, and has them written back, which may take as long as a disk is full."""

from __future__ import annotations

import os
import random
import threading

from lazymem.pages import PAGE_SIZE
from tests.support.mounts import Mounted
from tests.support.snapshots import BuiltSnapshot


class GuestWriter:
    """Writes pages as a guest does, through a shared map, and has them written back in a thread."""

    def __init__(self, mount: Mounted, pages: range, seed: int) -> None:
        self._mapped = mount.open_map()
        self.data = random.Random(seed).randbytes(len(pages) * PAGE_SIZE)
        self._mapped[pages.start * PAGE_SIZE : pages.stop * PAGE_SIZE] = self.data
        self._fd = os.open(mount.ram_path, os.O_RDWR)
        self._failed: OSError | None = None
        self._thread = threading.Thread(target=self._sync, daemon=True)
        self._thread.start()

    def _sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._failed = error

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def finish(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self._failed is None
        self._mapped.close()
        os.close(self._fd)


def expected_ram(snapshot: BuiltSnapshot, *written: tuple[range, bytes]) -> bytes:
    ram = bytearray(snapshot.ram)
    for pages, data in written:
        ram[pages.start * PAGE_SIZE : pages.stop * PAGE_SIZE] = data
    return bytes(ram)
