"""Layer directories: lowers, upper, work directory."""
