"""The contract of graph drivers as tests, for whoever writes one. Needs pytest.

A class of tests is made for a driver by saying how it is opened::

    from unionfs.testing import DriverContract

    class TestMine(DriverContract):
        def open_driver(self, home, options, id_mapping):
            return my_package.driver.init(home, options, id_mapping)

:class:`DriverContract` holds for every driver, :class:`LayeredContract` adds what is promised by those that mount a
tree over its parents'. The tests run as root, and each driver in a directory of its own.
"""

import pytest

# Before they are imported: a failing assertion is to show what it compared.
pytest.register_assert_rewrite(*(f"unionfs.testing.{name}" for name in ("diffs", "graphtest", "layered", "layers")))

from unionfs.testing.diffs import DiffTests  # noqa: E402
from unionfs.testing.graphtest import GraphTests  # noqa: E402
from unionfs.testing.layered import LayeredTests  # noqa: E402
from unionfs.testing.layers import LayerTests  # noqa: E402
from unionfs.testing.rig import DriverRig  # noqa: E402

__all__ = ["DriverContract", "DriverRig", "LayeredContract"]


class DriverContract(GraphTests, LayerTests, DiffTests):
    """What every driver promises. A test that does not apply is taken out with ``test_... = None``."""


class LayeredContract(LayeredTests, DriverContract):
    """What a driver promises that mounts a tree over its parents' trees and knows what was changed in it."""
