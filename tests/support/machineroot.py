"""Run as root, in a mount namespace of its own: a throwaway machine whose pid 1 is systemd, over this machine's files.

Its root is an overlay of ours with all changes in memory, its units are the few in `STOCK_UNITS` and what is installed
into it, its network is its own. Nothing of it is left when this process ends, however it ends: pid 1 is killed with it,
and with pid 1 all that it started; with the mount namespace go the mounts.

    machineroot.py FOLDER [FROM:TO]...  an empty folder to mount in; it stays empty for everybody else. Each FROM of
                                        this machine is seen as TO there.

Standard input: one JSON object a line, {"run": [WORD...]} or {"copy": [FROM, TO]}; standard output: {"code", "out",
"err"} for each. First comes {"ready": PID}, or {"refused": REASON} where this machine does not allow all that. The end
of input ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

STOCK_UNITS = (
    *("basic.target", "final.target", "local-fs.target", "multi-user.target", "network-online.target"),
    *("network.target", "paths.target", "shutdown.target", "slices.target", "sockets.target", "sysinit.target"),
    *("timers.target", "umount.target"),
)
UNIT_FOLDERS = ("/usr/lib/systemd/system", "/lib/systemd/system")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "fuse")
EMPTY_FOLDERS = (
    # What this machine would do at boot and must not happen there.
    *("/etc/systemd/system", "/usr/lib/systemd/system-generators", "/etc/systemd/system-generators"),
    *("/usr/lib/sysusers.d", "/etc/sysusers.d", "/usr/lib/tmpfiles.d", "/etc/tmpfiles.d"),
    # Fresh for its own use.
    *("/run", "/tmp", "/var/cache", "/var/lib", "/srv", "/opt", "/usr/local/bin", "/etc/lazymem"),
)
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    # So that it leaves the kernel's settings alone, and boots without a console.
    "container": "lazymem-test",
    "SYSTEMD_UNIT_PATH": "/etc/systemd/system:/run/stock-units",
}
ORDER_SECONDS = 100.0
"""For a command: more than any takes on a busy machine, less than a test may."""

ENTER = ("nsenter", "--mount", "--pid", "--cgroup", "--uts", "--ipc", "--net", "--root", "--wd")
PATIENCE_SECONDS = 60.0
"""For a condition on a busy test machine; nothing waits this long unless it is broken."""

START = """
set -eu
root=$1; shift
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t cgroup2 cgroup "$root/sys/fs/cgroup"
cd "$root"
mkdir -p .old
pivot_root . .old
umount -l .old
mount --make-rshared /
echo "now systemd" >&2
exec "$@"
"""


class RefusedError(Exception):
    """This machine does not allow it."""


def call(*command: object) -> None:
    """Raises RefusedError with what the command said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RefusedError(f"{command[0]}: {done.stderr.strip() or done.returncode}")


def let_go_of_mounts() -> None:
    """Our namespace began with a copy of each mount, and a FUSE daemon lives as long as any copy of its mount: those of
    other tests are not ours to keep."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, behind = line.partition(" - ")
        if behind.split()[0] in ("fuse", "fuseblk") or behind.split()[0].startswith("fuse."):
            path = before.split()[4].encode().decode("unicode_escape")
            subprocess.run(["umount", "--lazy", path], capture_output=True, check=False)  # gone is as good


def make_root(folder: Path, binds: list[str]) -> Path:
    """The machine's files, below `folder`."""
    call("mount", "-t", "tmpfs", "-o", "mode=0755", "lazymem-machine", folder)
    upper, work, root = folder / "upper", folder / "work", folder / "root"
    for path in (upper, work, root):
        path.mkdir()
    call("mount", "-t", "overlay", "-o", f"lowerdir=/,upperdir={upper},workdir={work}", "lazymem-machine", root)
    for name in EMPTY_FOLDERS:
        path = root / name[1:]
        path.mkdir(parents=True, exist_ok=True)
        call("mount", "-t", "tmpfs", "-o", f"mode={'1777' if name == '/tmp' else '0755'}", "tmpfs", path)
    add_devices(root / "dev")
    # Without what is mounted below it: a kernel does not mount control groups over control groups.
    call("mount", "--bind", "/sys", root / "sys")
    call("mount", "-t", "fusectl", "fusectl", root / "sys/fs/fuse/connections")
    (root / "proc").mkdir(exist_ok=True)
    add_units(root)
    for bind in binds:
        source, _, target = bind.partition(":")
        (root / target[1:]).mkdir(parents=True)
        call("mount", "--bind", source, root / target[1:])
    return root


def add_devices(folder: Path) -> None:
    call("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", folder)
    for name in DEVICES:
        if Path("/dev", name).exists():
            (folder / name).touch()
            call("mount", "--bind", f"/dev/{name}", folder / name)
    (folder / "ptmx").symlink_to("pts/ptmx")


