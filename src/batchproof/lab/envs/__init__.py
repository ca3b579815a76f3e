"""Environments written in JAX, by the id of the environment that they equal step by step."""

from typing import Any

from batchproof.lab.envs.constant_reward import ConstantReward
from batchproof.lab.envs.linear_outliers import LinearOutliers
from batchproof.lab.envs.particle import Reference, SpeakerListener, Spread
from batchproof.lab.envs.pendulum import Pendulum
from batchproof.lab.envs.pendulum_swingup import PendulumSwingup
from batchproof.lab.envs.point_mass import PointMass
from batchproof.lab.envs.rally import Rally

# Each follows `batchproof.lab.envs.jax_env.JaxEnv`, with options of its own in ``make``.
JAX_ENVS: dict[str, Any] = {
    "batchproof/ConstantReward-v0": ConstantReward,
    "batchproof/LinearOutliers-v0": LinearOutliers,
    "batchproof/PendulumSwingup-v0": PendulumSwingup,
    "Pendulum-v1": Pendulum,
    "batchproof/PointMass-v0": PointMass,
    "batchproof/Rally-v0": Rally,
    "mpe2/simple_reference": Reference,
    "mpe2/simple_speaker_listener": SpeakerListener,
    "mpe2/simple_spread": Spread,
}
