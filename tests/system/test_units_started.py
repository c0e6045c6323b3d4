"""The units on a machine that systemd runs: installed as deploy/README.md says, started, stopped, broken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lazymem.cli.main import main as lazymem
from lazymem.vm.guests import build_guest
from tests.support.mounts import wait_until
from tests.support.systemdmachine import CHECKOUT, PROGRAMS, SystemdMachine, install_programs, started
from tests.support.vmprocess import starting

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

RAM_MIB = 16
VM, MOUNT, SERVER = "lazymem-vm@web.service", "lazymem-mount@web.service", "lazymem-serve@7411.service"

ENDED = ("failed", "inactive")

KILLS = {
    "the daemon": "kill -KILL {daemon}",
    "the supervisor": "kill -KILL {supervisor}",
    "both": "kill -KILL {supervisor} {daemon}",
    "all of the unit, and what systemd starts to clean up": "systemctl kill --signal=KILL {unit}",
    "the daemon of a supervisor that was killed": "kill -KILL {daemon}",
}
UPGRADE = "lazymem mount --upgrade /run/lazymem/web"

READ_SERIAL = """
import re, socket
line = socket.socket(socket.AF_UNIX)
line.settimeout(60)
line.connect("/run/lazymem-vm/web/serial")
text = b""
while not (found := re.search(rb"tick ([0-9]+)\\r?\\n", text)):
    data = line.recv(4096)
    assert data, text
    text += data
print(found[1].decode())
"""


def commands(name: str) -> str:
    """The block of deploy/README.md that is marked with `name`."""
    found: list[str] = re.findall(
        rf"^```sh {name}\n(.*?)^```$", (CHECKOUT / "deploy/README.md").read_text(), re.M | re.S
    )
    assert len(found) == 1
    return found[0]


def test_the_readmes_two_commands_are_among_them() -> None:
    told = re.findall(r"^ {4}(systemctl .*?) *#", (CHECKOUT / "README.md").read_text(), re.M)
    assert told == [commands("serve").splitlines()[-1], commands("start").strip()]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A saved guest, and the tick after which it was saved, or a little later."""
    folder = tmp_path_factory.mktemp("units")
    (folder / "ram").touch()
    with (folder / "ram").open("r+b") as ram:
        ram.truncate(RAM_MIB << 20)
    with starting(folder, RAM_MIB) as start:
        guest = start("--pcram-file", folder / "ram", "-kernel", build_guest("heartbeat", folder))
        guest.wait_ticks(20)
        assert lazymem(["snapshot", str(guest.monitor), str(folder / "snap")]) == 0
        guest.end()
    return folder / "snap", guest.ticks()[-1]


@pytest.fixture(scope="module")
def installed(snapshot: tuple[Path, int]) -> Iterator[SystemdMachine]:
    with started() as machine:
        install_programs(machine)
        machine.run("mkdir", "/tmp/checkout")
        machine.copy(CHECKOUT / "deploy", "/tmp/checkout/deploy")
        machine.copy(snapshot[0], "/tmp/checkout/snap")
        for name in ("vm", "mount", "serve"):
            machine.keep_log(f"lazymem-{name}@.service")
        pip, *lines = commands("install").splitlines()
        assert "pip install" in pip
        machine.shell("\n".join(["cd /tmp/checkout", *lines, commands("serve")]))
        # Two servers, of which the first is not there: the other one has to do.
        machine.shell("sed -i s/ram.example.net/127.0.0.1:1\\\\/web,127.0.0.1/ /etc/lazymem/mount-web.conf")
        yield machine


@pytest.fixture
def machine(installed: SystemdMachine) -> Iterator[SystemdMachine]:
    """Everything stopped, and the guest's memory as the snapshot has it."""
    configure(installed, RAM_MIB)
    yield installed
    installed.run("systemctl", "stop", VM, MOUNT)
    installed.run("systemctl", "reset-failed", check=False)


def configure(machine: SystemdMachine, ram_mib: int) -> None:
    machine.shell(f"sed -i s/^LAZYMEM_VM_MEMORY=.*/LAZYMEM_VM_MEMORY={ram_mib}M/ /etc/lazymem/vm-web.conf")


def tick(machine: SystemdMachine) -> int:
    """What the guest counts next."""
    return int(machine.run("/opt/lazymem/bin/python3", "-c", READ_SERIAL).stdout)


def mounted(machine: SystemdMachine) -> bool:
    return " /run/lazymem/web fuse.lazymem " in machine.shell("cat /proc/1/mounts")


