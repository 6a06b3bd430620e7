"""Training: stages, steps and checkpoints. Does not import Ray."""
