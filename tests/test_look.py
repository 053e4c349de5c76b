"""`panollava look`: the page in a real browser, with a real model that answers by direction."""

import contextlib
import csv
import io
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Error, Page, Request, Route, expect

from helpers import ROOT, change, read_array, running
from panollava import PanoLLaVA, paths
from panollava.cli import main as cli
from panollava.config import load_settings
from panollava.data.dialogue import Dialogue
from panollava.data.packing import pack
from panollava.data.prepare import prepare_project
from panollava.demo.questions import QUERIES, answer, has_answer
from panollava.demo.render import render
from panollava.demo.scenes import DIRECTIONS, Scene, make_scene
from panollava.model.header import TOWERS, make_header
from panollava.model.heat_map import HeatMaps
from panollava.model.language_model import end_tokens
from panollava.model.network import build_model
from panollava.model.weights import save_weights
from panollava.serving.look import look, make_page_server
from panollava.serving.server import Limits, bind
from panollava.stages import STAGES

expect.set_options(timeout=30_000)  # the machine may be busy
LIMITS = Limits(max_new_tokens=16, max_bytes=1 << 20, max_pixels=1 << 21)
MARKUP = "<img src=x onerror='window.hacked=true'><script>window.hacked=true</script>"
LEFT = QUERIES["left"]
YAWS = {"front": 0, "right": 90, "behind": 180, "left": -90}


def scenes(seed: int, count: int) -> list[Scene]:
    """Scenes with an object on the left, which is alone there."""
    all_scenes = (make_scene(seed, index) for index in range(10 * count))
    return [s for s in all_scenes if s.at("left") and s.is_clear("left")][:count]


TEST_SCENES = scenes(7, 14)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose test split is prepared. In its last panorama, all texts are markup."""
    folder = tmp_path_factory.mktemp("look")
    images = folder / "data/images"
    images.mkdir(parents=True)
    for split, of_split in (
        ("train", scenes(5, 1)),
        ("valid", scenes(6, 1)),
        ("test", TEST_SCENES),
    ):
        with (folder / f"data/{split}.csv").open("w", newline="", encoding="utf-8") as file:
            write = csv.writer(file).writerow
            write(("url", "query", "annotation"))
            for index, scene in enumerate(of_split):
                marked = index == len(TEST_SCENES) - 1
                name = f"{split}_{index}{MARKUP.replace('/', '') if marked else ''}.png"
                Image.fromarray(render(scene, 256)).save(images / name)
                for topic in ("left", "count"):
                    write((f"images/{name}", QUERIES[topic], answer(scene, topic, 0)))
                if marked:
                    write((f"images/{name}", MARKUP, f"reference {MARKUP}"))
    settings = load_settings(ROOT / "params.yaml")
    with contextlib.chdir(folder):
        prepare_project(change(settings, data__dir="data"))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> PanoLLaVA:
    """The demo's towers, with a resampler that learns in seconds what is in each direction."""
    settings, stage = load_settings(ROOT / "params.yaml"), STAGES["finetune"]
    with contextlib.chdir(ROOT):
        network, tokenizer = build_model(settings.model, settings.views)
        header = make_header(stage, settings, TOWERS)
    file = folder / "model.safetensors"
    fit(network, Dialogue(tokenizer, ends=end_tokens(network.language_model)), settings)
    save_weights(file, network, stage.saves, header)
    with contextlib.chdir(ROOT):
        return PanoLLaVA.from_pretrained(file, accelerator="cpu")


