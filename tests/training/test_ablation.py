"""Ablations without training: variants, grids, figures as ratios, and what the intervals claim."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

import msgspec
import pytest
from support.tiny_training import heads_alone, model_config, train_config, write_checkpoint

import dqe_engine
import dqe_training
from dqe_engine.contracts.parsing import parse_json, to_json
from dqe_engine.errors import InputError
from dqe_training.ablation import plan as plan_module
from dqe_training.ablation.comparison import compare_cells
from dqe_training.ablation.plan import Cell, Plan, make_plan
from dqe_training.ablation.results import CellResult, Ratio, cell_path, others_code, write_cell
from dqe_training.ablation.source_hash import hash_source, source_hash
from dqe_training.ablation.table import table
from dqe_training.ablation.variants import PARTS, apply_variant, parse_sweep, parse_variant
from dqe_training.cli.ablate import build_parser
from dqe_training.config import LossConfig, TrainConfig
from dqe_training.evaluation.metrics import PerQuery

# -- variants ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("baseline", {}),
        ("full", {"kl": "", "law": "", "trns": ""}),
        ("+kl", {"kl": ""}),
        ("baseline+law", {"law": ""}),
        ("+pool+law:unlabelled+trns:two-drops", {"pool": "", "law": "unlabelled", "trns": "two-drops"}),
        ("full+pool-trns+trns:random", {"kl": "", "law": "", "pool": "", "trns": "random"}),
        ("full-kl-law", {"trns": ""}),
        ("+pairwise+trns:two-drops", {"pairwise": "", "trns": "two-drops"}),
        ("+twopass+sprc:prompt+gist:relative", {"twopass": "", "sprc": "prompt", "gist": "relative"}),
    ],
)
def test_variants_by_name(name: str, parts: dict[str, str]) -> None:
    assert parse_variant(name) == parts


@pytest.mark.parametrize(
    "name",
    [
        "",
        "kl",
        "+KL",
        "full+kl",
        "baseline-kl",
        "+kl+kl",
        "full-",
        "best",
        "+kl,+law",
        "+kl:soft",
        "+law:",
        "+trns:-x",
        "+pool+cls",
        "+twopass+pool",
        "+two-drops",
        "+pairwise",
        "+pairwise+trns+kl",
        "+pairwise+trns+gist",
        "+sprc:rtc",
    ],
)
def test_what_is_no_variant(name: str) -> None:
    with pytest.raises(InputError, match="variant"):
        parse_variant(name)


def test_a_variant_has_its_parts_and_no_others() -> None:
    config = train_config(model_config(position_embeddings=40))
    for size in range(len(PARTS) + 1):
        for names in itertools.combinations(PARTS, size):
            parts = dict.fromkeys(names, "")
            try:
                assert parse_variant("+" + "+".join(names) if names else "baseline") == parts
            except InputError:  # two that exclude each other
                continue
            made = apply_variant(config, parts, name="x")
            assert (made.model.base_query == "pool") == ("pool" in parts)
            assert (made.loss.objective == "kl") == ("kl" in parts)
            assert made.model.attribute_weights == (made.loss.attribute_weight > 0) == (made.loss.presence_weight > 0) == ("law" in parts)
            assert made.trns.enabled == (made.loss.rank_weight > 0) == ("trns" in parts)
            assert (made.loss.objective == "pairwise") == (made.trns.warmup == "random") == ("pairwise" in parts)
            assert made.prompted == (made.loss.prompt_weight > 0) == (made.loss.align_weight > 0) == ("sprc" in parts)
            assert (made.loss.filter != "off") == ("gist" in parts)
            assert made.optim == config.optim
    assert apply_variant(config, parse_variant("full"), name="full") == config


def test_the_commands_help_names_every_part_and_option() -> None:
    told = build_parser().format_help()
    for part, options in PARTS.items():
        assert re.search(rf"^  ([a-z]+, )*{part}[, ]", told, re.MULTILINE), part
        assert [option for option in options if not re.search(rf":{option}\b", told)] == [], part


def config_of_sprc() -> TrainConfig:
    """Where one of the weights is set, and there is room for the prompts."""
    return train_config(model_config(position_embeddings=40), loss=LossConfig(prompt_weight=0.4))


def test_a_variant_that_cannot_be_is_one_line() -> None:
    with pytest.raises(InputError, match=r"variant '\+sprc': loss.prompt_weight puts 3 tokens into a text of 32") as caught:
        apply_variant(train_config(), {"sprc": ""}, name="+sprc")
    assert "\n" not in str(caught.value)


def test_options_of_the_parts() -> None:
    config = train_config()
    free = apply_variant(config, parse_variant("+law:unlabelled"), name="x")
    assert free.model.attribute_weights
    assert free.loss.attribute_weight == free.loss.presence_weight == 0
    constant = apply_variant(config, parse_variant("+law:constant"), name="x")
    assert constant == msgspec.structs.replace(free, model=msgspec.structs.replace(free.model, weights_from="constant"))
    assert apply_variant(config, parse_variant("+law:image"), name="x").model.weights_from == "text+image"
    alike, evenly = (apply_variant(config, parse_variant(name), name="x") for name in ("+kl", "+kl:uniform"))
    assert evenly == msgspec.structs.replace(alike, loss=msgspec.structs.replace(alike.loss, relevance_spread="uniform"))
    assert apply_variant(evenly, parse_variant("baseline"), name="x").loss.relevance_spread == "similarity"
    assert apply_variant(config, parse_variant("+cls"), name="x").model.base_query == "cls"
    assert apply_variant(config, parse_variant("full+twopass"), name="x").model.base_query == "two_pass"
    alone = {option: apply_variant(config_of_sprc(), {"sprc": option}, name="x").loss for option in PARTS["sprc"]}
    assert {option: (loss.prompt_weight, loss.align_weight) for option, loss in alone.items()} == {"prompt": (0.4, 0), "align": (0, 1)}
    for option in PARTS["gist"]:
        assert apply_variant(config, {"gist": option}, name="x").loss.filter == option
    made = {option: apply_variant(config, {"trns": option}, name="x") for option in ("", *PARTS["trns"])}
    assert made[""].trns == config.trns
    assert made["two-drops"].trns.rule == "two-drops"
    assert all(one != other for one, other in itertools.combinations(made.values(), 2))
    assert all(parse_json(TrainConfig, to_json(each), where="x") == each for each in made.values())


@pytest.mark.parametrize("option", ["unlabelled", "constant"])
def test_law_without_labels_begins_only_with_a_model_that_no_label_trained(option: str, tmp_path: Path) -> None:
    """The control of a comparison that begins with one checkpoint: the same model as +law, other losses."""
    starts = {on: write_checkpoint(tmp_path / str(on), model_config(attribute_weights=on)) for on in (True, False)}
    configs = {on: msgspec.structs.replace(train_config(), start=str(start)) for on, start in starts.items()}
    made, law = (apply_variant(configs[False], parse_variant(name), name=name) for name in (f"+law:{option}", "+law"))
    assert (made.model == law.model) == (option == "unlabelled")
    assert (made.loss.attribute_weight, made.loss.presence_weight) == (0, 0)
    assert min(law.loss.attribute_weight, law.loss.presence_weight) > 0
    with pytest.raises(
        InputError,
        match=rf"law:{option} must not have seen labels, but they may have trained the attribute weights of .*; train from scratch",
    ):
        apply_variant(configs[True], parse_variant(f"+law:{option}"), name=f"+law:{option}")


def test_heads_alone_are_compared_with_heads() -> None:
    config = heads_alone()
    assert apply_variant(config, {"law": ""}, name="+law").finetune == "attributes"
    with pytest.raises(InputError, match="variant 'baseline': finetune=attributes trains only what"):
        apply_variant(config, {}, name="baseline")


def test_settings_of_a_part_that_is_off_do_not_matter() -> None:
    config = train_config()
    other = msgspec.structs.replace(config, loss=LossConfig(relevance_share=0.3, attribute_margin=0.5))
    assert apply_variant(config, {}, name="x") == apply_variant(other, {}, name="x")
    assert apply_variant(config, {"kl": ""}, name="x") != apply_variant(other, {"kl": ""}, name="x")


def test_a_part_that_would_change_nothing_is_refused() -> None:
    config = msgspec.structs.replace(train_config(), loss=LossConfig(rank_weight=0, relevance_share=0))
    with pytest.raises(InputError, match=r"'\+trns': trns would change nothing, since loss.rank_weight is 0"):
        apply_variant(config, {"trns": ""}, name="+trns")
    with pytest.raises(InputError, match="relevance_share is 0"):
        apply_variant(config, {"kl": ""}, name="+kl")


# -- plans ---------------------------------------------------------------------------------------------------------------


def plan(config: TrainConfig | None = None, variants: str = "baseline,+trns", seeds: tuple[int, ...] = (0, 1), **options: object) -> Plan:
    chosen: dict[str, object] = {"budget": "steps", "identity": "data"} | options
    return make_plan(config or train_config(), variants.split(","), seeds, **chosen)  # type: ignore[arg-type]


def test_cells_come_seed_by_seed_and_keys_say_what_is_trained() -> None:
    made = plan()
    assert [(c.arm, c.seed) for c in made.cells] == [("baseline", 0), ("+trns", 0), ("baseline", 1), ("+trns", 1)]
    assert all(c.config.optim.seed == c.seed for c in made.cells)
    others = [plan(identity="other"), plan(train_config(epochs=4)), plan(budget="seconds", config=train_config(seconds=5.0))]
    keys = {cell.key for each in (made, *others) for cell in each.cells}
    assert len(keys) == 4 * len(made.cells)
    assert plan(seeds=(1, 2)).cells[0] == made.cells[2]


def test_equal_steps_ignore_the_clock_and_equal_seconds_need_it() -> None:
    assert plan(train_config(seconds=9.0)).cells == plan().cells
    with pytest.raises(InputError, match=r"--budget seconds needs .* optim.seconds=60"):
        plan(budget="seconds")
    with pytest.raises(InputError, match=r"--budget steps: optim.epochs must be at least 1"):
        plan(train_config(epochs=0, seconds=5.0))


def test_a_grid_leaves_alone_what_it_does_not_touch_and_says_what_it_leaves_out() -> None:
    made = plan(points=parse_sweep(["trns.zones.lo=0.05,0.3", "trns.zones.hi=0.1,0.5"]))
    labels = ["baseline", "+trns lo=0.05 hi=0.1", "+trns lo=0.05 hi=0.5", "+trns lo=0.3 hi=0.5"]
    assert [arm.label for arm in made.arms] == labels
    assert len(made.cells) == 2 * len(labels)
    (left_out,) = made.left_out
    assert left_out.startswith("lo=0.3 hi=0.1: zone bounds must satisfy lo <= hi")


def test_bad_plans_are_refused() -> None:
    with pytest.raises(InputError, match="train the same"):
        plan(variants="full,+kl+law+trns")
    with pytest.raises(InputError, match=r"\+trns is given twice"):
        plan(variants="+trns,+trns")
    with pytest.raises(InputError, match="1 is given twice"):
        plan(seeds=(1, 1))
    with pytest.raises(InputError, match=r"no point is a valid configuration; the first: .*valid keys of ZoneSpec"):
        plan(points=parse_sweep(["trns.zones.low=1,2"]))
    for axes, said in (
        (["a=1", "b=1", "c=1"], "3 keys"),
        (["a"], "expected section.key=value"),
        (["a=1,,2"], "expected section.key=value"),
        (["a=1", "a=2"], "a is given twice"),
    ):
        with pytest.raises(InputError, match=said):
            parse_sweep(axes)


def test_other_code_makes_other_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell of a method that has changed since is never taken for one of today's."""
    before = plan()
    assert plan().cells == before.cells
    monkeypatch.setattr(plan_module, "source_hash", lambda: "another")
    assert not {cell.key for cell in plan().cells} & {cell.key for cell in before.cells}


