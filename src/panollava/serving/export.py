"""`panollava export`: writes a folder that transformers loads, with or without this package."""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationConfig, PreTrainedTokenizerBase

from panollava import hf, paths
from panollava.errors import UserError, as_user_error
from panollava.model.exported import is_exported
from panollava.model.header import TOWERS
from panollava.model.lora import merged_state, save_adapter
from panollava.model.panollava import MAX_NEW_TOKENS, PanoLLaVA
from panollava.model.weights import read_header
from panollava.serving.chat_template import IMAGE, exported_tokenizer, template_texts
from panollava.serving.model_card import model_card


def export(model: PanoLLaVA, result: Path, out: Path, refer_to_towers: bool = False) -> None:
    """Write `model`, on the processor in float32, which was loaded from the file `result`, to the
    new folder `out`. `refer_to_towers`: without the weights of the language model, which are loaded
    from where they were in training.

    Raises:
        UserError: `out` is not empty or cannot be written, or a tower cannot be exported.
    """
    adapted = hasattr(model.network, "lora")
    if refer_to_towers and adapted:
        raise UserError(
            "--refer-to-towers: the adapter is merged into the language model's weights, which the "
            "folder must hold; leave the option out, or export the adapter with --adapter"
        )
    header = _without_folders(read_header(result))
    if adapted:
        header["parts"].remove("lora")
    card = model_card(model, header, result, out.name)
    tokenizer = exported_tokenizer(model.dialogue)
    exported = _model(model, header, tokenizer.get_vocab()[IMAGE])
    processor = _processor(model, tokenizer)
    state = exported.state_dict()
    if refer_to_towers:
        exported.config.language_model = _reference(model, header, out)
        language_model = ("model.language_model.", "lm_head.")
        state = {k: v for k, v in state.items() if not k.startswith(language_model)}
    with _new_folder(out) as unfinished:
        exported.save_pretrained(unfinished, state_dict=state, max_shard_size="1000GB")
        processor.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def export_adapter(model: PanoLLaVA, result: Path, out: Path) -> None:
    """Write the adapter of `model`, which was loaded from the file `result`, to the new folder
    `out`, as peft does.

    Raises:
        UserError: there is no adapter, or `out` is not empty or cannot be written.
    """
    if not hasattr(model.network, "lora"):
        raise UserError(f"{result}: has no adapter; set stage.finetune.lora to true and train it")
    header = _without_folders(read_header(result))
    path = header["settings"]["model"]["language_model"]["path"]
    commit = header["towers"]["language_model"].get("commit")
    with _new_folder(out) as unfinished:
        save_adapter(unfinished, model.network, model.header.model.lora, path, commit)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Where the block writes a folder, which is then renamed to `out`. Raises UserError if `out` is
    not empty or cannot be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; remove it, or name another")
    unfinished = out.with_name(out.name + ".part")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        yield unfinished
        if out.exists():
            out.rmdir()
        os.replace(unfinished, out)
    except OSError as error:
        raise as_user_error(error, out) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def result_file(path: Path) -> Path:
    """The result in `path`, a file or its folder. Raises UserError for an exported folder."""
    if is_exported(path):
        raise UserError(f"{path}: an exported folder; copy it, or export the result it was made of")
    return path / paths.WEIGHTS if path.is_dir() else path


def _without_folders(header: dict[str, Any]) -> dict[str, Any]:
    """Absolute paths of towers, which say something of this machine, are cut to their names."""
    text = json.dumps(header)
    for section in (header["settings"], header["settings"]["model"]):
        for tower in TOWERS:
            if Path(path := section.get(tower, {}).get("path", "")).is_absolute():
                text = text.replace(json.dumps(path), json.dumps(Path(path).name))
    return json.loads(text)


