"""The systems that the paper builds on or argues against, re-implemented as references to compare with.

One file for each system, with its published loss and how ours differs from it; docs/related_work.md says how each did.
They are trained and used by the same commands as every other method, and nothing outside this folder imports them: the
registries load them by name (``config/references.py``).
"""
