"""Set-up of a checkout: system packages that are missing, the Linux guest's parts, the virtual environment.

Standard library only: it runs before anything is installed. Every need is tested for itself (a header, a program), not
by a package's name, so that a Python from elsewhere or a hand-made install is as good. What is there stays untouched.

The Linux guest's kernel and busybox are never installed, because a kernel package changes what the machine boots and
busybox-static replaces busybox: where the machine has no usable ones, they are unpacked from the distribution's
packages into .cache/linux-guest.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "lazymem-setup-stamp"
GUEST_PARTS = ROOT / ".cache" / "linux-guest"
SOURCES = (ROOT / "lazymem", ROOT / "server" / "lazymem_server")
PYTHON_PACKAGE = f"python{sys.version_info[0]}.{sys.version_info[1]}"


def say(text: str) -> None:
    """One line of progress, out at once even where stdout is a pipe."""
    print(f"setup: {text}", flush=True)


def fail(text: str) -> NoReturn:
    """Ends the set-up with one reason."""
    raise SystemExit(f"setup: {text}")


@dataclass(frozen=True)
class Need:
    """Something that must be on the machine: what it is for, how to see it, the packages that bring it."""

    purpose: str
    there: Callable[[], bool]
    packages: tuple[str, ...]


def program(*names: str) -> Callable[[], bool]:
    """A test that every one of these programs can be found; sbin counts, for users whose PATH lacks it."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    return lambda: all(shutil.which(name, path=path) for name in names)


def has_fuse_headers() -> bool:
    """Whether a C program could be built against libfuse 3."""
    return program("pkg-config")() and subprocess.run(["pkg-config", "--exists", "fuse3"], check=False).returncode == 0


NEEDS = (
    Need(
        "virtual environments", lambda: bool(find_spec("venv") and find_spec("ensurepip")), (f"{PYTHON_PACKAGE}-venv",)
    ),
    Need(
        "Python's headers, to build pyfuse3",
        lambda: Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        (f"{PYTHON_PACKAGE}-dev",),
    ),
    Need("a C compiler", lambda: program("gcc")() and Path("/usr/include/stdio.h").exists(), ("gcc", "libc6-dev")),
    Need("pkg-config", program("pkg-config"), ("pkg-config",)),
    Need("libfuse's headers", has_fuse_headers, ("libfuse3-dev", "pkg-config")),
    Need("mounts without root", program("fusermount3"), ("fuse3",)),
    Need("an assembler for the guests", program("as", "ld"), ("binutils",)),
    Need("QEMU", program("qemu-system-x86_64"), ("qemu-system-x86",)),
    Need("memtest86+, a guest", Path("/boot/memtest86+x64.bin").exists, ("memtest86+",)),
    Need("systemd, to check and start its units", program("systemd-analyze"), ("systemd",)),
)


