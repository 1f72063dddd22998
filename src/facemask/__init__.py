"""facemask: vision transformers on faces with and without masks, with numbers that can be reproduced."""

__version__ = "0.1.0"
