"""What a person may say about a container, and the process and configuration that come of it."""

from __future__ import annotations

import errno
import fcntl
import threading
from pathlib import Path
from typing import Any

import pytest

from unionfs.engines.images.model import ImageConfig
from unionfs.engines.run.options import (
    RunOptions,
    Tmpfs,
    Volume,
    parse_env,
    parse_hostname,
    parse_tmpfs,
    parse_volume,
    read_env_file,
)
from unionfs.engines.run.privileges import (
    ALL_CAPABILITIES,
    DEFAULT_CAPABILITIES,
    choose_capabilities,
    seccomp_profile,
)
from unionfs.engines.run.process import User, arguments, make_process
from unionfs.engines.run.records import Place, Record, Running
from unionfs.engines.run.spec import build_spec
from unionfs.errors import RunError

IMAGE = ImageConfig.model_validate(
    {"Entrypoint": ["/entry", "-x"], "Cmd": ["cmd"], "Env": ["A=1", "broken", "PATH=/p"], "WorkingDir": "/work/../w"}
)
NOTHING = ImageConfig.model_validate({})


def test_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    here = str(tmp_path / "data")
    assert parse_volume(f"{here}:/x") == Volume(source=here, destination="/x")
    assert parse_volume("./data:/x/../y/:ro") == Volume(source=here, destination="/y", read_only=True)
    for words in ("z", "Z", "rw,z", "cached", "delegated,rw", "consistent", "nocopy", "rslave"):
        assert parse_volume(f"{here}:/x:{words}") == Volume(source=here, destination="/x")
    for words in ("ro,z", "Z,ro", "ro,cached"):
        assert parse_volume(f"{here}:/x:{words}") == Volume(source=here, destination="/x", read_only=True)
    assert parse_volume("data:/x:ro,Z") == Volume(source="", destination="/x", read_only=True, name="data")
    assert parse_volume(".:/y:rw") == Volume(source=str(tmp_path), destination="/y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/tmp", "write SOURCE:DESTINATION"),
        ("/tmp:", "write SOURCE:DESTINATION"),
        (":/x", "write SOURCE:DESTINATION"),
        ("/tmp:/x:", "write SOURCE:DESTINATION"),
        ("/tmp:/x:rx", "there is no option 'rx'; use ro, rw or z"),
        ("/tmp:/x:ro:z", "there is no option 'ro:z'"),
        ("/tmp:/x:ro,", "there is no option ''"),
        ("/tmp:/x:rshared", "there is no option 'rshared'"),
        ("/tmp:/x:ro,rw", "choose one of ro and rw"),
        ("-data:/x", "a name has letters"),
        ("/nothere:/x", "there is no /nothere; make it first"),
        ("/tmp:x", "must be an absolute path"),
        ("/tmp:/", "not its root"),
        ("/tmp:/x/..", "not its root"),
    ],
)
def test_bad_volumes(text: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        parse_volume(text)


def test_tmpfs() -> None:
    assert parse_tmpfs("/tmp") == Tmpfs(destination="/tmp")
    assert parse_tmpfs("/tmp:size=64m,mode=1777,ro") == Tmpfs(
        destination="/tmp", options=("size=64m", "mode=1777", "ro")
    )
    common = ("rw", "noexec", "nosuid", "nodev", "size=65536k")  # what READMEs give to Docker
    assert parse_tmpfs("/run:" + ",".join(common)) == Tmpfs(destination="/run", options=common)
    for text in ("/tmp:size", "/tmp:size=1m size=2m", "/tmp:suid", "tmp", "/", "/tmp:source=/etc"):
        with pytest.raises(RunError):
            parse_tmpfs(text)


def test_host_names() -> None:
    assert parse_hostname("web-1.example") == "web-1.example"
    for text in ("a b", "-a", "a" * 65, "a\n", "ä"):
        with pytest.raises(RunError, match="use letters"):
            parse_hostname(text)


def test_variables(tmp_path: Path) -> None:
    assert parse_env(["A=1", "B", "C", "D="], {"B": "ours"}) == ("A=1", "B=ours", "D=")
    for word in ("=x", "", "A B=1"):
        with pytest.raises(RunError, match="write NAME=value"):
            parse_env([word], {})
    file = tmp_path / "env"
    file.write_text("# no\n\n  A=b c \r\nB\n")
    assert read_env_file(str(file)) == ["A=b c ", "B"]
    file.write_bytes(b"\xff")
    for path in (file, tmp_path / "nothere", tmp_path):
        with pytest.raises(RunError, match="environment file"):
            read_env_file(str(path))


def test_the_program() -> None:
    def program(config: ImageConfig = IMAGE, **options: Any) -> tuple[str, ...]:
        return arguments(config, RunOptions(**options))

    assert program() == ("/entry", "-x", "cmd")
    assert program(command=("a", "b")) == ("/entry", "-x", "a", "b")
    assert program(entrypoint="/other") == ("/other",)
    assert program(entrypoint="/other", command=("a",)) == ("/other", "a")
    assert program(entrypoint="", command=("a",)) == ("a",)
    assert program(command=("",)) == ("/entry", "-x", "")
    assert program(NOTHING, command=("a",)) == ("a",)
    for config, entrypoint in ((NOTHING, None), (IMAGE, "")):
        with pytest.raises(RunError, match="write a command after it"):
            program(config, entrypoint=entrypoint)


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "options", "expected"),
    [
        ([""], ["a", "b"], {}, ("a", "b")),
        ("", "a", {}, ("a",)),
        ([""], ["a"], {"command": ("c",)}, ("c",)),
        ([""], ["a"], {"entrypoint": "/e"}, ("/e",)),
        ([""], None, {}, None),
        (["/e"], [""], {}, ("/e", "")),
        (["/e"], [], {}, ("/e",)),
        (["/e"], ["a"], {"entrypoint": ""}, None),
        # Only a single empty text is none: these are run, and not found.
        ([], [""], {}, ("",)),
        ([""], [""], {}, ("",)),
        (["", "x"], ["a"], {}, ("", "x", "a")),
    ],
)
def test_empty_programs(
    entrypoint: object, cmd: object, options: dict[str, Any], expected: tuple[str, ...] | None
) -> None:
    """moby's mergeAndVerifyConfig."""
    config = ImageConfig.model_validate({"Entrypoint": entrypoint, "Cmd": cmd})
    if expected is None:
        with pytest.raises(RunError, match="does not say what to run"):
            arguments(config, RunOptions(**options))
    else:
        assert arguments(config, RunOptions(**options)) == expected


