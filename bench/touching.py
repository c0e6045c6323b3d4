"""Starts the toucher before there is anything to touch, lets it go, and checks that it saw the image's bytes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.images import TOUCH_SEED, Image
from bench.summary import quantile
from bench.way import WayError
from lazymem.pages import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Touches:
    """Waiting times, seconds, in order of the touches."""

    waits: list[float]
    elapsed_seconds: float

    def figures(self) -> dict[str, float]:
        ordered = sorted(self.waits)
        return {
            "wait_p50_seconds": quantile(ordered, 0.5),
            "wait_p90_seconds": quantile(ordered, 0.9),
            "wait_p99_seconds": quantile(ordered, 0.99),
            "wait_max_seconds": ordered[-1],
            "wait_sum_seconds": sum(ordered),
            "touches": len(ordered),
        }


def chosen(image: Image, count: int, round_number: int, *, nonzero: bool) -> array[int]:
    """Different pages in a random order; another in each round, the same for every way in it."""
    numbers = image.nonzero_numbers() if nonzero else range(image.facts.pages)
    return array("L", random.Random(TOUCH_SEED + round_number).sample(numbers, min(count, len(numbers))))


class Toucher:
    """A process that waits for its job."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._waits = folder / "waits"
        self._pages = folder / "pages"

    def prepare(self, numbers: array[int]) -> None:
        with self._pages.open("wb") as file:
            numbers.tofile(file)

    def go(self, ram: Path, until_seconds: float | None = None) -> None:
        """Begin; with `until_seconds`, stop then."""
        assert self._process.stdin is not None
        job = {"file": str(ram), "pages": str(self._pages), "waits": str(self._waits), "until_seconds": until_seconds}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def result(self, image: Image, numbers: array[int]) -> Touches:
        """Wait for the end. Raises WayError when the bytes were wrong or it died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        code = self._process.wait(10)  # it holds the file until then, and an unmount would find it busy
        if not line:
            raise WayError(f"the toucher ended with {code}")
        found = json.loads(line)
        if found["byte_sum"] != _byte_sum(image, numbers[: found["touched"]]):
            raise WayError("the touched bytes are not the image's")
        waits = array("Q")
        with self._waits.open("rb") as file:
            waits.frombytes(file.read())
        return Touches([wait / 1e9 for wait in waits], found["elapsed_ns"] / 1e9)


@contextmanager
def toucher(folder: Path, numbers: array[int]) -> Iterator[Toucher]:
    """A toucher that is ready to go; ended on the way out."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.toucher"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdout.readline()
        found = Toucher(process, folder)
        found.prepare(numbers)
        yield found
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _byte_sum(image: Image, numbers: array[int]) -> int:
    with image.ram.open("rb") as file:
        return sum(os.pread(file.fileno(), 1, number * PAGE_SIZE)[0] for number in numbers)
