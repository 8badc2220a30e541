"""Copies whose data is brought to the disk later."""
