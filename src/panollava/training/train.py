"""Train one stage: from its row in `stages` to runs/vlm_<stage>/model_final.safetensors."""

import logging
import operator
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pydantic_core import to_jsonable_python
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.plugins.environments import LightningEnvironment

from panollava import paths
from panollava.config import Settings, Trainer
from panollava.data import shards
from panollava.errors import UserError
from panollava.files import write_json
from panollava.model import ranks
from panollava.model.device import choose_device, configure_cpu, describe_device
from panollava.model.header import TOWERS, check_lora, make_header
from panollava.model.weights import (
    load_start,
    parts_in,
    read_checkpoint,
    read_header,
    save_weights,
)
from panollava.provenance import code_digest, made_from, resume
from panollava.provenance.fingerprint import fingerprint
from panollava.stages import STAGES, Stage
from panollava.training.checkpoints import AtomicCheckpointIO, Checkpoints
from panollava.training.cuda_graphs import needs_few_shapes
from panollava.training.curves import Curves, Speed, Track, open_tracker
from panollava.training.lightning_module import LitStage
from panollava.training.objective import StageObjective, load_objective, prepare_parts
from panollava.training.strategy import RankStrategy
from panollava.training.tower_layers import compile_layers

log = logging.getLogger(__name__)
logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)  # its tips


def train(
    stage: Stage,
    settings: Settings,
    start: Path | None = None,
    must_resume: bool = False,
    run_name: str | None = None,
) -> None:
    """Train the stage, or resume its unfinished work, and publish the result.

    `start`: weights to start from (default: the result of the stage before); `must_resume`: it is
    an error if there is no unfinished work; `run_name`: on Weights & Biases.

    Raises:
        UserError: the stage cannot start, or the training failed. Nothing is published then.
    """
    device = choose_device(settings.trainer.accelerator)
    check_deterministic(settings.trainer, device)
    configure_cpu(settings.trainer.threads)
    log.info("device: %s", describe_device(device))
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    if stage.starts_from is not None:
        start = start or paths.weights_file(stage.starts_from)
        stage = stage.configured(getattr(settings.stage, stage.name), parts_in(start))
    objective = load_objective(stage, settings)
    towers = [name for name in TOWERS if hasattr(objective.model, name)]
    header = make_header(stage, settings, towers)
    objective.open_readers()
    opened = [reader.array for reader in objective.readers.values()]
    ranks.on_first(lambda: shards.verify(opened))
    _load_start(stage, settings, objective.model, start)
    module = make_module(stage, settings, objective)
    work = ranks.on_first(lambda: _open_work(stage, settings, module, must_resume))
    checkpoints = Checkpoints(work, settings.trainer.keep_checkpoints, settings.machine.save_every)
    restored = checkpoints.restore(module)
    ranks.expect_slow_start()
    if ranks.rank():
        return _fit(module, settings.trainer, [checkpoints])
    parameters = _parameters(stage, settings)
    track = open_tracker(settings.machine.wandb, run_name or stage.log_name, parameters)
    curves = Curves(paths.curves_folder(stage.name), settings.trainer.log_every, track)
    if restored:
        for step, values in module.history:
            curves.write(step, values)
        log.info("resuming from step %d of %d (%s)", module.step, module.total_steps, work)
    speed = Speed(paths.speed_folder(stage.name), settings.trainer.log_every, track)
    _fit(module, settings.trainer, [curves, checkpoints, speed])
    _publish(stage, module, checkpoints, track, header)
    resume.mark_finished(work)


def check_deterministic(trainer: Trainer, device: torch.device) -> None:
    """Raises UserError for settings that promise the same bytes but cannot keep the promise:
    programs compiled for a GPU depend on the order in which shapes occur, and resuming changes that
    order."""
    if device.type == "cuda" and trainer.compile and trainer.deterministic:
        raise UserError(
            "trainer.compile and trainer.deterministic cannot both be true on a GPU: a resumed run "
            "would not be bit-identical to an uninterrupted one. Set one of them to false"
        )


def _load_start(
    stage: Stage, settings: Settings, model: torch.nn.Module, start: Path | None
) -> None:
    """Load the result of the stage before, if the stage starts from one."""
    if stage.starts_from is None or start is None:
        log.info("stage %d, %s: starts from the pretrained towers", stage.number, stage.name)
        return
    before = STAGES[stage.starts_from]
    held = [part for part in before.optional if part in parts_in(start)]
    load_start(start, model, (*before.saves, *held), before)
    if "lora" in held and start.suffix != ".ckpt":
        check_lora(read_header(start), settings.model.lora, start)
    if stage.reads_features:
        made_from.check_features(settings, model.encoder)  # type: ignore[arg-type]
    log.info("stage %d, %s: starts from %s", stage.number, stage.name, start)


def make_module(stage: Stage, settings: Settings, objective: StageObjective) -> LitStage:
    """The Lightning module of an objective whose readers are open and whose weights are loaded."""
    checkpointing = settings.trainer.gradient_checkpointing
    log.info("%s", prepare_parts(objective.model, stage, settings.trainer.precision, checkpointing))
    if settings.trainer.compile:
        compile_layers(objective.model, needs_few_shapes(settings.trainer))
    module = LitStage(objective, settings, stage)
    rates = (f"{group['name']} {group['lr']:g}" for group in module.groups)
    log.info("learning rates: %s", ", ".join(rates))
    return module


