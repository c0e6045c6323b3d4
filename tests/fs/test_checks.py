"""What is missing is found at start, with the reason (rule 10)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.errors import EnvironmentRefusedError, MountError
from lazymem.fs import checks, mountinfo


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


def test_a_namespace_to_oneself_is_refused_unless_somebody_shares_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    if os.geteuid() != 0:
        # A user makes one within a user namespace, from where nobody outside can be seen: nothing speaks against it.
        assert subprocess.run(["unshare", "-rm", "--propagation", "private", *command], check=False).returncode == 0
        return
    alone = subprocess.run(
        ["unshare", "-m", "--propagation", "private", *command], capture_output=True, text=True, check=False
    )
    assert alone.returncode != 0
    assert "mount namespace to itself" in alone.stderr
    slave = subprocess.run(
        ["unshare", "-m", "--propagation", "slave", *command], capture_output=True, text=True, check=False
    )
    assert "mount namespace to itself" in slave.stderr
    # The shell that started it is there too, and will use the mount.
    shell = ["unshare", "-m", "--propagation", "private", "sh", "-c", '"$@"; exit $?', "sh", *command]
    assert subprocess.run(shell, check=False).returncode == 0


def test_a_shared_mount_point_is_seen_by_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    group = mountinfo.mount_holding(str(tmp_path)).peer_group
    assert checks._propagates(str(tmp_path)) == (group is not None)
