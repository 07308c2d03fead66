"""An item that was removed by the API stays removed, though its photo stays in the watched folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.hostile_images import encoded
from support.samples import noise_image
from support.server import WRITE_KEY, bearer

from dqe_engine.cli.serve import main
from dqe_engine.errors import IndexFormatError
from dqe_engine.index import GalleryIndex
from dqe_engine.server.background import FolderJob, _Work, index_folder
from dqe_engine.server.progress import Progress
from dqe_engine.server.removed import Removed, removed_beside
from dqe_engine.server.service import Service
from dqe_engine.server.settings import Key

GONE, KEPT = "sub/01.png", "00.png"
WRITE = bearer(WRITE_KEY)


def job_of(bundle: Path, place: Path, photos: Path, **options: Any) -> FolderJob:
    index, state = place / "index", place / "state.json"
    return FolderJob(bundle=bundle, index=index, folders=(("", photos),), state_file=state, provider="cpu", threads=1, **options)


@pytest.fixture
def update(bundle_path: Path, shop: Path, tmp_path: Path) -> Callable[..., Progress]:
    """What `dqe-serve --update` does in the background, for the index that `serve` serves."""

    def update(**options: Any) -> Progress:
        return index_folder(job_of(bundle_path, tmp_path, shop / "photos", **options))

    return update


def ids(index: Path) -> set[str]:
    with GalleryIndex.load(index, screened=False) as loaded:
        return set(loaded.ids)


def remove(client: TestClient, id: str) -> None:
    assert client.delete(f"/v1/items/{id}", headers=WRITE).status_code == 200


def test_it_is_left_out_until_it_is_asked_for(
    serve: Callable[..., TestClient], update: Callable[..., Progress], keys: tuple[Key, ...], tmp_path: Path
) -> None:
    client = serve(keys=keys)
    remove(client, GONE)
    for _ in range(2):
        assert update().skipped == {"removed from the index before (--readd takes them again)": 1}
        assert ids(tmp_path / "index") == {f"{'sub/' if n % 2 else ''}{n:02}.png" for n in range(24)} - {GONE}
    assert update(readd=True).skipped == {}
    assert GONE in ids(tmp_path / "index")
    assert update().skipped == {}
    assert GONE in ids(tmp_path / "index")


def test_a_server_without_folders_remembers_it_too(
    serve: Callable[..., TestClient], update: Callable[..., Progress], keys: tuple[Key, ...], tmp_path: Path
) -> None:
    """It cannot look for the photo. An upload that goes with its item is no photo of a folder, so its id is not remembered."""
    client = serve(keys=keys, photos=())
    parts = {"image": encoded(noise_image(78), "PNG")}
    for id in ("late.png", "same.png"):
        assert client.post("/v1/items", headers=WRITE, files=parts, data={"item": f'{{"id": "{id}"}}'}).status_code == 201
    remove(client, GONE)
    remove(client, "late.png")  # its image stays, as that of the other one
    remove(client, "same.png")
    assert Removed(removed_beside(tmp_path / "index")).ids() == {GONE, "late.png"}
    assert update().skipped == {"removed from the index before (--readd takes them again)": 1}
    assert GONE not in ids(tmp_path / "index")


def test_it_is_left_out_after_compaction(
    serve: Callable[..., TestClient], update: Callable[..., Progress], keys: tuple[Key, ...], tmp_path: Path
) -> None:
    remove(serve(keys=keys), GONE)
    with GalleryIndex.load(tmp_path / "index", screened=False) as index:
        index.compact()
    update()
    assert GONE not in ids(tmp_path / "index")


def put(client: TestClient, id: str, image: bytes, *, replace: bool) -> None:
    words = f'{{"id": "{id}", "replace": {"true" if replace else "false"}}}'
    assert client.post("/v1/items", headers=WRITE, files={"image": image}, data={"item": words}).status_code == 201


def test_it_is_left_out_where_its_folder_was_away(
    serve: Callable[..., TestClient], update: Callable[..., Progress], keys: tuple[Key, ...], tmp_path: Path
) -> None:
    """A folder on another disk may be away when its item is removed; the photo is there again later."""
    away = tmp_path / "away"
    away.mkdir()
    client = serve(keys=keys, photos=(("", away),))
    away.rmdir()
    remove(client, GONE)
    assert Removed(removed_beside(tmp_path / "index")).ids() == {GONE}
    assert update().skipped == {"removed from the index before (--readd takes them again)": 1}
    assert GONE not in ids(tmp_path / "index")


@pytest.mark.parametrize("folders", [(), (("", "away"),)], ids=["no folders", "its folder is away"])
def test_a_photo_whose_item_became_an_upload_stays_out(
    folders: tuple[tuple[str, str], ...], serve: Callable[..., TestClient], update: Callable[..., Progress], keys: tuple[Key, ...],
    shop: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Replaced by another image, or by the very same; replaced again; removed then. The id is written once."""
    (tmp_path / "away").mkdir()
    client = serve(keys=keys, photos=tuple((prefix, tmp_path / folder) for prefix, folder in folders))
    (tmp_path / "away").rmdir()
    put(client, GONE, encoded(noise_image(81), "PNG"), replace=True)
    put(client, GONE, encoded(noise_image(82), "PNG"), replace=True)
    for _ in range(2):
        put(client, KEPT, (shop / "photos" / KEPT).read_bytes(), replace=True)
    assert update(uploads=tmp_path / "index.uploads").skipped == {}
    remove(client, GONE)
    remove(client, KEPT)
    assert sorted(line for line in removed_beside(tmp_path / "index").read_text().split("\n") if line) == [f'"{KEPT}"', f'"{GONE}"']
    assert update().skipped == {"removed from the index before (--readd takes them again)": 2}
    assert ids(tmp_path / "index").isdisjoint({GONE, KEPT})


