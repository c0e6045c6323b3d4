"""A guest's touches of pages that do not come for a while: each in a thread, which says what it was shown."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable

from lazymem.pages import PAGE_SIZE
from tests.support.mounts import WAIT_SECONDS, Mounted


class PatientReaders:
    """One for each of `pages`, at once."""

    def __init__(self, mount: Mounted, pages: Iterable[int]) -> None:
        self.found: dict[int, bytes | OSError] = {}
        self._path = mount.ram_path
        self._threads = [threading.Thread(target=self._read, args=(page,), daemon=True) for page in pages]
        for thread in self._threads:
            thread.start()

    def _read(self, page: int) -> None:
        fd = os.open(self._path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            self.found[page] = os.pread(fd, PAGE_SIZE, page * PAGE_SIZE)
        except OSError as error:
            self.found[page] = error
        finally:
            os.close(fd)

    def finish(self) -> dict[int, bytes | OSError]:
        """What each was shown, or its error."""
        for thread in self._threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive()
        return self.found
