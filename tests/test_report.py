"""The report: one file that opens anywhere, says what was measured, and reads texts as texts."""

import base64
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import Project, read_array, save_shards
from panollava import paths
from panollava.cli import main as cli
from panollava.config import load_settings
from panollava.data.images import reduced_jpeg
from panollava.evaluation.captions import score
from panollava.evaluation.grounding import swapped_answers
from panollava.evaluation.metrics import PREDICTION, compute_details, group_references, headline
from panollava.files import read_prepared_rows, write_csv, write_json
from panollava.serving import charts, gallery

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=alert(1)> & \"'"


@pytest.fixture
def root(finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of a finished project with answers, as the small towers give none."""
    shutil.copytree(finished.folder, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    for file in Path("runs").rglob("*"):  # DVC may have linked it to the cache
        if file.is_file() and (file.is_symlink() or not file.stat().st_mode & 0o200):
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(content)
    write_answers()
    Project(Path()).replace("params.yaml", "threads: 2 # CPU", "threads: 1 # CPU")
    threads = torch.get_num_threads()
    yield Path()
    torch.set_num_threads(threads)


def write_answers() -> None:
    """The query `what` stays without one."""
    rows = read_prepared_rows(paths.PREPARED / "test/rows.csv")
    references = group_references(rows)
    answers = {key: f"the {key[1]} box is left." * (key[1] != "what") for key in references}
    scores = score(answers, references)
    details = compute_details({PREDICTION: answers}, references, [], None, scores)
    write_json(paths.EVALUATION_DETAILS, details)
    write_json(paths.EVALUATION, headline(details, None))
    table = pd.read_csv(paths.PREDICTIONS, dtype=str, keep_default_na=False)
    swapped, *_ = swapped_answers(answers)
    columns = {name: [*each.values()] for name, each in scores.each.items()}
    write_csv(
        paths.PREDICTIONS,
        table.assign(
            prediction=[*answers.values()],
            swapped=[swapped.get(key, "") for key in references],
            **columns,
        ),
    )


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser, offline."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM.is_file():
        pytest.skip(f"needs {CHROMIUM} (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox", "--enable-unsafe-swiftshader"]
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=options)
        yield browser
        browser.close()


class Opened:
    """The report as a reader opens it: from the disk, without a network."""

    def __init__(self, chromium: Any, **options: Any) -> None:
        self.problems: list[str] = []
        self.page = chromium.new_context(offline=True, **options).new_page()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", self._request)
        self.page.goto(f"file://{paths.REPORT.resolve()}")

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(message.text)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((f"file://{paths.REPORT.resolve()}", "data:", "blob:")):
            self.problems.append(request.url)


def report(*options: str) -> str:
    cli.main(["report", *options])
    return paths.REPORT.read_text(encoding="utf-8")


def change_predictions(**first_row: str) -> pd.DataFrame:
    table = pd.read_csv(paths.PREDICTIONS, dtype=str, keep_default_na=False)
    for name, value in first_row.items():
        table.loc[0, name] = value
    write_csv(paths.PREDICTIONS, table)
    return table


def test_the_page_opens_from_the_disk_and_reads_texts_as_texts(root: Path, chromium: Any) -> None:
    references = json.dumps([HOSTILE, "a </script> b"])
    change_predictions(
        query=HOSTILE, prediction=HOSTILE, swapped=HOSTILE, references=references, url=HOSTILE
    )
    report()
    opened = Opened(chromium)
    page = opened.page
    assert page.title().startswith("PanoLLaVA report")
    page.evaluate(
        "() => { window.drawn = []; const setMap = PanoramaViewer.prototype.setMap;"
        "PanoramaViewer.prototype.setMap = function (map) {"
        "drawn.push(map && map.values); setMap.call(this, map); }; }"
    )
    card = page.locator("article[data-number='0']")
    for place in (".query", ".answer", ".title", "dd >> nth=0", "dd >> nth=1"):
        assert HOSTILE in card.locator(place).first.text_content(), place
    assert page.locator("article .turn").count() == 3
    card.locator("button.answer").first.click()
    page.wait_for_selector("article .viewer canvas")
    assert card.locator(".map-controls").is_visible()
    assert page.locator("[aria-pressed=true].answer").count() == 1
    page.wait_for_function("drawn.length === 1")
    values = base64.b64decode(page.evaluate("drawn[0]"))
    assert len(values) == 45 * 90 and max(values) > 0
    card.locator("button.answer").first.click()  # again: it is removed
    page.wait_for_function("drawn.length === 2 && drawn[1] === null")
    assert not card.locator(".map-controls").is_visible()
    assert page.locator("p.answer").count() == 1  # an empty answer has no map
    # One viewer at a time.
    page.locator("article .turn").nth(1).click()
    page.locator("article .turn").nth(2).click()
    page.wait_for_selector("article .viewer canvas")
    assert page.locator(".viewer").count() == 1
    assert page.locator("article img").count() == 2
    assert page.locator("[aria-pressed=true].answer").count() == 0
    assert opened.problems == []
    # Nor could it load anything.
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'https://example.org/'}))")
    page.wait_for_timeout(100)
    assert any("Content Security Policy" in problem for problem in opened.problems)


def test_without_javascript_everything_but_the_viewer_is_there(root: Path, chromium: Any) -> None:
    report("--no-maps")
    page = Opened(chromium, java_script_enabled=False, viewport={"width": 390, "height": 844}).page
    for stage in ("vision", "resampler", "finetune"):
        assert page.locator(f".card:has(h3:text-is('{stage}')) svg").first.is_visible()
    assert page.locator("article img").count() == 3
    assert page.locator("article .answer").first.is_visible()
    assert page.get_by_text("needs JavaScript").is_visible()
    assert not page.locator(".turn").first.is_visible()


def test_a_phone_shows_it_without_scrolling_sideways(root: Path, chromium: Any) -> None:
    report("--no-maps")
    page = Opened(chromium, viewport={"width": 390, "height": 844}).page
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    page.locator("article .turn").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_two_copies_of_a_project_write_the_same_bytes(root: Path, tmp_path: Path) -> None:
    report()
    first = [file.read_bytes() for file in (paths.REPORT, paths.SAMPLE)]
    other = tmp_path / "elsewhere/copy"
    shutil.copytree(root, other, symlinks=True)
    shutil.rmtree(other / "runs/report")
    copy = Project(other)
    copy.run("python", "src/run.py", "report", environment={"PYTHONHASHSEED": "7"})
    assert [(other / file).read_bytes() for file in (paths.REPORT, paths.SAMPLE)] == first
    assert str(tmp_path).encode() not in first[0]


def test_the_page_says_what_was_measured(root: Path) -> None:
    page = report("--no-maps")
    details = json.loads(paths.EVALUATION_DETAILS.read_text())
    for name in ("rouge_l", "bleu_1"):
        shown = f">{details[name]:.3f}<" in page
        assert shown == (name == "rouge_l")
    interval = details["interval"]["rouge_l"]
    assert f"{interval['low']:.3f} to {interval['high']:.3f}" in page
    settings = load_settings(paths.PARAMS)
    assert (
        f"<code>stage.finetune.lr</code></th><td><code>{settings.stage.finetune.lr}</code>" in page
    )
    assert "loader_workers" not in page  # belongs to the machine
    assert "were left out (<code>--no-maps</code>)" in page
    change_predictions()
    table = pd.read_csv(paths.PREDICTIONS, dtype=str, keep_default_na=False)
    write_csv(paths.PREDICTIONS, table.assign(swapped="", cider_d="", rouge_l=""))
    page = report("--no-maps")
    assert "none: no other panorama was asked this" in page
    assert "No answer has a score, so the panoramas stand in their order." in page


def test_many_large_panoramas_with_long_texts_make_a_small_page(root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1024, 2048, 3), dtype=np.uint8)
    jpeg = reduced_jpeg(noise)
    assert len(jpeg) > 1 << 17
    count, folder = 60, paths.PREPARED / "test" / paths.PICTURES
    save_shards(folder, [jpeg] * count)
    row = pd.read_csv(paths.PREDICTIONS, dtype=str, keep_default_na=False).iloc[0]
    long = "파노라마 " * 250
    rows = [
        {**row, "panorama": number, "query": f"{query} {long}", "swapped": long, "prediction": "a"}
        | {"references": json.dumps([long] * 9)}
        for number in range(count)
        for query in range(20)
    ]
    write_csv(paths.PREDICTIONS, pd.DataFrame(rows))
    page = report("--no-maps")
    assert page.count("<article") == 6 and page.count('class="query"') == 6 * 12
    assert "8 more queries about this panorama" in page and "and 6 more" in page
    assert paths.REPORT.stat().st_size < 15e6 - 9 * 12 * 6000  # room for the maps


def remove(file: str) -> None:
    path = Path(file)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(file: str) -> None:
    Path(file).write_bytes(Path(file).read_bytes()[:-20])


def change_last_byte(file: str) -> None:
    content = bytearray(Path(file).read_bytes())
    content[-1] ^= 1
    Path(file).unlink()
    Path(file).write_bytes(content)


def garble(file: str) -> None:
    Path(file).write_text("step\tloss\n1\t0.\x001\n")


def shorten(folder: str) -> None:
    save_shards(Path(folder), read_array(Path(folder))[:1])


FAULTS = {
    "no answers": (
        remove,
        "runs/evaluate/predictions.csv",
        "no such file; run: dvc repro evaluate",
    ),
    "half of the answers": (cut, "runs/evaluate/predictions.csv", "not what evaluate writes"),
    "no details": (remove, "runs/evaluate/details.json", "no such file; run: dvc repro evaluate"),
    "half of the details": (cut, "runs/evaluate/details.json", "not valid JSON"),
    "no picture": (
        remove,
        "runs/prepared/test/pictures/000000.tar",
        "no such file, but it is in runs/prepared/test/pictures/manifest.json; restore the file",
    ),
    "half a picture": (cut, "runs/prepared/test/pictures/000000.tar", "10220 bytes instead"),
    "a changed picture": (
        change_last_byte,
        "runs/prepared/test/pictures/000000.tar",
        "other content than in runs/prepared/test/pictures/manifest.json; restore the file",
    ),
    "changed views": (
        change_last_byte,
        "runs/prepared/test/panoramas/000000.npy",
        "other content than in runs/prepared/test/panoramas/manifest.json; restore the file",
    ),
    "no curves": (remove, "metrics/vision/plots", "no such folder; run: dvc repro vision"),
    "no numbers": (garble, "metrics/finetune/plots/metrics/val/loss.tsv", "not a curve"),
    "no metrics": (
        remove,
        "metrics/finetune/metrics.json",
        "no such file; run: dvc repro finetune",
    ),
    "no model": (remove, "runs/vlm_finetune/model_final.safetensors", "no such"),
    "few views": (shorten, "runs/prepared/test/panoramas", "1 panoramas, but"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_missing_and_damaged_files_are_named(
    root: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, file, message = FAULTS[name]
    damage(file)
    remove("runs/report")
    with pytest.raises(SystemExit):
        report()
    output = capsys.readouterr().err
    assert f"{file}: {message}" in output and "Traceback" not in output, output
    assert not paths.REPORT.exists()


def test_a_comparison_shows_both_and_leaves_the_pipeline_as_it_is(root: Path) -> None:
    project = Project(Path.cwd())
    commit = project.run("git", "rev-parse", "HEAD").strip()
    table = change_predictions(prediction=HOSTILE)
    file = paths.metrics_file("finetune")
    metrics = json.loads(file.read_text())
    file.write_text(json.dumps({**metrics, "val_loss": 0.125}))
    project.replace("params.yaml", "max_new_tokens: ", "max_new_tokens: 1")
    answers = project.run("git", "status", "--short")
    cli.main(["report", "--no-maps", "--compare", commit])
    out = Path(f"runs/report-{commit}.html")
    page = " ".join(out.read_text(encoding="utf-8").split())
    # The answers of the commit are empty.
    changed = sum(table["prediction"] != "")
    assert f"{changed} of {len(table)} answers to the same queries differ." in page
    before = f"{metrics['val_loss']:.3f}"
    assert f'>{before}</td><td class="number">0.125</td>' in page
    assert "<code>evaluate.max_new_tokens</code>" in page
    assert "<script>document.title" not in page
    assert project.run("git", "status", "--short") == answers  # the page is ignored


def test_a_comparison_that_cannot_be_made_is_an_error(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project(Path.cwd())
    project.run("git", "rm", "-q", "--cached", "metrics/evaluate/metrics.json")
    project.run("git", "commit", "-qm", "no results")
    cache = Path(project.run("dvc", "cache", "dir").strip())
    for revision, message in (
        ("nowhere", "no such commit or experiment"),
        ("HEAD", "no metrics/evaluate/metrics.json there"),
        ("HEAD~1", "its runs/evaluate/predictions.csv is not in DVC's cache"),
    ):
        if revision == "HEAD~1":
            shutil.rmtree(cache)
        with pytest.raises(SystemExit):
            cli.main(["report", "--no-maps", "--compare", revision])
        assert f"--compare {revision}: {message}" in capsys.readouterr().err


def test_dvc_plots_show_curves_scores_and_panoramas(finished: Project) -> None:
    finished.run("dvc", "plots", "show", "--out", "plots", "--html-template", "", check=False)
    finished.run("dvc", "plots", "show", "--out", "plots")
    page = (finished.folder / "plots/index.html").read_text(encoding="utf-8")
    for name in ("learning rate", "gradient norm", "validation accuracy", "CIDEr-D by query"):
        assert name in page, name
    assert re.search(r"<img [^>]*panoramas\.svg", page)


def predictions(scores: list[float | None]) -> pd.DataFrame:
    row = {"url": "a.jpg", "query": "q", "prediction": "a", "swapped": "", "references": ["a"]}
    table = pd.DataFrame([{**row, "panorama": n, "cider_d": s} for n, s in enumerate(scores)])
    return table.assign(rouge_l=math.nan, cider_d=table["cider_d"].astype(float))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0], {"best": [0]}),
        ([1.0, 2.0], {"best": [1], "worst": [0]}),
        ([1.0, 3.0, 2.0], {"best": [1], "median": [2], "worst": [0]}),
        ([1.0, 1.0, 1.0, 1.0], {"best": [0], "median": [1], "worst": [3]}),
        ([float(n) for n in range(98)], {"best": [97, 96], "median": [49, 48], "worst": [1, 0]}),
        ([1.0, None, 2.0], {"best": [2], "median": [0], "worst": [1]}),
    ],
)
def test_the_best_median_and_worst_panoramas_are_chosen(
    scores: list[float | None], expected: dict[str, list[int]]
) -> None:
    chosen = gallery.choose(predictions(scores)).groups
    assert {name: [each.number for each in group] for name, group in chosen.items()} == expected


def test_a_chart_covers_all_finite_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("metrics/vision/plots/metrics/train")
    folder.mkdir(parents=True)
    lines = [f"{step}\t{math.sin(step) * 1e-5}" for step in range(5000)]
    (folder / "loss.tsv").write_text("\n".join(["step\tloss", "0\tnan", "1\tinf", *lines]))
    (folder / "norm.tsv").write_text("step\tnorm\n1\tnan\n")
    (chart,) = charts.stage_charts("vision")
    (places,) = chart.places
    assert 200 < len(places) <= 401 and places[-1][0] == pytest.approx(319.9, abs=0.1)
    for x, y in [*places, *((x, 0) for x, _ in chart.x_ticks), *((0, y) for y, _ in chart.y_ticks)]:
        assert 0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT
    assert [label for _, label in chart.x_ticks] == ["0", "1000", "2000", "3000", "4000", "5000"]
    assert [label for _, label in chart.y_ticks] == ["-1e-05", "-5e-06", "0", "5e-06", "1e-05"]
    assert chart.description.startswith("loss by step: training from 0 to -6.6")


def test_a_missing_tower_is_an_error_unless_maps_are_left_out(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("small/towers/language_model")
    with pytest.raises(SystemExit):
        report()
    assert "small/towers/language_model" in capsys.readouterr().err
    assert "were left out" in report("--no-maps")