def test_other_weights_to_begin_with_make_other_cells(tmp_path: Path) -> None:
    """The configuration has only the place where they lie."""
    (tmp_path / "tower").mkdir()
    tower = tmp_path / "tower" / "vision.safetensors"
    tower.write_bytes(b"one")
    start = write_checkpoint(tmp_path / "start")
    configs = [
        msgspec.structs.replace(train_config(), **{key: str(path)}) for key, path in (("vision_weights", tower.parent), ("start", start))
    ]
    before = [{cell.key for cell in plan(config).cells} for config in configs]
    assert [{cell.key for cell in plan(config).cells} for config in configs] == before
    tower.write_bytes(b"two")
    shutil.rmtree(start)
    write_checkpoint(start, model_config(embedding_dim=12))
    assert not any({cell.key for cell in plan(config).cells} & keys for config, keys in zip(configs, before, strict=True))


@pytest.mark.parametrize(
    ("package", "changed", "matters"),
    [
        ("dqe_training", "losses/kl_relevance.py", True),
        ("dqe_training", "evaluation/metrics.py", True),
        ("dqe_training", "ablation/scores.py", True),
        ("dqe_engine", "zones/mining.py", True),
        ("dqe_engine", "preprocessing.py", True),
        ("dqe_engine", "errors.py", True),
        ("dqe_engine", "device_arrays.py", True),
        ("dqe_training", "weights/garments/vision.safetensors", True),
        ("dqe_training", "presets/garments.yaml", True),
        ("dqe_training", "cli/ablate.py", False),
        ("dqe_training", "ablation/table.py", False),
        ("dqe_engine", "engine.py", False),
    ],
)
def test_the_code_is_what_trains_and_evaluates(package: str, changed: str, matters: bool, tmp_path: Path) -> None:
    roots = {name: tmp_path / name for name in ("dqe_training", "dqe_engine")}
    for module in (dqe_training, dqe_engine):
        assert module.__file__ is not None
        shutil.copytree(Path(module.__file__).parent, roots[module.__name__], ignore=lambda at, names: {n for n in names if "." in n[:-3]})
    before = hash_source(roots["dqe_training"], roots["dqe_engine"])
    with open(roots[package] / changed, "a") as stream:
        stream.write("# one word more\n")
    assert (hash_source(roots["dqe_training"], roots["dqe_engine"]) != before) == matters


