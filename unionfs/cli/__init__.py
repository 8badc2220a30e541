"""The commands people and engines run."""
