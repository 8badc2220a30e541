"""Helpers shared by the tests: mounting, building layers, comparing trees."""
