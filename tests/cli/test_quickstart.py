"""What a command that only asks may not import; the quick way of importing and leaving leaves nothing behind."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.cli.quickstart import quick_imports

LATER = {"rich", "trio", "pyfuse3", "attr", "ssl", "zstandard", "unicorn", "asyncio"}
"""What no command needs that only looks, asks, or says what is wrong with its command line."""

LOADED = "import sys, json; json.dump(sorted(sys.modules), open({file!r}, 'w'))"


def _python(code: str, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**{k: v for k, v in os.environ.items() if k != "NOTIFY_SOCKET"}, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def _loaded(file: Path) -> set[str]:
    found: set[str] = set(json.loads(file.read_text()))
    assert "lazymem" in found, "nothing was seen"
    return found


@pytest.mark.parametrize(
    ("module", "arguments", "code"),
    [
        ("mount", ["127.0.0.1:9", "/no/such/folder"], 13),
        ("mount", ["--help"], 0),
        ("vm", ["--help"], 0),
        ("vm", ["-m", "nonsense"], 2),
        ("vm", ["-m", "64"], 2),
        ("vm", ["--engine", "qemu", "--qemu", "/no/such", "--pcram-file", "/no/such", "-kernel", "k"], 3),
        ("status", ["/"], 13),
        ("umount", ["/"], 13),
        ("umount", ["--help"], 0),
        ("main", ["--help"], 0),
        ("main", ["status", "/"], 13),
    ],
)
def test_who_only_asks_waits_for_no_event_loop(module: str, arguments: list[str], code: int, tmp_path: Path) -> None:
    file = tmp_path / "modules"
    ran = _python(
        f"""
import sys
from lazymem.cli import {module}
try:
    code = {module}.main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
{LOADED.format(file=str(file))}
sys.exit(code)
""",
        *arguments,
    )
    assert ran.returncode == code, ran.stderr
    assert not _loaded(file) & LATER


def test_stand_ins_are_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("importlib.metadata", "typing_extensions"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with quick_imports():
        assert not gc.isenabled()
        from importlib.metadata import PackageNotFoundError, version

        with pytest.raises(PackageNotFoundError):
            version("pyfuse3")
        with pytest.raises(ImportError):
            importlib.import_module("typing_extensions")
    assert gc.isenabled()
    assert not {"importlib.metadata", "typing_extensions"} & set(sys.modules)
    assert importlib.import_module("importlib.metadata").version("pyfuse3")


def test_an_event_loop_comes_without_openssl_and_tls_can_be_had_later() -> None:
    ran = _python(
        """
import sys
from lazymem.cli.quickstart import TRIO_LEFT_OUT, quick_imports
with quick_imports():
    import trio, secrets
    assert issubclass(trio.SSLStream, object), "a name that others may take"
assert not {"_ssl", "_hashlib", *TRIO_LEFT_OUT} & set(sys.modules)
trio.run(trio.sleep, 0)
import hashlib, ssl
from lazymem.tls import pipe
assert hashlib.blake2b(b"").hexdigest() and ssl.create_default_context()
""",
    )
    assert ran.returncode == 0, ran.stderr


def test_a_python_without_hashes_of_its_own_has_openssls() -> None:
    """As Fedora's and Red Hat's (--with-builtin-hashlib-hashes=blake2): without them `random` would not load."""
    ran = _python(
        """
import sys
for name in ("_md5", "_sha1", "_sha2", "_sha256", "_sha3", "_sha512"):
    sys.modules[name] = None
from lazymem.cli import mount
from lazymem.cli.quickstart import quick_imports
with quick_imports():
    import hashlib, random, trio
assert hashlib.sha256(b"").name == "sha256"
""",
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""


def test_who_has_an_event_loop_already_has_all_of_it() -> None:
    ran = _python(
        """
import trio
stream = trio.SSLStream
from lazymem.cli.quickstart import quick_imports
with quick_imports():
    import trio._ssl
assert trio.SSLStream is stream is trio._ssl.SSLStream
""",
    )
    assert ran.returncode == 0, ran.stderr


def test_what_is_loaded_already_is_left_alone() -> None:
    real = importlib.import_module("importlib.metadata")
    with quick_imports():
        assert sys.modules["importlib.metadata"] is real
    assert sys.modules["importlib.metadata"] is real


def test_an_import_that_fails_leaves_all_as_it_was() -> None:
    import ctypes.util

    look = ctypes.util.find_library
    with pytest.raises(ModuleNotFoundError), quick_imports():
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert ctypes.util.find_library is look
    assert gc.isenabled()


def test_who_leaves_quickly_has_said_everything() -> None:
    """Into a pipe, where output is buffered; and with a thread that still works, which is waited for."""
    said = _python("from lazymem.cli.quickstart import leave; print('x' * 50000); leave(3)")
    assert (said.returncode, len(said.stdout)) == (3, 50001)
    waited = _python(
        """
import sys, threading
from lazymem.cli.quickstart import leave
go = threading.Event()
def work():
    go.wait(); sys.stdout.write("worked")
threading.Thread(target=work).start()
import atexit; threading._register_atexit(go.set)
leave(4)
"""
    )
    assert (waited.returncode, waited.stdout) == (4, "worked"), waited.stderr


def test_a_reader_that_is_gone_is_no_traceback() -> None:
    """Python's own way to end then: one line that it could not write, and a code of its own."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    code = "from lazymem.cli.quickstart import leave; print('x'); leave(0)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=write_end,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        check=False,
    )
    os.close(write_end)
    assert done.returncode == 120
    assert b"Traceback" not in done.stderr
