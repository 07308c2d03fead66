"""An index cut over devices answers as the single one does, whatever the cut. Devices are stand-ins on the host."""

from __future__ import annotations

import gc
import json
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.host_driver import HostDriver

from dqe_engine import device_arrays
from dqe_engine.cli import search as search_command
from dqe_engine.cli import serve as serve_command
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.device_arrays import CUDA_DEVICE, CudaMemory, ForeignArray
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import BackendError, IndexFormatError, InputError
from dqe_engine.index import GalleryIndex
from dqe_engine.index.on_devices import CudaSlice, DeviceIndex
from dqe_engine.query import Query
from dqe_engine.server.service import Service
from dqe_engine.server.settings import ServerSettings
from dqe_engine.zones import ZoneSelection, cuda, select_zones

MakeIndex = Callable[..., GalleryIndex]
ABSOLUTE = ZoneSpec(lo=2, hi=9, policy="hardest")
QUERIES = np.random.default_rng(1).integers(-3, 4, (6, 4)).astype(np.float32)
FIELDS = ("scores", "ids", "counts", "picks", "pick_scores", "lo", "hi", "anchor_scores")


class HostSlice:
    """Rows of a device that is the host."""

    asked: list[tuple[int, dict[str, Any]]] = []  # noqa: RUF012

    def __init__(self, parts: Sequence[np.ndarray], device: int) -> None:
        self.items, self.device = np.concatenate(parts), device

    def select(self, queries: np.ndarray, **options: Any) -> ZoneSelection:
        self.asked.append((self.device, options))
        return select_zones(queries, self.items, **options)


def filled(make_index: MakeIndex, rows: int) -> GalleryIndex:
    """Whole numbers, so that scores are exact and many are equal; some items are replaced and removed again."""
    index, rng = make_index(), np.random.default_rng(rows)
    tokens = rng.integers(-3, 4, (rows, 2, 4)).astype(np.float32)
    metadata = [{"n": n, "brand": "ab"[n % 2]} for n in range(rows)]
    for start in range(0, rows, 150):  # some arrays, whose ends are not those of the slices
        part = slice(start, start + 150)
        index.add([f"i{n}" for n in range(rows)][part], tokens[part], None, metadata[part])
    if rows > 5:
        index.remove(["i0", f"i{rows - 1}", f"i{rows // 2}"])
    return index


@pytest.mark.parametrize("devices", [[0], [0, 1], [2, 0, 1]])
@pytest.mark.parametrize("rows", [0, 1, 65, 400])
def test_every_answer_is_the_single_indexs(rows: int, devices: list[int], make_index: MakeIndex) -> None:
    single = filled(make_index, rows)
    index = DeviceIndex(single, devices, open_slice=HostSlice)
    exclude = [[f"i{n}", "unknown", f"i{rows - 2 - n}"] for n in range(len(QUERIES))]
    for k in (1, 10, rows + 3):
        for filter in (None, {"brand": "a"}, {"n": {"<": 70}}, {"n": {"<": 0}}):
            for options in ({}, {"exclude": exclude}, {"zones": ABSOLUTE, "picks": 7}, {"zones": ABSOLUTE, "exclude": exclude}):
                wanted = single.snapshot().search(QUERIES, k, filter=filter, **options)  # type: ignore[arg-type]
                assert index.snapshot().search(QUERIES, k, filter=filter, **options) == wanted  # type: ignore[arg-type]
    assert (held := index.snapshot()).count == len(single)
    index.close()
    index.close()
    assert held.search(QUERIES, 3) == single.snapshot().search(QUERIES, 3), "who holds a snapshot goes on"
    with pytest.raises(InputError, match="closed"):
        index.snapshot()
    assert len(single.snapshot().ids()) == len(single), "the index that it was made from stays open"


def test_rows_are_shared_out_and_zones_take_a_second_round(make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostSlice, "asked", [])
    index = DeviceIndex(filled(make_index, 400), [3, 1, 2], open_slice=HostSlice)
    assert [(start, end) for start, end, _ in index.snapshot().slices] == [(0, 128), (128, 256), (256, 400)]
    index.snapshot().search(QUERIES, 5, zones=ABSOLUTE)
    assert sorted(device for device, _ in HostSlice.asked) == [1, 1, 2, 2, 3, 3]
    assert [options["zones"] for _, options in HostSlice.asked] == [None] * 3 + [ABSOLUTE] * 3
    alone = DeviceIndex(filled(make_index, 400), [5], open_slice=HostSlice)
    HostSlice.asked.clear()
    alone.snapshot().search(QUERIES, 5, zones=ABSOLUTE)
    assert len(HostSlice.asked) == 1
    drawn = ZoneSpec(lo=2, hi=9, policy="uniform", seed=1)
    assert alone.snapshot().search(QUERIES, 5, zones=drawn, picks=3)[0].picks
    with pytest.raises(InputError, match="give absolute bounds"):
        index.snapshot().search(QUERIES, 5, zones=ZoneSpec(lo=0.1, hi=0.5, bounds="rank"))
    with pytest.raises(
        InputError, match=r"^picks by policy 'uniform': random draws need the rows of one device, not of 3; take policy 'hardest'$"
    ):
        index.snapshot().search(QUERIES, 5, zones=drawn, picks=3)


