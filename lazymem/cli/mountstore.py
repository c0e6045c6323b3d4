"""A mount's store, opened: the cache, this run's written pages, the digests of what is fetched."""

from __future__ import annotations

import logging
import math

import trio

from lazymem.cli.survival import Survival
from lazymem.errors import ServerUnreachableError, StoreError
from lazymem.fetch.client import Client
from lazymem.settings import MountSettings
from lazymem.store.cachefolder import open_cache
from lazymem.store.candidates import Candidates
from lazymem.store.origin import RamOrigin
from lazymem.store.pristine import PristinePages
from lazymem.store.statefiles import StateFolder
from lazymem.store.statefolder import open_private_state, open_state, reserve_room

log = logging.getLogger(__name__)

STATE_WAIT_SECONDS = 30.0
"""For the daemon of an earlier mount to store what its guest wrote: 3 GB at a slow disk's 100 MB/s."""


async def open_store(
    client: Client, settings: MountSettings, origin: RamOrigin, survival: Survival
) -> tuple[PristinePages, StateFolder | None]:
    """What was fetched, and what this run wrote (None: nobody writes to a template). The caller closes both.

    Raises:
        LazymemError: a folder cannot be used, or the server does not send the digests.
    """
    cache = await trio.to_thread.run_sync(open_cache, settings.cache_dir, origin)

    def maybe_open_run() -> StateFolder | None:
        if survival.continues:
            return survival.adopt_state(origin)
        if settings.template:
            return None
        if settings.state_dir is None:
            run = open_private_state(settings.cache_dir, origin)
        else:
            run = open_state(settings.state_dir, origin, wait_seconds=STATE_WAIT_SECONDS)
        try:
            reserve_room(run, origin, settings.reserve_bytes)
        except BaseException:
            run.close()
            raise
        return run

    state = await trio.to_thread.run_sync(maybe_open_run)
    candidates = await trio.to_thread.run_sync(_maybe_candidates, settings, origin)
    try:
        if not survival.continues:
            survival.keep_state(state)
        upper = b""
        if origin.root is not None:
            seconds = math.inf if survival.continues else settings.link.connect_timeout_seconds
            upper = survival.maybe_upper() or cache.digests.maybe_upper(origin.root) or await _upper(client, seconds)
        pristine = PristinePages(origin, cache, upper, state.written if state is not None else None, candidates)
        survival.keep_upper(upper)
        return pristine, state
    except BaseException:
        cache.close()
        if candidates is not None:
            candidates.close()
        if state is not None:
            state.close()
        raise


async def _upper(client: Client, seconds: float) -> bytes:
    """Of the digest tree. Before there is a mount, somebody waits for the command.

    Raises:
        ServerUnreachableError: it does not come.
    """
    try:
        with trio.fail_after(seconds):
            return await client.fetch_upper()
    except trio.TooSlowError as error:
        raise ServerUnreachableError(
            f"the server took the connection, but sends no digests of the RAM within {seconds:g} s"
        ) from error


def _maybe_candidates(settings: MountSettings, origin: RamOrigin) -> Candidates | None:
    """Blocking. A next daemon goes on without them, since their names are gone."""
    if settings.candidates_dir is None or origin.root is not None:
        return None
    try:
        return Candidates(settings.candidates_dir, origin.pages)
    except StoreError as error:
        log.info("no pages that came ahead of the guest: %s", error)
        return None
