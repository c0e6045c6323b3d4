"""A command's start and end, quickly: imports without what only costs time, and no tidying up in front of the exit.

Nearly all of a command's start is imports, so whoever waits for a mount waits for these. What is left out while
`quick_imports` lasts, and why nobody misses it:

- Looks for garbage: imports make much and throw little away. What they made is never looked at again either.
- `importlib.metadata`, with its e-mail parser and zip files: pyfuse3 wants to know its own version, to show it.
- `typing_extensions`, where a development tool has installed it: msgspec prefers its functions for older Pythons.
- ldconfig(8), a process: trio looks for the thread library, to name its threads.
- OpenSSL: trio brings TLS and DTLS streams of its own, which nobody here uses (`lazymem.tls` has its own, and loads
  OpenSSL where TLS is asked for); and hashlib, which does as well without, for its own implementations. (Where Python
  was built without those, as for Fedora and Red Hat, it needs OpenSSL, and `random` needs it.)
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import NoReturn


class _NoMetadata(ModuleType):
    """Stands for `importlib.metadata`: no package is known."""

    class PackageNotFoundError(ModuleNotFoundError):
        pass

    @staticmethod
    def version(name: str) -> NoReturn:
        raise _NoMetadata.PackageNotFoundError(name)


class _LeftOut(ModuleType):
    """Stands for a module of which others take names that nobody uses; each of them is a class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


_SHA2 = ("_sha2",) if sys.version_info >= (3, 12) else ("_sha256", "_sha512")
_HASHES = ("_blake2", "_md5", "_sha1", "_sha3", *_SHA2)
"""Python's own, all of which hashlib loads where there is no OpenSSL."""

TRIO_LEFT_OUT = ("trio._dtls", "trio._highlevel_ssl_helpers", "trio._ssl")


@contextlib.contextmanager
def quick_imports(*, trio: bool = True) -> Iterator[None]:
    """For the imports of modules that are known to do without what is left out; nothing else belongs in it.

    `trio`: it is among them (a command without it has no use for ctypes.util either).
    """
    stand_ins: dict[str, ModuleType | None] = {
        "importlib.metadata": _NoMetadata("importlib.metadata"),
        "typing_extensions": None,
    }
    if _has_own_hashes():
        stand_ins["_hashlib"] = None
    if "trio" not in sys.modules:
        stand_ins |= {name: _LeftOut(name) for name in TRIO_LEFT_OUT}
    missing = {name: stand_in for name, stand_in in stand_ins.items() if name not in sys.modules}
    collected, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    sys.modules.update(missing)  # type: ignore[arg-type]  # None: Python's own way to say that there is no such module
    try:
        with _thread_library_known() if trio else contextlib.nullcontext():
            yield
    finally:
        for name in missing:
            sys.modules.pop(name, None)
        if len(sys.modules) > known:
            gc.freeze()
        if collected:
            gc.enable()


def _has_own_hashes() -> bool:
    try:
        for name in _HASHES:
            importlib.import_module(name)
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def _thread_library_known() -> Iterator[None]:
    import ctypes.util

    look = ctypes.util.find_library

    def find_library(name: str) -> str | None:
        return "libpthread.so.0" if name == "pthread" else look(name)

    ctypes.util.find_library = find_library
    try:
        yield
    finally:
        ctypes.util.find_library = look


def leave(exit_code: int) -> NoReturn:
    """End the process once what it printed is out. Python would take every module apart first, for 10 ms.

    Only where nothing is registered to run at the exit, and no file is open for writing. Threads are waited for.
    """
    threading = sys.modules.get("threading")
    if threading is not None and threading.active_count() > 1:
        sys.exit(exit_code)
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # as it is where whoever started us has closed it
                stream.flush()
    except OSError:  # whoever read it is gone: Python has its own way to end then
        sys.exit(exit_code)
    os._exit(exit_code)
