"""The supervisor: its servers are those that would have been started without it, and nobody depends on it."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import trio

from tests.cli import test_bad_input, test_daemon, test_engine_calls, test_signals
from tests.cli.programs import (
    BIN,
    TIMEOUT_S,
    assert_one_line,
    layer_options,
    listed_at,
    mounted_under,
    run,
    server_of,
    unionfs_mount,
)
from tests.support.mounts import (
    is_mounted,
    is_running,
    mount_program,
    servers_of,
    take_down,
    wait_until,
)
from tests.support.sandbox import Sandbox, needs_root
from tests.support.supervisor import END_S, Supervisor, parent_of, running_supervisor
from tests.support.syscalls import CLONE_NEWNS
from tests.support.users import as_user, in_child
from unionfs.drivers.layered import Stack
from unionfs.drivers.union import FuseMounter
from unionfs.errors import MountError
from unionfs.fuse_ops.session.mount_server import serve_in_copy
from unionfs.fuse_ops.session.supervisor import client
from unionfs.fuse_ops.session.supervisor.worker import rehearse

pytest_plugins = ["tests.support.sandbox"]
needs_root()

NOBODY = 65534
PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + "/unionfs"


@pytest.fixture
def layers(direct_box: Sandbox) -> Sandbox:
    """A sandbox with one lower layer."""
    direct_box.lower().file("name", b"text")
    return direct_box


@pytest.fixture
def supervisor(layers: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    """One that runs, and that everything which mounts is told to use."""
    with running_supervisor(os.path.join(layers.root, "run")) as running:
        monkeypatch.setenv(client.SWITCH, running.path)
        yield running


@contextlib.contextmanager
def mounted(box: Sandbox, *words: str) -> Iterator[int]:
    """A mount of the sandbox; the server's process id."""
    done = unionfs_mount("-o", ",".join([layer_options(box), *words]), box.target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = server_of(box.target)
    try:
        assert os.listdir(box.target) == ["name"]
        yield pid
    finally:
        faults = take_down(box.target, [pid])
    assert not faults


def test_copy_of_the_supervisor_serves_the_mount(layers: Sandbox, supervisor: Supervisor) -> None:
    (waiting,) = supervisor.copies()
    with mounted(layers) as pid:
        assert pid == waiting
        assert supervisor.serves(pid)
        shown = listed_at(layers.target)
        assert shown is not None
        assert (shown["pid"], shown["supervised"], shown["state"]) == (pid, True, "serving")
        with open(layers.at("new"), "w", encoding="utf-8") as file:
            file.write("new")
        # The next one waits already.
        assert wait_until(lambda: len(supervisor.copies()) == 2, END_S)
    # Reaped: no child is left but the one that waits.
    assert wait_until(lambda: len(supervisor.copies()) == 1, END_S)
    assert os.listdir(layers.in_upper()) == ["new"]


def test_what_is_sent_is_what_arrives() -> None:
    environment = {b"A": b"1", b"EMPTY": b"", b"TWO": b"x=y", b"\xff": b"\xfe"}
    sent = client.Request(["python3", "unionfs-mount", "-o", "a b", "\udcff"], 3, environment, (7, 8))
    body = sent.pack()[client.LENGTH_BYTES :]
    got = client.Request.unpack(body)
    assert (got.argv, got.arguments, got.namespaces) == (sent.argv, ["-o", "a b", "\udcff"], (7, 8))
    assert got.environment == environment
    # Not variables: a word that nobody sets, and one without a name.
    assert client.Request.unpack(body + b"\0WORD\0=value").environment == environment


def test_rehearsal_goes_as_far_as_a_listing() -> None:
    """It is only worth something while it does what a mount does."""

    def twice() -> tuple[bool, bool, int, int]:
        first = rehearse(serve_in_copy)
        open_before, second = _open_files(os.getpid()), rehearse(serve_in_copy)
        leaked = len(_open_files(os.getpid())) - len(open_before)
        return first, second, leaked, len(os.listdir("/proc/self/task"))

    # A thread would not be in the copies, while what it has locked would be.
    assert in_child(twice) == (True, True, 0, 1)


def _open_files(pid: int) -> list[str]:
    """What the process has open, in the words of /proc without the numbers."""
    links = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(re.sub(r"\d+\]$", "]", os.readlink(f"/proc/{pid}/fd/{fd}")))
    return sorted(links)


def _has_let_go(pid: int, other: dict[str, object] | None) -> bool:
    files = _open_files(pid)
    return "pipe:[]" not in files if other is None else files == other["fds"]


def _traits(pid: int) -> dict[str, object]:
    """All that a server may have taken from who started it, or should not have."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as lines:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in lines if ":\t" in line)
    names = ["Name", "Umask", "Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Threads"]
    names += ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "SigBlk", "SigIgn", "SigCgt"]
    found: dict[str, object] = {name: status[name].strip() for name in names}
    for name in ("cmdline", "environ", "oom_score_adj", "limits", "cgroup"):
        with open(f"/proc/{pid}/{name}", "rb") as file:
            found[name] = file.read()
    for name in ("cwd", "root", "ns/mnt", "ns/user", "ns/pid", "ns/net"):
        found[name] = os.readlink(f"/proc/{pid}/{name}")
    found["fds"] = _open_files(pid)
    found["session"] = os.getsid(pid) == pid
    found["niceness"] = os.getpriority(os.PRIO_PROCESS, pid)
    found["processors"] = os.sched_getaffinity(pid)
    return found


def test_server_is_as_one_of_the_callers_own(layers: Sandbox, supervisor: Supervisor) -> None:
    script = "umask 027; ulimit -Sc 0; ulimit -Sn 200; echo 123 >/proc/self/oom_score_adj; export MARK=here; cd /usr; "
    script += 'exec setpriv --groups 7,8 nice -n 3 taskset -c 0 "$@"'
    words = [mount_program(), "-o", layer_options(layers), layers.target]
    found: list[dict[str, object]] = []
    for switch in ("0", supervisor.path):
        done = run(["sh", "-c", script, "sh", *words], env={client.SWITCH: switch})
        assert (done.returncode, done.stderr) == (0, "")
        pid = server_of(layers.target)
        try:
            assert supervisor.serves(pid) == (switch != "0")
            # A server lets go of the caller's pipe, or connection, right after it has said that it is ready.
            wait_until(partial(_has_let_go, pid, found[0] if found else None), END_S)
            found.append(_traits(pid))
        finally:
            assert take_down(layers.target, [pid]) == []
    own, copy = found
    assert own["niceness"] == 3
    assert "MARK=here" in str(own["environ"])
    for traits in found:
        environ = traits["environ"]
        assert isinstance(environ, bytes)
        # The order and this variable are all that may differ.
        traits["environ"] = {part for part in environ.split(b"\0") if not part.startswith(os.fsencode(client.SWITCH))}
    for name, value in own.items():
        assert copy[name] == value, name


@pytest.mark.parametrize(
    "check",
    [
        test_daemon.test_mount_is_usable_when_the_program_returns,
        test_daemon.test_server_keeps_nothing_of_the_caller,
        test_daemon.test_limits_and_umask,
        test_daemon.test_relative_paths,
        test_daemon.test_target_that_is_a_link,
        test_bad_input.test_target_with_our_mount,
        test_bad_input.test_unknown_words_are_one_line_and_no_failure,
    ],
    ids=lambda check: check.__name__,
)
def test_same_as_without(layers: Sandbox, supervisor: Supervisor, check: Callable[[Sandbox], None]) -> None:
    (waiting,) = supervisor.copies()
    check(layers)
    assert wait_until(lambda: waiting not in supervisor.copies(), END_S), "it was not asked"


@pytest.mark.parametrize(
    "case", ["missing layer", "missing upper", "missing target", "bad number", "no target", "new line in a name"]
)
def test_wrong_words(layers: Sandbox, supervisor: Supervisor, case: str) -> None:
    (waiting,) = supervisor.copies()
    test_bad_input.test_wrong_words(layers, case)
    assert wait_until(lambda: waiting not in supervisor.copies(), END_S)


@pytest.mark.parametrize(
    "check",
    [
        test_signals.test_sigterm_loses_nothing_and_serves_the_last_user,
        test_signals.test_second_signal_ends_at_once,
        test_signals.test_unmount_from_outside_ends_the_server,
        test_signals.test_hangup_is_ignored,
    ],
    ids=lambda check: check.__name__,
)
def test_same_signals(layers: Sandbox, supervisor: Supervisor, check: Callable[[Sandbox], None]) -> None:
    with contextlib.ExitStack() as stack:
        done = unionfs_mount("-o", layer_options(layers) + ",passthrough=0", layers.target)
        assert done.returncode == 0, done.stderr
        pid = server_of(layers.target)
        stack.callback(take_down, layers.target, [pid])
        assert supervisor.serves(pid)
        check(layers)


@pytest.mark.parametrize(
    "check",
    [test_engine_calls.test_podman_run, test_engine_calls.test_options_of_100_kilobytes],
    ids=lambda check: check.__name__,
)
def test_same_engine_calls(
    direct_box: Sandbox, supervisor: Supervisor, check: Callable[[test_engine_calls.Store], None]
) -> None:
    (waiting,) = supervisor.copies()
    check(test_engine_calls.Store(direct_box, direct_box.new_dir("overlay")))
    assert wait_until(lambda: waiting not in supervisor.copies(), END_S)


@pytest.mark.parametrize("words", [("-f",), ("-d",), ("-o", "debug")])
def test_foreground_is_a_process_of_the_callers_own(
    layers: Sandbox, supervisor: Supervisor, words: tuple[str, ...]
) -> None:
    argv = [mount_program(), *words, "-o", layer_options(layers), layers.target]
    server = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: is_mounted(layers.target), END_S)
        assert server_of(layers.target) == server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(TIMEOUT_S) == 0


def test_layer_named_by_a_descriptor_is_the_callers(layers: Sandbox, supervisor: Supervisor) -> None:
    test_daemon.test_layer_named_by_a_descriptor(layers)


def test_standard_descriptors_may_be_closed(layers: Sandbox, supervisor: Supervisor) -> None:
    test_daemon.test_standard_descriptors_may_be_closed(layers)


def test_switched_off(layers: Sandbox, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client.SWITCH, "0")
    with mounted(layers) as pid:
        assert not supervisor.serves(pid)


def test_graph_driver_uses_it(layers: Sandbox, supervisor: Supervisor) -> None:
    mounter = FuseMounter()
    stack = Stack(
        home=layers.root, target=layers.target, lowers=(layers.lowers[0],), upper=layers.upper, work=layers.work
    )
    mounter.mount(stack)
    pid = server_of(layers.target)
    try:
        assert supervisor.serves(pid)
        assert os.listdir(layers.target) == ["name"]
        with pytest.raises(MountError, match="busy"):
            mounter.mount(stack)
    finally:
        mounter.take_down(layers.target, lazy=False)
    assert not is_running(pid)
    os.mkdir(layers.target)
    with pytest.raises(MountError, match="none"):
        mounter.mount(Stack(home=layers.root, target=layers.target, lowers=(layers.root + "/none",)))


# -- whoever is not like the supervisor -----------------------------------------------------------------------------


@contextlib.contextmanager
def mounted_inside(become: list[str], *words: str) -> Iterator[int]:
    """Mount in what ``become`` runs the program in, and stay there; the process id of the shell."""
    script = '"$@" || exit 9; ls "$0"; read line'
    command = [*become, "sh", "-c", script, words[-1], mount_program(), *words]
    shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert shell.stdin is not None
    assert shell.stdout is not None
    try:
        line = shell.stdout.readline()
        assert line == "name\n", shell.communicate(timeout=TIMEOUT_S)
        yield shell.pid
    finally:
        shell.stdin.close()
        shell.wait(TIMEOUT_S)


def is_told_of(pid: int, target: str) -> bool:
    """Whether ``target`` is in the process' command line."""
    with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="surrogateescape") as file:
        return target in file.read().split("\0")


