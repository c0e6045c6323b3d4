"""`lazymem-mount`: mounts a published snapshot's RAM. Checks and forks first, imports what is heavy in the daemon."""

from __future__ import annotations

from lazymem.cli.quickstart import leave, quick_imports

with quick_imports(trio=False):
    import argparse
    import os
    import sys
    from functools import cache, partial
    from pathlib import Path
    from typing import TYPE_CHECKING

    from lazymem.cli import logs
    from lazymem.cli.background import Announcer, Background, run_daemon, run_in_background
    from lazymem.cli.groups import cause_of
    from lazymem.cli.servicemanager import exit_code_of_first_start, is_first_start, is_service
    from lazymem.errors import LazymemError, UsageError
    from lazymem.fs import checks, mountinfo
    from lazymem.fs.descriptorstore import LOCK, SUCCESSOR_VARIABLE
    from lazymem.settings import (
        DEFAULT_RECORD_SECONDS,
        LinkSettings,
        MountSettings,
        Prefetch,
        ServerAddress,
        TcpEndpoint,
        default_cache_dir,
        parse_endpoint,
        parse_reserve,
        parse_servers,
    )
    from lazymem.tls.options import add_tls_options, maybe_tls

if TYPE_CHECKING:
    from lazymem.cli.fillprocess import FillProcess
    from lazymem.cli.mountdaemon import Progress
    from lazymem.fetch.headstart import HeadStart

PROGRAM = "lazymem-mount"

_EPILOG = """examples:
  lazymem-mount ram.example:7411 /mnt/ram                     the server's only snapshot
  lazymem-mount ram.example:7411/web /mnt/ram --state /srv/run1
                                                              one of several; this run's writes are kept
  lazymem-mount a.example:7411,b.example:7411 /mnt/ram        the same snapshot at two servers: if one goes, the other
  lazymem-mount ram.example:7411/web /mnt/ram --state /srv/run1 --reserve all
                                                              and the disk has room for all that the guest may write
  lazymem-mount unix:/run/lazymem.sock:/web /mnt/ram -o allow_other
  lazymem-mount ram.example:7411 /mnt/ram --tls-cert host-b.crt --tls-key host-b.key --tls-ca ca.crt
                                                              over TLS (lazymem pki --help: the files)
  lazymem-mount ram.example:7411 /mnt/ram --record set        then: mv set SNAPSHOT/working-set, where it is served
  lazymem-mount --upgrade /mnt/ram                            a daemon of the version installed now goes on with it
  umount /mnt/ram                                             ends it; so does SIGTERM, once no guest maps the file

The command returns when the mount answers. `lazymem status /mnt/ram` shows what it does.
"""

LOCK_WAIT_SECONDS = 30.0
"""For the daemon of an earlier mount on the same folder to store what its guest wrote."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    if "--upgrade" in (sys.argv if arguments is None else arguments):
        from lazymem.cli import upgrade

        return upgrade.main(arguments)
    try:
        found = parse(arguments)
    except SystemExit as end:
        if isinstance(end.code, int) and is_first_start():
            raise SystemExit(exit_code_of_first_start(end.code)) from end
        raise
    return mount(found)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, for `mount`. Raises SystemExit where that is all there is to do."""
    return _parser().parse_args(arguments)


def prepare() -> None:
    """Do ahead of a command what takes time and needs nothing of it."""
    _parser()


def mount(found: argparse.Namespace, *, from_ours: bool = False, background: Background = run_in_background) -> int:
    """Mount what the command line says, as `parse` read it; returns the command's exit code. `from_ours`: the
    server is one that lives no longer than we, and has another address the next time. `background`: runs the daemon."""
    first, announcer = is_first_start(), Announcer()
    if found.log:
        found.log = found.log.absolute()  # a daemon works in another folder
    try:
        settings = _settings(found)
        if SUCCESSOR_VARIABLE in os.environ:
            return run_daemon(lambda announcer: _daemon(found, settings, announcer), announcer)
        if found.foreground and is_service() and not found.no_supervisor and checks.maybe_no_resend() is None:
            return _supervise(found, settings, takes_up=not from_ours)
        if found.foreground and "LISTEN_FDS" in os.environ:  # systemd kept a mount for us
            return _daemon(found, settings, announcer)
        _check_host(settings)
        if found.foreground:
            return _daemon(found, settings, announcer)
        return background(PROGRAM, lambda announcer: _daemon(found, settings, announcer))
    except LazymemError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_code_of_first_start(error.exit_code) if first and not announcer.was_ready else error.exit_code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; nothing is mounted", file=sys.stderr)
        return 130


