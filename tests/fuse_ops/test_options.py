"""The text after ``-o``: every option, every way that callers write it, and every mistake."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unionfs.errors import OptionError
from unionfs.fuse_ops.options import SPEEDUPS, MountOptions, RedirectMode, XattrPermissions
from unionfs.fuse_ops.session.option_text import escape_value, format_layers, parse_options
from unionfs.overlay.idmap import IdRange


@pytest.fixture(autouse=True, scope="module")
def plain_environment() -> Iterator[None]:
    """Whole suites are run on one transport by this variable, which decides a default here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("UNIONFS_TRANSPORT", raising=False)
        yield


def parsed(*texts: str, privileged: bool = True) -> MountOptions:
    return parse_options(texts, cwd="/cwd", privileged=privileged).options


def with_lower(text: str) -> MountOptions:
    return parsed("lowerdir=/l", text)


def values(options: MountOptions) -> dict[str, object]:
    """The fields of ``options`` as values that can be compared."""
    found = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return found | {"uid_map": options.uid_map.ranges, "gid_map": options.gid_map.ranges}


def message(*texts: str) -> str:
    with pytest.raises(OptionError) as caught:
        parsed(*texts)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults() -> None:
    expected = MountOptions(
        lowerdirs=("/l",),
        read_only=True,
        fuse_options=("default_permissions", "allow_other", "suid", "noatime", "ro"),
    )
    assert values(parsed("lowerdir=/l")) == values(expected)


def test_unprivileged_defaults_hold_nothing_that_fusermount_refuses() -> None:
    options = parsed("lowerdir=/l,upperdir=/u,workdir=/w", privileged=False)
    assert options.fuse_options == ("default_permissions", "noatime")


def test_unprivileged_dev_and_suid_are_named_as_ignored() -> None:
    result = parse_options(["lowerdir=/l,dev,suid,nodev"], privileged=False)
    assert result.ignored == ["suid"]
    assert result.options.fuse_options == ("default_permissions", "noatime", "nodev", "ro")


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("static_nlink", "static_nlink", True),
        ("static_nlink=0", "static_nlink", False),
        ("noacl", "acl", False),
        ("noxattrs", "xattrs", False),
        ("noxattrs=1", "xattrs", False),
        ("noxattrs=0", "xattrs", True),
        ("xattr_permissions=1", "xattr_permissions", XattrPermissions.PRIVILEGED),
        ("xattr_permissions=2", "xattr_permissions", XattrPermissions.CONTAINERS),
        ("volatile", "volatile", True),
        ("fsync=0", "fsync", False),
        ("sync=0", "fsync", False),
        ("fsync=1", "fsync", True),
        ("timeout=0", "timeout_s", 0.0),
        ("timeout=1.5", "timeout_s", 1.5),
        ("timeout=1e9", "timeout_s", 1e9),
        ("redirect_dir=on", "redirect_dir", RedirectMode.ON),
        ("redirect_dir=off", "redirect_dir", RedirectMode.OFF),
        ("redirect_dir=follow", "redirect_dir", RedirectMode.FOLLOW),
        ("redirect_dir=nofollow", "redirect_dir", RedirectMode.NOFOLLOW),
        ("metacopy=on", "metacopy", True),
        ("metacopy=off", "metacopy", False),
        ("index=off", "lowerdirs", ("/l",)),
        ("nfs_export=off", "lowerdirs", ("/l",)),
        ("xino=on", "xino", "on"),
        ("xino=off", "xino", "off"),
        ("userxattr", "userxattr", True),
        ("writeback=0", "writeback", False),
        ("upperdir=/u,workdir=/w,quota=4096", "quota_bytes", 4096),
        ("upperdir=/u,workdir=/w,quota=10G", "quota_bytes", 10 << 30),
        ("upperdir=/u,workdir=/w,quota=1.5 MiB", "quota_bytes", 3 << 19),
        ("upperdir=/u,workdir=/w,quota=4096", "writeback", False),
        ("exclusive", "exclusive", True),
        ("upperdir=/u,workdir=/w,quota=4096", "passthrough", False),
        ("upperdir=/u,workdir=/w,quota=0,writeback=1", "writeback", True),
        ("quota=4096", "quota_bytes", 0),  # nothing can be written
        ("debug", "debug", True),
        ("speedups=on", "speedups", SPEEDUPS),
        ("speedups=off", "speedups", frozenset()),
        ("speedups=pages+inline", "speedups", frozenset({"pages", "inline"})),
        ("squash_to_root", "squash_uid", 0),
        ("squash_to_root", "squash_gid", 0),
        ("squash_to_uid=7", "squash_uid", 7),
        ("squash_to_uid=7", "squash_gid", None),
        ("squash_to_gid=8,squash_to_root", "squash_gid", 8),
        ("fsname=name", "source", "name"),
        ('context="system_u:object_r:t:s0:c1,c2"', "context", "system_u:object_r:t:s0:c1,c2"),
        ("context=plain", "context", "plain"),
    ],
)
def test_setting(text: str, field: str, value: object) -> None:
    assert getattr(with_lower(text), field) == value


