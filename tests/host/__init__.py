"""Tests of what is Linux and nothing of overlays."""