def add_units(root: Path) -> None:
    stock = root / "run/stock-units"
    stock.mkdir()
    for name in STOCK_UNITS:
        (found,) = [path for path in (Path(folder, name) for folder in UNIT_FOLDERS) if path.exists()][:1]
        shutil.copy(found, stock / name)
    (stock / "default.target").write_text("[Unit]\nRequires=multi-user.target\nAfter=multi-user.target\n")
    for name in ("fstab", "machine-id"):
        (root / "etc" / name).write_text("")


class Cgroup:
    """A control group of the machine's own, of version 2, below the one that we are in."""

    def __init__(self, folder: Path) -> None:
        hierarchy = folder / "cgroups"
        hierarchy.mkdir()
        call("mount", "-t", "cgroup2", "cgroup", hierarchy)
        (ours,) = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
        if ours.startswith("/.."):  # outside of what this namespace shows: whoever started us only came to visit
            ours = ""
        self.path = hierarchy / ours.lstrip("/") / f"lazymem-machine-{os.getpid()}"
        try:
            self.path.mkdir()
        except OSError as error:
            raise RefusedError(f"no control group can be made: {error}") from error

    def remove(self) -> None:
        """Once its processes have died: killed ones take a moment."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while self.path.exists() and time.monotonic() < give_up:
            for folder, _, _ in os.walk(self.path, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
            time.sleep(0.01)


class Machine:
    """It runs from construction on."""

    def __init__(self, folder: Path, binds: list[str]) -> None:
        self._root = make_root(folder, binds)
        self._cgroup = Cgroup(folder)
        namespaces = ("--pid", "--fork", "--kill-child=KILL", "--cgroup", "--uts", "--ipc", "--net", "--mount")
        systemd = next(path for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if os.path.exists(path))
        # In its control group before it gets the namespace that has this group for its root.
        enter = f'echo $$ >"{self._cgroup.path}/cgroup.procs"; exec "$@"'
        self._starter = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "sh", "-c", enter, "sh", "unshare", *namespaces),
                *("sh", "-c", START, "sh", str(self._root), systemd, "--system", "--log-target=null"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            text=True,
        )
        try:
            self.pid = self._wait_started()
        except BaseException:
            self.close()
            raise

    def _wait_started(self) -> int:
        children = Path(f"/proc/{self._starter.pid}/task/{self._starter.pid}/children")
        give_up = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < give_up:
            if self._starter.poll() is not None:
                assert self._starter.stderr is not None
                said = self._starter.stderr.read()
                raise (RuntimeError if "now systemd" in said else RefusedError)(f"it did not start: {said.strip()}")
            with contextlib.suppress(OSError, ValueError):
                pid = int(children.read_text())
                run = Path(f"/proc/{pid}/root/run")  # ours, until it has a root of its own
                if (run / "stock-units").exists() and (run / "systemd/private").exists():
                    return pid
            time.sleep(0.01)
        raise TimeoutError("systemd was not ready in time")

    def copy(self, source: str, target: str) -> dict[str, object]:
        """Into the machine, readable by all its users. A folder's contents, if it ends in `/.`."""
        copied = ["cp", "-r", "--no-preserve=mode,ownership", source, f"{self._root}{target}"]
        done = subprocess.run(copied, capture_output=True, text=True, check=False, umask=0o022)
        return {"code": done.returncode, "out": done.stdout, "err": done.stderr}

    def run(self, command: list[str]) -> dict[str, object]:
        target = [ENTER[0], f"--target={self.pid}", *ENTER[1:]]
        try:
            done = subprocess.run(
                [*target, *command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                env=ENVIRONMENT,
                timeout=ORDER_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return {"code": 124, "out": "", "err": f"not done in {ORDER_SECONDS:.0f} s"}
        return {"code": done.returncode, "out": done.stdout, "err": done.stderr}

    def close(self) -> None:
        """At once, as a machine whose plug is pulled."""
        self._abort_mounts()
        with contextlib.suppress(AttributeError, ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._starter.kill()
        self._starter.communicate()
        self._cgroup.remove()

    def _abort_mounts(self) -> None:
        """What waits for a page of a mount whose daemon stands still cannot even be killed."""
        with contextlib.suppress(AttributeError, OSError):
            mounts = [line.split() for line in Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()]
            for mount in mounts:
                if mount[mount.index("-") + 1].startswith("fuse."):
                    minor = mount[2].partition(":")[2]
                    Path(f"/sys/fs/fuse/connections/{minor}/abort").write_text("1")


def say(message: dict[str, object]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its input
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        let_go_of_mounts()
        machine = Machine(Path(sys.argv[1]), sys.argv[2:])
    except RefusedError as error:
        say({"refused": str(error)})
        return
    try:
        say({"ready": machine.pid})
        for line in sys.stdin:
            order = json.loads(line)
            say(machine.copy(*order["copy"]) if "copy" in order else machine.run(order["run"]))
    finally:
        machine.close()


if __name__ == "__main__":
    main()
