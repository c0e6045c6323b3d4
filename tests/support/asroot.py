"""Tests that only root can do (`needs_root`): root does them in place; others' each go to a pytest of a root's own.

That root is the machine's, by sudo, or a user namespace's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.support import skips

_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TMPDIR", "CI")
"""All else of the user's is kept from root: files would get into his folders that he cannot remove."""

_LAST_LINE = re.compile(r"^1 (passed|skipped)(, \d+ warnings?)? in ", re.MULTILINE)


class AsRoot(pytest.Item):
    """Stands here for the test of its name. Fixtures and time limit are the child's, so it is no `pytest.Function`."""

    def __init__(self, *, test: pytest.Item, root: tuple[str, ...], **other: Any) -> None:
        super().__init__(**other)
        self._test = test
        self._root = root
        self.add_marker(pytest.mark.timeout(0))

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        return self._test.reportinfo()

    def runtest(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="lazymem-root-"))
        try:
            code, output = self._run(folder)
        finally:
            self._remove(folder)
        last = _LAST_LINE.search(output)
        if code or last is None:
            pytest.fail(f"as root it ended with {code}:\n{output}", pytrace=False)
        if last[1] == "skipped":
            pytest.fail(f"root may not skip it:\n{output}", pytrace=False)
        skips.stood_in_elsewhere(self, output)

    def _run(self, folder: Path) -> tuple[int, str]:
        """Exit code and all that it printed: to a file, since a pipe ends only with all who hold it."""
        log = folder / "output"
        with open(log, "wb") as output:
            # A group of its own: Ctrl-C reaches it once, from here, so that it can take down what it started.
            process = subprocess.Popen(
                [*self._root, *self._command(folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.config.rootpath,
                process_group=0,
            )
            try:
                code = process.wait()
            finally:
                if process.poll() is None:
                    # The shell's: a minimal Debian has no program of that name.
                    subprocess.run([*self._root, "sh", "-c", f"kill -INT {process.pid}"], check=False)
                    process.wait()
        return code, log.read_text(errors="replace")

    def _command(self, folder: Path) -> list[str]:
        environ = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environ["PATH"] = environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"  # an ordinary user's has them not
        environ |= {"HOME": str(folder), "COLUMNS": "1000", "PYTHONDONTWRITEBYTECODE": "1"}
        environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
        words = ["env", "-i", *(f"{name}={value}" for name, value in environ.items())]
        words += [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"]
        limit = self.config.getoption("timeout", None)
        if limit is not None:
            words.append(f"--timeout={limit}")
        return [*words, f"--basetemp={folder / 't'}", self.nodeid]

    def _remove(self, folder: Path) -> None:
        """No mount that it may have left behind is emptied; that there is one fails the test."""
        command = [*self._root, "rm", "-rf", "--one-file-system", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def hand_over(items: list[pytest.Item], root: tuple[str, ...] | None) -> None:
    """Those of `items` that need root get it by `root`, put before a command.

    None: they are skipped and say why, but those that say `else_in_place`, which show without root what can be shown.
    """
    for place, item in enumerate(items):
        marker = item.get_closest_marker("needs_root")
        if marker is None or (root is None and marker.kwargs.get("else_in_place")):
            continue
        if root is None:
            item.add_marker(pytest.mark.skip(reason=f"{skips.OWN_ROOT}: {marker.args[0]}"))
        else:
            assert item.parent is not None
            items[place] = AsRoot.from_parent(item.parent, name=item.name, test=item, root=root)