def _steps(module: LitStage) -> str:
    """The number of steps and their mean size."""
    size = module.size
    rows = f"{size.rows_per_step:.1f} rows and " if hasattr(module.objective, "dialogue") else ""
    mean = f"{rows}{size.panoramas_per_step:.1f} panoramas"
    return f"{size.steps} steps of {mean} on average"


def _open_work(stage: Stage, settings: Settings, module: LitStage, must_resume: bool) -> Path:
    """The folder of this run's unfinished work, named by a fingerprint of all its inputs."""
    described = {
        "stage": repr(stage),
        "parameters": _parameters(stage, settings),
        "code": code_digest.digest(stage.name),
        "towers": module.objective.describe(),
        "torch": torch.__version__,
    }
    files = [file for reader in module.objective.readers.values() for file in reader.files]
    key = fingerprint(described, files, module.state_dict())
    if must_resume:
        resume.check_unfinished(stage.name, key)
    return resume.work_folder(stage.name, key)


def _parameters(stage: Stage, settings: Settings) -> dict[str, Any]:
    """The parameters that the stage reads, by their keys."""
    return {key: to_jsonable_python(operator.attrgetter(key)(settings)) for key in stage.reads}


def _fit(module: LitStage, settings: Trainer, callbacks: list[pl.Callback]) -> None:
    """Train the epochs that are left."""
    if not module.epochs_left:
        return
    most = "" if module.patience is None else "at most "
    log.info("%s%d epochs, %s", most, len(module.epoch_steps), _steps(module))
    with warnings.catch_warnings():
        # The number of workers is the user's choice (machine.loader_workers).
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Frozen parts are in evaluation mode on purpose.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # deprecated, used by Lightning
        # `LitStage` puts the values of several processes together itself.
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
        trainer = pl.Trainer(
            accelerator=settings.accelerator,
            devices=1,
            strategy=_strategy(settings.accelerator),
            precision=settings.precision,
            max_epochs=module.epochs_left,
            # Reading the loss waits for a GPU.
            callbacks=[*callbacks, _ProgressBar(settings.log_every if settings.cuda_graphs else 5)],
            # Whatever scheduler runs this, each process trains on one device and is started
            # already, and `Checkpoints` saves and resumes.
            # Under SLURM, Lightning would also load a hpc_ckpt_*.ckpt from its root folder.
            plugins=[AtomicCheckpointIO(), LightningEnvironment()],
            default_root_dir=paths.RESUME / "lightning",  # does not exist
            logger=False,
            enable_checkpointing=False,
            reload_dataloaders_every_n_epochs=1,
            # Lightning's sanity check serves as the validation of the start, on all batches.
            num_sanity_val_steps=0 if module.history else -1,
            enable_model_summary=False,
            use_distributed_sampler=False,
            deterministic=settings.deterministic,
        )
        # We never read uninitialized memory, so skip the (slow) NaN fill.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            trainer.fit(module)
        except SystemExit:  # Lightning turns KeyboardInterrupt into it
            raise KeyboardInterrupt from None
        except RuntimeError as error:
            if reason := _explain_unsupported(error):
                raise UserError(reason) from error
            raise


def _strategy(accelerator: str) -> Any:
    if ranks.count() == 1:
        return "auto"
    device = choose_device(accelerator)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    return RankStrategy(device)


class _ProgressBar(TQDMProgressBar):
    sanity_check_description = "Validation of the start"


def _explain_unsupported(error: RuntimeError) -> str | None:
    """The message for a tower that does not support a `trainer` parameter, else None."""
    first_line = str(error).strip().partition("\n")[0]
    if "does not have a deterministic implementation" in first_line:
        return f"trainer.deterministic: {first_line.split(', but')[0]}; set it to false"
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return f"trainer.compile: {first_line}; set it to false"
    return None


def _publish(
    stage: Stage, module: LitStage, checkpoints: Checkpoints, track: Track, header: dict[str, Any]
) -> None:
    """Write the stage's outputs: the best epochs' checkpoints, and the metrics and weights of the
    best one, or of the start if no epoch improves on it."""
    folder = paths.run_folder(stage.name) / "checkpoints"
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in checkpoints.files(module.best):
        shutil.copyfile(file, folder / file.name)
    metrics = {**_load_best(module, checkpoints), **module.objective.row_counts()}
    if module.stops_early:
        metrics["stopped_after_epochs"] = module.epoch
        log.info(
            "early stopping: no lower validation loss in %d epochs (patience); trained %d of %d",
            *(module.patience, module.epoch, len(module.epoch_steps)),
        )
    track(module.step, metrics)
    write_json(paths.metrics_file(stage.name), metrics)
    final = paths.weights_file(stage.name)
    save_weights(final, module.objective.model, stage.saves, header)
    log.info("wrote %s", final)


def _load_best(module: LitStage, checkpoints: Checkpoints) -> dict[str, Any]:
    """Load the weights with the lowest validation loss, and return their headline metrics; none
    after 0 epochs."""
    if not module.best:
        log.info("0 epochs: copying the input weights unchanged")
        return {}
    file = checkpoints.result(module)
    checkpoint = read_checkpoint(file)
    module.load_trained(checkpoint["state_dict"], file)
    step, validation = checkpoint["history"][-1]  # it is saved right after its validation
    if step:
        log.info("best epoch: %s, step %d", file.name, step)
    else:
        log.info(
            "no epoch improves on the start (validation loss %.3f at step 0); model_final holds "
            "the weights that the stage started from",
            validation["val/loss"],
        )
    values = {name.replace("/", "_"): value for name, value in validation.items()}
    return {"best": {"step": step}, **values}
