"""The page over other models: without attributes, and not trained for composed retrieval."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.page import ITEM, SLIDER, Axe, OpenPage, Page, asked, expect, running, search, shown
from support.samples import noise_image
from support.tiny_bundle import build_tiny_bundle

from dqe_engine.engine import RetrievalEngine
from dqe_engine.server.settings import ServerSettings


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server over a model as published BLIP-2s are: it has no attributes, and adds the embeddings of image and text."""
    folder = tmp_path_factory.mktemp("untrained")
    bundle = build_tiny_bundle(folder / "bundle", attributes=False, model={"base_query": "zero_shot"})
    photos = folder / "photos"
    photos.mkdir()
    with RetrievalEngine.load(bundle, provider="cpu", threads=1) as engine:
        for n in range(6):
            noise_image(n).save(photos / f"{n}.png")
        engine.index_images(photos)
        engine.save_index(folder / "index")
    with running(ServerSettings(bundle=bundle, index=folder / "index", photos=(("", photos),), provider="cpu", threads=1)) as address:
        yield address


def test_a_model_without_attributes_offers_no_weights(untrained: str, open_page: OpenPage) -> None:
    page = open_page(f"{untrained}?ref=1.png&text=red", viewport={"width": 390, "height": 700})
    assert page.request.get(f"{untrained}v1/vocabulary").json()["attributes"] == []
    weighed = {"reference_id": "1.png", "text": "red", "weights": {"colour": 2.0}}
    refused = page.request.post(f"{untrained}v1/search", data=weighed)
    assert (refused.status, "this model has no attributes" in refused.text()) == (422, True)
    assert len(shown(page)) == 5
    expect(page.locator(SLIDER)).to_have_count(0)
    expect(page.get_by_text("Attribute weights")).to_be_hidden()
    expect(page.locator("#dock button:visible")).to_have_text(["Filters"])
    page.locator("#dock button:visible").click()
    expect(page.locator("#filters")).to_be_visible()
    expect(page.locator("#weights")).to_be_hidden()
    page.keyboard.press("Escape")
    first = page.locator("#grid > .tile").first
    first.hover()
    first.locator(".info").click()
    expect(page.locator("#details th[scope=row]")).to_have_text(["whole query"])
    found = Axe().run(page).response["violations"]
    assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []


def test_what_the_model_cannot_is_told(untrained: str, open_page: OpenPage) -> None:
    assert httpx.get(f"{untrained}v1/vocabulary").json()["model"]["composition"] == "added"
    page = open_page(f"{untrained}?ref=1.png&text=red")
    notes = page.locator("#notes")
    expect(page.locator("#weights")).to_contain_text("This model has no attributes to weigh.")
    expect(page.locator("#reset-weights")).to_be_hidden()
    expect(notes).to_contain_text("not trained to change an image by a text")
    page.get_by_role("button", name="Remove the reference image").click()
    expect(page.locator("#lead")).to_have_text("Show me")
    expect(notes.locator("p")).to_have_count(0)  # a text alone is what it was trained for


def test_weights_of_an_address_that_the_model_does_not_have_are_left_out(untrained: str, open_page: OpenPage) -> None:
    sent: list[dict[str, Any]] = []

    def listen(page: Page) -> None:
        page.on("request", lambda request: sent.append(asked(request)) if request.url.endswith("/v1/search") else None)

    page = open_page(f"{untrained}?ref=1.png&text=red&w.colour=2", prepare=listen)
    assert [query.get("weights") for query in sent] == [None]
    assert len(shown(page)) == 5
    expect(page.locator("#notes .warn")).to_have_text(
        "The address had a weight for “colour”, which was left out: this model has no attributes to weigh."
    )
    page.wait_for_url(lambda url: "text=red" in url and "w.colour" not in url)
    search(page, "blue")
    expect(page.locator("#notes .warn")).to_have_count(0)


def test_those_that_it_has_stay(address: str, open_page: OpenPage) -> None:
    with_both = f"{address}?ref={ITEM}&text=in+red&w.colour=2&w.sleeve=3&w.__proto__=1.5"
    page = open_page(with_both)
    expect(page.locator("#notes .warn")).to_contain_text("“sleeve”")
    expect(page.locator("#notes .warn")).to_contain_text("this model weighs colour, shape.")
    expect(page.locator(SLIDER).first).to_have_value("2")
    page.wait_for_url(lambda url: "w.colour=2" in url and "w.sleeve" not in url)


def test_a_history_of_another_model_is_read_as_an_address_is(address: str, open_page: OpenPage) -> None:
    """The bundle behind a page may change between two visits; the browser keeps the state of before."""
    page = open_page(f"{address}?ref={ITEM}&text=in+red&w.colour=2")
    page.evaluate("""() => {
        const state = structuredClone(history.state);
        for (const query of [state.query, ...state.steps]) query.weights.sleeve = 2;
        history.replaceState(state, "");
    }""")
    with page.expect_response("**/v1/search") as answer:
        page.reload()
    assert answer.value.status == 200
    assert asked(answer.value.request)["weights"] == {"colour": 2}
    expect(page.locator("#notes .warn")).to_contain_text("“sleeve”")
    page.wait_for_function("history.state.steps.every(({ weights }) => !('sleeve' in weights))")
