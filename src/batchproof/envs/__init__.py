"""Gymnasium environments, registered when this package is imported.

Gymnasium imports it by itself for an id with its name in front:
``gymnasium.make("batchproof.envs:batchproof/ConstantReward-v0")``.
"""

from __future__ import annotations

import contextlib
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gymnasium

ENTRY_POINTS = {
    "batchproof/ConstantReward-v0": "batchproof.envs.constant_reward:ConstantRewardEnv",
    "batchproof/LinearOutliers-v0": "batchproof.envs.linear_outliers:LinearOutliersEnv",
    "batchproof/PendulumSwingup-v0": "batchproof.envs.pendulum_swingup:PendulumSwingupEnv",
    "batchproof/PointMass-v0": "batchproof.envs.point_mass:PointMassEnv",
}


def register_envs() -> None:
    """Register every environment of the package with Gymnasium; doing it twice changes nothing."""
    import gymnasium

    for name, entry_point in ENTRY_POINTS.items():
        if name not in gymnasium.registry:
            gymnasium.register(id=name, entry_point=entry_point)


def make(env_id: str, options: dict[str, Any]) -> gymnasium.Env:
    """`gymnasium.make` with the package's own ids, and without MuJoCo's log file.

    Raises:
        gymnasium.error.Error: unknown id, or a package that is not installed.
    """
    import gymnasium

    register_envs()
    spec = gymnasium.registry.get(env_id)
    if env_id.startswith("dm_control/") or (spec and "mujoco" in str(spec.entry_point)):
        _warn_in_python()
    return gymnasium.make(env_id, **options)


def _warn_in_python() -> None:
    # MuJoCo's engine prints each warning every time and appends it to MUJOCO_LOG.TXT in whatever
    # folder it runs in. With a handler it does neither, and Python shows each text once.
    if find_spec("mujoco") is None:  # Gymnasium says so
        return
    import mujoco

    if hasattr(mujoco, "set_mju_user_warning") and mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(_tell)


def _tell(text: str) -> None:
    # An exception would pass through the engine and end the process: where warnings are errors,
    # this one is dropped.
    with contextlib.suppress(Warning):
        warnings.warn(f"MuJoCo: {text}", stacklevel=1)


if find_spec("gymnasium") is not None:
    register_envs()
