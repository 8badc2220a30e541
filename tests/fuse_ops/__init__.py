"""Tests of the union file system."""
