"""A run of lazymem-vm: puts RAM blocks, machine, monitor and migration together, and ends with the right exit code.

Threads: trio's (this one) has the monitor and the signals, the vCPU has its own (vm/machine.py); what may wait for a
page of a mount, or for a disk, is done in others. None of them can keep the process from ending.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NoReturn

import trio

from lazymem.cli.exitcode import note
from lazymem.cli.servicemanager import tell_ready
from lazymem.cli.vm_options import VmOptions
from lazymem.errors import LazymemError
from lazymem.vm.commands import Commands
from lazymem.vm.identity import check_may_share
from lazymem.vm.machine import Ending, Machine, MachineConfig, block_sizes
from lazymem.vm.migration import Migrations
from lazymem.vm.monitor import Monitor
from lazymem.vm.ram import RamBlocks, check_host, this_host
from lazymem.vm.runstate import RunState
from lazymem.vm.serial import SerialLine, open_serial
from lazymem.vm.uri import Uri

_CLOSE_SECONDS = 2.0
"""For the vCPU to stand at the end: a slice takes 10 ms. One that waits for a page is left waiting."""

_LEAVE_SECONDS = 5.0
"""For a save or a load to let go at the end. One that waits for a file (a pipe, a mount whose server is away) is left
waiting; a save's file gets its time to reach the disk."""


def say(line: str) -> None:
    """One line on the terminal, beside the guest's own."""
    print(f"lazymem-vm: {line}", file=sys.stderr, flush=True)


async def run(options: VmOptions) -> int:
    try:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            vm = await _interruptible(signals, lambda: _Vm(options))
            return vm if isinstance(vm, int) else await vm.run(signals)
    except BaseExceptionGroup as group:
        raise _only_error(group) from None


async def _interruptible(signals: AsyncIterator[int], make: Callable[[], _Vm]) -> _Vm | int:
    """Make the machine in a thread, since opening files on a mount may wait; or 128 + signal when one comes."""
    made: list[_Vm] = []
    caught: list[int] = []
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            async for number in signals:
                caught.append(number)
                nursery.cancel_scope.cancel()
                return

        nursery.start_soon(watch)
        made.append(await trio.to_thread.run_sync(make, abandon_on_cancel=True))
        nursery.cancel_scope.cancel()
    return made[0] if made else 128 + caught[0]


def _only_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error in nurseries' wrapping, so that it is told in one line; a bug with company stays a group."""
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:
        inner = inner.exceptions[0]
    return inner