def fit(network: Any, dialogue: Dialogue, settings: Any) -> None:
    torch.set_num_threads(1)  # more are slower where several processes share the cores
    learned = [make_scene(123, index) for index in range(120)]
    views = np.stack([sampled(scene, settings) for scene in learned])
    with torch.no_grad():
        parts = torch.from_numpy(views).split(20)
        features = torch.cat([network.features(part) for part in parts])
    rows = [
        [
            dialogue.row(QUERIES[direction], answer(scene, direction, 0), truncate=False)
            for direction in DIRECTIONS
            if has_answer(scene, direction)
        ]
        for scene in learned
    ]
    network.requires_grad_(False)
    parameters = [*network.resampler.parameters(), *network.projector.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=80)
    random = np.random.default_rng(0)
    vision_tokens = network.resampler.tokens
    for _ in range(80):
        batch = [index for index in random.permutation(len(rows))[:16] if rows[index]]
        packed = pack(dialogue.text_prefix, vision_tokens, [rows[i] for i in batch], dialogue.pad)
        loss = network.loss_sum(features[batch], packed, len(dialogue.text_prefix))
        optimizer.zero_grad()
        (loss / len(packed.labels)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        schedule.step()
    assert loss / len(packed.labels) < 0.3


def sampled(scene: Scene, settings: Any) -> NDArray[np.uint8]:
    from panollava.geometry.views import Sampler, layout

    return Sampler(layout(settings.views), settings.views.size).sample(render(scene, 128))


@contextlib.contextmanager
def serving(model: PanoLLaVA, folder: Path, limits: Limits = LIMITS) -> Iterator[str]:
    """The page's server in a thread, started in `folder`."""
    with contextlib.chdir(folder):
        server = make_page_server(model, "the model", ["pano.example"], limits)
    with running(server) as url:
        yield url


@pytest.fixture(scope="module")
def url(model: PanoLLaVA, folder: Path) -> Iterator[str]:
    with serving(model, folder) as url:
        yield url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The loaded page. No test may cause an error in it, or a request to another host."""
    with opened(browser, url) as page:
        yield page


@contextlib.contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    options = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
    page = browser.new_page(**options)
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if "Content Security" in m.text else None)
    page.goto(url)
    expect(page.locator("#viewer canvas")).to_be_visible()
    yield page
    assert not errors
    assert {request.split("/", 3)[2] for request in requests} == {url.split("/")[2]}
    assert not page.evaluate("window.hacked")
    page.close()


def ask(page: Page, question: str) -> None:
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect_map(page)


def expect_map(page: Page) -> None:
    expect(page.locator("#turn")).to_be_enabled()


def until(page: Page, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        page.wait_for_timeout(50)


def direction(page: Page) -> dict[str, float]:
    return page.evaluate("viewer.direction()")


def heat(page: Page, yaw: float) -> float:
    """How much the map changes the pixels of the panorama in the viewer, turned to `yaw`."""

    def screenshot(strength: int) -> NDArray[np.float64]:
        page.locator("#strength").fill(str(strength))
        page.wait_for_timeout(100)
        png = page.locator("#viewer").screenshot()
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float)

    page.evaluate(f"viewer.look({yaw}, 0)")
    return float(np.abs(screenshot(100) - screenshot(0)).mean())


def test_the_page_turns_answers_and_shows_the_map_where_the_object_is(
    page: Page, model: PanoLLaVA, folder: Path
) -> None:
    """To the left for what is on the left, of the words that name it."""
    viewer = page.locator("#viewer")
    box = viewer.bounding_box()
    assert box
    page.mouse.move(box["x"] + 400, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 200, steps=5)
    page.mouse.up()
    until(page, lambda: direction(page)["yaw"] > 5)  # what is dragged comes from the right
    page.wait_for_timeout(500)
    dragged = direction(page)["yaw"]
    viewer.focus()
    page.keyboard.down("ArrowLeft")
    until(page, lambda: direction(page)["yaw"] < dragged - 5)
    page.keyboard.up("ArrowLeft")

    page.evaluate(
        "window.texts = new Set(); new MutationObserver(() => texts.add($('answer').textContent))"
        ".observe($('answer'), {childList: true, characterData: true, subtree: true})"
    )
    ask(page, LEFT)
    views = read_array(folder / "runs/prepared/test/panoramas")[:1]
    features = model.features_of_views(views)
    ((expected,),) = model.answer_features(features, [[LEFT]], LIMITS.max_new_tokens)
    found = TEST_SCENES[0].at("left")
    assert found and f"{found.color} {found.shape}" in expected.text
    expect(page.locator("#answer")).to_have_text(expected.text)
    assert len(page.evaluate("[...texts]")) > 3  # they came one after the other
    expect(page.locator("#status")).to_contain_text("The whole answer")
    expect(page.locator("#references li")).to_have_text([answer(TEST_SCENES[0], "left", 0)])

    page.get_by_role("button", name=found.color).click()
    page.get_by_role("button", name=found.shape).click(modifiers=["Shift"])
    expect(page.locator("#peak")).to_contain_text(f"“{found.color} {found.shape}”: most of all")
    expect_map(page)
    # In the picture itself, not only in the text.
    assert heat(page, -90) > 2 * max(heat(page, 90), heat(page, 0))
    yaw = float(re.findall(r"yaw (.\d+)", page.inner_text("#peak"))[0].replace("−", "-"))
    assert abs((yaw - found.yaw + 180) % 360 - 180) < 25
    page.evaluate("viewer.look(90, 0)")
    page.get_by_role("button", name="Turn there").click()
    page.wait_for_timeout(300)
    assert abs(direction(page)["yaw"] - yaw) < 1
    page.get_by_role("button", name="Whole answer").click()
    expect(page.locator("#peak")).to_contain_text("The whole answer")


def test_the_keyboard_is_enough(page: Page) -> None:
    """And its focus is always seen."""

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            style = page.evaluate(
                "() => {const {outlineStyle, outlineWidth} = getComputedStyle("
                "document.activeElement.id === 'file' ? document.querySelector('label.button')"
                " : document.activeElement); return [outlineStyle, parseInt(outlineWidth)]}"
            )
            assert style[0] != "none" and style[1] >= 2
            if page.evaluate(f"document.activeElement.matches('{selector}')"):
                return
        raise AssertionError(f"no way to {selector}")

    tab_to("#viewer")
    tab_to("#question")
    page.keyboard.type(LEFT)
    page.keyboard.press("Enter")
    expect_map(page)
    tab_to(".word")
    with page.expect_request("**/look/maps") as asked:
        page.keyboard.press("End")
    text = page.inner_text("#answer")
    last = re.findall(r"\w+", text)[-1]
    assert part_of(asked.value) == [text.index(last), text.index(last) + len(last)]
    expect(page.locator(".word[aria-pressed=true]")).to_have_text([last])
    with page.expect_request("**/look/maps") as asked:
        page.keyboard.press("Shift+ArrowLeft")
    before = re.findall(r"\w+", text)[-2]
    expect(page.locator(".word[aria-pressed=true]")).to_have_text([before, last])
    assert part_of(asked.value)[0] == text.index(before)
    page.keyboard.press("Escape")
    expect(page.locator(".word[aria-pressed=true]")).to_have_count(0)
    tab_to("#strength")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#strength").input_value() == "79"
    tab_to("#file")
    tab_to("#thumbnails li:nth-child(2) button")
    page.keyboard.press("Enter")
    expect(page.locator("#name")).to_have_text("images/test_1.png")


def part_of(request: Request) -> list[int]:
    content = request.post_data_json
    assert content
    return content["part"]


def jpeg(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "gray").save(out, "JPEG")
    return out.getvalue()


FILES = {
    "notes.txt": (b"no picture", "notes.txt cannot be used: not a picture"),
    "square.jpg": (jpeg(64, 64), "square.jpg cannot be used: not 2:1: 64 x 64 pixels; an equirec"),
    "cut.jpg": (jpeg(640, 320)[:900], "cut.jpg cannot be used: cut off"),
    "wide.jpg": (jpeg(4096, 2048), "wide.jpg cannot be used: too large: 4096 x 2048 pixels"),
    "big.jpg": (bytes(1 << 21), "big.jpg is too large: a file may have 1 MiB"),
    "<script>.jpg": (b"<script>hacked=true</script>", "<script>.jpg cannot be used: not a"),
}


def test_a_wrong_file_is_refused_in_plain_words(page: Page, folder: Path, model: PanoLLaVA) -> None:
    """And a panorama of one's own can be asked about, chosen or dropped."""
    for name, (content, message) in FILES.items():
        file = {"name": name, "mimeType": "image/jpeg", "buffer": content}
        page.locator("#file").set_input_files(file)  # type: ignore[arg-type]
        expect(page.get_by_role("alert")).to_contain_text(message)
    own = folder / "own.png"
    Image.fromarray(render(TEST_SCENES[3], 256)).save(own)
    page.locator("#file").set_input_files(own)
    expect(page.locator("#name")).to_have_text("own.png")
    expect(page.get_by_role("alert")).to_be_hidden()
    ask(page, LEFT)
    expect(page.locator("#answer")).to_have_text(model.answer(own, [LEFT], 16)[0])
    page.reload()
    expect(page.locator("#question")).to_have_value(LEFT)
    ask(page, LEFT)
    expect(page.locator("#answer")).to_have_text(model.answer(own, [LEFT], 16)[0])
    page.evaluate(
        """() => {
            const files = new DataTransfer();
            files.items.add(new File(["no picture"], "dropped.txt"));
            document.body.dispatchEvent(
                new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
        }"""
    )
    expect(page.get_by_role("alert")).to_contain_text("dropped.txt cannot be used: not a picture")


def test_a_question_waits_for_the_file_that_is_read(
    page: Page, folder: Path, model: PanoLLaVA
) -> None:
    """It is about that panorama, not about the one before; and the last choice counts."""
    uploads: list[Route] = []
    page.route("**/look/panoramas", lambda route: uploads.append(route))
    for number in (1, 2):
        Image.fromarray(render(TEST_SCENES[number], 256)).save(folder / f"late_{number}.png")
        page.locator("#file").set_input_files(folder / f"late_{number}.png")
        page.get_by_label("Your question").fill(LEFT)
        page.get_by_role("button", name="Ask", exact=True).click()
        until(page, lambda: len(uploads) == number)  # noqa: B023
    for upload in reversed(uploads):
        with contextlib.suppress(Error):  # the first one was given up
            upload.continue_()
    expect(page.locator("#name")).to_have_text("late_2.png")
    expect(page.locator("#answer")).to_have_text(model.answer(folder / "late_2.png", [LEFT], 16)[0])
    page.locator("#file").set_input_files(folder / "late_1.png")
    page.locator("#thumbnails button").last.click()  # instead
    expect(page.locator("#name")).to_have_text("images/test_11.png")
    page.unroute("**/look/panoramas")


def test_the_gallery_is_searched_and_paged(page: Page, url: str) -> None:
    titles = page.locator("#thumbnails button")
    expect(titles).to_have_count(12)
    expect(page.locator("#count")).to_have_text("14 panoramas of the split “test”")
    page.get_by_role("button", name="Next").click()
    expect(titles).to_have_count(2)
    expect(page.get_by_role("button", name="Next")).to_be_disabled()
    page.get_by_label("Search names").fill("TEST_3")
    expect(titles).to_have_text(["test_3.png"])
    titles.click()
    expect(page.locator("#name")).to_have_text("images/test_3.png")
    page.get_by_role("button", name=LEFT).click()
    expect(page.locator("#references li")).to_have_text([answer(TEST_SCENES[3], "left", 0)])
    page.reload()
    expect(page.locator("#name")).to_have_text("images/test_3.png")
    expect(page.locator("#question")).to_have_value(LEFT)
    page.goto(f"{url}/#panorama=99")
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("not here any more; choose it again")


def test_texts_of_the_data_are_never_html(page: Page) -> None:
    page.get_by_label("Search names").fill("onerror")
    expect(page.locator("#thumbnails button")).to_have_count(1)
    page.locator("#thumbnails button").click()
    expect(page.locator("#name")).to_contain_text("<img src=x onerror=")
    page.get_by_role("button", name=MARKUP).click()
    expect_map(page)
    expect(page.locator("#asked")).to_have_text(MARKUP)
    expect(page.locator("#references li")).to_have_text([f"reference {MARKUP}"])


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_width_light_and_dark(
    browser: Browser, url: str, width: int, scheme: str
) -> None:
    viewport = {"width": width, "height": 844}
    with opened(browser, url, viewport=viewport, color_scheme=scheme, has_touch=True) as page:
        ask(page, LEFT)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        color, background = page.evaluate(
            "(style => [style.color, style.backgroundColor])(getComputedStyle($('result')))"
        )
        bright, dark = sorted((sum(rgb(background)), sum(rgb(color))), reverse=True)
        assert bright - dark > 450  # of 765
        assert (sum(rgb(background)) > 382) == (scheme == "light")
        if width == 390:  # a finger chooses words, too
            page.locator(".word").last.tap()
            expect(page.locator(".word[aria-pressed=true]")).to_have_count(1)


def rgb(color: str) -> list[int]:
    return [int(channel) for channel in re.findall(r"\d+", color)[:3]]


def test_outlines_of_the_views_are_drawn_on_demand(page: Page) -> None:
    def picture() -> bytes:
        page.wait_for_timeout(100)
        return page.locator("#viewer").screenshot()

    page.mouse.move(1, 1)
    before = picture()
    page.get_by_label("Outlines of the views").check()
    assert picture() != before
    page.get_by_label("Outlines of the views").uncheck()
    assert picture() == before


def test_without_webgl_the_panorama_is_flat_with_its_map(browser: Browser, url: str) -> None:
    context = browser.new_context()
    context.add_init_script(
        "const {getContext} = HTMLCanvasElement.prototype;"
        "HTMLCanvasElement.prototype.getContext = function (kind) {"
        "  return kind.includes('webgl') ? null : getContext.apply(this, arguments);"
        "};"
    )
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#viewer canvas.flat")).to_be_visible()
    pixels = "document.querySelector('canvas.flat').toDataURL()"
    before = page.evaluate(pixels)
    ask(page, LEFT)
    assert page.evaluate(pixels) != before
    context.close()


def test_without_a_project_the_page_takes_uploads(
    browser: Browser, model: PanoLLaVA, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own.png"
    Image.fromarray(render(TEST_SCENES[0], 128)).save(file)
    with serving(model, tmp_path) as url:
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#no-gallery")).to_be_visible()
        expect(page.locator("#browse")).to_be_hidden()
        page.get_by_label("Your question").fill(LEFT)
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("Choose a panorama first.")
        page.locator("#file").set_input_files(file)
        expect(page.locator("#name")).to_have_text("own.png")
        ask(page, LEFT)
        page.close()
    assert [*tmp_path.iterdir()] == [file]  # nothing is written
    page = browser.new_page()
    with serving(model, folder) as url:
        page.goto(url)
        expect(page.locator("#name")).not_to_be_empty()
    page.get_by_label("Your question").fill(LEFT)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
    page.close()


def test_views_of_other_settings_are_no_gallery(
    model: PanoLLaVA, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folder / "runs", tmp_path / "runs")
    file = tmp_path / paths.PREPARED / "provenance.json"
    file.write_text(file.read_text().replace('"views.size": 64', '"views.size": 32'))
    with serving(model, tmp_path) as url:
        assert httpx.get(f"{url}/look/start").json()["split"] is None
        assert httpx.get(f"{url}/look/panoramas").json() == {"total": 0, "panoramas": []}
    assert "no gallery" in caplog.text and "made with views.size 32, now 64" in caplog.text


GOOD = {"panorama": "0", "question": LEFT, "answer": "on the left", "part": None}
REQUESTS: dict[str, tuple[str, Any, int, str]] = {
    "a map": ("maps", GOOD, 200, ""),
    "a part": ("maps", {**GOOD, "part": [3, 11]}, 200, ""),
    "no panorama": ("maps", {**GOOD, "panorama": None}, 404, "choose it again"),
    "a list": ("answers", {**GOOD, "panorama": ["0"]}, 404, "choose it again"),
    "another number": ("answers", {**GOOD, "panorama": "00"}, 404, "choose it again"),
    "a number too large": ("answers", {**GOOD, "panorama": "9" * 5000}, 404, "choose it again"),
    "a path": ("answers", {**GOOD, "panorama": "../0"}, 404, "choose it again"),
    "no question": ("answers", {**GOOD, "question": " "}, 400, "question: no question"),
    "a question that is a number": ("answers", {**GOOD, "question": 3}, 400, "expected text"),
    "a long question": ("answers", {**GOOD, "question": "a" * 30_000}, 400, "at most 20,000"),
    "more than the model's window": ("answers", {**GOOD, "question": "?" * 19_000}, 400, "shorten"),
    "a long answer": ("maps", {**GOOD, "answer": "?" * 19_000}, 400, "shorten"),
    "a part that is text": ("maps", {**GOOD, "part": "all"}, 400, "part: expected"),
    "a part of true": ("maps", {**GOOD, "part": [False, True]}, 400, "part: expected"),
    "a part outside": ("maps", {**GOOD, "part": [0, 12]}, 400, "part: expected"),
    "an empty part": ("maps", {**GOOD, "part": [3, 3]}, 400, "part: expected"),
    "JSON of another kind": ("maps", [1], 400, "must be a JSON object"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_hostile_request_gets_a_clear_answer(url: str, name: str) -> None:
    path, content, status, message = REQUESTS[name]
    response = httpx.post(f"{url}/look/{path}", json=content, timeout=60)
    assert response.status_code == status, response.text
    if status != 200:
        assert message in response.json()["error"]["message"]


def test_only_the_page_itself_may_use_the_server(url: str) -> None:
    """Not a page of another site that the same browser shows, and no form of one."""
    with httpx.Client(base_url=url, timeout=60) as client:
        page = client.get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 403
        other = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        for path in ("/look/pictures/0", "/look/start", "/v1/models", "/"):
            assert client.get(path, headers=other).status_code == 403, path
            assert client.get(path, headers={**other, "Sec-Fetch-Site": "same-origin"}).is_success
        opened = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert client.get("/", headers=opened).is_success  # a link to the page
        assert client.post("/look/panoramas", headers=opened).status_code == 403
        for path, kind in (("panoramas", "text/plain"), ("panoramas", ""), ("maps", "text/plain")):
            sent = client.post(f"/look/{path}", content=b"{}", headers={"Content-Type": kind})
            assert sent.status_code == 415
        for path in ("/assets/%2e%2e", "/assets/%2e%2e%2flook.py", "/assets/a.js"):
            assert client.get(path).status_code == 404
        for path in ("/look/pictures/14", "/look/pictures/..", "/look/panoramas?start=-1"):
            assert client.get(path).status_code in (400, 404)


def test_an_error_of_the_map_is_told_and_the_page_goes_on(
    page: Page, model: PanoLLaVA, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(HeatMaps, "heat_map", Mock(side_effect=KeyError("lost")))
        page.get_by_label("Your question").fill(LEFT)
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("internal error (KeyError)")
        expect(page.locator("#peak")).to_have_text("There is no map of these words.")
    ask(page, LEFT)


def test_the_command_opens_a_browser(
    model: PanoLLaVA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At the page's address, once the model is loaded."""
    opened = threading.Event()
    address: list[str] = []

    def open_browser(url: str) -> None:
        address.append(httpx.get(url).text)
        opened.set()
        servers[0].should_exit = True

    def make(*arguments: Any) -> Any:
        servers.append(make_page_server(*arguments))
        return servers[0]

    servers: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", open_browser)
    monkeypatch.setattr("panollava.serving.look.make_page_server", make)
    with bind("127.0.0.1", 0) as listener:
        # Playwright has an event loop in this thread.
        thread = threading.Thread(
            target=look, args=(model, "the model", listener, [], LIMITS, True)
        )
        thread.start()
        thread.join(60)
    assert opened.is_set() and "<title>PanoLLaVA</title>" in address[0]
    with bind("127.0.0.1", 0) as listener:
        port = str(listener.getsockname()[1])
        with pytest.raises(SystemExit, match=f"port {port}: Address already in use; choose"):
            cli.main(["look", "--port", port])


def test_the_viewer_works_in_a_file(browser: Browser, tmp_path: Path) -> None:
    """Opened by a double click, with the picture inside."""
    assets = ROOT / "src/panollava/serving/assets"
    inline = {name: (assets / name).read_text() for name in ("pannellum.js", "viewer.js")}
    scripts = "".join(f"<script>{text}</script>" for text in inline.values())
    style = (assets / "style.css").read_text()
    file = tmp_path / "page.html"
    file.write_text(f"<style>{style}</style><div class=viewer id=v></div>{scripts}")
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    shown = page.evaluate(
        """async () => {
            const canvas = Object.assign(document.createElement("canvas"), {width: 64, height: 32});
            window.viewer = new PanoramaViewer(document.getElementById("v"));
            await viewer.show(canvas.toDataURL());
            viewer.setMap({width: 2, height: 1, values: btoa("\\xff\\x00")});
            viewer.look(-90, 10);
            const refused = await viewer.show("data:image/png;base64,AAAA").catch(() => true);
            return [viewer.direction().yaw, refused];
        }"""
    )
    assert shown == [-90, True] and not errors
    page.evaluate("viewer.destroy()")
    assert page.locator("#v > *").count() == 0
    page.close()


def test_an_installed_package_has_the_page(tmp_path: Path) -> None:
    """With the licenses of what is not ours."""
    for name in ("pyproject.toml", "README.md", "LICENSE", *map(str, ROOT.glob("require*.txt"))):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", "wheel", ".")
    subprocess.run([sys.executable, *build], cwd=tmp_path, check=True, env={**os.environ})
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    packaged = set(zipfile.ZipFile(wheel).namelist())
    assets = (ROOT / "src").glob("panollava/serving/assets/*")
    assert {str(file.relative_to(ROOT / "src")) for file in assets} <= packaged
    assert "panollava/serving/assets/pannellum-LICENSE.txt" in packaged