def test_every_field_can_be_set_by_text() -> None:
    options = values(
        parsed(
            "lowerdir=/m::/d,upperdir=/u,workdir=/w,uidmapping=0:1:2,gidmapping=0:1:2,squash_to_uid=1,"
            "squash_to_gid=1,static_nlink,noacl,noxattrs,xattr_permissions=1,volatile,fsync=0,timeout=1,"
            "redirect_dir=on,metacopy=on,xino=on,userxattr,writeback=0,rw,debug,fsname=n,context=c,"
            "passthrough=0,transport=pyfuse3,quota=1,speedups=off,exclusive"
        )
    )
    plain = values(parsed("lowerdir=/l"))
    # With metacopy the other modes are refused; another test sets them.
    assert {name for name in plain if plain[name] == options[name]} == {"redirect_dir"}


def test_map_is_container_id_then_host_id() -> None:
    options = with_lower("uidmapping=0:200000:65536,gidmapping=:0:1:1001:1001:0:1:1002:1002:64535")
    assert options.uid_map.ranges == (IdRange(container=0, host=200000, count=65536),)
    assert options.uid_map.to_mount_id(5) == 200005
    assert options.gid_map.ranges == (
        IdRange(container=0, host=1, count=1001),
        IdRange(container=1001, host=0, count=1),
        IdRange(container=1002, host=1002, count=64535),
    )


def test_map_of_all_ids() -> None:
    assert with_lower("uidmapping=0:0:4294967295").uid_map.to_mount_id(4294967294) == 4294967294


@pytest.mark.parametrize(
    ("text", "lowers", "datas"),
    [
        ("lowerdir=/a:/b:/c", ("/a", "/b", "/c"), ()),
        ("lowerdir=/a::/d", ("/a",), ("/d",)),
        ("lowerdir=/a:/b::/d::/e", ("/a", "/b"), ("/d", "/e")),
        (r"lowerdir=/a\:b:/c\,d:/e\\", ("/a:b", "/c,d", "/e\\"), ()),
        (r"lowerdir=/a\:\:b", ("/a::b",), ()),
        ('lowerdir="/a,b:/c"', ("/a,b", "/c"), ()),
        ('lowerdir=/a"b:/c"', ('/a"b', '/c"'), ()),
        ("lowerdir=rel:/abs", ("/cwd/rel", "/abs"), ()),
        ("lowerdir=/l/X/../diff1", ("/l/X/../diff1",), ()),
        ("lowerdir+=/a,lowerdir+=/b:c,datadir+=/d,datadir+=e", ("/a", "/b:c"), ("/d", "/cwd/e")),
    ],
)
def test_layers(text: str, lowers: tuple[str, ...], datas: tuple[str, ...]) -> None:
    options = parsed(text)
    assert (options.lowerdirs, options.datadirs) == (lowers, datas)


def test_empty_words_are_fine() -> None:
    options = parsed("", "lowerdir=/l,,volatile,", ",", "upperdir=/u,workdir=/w,")
    assert options.volatile
    assert options.upperdir == "/u"


