"""Rule 2: a write is acknowledged only once its bytes outlive the daemon. Daemons are killed to see."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.pages import PAGE_SIZE
from tests.support.snapshots import make_snapshot
from tests.support.stores import opened_store

ROOT = Path(__file__).resolve().parents[2]
PAGES = 64

WRITER = """
import itertools, os, random, signal, sys
from pathlib import Path
import trio
from tests.support.snapshots import make_snapshot
from tests.support.stores import opened_store

async def main(folder, state, kill_after):
    snapshot = make_snapshot(folder / "snapshot", pages=64, seed=21)
    choose = random.Random(1)
    async with opened_store(snapshot, folder / "cache", state) as store:
        for number in itertools.count(1):
            offset, length = choose.randrange(64 * 4096 - 9000), choose.randint(1, 9000)
            await store.ram.write(offset, bytes([number % 251]) * length)
            os.write(1, b"%d %d %d\\n" % (offset, length, number % 251))
            if number == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
trio.run(main, folder, folder / "state" if sys.argv[2] == "named" else None, int(sys.argv[3]))
"""


def run_writer(folder: Path, kind: str, kill_after: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, str(folder), kind, str(kill_after)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def apply(lines: bytes, model: bytearray) -> int:
    """Whole lines only: an acknowledgement that was cut in the pipe is none."""
    done = 0
    for line in lines.split(b"\n")[:-1]:
        offset, length, value = map(int, line.split())
        model[offset : offset + length] = bytes([value]) * length
        done += 1
    return done


@pytest.mark.parametrize("kill_after", [1, 2, 40])
async def test_every_acknowledged_write_is_there_after_a_kill(tmp_path: Path, kill_after: int) -> None:
    child = run_writer(tmp_path, "named", kill_after)
    lines, _ = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    snapshot = make_snapshot(tmp_path / "snapshot", pages=PAGES, seed=21)
    model = bytearray(snapshot.ram)
    assert apply(lines, model) == kill_after
    async with opened_store(snapshot, tmp_path / "cache", tmp_path / "state") as store:
        assert await store.ram.read(0, len(model)) == model


async def test_a_kill_at_any_moment_loses_no_acknowledged_write(tmp_path: Path) -> None:
    """Killed from outside, in the middle of things: all but the write that was under way is exactly there."""
    child = run_writer(tmp_path, "named", 0)
    assert child.stdout
    lines = b"".join(child.stdout.readline() for _ in range(100))
    child.kill()
    rest, _ = child.communicate(timeout=60)
    snapshot = make_snapshot(tmp_path / "snapshot", pages=PAGES, seed=21)
    model = bytearray(snapshot.ram)
    done = apply(lines + rest, model)
    assert done >= 100
    async with opened_store(snapshot, tmp_path / "cache", tmp_path / "state") as store:
        found = await store.ram.read(0, len(model))
    # The one write that may be there without having been acknowledged.
    differing = [at for at in range(len(model)) if found[at] != model[at]]
    assert all(found[at] == (done + 1) % 251 for at in differing)
    assert not differing or differing[-1] - differing[0] < 9000


async def test_a_killed_run_without_a_name_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    child = run_writer(tmp_path, "private", 5)
    child.communicate(timeout=60)
    snapshot = make_snapshot(tmp_path / "snapshot", pages=PAGES, seed=21)
    assert len(list((tmp_path / "cache").glob("run-*"))) == 1
    async with opened_store(snapshot, tmp_path / "cache") as store:
        (own,) = (tmp_path / "cache").glob("run-*")
        assert store.state
        assert store.state.path == own
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram
        async with opened_store(snapshot, tmp_path / "cache") as other:
            await other.ram.write(0, bytes(PAGE_SIZE))
            assert own.exists(), "a run that lives is left alone"
            assert len(list((tmp_path / "cache").glob("run-*"))) == 2
    assert not list((tmp_path / "cache").glob("run-*"))
