"""Who may have which snapshot, by `--allow`: nobody who is not named."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping

from lazymem.errors import UsageError
from lazymem.snapshot.reader import SnapshotReader
from lazymem.wire.rules import name_problem
from lazymem_server.catalog import Catalog

log = logging.getLogger("lazymem.server")

ANY = "*"
"""Every name, or every identity."""


class Allowed:
    """Names to the identities that may have them."""

    def __init__(self, rules: Mapping[str, Collection[str]]) -> None:
        self._rules = {name: frozenset(identities) for name, identities in rules.items()}

    def permits(self, name: str, identities: Collection[str]) -> bool:
        """Whether a client with these identities may have that snapshot."""
        for rule in (name, ANY):
            found = self._rules.get(rule)
            if found and (ANY in found or not found.isdisjoint(identities)):
                return True
        return False

    def check(self, names: Collection[str]) -> None:
        """Hold the rules against what is published.

        Raises:
            UsageError: a rule for what is not there, or a snapshot that nobody could ever have.
        """
        for rule in self._rules:
            if rule != ANY and rule not in names:
                raise UsageError(f"--allow {rule}=...: no snapshot is called {rule!r}")
        nobodys = [name for name in names if name not in self._rules and ANY not in self._rules]
        if nobodys:
            raise UsageError(
                f"nobody may have {nobodys[0]!r}: say --allow {nobodys[0]}=IDENTITY (a client certificate's name), "
                f"or --allow {nobodys[0]}='*' for every client with a certificate of the authority"
            )


def parse_allowed(texts: Iterable[str]) -> Allowed:
    """``[NAME=]IDENTITY[,IDENTITY...]`` each; without a name, all of them are meant.

    Raises:
        UsageError: one says nothing.
    """
    rules: dict[str, set[str]] = {}
    for text in texts:
        name, equals, rest = text.rpartition("=")
        identities = [identity.strip() for identity in rest.split(",")]
        if not all(identities) or (equals and (not name or (name != ANY and name_problem(name) is not None))):
            raise UsageError(f"--allow {text!r}: write NAME=IDENTITY[,IDENTITY...], or IDENTITY for all names")
        rules.setdefault(name or ANY, set()).update(identities)
    return Allowed(rules)


class CatalogForOne:
    """What is published, as one client may know it. Its refusals are the same for what it may not have as for what
    does not exist."""

    def __init__(self, catalog: Catalog, allowed: Allowed, identities: Collection[str], peer: str) -> None:
        self._catalog = catalog
        self._allowed = allowed
        self._identities = identities
        self._peer = peer

    def find(self, name: str) -> tuple[str, SnapshotReader] | None:
        """As `Catalog.find`."""
        if not name:
            mine = [found for found, _ in self._catalog if self._allowed.permits(found, self._identities)]
            return (mine[0], self._catalog[mine[0]]) if len(mine) == 1 else None
        found = self._catalog.find(name)
        if found is not None and not self._allowed.permits(name, self._identities):
            log.warning("%s: asks for %r, which it may not have (--allow %s=...)", self._peer, name, name)
            return None
        return found

    def refusal(self, name: str) -> str:
        """As `Catalog.refusal`."""
        who = ", ".join(self._identities) or "a client without a name"
        if name:
            return f"there is no snapshot {name!r} here for {who}"
        return f"there is none, or more than one snapshot here for {who}: name one"
