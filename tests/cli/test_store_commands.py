"""Commands about the whole store and the machine: info, df, histories, images of containers; how names are shown."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.image_archives import Made, to_directory, to_tar
from tests.layers.archives import files
from unionfs.cli import running
from unionfs.cli.main import main
from unionfs.engines.images import ImageStore, import_images, parse_reference
from unionfs.engines.images.model import ImageConfig
from unionfs.engines.run.options import RunOptions
from unionfs.engines.run.records import Place, Record
from unionfs.layers import LayerStore, open_store

BIG = b"x" * 300_000


class Desk:
    """Runs ``unionfs`` on a store of its own, in this process."""

    def __init__(self, root: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self._capture = capture

    def run(self, *words: str | Path) -> tuple[int, str, str]:
        """(exit status, output, errors)."""
        self._capture.readouterr()
        status = main([*map(str, words), f"--root={self.root}"])
        said = self._capture.readouterr()
        return status, said.out, said.err

    def out(self, *words: str | Path) -> str:
        status, out, err = self.run(*words)
        assert (status, err) == (0, ""), err
        return out

    def json(self, *words: str) -> Any:
        return json.loads(self.out(*words, "--json"))

    def store(self) -> LayerStore:
        return open_store(self.root, "vfs")


@pytest.fixture
def desk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    made = Desk(tmp_path / "root", capfd)
    made.store().close()
    yield made


def add(desk: Desk, name: str, *layers: bytes, **config: Any) -> str:
    """An image's id."""
    made = Made(list(layers), config)
    with desk.store() as store:
        import_images(ImageStore(store), io.BytesIO(to_tar(made.old_docker(name))))
    return made.image_id


# info


