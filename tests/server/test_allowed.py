"""Who may have which snapshot: nobody who is not named, and no word about what others may have."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from lazymem_server.allowed import Allowed, CatalogForOne, parse_allowed
from lazymem_server.catalog import Catalog
from lazymem_server.identity import certificate_identities, user_identities

from lazymem.errors import UsageError
from tests.support.snapshots import make_snapshot


@pytest.mark.parametrize(
    ("texts", "name", "identity", "permitted"),
    [
        ([], "web", "host-b", False),
        (["web=host-b"], "web", "host-b", True),
        (["web=host-b"], "web", "host-c", False),
        (["web=host-b"], "db", "host-b", False),
        (["web=host-b,host-c"], "web", "host-c", True),
        (["web=host-b", "web=host-c"], "web", "host-b", True),
        (["host-b"], "anything", "host-b", True),
        (["host-b"], "anything", "host-c", False),
        (["*"], "web", "host-z", True),
        (["web=*"], "web", "host-z", True),
        (["web=*"], "db", "host-z", False),
        (["*=host-b"], "db", "host-b", True),
        (["a=b=host-b"], "a=b", "host-b", True),
        (["web=HOST-B"], "web", "host-b", False),
        (["web=host"], "web", "host-b", False),
        (["web=host-b"], "web", "*", False),
    ],
)
def test_rules(texts: list[str], name: str, identity: str, permitted: bool) -> None:
    assert parse_allowed(texts).permits(name, (identity,)) is permitted


def test_a_client_without_a_name_has_what_everybody_has() -> None:
    assert parse_allowed(["web=*"]).permits("web", ())
    assert not parse_allowed(["web=host-b"]).permits("web", ())


@pytest.mark.parametrize("text", ["", "=host-b", "web=", "web=a,,b", "a/b=host", "web=,"])
def test_rules_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--allow"):
        parse_allowed([text])


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "nobody may have 'web'"),
        (["web=host-b"], "nobody may have 'db'"),
        (["wbe=host-b", "*"], "no snapshot is called 'wbe'"),
    ],
)
def test_a_snapshot_that_nobody_could_have_and_a_rule_for_none_are_mistakes(texts: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_allowed(texts).check(["web", "db"])
    parse_allowed(["web=host-b", "db=host-c"]).check(["web", "db"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("allowed")
    return [make_snapshot(folder / name, pages=2).folder for name in ("web", "db")]


def test_what_exists_and_what_does_not_are_refused_in_the_same_words(folders: list[Path]) -> None:
    with Catalog(folders) as catalog:
        mine = CatalogForOne(catalog, Allowed({"web": ["host-b"], "db": ["host-c"]}), ("host-b",), "peer")
        assert mine.find("db") is None
        assert mine.find("nothing") is None
        assert mine.refusal("db").replace("db", "X") == mine.refusal("nothing").replace("nothing", "X")


def test_the_only_one_is_the_only_one_that_the_client_may_have(folders: list[Path]) -> None:
    with Catalog(folders) as catalog:
        rules = Allowed({"web": ["host-b", "host-a"], "db": ["host-a"]})

        def found(identity: str) -> str | None:
            maybe_found = CatalogForOne(catalog, rules, (identity,), "peer").find("")
            return maybe_found[0] if maybe_found else None

        assert found("host-b") == "web"
        assert found("host-a") is None
        assert found("host-z") is None
        refusals = {CatalogForOne(catalog, rules, ("x",), "peer").refusal("") for _ in ("two", "none")}
        assert len(refusals) == 1, "how many there are for others is not told"


SUBJECT = ((("commonName", "common"),),)


@pytest.mark.parametrize(
    ("certificate", "identities"),
    [
        ({"subject": SUBJECT, "subjectAltName": (("DNS", "a"), ("DNS", "b"))}, ("a", "b")),
        ({"subject": SUBJECT, "subjectAltName": (("IP Address", "10.0.0.5"),)}, ("common",)),
        ({"subject": SUBJECT}, ("common",)),
        ({"subject": ()}, ()),
        ({"subject": ((("commonName", "*"),),)}, ()),
        ({"subject": ((("commonName", "uid:0"),),)}, ()),
        ({"subject": ((("commonName", "a\nb"),),)}, ()),
    ],
)
def test_who_a_certificate_says_it_is(certificate: dict[str, Any], identities: tuple[str, ...]) -> None:
    assert certificate_identities(certificate) == identities


def test_our_own_user_over_a_unix_socket_is_asked_nothing() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert user_identities(ours) is None


@pytest.mark.needs_root("becomes another user")
def test_another_user_over_a_unix_socket_has_a_name() -> None:
    address = f"\0lazymem-test-{os.getpid()}"  # in no folder that the other user would have to enter
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        child = os.fork()
        if child == 0:
            os.setresuid(12345, 12345, 12345)
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(address)
                other.recv(1)
            os._exit(0)
        connected, _ = listener.accept()
        with connected:
            assert user_identities(connected) == ("uid:12345",)
        os.waitpid(child, 0)
