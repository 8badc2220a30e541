"""Running a command in an image's files with an OCI runtime, without an engine."""

from __future__ import annotations
