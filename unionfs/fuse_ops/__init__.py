"""The union file system: layers stacked into one tree and served through FUSE."""
