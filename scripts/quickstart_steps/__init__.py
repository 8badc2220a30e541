"""The parts of scripts/quickstart: where the root file system comes from, what is done in it, what is shown."""
