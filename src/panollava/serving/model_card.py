"""The README.md of an exported model: what it was trained on and how, what it was measured to be
worth, its limits and licenses. What the project does not say is "unknown"."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from panollava import paths
from panollava.config import Pretrained
from panollava.model.header import TOWERS
from panollava.model.panollava import PanoLLaVA
from panollava.model.weights import count_parameters
from panollava.provenance.fingerprint import file_sha256
from panollava.serving import project_record as project
from panollava.serving.project_record import UNKNOWN
from panollava.stages import STAGES, Stage

NONE_STATED = "none stated"
_METRIC_IDS = {"bleu_4": "bleu", "rouge_l": "rouge", "cider_d": "cider"}


def model_card(model: PanoLLaVA, header: dict[str, Any], result: Path, name: str) -> str:
    """The card of the exported folder `name`. `result`: the file that is exported, with `header`.

    Data, training and metrics are those of the project in the working directory, if `result` holds
    the same bytes as its result of that stage."""
    stage = model.header.stage
    ours = paths.weights_file(stage.name)
    known = ours.is_file() and file_sha256(ours) == file_sha256(result)
    prepared = project.read(paths.PREPARED / "provenance.json") if known else {}
    details = project.read(paths.EVALUATION_DETAILS) if known and not _following(stage) else {}
    data = prepared.get("data.dir")
    sections = {
        "Use": _use(name),
        "Model": _model(model, header),
        "Data": project.data(prepared) if data else UNKNOWN,
        "Training": project.training(stage) if known else UNKNOWN,
        "Evaluation": project.evaluation(details, prepared) if details else UNKNOWN,
        "Limits": _LIMITS,
        "Licenses": _licenses(model, header, Path(data) if data else None),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    results = _results(details, prepared) if details and data else []
    towers = (model.header.model.encoder, model.header.model.language_model)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license="unknown",
        tags=["panollava", "panorama", "equirectangular"],
        base_model=[tower.path for tower in towers if not Path(tower.path).is_dir()] or None,
        model_name=name,
        eval_results=results or None,
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


def _model(model: PanoLLaVA, header: dict[str, Any]) -> str:
    trained = model.header.stage.saves
    parts = [
        (part, f"{count:,}", "trained" if part in trained else "frozen")
        for part, count in count_parameters(model.network).items()
    ]
    settings = json.dumps(header["settings"], indent=2, ensure_ascii=False)
    towers = json.dumps(header["towers"], indent=2)
    return "\n\n".join(
        [
            f"A result of stage `{model.header.stage.name}`.",
            project.table(["part", "parameters", ""], parts),
            f"Settings:\n\n```json\n{settings}\n```",
            "Pretrained towers, by commit or by the SHA-256 of their files:\n\n"
            f"```json\n{towers}\n```",
        ]
    )


def _following(stage: Stage) -> list[Stage]:
    return [other for other in STAGES.values() if other.starts_from == stage.name]


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
        for score in project.SCORES
        if details.get(score) is not None
    ]


def _licenses(model: PanoLLaVA, header: dict[str, Any], data: Path | None) -> str:
    rows: list[tuple[Any, ...]] = [
        (name, header["settings"]["model"][name]["path"], _tower_license(tower))
        for name in TOWERS
        for tower in [getattr(model.header.model, name)]
    ]
    rows.append(("data", data or UNKNOWN, _stated_license(data)))
    return project.table(["part", "", "license"], rows)


def _tower_license(tower: Pretrained) -> str:
    if Path(tower.path).is_dir():
        return _stated_license(Path(tower.path))
    try:
        card = ModelCard.load(tower.path)
    except (OSError, ValueError, HfHubHTTPError):
        return UNKNOWN
    return str(card.data.get("license") or NONE_STATED)


def _stated_license(folder: Path | None) -> str:
    """As a line "License: ..." of the README.md in this folder, or up to two above it, says."""
    readmes = [each / "README.md" for each in (folder, *folder.parents[:2])] if folder else []
    for readme in readmes:
        if readme.is_file() and readme.parent.resolve() != Path.cwd():  # not that of the code
            text = readme.read_text(encoding="utf-8")
            found = re.search(r"^license: *(.+)$", text, re.MULTILINE | re.IGNORECASE)
            return found[1] if found else NONE_STATED
    return UNKNOWN