# -- the page ------------------------------------------------------------------------------------------------------------


def result(cell: Cell, hits: list[int]) -> CellResult:
    return CellResult(
        key=cell.key, seed=cell.seed, config=cell.config, steps=10, seconds=2.0, refreshes=1, code="",
        machine="a machine",
        scores={"recall_at_10": Ratio.of(PerQuery.of(hits))},
    )  # fmt: skip


def test_the_table_says_what_can_be_concluded() -> None:
    made = plan(seeds=(0, 1, 2))
    hits = {"baseline": [0, 0, 0, 1] * 50, "+trns": [1, 1, 1, 0] * 50}
    results = {cell.key: result(cell, hits[cell.arm]) for cell in made.cells}
    page = table(compare_cells(made, results, data="tiny"))
    assert "| baseline | 3 | 10 | 2 | 1 | 25.0 |" in page
    assert "**+50.0 [+38.0, +62.0]**" in page
    assert "Against baseline: +trns R@10 higher." in page
    (told,) = [line for line in page.splitlines() if line.startswith("| +trns | ") and "=" in line]
    assert {"trns.enabled=true", "loss.rank_weight=0.5", "trns.zones.hi=0.5"} <= set(told.split(" | ")[1].removesuffix(" |").split(", "))
    assert "optim.seed" not in page
    same = {cell.key: result(cell, hits["baseline"]) for cell in made.cells}
    assert "No figure of any arm differs measurably from baseline's." in table(compare_cells(made, same, data="tiny"))