def test_caller_in_another_mount_namespace(layers: Sandbox, supervisor: Supervisor) -> None:
    """The mount is where the caller is, and nowhere else."""
    become = ["unshare", "-m", "--propagation", "private"]
    with mounted_inside(become, "-o", layer_options(layers), layers.target) as shell:
        pid = server_of(layers.target)
        assert supervisor.serves(pid)
        assert os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink(f"/proc/{shell}/ns/mnt")
        assert os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
        assert not is_mounted(layers.target)
    # Ours are not the server's either: it ends with the namespace of the caller, or when told to.
    os.kill(pid, signal.SIGTERM)
    assert wait_until(lambda: not is_running(pid), END_S)


def test_caller_in_a_chroot(layers: Sandbox, supervisor: Supervisor) -> None:
    root = layers.new_dir("root")
    script = f'mount --rbind / {root} && exec chroot {root} "$@"'
    become = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh"]
    with mounted_inside(become, "-o", layer_options(layers), layers.target) as shell:
        (pid,) = (pid for pid in supervisor.copies() if is_told_of(pid, layers.target))
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8") as lines:
            points = [line.split()[4] for line in lines if "fuse.unionfs-mount" in line]
        assert points == [layers.target], "seen from its own root, which is the caller's"
        with open(f"/proc/{os.getpid()}/mountinfo", encoding="utf-8") as lines:
            assert not [line for line in lines if layers.target in line]
        assert os.stat(f"/proc/{pid}/root").st_ino == os.stat(f"/proc/{shell}/root").st_ino
    os.kill(pid, signal.SIGTERM)
    assert wait_until(lambda: not is_running(pid), END_S)


