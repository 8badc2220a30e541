"""Pushing to a real registry: uploads that are cut off, and layers that must not be pushed."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from tests.e2e.engines.registry import Answer, FaultyProxy, Registry, Seen
from tests.e2e.engines.registry_tools import fetch, give, large
from tests.engines.image_archives import Made, to_tar
from tests.layers.archives import files
from unionfs.engines.images import ImageStore, import_images
from unionfs.errors import ImageNotFoundError, UnionfsError

pytestmark = [pytest.mark.engine, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
pytest_plugins = ["tests.e2e.engines.registry_fixtures"]


@pytest.mark.parametrize("fault", ["lost request", "lost answer", "forgotten"])
def test_an_upload_in_pieces_goes_on(proxy: FaultyProxy, images: ImageStore, fault: str) -> None:
    made = Made([large(len(fault))])
    (image,) = import_images(images, io.BytesIO(to_tar(made.old_docker())))
    patches = iter(range(1000))

    def lose(request: Seen) -> Answer | None:
        lost = request.method == "PATCH" and next(patches) in (1, 4)
        return Answer(503 if fault == "lost request" else 404, {}, b"") if lost else None

    def lose_answer(request: Seen, answer: Answer) -> Answer | None:
        return None if request.method == "PATCH" and next(patches) in (1, 4) else answer

    if fault == "lost answer":
        proxy.fault = lose_answer
    else:
        proxy.before = lose
    give(images, image, f"{proxy.address}/pieces:{fault.replace(' ', '-')}", upload_bytes=50_000)
    sent = [one.headers["Content-Range"] for one in proxy.requests("PATCH")]
    assert len(sent) > len(set(sent))
    if fault == "lost request":
        # The registry was asked how much it has, and got only what it lacked.
        assert len(proxy.requests("GET", "/blobs/uploads/")) == 2
        assert len(sent) == len(set(sent)) + 2
    proxy.before, proxy.fault = lambda request: None, lambda request, answer: answer
    images.remove(image.image_id)
    assert fetch(images, f"{proxy.address}/pieces:{fault.replace(' ', '-')}").image_id == made.image_id


def test_trouble_in_an_upload_passes(proxy: FaultyProxy, images: ImageStore) -> None:
    made = Made([large(99, 150_000), files(a="b")])
    (image,) = import_images(images, io.BytesIO(to_tar(made.old_docker())))
    failed: dict[str, int] = {}

    def fail(request: Seen) -> Answer | None:
        key = request.method + request.path.partition("/uploads/")[0]
        failed[key] = failed.get(key, 0) + 1
        return Answer(502, {}, b"") if failed[key] <= 1 else None

    proxy.before = fail
    give(images, image, f"{proxy.address}/trouble/app:v1")
    images.remove(image.image_id)
    assert fetch(images, f"{proxy.address}/trouble/app:v1").image_id == made.image_id


def test_a_damaged_layer_is_not_pushed(registry: Registry, images: ImageStore) -> None:
    made = Made([files(a="good")])
    (image,) = import_images(images, io.BytesIO(to_tar(made.old_docker())))
    tree = Path(images.root).parents[1] / "vfs/dir" / images.layers_of(image)[0].cache_id
    (tree / "a").write_text("evil")
    with pytest.raises(UnionfsError):
        give(images, image, f"{registry.address}/damaged:v1")
    with pytest.raises(ImageNotFoundError):
        fetch(images, f"{registry.address}/damaged:v1")
