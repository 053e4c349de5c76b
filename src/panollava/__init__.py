"""PanoLLaVA: a vision-language model for 360° panoramas, trained in three reproducible stages."""
