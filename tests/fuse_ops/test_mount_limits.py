"""Read-only mounts, many and odd layers, the work directory, and behaviour under load."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from tests.support.mounts import (
    MountFailedError,
    is_mounted,
    is_running,
    mount_program,
    mounted_image,
    mounted_program,
    mounted_tmpfs,
    mounted_union,
    option_string,
    wait_until,
)
from tests.support.sandbox import Sandbox, needs_root
from tests.support.snapshot import assert_same, snapshot
from tests.support.syscalls import MNT_DETACH, umount2

pytest_plugins = ["tests.support.sandbox"]
needs_root()


def rss_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS:"))


def test_without_an_upper_nothing_can_be_written(box: Sandbox) -> None:
    box.lower().file("d/f", "top").whiteout("gone")
    box.lower().file("d/g", "bottom").file("gone")
    upper, work = box.upper, box.work
    box.upper = box.work = None
    with box.mount():
        tree = snapshot(box.target)
        attempts: list[Callable[[], object]] = [
            lambda: os.mkdir(box.at("new")),
            lambda: os.unlink(box.at("d/f")),
            lambda: os.rename(box.at("d/f"), box.at("x")),
            lambda: os.chmod(box.at("d/f"), 0),
            lambda: os.utime(box.at("d")),
            lambda: os.setxattr(box.at("d"), "user.x", b""),
            lambda: os.truncate(box.at("d/f"), 0),
            lambda: os.close(os.open(box.at("d/f"), os.O_RDWR)),
            lambda: os.close(os.open(box.at("new"), os.O_CREAT | os.O_WRONLY)),
            lambda: os.link(box.at("d/f"), box.at("l")),
            lambda: os.symlink("x", box.at("l")),
        ]
        for attempt in attempts:
            with pytest.raises(OSError) as caught:
                attempt()
            assert caught.value.errno == errno.EROFS
        assert_same(snapshot(box.target), tree)
    assert_same(tree, box.kernel_snapshot("ro"))
    box.upper, box.work = upper, work


def test_a_single_lower_without_upper(box: Sandbox) -> None:
    """What an engine mounts for the diff of a base layer."""
    box.lower().file("d/f", "x").symlink("l", "d")
    box.upper = box.work = None
    with box.mount():
        assert sorted(snapshot(box.target)) == [".", "d", "d/f", "l"]


def test_five_hundred_layers(box: Sandbox) -> None:
    for n in range(500):
        box.lower().file("common", f"{n}").file(f"d/{n:03}", f"{n}")
    with box.mount():
        # 500 paths of about 40 bytes: far longer than the page that mount(2) takes.
        assert len(os.listdir(box.at("d"))) == 500
        with open(box.at("common")) as f:
            assert f.read() == "0"
        os.unlink(box.at("d/499"))
        with open(box.at("d/000"), "a") as f:
            f.write("x")
        with open(box.at("d/498")) as f:
            assert f.read() == "498"
    with box.mount():
        assert len(os.listdir(box.at("d"))) == 499


def test_option_string_longer_than_a_page(box: Sandbox) -> None:
    long = os.path.join(box.root, *("n" * 250 for _ in range(3)))
    for n in range(12):
        os.makedirs(f"{long}/{n}")
        box.lower(f"{long}/{n}").file(f"f{n}", "x")
    with box.mount():
        assert len(os.listdir(box.target)) == 12


@pytest.mark.parametrize("name", ["a:b", "a,b", "a b", "a\\b", 'a"b', "é", "a=b", "%41"])
def test_layer_paths_with_odd_characters(box: Sandbox, name: str) -> None:
    odd = box.new_dir(name)
    for part in ("lower", "upper", "work", "mnt"):
        os.mkdir(f"{odd}/{part}")
    box.lower(f"{odd}/lower").file("f", "x")
    box.upper, box.work, box.target = f"{odd}/upper", f"{odd}/work", f"{odd}/mnt"
    with box.mount(), open(box.at("f"), "a") as f:
        f.write("y")
    with open(box.in_upper("f")) as f:
        assert f.read() == "xy"


def test_layers_given_as_symlinks(box: Sandbox) -> None:
    """As engines do: ``l/SHORT -> ../ID/diff``."""
    box.lower().file("f", "one")
    box.lower().file("g", "two")
    links = []
    for n, low in enumerate(box.lowers):
        link = os.path.join(box.root, f"link{n}")
        os.symlink(os.path.relpath(low, box.root), link)
        links.append(link)
    with box.mount(lowers=links):
        assert sorted(os.listdir(box.target)) == ["f", "g"]


def test_links_in_layers_do_not_lead_out(box: Sandbox) -> None:
    """A symbolic link is resolved by the client in the mount, never by the server in the layer."""
    box.lower().symlink("d", "/etc").symlink("up", "../..").file("x/f", "x")
    with box.mount():
        assert os.readlink(box.at("d")) == "/etc"
        os.unlink(box.at("d"))
        os.mkdir(box.at("d"))
        assert os.listdir(box.at("d")) == []
        os.unlink(box.at("up"))
        os.mkdir(box.at("up"))
        with open(box.at("up/passwd"), "w") as f:
            f.write("mine")
    box.assert_kernel_agrees()


def test_an_upper_directory_that_is_a_link_in_a_lower_layer(box: Sandbox) -> None:
    box.lower().file("d/f", "top")
    box.lower().symlink("d", "/etc")
    with box.mount():
        assert os.listdir(box.at("d")) == ["f"]
        assert not os.path.lexists(box.at("d/passwd"))
    box.assert_kernel_agrees()


def test_work_directory_is_prepared_and_emptied(box: Sandbox) -> None:
    box.lower().file("f", "x")
    assert box.work is not None
    os.makedirs(box.work + "/work/left/over")
    with open(box.work + "/work/#1f", "w"):
        pass
    with box.mount():
        assert not os.path.lexists(box.work + "/work/left")
        assert not os.path.lexists(box.work + "/work/#1f")
        os.chmod(box.at("f"), 0o600)


def test_work_directory_may_be_missing_or_fresh(box: Sandbox) -> None:
    box.lower().file("f", "x")
    for turn in range(2):
        with box.mount(), open(box.at("f"), "a") as f:
            f.write(str(turn))
    with open(box.in_upper("f")) as f:
        assert f.read() == "x01"
    box.assert_kernel_agrees()


def test_upper_and_work_on_different_file_systems_are_refused(box: Sandbox) -> None:
    box.lower().file("f", "x")
    with mounted_tmpfs(os.path.join(box.root, "t")) as tmpfs:
        upper, box.upper = box.upper, tmpfs
        with pytest.raises(MountFailedError) as caught, box.mount():
            pass
        box.upper = upper
    assert caught.value.returncode == 1
    assert caught.value.stderr.strip().count("\n") == 0
    assert not is_mounted(box.target)


def test_upper_in_use_is_warned_about_and_mounted(box: Sandbox) -> None:
    """``ctr snapshots diff`` mounts the directories of a running container a second time."""
    box.lower().file("f", "x").file("g", "y")
    second = box.new_dir("second")
    with box.mount() as first:
        with open(box.at("f"), "a") as f:
            f.write("1")
        with mounted_union(box.lowers, box.upper, box.work, second) as other:
            assert other.stderr.strip(), "no warning"
            with open(second + "/f") as f:
                assert f.read() == "x1"
            # The first goes on: its work directory was not taken from it.
            os.chmod(box.at("g"), 0o600)
            with open(box.at("new"), "w") as f:
                f.write("n")
        with open(box.at("g"), "a") as f:
            f.write("more")
        assert is_running(first.pid)


def test_volatile_marks_and_the_mark_is_honoured(box: Sandbox) -> None:
    box.lower().file("f", "x")
    mark = f"{box.work}/work/incompat/volatile"
    with box.mount("volatile"):
        with open(box.at("f"), "a") as f:
            f.write("y")
            f.flush()
            os.fsync(f.fileno())
        assert os.path.isdir(mark)
    if os.path.isdir(mark):  # the kernel leaves it: only who knows that all is on disk may remove it
        with pytest.raises(MountFailedError, match="volatile"), box.mount():
            pass
        os.rmdir(mark)
        os.rmdir(os.path.dirname(mark))
    with box.mount():
        with open(box.at("f")) as f:
            assert f.read() == "xy"
        assert not os.path.lexists(mark)


def test_unclean_volatile_upper_is_refused(box: Sandbox) -> None:
    box.lower().file("f", "x")
    os.makedirs(f"{box.work}/work/incompat/volatile")
    with pytest.raises(MountFailedError, match="volatile"), box.mount():
        pass


def test_a_long_copy_up_holds_nobody_up(box: Sandbox) -> None:
    """fuse-overlayfs copies under one lock: every other request waits."""
    low = box.lower()
    size = 2 << 30
    block = os.urandom(1 << 20)
    with open(low.at("big"), "wb") as f:
        for _ in range(size >> 20):
            f.write(block)
        os.fsync(f.fileno())
    for n in range(200):
        low.file(f"d/{n}", "x")
    with open(low.at("big"), "rb") as big:
        os.posix_fadvise(big.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    waits: list[float] = []
    done = threading.Event()
    failures: list[BaseException] = []

    def copy() -> None:
        try:
            fd = os.open(box.at("big"), os.O_WRONLY)
            os.pwrite(fd, b"end", size)
            os.close(fd)
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    with box.mount():
        began = time.monotonic()
        thread = threading.Thread(target=copy)
        thread.start()
        n = 0
        while not done.is_set():
            at = time.monotonic()
            path = box.at(f"d/{n % 200}")
            os.stat(path)
            with open(path) as text:
                assert text.read().startswith("x")
            with open(box.at(f"new{n % 50}"), "w") as text:
                text.write("x")
            with open(path, "a") as text:
                text.write("y")
            os.stat(box.at("big"))
            waits.append(time.monotonic() - at)
            n += 1
        thread.join()
        copy_s = time.monotonic() - began
        assert not failures
        assert os.stat(box.at("big")).st_size == size + 3
        with open(box.at("big"), "rb") as big:
            big.seek(size - 4)
            assert big.read() == block[-4:] + b"end"
    # One round is some ten requests; a disk busy with 2 GiB may hold one up, but never as long as the copy takes.
    assert n > 5, f"{n} rounds in {copy_s:.1f} s"
    waits.sort()
    assert waits[len(waits) // 2] < 0.5, f"median {waits[len(waits) // 2]:.2f} s of {copy_s:.1f} s"
    assert waits[-1] < max(2.0, copy_s / 2), f"longest {waits[-1]:.2f} s of {copy_s:.1f} s"


def test_ten_thousand_open_files(box: Sandbox) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = 10_000
    if hard < count + 500:
        pytest.skip(f"the hard limit of open files is {hard}")
    low = box.lower(huge=True)
    for n in range(count):
        low.file(f"d{n % 10}/{n}", str(n))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    fds: list[int] = []
    with box.mount():
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        try:
            for n in range(count):
                flags = os.O_RDWR if n % 10 == 0 else os.O_RDONLY
                fds.append(os.open(box.at(f"d{n % 10}/{n}"), flags))
            for n in range(0, count, 97):
                assert os.read(fds[n], 10) == str(n).encode()
            os.unlink(box.at("d0/0"))
            assert os.fstat(fds[0]).st_nlink == 0
        finally:
            for fd in fds:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert os.path.exists(box.at("d9/9999"))


def drop_caches() -> None:
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as f:
        f.write("2")


def counters(server: subprocess.Popen[str]) -> dict[str, int]:
    """What a server in the foreground says of itself when it is asked."""
    assert server.stderr is not None
    server.send_signal(signal.SIGUSR1)
    assert select.select([server.stderr], [], [], 60)[0], "no answer to SIGUSR1 in a minute"
    _, sign, said = server.stderr.readline().partition("counters: ")
    assert sign
    return {name: int(value) for name, _, value in (word.partition("=") for word in said.split())}


@pytest.mark.timeout(400)
def test_memory_is_bounded_by_what_the_kernel_remembers(box: Sandbox) -> None:
    count, dirs = 100_000, 100
    low = box.lower(huge=True)
    for d in range(dirs):
        low.dir(f"d{d}")
        for n in range(count // dirs):
            os.close(os.open(low.at(f"d{d}/{n}"), os.O_CREAT | os.O_WRONLY))
    argv = [mount_program(), "-f", "-o", option_string(box.lowers, box.upper, box.work), box.target]
    server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    full = []
    try:
        assert wait_until(lambda: is_mounted(box.target), 60)
        start = rss_kib(server.pid)

        def find() -> int:
            words = ["find", box.target, "-newermt", "2001-01-01", "-printf", "x"]
            return len(subprocess.run(words, check=True, capture_output=True).stdout)

        for _ in range(3):
            # Every file has a time of its own call, so find asks for the attributes of each.
            assert find() > count
            full.append(rss_kib(server.pid))
            drop_caches()
            # The kernel waits for no answer to a FORGET: they are still coming.
            assert wait_until(lambda: counters(server)["inodes"] < count // 100, 60), counters(server)
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0
    # A process does not always give memory back, but it must use what was forgotten again.
    assert full[2] < full[1] * 1.15, f"start {start}, each time that all is known {full} KiB"
    assert full[2] < 800_000, f"{full[2]} KiB for {count} files"


def test_caches_may_be_dropped_at_any_time(box: Sandbox) -> None:
    low = box.lower()
    for n in range(50):
        low.file(f"d{n}/e/f", str(n))
    with box.mount():
        fd = os.open(box.at("d0/e/f"), os.O_RDWR)
        before = snapshot(box.target)
        numbers = {p: os.lstat(box.at(p)).st_ino for p in before}
        drop_caches()
        assert_same(snapshot(box.target), before)
        assert {p: os.lstat(box.at(p)).st_ino for p in before} == numbers
        os.rename(box.at("d0"), box.at("moved"))
        drop_caches()
        os.write(fd, b"new")
        os.close(fd)
        with open(box.at("moved/e/f")) as f:
            assert f.read() == "new"


def test_many_clients_at_once(box: Sandbox) -> None:
    low = box.lower()
    for n in range(8):
        for m in range(20):
            low.file(f"d{n}/{m}", b"x" * 10_000)
    failures: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for m in range(20):
                with open(box.at(f"d{n}/{m}"), "ab") as f:
                    f.write(b"y" * 5000)
                os.rename(box.at(f"d{n}/{m}"), box.at(f"d{n}/r{m}"))
                os.mkdir(box.at(f"d{n}/sub{m}"))
                with open(box.at(f"d{n}/sub{m}/f"), "w") as f:
                    f.write("z")
                os.listdir(box.target)
                os.link(box.at(f"d{n}/r{m}"), box.at(f"l{n}.{m}"))
            os.rename(box.at(f"d{n}"), box.at(f"e{n}"))
        except BaseException as error:
            failures.append(error)

    with box.mount():
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not failures, failures
        tree = snapshot(box.target)
        assert len([p for p in tree if p.startswith("l")]) == 160
        assert {e.size for p, e in tree.items() if p.startswith("l")} == {15_000}
    box.assert_kernel_agrees()


def test_a_lazy_unmount_ends_the_server_with_its_last_user(box: Sandbox) -> None:
    box.lower().file("f", "x")
    with box.mount() as here:
        here.expect_end = False
        fd = os.open(box.at("f"), os.O_RDWR)
        umount2(box.target, MNT_DETACH)
        assert not is_mounted(box.target)
        os.write(fd, b"written after")
        assert is_running(here.pid)
        os.close(fd)
        assert wait_until(lambda: not is_running(here.pid), 10)
    with open(box.in_upper("f")) as f:
        assert f.read() == "written after"


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_a_signal_unmounts_and_loses_nothing(box: Sandbox, signal_name: str) -> None:
    import signal

    box.lower().file("f", "x")
    with box.mount() as here:
        here.expect_end = False
        for n in range(50):
            with open(box.at(f"new{n}"), "w") as f:
                f.write("data" * 1000)
        os.kill(here.pid, getattr(signal, signal_name))
        assert wait_until(lambda: not is_running(here.pid), 10)
        assert not is_mounted(box.target)
    for n in range(50):
        assert os.stat(box.in_upper(f"new{n}")).st_size == 4000


def test_layers_on_a_small_ext4_of_their_own(box: Sandbox) -> None:
    with mounted_image(os.path.join(box.root, "image"), os.path.join(box.root, "ext4")) as top:
        for part in ("lower", "upper", "work"):
            os.mkdir(f"{top}/{part}")
        box.lower(f"{top}/lower").file("d/f", "x").file("d/g", b"y" * 100_000).symlink("l", "d/f")
        box.upper, box.work = f"{top}/upper", f"{top}/work"
        with box.mount():
            os.rename(box.at("d"), box.at("e"))
            with open(box.at("e/f"), "a") as f:
                f.write("more")
            fd = os.open(box.at("e/g"), os.O_RDWR)
            os.fsync(fd)
            os.close(fd)
            assert os.statvfs(box.target).f_blocks == os.statvfs(top).f_blocks
        box.assert_kernel_agrees()
        box.upper = box.work = None


def test_a_read_only_lower_file_system(box: Sandbox) -> None:
    from tests.support.mounts import bind_read_only, take_down

    source, target = box.new_dir("source"), box.new_dir("readonly")
    with open(source + "/f", "w") as f:
        f.write("x")
    bind_read_only(source, target)
    try:
        box.lower(target)
    except OSError as error:
        assert error.errno == errno.EROFS
        box.lowers.append(target)
    try:
        with box.mount(), open(box.at("f"), "a") as f:
            f.write("y")
        with open(source + "/f") as f:
            assert f.read() == "x"
    finally:
        take_down(target)


def test_engine_calling_conventions(box: Sandbox) -> None:
    """A source before the target, empty words, unknown words, a quoted context with commas."""
    box.lower().file("f", "x")
    context = 'context="system_u:object_r:container_file_t:s0:c1,c2"'
    options = f"lowerdir={box.lowers[0]},upperdir={box.upper},workdir={box.work},,volatile,private,{context},"
    with mounted_program([mount_program(), "overlay", box.target, "-o", options], box.target):
        assert os.listdir(box.target) == ["f"]
    options = f"workdir={box.work}2,upperdir={box.upper}2,lowerdir={box.lowers[0]},dev,suid"
    os.mkdir(f"{box.work}2")
    os.mkdir(f"{box.upper}2")
    with mounted_program([mount_program(), "overlay", box.target, "-o", options], box.target):
        assert os.listdir(box.target) == ["f"]
        os.mknod(box.at("null"), 0o20666, os.makedev(1, 3))
        with open(box.at("null"), "w") as f:
            f.write("x")


def test_names_of_255_bytes(box: Sandbox) -> None:
    """[longname]: fuse-overlayfs refuses names of 252 bytes and more."""
    box.lower().file("d/" + "l" * 255, "x")
    with box.mount():
        assert os.statvfs(box.target).f_namemax == 255
        for length in (251, 252, 254, 255):
            name = "n" * length
            with open(box.at(name), "w") as f:
                f.write("x")
            os.rename(box.at(name), box.at("d/" + name))
            os.unlink(box.at("d/" + name))
            os.mkdir(box.at(name))
            os.rmdir(box.at(name))
        with pytest.raises(OSError) as caught:
            os.mkdir(box.at("n" * 256))
        assert caught.value.errno == errno.ENAMETOOLONG
        os.unlink(box.at("d/" + "l" * 255))
        assert os.listdir(box.at("d")) == []
    box.assert_kernel_agrees()


def test_lower_layers_cannot_be_changed_by_reopening(box: Sandbox) -> None:
    """fuse-overlayfs 2.0: a file opened for reading first and for writing then was written in its lower layer."""
    low = box.lower().file("f", "lower content")
    with box.mount():
        reader = os.open(box.at("f"), os.O_RDONLY)
        assert os.read(reader, 5) == b"lower"
        writer = os.open(box.at("f"), os.O_RDWR)
        os.pwrite(writer, b"UPPER", 0)
        os.ftruncate(writer, 7)
        again = os.open(f"/proc/self/fd/{reader}", os.O_WRONLY)
        os.pwrite(again, b"!", 6)
        for fd in (reader, writer, again):
            os.close(fd)
        with open(box.at("f")) as f:
            assert f.read() == "UPPER !"
    with open(low.at("f")) as f:
        assert f.read() == "lower content"


def cpu_ticks(pid: int) -> int:
    """Processor time of a process in hundredths of a second."""
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_what_is_known_is_not_asked_again(box: Sandbox) -> None:
    """A missing name, attributes: fuse-overlayfs 2.0 is asked for each missing name every time."""
    box.lower().file("d/f", "x" * 5000).symlink("d/l", "f")

    def look(times: int) -> None:
        for _ in range(times):
            for name in ("missing", "d/missing", "none/at/all"):
                assert not os.path.lexists(box.at(name))
            os.stat(box.at("d/f"))
            os.lstat(box.at("d/l"))
            if os.environ["UNIONFS_TRANSPORT"] == "direct":  # pyfuse3 cannot let the kernel keep targets
                os.stat(box.at("d/l"))

    with box.mount() as here:
        look(10)
        before = cpu_ticks(here.pid)
        look(5000)
        # 25,000 answers would take the server more than a second.
        assert cpu_ticks(here.pid) - before <= 10
        with open(box.at("missing"), "w"):
            pass
        assert os.path.exists(box.at("missing"))


@pytest.mark.parametrize("fstype", ["xfs", "btrfs"])
def test_copy_up_shares_blocks_where_the_file_system_can(box: Sandbox, fstype: str) -> None:
    size = 64 << 20
    image, top = os.path.join(box.root, "image"), os.path.join(box.root, "fs")
    with mounted_image(image, top, fstype, 400 << 20):
        for part in ("lower", "upper", "work"):
            os.mkdir(f"{top}/{part}")
        box.lower(f"{top}/lower").file("f", os.urandom(size))
        box.upper, box.work = f"{top}/upper", f"{top}/work"
        os.sync()

        def used() -> int:
            st = os.statvfs(top)
            return (st.f_blocks - st.f_bfree) * st.f_frsize

        with box.mount():
            before = used()
            os.chmod(box.at("f"), 0o600)
            with open(box.at("f"), "r+b") as f:
                f.write(b"changed")
            os.sync()
            grown = used() - before
        assert grown < size // 4, f"{grown} more bytes are used"
        assert os.stat(box.in_upper("f")).st_size == size
        box.assert_kernel_agrees()
        box.upper = box.work = None


def test_a_killed_server_leaves_no_half_copy(box: Sandbox) -> None:
    """A copy-up that a crash interrupts is not visible at the next mount, and what it left is removed."""
    import signal

    low = box.lower().file("small", "s")
    block = os.urandom(1 << 20)
    with open(low.at("big"), "wb") as f:
        for _ in range(512):
            f.write(block)
    with box.mount() as here:
        here.expect_end = False
        with open(box.at("done"), "w") as text:
            text.write("written before")
        with open(box.at("small"), "a") as text:
            text.write("!")
        failed = threading.Event()

        def copy() -> None:
            try:
                os.close(os.open(box.at("big"), os.O_WRONLY))
            except OSError:
                failed.set()

        thread = threading.Thread(target=copy)
        thread.start()
        time.sleep(0.05)
        os.kill(here.pid, signal.SIGKILL)
        thread.join(30)
        assert not thread.is_alive(), "a request to a dead server must end"
        assert wait_until(lambda: not is_running(here.pid), 10)
        umount2(box.target, MNT_DETACH)
    if failed.is_set():
        assert not os.path.lexists(box.in_upper("big"))
    with box.mount():
        with open(box.at("big"), "rb") as big:
            assert big.read(1 << 20) == block
        assert os.stat(box.at("big")).st_size == 512 << 20
        with open(box.at("done")) as text:
            assert text.read() == "written before"
        with open(box.at("small")) as text:
            assert text.read() == "s!"
        sizes = [
            os.lstat(os.path.join(base, name)).st_size for base, _, names in os.walk(box.work or "") for name in names
        ]
        assert sum(sizes) == 0, "the work directory was not emptied"
