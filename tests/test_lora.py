"""LoRA: an adapter of the language model, trained, saved, resumed, used and exported."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import (
    Killed,
    change,
    curve,
    outputs,
    random_views,
    run_stage,
    save_encoder,
    save_language_model,
    settings_for,
    weights,
)
from panollava import paths
from panollava.cli import main as cli
from panollava.config import Settings
from panollava.errors import UserError
from panollava.evaluation.evaluate import evaluate
from panollava.model.header import TOWERS, make_header
from panollava.model.network import build_model
from panollava.model.panollava import PanoLLaVA
from panollava.model.weights import read_header, save_weights
from panollava.planning.plan import make_plan
from panollava.planning.step_memory import run_step
from panollava.provenance.resume import remove_finished
from panollava.serving.export import export, export_adapter
from panollava.stages import STAGES, configured_stages
from panollava.training import lightning_module
from panollava.training.features import write_features
from panollava.training.objective import load_objective, prepare_parts
from panollava.training.train import train

peft = pytest.importorskip("peft")


EPOCHS = {"vision": 0, "resampler": 1, "finetune": 1}


def with_lora(settings: Settings, *stages: str, **changes: Any) -> Settings:
    epochs = {f"stage__{stage}__epochs": count for stage, count in EPOCHS.items()}
    settings = change(settings, trainer__threads=1, **epochs)
    return change(settings, **{f"stage__{stage}__lora": True for stage in stages}, **changes)


def parts(stage: str) -> set[str]:
    return {name.split(".")[0] for name in weights(stage)}


def adapter(stage: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(stage).items() if name.startswith("lora.")}


def train_all(settings: Settings) -> None:
    run_stage("vision", settings)
    run_stage("resampler", settings)
    write_features(settings)
    run_stage("finetune", settings)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed(towers: Path) -> None:
    settings = settings_for(towers)
    views = random_views(2)
    tokens = torch.tensor([[5, 6, 7, 8]])
    results, matrices = [], []
    for seed, lora in ((0, False), (0, True), (1, True), (1, True)):
        model, _ = build_model(settings.model, settings.views, seed, lora=lora)
        vision = model.vision_tokens(model.features(views))
        results.append((vision, model.language_model(input_ids=tokens).logits))
        matrices.append(dict(model.lora.state_dict()) if lora else {})
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    _, first, second, again = matrices
    assert equal(second, again) and not equal(first, second)
    for name, matrix in first.items():
        assert bool(matrix.any()) == ("lora_A" in name)


def test_the_adapter_is_in_the_language_model_s_linear_layers_and_nowhere_else(
    towers: Path,
) -> None:
    settings = settings_for(towers)
    model, _ = build_model(settings.model, settings.views, lora=True)
    names = {name.rpartition(".lora_")[0] for name, _ in model.lora.named_parameters()}
    kinds = [f"self_attn.{kind}_proj" for kind in "qkvo"]
    kinds += [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    assert names == {f"model.layers.{layer}.{kind}" for layer in range(2) for kind in kinds}
    encoder = [name for name, _ in model.encoder.named_modules()]  # has a q_proj, too
    assert any("q_proj" in name for name in encoder)
    assert not any("lora" in name for name in encoder)
    settings = change(settings, model__lora__targets=r"model\.layers\.1\..*v_proj")
    model, _ = build_model(settings.model, settings.views, lora=True)
    names = {name.rpartition(".lora_")[0] for name, _ in model.lora.named_parameters()}
    assert names == {"model.layers.1.self_attn.v_proj"}


@pytest.mark.parametrize("targets", ["q_proj", "lm_head", "model.embed_tokens", "encoder.*q_proj"])
def test_targets_that_match_no_layer_are_an_error_that_names_some(
    towers: Path, targets: str
) -> None:
    settings = change(settings_for(towers), model__lora__targets=targets)
    with pytest.raises(
        UserError, match=r"such as model\.layers\.0\.self_attn\.q_proj or "
    ) as raised:
        build_model(settings.model, settings.views, lora=True)
    assert f"model.lora.targets: '{targets}' matches no complete name" in str(raised.value)


def test_without_peft_the_error_says_how_to_install_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    run_stage("vision", settings)
    with pytest.raises(UserError, match=r"LoRA needs peft.*pip install -e \.\[lora\]"):
        run_stage("resampler", with_lora(settings, "resampler"))


@pytest.mark.parametrize("trained_by", ["resampler", "finetune", "resampler finetune"])
def test_a_stage_trains_passes_on_or_leaves_out_the_adapter(
    settings: Settings, trained_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    stages = trained_by.split()
    settings = with_lora(settings, *stages)
    caplog.set_level("INFO")
    train_all(settings)
    for before, stage in ((set(), "resampler"), ({"resampler"}, "finetune")):
        held = bool({*stages} & {*before, stage})
        expected = {"encoder", "resampler", "projector"} | ({"lora"} if held else set())
        assert parts(stage) == expected
        assert {*read_header(paths.weights_file(stage))["parts"]} == expected
        rates = paths.curves_folder(stage) / "plots/metrics/train/learning_rate/lora.tsv"
        assert rates.is_file() == (stage in stages)
    tables = [text for text in caplog.messages if text.startswith("part")]
    states = [
        line.split()[1] for text in tables for line in text.splitlines() if line.startswith("lora")
    ]
    expected_states = {
        "resampler": ["trains", "frozen"],
        "finetune": ["trains"],
        "resampler finetune": ["trains", "trains"],
    }
    assert states == expected_states[trained_by]
    if trained_by == "resampler":
        assert adapter("finetune") and equal(adapter("resampler"), adapter("finetune"))
        assert any(value.any() for name, value in adapter("finetune").items() if "lora_B" in name)
    if trained_by == "resampler finetune":
        assert not equal(adapter("resampler"), adapter("finetune"))
    # The table of what trains is that of the plan.
    for name, configured in configured_stages(settings.stage).items():
        assert parts(name) == set(configured.saves)
    if trained_by == "resampler":
        evaluate(settings)
        assert paths.EVALUATION.is_file()


def test_the_adapter_has_a_learning_rate_of_its_own(settings: Settings) -> None:
    settings = with_lora(settings, "resampler", stage__resampler__lora_lr=0.0)
    run_stage("vision", settings)
    run_stage("resampler", settings)
    assert max(curve("resampler", "train/learning_rate/lora")) == 0
    assert not any(v.any() for name, v in adapter("resampler").items() if "lora_B" in name)
    run_stage("resampler", change(settings, stage__resampler__lora_lr=3e-3))
    assert max(curve("resampler", "train/learning_rate/lora")) == pytest.approx(3e-3, rel=0.05)


def test_in_half_precision_only_the_frozen_layers_are_rounded(settings: Settings) -> None:
    stage = configured_stages(with_lora(settings, "finetune").stage)["finetune"]
    settings = with_lora(settings, "finetune", trainer__precision="bf16-mixed")
    objective = load_objective(stage, settings)
    prepare_parts(objective.model, stage, "bf16-mixed", checkpointing=False)
    layer = objective.model.language_model.model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert {p.dtype for p in objective.model.lora.parameters()} == {torch.float32}
    trained = {name for name, p in objective.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"resampler", "projector", "lora"}


def test_all_stages_train_an_adapter_in_half_precision_with_checkpointing_and_parts(
    settings: Settings,
) -> None:
    settings = with_lora(
        settings,
        *("resampler", "finetune"),
        trainer__precision="bf16-mixed",
        trainer__gradient_checkpointing=True,
        stage__resampler__accumulate=2,
    )
    train_all(settings)
    assert {value.dtype for value in weights("finetune").values()} == {torch.float32}
    assert not equal(adapter("resampler"), adapter("finetune"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_depend_on_parts_or_checkpointing(
    settings: Settings, checkpointing: bool
) -> None:
    """And packed rows have the loss of separate ones, because positions and mask are the same."""
    settings = with_lora(settings, "resampler")
    stage = configured_stages(settings.stage)["resampler"]
    gradients = []
    for checkpointed, count in ((False, 1), (checkpointing, 2)):
        objective = load_objective(stage, settings)
        objective.open_readers()
        prepare_parts(objective.model, stage, "32-true", checkpointed)
        for name, parameter in objective.model.lora.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        reader = objective.readers["train"]
        batch = lightning_module.StepDataset(reader, 0, count)[0]
        *sums, _ = run_step(objective, batch.parts, batch.divisor)
        names = [name for name, p in objective.named_parameters() if p.requires_grad]
        gradients.append(dict(zip(names, sums, strict=True)))
    adapter = [name for name in gradients[0] if name.startswith("model.lora.")]
    assert adapter
    for name in adapter:
        first, second = (each[name] for each in gradients)
        assert first.any() and torch.allclose(first, second, atol=1e-6), name


@pytest.mark.parametrize("stage", ["resampler", "finetune"])
def test_a_killed_run_ends_in_the_same_bytes(
    settings: Settings, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = {f"stage__{stage}__epochs": 2}
    settings = with_lora(settings, "resampler", "finetune", **epochs)
    train_all(settings)
    expected = outputs(stage)
    remove_finished(except_stage=None)
    step = lightning_module.LitStage.training_step
    for kill_at in (1, 4):

        def training_step(self: Any, *arguments: Any, kill_at: int = kill_at) -> None:
            if self.step == kill_at:
                raise Killed
            step(self, *arguments)

        monkeypatch.setattr(lightning_module.LitStage, "training_step", training_step)
        with pytest.raises(Killed):
            run_stage(stage, settings)
    monkeypatch.setattr(lightning_module.LitStage, "training_step", step)
    run_stage(stage, settings)
    assert outputs(stage) == expected


def test_a_stage_starts_from_a_checkpoint_with_an_adapter(settings: Settings) -> None:
    settings = with_lora(settings, "resampler", stage__finetune__epochs=0)
    run_stage("vision", settings)
    run_stage("resampler", settings)
    (checkpoint,) = (paths.run_folder("resampler") / "checkpoints").glob("*.ckpt")
    write_features(settings, checkpoint)
    train(STAGES["finetune"], settings, checkpoint)
    message = r"trained with model\.lora\.alpha 32, params\.yaml has 16"
    with pytest.raises(UserError, match=message):
        run_stage("finetune", change(settings, model__lora__alpha=16))
    assert adapter("finetune") and equal(adapter("resampler"), adapter("finetune"))


def test_the_plan_counts_the_adapter(settings: Settings) -> None:
    settings = with_lora(settings, "resampler")
    stages = [STAGES["resampler"], STAGES["finetune"]]
    plan = make_plan(settings, stages)
    without = make_plan(change(settings, stage__resampler__lora=False), stages)
    model, _ = build_model(settings.model, settings.views, lora=True)
    size = sum(parameter.numel() for parameter in model.lora.parameters())
    for stage, trained in (("resampler", size), ("finetune", 0)):
        one, other = plan.stages[stage], without.stages[stage]
        assert one.parameters["lora"] == size and "lora" not in other.parameters
        assert one.parameters["language_model"] == other.parameters["language_model"]
        assert one.trained - other.trained == trained
        assert one.memory.weights - other.memory.weights == 4 * size
        assert one.memory.gradients - other.memory.gradients == 4 * trained
        assert one.model_final - other.model_final == 4 * size


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Settings, PanoLLaVA, Path]:
    """A model whose language model and adapter both change its answers, and its file."""
    monkeypatch.chdir(tmp_path)
    save_encoder(Path("towers/encoder"), size=32)
    save_language_model(Path("towers/language_model"), spread=0.3)
    settings = with_lora(settings_for(Path("towers")), "finetune")
    network, _ = build_model(settings.model, settings.views, seed=3, lora=True)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05, generator=generator)
    stage, file = configured_stages(settings.stage)["finetune"], Path(paths.WEIGHTS)
    save_weights(file, network, stage.saves, make_header(stage, settings, TOWERS))
    return settings, PanoLLaVA.from_pretrained(file, accelerator="cpu"), file


def test_merged_and_unmerged_answers_and_peft_s_are_the_same(
    answering: tuple[Settings, PanoLLaVA, Path],
    small_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, model, file = answering
    export(model, file, Path("merged"))
    cli.main(["export", "--adapter", "adapter", "--model", str(file)])
    merged = PanoLLaVA.from_pretrained("merged", accelerator="cpu")
    assert "lora" not in merged.header.stage.saves and not hasattr(merged.network, "lora")
    pictures = sorted((small_data / "images").glob("*.jpg"))
    queries = ["what", "where is the ball", "the red box", "is it behind"]
    answers = [
        [each.answer(picture, queries, 12) for picture in pictures] for each in (model, merged)
    ]
    assert answers[0] == answers[1]
    assert len({text for texts in answers[0] for text in texts}) > 10
    plain = PanoLLaVA.from_pretrained(file, accelerator="cpu")
    for matrix in plain.network.lora.parameters():
        matrix.zero_()
    assert [plain.answer(picture, queries, 12) for picture in pictures] != answers[0]
    network: Any = model.network.language_model
    tokens = torch.randint(0, network.config.vocab_size, (3, 20))
    base = AutoModelForCausalLM.from_pretrained(settings.model.language_model.path)
    with torch.no_grad():
        frozen = base(input_ids=tokens).logits
        loaded = peft.PeftModel.from_pretrained(base, "adapter")
        ours, theirs = network(input_ids=tokens).logits, loaded(input_ids=tokens).logits
    assert torch.equal(ours, theirs) and not torch.allclose(ours, frozen, atol=0.01)
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "towers/language_model"
    assert config["r"] == 16
    assert sorted(path.name for path in Path("adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with pytest.raises(UserError, match="--refer-to-towers: the adapter is merged"):
        export(model, file, Path("other"), refer_to_towers=True)
    assert not Path("other").exists()
    monkeypatch.setitem(sys.modules, "peft", None)  # an exported folder does not need it
    PanoLLaVA.from_pretrained("merged", accelerator="cpu")
    with pytest.raises(UserError, match="LoRA needs peft"):
        PanoLLaVA.from_pretrained(file, accelerator="cpu")


def test_a_result_without_an_adapter_has_none_to_export(settings: Settings) -> None:
    settings = change(settings, stage__resampler__epochs=0, stage__vision__epochs=0)
    run_stage("vision", settings)
    run_stage("resampler", settings)
    file = paths.weights_file("resampler")
    model = PanoLLaVA.from_pretrained(file, accelerator="cpu")
    with pytest.raises(UserError, match=r"has no adapter; set stage\.finetune\.lora to true"):
        export_adapter(model, file, Path("adapter"))


def test_a_listed_adapter_that_is_missing_is_an_error(settings: Settings) -> None:
    settings = with_lora(settings, "resampler", stage__resampler__epochs=0)
    run_stage("vision", settings)
    run_stage("resampler", settings)
    file = paths.weights_file("resampler")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    kept = {name: v for name, v in weights("resampler").items() if not name.startswith("lora.")}
    save_file(kept, file, metadata)
    with pytest.raises(UserError, match=r"'lora\..*' is missing from the file"):
        PanoLLaVA.from_pretrained(file, accelerator="cpu")
