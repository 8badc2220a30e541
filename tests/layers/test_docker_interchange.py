"""Docker's data root opened by our store, and layers that our store put there accepted by Docker."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.layers.archives import archive, hard_link, member, symlink
from tests.layers.dockerd import image, running_docker
from unionfs.layers import create_chain_id, fsck, open_store
from unionfs.layers.identity import diff_id_of

# A capability, as `setcap cap_net_raw+ep` stores it.
CAPABILITY = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

LOW = archive(
    [
        member("bin/"),
        member("bin/su", "setuid", mode=0o4755),
        member(
            "bin/ping", "capability", mode=0o755, pax={"SCHILY.xattr.security.capability": CAPABILITY.decode("latin-1")}
        ),
        member("tmp/", mode=0o1777),
        member("etc/"),
        member("etc/conf", "low"),
        hard_link("etc/same", "etc/conf"),
        symlink("lib", "usr/lib"),
        member("usr/lib/"),
        member("usr/lib/" + "n" * 255, "255 bytes"),
        member("opaque/"),
        member("opaque/below", "hidden"),
        member("gone", "whited out"),
        member("gone-dir/"),
        member("gone-dir/x", "too"),
        member("dev/"),
        member("dev/null2", kind=tarfile.CHRTYPE),
        member("dev/fifo", kind=tarfile.FIFOTYPE),
        member("latin-\udce9", "not UTF-8"),
        member("big", os.urandom(200_000)),
    ],
    tarfile.PAX_FORMAT,
)
HIGH = archive(
    [
        member(".wh.gone"),
        member(".wh.gone-dir"),
        member("opaque/"),
        member("opaque/.wh..wh..opq"),
        member("opaque/new", "shown"),
        member("etc/"),
        member("etc/conf", "high"),
    ]
)
OTHER = archive([member("etc/"), member("etc/other", "ours")])


Facts = tuple[bytes, int, int, int, str, bytes]


def entries(tar: bytes) -> dict[str, Facts]:
    """What a tree's archive says, without the order and without the mtime of what Docker makes itself."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive_:
        for one in archive_:
            contents = archive_.extractfile(one) if one.isreg() else None
            data = contents.read() if contents is not None else b""
            found[one.name] = (one.type, one.mode & 0o7777, one.uid, one.gid, one.linkname, data)
    return found


def assert_awkward_entries(root: Path) -> None:
    """What tar does not show."""
    assert os.listdir(root / "opaque") == ["new"]
    assert not (root / "gone").exists()
    assert stat.S_IMODE((root / "bin" / "su").stat().st_mode) == 0o4755
    assert os.getxattr(root / "bin" / "ping", "security.capability") == CAPABILITY
    assert (root / "dev" / "null2").stat().st_rdev == os.makedev(1, 3)
    assert stat.S_ISFIFO((root / "dev" / "fifo").stat().st_mode)
    assert (root / "lib" / ("n" * 255)).read_text() == "255 bytes"
    assert os.fsencode("latin-\udce9") in os.listdir(os.fsencode(root))


def assert_same_tree(path: str, exported: bytes) -> None:
    """The tree at ``path`` is the one that Docker exported."""
    tree = subprocess.run(["tar", "-C", path, "-c", "."], capture_output=True, check=True).stdout
    ours = {name.removeprefix("./"): facts for name, facts in entries(tree).items() if name != "."}
    theirs = entries(exported)
    assert ours.keys() == theirs.keys()
    # Which of two names is the hard link depends on the order.
    links = {name for name, facts in (ours | theirs).items() if facts[0] == tarfile.LNKTYPE}
    links |= {facts[4] for facts in (*ours.values(), *theirs.values()) if facts[0] == tarfile.LNKTYPE}
    links |= {name.removeprefix("./") for name in links}
    for name in theirs.keys() - links:
        assert ours[name] == theirs[name], name


@pytest.mark.timeout(280)
def test_both_ways(tmp_path: Path) -> None:
    """Issue 4, point 3."""
    data_root = tmp_path / "data"
    with running_docker(tmp_path / "run", data_root) as docker:
        docker("load", stdin=image("theirs:1", [LOW, HIGH]))
        docker("create", "--name", "box", "theirs:1")
        (tmp_path / "file").write_text("copied in")
        docker("cp", tmp_path / "file", "box:/etc/conf")
        exported = docker("export", "box")

    low, high = create_chain_id([diff_id_of(LOW)]), create_chain_id([diff_id_of(LOW), diff_id_of(HIGH)])
    with open_store(data_root, "overlay2") as store:
        assert store.unreadable == []
        assert store.map().keys() == {low, high}
        for chain_id, tar in ((low, LOW), (high, HIGH)):
            with store.map()[chain_id].tar_stream() as out:
                assert out.read() == tar
        assert fsck(store, deep=True) == []
        (name,) = store.rw_layers()
        rw = store.get_rw_layer(name)
        assert (b"/etc/conf", "C") in {(change.path, change.kind.value) for change in rw.changes()}
        with rw.mounted() as path:
            root = Path(path)
            assert (root / "etc" / "conf").read_text() == "copied in"
            assert_awkward_entries(root)
            assert_same_tree(path, exported)
        other = store.register(io.BytesIO(OTHER), high)
        base = store.register(io.BytesIO(OTHER))
        assert fsck(store, deep=True) == []

    with running_docker(tmp_path / "run", data_root) as docker:
        for tag, layers in (("ours:1", [LOW, HIGH, OTHER]), ("ours:2", [OTHER])):
            said = docker("load", stdin=image(tag, layers))
            assert b"Loading layer" not in said, "it was not there for Docker"
        assert {path.name for path in (data_root / "image/overlay2/layerdb/sha256").iterdir()} == {
            chain_id[7:] for chain_id in (low, high, other.chain_id, base.chain_id)
        }
        docker("create", "--name", "mine", "ours:1")
        assert entries(docker("export", "mine"))["etc/other"][-1] == b"ours"
        saved = docker("save", "ours:1")
        with tarfile.open(fileobj=io.BytesIO(saved)) as parts:
            found = {
                diff_id_of(file.read())
                for one in parts
                if one.name.endswith("layer.tar") and one.isfile() and (file := parts.extractfile(one)) is not None
            }
        assert found == {diff_id_of(LOW), diff_id_of(HIGH), diff_id_of(OTHER)}, "Docker exports ours byte for byte"
        docker("rm", "mine")
        docker("rmi", "ours:2", "ours:1")
    with open_store(data_root, "overlay2") as store:
        assert store.map().keys() == {low, high}
        assert fsck(store, deep=True) == []
        assert store.incomplete() == []
