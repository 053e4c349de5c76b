"""The README.md of an exported model: what it was trained on and how, what it was measured to be
worth, its limits and licenses. What the project does not say is "unknown"."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from panollava import paths
from panollava.config import Pretrained, load_settings
from panollava.data.rows import SPLITS
from panollava.errors import UserError
from panollava.model.panollava import PanoLLaVA
from panollava.provenance.fingerprint import file_sha256
from panollava.stages import STAGES, Stage

UNKNOWN, NONE_STATED = "unknown", "none stated"
_STARTED, _WROTE = " INFO panollava: log: ", " INFO panollava.training.train: wrote "
_DEVICE = " INFO panollava.training.train: device: "


def model_card(model: PanoLLaVA, header: dict[str, Any], result: Path, name: str) -> str:
    """The card of the exported folder `name`. `result`: the file that is exported, with `header`.

    Data, training and metrics are those of the project in the working directory, if `result` holds
    the same bytes as its result of that stage."""
    stage = model.header.stage
    ours = paths.weights_file(stage.name)
    known = ours.is_file() and file_sha256(ours) == file_sha256(result)
    prepared = _read(paths.PREPARED / "provenance.json") if known else {}
    details = _read(paths.EVALUATION_DETAILS) if known and not _following(stage) else {}
    data = prepared.get("data.dir")
    sections = {
        "Use": _use(name),
        "Model": _model(model, header),
        "Data": _data(prepared) if data else UNKNOWN,
        "Training": _training(stage) if known else UNKNOWN,
        "Evaluation": _evaluation(details, prepared) if details else UNKNOWN,
        "Limits": _LIMITS,
        "Licenses": _licenses(model, Path(data) if data else None),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    results = _results(details, prepared) if details and data else None
    towers = (model.header.model.encoder, model.header.model.language_model)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license="unknown",
        tags=["panollava", "panorama", "equirectangular"],
        base_model=[tower.path for tower in towers if not Path(tower.path).is_dir()] or None,
        model_name=name,
        eval_results=results,
    )
    card = f"---\n{metadata.to_yaml()}\n---\n\n# {name}\n\n{_INTRODUCTION}\n\n{body}\n"
    return str(ModelCard(card))


_INTRODUCTION = (
    "A vision-language model that answers questions about 360° equirectangular panoramas, trained "
    "with PanoLLaVA."
)
_LIMITS = """\
- It answers one question about one equirectangular panorama, twice as wide as high. Other pictures
  are refused.
- It was trained on the data named here, and knows no others. Where the grounding gap is small,
  answers follow the question more than the picture.
- An answer may be wrong, and says nothing of its confidence. Do not rely on it where that can do
  harm.
- Answers are those of PanoLLaVA in float32. In half precision some differ.
- It was not run in vLLM or SGLang."""


def _use(name: str) -> str:
    return f"""\
