"""The servers of one snapshot: which of them is tried next, and whether who answers there is one of them.

Several addresses are one server that may have moved, or several that publish the same RAM. They are tried in their
order, from the one behind the one that was lost; who publishes other RAM is no server of this snapshot, and passed by.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from msgspec import structs

from lazymem.errors import IdentityError, LazymemError, ServerRefusedError, ServerUnreachableError
from lazymem.fetch.session import Session, open_session
from lazymem.fetch.stats import LinkCounters
from lazymem.fetch.transport import Transport, dial
from lazymem.settings import LinkSettings, ServerAddress
from lazymem.wire.messages import Welcome

DialAddress = Callable[[ServerAddress, LinkSettings], Awaitable[Transport]]


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
    ) -> None:
        self._addresses = tuple(addresses)
        self._counters = counters
        self._dial = dial_address
        self._link = link if len(self._addresses) == 1 else _hastier(link)

    @property
    def are_several(self) -> bool:
        return len(self._addresses) > 1

    async def open_first(self) -> tuple[Session, ServerAddress]:
        """The first session, which says what the snapshot is.

        Raises:
            ServerUnreachableError, ServerRefusedError, RemoteProtocolError: of each of them; where one may be better in
                a moment, so says the error's `temporary`.
        """
        errors: list[LazymemError] = []
        for address in self._addresses:
            try:
                return await self._open(address, address.name), address
            except LazymemError as error:
                errors.append(_located(error, address))
        raise _of_all(errors)

    async def open_again(self, welcome: Welcome, maybe_lost: ServerAddress | None) -> tuple[Session, ServerAddress]:
        """One try at each for a session with the RAM that `welcome` told of. `maybe_lost`: whom the last one was with.

        Raises:
            LazymemError: none of them, now.
        """
        errors: list[LazymemError] = []
        for address in self._in_turn(maybe_lost):
            try:
                return await self._open_same(address, welcome), address
            except LazymemError as error:
                errors.append(_located(error, address))
        raise _of_all(errors)

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

    async def _open(self, address: ServerAddress, name: str) -> Session:
        return await open_session(await self._dial(address, self._link), name, self._link, self._counters)


def _hastier(link: LinkSettings) -> LinkSettings:
    """With others to try, one that is silent gets less time."""
    return structs.replace(
        link,
        connect_timeout_seconds=min(link.connect_timeout_seconds, link.next_server_seconds),
        handshake_timeout_seconds=min(link.handshake_timeout_seconds, link.next_server_seconds),
    )


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
