"""What is missing is found at start, with the reason (rule 10)."""

import os
import subprocess
from pathlib import Path

import pytest

from lazymem.errors import EnvironmentRefusedError, MountError
from lazymem.fs import checks, mountinfo
from tests.support.ownnamespace import own_mount_namespace


@pytest.mark.parametrize("release", ["5.4.0-1-amd64", "6.18.44", "10.0"])
def test_kernels_that_do(release: str) -> None:
    checks.check_kernel(release)


@pytest.mark.parametrize("release", ["5.3.18", "3.10.0-1160.el7", "4.19", "nonsense"])
def test_kernels_that_do_not(release: str) -> None:
    with pytest.raises(EnvironmentRefusedError, match=r"too old"):
        checks.check_kernel(release)


def test_no_fuse_device(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentRefusedError, match=r"there is no .*modprobe fuse"):
        checks.check_fuse_device(str(tmp_path / "fuse"))
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentRefusedError, match=r"not a device"):
        checks.check_fuse_device(str(tmp_path / "file"))


def test_mount_points(tmp_path: Path) -> None:
    checks.check_mount_point(str(tmp_path))
    with pytest.raises(MountError, match=r"does not exist: create the folder"):
        checks.check_mount_point(str(tmp_path / "missing"))
    (tmp_path / "file").touch()
    with pytest.raises(MountError, match=r"is not a folder"):
        checks.check_mount_point(str(tmp_path / "file"))
    with pytest.raises(MountError, match=r"/proc is busy: proc"):
        checks.check_mount_point("/proc")


def test_our_own_namespace_is_fine(tmp_path: Path) -> None:
    checks.check_namespace(str(tmp_path))


CODE = "import sys; from lazymem.fs import checks; checks.check_namespace(sys.argv[1])"


@pytest.mark.parametrize("propagation", ["private", "slave"])
def test_a_namespace_to_oneself_is_refused(tmp_path: Path, propagation: str, request: pytest.FixtureRequest) -> None:
    alone = own_mount_namespace(request.node, propagation, CODE)
    done = subprocess.run([*alone, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "mount namespace to itself" in done.stderr


def test_a_namespace_with_a_shell_in_it_is_fine(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The shell that started it is there too, and will use the mount."""
    alone = own_mount_namespace(request.node, "private", CODE, shell=True)
    done = subprocess.run([*alone, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_user_who_cannot_look_outside_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As within a user namespace: neither pid 1 nor the parent can be looked at, so nothing speaks against it."""
    monkeypatch.setattr(checks, "_maybe_namespace", lambda pid: None)
    checks.check_namespace(str(tmp_path))
    monkeypatch.setattr(checks, "_maybe_namespace", lambda pid: "mnt:[1]" if pid == str(os.getppid()) else None)
    with pytest.raises(EnvironmentRefusedError, match="mount namespace to itself"):
        checks.check_namespace(str(tmp_path))


def test_a_shared_mount_point_is_seen_by_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    group = mountinfo.mount_holding(str(tmp_path)).peer_group
    assert checks._propagates(str(tmp_path)) == (group is not None)
