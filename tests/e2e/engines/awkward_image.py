"""An image of six layers with every entry that union file systems and engines have stumbled over.

The same bytes each time, so that digests can be compared. Each layer is a list of entries below; what the tree has
to be in the end is told by `EXPECTED` and by the program ``/bin/census`` in the image, which lists the tree that it
runs in. Formats: the OCI image-spec (layer.md) for whiteouts, POSIX.1-2001 (pax) for the archives, since times with
fractions, long names and attributes need it, and "docker save" for the archive of the image.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

NAME = "awkward"
TAG = f"{NAME}:latest"
OLD = "1000000000.123456789"
BEFORE_1970 = "-86400.5"
LONG_NAME = "n" * 255
NOT_UTF8 = b"caf\xe9".decode("utf-8", "surrogateescape")
_APPLETS = (
    "sh ash cat chgrp chmod chown cp cut dd echo env false find grep head hostname id ln ls md5sum mkdir mkfifo mknod "
    "mktemp mount mv nice od printf pwd readlink rm rmdir sed seq setpriv sleep sort stat sync tail tar test touch tr "
    "true umount uniq wc xargs"
)

# One line for each name: "s", a stat; "m", the checksum of a file. Names may be anything but have no newline.
CENSUS = """\
#!/bin/sh
# Lists the tree that it runs in, up to other file systems; sorted by the reader, whose idea of order is certain.
cd "${1:-/}" || exit
find . -xdev -exec stat -c 's|%i|%F|%a|%u|%g|%s|%Y|%t:%T|%N' {} +
find . -xdev -type f -exec md5sum {} + | sed 's/^/m|/'
"""

# VFS_CAP_REVISION_2 with cap_net_raw permitted and the effective bit: linux/capability.h.
FILE_CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


@dataclass
class LayerTar:
    """One layer's archive, made by chained calls."""

    _entries: list[tuple[tarfile.TarInfo, bytes]] = field(default_factory=list)

    def _add(
        self, path: str, kind: bytes, mode: int, owner: tuple[int, int], mtime: str, data: bytes = b"", **more: object
    ) -> LayerTar:
        info = tarfile.TarInfo(path)
        info.type, info.mode, info.size = kind, mode, len(data)
        info.uid, info.gid = owner
        info.pax_headers = {"mtime": mtime}
        for name, value in more.items():
            setattr(info, name, value)
        self._entries.append((info, data))
        return self

    def file(
        self,
        path: str,
        data: bytes | str = b"",
        mode: int = 0o644,
        owner: tuple[int, int] = (0, 0),
        mtime: str = OLD,
        xattrs: dict[str, bytes] | None = None,
    ) -> LayerTar:
        """A regular file."""
        content = data.encode() if isinstance(data, str) else data
        self._add(path, tarfile.REGTYPE, mode, owner, mtime, content)
        self._xattrs(xattrs or {})
        return self

    def dir(
        self,
        path: str,
        mode: int = 0o755,
        owner: tuple[int, int] = (0, 0),
        mtime: str = OLD,
        xattrs: dict[str, bytes] | None = None,
    ) -> LayerTar:
        """A directory."""
        self._add(path, tarfile.DIRTYPE, mode, owner, mtime)
        self._xattrs(xattrs or {})
        return self

    def symlink(self, path: str, target: str, owner: tuple[int, int] = (0, 0)) -> LayerTar:
        """A symbolic link."""
        return self._add(path, tarfile.SYMTYPE, 0o777, owner, OLD, linkname=target)

    def link(self, path: str, to: str) -> LayerTar:
        """A further name for a file of this layer."""
        first = next(info for info, _ in self._entries if info.name == to)
        return self._add(path, tarfile.LNKTYPE, first.mode, (first.uid, first.gid), OLD, linkname=to)

    def fifo(self, path: str) -> LayerTar:
        """A named pipe."""
        return self._add(path, tarfile.FIFOTYPE, 0o620, (0, 0), OLD)

    def device(self, path: str, kind: bytes, major: int, minor: int) -> LayerTar:
        """A device node; ``kind`` is `tarfile.CHRTYPE` or `tarfile.BLKTYPE`."""
        return self._add(path, kind, 0o640, (0, 6), OLD, devmajor=major, devminor=minor)

    def whiteout(self, path: str) -> LayerTar:
        """Hide a name of the layers below."""
        parent, _, name = path.rpartition("/")
        return self.file(f"{parent}/.wh.{name}" if parent else f".wh.{name}", mode=0)

    def opaque(self, path: str) -> LayerTar:
        """Hide everything that the layers below have in a directory."""
        return self.file(f"{path}/.wh..wh..opq", mode=0)

    def leave_out(self, *paths: str) -> LayerTar:
        """Take entries away again."""
        self._entries = [entry for entry in self._entries if entry[0].name not in paths]
        return self

    def _xattrs(self, values: dict[str, bytes]) -> None:
        info = self._entries[-1][0]
        words = {f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape") for name, value in values.items()}
        info.pax_headers = {**info.pax_headers, **dict(sorted(words.items()))}

    def __bytes__(self) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
            for info, data in self._entries:
                tar.addfile(info, io.BytesIO(data))
        return out.getvalue()


def _busybox() -> bytes:
    program = shutil.which("busybox")
    assert program is not None, "busybox is missing; run scripts/setup --dev"
    return Path(program).read_bytes()


def _base(many_ids: bool) -> LayerTar:
    layer = LayerTar()
    for path in ("bin", "dev", "etc", "proc", "root", "run", "sys", "usr", "usr/bin", "var", "work"):
        layer.dir(path)
    layer.dir("tmp", 0o1777).file("bin/busybox", _busybox(), 0o755).file("bin/census", CENSUS, 0o755)
    for applet in _APPLETS.split():
        layer.symlink(f"bin/{applet}", "busybox")
    layer.file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")
    layer.file("etc/group", "root:x:0:\nuser:x:1000:\n")
    # Permissions, owners, times, attributes.
    layer.dir("modes", 0o2775, (0, 50)).file("modes/setuid", "suid\n", 0o4755).file("modes/setgid", "sgid\n", 0o2755)
    layer.dir("modes/sticky", 0o1777).file("modes/none", "none\n", 0).file(
        "modes/owned", "owned\n", 0o640, (1000, 1001)
    )
    layer.file("modes/all", "all\n", 0o7777, (7, 8))
    layer.file("modes/capable", "capable\n", 0o755, xattrs={"security.capability": FILE_CAPABILITY})
    layer.file(
        "modes/xattr", "xattr\n", xattrs={"user.text": b"value", "user.binary": b"\x00\xff\x80", "user.none": b""}
    )
    layer.dir("modes/xattr-dir", xattrs={"user.of-directory": b"d"})
    if many_ids:
        layer.file("modes/far", "far\n", 0o644, (2_000_000, 3_000_000))
    layer.dir("times").file("times/before-1970", "1969\n", mtime=BEFORE_1970).file("times/zero", "0\n", mtime="0")
    layer.file("times/far", "2100\n", mtime="4102444800.987654321")
    # Kinds.
    layer.dir("kinds").fifo("kinds/fifo").device("kinds/char", tarfile.CHRTYPE, 1, 3)
    layer.device("kinds/block", tarfile.BLKTYPE, 7, 200)
    layer.symlink("kinds/dangling", "nowhere/at/all").symlink("kinds/absolute", "/etc/passwd")
    layer.symlink("kinds/up", "../../../../etc/group", (1000, 1000)).symlink("kinds/to-dir", "../modes")
    # Names.
    layer.dir("names").file(f"names/{LONG_NAME}", "255\n").file(f"names/{NOT_UTF8}", "latin 1\n").file(
        "names/a b", "space\n"
    )
    layer.file("names/back\\slash", "\\\n").file("names/quote'\"", "quotes\n").file("names/ünïcödé", "utf-8\n")
    layer.file("names/-dash", "dash\n").file("names/.hidden", "dot\n").file("names/...", "dots\n").file(
        "names/*", "glob\n"
    )
    layer.file("names/colon:comma,", "mount options\n").dir("names/" + "d" * 255).file(
        "names/" + "d" * 255 + "/f", "deep\n"
    )
    # Hard links, also over directories; files with holes and of odd sizes.
    layer.dir("links").dir("links/far").file("links/a", "linked\n", 0o640).link("links/b", "links/a")
    layer.link("links/far/c", "links/a").file("links/p", "pair\n").link("links/q", "links/p").link("links/r", "links/p")
    layer.dir("data").file("data/sparse", b"start" + bytes(1 << 20) + b"end").file("data/empty", b"")
    layer.file("data/block", b"x" * 4096).file("data/odd", bytes(range(256)) * 257)
    # What the layers above change.
    for number in range(1, 5):
        layer.dir(f"d{number}").file(f"d{number}/old", f"old {number}\n").dir(f"d{number}/sub")
        layer.file(f"d{number}/sub/deep", f"deep {number}\n")
    layer.dir("turns").dir("whiteout")
    layer.file("turns/file", "a file\n").dir("turns/dir").file("turns/dir/inside", "inside\n").file(
        "turns/again", "1\n"
    )
    layer.symlink("turns/link", "dir").file("whiteout/x", "old x\n").dir("whiteout/dir").file(
        "whiteout/dir/old", "old\n"
    )
    return layer.file("whiteout/only", "only\n").file("whiteout/back", "first\n")


def _layers(many_ids: bool) -> list[LayerTar]:
    # Each names the directories that it changes: one that is only implied gets the time of the unpacking.
    second = LayerTar()
    second.whiteout("d1").dir("d2").opaque("d2").file("d2/new", "new 2\n").dir("d3").whiteout("d3/old")
    second.dir("d4").whiteout("d4/sub").file("d4/added", "added\n")
    second.dir("whiteout").whiteout("whiteout/only").whiteout("whiteout/back")
    # The name exists again in the very layer that hides it: a whiteout is for the layers below.
    second.whiteout("whiteout/x").file("whiteout/x", "new x\n")
    second.whiteout("whiteout/dir").dir("whiteout/dir").file("whiteout/dir/new", "new\n")
    third = LayerTar()
    third.dir("turns").file("turns/dir", "a file now\n").dir("turns/file").file(
        "turns/file/inside", "a directory now\n"
    )
    third.dir("turns/link", 0o700).file("turns/link/x", "was a link\n").symlink("turns/again", "file")
    third.dir("d1").file("d1/came-back", "d1 is another\n").dir("whiteout").file("whiteout/back", "again\n")
    # The layer of a step that changed nothing.
    empty = LayerTar()
    fifth = LayerTar()
    fifth.dir("d2", 0o750, (1000, 1000)).file("d2/later", "after opaque\n").dir("d2/sub").file("d2/sub/x", "x\n")
    fifth.dir("links").whiteout("links/b").file("links/p", "alone\n")
    fifth.dir("d3", 0o711).dir("d3/sub").opaque("d3/sub").file("d3/sub/other", "other\n")
    fifth.dir("turns").whiteout("turns/dir").dir("turns/dir").file("turns/dir/third", "a directory again\n")
    sixth = LayerTar()
    sixth.dir("modes", 0o2770, (5, 50)).file("modes/setuid", "changed\n", 0o6711, (1000, 1000))
    sixth.dir("new").dir("links").file("new/a", "n\n").link("new/b", "new/a").link("links/new", "new/a")
    sixth.dir("d4", mtime=BEFORE_1970).dir("names").file("names/.w", "not a whiteout\n").file("names/wh.x", "neither\n")
    return [_base(many_ids), second, third, empty, fifth, sixth]


# Facts of the tree, from reading the layers: present with this text, or None for absent.
EXPECTED: dict[str, str | None] = {
    "d1/old": None,
    "d1/sub": None,
    "d1/came-back": "d1 is another\n",
    "d2/old": None,
    "d2/new": "new 2\n",
    "d2/later": "after opaque\n",
    "d2/sub/deep": None,
    "d3/old": None,
    "d3/sub/deep": None,
    "d3/sub/other": "other\n",
    "d4/old": "old 4\n",
    "d4/sub": None,
    "d4/added": "added\n",
    "turns/file/inside": "a directory now\n",
    "turns/dir/third": "a directory again\n",
    "turns/dir/inside": None,
    "turns/link/x": "was a link\n",
    "turns/link/inside": None,
    "whiteout/only": None,
    "whiteout/back": "again\n",
    "whiteout/x": "new x\n",
    "whiteout/dir/new": "new\n",
    "whiteout/dir/old": None,
    "links/a": "linked\n",
    "links/b": None,
    "links/far/c": "linked\n",
    "links/p": "alone\n",
    "links/q": "pair\n",
    "links/new": "n\n",
    f"names/{LONG_NAME}": "255\n",
    "names/" + "d" * 255 + "/f": "deep\n",
    "modes/setuid": "changed\n",
    "modes/none": "none\n",
}
# Names that are one file, whatever layer they come from.
EXPECTED_LINKS = [{"links/a", "links/far/c"}, {"links/q", "links/r"}, {"new/a", "new/b", "links/new"}]


@dataclass(frozen=True)
class AwkwardImage:
    """The image on disk."""

    archive: Path
    """What ``docker save`` would write, for ``docker load``, ``skopeo copy docker-archive:`` and others."""
    diff_ids: tuple[str, ...]
    """The digests of its layers, base first."""
    image_id: str
    """The digest of its configuration."""
    layers: tuple[Path, ...]
    """The layers' archives, base first."""

    def oci_layout(self, directory: Path) -> Path:
        """The image as an OCI layout with compressed layers, made by skopeo; the tag is ``latest``."""
        command = [
            "skopeo",
            "--insecure-policy",
            "copy",
            "-q",
            f"docker-archive:{self.archive}",
            f"oci:{directory}:latest",
        ]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        return directory


def build(
    directory: Path, *, many_ids: bool = True, change: Callable[[list[LayerTar]], None] | None = None
) -> AwkwardImage:
    """Write the image below ``directory``, which is made.

    Args:
        directory: where to.
        many_ids: with a file whose owner no user namespace of 65536 ids has; a rootless engine refuses such an image.
        change: is given the layers, to change some, when another image is wanted.
    """
    directory.mkdir(parents=True, exist_ok=True)
    entries = _layers(many_ids)
    if change is not None:
        change(entries)
    layers = [bytes(layer) for layer in entries]
    diff_ids = tuple(f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": "2001-09-09T01:46:40Z",
            "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"], "WorkingDir": "/", "Labels": {"awkward": "yes"}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [
                {"created": "2001-09-09T01:46:40Z", "created_by": f"layer {number}"}
                for number in range(1, len(layers) + 1)
            ],
        }
    ).encode()
    image_id = hashlib.sha256(config).hexdigest()
    paths = []
    with tarfile.open(directory / "image.tar", "w") as tar:
        members = [(f"{image_id}.json", config)]
        members += [(f"{number}/layer.tar", layer) for number, layer in enumerate(layers)]
        names = [name for name, _ in members[1:]]
        manifest = [{"Config": f"{image_id}.json", "RepoTags": [TAG], "Layers": names}]
        for name, data in [*members, ("manifest.json", json.dumps(manifest).encode())]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for number, layer in enumerate(layers):
        path = directory / f"layer{number}.tar"
        path.write_bytes(layer)
        paths.append(path)
    return AwkwardImage(directory / "image.tar", diff_ids, f"sha256:{image_id}", tuple(paths))
