"""What the mount looks like."""

import stat

from lazymem.fs.tree import (
    DIGESTS_INODE,
    DIGESTS_NAME,
    MANIFEST_INODE,
    RAM_INODE,
    ROOT_INODE,
    VMSTATE_INODE,
    WRITTEN_INODE,
    WRITTEN_NAME,
    Tree,
)


def _tree(*, written: bool = False, others: bool = False, writable: bool = True) -> Tree:
    return Tree(
        ram_bytes=1 << 20,
        manifest_bytes=300,
        vmstate_bytes=5000,
        has_writes=lambda: written,
        others=others,
        writable=writable,
    )


def test_names_and_numbers_are_fixed() -> None:
    found = {node.name: node.inode for node in _tree().children()}
    assert found == {b"pc.ram": RAM_INODE, b"manifest.json": MANIFEST_INODE, b"vmstate": VMSTATE_INODE}


def test_a_run_that_wrote_offers_no_vmstate_but_an_open_one_stays() -> None:
    tree = _tree(written=True)
    assert [node.name for node in tree.children()] == [b"pc.ram", b"manifest.json"]
    assert tree.maybe_child(ROOT_INODE, b"vmstate") is None
    node = tree.maybe_node(VMSTATE_INODE)
    assert node is not None
    assert node.size == 5000


def test_only_vmstate_may_vanish() -> None:
    assert [node.name for node in _tree().children() if node.name_seconds == 0] == [b"vmstate"]


def test_a_bare_ram_file_has_no_companions() -> None:
    tree = Tree(ram_bytes=4096, manifest_bytes=0, vmstate_bytes=0, has_writes=lambda: False)
    assert [node.name for node in tree.children()] == [b"pc.ram"]


def test_modes() -> None:
    private = _tree()
    assert stat.S_IMODE(private.ram.mode) == 0o600
    assert stat.S_IMODE(private.root.mode) == 0o700
    shared = _tree(others=True)
    assert stat.S_IMODE(shared.ram.mode) == 0o666
    assert all(stat.S_IMODE(node.mode) & 0o222 == 0 for node in shared.children() if node.inode != RAM_INODE)
    assert stat.S_IMODE(_tree(writable=False).ram.mode) == 0o400


def test_no_names_below_files() -> None:
    assert _tree().maybe_child(RAM_INODE, b"pc.ram") is None
    assert _tree().maybe_node(99) is None


def test_what_is_in_no_listing_is_found_by_its_name() -> None:
    tree = Tree(
        ram_bytes=8192, manifest_bytes=0, vmstate_bytes=0, has_writes=lambda: True, digests_bytes=48, written_bytes=2
    )
    assert [node.name for node in tree.children()] == [b"pc.ram"]
    for name, inode, size in ((DIGESTS_NAME, DIGESTS_INODE, 48), (WRITTEN_NAME, WRITTEN_INODE, 2)):
        node = tree.maybe_child(ROOT_INODE, name.encode())
        assert node is not None
        assert (node.inode, node.size, stat.S_IMODE(node.mode)) == (inode, size, 0o400)
        assert tree.maybe_node(inode) == node
    assert _tree().maybe_child(ROOT_INODE, DIGESTS_NAME.encode()) is None