def test_upper_makes_it_writable_and_ro_does_not() -> None:
    upper = "lowerdir=/l,upperdir=u,workdir=w"
    assert not parsed(upper).read_only
    assert "ro" not in parsed(upper).fuse_options
    assert parsed(upper).upperdir == "/cwd/u"
    assert parsed(upper, "ro").read_only
    assert not parsed(upper, "ro", "rw").read_only
    assert "ro" in parsed(upper, "ro").fuse_options


def test_workdir_alone_is_not_used() -> None:
    assert with_lower("workdir=/w").workdir is None


@pytest.mark.parametrize(
    ("text", "present", "absent"),
    [
        ("nosuid", "nosuid", "suid"),
        ("suid,nosuid,suid", "suid", "nosuid"),
        ("dev", "dev", "nodev"),
        ("noexec", "noexec", "exec"),
        ("atime", "atime", "noatime"),
        ("allow_root", "allow_root", "allow_other"),
        ("sync", "sync", "async"),
        ("auto_unmount", "auto_unmount", "-"),
        ("max_read=4096", "default_permissions", "max_read=4096"),
        ("rw", "ro", "rw"),
    ],
)
def test_words_for_fuse(text: str, present: str, absent: str) -> None:
    words = with_lower(text).fuse_options
    assert present in words
    assert absent not in words
    assert len(words) == len(set(words))


def test_words_that_decide_nothing_are_accepted_silently() -> None:
    words = (
        "lowerdir=/l,threaded=1,fast_ino=1,ino32_t,plugins=a.so:b.so,splice_read,kernel_cache,max_write=4096,"
        "diratime,nodiratime,defaults,clone_fd,max_idle_threads=3"
    )
    assert parse_options([words]).ignored == []


def test_unknown_words_are_named() -> None:
    words = "private,user,nofail,x-systemd.automount,_netdev,metacopy_on=1,foo=a\\,b"
    result = parse_options(["lowerdir=/l," + words])
    assert result.ignored == [
        "private",
        "user",
        "nofail",
        "x-systemd.automount",
        "_netdev",
        "metacopy_on=1",
        r"foo=a\,b",
    ]


