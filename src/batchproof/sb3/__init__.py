"""Stable-Baselines3 and sb3-contrib: subjects from their models, mode plans, policies, monitor.

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from batchproof.memory import keep_freed_memory

if TYPE_CHECKING:
    from batchproof.sb3 import policies
    from batchproof.sb3.adapter import subject_from_model
    from batchproof.sb3.atari import AtariVecEnv, make_atari
    from batchproof.sb3.callback import MonitorCallback
    from batchproof.sb3.loading import load_subject
    from batchproof.sb3.modes import set_modes
    from batchproof.sb3.nature_cnn import CnnPolicy, CombinedExtractor, NatureCNN
    from batchproof.sb3.on_policy import OnPolicyModes

_HOMES = {
    "AtariVecEnv": "atari",
    "CnnPolicy": "nature_cnn",
    "CombinedExtractor": "nature_cnn",
    "MonitorCallback": "callback",
    "NatureCNN": "nature_cnn",
    "OnPolicyModes": "on_policy",
    "load_subject": "loading",
    "make_atari": "atari",
    "set_modes": "modes",
    "subject_from_model": "adapter",
}

__all__ = [
    "AtariVecEnv",
    "CnnPolicy",
    "CombinedExtractor",
    "MonitorCallback",
    "NatureCNN",
    "OnPolicyModes",
    "keep_freed_memory",
    "load_subject",
    "make_atari",
    "policies",
    "set_modes",
    "subject_from_model",
]


def __getattr__(name: str) -> Any:
    if name == "policies":
        return importlib.import_module("batchproof.sb3.policies")
    if name in _HOMES:
        return getattr(importlib.import_module(f"batchproof.sb3.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'batchproof.sb3' has no attribute {name!r}")
