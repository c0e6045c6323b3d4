"""`lazymem-serve`: publishes snapshots until a signal ends it (the server itself: `serving`)."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import sdnotify
import trio

from lazymem.errors import LazymemError, UsageError
from lazymem.timeslice import ask_for_short_slices
from lazymem.tls.options import add_tls_options, maybe_tls
from lazymem_server.catalog import Catalog
from lazymem_server.learning import Learning
from lazymem_server.listeners import DEFAULT_LISTEN, Listeners, parse_listen
from lazymem_server.logs import OneLineNowAndThen
from lazymem_server.privileges import give_up_root, maybe_account, with_own_key
from lazymem_server.serving import Serving, open_gate, serve
from lazymem_server.socketsweep import removed_after_us

EXIT_INTERRUPTED = 130

SWITCH_SECONDS = 0.0005
"""After so long a session's thread gives another one its turn (Python's own 5 ms would be a whole fault's waiting)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    options = _parser().parse_args(argv)
    level = logging.WARNING if options.quiet else logging.INFO
    logging.basicConfig(stream=sys.stderr, level=level, format="lazymem-serve: %(message)s")
    logging.getLogger("trio.serve_listeners").addFilter(OneLineNowAndThen())
    try:
        return _open_and_serve(options)
    except LazymemError as error:
        print(f"lazymem-serve: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _open_and_serve(options: argparse.Namespace) -> int:
    """All that may need root is open before it is given up, and nothing is served before that."""
    tls = maybe_tls(options)
    if tls is None and options.allow:
        raise UsageError("--allow needs --tls-cert, --tls-key and --tls-ca: without TLS nobody has a name")
    account = maybe_account(options.user, options.learn)
    with contextlib.ExitStack() as stack:
        catalog = stack.enter_context(Catalog(options.snapshot, options.parent))
        gate = None
        if tls is not None:
            gate = open_gate(with_own_key(tls, account), options.allow, [name for name, _ in catalog])
        listeners = stack.enter_context(Listeners(private=tls is None and not options.insecure))
        adopted = listeners.adopt()
        if options.listen or not adopted:
            listeners.open(parse_listen(text) for text in options.listen or [DEFAULT_LISTEN])
        learning = stack.enter_context(Learning(options.learn, account)) if options.learn is not None else None
        notifier = sdnotify.SystemdNotifier()  # connected now; outside of systemd it does nothing
        if account is not None:
            stack.enter_context(removed_after_us(listeners.unix))
        give_up_root(account)
        if learning is not None:
            learning.check_place(account)
        sys.setswitchinterval(SWITCH_SECONDS)
        ask_for_short_slices()  # a session's thread that is put aside while it has the interpreter stops them all
        start = partial(serve, catalog, listeners, learn=learning, maybe_gate=gate)
        return trio.run(_serve_until_signal, start, options.json, notifier)


async def _serve_until_signal(
    start: Callable[..., Awaitable[None]], as_json: bool, notifier: sdnotify.SystemdNotifier
) -> int:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            serving: Serving = await nursery.start(start)
            _announce(serving, as_json)
            notifier.notify("READY=1")
            number = await anext(signals)
            notifier.notify("STOPPING=1")
            serving.stop()
    return EXIT_INTERRUPTED if number == signal.SIGINT else 0


def _announce(serving: Serving, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"listening": serving.addresses, "snapshots": serving.names}), flush=True)
    else:
        print(f"serving {', '.join(serving.names)} on {', '.join(serving.addresses)}", flush=True)


_EPILOG = """examples:
  lazymem-serve /var/lib/lazymem/web db=/srv/snapshots/db-3
                                      for this host only: 127.0.0.1:7411
  lazymem-serve --listen 0.0.0.0:7411 --tls-cert a.crt --tls-key a.key --tls-ca ca.crt --allow web=host-b web
                                      for host-b, over any network (lazymem pki --help: the files)
  lazymem-serve --learn /var/lib/lazymem/learned /var/lib/lazymem/web
                                      what the first resume touches is fetched first by the next ones
  lazymem-serve --parent /srv/snapshots/web /srv/deltas/web-2
                                      a delta (lazymem snapshot --delta), served as all that it makes of its parent
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lazymem-serve",
        description="Publish the RAM of snapshots, read-only, for lazymem-mount to resume guests from.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "snapshot",
        nargs="+",
        metavar="[NAME=]DIR",
        help="a snapshot folder, or one that just holds pc.ram; published by its base name unless NAME is given",
    )
    parser.add_argument(
        "--listen",
        action="append",
        metavar="ADDRESS",
        help=f"HOST:PORT (port 0: any free one) or unix:PATH (mode 0600); may be repeated; default {DEFAULT_LISTEN}, "
        "or the sockets that systemd hands over",
    )
    parser.add_argument(
        "--user",
        metavar="NAME",
        help="started by root: become this user once snapshots and sockets are open; default: who owns the folder of "
        "--learn, if that is not root, else the user lazymem-serve if there is one, else nobody",
    )
    parser.add_argument(
        "--learn",
        metavar="DIR",
        type=Path,
        help="take a recording from the first client of a snapshot that has no working-set, keep it in DIR, and give "
        "it to later ones: whoever may connect may so decide what is fetched first",
    )
    parser.add_argument(
        "--parent",
        action="append",
        default=[],
        metavar="DIR",
        type=Path,
        help="the snapshot that a delta was made over, where it is not beside the delta; may be repeated",
    )
    add_tls_options(parser, name=False)
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="[NAME=]IDENTITY[,IDENTITY...]",
        help="who may have the snapshot NAME (or all): names in client certificates, or '*' for every client with a "
        "certificate of the authority; may be repeated. With TLS, nobody else may have any",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="listen where others than this host can reach it, without TLS: whoever does can read the guests' memory",
    )
    parser.add_argument("--json", action="store_true", help="print the line that says it is ready as JSON")
    parser.add_argument("--quiet", action="store_true", help="log only what went wrong")
    return parser


if __name__ == "__main__":
    sys.exit(main())
