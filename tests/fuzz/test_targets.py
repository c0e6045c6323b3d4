"""Every fuzz target over its seeds and corpus, then over mutations of those; `make fuzz` goes on from there."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import CORPUS, seeds
from tests.fuzz.targets import TARGETS

MOST_PEAK_BYTES = 4 << 20
"""Of memory for an input of at most 4 KiB: it may hold a MiB of compressed pages, and they are looked at twice."""

MUTATED_EXAMPLES = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seeds")


@pytest.mark.parametrize("name", TARGETS)
def test_corpus(folder: Path, name: str) -> None:
    """And each seed cut anywhere in its first bytes, and at its end."""
    found = seeds(name, folder / name)
    assert found
    for data in found:
        TARGETS[name](data)
        for length in {*range(min(len(data), 40)), max(0, len(data) - 1)}:
            TARGETS[name](data[:length])
        TARGETS[name](data + b"\0")


@pytest.mark.parametrize("name", TARGETS)
def test_memory_is_bounded(folder: Path, name: str) -> None:
    found = seeds(name, folder / f"{name}-memory")
    TARGETS[name](found[0])  # what is loaded once
    tracemalloc.start()
    try:
        for data in found:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            TARGETS[name](data)
            assert tracemalloc.get_traced_memory()[1] - before < MOST_PEAK_BYTES, data[:64]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
def test_mutations(folder: Path, name: str) -> None:
    found = seeds(name, folder / f"{name}-mutations")

    @settings(max_examples=MUTATED_EXAMPLES, database=None)
    @given(st.sampled_from(found), st.sampled_from(found), st.randoms(use_true_random=False))
    def run(data: bytes, other: bytes, choose: random.Random) -> None:
        for _ in range(10):
            TARGETS[name](_mutated(data, other, choose))

    run()


_NUMBERS = [b"\0" * 8, b"\xff" * 8, b"\xff" * 4, b"\x7f", b"\x80", b"\0\0\0\x80", b"\1\0\0\0", b"\0\0\0\1", b"\xff\xff"]


def _mutated(data: bytes, other: bytes, choose: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        at = choose.randint(0, len(found))
        kind = choose.randrange(5)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            number = choose.choice(_NUMBERS)
            found[at : at + len(number)] = number
        elif kind == 2:
            del found[at : at + choose.randint(1, 16)]
        elif kind == 3:
            found[at:at] = found[at : at + choose.randint(1, 64)]
        else:
            start = choose.randint(0, len(other))
            found[at:] = other[start:]
    return bytes(found[:8192])


def test_the_corpus_is_small_and_belongs_to_targets() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} <= set(TARGETS)
    assert sum(path.stat().st_size for path in files) < 512 << 10
