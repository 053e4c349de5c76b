"""Every path inside the project, defined once, relative to its root, where the commands run."""

from pathlib import Path

PARAMS = Path("params.yaml")
LOGS = Path("logs")
LOGS_OF_DEMO = Path("../../logs")  # the demo's own pipeline runs in data/demo
RESUME = Path(".resume")  # unfinished work of training stages
PREPARED = Path("runs/prepared")  # <split>/views.npy, <split>/rows.csv
ROLLED = PREPARED / "rolled.npy"  # the evaluated split, rolled by evaluate.rolls; see `prepare`
FEATURES = Path("runs/features")  # <split>.npy, rolled.npy
DIGESTS = Path("runs/digest")  # <stage>.txt
PREDICTIONS = Path("runs/evaluate/predictions.csv")
EVALUATION_DETAILS = Path("runs/evaluate/details.json")
EVALUATION = Path("metrics/evaluate/metrics.json")  # the headline numbers

WEIGHTS = "model_final.safetensors"  # of a training stage


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
