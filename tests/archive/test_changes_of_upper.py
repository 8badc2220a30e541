"""Change lists from an overlay upper directory, form by form."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.archive.trees import opaque, whiteout, write
from unionfs.archive.changes import Change, ChangeKind, Origin, changes_of_upper, size_of
from unionfs.errors import LayerError
from unionfs.overlay.format import TRUSTED


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    lower = tmp_path / "lower"
    for name in ("etc/passwd", "etc/hosts", "usr/bin/ls", "usr/bin/cp", "usr/lib/libc.so"):
        write(lower / name, name, mtime=1000)
    os.symlink("hosts", lower / "etc/link")
    return lower


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    upper = tmp_path / "upper"
    upper.mkdir()
    return upper


def listed(upper: Path, *lowers: Path) -> list[str]:
    return [str(change) for change in changes_of_upper(str(upper), [str(lower) for lower in lowers])]


def copy_up(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    info = source.stat()
    target.chmod(info.st_mode)
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))


def test_nothing_changed(upper: Path, lower: Path) -> None:
    assert listed(upper, lower) == []


def test_new_modified_and_deleted_with_their_parents(upper: Path, lower: Path) -> None:
    write(upper / "etc/new", "x")
    write(upper / "etc/hosts", "other")
    whiteout(upper / "usr/bin/ls")
    assert listed(upper, lower) == ["C /etc", "C /etc/hosts", "A /etc/new", "C /usr", "C /usr/bin", "D /usr/bin/ls"]


def test_new_directory_is_listed_with_all_its_contents(upper: Path, lower: Path) -> None:
    write(upper / "srv/www/index.html", "x")
    assert listed(upper, lower) == ["A /srv", "A /srv/www", "A /srv/www/index.html"]


def test_deleted_directory_is_listed_by_its_top(upper: Path, lower: Path) -> None:
    whiteout(upper / "usr")
    assert listed(upper, lower) == ["D /usr"]


def test_whiteout_of_nothing_is_no_change(upper: Path, lower: Path) -> None:
    whiteout(upper / "nothing")
    whiteout(upper / "etc/nothing")
    assert listed(upper, lower) == []


def test_base_layer_adds_everything(lower: Path) -> None:
    assert [str(c) for c in changes_of_upper(str(lower), [])][:3] == ["A /etc", "A /etc/hosts", "A /etc/link"]


def test_wh_names(upper: Path, lower: Path) -> None:
    write(upper / "etc/.wh.passwd")
    write(upper / ".wh..wh.plnk")
    write(upper / ".wh.")
    assert listed(upper, lower) == ["C /etc", "D /etc/passwd"]


def test_wh_name_beside_the_new_file_covers_the_lower_one(upper: Path, lower: Path) -> None:
    write(upper / ".wh.usr")
    write(upper / "usr/bin/ls", "usr/bin/ls", mtime=1000)
    assert listed(upper, lower) == ["C /usr", "C /usr/bin", "D /usr/bin/cp", "D /usr/lib"]


@pytest.mark.parametrize(
    "form", ["trusted.overlay.opaque", "user.overlay.opaque", "user.fuseoverlayfs.opaque", "marker"]
)
def test_opaque_directory_deletes_what_it_does_not_hold(upper: Path, lower: Path, form: str) -> None:
    write(upper / "usr/bin/new", "x")
    copy_up(lower / "usr/bin/cp", upper / "usr/bin/cp")
    if form == "marker":
        write(upper / "usr/bin/.wh..wh..opq")
    else:
        os.setxattr(upper / "usr/bin", form, b"y")
    assert listed(upper, lower) == ["C /usr", "C /usr/bin", "D /usr/bin/ls", "A /usr/bin/new"]


def test_xattrs_of_another_name_space_are_ordinary_ones(upper: Path, lower: Path) -> None:
    """An overlay by root passes user.overlay.* through, and whatever a container sets there."""
    write(upper / "usr/bin/new", "x")
    os.setxattr(upper / "usr/bin", "user.overlay.opaque", b"y")
    changes = changes_of_upper(str(upper), [str(lower)], spaces=(TRUSTED,))
    assert [str(c) for c in changes] == ["C /usr", "C /usr/bin", "A /usr/bin/new"]
    os.unlink(upper / "usr/bin/new")
    changes = changes_of_upper(str(upper), [str(lower)], spaces=(TRUSTED,))
    assert [str(c) for c in changes] == ["C /usr", "C /usr/bin"]


def test_opaque_xattr_on_a_root_is_nothing(upper: Path, lower: Path) -> None:
    """As for the kernel: checked on 6.18."""
    os.setxattr(upper, "trusted.overlay.opaque", b"y")
    assert listed(upper, lower) == []


def test_opaque_marker_at_the_root(upper: Path, lower: Path) -> None:
    write(upper / ".wh..wh..opq")
    assert listed(upper, lower) == ["D /etc", "D /usr"]


def test_xattr_whiteout_counts_only_in_a_directory_marked_x(upper: Path, lower: Path) -> None:
    opaque(upper / "etc", b"x")
    write(upper / "etc/passwd")
    os.setxattr(upper / "etc/passwd", "trusted.overlay.whiteout", b"y")
    write(upper / "usr/bin/ls")
    os.setxattr(upper / "usr/bin/ls", "trusted.overlay.whiteout", b"y")
    assert listed(upper, lower) == ["C /etc", "D /etc/passwd", "C /usr", "C /usr/bin", "C /usr/bin/ls"]


def test_directory_marked_x_is_still_merged(upper: Path, lower: Path) -> None:
    opaque(upper / "etc", b"x")
    assert listed(upper, lower) == []


@pytest.mark.parametrize("redirect", [b"/usr", b"usr"])
def test_renamed_directory(upper: Path, lower: Path, redirect: bytes) -> None:
    (upper / "opt").mkdir()
    os.setxattr(upper / "opt", "trusted.overlay.redirect", redirect)
    whiteout(upper / "usr")
    write(upper / "opt/bin/mine", "x")
    whiteout(upper / "opt/bin/ls")
    changes = list(changes_of_upper(str(upper), [str(lower)]))
    assert [str(c) for c in changes] == [
        "A /opt",
        "A /opt/bin",
        "A /opt/bin/cp",
        "A /opt/bin/mine",
        "A /opt/lib",
        "A /opt/lib/libc.so",
        "D /usr",
    ]
    assert changes[2].data == Origin(os.fsencode(lower), b"usr/bin/cp")


def test_directory_renamed_over_another(upper: Path, lower: Path) -> None:
    (upper / "etc").mkdir()
    os.setxattr(upper / "etc", "trusted.overlay.redirect", b"/usr")
    whiteout(upper / "usr")
    assert listed(upper, lower) == [
        "C /etc",
        "A /etc/bin",
        "A /etc/bin/cp",
        "A /etc/bin/ls",
        "D /etc/hosts",
        "A /etc/lib",
        "A /etc/lib/libc.so",
        "D /etc/link",
        "D /etc/passwd",
        "D /usr",
    ]


def test_redirects_in_several_layers(tmp_path: Path, upper: Path, lower: Path) -> None:
    middle = tmp_path / "middle"
    (middle / "moved").mkdir(parents=True)
    os.setxattr(middle / "moved", "trusted.overlay.redirect", b"/usr")
    whiteout(middle / "usr")
    (upper / "again").mkdir()
    os.setxattr(upper / "again", "trusted.overlay.redirect", b"/moved/bin")
    whiteout(upper / "moved/bin")
    assert listed(upper, middle, lower) == [
        "A /again",
        "A /again/cp",
        "A /again/ls",
        "C /moved",
        "D /moved/bin",
    ]


@pytest.mark.parametrize("redirect", [b"../usr", b"/../../etc", b"..", b"", b"a/b"])
def test_invalid_redirect_is_told(upper: Path, lower: Path, redirect: bytes) -> None:
    """The kernel answers EINVAL or EACCES for the name; what is there cannot be said."""
    (upper / "opt").mkdir()
    os.setxattr(upper / "opt", "trusted.overlay.redirect", redirect)
    with pytest.raises(LayerError, match=r"upper/opt: the layer has a.* redirect"):
        listed(upper, lower)


def test_metadata_only_copy(upper: Path, lower: Path) -> None:
    copy_up(lower / "etc/passwd", upper / "etc/passwd")
    os.truncate(upper / "etc/passwd", 0)
    os.truncate(upper / "etc/passwd", len("etc/passwd"))
    (upper / "etc/passwd").chmod(0o600)
    os.setxattr(upper / "etc/passwd", "trusted.overlay.metacopy", b"")
    changes = list(changes_of_upper(str(upper), [str(lower)]))
    assert [str(c) for c in changes] == ["C /etc", "C /etc/passwd"]
    assert changes[1].data == Origin(os.fsencode(lower), b"etc/passwd")
    assert changes[1].meta == Origin(os.fsencode(upper), b"etc/passwd")


def test_metadata_only_copy_with_its_data_in_a_data_only_layer(tmp_path: Path, upper: Path, lower: Path) -> None:
    write(tmp_path / "data/ab/cdef", "contents")
    write(upper / "file", "")
    os.setxattr(upper / "file", "trusted.overlay.metacopy", b"")
    os.setxattr(upper / "file", "trusted.overlay.redirect", b"/ab/cdef")
    (change,) = changes_of_upper(upper.__fspath__(), [str(lower)], data_only=[str(tmp_path / "data")])
    assert change.data == Origin(os.fsencode(tmp_path / "data"), b"ab/cdef")


def test_edit_that_keeps_size_and_mtime_is_seen(upper: Path, lower: Path) -> None:
    copy_up(lower / "etc/hosts", upper / "etc/hosts")
    with open(upper / "etc/hosts", "r+b") as file:
        file.write(b"E")
    os.utime(upper / "etc/hosts", (1000, 1000))
    assert listed(upper, lower) == ["C /etc", "C /etc/hosts"]


def test_copied_up_but_identical_is_no_change(upper: Path, lower: Path) -> None:
    copy_up(lower / "etc/hosts", upper / "etc/hosts")
    os.symlink("hosts", upper / "etc/link")
    times = os.lstat(lower / "etc/link")
    os.utime(upper / "etc/link", ns=(times.st_atime_ns, times.st_mtime_ns), follow_symlinks=False)
    assert listed(upper, lower) == []


def test_file_that_got_a_further_name_is_a_change(upper: Path, lower: Path) -> None:
    """Its layer would otherwise have the new name as a file of its own."""
    copy_up(lower / "etc/hosts", upper / "etc/hosts")
    os.link(upper / "etc/hosts", upper / "etc/name")
    assert listed(upper, lower) == ["C /etc", "C /etc/hosts", "A /etc/name"]


def test_nanosecond_of_mtime_counts(upper: Path, lower: Path) -> None:
    copy_up(lower / "etc/hosts", upper / "etc/hosts")
    os.utime(upper / "etc/hosts", ns=(1000 * 10**9, 1000 * 10**9 + 1))
    assert listed(upper, lower) == ["C /etc", "C /etc/hosts"]


def test_xattr_change_is_seen_and_overlays_own_is_not(upper: Path, lower: Path) -> None:
    copy_up(lower / "etc/hosts", upper / "etc/hosts")
    os.setxattr(upper / "etc/hosts", "trusted.overlay.origin", b"\0\xfb")
    os.setxattr(upper / "etc", "trusted.overlay.impure", b"y")
    assert listed(upper, lower) == []
    os.setxattr(upper / "etc/hosts", "user.note", b"1")
    assert listed(upper, lower) == ["C /etc", "C /etc/hosts"]


def test_directory_attributes(upper: Path, lower: Path) -> None:
    (upper / "etc").mkdir(mode=0o700)
    assert listed(upper, lower) == ["C /etc"]


def test_file_and_directory_replace_each_other(upper: Path, lower: Path) -> None:
    write(upper / "usr", "a file now")
    write(upper / "etc/hosts/inside", "x")
    assert listed(upper, lower) == ["C /etc", "C /etc/hosts", "A /etc/hosts/inside", "C /usr"]


def test_order_is_that_of_the_bytes_of_the_path(upper: Path, tmp_path: Path) -> None:
    lower = tmp_path / "lower2"
    for name in ("a/b/x", "a-b", "a/b-c", "a.d/x", "q/x", "q-"):
        write(lower / name, "1")
        write(upper / name, "22")
    (lower / "n").mkdir()
    (upper / "n").mkdir()
    write(lower / "n-", "1")
    write(upper / "n-", "22")
    paths = [c.path for c in changes_of_upper(str(upper), [str(lower)])]
    assert paths == sorted(paths)
    assert b"/a" in paths
    assert b"/n" not in paths
    assert paths.count(b"/a/b") == 1


def test_whiteouts_between_the_lowers(tmp_path: Path, upper: Path, lower: Path) -> None:
    middle = tmp_path / "middle"
    whiteout(middle / "usr")
    whiteout(upper / "usr")
    write(upper / "etc/passwd", "x")
    assert listed(upper, middle, lower) == ["C /etc", "C /etc/passwd"]


def test_non_utf8_names(upper: Path, lower: Path) -> None:
    with open(os.fsencode(upper) + b"/\xff\xfe", "wb"):
        pass
    (change,) = changes_of_upper(os.fsencode(upper), [os.fsencode(lower)])
    assert change.path == b"/\xff\xfe"
    assert str(change) == "A /\\xff\\xfe"


def test_tree_deeper_than_the_recursion_limit_and_path_max(upper: Path, lower: Path) -> None:
    depth = 1300
    fd = os.open(upper, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("dddd", dir_fd=fd)
        inner = os.open("dddd", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    try:
        changes = list(changes_of_upper(str(upper), [str(lower)]))
    finally:
        # pytest's own clean-up is recursive and would fail on this in a later run.
        subprocess.run(["rm", "-rf", str(upper)], check=True)
    assert len(changes) == depth
    assert len(changes[-1].path) == depth * 5


def test_time_is_proportional_to_the_changes(upper: Path, lower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(200):
        write(lower / f"usr/share/doc/{i}", "x")
    write(upper / "usr/share/new", "x")
    looked = 0
    real = os.lstat

    def counting(path: object, **more: int) -> os.stat_result:
        nonlocal looked
        looked += 1
        return real(path, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "lstat", counting)
    assert listed(upper, lower) == ["C /usr", "C /usr/share", "A /usr/share/new"]
    assert looked < 50


def test_symlink_swapped_in_is_not_followed(tmp_path: Path, upper: Path, lower: Path) -> None:
    write(tmp_path / "secret/file", "x")
    write(upper / "etc/hosts", "changed")
    changes = changes_of_upper(str(upper), [str(lower)])
    assert str(next(changes)) == "C /etc"  # the walk has gone into it by now
    write(upper / "usr/lib/x", "x")
    os.rename(upper / "usr", tmp_path / "gone")
    os.symlink(tmp_path / "secret", upper / "usr")
    assert "/usr/file" not in " ".join(str(c) for c in changes)


def test_missing_directory_is_named(tmp_path: Path, lower: Path) -> None:
    with pytest.raises(LayerError, match="nowhere"):
        list(changes_of_upper(str(tmp_path / "nowhere"), [str(lower)]))


def test_no_descriptor_is_left_open(upper: Path, lower: Path) -> None:
    write(upper / "etc/new", "x")
    before = os.listdir("/proc/self/fd")
    list(changes_of_upper(str(upper), [str(lower)]))
    unfinished = changes_of_upper(str(upper), [str(lower)])
    next(unfinished)
    unfinished.close()  # type: ignore[attr-defined]
    assert os.listdir("/proc/self/fd") == before


def test_kinds_have_dockers_numbers() -> None:
    assert [(kind.value, kind.docker_number) for kind in ChangeKind] == [("C", 0), ("A", 1), ("D", 2)]


def test_size_counts_what_the_upper_adds(upper: Path, lower: Path) -> None:
    write(upper / "etc/new", b"x" * 100)
    os.link(upper / "etc/new", upper / "etc/same")
    whiteout(upper / "usr")
    assert size_of(changes_of_upper(str(upper), [str(lower)])) == 100


def test_change_string() -> None:
    """moby's TestChangeString."""
    assert [str(Change(b"/file", kind)) for kind in ChangeKind] == ["C /file", "A /file", "D /file"]


def test_holes_are_not_read_to_compare_them(tmp_path: Path) -> None:
    """A copied-up file of 256 GiB of nothing is compared at once; only what is data in one of them is read."""
    size = 1 << 38
    for name, end in (("lower", b"one"), ("upper", b"one"), ("other", b"two")):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "f", "wb") as file:
            file.seek(size)
            file.write(end)
        os.utime(tmp_path / name / "f", (5, 5))
    assert listed(tmp_path / "upper", tmp_path / "lower") == []
    assert listed(tmp_path / "other", tmp_path / "lower") == ["C /f"]
