"""Modification texts for `garments`: what changes, in many wordings, and what the text leaves valid."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from dqe_engine.errors import InputError

from .catalog import COLOURS, LENGTHS, LIGHTNESS, LIGHTNESS_STEP, PATTERNS, SHAPES, Garment

_COLOUR_WORDS = {"red": ("red", "scarlet"), "grey": ("grey", "gray"), "teal": ("teal", "turquoise"), "purple": ("purple", "violet")}
_SHAPE_WORDS = {
    "t-shirt": ("t-shirt", "tee"),
    "coat": ("coat", "overcoat"),
    "kimono": ("kimono", "robe"),
    "poncho": ("poncho", "cape"),
    "dress": ("dress", "gown"),
    "trousers": ("trousers", "pants"),
    "dungarees": ("dungarees", "overalls"),
}
_PATTERN_PHRASES = {
    "plain": ("is plain", "has no pattern", "is a solid colour", "without any pattern", "make it plain"),
    "striped": ("is striped", "has stripes", "with stripes", "make it striped", "with a striped pattern"),
    "dotted": ("is dotted", "has dots", "has polka dots", "with spots on it", "with a dotted pattern"),
    "checked": ("is checked", "has checks", "with a gingham look", "make it checked", "with a checked pattern"),
    "zigzag": ("has zigzags", "with a zigzag pattern", "has a chevron pattern", "make it zigzag"),
}
_LENGTH_PHRASES = {
    "cropped": ("is cropped", "make it cropped", "in a cropped cut", "is cut very short"),
    "regular": ("is regular length", "in a regular cut", "make it mid-length"),
    "long": ("is long", "is full length", "in a long cut", "make it long", "is maxi"),
}
_COLOUR_FORMS = (
    "is {new}", "in {new}", "make it {new}", "is {new} instead of {old}", "change the colour to {new}", "has a {new} color",
    "the same but in {new}", "is more {new}", "i want a {new} one", "{new}", "not {old} but {new}",
)  # fmt: skip
_SHADE_FORMS = ("is {}", "is {} in colour", "in a {} shade")
_SHAPE_FORMS = (
    "is a {new}", "make it a {new} instead", "is a {new} not a {old}", "turn it into a {new}", "the same look but as a {new}",
    "i want a {new}", "is a {new} and not a {old}", "as a {new}", "change the {old} to a {new}",
)  # fmt: skip
_SHAPE_PLURAL = {"trousers", "pants", "dungarees", "overalls"}
# Said at times with a single change: names an attribute that stays, so that naming words alone do not mean a change.
_KEEP = {
    "colour": ("same colour but {}", "keep the colour, {}"),
    "shape": ("same shape but {}", "the same kind of garment, {}"),
    "pattern": ("same pattern but {}", "keep the pattern, {}"),
    "length": ("same length but {}",),
}
_JOIN = ("{} and {}", "{}, {}", "{} and also {}", "{}. {}")
_JOIN_VERB = (*_JOIN, "{} and it {}")  # where the second phrase starts with a verb of its own

_STATEMENTS = {
    "plain": (("is plain", "is not plain"), ("is a solid colour", "is not a solid colour")),
    "striped": (("is striped", "is not striped"), ("with stripes", "without stripes")),
    "dotted": (("is dotted", "is not dotted"), ("with dots", "without dots")),
    "checked": (("is checked", "is not checked"), ("with checks", "without checks")),
    "zigzag": (("has zigzags", "has no zigzags"), ("with zigzags", "without zigzags")),
    "cropped": (("is cropped", "is not cropped"), ("in a cropped cut", "not in a cropped cut")),
    "regular": (("is regular length", "is not regular length"), ("in a regular cut", "not in a regular cut")),
    "long": (("is long", "is not long"), ("in a long cut", "not in a long cut")),
}

Allowed = dict[str, tuple[str, ...]]


class Modification(NamedTuple):
    """`text`; `allowed` values per attribute (attributes not in it stay as in the reference); `named`: what changes."""

    text: str
    allowed: Allowed

    @property
    def named(self) -> tuple[str, ...]:
        return tuple(self.allowed)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _other(rng: np.random.Generator, options: tuple[str, ...], current: str) -> str:
    return _pick(rng, tuple(option for option in options if option != current))


def _colour_change(reference: Garment, rng: np.random.Generator, relative: float) -> tuple[str, tuple[str, ...]]:
    if rng.uniform() < relative:
        darker, lighter = _shades(reference.colour).values()
        word, values = ("darker", darker) if (rng.uniform() < 0.5 or not lighter) and darker else ("lighter", lighter)
        return _pick(rng, _SHADE_FORMS).format(word), values
    new = _other(rng, tuple(COLOURS), reference.colour)
    words = {value: _pick(rng, _COLOUR_WORDS.get(value, (value,))) for value in (new, reference.colour)}
    return _pick(rng, _COLOUR_FORMS).format(new=words[new], old=words[reference.colour]), (new,)


def _shape_change(reference: Garment, rng: np.random.Generator, relative: float) -> tuple[str, tuple[str, ...]]:
    new = _other(rng, SHAPES, reference.shape)
    words = {value: _pick(rng, _SHAPE_WORDS.get(value, (value,))) for value in (new, reference.shape)}
    text = _pick(rng, _SHAPE_FORMS).format(new=words[new], old=words[reference.shape])
    return _without_article(text, tuple(words.values())), (new,)


def _pattern_change(reference: Garment, rng: np.random.Generator, relative: float) -> tuple[str, tuple[str, ...]]:
    new = _other(rng, PATTERNS, reference.pattern)
    return _pick(rng, _PATTERN_PHRASES[new]), (new,)


def _length_change(reference: Garment, rng: np.random.Generator, relative: float) -> tuple[str, tuple[str, ...]]:
    if rng.uniform() < relative:
        rank = LENGTHS.index(reference.length)
        shorter = rank == len(LENGTHS) - 1 or (rank > 0 and rng.uniform() < 0.5)
        return ("is shorter", LENGTHS[:rank]) if shorter else ("is longer", LENGTHS[rank + 1 :])
    new = _other(rng, LENGTHS, reference.length)
    return _pick(rng, _LENGTH_PHRASES[new]), (new,)


_CHANGES = {"colour": _colour_change, "shape": _shape_change, "pattern": _pattern_change, "length": _length_change}


def modify(reference: Garment, rng: np.random.Generator, *, two: float = 0.45, relative: float = 0.06) -> Modification:
    """A modification of `reference`: one attribute, or two with probability `two`.

    `relative` is the share of colour and length changes said as a comparison ("is darker"), which leaves several
    values valid.
    """
    names = [str(name) for name in rng.permutation(list(_CHANGES))]
    chosen = names[: 2 if rng.uniform() < two else 1]
    phrases, allowed = [], {}
    for name in chosen:
        phrase, allowed[name] = _CHANGES[name](reference, rng, relative)
        phrases.append(phrase)
    return Modification(_whole(phrases, tuple(chosen), tuple(names), rng), allowed)


def _whole(phrases: list[str], chosen: tuple[str, ...], names: tuple[str, ...], rng: np.random.Generator) -> str:
    """One text of one or two `phrases`, which change the attributes `chosen`; at times it says that one of `names` stays."""
    if len(phrases) == 2:
        joins = _JOIN_VERB if phrases[1].startswith(("is ", "has ")) else _JOIN
        return _pick(rng, joins).format(*phrases)
    if rng.uniform() < 0.15:
        kept = next(name for name in names if name not in chosen)
        return _pick(rng, _KEEP[kept]).format(phrases[0])
    return phrases[0]


def reword(reference: Garment, allowed: Allowed, rng: np.random.Generator) -> str:
    """A text of this grammar that leaves exactly `allowed` valid for `reference`: what `modify` could have said instead.

    Raises InputError where the grammar has no words for `allowed`: no such change of one or two attributes.
    """
    names = tuple(str(name) for name in rng.permutation(list(_CHANGES)))
    chosen = tuple(name for name in names if name in allowed)
    if not 1 <= len(chosen) == len(allowed) <= 2:
        raise InputError(f"no text changes {', '.join(allowed) or 'nothing'}; expected one attribute or two of {', '.join(_CHANGES)}")
    return _whole([_pick(rng, phrases(reference, name, allowed[name])) for name in chosen], chosen, names, rng)


def phrases(reference: Garment, name: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """Every phrase that leaves `values` of the attribute `name` valid, each once. Raises InputError where there is none."""
    old = getattr(reference, name)
    found: list[str] = []
    if len(values) == 1 and values[0] != old:
        (new,) = values
        if name == "colour":
            pairs = itertools.product(_COLOUR_WORDS.get(new, (new,)), _COLOUR_WORDS.get(old, (old,)))
            found += [form.format(new=one, old=other) for one, other in pairs for form in _COLOUR_FORMS]
        elif name == "shape":
            pairs = itertools.product(_SHAPE_WORDS.get(new, (new,)), _SHAPE_WORDS.get(old, (old,)))
            found += [_without_article(form.format(new=one, old=other), (one, other)) for one, other in pairs for form in _SHAPE_FORMS]
        else:
            found += (_PATTERN_PHRASES if name == "pattern" else _LENGTH_PHRASES)[new]
    if name == "colour":
        found += [form.format(word) for word, colours in _shades(old).items() if set(colours) == set(values) for form in _SHADE_FORMS]
    if name == "length":
        rank = LENGTHS.index(old)
        ways = {"is shorter": LENGTHS[:rank], "is longer": LENGTHS[rank + 1 :]}
        found += [phrase for phrase, lengths in ways.items() if set(lengths) == set(values)]
    if not found:
        raise InputError(f"{name}: no words for {', '.join(values) or 'no value'} instead of {old}")
    return tuple(dict.fromkeys(found))


def _shades(colour: str) -> dict[str, tuple[str, ...]]:
    """What "darker" and "lighter" than a colour leave valid."""
    level = LIGHTNESS[colour]
    return {
        "darker": tuple(c for c in COLOURS if LIGHTNESS[c] < level - LIGHTNESS_STEP),
        "lighter": tuple(c for c in COLOURS if LIGHTNESS[c] > level + LIGHTNESS_STEP),
    }


def _without_article(text: str, words: tuple[str, ...]) -> str:
    for plural in _SHAPE_PLURAL & set(words):
        text = text.replace(f"a {plural}", plural)
    return text


def statements(name: str, value: str) -> tuple[tuple[str, str], ...]:
    """Pairs of a text that asks for `value` and the same text negated; as many, and in the same order, for every value of an attribute.

    The triplets negate nothing alone: no training text is among the negated ones.
    """
    if name == "colour":
        return ((f"is {value}", f"is not {value}"), (value, f"not {value}"))
    if name == "shape":
        said = _without_article(f"a {value}", (value,))
        return ((f"is {said}", f"is not {said}"), (f"as {said}", f"not as {said}"))
    return _STATEMENTS[value]
