"""The laboratory's work: which trainings and answers are missing, and doing them.

Stages that several variants share are trained once: their weights are kept under a key of the
parameters that they depend on. Several processes share the work; each takes what no other one has
locked."""

import contextlib
import hashlib
import json
import logging
import operator
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from pydantic_core import to_jsonable_python

from laboratory_scores import score_replicas
from measure import ROOT
from panollava import paths
from panollava.config import Settings, load_settings
from panollava.data.prepare import prepare_project
from panollava.files import write_json
from panollava.model.header import TOWERS, make_header
from panollava.model.weights import save_weights
from panollava.stages import STAGES, Stage
from replicas import Replicas
from variants import changes_of

log = logging.getLogger("laboratory")

# For all variants. Choices are made on valid; threads change the last bits only.
COMMON: dict[str, Any] = {
    "evaluate.split": "valid",
    "evaluate.rolls": [45, 180],
    "trainer.threads": 1,
}
*EARLIER, LAST = STAGES.values()


class Run(NamedTuple):
    variant: str
    seed: int
    settings: Settings


def make_runs(variants: list[str], seeds: range) -> list[Run]:
    runs = []
    for variant in variants:
        changes = {**changes_of(variant), **COMMON}
        for seed in seeds:
            settings = load_settings(ROOT / paths.PARAMS, changes={**changes, "seed": seed})
            runs.append(Run(variant, seed, settings))
    return runs


class Laboratory:
    """Does what is missing in `folder`, at most `stacked` trainings at once."""

    def __init__(self, folder: Path, commit: str, device: torch.device, stacked: int) -> None:
        self.folder, self.commit = folder.absolute(), commit
        self.device, self.stacked = device, stacked
        for name in ("results", "weights", "locks"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def run(self, runs: list[Run]) -> None:
        """First what no other process works on; then wait for the others."""
        for timeout in (0, -1):
            for unit in self._units(LAST, runs):
                with contextlib.suppress(Timeout), self._locked(unit, timeout):
                    self._finish([run for run in unit if not self._result(run).is_file()])

    def _locked(self, work: Any, timeout: float = -1) -> Any:
        return FileLock(self.folder / "locks" / _digest(str(work))).acquire(timeout=timeout)

    def _units(self, stage: Stage, runs: list[Run]) -> list[list[Run]]:
        """Runs whose trainings of `stage` can be stacked, because only their seeds and the weights
        they start from differ."""
        groups: dict[str, list[Run]] = {}
        for run in runs:
            values = {**_parameters(stage, run.settings), "seed": None}
            groups.setdefault(_digest(values, _views_key(run.settings)), []).append(run)
        return [
            group[at : at + self.stacked]
            for group in groups.values()
            for at in range(0, len(group), self.stacked)
        ]

    def _finish(self, unit: list[Run]) -> None:
        """Train all stages, the earlier ones unless their weights are there, and write results."""
        if not unit:
            return
        with self._prepared(unit[0].settings):
            for stage in EARLIER:
                unique = {self._weights(stage, run.settings): run for run in unit}
                for part in self._units(stage, [*unique.values()]):
                    with self._locked([self._weights(stage, run.settings) for run in part]):
                        self._train(stage, part)
            replicas = self._trained(LAST, unit)
            start = time.monotonic()
            counts = score_replicas(replicas)
        log.info("answers of %s: %.0f s", _name(unit), time.monotonic() - start)
        for run, of_run in zip(unit, counts, strict=True):
            about = {"variant": run.variant, "seed": run.seed, "commit": self.commit}
            write_json(self._result(run), {**about, "counts": of_run})

    @contextlib.contextmanager
    def _prepared(self, settings: Settings) -> Iterator[None]:
        """A working directory of its own, because stages read and write fixed paths. Views are
        sampled once for all with the same settings."""
        shared = self.folder / "views" / _views_key(settings)
        with self._locked(shared):
            if not (shared / paths.PREPARED / "provenance.json").is_file():
                with _project(shared):
                    prepare_project(settings)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder, _project(Path(folder)):
            paths.PREPARED.parent.mkdir()
            paths.PREPARED.symlink_to(shared / paths.PREPARED)
            yield

    def _train(self, stage: Stage, unit: list[Run]) -> None:
        """Train an earlier stage, and keep its weights."""
        unit = [run for run in unit if not self._weights(stage, run.settings).is_file()]
        if unit:
            replicas = self._trained(stage, unit)
            stage = replicas.stage
            for run, objective in zip(unit, replicas.objectives, strict=True):
                towers = [name for name in TOWERS if hasattr(objective.model, name)]
                header = make_header(stage, run.settings, towers)
                file = self._weights(stage, run.settings)
                save_weights(file, objective.model, stage.saves, header)

    def _trained(self, stage: Stage, unit: list[Run]) -> Replicas:
        start = time.monotonic()
        before = STAGES.get(stage.starts_from or "")
        starts = [self._weights(before, run.settings) if before else None for run in unit]
        replicas = Replicas(stage, [run.settings for run in unit], starts, self.device)
        losses = [min(each, default=float("nan")) for each in replicas.train()]
        seconds = time.monotonic() - start
        mean = float(np.mean(losses))
        log.info("%s of %s: %.0f s, validation loss %.4f", stage.name, _name(unit), seconds, mean)
        return replicas

    def _result(self, run: Run) -> Path:
        return self.folder / "results" / f"{run.variant}.{run.seed}.{self.commit}.json"

    def _weights(self, stage: Stage, settings: Settings) -> Path:
        return self.folder / "weights" / f"{stage.name}-{self._key(stage, settings)}.safetensors"

    def _key(self, stage: Stage, settings: Settings) -> str:
        """Of all that a stage's weights depend on."""
        before = self._key(STAGES[stage.starts_from], settings) if stage.starts_from else ""
        return _digest(self.commit, _parameters(stage, settings), before)


def _name(unit: list[Run]) -> str:
    variants = dict.fromkeys(run.variant for run in unit)
    return f"{', '.join(variants)} (seeds {', '.join(str(run.seed) for run in unit)})"


def _parameters(stage: Stage, settings: Settings) -> dict[str, Any]:
    return {key: to_jsonable_python(operator.attrgetter(key)(settings)) for key in stage.reads}


def _views_key(settings: Settings) -> str:
    return _digest(to_jsonable_python(settings.views), to_jsonable_python(settings.evaluate))


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _project(folder: Path) -> Iterator[None]:
    """Work in `folder`, which links to the data and the towers."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to(ROOT / "data")
    with contextlib.chdir(folder):
        yield
