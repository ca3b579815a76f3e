"""Environments written in JAX, by the Gymnasium id that they equal step by step."""

from batchproof.lab.envs.constant_reward import ConstantReward
from batchproof.lab.envs.jax_env import JaxEnv

JAX_ENVS: dict[str, type[JaxEnv]] = {"batchproof/ConstantReward-v0": ConstantReward}
