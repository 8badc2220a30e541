"""What only makes things faster; no right answer depends on it."""
