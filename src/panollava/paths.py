"""Every path inside the project, defined once, relative to its root, where the commands run."""

import re
from pathlib import Path

PARAMS = Path("params.yaml")
LOGS = Path("logs")
LOGS_OF_DEMO = Path("../../logs")  # the demo's own pipeline runs in data/demo
RESUME = Path(".resume")  # unfinished work of stages, a folder each
FINISHED = "finished"  # a file in such a folder: its results are written
CACHE = Path(".cache")  # what can be computed again
PREPARED = Path("runs/prepared")  # <split>/rows.csv and the folders below
PANORAMAS = "panoramas"  # <split>/panoramas: shards of what the models read
PICTURES = "pictures"  # <split>/pictures: shards of JPEGs of the evaluated split, for the report
ROLLED = PREPARED / "rolled"  # shards of the evaluated split, rolled by evaluate.rolls
FEATURES = Path("runs/features")  # <split>, rolled: shards
DIGESTS = Path("runs/digest")  # <stage>.txt
PREDICTIONS = Path("runs/evaluate/predictions.csv")
EVALUATION_DETAILS = Path("runs/evaluate/details.json")
SCORES_BY_QUERY = Path("runs/evaluate/scores_by_query.csv")
EVALUATION = Path("metrics/evaluate/metrics.json")  # the headline numbers
REPORT = Path("runs/report/index.html")
SAMPLE = Path("runs/report/panoramas.svg")  # panoramas with answers, for `dvc plots`

WEIGHTS = "model_final.safetensors"  # of a training stage


def report_of(revision: str) -> Path:
    """A page that compares with `revision`; beside the folder that DVC knows."""
    name = re.sub(r"[^\w.~^-]", "-", revision)
    return Path(f"runs/report-{name}.html")


def run_folder(stage: str) -> Path:
    return Path(f"runs/vlm_{stage}")


def weights_file(stage: str) -> Path:
    return run_folder(stage) / WEIGHTS


def curves_folder(stage: str) -> Path:
    """DVCLive's folder of a training stage."""
    return Path(f"metrics/{stage}")


def metrics_file(stage: str) -> Path:
    """Headline metrics of a training stage."""
    return curves_folder(stage) / "metrics.json"


def speed_folder(stage: str) -> Path:
    """Speed and memory differ between runs, so they are kept apart from reproducible results."""
    return Path(f"metrics/speed/{stage}")
