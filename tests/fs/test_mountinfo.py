"""Lines of mountinfo as proc(5) and a busy host show them."""

from pathlib import Path

import pytest

from lazymem.fs import mountinfo

TEXT = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:39 / /mnt/with\\040space rw,nosuid - fuse.lazymem host:7411/web rw,user_id=0
31 22 0:40 / /mnt/slave rw shared:7 master:3 - tmpfs tmpfs rw
32 22 0:41 / /mnt/slave rw - fuse.lazymem hidden rw
33 22 0:42 / /tab\\011and\\134backslash rw - tmpfs none rw
"""


def test_fields() -> None:
    root, ours, slave, _, odd = mountinfo.parse(TEXT)
    assert (root.peer_group, root.fs_type, root.is_ours) == (1, "ext4", False)
    assert (ours.path, ours.device, ours.minor, ours.source) == ("/mnt/with space", "0:39", 39, "host:7411/web")
    assert ours.is_ours
    assert slave.peer_group == 7
    assert odd.path == "/tab\tand\\backslash"


def test_the_topmost_mount_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountinfo, "current", lambda: mountinfo.parse(TEXT))
    top = mountinfo.maybe_mount_at("/mnt/slave")
    assert top is not None
    assert top.source == "hidden"
    assert mountinfo.maybe_mount_at("/mnt") is None
    assert mountinfo.mount_holding("/mnt/slave/x").source == "hidden"
    assert mountinfo.mount_holding("/mnt/slavery").path == "/"


def test_real_path_resolves_parents_only(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert mountinfo.real_path(str(tmp_path / "link" / "mnt")) == str(tmp_path / "real" / "mnt")
    assert mountinfo.real_path(str(tmp_path / "link")) == str(tmp_path / "link")


def test_this_process_has_a_root_mount() -> None:
    assert mountinfo.mount_holding("/").path == "/"
