"""`lazymem demo` as a user runs it: right, with real figures, and gone without a trace, also when interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lazymem.cli import demo
from lazymem.demo.runs import Figures
from tests.support.mounts import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

COMMAND = [sys.executable, "-m", "lazymem.cli.demo"]


@pytest.fixture
def place() -> Iterator[Path]:
    """The demo's TMPDIR, which it must leave empty, with no mount and no process of its own."""
    with tempfile.TemporaryDirectory(prefix="lazymem-") as folder:
        yield Path(folder)
        assert os.listdir(folder) == []
        assert folder not in Path("/proc/self/mountinfo").read_text()
        # The mount's supervisor, and its next daemon, end behind the daemon that the demo waits for.
        wait_until(lambda: processes_that_mention(folder) == [], "all of its processes to end")


def processes_that_mention(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and entry.name != str(os.getpid()):
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if text in command:
                found.append(command.replace("\0", " "))
    return found


def run(place: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TMPDIR": str(place)}
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, check=False, env=environment)


def cells(output: str) -> dict[str, str]:
    """The table's first two columns."""
    rows = [line.split("│") for line in output.splitlines()]
    return {row[1].strip(): row[2].strip() for row in rows if row[2:]}


def test_every_page_on_demand_is_right(place: Path) -> None:
    done = run(place, "--guest", "pages", "--memory", "32", "--prefetch", "none")
    assert done.returncode == 0, done.stdout + done.stderr
    table = cells(done.stdout)
    assert table["RAM"] == "32 MiB"
    assert table["of that in the stream"] == "0 bytes"
    demanded, total = map(int, table["pages on demand"].split(" of "))
    checked = int(table["checked by the guest"].split()[0])
    assert total == 32 * 256 >= demanded >= checked > 7000
    assert table["pages ahead of that"] == "0"
    assert table["wrong pages"] == "0"


def test_linux_finds_its_memory(place: Path) -> None:
    done = run(place, "--guest", "linux")
    assert done.returncode == 0, done.stdout + done.stderr
    table = cells(done.stdout)
    assert table["RAM"] == "256 MiB"
    assert table["of that in the stream"] == "0 bytes"
    assert table["checked by the guest"] == "32 MiB, checksum same"


@pytest.mark.parametrize("phase", ["fills its RAM", "serving and mounting", "verifies all its pages"])
def test_interrupted_anywhere_it_clears_up(place: Path, phase: str) -> None:
    environment = os.environ | {"TMPDIR": str(place)}
    # One that stands at its end: the interrupt may be late.
    command = [sys.executable, "-m", "tests.support.standingdemo", "--guest", "pages", "--memory", "64"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert any(phase in line for line in process.stdout)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, error
    assert "interrupted" in error
    assert "Traceback" not in error


FIGURES = Figures(
    guest="made up",
    ram_bytes=1 << 20,
    ram_in_stream_bytes=0,
    vmstate_bytes=1000,
    ram_way="move",
    mount_seconds=0.1,
    start_seconds=0.2,
    total_pages=256,
    demanded_pages=6,
    ahead_pages=250,
    wrong_pages=0,
    check="256 pages",
    good=True,
)


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 1)])
def test_a_wrong_page_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], good: bool, code: int
) -> None:
    wrong = replace(FIGURES, wrong_pages=0 if good else 3, good=good)
    monkeypatch.setattr(demo, "run_pages", lambda *_: wrong)
    assert demo.main(["--guest", "pages"]) == code
    assert "wrong pages" in capsys.readouterr().out


def test_without_qemu_the_linux_guest_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_qemu", lambda: None)
    monkeypatch.setattr(demo, "run_pages", lambda *_: FIGURES)
    assert demo.main([]) == 0
    assert "no QEMU here" in capsys.readouterr().out


def test_a_full_disk_is_found_before(place: Path) -> None:
    done = run(place, "--guest", "pages", "--memory", "65536")
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    if free > 4 << 36:
        pytest.fail("this disk is too large for the test")
    assert done.returncode == 15
    assert "TMPDIR" in done.stderr