def test_a_mount_by_hand_is_forked_and_outlives_the_fork_servers_unit(machine: SystemdMachine) -> None:
    unit, point = "lazymem-forkserver.service", "/tmp/by-hand"
    machine.run("systemctl", "start", unit)
    machine.run("mkdir", point)
    log = machine.shell(f"lazymem-mount 127.0.0.1:7411/web {point} --cache /tmp/cache 2>&1")
    try:
        assert log == ""
        daemon = json.loads(machine.shell(f"lazymem status --json {point}"))["pid"]
        assert machine.shell(f"ps -o ppid= -p {daemon}").strip() == machine.show(unit, "MainPID")
        machine.run("systemctl", "restart", unit)
        machine.run("systemctl", "stop", unit)
        assert machine.show(unit, "Result") == "success"
        assert json.loads(machine.shell(f"lazymem status --json {point}"))["pid"] == daemon
        assert machine.shell("test -e /run/lazymem/forkserver.sock || echo gone").strip() == "gone"
    finally:
        machine.run("umount", point)


def test_a_guest_goes_on_starts_over_and_ends(machine: SystemdMachine, snapshot: tuple[Path, int]) -> None:
    machine.shell(commands("start"))
    assert [machine.show(unit, "ActiveState") for unit in (VM, MOUNT, SERVER)] == ["active"] * 3
    assert mounted(machine)
    first = tick(machine)
    assert first >= snapshot[1], "it goes on, and does not begin again"
    while tick(machine) < first + 20:
        pass
    before = machine.show(MOUNT, "MainPID")
    machine.run("systemctl", "restart", VM)
    assert machine.show(MOUNT, "MainPID") != before, "from the snapshot again, on a mount that nobody has written to"
    assert tick(machine) >= snapshot[1]
    machine.run("systemctl", "stop", VM)
    machine.wait_shown(MOUNT, "ActiveState", "inactive")
    assert [machine.show(unit, "Result") for unit in (VM, MOUNT)] == ["success"] * 2
    assert not mounted(machine)
    machine.shell(commands("start"))
    machine.run("systemctl", "stop", MOUNT)
    assert [machine.show(unit, "ActiveState") for unit in (VM, MOUNT)] == ["inactive"] * 2
    assert machine.show(VM, "Result") == "success"
    assert not mounted(machine)


def filters(status: str) -> int:
    """How many system call filters a process has (Linux 5.10). Within a container pid 1 has some already."""
    found = re.search(r"^Seccomp_filters:\s+(\d+)$", status, re.M)
    assert found is not None
    return int(found[1])


def test_guest_and_server_are_shut_in_and_the_mount_is_not(machine: SystemdMachine) -> None:
    machine.shell(commands("start"))
    ours, first = machine.shell("readlink /proc/1/ns/mnt"), machine.shell("cat /proc/1/status")
    groups = {}
    for unit, user in ((VM, "lazymem-vm"), (SERVER, "lazymem-serve"), (MOUNT, "root")):
        pid = machine.show(unit, "MainPID")
        assert machine.shell(f"stat --format=%U /proc/{pid}").strip() == user
        groups[unit] = machine.shell(f"cat /proc/{pid}/cgroup")
        status = machine.shell(f"cat /proc/{pid}/status")
        hardened = unit != MOUNT
        assert (machine.shell(f"readlink /proc/{pid}/ns/mnt") != ours) is hardened
        assert bool(re.search(r"^NoNewPrivs:\s+1$", status, re.M)) is hardened
        assert bool(re.search(r"^CapBnd:\s+0+$", status, re.M)) is hardened
        assert (filters(status) > filters(first)) is hardened
    assert "lazymem-guests.slice" in groups[VM]
    assert "lazymem-guests.slice" not in groups[MOUNT]


def test_a_guest_that_cannot_go_on_is_a_start_that_fails(machine: SystemdMachine) -> None:
    configure(machine, 2 * RAM_MIB)
    assert machine.run("systemctl", "start", VM, check=False).returncode == 1
    assert machine.show(VM, "ActiveState") == "failed"
    assert machine.show(VM, "ExecMainStatus") == "4", "its RAM file has another size"


def test_ram_that_was_written_to_is_no_start_either(machine: SystemdMachine) -> None:
    machine.run("systemctl", "start", MOUNT)
    machine.shell("printf x | dd of=/run/lazymem/web/pc.ram conv=notrunc status=none")
    assert machine.run("systemctl", "start", VM, check=False).returncode == 1
    machine.run("systemctl", "restart", VM)
    assert tick(machine)


def status(machine: SystemdMachine) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(machine.shell("lazymem status --json /run/lazymem/web"))
    return found


