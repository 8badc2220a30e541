"""Options of drivers, as ``key=value`` texts for a whole driver and as mappings for one layer.

The syntax is Docker's ``--storage-opt``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from unionfs.errors import OptionError


def parse_options(options: Iterable[str], known: Iterable[str], driver: str) -> dict[str, str]:
    """The driver options ``options`` as a mapping from lower-case key to value; the last of equal keys counts.

    Args:
        options: texts ``key=value``; only the first ``=`` separates, spaces around both sides do not count.
        known: the keys that the driver has.
        driver: its name, for messages.

    Raises:
        OptionError: a text without ``=``, or a key that is not known.
    """
    return known_options([split_option(option) for option in options], known, driver)


def split_option(option: str) -> tuple[str, str]:
    """Key and value of ``key=value``."""
    key, equals, value = option.partition("=")
    if not equals:
        raise OptionError(f"unable to parse storage-opt key/value: {option}; write it as key=value")
    return key.strip(), value.strip()


def layer_options(options: Mapping[str, str], known: Iterable[str], driver: str) -> dict[str, str]:
    """The options of one layer with keys in lower case; raises :class:`OptionError` for one that is not known."""
    return known_options(options.items(), known, driver)


def known_options(pairs: Iterable[tuple[str, str]], known: Iterable[str], driver: str) -> dict[str, str]:
    """``pairs`` as a mapping with keys in lower case; raises :class:`OptionError` for one that is not known."""
    allowed = sorted(known)
    found = {}
    for key, value in pairs:
        if key.lower() not in allowed:
            choice = f"use one of {', '.join(allowed)}" if allowed else "it has none, leave it out"
            raise OptionError(f"{driver}: unknown option {key}; {choice}")
        found[key.lower()] = value
    return found


def parse_switch(key: str, value: str) -> bool:
    """``true`` or ``false`` and their usual other spellings; raises :class:`OptionError` for anything else."""
    if value.lower() in ("1", "t", "true", "on", "yes"):
        return True
    if value.lower() in ("0", "f", "false", "off", "no"):
        return False
    raise OptionError(f"option {key}={value}: write {key}=true or {key}=false")
