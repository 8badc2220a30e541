"""Podman on our mount program: what it shows is what it shows on the kernel's overlayfs, or better."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from uuid import uuid4

import pytest

from tests.e2e.engines import awkward_image
from tests.e2e.engines.awkward_image import EXPECTED, LONG_NAME, NOT_UTF8, TAG, LayerTar
from tests.e2e.engines.podman import FAULTS, LIMITS, PROGRAM, Podman, podman, storage_conf
from tests.e2e.engines.private import USER_ID
from tests.e2e.engines.scenario import (
    EXPECTED_DIFF,
    Record,
    Tree,
    assert_holds,
    assert_linked,
    census,
    differences,
    listing,
    play,
    saved_layers,
    without_times,
)
from tests.support.sandbox import needs_root
from tests.support.snapshot import snapshot

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
needs_root()

User = Literal["root", "rootless"]
USERS: tuple[User, ...] = ("root", "rootless")


def without_overlay_xattrs(record: Record) -> Record:
    """The record without the kernel's own attributes, which a rootless podman writes into its layers."""
    for tree in record.trees.values():
        for entry in tree.values():
            for name in [name for name in entry if name.startswith("user.overlay.")]:
                del entry[name]
    return record


@pytest.mark.parametrize("user", USERS)
def test_scenario(user: User) -> None:
    with podman("unionfs", user) as engine:
        info = engine("info", "--format", "{{.Store.GraphDriverName}} {{.Store.GraphOptions}}")
        assert str(PROGRAM) in info
        assert "unionfs-mount: version" in info
        image = awkward_image.build(engine.cell.root / "image", many_ids=user == "root")
        ours = play(engine, image)
    with podman("stock", user) as engine:
        assert "mount_program" not in engine("info", "--format", "{{.Store.GraphOptions}}")
        image = awkward_image.build(engine.cell.root / "image", many_ids=user == "root")
        theirs = play(engine, image)
    assert_linked(ours.trees["changed"], [{"links/a", "links/far/c"}])
    names = {f"A names/{LONG_NAME[:200]}", f"A names/{'w' * 255}", f"D names/{NOT_UTF8}"}
    assert set(ours.lists["diff"]) == EXPECTED_DIFF | names | {"C links/far", "C links/far/c"}
    known = {name for tree in ours.trees.values() for entry in tree.values() for name in entry}
    assert "user.binary" in known
    assert not [name for name in known if ".overlay." in name or "containers" in name]
    assert differences(ours, without_overlay_xattrs(theirs), [*FAULTS, *LIMITS]) == []


@pytest.fixture(scope="module", params=USERS)
def engine(request: pytest.FixtureRequest) -> Iterator[Podman]:
    """Podman on our storage with the image loaded, for tests that leave it as it was; root's with the supervisor."""
    supervised = request.param == "root"
    with podman("unionfs", request.param, 'root-auto-userns-user = "e2e"\n', supervised=supervised) as made:
        made.load(awkward_image.build(made.cell.root / "image", many_ids=False).archive)
        yield made


@pytest.fixture
def one(engine: Podman) -> Iterator[str]:
    """A running container."""
    engine.start(TAG, "one")
    yield "one"
    engine.remove("one")


def without_accounts(tree: Tree) -> Tree:
    """The tree without times, and without the files to which podman adds the user of a mapping."""
    return {path: entry for path, entry in without_times(tree).items() if path not in ("etc/passwd", "etc/group")}


