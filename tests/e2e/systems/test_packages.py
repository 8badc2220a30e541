"""The packages on a fresh Debian: installed, used by a rootless container, upgraded under it, removed, purged."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from build_parts.debian import PACKAGE, SUITES, mounted_root
from quickstart_steps import rootfs
from quickstart_steps.sandbox import Sandbox
from quickstart_steps.storage import Storage, default_directory
from tests.support.sandbox import needs_root
from unionfs import __version__

needs_root()
pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[3]

# A container engine for the user "someone", without a registry: an image is made of busybox.
ENGINE = """
printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
rm -f /etc/dpkg/dpkg.cfg.d/*
apt-get update -q
apt-get install -q -y --no-install-recommends podman runc uidmap busybox-static man-db
useradd --create-home someone
usermod --add-subuids 100000-165535 --add-subgids 100000-165535 someone
mkdir -p /run/user/1000 /etc/containers
chown someone: /run/user/1000
cat >/etc/containers/containers.conf <<'CONF'
[containers]
netns = "none"
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
events_logger = "file"
CONF
mkdir -p /srv/image/bin
cp /bin/busybox /srv/image/bin/busybox
for name in sh cat date mount sleep; do ln -sf busybox /srv/image/bin/$name; done
tar -C /srv/image -cf /srv/image.tar .
chmod 644 /srv/image.tar
"""


def built(pattern: str, directory: Path, *words: str) -> Path:
    """The package that ``scripts/build WORDS`` makes, or made in the directory ``UNIONFS_PACKAGES``."""
    given = os.environ.get("UNIONFS_PACKAGES")
    if given is None:
        argv: list[str | Path] = [sys.executable, ROOT / "scripts/build.py", *words, "--output", directory]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + done.stdout
    (made,) = Path(given or directory).glob(pattern)
    return made


@dataclass
class System:
    """A fresh Debian with Podman, and a user of it."""

    suite: str
    sandbox: Sandbox
    root: str
    srv: Path
    """What is /srv there, as seen from here."""

    def shell(self, script: str) -> str:
        """Run a shell script as root, and return what it said on both outputs."""
        return self.sandbox.run_in(self.root, script)

    def as_user(self, script: str) -> str:
        """Run a shell script as the ordinary user."""
        (self.srv / "script").write_text(script)
        return self.shell(
            "cd /home/someone; exec setpriv --reuid=someone --regid=someone --init-groups env HOME=/home/someone "
            "XDG_RUNTIME_DIR=/run/user/1000 USER=someone sh -eu /srv/script"
        )

    def use(self, program: str) -> None:
        """Have the user's Podman mount with this program, and give it the image."""
        conf = f'[storage]\ndriver = "overlay"\n[storage.options.overlay]\nmount_program = "{program}"\n'
        self.as_user(f"mkdir -p .config/containers; printf '%s' '{conf}' >.config/containers/storage.conf")
        self.as_user("podman import -q /srv/image.tar localhost/box")

    def check_container(self) -> None:
        """A container of the user lives on our mount, and what it writes is its own."""
        said = self.as_user("podman run --rm localhost/box sh -c 'mount; echo new >/file; cat /file'")
        assert re.search(r" on / type fuse\.unionfs-mount \(rw", said), said
        assert said.endswith("new")

    def check_mount(self, more: str, transport: str) -> None:
        """mount(8) finds the program by the type."""
        said = self.shell(
            "mkdir -p /srv/lower /srv/upper /srv/work /srv/merged; echo text >/srv/lower/file\n"
            "mount -t fuse.unionfs-mount layers /srv/merged "
            f"-o lowerdir=/srv/lower,upperdir=/srv/upper,workdir=/srv/work{more}\n"
            "cat /srv/merged/file; unionfs-overlay mounts --json; umount /srv/merged"
        )
        assert said.startswith("text\n")
        assert f'"transport": "{transport}' in said

    def is_writing(self) -> bool:
        """Whether the container "long" goes on to write in its mount."""
        count = "podman exec long cat /log | wc -l"
        said = self.as_user(f"{count}; sleep 3; {count}").splitlines()
        before, after = (line for line in said if line.isdigit())  # Podman also warns, of this machine
        return int(after) > int(before)


@pytest.fixture(params=SUITES)
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    suite: str = request.param
    storage = Storage(default_directory())
    with Sandbox() as sandbox:
        base = Path(rootfs.debian(suite, storage, sandbox, refresh=False).path)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(storage.run_directory(keep=False)))
        sandbox, root = stack.enter_context(mounted_root([base], directory))
        # Containers' files are to be on a disk, and no overlay is one.
        for name in ("srv", "home"):
            (directory / name).mkdir()
            sandbox.run(["mount", "--bind", str(directory / name), f"{root}/{name}"])
        # udev lets everybody open it; here there is none.
        sandbox.run(["mknod", "-m", "666", str(directory / "fuse"), "c", "10", "229"])
        sandbox.run(["mount", "--bind", str(directory / "fuse"), f"{root}/dev/fuse"])
        sandbox.run(["mount", "-t", "tmpfs", "-o", "mode=755", "run", f"{root}/run"])
        sandbox.run(["mount", "--rbind", "/sys", f"{root}/sys"])
        for name in ("resolv.conf", "ssl/certs/ca-certificates.crt"):
            sandbox.run(["mkdir", "-p", f"{root}/etc/ssl/certs"])
            sandbox.run(["cp", "--remove-destination", f"/etc/{name}", f"{root}/etc/{name}"])
        # The kernel makes no user namespace in a chroot.
        pivot = f"cd {root}; pivot_root . mnt; cd /; umount -l /mnt; mount --make-rshared /"
        sandbox.run(["sh", "-e", "-c", pivot])
        made = System(suite, sandbox, "/", directory / "srv")
        made.shell(ENGINE)
        yield made


def next_version(deb: Path, directory: Path) -> Path:
    """The same package with the next revision, and with a module that is another."""
    tree = directory / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", deb, tree], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace(f"{__version__}-1", f"{__version__}-2"))
    (module,) = tree.glob("usr/lib/unionfs-overlay/lib/*/site-packages/unionfs/__init__.py")
    module.write_text(module.read_text() + '\n_NEXT = "2"\n')
    made = directory / "next.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, made], check=True, capture_output=True)
    return made


