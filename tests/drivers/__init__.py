"""Tests of the graph drivers."""
