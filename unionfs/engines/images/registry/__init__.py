"""Registries: images fetched from them and given to them. Source: OCI distribution specification 1.1."""

from unionfs.engines.images.registry.connection import Access
from unionfs.engines.images.registry.credentials import Credentials, find_credentials
from unionfs.engines.images.registry.pull import pull
from unionfs.engines.images.registry.push import push
from unionfs.engines.images.registry.retry import Patience
from unionfs.engines.images.registry.threads import run

__all__ = ["Access", "Credentials", "Patience", "find_credentials", "pull", "push", "run"]
