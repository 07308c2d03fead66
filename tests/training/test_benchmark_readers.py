"""The public datasets' annotation files: what is read from them, and one clear line for what is not right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.tiny_benchmarks import CIRCO_GALLERY, CIRR_GALLERY, WRITERS, write_circo, write_cirr, write_fashioniq, write_hp_fashioniq

from dqe_engine.errors import InputError
from dqe_training.data.image_folder import ImageFolder
from dqe_training.data.public.base import Options
from dqe_training.data.public.circo import CIRCO
from dqe_training.data.public.cirr import CIRR
from dqe_training.data.public.detect import FINDERS, find_benchmarks, open_benchmark
from dqe_training.data.public.fashioniq import FashionIQ, join_blanks, join_captions
from dqe_training.data.public.hp_fashioniq import HPFashionIQ
from dqe_training.data.public.names import TITLES
from dqe_training.data.public.wording import PLAIN, WORDINGS, wording_of
from dqe_training.data.queries import Preference, Query, QuerySet


@pytest.mark.parametrize(
    ("captions", "text", "wordings"),
    [
        (["is red.", " has no sleeves?, "], "Is red and has no sleeves", ("Has no sleeves and is red", "Is red", "Has no sleeves")),
        (["Is RED", "A Tank"], "Is red and A Tank", ("A tank and Is RED", "Is red", "A tank")),
        (["", "has bigger image"], "Has bigger image", ()),
        (["Darker and not as shiny", "."], "Darker and not as shiny", ()),
        (["", " ?."], "", ()),
    ],
)
def test_captions_are_joined_as_the_peers_do(captions: list[str], text: str, wordings: tuple[str, ...]) -> None:
    assert join_captions(captions) == (text, wordings)


@pytest.mark.parametrize(
    ("captions", "text"),
    [
        (["is red.", " has no sleeves?, "], "Is red and has no sleeves"),
        (["", "is grey with a design on the back"], " and is grey with a design on the back"),
        (["Darker", "."], "Darker and "),
        (["", ""], " and "),
    ],
)
def test_sprc_spn4cir_and_qure_join_blanks_too(tmp_path: Path, captions: list[str], text: str) -> None:
    """Written down from their public code, which joins whatever is left of the two captions."""
    assert join_blanks(captions) == text
    folder = write_fashioniq(tmp_path, images=False)
    path = folder / "captions" / "cap.shirt.val.json"
    records = json.loads(path.read_text())
    records[3]["captions"] = captions
    path.write_text(json.dumps(records))
    for name in ("sprc", "spn4cir", "qure"):
        _, shirts, _ = FashionIQ(folder).query_sets("val", Options(wording=WORDINGS[name]))
        _, plain, _ = FashionIQ(folder).query_sets("val", Options())
        assert shirts.queries[3].text == text
        assert plain.queries[3].text == join_captions(captions).text
        assert [q.text for q in shirts.queries[:3]] == [q.text for q in plain.queries[:3]]


def test_qure_puts_its_prompt_around_circos_captions(tmp_path: Path) -> None:
    benchmark = CIRCO(write_circo(tmp_path, images=False))
    path = tmp_path / "annotations" / "val.json"
    entries = json.loads(path.read_text())
    entries[0]["relative_caption"], entries[1]["relative_caption"] = "has {} TWO dogs.", ""
    path.write_text(json.dumps(entries))
    (asked,) = benchmark.query_sets("val", Options(wording=WORDINGS["qure"]))
    assert asked.texts[:2] == ("a photo of $ that has {} TWO dogs.", "a photo of $ that ")
    assert asked.texts[2] == f"a photo of $ that {entries[2]['relative_caption']}"
    (longer,) = benchmark.query_sets("val", Options(shared_concept=True, wording=WORDINGS["qure"]))
    assert longer.texts[0] == "a photo of $ that a thing, has {} TWO dogs."
    for name in ("plain", "sprc", "spn4cir"):
        (other,) = benchmark.query_sets("val", Options(wording=WORDINGS[name]))
        assert other.texts[:2] == ("has {} TWO dogs.", ".")
    assert "a photo of $ that {}" in benchmark.describe(Options(wording=WORDINGS["qure"]))
    assert "photo" not in benchmark.describe(Options(wording=WORDINGS["sprc"]))


def test_a_layout_has_its_authors_wording() -> None:
    assert [wording_of(layout).name for layout in ("sprc", "spn4cir", "qure")] == ["sprc", "spn4cir", "qure"]
    assert [wording_of(layout) for layout in ("lavis", "transformers", None)] == [PLAIN] * 3


def test_fashioniq_has_two_galleries(tmp_path: Path) -> None:
    benchmark = FashionIQ(write_fashioniq(tmp_path, images=False))
    original = benchmark.query_sets("val", Options())
    assert [(s.name, len(s), len(s.gallery)) for s in original] == [("dress", 8, 20), ("shirt", 8, 20), ("toptee", 8, 20)]
    for wide, narrow in zip(original, benchmark.query_sets("val", Options(gallery="val")), strict=True):
        records = json.loads((tmp_path / "captions" / f"cap.{wide.name}.val.json").read_text())
        assert set(narrow.gallery) == {r["candidate"] for r in records} | {r["target"] for r in records}
        assert len(narrow.gallery) < len(wide.gallery)
        assert list(wide.gallery) == sorted(wide.gallery)  # ties: id ascending
        assert wide.queries == narrow.queries
        assert wide.excluded is None  # the reference stays
        assert wide.depth == 50
        assert [wide.gallery[at] for at in wide.target] == [r["target"] for r in records]
        assert [wide.gallery[at] for at in wide.reference] == [r["candidate"] for r in records]


def test_fashioniq_trains_on_all_categories(tmp_path: Path) -> None:
    records = FashionIQ(write_fashioniq(tmp_path, images=False)).training_records()
    assert len(records) == 36
    assert [len(r.wordings) for r in records].count(3) == 34
    assert (records[26].text, records[26].wordings) == ("Has bigger image", ())


def test_cirr_leaves_the_reference_out_and_keeps_five_members(tmp_path: Path) -> None:
    benchmark = CIRR(write_cirr(tmp_path, images=False))
    (val,) = benchmark.query_sets("val", Options())
    assert (len(val), len(val.gallery), val.depth) == (20, CIRR_GALLERY, CIRR_GALLERY)
    for query, pair in zip(val.queries, json.loads((tmp_path / "captions" / "cap.rc2.val.json").read_text()), strict=True):
        assert (query.id, query.exclude, query.targets) == (str(pair["pairid"]), (pair["reference"],), (pair["target_hard"],))
        assert len(query.subset) == 5
        assert {*query.subset, query.reference} == set(pair["img_set"]["members"])
    (test,) = benchmark.query_sets("test1", Options())
    assert (test.target == -1).all()
    assert [q.wordless for q in test.queries].count(True) == 1
    assert test.texts[4] == "."
    assert len(benchmark.training_records()) == 12


def test_circo_knows_every_ground_truth(tmp_path: Path) -> None:
    benchmark = CIRCO(write_circo(tmp_path, images=False))
    (val,) = benchmark.query_sets("val", Options())
    assert (len(val), len(val.gallery)) == (14, CIRCO_GALLERY)
    annotations = json.loads((tmp_path / "annotations" / "val.json").read_text())
    for row, (query, entry) in enumerate(zip(val.queries, annotations, strict=True)):
        assert query.targets == tuple(f"{id:012d}" for id in entry["gt_img_ids"])
        assert len(query.targets) == row + 1
        assert val.gallery[val.target[row]] == f"{entry['target_img_id']:012d}"
        assert query.text == entry["relative_caption"]
        assert not query.exclude
    (shared,) = benchmark.query_sets("val", Options(shared_concept=True))
    assert shared.texts[0] == f"a thing, {val.texts[0]}"


def test_without_cocos_list_the_image_folder_is_circos_gallery(tmp_path: Path) -> None:
    benchmark = CIRCO(write_circo(tmp_path, listed=False))
    root = benchmark.image_directory()
    assert root is not None
    (root / "cover.png").write_bytes(b"")
    (root / "000000000007.jpg").unlink()
    (val,) = benchmark.query_sets("val", Options(), ImageFolder.scan(root))
    assert "cover" not in val.gallery
    assert len(val.gallery) == CIRCO_GALLERY  # what the queries name belongs to it, there or not
    with pytest.raises(InputError, match="nothing lists the gallery"):
        benchmark.query_sets("val", Options())


def test_hp_fashioniq_rows(tmp_path: Path) -> None:
    (all_,) = HPFashionIQ(write_hp_fashioniq(tmp_path, images=False)).query_sets("all", Options())
    assert len(all_) == 12
    raw = json.loads((tmp_path / "hpfiq.json").read_text())["user_1"]["question_set_2"]
    last, choice = all_.queries[-1], all_.queries[-1].preference
    assert last.id == "user_1/question_set_2/2"
    assert isinstance(choice, Preference)
    assert f"/-/image_data/dress/{last.reference}.jpg" == raw["ref_img_paths"][2]
    assert [f"/-/image_data/dress/{id}.jpg" for id in choice.second] == raw["retrieved_set2"][2]["img_path"]
    assert choice.preferred == int(raw["preferred set"][2])


# -- finding ---------------------------------------------------------------------------------------------------------------


def test_a_folder_tells_what_it_holds(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        found = open_benchmark(write(tmp_path / name))
        assert found is not None
        assert found.name == name
        root = found.image_directory()
        assert root is not None
        wanted = [image for part in found.parts(ImageFolder.scan(root)) for image in part.images]
        assert not ImageFolder.scan(root).missing(wanted)
    assert {b.name for b in find_benchmarks(tmp_path)} == set(WRITERS) == set(FINDERS) == set(TITLES)
    assert [b.name for b in find_benchmarks(tmp_path, "circo")] == ["circo"]
    assert open_benchmark(tmp_path) is None
    assert open_benchmark(tmp_path / "cirr", "jsonl") is None


def test_cirrs_images_may_lie_beside_its_annotations(tmp_path: Path) -> None:
    write_cirr(tmp_path / "all")
    (tmp_path / "all" / "cirr").mkdir()
    for name in ("captions", "image_splits"):
        shutil.move(tmp_path / "all" / name, tmp_path / "all" / "cirr" / name)
    assert CIRR(tmp_path / "all" / "cirr").image_directory() == tmp_path / "all"


def test_what_is_ambiguous_or_not_there_is_said(tmp_path: Path) -> None:
    write_fashioniq(tmp_path, images=False)
    write_cirr(tmp_path, images=False)
    with pytest.raises(InputError, match="holds fashioniq and cirr; say which with --dataset"):
        open_benchmark(tmp_path)
    chosen = open_benchmark(tmp_path, "cirr")
    assert chosen is not None
    assert chosen.name == "cirr"
    with pytest.raises(InputError, match="no annotations of circo here"):
        open_benchmark(tmp_path, "circo")
    with pytest.raises(InputError, match="--dataset shoes: expected auto, fashioniq, cirr"):
        open_benchmark(tmp_path, "shoes")
    with pytest.raises(InputError, match="no such dataset folder"):
        open_benchmark(tmp_path / "none")
    with pytest.raises(InputError, match="no annotations of FashionIQ, CIRR"):
        find_benchmarks(tmp_path / "captions")


# -- mistakes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "file", "content", "said"),
    [
        (write_fashioniq, "captions/cap.dress.val.json", "[{", "not in the official format"),
        (write_fashioniq, "captions/cap.dress.val.json", '[{"candidate": "a"}]', "missing required field `captions`"),
        (write_fashioniq, "captions/cap.dress.val.json", '[{"candidate": "a", "target": "b", "captions": ["x"]}]', "record 1: 1 captions"),
        (write_fashioniq, "image_splits/split.dress.val.json", "[]", "query images are not in the gallery, for example D"),
        (write_cirr, "captions/cap.rc2.val.json", '[{"pairid": "x"}]', "Expected `int`"),
        (write_cirr, "image_splits/split.rc2.val.json", '["a"]', "Expected `object`"),
        (
            write_cirr, "captions/cap.rc2.val.json",
            '[{"pairid": 7, "reference": "a", "caption": "x", "img_set": {"members": ["b", "c"]}}]', "pair 7: expected an image set of 6",
        ),
        (write_circo, "annotations/val.json", '[{"id": 0}]', "missing required field `reference_img_id`"),
        (write_hp_fashioniq, "hpfiq.json", '{"user_0": {"question_set_1": {}}}', "missing required field"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path: Path, write: object, file: str, content: str, said: str) -> None:
    write(tmp_path, images=False)  # type: ignore[operator]
    (tmp_path / file).write_text(content)
    benchmark = open_benchmark(tmp_path)
    assert benchmark is not None
    with pytest.raises(InputError) as caught:
        benchmark.query_sets(benchmark.splits[0], Options(), ImageFolder(tmp_path, {}))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_preference_is_an_error(tmp_path: Path) -> None:
    path = write_hp_fashioniq(tmp_path, images=False) / "hpfiq.json"
    path.write_text(path.read_text().replace('"preferred set": ["2"', '"preferred set": ["3"', 1).replace('set": ["1"', 'set": ["3"', 1))
    with pytest.raises(InputError, match="Invalid enum value '3'"):
        HPFashionIQ(tmp_path).query_sets("all", Options())


@pytest.mark.parametrize(
    ("name", "split", "options", "said"),
    [
        ("fashioniq", "test", Options(), "no split 'test' to evaluate; there are val"),
        ("fashioniq", "val", Options(shared_concept=True), "--shared-concept is CIRCO's"),
        ("cirr", "val", Options(gallery="val"), "leave --gallery out"),
        ("cirr", "train", Options(), "there are val, test1"),
        ("circo", "val", Options(gallery="original"), "--gallery is FashionIQ's"),
        ("hp-fashioniq", "all", Options(gallery="val"), "leave --gallery out"),
    ],
)
def test_an_option_of_another_dataset_is_refused(tmp_path: Path, name: str, split: str, options: Options, said: str) -> None:
    benchmark = open_benchmark(WRITERS[name](tmp_path, images=False))
    assert benchmark is not None
    with pytest.raises(InputError, match=said):
        benchmark.query_sets(split, options, None)


def test_absent_files_are_named(tmp_path: Path) -> None:
    write_cirr(tmp_path, images=False)
    (tmp_path / "captions" / "cap.rc2.train.json").unlink()
    with pytest.raises(InputError, match=r"cap\.rc2\.train\.json: no such annotation file"):
        CIRR(tmp_path).training_records()
    assert [part.queries is None for part in CIRR(tmp_path).parts()] == [True, False, False]
    for name in ("circo", "hp-fashioniq"):
        benchmark = open_benchmark(WRITERS[name](tmp_path / name, images=False))
        assert benchmark is not None
        with pytest.raises(InputError, match="train on FashionIQ"):
            benchmark.training_records()


def test_a_query_set_must_be_consistent() -> None:
    with pytest.raises(InputError, match="mine: the gallery names an image twice; 3 names, 2 images"):
        QuerySet("mine", (), ("a", "b", "a"))
    with pytest.raises(InputError, match="2 query images are not in the gallery, for example z of query 7"):
        QuerySet("mine", (Query("7", "a", "x", ("z", "y")),), ("a", "b"))