def test_info(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNIONFS_TRANSPORT", raising=False)
    facts = desk.json("info")
    kernel = tuple(int(part) for part in os.uname().release.split(".")[:2])
    assert facts["kernel"]["value"] == os.uname().release
    assert facts["transport"]["value"] == ("direct" if kernel >= (5, 17) else "pyfuse3")
    assert facts["driver"]["value"] == "vfs"
    assert facts["store"]["value"] == str(desk.root)
    if os.geteuid() == 0 and os.path.exists("/dev/fuse"):
        assert facts["fuse"]["value"].startswith("7.")
    if facts["passthrough"]["value"] == "no":
        assert facts["passthrough"]["why"]
    text = desk.out("info")
    lines = text.splitlines()[1:]
    assert len(lines) == len(facts)
    for fact, line in zip(facts.values(), lines, strict=True):
        assert fact["value"] in line
        assert fact["why"] in line
    monkeypatch.setenv("UNIONFS_TRANSPORT", "pyfuse3")
    facts = desk.json("info")
    assert facts["transport"] == {"value": "pyfuse3", "why": "UNIONFS_TRANSPORT says so"}
    assert facts["passthrough"] == {"value": "no", "why": "only the transport direct has it"}


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse")
def test_info_is_what_a_mount_gets(desk: Desk, tmp_path: Path) -> None:
    """What it says of passthrough is what the mount table says of a mount."""
    lower, target = tmp_path / "lower", tmp_path / "target"
    lower.mkdir()
    target.mkdir()
    facts = desk.json("info")
    assert main(["mount", "--lower", str(lower), str(target)]) == 0
    try:
        (mount,) = [one for one in json.loads(desk_output(desk, "mounts", "--json")) if one["target"] == str(target)]
    finally:
        assert main(["umount", str(target)]) == 0
    assert mount["transport"].split(",")[0] == facts["transport"]["value"]
    assert ("passthrough" in mount["transport"]) == (facts["passthrough"]["value"] == "yes")
    assert not [one for one in Path("/proc/self/mountinfo").read_text().splitlines() if "unionfs-info" in one]


def desk_output(desk: Desk, *words: str) -> str:
    desk._capture.readouterr()
    assert main(list(words)) == 0
    return desk._capture.readouterr().out


def test_info_for_an_ordinary_user(tmp_path: Path) -> None:
    """Without /dev/fuse, ids or a store there is a line with the reason for each."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody")
    script = "mount --bind /dev/null /dev/fuse; exec setpriv --reuid 65534 --regid 65534 --clear-groups "
    command = f"{script} {sys.executable} -m unionfs.cli.main info --json --root {tmp_path}/none"
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, cwd="/", check=True)
    facts = json.loads(done.stdout)
    assert facts["fuse"]["value"] == "cannot be used"
    assert facts["fuse"]["why"]
    assert facts["passthrough"]["value"] == "no"
    assert facts["rootless"]["value"] == "no"
    assert "/etc/subuid" in facts["rootless"]["why"]
    assert facts["limits_of_containers"]["value"] == "none"


# df


def test_what_is_shared_and_own(desk: Desk) -> None:
    base = files(big=BIG)
    add(desk, "one", base, files(a=BIG))
    add(desk, "two", base, files(b=BIG))
    with desk.store() as store:
        images = ImageStore(store)
        box = store.create_rw_layer("box", images.get("one").chain_id)
        with box.mounted() as path:
            Path(path, "own").write_bytes(BIG)
        store.register(io.BytesIO(files(alone=BIG)))
    found = desk.json("df")
    things = {(one["kind"], one["name"]): one for one in found["things"]}
    assert {kind for kind, _ in things} == {"image", "container", "layer"}
    for name in ("one:latest", "two:latest"):
        image = things["image", name]
        assert image["size"] == image["shared"] + image["own"]
        assert image["shared"] >= len(BIG)
        assert image["own"] >= len(BIG)
    assert things["container", "box"]["own"] >= len(BIG)
    assert found["size"] == found["layers"] + found["containers"] + found["volumes"]
    taken = sum(info.stat().st_blocks * 512 for info in (desk.root / "vfs/dir").rglob("*") if not info.is_dir())
    assert found["size"] >= taken
    text = desk.out("df")
    assert "one:latest" in text
    assert "KiB" in text
    assert text.splitlines()[-1].startswith("4 layers ")


def test_nothing_takes_nothing(desk: Desk) -> None:
    assert desk.out("df") == "0 layers 0 B, containers 0 B; together 0 B.\n"


# Histories, and images of containers

STEPS: list[dict[str, Any]] = [
    {"created": "2024-01-01T00:00:00Z", "created_by": "ADD rootfs"},
    {"created": "2024-01-02T00:00:00Z", "created_by": "ENV A=1", "empty_layer": True},
    {"created": "2024-01-03T00:00:00Z", "created_by": "RUN " + "long " * 40, "comment": "buildkit"},
]


def test_a_history(desk: Desk) -> None:
    add(desk, "app", files(a="1234"), files(b="12"), history=STEPS)
    found = desk.json("image", "history", "app")
    assert [step["size"] for step in found] == [2, 0, 4]
    assert [step["created_by"] for step in found] == [step["created_by"] for step in STEPS[::-1]]
    assert found[1]["diff_id"] is None
    lines = desk.out("image", "history", "app").splitlines()
    assert lines[0].split() == ["CREATED", "SIZE", "MADE", "BY", "COMMENT"]
    assert "... " in lines[1]
    assert lines[1].split()[-1] == "buildkit"
    assert lines[3].split() == ["2024-01-01", "4", "B", "ADD", "rootfs", "-"]
    assert "long long" * 10 not in desk.out("image", "history", "app")
    assert str(STEPS[2]["created_by"]).strip() in desk.out("image", "history", "--full", "app")
    add(desk, "none", files(c="1"))
    assert desk.out("image", "history", "none") == "The image has no history.\n"


def test_an_image_of_a_container(desk: Desk, tmp_path: Path) -> None:
    config = {"Env": ["A=1"], "Cmd": ["/bin/sh"], "OnBuild": None}
    add(desk, "app", files(a="1"), files(b="2"), history=STEPS, config=config, created="2024-01-03T00:00:00Z")
    with desk.store() as store:
        image = ImageStore(store).get("app")
        with store.create_rw_layer("box", image.chain_id).mounted() as path:
            Path(path, "new").write_text("made")
    image_id = desk.out("container", "commit", "--image", "made:v1", "-m", "why", "--author", "me", "box").strip()
    (found,) = desk.json("image", "inspect", "made:v1")
    assert found["id"] == image_id
    assert found["complete"]
    assert (found["config"]["env"], found["config"]["cmd"], found["author"]) == (["A=1"], ["/bin/sh"], "me")
    assert len(found["layers"]) == 3
    assert found["created"] > "2024-01-03"
    history = desk.json("image", "history", "made:v1")
    assert [(step["comment"], step["size"]) for step in history] == [("why", 4), ("buildkit", 1), ("", 0), ("", 1)]
    # It can be given away, and is the same elsewhere.
    desk.out("image", "export", "made:v1", "--format", "oci-dir", "--output", str(tmp_path / "out"))
    assert desk.out("image", "import", tmp_path / "out").strip() == image_id
    # A container that changed nothing makes no layer.
    desk.out("container", "create", "--name", "same", found["chain_id"])
    desk.out("container", "commit", "--image", "same", "same")
    assert len(desk.json("image", "inspect", "same")[0]["layers"]) == 3
    assert desk.json("image", "history", "same")[0]["empty_layer"]
    # Holding is right: the image keeps its layers.
    desk.out("container", "rm", "box", "same")
    assert [one["name"] for one in desk.json("gc", "--layers") if one["kind"] == "layer"] == []
    assert desk.json("fsck", "--deep") == []


def test_an_image_of_a_container_without_one(desk: Desk) -> None:
    with desk.store() as store:
        base = store.register(io.BytesIO(files(a="1")))
        box = store.create_rw_layer("box", base.chain_id)
        with box.mounted() as path:
            Path(path, "b").write_text("2")
        record = Record(
            name="box",
            image="gone",
            config=ImageConfig.model_validate({"Cmd": ["x"], "Volumes": {"/v": {}}}),
            options=RunOptions(command=("sh", "-c", "echo > b")),
        )
        Place(str(desk.root / "image/vfs/containers"), box.mount_id).make(record)
    desk.out("container", "commit", "--image", "made", "box")
    (found,) = desk.json("image", "inspect", "made")
    assert (found["config"]["cmd"], found["config"]["volumes"]) == (["x"], ["/v"])
    last, first = desk.json("image", "history", "made")
    assert (last["created_by"], first["comment"]) == ("sh -c 'echo > b'", "without history")
    assert desk.run("container", "commit", "--author", "me", "box")[0] == 2
    assert "is no name of an image" in desk.run("container", "commit", "--image", "NO", "box")[2]


# Names


def test_an_oci_layouts_tags(desk: Desk, tmp_path: Path) -> None:
    one, two = Made([files(a="1")]).oci("v1"), Made([files(a="2")]).oci("latest")
    for members in (one, two):
        members["index.json"] = members["index.json"]
    merged = {**one, **two}
    entries = [json.loads(members["index.json"])["manifests"][0] for members in (one, two)]
    merged["index.json"] = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    layout = to_directory(merged, tmp_path / "My App_1")
    desk.out("image", "import", layout)
    assert [one["names"] for one in desk.json("image", "ls")] == [
        ["localhost/my-app-1:latest"],
        ["localhost/my-app-1:v1"],
    ]
    archive = tmp_path / "box.tar.gz"
    archive.write_bytes(to_tar(one))
    desk.out("image", "import", archive)
    assert "localhost/box:v1" in desk.out("image", "ls")
    desk.out("image", "import", "--only", "v1", "--name", "other", archive)
    assert "other:latest" in desk.out("image", "ls")


def on_terminal(words: list[str], columns: int) -> str:
    terminal, its_side = pty.openpty()
    fcntl.ioctl(its_side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | {"TERM": "dumb"}
    with subprocess.Popen(
        [sys.executable, "-m", "unionfs.cli.main", *words], stdin=its_side, stdout=its_side, env=environment
    ) as process:
        os.close(its_side)
        shown = b""
        try:
            while piece := os.read(terminal, 4096):
                shown += piece
        except OSError:  # EIO: the other side is closed
            pass
        os.close(terminal)
        assert process.wait() == 0
    return shown.decode().replace("\r", "")


def test_names_are_whole_in_80_columns(desk: Desk) -> None:
    names = [
        "ghcr.io/some-owner/application:2024.11.30",
        "a",
        "registry.example.org:5000/" + "long/" * 20 + "name",
    ]
    for name in names:
        add(desk, name, files(a="1"))
    shown = on_terminal(["image", "ls", f"--root={desk.root}"], 80)
    for name in names:
        assert f"{name}:latest " in shown or f"{name} " in shown, shown
    assert "PLATFORM" not in shown
    short = on_terminal(["image", "rm", f"--root={desk.root}", names[2]], 80) and on_terminal(
        ["image", "ls", f"--root={desk.root}"], 80
    )
    assert all(len(line.rstrip()) <= 80 for line in short.splitlines()), short
    add(desk, "other", files(a="1"), architecture="s390x")
    assert "linux/s390x" in desk.out("image", "ls")


EVIL = "e\x1b[31mvil\n\tname\x7f"


def test_control_characters_are_escaped(desk: Desk) -> None:
    with desk.store() as store:
        base = store.register(io.BytesIO(files(a="1")))
        store.create_rw_layer(EVIL, base.chain_id)
    shown = r"e\x1b[31mvil\n\tname\x7f"
    for words in (["container", "ls"], ["layer", "tree"], ["df"], ["container", "inspect", EVIL]):
        text = desk.out(*words)
        assert shown in text, words
        assert EVIL not in text
    status, _, err = desk.run("layer", "rm", base.chain_id)
    assert (status, err.count("\n")) == (1, 1)
    assert shown in err
    status, _, err = desk.run("container", "mount", EVIL + "x")
    assert err == f"unionfs: there is no container {shown}x; unionfs container ls shows those that are there\n"


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse")
def test_control_characters_in_mounts(desk: Desk, tmp_path: Path) -> None:
    lower, target = tmp_path / EVIL, tmp_path / f"{EVIL}2"
    lower.mkdir()
    target.mkdir()
    assert main(["mount", "--lower", str(lower), str(target)]) == 0
    try:
        text = desk_output(desk, "mounts")
        assert r"e\x1b[31mvil\n\tname\x7f2" in text
        assert "\x1b" not in text
    finally:
        assert main(["umount", str(target)]) == 0


def test_a_damaged_record_of_a_container_is_told(desk: Desk) -> None:
    """fsck names it, and its files can be made an image all the same."""
    add(desk, "app", files(a="1"))
    with desk.store() as store:
        box = store.create_rw_layer("box", ImageStore(store).get("app").chain_id)
        record = Record(name="box", image="app", config=ImageConfig.model_validate({}), options=RunOptions())
        place = Place(str(desk.root / "image/vfs/containers"), box.mount_id)
        place.make(record)
    damaged = Path(place.path, "container.json")
    damaged.write_text("{")
    status, out, _ = desk.run("fsck")
    assert status == 1
    assert out.startswith(f"container box: {damaged} is damaged [")
    desk.out("container", "commit", "--image", "saved", "box")
    desk.out("container", "rm", "--force", "box")
    assert desk.json("fsck") == []


def test_damaged_names_do_not_stop_everything(desk: Desk) -> None:
    image_id = add(desk, "app", files(a="1"))
    names = desk.root / "image/vfs/repositories.json"
    good = names.read_bytes()
    names.write_bytes(b"{")
    status, out, _ = desk.run("fsck")
    assert status == 1
    assert f"image names: {names}: is damaged" in out
    status, out, err = desk.run("image", "ls")
    assert (status, image_id[7:19] in out) == (0, True)
    assert err.startswith(f"unionfs: no image has a name: {names}: is damaged")
    status, _, err = desk.run("image", "tag", image_id, "new")
    assert (status, "move it away" in err) == (1, True)
    assert desk.json("gc", "--layers") == []
    names.write_bytes(good)
    assert desk.json("fsck", "--deep") == []
    with desk.store() as store:
        assert ImageStore(store).get("app").names == (parse_reference("app").with_default_tag().familiar,)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("text", [b"", b"\n", b"one", b"one\n", b"one\ntwo\n\nfour\n", b"\n\n\n", b"a\nlonger line\nb"])
def test_the_last_lines_of_a_log(text: bytes, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tail(1) shows them, however the file is read."""
    monkeypatch.setattr(running, "_PIECE_BYTES", piece)
    for count in range(6):
        expected = subprocess.run(["tail", "-n", str(count)], input=text, capture_output=True, check=True).stdout
        assert text[running._start_of_last_lines(io.BytesIO(text), count) :] == expected, count
