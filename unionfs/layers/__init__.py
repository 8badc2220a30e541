"""The layer store: content-addressed, reference-counted layers and exact tar streams."""
