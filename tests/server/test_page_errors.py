"""What the page says where the server refuses, is busy, starts, is gone, or is another."""

from __future__ import annotations

import pytest
from support.page import ITEM, PICKS, OpenPage, Page, Route, expect, problem, search, shown

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
