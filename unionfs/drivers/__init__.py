"""Graph drivers: where the file trees of layers lie, and how they are mounted.

:class:`Driver` says what each call means, :func:`default_registry` gives one. :mod:`unionfs.testing` has the contract
as tests, for whoever writes another one.
"""

from unionfs import publish

__all__ = [
    "Capabilities",
    "CapabilityDriver",
    "CreateOptions",
    "DiffDriver",
    "DiffGetterDriver",
    "Driver",
    "FileGetCloser",
    "InitFunc",
    "ListingDriver",
    "LookFunc",
    "NaiveDiff",
    "NaiveDiffDriver",
    "ProtoDriver",
    "Registry",
    "SyncingDriver",
    "capabilities_of",
    "check_layer_id",
    "default_registry",
    "file_getter",
]

TYPE_CHECKING = False  # typing's, without the import
if TYPE_CHECKING:
    from unionfs.drivers.contract import (
        Capabilities,
        CapabilityDriver,
        CreateOptions,
        DiffDriver,
        DiffGetterDriver,
        Driver,
        FileGetCloser,
        InitFunc,
        ListingDriver,
        LookFunc,
        ProtoDriver,
        SyncingDriver,
        capabilities_of,
        check_layer_id,
    )
    from unionfs.drivers.files import file_getter
    from unionfs.drivers.naive_diff import NaiveDiff, NaiveDiffDriver
    from unionfs.drivers.registry import Registry, default_registry

publish(
    __name__,
    {
        "contract": "Capabilities CapabilityDriver CreateOptions DiffDriver DiffGetterDriver Driver FileGetCloser "
        "InitFunc ListingDriver LookFunc ProtoDriver SyncingDriver capabilities_of check_layer_id",
        "files": "file_getter",
        "naive_diff": "NaiveDiff NaiveDiffDriver",
        "registry": "Registry default_registry",
    },
)
