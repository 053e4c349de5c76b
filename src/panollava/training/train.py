"""Train one stage: from its row in `stage` to `runs/vlm_<stage>/model_final.safetensors`."""

import dataclasses
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar

from panollava import paths
from panollava.config import Settings, Trainer
from panollava.errors import UserError
from panollava.model.device import choose_device
from panollava.model.pretrained import hub_commit
from panollava.model.weights import load_start, read_checkpoint, save_weights
from panollava.provenance.code_digest import digests
from panollava.provenance.fingerprint import fingerprint
from panollava.provenance.made_from import check_features
from panollava.provenance.resume import check_unfinished, mark_finished, work_folder
from panollava.stages import Stage, find_stage
from panollava.training.checkpoints import Checkpoints, WholeFiles
from panollava.training.curves import Curves, Speed, open_tracker
from panollava.training.lightning_module import LitStage
from panollava.training.objective import StageObjective, load_objective, prepare_parts
from panollava.training.tower_layers import compile_layers

log = logging.getLogger(__name__)
logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)  # its tips


def train(
    stage: Stage,
    settings: Settings,
    source: Path | None = None,
    must_resume: bool = False,
    run_name: str | None = None,
) -> None:
    """Train the stage, or go on with its unfinished work, and publish the result.

    `source`: where it starts, if not from the result of the stage before; `must_resume`: there
    must be unfinished work; `run_name`: on Weights & Biases.

    Raises UserError for what the user can mend; nothing is left as a result then."""
    own = getattr(settings.stage, stage.name)
    check_deterministic(settings.trainer, choose_device(settings.trainer.accelerator))
    torch.set_num_threads(settings.trainer.threads)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    objective = load_objective(stage, settings)
    header = _header(stage, settings, objective.model)
    objective.open_readers()
    if stage.starts_from is not None:
        start = find_stage(stage.starts_from)
        source = source or paths.weights_file(start.name)
        load_start(source, objective.model, start.saves, start)
        if stage.reads_features:
            check_features(settings, objective.model.encoder)
        log.info("stage %d, %s: starts from %s", stage.number, stage.name, source)
    else:
        log.info("stage %d, %s: starts from the pretrained towers", stage.number, stage.name)
    module = make_module(stage, settings, objective)
    key = _fingerprint(stage, settings, module)
    if must_resume:
        check_unfinished(stage.name, key)
    work = work_folder(stage.name, key)
    checkpoints = Checkpoints(work, settings.trainer.keep_checkpoints, settings.machine.save_every)
    described = {key: _plain(_read(settings, key)) for key in stage.reads}
    name = run_name or f"stage{stage.number}_{stage.name}"
    track = open_tracker(settings.machine.wandb, name, described)
    curves = Curves(paths.curves_folder(stage.name), settings.trainer.log_every, track)
    if checkpoints.restore(module):
        for step, values in module.history:
            curves.write(step, values)
        log.info("goes on from step %d of %d (%s)", module.step, module.total_steps, work)
    if module.epoch < own.epochs:
        log.info("%d epochs, %d steps", own.epochs, module.total_steps)
        speed = Speed(paths.speed_folder(stage.name), settings.trainer.log_every, track)
        _fit(module, settings.trainer, own.epochs - module.epoch, [curves, checkpoints, speed])
    _publish(stage, module, checkpoints, curves, header)
    mark_finished(work)


def check_deterministic(trainer: Trainer, device: torch.device) -> None:
    """Raises UserError for settings that promise the same bytes and can't keep it: programs for a
    GPU depend on the shapes that were met first, which are others where a killed run goes on."""
    if device.type == "cuda" and trainer.compile and trainer.deterministic:
        raise UserError(
            "trainer.compile: found true, with trainer.deterministic: true; but on a GPU, a run "
            "with compiled layers that is killed and goes on ends in other last bits than one that "
            "isn't. Set trainer.deterministic to false too (faster still), or trainer.compile to "
            "false (the same bytes, killed or not)"
        )


