"""What is handed over to root's pytest: it runs there, and whatever goes wrong there is seen here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import skips
from tests.support.mounts import wait_until

CONFTEST = """
import sys
sys.path.insert(0, {checkout!r})
from tests.support import asroot, skips

def pytest_collection_modifyitems(items):
    if "no:cacheprovider" not in sys.argv:  # a command that changes nothing stands for sudo, so the child must know
        asroot.hand_over(items, {root!r})

def pytest_terminal_summary(terminalreporter):
    for reports in terminalreporter.stats.values():
        terminalreporter.write_line("\\n".join(skips.stand_ins(reports)))
"""

TESTS = """
import os, time
from pathlib import Path
import pytest

pytestmark = pytest.mark.needs_root("it is the only one")

@pytest.mark.parametrize("text", ["a [b]/c"])
def test_passes(text, tmp_path):
    assert text == "a [b]/c"
    Path("ran").write_text(str(tmp_path))
    assert "SECRET" not in os.environ
    assert os.environ["HOME"] in str(tmp_path)

def test_fails():
    print("1 passed in 0.01s")
    assert not "the child's own words"

def test_must_not_skip():
    pytest.skip("no such thing here")

@pytest.mark.needs_root("it shows something", else_in_place=True)
def test_in_place_or_told_of(request):
    from tests.support import skips
    skips.stood_in(request.node, "a lamp")

def test_waits(tmp_path):
    try:
        Path("waits").touch()
        time.sleep(100)
    finally:
        Path("cleaned up").touch()
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra\nmarkers =\n    needs_root: as here\n")
    (tmp_path / "tmp").mkdir()
    return tmp_path


def _start(project: Path, chosen: str, root: tuple[str, ...] | None = ("nice", "-n", "0")) -> subprocess.Popen[str]:
    (project / "conftest.py").write_text(CONFTEST.format(checkout=str(Path(__file__).parents[1]), root=root))
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-v", "--basetemp", project / "base", "-k", chosen],
        cwd=project,
        env={**os.environ, "TMPDIR": str(project / "tmp"), "SECRET": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def _report(project: Path, chosen: str, root: tuple[str, ...] | None = ("nice", "-n", "0")) -> str:
    with _start(project, chosen, root) as process:
        report, _ = process.communicate()
    assert os.listdir(project / "tmp") == [], "what it made is gone"
    assert not list(project.rglob("__pycache__"))
    return report


def test_it_runs_there(project: Path) -> None:
    report = _report(project, "test_passes")
    assert "test_it.py::test_passes[a [b]/c] PASSED" in report
    assert str(project / "tmp" / "lazymem-root-") in (project / "ran").read_text(), "in the child"
    assert "1 passed, 4 deselected" in report


def test_what_fails_or_skips_there_fails_here(project: Path) -> None:
    report = _report(project, "test_fails or skip")
    assert "test_it.py::test_fails FAILED" in report
    assert "the child's own words" in report
    assert "test_it.py::test_must_not_skip FAILED" in report
    assert "root may not skip it" in report
    assert "2 failed, 3 deselected" in report


def test_without_sudo_it_is_skipped_and_says_why(project: Path) -> None:
    report = _report(project, "test_passes", None)
    assert f"{skips.OWN_ROOT}: it is the only one" in report
    assert "1 skipped, 4 deselected" in report
    assert not (project / "ran").exists()


@pytest.mark.parametrize("root", [("nice", "-n", "0"), None])
def test_what_it_tells_of_is_told_here(project: Path, root: tuple[str, ...] | None) -> None:
    """Also where it runs in place, since there is no root."""
    report = _report(project, "in_place", root)
    assert "stand-in: a lamp\n" in report
    assert "1 passed, 4 deselected" in report


def test_an_interrupted_one_takes_down_what_it_made(project: Path) -> None:
    with _start(project, "test_waits") as process:
        wait_until((project / "waits").exists, "it runs")
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 2
    assert (project / "cleaned up").exists()
    assert os.listdir(project / "tmp") == []