@pytest.mark.parametrize(
    "become",
    [
        ["unshare", "-U", "-r", "-m"],
        ["unshare", "-p", "-f", "-m", "--mount-proc"],
        ["setpriv", "--bounding-set", "-sys_time"],
        ["setpriv", "--no-new-privs"],
    ],
    ids=["user namespace", "process namespace", "fewer capabilities", "no new privileges"],
)
def test_caller_who_is_not_like_the_supervisor(layers: Sandbox, supervisor: Supervisor, become: list[str]) -> None:
    """He is declined, and starts a server with what he has himself."""
    with mounted_inside(become, "-o", layer_options(layers), layers.target) as shell:
        pid = server_of(layers.target)
        assert not supervisor.serves(pid)
        for name in ("user", "pid", "mnt"):
            in_shell = f"/proc/{shell}/ns/{name}" if name != "pid" else f"/proc/{shell}/ns/pid_for_children"
            assert os.readlink(f"/proc/{pid}/ns/{name}") == os.readlink(in_shell)
        if is_mounted(layers.target):
            assert take_down(layers.target, [pid]) == []
    if is_running(pid):
        os.kill(pid, signal.SIGTERM)
    assert wait_until(lambda: not is_running(pid), END_S)


def test_thread_in_another_mount_namespace_than_its_process(layers: Sandbox, supervisor: Supervisor) -> None:
    def in_thread() -> list[int | None]:
        import ctypes

        answers: list[int | None] = []

        def ask() -> None:
            assert ctypes.CDLL(None).unshare(CLONE_NEWNS | 0x200) == 0  # CLONE_FS
            words = ["-o", layer_options(layers), layers.target]
            answers.append(client.mount(words, ["unionfs-mount", *words], os.environb))

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return answers

    assert in_child(in_thread) == [None]
    assert not is_mounted(layers.target)


