"""The model card of a published bundle: README.md with what its manifest says, the same for the same manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dqe_engine.contracts.manifest import BundleManifest, GraphParity

CARD_FILE = "README.md"
GENERATED = "<!-- written by dqe-export from manifest.json; remove this line to keep your own text -->"
_HEAD = """\
---
library_name: dqe-engine
tags:
- composed-image-retrieval
- image-retrieval
- dqe-cir
- onnx
---
"""
_TARGETS = {"cpu": "CPUs", "cuda": "GPUs"}
_QUERIES = {
    "mean": "the mean of the fused query tokens (QuRe's)",
    "cls": "the text's [CLS], fused with the image",
    "pool": "an attention pool over the fused tokens",
    "two_pass": "the text's [CLS] of a second pass over the fused query tokens (SPRC's)",
    "two_encoders": "the text's [CLS] of a second pass through a Q-Former of its own (SPN4CIR's)",
    "zero_shot": "the embeddings of image and text added; not trained for composed retrieval",
}


def model_card(manifest: BundleManifest, repository: str) -> str:
    """The card of the bundle as "OWNER/NAME", in Markdown."""
    return "\n\n".join((_HEAD + GENERATED, *_sections(manifest, repository))) + "\n"


def _sections(manifest: BundleManifest, repository: str) -> Iterator[str]:
    yield f"# {_plain(manifest.name)}"
    yield (
        "A model for composed image retrieval: a reference image and a text that says what should differ, such as “the same, in red”, find "
        "the images that fit both. It is a bundle of ONNX graphs for dqe-engine, which runs it without PyTorch. It holds no code and no "
        "pickle, and every file is verified against `manifest.json` before it is loaded."
    )
    yield "## Load it"
    yield (
        "```python\nfrom dqe_engine import Query, RetrievalEngine  # the extras cpu and hub\n"
        f'engine = RetrievalEngine.load("hf://{repository}")\nengine.index_images("photos")\n```'
    )
    yield (
        'Then `engine.search(Query(image=Path("photo.jpg"), text="in red"))` gives the hits. Add `@` and a commit to the name to stay with '
        "one version."
    )
    yield "## Intended use"
    yield (
        "Search in collections of images like those that the model was trained on. Scores order the images of one collection; they are no "
        "probabilities. What the model has not seen in training it finds badly, and what its training data associates it repeats: look at "
        "results before others rely on them. It is not made to identify people, nor to decide about them."
    )
    yield "## Base model"
    yield "\n".join(_base(manifest))
    yield "## Attributes"
    yield _attributes(manifest)
    yield "## Precision and parity"
    size = sum(file.size for file in manifest.files) / 1e6
    yield f"Weights and arithmetic: {manifest.precision}, graphs for {_TARGETS[manifest.target]}, {size:.1f} MB."
    if rows := [_parity(parity) for parity in manifest.parity if parity.outputs]:
        yield "Differences from PyTorch, as measured when it was exported:"
        yield _table(("graph", "largest error", "smallest cosine"), rows)
        yield f"Allowed are {manifest.tolerance.max_error:g} and {manifest.tolerance.min_cosine:g}."
    yield "## Evaluation"
    yield _evaluation(manifest)


def _parity(parity: GraphParity) -> tuple[str, str, str]:
    outputs = parity.outputs.values()
    return parity.graph, f"{max(output.max_error for output in outputs):.1e}", f"{min(output.cosine_min for output in outputs):.6f}"


def _base(manifest: BundleManifest) -> Iterator[str]:
    vision, qformer = (manifest.model.get(part) or {} for part in ("vision", "qformer"))
    sizes = manifest.sizes
    if vision and qformer:
        yield (
            f"* BLIP-2's architecture: a ViT of {vision.get('layers')} layers and width {vision.get('hidden_size')}, a Q-Former of "
            f"{qformer.get('layers')} layers and width {qformer.get('hidden_size')}."
        )
    side, tokens = sizes.image_size, sizes.target_tokens
    yield f"* Images of {side} × {side} pixels, {tokens} target tokens of {sizes.embedding_dim} values."
    if base_query := manifest.model.get("base_query"):
        yield f"* Base query: {_QUERIES.get(base_query, base_query)}."
    yield f"* Texts of up to {manifest.tokenizer.max_length} tokens."
    imported = manifest.imported
    if imported is None:
        yield "* Weights: trained with dqe-train. The licence is the publisher's to name."
        return
    yield f"* Weights: imported from a file of the layout “{_plain(imported.format)}”, or trained on from there:"
    yield from (f"  * `{_plain(file.name)}`, {file.size} bytes, SHA-256 `{file.sha256}`" for file in imported.files)
    yield f"* Licence of these weights: {_plain(imported.licence)}"
    yield from (f"* Otherwise than in the original: {_plain(deviation)}" for deviation in imported.deviations)


def _attributes(manifest: BundleManifest) -> str:
    attributes = manifest.vocabulary.attributes
    if not attributes:
        return "None: this model has no attribute heads, and its queries take no attribute weights."
    rows = [(attribute.name, ", ".join((*attribute.values, *attribute.words)[:8])) for attribute in attributes]
    text = 'Each has a weight, which the model predicts from the query and `Query(weights={"NAME": 2.0})` multiplies.\n\n'
    return text + _table(("attribute", "named by, for example"), rows)


def _evaluation(manifest: BundleManifest) -> str:
    if (found := manifest.retrieval) is None:
        return "The bundle was exported without an evaluation set: no recall is known of it."
    low, high = found.interval
    return (
        f"On {_plain(found.data)}, {found.queries} queries over {found.gallery} images: recall@10 {100 * found.bundle_recall_at_10:.2f} %, "
        f"{found.difference:+.2f} points against PyTorch (95 % interval {low:+.2f} to {high:+.2f}); {100 * found.top10_overlap:.1f} % of "
        "the first ten are the same."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """On one line, and nothing that Markdown takes for markup of a table or for HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
