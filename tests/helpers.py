"""Helpers of tests and benchmarks: small towers, data and projects. Nothing here may import pytest,
which benchmarks run without."""

import contextlib
import csv
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from panollava import paths
from panollava.config import Settings, load_settings
from panollava.data.dialogue import Dialogue
from panollava.data.packing import pack
from panollava.data.shard_work import ShardStore
from panollava.data.shards import Shards
from panollava.files import write_array, write_tar
from panollava.model.network import Network
from panollava.stages import STAGES

ROOT = Path(__file__).parents[1]
CHROMIUM = Path("/usr/bin/chromium")
# WebGL without a graphics card, and no connection that a page does not ask for.
CHROMIUM_OPTIONS = (
    "--no-sandbox --enable-unsafe-swiftshader --disable-background-networking --disable-quic "
    "--no-first-run --disable-component-update --disable-sync"
).split()
SHARED = ROOT.parent / "shared"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "a the what where is red blue green box ball front left right behind one two none .".split()


def save_towers(folder: Path) -> Path:
    """An encoder for views of 32 pixels, and a language model."""
    save_encoder(folder / "encoder", size=32)
    save_language_model(folder / "language_model")
    return folder


def save_encoder(folder: Path, size: int, patch: int = 8, width: int = 32) -> Path:
    """A SigLIP vision tower with random weights, in `from_pretrained` format."""
    torch.manual_seed(1)
    config = SiglipVisionConfig(
        image_size=size,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], '
        f'"size": {{"height": {size}, "width": {size}}}}}'
    )
    return folder


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Tokens for WORDS, bytes for everything else, and a ChatML template."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = special + alphabet + ["Ġ" + word for word in WORDS] + WORDS
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return fast


