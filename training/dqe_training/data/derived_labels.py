"""Values of a target's attributes, derived from the texts that ask for it: "is red" says that the target's colour is red.

A label that is wrong teaches the margin loss to push a target away from its like, and a missing one costs little. So the
rules take a value only where the text gives it to the thing itself, and they know no more English than that needs:

- *Denied* by `not`, `no`, `without`, `neither`, `except`, `avoid`, `instead of`, `rather than`, `other than`, `anything but` before it,
  up to the end of the clause; as what is replaced: "replace red with blue", "red is replaced by blue"; and by "is not" behind it.
- *Left out* behind `less`, `fewer`, `than`, `from`, `too`, `as`: neither "less red" nor "as red as that one" says what the colour is.
- *Of a part*: a value that describes another noun ("red logo", "white stripes") is not the thing's. Nouns that it may
  describe are the vocabulary's `subjects` ("red dress") and its own attribute's words ("red color", "striped pattern").
- *Of a place*: "white on the sides", "long in the back".
- *By the way*: behind `has`, `with`, `on`, … a bare adjective is a part's or a second one ("black with red"). A part that
  is itself a value ("has stripes", "with long sleeves") counts there too.
- *Of the other one*: "the black shirt has …" as often means the reference.
- What two texts, or two places of one text, say of an attribute must agree, and neither may deny what the other states:
  otherwise the value is unknown. "Red instead of blue" is red, "black and white" is unknown.

docs/attributes.md has the precision of these rules on FashionIQ, judged by hand, and the errors that are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from dqe_engine.contracts.vocabulary import AttributeVocabulary, Mention, tokens_of

from .records import TripletRecord

Polarity = Literal["stated", "denied", "open"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STOPS = frozenset(".;!?:")
_DENIES = _words(
    "not no non without isn isnt doesn doesnt aren arent wasn weren don dont didn hasn haven cannot cant shouldn shouldnt mustn couldn "
    "wouldn won never nothing none neither nor minus lacks lacking remove removes removing unlike except excepting exclude excludes "
    "excluding avoid avoids avoiding omit omits ditch skip dislike dislikes hate hates besides barely hardly ain"
)
_LEAVES_OPEN = _words("less fewer than from if similar compared different as too substitute substituted previously formerly originally")
_REPLACES = _words(
    "replace replaces replaced replacing swap swaps swapped swapping change changes changed changing turn turns turned turning "
    "exchange exchanged trade traded convert converted"
)
_BY = _words("with for by to into")
"""Between what is replaced and what it is replaced by."""
_GOES = _words("replaced swapped exchanged removed avoided excluded omitted")
_ANYTHING = _words("anything everything all")
_JOINS = _words("and or & /")
_RESUMES = _words(
    "is are has have had it its the a an with in more less but comes looks features shows does no not without slightly also much"
)
"""After "and", these begin a new clause, which a negation before it does not reach."""
_BEING = _words("is are was be being been looks look appears becomes made")
_HAVING = _words(
    "has have had having with w wth on of contains features featuring picturing wearing covering shows show includes add adds added "
    "plus for by at under over around like says saying reads"
)
_SUBJECT_PRONOUNS = _words("it its they this that these which and but also now still he she s image target desired")
_PLACES = _words("on at around down across along under near below above inside over up through")
_SIDES = _words("the front back middle center centre top bottom places side")
_OF_KIND = _words("shade shades color colour hue tone kind type style version pattern print")
_ENDS_NOUN_PHRASE = _STOPS | _DENIES | _LEAVES_OPEN | _REPLACES | _GOES | _JOINS | _BEING | _HAVING | _words(
    ", but in to the a an more most very it its that which this while as so too also though only just w instead rather when"
)  # fmt: skip


class _Item(NamedTuple):
    """A phrase of the vocabulary, or one other token."""

    text: tuple[str, ...]
    mention: Mention | None = None

    @property
    def last(self) -> str:
        return self.text[-1]

    def names(self, attribute: int) -> bool:
        return self.mention is not None and any(m.attribute == attribute for m in self.mention.meanings)

    def value_of(self, attribute: int) -> bool:
        return self.mention is not None and any(m.attribute == attribute and m.value >= 0 for m in self.mention.meanings)


class _Reader:
    """One text, read by the rules above."""

    def __init__(self, text: str, vocabulary: AttributeVocabulary) -> None:
        self._subjects, self._parts = frozenset(vocabulary.subjects), frozenset(vocabulary.parts)
        tokens = tokens_of(text)
        self.items: list[_Item] = []
        at = 0
        for mention in vocabulary.mentions(tokens):
            self.items += [_Item((token,)) for token in tokens[at : mention.start]]
            self.items.append(_Item(tuple(tokens[mention.start : mention.stop]), mention))
            at = mention.stop
        self.items += [_Item((token,)) for token in tokens[at:]]

    def _is(self, at: int, words: frozenset[str]) -> bool:
        """Whether there is an item at `at`, it is no phrase, and it is one of `words`."""
        return 0 <= at < len(self.items) and self.items[at].mention is None and self.items[at].last in words

    def polarity(self, at: int) -> Polarity:
        if self._is_ruled_out_behind(at):
            return "denied"
        for left in range(at - 1, -1, -1):
            word = self.items[left].last
            if self.items[left].mention is not None:
                beside = left == at - 2 and self._is(at - 1, _JOINS) and self._is_part(self.items[at])
                if self.items[left].text[0] in _DENIES and beside:
                    return "denied"  # "no sleeves and collar"
                continue
            if word == "but" and self._is_anything_but(left):
                return "denied"
            if word in _STOPS or word in ("but", "with", ",") or (word in _JOINS and self._is(left + 1, _RESUMES)):
                return "stated"
            if word in _DENIES or (word in ("of", "than") and self._is(left - 1, _words("instead rather other"))):
                return "denied"
            if word == "from" and any(self._is(between, _words("to into")) for between in range(left + 1, at)):
                return "stated"  # "from blue to red"
            if word in _REPLACES:
                return "stated" if any(self._is(between, _BY) for between in range(left + 1, at)) else "denied"
            if word in _LEAVES_OPEN and not self._is_as_well_as(left):
                return "open"
            if word == "instead":
                return "stated"
        return "stated"

    def _is_ruled_out_behind(self, at: int) -> bool:
        """Whether what follows the value takes it away: "red is not wanted", "red is replaced by blue"."""
        behind = at + 1
        while self._is(behind, _BEING | _words("should must")):
            behind += 1
        denied = self._is(at + 1, _words("isn isnt")) or (behind > at + 1 and self._is(behind, _words("not never")))
        return self._is(behind, _GOES) or (denied and not self._is_predicate(at))

    def _is_predicate(self, at: int) -> bool:
        """Whether a verb is before the value in its clause: "is red is not long"."""
        for left in range(at - 1, -1, -1):
            if self._is(left, _STOPS | _words(", but")):
                return False
            if self._is(left, _BEING):
                return True
        return False

    def _is_anything_but(self, at: int) -> bool:
        """Whether the "but" at `at` takes away from what is before: "anything but", "any colour but"."""
        return self._is(at - 1, _ANYTHING) or self._is(at - 2, _words("any every"))

    def _is_as_well_as(self, at: int) -> bool:
        """Whether the word at `at` is an "as" of "as well as", which joins and does not compare."""
        well = _words("well")
        return self._is(at, _words("as")) and (self._is(at - 1, well) or self._is(at + 1, well))

    def _is_replaced(self, at: int, attribute: int) -> bool:
        """Whether the word at `at` stands before what the thing's own value is replaced by: "replace red with", "red is replaced by",
        but not "replace the logo with"."""
        if not self._is(at, _BY):
            return False
        last = at - 1
        if self._is(last, _REPLACES):  # "red is replaced by"
            last -= 1
            while self._is(last, _BEING):
                last -= 1
        elif not any(self._is(left, _REPLACES) for left in range(last)):
            return False
        if last < 0:
            return False
        item = self.items[last]
        return item.names(attribute) or (item.mention is None and item.last in self._subjects)

    def _is_part(self, item: _Item) -> bool:
        return item.last in self._parts

    def _head(self, at: int, attribute: int) -> tuple[int, list[_Item]]:
        """Position of the last item of the noun phrase that begins at `at`, and the items between."""
        head, between = at, []
        while head + 1 < len(self.items):
            if self._is(head + 1, _JOINS) and head + 2 < len(self.items) and self.items[head + 2].value_of(attribute):
                head += 2  # "black and white stripes": both describe what follows
            elif self.items[head + 1].mention is None and self.items[head + 1].last in _ENDS_NOUN_PHRASE:
                break
            else:
                head += 1
            between.append(self.items[head])
        return head, between[:-1]

    def _governor(self, at: int, attribute: int) -> Literal["being", "having"]:
        """Whether the value at `at` is what the thing is, or what it has."""
        for left in range(at - 1, -1, -1):
            item, before = self.items[left], self.items[left - 1] if left else None
            word = item.last
            if item.mention is not None:
                continue
            if word in _STOPS:
                return "being"
            if word in _BEING:
                if left > 1 and self._is(left - 1, frozenset(("that", "which"))):
                    before = self.items[left - 2]  # "sleeves that are long"
                return "being" if before is None or self._may_be(before, attribute) else "having"
            if self._is_replaced(left, attribute):
                return "being"
            if word == "of" and before is not None and before.last in _OF_KIND:
                continue
            if word == "in":
                clear = before is None or before.last in _BEING | _JOINS | self._subjects | {"comes", "come", ","}
                return "being" if clear or (before is not None and before.mention is not None and not self._is_part(before)) else "having"
            if word in _HAVING or (word == "to" and before is not None and self._is_part(before) and not before.names(attribute)):
                return "having"  # "change the logo to red"
        return "being"

    def _may_be(self, subject: _Item, attribute: int) -> bool:
        """Whether `X is red`, with this `X`, speaks of the thing itself."""
        if subject.mention is not None:
            return not self._is_part(subject) or subject.names(attribute)
        return subject.last in self._subjects or subject.last in _SUBJECT_PRONOUNS or subject.last in _STOPS | {","}

    def gives(self, at: int, attribute: int) -> bool:
        """Whether the value at `at` is given to the thing itself, by the rules but those of negation."""
        value = self.items[at]
        head, between = self._head(at, attribute)
        last = self.items[head]
        if self._is_part(value):  # "a graphic", "graphic tee"; but an "animal print pocket" is a pocket
            return last.mention is not None or last.last in self._subjects
        if any(self._is_part(item) and len(item.text) == 1 and not item.names(attribute) for item in between):
            return False  # "black stripe shirt"; but "black v neck shirt" is black
        if head > at and last.names(attribute) and not last.value_of(attribute):
            return True  # "red color", "striped pattern"
        if head > at and (self._is_part(last) or (last.mention is None and last.last not in self._subjects)):
            return False
        if self._is(head + 1, _PLACES) or (self._is(head + 1, frozenset(("in",))) and self._is(head + 2, _SIDES)):
            return False
        if self._is(head + 1, _BEING | _HAVING) and self._begins_with_the(at):
            return False
        return self._governor(at, attribute) == "being"

    def _begins_with_the(self, at: int) -> bool:
        """Whether the noun phrase around `at` is "the …": before a verb that is as often the reference as the target."""
        first = at
        while first > 0 and not (self.items[first - 1].mention is None and self.items[first - 1].last in _ENDS_NOUN_PHRASE):
            first -= 1
        return self._is(first - 1, frozenset(("the",)))


class Said(NamedTuple):
    """What a text says of one attribute: positions of the values that it gives to the target, and that it denies it."""

    stated: frozenset[int] = frozenset()
    denied: frozenset[int] = frozenset()

    def both(self, other: Said) -> Said:
        """What two texts say together."""
        return Said(self.stated | other.stated, self.denied | other.denied)

    @property
    def value(self) -> int:
        """The one value stated and not denied, else -1."""
        return next(iter(self.stated)) if len(self.stated) == 1 and not self.stated & self.denied else -1


def read_text(text: str, vocabulary: AttributeVocabulary) -> tuple[Said, ...]:
    """For each attribute, what `text` says of the target's value."""
    reader = _Reader(text, vocabulary)
    stated: list[set[int]] = [set() for _ in vocabulary.attributes]
    denied: list[set[int]] = [set() for _ in vocabulary.attributes]
    for at, item in enumerate(reader.items):
        for attribute, value in item.mention.meanings if item.mention else ():
            if value < 0:
                continue
            polarity = reader.polarity(at)
            if polarity == "denied":
                denied[attribute].add(value)
            elif polarity == "stated" and reader.gives(at, attribute):
                stated[attribute].add(value)
    return tuple(Said(frozenset(s), frozenset(d)) for s, d in zip(stated, denied, strict=True))


