"""Distill a flow-matching text-to-image teacher into a one-step student (Flow Generator Matching).

Importing this package imports no torch; the modules below do where they need it.
"""

from contextlib import suppress

__version__ = "0.1.0"

with suppress(ModuleNotFoundError):  # the package of toy datasets may be deleted
    import distill.worlds  # noqa: F401  adds their sources of prompts and images
