"""A real Debian works in our mount, with the same results as in the kernel's overlayfs.

The same programs run in a root file system mounted both ways: packages come and go, a program is built, databases
and repositories are written, archives go out and in. Then both trees must be the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.layers import Layer
from tests.support.mounts import is_ours, mounted_overlay, mounted_union, transports
from tests.support.sandbox import needs_root, new_root
from tests.support.snapshot import Snapshot, checksum_layer, differences, snapshot

needs_root()
pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# In the root file system from the start, and downloaded for the tests to install.
INCLUDED = ("git", "sqlite3", "ca-certificates", "libc6-dev")
OFFERED = ("tcc", "hello", "cowsay")

# What two runs write differently on any file system: logs with times, caches of times and inode numbers, and
# files whose format holds random numbers. Their presence and attributes are compared, not what they hold.
VOLATILE = re.compile(
    r"""
      var/log/.*
    | var/cache/ldconfig/aux-cache
    | var/cache/apt/\w+\.bin
    | var/lib/apt/(extended_states|periodic/.*)
    | .*\.git/(worktrees/[^/]+/)?index
    | .*\.git/(logs/.*|objects/pack/.*\.(idx|rev))
    | srv/.*\.db
    """,
    re.VERBOSE,
)

# /dev has to be made in the namespace: device nodes are not served by every mount.
ENTER = """
set -eu
mount -t proc proc "$0/proc"
mount -t tmpfs -o mode=755 dev "$0/dev"
for device in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "$0/dev/${device%:*}" c 1 "${device#*:}"
done
ln -s /proc/self/fd "$0/dev/fd"
exec chroot "$0" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \\
    DEBIAN_FRONTEND=noninteractive sh -eu -c "$1"
"""


def run_in(root: str, script: str, timeout_s: float = 240) -> str:
    """Run a shell script as root in ``root``, in mount and pid namespaces of its own; returns what it prints."""
    words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, root, script]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"exit {done.returncode} in {root}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def git(directory: str, *words: str) -> None:
    environment = {
        **os.environ,
        "GIT_AUTHOR_DATE": "1000000000 +0000",
        "GIT_COMMITTER_DATE": "1000000000 +0000",
        "GIT_CONFIG_GLOBAL": "/dev/null",
    }
    identity = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, *words], cwd=directory, check=True, capture_output=True, env=environment)


def make_repository(path: str) -> None:
    """A repository with some history, branches, a symbolic link and an executable."""
    os.makedirs(path)
    git(path, "init", "-q")
    for commit in range(15):
        for n in range(20):
            os.makedirs(f"{path}/d{n % 5}/e", exist_ok=True)
            with open(f"{path}/d{n % 5}/e/f{n}", "a") as f:
                f.write(f"commit {commit} file {n}\n" * (n + 1))
        if commit == 3:
            os.symlink("d0/e/f0", f"{path}/link")
            os.chmod(f"{path}/d1/e/f1", 0o755)
        git(path, "add", "-A")
        git(path, "commit", "-q", "-m", f"commit {commit}")
        if commit == 7:
            git(path, "branch", "other")
    git(path, "gc", "-q")


def make_package(root: str) -> None:
    """A small .deb with a conffile, a setuid program, hard and symbolic links and maintainer scripts."""
    source = root + "/srv/package"
    layer = Layer(source)
    os.makedirs(source)
    layer.file("DEBIAN/control", "Package: unionfs-probe\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b>\n"
               "Description: a probe\n")  # fmt: skip
    layer.file("DEBIAN/conffiles", "/etc/unionfs-probe.conf\n").file("etc/unionfs-probe.conf", "setting=1\n")
    layer.file("DEBIAN/postinst", "#!/bin/sh\necho done > /var/lib/unionfs-probe/state\n", mode=0o755)
    layer.file("DEBIAN/prerm", "#!/bin/sh\nrm /var/lib/unionfs-probe/state\n", mode=0o755)
    layer.dir("var/lib/unionfs-probe").file("usr/bin/unionfs-probe", "#!/bin/sh\necho probe\n", mode=0o4755)
    layer.link("usr/bin/unionfs-probe2", to="usr/bin/unionfs-probe")
    layer.symlink("usr/share/unionfs-probe/link", "../../bin/unionfs-probe")
    words = ["dpkg-deb", "--root-owner-group", "-b", source, root + "/srv/probe.deb"]
    subprocess.run(words, check=True, capture_output=True)
    shutil.rmtree(source)


@dataclass(frozen=True, slots=True)
class Workbench:
    """The same root file system, mounted by us and by the kernel."""

    ours: str
    kernel: str
    began_ns: int

    def both(self, script: str) -> str:
        """Run a script in both; it must print the same."""
        ours = run_in(self.ours, script)
        kernel = run_in(self.kernel, script)
        assert ours == kernel
        return ours

    def snapshot(self, root: str) -> Snapshot:
        """The tree, without what any two runs do differently."""
        tree = snapshot(root, mtime=lambda ns: ns if ns < self.began_ns else -1, check_ino=root == self.ours)
        for path, entry in tree.items():
            if VOLATILE.fullmatch(path):
                tree[path] = entry.__class__(entry.kind, entry.mode, entry.uid, entry.gid, 0, 0, 0, -1, "", "", ())
        # Their names are made of random numbers or of the content of others of these.
        return {p: e for p, e in tree.items() if "/.git/objects/" not in p}


@pytest.fixture(scope="session")
def rootfs() -> Iterator[str]:
    """A minimal Debian from the machine's Debian mirror, with packages downloaded to be installed later."""
    if not shutil.which("mmdebstrap"):
        pytest.skip("needs mmdebstrap")
    top = new_root()
    root = top + "/rootfs"
    words = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", "--skip=cleanup/apt"]
    words += ["--include=" + ",".join(INCLUDED)]
    words += [f"--customize-hook=chroot $1 apt-get -y --download-only install {' '.join(OFFERED)}"]
    words += [SUITE, root, f"deb [signed-by={KEYRING}] {MIRROR} {SUITE} main"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        make_repository(root + "/srv/repository")
        make_package(root)
        yield root
    finally:
        shutil.rmtree(top, ignore_errors=True)


@pytest.fixture(scope="module", params=transports())
def bench(rootfs: str, request: pytest.FixtureRequest) -> Iterator[Workbench]:
    """Both mounts, over two layers: the root file system, and one that hides and replaces a little of it."""
    top = new_root()
    middle = Layer(top + "/middle")
    os.mkdir(middle.root)
    middle.file("etc/motd", "from the middle layer\n").whiteout("usr/share/common-licenses")
    lowers = [middle.root, rootfs]
    before = [checksum_layer(low) for low in lowers]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, top, ignore_errors=True)
        for name in ("ours", "kernel"):
            for part in ("upper", "work", "mnt"):
                os.makedirs(f"{top}/{name}/{part}")
        began_ns = time.time_ns() - 1_000_000_000
        part = f"{top}/kernel/"
        # With its index the kernel keeps hard links of lower layers together, as we do.
        options = ("redirect_dir=on", "index=on")
        with (
            mounted_overlay(lowers, part + "upper", part + "work", part + "mnt", options),
            mounted_union(
                lowers,
                f"{top}/ours/upper",
                f"{top}/ours/work",
                f"{top}/ours/mnt",
                (f"transport={request.param}",) if is_ours() else (),
                watchdog_s=1500,
            ),
        ):
            yield Workbench(f"{top}/ours/mnt", part + "mnt", began_ns)
        assert [checksum_layer(low) for low in lowers] == before, "a lower layer was changed"


