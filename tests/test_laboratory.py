"""The laboratory: many trainings at once equal `panollava train` and `evaluate`; its intervals
contain the truth as often as they say."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import laboratory_table
import laboratory_work
import variants
from crossed_intervals import influence, interval
from helpers import change, curve, run_stage, save_language_model
from laboratory_scores import answer_all
from panollava import paths
from panollava.config import Settings
from panollava.data.prepare import prepare_project
from panollava.evaluation.evaluate import evaluate
from panollava.evaluation.metrics import group_references, rolled_name
from panollava.files import read_prepared_rows
from panollava.stages import STAGES
from panollava.training.features import write_features
from replicas import Replicas

SEEDS = (0, 1)  # whose epochs have different numbers of steps
CPU = torch.device("cpu")
# Their gradients are rounding: softmax ignores a bias that all keys share, and VICReg one that all
# features share.
WITHOUT_GRADIENT = ("k_proj.bias",)
WITHOUT_GRADIENT_IN_VISION = (*WITHOUT_GRADIENT, "post_layernorm.bias")


@pytest.fixture
def each(settings: Settings, tmp_path: Path) -> list[Settings]:
    """Settings of every seed. The language model's answers vary with what it sees."""
    language_model = save_language_model(tmp_path / "language_model", spread=0.3)
    settings = change(
        settings,
        model__language_model__path=str(language_model),
        trainer__threads=1,
        evaluate__rolls=[20, 35, 45],
        stage__resampler__batch_size=5,
        stage__resampler__labeled=0.7,
        stage__finetune__epochs=3,
        stage__finetune__batch_size=5,
        stage__finetune__labeled=0.7,
    )
    prepare_project(settings)
    return [change(settings, seed=seed) for seed in SEEDS]


def train_stages(settings: Settings, last: str, folder: Path) -> None:
    """Train up to the stage `last` by Lightning, and keep the weights in `folder`."""
    for stage in STAGES.values():
        if stage.reads_features:
            write_features(settings)
        run_stage(stage.name, settings)
        shutil.copytree(paths.run_folder(stage.name), folder / stage.name)
        if stage.name == last:
            break


@pytest.mark.parametrize("name", ["vision", "resampler", "finetune"])
def test_replicas_end_in_the_losses_and_weights_of_panollava_train(
    each: list[Settings], name: str, tmp_path: Path
) -> None:
    stage, folders = STAGES[name], [tmp_path / f"seed{seed}" for seed in SEEDS]
    expected = []
    for settings, folder in zip(each, folders, strict=True):
        train_stages(settings, name, folder)
        expected.append(curve(name, "val/loss"))
    starts = [
        folder / stage.starts_from / paths.WEIGHTS if stage.starts_from else None
        for folder in folders
    ]
    trained = Replicas(stage, each, starts, CPU)
    before = [
        {key: value.clone() for key, value in objective.model.state_dict().items()}
        for objective in trained.objectives
    ]
    history = trained.train()
    steps = [module.epoch_steps for module in trained.modules]
    assert steps == ([[2], [2]] if name == "vision" else [[3, 2, 2], [3, 3, 2]])
    for losses, reference in zip(history, expected, strict=True):
        assert losses == pytest.approx(reference, rel=1e-5)
        assert min(losses) < losses[0]
    without_gradient = WITHOUT_GRADIENT_IN_VISION if name == "vision" else WITHOUT_GRADIENT
    for objective, start, folder in zip(trained.objectives, before, folders, strict=True):
        state = objective.model.state_dict()
        for key, value in load_file(folder / name / paths.WEIGHTS).items():
            if key.split(".")[0] not in stage.trains:
                assert torch.equal(state[key], value), key
            elif not key.endswith(without_gradient):
                # Adam turns rounding into steps where a gradient is small: compare whole tensors.
                moved = (value - start[key]).norm()
                assert (state[key] - value).norm() <= 1e-3 * moved, key


