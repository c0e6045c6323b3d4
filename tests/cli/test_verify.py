"""`lazymem verify`: names every wrong page of snapshots, deltas and caches, and says nothing against right ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lazymem.cli import verify
from lazymem.errors import VerificationError
from lazymem.pages import PAGE_SIZE
from lazymem.store import cachefolder
from tests.support.deltas import make_delta
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stores import opened_store

WRONG_BYTES = VerificationError.exit_code


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        (old,) = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([old ^ 1]), at)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = verify.main([*map(str, arguments), "--json"])
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert record["ok"] == (code == 0)
    return code, record


@pytest.fixture
def snapshot(tmp_path: Path) -> BuiltSnapshot:
    return make_snapshot(tmp_path / "web", pages=600, seed=11)


def test_a_right_snapshot(snapshot: BuiltSnapshot, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = run(capsys, snapshot.folder)
    (found,) = record["checked"]
    assert code == 0
    assert (found["kind"], found["pages_total"], found["pages_checked"]) == ("snapshot", 600, 600)
    assert found["identity"] == snapshot.identity.hex()
    assert verify.main([str(snapshot.folder)]) == 0
    assert "600 of 600 pages held against their digests: all right" in capsys.readouterr().out


def test_every_wrong_page_is_named(snapshot: BuiltSnapshot, capsys: pytest.CaptureFixture[str]) -> None:
    hole = next(page for page in range(600) if not any(snapshot.page(page)))
    full = next(page for page in range(300, 600) if any(snapshot.page(page)))
    flip(snapshot.folder / "pc.ram", full * PAGE_SIZE + 4095)
    flip(snapshot.folder / "pc.ram", hole * PAGE_SIZE)
    code, record = run(capsys, snapshot.folder)
    assert code == WRONG_BYTES
    assert record["checked"][0]["wrong"] == sorted([[hole, 1], [full, 1]])
    assert verify.main([str(snapshot.folder)]) == WRONG_BYTES
    assert f"2 wrong pages, which nobody is served: {min(hole, full)}, {max(hole, full)}" in capsys.readouterr().out


def test_a_page_that_became_a_hole_is_wrong(snapshot: BuiltSnapshot, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(snapshot.folder / "pc.ram", 0)
    os.truncate(snapshot.folder / "pc.ram", len(snapshot.ram))
    code, record = run(capsys, snapshot.folder)
    assert code == WRONG_BYTES
    assert record["checked"][0]["pages_wrong"] == sum(any(snapshot.page(page)) for page in range(600))


def test_changed_digests_of_a_leaf(snapshot: BuiltSnapshot, capsys: pytest.CaptureFixture[str]) -> None:
    flip(snapshot.folder / "pc.ram.digests", 256 * 16)
    code, record = run(capsys, snapshot.folder)
    assert code == WRONG_BYTES
    assert record["checked"][0]["unknown"] == [[256, 256]]


def test_a_changed_upper_level_or_manifest(snapshot: BuiltSnapshot, capsys: pytest.CaptureFixture[str]) -> None:
    flip(snapshot.folder / "pc.ram.digests", 600 * 16)
    code, record = run(capsys, snapshot.folder)
    assert code == 5
    assert "not the digest tree" in record["error"]


@pytest.mark.parametrize("change", ["bytes", "size", "missing"])
def test_a_changed_vmstate(snapshot: BuiltSnapshot, capsys: pytest.CaptureFixture[str], change: str) -> None:
    path = snapshot.folder / "vmstate"
    if change == "missing":
        path.unlink()
    elif change == "size":
        os.truncate(path, 3)
    else:
        flip(path, 2)
    code, record = run(capsys, snapshot.folder)
    assert code == WRONG_BYTES
    assert "vmstate" in record["checked"][0]["problems"][0]


@pytest.mark.parametrize("change", ["bytes", "missing"])
def test_changed_sums(snapshot: BuiltSnapshot, capsys: pytest.CaptureFixture[str], change: str) -> None:
    path = snapshot.folder / "pc.ram.sums"
    if change == "missing":
        path.unlink()
    else:
        flip(path, 2)
    code, record = run(capsys, snapshot.folder)
    assert code == WRONG_BYTES
    assert "pc.ram.sums" in record["checked"][0]["problems"][0]


def test_a_delta_with_its_parent(snapshot: BuiltSnapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    written = {page: bytes([page % 251]) * PAGE_SIZE for page in (3, 4, 5, 300)}
    delta = tmp_path / "elsewhere" / "web-2"
    make_delta(delta, snapshot.folder, written, parents=(snapshot.folder,))
    assert verify.main([str(delta)]) == 5
    assert "--parent" in capsys.readouterr().err
    code, record = run(capsys, delta, "--parent", snapshot.folder)
    assert (code, record["checked"][0]["kind"], record["checked"][0]["pages_checked"]) == (0, "delta", 600)
    flip(delta / "pc.ram.delta", 3 * PAGE_SIZE)
    code, record = run(capsys, delta, "--parent", snapshot.folder)
    assert (code, record["checked"][0]["wrong"]) == (WRONG_BYTES, [[300, 1]])


@pytest.mark.parametrize("hashed", [True, False])
async def test_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str], hashed: bool) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=600, seed=12, hashed=hashed)
    full = next(page for page in range(300, 400) if any(snapshot.page(page)))
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.ram.read(300 * PAGE_SIZE, 100 * PAGE_SIZE)
        held = store.ram.held_pages
        folder = store.cache.path
    code, record = run(capsys, tmp_path / "cache")
    (found,) = record["checked"]
    assert (code, found["pages_checked"], found["identity"]) == (0, held, snapshot.identity.hex())
    flip(folder / cachefolder.PAGES_NAME, full * PAGE_SIZE)
    assert run(capsys, folder)[1]["checked"][0]["wrong"] == [[full, 1]]
    flip(folder / cachefolder.DIGESTS_NAME, (full + 1) * 16)
    code, record = run(capsys, folder)
    (found,) = record["checked"]
    assert code == WRONG_BYTES
    if hashed:
        assert found["pages_unknown"] >= 100, "nothing of that leaf can be believed"
    else:
        assert found["wrong"] == [[full, 2]]


@pytest.mark.parametrize("value", [1, 2, 77])
async def test_a_map_that_says_what_is_not_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: int) -> None:
    """After a crash of the host it may: held, and there is nothing."""
    snapshot = make_snapshot(tmp_path / "web", pages=600, seed=12)
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.ram.read(0, PAGE_SIZE)
        folder = store.cache.path
    (folder / cachefolder.MAP_NAME).write_bytes(bytes([value]) * 600)
    os.chmod(folder / cachefolder.MAP_NAME, 0o600)
    code, record = run(capsys, folder)
    assert code == WRONG_BYTES
    assert record["checked"][0]["pages_wrong"] + record["checked"][0]["pages_unknown"] > 500


def missing(folder: Path) -> None:
    """Nothing there."""


def empty(folder: Path) -> None:
    folder.mkdir()


def unhashed(folder: Path) -> None:
    make_snapshot(folder, pages=4, hashed=False)


def state(folder: Path) -> None:
    folder.mkdir()
    (folder / "state.json").write_text("{}")


@pytest.mark.parametrize(
    ("make", "text"),
    [(missing, "does not exist"), (empty, "neither"), (unhashed, "no digests"), (state, "a state folder")],
)
def test_what_cannot_be_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], text: str
) -> None:
    make(tmp_path / "it")
    assert verify.main([str(tmp_path / "it")]) == 5
    assert text in capsys.readouterr().err


def test_a_page_that_the_disk_does_not_give(
    snapshot: BuiltSnapshot, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    bad = next(page for page in range(600) if any(snapshot.page(page)))

    def failing(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if offset <= bad * PAGE_SIZE < offset + sum(map(len, buffers)) and os.readlink(f"/proc/self/fd/{fd}").endswith(
            "pc.ram"
        ):
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", failing)
    code, record = run(capsys, snapshot.folder)
    assert (code, record["checked"][0]["unreadable"]) == (15, [[bad, 1]])


def test_ctrl_c_says_how_far_it_was(tmp_path: Path) -> None:
    """A huge hole, each page of which is held against its digest: long enough for anybody's ctrl-C."""
    folder = make_snapshot(tmp_path / "web", pages=64).folder
    program = (
        "import sys; from lazymem.cli import verify; from lazymem.snapshot import checking\n"
        "real = checking.CheckableSnapshot.check\n"
        "def slow(self):\n"
        "    yield from real(self)\n"
        "    print('begun', file=sys.stderr, flush=True)\n"
        "    while True: yield from real(self)\n"
        "checking.CheckableSnapshot.check = slow\n"
        "sys.exit(verify.main(sys.argv[1:]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        assert process.stderr.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "not all of them" in out