Needs transformers 5, OpenCV and Pillow. The folder carries its code: read it, then pass
`trust_remote_code=True`. With PanoLLaVA installed, `import panollava.hf` registers the same
classes.

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="{name}", trust_remote_code=True)
parts = [{{"type": "image", "path": "panorama.jpg"}}, {{"type": "text", "text": "what is behind?"}}]
ask(text=[{{"role": "user", "content": parts}}], return_full_text=False)
```"""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _model(model: PanoLLaVA, header: dict[str, Any]) -> str:
    trained = {
        part
        for stage in [model.header.stage, *_before(model.header.stage)]
        for part in stage.trains
    }
    parts = [
        (part, f"{_count(module):,}", "trained" if part in trained else "frozen")
        for part, module in model.network.named_children()
    ]
    settings = json.dumps(header["settings"], indent=2, ensure_ascii=False)
    towers = json.dumps(header["towers"], indent=2)
    return "\n\n".join(
        [
            f"A result of stage `{model.header.stage.name}`.",
            _table(["part", "parameters", ""], parts),
            f"Settings:\n\n```json\n{settings}\n```",
            "Pretrained towers, by commit or by the SHA-256 of their files:\n\n"
            f"```json\n{towers}\n```",
        ]
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _before(stage: Stage) -> list[Stage]:
    """The stages whose results this one was trained from, the first one first."""
    if stage.starts_from is None:
        return []
    earlier = STAGES[stage.starts_from]
    return [*_before(earlier), earlier]


def _following(stage: Stage) -> list[Stage]:
    return [other for other in STAGES.values() if other.starts_from == stage.name]


def _data(prepared: dict[str, Any]) -> str:
    folder = Path(prepared["data.dir"])
    rows = []
    for split in SPLITS:
        kept = _rows(paths.PREPARED / split / "rows.csv")
        rejects = _rows(paths.PREPARED / split / "rejects.csv")
        source = folder / f"{split}.csv"
        rows.append(
            (
                split,
                UNKNOWN if kept is None else len(kept),
                UNKNOWN if kept is None else kept["panorama"].nunique(),
                _kinds(rejects),
                f"`{file_sha256(source)}`" if source.is_file() else UNKNOWN,
                f"`{prepared.get('files', {}).get(f'{split}/views.npy', UNKNOWN)}`",
            )
        )
    head = ["split", "rows", "panoramas", "rejected rows", "SHA-256 of the rows", "of the views"]
    return f"`{folder}`\n\n{_table(head, rows)}"


def _rows(path: Path) -> pd.DataFrame | None:
    return pd.read_csv(path, keep_default_na=False) if path.is_file() else None


def _kinds(rejects: pd.DataFrame | None) -> str:
    if rejects is None:
        return UNKNOWN
    kinds = rejects["reason"].astype(str).str.split(":").str[0].value_counts()
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return f"{len(rejects)} ({listed})" if listed else "0"


def _training(stage: Stage) -> str:
    try:
        settings: Any = load_settings(paths.PARAMS)
    except UserError:
        settings = None
    rows = []
    for each in [*_before(stage), stage]:
        chosen = getattr(settings.stage, each.name) if settings else None
        metrics, speed = (
            _read(paths.metrics_file(each.name)),
            _read(paths.speed_folder(each.name) / "metrics.json"),
        )
        device, time = _log(each)
        rows.append(
            (
                each.name,
                *(getattr(chosen, key, UNKNOWN) for key in ("epochs", "batch_size", "lr")),
                metrics.get("best", {}).get("step", UNKNOWN),
                _number(metrics.get("val_loss")),
                device,
                time,
                _number(speed.get("rows_per_second")),
                _number(speed.get("peak_memory_gb")),
            )
        )
    head = ["stage", "epochs", "batch size", "learning rate", "best step", "validation loss"]
    head += ["hardware", "time of the last run", "rows a second", "peak memory, GB"]
    seed = settings.seed if settings else UNKNOWN
    return (
        f"{_table(head, rows)}\n\nSeed: {seed}. AdamW; the best epoch by validation loss is kept."
    )


def _log(stage: Stage) -> tuple[str, str]:
    """Hardware and wall-clock time of the stage's last finished run, from its log."""
    for log in sorted(paths.LOGS.glob(f"{stage.log_name}_*.log"), reverse=True):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        started, wrote = ([line for line in lines if text in line] for text in (_STARTED, _WROTE))
        if started and wrote:
            begin, end = (datetime.fromisoformat(each[0][:19]) for each in (started, wrote))
            device = [line.split(_DEVICE)[1] for line in lines if _DEVICE in line]
            return (device or [UNKNOWN])[0], str(end - begin)
    return UNKNOWN, UNKNOWN


def _evaluation(details: dict[str, Any], prepared: dict[str, Any]) -> str:
    gap, intervals = details.get("grounding_gap", {}), details.get("interval", {})
    best = gap.get("headline")
    rows = [(n, _number(details.get(n)), _interval(intervals.get(n))) for n in _SCORES]
    between = _interval(gap.get("interval", {}).get(best))
    rows.append((f"grounding gap ({best or UNKNOWN})", _number(gap.get(best)), between))
    for kind, fact in details.get("facts", {}).items():
        rows.append((f"facts: {kind}, F1", _number(fact["f1"]), _interval(fact)))
    if seam := details.get("seam", {}).get("gap"):
        rows.append(
            ("facts elsewhere minus at the seam, F1", _number(seam["value"]), _interval(seam))
        )
    rows.append(("answers that were cut", details.get("cut_answers", UNKNOWN), ""))
    return (
        f"Split `{prepared.get('evaluate.split', UNKNOWN)}`: {details.get('captions', UNKNOWN)} "
        f"queries about {details.get('panoramas', UNKNOWN)} panoramas. Intervals are 95%, by a "
        "cluster bootstrap over panoramas. The grounding gap is the score minus that of the "
        f"answers about other panoramas.\n\n{_table(['metric', 'value', '95% interval'], rows)}"
    )


_SCORES = ("bleu_4", "rouge_l", "cider_d")
_METRIC_IDS = {"bleu_4": "bleu", "rouge_l": "rouge", "cider_d": "cider"}


def _results(details: dict[str, Any], prepared: dict[str, Any]) -> list[EvalResult]:
    name = Path(prepared["data.dir"]).name
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=name,
            dataset_name=name,
            dataset_split=prepared.get("evaluate.split"),
            metric_type=_METRIC_IDS[score],
            metric_name=score,
            metric_value=details[score],
        )
        for score in _SCORES
        if details.get(score) is not None
    ]


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4g}"


def _interval(bounds: dict[str, Any] | None) -> str:
    return f"{bounds['low']:.4g} to {bounds['high']:.4g}" if bounds else ""


def _licenses(model: PanoLLaVA, data: Path | None) -> str:
    settings = model.header.model
    rows = [
        ("encoder", settings.encoder.path, _tower_license(settings.encoder)),
        ("language model", settings.language_model.path, _tower_license(settings.language_model)),
        ("data", data or UNKNOWN, _stated_license(data)),
    ]
    return _table(["part", "", "license"], rows)


def _tower_license(tower: Pretrained) -> str:
    if Path(tower.path).is_dir():
        return _stated_license(Path(tower.path))
    try:
        card = ModelCard.load(tower.path)
    except (OSError, ValueError, HfHubHTTPError):
        return UNKNOWN
    return str(card.data.get("license") or NONE_STATED)


def _stated_license(folder: Path | None) -> str:
    """As a line "License: ..." of the README.md in this folder, or one above it, says."""
    readmes = [each / "README.md" for each in (folder, *folder.parents)] if folder else []
    for readme in readmes:
        if readme.is_file() and readme.parent.resolve() != Path.cwd():  # not that of the code
            text = readme.read_text(encoding="utf-8")
            found = re.search(r"^license: *(.+)$", text, re.MULTILINE | re.IGNORECASE)
            return found[1] if found else NONE_STATED
    return UNKNOWN


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
