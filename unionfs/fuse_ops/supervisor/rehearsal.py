"""Loading what a server needs, and doing once what each would do for the first time."""

from __future__ import annotations


def rehearse() -> None:
    """Import every module that a server with the direct transport uses."""
    import json
    import logging.handlers
    import subprocess

    from unionfs.fuse_ops import direct, mounting, session, stack, transport

    _ = json, logging.handlers, subprocess, direct, mounting, session, stack, transport
