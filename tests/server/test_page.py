"""The search page in a browser: against the real application, and against made-up answers where an error or an order is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.hostile_images import encoded
from support.samples import noise_image
from support.server import READ_KEY, WRITE_KEY
from support.tiny_bundle import build_tiny_bundle

from dqe_engine.engine import RetrievalEngine
from dqe_engine.server.app import create_app
from dqe_engine.server.settings import Key, ServerSettings

pytest.importorskip("playwright", reason="no playwright: pip install -e '.[dev]'")
pytest.importorskip("axe_playwright_python", reason="no axe-playwright-python: pip install -e '.[dev]'")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright
from support.page import AT_REST, BROWSERS, CHROMIUM, PICKS, Recorded, running, serving, shown, tile

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no {', '.join(BROWSERS)} on PATH: apt-get install chromium")

MakeSettings = Callable[..., ServerSettings]
OpenPage = Callable[..., Page]
ITEM = "sub/01.png"
SLIDER = "#sliders input"
PATIENCE_MS = 20_000
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def address(make_settings: MakeSettings) -> Iterator[str]:
    with running(make_settings()) as address:
        yield address


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens an address in a browser of its own. What the page throws, and what its Content-Security-Policy refuses, fails the test."""
    wrong: list[str] = []
    with ExitStack() as contexts:

        def opened(address: str, *, at_rest: bool = True, prepare: Callable[[Page], Any] = lambda page: None, **options: Any) -> Page:
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
            contexts.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(PATIENCE_MS)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
            prepare(page)
            page.goto(address)
            if at_rest:
                expect(page.locator(AT_REST)).to_be_attached()
                expect(page.locator(".skeleton")).to_have_count(0)
            return page

        yield opened
    assert not wrong


def search(page: Page, text: str) -> None:
    page.fill("#text", text)
    with page.expect_response("**/v1/search"):
        page.press("#text", "Enter")
    expect(page.locator(AT_REST)).to_be_attached()


def asked(request: Request) -> dict[str, Any]:
    """The query of a search without an upload."""
    return dict(json.loads(request.post_data or "{}"))


def parts(body: bytes) -> tuple[bytes, dict[str, Any]]:
    """Image and query of a search by an upload."""
    image, query = (body.split(b'name="%s"' % name, 1)[1].split(b"\r\n\r\n", 1)[1] for name in (b"image", b"query"))
    boundary = body.split(b"\r\n", 1)[0]
    return image.split(b"\r\n" + boundary, 1)[0], json.loads(query.split(b"\r\n" + boundary, 1)[0])


def problem(status: int, code: str, message: str, **headers: str) -> Callable[[Route], None]:
    error = {"error": {"code": code, "message": message, "request_id": "0123abcd"}}
    return lambda route: route.fulfill(status=status, json=error, headers=headers)


# ---- search ----------------------------------------------------------------------------------------------------------------------------


