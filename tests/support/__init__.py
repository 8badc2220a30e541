"""Helpers shared by the tests: mounting, building layers, comparing trees."""

import pytest

# Test modules import the helpers before pytest loads them as plugins.
pytest.register_assert_rewrite("tests.support.sandbox", "tests.support.snapshot", "tests.support.mounts")