def test_the_process() -> None:
    options = RunOptions(env=("A=2", "EMPTY="), terminal=True)
    process = make_process(IMAGE, options, User(home="/home/x"), "box")
    assert set(process.env) == {"A=2", "PATH=/p", "HOME=/home/x", "HOSTNAME=box", "TERM=xterm", "EMPTY="}
    assert process.cwd == "/w"
    assert process.search == "/p"
    assert make_process(IMAGE, RunOptions(workdir="/other"), User(), "box").cwd == "/other"
    with pytest.raises(RunError, match="must be an absolute path"):
        make_process(IMAGE, RunOptions(workdir="other"), User(), "box")


def spec(user: User | None = None, **options: Any) -> dict[str, Any]:
    chosen = RunOptions(**options)
    process = make_process(IMAGE, chosen, user or User(), "box")
    return build_spec(process, chosen, rootfs="/r", files="/f", hostname="box")


def test_capabilities() -> None:
    root = spec()["process"]["capabilities"]
    assert root["effective"] == root["permitted"] == root["bounding"]
    assert "CAP_CHOWN" in root["bounding"]
    assert "CAP_SYS_ADMIN" not in root["bounding"]
    other = spec(User(uid=5))["process"]["capabilities"]
    assert (other["effective"], other["permitted"]) == ([], [])
    assert choose_capabilities([], []) is None
    assert choose_capabilities(["net_admin"], ["ALL"]) == ("NET_ADMIN",)
    assert set(choose_capabilities([], ["CAP_MKNOD"]) or ()) == set(DEFAULT_CAPABILITIES) - {"MKNOD"}
    assert choose_capabilities(["all"], []) == ALL_CAPABILITIES
    with pytest.raises(RunError, match="there is no capability"):
        choose_capabilities(["FLY"], [])


def test_the_order_of_mounts_is_that_of_depth() -> None:
    volumes = (Volume(source="/s", destination="/a/b/c"), Volume(source="/s", destination="/a"))
    mounts = [one["destination"] for one in spec(volumes=volumes, tmpfs=(Tmpfs(destination="/a/b"),))["mounts"]]
    assert mounts[-3:] == ["/a", "/a/b", "/a/b/c"]


def test_namespaces() -> None:
    def kinds(**options: Any) -> set[str]:
        return {one["type"] for one in spec(**options)["linux"]["namespaces"]}

    assert kinds() == {"pid", "mount", "ipc", "uts", "cgroup"}
    assert kinds(network="none") == {"pid", "mount", "ipc", "uts", "cgroup", "network"}


def test_refused_calls_can_be_allowed() -> None:
    assert spec()["linux"]["seccomp"] == seccomp_profile()
    assert "seccomp" not in spec(seccomp=False)["linux"]
    # The C library goes on with clone, whose flags can be seen, only if it is told that there is no clone3.
    rules = {name: rule for rule in seccomp_profile()["syscalls"] for name in rule["names"]}
    assert rules["clone3"]["errnoRet"] == errno.ENOSYS


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    options = RunOptions(command=("a",), volumes=(Volume(source="/s", destination="/d"),), capabilities=("CHOWN",))
    record = Record(name="x", image="i", config=IMAGE, options=options, remove=True)
    place = Place(str(tmp_path), "id")
    assert not place.exists()
    place.make(record)
    assert place.record() == record
    (tmp_path / "id/container.json").write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        place.record()


def test_only_one_runs_a_container(tmp_path: Path) -> None:
    first, second = Place(str(tmp_path), "id"), Place(str(tmp_path), "id")
    first.make(Record(name="x", image="i", config=IMAGE, options=RunOptions()))
    assert first.take()
    assert not second.take()
    first.let_go()
    assert second.take()
    second.let_go()


def test_who_looks_is_in_nobodys_way(tmp_path: Path) -> None:
    first, looking = Place(str(tmp_path), "id"), Place(str(tmp_path), "id")
    assert not looking.is_running()
    first.make(Record(name="x", image="i", config=IMAGE, options=RunOptions()))
    with open(looking.lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert not looking.is_running(), "two may look at once"
        assert not first.take()
        later = threading.Timer(0.02, file.close)
        later.start()
        assert first.take(tries=100)
        later.join()
    assert not looking.is_running(), "it is not marked as running yet"
    first.mark_running(Running(pid=1, boot="", runtime="crun", path="/crun", started=1.0))
    assert looking.is_running()
    first.note_end(3)
    first.let_go()
    assert not looking.is_running()
    ended = looking.ended()
    assert ended is not None
    assert (ended.status, ended.started) == (3, 1.0)
