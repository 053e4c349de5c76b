"""The training stages: objectives, loop, checkpoints and curves."""
