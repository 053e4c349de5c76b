"""The processor of an exported PanoLLaVA model: from an equirectangular panorama to its views, and
from text to tokens."""

import re
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors.numpy import load_file, save_file
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessorMixin
from transformers.utils.hub import cached_file

_POSITIONS = "sampling_positions.safetensors"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class PanoLLaVAImagesKwargs(ImagesKwargs, total=False):
    check_ratio: bool


class PanoLLaVAImageProcessor(BaseImageProcessor):
    """Samples the views of panoramas, at stored positions."""

    valid_kwargs = PanoLLaVAImagesKwargs
    model_input_names = ["pixel_values"]

    def __init__(
        self,
        panorama_width: int = 0,
        check_ratio: bool = True,
        positions: NDArray[np.float64] | None = None,
        **kwargs: Any,
    ) -> None:
        """`panorama_width`: the smallest one that panoramas are reduced to. `check_ratio`: refuse
        pictures that are not twice as wide as high. `positions`: (views, size, size, 2), of each
        pixel of the views, as fractions of the panorama's width and height."""
        super().__init__(**kwargs)
        self.panorama_width, self.check_ratio = panorama_width, check_ratio
        self.positions = positions

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        file = str(cached_file(pretrained_model_name_or_path, _POSITIONS, **hub))
        one = processor[0] if isinstance(processor, tuple) else processor
        one.positions = load_file(file)["positions"]
        return processor

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        files = super().save_pretrained(save_directory, *args, **kwargs)
        self.save_positions(Path(save_directory))
        return files

    def save_positions(self, folder: Path) -> None:
        assert self.positions is not None
        save_file({"positions": self.positions}, folder / _POSITIONS)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "positions"}

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """`pixel_values`: uint8 (images, views, size, size, 3). Raises ValueError for a picture
        that is not a panorama of 8 or 16 bits per channel."""
        check = kwargs.get("check_ratio")
        check = self.check_ratio if check is None else check
        flat: Any = make_flat_list_of_images(self.fetch_images(images))
        views = np.stack([self._sample(self._panorama(image, check)) for image in flat])
        return BatchFeature({"pixel_values": views}, tensor_type=kwargs.get("return_tensors"))

    def _panorama(self, image: Any, check_ratio: bool) -> NDArray[np.uint8]:
        """uint8 (height, width, 3), reduced by an integer factor."""
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
                raise ValueError(
                    "expected a PIL image or a uint8 array (height, width, 3), found "
                    f"{array.dtype} {array.shape}"
                )
            image = Image.fromarray(array)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if upright.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode}; save it with 8 bits per channel")
        if upright.has_transparency_data:  # black, as in training
            rgba = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
        upright = upright.convert("RGB")
        if check_ratio and abs(upright.width / upright.height - 2) > 0.02:
            raise ValueError(
                f"{upright.width} x {upright.height} pixels; an equirectangular panorama is twice "
                "as wide as high"
            )
        factor = upright.width // self.panorama_width
        return np.asarray(upright.reduce(factor) if factor > 1 else upright)

    def _sample(self, panorama: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(height, width, 3) -> (views, size, size, 3), bilinear."""
        height, width = panorama.shape[:2]
        # One pixel more on each side: across the seam, and over the poles.
        padded = np.pad(panorama, ((1, 1), (1, 1), (0, 0)), mode="wrap")
        opposite = (np.arange(-1, width + 1) - width // 2) % width + 1
        padded[0], padded[-1] = padded[1, opposite], padded[-2, opposite]
        assert self.positions is not None
        place = (self.positions * (width, height) + 0.5).astype(np.float32)
        views = np.empty((*place.shape[:3], 3), np.uint8)
        for view, each in zip(views, place, strict=True):
            points, fractions = cv2.convertMaps(each[..., 0], each[..., 1], cv2.CV_16SC2)
            cv2.remap(padded, points, fractions, cv2.INTER_LINEAR, dst=view)
        return views


class PanoLLaVAProcessor(ProcessorMixin):
    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_seq_length: int = 1,
        template: dict[str, str] | None = None,
    ) -> None:
        """`image_seq_length`: vision tokens of a panorama. `template`: the texts that the chat
        template puts around the image, a question and an answer."""
        self.image_token, self.image_seq_length = image_token, image_seq_length
        self.template = template
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        tokenizer.padding_side = "left"  # answers follow the text; not every tokenizer saves it
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """`text`: rendered by the chat template, with one image token for each panorama."""
        if text is None:
            raise ValueError("text: expected a text, or several, with an image token each")
        texts = [text] if isinstance(text, str) else list(text)
        images = None if images is None else self.image_processor.fetch_images(images)
        counts = [self._count_images(each) for each in texts]
        if max(counts, default=0) > 1:
            raise ValueError(f"{max(counts)} images in one text; ask about one panorama")
        flat: Any = [] if images is None else make_flat_list_of_images(images)
        count = len(flat)
        if sum(counts) != count:
            raise ValueError(
                f"found {sum(counts)} {self.image_token} tokens and {count} images; the number of "
                "image tokens must be the same as the number of images"
            )
        options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        ids = [self._tokens(each) for each in texts]
        if options["text_kwargs"].get("truncation"):
            raise ValueError("truncation would cut the image or the query; ask a shorter query")
        names = ("padding", "max_length", "pad_to_multiple_of", "padding_side")
        padding = {k: v for k, v in options["text_kwargs"].items() if k in names}
        self.tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
        data = dict(self.tokenizer.pad({"input_ids": ids}, **{"padding": False, **padding}))
        if options.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if images is not None:
            data |= self.image_processor(images, **options["images_kwargs"])
        return BatchFeature(data, tensor_type=options["text_kwargs"].get("return_tensors"))

    def _tokens(self, text: str) -> list[int]:
        """What is before and after the image is tokenized separately, as in training: some
        tokenizers treat the start of a text in another way. In a text that the model's own chat
        template rendered, control tokens in the question and the answer are plain text."""
        image = [self.image_token_id] * self.image_seq_length
        if parts := self._parts(text):
            control = _control_tokens(self.tokenizer)
            query = _plain_tokens(self.tokenizer, control, *parts["query"])
            before = _plain_tokens(self.tokenizer, (), "", parts["before"], "")
            ids = [*before, *(image if parts["image"] else []), *query]
            if "answer" in parts:
                opening, answer, stop = parts["answer"]
                start = _plain_tokens(self.tokenizer, (), "", opening, "")
                tokens = _plain_tokens(self.tokenizer, control, opening, answer, stop)
                follows = tokens[: len(start)] == start
                alone = _plain_tokens(self.tokenizer, control, "", answer, stop)
                ids += tokens[len(start) :] if follows else alone
            return ids
        pieces = text.split(self.image_token)
        ids = [_plain_tokens(self.tokenizer, (), "", piece, "") for piece in pieces]
        return ids[0] if len(pieces) == 1 else [*ids[0], *image, *ids[1]]

    def _parts(self, text: str) -> dict[str, Any] | None:
        """Of a text that the chat template rendered: what is `before` the image, whether it has an
        `image`, and, between the template's texts, the `query` and, if there is one, the `answer`.
        None for any other text."""
        template = self.template
        if not template or not text.startswith(template["before"]):
            return None
        before = template["before"]
        rest = text.removeprefix(before)
        image = rest.startswith(self.image_token)
        rest = rest.removeprefix(self.image_token) if image else rest
        between = template["between"] if rest.startswith(template["between"]) else ""
        rest, stop = rest.removeprefix(between), template["stop"]
        for opening in (template["opening"], template["plain_opening"]):
            parts = {"before": before, "image": image}
            if rest.endswith(opening):
                return {**parts, "query": (between, rest.removesuffix(opening), opening)}
            if opening in rest and rest.endswith(stop):
                query, _, answer = rest.removesuffix(stop).partition(opening)
                answers = {"query": (between, query, opening), "answer": (opening, answer, stop)}
                return {**parts, **answers}
        return None

    def _count_images(self, text: str) -> int:
        parts = self._parts(text)
        return int(parts["image"]) if parts else text.count(self.image_token)

    def _get_num_multimodal_tokens(
        self, image_sizes: list[Any] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """For servers: every panorama has the same number of tokens."""
        count = len(image_sizes or ())
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count
        )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        files = super().save_pretrained(save_directory, *args, **kwargs)
        self.image_processor.save_positions(Path(save_directory))
        return files

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "pixel_values"]


# As in training: copies of functions of `panollava.data.dialogue`.
def _control_tokens(tokenizer: Any) -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    names = [token.content for token in added if token.special or not token.normalized]
    return [name.lower() for name in ("<image>", *names) if len(name.strip()) > 1]


def _plain_tokens(
    tokenizer: Any, control: Collection[str], before: str, text: str, after: str
) -> list[int]:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def continued(piece: str) -> list[int]:
        start, tokens = encode("\n"), encode("\n" + piece)
        return tokens[len(start) :] if tokens[: len(start)] == start else encode(piece)

    joined, start, end = before + text + after, len(before), len(before) + len(text)
    cuts = {
        max(found.start() + 1, start)
        for name in control
        if name in joined.lower()
        for found in re.finditer(f"(?={re.escape(name)})", joined, re.IGNORECASE)
        if found.start() < end and found.start() + len(name) > start
    }
    first, *others = (joined[a:b] for a, b in pairwise([0, *sorted(cuts), len(joined)]))
    return encode(first) + [token for piece in others for token in continued(piece)]