def test_other_user_is_refused(layers: Sandbox, supervisor: Supervisor) -> None:
    os.chmod(supervisor.path, 0o666)  # were it not for this, he could not even connect
    os.chown(layers.target, NOBODY, NOBODY)
    words = ["-o", f"lowerdir={layers.lowers[0]}", layers.target]
    request = client.Request(["unionfs-mount", *words], len(words), {}, client.own_namespaces())
    assert as_user(NOBODY, lambda: _converse(supervisor.path, request)) in (client.DECLINED, b"")
    assert mounted_under(layers.root) == []
    with mounted(layers) as pid:
        assert supervisor.serves(pid)


def _converse(path: str, request: client.Request, *, last: bytes = client.GO, server: int = 0) -> bytes:
    """Send ``request`` as a client that does not look who listens; the first answer.

    ``server``, if it is one, is stopped before it is told ``last``: it hears of that and of the end at once.
    """
    with socket.socket(socket.AF_UNIX) as connection, open(os.devnull, "r+b") as null:
        connection.settimeout(TIMEOUT_S)
        connection.connect(path)
        socket.send_fds(connection, [request.pack()], [null.fileno()] * 3)
        try:
            answer = connection.recv(1)
        except ConnectionResetError:
            return b""
        if server:
            os.kill(server, signal.SIGSTOP)
        if answer == client.TAKEN and last:
            connection.sendall(last)
        return answer