def test_long_strings() -> None:
    lowers = tuple(f"/var/lib/containers/storage/overlay/l/{n:026}" for n in range(1600))
    text = "lowerdir=" + ":".join(lowers)
    assert len(text) > 100_000
    assert parsed(text).lowerdirs == lowers


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        ((), "lowerdir"),
        (("upperdir=/u,workdir=/w",), "lowerdir"),
        (("lowerdir",), "lowerdir needs a value"),
        (("lowerdir=",), "empty"),
        (("lowerdir=/a:",), "empty"),
        (("lowerdir=:/a",), "empty"),
        (("lowerdir=::/a",), "empty"),
        (("lowerdir=/a:::/b",), "empty"),
        (("lowerdir=/a::/b:/c",), "/c"),
        (("lowerdir=/a,lowerdir=/b",), "lowerdir is given twice (lowerdir=/a and lowerdir=/b)"),
        (("lowerdir=/a,lowerdir=/a",), "lowerdir is given twice"),
        (("lowerdir=/a,lowerdir+=/b",), "exclude"),
        (("lowerdir+=",), "empty"),
        (("lowerdir=/l,upperdir=/u",), "upperdir=/u needs a workdir"),
        (("lowerdir=/l,upperdir=/u,workdir=/w", "upperdir=/u"), "upperdir is given twice"),
        (("lowerdir=/l,upperdir=/u,workdir=/w", "workdir=/v"), "workdir is given twice"),
        (("lowerdir=/l,upperdir=,workdir=/w",), "empty"),
        (("lowerdir=/l,timeout=abc",), "'abc' is not a number of seconds"),
        (("lowerdir=/l,timeout=-1",), "timeout"),
        (("lowerdir=/l,timeout=nan",), "timeout"),
        (("lowerdir=/l,timeout=inf",), "timeout"),
        (("lowerdir=/l,timeout=1,timeout=2",), "timeout is given twice"),
        (("lowerdir=/l,squash_to_uid=-1",), "'-1' is not a number"),
        (("lowerdir=/l,squash_to_uid=4294967295",), "squash_to_uid"),
        (("lowerdir=/l,squash_to_gid=1_0",), "squash_to_gid"),
        (("lowerdir=/l,squash_to_gid=",), "squash_to_gid"),
        (("lowerdir=/l,uidmapping=0:1",), "triples"),
        (("lowerdir=/l,uidmapping=0:1:0",), "uidmapping"),
        (("lowerdir=/l,uidmapping=0:x:1",), "'x' is not a number"),
        (("lowerdir=/l,gidmapping=1:0:4294967295",), "gidmapping"),
        (("lowerdir=/l,gidmapping=0:1:99999999999999999999999999",), "gidmapping"),
        (("lowerdir=/l,xattr_permissions=3",), "xattr_permissions"),
        (("lowerdir=/l,fsync=2",), "fsync=0 or fsync=1"),
        (("lowerdir=/l,quota=10X",), "quota=10X: invalid suffix: 'x'"),
        (("lowerdir=/l,quota=much",), "quota=much: invalid size"),
        (("lowerdir=/l,quota=-1",), "quota=-1: invalid size"),
        (("lowerdir=/l,quota=9000P",), "quota=9000P: invalid size: '9000P' is too large"),
        (("lowerdir=/l,volatile=yes",), "volatile"),
        (("lowerdir=/l,redirect_dir=yes",), "redirect_dir"),
        (("lowerdir=/l,metacopy=1",), "metacopy"),
        (("lowerdir=/l,metacopy=on,redirect_dir=off",), "metacopy=on and redirect_dir=off"),
        (("lowerdir=/l,xino=maybe",), "xino"),
        (("lowerdir=/l,index=on",), "index=on is not supported"),
        (("lowerdir=/l,nfs_export=on",), "nfs_export=on is not supported"),
        (("lowerdir=/l,verity=require",), "verity"),
        (('lowerdir=/l,context="a,b',), "quotation mark"),
        (('lowerdir=/l,context="a"b',), "quotation mark"),
    ],
)
def test_mistake_is_named_in_one_line(texts: tuple[str, ...], names: str) -> None:
    assert names in message(*texts)


def test_message_about_a_long_value_is_short() -> None:
    assert len(message("lowerdir=" + "/a" * 50_000 + ":")) < 500


def test_the_same_setting_twice_is_fine() -> None:
    assert parsed("lowerdir=/l,fsync=0,volatile", "fsync=0,volatile").fsync is False


# NUL ends a path and the kernel takes none; everything else may be in one, also undecodable bytes.
names = st.text(st.characters(blacklist_characters="\0", max_codepoint=0x2FFF), min_size=1) | st.text(
    '\\:,"= a\n\udcff', min_size=1
)


@given(st.lists(names, min_size=1, max_size=4), st.lists(names, max_size=3), names, names)
@example(["\\"], ["\\"], "\\", '"')
@example(['"a,'], ['"'], '"', "=")
def test_escaping_round_trip(lowers: list[str], datas: list[str], upper: str, work: str) -> None:
    lowers, datas = ["/" + name for name in lowers], ["/" + name for name in datas]
    options = parsed(
        f"lowerdir={format_layers(lowers, datas)},upperdir={escape_value('/' + upper)},,"
        f"workdir={escape_value('/' + work)},context={escape_value(upper)}"
    )
    assert options.lowerdirs == tuple(lowers)
    assert options.datadirs == tuple(datas)
    assert options.upperdir == "/" + upper
    assert options.workdir == "/" + work
    assert options.context == upper


@given(st.lists(st.text('\\:,"=lowerdirxu+/ ', max_size=20), max_size=4))
def test_any_text_is_parsed_or_refused_in_one_line(texts: list[str]) -> None:
    try:
        parse_options(texts)
    except OptionError as error:
        assert "\n" not in str(error)
