"""A user-space union file system for containers."""

__version__ = "0.1.0"
