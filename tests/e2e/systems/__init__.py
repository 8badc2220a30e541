"""Other Debian releases: set-up, the file system and the engines on each of them, in machines made for it."""
