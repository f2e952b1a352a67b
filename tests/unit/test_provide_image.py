"""How a target gets the container's image, whatever store it keeps images in. The store here is a table in memory."""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import structlog

from events.errors import PermanentError, RefusedError
from events.schema import FileRef, ImagePacked, ImageWanted
from hostd.effects import provide_image
from hostd.effects.base import Context
from hostd.effects.provide_image import ProvideImage
from hostd.image_identity import is_same
from hostd.spec import ContainerSpec, from_inspect
from hostd.turn import ENDS_STEP
from tests.support.inspected import IMAGE_ID, container, image

BASE, TOP = b"base" * 500, b"top" * 700


def digest(contents: bytes) -> str:
    return f"sha256:{hashlib.sha256(contents).hexdigest()}"


LAYERS = [digest(BASE), digest(TOP)]


def archive(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return buffer.getvalue()


def saved(*layers: bytes) -> dict[str, bytes]:
    names = [f"blobs/sha256/{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    manifest = json.dumps([{"Layers": names}]).encode()
    return {**dict(zip(names, layers, strict=True)), "manifest.json": manifest}


class Store:
    """An engine's images. One that is loaded gets an id of this store's own."""

    def __init__(self, containerd: bool, images: Sequence[dict[str, Any]] = (), parts: bytes = b"") -> None:
        self.containerd = containerd
        self.kept = {str(one["Id"]): one for one in images}
        self.parts = parts
        self.arriving: dict[str, Any] = {}
        self.loaded: set[str] = set()
        self.tags: dict[str, str] = {}

    def info(self) -> Any:
        return SimpleNamespace(containerd_snapshotter=self.containerd)

    def disk_free(self) -> Any:
        return SimpleNamespace(free_bytes=10**9)

    def images(self) -> Iterator[dict[str, Any]]:
        yield from self.kept.values()

    def image_inspect(self, reference: str) -> dict[str, Any] | None:
        return self.kept.get(self.tags.get(reference, reference))

    def image_of(self, image_id: str, identity: Mapping[str, Any], _names: Sequence[str] = ()) -> dict[str, Any] | None:
        return next((one for one in self.kept.values() if is_same(one, image_id, identity)), None)

    def save_image(self, _references: Sequence[str]) -> Iterable[bytes]:
        return [self.parts]

    def load_image(self, pieces: Iterable[bytes]) -> None:
        with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as tar:
            self.loaded = set(tar.getnames())
        if self.arriving:
            self.kept[self.arriving["Id"]] = self.arriving

    def image_tag(self, image_id: str, reference: str) -> None:
        self.tags[reference] = image_id

    def image_remove(self, reference: str) -> bool:
        if self.tags.pop(reference, None) is None:
            self.kept.pop(reference, None)
        return True

    def containers(self) -> list[Any]:
        return []


def described(image_id: str = IMAGE_ID, **changes: Any) -> dict[str, Any]:
    raw = copy.deepcopy(image()) | {"RepoTags": ["shop/web:1"], "RootFS": {"Type": "layers", "Layers": LAYERS}}
    return raw | {"Id": image_id} | changes


OTHER = described("sha256:other", Created="2020-01-01T00:00:00Z", RootFS={"Layers": [digest(BASE), "sha256:x"]})


class Bringing:
    """The effect on one host, with what the source has said."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
        self.spec = self.spec_of(described(RepoDigests=["shop/web@sha256:12"]))
        monkeypatch.setattr(provide_image, "load_spec", lambda _context: self.spec)
        monkeypatch.setattr(provide_image, "peer_of_source", lambda _context: None)
        self.store = store
        self.facts: dict[str, Any] = {}
        self.sent = b""
        prepared = SimpleNamespace(image_id=IMAGE_ID, image_tags=("shop/web:1",))
        view = SimpleNamespace(
            source_prepared=prepared, facts=self.facts, request=SimpleNamespace(image="transfer"), bwlimit_kib=0
        )
        settings = SimpleNamespace(name="beta", state_dir=tmp_path)
        bench = SimpleNamespace(engine=store, transport=SimpleNamespace(fetch=self._fetch), settings=settings)
        self.context = cast(
            Context,
            SimpleNamespace(
                view=view, bench=bench, host="beta", directory=tmp_path, cancelled=threading.Event(), bwlimit_kib=0,
                progress=lambda _fields: None, log=structlog.get_logger(),
            ),
        )  # fmt: skip

    @staticmethod
    def spec_of(picture: dict[str, Any]) -> ContainerSpec:
        spec, _, refusals = from_inspect(container(), picture)
        assert refusals == []
        return spec

    def _fetch(self, _peer: Any, _file: FileRef, place: Path, **_options: Any) -> None:
        place.write_bytes(self.sent)

    def run(self) -> dict[str, Any]:
        return dict(ProvideImage().run(self.context) or {})

    def wanted(self) -> ImageWanted:
        """What the target asks for."""
        asked = self.run()
        assert asked.pop(ENDS_STEP) is True
        self.facts["image_wanted"] = ImageWanted(**asked)
        return ImageWanted(**asked)

    def packed(self, members: Mapping[str, bytes]) -> None:
        """The source's answer."""
        self.sent = archive(members)
        self.facts["image_packed"] = ImagePacked(
            archive=FileRef(path="x", size_bytes=len(self.sent), sha256=""), layers=1
        )


@pytest.mark.parametrize("image_id", [IMAGE_ID, "sha256:of-another-store"])
def test_an_image_that_is_here_under_whatever_id_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_id: str
) -> None:
    """F11"""
    bringing = Bringing(tmp_path, monkeypatch, Store(True, [described(image_id)]))
    assert bringing.run() == {"warnings": ()}
    assert bringing.store.tags == {}


def test_dockers_own_store_needs_no_layer_that_another_image_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Bringing(tmp_path, monkeypatch, Store(False, [OTHER])).wanted()
    assert (wanted.layers, wanted.blobs) == ((digest(BASE),), None)


@pytest.mark.parametrize("compressed", [False, True])
def test_containerds_store_gets_back_what_it_did_not_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    """F11: an image with parts missing would run here, and could never be packed again."""
    base = gzip.compress(BASE) if compressed else BASE
    store = Store(True, [OTHER], parts=archive(saved(base)))
    bringing = Bringing(tmp_path, monkeypatch, store)
    wanted = bringing.wanted()
    assert wanted.layers == (digest(BASE),)
    assert wanted.blobs == ((digest(base),) if compressed else ())
    whole = saved(base, TOP)
    left_out = next(name for name, contents in whole.items() if contents == base)
    bringing.packed({name: contents for name, contents in whole.items() if name != left_out})
    store.arriving = described("sha256:of-this-store")
    warnings = bringing.run()["warnings"]
    assert store.loaded == set(whole)
    assert store.tags == {"shop/web:1": "sha256:of-this-store"}
    assert len(warnings) == 1
    assert "shop/web@sha256:12" in warnings[0]
    ProvideImage().undo(bringing.context)
    assert set(store.kept) == {"sha256:other"}
    assert store.tags == {}


def test_containerds_store_asks_for_layers_that_it_could_not_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other image runs here, but has parts missing itself."""
    wanted = Bringing(tmp_path, monkeypatch, Store(True, [OTHER], parts=archive({"manifest.json": b"[]"}))).wanted()
    assert (wanted.layers, wanted.blobs) == ((), ())


def test_an_archive_that_brings_another_image_is_not_taken_for_the_one_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F8"""
    bringing = Bringing(tmp_path, monkeypatch, Store(False))
    bringing.wanted()
    bringing.packed(saved(BASE, TOP))
    bringing.store.arriving = described("sha256:impostor", Architecture="arm64")
    with pytest.raises(PermanentError, match="is not there"):
        bringing.run()
    ProvideImage().undo(bringing.context)
    assert set(bringing.store.kept) == {"sha256:impostor"}, "what cannot be recognised is not removed"


def test_an_image_that_may_not_be_brought_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F8"""
    bringing = Bringing(tmp_path, monkeypatch, Store(True, [OTHER]))
    cast(Any, bringing.context).view.request.image = "refuse"
    with pytest.raises(RefusedError, match="shop/web:1"):
        bringing.run()


def test_evidence_of_an_earlier_version_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knew images by their ids alone."""
    bringing = Bringing(tmp_path, monkeypatch, Store(False, [described()]))
    (tmp_path / "image-brought.json").write_bytes(msgspec.json.encode({"image_id": IMAGE_ID, "names": ["shop/web:1"]}))
    ProvideImage().undo(bringing.context)
    assert bringing.store.kept == {}
