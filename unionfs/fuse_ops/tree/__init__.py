"""The merged tree: look-up, listing, changes, attributes, open files."""
