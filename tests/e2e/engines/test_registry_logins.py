"""Who asks a registry: passwords, tokens, certificates, and where logins are kept."""

from __future__ import annotations

import io
import os
import subprocess
import urllib.parse
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines.registry import (
    PASSWORD,
    USER,
    Answer,
    FaultyProxy,
    Registry,
    Seen,
    faulty_proxy,
    running_registry,
)
from tests.e2e.engines.registry_tools import fetch, give, nothing_is_left, unionfs
from tests.engines.image_archives import Made, to_json, to_tar
from unionfs.engines.images import ImageStore, import_images
from unionfs.engines.images.registry import Credentials
from unionfs.errors import RegistryError

pytestmark = [pytest.mark.engine, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
pytest_plugins = ["tests.e2e.engines.registry_fixtures"]


def test_basic_login(closed_registry: Registry, tmp_path: Path) -> None:
    made = Made()
    (tmp_path / "app.tar").write_bytes(to_tar(made.old_docker()))
    store, where = tmp_path / "store", f"{closed_registry.address}/app:v1"
    unionfs(store, "image", "import", str(tmp_path / "app.tar"))
    nobody = {"HOME": str(tmp_path / "nobody"), "XDG_RUNTIME_DIR": str(tmp_path / "nobody")}
    by_hand = ("--username", USER, "--password-stdin")
    assert "asks who you are" in unionfs(store, "image", "push", "app:v1", where, status=1, environ=nobody)
    message = unionfs(store, "image", "push", "app:v1", where, *by_hand, stdin="wrong", status=1, environ=nobody)
    assert f"refused the login of {USER}" in message
    assert "wrong" not in message
    unionfs(store, "image", "push", "app:v1", where, *by_hand, stdin=PASSWORD + "\n", environ=nobody)
    # Where skopeo, Podman and Buildah leave their login.
    auth = tmp_path / "auth.json"
    subprocess.run(
        ["skopeo", "login", "--tls-verify=false", "-u", USER, "--password-stdin", closed_registry.address],
        input=PASSWORD,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "REGISTRY_AUTH_FILE": str(auth)},
    )
    assert (
        unionfs(tmp_path / "b", "image", "pull", where, environ={"REGISTRY_AUTH_FILE": str(auth)}).strip()
        == made.image_id
    )
    # And where Docker does.
    (tmp_path / "home/.docker").mkdir(parents=True)
    auth.rename(tmp_path / "home/.docker/config.json")
    home = {"HOME": str(tmp_path / "home"), "XDG_RUNTIME_DIR": str(tmp_path / "nobody")}
    assert unionfs(tmp_path / "c", "image", "pull", where, environ=home).strip() == made.image_id


class TokenServer:
    """Makes a proxy ask for Bearer tokens, and gives them."""

    def __init__(self, proxy: FaultyProxy, *, lifetime: int = 1000) -> None:
        self.proxy = proxy
        self.lifetime = lifetime
        self.scopes: list[str] = []
        self.token = ""
        self.uses = 0
        proxy.before = self.answer

    def answer(self, request: Seen) -> Answer | None:
        headers = {name.lower(): value for name, value in request.headers.items()}
        given = headers.get("authorization", "")
        if request.path.startswith("/token"):
            self.scopes.append(urllib.parse.unquote_plus(request.path))
            if given != Credentials(USER, PASSWORD).basic():
                return Answer(401, {}, b"{}")
            self.token, self.uses = f"t{len(self.scopes)}", 0
            return Answer(200, {}, to_json({"token": self.token}))
        self.uses += 1
        if self.token and given == f"Bearer {self.token}" and self.uses <= self.lifetime:
            return None
        realm = f'Bearer realm="http://{self.proxy.address}/token",service="s",scope="repository:app:pull"'
        return Answer(401, {"WWW-Authenticate": realm}, b"{}")