def test_each_replica_keeps_the_weights_of_its_own_best_epoch(
    each: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Replicas(STAGES["resampler"], each, [None, None], CPU)
    losses = iter(torch.tensor([[3.0, 1.0], [1.0, 2.0], [2.0, 2.0], [1.0, 1.0]]))
    seen: list[torch.Tensor] = []
    weight = "model.projector.weight"

    def validate() -> torch.Tensor:
        seen.append(trained.stacked[weight].detach().clone())
        return next(losses)

    monkeypatch.setattr(trained, "validate", validate)
    trained.train()
    assert not torch.equal(seen[1], seen[3])
    expected = torch.stack([seen[1][0], seen[0][1]])  # the first of equal ones
    assert torch.equal(trained.stacked[weight], expected)


def test_replicas_answer_as_panollava_evaluate_does(each: list[Settings], tmp_path: Path) -> None:
    each = [change(settings, stage__vision__epochs=0) for settings in each]
    expected, folders = [], []
    for settings in each:
        folders.append(tmp_path / f"seed{settings.seed}")
        train_stages(settings, "finetune", folders[-1])
        evaluate(settings)
        expected.append(pd.read_csv(paths.PREDICTIONS, keep_default_na=False))
    starts = [folder / "resampler" / paths.WEIGHTS for folder in folders]
    trained = Replicas(STAGES["finetune"], each, starts, CPU)
    trained.train()
    split = paths.PREPARED / each[0].evaluate.split
    references = group_references(read_prepared_rows(split / "rows.csv"))
    answered = answer_all(trained, references)
    for answers, table in zip(answered, expected, strict=True):
        assert answers.keys() == {"prediction", *map(rolled_name, (20, 35, 45))}
        for name, texts in answers.items():
            rows = zip(table["panorama"], table["query"], table[name], strict=True)
            assert texts == {(panorama, query): text for panorama, query, text in rows}
        assert len({*answers["prediction"].values()}) > 2
    assert answered[0]["prediction"] != answered[1]["prediction"]


def test_a_laboratory_trains_shared_stages_once_and_continues_where_it_stopped(
    each: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = []

    class Counted(Replicas):
        def train(self) -> list[list[float]]:
            trainings.append((self.stage.name, len(self.objectives)))
            return super().train()

    monkeypatch.setattr(laboratory_work, "Replicas", Counted)
    changed: dict[str, dict[str, float]] = {
        "profile.sphere-64": {},
        "profile.views": {"stage__finetune__lr": 2e-3},
        "profile.stage1-none": {"stage__vision__epochs": 0, "stage__finetune__epochs": 0},
    }
    runs = [
        laboratory_work.Run(variant, settings.seed, change(settings, **changes))
        for variant, changes in changed.items()
        for settings in each
    ]
    laboratory = laboratory_work.Laboratory(tmp_path / "laboratory", "abc", CPU, stacked=2)
    laboratory.run(runs)
    stages = "vision resampler finetune finetune vision resampler finetune".split()
    assert trainings == [(stage, 2) for stage in stages]
    results = sorted((tmp_path / "laboratory/results").iterdir())
    assert len(results) == 6
    before = results[1].read_bytes()
    results[1].unlink()
    trainings.clear()
    laboratory.run(runs)
    assert trainings == [("finetune", 1)]
    assert results[1].read_bytes() == before
    laboratory.run(runs)
    assert trainings == [("finetune", 1)]


def test_variants_are_compared_with_one_that_also_runs_and_have_valid_settings() -> None:
    core = variants.select([])
    assert {*core} == variants.CORE and len(core) == 9
    assert len(laboratory_work.make_runs(core, range(8))) == 72
    assert len(laboratory_work.make_runs(variants.select(["*"]), range(1))) == 3 * len(
        variants.CHOICES
    )
    assert variants.select(["quarter.views"]) == ["quarter.sphere-64", "quarter.views"]
    assert variants.select(["stage1-n*"])[:2] == ["quarter.sphere-64", "quarter.stage1-none"]


def simulate(random: np.random.Generator, seeds: int, panoramas: int, spread: float) -> np.ndarray:
    """Counts of two variants, (2, seeds, panoramas, 3), about the same panoramas. The second is
    better; `spread` is that of seeds and of panoramas, in logits."""
    difficulty = spread * random.normal(size=(panoramas,))
    of_seeds = spread * random.normal(size=(2, seeds, 1))
    own = random.normal(size=(2, 1, panoramas)) * spread  # what one of them finds harder
    gain = np.array([0.0, 0.7])[:, None, None]
    right = 1 / (1 + np.exp(-(1 + gain + difficulty + of_seeds + own)))
    facts = random.integers(1, 4, size=panoramas)
    correct = random.binomial(facts, right)
    return np.stack([correct, *np.broadcast_arrays(facts, facts, correct)[:2]], axis=-1)


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seeds", [3, 8])
def test_intervals_contain_the_true_difference_in_95_of_100_studies(
    seeds: int, spread: float
) -> None:
    random = np.random.default_rng(0)

    def difference(counts: np.ndarray) -> np.ndarray:
        base, variant = map(influence, counts)
        return variant - base

    many = [difference(simulate(random, 300, 3000, spread)).mean() for _ in range(3)]
    truth, studies = np.mean(many), 600
    intervals = [interval(difference(simulate(random, seeds, 100, spread))) for _ in range(studies)]
    contained = np.mean([abs(mean - truth) <= half for mean, half in intervals])
    assert 0.93 <= contained <= 0.99


def test_influence_keeps_each_seeds_f1() -> None:
    counts = simulate(np.random.default_rng(0), 5, 20, 1.0)[0]
    sums = counts.sum(axis=1)
    expected = 2 * sums[:, 0] / (sums[:, 1] + sums[:, 2])
    np.testing.assert_allclose(influence(counts).mean(axis=1), expected)


@pytest.mark.parametrize(("seeds", "claimed"), [(8, True), (7, False)])
def test_a_difference_is_bold_only_with_eight_seeds(seeds: int, claimed: bool) -> None:
    counts = simulate(np.random.default_rng(1), seeds, 100, 0.1)
    results = {
        variant: {seed: {"largest": each[seed].tolist()} for seed in range(seeds)}
        for variant, each in zip(("profile.sphere-64", "profile.views"), counts, strict=True)
    }
    cell = laboratory_table.describe(results, "profile.views", "largest")
    assert ("**(+" in cell) == claimed and "(+" in cell
    assert laboratory_table.describe(results, "profile.views", "around") == "–"


def test_differences_are_paired_by_seed() -> None:
    base = simulate(np.random.default_rng(1), 8, 100, 1.0)[0]
    results = {
        "profile.sphere-64": {seed: {"count": base[seed].tolist()} for seed in range(8)},
        "profile.views": {seed: {"count": base[seed].tolist()} for seed in range(2, 8)},
    }
    assert "(+0.000 ± 0.000)" in laboratory_table.describe(results, "profile.views", "count")
    assert "± 0.000" not in laboratory_table.describe(results, "profile.sphere-64", "count")


def test_replicas_stop_early_by_themselves(each: list[Settings], tmp_path: Path) -> None:
    each = [change(s, stage__resampler__epochs=6, stage__resampler__patience=1) for s in each]
    # Every epoch of this one is as good as the start.
    each[1] = change(each[1], stage__resampler__lr=0.0, stage__resampler__encoder_lr=0.0)
    stopped, starts = [], []
    for settings in each:
        train_stages(settings, "resampler", tmp_path / f"seed{settings.seed}")
        starts.append(tmp_path / f"seed{settings.seed}/vision" / paths.WEIGHTS)
        stopped.append(curve("resampler", "val/loss"))
    assert len(stopped[1]) == 2 < len(stopped[0])
    history = Replicas(STAGES["resampler"], each, starts, CPU).train()
    for losses, reference in zip(history, stopped, strict=True):
        assert losses[: len(reference)] == pytest.approx(reference, rel=1e-3)
        assert {*losses[len(reference) :]} <= {losses[len(reference) - 1]}


def test_adapters_train_and_answer_as_in_panollava(each: list[Settings], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    each = [
        change(settings, stage__resampler__lora=True, stage__finetune__lora=True)
        for settings in each
    ]
    expected, tables, folders = [], [], []
    for settings in each:
        folders.append(tmp_path / f"seed{settings.seed}")
        train_stages(settings, "finetune", folders[-1])
        expected.append(curve("finetune", "val/loss"))
        evaluate(settings)
        tables.append(pd.read_csv(paths.PREDICTIONS, keep_default_na=False))
    starts = [folder / "resampler" / paths.WEIGHTS for folder in folders]
    trained = Replicas(STAGES["finetune"], each, starts, CPU)
    history = trained.train()
    assert [*map(min, history)] == pytest.approx([*map(min, expected)], rel=1e-5)
    rows = read_prepared_rows(paths.PREPARED / each[0].evaluate.split / "rows.csv")
    answered = answer_all(trained, group_references(rows))
    for answers, table in zip(answered, tables, strict=True):
        keys = zip(table["panorama"], table["query"], strict=True)
        assert answers["prediction"] == dict(zip(keys, table["prediction"], strict=True))
