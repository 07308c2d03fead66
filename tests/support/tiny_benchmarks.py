"""Made-up datasets in the official formats of FashionIQ, CIRR, CIRCO and HP-FashionIQ, with 16 x 16 px images."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet
from support.samples import noise_image

WORDS = ("is red", "has longer sleeves", "is a dress", "more striped", "in teal, please", "without a collar", "looks cropped")
CIRR_GALLERY, CIRCO_GALLERY = 60, 64


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_images(folder: Path, names: Iterable[str]) -> None:
    """One distinct picture for each name; the suffix decides the format."""
    for seed, name in enumerate(sorted(names)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(seed, (16, 16)).save(folder / name)


def write_fashioniq(directory: Path, *, images: bool = True) -> Path:
    """Per category: 12 train, 8 val and 3 test triplets over 30, 20 and 6 images; images nested, of three formats."""
    rng = np.random.default_rng(1)
    names = []
    for category in ("dress", "shirt", "toptee"):
        for split, count, size in (("train", 12, 30), ("val", 8, 20), ("test", 3, 6)):
            ids = [f"{category[0].upper()}{split[:2]}{i:03d}" for i in range(size)]
            suffixes = (".png", ".JPG", ".webp")
            names += [f"{category}/{id}{suffixes[i % 3]}" for i, id in enumerate(ids)]
            records = []
            for _ in range(count):
                reference, target = rng.choice(size // 2 + 2, 2, replace=False).tolist()
                captions = rng.choice(WORDS, 2, replace=False).tolist()
                pair = {"candidate": ids[reference], "captions": captions}
                records.append(pair if split == "test" else pair | {"target": ids[target]})
            if (category, split) == ("toptee", "train"):
                records[2]["captions"] = ["", "has bigger image"]
                records[3]["captions"] = ["Darker.", "."]
            write_json(directory / "captions" / f"cap.{category}.{split}.json", records)
            write_json(directory / "image_splits" / f"split.{category}.{split}.json", ids[::-1])
    if images:
        write_images(directory / "images", names)
    return directory


def _cirr_pair(pairid: int, members: list[str], rng: np.random.Generator, *, target: bool) -> dict[str, Any]:
    reference, hard = rng.choice(6, 2, replace=False).tolist()
    pair: dict[str, Any] = {"pairid": pairid, "reference": members[reference], "caption": str(rng.choice(WORDS))}
    if target:
        pair |= {"target_hard": members[hard], "target_soft": {members[hard]: 1.0}}
    return pair | {"img_set": {"id": pairid // 10, "members": members, "reference_rank": reference}}


def write_cirr(directory: Path, *, images: bool = True) -> Path:
    """12 train, 20 val and 10 test1 pairs, val and test1 over `CIRR_GALLERY` images each; one test1 caption is blank."""
    rng = np.random.default_rng(4)  # no two scores of a test1 query are as near as rounding errors
    for split, prefix, count in (("train", "train", 12), ("val", "dev", 20), ("test1", "test1", 10)):
        ids = [f"{prefix}-{i // 2}-{i % 2}-img0" for i in range(CIRR_GALLERY)]
        files = {id: f"./{prefix}/{id}.png" if split != "train" else f"./train/{i % 7}/{id}.png" for i, id in enumerate(ids)}
        pairs = [
            _cirr_pair(100 * count + row, [ids[6 * (row % 10) + i] for i in range(6)], rng, target=split != "test1") for row in range(count)
        ]
        if split == "test1":
            pairs[4]["caption"] = " "
        write_json(directory / "captions" / f"cap.rc2.{split}.json", pairs)
        write_json(directory / "image_splits" / f"split.rc2.{split}.json", files)
        if images:
            write_images(directory, files.values())
    return directory


def write_circo(directory: Path, *, images: bool = True, listed: bool = True) -> Path:
    """14 val queries with 1 to 14 ground truths, every third with a second semantic aspect, and 5 test queries over `CIRCO_GALLERY`
    images, with COCO's image list."""
    rng = np.random.default_rng(3)
    ids = [1000 * i + 7 for i in range(CIRCO_GALLERY)]
    val = []
    for row in range(14):
        reference, *valid = rng.choice(ids, row + 2, replace=False).tolist()
        val.append(
            {"reference_img_id": reference, "target_img_id": valid[0], "relative_caption": str(rng.choice(WORDS)),
             "shared_concept": "a thing", "gt_img_ids": valid, "id": row,
             "semantic_aspects": ["addition"] if row % 3 else ["addition", "negation"]}
        )  # fmt: skip
    test = [{"reference_img_id": ids[row], "relative_caption": WORDS[row], "shared_concept": "a thing", "id": row} for row in range(5)]
    write_json(directory / "annotations" / "val.json", val)
    write_json(directory / "annotations" / "test.json", test)
    coco = directory / "COCO2017_unlabeled"
    if listed:
        entries = [{"id": id, "file_name": f"{id:012d}.jpg", "height": 16} for id in ids]
        write_json(coco / "annotations" / "image_info_unlabeled2017.json", {"images": entries, "licenses": []})
    if images:
        write_images(coco / "unlabeled2017", [f"{id:012d}.jpg" for id in ids])
    return directory


