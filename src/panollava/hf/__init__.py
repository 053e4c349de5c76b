"""The classes of an exported model for transformers, registered with its Auto classes on import.

`export` copies the modules of this package into the exported folder, where they run without
PanoLLaVA. So they import nothing of it, and hold no geometry: positions, pooling weights and
encodings of directions are stored as tensors."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from panollava.hf.configuration_panollava import PanoLLaVAConfig
from panollava.hf.modeling_panollava import PanoLLaVAForConditionalGeneration, PanoLLaVAModel
from panollava.hf.processing_panollava import PanoLLaVAImageProcessor, PanoLLaVAProcessor

AutoConfig.register(PanoLLaVAConfig.model_type, PanoLLaVAConfig)
AutoModel.register(PanoLLaVAConfig, PanoLLaVAModel)
AutoModelForImageTextToText.register(PanoLLaVAConfig, PanoLLaVAForConditionalGeneration)
images: type = PanoLLaVAImageProcessor  # for each backend that transformers may ask for
AutoImageProcessor.register(
    PanoLLaVAConfig, image_processor_classes={"pil": images, "torchvision": images}
)
AutoProcessor.register(PanoLLaVAConfig, PanoLLaVAProcessor)

# `save_pretrained` writes the code too, for users without the package.
PanoLLaVAConfig.register_for_auto_class()
PanoLLaVAModel.register_for_auto_class("AutoModel")
PanoLLaVAForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
PanoLLaVAImageProcessor.register_for_auto_class()
PanoLLaVAProcessor.register_for_auto_class()
