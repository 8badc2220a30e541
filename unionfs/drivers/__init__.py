"""Graph drivers: where the file trees of layers lie, and how they are mounted."""