def save_language_model(
    folder: Path, width: int = 32, spread: float = 0.02, window: int = 32768
) -> Path:
    """Random weights with standard deviation `spread`: the larger it is, the more a prefix changes
    the logits. `window`: tokens that it attends to."""
    torch.manual_seed(2)
    tokenizer = save_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=spread,
        max_position_embeddings=window,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def pair_head_rows(language_model: Any) -> None:
    """Make rows 2i and 2i + 1 of the output head equal in bf16, the second a little longer: in
    float32, and only there, it has the larger logit of two positive ones."""
    weight = language_model.get_output_embeddings().weight
    weight[::2] = weight[::2].bfloat16().float()
    weight[1::2] = weight[: len(weight) // 2 * 2 : 2] * (1 + 1e-3)
    assert torch.equal(weight[::2][: len(weight) // 2].bfloat16(), weight[1::2].bfloat16())


def save_data(folder: Path) -> Path:
    """Six panoramas with one to four rows each in train, two in valid and three in test."""
    seed = 0
    for split, count in (("train", 6), ("valid", 2), ("test", 3)):
        rows = []
        for index in range(count):
            name = f"images/{split}_{index}.jpg"
            save_panorama(folder / name, seed)
            seed += 1
            for row in range(1 + index % 4):
                rows.append(
                    (name, WORDS[row], f"the {WORDS[5 + index % 3]} box is {WORDS[11 + row]}.")
                )
        write_rows(folder / f"{split}.csv", rows)
    return folder


def write_rows(path: Path, rows: list[tuple[str, str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("url", "query", "annotation"), *rows])


def save_panorama(path: Path, seed: int, height: int = 64) -> None:
    """A smooth random panorama, 2:1."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 255, (4, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize((2 * height, height), Image.Resampling.BICUBIC).save(path)


def save_whole_panorama(path: Path, seed: int, height: int = 64) -> None:
    """A picture of soft stripes and a gradient between the poles: its edges meet."""
    rows, columns = np.mgrid[:height, : 2 * height] + 0.5
    phases = np.random.default_rng(seed).uniform(0, 2 * np.pi, 3)
    pitch, yaw = np.pi * rows / height, np.pi * columns / height
    waves = np.sin(pitch)[..., None] * np.sin(3 * yaw[..., None] + phases)
    pixels = 128 + 60 * waves + 50 * np.cos(pitch)[..., None]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_params(path: Path, towers: Path, data: Path) -> None:
    """The project's params.yaml, for `save_towers` and `save_data`, with one epoch a stage."""
    text = (ROOT / "params.yaml").read_text()
    for old, new in (
        ("dir: data/demo", f"dir: {data}"),
        ("data/demo/towers", str(towers)),
        ("size: 64", "size: 32"),
        ("shard_size: 128", "shard_size: 4"),
        ("save_every: 50", "save_every: 1"),
    ):
        assert old in text
        text = text.replace(old, new)
    for key, value in (("max_text_length", 99), ("epochs", 1), ("batch_size", 4)):
        text = re.sub(rf"{key}: \d+", f"{key}: {value}", text)
    path.write_text(text)


def train_nothing() -> None:
    """The results of `vision` and `resampler` after 0 epochs, for the params.yaml here."""
    stages = ("vision", "resampler")
    settings = load_settings(paths.PARAMS)
    for name in stages:
        run_stage(name, change(settings, **{f"stage__{each}__epochs": 0 for each in stages}))


def results_of_one_process() -> dict[str, bytes]:
    """`results` of a project in which nothing has run."""
    from panollava.cli.main import main

    main(["prepare"])
    train_nothing()
    main(["features"])
    return results()


def results() -> dict[str, bytes]:
    """The files that `prepare` and `features` wrote here."""
    files = [*paths.PREPARED.rglob("*"), *paths.FEATURES.rglob("*")]
    return {str(file): file.read_bytes() for file in files if file.is_file()}


def save_shards(folder: Path, panoramas: Any, size: int = 4) -> Shards:
    """A shard set of an array's rows, or of JPEGs."""
    store = ShardStore(folder.parent / f"{folder.name}-shards", permanent=False, root=folder.parent)
    names = [f"{number:016x}" for number, _ in enumerate(panoramas[::size])]
    end = ".tar" if isinstance(panoramas, list) else ".npy"
    for number, name in enumerate(names):
        part = panoramas[number * size : (number + 1) * size]
        if end == ".npy":
            with write_array(store.path(name, end)) as append:
                append(part)
        else:
            with write_tar(store.path(name, end)) as append_file:
                for jpeg in part:
                    append_file("panorama.jpg", jpeg)
        store.finish(name, {end: len(part)})
    store.publish(folder, store.records(names), end)
    shutil.rmtree(store.folder, ignore_errors=True)
    return Shards(folder)


def read_array(folder: Path) -> np.ndarray:
    """All panoramas of a shard set."""
    shards = Shards(folder)
    return np.stack([shards[panorama] for panorama in range(len(shards))])


ROWS = [
    [("what", "the red box"), ("where", "left ."), ("what is", "a green ball")],
    [("where is the ball", "right")],
]


def random_views(panoramas: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (panoramas, 8, 32, 32, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def packed_loss(
    model: Network, dialogue: Dialogue, views: torch.Tensor, rows: list
) -> torch.Tensor:
    """Loss of packed rows, summed over answer tokens."""
    tokenized = [[dialogue.row(*row) for row in panorama] for panorama in rows]
    features = model.features(views)
    packed = pack(dialogue.text_prefix, model.resampler.tokens, tokenized, dialogue.pad)
    return model.loss_sum(features, packed, len(dialogue.text_prefix))


def separate_losses(model: Network, dialogue: Dialogue, views: torch.Tensor) -> list[float]:
    """Losses of ROWS, one row per sequence, computed by transformers' causal model."""
    losses = []
    vision = model.vision_tokens(model.features(views))
    embed = model.language_model.get_input_embeddings()
    for panorama, rows in enumerate(ROWS):
        for query, text in rows:
            row = dialogue.row(query, text)
            before = embed(torch.tensor([dialogue.text_prefix]))
            after = embed(torch.tensor([row.query + row.answer]))
            embedded = torch.cat([before, vision[panorama : panorama + 1], after], dim=1)
            labels = torch.full(embedded.shape[:2], -100)
            labels[0, -len(row.answer) :] = torch.tensor(row.answer)
            output = model.language_model(inputs_embeds=embedded, labels=labels)
            losses.append(float(output.loss) * len(row.answer))
    return losses


def settings_for(towers: Path) -> Settings:
    """The project's, for `save_towers`, with tokens pooled in views, as every strategy allows."""
    settings = load_settings(ROOT / "params.yaml")
    model = dataclasses.replace(
        settings.model,
        tokens="views",
        encoder=dataclasses.replace(settings.model.encoder, path=str(towers / "encoder")),
        language_model=dataclasses.replace(
            settings.model.language_model, path=str(towers / "language_model")
        ),
    )
    views = dataclasses.replace(settings.views, size=32)
    return dataclasses.replace(settings, model=model, views=views)


def change(settings: Any, **changes: Any) -> Any:
    """`stage__vision__lr=1` sets settings.stage.vision.lr."""
    for name, value in changes.items():
        first, _, rest = name.partition("__")
        part = getattr(settings, first)
        settings = dataclasses.replace(
            settings, **{first: change(part, **{rest: value}) if rest else value}
        )
    return settings


@contextlib.contextmanager
def running(server: Any) -> Iterator[str]:
    """The address of an HTTP server that runs in a thread."""
    from panollava.serving.server import bind

    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def run_stage(name: str, settings: Settings) -> None:
    from panollava.training.train import train  # Lightning is slow to import

    train(STAGES[name], settings)


def weights(stage: str) -> dict[str, torch.Tensor]:
    return load_file(paths.weights_file(stage))


def curve(stage: str, name: str) -> list[float]:
    lines = (paths.curves_folder(stage) / f"plots/metrics/{name}.tsv").read_text().splitlines()
    return [float(line.split("\t")[1]) for line in lines[1:]]


def outputs(stage: str) -> dict[str, bytes]:
    """All that DVC records of a stage."""
    return {
        str(path): path.read_bytes()
        for folder in (paths.run_folder(stage), paths.curves_folder(stage))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


PIPELINE = ("prepare", "vision", "resampler", "features", "finetune", "evaluate", "report")


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
        "model/network.py", "class Network", "# A comment.\nclass Network", set(), set()
    ),
    "a docstring of the training": CodeEdit(
        "training/train.py", '"""', '"""Changed: ', set(), set()
    ),
    "a line of resampler.py": CodeEdit(
        "model/resampler.py",
        "functional.gelu(",
        "functional.silu(",
        {"resampler", "features", "finetune", "evaluate", "report"},
        {"resampler", "features", "finetune", "evaluate", "report"},
    ),
    "a line of evaluate.py": CodeEdit(
        "evaluation/evaluate.py",
        "getLogger(__name__)",
        'getLogger("evaluate")',
        {"evaluate"},
        {"evaluate"},
    ),
    "a line of charts.py": CodeEdit(
        "serving/charts.py", "WIDTH, HEIGHT = 320", "WIDTH, HEIGHT = 300", {"report"}, {"report"}
    ),
    "a line of overlap.py": CodeEdit(
        "geometry/overlap.py",
        "return position.place, position.between",
        "return position.place - 0.01, position.between",
        {"vision"},
        set(PIPELINE) - {"prepare"},
    ),
    "a line of captions.py": CodeEdit(
        "evaluation/captions.py", "lower case", "lower-case", {"evaluate"}, {"evaluate", "report"}
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
    "a line of files.py": CodeEdit(
        "files.py", "indent=2", "indent=1", set(PIPELINE), set(PIPELINE)
    ),
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


def finished_project(target: Path, towers: Path, data: Path) -> Project:
    """A copy of the project in which the pipeline has run and is committed."""
    project = copy_project(target, towers, data)
    assert project.repro() == set(PIPELINE)
    project.commit("results")
    return project


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
        needed = not name.startswith("data/demo/") or (data is None and "/towers/" not in name)
        result = name == "dvc.lock" or name.startswith("metrics/")
        if (ROOT / name).is_file() and needed and not result:
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
        ("shard_size: 128", "shard_size: 4"),
    ):
        project.replace("params.yaml", old, new)
    project.set("params.yaml", max_text_length=99, epochs=2, batch_size=4, save_every=1)
    project.run("git", "init", "-q")
    project.run("git", "config", "user.email", "test@example.invalid")
    project.run("git", "config", "user.name", "test")
    project.commit("start")
    return project
