"""Environments written in JAX, by the Gymnasium id that they equal step by step."""

from batchproof.lab.envs.constant_reward import ConstantReward

JAX_ENVS: dict[str, type[ConstantReward]] = {"batchproof/ConstantReward-v0": ConstantReward}
