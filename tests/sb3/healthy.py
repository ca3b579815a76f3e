"""Healthy policies: stock agents of Stable-Baselines3 and sb3-contrib, trained for a moment.

``HEALTHY`` maps a name to a function that trains one and gives its `Subject`. The audit must find
nothing wrong with any of them.
"""

import copy
import warnings
from functools import partial

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from batchproof.clinic.subject import Subject
from batchproof.sb3.adapter import subject_from_model


class Reach(gym.Env):
    """Move a point in the plane towards a goal; observed as a vector, an image or a Dict."""

    def __init__(self, seen="vector", actions="box", length=20):
        self.seen, self.length = seen, length
        image = spaces.Box(0, 255, (36, 36, 1), np.uint8)
        vector = spaces.Box(-2.0, 2.0, (4,), np.float32)
        self.observation_space = {
            "vector": vector,
            "image": image,
            "dict": spaces.Dict({"goal": spaces.Box(-1.0, 1.0, (2,)), "point": vector}),
            "mixed": spaces.Dict({"frame": image, "point": vector}),
            "discrete": spaces.Discrete(9),
        }[seen]
        self.action_space = {
            "box": spaces.Box(np.float32([-1.0, -0.5]), np.float32([1.0, 2.0])),
            "discrete": spaces.Discrete(4),
            "multi": spaces.MultiDiscrete([3, 3]),
            "binary": spaces.MultiBinary(2),
        }[actions]
        self.actions = actions

    def _obs(self):
        vector = np.concatenate([self.point, self.goal]).astype(np.float32)
        frame = np.zeros((36, 36, 1), np.uint8)
        for place, light in ((self.goal, 120), (self.point, 255)):
            row, column = np.clip(((place + 1) * 16).astype(int), 0, 32)
            frame[row : row + 4, column : column + 4] = light
        cell = np.clip(((self.point + 1) * 1.5).astype(int), 0, 2)
        return {
            "vector": vector,
            "image": frame,
            "dict": {"goal": self.goal.astype(np.float32), "point": vector},
            "mixed": {"frame": frame, "point": vector},
            "discrete": int(cell[0] * 3 + cell[1]),
        }[self.seen]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.point, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        return self._obs(), {}

    def step(self, action):
        move = {
            "box": lambda: np.asarray(action),
            "discrete": lambda: np.array([(1, 0), (-1, 0), (0, 1), (0, -1)][int(action)]),
            "multi": lambda: np.asarray(action) - 1.0,
            "binary": lambda: np.asarray(action) * 2.0 - 1.0,
        }[self.actions]()
        self.point = np.clip(self.point + 0.2 * move, -1, 1)
        self.steps += 1
        distance = float(np.linalg.norm(self.point - self.goal))
        return self._obs(), -distance, distance < 0.1, self.steps >= self.length, {}

    def action_masks(self):
        return np.ones(4, bool)


class LayerNormExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space, features_dim=16):
        super().__init__(observation_space, features_dim)
        size = observation_space.shape[0]
        self.net = nn.Sequential(
            nn.Linear(size, features_dim), nn.LayerNorm(features_dim), nn.ELU()
        )

    def forward(self, obs):
        return self.net(obs)


class SmallCNN(BaseFeaturesExtractor):
    """For frames of 36 x 36, with a group norm, which looks at single rows."""

    def __init__(self, observation_space, features_dim=32, norm=True):
        super().__init__(observation_space, features_dim)
        channels = observation_space.shape[0]
        self.net = nn.Sequential(
            nn.Conv2d(channels, 8, 8, 4),
            nn.GroupNorm(2, 8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(8, 8, 4, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, features_dim),
            nn.ReLU(),
        )

    def forward(self, obs):
        return self.net(obs)


class FrozenBatchNorm(nn.BatchNorm1d):
    """A batch norm that keeps given statistics in both modes."""

    def __init__(self, size, mean, var):
        super().__init__(size)
        self.running_mean.copy_(torch.as_tensor(mean))
        self.running_var.copy_(torch.as_tensor(var))
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)
        super().train(False)

    def train(self, mode=True):
        return super().train(False)


class FrozenExtractor(BaseFeaturesExtractor):
    """Standardizes Pendulum's observations with the statistics of a uniform angle and speed."""

    def __init__(self, observation_space, features_dim=3):
        super().__init__(observation_space, features_dim)
        self.norm = FrozenBatchNorm(3, [0.0, 0.0, 0.0], [0.5, 0.5, 4.0])

    def forward(self, obs):
        return self.norm(obs)


SMALL = {"net_arch": [16, 16]}
OFF = {"buffer_size": 1000, "learning_starts": 100, "batch_size": 64}
ON = {"n_steps": 128}


def trained(algorithm, policy, env, steps, policy_kwargs=None, **options):
    """The subject of a briefly trained model; ``env`` is an id or a function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's advice on tiny settings
        made = env() if callable(env) else env
        # A copy: DDPG writes its number of critics into what it is given.
        kwargs = copy.deepcopy(SMALL if policy_kwargs is None else policy_kwargs)
        model = algorithm(policy, made, policy_kwargs=kwargs, seed=0, device="cpu", **options)
        model.learn(steps)
        return subject_from_model(model, count=256)


def ars():
    """ARS keeps no observations: they are collected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ARS("MlpPolicy", Reach(), n_delta=2, seed=0, policy_kwargs={"net_arch": [16]})
        model.learn(200)
        return subject_from_model(model, env=Reach(), count=128)


