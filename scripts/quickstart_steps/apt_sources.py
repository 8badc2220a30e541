"""Where this machine gets Debian's packages from: the lines for a new root file system's sources.list."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

DEFAULT_ARCHIVE = "http://deb.debian.org/debian"
DEFAULT_SECURITY = "http://deb.debian.org/debian-security"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# Only the two files that Debian's installer and images write. Files beside them belong to third parties, whose
# packages have no place in the root file system.
DEBIAN_SOURCES = "/etc/apt/sources.list.d/debian.sources"
SOURCES_LIST = "/etc/apt/sources.list"

# Suites that have neither updates nor security fixes of their own.
_ROLLING = frozenset({"sid", "unstable", "experimental"})
_ONE_LINE = re.compile(r"deb\s+(?:\[[^]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)")
# How to reach the archive from here: proxies, certificates, and whether an old snapshot counts as valid.
_TRANSPORT_SETTING = re.compile(r"Acquire::(?:(?:https?|ftp)::.+|Check-Valid-Until|Check-Date)\s")


@dataclass(frozen=True, slots=True)
class Archives:
    """The base addresses of the two Debian archives."""

    main: str = DEFAULT_ARCHIVE
    security: str = DEFAULT_SECURITY

    def lines(self, suite: str) -> list[str]:
        """sources.list lines for ``suite``, with its updates and security fixes where it has them."""
        places = [(self.main, suite)]
        if suite not in _ROLLING:
            places += [(self.main, f"{suite}-updates"), (self.security, f"{suite}-security")]
        return [f"deb [signed-by={KEYRING}] {uri} {name} main" for uri, name in places]


def machine_archives() -> Archives:
    """The archives that this machine's own Debian sources name, or Debian's usual ones."""
    texts = {}
    for path in (DEBIAN_SOURCES, SOURCES_LIST):
        try:
            with open(path, encoding="utf-8") as file:
                texts[path] = file.read()
        except OSError:
            continue
    return archives_in(texts)


def archives_in(texts: Mapping[str, str]) -> Archives:
    """The archives named by the sources files in ``texts``, path to content.

    An address counts as Debian's when its last part is the one that every Debian mirror has (``debian``,
    ``debian-security``) or when it is a snapshot of one.
    """
    main = security = None
    for path, text in texts.items():
        pairs = _deb822_pairs(text) if path.endswith(".sources") else _one_line_pairs(text)
        for uri, suite in pairs:
            base = uri.rstrip("/")
            if not re.search(r"/debian(-security)?(/\d{8}T\d{6}Z)?$", base):
                continue
            if suite.endswith("-security"):
                security = security or base
            elif "debian-security" not in base:
                main = main or base
    return Archives(main or DEFAULT_ARCHIVE, security or DEFAULT_SECURITY)


def _deb822_pairs(text: str) -> Iterator[tuple[str, str]]:
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, list[str]] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():  # a value that goes on
                fields.setdefault(name, []).extend(line.split())
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.split()
        if "deb" not in fields.get("types", []) or fields.get("enabled") == ["no"]:
            continue
        for uri in fields.get("uris", []):
            for suite in fields.get("suites", []):
                yield uri, suite


def _one_line_pairs(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if found := _ONE_LINE.match(line.strip()):
            yield found["uri"], found["suite"]


def transport_settings() -> list[str]:
    """This machine's apt settings for reaching the archive, as apt configuration lines."""
    if shutil.which("apt-config") is None:
        return []
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False).stdout
    return [line for line in dump.splitlines() if _TRANSPORT_SETTING.match(line) and not line.endswith(' "";')]
