"""A verifying writer on a mount (`ackwriter`), and what the RAM must be after it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from lazymem.pages import PAGE_SIZE
from tests.support import ackwriter
from tests.support.mounts import wait_until


class Writer:
    """`ackwriter` on a mount. `stored`: what it was told is stored, page to number. `original`: as it knows it."""

    def __init__(self, ram_path: Path, seed: int, *original: Path, errors: IO[bytes] | None = None) -> None:
        """`errors`: where it says what is wrong, if not on our own stderr."""
        self._seed = seed
        self.stored: dict[int, int] = {}
        self.count = 0
        self.longest_seconds = 0.0
        self.process = subprocess.Popen(
            [sys.executable, ackwriter.__file__, str(ram_path), str(seed), *map(str, original)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            page, number, longest = line.split()
            self.stored[int(page)] = int(number)
            self.longest_seconds = float(longest)
            self.count += 1

    def wait_for_more(self, steps: int = 3) -> None:
        wanted = self.count + steps
        wait_until(lambda: self.count >= wanted or self.process.poll() is not None, "the writer goes on")

    def stop(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.close()
        assert self.process.wait(30) == 0
        self._listener.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def expected(self, ram: bytes) -> bytes:
        """The RAM after all of it, from the snapshot's `ram`."""
        found = bytearray(ram)
        for page, number in self.stored.items():
            text = ackwriter.stamp(number, self._seed)
            found[page * PAGE_SIZE : page * PAGE_SIZE + len(text)] = text
        return bytes(found)
