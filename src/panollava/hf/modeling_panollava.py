"""A PanoLLaVA model for transformers: vision encoder, resampler, projector and language model."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils.hub import cached_file

from .configuration_panollava import PanoLLaVAConfig
from .resampler_panollava import RESAMPLERS

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class PanoLLaVAPreTrainedModel(PreTrainedModel):
    config_class = PanoLLaVAConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # In half precision, rounded weights would read at other places.
    _keep_in_fp32_modules_strict = ["pooling_matrix", "directions"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any model; where the folder refers to a language model, its weights are loaded from
        there. Raises ValueError if weights are missing, which would be made up at random."""
        wants_report = kwargs.pop("output_loading_info", False)
        model, report = cls._load(pretrained_model_name_or_path, *args, **kwargs)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path}: {missing[0]!r} is missing from the weights "
                f"({len(missing)} tensors are); copy or export the folder again"
            )
        return (model, report) if wants_report else model

    @classmethod
    def _load(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["output_loading_info"] = True
        place = pretrained_model_name_or_path
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        config = kwargs.pop("config", None)
        if config is None and place is not None:
            config = PanoLLaVAConfig.from_pretrained(place, **hub)
        if place is None or config.language_model is None:
            return super().from_pretrained(place, *args, config=config, **kwargs)
        state = load_file(str(cached_file(place, "model.safetensors", **hub)))
        state |= _referred_weights(config.language_model, Path(str(place)))
        config.language_model = None  # all weights are in the model from here on
        for name in hub:
            kwargs.pop(name)
        loaded: Any = super().from_pretrained(
            None, *args, config=config, state_dict=state, **kwargs
        )
        model, report = loaded
        if model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(place, **hub)
        return model, report


class PanoLLaVAModel(PanoLLaVAPreTrainedModel):
    """Without the language model's head."""

    pooling_matrix: Tensor | None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        tower = AutoModel.from_config(config.vision_config)
        self.vision_tower = getattr(tower, "vision_model", tower)
        for name in config.removed or ():
            _remove(self.vision_tower, name)
        matrix = None
        if config.merged:
            matrix = torch.zeros(config.pooled_shape[0], config.patch_tokens)
        self.register_buffer("pooling_matrix", matrix)
        self.resampler = RESAMPLERS[config.resampler](config)
        self.projector = nn.Linear(config.resampler_width, config.embedding_width)
        self.language_model = AutoModel.from_config(config.text_config).get_decoder()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """The views of panoramas, uint8 (images, views, size, size, 3) -> `pooler_output`: the
        vision tokens of each, (tokens, embedding width)."""
        features = self._pool(self._patch_tokens(pixel_values)).float()
        features = features.to(getattr(torch, self.config.features_dtype))
        tokens = self.projector(self.resampler(features.to(self.projector.weight.dtype)))
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=list(tokens),  # type: ignore[arg-type]  # as transformers' models do
        )

    def _patch_tokens(self, views: Tensor) -> Tensor:
        """(images, views, size, size, 3) -> (images, views, grid, grid, features)."""
        pixels = views.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        mean, std = (
            pixels.new_tensor(values).view(3, 1, 1)
            for values in (self.config.image_mean, self.config.image_std)
        )
        pixels = ((pixels - mean) / std).to(self.projector.weight.dtype)
        tokens = self.vision_tower(pixel_values=pixels).last_hidden_state
        grid = views.shape[2] // self.config.vision_config.patch_size
        # Class and register tokens, where a tower has them, come before the patches.
        return tokens[:, -grid * grid :].reshape(*views.shape[:2], grid, grid, -1)

    def _pool(self, grids: Tensor) -> Tensor:
        """(images, views, grid, grid, features) -> (images, *pooled_shape, features)."""
        if self.pooling_matrix is not None:
            with torch.autocast(grids.device.type, enabled=False):
                return self.pooling_matrix.float() @ grids.flatten(1, 3).float()
        images, views, grid, _, width = grids.shape
        flat = grids.reshape(-1, grid, grid, width).permute(0, 3, 1, 2)
        pooled = functional.avg_pool2d(flat, self.config.pool, ceil_mode=True)
        return pooled.permute(0, 2, 3, 1).reshape(images, views, *pooled.shape[2:], width)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`input_ids`: one image token for each vision token of the images, in their order.
        `mm_token_type_ids` is not read."""
        kwargs["return_dict"] = True
        if inputs_embeds is None:
            assert input_ids is not None
            image = input_ids == self.config.image_token_id
            # The image token may lie outside the vocabulary.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(image, 0))
            if pixel_values is not None:
                images: Any = self.get_image_features(pixel_values).pooler_output
                tokens = torch.cat(images)
                if len(tokens) != int(image.sum()):
                    raise ValueError(
                        f"{len(tokens)} vision tokens for {int(image.sum())} image tokens; give "
                        "one panorama for each image in the text"
                    )
                tokens = tokens.to(inputs_embeds.device, inputs_embeds.dtype)
                inputs_embeds = inputs_embeds.masked_scatter(image[..., None], tokens)
        elif pixel_values is not None:
            raise ValueError("pixel_values need input_ids, which say where the image tokens are")
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            # Padding on the left must not move the text.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            position_ids = position_ids[:, -inputs_embeds.shape[1] :]
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )


class PanoLLaVAForConditionalGeneration(PanoLLaVAPreTrainedModel, GenerationMixin):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = PanoLLaVAModel(config)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self.lm_head = nn.Linear(config.embedding_width, vocabulary, bias=config.head_bias)
        embeddings = self.model.get_input_embeddings().weight
        names = [name for name, each in self.named_parameters() if each is embeddings]
        self._tied_weights_keys = {"lm_head.weight": names[0]}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._scale(self.lm_head(outputs.last_hidden_state[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1])
        others = {k: v for k, v in outputs.items() if k in CausalLMOutputWithPast.__annotations__}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **others)

    def _scale(self, logits: Tensor) -> Tensor:
        """As the language model scales the logits of its head."""
        config = self.config.text_config
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if factor := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * factor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits


def _remove(tower: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    parent = tower.get_submodule(path)
    if isinstance(parent, nn.ModuleList):
        del parent[int(leaf) :]
    else:
        setattr(parent, leaf, nn.Identity() if leaf in dict(parent.named_children()) else None)


def _referred_weights(language_model: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The language model's weights from where `folder` says that they are. Raises ValueError for
    other files than those of the export."""
    place, revision = language_model["path"], language_model.get("revision")
    if "files" in language_model:
        place = folder / place
        for name, expected in language_model["files"].items():
            file = place / name
            found = "no such file"
            if file.is_file():
                with file.open("rb") as opened:
                    found = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
            if found != expected[:16]:
                raise ValueError(
                    f"{file}: SHA-256 {found}, expected {expected[:16]}: not the language model of "
                    "the export; restore it, or export again without --refer-to-towers"
                )
    model = AutoModelForCausalLM.from_pretrained(place, revision=revision or "main")
    state = model.get_decoder().state_dict(prefix="model.language_model.")
    return state | model.get_output_embeddings().state_dict(prefix="lm_head.")
