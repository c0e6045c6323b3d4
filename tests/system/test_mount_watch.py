"""`lazymem status --watch` on a terminal over a real mount, and `--json` with the same numbers."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pty
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.cli.status import read_status
from lazymem.fs import session
from tests.support.mounts import WAIT_SECONDS, Mounted, Stage, command, wait_until
from tests.support.snapshots import BuiltSnapshot


class Watching:
    """A command in a terminal of 100 by 40; `text` is all that it ever wrote."""

    def __init__(self, words: list[str]) -> None:
        self._master, slave = pty.openpty()
        environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        self.process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=environ)
        os.close(slave)
        self._chunks: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def text(self) -> str:
        return b"".join(self._chunks).decode(errors="replace")

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while chunk := os.read(self._master, 65536):
                self._chunks.append(chunk)

    def wait_for(self, part: str) -> None:
        wait_until(lambda: part in self.text, f"{part!r} in {self.text[-2000:]!r}")

    def wait_ended(self) -> int:
        code = self.process.wait(WAIT_SECONDS)
        self._reader.join(WAIT_SECONDS)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait_ended()
        os.close(self._master)


@pytest.fixture
def mount(mounts: Stage, snapshot: BuiltSnapshot) -> Mounted:
    return mounts.mount(mounts.serve(snapshot.folder).address, "--prefetch", "none")


@pytest.fixture
def watching(mount: Mounted) -> Iterator[Watching]:
    view = Watching(command("lazymem.cli.status", mount.path, "--watch"))
    yield view
    view.close()


def _touch_all(mount: Mounted) -> None:
    with mount.open_map() as ram:
        for offset in range(0, len(ram), mmap.PAGESIZE):
            ram[offset]


def _unmount_beside(mount: Mounted) -> None:
    """A look at a mount keeps it busy as long as it lasts."""
    wait_until(lambda: session.unmount(str(mount.path)), "a moment without a look at it")
    mount.wait_ended()


def test_it_shows_what_happens_until_the_mount_ends(mount: Mounted, watching: Watching) -> None:
    watching.wait_for("held ")
    _touch_all(mount)
    watching.wait_for("held 100.0%")
    watching.wait_for("all is here")
    watching.wait_for("waits of demand faults: p50")
    _unmount_beside(mount)
    assert watching.wait_ended() == 0
    assert "the mount has ended" in watching.text
    assert "Traceback" not in watching.text


def test_ctrl_c_ends_the_view_and_not_the_mount(mount: Mounted, watching: Watching) -> None:
    watching.wait_for("a letter")
    watching.process.send_signal(signal.SIGINT)
    assert watching.wait_ended() == 0
    assert "Traceback" not in watching.text
    assert mount.status()["pages_total"] > 0


def test_json_has_the_same_numbers(mount: Mounted) -> None:
    before = read_status(str(mount.path), with_map=True)["map"]
    assert not any(before["demanded"] + before["written"])
    _touch_all(mount)
    with mount.open_map() as ram:
        ram[0:4] = b"mine"
        ram.flush()
    mount.wait_kept()  # what is not held is missing on the map
    asked = subprocess.run(
        command("lazymem.cli.status", mount.path, "--json"), capture_output=True, check=True, timeout=WAIT_SECONDS
    )
    record = json.loads(asked.stdout)
    found = record["map"]
    assert found["written"][0] > 0
    assert sum(found["written"]) == found["written"][0]
    for cell in zip(found["guessed"], found["demanded"], found["written"], strict=True):
        assert sum(cell) == pytest.approx(1.0, abs=0.002)
    assert any(found["demanded"])
    assert sum(count for _, count in record["fetch"]["wait_octaves"]) > 0


def test_watched_json_has_rates_a_line_a_look(mount: Mounted) -> None:
    words = command("lazymem.cli.status", mount.path, "--watch", "--json")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert first["rates"]["ram_bytes_per_second"] == 0
        _touch_all(mount)
        found = first
        while found["seconds_to_go"] != 0:
            found = json.loads(process.stdout.readline())
        assert found["rates"]["ram_bytes_per_second"] > 0
        assert found["rates"]["demand_faults_per_second"] > 0
        assert found["pages_held"] == found["pages_total"]
        assert any(found["map"]["demanded"])
        _unmount_beside(mount)
        assert process.wait(WAIT_SECONDS) == 0


def test_a_reader_of_json_lines_that_goes_away_ends_them_without_a_word(mount: Mounted) -> None:
    words = command("lazymem.cli.status", mount.path, "--watch", "--json")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(WAIT_SECONDS) == 0
        assert process.stderr.read() == ""


def test_without_a_mount_there_is_no_view(tmp_path: Path) -> None:
    done = subprocess.run(
        command("lazymem.cli.status", tmp_path, "--watch"), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 13
    assert "is not a lazymem mount" in done.stderr
    assert done.stdout == ""


def test_a_mount_in_front_shows_its_progress(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    address, point = mounts.serve(snapshot.folder).address, tmp_path / "front"
    point.mkdir()
    front = Watching(command("lazymem.cli.mount", address, point, "--cache", tmp_path / "cache", "-f"))
    try:
        front.wait_for("is ready")
        front.wait_for("all is here")
        front.process.send_signal(signal.SIGINT)
        assert front.wait_ended() == 0
    finally:
        subprocess.run(["umount", "-l", point], capture_output=True, check=False)
        front.close()
    assert "Traceback" not in front.text
