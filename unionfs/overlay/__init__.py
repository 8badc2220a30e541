"""The on-disk format and its rules, once."""
