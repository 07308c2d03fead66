"""The page for everybody: by keyboard, on any screen, in the dark, without motion, and by axe-core's rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.page import AT_REST, ITEM, LONG, PICKS, SLIDER, Axe, OpenPage, Page, expect, problem, search


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
    page = open_page(address, color_scheme=scheme, viewport={"width": width, "height": 800}, reduced_motion="reduce")
    for name, prepare in STATES.items():
        page.goto("about:blank")  # so that no dialog or answer of the state before stays
        page.goto(address)
        expect(page.locator(".skeleton")).to_have_count(0)
        prepare(page)
        expect(page.locator(AT_REST)).to_be_attached()
        found = [one for one in Axe().run(page).response["violations"] if one["impact"] in ("serious", "critical")]
        assert not found, (name, [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found])
        page.unroute_all()
