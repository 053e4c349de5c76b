"""The configuration of an exported PanoLLaVA model."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class PanoLLaVAConfig(PreTrainedConfig):
    """Shapes and settings; the defaults are placeholders."""

    model_type = "panollava"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(AutoConfig, model_type="siglip_vision_model"),
        "text_config": SubConfigSpec(AutoConfig, model_type="qwen2"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    # Modules and parameters of the vision tower that its patch tokens do not depend on. A layer
    # stands for all that follow it, too.
    removed: list[str] | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    features_dtype: str = "float32"  # that pooled patch tokens are rounded to
    pool: int = 1  # side of the squares of patch tokens that are averaged
    pooled_shape: list[int] | None = None  # (views, rows, columns), or (tokens,) of merged views
    patch_tokens: int = 1  # of all views
    merged: bool = False  # a stored matrix merges the tokens of all views
    resampler: str = "mlp"
    resampler_width: int = 1
    queries: int = 1  # of a perceiver
    position: str = "none"  # ray, view or none: what is known of a token's direction
    direction_size: int = 1  # numbers in the encoding of a direction
    embedding_width: int = 1  # of the language model's embeddings
    head_bias: bool = False  # of the language model's head
    image_token_id: int = 0
    tie_word_embeddings: bool = False
    # Where the language model's weights are, if not in this folder: path, and revision (of a hub)
    # or files (SHA-256 of a folder's).
    language_model: dict[str, Any] | None = None
    panollava: dict[str, Any] | None = None  # the header of the result that was exported