def make_module(stage: Stage, settings: Settings, objective: StageObjective) -> LitStage:
    """The objective, whose readers are open and whose model has its weights, ready to be fitted."""
    own, model = getattr(settings.stage, stage.name), objective.model
    checkpointing = settings.trainer.gradient_checkpointing
    log.info("%s", prepare_parts(model, stage, settings.trainer.precision, checkpointing))
    if settings.trainer.compile:
        compile_layers(model)
    return LitStage(
        objective, settings.trainer, settings.machine, own.epochs, own.accumulate, settings.seed
    )


def _publish(
    stage: Stage,
    module: LitStage,
    checkpoints: Checkpoints,
    curves: Curves,
    header: dict[str, Any],
) -> None:
    """Write the stage's outputs: the best epochs' checkpoints, and the best one's weights."""
    folder = paths.run_folder(stage.name)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    files = checkpoints.files(module.best)
    for file in files:
        shutil.copyfile(file, folder / "checkpoints" / file.name)
    if files:
        loss, epoch = module.best[0]
        log.info("best epoch: %s", files[0].name)
        module.load_trained(read_checkpoint(files[0])["state_dict"], files[0])
        curves.write(module.step, {"best/epoch": epoch, "best/val_loss": loss}, plot=False)
    else:
        (paths.curves_folder(stage.name) / "plots").mkdir(exist_ok=True)
        curves.live.make_summary()
        log.info("0 epochs: the stage passes on what it starts from")
    final = paths.weights_file(stage.name)
    save_weights(final, module.objective.model, stage.saves, header)
    log.info("wrote %s", final)


def _fingerprint(stage: Stage, settings: Settings, module: LitStage) -> str:
    """Of everything that the result depends on."""
    described = {
        "stage": repr(stage),
        "settings": {key: repr(_read(settings, key)) for key in stage.reads},
        "code": digests()[stage.name],
        "towers": module.objective.describe(),
        "torch": torch.__version__,
    }
    files = [file for reader in module.objective.readers.values() for file in reader.files]
    return fingerprint(described, files, module.state_dict())


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def _read(settings: Settings, key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _fit(module: LitStage, settings: Trainer, epochs: int, callbacks: list[pl.Callback]) -> None:
    with warnings.catch_warnings():
        # Workers are the user's choice (machine.loader_workers).
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Frozen parts are in evaluation mode on purpose.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own
        trainer = pl.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            precision=settings.precision,
            max_epochs=epochs,
            callbacks=[*callbacks, TQDMProgressBar(refresh_rate=5)],
            plugins=[WholeFiles()],
            logger=False,
            enable_checkpointing=False,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            use_distributed_sampler=False,
            deterministic=settings.deterministic,
        )
        # Nothing here reads what it hasn't written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            trainer.fit(module)
        except SystemExit:  # Lightning's answer to a KeyboardInterrupt
            raise KeyboardInterrupt from None
        except RuntimeError as error:
            if reason := _unable(error):
                raise UserError(reason) from error
            raise


def _unable(error: RuntimeError) -> str | None:
    """What to do where a tower can't be trained as `trainer` says."""
    first = str(error).strip().partition("\n")[0]
    if "does not have a deterministic implementation" in first:
        return f"trainer.deterministic: {first.split(', but')[0]}; set it to false"
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return f"trainer.compile: {first}; set it to false"
    return None


def _header(stage: Stage, settings: Settings, model: torch.nn.Module) -> dict[str, Any]:
    """The stage, the settings that rebuild the model, and the hub commits of what it stands on."""
    commits = {
        name: hub_commit(getattr(settings.model, name))
        for name in ("encoder", "language_model")
        if hasattr(model, name)
    }
    described = {
        "views": dataclasses.asdict(settings.views),
        "encoder": dataclasses.asdict(settings.model.encoder),
    }
    if "resampler" in stage.saves:
        described["model"] = dataclasses.asdict(settings.model)
    return {"stage": stage.name, "settings": described, "commits": commits}
