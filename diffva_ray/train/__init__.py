"""The joint fine-tune, as stages, steps and checkpoints. No Ray in here."""
