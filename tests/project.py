"""A copy of the project with small data and towers, under real git and DVC."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
STAGES = ("prepare", "vision", "resampler", "features", "finetune", "evaluate")


class CodeEdit(NamedTuple):
    """An edit of src/panollava, and what it changes."""

    file: str
    old: str
    new: str
    digests: set[str]  # stages of the pipeline whose code digest changes
    reruns: set[str]  # stages that `dvc repro` runs: also those that read a changed result


_TRAINING = {"vision", "resampler", "finetune"}
CODE_EDITS = {
    "a comment in the model": CodeEdit(
        "model/panollava.py", "class PanoLLaVA", "# A comment.\nclass PanoLLaVA", set(), set()
    ),
    "a docstring of the training": CodeEdit(
        "training/train.py", '"""', '"""Changed: ', set(), set()
    ),
    "a line of resampler.py": CodeEdit(
        "model/resampler.py",
        "nn.GELU()",
        "nn.SiLU()",
        {"resampler", "finetune", "evaluate"},
        {"resampler", "features", "finetune", "evaluate"},
    ),
    "a line of evaluate.py": CodeEdit(
        "evaluation/evaluate.py",
        "getLogger(__name__)",
        'getLogger("evaluate")',
        {"evaluate"},
        {"evaluate"},
    ),
    "a line of overlap.py": CodeEdit(
        "geometry/overlap.py",
        "return grid * position - 0.5, inside",
        "return grid * position - 0.51, inside",
        {"vision"},
        set(STAGES) - {"prepare"},
    ),
    "a line of captions.py": CodeEdit(
        "evaluation/captions.py", "lower case", "lower-case", {"evaluate"}, {"evaluate"}
    ),
    # The weights stay the same, so that features and evaluate have nothing to do.
    "a log message of the training": CodeEdit(
        "training/train.py", '"wrote %s"', '"saved %s"', _TRAINING, _TRAINING
    ),
    "a log message of resume.py": CodeEdit(
        "provenance/resume.py", '"deleting %s', '"removing %s', _TRAINING, _TRAINING
    ),
    "a line of logs.py": CodeEdit(
        "logs.py", "%(asctime)s %(levelname)s", "%(levelname)s %(asctime)s", set(), set()
    ),
    "a line of files.py": CodeEdit("files.py", "indent=2", "indent=1", set(STAGES), set(STAGES)),
}


class Project:
    """A git repository with the project in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            # As an installed copy of the project would be: the folder's own code must win.
            "PYTHONPATH": str(ROOT / "src"),
            "HF_HUB_OFFLINE": "1",
            "DVC_NO_ANALYTICS": "1",
            "TQDM_DISABLE": "1",
        }

    def run(
        self, *command: str, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **(environment or {})},
            text=True,
            capture_output=True,
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0 or not check, output
        return output

    def repro(self) -> set[str]:
        """Run what has changed; the stages that ran, but for the digest."""
        output = self.run("dvc", "repro")
        return set(re.findall(r"Running stage '(\w+)'", output)) - {"digest"}

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", message)

    def replace(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        text = path.read_text()
        assert old in text, (file, old)
        path.write_text(text.replace(old, new, 1))

    def set(self, file: str, **values: object) -> None:
        """Set every `key: number` of these keys in a YAML file."""
        path = self.folder / file
        text = path.read_text()
        for key, value in values.items():
            text, count = re.subn(rf"\b{key}: \d+(\.\d+)?", f"{key}: {value}", text)
            assert count, (file, key)
        path.write_text(text)

    def results(self) -> dict[str, bytes]:
        """What equal runs have in common: the lock files and the metrics."""
        files = [*self.folder.rglob("dvc.lock"), *(self.folder / "metrics").rglob("*")]
        names = {str(f.relative_to(self.folder)): f for f in files if f.is_file()}
        return {
            name: file.read_bytes()
            for name, file in sorted(names.items())
            if not name.startswith(("metrics/speed/", ".dvc/"))
        }


def copy_project(target: Path, towers: Path, data: Path | None) -> Project:
    """What git knows of the project but for results, with small towers in its params.yaml, and
    other data; None: a small form of the demo's, which the pipeline makes itself."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        own = not name.startswith("data/demo/") or (data is None and "/towers/" not in name)
        result = name == "dvc.lock" or name.startswith("metrics/")
        if (ROOT / name).is_file() and own and not result:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    shutil.copytree(towers, target / "small/towers")
    project = Project(target)
    if data is None:
        project.set("data/demo/params.yaml", height=64, train=24, valid=6, test=6)
    else:
        shutil.copytree(data, target / "small/data")
        project.replace("params.yaml", "dir: data/demo", "dir: small/data")
    for old, new in (
        ("towers: data/demo/towers", "towers: small/towers"),
        ("path: data/demo/towers/encoder", "path: small/towers/encoder"),
        ("path: data/demo/towers/language_model", "path: small/towers/language_model"),
        ("size: 64", "size: 32"),
    ):
        project.replace("params.yaml", old, new)
    project.set("params.yaml", max_text_length=99, epochs=1, batch_size=4)
    project.run("git", "init", "-q")
    project.run("git", "config", "user.email", "test@example.invalid")
    project.run("git", "config", "user.name", "test")
    project.commit("start")
    return project
