"""PanoLLaVA: a vision-language model for 360° panoramas, trained in three reproducible stages."""

import os

# Torch's threads wait for each other many times a step. Where another program takes a core they
# would wait in a busy loop, by libgomp's default of milliseconds: a step then takes up to ten times
# as long. Read when libgomp is loaded, so before torch is.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
