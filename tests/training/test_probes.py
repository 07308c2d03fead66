"""The probes, on models whose faults are known: one that is deaf to the text, one that reads only it, one that hears no "not"."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.tiny_benchmarks import write_cirr, write_hp_fashioniq
from support.tiny_bundle import build_tiny_bundle
from support.tiny_training import write_checkpoint

from dqe_engine.errors import InputError
from dqe_engine.zones import select_zones
from dqe_training.cli import evaluate
from dqe_training.data.garments.catalog import ALL_GARMENTS, VALUES, Garment
from dqe_training.data.garments.texts import modify, phrases, reword
from dqe_training.data.grammars import grammar_of
from dqe_training.data.queries import DEPTH, Query, QuerySet
from dqe_training.data.records import ImageRecord, TripletRecord
from dqe_training.data.tinted import CATEGORIES, COLOURS
from dqe_training.evaluation.probe_report import Probe
from dqe_training.evaluation.probes.asking import Asking, Labels, overlap
from dqe_training.evaluation.probes.run import run_probes
from dqe_training.evaluation.protocol import Embeddings, evaluation_set

# -- the grammar -----------------------------------------------------------------------------------------------------------


def test_every_text_of_the_grammar_is_known_to_it() -> None:
    """What `modify` says of one attribute is among the phrases that leave the same values valid."""
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(1500):
        reference = ALL_GARMENTS[int(rng.integers(len(ALL_GARMENTS)))]
        change = modify(reference, rng, two=0)
        if not change.text.startswith(("same ", "keep ", "the same kind")):
            ((name, values),) = change.allowed.items()
            assert change.text in phrases(reference, name, values)
            seen += 1
    assert seen > 1000


def test_a_phrase_leaves_the_same_values_valid_whoever_says_it() -> None:
    """No phrase stands for two different changes of one garment: other wordings are exact."""
    for reference in ALL_GARMENTS[::37]:
        meanings: dict[str, set[tuple[str, frozenset[str]]]] = {}
        for name, values in VALUES.items():
            for count in range(1, len(values)):
                for subset in [(v,) for v in values] if count == 1 else [values[:count], values[count:]] if name == "length" else []:
                    try:
                        said = phrases(reference, name, tuple(subset))
                    except InputError:
                        continue
                    for phrase in said:
                        meanings.setdefault(phrase, set()).add((name, frozenset(subset)))
        assert len(meanings) > 100
        assert all(len(meant) == 1 for meant in meanings.values())


@pytest.mark.parametrize("two", [0.0, 1.0])
def test_other_wordings_keep_the_valid_answers(two: float) -> None:
    """Each is what `modify` could have said: read back phrase by phrase, it leaves the same values valid."""
    rng = np.random.default_rng(1)
    grammar = grammar_of([g._asdict() for g in ALL_GARMENTS])
    for number in range(60):
        reference = ALL_GARMENTS[int(rng.integers(len(ALL_GARMENTS)))]
        change = modify(reference, rng, two=two)
        others = grammar.wordings(change.text, reference._asdict(), change.allowed, 4, [0, number])
        assert others == grammar.wordings(change.text, reference._asdict(), change.allowed, 4, [0, number])
        assert len(others) >= 2
        assert change.text not in others
        assert len(set(others)) == len(others)
        for other in others:
            for name, values in change.allowed.items():
                assert any(phrase in other for phrase in phrases(reference, name, values)), (other, change)


def test_what_the_grammar_cannot_say_is_an_error() -> None:
    garment = ALL_GARMENTS[0]
    with pytest.raises(InputError, match="expected one attribute or two"):
        reword(garment, {}, np.random.default_rng(0))
    with pytest.raises(InputError, match="colour: no words for red, blue instead of black"):
        phrases(Garment("black", "coat", "plain", "long"), "colour", ("red", "blue"))
    with pytest.raises(InputError, match="no words for long instead of long"):
        phrases(Garment("black", "coat", "plain", "long"), "length", ("long",))


def test_statements_come_in_the_same_order_for_all_values() -> None:
    for space in (VALUES, {"colour": tuple(COLOURS), "category": CATEGORIES}, {"style": ("a_line", "b")}):
        rows = [{name: values[at % len(values)] for name, values in space.items()} for at in range(12)]
        grammar = grammar_of(rows)
        for name, values in space.items():
            counts = {len(grammar.statements(name, value)) for value in values}
            assert len(counts) == 1
            for value in values:
                for plain, negated in grammar.statements(name, value):
                    assert re.search(r"\b(not|no|without)\b", negated)
                    assert not re.search(r"\b(not|no|without)\b", plain)
    assert grammar_of([{"colour": "mauve"}]).statements("style", "a_line")[0] == ("is a line", "is not a line")


# -- models with known faults ----------------------------------------------------------------------------------------------

SIZES = ("small", "big")
LABELS = [{"hue": hue, "size": size} for hue in ("red", "green", "blue", "grey") for size in SIZES for _ in range(6)]
WIDTH = 6


def one_hot(labels: dict[str, str]) -> np.ndarray:
    vector = np.zeros(WIDTH, np.float32)
    vector[("red", "green", "blue", "grey").index(labels["hue"])] = 1
    vector[4 + SIZES.index(labels["size"])] = 1
    return vector / np.linalg.norm(vector)


def asking(encode: Callable[[dict[str, str] | None, str], np.ndarray], *, wordings: bool = True) -> Asking:
    """48 images, three kinds of labelled queries; the model is `encode`, of a reference's labels (None: the neutral image) and a text."""
    images = [ImageRecord(image=f"g{at:02d}", attributes=row) for at, row in enumerate(LABELS)]
    records = []
    for at in range(0, 48, 2):
        hue, size = LABELS[at]["hue"], LABELS[at]["size"]
        new = ("red", "green", "blue", "grey")[(("red", "green", "blue", "grey").index(hue) + 1) % 4]
        target = next(i for i, row in enumerate(LABELS) if row == {"hue": new, "size": size} and i % 5 == at % 5)
        records.append(
            TripletRecord(
                reference=f"g{at:02d}", target=f"g{target:02d}", text=f"is {new}", attributes={"hue": new}, allowed={"hue": [new]},
                wordings=(f"make it {new}", f"{new} please") if wordings else (),
            )
        )  # fmt: skip
    evaluation = evaluation_set(records, images)
    queries = evaluation.queries
    tokens = np.stack([one_hot(row) for row in LABELS])[:, None]
    tokens = tokens + np.arange(48, dtype=np.float32)[:, None, None] * 1e-6  # no two alike

    def encoded(references: Sequence[str | None], texts: Sequence[str]) -> np.ndarray:
        pairs = [(None if name is None else LABELS[int(name[1:])], text) for name, text in zip(references, texts, strict=True)]
        return np.stack([encode(*pair) for pair in pairs]).astype(np.float32)

    embedded = encoded([q.reference for q in queries.queries], queries.texts)
    found = select_zones(embedded, tokens, k=DEPTH, exclude=queries.excluded)
    embeddings = Embeddings(embedded, tokens, np.zeros((len(queries), 0), np.float32), found.ids, found.scores)
    return Asking(queries, embeddings, encoded, "nothing", Labels.of(evaluation))


