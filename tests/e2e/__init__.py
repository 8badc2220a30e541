"""Tests that drive real programs and engines."""
