"""The program that draws a guest's screen for the hand-over's measures, run here on a file instead of a framebuffer."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from bench.linuximage import assembled
from lazymem.pages import PAGE_SIZE
from tests.support.vmprocess import wait_until

WIDTH, HEIGHT = 1024, 768
LINE_BYTES = 16 * WIDTH * 4
BACKGROUND = b"\x20\x18\x10\0"


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    path = tmp_path / "screen"
    path.write_bytes(bytes(WIDTH * HEIGHT * 4))
    return path


@contextmanager
def _drawing(screen: Path, what: str) -> Iterator[None]:
    """It has drawn at least one screen by then."""
    assembled(screen.parent)
    process = subprocess.Popen([screen.parent / "draw", screen, what])
    try:
        wait_until(lambda: any(screen.read_bytes()[-PAGE_SIZE:]), "the last pixels")
        yield
    finally:
        process.kill()
        process.wait()


def _pieces(data: bytes) -> float:
    """By how much it is smaller, compressed as a hand-over does it."""
    zstd = zstandard.ZstdCompressor(level=1)
    return len(data) / sum(len(zstd.compress(data[at : at + (1 << 17)])) for at in range(0, len(data), 1 << 17))


def test_a_console_that_scrolls(screen: Path) -> None:
    """Lines of text in three colours, the first of which is gone in a moment, on a background."""
    with _drawing(screen, "text"):
        before = screen.read_bytes()
        wait_until(lambda: screen.read_bytes()[:LINE_BYTES] != before[:LINE_BYTES], "it to scroll")
    data = screen.read_bytes()  # of a moment, maybe in the middle of a line
    pixels = [data[at : at + 4] for at in range(0, len(data), 4)]
    colours = {colour: pixels.count(colour) for colour in set(pixels)}
    assert max(colours, key=colours.__getitem__) == BACKGROUND
    assert len(colours) == 4
    lines = [data[at : at + LINE_BYTES] for at in range(0, len(data) - 2 * LINE_BYTES, LINE_BYTES)]
    assert len(set(lines)) == len(lines)
    assert all(line.strip(BACKGROUND) for line in lines)
    assert 10 < _pieces(data) < 100


def test_a_moving_picture(screen: Path) -> None:
    """That compresses as pictures do: a little."""
    with _drawing(screen, "video"):
        before = screen.read_bytes()
        wait_until(lambda: screen.read_bytes()[:PAGE_SIZE] != before[:PAGE_SIZE], "it to move")
    assert 1.1 < _pieces(screen.read_bytes()) < 2


def test_the_same_each_time(screen: Path) -> None:
    """`once` ends by itself."""
    assembled(screen.parent)
    drawn = []
    for _ in range(2):
        subprocess.run([screen.parent / "draw", screen, "once"], check=True, timeout=60)
        drawn.append(screen.read_bytes())
        screen.write_bytes(bytes(WIDTH * HEIGHT * 4))
    assert drawn[0] == drawn[1]
    assert _pieces(drawn[0]) < 1.01
