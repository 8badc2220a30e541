"""Adapters that put the layer store and the graph drivers under container engines, and images without an engine."""