def test_packages_come_and_go(bench: Workbench) -> None:
    bench.both(
        """
        exec > /tmp/apt.out 2>&1
        apt-get -y --no-download install tcc hello cowsay
        dpkg -i /srv/probe.deb
        """
    )
    out = bench.both(
        """
        hello; /usr/games/cowsay moo; unionfs-probe2; cat /var/lib/unionfs-probe/state
        echo changed=1 >> /etc/unionfs-probe.conf
        dpkg -V tcc hello unionfs-probe || true
        dpkg -l | awk '{print $1, $2, $3}' | sort
        """
    )
    assert "Hello, world!" in out
    bench.both(
        """
        exec > /tmp/apt.out 2>&1
        apt-get -y purge hello
        apt-get -y purge --allow-remove-essential e2fsprogs || true
        dpkg -r unionfs-probe
        dpkg -P cowsay
        dpkg --audit
        """
    )
    out = bench.both("dpkg -l | awk '{print $1, $2, $3}' | sort; ls /usr/bin /usr/share/doc /var/lib/dpkg/info")
    assert "rc unionfs-probe" in out
    assert " hello" not in out


def test_a_package_can_be_installed_again(bench: Workbench) -> None:
    bench.both(
        """
        exec > /tmp/apt.out 2>&1
        dpkg -i /srv/probe.deb
        dpkg -P unionfs-probe
        for turn in 1 2 3; do
            apt-get -y --no-download install hello
            apt-get -y purge hello
        done
        """
    )
    bench.both("dpkg --audit; test ! -e /etc/unionfs-probe.conf; test ! -e /usr/bin/hello")


def test_a_program_is_built(bench: Workbench) -> None:
    out = bench.both(
        r"""
        mkdir -p /srv/build/parts && cd /srv/build
        for n in $(seq 40); do
            printf 'int part%d(int x) { return x * %d; }\n' $n $n > parts/p$n.c
            printf 'int part%d(int);\n' $n >> all.h
        done
        { echo '#include <stdio.h>'; echo '#include "all.h"'; echo 'int main(void) { long s = 0;'
          for n in $(seq 40); do echo "s += part$n($n);"; done
          echo 'printf("%ld\n", s); return 0; }'; } > main.c
        command -v tcc > /dev/null || apt-get -y --no-download install tcc > /dev/null 2>&1
        for f in parts/*.c main.c; do tcc -c "$f" -o "${f%.c}.o"; done
        tcc -o program parts/*.o main.o
        ./program
        mv parts moved && rm moved/*.o && ls -R | sort && cp -a moved copy && diff -r moved copy
        """
    )
    assert str(sum(n * n for n in range(1, 41))) in out


