"""Linux, nothing of overlays: system calls, mounts, processes."""