def _model(
    model: PanoLLaVA, header: dict[str, Any], image_token: int
) -> hf.PanoLLaVAForConditionalGeneration:
    network, settings = model.network, model.header.model
    if settings.encoder.trust_remote_code or settings.language_model.trust_remote_code:
        raise UserError("a tower that runs code of its own (trust_remote_code) cannot be exported")
    language_model: Any = network.language_model  # of several types
    encoder: Any = network.encoder
    projector: Any = network.projector
    pooling = network.resampler.pooling
    decoder, head = language_model.get_decoder(), language_model.get_output_embeddings()
    vision = copy.deepcopy(encoder.tower.config)
    vision.image_size = model.header.views.size  # positions of tokens are stored for this size
    text = copy.deepcopy(decoder.config)
    with torch.device("meta"):
        complete = AutoModel.from_config(vision)
        complete = getattr(complete, "vision_model", complete)
        rebuilt = AutoModel.from_config(text).get_decoder()
    for name, one, other in (
        ("encoder", encoder.tower, complete),
        ("language_model", decoder, rebuilt),
    ):
        if type(one) is not type(other):
            raise UserError(
                f"model.{name}: transformers rebuilds {type(one).__name__} as "
                f"{type(other).__name__} from its configuration; this tower cannot be exported"
            )
    for part in (vision, text):
        part.name_or_path = ""  # a path on this machine
    patches = model.header.views.size // encoder.patch
    config = hf.PanoLLaVAConfig(
        vision_config=vision,
        text_config=text,
        removed=_removed(encoder.tower, complete),
        image_mean=encoder.mean.flatten().tolist(),
        image_std=encoder.std.flatten().tolist(),
        features_dtype=settings.features,
        pool=pooling.side,
        pooled_shape=list(pooling.shape),
        patch_tokens=len(model.sampler.layout.projections) * patches**2,
        merged=pooling.matrix is not None,
        resampler=settings.resampler.type,
        resampler_width=projector.in_features,
        queries=settings.resampler.queries,
        position=settings.resampler.position,
        direction_size=network.resampler.directions.shape[-1],
        embedding_width=projector.out_features,
        head_bias=head.bias is not None,
        image_token_id=image_token,
        tie_word_embeddings=head.weight is language_model.get_input_embeddings().weight,
        panollava=header,
        dtype="float32",
    )
    config.auto_map = {"AutoModel": "modeling_panollava.PanoLLaVAModel"}  # for servers
    with torch.device("meta"):
        exported = hf.PanoLLaVAForConditionalGeneration(config)
    state = {
        **encoder.tower.state_dict(prefix="model.vision_tower."),
        **network.resampler.state_dict(prefix="model.resampler."),
        **projector.state_dict(prefix="model.projector."),
        **merged_state(decoder, "model.language_model."),
        **head.state_dict(prefix="lm_head."),
    }
    if pooling.matrix is not None:
        state["model.pooling_matrix"] = pooling.matrix
    if config.position != "none":
        state["model.resampler.directions"] = network.resampler.directions
    exported.load_state_dict(state, strict=True, assign=True)
    exported.tie_weights()
    exported.generation_config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=sorted(model.dialogue.ends),
        pad_token_id=model.dialogue.pad,
    )
    return exported


def _removed(tower: nn.Module, complete: nn.Module) -> list[str]:
    """The modules and parameters of the `complete` tower that `tower` lacks."""
    kept, parameters = dict(tower.named_modules()), dict(tower.named_parameters())
    names: list[str] = []

    def inside(path: str) -> bool:
        return any(path.startswith(f"{name}.") for name in names)

    for path, module in complete.named_modules():
        identity = isinstance(kept.get(path), nn.Identity) and not isinstance(module, nn.Identity)
        if (identity or path not in kept) and not inside(path):
            names.append(path)
    modules = [*names]
    return modules + [
        name
        for name, _ in complete.named_parameters()
        if name not in parameters and not inside(name)
    ]


def _processor(model: PanoLLaVA, tokenizer: PreTrainedTokenizerBase) -> hf.PanoLLaVAProcessor:
    images = hf.PanoLLaVAImageProcessor(
        panorama_width=model.sampler.panorama_width, positions=model.sampler.position
    )
    return hf.PanoLLaVAProcessor(
        images,
        tokenizer,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
        image_seq_length=model.network.resampler.tokens,
        template=template_texts(model.dialogue),
    )


def _reference(model: PanoLLaVA, header: dict[str, Any], out: Path) -> dict[str, Any]:
    """Where the language model is: on the hub, or relative to `out`."""
    path, recorded = model.header.model.language_model.path, header["towers"]["language_model"]
    if "files" not in recorded:
        return {"path": path, "revision": recorded["commit"]}
    weights = {k: v for k, v in recorded["files"].items() if k.endswith((".safetensors", ".bin"))}
    return {"path": os.path.relpath(path, out), "files": weights}
