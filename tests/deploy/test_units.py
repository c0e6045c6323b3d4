"""The systemd units: systemd itself accepts them, the mount's makes no mount namespace, the others are hardened."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.cli.servicemanager import AGAIN_EXIT_CODE, MISTAKE_EXIT_CODE
from lazymem.errors import LazymemError
from tests.support.mounts import WAIT_SECONDS

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
MOUNT_UNIT = DEPLOY / "lazymem-mount@.service"
UNITS = sorted(path.name for path in DEPLOY.iterdir() if path.suffix in (".service", ".socket"))

MAKES_MOUNT_NAMESPACE = frozenset(
    [
        "BindPaths",
        "BindReadOnlyPaths",
        "DynamicUser",
        "ExecPaths",
        "ExtensionDirectories",
        "ExtensionImages",
        "ImportCredential",
        "InaccessiblePaths",
        "LoadCredential",
        "LoadCredentialEncrypted",
        "LogNamespace",
        "MountAPIVFS",
        "MountFlags",
        "MountImages",
        "NetworkNamespacePath",
        "NoExecPaths",
        "PrivateBPF",
        "PrivateDevices",
        "PrivateIPC",
        "PrivateMounts",
        "PrivateNetwork",
        "PrivatePIDs",
        "PrivateTmp",
        "PrivateUsers",
        "ProcSubset",
        "ProtectControlGroups",
        "ProtectHome",
        "ProtectHostname",
        "ProtectKernelLogs",
        "ProtectKernelModules",
        "ProtectKernelTunables",
        "ProtectProc",
        "ProtectSystem",
        "ReadOnlyPaths",
        "ReadWritePaths",
        "RootDirectory",
        "RootImage",
        "SetCredential",
        "SetCredentialEncrypted",
        "TemporaryFileSystem",
    ]
)
"""systemd.exec(5), read through 257; some only do so in part of the versions, which is not worth finding out live."""

TAKES_AWAY = frozenset(
    [
        "DeviceAllow",
        "DevicePolicy",
        "ProtectClock",
        "NoNewPrivileges",
        "SystemCallFilter",
        "SystemCallArchitectures",
        "SystemCallLog",
        "RestrictAddressFamilies",
        "RestrictFileSystems",
        "RestrictNamespaces",
        "RestrictRealtime",
        "RestrictSUIDSGID",
        "LockPersonality",
        "MemoryDenyWriteExecute",
        "MemoryMax",
        "MemoryHigh",
    ]
)


def options(unit: Path) -> list[tuple[str, str]]:
    """(name, value) of each line that sets something, continued lines joined."""
    text = unit.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if not line.startswith(("#", ";", "["))]
    return [(name.strip(), value.strip()) for name, _, value in (line.partition("=") for line in lines if "=" in line)]


def value(unit: str, name: str) -> str:
    found = [v for n, v in options(DEPLOY / unit) if n == name]
    assert len(found) == 1, f"{unit} sets {name} {len(found)} times"
    return found[0]


def test_the_units_are_all_there() -> None:
    assert UNITS == [
        "lazymem-forkserver.service",
        "lazymem-mount@.service",
        "lazymem-serve@.service",
        "lazymem-serve@.socket",
        "lazymem-vm@.service",
    ]


MOUNTS = ("lazymem-mount@.service", "lazymem-forkserver.service")
"""Of which mounts are made."""


@pytest.mark.parametrize("unit", MOUNTS)
def test_mount_unit_makes_no_mount_namespace_and_keeps_what_it_needs(unit: str) -> None:
    found = {name for name, _ in options(DEPLOY / unit)}
    assert not found & MAKES_MOUNT_NAMESPACE
    assert not found & TAKES_AWAY


@pytest.mark.parametrize("unit", MOUNTS)
def test_mount_unit_keeps_the_capabilities_that_it_needs(unit: str) -> None:
    """fusermount3, which a User= mounts with, is root within the same bounds."""
    kept = set(value(unit, "CapabilityBoundingSet").split())
    assert kept >= {"CAP_SYS_ADMIN", "CAP_SYS_RESOURCE", "CAP_DAC_OVERRIDE", "CAP_SETUID", "CAP_SETGID"}


def test_mount_unit_names_the_whole_list_and_the_reason() -> None:
    comments = "\n".join(line for line in MOUNT_UNIT.read_text().splitlines() if line.startswith("#"))
    named = set(re.findall(r"([A-Z][A-Za-z]+)=", comments))
    assert named >= MAKES_MOUNT_NAMESPACE
    assert "mount namespace" in comments.lower()


def test_the_check_would_notice_one(tmp_path: Path) -> None:
    unit = tmp_path / "unit"
    unit.write_text(MOUNT_UNIT.read_text() + "\n[Service]\nPrivateTmp=yes\n")
    assert {name for name, _ in options(unit)} & MAKES_MOUNT_NAMESPACE == {"PrivateTmp"}


def test_mount_is_ready_when_it_answers_and_never_killed() -> None:
    assert value("lazymem-mount@.service", "Type") == "notify"
    assert value("lazymem-mount@.service", "SendSIGKILL") == "no"
    assert value("lazymem-mount@.service", "TimeoutStopSec") == "infinity"
    assert value("lazymem-mount@.service", "StartLimitIntervalSec") == "0"
    assert " -f " in value("lazymem-mount@.service", "ExecStart")


def test_a_fork_servers_end_is_not_its_mounts_end() -> None:
    assert value("lazymem-forkserver.service", "KillMode") == "process"
    assert value("lazymem-forkserver.service", "OOMPolicy") == "continue"
    assert value("lazymem-forkserver.service", "Restart") == "always", "it ends when its files are exchanged"
    assert value("lazymem-forkserver.service", "StartLimitIntervalSec") == "0", "half installed, it fails at once"


@pytest.mark.parametrize("answers", [True, False])
def test_only_a_mount_that_answers_nobody_is_cleared_away(tmp_path: Path, answers: bool) -> None:
    """A unit that fails to start since somebody mounted there by hand must not take that mount off."""
    fake = tmp_path / "umount"
    fake.write_text(f"#!/bin/sh\necho called >{tmp_path}/called\n")
    fake.chmod(0o755)
    mountpoint = tmp_path / "mount"
    if answers:
        mountpoint.mkdir()
    cleans = value("lazymem-mount@.service", "ExecStopPost")
    assert ("ExecStartPre", cleans) in options(MOUNT_UNIT)
    line = cleans.removeprefix("-").replace("/run/lazymem/%i", str(mountpoint)).replace("$$", "$")
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(shlex.split(line), check=True, env={"PATH": path})
    assert (tmp_path / "called").exists() is not answers


FAKE_SYSTEMCTL = """#!/bin/sh
case "$1" in
show) echo "$KEPT" ;;
list-jobs) echo "$JOBS" ;;
is-active) ;;
stop) echo "$@" >>"$DID" ;;
esac
"""


@pytest.mark.parametrize(
    ("kept", "end", "jobs", "left"),
    [
        (4, {"SERVICE_RESULT": "signal", "EXIT_CODE": "killed", "EXIT_STATUS": "KILL"}, "", True),
        (4, {"SERVICE_RESULT": "exit-code", "EXIT_CODE": "exited", "EXIT_STATUS": "75"}, "", True),
        (4, {"SERVICE_RESULT": "exit-code", "EXIT_CODE": "exited", "EXIT_STATUS": "2"}, "", True),
        (4, {"SERVICE_RESULT": "protocol", "EXIT_CODE": "exited", "EXIT_STATUS": "0"}, "7 x restart waiting", True),
        (4, {}, "", True),  # before a start
        (4, {"SERVICE_RESULT": "exit-code", "EXIT_CODE": "exited", "EXIT_STATUS": "2"}, "7 x stop running", False),
        (4, {"SERVICE_RESULT": "exit-code", "EXIT_CODE": "exited", "EXIT_STATUS": "78"}, "", False),
        (4, {"SERVICE_RESULT": "success", "EXIT_CODE": "exited", "EXIT_STATUS": "0"}, "", False),
        (0, {"SERVICE_RESULT": "signal", "EXIT_CODE": "killed", "EXIT_STATUS": "KILL"}, "", False),
    ],
)
def test_a_mount_that_goes_on_is_left_as_it_is(
    tmp_path: Path, kept: int, end: dict[str, str], jobs: str, left: bool
) -> None:
    """Else nobody is to ask a mount that may answer nobody, and its guest ends."""
    for name, text in (
        ("systemctl", FAKE_SYSTEMCTL),
        ("umount", '#!/bin/sh\necho umount "$@" >>"$DID"\n'),
        ("ls", '#!/bin/sh\necho ls >>"$DID"\nexit 1\n'),
        ("sleep", "#!/bin/sh\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    line = value("lazymem-mount@.service", "ExecStopPost").removeprefix("-").replace("$$", "$").replace("%i", "web")
    did = tmp_path / "did"
    did.touch()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "KEPT": str(kept), "JOBS": jobs, "DID": str(did), **end}
    subprocess.run(shlex.split(line), check=True, env=environment)
    ended = ["umount --lazy --quiet /run/lazymem/web", "stop --no-block lazymem-vm@web.service"]
    assert did.read_text().splitlines() == ([] if left else ended if kept else ["ls", *ended])


def test_only_one_code_ends_a_unit_and_with_it_what_it_keeps() -> None:
    assert value("lazymem-mount@.service", "RestartPreventExitStatus") == str(MISTAKE_EXIT_CODE)
    assert MISTAKE_EXIT_CODE not in {kind.exit_code for kind in LazymemError.__subclasses__()}
    assert MISTAKE_EXIT_CODE != AGAIN_EXIT_CODE


def test_nothing_dumps_a_core() -> None:
    for name in UNITS:
        if name.endswith(".service"):
            assert value(name, "LimitCORE") == "0"


def test_guest_is_bound_to_its_mount_and_in_another_cgroup() -> None:
    assert value("lazymem-vm@.service", "Wants") == "lazymem-mount@%i.service"
    assert value("lazymem-vm@.service", "After") == "lazymem-mount@%i.service"
    assert value("lazymem-vm@.service", "Slice") == "lazymem-guests.slice"
    assert value("lazymem-vm@.service", "Restart") == "no"


def test_guests_ram_is_writable_in_the_emulators_name_space() -> None:
    """ProtectSystem=strict makes all of /run read-only but what is named."""
    for unit, ram in (
        (DEPLOY / "lazymem-vm@.service", "/run/lazymem/%i"),
        (DEPLOY / "examples" / "qemu-web.service", "/run/lazymem/web"),
    ):
        found = dict(options(unit))
        assert found["ProtectSystem"] == "strict"
        assert found["ReadWritePaths"] == ram
        assert f"{ram}/pc.ram" in found["ExecStart"]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as instances that verify can load, their programs those of this environment."""
    programs = Path(sys.executable).parent
    for name in UNITS:
        instance = "7411" if "serve" in name else "web"
        text = (DEPLOY / name).read_text().replace("/usr/local/bin/", f"{programs}/")
        # systemd-analyze takes no instances: it invents one for a template, and "i" is no port.
        text = text.replace("127.0.0.1:%i", "127.0.0.1:7411").replace("@%i", f"-{instance}").replace("%i", instance)
        (tmp_path / name.replace("@", f"-{instance}")).write_text(text)
    example = (DEPLOY / "examples" / "qemu-web.service").read_text().replace("@web", "-web")
    example = example.replace("/usr/local/lib/lazymem/", f"{DEPLOY}/examples/")
    (tmp_path / "qemu-web.service").write_text(example)
    return tmp_path


