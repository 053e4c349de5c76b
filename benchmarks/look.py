"""The page of `panollava look` with the demo's model loaded: the time until it can be used, and
from the click on Ask to the first word and to the heat map, in headless Chromium.

Nothing is measured without Chromium, or before `make repro`."""

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

sys.path.append(f"{sys.prefix}/bench")  # requirements-bench.txt
from playwright.sync_api import Page, sync_playwright

from measure import PANOLLAVA, ROOT, Line, options_parser, report
from panollava import paths
from panollava.demo.questions import QUERIES
from panollava.demo.render import render
from panollava.demo.scenes import make_scene

CHROMIUM = Path("/usr/bin/chromium")
MODEL = ROOT / paths.weights_file("finetune")
OPTIONS = ("--no-sandbox", "--enable-unsafe-swiftshader", "--disable-background-networking")
MOST = {"the page can be used": 2.0, "first word": 1.5, "heat map": 3.0}  # seconds
# When a word or the map is there, without the delays of looking for it from outside.
WATCH = """
window.times = {};
new MutationObserver(() => {
    if ($("answer").textContent) times.word ??= performance.now();
    if (!$("turn").disabled || /mattered much/.test($("peak").textContent)) {
        times.map ??= performance.now();
    }
}).observe($("result"), {childList: true, characterData: true, subtree: true, attributes: true});
$("ask").addEventListener("submit", () => times.click = performance.now(), {capture: true});
"""


def main() -> None:
    options = options_parser(__doc__, repeats=10).parse_args()
    for file, remedy in ((CHROMIUM, "as root: apt-get install chromium"), (MODEL, "make repro")):
        if not file.is_file():
            sys.stderr.write(f"{file} is missing ({remedy}); nothing was measured\n")
            return
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        panoramas = save_panoramas(Path(folder), options.repeats + 1)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        with serving() as url:
            measured = [measure(browser.new_page(), url, file) for file in panoramas][1:]
        browser.close()
    lines = [
        Line(f"panollava look: {name}", "s", statistics.median(each), at_most=most)
        for (name, most), each in zip(MOST.items(), zip(*measured, strict=True), strict=True)
    ]
    report(lines, options.out)


def save_panoramas(folder: Path, count: int) -> list[Path]:
    """Each repeat asks about another one, of which nothing is remembered."""
    files = [folder / f"{index}.png" for index in range(count)]
    for index, file in enumerate(files):
        Image.fromarray(render(make_scene(9, index), 256)).save(file)
    return files


@contextlib.contextmanager
def serving() -> Iterator[str]:
    command = [*PANOLLAVA, "look", "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr
        line = next(line for line in server.stderr if "look at " in line)
        yield line.split("look at ")[1].strip()
    finally:
        server.kill()
        server.wait()


def measure(page: Page, url: str, panorama: Path) -> tuple[float, float, float]:
    """Seconds: until the first panorama is drawn and a question can be typed; from the click to the
    first word; and to the heat map."""
    start = time.perf_counter()
    page.goto(url)
    page.wait_for_selector("#viewer canvas")
    page.get_by_label("Your question").fill(QUERIES["left"])
    usable = time.perf_counter() - start
    page.locator("#file").set_input_files(panorama)
    page.locator("#name", has_text=panorama.name).wait_for()
    page.evaluate(WATCH)
    page.get_by_role("button", name="Ask", exact=True).click()
    while "map" not in (times := page.evaluate("times")):
        assert time.perf_counter() - start < 120, page.inner_text("body")
        time.sleep(0.05)
    page.close()
    return usable, (times["word"] - times["click"]) / 1000, (times["map"] - times["click"]) / 1000


if __name__ == "__main__":
    main()