def test_an_item_that_is_clicked_becomes_the_reference_and_a_text_changes_it(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    assert len(shown(page)) == 24
    with page.expect_request("**/v1/search") as alone:
        tile(page, ITEM).locator(".pick").click()
    assert asked(alone.value)["reference_id"] == ITEM
    expect(page.locator("#notes")).to_contain_text("not what the model was trained for")
    expect(page.locator("#text")).to_be_focused()
    with page.expect_response("**/v1/search") as both:
        page.keyboard.type("the same but red")
        page.keyboard.press("Enter")
    hits = both.value.json()["hits"]
    expect(page.locator("#live")).to_contain_text(f"23 results, best {hits[0]['score']:.2f}")
    assert shown(page) == [hit["id"] for hit in hits]
    assert ITEM not in shown(page)
    page.wait_for_url(lambda url: "text=the+same+but+red" in url)
    page.wait_for_url(lambda url: "ref=sub%2F01.png" in url)


def test_details_say_what_the_score_is_made_of(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}&text=the+same+but+red")
    first = page.locator("#grid > .tile").first
    first.hover()
    first.locator(".info").click()
    dialog = page.locator("#details")
    expect(dialog.locator(".alike .pick")).to_have_count(6)
    parts = [float(text.replace("−", "-")) for text in dialog.locator("td.number").all_inner_texts()]
    assert len(parts) == 3
    assert sum(parts) == pytest.approx(float(dialog.locator(".why h3 .number").inner_text().replace("−", "-")), abs=0.02)
    expect(dialog.locator(".metadata")).to_contain_text("price")
    page.wait_for_url(lambda url: "item=" in url)
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(first.locator(".info")).to_be_focused()
    page.wait_for_url(lambda url: "item=" not in url)


def test_an_upload_is_scaled_down_upright_and_sent_again_by_sliders(make_settings: MakeSettings, open_page: OpenPage) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo = BytesIO()
    Image.linear_gradient("L").resize((2400, 1200)).convert("RGB").save(photo, "JPEG", exif=exif)
    recorded = Recorded(create_app(make_settings()), "/v1/search")
    with serving(recorded) as address:
        page = open_page(f"{address}/?text=red")
        with page.expect_response("**/v1/search"):
            page.locator("#file").set_input_files({"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photo.getvalue()})
        with page.expect_response("**/v1/search"):
            page.locator(SLIDER).first.press("End")
        (image, query), second = [sent for body in recorded.bodies if body.startswith(b"--") and not (sent := parts(body))[1]["offset"]]
        assert Image.open(BytesIO(image)).size == (800, 1600)
        assert Image.open(BytesIO(image)).getexif().get(0x0112, 1) == 1
        assert query["text"] == "red"
        assert second[0] == image
        assert second[1]["weights"] == {"colour": 3}
        page.wait_for_url(lambda url: "text=red" in url)
        page.wait_for_url(lambda url: "ref" not in url)


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_an_image_is_pasted_and_dropped(way: str, make_settings: MakeSettings, open_page: OpenPage) -> None:
    give = """([way, bytes]) => {
        const carried = new DataTransfer();
        carried.items.add(new File([new Uint8Array(bytes)], "small.png", { type: "image/png" }));
        const told = { bubbles: true, cancelable: true };
        document.dispatchEvent(way === "paste" ? new ClipboardEvent(way, { ...told, clipboardData: carried })
            : new DragEvent(way, { ...told, dataTransfer: carried }));
    }"""
    small = encoded(noise_image(1), "PNG")
    recorded = Recorded(create_app(make_settings()), "/v1/search")
    with serving(recorded) as address:
        page = open_page(f"{address}/")
        with page.expect_response("**/v1/search") as answer:
            page.evaluate(give, [way, list(small)])
        assert parts(recorded.bodies[0])[0] == small  # as it came
        assert answer.value.json()["hits"][0]["id"] == ITEM
        expect(page.locator("#reference img")).to_have_attribute("src", re.compile("^blob:"))


def test_what_is_no_image_is_told_so(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    page.locator("#file").set_input_files({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"})
    expect(page.get_by_role("alert")).to_contain_text("is no image")
    page.locator("#file").set_input_files({"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG no image"})
    expect(page.get_by_role("alert")).to_contain_text("This kind of image is not taken")
    page.get_by_role("button", name="Remove the image").click()
    expect(page.locator(PICKS)).to_have_count(24)


# ---- weights ---------------------------------------------------------------------------------------------------------------------------


def test_sliders_rank_anew_and_need_a_text(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}")
    slider = page.locator(SLIDER).first
    expect(slider).to_be_disabled()
    expect(page.locator("#weights-why")).to_contain_text("Off")
    search(page, "the same but red")
    expect(slider).to_be_enabled()
    expect(page.locator(".slider .said").first).to_contain_text("predicted")
    entries = page.evaluate("history.length")
    for key, weight in (("End", 3), ("ArrowLeft", 2.9), ("Home", 0)):
        with page.expect_response("**/v1/search") as answer:
            slider.press(key)
        assert asked(answer.value.request)["weights"] == {"colour": pytest.approx(weight)}
        order = [hit["id"] for hit in answer.value.json()["hits"]]
        expect(page.locator("#grid > .tile").first).to_have_attribute("data-id", order[0])
        expect(page.locator(AT_REST)).to_be_attached()
        assert shown(page) == order
    assert page.evaluate("history.length") == entries + 1
    page.wait_for_url(lambda url: "w.colour=0" in url)
    with page.expect_request("**/v1/search") as reset:
        page.locator("#reset-weights").click()
    assert "weights" not in asked(reset.value)


def test_an_older_answer_never_takes_the_place_of_a_newer_one(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}&text=the+same+but+red")
    held: list[Route] = []

    def answer(route: Route) -> None:
        if asked(route.request)["weights"] == {"colour": 3}:
            held.append(route)
        else:
            route.continue_()

    page.route("**/v1/search", answer)
    slider = page.locator(SLIDER).first
    with page.expect_request("**/v1/search"):
        slider.press("End")
    with page.expect_response("**/v1/search") as newer:
        slider.press("Home")
    order = [hit["id"] for hit in newer.value.json()["hits"]]
    expect(page.locator(AT_REST)).to_be_attached()
    assert shown(page) == order
    stale = {**newer.value.json(), "hits": newer.value.json()["hits"][:1]}
    for route in held:
        route.fulfill(json=stale)
    page.evaluate("fetch('healthz').then(answer => answer.text())")  # whatever was under way before it has arrived
    assert len(held) == 1
    assert shown(page) == order


def test_a_model_without_attributes_offers_no_weights(make_settings: MakeSettings, open_page: OpenPage, tmp_path: Path) -> None:
    bundle = build_tiny_bundle(tmp_path / "plain", attributes=False)
    photos = tmp_path / "few"
    photos.mkdir()
    with RetrievalEngine.load(bundle, provider="cpu", threads=1) as engine:
        for n in range(6):
            noise_image(n).save(photos / f"{n}.png")
        engine.index_images(photos)
        engine.save_index(tmp_path / "plain-index")
    with running(make_settings(bundle=bundle, index=tmp_path / "plain-index", photos=(("", photos),))) as address:
        page = open_page(f"{address}?ref=1.png&text=red", viewport={"width": 390, "height": 700})
        assert page.request.get(f"{address.rstrip('/')}/v1/vocabulary").json()["attributes"] == []
        weighed = {"reference_id": "1.png", "text": "red", "weights": {"colour": 2.0}}
        refused = page.request.post(f"{address.rstrip('/')}/v1/search", data=weighed)
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


# ---- steps, filters, addresses ---------------------------------------------------------------------------------------------------------


def test_steps_can_be_gone_back_to(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    tile(page, ITEM).locator(".pick").click()
    expect(page.locator(AT_REST)).to_be_attached()
    search(page, "in red")
    first = shown(page)
    page.locator(PICKS).nth(2).click()
    expect(page.locator("#text")).to_have_value("")
    search(page, "with long sleeves")
    second = shown(page)
    expect(page.locator(".crumb")).to_have_count(2)
    expect(page.locator(".crumb[aria-current=step]")).to_contain_text("with long sleeves")
    page.go_back()  # to the picked item without a text
    expect(page.locator("#text")).to_have_value("")
    page.go_back()
    expect(page.locator("#text")).to_have_value("in red")
    expect(page.locator(AT_REST)).to_be_attached()
    assert shown(page) == first
    page.go_forward()
    page.go_forward()
    expect(page.locator("#text")).to_have_value("with long sleeves")
    expect(page.locator(AT_REST)).to_be_attached()
    assert shown(page) == second
    page.locator(".crumb").first.click()
    expect(page.locator("#text")).to_have_value("in red")
    expect(page.locator(".crumb")).to_have_count(2)
    expect(page.locator(AT_REST)).to_be_attached()
    assert shown(page) == first


def test_examples_that_are_not_wanted_are_taken_back_one_by_one(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}&text=in+red")
    gone = shown(page)[:2]
    for id in gone:
        tile(page, id).locator(".pick").focus()
        with page.expect_request("**/v1/search") as sent:
            page.keyboard.press("x")
    assert asked(sent.value)["unlike"] == gone
    expect(tile(page, gone[1])).to_have_count(0)
    page.get_by_role("button", name=f"Undo: not like {gone[0]}").click()
    expect(tile(page, gone[0])).to_have_count(1)
    expect(tile(page, gone[1])).to_have_count(0)


def test_filters_narrow_count_and_say_what_to_loosen(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    menu = page.locator(".menu", has_text="colour")
    menu.locator("summary").click()
    menu.get_by_label("red").check()
    expect(page.locator(PICKS)).to_have_count(8)
    expect(page.locator("#summary")).to_contain_text("8 items")
    expect(menu.locator(".choice", has_text="green").locator(".tally")).to_have_text("8")  # what it would add
    sale = page.locator(".menu", has_text="sale")
    sale.locator("summary").click()
    expect(sale.locator(".choice", has_text="yes").locator(".tally")).to_have_text("2")
    sale.get_by_label("yes").check()
    expect(page.locator(PICKS)).to_have_count(2)
    price = page.locator(".menu", has_text="price")
    price.locator("summary").click()
    price.get_by_label("price, at least").fill("20")
    price.get_by_label("price, at least").press("Enter")
    expect(page.locator("#notice")).to_contain_text("No item passes the filters")
    page.wait_for_url(lambda url: "is.colour=red" in url)
    page.wait_for_url(lambda url: "on.sale=yes" in url)
    page.wait_for_url(lambda url: "in.price=20.." in url)
    page.get_by_role("button", name="Without “sale: yes”: 1 item").click()
    expect(page.locator(PICKS)).to_have_count(1)
    expect(page.locator(".chip")).to_have_count(2)
    page.locator("#clear-filters").click()
    expect(page.locator(PICKS)).to_have_count(24)


def test_menus_stay_where_the_facets_cannot_be_loaded(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    hint = page.locator("#facets > .hint")
    colour = page.locator(".menu", has_text="colour")
    sale = page.locator(".menu", has_text="sale")
    expect(page.locator(".menu")).to_have_count(3)
    colour.locator("summary").click()
    page.route("**/v1/facets*", problem(500, "internal", "x"))
    colour.get_by_label("red").check()
    expect(page.locator(PICKS)).to_have_count(8)
    expect(hint).to_contain_text("cannot be loaded")
    expect(page.locator(".menu")).to_have_count(3)
    colour.get_by_label("blue").check()  # to what is chosen, not in its place
    expect(page.locator(PICKS)).to_have_count(16)
    expect(hint).to_have_count(1)
    page.wait_for_url(lambda url: "is.colour=red&is.colour=blue" in url)
    page.unroute("**/v1/facets*")
    with page.expect_response("**/v1/facets*"):
        page.locator("#clear-filters").click()  # back to the filters of the last good answer
    expect(hint).to_have_count(0)
    expect(page.locator(".menu")).to_have_count(3)
    expect(colour.locator("input:checked")).to_have_count(0)
    sale.locator("summary").click()
    sale.get_by_label("yes").check()
    expect(colour.locator(".choice", has_text="red").locator(".tally")).to_have_text("2")


def test_what_to_loosen_is_not_said_from_facets_of_other_filters(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?is.colour=red&in.price=90..")
    expect(page.get_by_role("button", name="Without “price: at least 90”")).to_be_visible()
    page.route("**/v1/facets*", problem(500, "internal", "x"))
    page.get_by_role("button", name="Remove colour: red").click()
    expect(page.locator("#facets > .hint")).to_contain_text("cannot be loaded")
    expect(page.locator("#notice")).to_contain_text("The filters together leave nothing.")
    expect(page.locator("#notice").get_by_role("button")).to_have_text(["Without any filter"])


def test_menus_come_after_a_first_failure(address: str, open_page: OpenPage) -> None:
    page = open_page(address, prepare=lambda page: page.route("**/v1/facets*", problem(503, "busy", "full")))
    expect(page.locator("#facets > .hint")).to_have_text("The filters cannot be loaded just now.")
    expect(page.locator(".menu")).to_have_count(0)
    page.unroute("**/v1/facets*")
    search(page, "in red")
    expect(page.locator(".menu")).to_have_count(3)
    expect(page.locator("#facets > .hint")).to_have_count(0)


def test_an_address_is_a_whole_search(address: str, open_page: OpenPage) -> None:
    requests: list[dict[str, Any]] = []
    asks = "?ref=sub%2F01.png&text=in+red&w.colour=2&unlike=02.png&is.colour=red&is.colour=blue&on.sale=no&page=2"
    page = open_page(
        address + asks,
        prepare=lambda page: page.on("request", lambda sent: requests.append(asked(sent)) if sent.url.endswith("/v1/search") else None),
    )
    (query,) = requests
    assert query["reference_id"] == ITEM
    assert query["weights"] == {"colour": 2}
    assert query["unlike"] == ["02.png"]
    assert query["filter"] == {"and": [{"colour": {"in": ["red", "blue"]}}, {"sale": False}]}
    assert query["k"] == 48
    expect(page.locator("#text")).to_have_value("in red")
    expect(page.locator(SLIDER).first).to_have_value("2")
    expect(page.locator(".chip")).to_have_count(3)
    assert sorted(page.url.split("?")[1].split("&")) == sorted(asks[1:].split("&"))
    before = shown(page)
    page.reload()
    expect(page.locator(PICKS)).to_have_count(len(before))
    assert shown(page) == before


def test_more_results_come_on_scrolling(open_page: OpenPage, address: str) -> None:
    page = open_page(address, viewport={"width": 390, "height": 500})
    page.route("**/v1/search", lambda route: route.fulfill(json=paged(asked(route.request))))
    search(page, "in red")
    for together in (48, 60):
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        expect(page.locator(PICKS)).to_have_count(together)
    expect(page.locator("#more")).to_be_hidden()
    assert shown(page) == [f"item {n}" for n in range(60)]
    page.wait_for_url(lambda url: "page=3" in url)


def paged(query: dict[str, Any]) -> dict[str, Any]:
    hits = [
        {"id": f"item {n}", "score": 1 - n / 100, "delta": n / 100, "metadata": None, "zone": None, "explanation": None}
        for n in range(query["offset"], min(60, query["offset"] + query["k"]))
    ]
    return {"hits": hits, "mode": "text", "weights": {}, "predicted_weights": {}, "overrides": {}, "truncated": False,
            "unknown_words": [], "zones": None, "timings_ms": {}, "index": {"items": 60, "revision": "x"}}  # fmt: skip


def test_the_page_works_under_a_path(make_settings: MakeSettings, open_page: OpenPage) -> None:
    with running(make_settings(), prefix="/shop/search") as address:
        page = open_page(address)
        tile(page, ITEM).locator(".pick").click()
        search(page, "in red")
        assert len(shown(page)) == 23
        assert page.url.startswith(f"{address}?")
        assert page.locator("#grid img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


# ---- without a mouse, on small screens, in the dark ------------------------------------------------------------------------------------


def test_everything_works_by_keyboard_alone(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    keys = page.keyboard
    keys.press("/")
    expect(page.locator("#text")).to_be_focused()
    keys.type("in red")
    with page.expect_response("**/v1/search"):
        keys.press("Enter")
    expect(page.locator(AT_REST)).to_be_attached()
    keys.press("Escape")
    picks = page.locator(PICKS)
    expect(picks.first).to_be_focused()
    keys.press("ArrowRight")
    expect(picks.nth(1)).to_be_focused()
    keys.press("ArrowDown")
    keys.press("ArrowUp")
    expect(picks.nth(1)).to_be_focused()
    keys.press("End")
    expect(picks.last).to_be_focused()
    keys.press("Home")
    expect(page.locator("#grid .pick[tabindex='0']")).to_have_count(1)
    keys.press("i")
    expect(page.locator("#details")).to_be_visible()
    keys.press("Escape")
    expect(picks.first).to_be_focused()
    keys.press("Enter")
    expect(page.locator("#lead")).to_have_text("Like this, but")
    expect(page.locator("#text")).to_be_focused()
    page.locator("#open-shortcuts").focus()
    keys.press("?")
    expect(page.locator("#shortcuts")).to_be_visible()
    keys.press("Escape")
    expect(page.locator("#open-shortcuts")).to_be_focused()


LONG = "the same but red with long sleeves and " * 40


@pytest.mark.parametrize("width", [320, 390, 2560])
def test_nothing_is_wider_than_the_screen(width: int, address: str, open_page: OpenPage) -> None:
    page = open_page(address, viewport={"width": width, "height": 640})

    def fits() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    fits()
    search(page, LONG)
    fits()
    page.locator(".tile .pick").first.focus()
    page.keyboard.press("i")
    expect(page.locator("#details .alike .pick")).to_have_count(6)
    assert page.locator("#details").evaluate("dialog => dialog.scrollWidth <= dialog.clientWidth")
    page.keyboard.press("Escape")
    if width < 900:
        page.get_by_role("button", name="Weights").click()
        expect(page.locator("#sliders")).to_be_visible()
        expect(page.locator("#facets")).to_be_hidden()
        fits()


def test_colours_follow_the_system_until_they_are_chosen(address: str, open_page: OpenPage) -> None:
    page = open_page(address, color_scheme="dark")
    brightness = "document.defaultView.getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(brightness)
    page.locator("#theme").click()
    expect(page.locator("#theme")).to_have_text("Light")
    assert page.evaluate(brightness) != dark
    page.reload()
    expect(page.locator("#theme")).to_have_text("Light")
    assert page.evaluate(brightness) != dark
    page.locator("#theme").click()
    assert page.evaluate(brightness) == dark


def test_nothing_moves_for_those_who_asked_for_less_motion(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}&text=in+red", reduced_motion="reduce")
    with page.expect_response("**/v1/search"):
        page.locator(SLIDER).first.press("End")
    expect(page.locator(AT_REST)).to_be_attached()
    assert page.evaluate("document.getAnimations().length") == 0


# ---- states ----------------------------------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for(make_settings: MakeSettings, keys: tuple[Key, ...], open_page: OpenPage) -> None:
    with running(make_settings(keys=keys)) as address:
        page = open_page(address, at_rest=False)
        dialog = page.locator("#session")
        expect(dialog.locator("#key")).to_be_focused()
        page.keyboard.type("no-such-key-0123456789")
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_contain_text("does not know this key")
        page.fill("#key", READ_KEY)
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator(PICKS)).to_have_count(24)
        assert page.locator("#grid img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
        page.reload()
        expect(page.locator(PICKS)).to_have_count(24)


def test_items_are_added_changed_and_removed(make_settings: MakeSettings, keys: tuple[Key, ...], open_page: OpenPage) -> None:
    with running(make_settings(keys=keys)) as address:
        page = open_page(address, at_rest=False)
        page.fill("#key", READ_KEY)
        page.keyboard.press("Enter")
        page.locator("#open-manage").click()
        adding, changing = page.locator("#manage form").all()
        page.fill("#write-key", WRITE_KEY)
        page.locator("#add-file").set_input_files({"name": "new.png", "mimeType": "image/png", "buffer": encoded(noise_image(99), "PNG")})
        expect(page.locator("#add-id")).to_have_value("new.png")
        page.fill("#add-metadata", '{"colour": ')
        page.get_by_role("button", name="Add", exact=True).click()
        expect(adding.locator(".said")).to_contain_text("no JSON")
        page.fill("#add-metadata", '{"colour": "mauve"}')
        page.get_by_role("button", name="Add", exact=True).click()
        expect(adding.locator(".said")).to_have_text("Added new.png.")
        expect(page.locator("#facts")).to_have_text("25 items")
        page.fill("#item-id", "new.png")
        page.get_by_role("button", name="Load its metadata").click()
        expect(page.locator("#item-metadata")).to_have_value('{\n  "colour": "mauve"\n}')
        page.fill("#item-metadata", '{"colour": "puce"}')
        with page.expect_request(lambda sent: sent.method == "PATCH") as sent:
            page.get_by_role("button", name="Change metadata").click()
        assert asked(sent.value) == {"metadata": {"colour": "puce"}}
        expect(changing.locator(".said")).to_have_text("Changed the metadata of new.png.")
        remove = changing.locator(".danger")
        remove.click()
        returns = page.locator("#manage #returns")
        expect(remove).to_have_text("Remove it from the index?")
        expect(returns).to_contain_text("A photo in the server's folder stays there, and is indexed again at the next update.")
        page.fill("#item-id", "new.pn")  # another id is asked about anew
        expect(remove).to_have_text("Remove the item")
        expect(returns).to_be_hidden()
        page.fill("#item-id", "new.png")
        remove.click()
        remove.click()
        expect(changing.locator(".said")).to_have_text("Removed new.png.")
        expect(page.locator("#facts")).to_have_text("24 items")


def test_a_write_key_is_kept_until_the_page_is_closed(make_settings: MakeSettings, keys: tuple[Key, ...], open_page: OpenPage) -> None:
    with running(make_settings(keys=keys)) as address:
        page = open_page(address, at_rest=False)
        page.fill("#key", READ_KEY)
        page.keyboard.press("Enter")
        key = page.locator("#write-key")
        page.locator("#open-manage").click()
        expect(key).to_have_accessible_description(re.compile("keeps the key until it is closed"))
        key.fill(WRITE_KEY)
        page.keyboard.press("Escape")
        expect(key).to_be_hidden()
        page.locator("#open-manage").click()
        expect(key).to_have_value(WRITE_KEY)
        stored = page.evaluate("JSON.stringify([{ ...localStorage }, { ...sessionStorage }, history.state, document.cookie])")
        assert WRITE_KEY not in stored + json.dumps(page.context.cookies())
        page.reload()
        page.locator("#open-manage").click()
        expect(key).to_have_value("")


ERRORS = [
    (400, "invalid_json", "The server made a mistake"),
    (403, "host", "Not allowed"),
    (404, "unknown_item", "Not in the index"),
    (413, "too_large", "at most"),
    (415, "unsupported_image", "The server takes"),
    (422, "invalid", "The server cannot use this"),
    (500, "internal", "0123abcd"),
    (504, "deadline", "took too long"),
]


@pytest.mark.parametrize(("status", "code", "says"), ERRORS)
def test_errors_say_what_to_do_and_can_be_tried_again(status: int, code: str, says: str, address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}")
    page.route("**/v1/search", problem(status, code, "something was not as expected"))
    search(page, "in red")
    expect(page.get_by_role("alert")).to_contain_text(says)
    assert len(shown(page)) == 23  # the answer before stays
    page.unroute("**/v1/search")
    with page.expect_response("**/v1/search"):
        page.get_by_role("button", name="Try again").click()
    expect(page.locator(".notice")).to_have_count(0)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_after_the_time_it_says(status: int, address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}")
    answered: list[int] = []

    def once(route: Route) -> None:
        answered.append(status)
        if len(answered) == 1:
            problem(status, "busy", "the queue is full", **{"Retry-After": "1"})(route)
        else:
            route.continue_()

    page.route("**/v1/search", once)
    search(page, "in red")
    expect(page.locator(".countdown")).to_contain_text("Trying again")
    expect(page.locator(".notice")).to_have_count(0)
    assert len(answered) == 2


def test_a_server_that_is_starting_is_waited_for(address: str, open_page: OpenPage) -> None:
    answers = iter([True])

    def starting(page: Page) -> None:
        def once(route: Route) -> None:
            if next(answers, False):
                problem(503, "not_ready", "the server is starting", **{"Retry-After": "1"})(route)
            else:
                route.continue_()

        page.route("**/v1/vocabulary", once)

    page = open_page(address, at_rest=False, prepare=starting)
    expect(page.locator("#notice")).to_contain_text("not ready yet")
    expect(page.locator(PICKS)).to_have_count(24)


def test_a_lost_connection_is_told_and_tried_again(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}")
    page.context.set_offline(True)
    page.fill("#text", "in red")
    page.press("#text", "Enter")
    expect(page.get_by_role("alert")).to_contain_text("No connection")
    page.context.set_offline(False)
    expect(page.locator(".notice")).to_have_count(0)
    expect(page.locator("#notes")).to_be_attached()
    expect(page.locator("#live")).to_contain_text("23 results")


def test_an_answer_of_something_else_is_told(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}")
    page.route("**/v1/search", lambda route: route.fulfill(body="<html>Log in to the café</html>", content_type="text/html"))
    search(page, "in red")
    expect(page.get_by_role("alert")).to_contain_text("not from the search server")


def test_an_empty_index_says_how_to_fill_it_and_shows_what_comes(
    bundle_path: Path, tmp_path: Path, make_settings: MakeSettings, open_page: OpenPage
) -> None:
    from dqe_engine.engine import RetrievalEngine

    with RetrievalEngine.load(bundle_path, provider="cpu", threads=1) as engine:
        engine.save_index(tmp_path / "empty")
    with running(make_settings(index=tmp_path / "empty", photos=())) as address:
        page = open_page(address)
        expect(page.locator("#notice")).to_contain_text("dqe-index")
        status = {"indexing": {"state": "indexing", "done": 3, "total": 12, "message": ""}, "items": 0, "revision": "0"}
        page.route("**/v1/status", lambda route: route.fulfill(json=status))
        expect(page.locator("progress")).to_have_attribute("value", "3")
        page.unroute("**/v1/status")
        with RetrievalEngine.load(bundle_path, provider="cpu", threads=1) as engine:
            engine.load_index(tmp_path / "empty")
            engine.index_images({"a/first one.png": noise_image(5)})
            engine.save_index(tmp_path / "empty", overwrite=True)
        expect(page.locator(PICKS)).to_have_count(1)
        expect(page.locator("progress")).to_be_hidden()
        expect(page.locator(".picture.missing")).to_contain_text("a/first one.png")  # it has no picture


def test_what_became_of_a_text_is_told_under_it(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}")
    answer = {**paged({"offset": 0, "k": 3}), "mode": "composed", "truncated": True, "unknown_words": ["zorkish", "x" * 400]}
    page.route("**/v1/search", lambda route: route.fulfill(json=answer))
    search(page, LONG)
    expect(page.locator("#notes")).to_contain_text("does not know “zorkish”")
    expect(page.locator("#notes")).to_contain_text("longer than the model reads")


def test_an_upload_cannot_be_shared_nor_found_again(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    small = encoded(noise_image(1), "PNG")
    with page.expect_response("**/v1/search"):
        page.locator("#file").set_input_files({"name": "small.png", "mimeType": "image/png", "buffer": small})
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#copy-link").click()
    expect(page.locator("#copy-link")).to_contain_text("cannot be shared")
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("Your image is gone")
    page.get_by_role("button", name="Without it").click()
    expect(page.locator(PICKS)).to_have_count(24)


def give(page: Page, seed: int) -> None:
    """Upload an image and wait for the answer."""
    with page.expect_response("**/v1/search"):
        page.locator("#file").set_input_files({"name": "small.png", "mimeType": "image/png", "buffer": encoded(noise_image(seed), "PNG")})
    expect(page.locator(AT_REST)).to_be_attached()


def test_an_upload_of_before_a_reload_is_never_another_one(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    give(page, 1)
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("Your image is gone")
    give(page, 2)
    expect(page.locator("#notice > *")).to_have_count(0)
    page.go_back()
    expect(page.get_by_role("alert")).to_contain_text("Your image is gone")
    expect(page.locator("#reference .missing")).to_be_visible()
    page.go_forward()
    expect(page.locator("#notice > *")).to_have_count(0)
    expect(page.locator("#reference img")).to_be_visible()


def test_uploads_are_kept_while_the_history_leads_to_them(address: str, open_page: OpenPage) -> None:
    watch = """() => {
        window.freed = [];
        const free = URL.revokeObjectURL;
        URL.revokeObjectURL = (address) => { window.freed.push(address); free.call(URL, address); };
    }"""
    page = open_page(address, prepare=lambda page: page.add_init_script(f"({watch})()"))
    given = []
    for seed in (1, 2):
        give(page, seed)
        given.append(page.locator("#reference img").get_attribute("src"))
    page.locator("#reference .clear").click()  # a new trail, without them
    expect(page.locator("#reference img")).to_have_count(0)
    expect(page.locator(PICKS)).to_have_count(24)
    page.go_back()
    expect(page.locator("#reference img")).to_have_attribute("src", given[1] or "")
    page.go_back()
    expect(page.locator("#reference img")).to_have_attribute("src", given[0] or "")
    expect(page.locator("#notice > *")).to_have_count(0)
    expect(page.locator(AT_REST)).to_be_attached()
    assert page.evaluate("freed") == []
    give(page, 3)  # after the first: the second was ahead
    assert page.evaluate("freed") == [given[1]]
    page.locator("#reference .clear").click()
    page.go_back()
    page.locator(".crumb").first.click()
    expect(page.locator("#reference img")).to_have_attribute("src", given[0] or "")
    for _ in range(3):
        page.go_back()
    expect(page.locator("#reference img")).to_have_count(0)
    search(page, "in red")
    assert len(page.evaluate("freed")) == 3


def test_zones_are_told_apart(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}&text=in+red")
    zones = page.locator("#grid .zone, #grid .zone-head.mid")
    expect(zones).to_have_count(1)
    expect(zones).to_contain_text("Similar but different")


# ---- for everybody ---------------------------------------------------------------------------------------------------------------------


def open_details(page: Page) -> None:
    page.locator(PICKS).first.focus()
    page.keyboard.press("i")
    expect(page.locator("#details .alike .pick")).to_have_count(6)


STATES: dict[str, Callable[[Page], Any]] = {
    "start": lambda page: None,
    "results": lambda page: search(page, "in red"),
    "details": open_details,
    "reference": lambda page: (page.locator(PICKS).first.click(), expect(page.locator("#reference .chosen")).to_be_visible()),
    "shortcuts": lambda page: page.locator("#open-shortcuts").click(),
    "filters": lambda page: page.locator(".menu").evaluate_all("menus => menus.forEach(menu => { menu.open = true; })"),
    "nothing": lambda page: (page.goto(f"{page.url}?is.colour=red&in.price=90.."), expect(page.locator(".notice")).to_be_visible()),
    "busy": lambda page: (page.route("**/v1/search", problem(429, "busy", "full", **{"Retry-After": "600"})), search(page, "in red")),
    "error": lambda page: (page.route("**/v1/search", problem(500, "internal", "x")), search(page, "in red")),
}  # fmt: skip


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_there_is_no_serious_barrier(width: int, scheme: str, address: str, open_page: OpenPage) -> None:
    for name, prepare in STATES.items():
        page = open_page(address, color_scheme=scheme, viewport={"width": width, "height": 800}, reduced_motion="reduce")
        prepare(page)
        expect(page.locator(AT_REST)).to_be_attached()
        found = [one for one in Axe().run(page).response["violations"] if one["impact"] in ("serious", "critical")]
        assert not found, (name, [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found])
        page.close()
