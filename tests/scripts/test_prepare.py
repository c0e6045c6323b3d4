"""The set-up script: what it takes for missing, what it installs, how it becomes root; without installing anything."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "prepare.py"


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, its cache in a folder of its own."""
    spec = importlib.util.spec_from_file_location("prepare_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "GUEST_PARTS", tmp_path / ".cache" / "linux-guest")
    return module


class Commands:
    """Stands in for subprocess.run: keeps what was to be run, answers with the given exit codes."""

    def __init__(self, *codes: int) -> None:
        self.ran: list[list[str]] = []
        self._codes = list(codes)

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.ran.append(command)
        code = self._codes.pop(0) if self._codes else 0
        return subprocess.CompletedProcess(command, code, stdout="", stderr="")


def test_here_nothing_is_missing(prepare: ModuleType) -> None:
    """These tests run in what the script made."""
    assert [need.purpose for need in prepare.NEEDS if not need.there()] == []


def test_only_what_is_missing_is_installed(prepare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"installed": False}
    needs = (
        prepare.Need("there", lambda: True, ("not-this",)),
        prepare.Need("missing", lambda: found["installed"], ("b", "a")),
        prepare.Need("missing too", lambda: found["installed"], ("a",)),
    )
    installed: list[list[str]] = []

    def install(packages: list[str]) -> None:
        installed.append(packages)
        found["installed"] = True

    monkeypatch.setattr(prepare, "require_apt", lambda _: None)
    monkeypatch.setattr(prepare, "apt_install", install)
    prepare.install_missing(needs)
    prepare.install_missing(needs)
    assert installed == [["a", "b"]]


def test_a_package_that_does_not_help_is_an_error(prepare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "require_apt", lambda _: None)
    monkeypatch.setattr(prepare, "apt_install", lambda _: None)
    with pytest.raises(SystemExit, match="still missing: a unicorn"):
        prepare.install_missing((prepare.Need("a unicorn", lambda: False, ("horse",)),))


def test_new_lists_only_when_the_old_ones_do_not_do(
    prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "x_Packages").touch()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(prepare.Path, "glob", lambda *_: iter([tmp_path / "x_Packages"]))
    for codes, updates in (((0,), 0), ((100, 0, 0), 1)):
        commands = Commands(*codes)
        monkeypatch.setattr(subprocess, "run", commands)
        prepare.apt_install(["fuse3"])
        assert sum("update" in command for command in commands.ran) == updates
        install = commands.ran[-1]
        assert install[:2] == ["env", "DEBIAN_FRONTEND=noninteractive"]
        assert install[-1] == "fuse3"
        assert "--no-install-recommends" in install
    monkeypatch.setattr(subprocess, "run", Commands(100, 0, 100))
    with pytest.raises(SystemExit, match="could not install fuse3"):
        prepare.apt_install(["fuse3"])


def test_sudo_for_users_and_a_clear_word_without_it(prepare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(prepare.shutil, "which", lambda *_, **__: "/usr/bin/sudo")
    assert prepare.as_root(["apt-get", "update"], "lists")[:3] == ["sudo", "env", "DEBIAN_FRONTEND=noninteractive"]
    monkeypatch.setattr(prepare.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match=r"not root and no sudo; needed for lists\. As root: apt-get update"):
        prepare.as_root(["apt-get", "update"], "lists")


def test_without_apt_the_packages_are_named(prepare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match=r"no apt-get here.*libfuse3-dev fuse3"):
        prepare.require_apt(["libfuse3-dev", "fuse3"])


def test_a_dynamic_busybox_is_no_use(prepare: ModuleType, tmp_path: Path) -> None:
    assert not prepare.is_static(Path(sys.executable).resolve())
    assert not prepare.is_static(tmp_path / "none")
    (tmp_path / "script").write_text("#!/bin/sh\n")
    assert not prepare.is_static(tmp_path / "script")
    (tmp_path / "static").write_bytes(b"\x7fELF" + bytes(8000))
    assert prepare.is_static(tmp_path / "static")


def test_the_stamp_changes_with_what_is_installed(prepare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("one")
    first = prepare.stamp_text()
    assert prepare.stamp_text() == first
    (tmp_path / "pyproject.toml").write_text("two")
    assert prepare.stamp_text() != first


def test_byte_code_is_kept_even_where_python_would_not(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    (tmp_path / "module.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("x = \n")
    prepare.compile_sources((tmp_path, tmp_path / "missing"))
    assert [path.name.partition(".")[0] for path in (tmp_path / "__pycache__").iterdir()] == ["module"]


def test_an_old_python_gets_one_clear_line(tmp_path: Path) -> None:
    """scripts/setup with a python3 that is too old, and no other in sight."""
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.10" && exit 0\nexit 1\n')
    old.chmod(0o755)
    for tool in ("sh", "dirname"):
        os.symlink(f"/bin/{tool}", tmp_path / tool)
    done = subprocess.run(
        ["/bin/sh", ROOT / "scripts" / "setup"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "needs Python 3.11 or newer; found: Python 3.8.10" in done.stderr
    assert "Traceback" not in done.stderr


def test_make_knows_its_two_commands() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "make demo" in done.stdout
    assert "make test" in done.stdout


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
