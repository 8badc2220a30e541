"""A user-space union file system for containers.

The public names are those in ``__all__`` here and in :mod:`unionfs.fuse_ops`, :mod:`unionfs.archive`,
:mod:`unionfs.drivers`, :mod:`unionfs.layers`, :mod:`unionfs.engines.images`, :mod:`unionfs.engines.images.registry`,
:mod:`unionfs.errors` and :mod:`unionfs.testing`. Everything else may change from one version to the next.
"""

import sys

__version__ = "0.1.0"

__all__ = ["LayerStore", "Mount", "Mounting", "UnionfsError", "__version__", "mounted", "open_store"]

TYPE_CHECKING = False  # typing's, without the import
if TYPE_CHECKING:
    from unionfs.errors import UnionfsError
    from unionfs.fuse_ops.session.mounted import Mount, Mounting, mounted
    from unionfs.layers.opening import open_store
    from unionfs.layers.store import LayerStore


def publish(package: str, places: "dict[str, str]") -> None:
    """Have the public names of a package imported when they are first asked for (PEP 562), and listed by dir().

    A mount program is started for each container, and must not pay for what it does not use.

    Args:
        package: its name; it has been imported, and names its public names in ``__all__``.
        places: which of its modules has which names, as words.
    """
    module = sys.modules[package]
    modules = {name: f"{package}.{place}" for place, names in places.items() for name in names.split()}

    def get(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(modules[name]), name)
        vars(module)[name] = value
        return value

    vars(module)["__getattr__"] = get
    vars(module)["__dir__"] = lambda: sorted(module.__all__)


publish(
    __name__,
    {
        "errors": "UnionfsError",
        "fuse_ops.session.mounted": "Mount Mounting mounted",
        "layers.opening": "open_store",
        "layers.store": "LayerStore",
    },
)