def test_bearer_tokens(proxy: FaultyProxy, app: Made, images: ImageStore) -> None:
    server = TokenServer(proxy)
    with pytest.raises(RegistryError, match="does not let everybody in"):
        fetch(images, f"{proxy.address}/app:v1")
    with pytest.raises(RegistryError, match="refused the login"):
        fetch(images, f"{proxy.address}/app:v1", credentials=Credentials(USER, "x"))
    assert nothing_is_left(images)
    server.scopes.clear()
    image = fetch(images, f"{proxy.address}/app:v1", credentials=Credentials(USER, PASSWORD))
    assert len(server.scopes) == 1  # one token for all
    assert "service=s" in server.scopes[0]
    assert "scope=repository:app:pull" in server.scopes[0]
    give(images, image, f"{proxy.address}/token/app:v1", credentials=Credentials(USER, PASSWORD))
    assert "repository:token/app:pull,push repository:app:pull" in server.scopes[-1]
    # Tokens that end after a few requests are replaced.
    images.remove(image.image_id)
    server.lifetime, server.token = 2, ""
    before = len(server.scopes)
    fetch(images, f"{proxy.address}/app:v1", credentials=Credentials(USER, PASSWORD), parallel=1)
    assert len(server.scopes) >= before + 2


def test_a_login_is_for_the_registry_only(closed_registry: Registry, images: ImageStore) -> None:
    made = Made()
    (image,) = import_images(images, io.BytesIO(to_tar(made.old_docker())))
    known: dict[str, Any] = {"credentials": Credentials(USER, PASSWORD)}
    give(images, image, f"{closed_registry.address}/redirected:v1", **known)
    images.remove(image.image_id)
    with ExitStack() as stack:
        front = stack.enter_context(faulty_proxy(closed_registry.address))
        storage = stack.enter_context(faulty_proxy(closed_registry.address))
        # The storage knows who asks by the address, as that of clouds does.
        secret = Credentials(USER, PASSWORD).basic()
        opener = urllib.request.build_opener()
        opener.addheaders = [("Authorization", secret)]

        def from_storage(request: Seen) -> Answer:
            with opener.open(f"http://{closed_registry.address}{request.path.partition('?')[0]}", timeout=60) as found:
                return Answer(200, {}, found.read())

        storage.before = from_storage
        front.fault = lambda request, answer: (
            Answer(307, {"Location": f"http://{storage.address}{request.path}?signed"}, b"")
            if "/blobs/" in request.path and answer.status == 200
            else answer
        )
        assert fetch(images, f"{front.address}/redirected:v1", **known).image_id == made.image_id
        assert len(storage.requests("GET", "/blobs/")) == 3
        assert [one for one in front.seen if "Authorization" in {name.title() for name in one.headers}]
        assert not [one for one in storage.seen if "Authorization" in {name.title() for name in one.headers}]
        front.fault = lambda request, answer: Answer(307, {"Location": request.path}, b"")
        with pytest.raises(RegistryError, match="from one place to the next"):
            fetch(images, f"{front.address}/redirected:v1", **known)


def test_tls(tmp_path: Path, images: ImageStore) -> None:
    certificates = tmp_path / "certs"
    certificates.mkdir()
    subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out ca.crt -days 2 -subj /CN=localhost "
        "-addext subjectAltName=IP:127.0.0.1",
        shell=True,
        check=True,
        cwd=certificates,
        capture_output=True,
        timeout=60,
    )
    made = Made()
    (image,) = import_images(images, io.BytesIO(to_tar(made.old_docker())))
    with running_registry(tmp_path / "registry", certificates=certificates) as registry:
        with pytest.raises(RegistryError, match="its certificate is not trusted"):
            give(images, image, f"{registry.address}/app:v1", plain_http=False)
        give(images, image, f"{registry.address}/app:v1", plain_http=False, cert_dir=str(certificates))
        images.remove(image.image_id)
        fetch(images, f"{registry.address}/app:v1", plain_http=False, cert_dir=str(certificates))
