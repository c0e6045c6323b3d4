"""The monitor's commands: which there are, what they take, what they answer. No sockets; vm/monitor.py serves them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from msgspec import Struct

import lazymem
from lazymem.errors import LazymemError
from lazymem.pages import PAGE_SIZE
from lazymem.snapshot.manifest import RAM_BLOCK
from lazymem.vm.migration import MACHINE_TYPE, Migrations, Progress
from lazymem.vm.qmp import QmpError, Request, Signature, check
from lazymem.vm.ram import RamBlock
from lazymem.vm.runstate import RunState
from lazymem.vm.savestate import LEAVE_UNSYNCED
from lazymem.vm.savestream.format import IGNORE_SHARED
from lazymem.vm.uri import Uri, parse_uri

Arguments = Mapping[str, Any]
Handler = Callable[[Arguments], Awaitable[Any]]


NO_ARGUMENTS = Signature()

_CPU_PATH = "/machine/cpu[0]"
_TYPES = {"/machine": f"{MACHINE_TYPE}-machine", _CPU_PATH: "unicorn-x86_64-cpu"}


class Command(Struct, frozen=True):
    handler: Handler
    signature: Signature = NO_ARGUMENTS


def version() -> dict[str, Any]:
    """As query-version answers: the numbers are lazymem's own, `package` says so."""
    major, minor, micro = (int(part) for part in lazymem.__version__.split(".")[:3])
    return {
        "qemu": {"major": major, "minor": minor, "micro": micro},
        "package": f"lazymem-vm {lazymem.__version__}",
    }


class Commands:
    """All commands over one machine. `background` runs a save or a load beside the monitor; `quit_now` ends it all."""

    def __init__(
        self,
        runstate: RunState,
        migrations: Migrations,
        background: Callable[[Callable[[], Awaitable[None]]], None],
        quit_now: Callable[[], None],
    ) -> None:
        self._runstate = runstate
        self._migrations = migrations
        self._background = background
        self._quit_now = quit_now
        uri = Signature({"uri": str}, {"detach": bool})
        capabilities = Signature({"capabilities": list})
        self._table: dict[str, Command] = {
            "cont": Command(self._cont),
            "migrate": Command(self._migrate, uri),
            "migrate-incoming": Command(self._migrate_incoming, Signature({"uri": str})),
            "migrate-set-capabilities": Command(self._set_capabilities, capabilities),
            "migrate_cancel": Command(self._migrate_cancel),
            "qom-get": Command(self._qom_get, Signature({"path": str, "property": str})),
            "query-block": Command(self._query_block),
            "query-commands": Command(self._query_commands),
            "query-cpus-fast": Command(self._query_cpus),
            "query-machines": Command(self._query_machines),
            "query-memdev": Command(self._query_memdev),
            "query-migrate": Command(self._query_migrate),
            "query-migrate-capabilities": Command(self._query_capabilities),
            "query-status": Command(self._query_status),
            "query-version": Command(self._query_version),
            "quit": Command(self._quit),
            "stop": Command(self._stop),
        }

    async def run(self, request: Request) -> Any:
        """The command's result.

        Raises:
            QmpError: unknown, wrong arguments, or it failed.
        """
        command = self._table.get(request.command)
        if command is None:
            raise QmpError(f"The command {request.command} has not been found", "CommandNotFound")
        check(request.arguments, command.signature)
        try:
            return await command.handler(request.arguments)
        except QmpError:
            raise
        except LazymemError as error:
            raise QmpError(str(error)) from error
        except Exception as error:
            # Whatever it is, it must not end the guest, whose only copy this process is.
            raise QmpError(f"a bug in lazymem-vm: {error!r}") from error

    async def _query_commands(self, _: Arguments) -> list[dict[str, str]]:
        return [{"name": name} for name in [*self._table, "qmp_capabilities"]]

    async def _query_version(self, _: Arguments) -> dict[str, Any]:
        return version()

    async def _query_status(self, _: Arguments) -> dict[str, Any]:
        return {"status": self._runstate.status, "running": self._runstate.running, "singlestep": False}

    async def _query_block(self, _: Arguments) -> list[Any]:
        return []

    async def _query_cpus(self, _: Arguments) -> list[dict[str, Any]]:
        return [{"cpu-index": 0, "qom-path": _CPU_PATH, "thread-id": os.getpid(), "target": "x86_64"}]

    async def _query_machines(self, _: Arguments) -> list[dict[str, Any]]:
        return [{"name": MACHINE_TYPE, "is-default": True, "cpu-max": 1, "hotpluggable-cpus": False}]

    async def _stop(self, _: Arguments) -> dict[str, Any]:
        await self._runstate.stop()
        return {}

    async def _cont(self, _: Arguments) -> dict[str, Any]:
        await self._runstate.cont()
        return {}

    async def _quit(self, _: Arguments) -> dict[str, Any]:
        self._quit_now()
        return {}

    async def _query_memdev(self, _: Arguments) -> list[dict[str, Any]]:
        """Backed blocks and pc.ram. `filename` is ours; QEMU tells it by qom-get mem-path, which works here too."""
        blocks = self._runstate.machine.blocks.values()
        return [_memdev(block) for block in blocks if block.backed or block.name == RAM_BLOCK]

    async def _qom_get(self, arguments: Arguments) -> Any:
        path, wanted = arguments["path"], arguments["property"]
        if path in _TYPES:
            found = {"type": _TYPES[path]}
        else:
            block = self._runstate.machine.blocks.get(path.removeprefix("/objects/"))
            if block is None or not path.startswith("/objects/"):
                raise QmpError(f"Device '{path}' not found", "DeviceNotFound")
            found = _properties(block)
        if wanted not in found:
            raise QmpError(f"Property '{path}.{wanted}' not found")
        return found[wanted]

    async def _migrate(self, arguments: Arguments) -> dict[str, Any]:
        uri = parse_uri(arguments["uri"])
        # Before the answer goes out, so that a query-migrate right behind it sees this save and not the one before.
        self._migrations.begin_save()
        self._background(lambda: self._migrations.save(uri))
        return {}

    async def _migrate_incoming(self, arguments: Arguments) -> dict[str, Any]:
        uri = parse_uri(arguments["uri"])
        self._migrations.begin_take_over()
        self._background(lambda: self._take_over(uri))
        return {}

    async def _take_over(self, uri: Uri) -> None:
        # A refused state stands in query-migrate, and another one may be sent: the guest has not started.
        with contextlib.suppress(LazymemError):
            await self._migrations.take_over(uri)

    async def _migrate_cancel(self, _: Arguments) -> dict[str, Any]:
        self._migrations.cancel()
        return {}

    async def _query_migrate(self, _: Arguments) -> dict[str, Any]:
        progress = self._migrations.progress
        return {} if progress is None else _migration_info(progress)

    async def _query_capabilities(self, _: Arguments) -> list[dict[str, Any]]:
        return [
            {"capability": IGNORE_SHARED, "state": True},
            {"capability": LEAVE_UNSYNCED, "state": self._migrations.leave_unsynced},
        ]

    async def _set_capabilities(self, arguments: Arguments) -> dict[str, Any]:
        for entry in arguments["capabilities"]:
            _check_capability(entry)
        for entry in arguments["capabilities"]:
            if entry["capability"] == LEAVE_UNSYNCED:
                self._migrations.leave_unsynced = entry["state"]
        return {}


