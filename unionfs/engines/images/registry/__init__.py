"""Registries: images fetched from them and given to them. Source: OCI distribution specification 1.1."""

from unionfs.engines.images.registry.connection import Access, RetryPolicy
from unionfs.engines.images.registry.credentials import Credentials, find_credentials
from unionfs.engines.images.registry.transfers import pull, push, run

__all__ = ["Access", "Credentials", "RetryPolicy", "find_credentials", "pull", "push", "run"]