def main() -> None:
    """The whole set-up; a second run finds everything in place and takes well under a second."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        fail(f"the guests are x86-64 and the mount is Linux's: not on {platform.system()} {platform.machine()}")
    install_missing(NEEDS)
    provide_guest_parts()
    make_environment()
    compile_sources(SOURCES)
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        say(
            "WARNING: /dev/fuse is missing or closed to this user, so nothing can be mounted "
            "(in a container: --device /dev/fuse)"
        )


# --- system packages


def install_missing(needs: tuple[Need, ...]) -> None:
    """Installs the packages of the needs that are not met; nothing else."""
    missing = [need for need in needs if not need.there()]
    if not missing:
        return
    for need in missing:
        say(f"missing: {need.purpose} ({' '.join(need.packages)})")
    packages = sorted({package for need in missing for package in need.packages})
    require_apt(packages)
    apt_install(packages)
    still = [need.purpose for need in missing if not need.there()]
    if still:
        fail(f"installed {' '.join(packages)}, but still missing: {', '.join(still)}")


def require_apt(packages: list[str]) -> None:
    """Only Debian and its relatives are known here; elsewhere the user gets the list."""
    if not shutil.which("apt-get"):
        fail(f"no apt-get here; install what Debian calls: {' '.join(packages)}")


def as_root(command: list[str], needed_for: str) -> list[str]:
    """The command, with sudo where we are not root."""
    if os.geteuid() == 0:
        return ["env", "DEBIAN_FRONTEND=noninteractive", *command]
    if not shutil.which("sudo"):
        fail(f"not root and no sudo; needed for {needed_for}. As root: {' '.join(command)}")
    return ["sudo", "env", "DEBIAN_FRONTEND=noninteractive", *command]


def apt_install(packages: list[str]) -> None:
    """Installs with the lists at hand, and only if that fails with new ones."""
    say(f"installing {' '.join(packages)}" + ("" if os.geteuid() == 0 else " with sudo"))
    command = as_root(["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages], "system packages")
    lists_exist = any(Path("/var/lib/apt/lists").glob("*_Packages*"))
    if lists_exist and subprocess.run(command, check=False).returncode == 0:
        return
    apt_update()
    if subprocess.run(command, check=False).returncode != 0:
        fail(f"apt-get could not install {' '.join(packages)} (its reason is above)")


def apt_update() -> None:
    """New package lists."""
    say("updating the package lists")
    subprocess.run(as_root(["apt-get", "update", "-q"], "package lists"), check=False)


# --- the Linux guest: a kernel and a static busybox


def provide_guest_parts() -> None:
    """A kernel that this user can read and a busybox that needs no libraries, from the machine or into the cache."""
    if not usable_kernel():
        kernel = unreadable_kernel()
        if kernel is not None:
            copy_as_root(kernel)
        else:
            unpack(kernel_package(), "boot/vmlinuz-*")
    if not usable_busybox():
        unpack("busybox-static", "*bin/busybox")


def usable_kernel() -> bool:
    """Whether a readable kernel image is at hand."""
    found = [*GUEST_PARTS.glob("vmlinuz-*"), *Path("/boot").glob("vmlinuz-*")]
    return any(os.access(path, os.R_OK) for path in found)


def usable_busybox() -> bool:
    """Whether a busybox without a dynamic loader is at hand."""
    return any(is_static(path) for path in (GUEST_PARTS / "busybox", Path("/bin/busybox"), Path("/usr/bin/busybox")))


def is_static(path: Path) -> bool:
    """Whether the ELF file asks for no program interpreter."""
    try:
        head = path.read_bytes()[:4096]
    except OSError:
        return False
    return head[:4] == b"\x7fELF" and b"/ld-" not in head


def unreadable_kernel() -> Path | None:
    """The newest of the machine's kernels; Ubuntu gives them mode 0600."""
    found = sorted(Path("/boot").glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def copy_as_root(kernel: Path) -> None:
    """The machine's own kernel image, into the cache and readable."""
    GUEST_PARTS.mkdir(parents=True, exist_ok=True)
    target = GUEST_PARTS / kernel.name
    say(
        f"copying {kernel} to {target.relative_to(ROOT)} with sudo: "
        "it is the Linux guest's kernel, and only root may read it"
    )
    owner = f"--owner={os.geteuid()}"
    command = as_root(["install", "-m", "0644", owner, str(kernel), str(target)], "reading the kernel")
    if subprocess.run(command, check=False).returncode != 0:
        fail(f"could not copy {kernel}")


def kernel_package() -> str:
    """The package that holds the newest small kernel image: what the distribution's meta package depends on."""
    require_apt(["linux-image-cloud-amd64 (Ubuntu: linux-image-virtual)"])
    for attempt in (1, 2):
        for meta in ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64"):
            output = subprocess.run(["apt-cache", "depends", meta], capture_output=True, text=True, check=False).stdout
            found = re.search(r"Depends: (linux-image-\d\S+)", output)
            if found:
                return found.group(1)
        if attempt == 1:
            apt_update()
    fail("no kernel package found (looked for linux-image-cloud-amd64, linux-image-virtual, linux-image-amd64)")


def unpack(package: str, pattern: str) -> None:
    """One file of a package, into the cache; the package is not installed."""
    name = pattern.rsplit("/")[-1]
    say(f"unpacking {name} from the package {package} into {GUEST_PARTS.relative_to(ROOT)} (for the Linux guest)")
    require_apt([package])
    GUEST_PARTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # Its own user could not write into our folder: apt would warn of that, and do without.
        command = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package]
        if subprocess.run(command, cwd=folder, check=False).returncode != 0:
            apt_update()
            if subprocess.run(command, cwd=folder, check=False).returncode != 0:
                fail(f"apt-get could not download {package} (its reason is above)")
        (archive,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), f"{folder}/tree"], check=True)
        (found,) = [path for path in Path(folder, "tree").rglob("*") if path.match(pattern) and path.is_file()]
        shutil.copy(found, GUEST_PARTS / f"{found.name}.part")
        os.replace(GUEST_PARTS / f"{found.name}.part", GUEST_PARTS / found.name)


# --- the virtual environment


def make_environment() -> None:
    """`.venv` with lazymem (editable) and the development tools; skipped while the stamp says nothing changed."""
    stamp = stamp_text()
    if STAMP.exists() and STAMP.read_text() == stamp and environment_works():
        return
    if not environment_works():
        say("making the virtual environment .venv")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    say("installing lazymem and its development tools into .venv (a minute or two the first time)")
    STAMP.unlink(missing_ok=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q", "-e", ".[dev]"]
    # Older pips build sdnotify, which has no pyproject.toml, in a way that they themselves warn of.
    environment = {**os.environ, "PIP_USE_PEP517": "1"}
    if subprocess.run(pip, cwd=ROOT, check=False, env=environment).returncode != 0:
        fail("pip could not install lazymem (its reason is above)")
    STAMP.write_text(stamp)
    say("done")


def compile_sources(folders: tuple[Path, ...]) -> None:
    """Byte code beside the sources, where it is missing or old (nothing else does that for an editable install).

    Python itself keeps it only where it may: not in a checkout of root's that a user runs, nor where
    PYTHONDONTWRITEBYTECODE is set, as in many containers. Then a third of each command's start would be compiling.
    """
    command = [str(VENV / "bin" / "python"), "-m", "compileall", "-q", *map(str, folders)]
    # Where it may not be written it is not: that costs time, and nothing else.
    subprocess.run(command, capture_output=True, check=False)


def environment_works() -> bool:
    """Whether .venv is there and its Python starts (a moved or half-made one does not)."""
    command = [str(VENV / "bin" / "python"), "-c", "import sys, pip; sys.exit(sys.version_info < (3, 11))"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def stamp_text() -> str:
    """What the environment depends on: where it is, what it installs, and this script."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return f"{ROOT} {digest.hexdigest()}\n"


if __name__ == "__main__":
    main()