@pytest.mark.parametrize("mapping", ["auto", "uidmap", "keep-id"])
def test_id_mapped_container(engine: Podman, mapping: str) -> None:
    options = {
        "auto": ("--userns=auto",),
        "uidmap": ("--uidmap=0:1:40000", "--gidmap=0:1:40000"),
        "keep-id": ("--userns=keep-id",),
    }[mapping]
    if mapping == "keep-id" and engine.user is None:  # root has no id to keep; two maps that differ instead
        options = ("--uidmap=0:200000:65536", "--gidmap=0:300000:65536")
    plain = without_accounts(census(engine.run(TAG, "/bin/census")))
    assert without_accounts(census(engine("run", "--rm", "--user=0", *options, TAG, "/bin/census"))) == plain
    script = """
        set -e; cd /
        echo mine >>modes/owned; chown 7:8 data/odd; chmod 4755 data/odd; rm -r d2; mkdir d2; echo 1 >d2/x; mkfifo pipe
        for name in modes/owned data/odd d2/x pipe; do stat -c '%n %a %u:%g' $name; done
    """
    try:
        said = engine("run", "--name", "mapped", "--user=0", *options, TAG, "sh", "-c", script)
        assert said.splitlines() == ["modes/owned 640 1000:1001", "data/odd 4755 7:8", "d2/x 644 0:0", "pipe 644 0:0"]
        # Podman may still unmount it when the command has ended, and a mounted one shows all files as changed.
        engine("container", "cleanup", "mapped")
        changes = engine.diff("mapped")
        assert {"A d2/x", "D d2/new", "C modes/owned", "C data/odd", "A pipe"} <= set(changes)
        # Not everything, as when owners are shown differently here and there.
        assert not [line for line in changes if line.startswith(("C names", "C links", "C d3"))]
        engine.commit("mapped", "was-mapped")
        committed = census(engine.run("was-mapped", "/bin/census"))
        shown = [f"{path} {committed[path]['mode']} {committed[path]['owner']}" for path in ("data/odd", "d2/x")]
        assert shown == ["data/odd 4755 7:8", "d2/x 644 0:0"]
        assert committed["modes/owned"]["owner"] == "1000:1001"
    finally:
        engine.remove("mapped")
        engine("rmi", "-i", "-f", "was-mapped")


def test_overlay_volume(engine: Podman) -> None:
    """``-v DIR:/x:O``: the container may write, and DIR stays as it is."""
    source = engine.cell.root / f"tmp/volume-{uuid4().hex}"
    engine.cell.shell("mkdir $1; cd $1; mkdir -p d/e; echo 1 >d/e/f; echo 2 >g; chmod 777 . d d/e", source)
    before = snapshot(os.fspath(source))
    script = "cd /v; rm -r d; mkdir d; echo 3 >d/h; echo more >>g; mv d moved; ls . moved; cat g moved/h"
    said = engine("run", "--rm", "-v", f"{source}:/v:O", TAG, "sh", "-c", script)
    assert said.split() == [".:", "g", "moved", "moved:", "h", "2", "more", "3"]
    assert snapshot(os.fspath(source)) == before


def test_root_file_system_of_a_directory(engine: Podman) -> None:
    """``--rootfs DIR:O``: a container without an image, its changes thrown away."""
    root = engine.cell.root / f"tmp/rootfs-{uuid4().hex}"
    engine.cell.shell("mkdir -p $1/bin $1/d $1/proc $1/dev; cp /bin/busybox $1/bin/sh; echo 1 >$1/d/old", root)
    if engine.user:
        engine.cell.shell("chown -R $1:$1 $2", str(USER_ID), root)
    before = snapshot(os.fspath(root))
    said = engine(
        "run", "--rm", "--rootfs", f"{root}:O", "/bin/sh", "-c", "rm -r /d; mkdir /d; echo /d/*; echo $(</bin/sh wc -c)"
    )
    assert said.split()[0] == "/d/*"
    assert int(said.split()[1]) > 100_000
    assert snapshot(os.fspath(root)) == before


def test_owners_kept_in_attributes() -> None:
    """``force_mask``, for file systems without owners, as NFS: all files on disk are the user's, with one mode."""

    def plain(layers: list[LayerTar]) -> None:
        # containers/storage cannot unpack a fifo then, and forgets setuid and its like.
        layers[0].leave_out("kinds/fifo", "kinds/char", "kinds/block")

    with podman("unionfs", "rootless", overlay='force_mask = "0700"\n') as engine:
        engine.load(awkward_image.build(engine.cell.root / "image", many_ids=False, change=plain).archive)
        shown = census(engine.run(TAG, "/bin/census"))
        assert_holds(shown, EXPECTED)
        assert (shown["modes/owned"]["owner"], shown["modes/owned"]["mode"]) == ("1000:1001", "640")
        assert shown["new"]["owner"] == "0:0"
        script = "chown 7:8 data/odd; chmod 4750 data/odd; ls -ln data/odd"
        assert engine.run(TAG, "sh", "-c", script).split()[:4] == ["-rwsr-x---", "1", "7", "8"]
        found = engine.cell.shell("find $1 -path '*/diff/*' ! -type l -printf '%U:%G %m\\n' | sort -u", engine.home)
        assert found == f"{USER_ID}:{USER_ID} 700\n"