def hue_in(text: str) -> str | None:
    return next((hue for hue in ("red", "green", "blue", "grey") if hue in text), None)


def perfect(labels: dict[str, str] | None, text: str) -> np.ndarray:
    """Changes what the text says, hears "not", keeps the rest."""
    wanted = dict(labels or {})
    vector = np.zeros(WIDTH, np.float32)
    size = next((s for s in SIZES if s in text), wanted.get("size"))
    hue, named = wanted.get("hue"), hue_in(text)
    negated = "not" in text
    if size is not None:
        vector[4 + SIZES.index(size)] = -1 if negated and any(s in text for s in SIZES) else 1
    if named is not None:
        vector[("red", "green", "blue", "grey").index(named)] = -1 if negated else 1
    elif hue is not None:
        vector[("red", "green", "blue", "grey").index(hue)] = 1
    return vector / max(float(np.linalg.norm(vector)), 1e-9)


def deaf_to_not(labels: dict[str, str] | None, text: str) -> np.ndarray:
    return perfect(labels, text.replace("not ", ""))


def deaf_to_text(labels: dict[str, str] | None, text: str) -> np.ndarray:
    return perfect(labels, ".")


def reads_only(labels: dict[str, str] | None, text: str) -> np.ndarray:
    return perfect(None, text)


def fickle(labels: dict[str, str] | None, text: str) -> np.ndarray:
    """Understands "is" and nothing else."""
    return perfect(labels, text if text.startswith("is") else "is grey")


def values(probe: Probe) -> dict[str, float]:
    assert not probe.skipped
    return {name: figure.value for name, figure in probe.figures.items()}


