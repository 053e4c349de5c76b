"""How many of the project's files a reader has to open to follow one piece of work.

    python benchmarks/call_stack.py

Traces it on a small project and prints the files in which a function was called, in the order of
their first call. Exits with 1 if there are more than the limit. config, files, errors, logs and
fingerprint do not count: a reader knows what they do from their names."""

import argparse
import contextlib
import inspect
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pytorch_lightning as pl
import torch

import panollava
from helpers import save_data, save_towers, write_params
from panollava import paths
from panollava.config import Settings, load_settings
from panollava.data.batches import StepBatch
from panollava.data.images import read_panorama
from panollava.data.prepare import prepare_project
from panollava.geometry import views
from panollava.model.network import build_model
from panollava.stages import STAGES
from panollava.training.features import write_features
from panollava.training.objective import load_objective, one_device
from panollava.training.train import train
from training_loop import Stop, fit, make_module

PACKAGE = Path(panollava.__file__).parent
NOT_COUNTED = ("config.py", "files.py", "errors.py", "logs.py", "provenance/fingerprint.py")
STEP_LIMIT, ROW_LIMIT, PANORAMA_LIMIT = 9, 9, 8


class Trace(NamedTuple):
    work: str
    files: list[str]  # in the order of their first call
    limit: int | None

    @property
    def too_long(self) -> bool:
        return self.limit is not None and len(self.files) > self.limit


class Recorder:
    """Records the files of the package whose functions are called between start and stop."""

    def __init__(self) -> None:
        self.files: dict[str, None] = {}

    def start(self) -> None:
        sys.setprofile(self._profile)

    def stop(self) -> None:
        sys.setprofile(None)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self.stop()

    def trace(self, work: str, limit: int | None) -> Trace:
        return Trace(work, [name for name in self.files if name not in NOT_COUNTED], limit)

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and _is_function(frame.f_code):
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(PACKAGE):
                self.files[str(file.relative_to(PACKAGE))] = None


def _is_function(code: CodeType) -> bool:
    """Not the body of a module or of a class, which an import executes."""
    return bool(code.co_flags & inspect.CO_OPTIMIZED)


class FirstStep(pl.Callback):
    """Records from the first batch's loading to the end of its step."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_fit_start(self, *_: Any) -> None:
        self.recorder.start()

    def on_train_batch_end(self, *_: Any) -> None:
        self.recorder.stop()
        raise Stop


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        towers, data = save_towers(folder / "towers"), save_data(folder / "data")
        write_params(Path("params.yaml"), towers, data)
        traces = trace_all()
    for trace in traces:
        limit = "no limit" if trace.limit is None else f"limit {trace.limit}"
        sys.stdout.write(f"{trace.work}: {len(trace.files)} files ({limit})\n")
        sys.stdout.writelines(f"    {file}\n" for file in trace.files)
    sys.exit(any(trace.too_long for trace in traces))


def trace_all() -> list[Trace]:
    """Traces of the project in the current folder, in which nothing has run."""
    settings = load_settings(Path("params.yaml"), changes={"machine.loader_workers": 0})
    prepare_project(settings)
    _write_features()
    return [
        *(trace_step(name, settings) for name in STAGES),
        trace_row("finetune", settings, ROW_LIMIT),
        trace_row("resampler", settings, None),
        trace_panorama(settings),
    ]


def _write_features() -> None:
    """Features of the pretrained encoder: stages of no epochs pass on its weights."""
    no_epochs = {f"stage.{name}.epochs": 0 for name in STAGES}
    settings = load_settings(Path("params.yaml"), changes=no_epochs)
    for name in ("vision", "resampler"):
        train(STAGES[name], settings)
    write_features(settings)


def trace_step(name: str, settings: Settings) -> Trace:
    """One optimizer step of a stage, from its batch's loading to the update of the weights."""
    recorder = Recorder()
    fit(make_module(name, settings), settings, FirstStep(recorder))
    return recorder.trace(f"a training step of {name}", STEP_LIMIT)


def trace_row(name: str, settings: Settings, limit: int | None) -> Trace:
    """One row, from rows.csv through its tokens and its packed batch to its loss."""
    recorder = Recorder()
    objective: Any = load_objective(STAGES[name], settings)
    for entry in paths.CACHE.glob("tokens-*/"):  # so that the row is tokenized
        shutil.rmtree(entry)
    with recorder():
        objective.open_readers()
        reader = objective.readers["train"]
        step = reader.plan(None)[0]
        batch = StepBatch([reader.load(step)], reader.count(step), len(step))
        next(objective.terms(batch, [0], one_device))[0].backward()
    return recorder.trace(f"a row from rows.csv to its loss, {name}", limit)


def trace_panorama(settings: Settings) -> Trace:
    """One panorama, from its file through its views and patch tokens to vision tokens."""
    recorder = Recorder()
    model, _ = build_model(settings.model, settings.views)
    picture = next((Path(settings.data.dir) / "images").iterdir())
    with recorder(), torch.no_grad():
        sampler = views.Sampler(views.layout(settings.views), settings.views.size)
        sampled = sampler.sample(read_panorama(picture, sampler.panorama_width))
        model.vision_tokens(model.features(torch.from_numpy(sampled)[None]))
    return recorder.trace("a panorama from its file to vision tokens", PANORAMA_LIMIT)


if __name__ == "__main__":
    main()
