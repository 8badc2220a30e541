"""Mounting as an unprivileged user in a user namespace of their own: ``user.overlay.*``, ``.wh.`` marks."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from tests.support.mounts import mount_program
from tests.support.sandbox import Sandbox, needs_root
from tests.support.snapshot import upper_entries

pytest_plugins = ["tests.support.sandbox"]
needs_root()

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# Runs in the user's namespaces: mounts, does what the test says, unmounts, prints what the test asked for.
PRELUDE = """
import json, os, shutil, stat, subprocess, sys, time
sys.path.insert(0, {repository!r})
from tests.support.snapshot import snapshot
from tests.support.mounts import servers_of, is_running, wait_until
target, program, options = {target!r}, {program!r}, {options!r}
at = lambda path: os.path.join(target, path)
def mount(*more):
    words = [program, "-o", ",".join([options, *more]), target]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
def unmount():
    pids = servers_of(target)
    assert pids
    subprocess.run(["umount", target], check=True)
    assert wait_until(lambda: not any(is_running(p) for p in pids), 10)
result = {{}}
"""


@pytest.fixture
def user() -> Iterator[str]:
    """An unprivileged user with subordinate ids, made for the test."""
    if not shutil.which("newuidmap"):
        pytest.skip("needs newuidmap")
    name = "unionfs-test"
    if name not in [p.pw_name for p in pwd.getpwall()]:
        subprocess.run(["useradd", "-M", "-N", "-g", "nogroup", "-d", "/nonexistent", name], check=True)
    fuse_mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    os.chmod("/dev/fuse", 0o666)
    try:
        yield name
    finally:
        os.chmod("/dev/fuse", fuse_mode)
        subprocess.run(["userdel", name], check=False, capture_output=True)


def subordinate(name: str, path: str) -> tuple[int, int]:
    with open(path) as f:
        for line in f:
            owner, first, count = line.strip().split(":")
            if owner == name:
                return int(first), int(count)
    pytest.fail(f"{name} has no range in {path}")


def in_userns(user: str, box: Sandbox, body: str, extra: str = "") -> dict[str, object]:
    """Run ``body`` as root of a new user namespace of ``user`` with a range of subordinate ids."""
    uid = pwd.getpwnam(user).pw_uid
    gid = pwd.getpwnam(user).pw_gid
    first_uid, count = subordinate(user, "/etc/subuid")
    first_gid, _ = subordinate(user, "/etc/subgid")
    options = f"lowerdir={':'.join(box.lowers)},upperdir={box.upper},workdir={box.work}{extra}"
    for path in (box.upper, box.work, box.target, *box.lowers):
        assert path is not None
        os.chown(path, uid, gid)
    script = PRELUDE.format(
        repository=REPOSITORY, target=box.target, program=mount_program(), options=options
    ) + textwrap.dedent(body)
    script += "\nprint(json.dumps(result, default=str))\n"
    # newuidmap needs a process to give the map to: it waits until its parent has had that done.
    child = (
        "import ctypes, os, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.unshare(0x10000000 | 0x20000 | 0x20000000) == 0, os.strerror(ctypes.get_errno())\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "os.setresgid(0, 0, 0); os.setresuid(0, 0, 0)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    assert libc.mount(b'proc', b'/proc', b'proc', 0, None) == 0, os.strerror(ctypes.get_errno())\n"
        f"    os.execv({sys.executable!r}, [{sys.executable!r}, '-c', sys.stdin.read()])\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", child],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        user=uid,
        group=gid,
        extra_groups=[],
        cwd="/",
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        for program, own, first in (("newuidmap", uid, first_uid), ("newgidmap", gid, first_gid)):
            ranges = ["0", str(own), "1", "1", str(first), str(count)]
            subprocess.run([program, str(process.pid), *ranges], check=True, user=uid, group=gid, extra_groups=[])
        out, err = process.communicate("go\n" + script, timeout=120)
        assert process.returncode == 0, err
        answer = json.loads(out.strip().splitlines()[-1])
        assert isinstance(answer, dict)
        return answer
    finally:
        if process.poll() is None:
            process.kill()  # it is the parent of pid 1 of its namespace
            process.communicate()


def owned(box: Sandbox, user: str) -> int:
    """Give the lower layers to the user, as if they had unpacked them; returns the first subordinate id."""
    uid, gid = pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid
    for low in box.lowers:
        for base, dirs, files in os.walk(low):
            for name in dirs + files:
                os.chown(os.path.join(base, name), uid, gid, follow_symlinks=False)
    return subordinate(user, "/etc/subuid")[0]


def test_a_rootless_mount_works(box: Sandbox, user: str) -> None:
    low = box.lower().file("d/f", "data").file("gone", "x").symlink("l", "d/f").file("merged/a", "a")
    first = owned(box, user)
    os.chown(low.at("d/f"), first + 99, first + 99)  # uid 100 of the container
    answer = in_userns(
        user,
        box,
        """
        mount()
        result["before"] = sorted(snapshot(target))
        st = os.stat(at("d/f"))
        result["owner"] = st.st_uid
        with open(at("d/f"), "a") as f:
            f.write("more")
        os.unlink(at("gone"))
        shutil.rmtree(at("merged"))
        os.mkdir(at("merged"))
        os.chown(at("l"), 5, 6, follow_symlinks=False)
        os.rename(at("d"), at("moved"))
        open(at("new"), "w").close()
        os.chown(at("new"), 1000, 1000)
        result["after"] = {p: (e.kind, e.uid, e.gid, e.size) for p, e in snapshot(target).items()}
        unmount()
        mount()
        result["again"] = {p: (e.kind, e.uid, e.gid, e.size) for p, e in snapshot(target).items()}
        unmount()
        """,
    )
    assert answer["before"] == [".", "d", "d/f", "gone", "l", "merged", "merged/a"]
    assert answer["owner"] == 100
    after = answer["after"]
    assert isinstance(after, dict)
    assert sorted(after) == [".", "l", "merged", "moved", "moved/f", "new"]
    assert after["moved/f"] == ["file", 100, 100, 8]
    assert after["l"][1:3] == [5, 6]
    assert after["new"][1:3] == [1000, 1000]
    assert answer["again"] == after
    kinds = upper_entries(box.in_upper())
    assert os.lstat(box.in_upper("new")).st_uid == first + 999
    names = {n for p in ("merged", "moved") for n in os.listxattr(box.in_upper(p))}
    assert any(n.startswith("user.overlay.") for n in names), names
    assert not any(n.startswith("trusted.") for n in names)
    # A whiteout device 0:0 can be made in a user namespace since Linux 5.8; otherwise it is a mark.
    assert kinds.get("gone") == "whiteout" or ".wh.gone" in kinds


def test_what_the_kernel_wrote_rootless_is_read_and_back(box: Sandbox, user: str) -> None:
    """The kernel's own overlay in a user namespace, with ``userxattr``."""
    box.lower().file("d/f", "data").file("d/g", "g").file("gone", "x").file("h", "h")
    owned(box, user)
    answer = in_userns(
        user,
        box,
        """
        words = options + ",userxattr"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", words, target], check=True)
        os.unlink(at("gone"))
        shutil.rmtree(at("d"))
        os.mkdir(at("d"))
        open(at("d/new"), "w").close()
        theirs = snapshot(target, check_ino=False)
        subprocess.run(["umount", target], check=True)
        mount()
        ours = snapshot(target)
        result["same"] = ours == theirs
        result["theirs"], result["ours"] = sorted(theirs), sorted(ours)
        os.unlink(at("h"))
        os.mkdir(at("h"))
        ours = snapshot(target)
        unmount()
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", words, target], check=True)
        result["back"] = snapshot(target, check_ino=False) == ours
        subprocess.run(["umount", target], check=True)
        """,
    )
    assert answer["ours"] == answer["theirs"] == [".", "d", "d/new", "h"]
    assert answer["same"] is True
    assert answer["back"] is True


