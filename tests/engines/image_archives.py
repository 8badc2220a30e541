"""Archives of images for the tests: what docker save and others write, and what nobody should."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.layers.archives import files

Members = dict[str, bytes | str]
"""Files by their names; texts are targets of symlinks."""


def sha256(contents: bytes) -> str:
    """Its digest."""
    return "sha256:" + hashlib.sha256(contents).hexdigest()


def to_json(value: object) -> bytes:
    """As text."""
    return json.dumps(value).encode()


@dataclass
class Made:
    """An image of some layers, whose parts a test may change before it is written."""

    layers: list[bytes] = field(default_factory=lambda: [files(a="one", b="x"), files(a="two")])
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def diff_ids(self) -> list[str]:
        """Of its layers."""
        return [sha256(layer) for layer in self.layers]

    @property
    def config_bytes(self) -> bytes:
        """Its configuration."""
        return to_json(
            {
                "os": "linux",
                "architecture": "amd64",
                "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
                **self.config,
            }
        )

    @property
    def image_id(self) -> str:
        """Of its configuration."""
        return sha256(self.config_bytes)

    def old_docker(self, name: str = "app:v1", **more: Any) -> dict[str, bytes | str]:
        """The members of what docker save wrote until Docker 24; texts are targets of symlinks."""
        members: dict[str, bytes | str] = {}
        first: dict[str, int] = {}
        for number, layer in enumerate(self.layers):
            members[f"{number}/VERSION"] = b"1.0"
            if sha256(layer) in first:
                members[f"{number}/layer.tar"] = f"../{first[sha256(layer)]}/layer.tar"
            else:
                first[sha256(layer)] = number
                members[f"{number}/layer.tar"] = layer
        config = self.image_id[7:] + ".json"
        members[config] = self.config_bytes
        layers = [f"{number}/layer.tar" for number in range(len(self.layers))]
        members["manifest.json"] = to_json([{"Config": config, "RepoTags": [name], "Layers": layers, **more}])
        members["repositories"] = b"{}"
        return members

    def oci(self, name: str = "app:v1", compress: bool = True, **more: Any) -> dict[str, bytes | str]:
        """The files of an OCI layout; ``more`` goes into the manifest."""
        members: dict[str, bytes | str] = {"oci-layout": to_json({"imageLayoutVersion": "1.0.0"})}
        layers = []
        for layer in self.layers:
            blob = gzip.compress(layer, mtime=0) if compress else layer
            members[f"blobs/sha256/{sha256(blob)[7:]}"] = blob
            kind = "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if compress else "")
            layers.append({"mediaType": kind, "digest": sha256(blob), "size": len(blob)})
        members[f"blobs/sha256/{self.image_id[7:]}"] = self.config_bytes
        manifest = to_json(
            {
                "schemaVersion": 2,
                "config": {
                    "mediaType": "application/vnd.oci.image.config.v1+json",
                    "digest": self.image_id,
                    "size": len(self.config_bytes),
                },
                "layers": layers,
                **more,
            }
        )
        members[f"blobs/sha256/{sha256(manifest)[7:]}"] = manifest
        members["index.json"] = to_json(
            {
                "schemaVersion": 2,
                "manifests": [
                    {
                        "mediaType": "application/vnd.oci.image.manifest.v1+json",
                        "digest": sha256(manifest),
                        "size": len(manifest),
                        "annotations": {"org.opencontainers.image.ref.name": name},
                    }
                ],
            }
        )
        return members


def index_of(*entries: tuple[Members, dict[str, Any]]) -> Members:
    """One layout of several, each with what goes into its entry."""
    merged: Members = {}
    manifests = []
    for members, more in entries:
        merged.update(members)
        manifests.append({**json.loads(members["index.json"])["manifests"][0], **more})
    return {**merged, "index.json": to_json({"schemaVersion": 2, "manifests": manifests})}


def to_tar(members: dict[str, bytes | str]) -> bytes:
    """An archive of them."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(contents, str):
                info.type, info.linkname = tarfile.SYMTYPE, contents
                tar.addfile(info)
            else:
                info.size = len(contents)
                tar.addfile(info, io.BytesIO(contents))
    return out.getvalue()


def to_directory(members: dict[str, bytes | str], root: Path) -> Path:
    """A directory of them."""
    for name, contents in members.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(contents, str):
            path.symlink_to(contents)
        else:
            path.write_bytes(contents)
    return root
