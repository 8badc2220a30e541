"""Buildah on our mount program: from, run, copy, add, commit, bud and mount, as root and in ``buildah unshare``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.engines import awkward_image
from tests.e2e.engines.awkward_image import EXPECTED, EXPECTED_LINKS, TAG
from tests.e2e.engines.podman import Podman, podman
from tests.e2e.engines.scenario import assert_holds, assert_linked, census, saved_layers
from tests.support.sandbox import needs_root

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
needs_root()


@dataclass
class Buildah:
    """Buildah in a private root; with the Podman of the same store, which runs what was built."""

    podman: Podman
    image: awkward_image.AwkwardImage

    @property
    def work(self) -> Path:
        """A directory that everybody may write to."""
        return self.podman.cell.root / "tmp"

    def __call__(self, script: str) -> str:
        """Run a bash script, ended by its first error, in which ``$run`` runs in a container; returns its output.

        An ordinary user's mounts exist only inside of one ``buildah unshare``, so the whole script is in one.
        """
        enter = ("buildah", "unshare") if self.podman.user else ()
        # "oci", the default, wants limits and control groups of its own.
        whole = f"run='buildah run --isolation chroot'\ncd {self.work}\n{script}"
        done = self.podman.cell.run(*enter, "bash", "-euc", whole, user=self.podman.user)
        return done.stdout.decode(errors="surrogateescape")


@pytest.fixture(scope="module", params=["root", "rootless"])
def buildah(request: pytest.FixtureRequest) -> Iterator[Buildah]:
    """Buildah on our storage, with the image loaded."""
    with podman("unionfs", request.param) as engine:
        image = awkward_image.build(engine.cell.root / "image", many_ids=request.param == "root")
        engine.load(image.archive)
        yield Buildah(engine, image)


def test_image_goes_out_and_comes_back(buildah: Buildah) -> None:
    """Pushed as an archive and as an OCI layout, removed, and pulled: the layers are the bytes that came in."""
    # First in this file, since an image that others are built on would not really be removed.
    buildah(f"""
        buildah push -q {TAG} docker-archive:pushed.tar:pushed
        buildah push -q {TAG} oci:pushed:latest
        buildah rmi {TAG} >/dev/null
    """)
    assert buildah.podman.leftovers() == []
    assert tuple(digest for digest, _ in saved_layers(buildah.work / "pushed.tar")) == buildah.image.diff_ids
    buildah(f"buildah tag $(buildah pull -q oci:pushed:latest) {TAG}")
    tree = census(buildah.podman.run(TAG, "/bin/census"))
    assert_holds(tree, EXPECTED)
    assert_linked(tree, EXPECTED_LINKS)


def test_working_container(buildah: Buildah) -> None:
    """Everything that is done to a working container is in its image, and nothing else."""
    (buildah.work / "context").mkdir()
    (buildah.work / "context/a").write_text("a\n")
    (buildah.work / "context/d").mkdir()
    (buildah.work / "context/d/b").write_text("b\n")
    said = buildah(f"""
        c=$(buildah from {TAG})
        $run $c -- sh -c 'rm -r /d2; mkdir /d2; echo 1 >/d2/x; mv /d4 /d5; chmod 4750 /modes/all; ln /new/a /new/c'
        buildah copy -q --chown 7:8 $c context/a /d5/old >/dev/null
        buildah add -q $c context/d /added >/dev/null
        at=$(buildah mount $c)
        test "$(cat $at/d2/x $at/d5/old $at/added/b | tr '\\n' ' ')" = '1 a b '
        stat -f -c %T $at
        echo from outside >$at/outside
        rm -r $at/d3
        ls -d $at/d2/old $at/d4 2>/dev/null || true
        $run $c -- cat /outside
        buildah umount $c >/dev/null
        buildah commit -q $c changed >/dev/null
        buildah rm $c >/dev/null
    """)
    kind, *rest = said.split()
    assert "fuse" in kind
    assert rest == ["from", "outside"]
    tree = census(buildah.podman.run("localhost/changed", "/bin/census"))
    changed = {"d2/x": "1\n", "d5/old": "a\n", "d5/added": "added\n", "added/b": "b\n", "outside": "from outside\n"}
    gone = dict.fromkeys(("d2/new", "d2/later", "d4", "d3", "d4/old", "d4/added", "d3/sub/other"))
    assert_holds(tree, {**EXPECTED, **changed, **gone})
    assert (tree["d5/old"]["owner"], tree["modes/all"]["mode"]) == ("7:8", "4750")
    assert_linked(tree, [{"links/a", "links/far/c"}])


def test_build(buildah: Buildah) -> None:
    """``buildah bud`` makes the same tree with and without a layer for each step; a second one takes all from it."""
    context = buildah.work / "build"
    context.mkdir()
    (context / "file").write_text("file\n")
    (context / "Dockerfile").write_text(f"""\
FROM {TAG}
RUN mv /d4 /d5 && rm -r /d2 && mkdir /d2
COPY --chown=7:8 file /d2/
RUN ln /d2/file /d2/hard && rm /links/a && echo more >>/d2/file
RUN mv /d5 /d6 && rm /d6/old && touch -d @1500000000 /d6/added
FROM {TAG} AS unused
RUN touch /unused
FROM 0
COPY --from=0 /d6 /copied
""")
    bud = "buildah bud -q --isolation chroot"
    buildah(f"{bud} --layers -t layered build >/dev/null; {bud} --layers=false -t flat build >/dev/null")
    facts = {
        "d2/hard": "file\nmore\n",
        "copied/added": "added\n",
        "d4": None,
        "d5": None,
        "d6/old": None,
        "unused": None,
    }
    trees = [census(buildah.podman.run(name, "/bin/census")) for name in ("localhost/layered", "localhost/flat")]
    for tree in trees:
        assert_holds(tree, facts)
        assert tree["d2/file"]["owner"] == "7:8"
        assert tree["d6/added"]["mtime"] == "1500000000"
    first = buildah("buildah images -q --no-trunc layered")
    assert buildah(f"{bud} --layers -t again build >/dev/null; buildah images -q --no-trunc again") == first


def test_from_scratch(buildah: Buildah) -> None:
    """An image made by hand: nothing below the working container but an empty layer."""
    said = buildah("""
        c=$(buildah from scratch)
        at=$(buildah mount $c)
        mkdir -p $at/bin; cp /bin/busybox $at/bin/sh; ln $at/bin/sh $at/bin/cat; echo made >$at/made; mknod $at/p p
        $run $c -- /bin/sh -c 'cat /made; rm /made; mkdir /made; echo again >/made/x'
        buildah umount $c >/dev/null
        buildah config --cmd '["/bin/cat", "/made/x"]' $c
        buildah commit -q --rm $c by-hand >/dev/null
    """)
    assert said == "made\n"
    assert buildah.podman.run("localhost/by-hand") == "again\n"


def test_another_program_of_the_same_library(buildah: Buildah) -> None:
    """Skopeo puts an image into the store, and takes it out again, as CRI-O does when it pulls."""
    buildah(f"""
        skopeo copy -q docker-archive:{buildah.image.archive} containers-storage:localhost/copied:latest
        skopeo copy -q containers-storage:localhost/copied:latest docker-archive:copied.tar:copied:latest
    """)
    assert tuple(digest for digest, _ in saved_layers(buildah.work / "copied.tar")) == buildah.image.diff_ids
    assert_holds(census(buildah.podman.run("localhost/copied", "/bin/census")), EXPECTED)