def test_marks_where_devices_cannot_be_made(box: Sandbox, user: str) -> None:
    """mknod is refused, as by a container runtime's seccomp profile or a kernel before 5.8."""
    box.lower().file("gone", "x").file("d/old", "o").file("n" * 253, "long")
    owned(box, user)
    answer = in_userns(
        user,
        box,
        """
        import ctypes, struct
        libc = ctypes.CDLL(None, use_errno=True)
        # load the call's number; mknod (133) and mknodat (259) give EPERM, all others are allowed
        steps = [(0x20, 0, 0, 0), (0x15, 2, 0, 133), (0x15, 1, 0, 259), (6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x50001)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *s) for s in steps))
        class Program(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
        program_ = Program(len(steps), ctypes.cast(code, ctypes.c_void_p))
        assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
        assert libc.prctl(22, 2, ctypes.byref(program_), 0, 0) == 0, os.strerror(ctypes.get_errno())
        try:
            os.mknod("/tmp/unionfs-test-node", 0o20600, 0)
        except PermissionError:
            result["refused"] = True
        mount()
        os.unlink(at("gone"))
        shutil.rmtree(at("d"))
        os.mkdir(at("d"))
        os.unlink(at("n" * 253))
        result["after"] = sorted(snapshot(target))
        unmount()
        mount()
        result["again"] = sorted(snapshot(target))
        open(at("gone"), "w").close()
        open(at("n" * 253), "w").close()
        result["back"] = sorted(snapshot(target))
        os.unlink(at("gone"))
        result["gone"] = os.path.lexists(at("gone"))
        unmount()
        """,
    )
    assert answer["refused"] is True
    assert answer["after"] == answer["again"] == [".", "d"]
    assert answer["back"] == [".", "d", "gone", "n" * 253]
    assert answer["gone"] is False
    kinds = upper_entries(box.in_upper())
    assert kinds[".wh.gone"] == "file"
    assert "whiteout" not in kinds.values()


