"""The page with keys and an index that changes: asking for a key, managing items, an index that fills."""

from __future__ import annotations

import json
import re
from pathlib import Path

from support.hostile_images import encoded
from support.page import PICKS, MakeSettings, OpenPage, asked, expect, running
from support.samples import noise_image
from support.server import READ_KEY, WRITE_KEY

from dqe_engine.engine import RetrievalEngine
from dqe_engine.server.settings import Key


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
        expect(adding.locator(".said")).to_contain_text("not valid JSON")
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
        expect(returns).to_contain_text("A photo in the server's folder stays there, and is left out of later updates")
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


def test_an_empty_index_says_how_to_fill_it_and_shows_what_comes(
    bundle_path: Path, tmp_path: Path, make_settings: MakeSettings, open_page: OpenPage
) -> None:
    with RetrievalEngine.load(bundle_path, provider="cpu", threads=1) as engine:
        engine.save_index(tmp_path / "empty")
    with running(make_settings(index=tmp_path / "empty", photos=())) as address:
        page = open_page(address)
        expect(page.locator("#notice")).to_contain_text("dqe-index")
        status = {"indexing": {"state": "indexing", "done": 3, "total": 12, "message": ""}, "items": 0, "revision": "0"}
        page.route("**/v1/status", lambda route: route.fulfill(json=status))
        expect(page.locator("progress")).to_have_attribute("value", "3")
        expect(page.locator("#notice")).to_contain_text("The first items are on their way")
        expect(page.locator("#notice")).not_to_contain_text("dqe-index")
        ended = {**status["indexing"], "state": "done", "skipped": {"damaged image": 2, "not an image": 1}}
        page.unroute("**/v1/status")
        page.route("**/v1/status", lambda route: route.fulfill(json={**status, "indexing": ended}))
        expect(page.locator("#indexing")).to_have_text("Indexing is done. 3 files were left out: 2 damaged image, 1 not an image.")
        page.unroute("**/v1/status")
        with RetrievalEngine.load(bundle_path, provider="cpu", threads=1) as engine:
            engine.load_index(tmp_path / "empty")
            engine.index_images({"a/first one.png": noise_image(5)})
            engine.save_index(tmp_path / "empty", overwrite=True)
        expect(page.locator(PICKS)).to_have_count(1)
        expect(page.locator("progress")).to_be_hidden()
        expect(page.locator(".picture.missing")).to_contain_text("a/first one.png")  # it has no picture
