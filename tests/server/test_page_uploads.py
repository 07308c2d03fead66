"""Images that are given to the page: picked, pasted, dropped, refused, and how long they are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from support.hostile_images import encoded
from support.page import AT_REST, ITEM, PICKS, SLIDER, OpenPage, Page, Recorded, expect, search, serving
from support.samples import noise_image

from dqe_engine.server.app import create_app
from dqe_engine.server.settings import ServerSettings


class Recording(NamedTuple):
    """A server of the page, and the bodies of the searches that it was sent."""

    address: str
    bodies: list[bytes]


@pytest.fixture(scope="module")
def recorded(bundle_path: Path, shop: Path) -> Iterator[Recording]:
    settings = ServerSettings(bundle=bundle_path, index=shop / "index", photos=(("", shop / "photos"),), provider="cpu", threads=1)
    app = Recorded(create_app(settings), "/v1/search")
    with serving(app) as address:
        yield Recording(f"{address}/", app.bodies)


def parts(body: bytes) -> tuple[bytes, dict[str, Any]]:
    """Image and query of a search by an upload."""
    image, query = (body.split(b'name="%s"' % name, 1)[1].split(b"\r\n\r\n", 1)[1] for name in (b"image", b"query"))
    boundary = body.split(b"\r\n", 1)[0]
    return image.split(b"\r\n" + boundary, 1)[0], json.loads(query.split(b"\r\n" + boundary, 1)[0])


def test_an_upload_is_scaled_down_upright_and_sent_again_by_sliders(recorded: Recording, open_page: OpenPage) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo = BytesIO()
    Image.linear_gradient("L").resize((2400, 1200)).convert("RGB").save(photo, "JPEG", exif=exif)
    page = open_page(f"{recorded.address}?text=red")
    recorded.bodies.clear()
    with page.expect_response("**/v1/search"):
        page.locator("#file").set_input_files({"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photo.getvalue()})
    with page.expect_response("**/v1/search"):
        page.locator(SLIDER).first.press("End")
    (image, query), second = [sent for body in recorded.bodies if body.startswith(b"--") and not (sent := parts(body))[1]["offset"]]
    assert Image.open(BytesIO(image)).size == (800, 1600)
    assert Image.open(BytesIO(image)).getexif().get(0x0112, 1) == 1
    assert query["text"] == "red"
    assert second[0] == image
    assert second[1]["weights"] == {"colour": 2}
    page.wait_for_url(lambda url: "text=red" in url)
    page.wait_for_url(lambda url: "ref" not in url)


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_an_image_is_pasted_and_dropped(way: str, recorded: Recording, open_page: OpenPage) -> None:
    give = """([way, bytes]) => {
        const carried = new DataTransfer();
        carried.items.add(new File([new Uint8Array(bytes)], "small.png", { type: "image/png" }));
        const told = { bubbles: true, cancelable: true };
        document.dispatchEvent(way === "paste" ? new ClipboardEvent(way, { ...told, clipboardData: carried })
            : new DragEvent(way, { ...told, dataTransfer: carried }));
    }"""
    small = encoded(noise_image(1), "PNG")
    page = open_page(recorded.address)
    recorded.bodies.clear()
    with page.expect_response("**/v1/search") as answer:
        page.evaluate(give, [way, list(small)])
    assert parts(recorded.bodies[0])[0] == small  # as it came
    assert answer.value.json()["hits"][0]["id"] == ITEM
    expect(page.locator("#reference img")).to_have_attribute("src", re.compile("^blob:"))


def test_what_is_no_image_is_told_so(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    page.locator("#file").set_input_files({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"})
    expect(page.get_by_role("alert")).to_contain_text("is not an image")
    page.locator("#file").set_input_files({"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG no image"})
    expect(page.get_by_role("alert")).to_contain_text("This kind of image is not accepted")
    expect(page.get_by_role("alert").get_by_role("button")).to_have_text(["Choose another image", "Remove the image"])
    expect(page.locator("#reference .missing")).to_have_text("no preview")
    page.get_by_role("button", name="Remove the image").click()
    expect(page.locator(PICKS)).to_have_count(24)


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
