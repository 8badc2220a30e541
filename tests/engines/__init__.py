"""Tests of ``unionfs.engines`` that need no engine."""