def _check_capability(entry: Any) -> None:
    if not isinstance(entry, dict) or set(entry) != {"capability", "state"} or not isinstance(entry["state"], bool):
        raise QmpError("Invalid parameter type for 'capabilities', expected: array of capability and state")
    if entry["capability"] not in (IGNORE_SHARED, LEAVE_UNSYNCED):
        raise QmpError(f"Parameter 'capability' does not accept value '{entry['capability']}'")
    if entry["capability"] == IGNORE_SHARED and not entry["state"]:
        raise QmpError(
            f"{IGNORE_SHARED} cannot be switched off: a file-backed block is never in a stream of lazymem-vm"
        )


def _properties(block: RamBlock) -> dict[str, Any]:
    kind = "memory-backend-file" if block.backed else "memory-backend-ram"
    found: dict[str, Any] = {"type": kind, "size": block.size, "share": block.share}
    if block.path is not None:
        found["mem-path"] = str(block.path)
    return found


def _memdev(block: RamBlock) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": block.name,
        "size": block.size,
        "share": block.share,
        "merge": False,
        "dump": True,
        "prealloc": False,
        "reserve": block.share,
        "host-nodes": [],
        "policy": "default",
    }
    if block.path is not None:
        found["filename"] = str(block.path)
    return found


def _migration_info(progress: Progress) -> dict[str, Any]:
    """Times in milliseconds, sizes in bytes, as QEMU's MigrationInfo."""
    ended = time.monotonic() if progress.ended is None else progress.ended
    info: dict[str, Any] = {"status": progress.status, "total-time": round((ended - progress.started) * 1000)}
    if progress.error is not None:
        info["error-desc"] = str(progress.error)
    if progress.address is not None and not progress.over:
        info["socket-address"] = [progress.address]
    if progress.incoming:
        return info
    if progress.stopped is not None:
        info["downtime"] = round((ended - progress.stopped) * 1000)
    info["ram"] = {
        "total": progress.total,
        "remaining": progress.remaining,
        "transferred": progress.transferred,
        "normal": progress.normal_pages,
        "normal-bytes": progress.normal_pages * PAGE_SIZE,
        "duplicate": progress.zero_pages,
        "dirty-sync-count": progress.passes,
        "page-size": PAGE_SIZE,
    }
    return info
