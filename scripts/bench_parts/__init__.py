"""The parts of the benchmark: what is mounted, what is done there, and how the figures are shown."""