def test_image_volume(engine: Podman) -> None:
    """``--mount type=image``: another image's tree in a container, read-only unless told otherwise."""
    mount = f"--mount=type=image,source={TAG},destination=/other"
    inside = without_times(census(engine("run", "--rm", mount, TAG, "/bin/census", "/other")))
    assert inside["d4/added"] == without_times(census(engine.run(TAG, "/bin/census")))["d4/added"]
    assert inside.keys() >= EXPECTED.keys() - {path for path, text in EXPECTED.items() if text is None}
    refused = engine("run", "--rm", mount, TAG, "sh", "-c", "touch /other/x 2>&1 || echo refused")
    assert "refused" in refused
    writable = f"{mount},rw=true"
    assert engine("run", "--rm", writable, TAG, "sh", "-c", "echo 1 >/other/x; cat /other/x") == "1\n"


def test_image_mount(engine: Podman) -> None:
    """``podman image mount``: a read-only mount of all layers on the machine."""
    script = f"""
        cd /  # not inside of what is going to be unmounted
        at=$(podman image mount {TAG})
        find $at/d1 $at/d2 $at/d3 $at/whiteout -type f | sed s,$at/,, | sort
        if touch $at/new 2>/dev/null; then exit 1; fi
        stat -f -c %T $at
        podman image umount {TAG} >/dev/null
    """
    enter = () if engine.user is None else ("podman", "unshare")
    done = engine.cell.run(*enter, "bash", "-euc", script, user=engine.user)
    *files, kind = done.stdout.decode().splitlines()
    present = {path for path, text in EXPECTED.items() if text and path.split("/")[0] in ("d1", "d2", "d3", "whiteout")}
    assert set(files) == present | {"d2/sub/x"}
    assert "fuse" in kind


def layers_on_disk(home: Path) -> dict[str, tuple[object, int]]:
    """What lies in the layers, with the times at which it was last changed."""
    found = snapshot(os.fspath(home))
    return {path: (entry, os.lstat(home / path).st_ctime_ns) for path, entry in found.items() if "/diff" in path}


def test_additional_image_store(engine: Podman) -> None:
    """An engine whose images lie in the store of another one, which it only reads."""
    other = engine.cell.root / ("home/other" if engine.user else "other")
    run_root = f"/run/user/{USER_ID}/other" if engine.user else f"{engine.cell.root}/run2"
    text = storage_conf(other, run_root, "unionfs", f'additionalimagestores = ["{engine.graph_root}"]\n')
    if engine.user:  # Podman takes another key then
        text = text.replace("[storage.options]", f'rootless_storage_path = "{other}"\n[storage.options]', 1)
    config = engine.cell.root / f"tmp/{uuid4().hex}.conf"
    config.write_text(text)
    config.chmod(0o644)
    second = replace(engine, environment={"CONTAINERS_STORAGE_CONF": os.fspath(config)}, graph_root=other)
    plain = without_times(census(engine.run(TAG, "/bin/census")))
    before = layers_on_disk(engine.home)
    assert len(second.images()) == 1
    assert without_times(census(second.run(TAG, "/bin/census"))) == plain
    second.start(TAG, "second")
    try:
        second.execute("second", "sh", "-c", "rm -r d2; mkdir d2; echo 1 >d2/x; mv d4 d5")
        assert {"D d2/new", "A d2/x", "D d4", "A d5/old"} <= set(second.diff("second"))
        second.commit("second", "of-two-stores")
        assert second.run("of-two-stores", "sh", "-c", "ls d2 d5") == "d2:\nx\n\nd5:\nadded\nold\n"
    finally:
        second.remove("second")
        second("rmi", "-i", "-f", "of-two-stores")
    assert second.leftovers() == []
    after = layers_on_disk(engine.home)
    assert [path for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)] == []


