"""facemask: vision transformers on faces with and without masks, with numbers that can be reproduced."""

import os

# albumentations would ask its index for a newer version whenever it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"