def test_what_is_no_share_has_a_table_of_its_own() -> None:
    made = plan(seeds=(0, 1, 2))
    gap = {"baseline": -0.0125, "+trns": 0.0375}
    results = {
        cell.key: msgspec.structs.replace(
            result(cell, [0, 1]),
            scores={"recall_at_10": Ratio.of(PerQuery.of([0, 1] * 50)), "train_score_gap": Ratio.of(PerQuery.of([gap[cell.arm]] * 50))},
        )
        for cell in made.cells
    }
    shares, cosines = table(compare_cells(made, results, data="tiny")).split("Differences of cosines, as they are:")
    assert "over unlabelled" not in shares
    assert "| baseline | −0.0125 |" in cosines
    assert "| +trns | 0.0375 |" in cosines
    assert "| +trns | **+0.0500 [+0.0500, +0.0500]** |" in cosines


def test_a_figure_is_stored_by_query() -> None:
    figure = PerQuery.of([0.25, float("nan"), 1 / 3], [1, 0, 1])
    again = parse_json(Ratio, to_json(Ratio.of(figure)), where="a cell").figure
    assert again.denominator.tolist() == [1, 0, 1]
    assert again.numerator.tolist() == [0.25, 0, 0.333333]


def test_cells_of_other_code_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third, fourth = plan(seeds=(0, 1)).cells
    assert others_code(tmp_path, [first]) == 0
    for cell in (first, second):
        write_cell(tmp_path, cell, msgspec.structs.replace(result(cell, [0, 1]), code=source_hash()))
    write_cell(tmp_path, third, result(third, [0, 1]))
    cell_path(tmp_path, fourth).write_text('{"schema_version": 0}')
    assert others_code(tmp_path, [first]) == 2, "second is of this code: the command asks for other cells"
    assert others_code(tmp_path, [first, third]) == 1


def test_the_table_of_what_is_not_finished() -> None:
    made = plan()
    assert table(compare_cells(made, {}, data="tiny")) == "No cell is finished yet.\n"
    first = {cell.key: result(cell, [0, 1]) for cell in made.cells[:2]}
    page = table(compare_cells(made, first, data="tiny"))
    assert "**2 cells are not finished**" in page
    assert "nothing can be concluded" in page
    uneven = {cell.key: result(cell, [0, 1]) for cell in made.cells[:3]}  # the baseline has a seed more: pairs alone are compared
    (arm,) = [arm for arm in compare_cells(made, uneven, data="tiny").arms if arm.differences]
    assert (arm.label, arm.differences["recall_at_10"].seeds) == ("+trns", 1)
