"""The servers of one snapshot: which of them is tried next, and whether who answers there is one of them.

Several addresses are one server that may have moved, or several that publish the same RAM. They are tried in their
order, from the one behind the one that was lost; who publishes other RAM is no server of this snapshot, and passed by.
As with one host's several addresses (RFC 8305, "happy eyeballs"), one that is slow is not given up for the next one,
which is tried beside it: whoever is ready first is it, and each has all of its time, as the only one would.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio

from lazymem.errors import IdentityError, LazymemError, ServerRefusedError, ServerUnreachableError
from lazymem.fetch.headstart import HeadStart
from lazymem.fetch.session import Session, open_session
from lazymem.fetch.stats import LinkCounters
from lazymem.fetch.transport import Transport, dial
from lazymem.settings import LinkSettings, ServerAddress
from lazymem.wire.messages import Welcome

log = logging.getLogger(__name__)

DialAddress = Callable[[ServerAddress, LinkSettings], Awaitable[Transport]]


OpenOne = Callable[[ServerAddress], Awaitable[Session]]


async def dial_endpoint(address: ServerAddress, link: LinkSettings) -> Transport:
    """The usual way."""
    return await dial(address.endpoint, link)


class Servers:
    """One client's. `addresses`: at least one; the client's lanes share this."""

    def __init__(
        self,
        addresses: Sequence[ServerAddress],
        link: LinkSettings,
        counters: LinkCounters,
        dial_address: DialAddress = dial_endpoint,
        maybe_head_start: HeadStart | None = None,
    ) -> None:
        """`maybe_head_start`: for the first session; taken over."""
        self._maybe_head_start = maybe_head_start
        self._addresses = tuple(addresses)
        self._counters = counters
        self._dial = dial_address
        self._link = link

    @property
    def are_several(self) -> bool:
        return len(self._addresses) > 1

    async def open_first(self) -> tuple[Session, ServerAddress]:
        """The first session, which says what the snapshot is.

        Raises:
            ServerUnreachableError, ServerRefusedError, RemoteProtocolError: of each of them; where one may be better in
                a moment, so says the error's `temporary`.
        """
        return await self._first_of(self._addresses, lambda address: self._open(address, address.name))

    async def open_again(self, welcome: Welcome, maybe_lost: ServerAddress | None) -> tuple[Session, ServerAddress]:
        """One try at each for a session with the RAM that `welcome` told of. `maybe_lost`: whom the last one was with.

        Raises:
            LazymemError: none of them, now.
        """
        return await self._first_of(self._in_turn(maybe_lost), lambda address: self._open_same(address, welcome))

    async def _first_of(self, addresses: Sequence[ServerAddress], open_one: OpenOne) -> tuple[Session, ServerAddress]:
        """The first that is ready. One begins when those before it have failed, or the last of them is slow."""
        race = _Race(open_one)
        try:
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    failed = trio.Event()
                    nursery.start_soon(race.run, address, failed, nursery.cancel_scope)
                    with trio.move_on_after(self._link.next_server_seconds):
                        await failed.wait()
        except BaseException:
            if race.maybe_won is not None:
                race.maybe_won[0].close()
            raise
        if race.maybe_won is not None:
            return race.maybe_won
        raise _of_all([race.errors[address] for address in addresses])

    def _in_turn(self, maybe_lost: ServerAddress | None) -> Sequence[ServerAddress]:
        """From the one behind `maybe_lost`, which so comes last."""
        if maybe_lost is None:
            return self._addresses
        first = self._addresses.index(maybe_lost) + 1
        return self._addresses[first:] + self._addresses[:first]

    async def _open_same(self, address: ServerAddress, welcome: Welcome) -> Session:
        try:
            session = await self._open(address, address.name or welcome.name)
        except ServerRefusedError as error:
            if error.temporary or address.name or not welcome.name:
                raise
            session = await self._open(address, "")  # elsewhere its folder may have another name
        if session.welcome.identity == welcome.identity and session.welcome.ram_bytes == welcome.ram_bytes:
            return session
        session.close()
        raise IdentityError(f"{address} publishes another snapshot now than the one that this mount is of")

    def close(self) -> None:
        """What nobody came for."""
        if self._maybe_head_start is not None:
            self._maybe_head_start.close()

    async def _open(self, address: ServerAddress, name: str) -> Session:
        head_start, self._maybe_head_start = self._maybe_head_start, None
        if head_start is not None and not head_start.is_for(address, name):
            head_start.close()
        elif head_start is not None:
            try:
                transport = await dial(address.endpoint, self._link, head_start.connecting)
                return await open_session(transport, name, self._link, self._counters, head_start.maybe_greeted)
            except ServerUnreachableError as error:
                if isinstance(error.__cause__, trio.TooSlowError):
                    raise
                log.info("a connection that was begun early came to nothing (%s): another one", error)
        return await open_session(await self._dial(address, self._link), name, self._link, self._counters)


class _Race:
    """Tries that run beside each other."""

    def __init__(self, open_one: OpenOne) -> None:
        self._open_one = open_one
        self.maybe_won: tuple[Session, ServerAddress] | None = None
        self.errors: dict[ServerAddress, LazymemError] = {}

    async def run(self, address: ServerAddress, failed: trio.Event, all_tries: trio.CancelScope) -> None:
        try:
            session = await self._open_one(address)
        except LazymemError as error:
            self.errors[address] = _located(error, address)
            failed.set()
            return
        if self.maybe_won is None:
            self.maybe_won = session, address
            all_tries.cancel()
        else:
            session.close()


def _of_all(errors: Sequence[LazymemError]) -> LazymemError:
    """One error for those of each address. Final only if all are: who is full or away may be the right one soon."""
    if len(errors) == 1:
        return errors[0]
    full = [error for error in errors if isinstance(error, ServerRefusedError) and error.temporary]
    away = [error for error in errors if isinstance(error, ServerUnreachableError)]
    deciding = (full or away or errors)[0]
    found = type(deciding)("; ".join(str(error) for error in errors))
    found.temporary = deciding.temporary
    return found


def _located(error: LazymemError, address: ServerAddress) -> LazymemError:
    """The same error, saying which server."""
    text = str(error)
    if str(address.endpoint) in text:
        return error
    found = type(error)(f"{address}: {text}")
    found.temporary = error.temporary
    found.__cause__ = error
    return found