def test_systemd_accepts_the_units(installed: Path) -> None:
    units = sorted(map(str, installed.iterdir()))
    assert len(units) == len(UNITS) + 1
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    ours = [line for line in done.stderr.splitlines() if "lazymem" in line or "qemu-web" in line]
    assert ours == []
    assert done.returncode == 0, done.stderr


def test_systemd_would_have_complained(installed: Path) -> None:
    unit = installed / "lazymem-vm-web.service"
    unit.write_text(unit.read_text().replace("Restart=no", "Restrat=no\nSlice=no/such"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert "Restrat" in done.stderr


SCORES = (
    ("lazymem-serve-7411.service", r"`systemd-analyze security`: ([0-9.]+)\)"),
    ("lazymem-vm-web.service", r"emulator is another user and shut in \(([0-9.]+)\)"),
    ("lazymem-mount-web.service", r"its unit may not be shut in \(([0-9.]+)\)"),
)
"""What SECURITY.md says of each."""


def exposure(unit: Path) -> float:
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=100", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, f"an offline security review, which systemd has from 250 on: {done.stderr}"
    return float(found[1])


@pytest.mark.parametrize("name", ["lazymem-serve-7411.service", "lazymem-vm-web.service"])
def test_server_and_emulator_are_hardened(installed: Path, name: str) -> None:
    assert exposure(installed / name) < 2.0


@pytest.mark.parametrize(("name", "told"), SCORES)
def test_scores_are_those_that_are_written_down(installed: Path, name: str, told: str) -> None:
    """Versions of systemd look for a little more, or less."""
    found = re.findall(told, (DEPLOY.parent / "SECURITY.md").read_text())
    assert [float(score) for score in found] == [pytest.approx(exposure(installed / name), abs=0.3)]


def test_configuration_examples_set_what_the_units_use() -> None:
    for unit, example in (
        ("lazymem-serve@.service", "serve-7411.conf"),
        ("lazymem-mount@.service", "mount-web.conf"),
        ("lazymem-vm@.service", "vm-web.conf"),
    ):
        text = (DEPLOY / "examples" / example).read_text()
        assert f"/etc/lazymem/{example.split('-')[0]}-%i.conf" == value(unit, "EnvironmentFile")
        used = set(re.findall(r"\$\{?(LAZYMEM_[A-Z_]+)", value(unit, "ExecStart")))
        assert used
        assert {line.partition("=")[0] for line in text.splitlines() if line.startswith("LAZYMEM")} == used


def test_taking_over_without_a_saved_state_is_one_clear_line(tmp_path: Path) -> None:
    """A mount shows none once its RAM was written to."""
    script = DEPLOY / "examples" / "qemu-take-over"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "qmp", tmp_path / "vmstate"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, f"{tmp_path}/vmstate: No such file or directory\n")


TELLS_OF_REFUSALS = """
import runpy, socket, sys
connect = socket.socket.connect

def told(self, path):
    try:
        connect(self, path)
    except ConnectionRefusedError:
        print("refused", flush=True)
        raise

socket.socket.connect = told
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0])
"""


def test_a_monitor_that_has_its_name_and_does_not_listen_yet_is_waited_for(tmp_path: Path, sockets: Path) -> None:
    """So is QEMU's, for a moment; who waited for the name is there before it."""
    script, vmstate, monitor = DEPLOY / "examples" / "qemu-take-over", tmp_path / "vmstate", sockets / "qmp"
    vmstate.write_bytes(b"QEVM")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(monitor))
        command: list[str | Path] = [sys.executable, "-c", TELLS_OF_REFUSALS, script, monitor, vmstate]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "refused\n"
            listener.listen(1)
            with listener.accept()[0] as connection:
                connection.sendall(b'{"QMP": {}}\n{"error": {"desc": "not now"}}\n')
                _, said = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, said) == (1, "qmp_capabilities: not now\n")


def test_users_of_the_units_are_made() -> None:
    """systemd-sysusers complains of a colon in a description, makes no user, and ends with 0."""
    lines = re.findall(r'^u (\S+) +- +"(.+)"', (DEPLOY / "lazymem.sysusers").read_text(), re.MULTILINE)
    assert not [text for _, text in lines if ":" in text]
    users = [name for name, _ in lines]
    assert sorted(users) == sorted({value("lazymem-serve@.service", "User"), value("lazymem-vm@.service", "User")})
