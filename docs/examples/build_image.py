"""Makes an image of a root file system and of what a command changes in it: build_image.py ROOTFS NAME COMMAND..."""

import json
import os
import sys
from tempfile import TemporaryDirectory

import trio

import unionfs
from unionfs.archive import PieceStream, changes_of_upper, pack_changes, pack_tree
from unionfs.engines.images import ImageStore, Platform, parse_reference
from unionfs.engines.images.registry import push


async def build(store: unionfs.LayerStore, rootfs: str, name: str, command: list[str]) -> str:
    """Run the command on top of ``rootfs``, which stays as it is, and push the image; return its digest there."""
    with TemporaryDirectory() as work:
        upper, target = f"{work}/upper", f"{work}/merged"
        os.mkdir(upper)
        os.mkdir(target)
        async with unionfs.mounted(lower=[rootfs], upper=upper, target=target):
            await trio.run_process(["chroot", target, *command])

        changes = list(changes_of_upper(upper, [rootfs]))
        print(*changes, sep="\n")
        with (
            store.register(PieceStream(pack_tree(rootfs))) as base,
            store.register(PieceStream(pack_changes(changes)), base.chain_id) as top,
        ):
            platform = Platform.of_this_machine()
            config = {
                "os": platform.os,
                "architecture": platform.architecture,
                "config": {"Cmd": command},
                "rootfs": {"type": "layers", "diff_ids": [base.diff_id, top.diff_id]},
            }
            images, reference = ImageStore(store), parse_reference(name)
            image = images.add(json.dumps(config).encode(), [reference.with_default_tag()])
            return await push(images, image, reference)


if __name__ == "__main__":
    with unionfs.open_store() as opened:
        print(trio.run(build, opened, sys.argv[1], sys.argv[2], sys.argv[3:]))
