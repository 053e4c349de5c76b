"""Train one stage: from its row in `stage` to `runs/vlm_<stage>/model_final.safetensors`."""

import dataclasses
import importlib
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar

from panollava import paths
from panollava.config import Settings
from panollava.errors import UserError
from panollava.lit import BestEpochs, Curves, LitStage, Speed
from panollava.stage import Stage, find_stage, freeze_all_but
from panollava.weights import load_weights, save_weights

log = logging.getLogger(__name__)
logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)  # its tips


def train(stage: Stage, settings: Settings) -> None:
    """Raises UserError for what the user can mend; nothing is left as a result then."""
    own = getattr(settings.stage, stage.name)
    torch.set_num_threads(settings.trainer.threads)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    objective = importlib.import_module(stage.objective).Objective(stage, settings)
    if stage.starts_from is not None:
        start = find_stage(stage.starts_from)
        source = paths.weights_file(start.name)
        load_weights(source, objective.model, start.saves, start.name)
        log.info("stage %d, %s: starts from %s", stage.number, stage.name, source)
    else:
        log.info("stage %d, %s: starts from the pretrained towers", stage.number, stage.name)
    log.info("%s", freeze_all_but(objective.model, stage.trains))
    folder = paths.run_folder(stage.name)
    shutil.rmtree(folder, ignore_errors=True)
    module = LitStage(objective, settings.trainer, own.epochs, own.accumulate)
    curves = Curves(paths.curves_folder(stage.name), settings.trainer.log_every)
    best = BestEpochs(folder / "checkpoints", settings.trainer.keep_checkpoints)
    if own.epochs:
        speed = Speed(paths.speed_folder(stage.name), settings.trainer.log_every)
        log.info("%d epochs, %d steps", own.epochs, module.total_steps)
        _fit(module, settings, own.epochs, [curves, speed, best, TQDMProgressBar(refresh_rate=5)])
        chosen = Path(best.best_model_path)
        log.info("best epoch: %s", chosen.name)
        state = torch.load(chosen, map_location="cpu", weights_only=True)
        loss = float(best.best_model_score)  # type: ignore[arg-type]
        result = {"best/epoch": state["epoch"], "best/val_loss": loss}
        curves.write(module.total_steps, result, plot=False)
        module.on_load_checkpoint(state)
        module.load_state_dict(state["state_dict"])
    else:
        (folder / "checkpoints").mkdir(parents=True)
        curves.live.make_summary()
        log.info("0 epochs: the stage passes on what it starts from")
    final = paths.weights_file(stage.name)
    save_weights(final, objective.model, stage.saves, _header(stage, settings, objective.model))
    log.info("wrote %s", final)


def _fit(module: LitStage, settings: Settings, epochs: int, callbacks: list[pl.Callback]) -> None:
    trainer_settings = settings.trainer
    with warnings.catch_warnings():
        # Workers are the user's choice (trainer.workers), and batches are lists of parts.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Frozen parts are in evaluation mode on purpose.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own
        warnings.filterwarnings("ignore", message=".*Trying to infer the `batch_size`.*")
        trainer = pl.Trainer(
            accelerator=trainer_settings.accelerator,
            devices=trainer_settings.devices,
            precision=trainer_settings.precision,  # type: ignore[arg-type]
            max_epochs=epochs,
            callbacks=callbacks,
            logger=False,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module)
    if trainer.interrupted:
        raise UserError("interrupted; run the same command again")


def _header(stage: Stage, settings: Settings, model: torch.nn.Module) -> dict[str, Any]:
    """The stage, the settings that rebuild the model, and the hub commits of what it stands on."""
    commits = {
        name: getattr(part.config, "_commit_hash", None)
        for name, part in (
            ("encoder", getattr(model.encoder, "tower", None)),
            ("language_model", getattr(model, "language_model", None)),
        )
        if part is not None
    }
    described = {
        "views": dataclasses.asdict(settings.views),
        "encoder": dataclasses.asdict(settings.model.encoder),
    }
    if "resampler" in stage.saves:
        described["model"] = dataclasses.asdict(settings.model)
    return {"stage": stage.name, "settings": described, "commits": commits}
