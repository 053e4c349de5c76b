"""The model: vision encoder, resampler, projector and language model."""