def daemon_of(machine: SystemdMachine) -> str:
    return str(status(machine)["pid"])


def wait_loaded(machine: SystemdMachine) -> None:
    wait_until(lambda: status(machine)["survival"]["next_is_loaded"], "a next daemon is loaded")


def test_a_killed_mount_goes_on_and_so_does_its_guest(machine: SystemdMachine) -> None:
    """Whatever of it is killed, and when another version is to go on."""
    machine.shell(commands("start"))
    guest, before, daemons = machine.show(VM, "MainPID"), tick(machine), 0
    for what, way in {**KILLS, "an upgrade": UPGRADE}.items():
        daemon, supervisor, restarted = daemon_of(machine), machine.show(MOUNT, "MainPID"), restarts(machine)
        assert str(status(machine)["survival"]["supervisor_pid"]) == supervisor
        machine.shell(way.format(daemon=daemon, supervisor=supervisor, unit=MOUNT))
        if "daemon" not in what:
            wait_until(lambda restarted=restarted: restarts(machine) > restarted, f"{what}: another supervisor")  # type: ignore[misc]
            machine.wait_shown(MOUNT, "ActiveState", "active")
        if what != "the supervisor":
            wait_until(lambda daemon=daemon: daemon_of(machine) != daemon, f"{what}: another daemon")  # type: ignore[misc]
            daemons += 1
        assert restarts(machine) - restarted == ("daemon" not in what), what
        machine.shell("cksum /run/lazymem/web/pc.ram")
        now = tick(machine)
        assert now > before
        before = now
        survival = status(machine)["survival"]
        assert (survival["kept_by"], survival["restarts"]) == ("systemd", daemons), what
    assert machine.show(VM, "MainPID") == guest
    machine.run("systemctl", "stop", MOUNT)
    assert [machine.show(unit, "Result") for unit in (VM, MOUNT)] == ["success"] * 2
    machine.wait_shown(MOUNT, "NFileDescriptorStore", "0")
    assert not mounted(machine)
    assert not machine.shell("find /var/cache/lazymem -name 'run-*'")


def test_a_loaded_daemon_goes_on_without_systemd(machine: SystemdMachine) -> None:
    machine.shell(commands("start"))
    wait_loaded(machine)
    daemon, supervisor, before = daemon_of(machine), machine.show(MOUNT, "MainPID"), tick(machine)
    machine.run("kill", "-KILL", daemon)
    wait_until(lambda: daemon_of(machine) != daemon, "another daemon")
    machine.shell("cksum /run/lazymem/web/pc.ram")
    assert tick(machine) > before
    assert (machine.show(MOUNT, "MainPID"), restarts(machine)) == (supervisor, 0)


@pytest.fixture
def program(machine: SystemdMachine) -> Iterator[Callable[[str], None]]:
    """Puts a shell script in the place of the mount's program; "": the program again, as after the test."""
    installed = PROGRAMS / "bin/lazymem-mount"
    machine.shell(f"cp {installed} {installed}.good")

    def put(script: str) -> None:
        if script:
            machine.shell(f"printf '#!/bin/sh\\n{script}\\n' >{installed}.new; chmod +x {installed}.new")
        else:
            machine.shell(f"cp {installed}.good {installed}.new")
        machine.shell(f"mv {installed}.new {installed}")

    yield put
    put("")


def restarts(machine: SystemdMachine) -> int:
    return int(machine.show(MOUNT, "NRestarts"))


def test_a_next_version_that_does_not_start_costs_no_guest(
    machine: SystemdMachine, program: Callable[[str], None]
) -> None:
    """2 is a wrong command line: an option that it does not know. An upgrade changes nothing; kills are waited out, of
    the supervisor while the daemon serves, and of both while the guest waits."""
    machine.shell(commands("start"))
    guest, supervisor, before = machine.show(VM, "MainPID"), machine.show(MOUNT, "MainPID"), tick(machine)
    daemon = daemon_of(machine)
    program("exit 2")
    done = machine.run("lazymem", "mount", "--upgrade", "/run/lazymem/web", check=False)
    assert done.returncode == 3, done.stderr
    assert f"daemon {daemon} goes on: the new version's daemon does not start" in done.stderr
    assert (machine.show(MOUNT, "MainPID"), daemon_of(machine), restarts(machine)) == (supervisor, daemon, 0)
    assert tick(machine) > before
    for killed in (supervisor, daemon):
        machine.run("kill", "-KILL", killed)
        for script in ("exit 2", "exit 0"):
            program(script)
            tried = restarts(machine)
            wait_until(lambda tried=tried: restarts(machine) >= tried + 2, "it is tried again")  # type: ignore[misc]
            if killed == supervisor:
                assert daemon_of(machine) == daemon
    assert machine.show(VM, "ActiveState") == "active"
    program("")
    machine.wait_shown(MOUNT, "ActiveState", "active")
    machine.shell("cksum /run/lazymem/web/pc.ram")
    after = tick(machine)
    assert after > before
    machine.shell(UPGRADE)
    assert tick(machine) > after
    assert machine.show(VM, "MainPID") == guest


