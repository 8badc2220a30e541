"""Debian's container engines on top of our file system, compared with the same engines on their stock storage."""