def statements(record: TripletRecord) -> tuple[str, ...]:
    """The triplet's texts, without those that only join two others: FashionIQ's "C1 and c2" beside C1 and C2, whose clauses
    would run into one another."""
    texts = tuple(dict.fromkeys(text.lower() for text in (record.text, *record.wordings)))

    def joins(text: str) -> bool:
        first = [other for other in texts if text.startswith(other) and other != text]
        return any(text.endswith(other) and len(one) + len(other) < len(text) for one in first for other in texts)

    return tuple(text for text in texts if not joins(text))


def read_triplet(record: TripletRecord, vocabulary: AttributeVocabulary) -> tuple[Said, ...]:
    """What all the texts of a triplet say of its target, attribute by attribute."""
    said = [Said() for _ in vocabulary.attributes]
    for text in statements(record):
        said = [one.both(other) for one, other in zip(said, read_text(text, vocabulary), strict=True)]
    return tuple(said)


def derive_labels(records: Iterable[TripletRecord], vocabulary: AttributeVocabulary) -> dict[str, list[int]]:
    """(A,) value positions for each target of a triplet without stated `attributes`, -1 where its texts give none or disagree.

    A target's label is of all its triplets together.
    """
    said: dict[str, Sequence[Said]] = {}
    for record in records:
        if record.attributes is None:
            found = read_triplet(record, vocabulary)
            before = said.get(record.target)
            said[record.target] = found if before is None else [one.both(other) for one, other in zip(before, found, strict=True)]
    return {target: [one.value for one in found] for target, found in said.items()}
