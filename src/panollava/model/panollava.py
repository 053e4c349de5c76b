"""A trained model with all that it needs to answer questions about panoramas."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from panollava import config, paths
from panollava.data.dialogue import Dialogue
from panollava.data.images import convert_panorama, read_panorama
from panollava.errors import UserError
from panollava.geometry.views import Sampler, layout
from panollava.model.device import choose_device
from panollava.model.exported import is_exported, load_exported
from panollava.model.generate import GREEDY, Answer, Report, Sampling, answer
from panollava.model.header import Header, check_header, load_header, with_tower
from panollava.model.heat_map import HeatMaps
from panollava.model.language_model import end_tokens
from panollava.model.network import Network, build_model
from panollava.model.precision import autocast, cast_frozen_linears
from panollava.model.weights import load_weights
from panollava.provenance.made_from import check_prepared
from panollava.stages import STAGES

Picture = str | Path | Image.Image | NDArray
MAX_NEW_TOKENS = 64


class PanoLLaVA:
    """A trained network, its tokenizer and its views.

    `header` holds the settings it was trained with."""

    def __init__(
        self, network: Network, dialogue: Dialogue, header: Header, precision: str
    ) -> None:
        self.network, self.dialogue, self.header = network, dialogue, header
        self.precision = precision
        self.sampler = Sampler(layout(header.views), header.views.size)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        encoder: str | Path | None = None,
        language_model: str | Path | None = None,
        accelerator: str = "auto",
        precision: str | None = None,
        trust_remote_code: bool = False,
    ) -> "PanoLLaVA":
        """Rebuild a model from a result of `resampler` or `finetune`; params.yaml is not needed.

        Args:
            path: the model_final.safetensors, its folder, or a folder that `export` wrote.
            encoder, language_model: folders or hub ids of the pretrained towers, if they are
                elsewhere now. Default: where they were in training, relative to the working
                directory or to a folder above `path`, or on the hub.
            accelerator: cpu, gpu or auto.
            precision: 32-true or bf16-mixed. Default: that of the training on a GPU, and 32-true
                on a processor.
            trust_remote_code: run code that comes with the weights of a tower.

        Raises:
            UserError: no such result, or a tower is missing or is not the one of the training.
        """
        file, device = Path(path), choose_device(accelerator)
        places = {"encoder": encoder, "language_model": language_model}
        if is_exported(file):
            if any(places.values()):
                raise UserError(f"{file}: an exported folder says where its towers are")
            network, tokenizer, header = load_exported(file)
        else:
            file = file / paths.WEIGHTS if file.is_dir() else file
            header = load_header(file)
            for name, place in places.items():
                header = with_tower(header, name, file, place, trust_remote_code)
            parts = header.stage.saves
            network, tokenizer = build_model(
                header.model, header.views, trained=True, lora="lora" in parts
            )
            load_weights(file, network, parts, header.stage)
        network.eval().requires_grad_(False)
        precision = precision or (header.precision if device.type == "cuda" else "32-true")
        # The encoder keeps its exact weights, to which cached features are compared.
        cast_frozen_linears(network, precision, keep=("encoder",))
        network.to(device)
        ends = end_tokens(network.language_model)
        dialogue = Dialogue(tokenizer, ends=ends, prompt=header.model.prompt, cache=False)
        return cls(network, dialogue, header, precision)

    @property
    def device(self) -> torch.device:
        return self.network.language_model.device

    @property
    def prefix_tokens(self) -> int:
        """Tokens before a query: those of the text before the image, and the vision tokens."""
        return len(self.dialogue.text_prefix) + self.network.resampler.tokens

    def answer(
        self,
        panorama: Picture,
        queries: Sequence[str],
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The answers to questions about an equirectangular panorama, which is twice as wide as
        high: a file, a PIL image, or an array, uint8 (height, width, 3). Raises PictureError for
        any other picture."""
        features = self.features([panorama])
        (answers,) = self.answer_features(features, [list(queries)], max_new_tokens, sampling)
        return [answer.text for answer in answers]

    def heat_map(
        self, panorama: Picture, query: str, answer: str, part: slice | None = None
    ) -> NDArray[np.float32]:
        """How much each direction of a panorama mattered for an answer, or for a `part` of its
        characters: equirectangular, (45, 90), in [0, 1], see `HeatMaps.heat_map`."""
        return HeatMaps(self, self.views(panorama)).heat_map(query, answer, part)

    def answer_features(
        self,
        features: Tensor | None,
        queries: list[list[str]],
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        report: Report | None = None,
    ) -> list[list[Answer]]:
        """Answers to `queries[i]` about each panorama i, in one batch, from `features`; None:
        without a picture. See `generate.answer`."""
        with autocast(self.device, self.precision):
            return answer(
                self.network, self.dialogue, features, queries, max_new_tokens, sampling, report
            )

    def features(self, panoramas: Sequence[Picture]) -> Tensor:
        """Features as the command `features` writes them, rounded to `model.features`: (panoramas,
        *shape, features), see `Pooling`."""
        return self.features_of_views(np.stack([self.views(each) for each in panoramas]))

    @torch.inference_mode()
    def features_of_views(self, views: NDArray) -> Tensor:
        """Features of views that are sampled already: uint8 (panoramas, views, size, size, 3)."""
        with autocast(self.device, self.precision):
            features = self.network.features(torch.from_numpy(views).to(self.device)).float()
        rounded = getattr(torch, self.header.model.features)
        return features.to(rounded).float()

    def views(self, panorama: Picture) -> NDArray:
        """Views as `prepare` samples them: uint8 (views, size, size, 3)."""
        width = self.sampler.panorama_width
        if isinstance(panorama, str | Path):
            return self.sampler.sample(read_panorama(Path(panorama), width))
        if not isinstance(panorama, Image.Image):
            panorama = _as_image(panorama)
        return self.sampler.sample(convert_panorama(panorama, width))


def load_finetuned(settings: config.Settings) -> PanoLLaVA:
    """The project's finetuned model, after checking that it and the prepared panoramas match the
    settings. Raises UserError if they do not."""
    stage = STAGES["finetune"]
    file = paths.weights_file(stage.name)
    check_header(load_header(file), stage, settings, file)
    model = PanoLLaVA.from_pretrained(
        file,
        accelerator=settings.trainer.accelerator,
        precision=settings.trainer.precision,
        trust_remote_code=True,  # as the settings say
    )
    check_prepared(settings.views, evaluate=settings.evaluate)
    return model


def _as_image(panorama: NDArray) -> Image.Image:
    array = np.asarray(panorama)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise UserError(
            "panorama: expected a file, a PIL image or a uint8 array (height, width, 3), found "
            f"{array.dtype} {array.shape}"
        )
    return Image.fromarray(array)