@pytest.mark.parametrize("last", [b"", b"x", client.GO], ids=["hangs up", "says nonsense", "hangs up after GO"])
def test_caller_who_is_gone_leaves_no_mount(layers: Sandbox, supervisor: Supervisor, last: bytes) -> None:
    (waiting,) = supervisor.copies()
    words = ["-o", layer_options(layers), layers.target]
    request = client.Request(["unionfs-mount", *words], len(words), os.environb, client.own_namespaces())
    assert in_child(lambda: _converse(supervisor.path, request, last=last, server=waiting)) == client.TAKEN
    os.kill(waiting, signal.SIGCONT)
    assert wait_until(lambda: waiting not in supervisor.copies(), END_S)
    assert not is_mounted(layers.target)
    assert servers_of(layers.target) == ()
    if last != client.GO:
        assert layers.work is not None
        assert os.listdir(layers.work) == [], "it did something without being told to go on"


def test_nonsense_harms_nobody(layers: Sandbox, supervisor: Supervisor) -> None:
    held = [null := socket.socket(socket.AF_UNIX)]
    for message in (b"", b"\xff\xff\xff\xff", b"\x08\0\0\0nonsense", b"\x20\0\0\0short", os.urandom(3000)):
        connection = socket.socket(socket.AF_UNIX)
        held.append(connection)  # left open: a slow caller must not hold up the others
        connection.connect(supervisor.path)
        if message:
            socket.send_fds(connection, [message], [null.fileno()] * 3)
    try:
        with mounted(layers) as pid:
            assert supervisor.serves(pid)
    finally:
        for connection in held:
            connection.close()
    assert wait_until(lambda: len(supervisor.copies()) == 1, END_S)