@cache
def _parser() -> argparse.ArgumentParser:
    """Made once, by a fork server before anybody waits: 2 ms."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Mount the RAM of a published snapshot: pages arrive when they are touched, and ahead of that. "
        "With --upgrade MOUNTPOINT instead: a daemon of the version installed now goes on with that mount.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "server",
        metavar="HOST:PORT[/NAME][,...]",
        help="lazymem-serve's address, or unix:PATH[:/NAME]; several of the same snapshot with commas between",
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing folder")
    parser.add_argument("--state", metavar="DIR", type=Path, help="this run's written pages (default: gone at unmount)")
    parser.add_argument(
        "--reserve",
        metavar="SIZE",
        help="have so much of the disk for what the guest writes: 512M, 2G, all, 0 (default: 64M, if it is there)",
    )
    parser.add_argument(
        "--template", action="store_true", help="for many guests, which map it privately: nothing is ever written to it"
    )
    # What lazymem receive says: a folder that is gone again once the mount is there, so nobody else can use it.
    parser.add_argument("--candidates", metavar="DIR", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=_version())
    return add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What `lazymem template` has, too."""
    parser.add_argument("--cache", metavar="DIR", type=Path, help=f"fetched pages (default: {default_cache_dir()})")
    parser.add_argument("-o", dest="options", metavar="OPT[,OPT...]", action="append", default=[], help="mount options")
    parser.add_argument(
        "--deadline",
        metavar="SECONDS",
        type=float,
        help="a page that does not come in time is an error (default: wait)",
    )
    parser.add_argument(
        "--prefetch", choices=[way.value for way in Prefetch], default=Prefetch.ALL.value, help="default: %(default)s"
    )
    parser.add_argument(
        "--record", metavar="FILE", type=Path, help="write the pages that this resume touches, as a working-set"
    )
    parser.add_argument(
        "--record-seconds",
        metavar="SECONDS",
        type=float,
        default=DEFAULT_RECORD_SECONDS,
        help="record for so long from the first touch (default: %(default)g)",
    )
    add_tls_options(parser, name=True)
    parser.add_argument("--no-supervisor", action="store_true", help="a killed daemon is the mount's end")
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in front")
    parser.add_argument("--log", metavar="FILE", type=Path, help="log file (default: stderr with -f, else syslog)")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    return parser


def _version() -> str:
    from lazymem import __version__

    return f"{PROGRAM} {__version__}"


def _settings(found: argparse.Namespace) -> MountSettings:
    return MountSettings(
        servers=tuple(_from_anywhere(server) for server in parse_servers(found.server)),
        mountpoint=Path(mountinfo.real_path(found.mountpoint)),
        cache_dir=(found.cache or default_cache_dir()).absolute(),
        state_dir=found.state.absolute() if found.state else None,
        deadline_seconds=found.deadline,
        prefetch=Prefetch(found.prefetch),
        record_file=_record_file(found.record) if found.record else None,
        record_seconds=found.record_seconds,
        template=found.template,
        link=_link(found),
        reserve_bytes=parse_reserve(found.reserve) if found.reserve is not None else None,
        candidates_dir=found.candidates.absolute() if found.candidates else None,
    )


def _link(found: argparse.Namespace) -> LinkSettings:
    tls = maybe_tls(found)
    if tls is not None and found.server.startswith("unix:"):
        raise UsageError("TLS is for HOST:PORT; who may use a unix socket, its file says (leave the --tls options out)")
    return LinkSettings(tls=tls)


def _record_file(path: Path) -> Path:
    """Where the daemon, which works in another folder, can write it when it ends."""
    path = path.absolute()
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--record {path}: cannot write a file there")
    return path


def _from_anywhere(server: ServerAddress) -> ServerAddress:
    """A socket's path made absolute: the daemon works in another folder than the user who named it."""
    endpoint = server.endpoint
    if isinstance(endpoint, TcpEndpoint):
        return server
    return ServerAddress(parse_endpoint(f"unix:{os.path.abspath(endpoint.path)}"), server.name)


def _check_host(settings: MountSettings) -> None:
    """Everything that the daemon needs of this host, before it exists (rule 10)."""
    path = str(settings.mountpoint)
    checks.check_kernel()
    checks.check_fuse_device()
    checks.check_mount_point(path)
    checks.check_namespace(path)
    if settings.link.tls is not None:
        from lazymem.tls.contexts import client_context

        client_context(settings.link.tls)


