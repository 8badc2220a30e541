"""Every exception that unionfs raises on purpose, each with the next step in its message.

System call errors inside the file system stay plain :class:`OSError`: their errno is the answer a program
gets. The classes here are for people: a message is one line that names the thing and says what to do.
"""


class UnionfsError(Exception):
    """Base of all errors meant for a person; ``str(error)`` is one line."""


class OptionError(UnionfsError):
    """A mount option, or a combination of options, that cannot work."""


class LayerError(UnionfsError):
    """A layer, upper or work directory that cannot be used as such."""


class MountError(UnionfsError):
    """The kernel or the host refused the mount."""
