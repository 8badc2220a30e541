"""The merged tree as it is: look-up, listing, attributes, open files."""