def _supervise(found: argparse.Namespace, settings: MountSettings, *, takes_up: bool) -> int:
    """As a systemd unit's main process, whose child the daemon is."""
    from lazymem.cli.restart import restart
    from lazymem.cli.unit import supervise

    again = restart(_parser(), found, settings)
    return supervise(again, verbose=found.verbose, check_host=lambda: _check_host(settings), takes_up=takes_up)


def _daemon(found: argparse.Namespace, settings: MountSettings, announcer: Announcer) -> int:
    with quick_imports(trio=False):
        import resource

        from lazymem.cli import supervisorstart
        from lazymem.cli.confinement import bound_daemon
        from lazymem.cli.restart import restart
        from lazymem.fs.session import MountOptions

    logs.set_up(PROGRAM, in_front=found.foreground, verbose=found.verbose, file=found.log)
    options = MountOptions.parse(found.options)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core has pages of the guest in it; all that we start inherits
    again = restart(_parser(), found, settings)
    bound_daemon()
    looked_after = {"in_front": found.foreground, "wanted": not found.no_supervisor}
    maybe_forked = supervisorstart.fork_supervisor(again) if supervisorstart.is_wanted(**looked_after) else None

    maybe_early = _maybe_head_start(settings)
    with quick_imports():  # a tenth of a second, beside which the supervisor loads the little that it needs
        if maybe_early is not None:
            maybe_early.say_hello()
        import trio

        if maybe_early is not None:
            maybe_early.say_hello()
        from lazymem.cli import mountdaemon, supervised
        from lazymem.cli.lifesign import maybe_life_sign
        from lazymem.cli.servicemanager import tell_ready
        from lazymem.fs import tuning
        from lazymem.fs.lock import MountLock
        from lazymem.timeslice import ask_for_short_slices

        # Now, and not when a guest waits for a next daemon.
        if settings.link.tls is not None:
            from lazymem.fetch import tlstransport  # noqa: F401
        if settings.prefetch is not Prefetch.NONE:
            from lazymem.cli import mountfill  # noqa: F401

    survival = supervised.begin(again, maybe_forked=maybe_forked, keep=announcer.descriptors(), **looked_after)
    maybe_filler = _maybe_filler(settings)
    lock = MountLock(str(settings.mountpoint))
    if survival.inherited(LOCK) >= 0:
        lock.adopt(survival.inherited(LOCK))
    else:
        lock.acquire(LOCK_WAIT_SECONDS)
        survival.keep(LOCK, lock.fileno())
    tuning.become_io_flusher()  # before any thread: they inherit it
    ask_for_short_slices()
    if survival.maybe_keeper is not None:
        survival.show_life(maybe_life_sign())

    def ready(notices: tuple[str, ...]) -> None:
        tell_ready()
        survival.ready()
        announcer.ready(notices)

    try:
        progress = _maybe_progress(found)
        trio.run(mountdaemon.run, settings, options, ready, progress, survival, again, maybe_filler, maybe_early)
        survival.nothing_is_left()
    except BaseExceptionGroup as group:
        raise cause_of(group) from group
    finally:
        if maybe_filler is not None:
            maybe_filler.close()
        if not survival.outlives_us:
            survival.forget_all()
            lock.release()
    return 0


def _maybe_head_start(settings: MountSettings) -> HeadStart | None:
    """Not for a daemon that goes on with a mount, as most that somebody looks after do: it may have no server."""
    if SUCCESSOR_VARIABLE in os.environ or "LISTEN_FDS" in os.environ:
        return None
    from lazymem.fetch.headstart import maybe_head_start

    return maybe_head_start(settings.servers, settings.servers[0].name, settings.link)


def _maybe_filler(settings: MountSettings) -> FillProcess | None:
    """Before there is an event loop; what is open it closes."""
    if settings.prefetch is Prefetch.NONE:
        return None
    from lazymem.cli.fillprocess import FillProcess
    from lazymem.cli.mountfill import fill

    return FillProcess(partial(fill, settings), keep=logs.descriptors())


def _maybe_progress(found: argparse.Namespace) -> Progress | None:
    if not found.foreground or not sys.stderr.isatty():
        return None
    from lazymem.cli import frontprogress

    return frontprogress.show


def run() -> None:
    """The installed `lazymem-mount`."""
    leave(main())


if __name__ == "__main__":
    run()
