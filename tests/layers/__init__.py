"""The layer store, from identities to crashes."""
