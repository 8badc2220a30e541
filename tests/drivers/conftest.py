"""Fixtures of all driver tests."""

from __future__ import annotations

from tests.drivers.rig import layered_rig, rig

__all__ = ["layered_rig", "rig"]