class _Vm:
    """One run of the emulator."""

    def __init__(self, options: VmOptions) -> None:
        self._options = options
        self._exit_code: int | None = None
        self._over = trio.Event()
        self._let_go = threading.Event()
        with contextlib.ExitStack() as undo:
            self._blocks = undo.enter_context(_open_blocks(options))
            self._serial = _open_serial(options.serial, undo)
            self._machine = Machine(_machine_config(options), self._blocks, self._serial)
            undo.callback(self._machine.close)
            if options.incoming is None:
                self._machine.boot()
            undo.pop_all()
        self._runstate = RunState(self._machine, incoming=options.incoming is not None)
        self._migrations = Migrations(self._runstate, start_paused=options.start_paused, notice=say)

    async def run(self, signals: AsyncIterator[int]) -> int:
        """Until the guest ends, somebody quits it, a signal comes, or its state is refused."""
        try:
            monitor = None
            if self._options.qmp is not None:
                monitor = await Monitor.listen(self._options.qmp, self._runstate)
            async with trio.open_nursery() as nursery:
                await self._serve(nursery, signals, monitor)
                nursery.cancel_scope.cancel()
        finally:
            self._let_go.set()
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._leave_at_next, signals)
                    await trio.to_thread.run_sync(self._close)
                    nursery.cancel_scope.cancel()
        assert self._exit_code is not None
        return self._exit_code

    async def _serve(self, nursery: trio.Nursery, signals: AsyncIterator[int], monitor: Monitor | None) -> None:
        nursery.start_soon(self._watch_signals, signals)
        self._watch_guest()
        if monitor is not None:

            def background(job: Callable[[], Awaitable[None]]) -> None:
                nursery.start_soon(job)

            commands = Commands(self._runstate, self._migrations, background, self._quit)
            nursery.start_soon(monitor.serve, commands)
        await self._begin(nursery)
        await self._over.wait()
        if monitor is not None:
            await monitor.finish()

    async def _begin(self, nursery: trio.Nursery) -> None:
        incoming = self._options.incoming
        if incoming is None:
            if not self._options.start_paused:
                await self._runstate.cont()
            tell_ready()
        elif incoming.uri is None:
            tell_ready()  # for the monitor's migrate-incoming
        else:
            self._migrations.begin_take_over()
            # Beside the wait for the end: the state may come over a socket, some day.
            nursery.start_soon(self._take_over, incoming.uri)

    async def _take_over(self, uri: Uri) -> None:
        await self._migrations.take_over(uri)
        tell_ready()
        if self._options.qmp is None and self._runstate.status == "paused":
            say("the guest stands, as it was saved or as -S says, and there is no monitor (-qmp) to let it go on")

    def _watch_guest(self) -> None:
        token = trio.lowlevel.current_trio_token()
        self._machine.listen_ended(lambda ending: token.run_sync_soon(self._guest_ended, ending))

    def _guest_ended(self, ending: Ending) -> None:
        if ending.error is not None:
            say(str(ending.error))
        reason = "guest-shutdown" if ending.run_state == "shutdown" else "guest-panic"
        self._end(ending.exit_code, {"guest": True, "reason": reason})

    def _quit(self) -> None:
        self._end(0, {"guest": False, "reason": "host-qmp-quit"})

    async def _watch_signals(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if self._over.is_set():  # as `_leave_at_next`
                self._leave(128 + number)
            self._end(128 + number, {"guest": False, "reason": "host-signal"})

    def _end(self, exit_code: int, event: dict[str, object]) -> None:
        if self._exit_code is None:
            self._exit_code = exit_code
            self._runstate.emit("SHUTDOWN", event)
            self._over.set()
            threading.Thread(target=self._leave_in_time, args=(exit_code,), name="leave", daemon=True).start()

    def _leave_in_time(self, exit_code: int) -> None:
        if not self._let_go.wait(_LEAVE_SECONDS):
            self._serial.close()
            say("left a save or a load that still waited for a file")
            self._leave(exit_code)

    async def _leave_at_next(self, signals: AsyncIterator[int]) -> None:
        """Whoever asks twice does not want to wait for what the first one waits for."""
        async for number in signals:
            say("left at once, as asked twice; a mount stores what the guest wrote all the same")
            self._leave(128 + number)

    def _close(self) -> None:
        """The guest stands, its RAM files are synced, and everything is given back."""
        stands = self._machine.finish(_CLOSE_SECONDS)
        synced = threading.Event()
        threading.Thread(target=self._say_what_is_waited_for, args=(synced,), name="sync", daemon=True).start()
        try:
            self._blocks.sync()
        except LazymemError as error:
            say(str(error))
            self._exit_code = error.exit_code
        synced.set()
        if stands and self._give_back_in_time():
            return
        # Unmapping under a vCPU that waits for a page would crash it; the end of the process does all at once.
        self._serial.close()
        if not stands:
            say("the guest still waited for a page of its RAM")
        if self._exit_code is not None:
            self._leave(self._exit_code)

    def _say_what_is_waited_for(self, synced: threading.Event) -> None:
        if not synced.wait(_CLOSE_SECONDS):
            paths = ", ".join(str(mem_file.path) for mem_file in self._options.mem_files if mem_file.share)
            say(f"waits for the guest's memory to be stored in {paths} (a full disk? a second signal ends it at once)")

    def _give_back_in_time(self) -> bool:
        """False: that waits for a page whose server is away. (Unicorn touches pages of the RAM that it lets go of.)"""
        given_back = threading.Event()

        def give_back() -> None:
            if self._machine.close(0):
                self._blocks.close()
                given_back.set()

        threading.Thread(target=give_back, name="give back", daemon=True).start()
        return given_back.wait(_CLOSE_SECONDS)

    def _leave(self, exit_code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        note(self._options.exit_code_file, exit_code)
        os._exit(exit_code)


def _open_blocks(options: VmOptions) -> RamBlocks:
    if options.mem_files:
        check_host(this_host())
    for mem_file in options.mem_files:
        if mem_file.share:
            check_may_share(mem_file.path, mem_file.block)
    return RamBlocks(block_sizes(_machine_config(options)), options.mem_files)


def _open_serial(text: str, undo: contextlib.ExitStack) -> SerialLine:
    line = open_serial(text)
    undo.callback(line.close)
    return line


def _machine_config(options: VmOptions) -> MachineConfig:
    return MachineConfig(
        ram_bytes=options.ram_bytes, kernel=options.kernel, append=options.append, icount=options.icount
    )
