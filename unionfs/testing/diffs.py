"""Changes, archives and file contents, beyond moby's own tests (rows 44 to 82 of the contract)."""

from __future__ import annotations

import errno
import gzip
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from unionfs.archive.changes import ChangeKind
from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.contract import capabilities_of
from unionfs.drivers.files import file_getter
from unionfs.errors import ArchiveError, BreakoutError, DriverError, LayerNotFoundError, UnionfsError
from unionfs.overlay.idmap import IdRange
from unionfs.testing.rig import DriverRig, DriverTests, got
from unionfs.testing.trees import members_of, tar_of, write


class DiffTests(DriverTests):
    """Every driver's differences."""

    def test_changes_of_a_base_layer_add_everything(self, rig: DriverRig) -> None:
        rig.make_base()
        assert rig.lines("base", "") == [
            "A /bin", "A /bin/bash", "A /bin/sh", "A /etc", "A /etc/group", "A /etc/passwd", "A /sh",
        ]  # fmt: skip

    def test_changes_of_a_child_since_nothing_add_everything(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create("x", "base")
        with rig.got("x") as root:
            os.unlink(root + "/sh")
        assert rig.lines("x", "") == ["A /bin", "A /bin/bash", "A /bin/sh", "A /etc", "A /etc/group", "A /etc/passwd"]

    def test_changes_since_a_grandparent(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create("middle", "base")
        with rig.got("middle") as root:
            write(root, "one", b"1")
        rig.driver.create("top", "middle")
        with rig.got("top") as root:
            write(root, "two", b"2")
            os.unlink(root + "/etc/group")
        assert rig.lines("top", "middle") == ["C /etc", "D /etc/group", "A /two"]
        assert rig.lines("top", "base") == ["C /etc", "D /etc/group", "A /one", "A /two"]
        with rig.driver.diff("top", "base") as stream:
            names = [member.name for member in members_of(stream)]
        assert names == ["etc", "etc/.wh.group", "one", "two"]
        assert rig.driver.diff_size("top", "base") == 2

    def test_changes_of_every_kind(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        with rig.got("x") as root:
            os.unlink(root + "/etc/group")
            write(root, "etc/passwd", b"toor!")
            os.chmod(root + "/bin", 0o700)
            os.unlink(root + "/sh")
            write(root, "sh/now/a/directory", b"")
            os.rename(root + "/bin/bash", root + "/bin/zsh")
            # The same while it is mounted as afterwards.
            mounted = rig.lines("x", "base")
        assert mounted == rig.lines("x", "base")
        assert mounted == [
            "C /bin", "D /bin/bash", "A /bin/zsh", "C /etc", "D /etc/group", "C /etc/passwd",
            "C /sh", "A /sh/now", "A /sh/now/a", "A /sh/now/a/directory",
        ]  # fmt: skip

    def test_unchanged_layer_has_no_changes(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create("x", "base")
        with rig.got("x") as root:
            os.listdir(root)
            Path(root, "etc/passwd").read_bytes()
        assert rig.lines("x", "base") == []
        with rig.driver.diff("x", "base") as stream:
            assert stream.read() == bytes(1024)
        assert rig.driver.diff_size("x", "base") == 0

    def test_renamed_directory_is_resolved(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        with rig.got("x") as root:
            try:
                os.rename(root + "/etc", root + "/cfg")
            except OSError as error:
                assert error.errno == errno.EXDEV
                assert not self.renames_directories
                return
        assert rig.lines("x", "base") == ["A /cfg", "A /cfg/group", "A /cfg/passwd", "D /etc"]
        with rig.driver.diff("x", "base") as stream:
            archive = stream.read()
        rig.driver.create("copy", "base")
        rig.driver.apply_diff("copy", "base", io.BytesIO(archive))
        with rig.got("copy") as root:
            assert Path(root, "cfg/passwd").read_bytes() == b"root"
            assert not os.path.exists(root + "/etc")

    def test_diff_is_reproducible_and_can_be_closed_early(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        with rig.got("x") as root:
            write(root, "big", bytes(5 << 20))
            os.unlink(root + "/sh")
        with rig.driver.diff("x", "base") as stream:
            first = stream.read()
        with rig.driver.diff("x", "base") as stream:
            assert stream.read() == first
        stream = rig.driver.diff("x", "base")
        assert stream.read(100) == first[:100]
        stream.close()
        stream.close()
        unread = rig.driver.diff("x", "base")
        unread.close()
        del unread
        assert rig.mounts() == []
        rig.driver.remove("x")

    def test_exact_streams_where_promised(self, rig: DriverRig) -> None:
        archive = tar_of(("b", b"1"), ("a", b"2")).getvalue() + bytes(512)
        rig.driver.create("x")
        rig.driver.apply_diff("x", "", io.BytesIO(archive))
        with rig.driver.diff("x") as stream:
            assert stream.read() == archive or not capabilities_of(rig.driver).reproduces_exact_diffs

    def test_diff_of_unknown_ids(self, rig: DriverRig) -> None:
        rig.make_base()
        for layer_id, parent in (("nowhere", ""), ("base", "nowhere"), ("nowhere", "base")):
            for call in (rig.driver.diff, rig.driver.changes, rig.driver.diff_size):
                with pytest.raises(LayerNotFoundError, match="nowhere"):
                    call(layer_id, parent)
        with pytest.raises(LayerNotFoundError):
            rig.driver.apply_diff("nowhere", "base", io.BytesIO(bytes(1024)))

    def test_apply_of_whiteouts_and_opaque_directories(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create("x", "base")
        archive = tar_of(
            ("bin", None), ("bin/.wh.bash", b""), ("etc", None), ("etc/.wh..wh..opq", b""), ("etc/new", b"12345")
        )
        assert rig.driver.apply_diff("x", "base", archive) == 5
        with rig.got("x") as root:
            assert os.listdir(root + "/bin") == ["sh"]
            assert os.listdir(root + "/etc") == ["new"]
        assert [str(c) for c in rig.driver.changes("x", "base") if c.kind is ChangeKind.DELETE] == [
            "D /bin/bash", "D /etc/group", "D /etc/passwd",
        ]  # fmt: skip

    def test_further_name_of_a_parents_file_stays_a_link(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create("x", "base")
        with rig.got("x") as root:
            os.link(root + "/etc/passwd", root + "/etc/second")
            os.link(root + "/etc/passwd", root + "/third")
        assert rig.lines("x", "base") == ["C /etc", "C /etc/passwd", "A /etc/second", "A /third"]
        with rig.driver.diff("x", "base") as stream:
            archive = stream.read()
        links = {member.name: member.linkname for member in members_of(io.BytesIO(archive)) if member.islnk()}
        assert links == {"etc/second": "etc/passwd", "third": "etc/passwd"}
        rig.driver.create("copy", "base")
        rig.driver.apply_diff("copy", "base", io.BytesIO(archive))
        with rig.got("copy") as root:
            inodes = {os.stat(f"{root}/{name}").st_ino for name in ("etc/passwd", "etc/second", "third")}
            assert len(inodes) == 1
            assert os.stat(root + "/third").st_nlink == 3

    def test_directories_that_an_archive_does_not_name(self, rig: DriverRig) -> None:
        """containerd/containerd#1723: layers of bazel, ko and nix have /tmp/file and no /tmp, which stays as it is."""
        rig.driver.create("base")
        with rig.got("base") as root:
            os.mkdir(root + "/tmp")
            os.chmod(root + "/tmp", 0o1777)
            os.chown(root + "/tmp", 5, 6)
            os.setxattr(root + "/tmp", "user.note", b"1")
            os.utime(root + "/tmp", (1000, 1000))
        rig.driver.create("x", "base")
        rig.driver.apply_diff("x", "base", tar_of(("tmp/file", b"1"), ("new/dir/file", b"2")))
        with rig.got("x") as root:
            st = os.stat(root + "/tmp")
            seen = (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid)
            assert seen == (0o1777, 5, 6)
            assert os.getxattr(root + "/tmp", "user.note") == b"1"
            assert st.st_mtime == 1000
            assert stat.S_IMODE(os.stat(root + "/new/dir").st_mode) == 0o755

    def test_apply_reads_the_stream_to_its_end(self, rig: DriverRig) -> None:
        rig.driver.create("x")
        stream = io.BytesIO(tar_of(("f", b"1")).getvalue() + bytes(30000))
        rig.driver.apply_diff("x", "", stream)
        assert stream.read() == b""

    def test_apply_to_a_mounted_layer_is_seen_through_the_mount(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        with rig.got("x") as root:
            assert sorted(os.listdir(root + "/etc")) == ["group", "passwd"]
            rig.driver.apply_diff("x", "base", tar_of(("etc", None), ("etc/.wh.group", b""), ("etc/new", b"1")))
            assert sorted(os.listdir(root + "/etc")) == ["new", "passwd"]

    def test_apply_of_garbage_and_of_a_hostile_archive(self, rig: DriverRig) -> None:
        rig.driver.create("x")
        with pytest.raises(UnionfsError):
            rig.driver.apply_diff("x", "", io.BytesIO(b"no tar at all" * 100))
        rig.driver.create("y")
        with pytest.raises((BreakoutError, DriverError)):
            rig.driver.apply_diff("y", "", tar_of(("../../escaped", b"1")))
        assert not [name for name in rig.names() if "escaped" in name]

    def test_compressed_archives_are_the_callers_to_unpack(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create("x", "base")
        packed = gzip.compress(tar_of(("new", b"1")).getvalue())
        with pytest.raises((ArchiveError, DriverError)) as raised:
            rig.driver.apply_diff("x", "base", io.BytesIO(packed))
        assert "\n" not in str(raised.value)
        assert rig.lines("x", "base") == []

    def test_apply_of_a_stream_that_breaks_off(self, rig: DriverRig) -> None:
        rig.driver.create("x")
        whole = tar_of(("f", bytes(10000))).getvalue()
        with pytest.raises((ArchiveError, DriverError)):
            rig.driver.apply_diff("x", "", io.BytesIO(whole[:5000]))
        rig.driver.remove("x")

    def test_owners_are_mapped(self, rig: DriverRig) -> None:
        mapping = IdMapping([IdRange(0, 100000, 1000)], [IdRange(0, 200000, 1000)])
        driver = rig.open(id_mapping=mapping)
        driver.create("base")
        with got(driver, "base") as root:
            info = os.stat(root)
            assert (info.st_uid, info.st_gid) == (100000, 200000)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name, owner in (("d/f", 7), ("g", 0)):
                member = tarfile.TarInfo(name)
                member.uid = member.gid = owner
                tar.addfile(member)
        archive.seek(0)
        driver.create("x", "base")
        driver.apply_diff("x", "base", archive)
        with got(driver, "x") as root:
            assert [(os.stat(f"{root}/{n}").st_uid, os.stat(f"{root}/{n}").st_gid) for n in ("d/f", "g", "d", ".")] == [
                (100007, 200007), (100000, 200000), (100000, 200000), (100000, 200000),
            ]  # fmt: skip
        with driver.diff("x", "base") as stream:
            members = members_of(stream)
        assert [(m.name, m.uid, m.gid) for m in members] == [("d", 0, 0), ("d/f", 7, 7), ("g", 0, 0)]
        with got(driver, "x") as root:
            os.chown(root + "/g", 5, 5)  # nobody's in the container
        with pytest.raises(UnionfsError), driver.diff("x", "base") as stream:
            stream.read()
        driver.cleanup()

    def test_file_getter(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        with rig.got("x") as root:
            write(root, "own/file", b"mine")
            os.chown(root + "/etc/passwd", 1, 1)
            os.symlink("/etc", root + "/link")
            os.symlink("../../../../../../etc/hostname", root + "/escape")
        files = file_getter(rig.driver, "x")
        with files.get(b"/own/file") as own, files.get(b"bin/sh") as inherited, files.get(b"link/passwd") as linked:
            assert (own.read(), inherited.read(), linked.read()) == (b"mine", b"#!", b"root")
        for missing in (b"nowhere", b"own", b"escape"):
            with pytest.raises(OSError, match=r"\w"):
                files.get(missing)
        files.close()
        files.close()
        assert rig.mounts() == []
        with pytest.raises(LayerNotFoundError):
            file_getter(rig.driver, "nowhere")

    def test_unknown_driver_option(self, rig: DriverRig) -> None:
        with pytest.raises(UnionfsError, match="colour"):
            rig.open(["colour=red"])
        with pytest.raises(UnionfsError):
            rig.open(["colour"])
