"""Exports: a run as a data set that others can load without this package."""
