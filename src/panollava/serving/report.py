"""`panollava report`, the last stage of the pipeline: parameters, curves, scores and answers on one
page, a file that needs no connection and no server."""

import base64
import dataclasses
import json
import logging
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from tqdm import tqdm

from panollava import paths
from panollava.config import Settings
from panollava.data.shards import Shards, open_views, verify
from panollava.errors import UserError
from panollava.files import write_text
from panollava.serving import project_record as project
from panollava.serving.charts import HEIGHT, WIDTH, stage_charts
from panollava.serving.gallery import Gallery, Panorama, choose, read_project_predictions, shorten
from panollava.stages import STAGES

if TYPE_CHECKING:  # slow to import, and not needed without --compare
    from panollava.serving.compare import Differences

log = logging.getLogger(__name__)

READS = ("seed", "data", "views", "model", "stage", "trainer", "evaluate")
_ASSETS = Path(__file__).parent / "assets"
_REFERENCES = 3  # of a query
_SAMPLE_ROWS = 4  # of a panorama in the picture for `dvc plots`

# By panorama, for each of its rows; see viewer.js. None: an empty answer has no map.
Maps = dict[int, list[dict[str, Any] | None]]


def write_report(
    settings: Settings,
    out: Path = paths.REPORT,
    with_maps: bool = True,
    differences: "Differences | None" = None,
) -> None:
    """Write the page, and in the stage's own folder also the picture for `dvc plots show`.

    Args:
        with_maps: compute the maps of the answers, which needs the model with its towers.
        differences: those to another commit, shown too.

    Raises:
        UserError: a result is missing or damaged, or does not match the settings.
    """
    gallery = choose(read_project_predictions())
    pictures = _pictures(settings, gallery)
    details = _json(paths.EVALUATION_DETAILS, "evaluate")
    charts = {stage: stage_charts(stage) for stage in STAGES}
    metrics = {stage: _json(paths.metrics_file(stage), stage) for stage in STAGES}
    pages = _templates()
    page = pages.get_template("report.html.jinja").render(
        data=settings.data.dir,
        split=settings.evaluate.split,
        details=details,
        scores=project.scores(details),
        rotation=project.rotation_scores(details),
        scores_note=project.SCORES_NOTE,
        stages=STAGES,
        metrics=metrics,
        charts=charts,
        width=WIDTH,
        height=HEIGHT,
        gallery=gallery,
        references=_REFERENCES,
        pictures=pictures,
        maps=_maps(settings, gallery) if with_maps else None,
        parameters={name: _flatten(getattr(settings, name), name) for name in READS},
        differences=differences,
    )
    if out == paths.REPORT:
        shown = {name: group[0] for name, group in gallery.groups.items()}
        sample = pages.get_template("panoramas.svg.jinja")
        write_text(
            paths.SAMPLE, sample.render(score=gallery.score, panoramas=[*_sample(shown, pictures)])
        )
    write_text(out, page)
    log.info("wrote %s (%.1f MB)", out, len(page.encode()) / 1e6)


def _templates() -> Environment:
    """Templates, in which texts from data are never HTML."""
    pages = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"short": shorten, "words": _words}
    pages.globals["asset"] = lambda name: Markup((_ASSETS / name).read_text(encoding="utf-8"))
    return pages


def _words(name: str) -> str:
    """The name of a score as the field writes it, others without underscores."""
    for key, text in (("bleu_4", "BLEU-4"), ("rouge_l", "ROUGE-L"), ("cider_d", "CIDEr-D")):
        name = name.replace(key, text)
    return name.replace("_", " ")


def _pictures(settings: Settings, gallery: Gallery) -> dict[int, str]:
    """The reduced panoramas as base64."""
    shards = Shards(paths.PREPARED / settings.evaluate.split / paths.PICTURES)
    _check_numbers(shards, gallery)
    verify([shards])
    numbers = [each.number for each in gallery.panoramas]
    return {number: base64.b64encode(shards[number]).decode() for number in numbers}


def _check_numbers(shards: Shards, gallery: Gallery) -> None:
    """Raises UserError if the predictions name a panorama that there is not."""
    largest = max(panorama.number for panorama in gallery.panoramas)
    if largest >= len(shards):
        raise UserError(
            f"{shards.folder}: {len(shards)} panoramas, but {paths.PREDICTIONS} names number "
            f"{largest}; run: dvc repro evaluate (without DVC: panollava evaluate)"
        )


def _json(file: Path, stage: str) -> dict[str, Any]:
    if not file.is_file():
        command = f"train {stage}" if stage in STAGES else stage
        raise UserError(
            f"{file}: no such file; run: dvc repro {stage} (without DVC: panollava {command})"
        )
    return project.read(file)


def _maps(settings: Settings, gallery: Gallery) -> Maps:
    """Where the model looked for each answer."""
    from panollava.model.device import configure_cpu  # torch is slow to import
    from panollava.model.heat_map import HeatMaps, encode_map
    from panollava.model.panollava import load_finetuned

    configure_cpu(settings.trainer.threads)
    model = load_finetuned(settings)
    folder = paths.PREPARED / settings.evaluate.split / paths.PANORAMAS
    views = open_views(folder, settings.views)
    _check_numbers(views, gallery)
    verify([views])
    maps: Maps = {}
    for panorama in tqdm(gallery.panoramas, desc="maps", delay=2, disable=None):
        computed = HeatMaps(model, np.array(views[panorama.number]))
        pairs = [(row.query, row.answer) for row in panorama.rows]
        computed.compute([pair for pair in pairs if pair[1]])
        maps[panorama.number] = [
            encode_map(computed.heat_map(*pair)) if pair[1] else None for pair in pairs
        ]
    return maps


def _flatten(value: Any, key: str) -> dict[str, str]:
    """The parameters of a section by dotted keys, as YAML writes short values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, dict):
        return {key: json.dumps(value, ensure_ascii=False)}
    parts = (_flatten(each, f"{key}.{name}") for name, each in value.items())
    return {name: text for part in parts for name, text in part.items()}


def _sample(panoramas: dict[str, Panorama], pictures: dict[int, str]) -> Iterator[dict[str, Any]]:
    """Panoramas with lines of text that fit beside them."""
    for title, panorama in panoramas.items():
        texts = [
            (name, line)
            for row in panorama.rows[:_SAMPLE_ROWS]
            for name, text in (("query", row.query), ("answer", row.answer))
            for line in textwrap.wrap(text, 62, max_lines=2, placeholder=" …")
        ]
        yield {
            "title": title,
            "panorama": panorama,
            "picture": pictures[panorama.number],
            "lines": texts,
        }