def test_false_supervisor_gets_nothing(layers: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket of another user in the place of ours: he gets no descriptor and no request of ours."""
    directory = layers.new_dir("run")
    os.chown(directory, NOBODY, NOBODY)
    path = f"{directory}/s.sock"
    monkeypatch.setenv(client.SWITCH, path)

    def listen() -> bytes:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            listener.settimeout(TIMEOUT_S)
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(TIMEOUT_S)
                return connection.recv(1)

    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(as_user, NOBODY, listen)
        assert wait_until(lambda: os.path.exists(path), END_S)
        with mounted(layers) as pid:
            assert parent_of(pid) != os.getpid()
        assert heard.result(TIMEOUT_S) == b""


# -- its life -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_mounts_live_on_without_it(layers: Sandbox, supervisor: Supervisor, number: int) -> None:
    with mounted(layers) as pid:
        assert wait_until(lambda: len(supervisor.copies()) == 2, END_S)
        waiting = next(copy for copy in supervisor.copies() if copy != pid)
        status = supervisor.end(number)
        assert status == {signal.SIGTERM: 0, signal.SIGKILL: -9, signal.SIGINT: 130}[signal.Signals(number)]
        assert wait_until(lambda: not is_running(waiting), END_S), "nobody would end it"
        assert os.path.exists(supervisor.path) == (number == signal.SIGKILL)
        with open(layers.at("new"), "wb") as file:
            file.write(b"new")
        assert is_running(pid)
    # The socket that is left leads to nobody.
    done = unionfs_mount("-o", f"lowerdir={layers.lowers[0]}", layers.target)
    assert (done.returncode, done.stderr) == (0, "")
    assert take_down(layers.target, [server_of(layers.target)]) == []


def test_twenty_at_once(layers: Sandbox, supervisor: Supervisor) -> None:
    targets = [layers.new_dir(f"mnt{i}") for i in range(20)]
    with ThreadPoolExecutor(20) as pool:
        done = list(pool.map(lambda t: unionfs_mount("-o", f"lowerdir={layers.lowers[0]}", t), targets))
    pids = []
    try:
        assert [(one.returncode, one.stderr) for one in done] == [(0, "")] * 20
        for target in targets:
            pids.append(server_of(target))
            assert os.listdir(target) == ["name"]
        assert all(supervisor.serves(pid) for pid in pids)
        assert len(set(pids)) == 20
    finally:
        for target in targets:
            take_down(target, servers_of(target))
    assert wait_until(lambda: len(supervisor.copies()) == 1, END_S)


def test_the_next_caller_does_not_wait_for_the_next_copy(layers: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making it is put off for the sake of the mount that is going on, but not while somebody asks."""
    path = os.path.join(layers.new_dir("run"), "s.sock")
    monkeypatch.setenv(client.SWITCH, path)
    code = "import unionfs.fuse_ops.session.supervisor.daemon as daemon; daemon._NEXT_COPY_S = 600; "
    code += "import sys; from unionfs.fuse_ops.session.supervisor.daemon import main; sys.exit(main(sys.argv[1], 0))"
    program = [sys.executable, "-c", code, path]
    with running_supervisor(os.path.dirname(path), program=program) as running:
        for _ in range(3):
            with mounted(layers) as pid:
                assert running.serves(pid)


def test_most_memory_is_shared(layers: Sandbox, supervisor: Supervisor) -> None:
    """The limit for each further mount, 8 MiB; what is private cannot be shared by more of them."""
    with mounted(layers) as pid, open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
        sizes = {line.split()[0]: int(line.split()[1]) for line in lines if line.endswith("kB\n")}
    assert sizes["Private_Dirty:"] + sizes["Private_Clean:"] < 8 << 10, sizes


def test_code_that_was_replaced(layers: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server is never a mixture of two versions; the supervisor starts again with the new one."""
    copied = os.path.join(layers.root, "installed")
    shutil.copytree(PACKAGE, f"{copied}/unionfs", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    # Python's own, and not this repository's hook for an editable installation, finds the copy.
    packages = os.path.dirname(os.path.dirname(trio.__file__))
    start = f"import sys; sys.path[:0] = [{copied!r}, {packages!r}]; "
    programs = {}
    for name, text in {
        "supervisor": "from unionfs.fuse_ops.session.supervisor.daemon import main; sys.exit(main(sys.argv[1], 0))",
        "mount": "from unionfs.fuse_ops.session.mount_program import main; sys.exit(main())",
    }.items():
        programs[name] = f"{copied}/{name}_program.py"
        with open(programs[name], "w", encoding="utf-8") as file:
            file.write(start + text)
    path = os.path.join(layers.new_dir("run"), "s.sock")
    monkeypatch.setenv(client.SWITCH, path)
    environment = {"PYTHONPATH": f"{copied}:{packages}"}  # for when it starts itself again
    command = [sys.executable, "-S", programs["supervisor"], path]
    with running_supervisor(os.path.dirname(path), program=command, environment=environment) as running:

        def served() -> bool:
            argv = [sys.executable, "-S", programs["mount"], "-o", f"lowerdir={layers.lowers[0]}", layers.target]
            done = run(argv)
            assert (done.returncode, done.stderr) == (0, "")
            pid = server_of(layers.target)
            by_copy = running.serves(pid)
            assert take_down(layers.target, [pid]) == []
            return by_copy

        assert served()
        # Another installation, this repository's, is not this one.
        with mounted(layers) as pid:
            assert not running.serves(pid)
        (waiting,) = running.copies()
        with open(f"{copied}/unionfs/fuse_ops/union/union_tree.py", "a", encoding="utf-8") as file:
            file.write("# changed\n")
        assert not served()
        assert wait_until(lambda: running.copies() != [] and waiting not in running.copies(), END_S)
        assert wait_until(served, END_S)


@pytest.mark.disk  # where the code is too: a file has other numbers when its layers are on several file systems
def test_mount_that_covers_the_code(layers: Sandbox, supervisor: Supervisor) -> None:
    """The supervisor's copies go on to serve, and it does not take the covered files for other ones."""
    upper, work = layers.new_dir("covering"), layers.new_dir("covering.work")
    done = unionfs_mount("-o", f"lowerdir={PACKAGE},upperdir={upper},workdir={work}", PACKAGE)
    assert (done.returncode, done.stderr) == (0, "")
    covering = server_of(PACKAGE)
    watchdog = threading.Timer(END_S, os.kill, [covering, signal.SIGKILL])
    watchdog.start()
    try:
        assert supervisor.serves(covering)
        for _ in range(2):
            with mounted(layers) as pid:
                assert supervisor.serves(pid)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(covering, number)
        assert wait_until(lambda: not is_running(covering), END_S)
        assert not is_mounted(PACKAGE)
    finally:
        watchdog.cancel()
        assert take_down(PACKAGE, [covering]) == []


def test_idle_one_ends_itself(layers: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_supervisor(os.path.join(layers.root, "run"), "--idle", "1") as running:
        monkeypatch.setenv(client.SWITCH, running.path)
        with mounted(layers) as pid:
            assert running.serves(pid)
            assert running.process.wait(END_S) == 0
            assert not os.path.exists(running.path)
            assert os.listdir(layers.target) == ["name"]


def test_socket_that_systemd_passes(layers: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.path.join(layers.new_dir("run"), "s.sock")
    monkeypatch.setenv(client.SWITCH, path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        # The shell is what systemd does between fork and exec: descriptor 3, and its own process id.
        script = 'export LISTEN_FDS=1 LISTEN_PID=$$; exec 3<&0 "$0" serve supervisor'
        command = ["sh", "-c", script, f"{BIN}/unionfs"]
        server = subprocess.Popen(command, stdin=listener.fileno(), stderr=subprocess.PIPE, text=True)
        try:
            with mounted(layers) as pid:
                assert parent_of(pid) == server.pid
        finally:
            server.terminate()
            assert server.communicate(timeout=TIMEOUT_S)[1] == ""
    assert os.path.exists(path), "it is systemd's"


def test_second_one_is_refused(layers: Sandbox, supervisor: Supervisor) -> None:
    done = run([f"{BIN}/unionfs", "serve", "supervisor", "--socket", supervisor.path])
    assert supervisor.path in assert_one_line(done, "unionfs")
    with mounted(layers) as pid:
        assert supervisor.serves(pid)


def test_stale_socket_is_replaced(layers: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = layers.new_dir("run")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{directory}/s.sock")
    monkeypatch.setenv(client.SWITCH, f"{directory}/s.sock")
    with mounted(layers):
        pass
    with running_supervisor(directory) as running:
        assert os.stat(running.path).st_mode & 0o777 == 0o600
        with mounted(layers) as pid:
            assert running.serves(pid)


def _is_writable_by_others(directory: str) -> None:
    os.chmod(directory, 0o777)


def _is_somebody_elses(directory: str) -> None:
    os.chown(directory, NOBODY, NOBODY)


def _is_a_link(directory: str) -> None:
    os.rename(directory, directory + ".real")
    os.symlink(directory + ".real", directory)


def _has_a_file(directory: str) -> None:
    with open(f"{directory}/s.sock", "w", encoding="utf-8"):
        pass


@pytest.mark.parametrize("spoil", [_is_writable_by_others, _is_somebody_elses, _is_a_link, _has_a_file])
def test_place_that_cannot_be_trusted(layers: Sandbox, spoil: Callable[[str], None]) -> None:
    directory = layers.new_dir("run")
    spoil(directory)
    before = os.listdir(directory)
    done = run([f"{BIN}/unionfs", "serve", "supervisor", "--socket", f"{directory}/s.sock"])
    assert directory in assert_one_line(done, "unionfs")
    assert os.listdir(directory) == before


def test_limits_of_the_supervisor_are_not_the_callers(layers: Sandbox, supervisor: Supervisor) -> None:
    """One that was started with a low limit of open files serves callers who have more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    (waiting,) = supervisor.copies()
    resource.prlimit(waiting, resource.RLIMIT_NOFILE, (64, hard))
    with mounted(layers) as pid:
        assert pid == waiting
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_limits_of_the_caller_that_would_bind_others(layers: Sandbox, supervisor: Supervisor) -> None:
    test_daemon.mount_once(layers)
    words = [mount_program(), "-o", layer_options(layers), layers.target]
    done = run(["sh", "-c", 'ulimit -f 8; ulimit -t 100; exec "$@"', "sh", *words])
    assert (done.returncode, done.stderr) == (0, "")
    pid = server_of(layers.target)
    try:
        assert supervisor.serves(pid)
        with open(layers.at("name"), "ab") as file:
            file.truncate(1 << 20)
        for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
            assert resource.prlimit(pid, limit) == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    finally:
        assert take_down(layers.target, [pid]) == []
