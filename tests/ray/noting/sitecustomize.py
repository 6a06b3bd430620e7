"""With this file on PYTHONPATH, each process of a cluster records Ray's deprecation warnings and their stack in $NOTES.

Warnings are recorded where they are raised, regardless of filters; logged ones are recorded too.
"""

import json
import logging
import os
import sys
import warnings

KINDS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def stack():
    """File and function of the frames below this module's and the standard library's own, innermost first."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and os.path.basename(os.path.dirname(name)) != "logging":
            found.append((name, frame.f_code.co_name))
        frame = frame.f_back
    return found


def note(kind, text):
    if path := os.environ.get("NOTES"):
        with open(os.path.join(path, f"{os.getpid()}.jsonl"), "a") as file:
            file.write(json.dumps({"kind": kind, "text": text, "stack": stack()}) + "\n")


def warn(message, category=None, stacklevel=1, source=None, **options):
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    if issubclass(kind, KINDS) or "deprecat" in str(message).lower():
        note(kind.__name__, str(message))
    plain_warn(message, category, stacklevel + 1, source, **options)


def warning(self, message, *values, **options):
    if self.name.split(".")[0] == "ray" and "deprecat" in str(message).lower():
        note("logged", str(message))
    plain_warning(self, message, *values, **options)


plain_warn, warnings.warn = warnings.warn, warn
plain_warning, logging.Logger.warning = logging.Logger.warning, warning
