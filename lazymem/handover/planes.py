"""Pixels as differences, in planes: what a screen is before it is compressed, where that makes it smaller.

Each four bytes become their difference (xor) from the four before, and then all first bytes come together, all second
ones, and so on, a plane for each channel of colour, as PNG's filters and Blosc's shuffle have it. Where a pixel begins
does not matter: an emulator's stream has a header of 8 bytes between pages, and a name of any length in front of them.

With numpy, which is loaded late and takes 0.03 to 0.2 s for that: `start_loading` belongs where no guest stands.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from lazymem.errors import EnvironmentRefusedError

_PIXEL_BYTES = 4


def use_one_thread() -> None:
    """For whoever will `load`, while this process has one thread: else numpy's linear algebra, which nobody needs here,
    starts a thread for each processor. Our children inherit the variable, and have no numpy."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def load() -> None:
    """What a `Planes` needs.

    Raises:
        EnvironmentRefusedError: it cannot be (numpy refuses processors that are too old for how it was built).
    """
    try:
        import numpy  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise EnvironmentRefusedError(f"numpy does not load here: {' '.join(str(error).split())}") from error


def start_loading() -> None:
    """`load` in a thread that ends with it: trio keeps its threads, and one that began before this process asked for
    short slices of the processor would have to work while a guest stands. Who needs it first is told what is wrong."""

    def run() -> None:
        with suppress(EnvironmentRefusedError):
            load()

    threading.Thread(target=run, name="numpy").start()


class Planes:
    """For one thread, and pieces of `most_bytes` bytes at most."""

    def __init__(self, most_bytes: int) -> None:
        """
        Raises:
            EnvironmentRefusedError: as `load`.
        """
        load()
        import numpy

        self._numpy = numpy
        self._pixels = numpy.zeros(most_bytes // _PIXEL_BYTES + 1, "<u4")
        self._others = numpy.zeros_like(self._pixels)
        self._bytes = bytearray(most_bytes)

    def take_apart(self, data: bytes | memoryview) -> memoryview:
        """As many bytes, valid until the next call. Up to three that make no pixel are last, as they are."""
        numpy, count = self._numpy, len(data) // _PIXEL_BYTES
        whole = count * _PIXEL_BYTES
        pixels, differences, shifted = numpy.frombuffer(data, "<u4", count), self._pixels[:count], self._others[:count]
        differences[:1] = pixels[:1]
        numpy.bitwise_xor(pixels[1:], pixels[:-1], out=differences[1:])
        planes = numpy.frombuffer(self._bytes, "u1", whole).reshape(_PIXEL_BYTES, count)
        for at in range(_PIXEL_BYTES):
            numpy.right_shift(differences, numpy.uint32(8 * at), out=shifted)
            numpy.copyto(planes[at], shifted, casting="unsafe")
        self._bytes[whole : len(data)] = data[whole:]
        return memoryview(self._bytes)[: len(data)]

    def put_together(self, data: bytes) -> bytes:
        """What `take_apart` was given."""
        numpy, count = self._numpy, len(data) // _PIXEL_BYTES
        whole = count * _PIXEL_BYTES
        planes = numpy.frombuffer(data, "u1", whole).reshape(_PIXEL_BYTES, count)
        pixels, plane = self._pixels[:count], self._others[:count]
        pixels.fill(0)
        for at in reversed(range(_PIXEL_BYTES)):
            numpy.left_shift(pixels, numpy.uint32(8), out=pixels)
            numpy.copyto(plane, planes[at])
            numpy.bitwise_or(pixels, plane, out=pixels)
        numpy.bitwise_xor.accumulate(pixels, out=pixels)
        return pixels.tobytes() + data[whole:]
