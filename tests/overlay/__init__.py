"""Tests of the format on the disk and its rules."""
