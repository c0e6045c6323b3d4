"""Lines of mountinfo as proc(5) and a busy host show them."""

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from lazymem.errors import MountError
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


def test_names_with_every_other_kind_of_line_end() -> None:
    """Anybody who may mount can have them, and one such line must not take the others away."""
    text = "50 22 0:50 / /mnt/a\rb\x0cc\x85d\u2028e rw - tmpfs with\\043hash rw\n" + TEXT
    odd, *others = mountinfo.parse(text)
    assert (odd.path, odd.source) == ("/mnt/a\rb\x0cc\x85d\u2028e", "with#hash")
    assert others == mountinfo.parse(TEXT)


def test_real_path_is_the_one_that_mountinfo_will_show(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert mountinfo.real_path(str(tmp_path / "link" / "mnt")) == str(tmp_path / "real" / "mnt")
    assert mountinfo.real_path(str(tmp_path / "link")) == str(tmp_path / "real")


def test_a_mount_point_is_never_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its daemon may be stuck, and then even an lstat hangs."""
    point = str(tmp_path / "mnt")
    looked: list[object] = []
    real_lstat = os.lstat

    def lstat(path: str, **more: int) -> os.stat_result:
        looked.append(path)
        return real_lstat(path, **more)

    monkeypatch.setattr(os, "lstat", lstat)
    monkeypatch.setattr(mountinfo, "current", lambda: [replace(mountinfo.parse(TEXT)[0], path=point)])
    assert mountinfo.real_path(point) == point
    assert str(tmp_path) in looked
    assert point not in looked


def test_a_path_without_a_name_is_not_the_current_folder() -> None:
    with pytest.raises(MountError, match="no name"):
        mountinfo.real_path("")


def test_this_process_has_a_root_mount() -> None:
    assert mountinfo.mount_holding("/").path == "/"
