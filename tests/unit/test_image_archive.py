"""What of an image travels: decided by its layers' order, found in the archive by their contents."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
from pathlib import Path

import pytest

from events.errors import CancelledError, PermanentError
from hostd.engine_images import split_reference
from hostd.image_archive import complete, held_in, layers_missing, layers_present, layers_to_leave_out, pack, pieces_of

BASE, MIDDLE, TOP = b"base" * 5000, b"middle" * 3000, b"top" * 7000


def digest(contents: bytes) -> str:
    return f"sha256:{hashlib.sha256(contents).hexdigest()}"


def archive(*members: tuple[str, bytes]) -> bytes:
    """A tar such as ``docker save`` gives: layers, descriptions, a directory and a link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        folder = tarfile.TarInfo("aa")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
        link = tarfile.TarInfo("cc/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../aa/layer.tar"
        tar.addfile(link)
    return buffer.getvalue()


def in_pieces(raw: bytes, size: int = 777) -> list[bytes]:
    return [raw[start : start + size] for start in range(0, len(raw), size)]


def contents_of(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as tar:
        members = {member.name: tar.extractfile(member) for member in tar.getmembers() if member.isreg()}
        return {name: opened.read() for name, opened in members.items() if opened is not None}


def test_layers_that_are_not_wanted_are_left_out_and_everything_else_is_as_it_was(tmp_path: Path) -> None:
    whole = archive(
        ("aa/layer.tar", BASE), ("aa/json", b"{}"), ("bb/layer.tar", MIDDLE), ("dd/layer.tar", TOP), ("manifest", b"[]")
    )
    packed = pack(in_pieces(whole), tmp_path / "image.tar", frozenset({digest(BASE), digest(TOP)}))
    assert contents_of(tmp_path / "image.tar") == {"aa/json": b"{}", "bb/layer.tar": MIDDLE, "manifest": b"[]"}
    with tarfile.open(tmp_path / "image.tar") as tar:
        assert {"aa", "cc/layer.tar"} <= set(tar.getnames())
    assert packed.left_out_bytes == len(BASE) + len(TOP)
    raw = (tmp_path / "image.tar").read_bytes()
    assert packed.archive.size_bytes == len(raw) < len(MIDDLE) + 15_000
    assert packed.archive.sha256 == hashlib.sha256(raw).hexdigest()
    assert b"".join(pieces_of(tmp_path / "image.tar")) == raw
    assert [place.name for place in tmp_path.iterdir()] == ["image.tar"]


def test_an_archive_of_which_nothing_is_left_out_holds_everything(tmp_path: Path) -> None:
    whole = archive(("aa/layer.tar", BASE), ("bb/layer.tar", TOP))
    pack(in_pieces(whole, 1_000_000), tmp_path / "image.tar", frozenset())
    assert contents_of(tmp_path / "image.tar") == {"aa/layer.tar": BASE, "bb/layer.tar": TOP}


def test_a_broken_stream_leaves_no_archive_behind(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="cannot be read"):
        pack(in_pieces(archive(("aa/layer.tar", BASE))[:9000]), tmp_path / "image.tar", frozenset())
    assert list(tmp_path.iterdir()) == []


def test_packing_ends_when_it_is_not_wanted_any_more(tmp_path: Path) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(CancelledError):
        pack(in_pieces(archive(("aa/layer.tar", BASE))), tmp_path / "image.tar", frozenset(), cancelled)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layers", "present"),
    [((), 0), (("x", "b", "c"), 0), (("a", "b", "x"), 2), (("a",), 1), (("a", "b", "c", "d"), 3), (("b", "a"), 0)],
)
def test_a_host_has_of_an_image_what_another_of_its_images_begins_with(layers: tuple[str, ...], present: int) -> None:
    assert layers_present(("a", "b", "c"), layers) == present


def test_the_same_data_needed_again_above_is_not_left_out() -> None:
    assert layers_to_leave_out(("a", "empty", "b", "empty"), ("a", "empty")) == {"a"}
    assert layers_to_leave_out(("a", "b"), ()) == frozenset()


def test_layers_that_the_image_does_not_begin_with_are_refused() -> None:
    with pytest.raises(PermanentError):
        layers_to_leave_out(("a", "b"), ("b",))


def test_a_name_of_an_image_is_a_repository_and_a_tag() -> None:
    assert split_reference("registry:5000/team/web:1") == ("registry:5000/team/web", "1")
    for odd in ("web", "registry:5000/web", "web@sha256:12", ":1"):
        with pytest.raises(PermanentError):
            split_reference(odd)


# --- a store that keeps the archive's parts ------------------------------------------------------------


def save(layers: list[tuple[str, bytes]], more: tuple[tuple[str, bytes], ...] = ()) -> bytes:
    """An archive with a manifest that names its layers, lowest first."""
    manifest = json.dumps([{"Config": "config", "RepoTags": None, "Layers": [name for name, _ in layers]}]).encode()
    return archive(*dict(layers).items(), *more, ("manifest.json", manifest))


def blob(contents: bytes) -> str:
    return f"blobs/sha256/{hashlib.sha256(contents).hexdigest()}"


def test_what_is_compressed_in_an_archive_is_known_by_what_is_in_it() -> None:
    packed, twice = gzip.compress(BASE), gzip.compress(MIDDLE[:50]) + gzip.compress(MIDDLE[50:])
    broken = gzip.compress(TOP)[:-20]
    held = held_in(in_pieces(archive(("a", packed), ("b", twice), ("c", broken), ("d", TOP))))
    assert {digest(BASE), digest(MIDDLE), digest(TOP), digest(broken)} <= held.plain
    assert held.stored - held.plain == {digest(packed), digest(twice)}


def test_a_compressed_layer_that_the_target_has_is_left_out_too(tmp_path: Path) -> None:
    packed = gzip.compress(BASE)
    whole = save([(blob(packed), packed), (blob(TOP), TOP)])
    pack(in_pieces(whole), tmp_path / "image.tar", frozenset({digest(BASE)}))
    assert set(contents_of(tmp_path / "image.tar")) == {blob(TOP), "manifest.json"}


@pytest.mark.parametrize("known", [True, False])
def test_a_compressed_layer_that_must_be_put_back_is_left_out_only_if_it_is_there_in_that_very_form(
    tmp_path: Path, known: bool
) -> None:
    packed = gzip.compress(BASE)
    whole = save([(blob(packed), packed), (blob(TOP), TOP)])
    pack(in_pieces(whole), tmp_path / "image.tar", frozenset({digest(BASE)}), blobs=[digest(packed)] if known else [])
    assert (blob(packed) not in contents_of(tmp_path / "image.tar")) == known


@pytest.mark.parametrize("local", [BASE, gzip.compress(BASE)], ids=["plain", "compressed"])
@pytest.mark.parametrize("name", ["aa/layer.tar", blob(BASE)], ids=["20.10", "26"])
def test_what_was_left_out_is_put_back_from_another_image(tmp_path: Path, name: str, local: bytes) -> None:
    whole = save([(name, BASE), ("bb/layer.tar", TOP)], more=(("config", b"{}"),))
    pack(in_pieces(whole), tmp_path / "image.tar", frozenset({digest(BASE)}), blobs=[])
    assert name not in contents_of(tmp_path / "image.tar")
    other = archive(("config", b"[]"), ("blobs/sha256/whatever", local))
    assert complete(tmp_path / "image.tar", [digest(BASE), digest(TOP)], in_pieces(other)) == 1
    assert contents_of(tmp_path / "image.tar")[name] == BASE
    assert contents_of(tmp_path / "image.tar")["bb/layer.tar"] == TOP
    assert [place.name for place in tmp_path.iterdir()] == ["image.tar"]


def test_a_compressed_layer_is_put_back_as_it_was_and_never_under_a_digest_that_is_not_its_own(tmp_path: Path) -> None:
    packed, otherwise = gzip.compress(BASE, 9), gzip.compress(BASE, 1)
    assert packed != otherwise
    whole = save([(blob(packed), packed), (blob(TOP), TOP)])
    pack(in_pieces(whole), tmp_path / "image.tar", frozenset({digest(BASE)}), blobs=[digest(packed)])
    with pytest.raises(PermanentError, match="are gone"):
        complete(tmp_path / "image.tar", [digest(BASE), digest(TOP)], in_pieces(archive(("x", otherwise))))
    assert complete(tmp_path / "image.tar", [digest(BASE), digest(TOP)], in_pieces(archive(("x", packed)))) == 1
    assert contents_of(tmp_path / "image.tar")[blob(packed)] == packed


def test_the_same_layer_twice_is_put_back_once_where_the_link_points(tmp_path: Path) -> None:
    """20.10 writes a second occurrence as a symlink: the helper's cc/layer.tar points to aa/layer.tar."""
    whole = archive(("aa/layer.tar", BASE), ("manifest.json", json.dumps([{"Layers": ["cc/layer.tar"]}]).encode()))
    pack(in_pieces(whole), tmp_path / "image.tar", frozenset({digest(BASE)}), blobs=[])
    assert complete(tmp_path / "image.tar", [digest(BASE)], in_pieces(archive(("x", BASE)))) == 1
    assert contents_of(tmp_path / "image.tar")["aa/layer.tar"] == BASE


@pytest.mark.parametrize(
    "manifest", [b"[]", b"{", b'[{"Layers":null}]', b'[{"Layers":["../../etc/passwd"]}]', b'[{"Layers":["a","b"]}]']
)
def test_a_manifest_that_cannot_be_of_that_image_is_refused(tmp_path: Path, manifest: bytes) -> None:
    (tmp_path / "image.tar").write_bytes(archive(("manifest.json", manifest)))
    with pytest.raises(PermanentError):
        complete(tmp_path / "image.tar", [digest(BASE)], in_pieces(archive(("x", BASE))))


def test_an_archive_tells_which_of_its_layers_are_missing(tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_bytes(save([("aa/layer.tar", BASE), ("bb/layer.tar", TOP)]))
    assert layers_missing(tmp_path / "image.tar", [digest(BASE), digest(TOP)]) == {}
    pack(
        in_pieces(save([("aa/layer.tar", BASE), ("bb/layer.tar", TOP)])),
        tmp_path / "image.tar",
        frozenset({digest(TOP)}),
    )
    assert layers_missing(tmp_path / "image.tar", [digest(BASE), digest(TOP)]) == {"bb/layer.tar": digest(TOP)}
