"""The same operations on our mount and on the kernel's overlayfs."""
