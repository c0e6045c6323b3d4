"""`lazymem doctor`: on this host, and on hosts made of files that lack one thing each."""

import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.cli import doctor
from lazymem.cli.host import Finding, Host, State
from lazymem.cli.hostfindings import examine
from lazymem.errors import EnvironmentRefusedError
from tests.support.mounts import command, stage
from tests.support.snapshots import BuiltSnapshot, make_snapshot

ALL_CAPABILITIES = (1 << 41) - 1


def _program(folder: Path, name: str, output: str, mode: int = 0o755) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(mode)
    return path


def _host(root: Path, **changes: object) -> Host:
    """A host of root's with everything; `changes` are `Host`'s fields."""
    for folder in ("sys/class/bdi", "sys/fs/fuse/connections/42", "dev", "run/systemd/system", "etc"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    if not (root / "dev/fuse").exists():
        (root / "dev/fuse").symlink_to("/dev/null")  # a character device that can be opened
    qemu = _program(root / "bin", "qemu-system-x86_64", "QEMU emulator version 9.2.1 (Debian)")
    fields: dict[str, object] = {
        "root": root,
        "release": "6.12.9-amd64",
        "uid": 0,
        "capabilities": ALL_CAPABILITIES,
        "which": {"qemu-system-x86_64": str(qemu)}.get,
        "may_count_faults": lambda: True,
        "descriptors": 1024,
        "file_bytes": -1,
        "locked_bytes": 8 << 20,
    }
    return Host(**(fields | changes))  # type: ignore[arg-type]  # fields of many types


def _found(host: Host, name: str) -> Finding:
    return next(found for found in examine(host) if found.name == name)


def test_a_host_with_everything(tmp_path: Path) -> None:
    findings = examine(_host(tmp_path))
    not_right = {found.name for found in findings if found.state is not State.OK}
    assert not_right <= {"/dev/kvm", "cache"}, "no file can be a KVM, and the disk is this host's"
    assert doctor.exit_code(findings) == 0
    assert all(found.detail for found in findings)


@pytest.mark.parametrize(
    ("changes", "name", "state", "words"),
    [
        ({"release": "4.19.0"}, "kernel", State.MISSING, "too old"),
        ({"release": "6.1.0-13"}, "killed daemon", State.LACKING, "Linux 6.9"),
        ({"capabilities": ALL_CAPABILITIES & ~(1 << 21)}, "right to mount", State.MISSING, "--cap-add SYS_ADMIN"),
        ({"capabilities": ALL_CAPABILITIES & ~(1 << 24)}, "write-back", State.LACKING, "SYS_RESOURCE"),
        ({"release": "5.1.0"}, "kernel", State.MISSING, "newer kernel"),
        ({"release": "5.4.0", "capabilities": 0}, "filling ahead", State.LACKING, "open_tree"),
        ({"uid": 1000}, "right to mount", State.MISSING, "install the package fuse3"),
        ({"uid": 1000}, "dirty throttle", State.LACKING, "mount as root"),
        ({"descriptors": 256}, "open files", State.LACKING, "ulimit -n 1024"),
        ({"descriptors": 63}, "open files", State.MISSING, "ulimit -n 1024"),
        ({"file_bytes": 1000 << 10}, "file size", State.MISSING, "ulimit -f unlimited"),
        ({"file_bytes": 1 << 30}, "file size", State.LACKING, "1024 MiB allowed"),
        (
            {"locked_bytes": 0, "capabilities": ALL_CAPABILITIES & ~(1 << 14)},
            "locked memory",
            State.LACKING,
            "ulimit -l 8192",
        ),
        ({"may_count_faults": lambda: False}, "touched pages", State.LACKING, "a seccomp profile"),
        ({"may_count_faults": lambda: False, "capabilities": 0}, "touched pages", State.LACKING, "paranoid=2"),
        ({"which": {}.get}, "QEMU", State.LACKING, "install the package qemu-system-x86"),
    ],
)
def test_what_is_wrong_is_said_and_how_to_mend_it(
    tmp_path: Path, changes: dict[str, object], name: str, state: State, words: str
) -> None:
    host = _host(tmp_path, **changes)
    found = _found(host, name)
    assert found.state is state
    assert words in f"{found.detail} {found.mend}"
    assert (doctor.exit_code(examine(host)) != 0) == (
        state is State.MISSING or "uid" in changes or not host.capabilities
    )


def test_no_fuse_device(tmp_path: Path) -> None:
    host = _host(tmp_path)
    (tmp_path / "dev/fuse").unlink()
    found = _found(host, "/dev/fuse")
    assert (found.state, found.detail) == (State.MISSING, f"there is no {tmp_path}/dev/fuse")
    assert "modprobe fuse" in found.mend
    (tmp_path / "dev/fuse").write_text("a file")
    assert _found(host, "/dev/fuse").state is State.MISSING
    assert doctor.exit_code(examine(host)) == EnvironmentRefusedError.exit_code


def test_a_user_with_a_helper(tmp_path: Path) -> None:
    helper = _program(tmp_path / "bin", "fusermount3", "", 0o4755)
    host = _host(tmp_path, uid=1000, which={"fusermount3": str(helper)}.get)
    if os.stat(helper).st_mode & stat.S_ISUID:
        assert _found(host, "right to mount").state is State.OK
        assert "user_allow_other" in _found(host, "-o allow_other").mend
        (tmp_path / "etc/fuse.conf").write_text("# user_allow_other\nuser_allow_other\n")
        assert "-o allow_other" not in {found.name for found in examine(host)}
        profiles = tmp_path / "sys/kernel/security/apparmor/profiles"
        profiles.parent.mkdir(parents=True)
        profiles.write_text("fusermount3 (enforce)\n")
        assert "/etc/apparmor.d/local/fusermount3" in _found(host, "AppArmor").mend
    helper.chmod(0o755)
    assert "chmod u+s" in _found(host, "right to mount").mend


def test_no_sysfs_to_tune_in(tmp_path: Path) -> None:
    host = _host(tmp_path)
    (tmp_path / "sys/class/bdi").rmdir()
    assert "ProtectKernelTunables" in _found(host, "dirty throttle").mend


def test_a_qemu_that_cannot_leave_ram_out_and_one_that_says_nothing(tmp_path: Path) -> None:
    host = _host(tmp_path)
    _program(tmp_path / "bin", "qemu-system-x86_64", "QEMU emulator version 3.1.0")
    assert "3.1" in _found(host, "QEMU").detail
    _program(tmp_path / "bin", "qemu-system-x86_64", "something else")
    assert "does not say its version" in _found(host, "QEMU").detail


def test_a_kvm_that_is_none(tmp_path: Path) -> None:
    host = _host(tmp_path)
    assert "is missing" in _found(host, "/dev/kvm").detail
    (tmp_path / "dev/kvm").symlink_to("/dev/null")
    assert "does not answer" in _found(host, "/dev/kvm").detail


def test_without_limits_or_with_the_right_to_lock_all_is_well(tmp_path: Path) -> None:
    names = ("open files", "file size", "locked memory")
    for host in (_host(tmp_path, descriptors=-1, locked_bytes=-1, capabilities=0), _host(tmp_path, locked_bytes=0)):
        assert {_found(host, name).state for name in names} == {State.OK}


@pytest.mark.system
@pytest.mark.parametrize(
    ("limit", "lowered", "name"),
    [(resource.RLIMIT_FSIZE, 1000 << 10, "file size"), (resource.RLIMIT_NOFILE, 24, "open files")],
)
def test_what_doctor_calls_missing_is_refused_by_a_mount(
    tmp_path: Path, snapshot: BuiltSnapshot, limit: int, lowered: int, name: str
) -> None:
    """And named: both are told to the user before anything is mounted."""

    def lower() -> None:
        resource.setrlimit(limit, (lowered, lowered))

    words = [sys.executable, "-m", "lazymem.cli.main", "doctor", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=lower)
    assert done.returncode == EnvironmentRefusedError.exit_code
    states = {found["name"]: found["state"] for found in json.loads(done.stdout)["findings"]}
    assert states[name] == "missing"
    with stage(tmp_path) as mounts:
        address = mounts.serve(snapshot.folder).address
        point = tmp_path / "mnt"
        point.mkdir()
        words = command("lazymem.cli.mount", address, point, "--cache", tmp_path / "cache")
        mounted = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=lower)
    assert mounted.returncode != 0
    assert mounted.stderr.count("\n") == 1
    assert ("File too large" if name == "file size" else "Too many open files") in mounted.stderr
    assert not os.path.ismount(point)