def test_fusermount_mounts_for_a_plain_user(box: Sandbox, user: str) -> None:
    """No namespace at all: a user's mount through the setuid fusermount3, read and written by that user only."""
    if not shutil.which("fusermount3"):
        pytest.skip("needs fusermount3")
    uid, gid = pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid
    box.lower().file("f", "x")
    owned(box, user)
    for path in (box.upper, box.work, box.target):
        assert path is not None
        os.chown(path, uid, gid)
    script = f"""
import os, subprocess, sys
sys.path.insert(0, {REPOSITORY!r})
from tests.support.mounts import mounted_program
options = "lowerdir={box.lowers[0]},upperdir={box.upper},workdir={box.work}"
done = subprocess.run([{mount_program()!r}, "-o", options, {box.target!r}], capture_output=True, text=True)
assert done.returncode == 0, done.stderr
with open({box.at("f")!r}, "a") as f:
    f.write("y")
assert open({box.at("f")!r}).read() == "xy"
subprocess.run(["fusermount3", "-u", {box.target!r}], check=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        user=uid,
        group=gid,
        extra_groups=[],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with open(box.in_upper("f")) as f:
        assert f.read() == "xy"


def test_setuid_and_capabilities_that_are_set_before_the_file_is_closed(box: Sandbox, user: str) -> None:
    """As tar and dpkg unpack: the kernel writes the data when the file is closed, by a server without CAP_FSETID."""
    box.lower()
    answer = in_userns(
        user,
        box,
        """
        mount()
        capability = bytes.fromhex("0100000200200000" + "00" * 12)
        for name, change in (
            ("setuid", lambda fd: os.fchmod(fd, 0o6755)),
            ("capable", lambda fd: os.setxattr(fd, "security.capability", capability)),
        ):
            with open(at(name), "wb", buffering=0) as f:
                f.write(b"program")
                change(f.fileno())
        look = lambda: [oct(os.stat(at("setuid")).st_mode), "security.capability" in os.listxattr(at("capable"))]
        result["mounted"] = look()
        unmount()
        mount()
        result["again"] = look()
        with open(at("capable"), "ab") as f:
            f.write(b"more")
        result["written"] = look()[1]
        unmount()
        """,
    )
    assert answer == {"mounted": ["0o106755", True], "again": ["0o106755", True], "written": False}


def test_a_thread_goes_to_a_program_that_is_alone(direct_box: Sandbox, user: str) -> None:
    """The server itself could not come back from SCHED_IDLE, without privilege."""
    box = direct_box
    box.lower().file("f", "x" * 5000)
    owned(box, user)
    said = box.new_dir("said")
    os.chown(said, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
    answer = in_userns(
        user,
        box,
        """
        said = os.path.join(os.path.dirname(target), "said", "loadavg")
        with open(said, "w") as f:  # what the server is told of the machine, whatever runs there
            f.write("0.00 0.00 0.00 1/100 1000\\n")
        subprocess.run(["mount", "--bind", said, "/proc/loadavg"], check=True)
        mount()
        (server,) = servers_of(target)
        def tasks():
            for name in os.listdir(f"/proc/{server}/task"):
                yield int(name), os.sched_getscheduler(int(name)), len(os.sched_getaffinity(int(name)))
        deadline = time.monotonic() + 60
        while not any(policy == os.SCHED_IDLE for _, policy, _ in tasks()):
            assert time.monotonic() < deadline
            for number in range(200):
                assert not os.path.lexists(at(f"missing-{number}-{time.monotonic()}"))
        result["tasks"] = [(tid == server, policy, cpus == 1) for tid, policy, cpus in tasks()]
        # What needs threads, tasks, and the disk, in turns with what does not.
        for number in range(20):
            for again in range(50):
                os.path.lexists(at(f"missing-{number}-{again}"))
            with open(at("new"), "wb") as f:
                f.write(b"x" * 3_000_000)
                os.fsync(f.fileno())
            os.truncate(at("new"), number)
            os.chmod(at("f"), 0o600 + number)
            assert os.stat(at("new")).st_size == number
            os.unlink(at("new"))
        result["f"] = os.stat(at("f")).st_mode & 0o777
        with open(at("f")) as f:
            result["length"] = len(f.read())
        unmount()
        """,
    )
    tasks = answer["tasks"]
    assert isinstance(tasks, list)
    assert sorted(tasks) == [[False, os.SCHED_IDLE, True], [True, os.SCHED_OTHER, False]]
    assert (answer["f"], answer["length"]) == (0o600 + 19, 5000)


def test_small_writes_wait_in_the_kernels_cache(direct_box: Sandbox, user: str) -> None:
    """Each that asked for file capabilities would cost a request, as a log has thousands of them."""
    box = direct_box
    box.lower().file("f", "x")
    owned(box, user)
    answer = in_userns(
        user,
        box,
        """
        mount()
        (server,) = servers_of(target)
        def requests():
            with open(f"/proc/{server}/io") as f:
                return next(int(line.split()[1]) for line in f if line.startswith("syscr"))
        fd = os.open(at("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, b"first")
        before = requests()
        for _ in range(1000):
            os.write(fd, b"x" * 50)
        result["requests"] = requests() - before
        os.close(fd)
        os.chmod(at("log"), 0o4755)
        os.chown(at("log"), 1000, 1000)
        os.chmod(at("log"), 0o6755)
        # What another one writes takes setuid and setgid away, whether it is written at once or not.
        pid = os.fork()
        if pid == 0:
            os.setresgid(1000, 1000, 1000)
            os.setresuid(1000, 1000, 1000)
            fd = os.open(at("log"), os.O_WRONLY)
            os.pwrite(fd, b"y", 0)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        result["mode"] = os.stat(at("log")).st_mode & 0o7777
        unmount()
        with open(os.path.join(os.path.dirname(target), "upper", "log"), "rb") as f:
            result["contents"] = f.read() == b"yirst" + b"x" * 50_000
        """,
    )
    assert isinstance(answer["requests"], int)
    assert answer["requests"] < 200
    assert (answer["mode"], answer["contents"]) == (0o755, True)