def unionfs_fuse(directory: Path) -> Path:
    """A package with the names of Debian 12's unionfs-fuse, which later releases lack but machines may still have."""
    tree = directory / "fuse"
    for name in ("usr/bin/unionfs", "usr/share/man/man8/unionfs.8.gz"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text("")
    (tree / "DEBIAN").mkdir()
    fields = {"Package": "unionfs-fuse", "Version": "1.0-1", "Architecture": "all"}
    fields |= {"Maintainer": "Nobody <nobody@example.org>", "Description": "another union"}
    (tree / "DEBIAN/control").write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    made = directory / "fuse.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, made], check=True, capture_output=True)
    return made


def test_debian_package(system: System, tmp_path: Path) -> None:
    deb = built(f"{system.suite}/*.deb", tmp_path, "deb", "--suite", system.suite)  # without errors, says lintian
    shutil.copy(deb, system.srv / "one.deb")
    shutil.copy(next_version(deb, tmp_path), system.srv / "two.deb")

    system.shell("apt-get install -q -y --no-install-recommends /srv/one.deb")
    version = system.shell("unionfs-mount --version")
    assert f"unionfs-mount: version {__version__} (compiled)" in version
    assert re.search(r"^pyfuse3 version: \d", version, re.MULTILINE)
    for program in ("unionfs-overlay", "unionfs"):
        assert system.shell(f"{program} --version") == f"unionfs: version {__version__}"
    for page in ("unionfs-mount", "unionfs-overlay", "unionfs"):
        assert f"{page}(8)" in system.shell(f"man --where {page}; echo '{page}(8)'")
    system.check_mount("", "direct")
    system.check_mount(",transport=pyfuse3", "pyfuse3")
    for module in ("engines.snapshotter.service", "engines.docker_plugin", "layers", "cli.main"):
        system.shell(f"/usr/lib/unionfs-overlay/bin/python -Ic 'import unionfs.{module}'")
    completed = system.shell(
        "bash -c 'source /usr/share/bash-completion/completions/unionfs-overlay; COMP_WORDS=(unionfs-overlay um); "
        'COMP_CWORD=1; _unionfs_overlay_completion unionfs-overlay; echo "${COMPREPLY[@]}"\''
    )
    assert completed == "umount"

    system.use("/usr/bin/unionfs-mount")
    system.check_container()
    system.as_user("podman run -d --name long localhost/box sh -c 'while sleep 0.2; do date >>/log; done'")
    system.shell("dpkg -i /srv/two.deb; grep -q _NEXT /usr/lib/unionfs-overlay/lib/*/site-packages/unionfs/__init__.py")
    assert system.is_writing(), "what was mounted before the upgrade goes on"
    system.check_container()

    shutil.copy(unionfs_fuse(tmp_path), system.srv / "fuse.deb")
    system.shell("dpkg -i /srv/fuse.deb")
    assert system.shell("dpkg -S /usr/bin/unionfs; test ! -L /usr/bin/unionfs") == "unionfs-fuse: /usr/bin/unionfs"
    assert system.shell("unionfs-overlay --version") == f"unionfs: version {__version__}"
    system.shell("dpkg -i /srv/two.deb")
    system.shell("dpkg --purge unionfs-fuse")
    assert system.shell("unionfs --version") == f"unionfs: version {__version__}", "the name is ours again"

    system.as_user("podman rm -f -t 0 long")
    system.shell(f"dpkg --remove {PACKAGE}")
    system.shell(f"dpkg --purge {PACKAGE}")
    assert system.shell("find /usr /etc /var/lib -name '*unionfs*' ! -path '/var/lib/apt/*'") == ""


def test_pipx(system: System, tmp_path: Path) -> None:
    """The wheel, without a compiler on the machine."""
    python = SUITES[system.suite]
    wheel = built(f"*-cp{python.replace('.', '')}-manylinux*.whl", tmp_path, "wheels", "--for", python)
    shutil.copy(wheel, system.srv)
    system.shell("apt-get install -q -y --no-install-recommends pipx fuse3; ! command -v gcc")
    system.shell(
        "export PIPX_HOME=/opt/pipx PIPX_BIN_DIR=/usr/local/bin PIPX_MAN_DIR=/usr/local/share/man "
        f"PIP_CERT=/etc/ssl/certs/ca-certificates.crt\npipx install /srv/{wheel.name}"
    )
    version = system.shell("unionfs-mount --version")
    assert f"unionfs-mount: version {__version__} (compiled)" in version
    assert "pyfuse3 version: not installed" in version
    system.shell("man --where unionfs-mount")
    system.use("/usr/local/bin/unionfs-mount")
    system.check_container()
