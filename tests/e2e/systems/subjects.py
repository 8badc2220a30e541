"""What is tested in each system: the rows of the table, and how each is run."""

from __future__ import annotations

from dataclasses import dataclass, field

FILE_SYSTEM = ("tests/host", "tests/overlay", "tests/fuse_ops", "tests/archive")


@dataclass(frozen=True, slots=True)
class Subject:
    """One thing that is tested in every system.

    Args:
        name: its name in the table.
        version: a shell command that writes the version of what is tested.
        tests: of ours, for pytest; they are the same that run on this machine.
        script: a shell script instead, which has to exit 0.
        compiled: whether the file system is compiled for it.
        environment: further variables.
        absent: suites in which it cannot be, with the reason; ``lacks`` has to be true there.
        lacks: a shell command that exits 0 where the subject cannot be.
        in_ci: the suites in which CI runs it; its own machine is a Debian 12, on which it runs all tests.
        timeout_s: how long it may take.
    """

    name: str
    version: str
    tests: tuple[str, ...] = ()
    script: str = ""
    compiled: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    lacks: str = "false"
    in_ci: tuple[str, ...] = ()
    timeout_s: float = 1800.0


def _engine(*names: str) -> tuple[str, ...]:
    """Modules of the engines' tests."""
    return tuple(f"tests/e2e/engines/test_{name}.py" for name in names)


def _package(name: str) -> str:
    """Writes the upstream version of a Debian package."""
    return f"dpkg-query -W -f '${{source:Upstream-Version}}' {name}"


def _not_packaged(name: str) -> str:
    return f"apt-cache policy {name} | grep -q 'Candidate: [0-9]' && exit 1 || exit 0"


def _at_least(name: str, version: str) -> str:
    return f"dpkg --compare-versions $({_package(name)}) ge {version}"


# Not sid, which is another one each day: what breaks there must not keep a change of ours back.
_CI = ("trixie",)
_PYFUSE3 = '.venv/bin/python -c \'from importlib.metadata import version; print("pyfuse3", version("pyfuse3"))\''
_SET_UP = "scripts/setup --dev | tee /dev/stderr | grep -qx 'setup: everything is there'"

SUBJECTS = (
    Subject("set-up, nothing compiled", _PYFUSE3, script=f"UNIONFS_COMPILE=0 {_SET_UP}", in_ci=_CI),
    Subject(
        "file system, nothing compiled",
        _PYFUSE3,
        tests=FILE_SYSTEM,
        environment={"UNIONFS_TRANSPORT": "pyfuse3"},
        timeout_s=3600,
    ),
    Subject("Podman, root", _package("podman"), tests=(*_engine("podman"), "-k", "not rootless")),
    Subject("Podman, rootless", _package("podman"), tests=(*_engine("podman"), "-k", "rootless"), in_ci=_CI),
    Subject("Podman, the guide", _package("podman"), tests=_engine("podman_guide")),
    Subject("Buildah", _package("buildah"), tests=_engine("buildah"), in_ci=_CI),
    Subject(
        "Docker, plugin",
        _package("docker.io"),
        tests=_engine("docker", "docker_variants", "docker_guide"),
        absent={"sid": "Docker 28 has no graph driver plugins"},
        lacks=_at_least("docker.io", "28"),
    ),
    Subject(
        "Docker, containerd's store",
        _package("docker.io"),
        tests=_engine("docker_containerd"),
        absent=dict.fromkeys(("bookworm", "trixie"), "Docker before 28 is used with the plugin"),
        lacks=f"! {_at_least('docker.io', '28')}",
    ),
    Subject("containerd: ctr, CRI", _package("containerd"), tests=_engine("containerd")),
    Subject(
        "registries, skopeo",
        _package("skopeo"),
        tests=_engine("image_round_trips", "images_guide", "pull", "push", "registry_logins"),
    ),
    Subject("unionfs run, with crun and runc", _package("crun"), tests=_engine("run", "running_guide")),
    Subject(
        "Apptainer",
        _package("apptainer"),
        tests=_engine("apptainer"),
        absent=dict.fromkeys(("bookworm", "trixie"), "Debian has no package of it"),
        lacks=_not_packaged("apptainer"),
    ),
    Subject(
        "Charliecloud",
        _package("charliecloud"),
        tests=(*_engine("on_a_mount"), "-k", "charliecloud"),
        in_ci=_CI,
    ),
    Subject("bubblewrap", _package("bubblewrap"), tests=(*_engine("on_a_mount"), "-k", "bubblewrap"), in_ci=_CI),
    Subject(
        "systemd-nspawn",
        _package("systemd-container"),
        tests=(*_engine("on_a_mount"), "-k", "nspawn"),
        in_ci=_CI,
    ),
    Subject(
        "set-up, compiled",
        '.venv/bin/python -c \'from importlib.metadata import version; print("mypyc", version("mypy"))\'',
        script=f"{_SET_UP}; ls unionfs/fuse_ops/*/*.so >/dev/null",
        compiled=True,
    ),
    Subject("file system, compiled", _package("fuse3"), tests=FILE_SYSTEM, compiled=True, timeout_s=3600),
    Subject("quickstart", _package("mmdebstrap"), script='scripts/quickstart --suite "$(hostname)"', compiled=True),
)