def test_sqlite_keeps_its_promises(bench: Workbench) -> None:
    out = bench.both(
        r"""
        cd /srv
        sqlite3 t.db 'PRAGMA journal_mode=WAL; CREATE TABLE t(n INTEGER PRIMARY KEY, x TEXT, who INT);'
        writer() {
            for n in $(seq 150); do
                echo "BEGIN IMMEDIATE; INSERT INTO t(x, who) VALUES(hex(zeroblob(200)), $1);"
                echo "UPDATE t SET x = 'changed' WHERE n % 10 = 0 AND who = $1; COMMIT;"
            done | sqlite3 -cmd '.timeout 60000' t.db
        }
        writer 1 & first=$!
        writer 2 & second=$!
        wait $first; wait $second
        sqlite3 t.db 'PRAGMA integrity_check; SELECT count(*), count(DISTINCT n), max(n) FROM t;'
        sqlite3 t.db 'PRAGMA journal_mode=DELETE; VACUUM; PRAGMA integrity_check;'
        sqlite3 r.db 'CREATE TABLE r(x); BEGIN; INSERT INTO r VALUES(1),(2); ROLLBACK; INSERT INTO r VALUES(3);
                      SELECT * FROM r;'
        sqlite3 m.db "PRAGMA mmap_size=10000000; ATTACH 't.db' AS o; CREATE TABLE c AS SELECT who, count(*) k
                      FROM o.t GROUP BY who; SELECT * FROM c ORDER BY who; PRAGMA integrity_check;"
        ls t.db*
        """
    )
    assert out.count("ok") == 3
    assert "300|300|300" in out


def test_git_clones_and_checks(bench: Workbench) -> None:
    out = bench.both(
        r"""
        cd /srv
        git config --global --add safe.directory '*'
        git clone -q /srv/repository clone
        git clone -q --no-hardlinks file:///srv/repository far
        cd clone
        git fsck --full --strict 2>&1
        git checkout -q other 2>&1; git checkout -q main
        echo more >> d0/e/f0; mv d1 moved; git add -A
        export GIT_AUTHOR_DATE='1000000000 +0000' GIT_COMMITTER_DATE='1000000000 +0000'
        git -c user.name=A -c user.email=a@b commit -q -m change
        git stash list; git status --porcelain; git log --format='%s %an' | head -3
        git gc -q --prune=now; git fsck --full 2>&1
        git worktree add -q ../tree other && ls ../tree
        cd ../far && git fsck --full 2>&1; git rev-parse HEAD; git ls-files | wc -l
        git -C /srv/repository fsck 2>&1
        """
    )
    assert "error" not in out
    assert "commit 14" in out


def test_tar_out_and_in(bench: Workbench) -> None:
    out = bench.both(
        r"""
        cd /
        tar --xattrs --acls -cf /srv/usr.tar usr/share usr/bin var/lib/dpkg etc 2>&1
        mkdir /srv/out && tar --xattrs --acls -xpf /srv/usr.tar -C /srv/out 2>&1
        tar --compare -f /srv/usr.tar -C /srv/out 2>&1
        tar --compare -f /srv/usr.tar -C / 2>&1
        diff -r --no-dereference /srv/out/usr/share /usr/share && echo same
        rm /srv/usr.tar
        find /srv/out -type f -links +1 | sort | head -50
        """
    )
    assert "same" in out
    assert "changed as we read it" not in out
    # Straight through a pipe, over files that are in the way.
    bench.both("tar -C /srv/out -cf - usr/share | tar -C / -xf - ; rm -r /srv/out")


def test_directories_move_and_vanish(bench: Workbench) -> None:
    bench.both(
        r"""
        mv /usr/share/doc /usr/share/doc.moved
        mkdir /usr/share/doc && touch /usr/share/doc/only
        mv /usr/share/doc.moved/git /usr/share/doc/
        find /usr/share/zoneinfo -name 'A*' -delete 2>/dev/null || true
        rm -rf /usr/share/man /usr/share/locale
        mv /etc/apt /etc/apt.old && cp -a /etc/apt.old /etc/apt
        find /usr/lib/python3* -name '*.pyc' -delete 2>/dev/null || true
        chown -R 1000:1000 /usr/share/git-core
        chmod -R g+w /usr/share/perl5
        sed -i 's/root/admin/' /etc/group
        ln /etc/hostname /etc/hostname2 && mv /etc/hostname2 /srv/
        """
    )


def test_both_trees_are_the_same(bench: Workbench) -> None:
    """Runs last: names, types, modes, owners, contents, times, links and attributes of all that was done."""
    ours, kernel = bench.snapshot(bench.ours), bench.snapshot(bench.kernel)
    assert len(ours) > 3000
    lines = differences(ours, kernel, ("ours", "kernel"))
    assert not lines, "\n".join(lines[:40])
