"""``unionfs df``: what the store takes on the disk, and which of it is shared."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

import click

from unionfs.cli.held_images import images_in
from unionfs.cli.layer_output import (
    OpenMode,
    human_size,
    json_option,
    opened,
    plural,
    print_json,
    print_table,
    progress_bar,
    short,
    store_options,
)


@dataclass(frozen=True, slots=True)
class _Row:
    """One thing.

    Attributes:
        kind: ``image``, ``container``, ``volume``, or ``layer`` for one of no image and no container.
        size: bytes on the disk, what others have too included.
        shared: bytes of ``size`` that others have too.
        own: bytes of ``size`` that nothing else of its kind has.
    """

    kind: str
    name: str
    size: int
    shared: int
    own: int


@click.command()
@json_option
@store_options
def df(root: str | None, driver: str, as_json: bool) -> None:
    """Show what images, containers, layers and volumes take on the disk.

    SHARED is what another image or container has too, OWN what nothing else has. Every file is looked at.
    """
    from unionfs.engines.run.volumes import Volumes, root_of
    from unionfs.layers.gc import size_on_disk
    from unionfs.layers.usage import measure

    with opened(root, driver, OpenMode.LOOK, hold_images=False) as store:
        images = images_in(store)
        with progress_bar("measuring", None, unit_is_bytes=False) as show:
            usage = measure(store, lambda done, _: show(done))
        chains = {chain_id: [one.chain_id for one in layer.stored.chain()] for chain_id, layer in store.map().items()}
        pictures = images.all() if images is not None else []
        holders = Counter(layer for image in pictures for layer in chains.get(image.chain_id, ()))
        rows = []
        for image in pictures:
            sizes = [(usage.layers[layer], holders[layer] > 1) for layer in chains.get(image.chain_id, ())]
            shared = sum(size for size, others in sizes if others)
            total = sum(size for size, _ in sizes)
            rows.append(
                _Row("image", image.names[0] if image.names else short(image.image_id), total, shared, total - shared)
            )
        used = set(holders)
        for name, mount in store.rw_layers().items():
            below = chains.get(mount.record.parent, ())
            used.update(below)
            shared = sum(usage.layers[layer] for layer in below)
            rows.append(_Row("container", name, shared + usage.containers[name], shared, usage.containers[name]))
        rows += [_Row("layer", one, size, 0, size) for one, size in usage.layers.items() if one not in used]
        for volume in Volumes(root_of(store)).all():
            size = size_on_disk(volume.path)
            rows.append(_Row("volume", volume.name, size, 0, size))
    layers, containers = sum(usage.layers.values()), sum(usage.containers.values())
    volumes = sum(row.size for row in rows if row.kind == "volume")
    if as_json:
        totals = {"layers": layers, "containers": containers, "volumes": volumes}
        print_json({"things": [asdict(row) for row in rows], **totals, "size": layers + containers + volumes})
        return
    if rows:
        table = [
            (
                row.kind,
                short(row.name) if row.kind == "layer" else row.name,
                *map(human_size, (row.size, row.shared, row.own)),
            )
            for row in rows
        ]
        print_table(("KIND", "NAME", "SIZE", "SHARED", "OWN"), table, right=("SIZE", "SHARED", "OWN"), whole=("NAME",))
    count = len(usage.layers)
    parts = [f"{count} {plural(count, 'layer')} {human_size(layers)}", f"containers {human_size(containers)}"]
    parts += [f"volumes {human_size(volumes)}"] if volumes else []
    click.echo(f"{', '.join(parts)}; together {human_size(layers + containers + volumes)}.")
