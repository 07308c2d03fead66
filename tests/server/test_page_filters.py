"""The page's filter menus, and what it says where they leave nothing or cannot be loaded."""

from __future__ import annotations

from support.page import PICKS, OpenPage, expect, problem, search


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
    expect(page.locator("#notice")).to_contain_text("No item passes all filters together.")
    expect(page.locator("#notice").get_by_role("button")).to_have_text(["Without any filter"])


def test_menus_come_after_a_first_failure(address: str, open_page: OpenPage) -> None:
    page = open_page(address, prepare=lambda page: page.route("**/v1/facets*", problem(503, "busy", "full")))
    expect(page.locator("#facets > .hint")).to_have_text("The filters cannot be loaded just now.")
    expect(page.locator(".menu")).to_have_count(0)
    page.unroute("**/v1/facets*")
    search(page, "in red")
    expect(page.locator(".menu")).to_have_count(3)
    expect(page.locator("#facets > .hint")).to_have_count(0)