def test_single_modality() -> None:
    good = values(run_probes(asking(perfect)).single_modality)
    assert good["composed_at_10"] == 1
    assert good["image_alone_at_10"] < 0.2
    assert good["only_composed_at_10"] == pytest.approx(1 - good["either_alone_at_10"])
    deaf = values(run_probes(asking(deaf_to_text)).single_modality)
    assert deaf["image_alone_at_10"] == deaf["composed_at_10"]
    assert deaf["only_composed_at_10"] == 0
    blind = values(run_probes(asking(reads_only)).single_modality)
    assert blind["text_alone_at_10"] == blind["composed_at_10"] > 0
    assert blind["composed_needlessly_at_10"] == 1


def test_what_a_query_leaves_out_is_left_out_of_the_single_modalities() -> None:
    """The image alone would find the reference itself first; where that is the answer's double, it is another matter."""
    asked: list[list[list[int]]] = []
    whole = asking(perfect)

    class Watched(Asking):
        def rank(self, references: Sequence[str | None], texts: Sequence[str], excluded: Sequence[Sequence[int]]) -> np.ndarray:
            asked.append([list(row) for row in excluded])
            ranked = super().rank(references, texts, excluded)
            assert all(not set(out) & set(row.tolist()) for out, row in zip(excluded, ranked, strict=True))
            return ranked

    run_probes(Watched(whole.queries, whole.found, whole.encode, whole.neutral, whole.labels))
    assert len(asked) == 6  # image, text, wordings, and three of negation
    assert all(len(row) == 1 for rows in asked for row in rows)


def test_paraphrases() -> None:
    steady = values(run_probes(asking(perfect)).paraphrases)
    assert steady["overlap_at_10"] == steady["same_outcome_at_10"] == steady["found_by_all_at_10"] == 1
    assert steady["range_of_precision_at_10"] == 0
    fickle_ones = values(run_probes(asking(fickle)).paraphrases)
    assert fickle_ones["overlap_at_10"] < 0.7
    assert fickle_ones["same_outcome_at_10"] < 0.5
    assert fickle_ones["found_by_any_at_10"] == 1
    assert fickle_ones["range_of_precision_at_10"] > 0.2
    none = run_probes(asking(perfect, wordings=False)).paraphrases
    assert "no triplet has `wordings`" in none.skipped
    assert none.figures == {}


def test_negation() -> None:
    hears, deaf = (values(run_probes(asking(model)).negation) for model in (perfect, deaf_to_not))
    assert hears["negated_hit_at_10"] == hears["affirmed_hit_at_10"] == 1
    assert hears["negated_precision_at_10"] > 0.9
    assert hears["shows_what_was_ruled_out"] < 0.2
    assert hears["overlap_without_the_not"] < 0.2 < 0.9 < deaf["overlap_without_the_not"]
    assert deaf["shows_what_was_ruled_out"] == deaf["shows_it_without_the_not"] > 0.7
    assert deaf["overlap_without_the_not"] == 1
    assert deaf["negated_precision_at_10"] < 0.4 < 0.9 < deaf["affirmed_precision_at_10"]
    assert set(run_probes(asking(perfect)).negation.by_attribute) == {"hue", "size"}
    assert hears["shows_it_by_chance"] == pytest.approx(0.375, abs=0.02)  # a quarter of hues, half of sizes


def test_leakage() -> None:
    keeps, forgets, deaf = (run_probes(asking(model)).leakage for model in (perfect, reads_only, deaf_to_text))
    assert values(keeps)["changed_unasked_at_1"] == 0
    assert values(keeps)["asked_not_met_at_1"] == 0
    assert values(forgets)["changed_unasked_at_10"] > 0.3  # the size is anything
    assert values(forgets)["asked_not_met_at_10"] < 0.2
    assert values(deaf)["asked_not_met_at_1"] == 1
    assert set(deaf.by_attribute) == {"hue", "size"}
    assert "changed_unasked_at_1" in deaf.by_attribute["size"]
    assert "asked_not_met_at_1" not in deaf.by_attribute["size"]  # no text asks for a size
    assert values(keeps)["changed_unasked_by_chance"] == pytest.approx(24 / 47, abs=1e-3)


def test_images_without_labels_are_not_looked_at() -> None:
    whole = asking(perfect)
    assert whole.labels is not None
    partly = tuple({} if at >= 24 else row for at, row in enumerate(whole.labels.attributes))
    labels = Labels(whole.labels.records, partly, None, whole.labels.grammar)
    report = run_probes(Asking(whole.queries, whole.found, whole.encode, whole.neutral, labels))
    assert values(report.leakage)["asked_not_met_at_1"] == values(report.leakage)["changed_unasked_at_1"] == 0
    assert report.leakage.figures["asked_not_met_at_1"].queries == 12  # red and green alone are labelled: 6 texts ask for each
    assert report.leakage.figures["changed_unasked_at_1"].queries == 6  # and of the references with labels, the red ones' answers are green
    bare = Labels(whole.labels.records, ({},) * 48, None, whole.labels.grammar)
    report = run_probes(Asking(whole.queries, whole.found, whole.encode, whole.neutral, bare))
    assert report.negation.skipped == report.leakage.skipped == "no image has attribute labels"