def normalized_ppo():
    """PPO behind a ``VecNormalize``, with a frozen copy of it at evaluation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2))
        model = PPO("MlpPolicy", env, n_steps=64, batch_size=64, policy_kwargs=SMALL, seed=0)
        model.learn(512)
        evaluation = VecNormalize(
            DummyVecEnv([lambda: gym.make("Pendulum-v1")]), training=False, norm_reward=False
        )
        evaluation.obs_rms = env.obs_rms
        return subject_from_model(model, env=evaluation, count=256)


def loaded_sac():
    """A SAC that went through a file, without its replay buffer."""
    import tempfile
    from pathlib import Path

    from batchproof.sb3.loading import load_subject

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        model = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs=SMALL, seed=0, **OFF)
        model.learn(200)
        model.save(Path(folder) / "sac.zip")
        return load_subject(Path(folder) / "sac.zip", env="Pendulum-v1", count=256)


_layer = {**SMALL, "features_extractor_class": LayerNormExtractor}
_cnn = {
    **SMALL,
    "features_extractor_class": SmallCNN,
    "features_extractor_kwargs": {"features_dim": 16},
}
_frozen = {**SMALL, "features_extractor_class": FrozenExtractor}
_mlp = "MlpPolicy"
_pendulum, _cartpole = "Pendulum-v1", "CartPole-v1"

HEALTHY = {
    "ppo cartpole": partial(trained, PPO, _mlp, _cartpole, 256, batch_size=64, **ON),
    "ppo pendulum": partial(trained, PPO, _mlp, _pendulum, 256, batch_size=64, **ON),
    "ppo gsde": partial(trained, PPO, _mlp, _pendulum, 256, batch_size=64, use_sde=True, **ON),
    "ppo image": partial(
        trained, PPO, "CnnPolicy", partial(Reach, "image", "discrete"), 128, _cnn, batch_size=64,
        n_steps=64, n_epochs=2,
    ),
    "ppo dict": partial(
        trained, PPO, "MultiInputPolicy", partial(Reach, "dict"), 256, batch_size=64, **ON
    ),
    "ppo discrete observations": partial(
        trained, PPO, _mlp, partial(Reach, "discrete", "discrete"), 256, batch_size=64, **ON
    ),
    "ppo multidiscrete": partial(
        trained, PPO, _mlp, partial(Reach, "vector", "multi"), 256, batch_size=64, **ON
    ),
    "ppo multibinary": partial(
        trained, PPO, _mlp, partial(Reach, "vector", "binary"), 256, batch_size=64, **ON
    ),
    "ppo layer norm": partial(trained, PPO, _mlp, _pendulum, 256, _layer, batch_size=64, **ON),
    "ppo vecnormalize": normalized_ppo,
    "a2c cartpole": partial(trained, A2C, _mlp, _cartpole, 200, n_steps=20),
    "a2c pendulum": partial(trained, A2C, _mlp, _pendulum, 200, n_steps=20),
    "trpo pendulum": partial(trained, TRPO, _mlp, _pendulum, 256, batch_size=64, **ON),
    "maskable ppo": partial(
        trained, MaskablePPO, _mlp, partial(Reach, "vector", "discrete"), 256, batch_size=64, **ON
    ),
    "ars": ars,
    "dqn cartpole": partial(trained, DQN, _mlp, _cartpole, 300, target_update_interval=50, **OFF),
    "dqn image": partial(
        trained, DQN, "CnnPolicy", partial(Reach, "image", "discrete"), 200, _cnn,
        target_update_interval=50, **OFF,
    ),
    "qrdqn cartpole": partial(
        trained, QRDQN, _mlp, _cartpole, 300, {**SMALL, "n_quantiles": 10},
        target_update_interval=50, **OFF,
    ),
    "ddpg pendulum": partial(trained, DDPG, _mlp, _pendulum, 300, **OFF),
    "td3 pendulum": partial(trained, TD3, _mlp, _pendulum, 300, **OFF),
    "td3 dict": partial(trained, TD3, "MultiInputPolicy", partial(Reach, "dict"), 250, **OFF),
    "td3 layer norm": partial(trained, TD3, _mlp, _pendulum, 250, _layer, **OFF),
    "td3 frozen batch norm": partial(trained, TD3, _mlp, _pendulum, 250, _frozen, **OFF),
    "sac pendulum": partial(trained, SAC, _mlp, _pendulum, 250, **OFF),
    "sac mixed dict": partial(
        trained, SAC, "MultiInputPolicy", partial(Reach, "mixed"), 160,
        {**SMALL, "features_extractor_kwargs": {"cnn_output_dim": 16}}, **OFF,
    ),
    "sac layer norm": partial(trained, SAC, _mlp, partial(Reach, "vector"), 250, _layer, **OFF),
    "sac from a file": loaded_sac,
    "tqc pendulum": partial(
        trained, TQC, _mlp, _pendulum, 250, {**SMALL, "n_quantiles": 10}, **OFF
    ),
    "crossq pendulum": partial(
        trained, CrossQ, _mlp, _pendulum, 400, {"net_arch": {"pi": [16, 16], "qf": [32, 32]}}, **OFF
    ),
}  # fmt: skip
"""At least twenty, by name: every stock agent, and norms that act the same alone and in a batch."""

assert all(callable(build) for build in HEALTHY.values())
__all__ = ["HEALTHY", "Reach", "Subject", "trained"]
