"""Readers of data sets as their hosts ship them, one file each; ``data/datasets.py`` lists them."""
