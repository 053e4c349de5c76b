"""Training a stage: the loop, objectives, losses, checkpoints, curves and cached features."""