def test_without_labels_only_what_needs_none_is_asked() -> None:
    whole = asking(perfect)
    report = run_probes(Asking(whole.queries, whole.found, whole.encode, whole.neutral))
    assert report.single_modality.figures
    assert all(probe.skipped and not probe.figures for probe in (report.paraphrases, report.negation, report.leakage))


def test_secret_targets_cannot_be_probed() -> None:
    whole = asking(perfect)
    queries = QuerySet("test", tuple(Query(q.id, q.reference, q.text) for q in whole.queries.queries), whole.queries.gallery)
    with pytest.raises(InputError, match="test: 24 of 24 queries have no target that is known"):
        run_probes(Asking(queries, whole.found, whole.encode, whole.neutral))


def test_overlap_by_hand() -> None:
    one = np.asarray([[0, 1, 2], [3, -1, -1], [-1, -1, -1]])
    other = np.asarray([[2, 1, 9], [3, 4, -1], [-1, -1, -1]])
    assert overlap(one, other) == pytest.approx([2 / 4, 1 / 2, 1])
    assert overlap(one, other, depth=1) == pytest.approx([0, 1, 1])


# -- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


def test_the_command_reports_them(checkpoint: Path, garments: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(checkpoint), "--data", str(garments), "--probes"]
    assert evaluate.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["probes"]
    assert not any(report[name]["skipped"] for name in report)
    assert report["single_modality"]["figures"]["composed_at_10"]["queries"] == 24
    assert set(report["leakage"]["by_attribute"]) == {"colour", "shape", "pattern", "length"}
    assert evaluate.main(arguments) == 0
    printed = capsys.readouterr().out
    for question in ("Does it need both image and text?", "Does it understand what is ruled out?", "What changes that was not asked?"):
        assert question in printed
    assert "nan" not in printed


def test_a_checkpoint_is_asked_as_it_is_evaluated(checkpoint: Path, garments: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The encoder of the probes is the evaluation's: asked the queries themselves, it gives their embeddings."""
    from dqe_training.evaluation.protocol import load_evaluation_set
    from dqe_training.evaluation.rankers import ask, open_ranker

    evaluation = load_evaluation_set(garments)
    model = open_ranker(checkpoint)
    found = model(evaluation.queries, garments / "images", evaluation.gallery)
    means = ask(model, evaluation.queries, garments / "images", evaluation.gallery, found)
    again = means.encode([q.reference for q in evaluation.queries.queries], evaluation.queries.texts)
    np.testing.assert_allclose(again, found.queries, rtol=0, atol=1e-5)
    ranked = means.rank([q.reference for q in evaluation.queries.queries], evaluation.queries.texts, means.excluded)
    assert ranked.tolist() == found.ranked.tolist()
    neutral = means.encode([None] * 2, ["is red", "is red"])
    assert not np.allclose(neutral[0], again[0], atol=1e-3)
    np.testing.assert_array_equal(neutral[0], neutral[1])


def test_a_bundle_is_asked_too(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(build_tiny_bundle(tmp_path / "bundle")), "--data", str(garments), "--probes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["probes"]["negation"]["figures"]


def test_preferences_have_no_target_to_probe(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is encoded; the padding of a ranking, -1, is not the target that is missing."""
    write_hp_fashioniq(tmp_path / "hp")
    assert evaluate.main([str(checkpoint), "--data", str(tmp_path / "hp"), "--probes"]) == 2
    assert "12 of 12 queries have no target that is known" in capsys.readouterr().err


def test_a_public_dataset_is_asked_what_needs_no_labels(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cirr(tmp_path / "cirr")
    arguments = [str(checkpoint), "--data", str(tmp_path / "cirr"), "--probes"]
    assert evaluate.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    probes = report["sets"][0]["probes"]
    assert probes["single_modality"]["figures"]["composed_at_10"]["value"] == pytest.approx(report["sets"][0]["figures"]["recall_at_10"])
    assert probes["paraphrases"]["skipped"] == "this dataset does not say which texts are other words for the same"
    assert evaluate.main([*arguments, "--split", "test1", "--submission", str(tmp_path / "out")]) == 2
    assert "--probes needs targets" in capsys.readouterr().err