def write_pinpoint(directory: Path, *, images: bool = True) -> Path:
    """9 queries, three texts of each of three images, and one with two reference images, over 40 images; as the authors' file: the
    missing second image is the word None, ids are listed twice, negatives hold the reference, an empty place and an id that the gallery
    lacks."""
    rng = np.random.default_rng(5)
    ids = [f"{i:032x}" for i in range(40)]
    rows = []
    for number in range(10):
        reference = ids[number // 3]
        drawn = rng.choice(ids[5:], 8, replace=False).tolist()
        rows.append({
            "query_id": f"query_{number:05d}", "query_image_signature": reference,
            "query_image_signature2": ids[4] if number == 9 else "None",
            "instruction": WORDS[number % len(WORDS)], "positive_candidates": [*drawn[:3], drawn[0]],
            "negative_candidates": [reference, None, *drawn[3:6], "f" * 32], "token_count": 3,
        })  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), directory / "pinpoint_licensed.parquet")
    (directory / "index_signatures.txt").write_text("\n".join(ids[::-1]) + "\n")
    if images:
        write_images(directory / "images", [f"{id}.jpg" for id in ids])
    return directory


def write_hp_fashioniq(directory: Path, *, images: bool = True) -> Path:
    """Two users, two question sets each, three questions a set."""
    rng = np.random.default_rng(4)
    ids = [f"B{i:05d}" for i in range(40)]
    users: dict[str, Any] = {}
    for user in ("user_0", "user_1"):
        users[user] = {}
        for number in ("question_set_1", "question_set_2"):
            drawn = [rng.choice(ids, 12, replace=False).tolist() for _ in range(3)]
            users[user][number] = {
                "ref_img_paths": [f"/-/image_data/dress/{d[0]}.jpg" for d in drawn],
                "targ_img_paths": [f"/-/image_data/dress/{d[1]}.jpg" for d in drawn],
                "sentences": rng.choice(WORDS, 3).tolist(),
                "retrieved_set1": [{"img_path": [f"/-/image_data/dress/{i}.jpg" for i in d[2:7]], "user_score": "3"} for d in drawn],
                "retrieved_set2": [{"img_path": [f"/-/image_data/dress/{i}.jpg" for i in d[7:12]], "user_score": "4"} for d in drawn],
                "preferred set": rng.choice(["1", "2"], 3).tolist(),
            }
    write_json(directory / "hpfiq.json", users)
    if images:
        write_images(directory / "image_data", [f"dress/{id}.jpg" for id in ids])
    return directory


WRITERS = {
    "fashioniq": write_fashioniq, "cirr": write_cirr, "circo": write_circo, "hp-fashioniq": write_hp_fashioniq, "pinpoint": write_pinpoint,
}  # fmt: skip
"""By the dataset's name: every one that `detect.FINDERS` knows."""
