"""Normalization layers for PyTorch that can be told which statistics to use."""

from batchproof.layers.batch_norm import BatchNorm1d, BatchNorm2d
from batchproof.layers.batch_renorm import BatchRenorm1d, BatchRenorm2d
from batchproof.layers.convert import CONVENTIONS, from_state, to_state
from batchproof.layers.estimators import ESTIMATORS
from batchproof.layers.override import mode_layers, use_mode
from batchproof.layers.registry import LAYERS, create_norm
from batchproof.layers.sync import check_in_sync, convert_sync

__all__ = [
    "CONVENTIONS",
    "ESTIMATORS",
    "LAYERS",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "check_in_sync",
    "convert_sync",
    "create_norm",
    "from_state",
    "mode_layers",
    "to_state",
    "use_mode",
]
