"""A skip that may not be fails the run, wherever it comes from; what a stand-in showed is told at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONFTEST = """
import sys
sys.path.insert(0, {checkout!r})
from tests.conftest import *
from tests.support import skips

skips.MISSING = {{"no moon": lambda: True, "no sun": lambda: False}}
"""

TESTS = """
import pytest
from tests.support import skips

def test_what_is_missing():
    skips.skip_without("no moon", "it is day")

def test_what_is_there():
    skips.skip_without("no sun", "it is night")

def test_what_nobody_listed():
    pytest.skip("no moon at all")

@pytest.mark.skip(reason="not today")
def test_marked():
    pass

@pytest.fixture
def missing():
    pytest.skip("a package is missing")

def test_by_its_fixture(missing):
    pass

@pytest.mark.xfail(reason="known", strict=True)
def test_known():
    assert False

@pytest.mark.parametrize("number", range(2))
def test_another_way(request, number):
    skips.stood_in(request.node, "a lamp, for the sun")
"""

MODULE = """
import pytest
pytest.importorskip("no_such_module")
"""


def test_only_what_is_really_missing_may_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra\nmarkers =\n    needs_root: as here\n")
    (tmp_path / "conftest.py").write_text(CONFTEST.format(checkout=str(Path(__file__).parents[1])))
    (tmp_path / "test_it.py").write_text(TESTS)
    report = _run(tmp_path, "-n", "1")  # as `make test`: reports come from another process
    for name in ("what_is_there", "what_nobody_listed", "marked", "by_its_fixture"):
        assert f" test_it.py::test_{name}" in report
    assert "it may not be skipped (which may be: tests/support/skips.py): a package is missing" in report
    assert "no moon: it is day" in report
    assert report.count("stand-in: a lamp, for the sun") == 1
    assert "2 failed, 2 passed, 1 skipped, 1 xfailed, 2 errors" in report
    (tmp_path / "test_module.py").write_text(MODULE)
    report = _run(tmp_path)
    assert "no_such_module" in report
    assert "it may not be skipped" in report


def _run(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "pytest", "--basetemp", str(folder / "base"), "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2), done.stdout
    return done.stdout