@pytest.fixture
def snapshot(tmp_path: Path) -> BuiltSnapshot:
    return make_snapshot(tmp_path / "snap", pages=1024)


def test_on_this_host() -> None:
    """What it says here is what the other commands do here: where mounts work, nothing is missing."""
    done = subprocess.run(
        [sys.executable, "-m", "lazymem.cli.main", "doctor", "--json"], capture_output=True, text=True, check=False
    )
    record = json.loads(done.stdout)
    assert done.returncode == (0 if record["ok"] else EnvironmentRefusedError.exit_code)
    states = {found["name"]: found["state"] for found in record["findings"]}
    assert states["/dev/fuse"] == ("ok" if os.path.exists("/dev/fuse") else "missing")
    if os.geteuid() == 0 and os.path.exists("/dev/fuse"):
        assert record["ok"], "the system tests mount here"


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.main([])
    text = capsys.readouterr().out
    assert text.startswith(("ok       kernel", "missing  kernel"))
    assert ("a mount can work here" in text) == (code == 0)
    assert max(map(len, text.splitlines())) <= 120
    broken = [Finding("kernel", State.MISSING, "old", "a newer one"), Finding("QEMU", State.LACKING, "none")]
    assert doctor.as_text(broken).splitlines() == [
        "missing  kernel           old",
        "                          -> a newer one",
        "lacking  QEMU             none",
        "",
        "1 missing, 1 lacking",
    ]