def test_a_next_daemon_that_is_never_ready_can_be_given_up(
    machine: SystemdMachine, program: Callable[[str], None]
) -> None:
    """Nothing of the mount is left, and the guest ends too."""
    machine.shell(commands("start"))
    daemon, supervisor = daemon_of(machine), machine.show(MOUNT, "MainPID")
    program("exec sleep 1000")
    machine.run("kill", "-KILL", supervisor, daemon)
    wait_until(lambda: machine.show(MOUNT, "SubState") == "start", "the next one is started")
    machine.run("systemctl", "stop", MOUNT)
    assert not mounted(machine)
    machine.wait_shown(MOUNT, "NFileDescriptorStore", "0")
    wait_until(lambda: machine.show(VM, "ActiveState") in ENDED, "the guest ends")
    program("")
    machine.run("systemctl", "reset-failed", check=False)
    machine.shell(commands("start"))
    assert tick(machine)


@pytest.fixture
def slow(machine: SystemdMachine) -> Iterator[Callable[[int], None]]:
    """systemd waits so many seconds before it starts the mount's unit again, until the test ends."""
    folder = f"/etc/systemd/system/{MOUNT.replace('@web', '@')}.d"

    def wait(seconds: int) -> None:
        machine.shell(f"printf '[Service]\\nRestartSec={seconds}s\\n' >{folder}/slow.conf")
        machine.run("systemctl", "daemon-reload")

    yield wait
    machine.shell(f"rm -f {folder}/slow.conf; systemctl daemon-reload")


def test_stopped_before_another_supervisor_is_there(machine: SystemdMachine, slow: Callable[[int], None]) -> None:
    """systemd cleans nothing up then. The daemon hears of it: it serves as long as there is a guest, and ends."""
    machine.shell(commands("start"))
    slow(1000)
    daemon, before = daemon_of(machine), tick(machine)
    machine.run("kill", "-KILL", machine.show(MOUNT, "MainPID"))
    machine.wait_shown(MOUNT, "SubState", "auto-restart")
    machine.run("systemctl", "stop", MOUNT)
    wait_until(lambda: "the unit was stopped" in machine.log(), "it hears of it")
    machine.shell("cksum /run/lazymem/web/pc.ram")
    assert (daemon_of(machine), machine.show(VM, "ActiveState")) == (daemon, "active")
    assert tick(machine) > before
    machine.run("systemctl", "stop", VM)
    wait_until(lambda: not mounted(machine), "the mount ends")
    machine.shell(commands("start"))
    assert tick(machine)


def test_stopped_before_another_daemon_is_there(machine: SystemdMachine, slow: Callable[[int], None]) -> None:
    """Nobody has its connection then: the guest has lost its RAM, and the mount stays as it is until the next start."""
    machine.shell(commands("start"))
    slow(1000)
    machine.run("kill", "-KILL", machine.show(MOUNT, "MainPID"), daemon_of(machine))
    machine.wait_shown(MOUNT, "SubState", "auto-restart")
    machine.run("systemctl", "stop", MOUNT)
    assert mounted(machine)
    assert machine.run("ls", "/run/lazymem/web", check=False).returncode != 0
    machine.run("systemctl", "stop", VM)
    machine.run("systemctl", "reset-failed", check=False)
    machine.shell(commands("start"))
    assert tick(machine)


def test_unmounted_before_another_daemon_is_there(machine: SystemdMachine, slow: Callable[[int], None]) -> None:
    """That is an end, and no failure after which it is mounted again."""
    machine.run("systemctl", "start", MOUNT)
    slow(1000)
    machine.run("kill", "-KILL", machine.show(MOUNT, "MainPID"), daemon_of(machine))
    machine.wait_shown(MOUNT, "SubState", "auto-restart")
    assert machine.shell("find /var/cache/lazymem -name 'run-*'")
    machine.run("umount", "--lazy", "/run/lazymem/web")
    slow(0)  # which counts from the daemon's end on
    machine.wait_shown(MOUNT, "ActiveState", "inactive")
    assert machine.show(MOUNT, "Result") == "success"
    assert not mounted(machine)
    assert not machine.shell("find /var/cache/lazymem -name 'run-*'")