def test_an_engine_searches_devices(engine: RetrievalEngine, image_folder: Path) -> None:
    engine.index_images(image_folder)
    queries = [Query(reference_id="00.png", text="in red", zones=ZoneSpec(lo=0.15, hi=0.4), explain=True), Query(text="blue", k=3)]
    expected = [(result.hits, result.zones) for result in engine.search_batch(queries)]
    engine.attach(DeviceIndex(engine.index, [0], open_slice=HostSlice))
    assert [(result.hits, result.zones) for result in engine.search_batch(queries)] == expected
    assert "12 items on CUDA devices [0]" in repr(engine)
    with pytest.raises(InputError, match="an engine cannot change"):
        engine.index_images(image_folder)


@pytest.mark.parametrize("devices", [[], [0, 0], [-1], [True], ["0"]])
def test_devices_that_are_none(devices: list[Any], make_index: MakeIndex) -> None:
    with pytest.raises(InputError, match=r"^devices: expected different numbers from 0, at least one, got \["):
        DeviceIndex(make_index(3), devices, open_slice=HostSlice)


def test_another_models_index_is_refused(engine: RetrievalEngine, make_index: MakeIndex) -> None:
    with pytest.raises(IndexFormatError, match="was made with model"):
        engine.attach(DeviceIndex(make_index(3), open_slice=HostSlice))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    """Two CUDA devices whose memory is the host's, and kernels that are the CPU's."""
    made = HostDriver()
    monkeypatch.setattr(device_arrays, "load_library", lambda name: made)
    monkeypatch.setattr(cuda, "kernels", lambda: types.SimpleNamespace(device_count=lambda: 2))

    class Index:
        def __init__(self, items: ForeignArray) -> None:
            self.items = items

        def select(self, queries: ForeignArray, **options: Any) -> ZoneSelection:
            assert queries.device == self.items.device
            host = CudaMemory(made)
            found = select_zones(host.download(queries), host.download(self.items), **options)
            fields: dict[str, Any] = {}
            for name in FIELDS:
                value = getattr(found, name)
                if value is not None:
                    value = ForeignArray(value.ctypes.data, value.shape, value.dtype, queries.device, owner=value)
                fields[name] = value
            return ZoneSelection(**fields, backend="cuda")

    monkeypatch.setattr(cuda, "Index", Index)
    return made


def test_slices_are_put_on_their_devices_and_leave_them(driver: HostDriver, make_index: MakeIndex) -> None:
    single = filled(make_index, 400)
    index = DeviceIndex(single, [0, 1])
    assert [rows._index.items.device for _, _, rows in index.snapshot().slices] == [(CUDA_DEVICE, 0), (CUDA_DEVICE, 1)]
    assert [len(block) for block in driver.blocks.values()] == [192 * 2 * 4 * 4, 208 * 2 * 4 * 4], "all rows, removed ones too"
    for options in ({}, {"zones": ABSOLUTE, "picks": 4}, {"filter": {"brand": "a"}}):
        assert index.snapshot().search(QUERIES, 9, **options) == single.snapshot().search(QUERIES, 9, **options)  # type: ignore[arg-type]
    assert len(driver.blocks) == 2, "a search leaves nothing behind"
    index.close()
    gc.collect()
    assert driver.blocks == {}


def test_what_goes_wrong_on_a_device_is_told_in_one_line(
    driver: HostDriver, make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"^device 2: this machine has 2 CUDA devices, numbered from 0; choose among them$"):
        DeviceIndex(make_index(200), [0, 2])
    monkeypatch.setattr(driver, "cuMemAlloc_v2", lambda *_: 2, raising=False)
    with pytest.raises(BackendError, match=r"^CUDA device 1 has no room for 0 MiB \(cuMemAlloc_v2: CUDA error 2\); free memory there"):
        DeviceIndex(make_index(20), [1])


