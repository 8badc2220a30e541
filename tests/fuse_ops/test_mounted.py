"""``unionfs.mounted``: a mount that lives as long as a block of a program, in a trio program and without trio."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import unionfs
from tests.support.mounts import is_mounted, is_running, servers_of, take_down, transports, wait_until
from tests.support.sandbox import Sandbox, needs_root
from unionfs.errors import LayerError, MountError, OptionError
from unionfs.fuse_ops.session import mount_registry
from unionfs.host import mounts

pytest_plugins = ["tests.support.sandbox"]
needs_root()

# Each program is a process of its own: one that waits for its own mount can only be killed.
PRELUDE = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
import trio
import unionfs
from unionfs.fuse_ops.session import mounted as module

lower, upper, target, transport = sys.argv[1:]

def mounted(**more):
    given = {"lower": [lower], "upper": upper, "target": target, "transport": transport} | more
    return unionfs.mounted(**given)

def is_mounted():
    return f" {target} " in Path("/proc/self/mountinfo").read_text()

async def sh(script, **more):
    done = await trio.run_process(["sh", "-c", script], capture_stdout=True, **more)
    return done.stdout.decode()
"""


class Programs:
    """Starts programs on the layers of a sandbox."""

    def __init__(self, box: Sandbox, transport: str) -> None:
        self.box = box
        self._transport = transport

    def start(self, program: str) -> subprocess.Popen[str]:
        assert self.box.upper is not None
        self.box.freeze()
        arguments = [self.box.lowers[0], self.box.upper, self.box.target, self._transport]
        text = PRELUDE + textwrap.dedent(program)
        return subprocess.Popen(
            [sys.executable, "-c", text, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self, process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[list[str], str]:
        """What the program printed, and what it said on stderr. The mount is gone then."""
        try:
            out, said = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._abort()
            process.kill()
            out, said = process.communicate()
            pytest.fail(f"the program hangs; it printed {out!r} and said {said}")
        assert not is_mounted(self.box.target), said
        return out.splitlines(), said

    def run(self, program: str) -> list[str]:
        """What a program prints that goes well."""
        process = self.start(program)
        out, said = self.end(process)
        assert process.returncode == 0, said
        return out

    def _abort(self) -> None:
        mount = mounts.top_mount(self.box.target)
        if mount is not None:
            Path(f"/sys/fs/fuse/connections/{mount.minor}/abort").write_text("1")


@pytest.fixture(params=transports())
def programs(request: pytest.FixtureRequest, box: Sandbox) -> Iterator[Programs]:
    layer = box.lower()
    layer.file("file", b"lower")
    layer.file("dir/deep", b"deep")
    yield Programs(box, request.param)


# In a trio program


def test_a_block_of_a_trio_program(programs: Programs) -> None:
    out = programs.run("""
        async def main():
            handlers = {number: signal.getsignal(number) for number in (1, 2, 15, 10)}
            threads, children = threading.active_count(), Path(f"/proc/self/task/{os.getpid()}/children")
            async with mounted() as mount:
                print(mount.target == target, mount.pid == os.getpid(), mount.transport.split(",")[0] == transport)
                print(os.fspath(mount) == target, is_mounted(), await sh("cat file; echo new > dir/new", cwd=target))
                print(handlers == {number: signal.getsignal(number) for number in handlers}, children.read_text())
            print(is_mounted())

        trio.run(main)
    """)
    assert out == ["True True True", "True True lower", "True ", "False"]
    assert Path(programs.box.in_upper("dir/new")).read_text() == "new\n"
    assert os.path.isdir(f"{programs.box.upper}.work")


def test_one_block_after_the_other(programs: Programs) -> None:
    out = programs.run("""
        async def once(number):
            async with mounted():
                await sh(f"echo {number} >> file", cwd=target)

        async def main():
            await once(1)
            before = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")[:-1])
            await once(2)
            await once(3)
            after = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")[:-1])
            print(before == after or (before, after))

        trio.run(main)
        trio.run(once, 4)
    """)
    assert out == ["True"]
    assert Path(programs.box.in_upper("file")).read_text() == "lower1\n2\n3\n4\n"


def test_what_the_block_raises_comes_out_of_it(programs: Programs) -> None:
    out = programs.run("""
        async def main():
            try:
                async with mounted():
                    await sh("echo kept > kept", cwd=target)
                    raise ValueError("mine")
            except ValueError as error:
                print(error, is_mounted())
            try:
                async with mounted():
                    raise ExceptionGroup("my own group", [KeyError("one")])
            except ExceptionGroup as group:
                print(group.message, is_mounted())

        trio.run(main)
    """)
    assert out == ["mine False", "my own group False"]
    assert os.path.exists(programs.box.in_upper("kept"))


def test_a_cancelled_block(programs: Programs) -> None:
    out = programs.run("""
        async def main():
            with trio.CancelScope() as scope:
                async with mounted():
                    await sh("echo kept > kept", cwd=target)
                    scope.cancel()
                    await trio.sleep_forever()
            print(scope.cancelled_caught, is_mounted())
            with trio.CancelScope() as scope:
                scope.cancel()
                async with mounted():
                    print("not cancelled")
            print(scope.cancelled_caught, is_mounted())

        trio.run(main)
    """)
    assert out == ["True False", "True False"]
    assert os.path.exists(programs.box.in_upper("kept"))


def test_an_interrupted_program(programs: Programs) -> None:
    process = programs.start("""
        async def main():
            async with mounted():
                print("ready", flush=True)
                await trio.sleep_forever()

        trio.run(main)
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = programs.end(process)
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode in (1, 130, -signal.SIGINT)


def test_a_server_that_fails_ends_the_block(programs: Programs) -> None:
    out = programs.run("""
        serve = module.Session.serve

        async def fail(self):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, self)
                await trio.sleep(0.3)
                raise ZeroDivisionError("in the server")

        module.Session.serve = fail

        async def main():
            try:
                async with mounted():
                    await trio.sleep_forever()
            except* ZeroDivisionError as group:
                print("failed", is_mounted())

        trio.run(main)
    """)
    assert out == ["failed False"]


def test_somebody_else_unmounts(programs: Programs) -> None:
    out = programs.run("""
        async def main():
            try:
                async with mounted():
                    await sh(f"umount {target}")
                    await trio.sleep_forever()
            except unionfs.UnionfsError as error:
                print(error)

        trio.run(main)
    """)
    assert len(out) == 1
    assert "was unmounted by somebody else" in out[0]


def test_threads_may_wait_for_the_mount(programs: Programs) -> None:
    """More of them than trio allows at a time, each with work for threads of the server's own."""
    for number in range(60):
        Path(programs.box.lowers[0], f"large{number}").write_bytes(bytes(1 << 20))
    out = programs.run("""
        def change(number):
            with open(f"{target}/large{number}", "r+b") as file:
                file.write(b"x")
                os.fsync(file.fileno())
            assert sorted(entry.name for entry in os.scandir(target) if entry.stat().st_size)[0]

        async def main():
            async with mounted():
                async with trio.open_nursery() as nursery:
                    for number in range(60):
                        nursery.start_soon(trio.to_thread.run_sync, change, number)
                print(await trio.Path(target, "file").read_text())

        trio.run(main)
    """)
    assert out == ["lower"]
    assert len([name for name in os.listdir(programs.box.in_upper()) if name.startswith("large")]) == 60


def test_calls_that_let_go_of_pythons_lock(programs: Programs) -> None:
    """What the guide says that a thread may do."""
    out = programs.run("""
        import fcntl, shutil, sqlite3, tempfile, zipfile

        def work():
            os.chdir(target)
            with open("file", "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                fcntl.lockf(file, fcntl.LOCK_EX)
                os.pwrite(file.fileno(), b"1", 0)
                os.pread(file.fileno(), 1, 0)
                os.fdatasync(file.fileno())
                os.ftruncate(file.fileno(), 1)
                os.fchmod(file.fileno(), 0o600)
            os.chmod("file", 0o644), os.chown("file", 1, 1), os.utime("file"), os.truncate("file", 0)
            os.setxattr("file", "user.x", b"1"), os.getxattr("file", "user.x"), os.listxattr("file")
            os.symlink("file", "symlink"), os.readlink("symlink"), os.path.realpath("symlink")
            os.link("file", "link"), os.rename("link", "renamed"), os.unlink("renamed"), os.unlink("symlink")
            os.mkfifo("fifo"), os.mknod("node"), os.access("file", os.R_OK), os.statvfs("."), os.path.isdir("nothing")
            print([entry.name for entry in os.scandir("dir") if entry.stat().st_size and entry.is_file()])
            shutil.copytree("dir", "copy"), shutil.rmtree("copy")
            with sqlite3.connect("database") as database:
                database.execute("create table t(x)")
            database.close()
            with zipfile.ZipFile("archive.zip", "w") as archive:
                archive.writestr("a", "b")
            with tempfile.NamedTemporaryFile(dir=".") as temporary:
                temporary.write(bytes(1 << 20))
            Path("module.py").write_text("x = 1")
            sys.path.insert(0, target)
            import module
            os.sync()
            os.chdir("/")

        async def main():
            async with mounted():
                await trio.to_thread.run_sync(work)

        trio.run(main)
    """)
    assert out == ["['deep']"]


def test_a_program_that_waits_for_itself_can_be_killed(programs: Programs) -> None:
    process = programs.start("""
        async def main():
            async with mounted():
                print("ready", flush=True)
                open(f"{target}/file").read()

        trio.run(main)
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.kill()
    process.wait(20)
    take_down(programs.box.target)
    programs.end(process)


def test_programs_can_be_started_from_the_mount_and_in_it(programs: Programs) -> None:
    program = Path(programs.box.lowers[0], "program")
    program.write_text("#!/bin/sh\necho started in $(basename $PWD)\n")
    program.chmod(0o755)
    out = programs.run("""
        async def main():
            usual = subprocess._USE_VFORK, subprocess._USE_POSIX_SPAWN
            async with mounted():
                for _ in range(5):
                    done = await trio.run_process([f"{target}/program"], cwd=f"{target}/dir", capture_stdout=True)
                await sh("sync -f .; echo 3 > /proc/sys/vm/drop_caches", cwd=target)
                print(done.stdout.decode().strip())
                command = [f"{target}/program"]
                print(await trio.to_thread.run_sync(lambda: subprocess.check_output(command, close_fds=False)))
            print(usual == (subprocess._USE_VFORK, subprocess._USE_POSIX_SPAWN))

        trio.run(main)
    """)
    assert out[0] == "started in dir"
    assert out[2] == "True"


def test_the_programs_umask_is_not_the_mounts(programs: Programs) -> None:
    default_acl = "02000000 01000700ffffffff 04000500ffffffff 10000500ffffffff 20000100ffffffff"
    directory = Path(programs.box.lowers[0], "acl")
    directory.mkdir()
    os.setxattr(directory, "system.posix_acl_default", bytes.fromhex(default_acl.replace(" ", "")))
    programs.run("""
        os.umask(0o027)

        async def main():
            async with mounted():
                await sh("umask 002; touch file-2 acl/file; mkdir dir-2 acl/dir; mkfifo fifo; rm file; touch file",
                         cwd=target)
                await sh("umask 0; touch file-0; mkdir dir-0", cwd=target)
            print(oct(os.umask(0)))

        trio.run(main)
    """)
    found = {
        name: oct(stat.S_IMODE(os.stat(programs.box.in_upper(name)).st_mode))
        for name in ("file", "file-2", "dir-2", "fifo", "file-0", "dir-0", "acl/file", "acl/dir")
    }
    assert found == {
        "file": "0o664",
        "file-2": "0o664",
        "dir-2": "0o775",
        "fifo": "0o664",
        "file-0": "0o666",
        "dir-0": "0o777",
        "acl/file": "0o640",
        "acl/dir": "0o751",
    }


def test_a_mount_is_no_layer_of_another_of_the_same_program(programs: Programs) -> None:
    (Path(programs.box.root) / "second").mkdir()
    out = programs.run("""
        second = os.path.join(os.path.dirname(target), "second")

        async def main():
            async with mounted():
                for where in ({"lower": [target]}, {"lower": [lower, f"{target}/dir"]}, {"target": f"{target}/dir"}):
                    for form in ("async", "plain"):
                        try:
                            mounting = unionfs.mounted(**{"lower": [lower], "target": second} | where)
                            if form == "async":
                                async with mounting:
                                    pass
                            else:
                                with mounting:
                                    pass
                        except unionfs.UnionfsError as error:
                            print(type(error).__name__, "would wait for itself" in str(error))

        trio.run(main)
    """)
    assert out == ["LayerError True"] * 6


def test_two_mounts_of_a_program(programs: Programs) -> None:
    """pyfuse3 has one in a process, and says so."""
    (Path(programs.box.root) / "second").mkdir()
    out = programs.run("""
        second = os.path.join(os.path.dirname(target), "second")

        async def main():
            async with mounted():
                try:
                    async with unionfs.mounted(lower=[lower], target=second, transport=transport):
                        print(await sh(f"cat {second}/file {target}/file"))
                except unionfs.UnionfsError as error:
                    print(error)
                print(await sh(f"cat {target}/file"))

        trio.run(main)
    """)
    if transports() == ("pyfuse3",) or "one mount in a process" in out[0]:
        assert "one mount in a process" in out[0]
    else:
        assert out[0] == "lowerlower"
    assert out[1] == "lower"


@pytest.mark.parametrize("form", ["async with", "with"])
def test_who_still_uses_the_mount_is_cut_off(programs: Programs, form: str) -> None:
    out = programs.run(f"""
        module._LEAVING_S = 0.5
        script = "exec 3>>file; echo ready; read _; cat dir/deep || echo late >&3"

        def start():
            user = subprocess.Popen(["sh", "-c", script], cwd=target, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert user.stdout.readline() == b"ready\\n"
            return user

        async def main():
            {form} mounted(options=["passthrough=0"]):
                user = await trio.to_thread.run_sync(start)
            print(is_mounted())
            user.communicate(b"go on\\n")
            print(user.returncode != 0)

        trio.run(main)
    """)
    assert out == ["False", "True"]
    assert "late" not in Path(programs.box.in_upper("file")).read_text()


# Without trio


def test_a_block_of_a_plain_program(programs: Programs) -> None:
    out = programs.run("""
        import mmap

        with mounted() as mount:
            print(mount.pid != os.getpid(), mount.transport.split(",")[0] == transport, is_mounted())
            path = Path(mount, "dir/deep")
            with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                print(bytes(memory))
            path.write_text("changed")
        print(is_mounted(), mount.pid)
        try:
            with mounted():
                raise ValueError("mine")
        except ValueError:
            print(is_mounted())
    """)
    assert out[:2] == ["True True True", "b'deep'"]
    assert out[2].startswith("False ")
    assert not is_running(int(out[2].split()[1]))
    assert out[3:] == ["False"]
    assert Path(programs.box.in_upper("dir/deep")).read_text() == "changed"


def test_a_plain_block_in_a_trio_program(programs: Programs) -> None:
    out = programs.run("""
        async def main():
            with mounted():
                print(Path(target, "file").read_text())

        trio.run(main)
    """)
    assert out == ["lower"]


def test_the_mount_of_a_killed_program_goes_on(programs: Programs) -> None:
    process = programs.start("""
        with mounted() as mount:
            print(mount.pid, flush=True)
            time.sleep(60)
    """)
    assert process.stdout is not None
    server = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert Path(programs.box.at("file")).read_text() == "lower"
    subprocess.run([Path(sys.executable).with_name("unionfs"), "umount", programs.box.target], check=True)
    assert wait_until(lambda: not is_running(server), 20)
    programs.end(process)


def test_a_mount_without_a_record(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server had no place to say who it is."""
    box.lower().file("file", b"lower")
    monkeypatch.setattr(mount_registry, "find", lambda minor: None)
    with unionfs.mounted(lower=list(box.lowers), target=box.target) as mount:
        assert mount.pid is None
        assert Path(mount, "file").read_text() == "lower"
        servers = servers_of(box.target)
    assert not is_mounted(box.target)
    assert wait_until(lambda: not any(is_running(pid) for pid in servers), 20)


# What is refused


def test_what_cannot_work_is_said_before_anything_is_done(box: Sandbox) -> None:
    box.lower().file("file", b"")
    lowers = list(box.lowers)
    with pytest.raises(OptionError, match="colour=red"):
        unionfs.mounted(lower=lowers, target=box.target, options=["colour=red"])
    with pytest.raises(OptionError, match="lowerdir"):
        unionfs.mounted(lower=[], target=box.target)
    with pytest.raises(MountError, match="mkdir"), unionfs.mounted(lower=lowers, target=box.root + "/nowhere"):
        pass
    with (
        pytest.raises(MountError, match="layer /nowhere: no such"),
        unionfs.mounted(lower=["/nowhere"], target=box.target),
    ):
        pass


def test_async_with_needs_trio(box: Sandbox) -> None:
    box.lower()
    mounting = unionfs.mounted(lower=list(box.lowers), target=box.target)
    with pytest.raises(MountError, match="without it"):
        mounting.__aenter__().send(None)


def test_an_upper_in_use_is_refused(box: Sandbox) -> None:
    box.lower()
    second = box.new_dir("second")
    with box.mount():
        mounting = unionfs.mounted(lower=list(box.lowers), upper=box.upper, work=box.work, target=second)
        with pytest.raises((MountError, LayerError), match="use"), mounting:
            pass


def test_names_are_taken_as_they_are(box: Sandbox) -> None:
    box.lowers.append(box.new_dir('a:b,c\\d"e f'))
    Path(box.lowers[0], "file").write_text("here")
    with unionfs.mounted(lower=[Path(box.lowers[0])], target=Path(box.target), source="a,b c") as mount:
        assert Path(mount, "file").read_text() == "here"
        with pytest.raises(OSError, match="Read-only"):
            Path(mount, "file").write_text("")
        top = mounts.top_mount(box.target)
        assert top is not None
        assert top.source == "a,b c"
