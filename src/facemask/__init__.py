"""facemask: vision transformers on faces with and without masks, with numbers that can be reproduced."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from facemask.predict import load_model

# albumentations would ask its index for a newer version whenever it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":  # imported when it is asked for: torch takes seconds
        from facemask.predict import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