def test_an_engine_searches_a_copy_on_devices(driver: HostDriver, engine: RetrievalEngine, image_folder: Path) -> None:
    engine.index_images(image_folder)
    query = Query(reference_id="00.png", text="in red", zones=ZoneSpec(lo=0.15, hi=0.4))
    expected = engine.search(query)
    engine.search_on([0, 1])
    assert "12 items on CUDA devices [0, 1]" in repr(engine.searched)
    found = engine.search(query)
    assert (found.hits, found.zones) == (expected.hits, expected.zones)
    copied, best = set(driver.blocks), expected.hits[0].id
    assert copied
    engine.index.remove([best])
    assert engine.search(query).hits[0].id == best, "the copy is as the index was"
    engine.search_on([1])
    gc.collect()
    assert not copied & set(driver.blocks)
    assert best not in [hit.id for hit in engine.search(query).hits]
    with pytest.raises(InputError, match="device 2: this machine has 2"):
        engine.search_on([0, 2])
    assert "[1]" in repr(engine.searched), "what was there before is searched"
    engine.search_on([])
    gc.collect()
    assert engine.searched is engine.index
    assert driver.blocks == {}


def test_devices_of_a_search_are_options(
    driver: HostDriver, engine: RetrievalEngine, bundle_path: Path, image_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engine.index_images(image_folder)
    engine.save_index(tmp_path / "index")
    given = [str(bundle_path), str(tmp_path / "index"), "--text", "in red", "--provider", "cpu", "--json"]
    hits, opened = [], []
    monkeypatch.setattr(CudaSlice, "__init__", _noted(CudaSlice.__init__, opened))
    for options in ([], ["--search-on", "cuda"], ["--search-on", "cuda:1"]):
        assert search_command.main([*given, *options]) == 0
        hits.append(json.loads(capsys.readouterr().out)["hits"])
    assert hits[0] == hits[1] == hits[2]
    assert opened == [0, 1]
    assert search_command.main([*given, "--search-on", "cuda:0,cuda:2"]) == 2
    assert capsys.readouterr().err == "error: device 2: this machine has 2 CUDA devices, numbered from 0; choose among them\n"
    for wrong in ("gpu:0", "cuda:x", "cuda:0,cuda", ""):
        with pytest.raises(SystemExit):
            search_command.main([*given, "--search-on", wrong])
        assert "--search-on: expected" in capsys.readouterr().err.splitlines()[-1]


def _noted(make: Callable[..., None], opened: list[int]) -> Callable[..., None]:
    def made(self: CudaSlice, parts: Sequence[np.ndarray], device: int) -> None:
        opened.append(device)
        make(self, parts, device)

    return made


def test_a_server_says_that_no_device_is_there_before_it_starts(
    bundle_path: Path, engine: RetrievalEngine, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engine.index_images(image_folder)
    engine.save_index(tmp_path / "index")
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert serve_command.main([str(bundle_path), str(tmp_path / "index"), "--search-on", "cuda:0", "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the CUDA kernels are not built" in said


def test_a_servers_copy_is_made_again_until_a_device_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    looked: list[int] = []

    def search_on(devices: tuple[int, ...]) -> None:
        asked.append(devices)
        if len(asked) == 1:
            raise BackendError("CUDA device 0 has no room")

    news = iter((True, False, False))
    service = object.__new__(Service)
    service.settings = ServerSettings(Path("bundle"), Path("index"), devices=(0, 1))
    service.engine = types.SimpleNamespace(attached=types.SimpleNamespace(refresh=lambda: next(news)), search_on=search_on)  # type: ignore[assignment]
    service._behind, service._refreshing = False, threading.Lock()
    monkeypatch.setattr(service, "_look", lambda: looked.append(1))
    with pytest.raises(BackendError):
        service._refresh()
    assert looked == []
    service._refresh()
    service._refresh()
    assert asked == [(0, 1)] * 2
    assert looked == [1]


def test_a_server_makes_one_copy_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The older of two that are made at once might be done last, and hide what was written since."""
    inside, together = threading.Semaphore(1), []

    def search_on(devices: tuple[int, ...]) -> None:
        alone = inside.acquire(timeout=0)
        together.append(alone)
        threading.Event().wait(0.2)
        if alone:
            inside.release()

    service = object.__new__(Service)
    service.settings = ServerSettings(Path("bundle"), Path("index"), devices=(0,))
    service.engine = types.SimpleNamespace(attached=types.SimpleNamespace(refresh=lambda: True), search_on=search_on)  # type: ignore[assignment]
    service._behind, service._refreshing = False, threading.Lock()
    monkeypatch.setattr(service, "_look", lambda: None)
    threads = [threading.Thread(target=service._refresh) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [True] * 3
