"""Tests of unionfs, laid out as the packages they judge."""
