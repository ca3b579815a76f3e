"""Batchproof: normalization for deep RL that acts the same alone and in a batch."""

from batchproof.errors import BatchproofError
from batchproof.modes import PRESETS, Mode, Plan, Slot

__version__ = "0.1.0"
__all__ = ["PRESETS", "BatchproofError", "Mode", "Plan", "Slot", "__version__"]