def test_what_cannot_be_remembered_is_not_removed(serve: Callable[..., TestClient], keys: tuple[Key, ...], tmp_path: Path) -> None:
    removed_beside(tmp_path / "index").mkdir()
    client = serve(keys=keys)
    answer = client.delete(f"/v1/items/{GONE}", headers=WRITE)
    assert answer.status_code == 507
    assert "nothing was changed" in answer.json()["error"]["message"]
    assert GONE in ids(tmp_path / "index")
    removed_beside(tmp_path / "index").rmdir()
    remove(client, GONE)


@pytest.mark.parametrize("asked", ["between the save and its answer", "while photos are read"])
def test_it_is_left_out_by_an_update_that_runs_meanwhile(
    asked: str, serve: Callable[..., TestClient], update: Callable[..., Progress], keys: tuple[Key, ...], shop: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An update that finds the item gone, or never saw it, knows that it was removed."""
    if asked == "between the save and its answer":
        refresh = Service._refresh

        def refreshed(service: Service) -> None:
            update()
            refresh(service)

        monkeypatch.setattr(Service, "_refresh", refreshed)
        remove(serve(keys=keys), GONE)
    else:
        client, photo = serve(keys=keys), {"image": (shop / "photos" / GONE).read_bytes()}
        with GalleryIndex.load(tmp_path / "index", screened=False) as index:
            index.remove([GONE])
            index.save(tmp_path / "index")
        encode = _Work._encode

        def encoded_late(work: _Work, pixels: Any) -> Any:
            assert client.post("/v1/items", headers=WRITE, files=photo, data={"item": f'{{"id": "{GONE}"}}'}).status_code == 201
            remove(client, GONE)
            return encode(work, pixels)

        monkeypatch.setattr(_Work, "_encode", encoded_late)
        assert update().skipped == {"removed from the index before (--readd takes them again)": 1}
    assert GONE not in ids(tmp_path / "index")


def test_a_removal_that_is_not_saved_costs_nothing(
    serve: Callable[..., TestClient],
    update: Callable[..., Progress],
    keys: tuple[Key, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The id was written before the save, and the item is in the index: updates keep it up to date as any other."""
    client = serve(keys=keys)

    def full(*arguments: Any, **options: Any) -> None:
        raise IndexFormatError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(GalleryIndex, "save", full)
        assert client.delete(f"/v1/items/{GONE}", headers=WRITE).status_code >= 500
    assert Removed(removed_beside(tmp_path / "index")).ids() == {GONE}
    assert update().skipped == {}
    assert GONE in ids(tmp_path / "index")


def test_an_upload_of_its_id_brings_it_back(
    serve: Callable[..., TestClient], update: Callable[..., Progress], keys: tuple[Key, ...], tmp_path: Path
) -> None:
    client = serve(keys=keys)
    remove(client, GONE)
    parts = {"image": encoded(noise_image(77), "PNG")}
    assert client.post("/v1/items", headers=WRITE, files=parts, data={"item": f'{{"id": "{GONE}"}}'}).status_code == 201
    assert update().skipped == {}
    assert GONE in ids(tmp_path / "index")


def test_only_removals_of_photos_are_remembered(
    serve: Callable[..., TestClient], keys: tuple[Key, ...], bundle_path: Path, shop: Path, tmp_path: Path
) -> None:
    """An upload leaves nothing in a folder, so a photo that comes there later is a new one; and what was not removed is not remembered."""
    client = serve(keys=keys)
    parts = {"image": encoded(noise_image(78), "PNG")}
    assert client.post("/v1/items", headers=WRITE, files=parts, data={"item": '{"id": "late.png"}'}).status_code == 201
    remove(client, "late.png")
    assert client.delete("/v1/items/nothing.png", headers=WRITE).status_code == 404
    assert not removed_beside(tmp_path / "index").exists()
    photos = tmp_path / "photos"
    shutil.copytree(shop / "photos", photos)
    noise_image(79).save(photos / "late.png")
    index_folder(job_of(bundle_path, tmp_path, photos))
    assert "late.png" in ids(tmp_path / "index")


def test_what_a_kill_cut_short_costs_no_other_id(tmp_path: Path) -> None:
    removed = Removed(tmp_path / "index.removed")
    assert removed.ids() == frozenset()
    removed.add([GONE])
    with removed.file.open("ab") as stream:
        stream.write(b'\n"half of an i')
    removed.add(['"\n\u2028ü', KEPT])
    removed.add([GONE])
    assert removed.ids() == {GONE, '"\n\u2028ü', KEPT}
    removed.clear()
    assert removed.ids() == frozenset()
    removed.clear()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text('"a"\n')
    (tmp_path / "index.removed").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic"):
        Removed(tmp_path / "index.removed").add(["b"])
    assert (tmp_path / "other").read_text() == '"a"\n'


def test_the_command_passes_it_on(bundle_path: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_of(bundle_path, tmp_path, tmp_path / os.fsdecode(b"caf\xe9"), readd=True, uploads=tmp_path / "uploads")
    assert FolderJob.told(job.command()[-1]) == job
    assert main([str(bundle_path), str(shop / "index"), "--images", str(shop / "photos"), "--readd"]) == 2
    assert "--readd has no effect without --update; add --update and --images FOLDER" in capsys.readouterr().err