def test_image_of_many_layers(engine: Podman) -> None:
    """Built by Buildah, which is in Podman, with a layer for each of many steps."""
    steps = 12 if engine.user else 60
    context = engine.cell.root / f"tmp/context-{uuid4().hex}"
    context.mkdir()
    lines = [f"FROM {TAG}"]
    for number in range(steps):
        (context / f"f{number}").write_text(f"{number}\n")
        lines.append(f"COPY f{number} /many/d{number % 7}/f{number}")
    lines.append("RUN rm -r /many/d0 && mv /many/d1 /many/d0 && cat /many/d?/* | sort -n | tr '\\n' ' ' >/list")
    (context / "Dockerfile").write_text("\n".join(lines))
    engine.build(context, "many")
    try:
        wanted = [str(number) for number in range(steps) if number % 7 != 0]
        assert engine.run("many", "cat", "/list").split() == wanted
        assert engine.run("many", "sh", "-c", "ls /many; cat /many/d0/f1 /many/d0/f8").split() == [
            *(f"d{number}" for number in (0, 2, 3, 4, 5, 6)),
            *("1", "8"),
        ]
        archive = engine.cell.root / f"tmp/many-{uuid4().hex}.tar"
        engine.save("many", archive)
        assert len(saved_layers(archive)) == 6 + steps + 1
    finally:
        engine("rmi", "-f", "many")


@dataclass(frozen=True)
class Fixed:
    """A fault of fuse-overlayfs 1.10: what is done in a container, and what has to be seen there and after a commit."""

    change: str
    look: str
    seen: str


# The change is made in one live mount, the look is taken in it and in a container of the commit.
FIXED = {
    "live-opaque": Fixed(
        "rm -r d3; mkdir d3; touch d3/new; stat d3/sub 2>&1 || true",
        "ls -A d3; stat -c here d3/sub d3/sub/other 2>/dev/null || echo gone",
        "new\ngone\n",
    ),
    "whsame": Fixed("true", "cat whiteout/x whiteout/dir/new; ls whiteout/dir", "new x\nnew\nnew\n"),
    "hardlinks": Fixed(
        "rm new/a; chmod 600 links/new",
        "stat -c '%i %a %h' new/b links/new | uniq | cut -d' ' -f2-",
        "600 2\n",
    ),
    "longname": Fixed(
        # Not the removal of one: a whiteout's name in a layer is four bytes longer, and podman cannot unpack that.
        "cd names; for i in 252 253 254 255; do echo $i >$(printf %0${i}d 1); done; "
        "mv $(printf %0255d 1) 3$(printf %0254d 2)",
        f"cd names; cat {LONG_NAME} 3*2 0*",
        "255\n255\n254\n253\n252\n",
    ),
}


@pytest.mark.parametrize("fault", FIXED)
def test_faults_of_fuse_overlayfs(engine: Podman, one: str, fault: str) -> None:
    fixed = FIXED[fault]
    engine.execute(one, "sh", "-c", f"cd /; {fixed.change}")
    assert engine.execute(one, "sh", "-c", f"cd /; {fixed.look}") == fixed.seen
    engine.commit(one, "fixed")
    try:
        assert engine.run("fixed", "sh", "-c", f"cd /; {fixed.look}") == fixed.seen
    finally:
        engine("rmi", "-f", "fixed")


def test_export_of_a_container_that_does_not_run(engine: Podman) -> None:
    engine("create", "--name", "created", TAG, "/bin/sh")
    try:
        archive = engine.cell.root / f"tmp/{uuid4().hex}.tar"
        engine.copy_in(Path("/etc/hostname"), "created", "/d4/old")
        engine.export("created", archive)
        with tarfile.open(archive, errors="surrogateescape") as tar:
            tree = listing(tar)
        assert "d2/old" not in tree
        assert tree["modes/xattr"]["user.text"] == "'value'"
        assert "security.capability" in tree["modes/capable"]
        assert tree["links/far/c"]["kind"] == tarfile.LNKTYPE.decode()
        assert "C d4/old" in engine.diff("created")
    finally:
        engine.remove("created")


def test_a_container_can_go_on_after_its_server_was_killed(engine: Podman, one: str) -> None:
    engine.execute(one, "sh", "-c", "rm -r d2; mkdir d2; echo kept >d2/x; sync; mv d4 d5; ln d2/x d2/y")
    before = census(engine.execute(one, "/bin/census"))
    merged = os.fspath(engine.layer_directory(one) / "merged")
    servers = [line.split()[0] for line in engine.cell.processes() if "unionfs" in line]
    assert servers, f"nothing serves {merged}"
    engine.cell.shell('kill -9 "$@"', *servers)
    # Not "restart": podman leaves the dead mount in place then.
    engine("stop", "-t", "0", one)
    engine("umount", "--force", one)
    engine("start", one)
    assert without_times(census(engine.execute(one, "/bin/census"))) == without_times(before)
    assert engine.execute(one, "cat", "d2/x", "d2/y") == "kept\nkept\n"
