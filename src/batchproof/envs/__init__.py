"""Gymnasium environments, registered when this package is imported.

Gymnasium imports it by itself for an id with its name in front:
``gymnasium.make("batchproof.envs:batchproof/ConstantReward-v0")``.
"""

from importlib.util import find_spec

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


if find_spec("gymnasium") is not None:
    register_envs()
