"""Healthy counterfactuals and attribution maps: the engine and one file per method."""