def test_a_mistake_at_a_first_start_is_not_tried_again(machine: SystemdMachine) -> None:
    machine.shell("cp /etc/lazymem/mount-web.conf /root/mount-web.conf")
    try:
        for mistake in ("--nonsense", "--deadline=-1", "-o nonsense"):
            machine.shell(f"sed -i 's/^LAZYMEM_MOUNT_OPTIONS=\"/&{mistake} /' /etc/lazymem/mount-web.conf")
            assert machine.run("systemctl", "start", MOUNT, check=False).returncode == 1
            found = [machine.show(MOUNT, name) for name in ("ActiveState", "ExecMainStatus", "NRestarts")]
            assert found == ["failed", "78", "0"], mistake
            machine.shell("cp /root/mount-web.conf /etc/lazymem/mount-web.conf")
            machine.run("systemctl", "reset-failed", MOUNT)
    finally:
        machine.shell("cp /root/mount-web.conf /etc/lazymem/mount-web.conf")


@pytest.mark.parametrize("whole", [False, True])
def test_a_mount_that_cannot_go_on_ends_the_guest_and_both_start_anew(machine: SystemdMachine, whole: bool) -> None:
    """As with an older kernel, where nothing is kept. `whole`: with what systemd starts afterwards to clean up, as its
    newer versions do."""
    machine.shell("sed -i 's/^LAZYMEM_MOUNT_OPTIONS=\"/&--no-supervisor /' /etc/lazymem/mount-web.conf")
    try:
        machine.shell(commands("start"))
        daemon = machine.show(MOUNT, "MainPID")  # without a supervisor
        machine.shell(f"systemctl kill --signal=KILL {MOUNT}" if whole else f"kill -KILL {daemon}")
        for unit in (VM, MOUNT):
            wait_until(lambda unit=unit: machine.show(unit, "ActiveState") in ENDED, f"{unit} ends")  # type: ignore[misc]
    finally:
        machine.shell("sed -i 's/--no-supervisor //' /etc/lazymem/mount-web.conf")
    assert whole or not mounted(machine)
    machine.shell(commands("start"))
    assert tick(machine)


def test_a_server_that_is_restarted_is_only_waited_for(machine: SystemdMachine) -> None:
    machine.shell(commands("start"))
    before = tick(machine)
    machine.run("systemctl", "restart", SERVER)
    machine.shell("cksum /run/lazymem/web/pc.ram")
    assert tick(machine) > before


def test_a_guest_from_another_host_over_tls(installed: SystemdMachine) -> None:
    """As "Over a network" says; after it all is as before, for the tests that come then."""
    machine = installed
    configure(machine, RAM_MIB)
    machine.shell("mkdir /root/before && cp /etc/lazymem/*.conf /root/before/")
    for block in ("pki", "tls-serve", "tls-mount"):
        machine.shell(commands(block))
    dialled = 's/^LAZYMEM_MOUNT_OPTIONS="/&--tls-name ram.example.net /'  # it is 127.0.0.1 here
    machine.shell(f"sed -i '{dialled}' /etc/lazymem/mount-web.conf")
    try:
        machine.shell(commands("start"))
        assert "0.0.0.0:7411" in machine.shell(
            f"systemctl show --property=Listen {SERVER.replace('.service', '.socket')}"
        )
        before, daemon = tick(machine), daemon_of(machine)
        machine.shell(f"kill -KILL {daemon}")
        wait_until(lambda: daemon_of(machine) != daemon, "another daemon")
        machine.shell("cksum /run/lazymem/web/pc.ram")
        machine.run("systemctl", "restart", SERVER)
        assert tick(machine) > before
        assert "(host-b): takes web" in machine.log()
        machine.run("systemctl", "stop", VM, MOUNT)
        machine.shell("sed -i 's/^LAZYMEM_SERVE_OPTIONS=.*/LAZYMEM_SERVE_OPTIONS=/' /etc/lazymem/serve-7411.conf")
        machine.run("systemctl", "stop", SERVER)
        assert machine.run("systemctl", "start", SERVER, check=False).returncode == 1
        assert "0.0.0.0 without TLS" in machine.log()
    finally:
        machine.run("systemctl", "stop", VM, MOUNT, SERVER, SERVER.replace(".service", ".socket"))
        machine.shell("rm -r /etc/systemd/system/lazymem-serve@.socket.d; systemctl daemon-reload")
        machine.shell("cp /root/before/*.conf /etc/lazymem/")
        machine.run("systemctl", "reset-failed", check=False)
        machine.run("systemctl", "start", SERVER.replace(".service", ".socket"))
