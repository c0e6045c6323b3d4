"""Pixels as differences, in planes: what is taken apart comes together as it was, whatever it is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis.strategies import binary, lists

from lazymem.errors import EnvironmentRefusedError
from lazymem.handover.planes import Planes, load

MOST = 4096


@pytest.fixture(scope="module")
def planes() -> Planes:
    return Planes(MOST)


@given(lists(binary(max_size=MOST), max_size=3), lists(binary(max_size=70), max_size=20))
@example([b"", b"a", b"abc", b"abcd", b"abcde", b"\xff" * MOST, b"\0" * MOST], [])
def test_what_is_taken_apart_comes_together(planes: Planes, large: list[bytes], small: list[bytes]) -> None:
    """In turns: nothing of one is left for the next."""
    for data in [*large, *small]:
        apart = bytes(planes.take_apart(data))
        assert len(apart) == len(data)
        assert planes.put_together(apart) == data
        assert bytes(planes.take_apart(memoryview(b"x" + data)[1:])) == apart


@given(binary(max_size=MOST))
def test_as_the_words_say(planes: Planes, data: bytes) -> None:
    count = len(data) // 4
    whole, rest = data[: 4 * count], data[4 * count :]
    differences = bytes(byte ^ before for byte, before in zip(whole, bytes(4) + whole, strict=False))
    assert planes.take_apart(data) == b"".join(differences[at::4] for at in range(4)) + rest


_IN_A_NEW_PROCESS = """
import sys
import lazymem.cli.send, lazymem.cli.receive, lazymem.handover.relay
assert "numpy" not in sys.modules
from lazymem.handover import planes
planes.use_one_thread()
planes.load()
assert "numpy" in sys.modules
print(len(list(__import__("os").scandir("/proc/self/task"))))
"""


def test_numpy_comes_late_and_brings_no_threads() -> None:
    clean = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", _IN_A_NEW_PROCESS], env=clean, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1"]


_ASIDE = """
import sys, threading
from lazymem.handover import planes
planes.start_loading()
[thread] = [thread for thread in threading.enumerate() if thread.name == "numpy"] or [None]
if thread is not None:
    thread.join()
assert "numpy" in sys.modules
"""


def test_it_is_loaded_aside() -> None:
    subprocess.run([sys.executable, "-c", _ASIDE], check=True)


def test_a_host_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(EnvironmentRefusedError, match="numpy does not load here: "):
        load()
    with pytest.raises(EnvironmentRefusedError, match="numpy does not load here: "):
        Planes(MOST)
