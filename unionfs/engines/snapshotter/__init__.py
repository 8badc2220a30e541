"""containerd's snapshotter service over our file system: a proxy plugin for containerd, nerdctl, Docker and Kubernetes.

::

    containerd ─ service ─ UnionSnapshotter ─┬─ store, filters  what snapshots there are: a database
     (gRPC)     (messages)    (contract)     ├─ directories     their files
                                             └─ mounts          how they are mounted

:mod:`.contract` says what each call means; ``docs/containerd.md`` is for operators.
"""

from __future__ import annotations

from unionfs.engines.snapshotter.contract import Info, Kind, Mount, Snapshotter, Usage
from unionfs.engines.snapshotter.snapshotter import UnionSnapshotter

__all__ = ["Info", "Kind", "Mount", "Snapshotter", "UnionSnapshotter", "Usage"]
