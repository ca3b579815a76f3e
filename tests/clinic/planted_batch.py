"""Planted defects of the families alone vs batch (BP1xx) and train vs eval (BP2xx)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from batchproof.clinic.subject import Subject

OBS = 24


def observations(count: int = 256, size: int = OBS, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def bounds(size: int = 2) -> dict[str, Tensor]:
    return {"action_low": -torch.ones(size), "action_high": torch.ones(size)}


def mlp(*between: nn.Module, size: int = 32, actions: int = 2, seed: int = 0) -> nn.Sequential:
    """Linear, the given layers, ReLU, Linear, tanh."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(OBS, size), *between, nn.ReLU(), nn.Linear(size, actions), nn.Tanh()
    )


def settled(module: nn.Module, obs: Tensor | None = None) -> nn.Module:
    """Running statistics equal to those of 256 observations; in eval mode afterwards."""
    obs = observations() if obs is None else obs
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    module.train()
    with torch.no_grad():
        for _ in range(2):
            module(obs)
    for norm in norms:
        norm.momentum = 0.1
    return module.eval()


class NotebookActor(nn.Module):
    """The actor of an MADDPG notebook: batch norm only where the input has a batch axis."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1, self.bn = nn.Linear(24, 256), nn.BatchNorm1d(256)
        self.fc2, self.fc3 = nn.Linear(256, 128), nn.Linear(128, 2)
        for layer in (self.fc1, self.fc2):
            limit = layer.weight.shape[0] ** -0.5
            nn.init.uniform_(layer.weight, -limit, limit)
        nn.init.uniform_(self.fc3.weight, -3e-3, 3e-3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        if h.ndim > 1:
            h = self.bn(h)
        return torch.tanh(self.fc3(functional.relu(self.fc2(functional.relu(h)))))


class OnlineScaler(nn.Module):
    """A home-made normalizer that never stops learning; no buffer has a usual name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("middle", torch.zeros(size))
        self.register_buffer("width", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.middle += 0.05 * (x.mean(0) - self.middle)
            self.width += 0.05 * (x.var(0, correction=0) - self.width)
        return (x - self.middle) / (self.width + 1e-5).sqrt()


class AlwaysDropout(nn.Module):
    """functional.dropout is active by default, whatever the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.2)


class Noise(nn.Module):
    """Exploration noise inside the network."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class SmallBatchNorm(nn.Module):
    """Uses the batch's mean where it is small enough to be, allegedly, one environment's."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if 1 < len(x) < 16 else x


def bn_in_train_mode() -> Subject:
    net = settled(mlp(nn.BatchNorm1d(32)))
    return Subject.from_module(net.train(), observations(), **bounds())


def two_norms_in_train_mode() -> Subject:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(OBS, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32),
        nn.ReLU(), nn.Linear(32, 2), nn.Tanh(),
    )  # fmt: skip
    return Subject.from_module(settled(net).train(), observations(), **bounds())


def batch_statistics_in_eval() -> Subject:
    net = mlp(nn.BatchNorm1d(32, track_running_stats=False)).eval()
    return Subject.from_module(net, observations(), **bounds())


def bypassed_norm() -> Subject:
    return Subject.from_module(settled(NotebookActor()), observations(), **bounds())


def small_batches_centred() -> Subject:
    return Subject.from_module(mlp(SmallBatchNorm()).eval(), observations(), **bounds())


def scaler_that_never_stops() -> Subject:
    net = nn.Sequential(OnlineScaler(OBS), *mlp()).eval()
    return Subject.from_module(net, observations(), **bounds())


def noise_inside() -> Subject:
    return Subject.from_module(mlp(Noise()).eval(), observations(), **bounds())


def dropout_in_train_mode() -> Subject:
    return Subject.from_module(mlp(nn.Dropout(0.5)).train(), observations(), **bounds())


def functional_dropout() -> Subject:
    return Subject.from_module(mlp(AlwaysDropout()).eval(), observations(), **bounds())


def one_norm_of_two_in_train_mode() -> Subject:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(OBS, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32),
        nn.ReLU(), nn.Linear(32, 2),
    )  # fmt: skip
    settled(net)
    net[4].train()
    return Subject.from_module(net, observations(), **bounds())


def evaluation_that_stays_in_eval() -> Subject:
    net = settled(mlp(nn.BatchNorm1d(32))).train()

    def act(obs: Any) -> Tensor:
        net.eval()
        with torch.no_grad():
            return net(obs)

    return Subject.from_callable(act, observations(), networks={"actor": net}, **bounds())


def _norm_extractor(space: Any, *between: nn.Module) -> nn.Module:
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    class Extractor(BaseFeaturesExtractor):
        def __init__(self, observation_space: Any) -> None:
            super().__init__(observation_space, 16)
            size = observation_space.shape[0]
            self.body = nn.Sequential(nn.Linear(size, 16), *between, nn.ReLU())

        def forward(self, obs: Tensor) -> Tensor:
            return self.body(obs)

    return Extractor(space)


def _sb3(algorithm: str, layer: Callable[[], nn.Module]) -> tuple[Any, np.ndarray]:
    """An untrained agent on Pendulum-v1 with a layer in its extractor, and observations."""
    import gymnasium
    import stable_baselines3

    class Env(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Box(-8.0, 8.0, (3,), np.float32)
        action_space = (
            gymnasium.spaces.Discrete(3)
            if algorithm == "DQN"
            else gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
        )

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
            super().reset(seed=seed)
            return np.zeros(3, np.float32), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
            return np.zeros(3, np.float32), 0.0, False, False, {}

    def extractor(space: Any) -> nn.Module:
        return _norm_extractor(space, layer())

    model = getattr(stable_baselines3, algorithm)(
        "MlpPolicy",
        Env(),
        policy_kwargs={"features_extractor_class": extractor, "net_arch": [16]},
        seed=0,
        device="cpu",
    )
    if algorithm in ("PPO", "A2C"):
        with torch.no_grad():  # initialized 100 times smaller than it trains to
            model.policy.action_net.weight *= 100
    obs = observations(256, 3, seed=1).numpy()
    model.policy.train()
    with torch.no_grad():
        for module in model.policy.modules():
            if type(module).__name__ == "Extractor":
                for _ in range(20):
                    module(torch.as_tensor(obs))
    model.policy.eval()
    return model, obs


def _adapted(model: Any, obs: np.ndarray) -> Subject:
    from batchproof.sb3.adapter import subject_from_model

    return subject_from_model(model, obs=obs)


def sb3_first_ratio(algorithm: str) -> Subject:
    return _adapted(*_sb3(algorithm, lambda: nn.BatchNorm1d(16)))


def sb3_acts_in_train_mode() -> Subject:
    model, obs = _sb3("TD3", lambda: nn.BatchNorm1d(16))
    model.policy.train()
    # As in custom policies whose override forgets one of the networks.
    model.policy.set_training_mode = lambda mode: None
    return _adapted(model, obs)


def sb3_acts_with_dropout() -> Subject:
    model, obs = _sb3("DQN", lambda: nn.Dropout(0.5))
    model.policy.train()
    model.policy.set_training_mode = lambda mode: None
    return _adapted(model, obs)


PLANTED: dict[str, tuple[Callable[[], Subject], str, str]] = {
    "acting in train mode, alone vs batch": (bn_in_train_mode, "BP101", "policy.1"),
    "batch statistics in eval mode": (batch_statistics_in_eval, "BP101", "policy.1"),
    "small batches are centred": (small_batches_centred, "BP102", "policy.1"),
    "batch norm skipped without a batch axis": (bypassed_norm, "BP103", "policy.bn"),
    "normalizer that never stops learning": (scaler_that_never_stops, "BP104", "policy.0"),
    "exploration noise inside the network": (noise_inside, "BP105", "policy.1"),
    "one norm of two in train mode": (one_norm_of_two_in_train_mode, "BP201", "policy.4"),
    "dropout in train mode": (dropout_in_train_mode, "BP202", "policy.1"),
    "functional dropout in eval mode": (functional_dropout, "BP202", "policy.1"),
    "layer and batch norm in train mode": (two_norms_in_train_mode, "BP203", "policy.4"),
    "evaluation that stays in eval mode": (evaluation_that_stays_in_eval, "BP204", "actor.1"),
    "SB3 PPO with batch norm": (partial(sb3_first_ratio, "PPO"), "BP205", "body.1"),
    "SB3 A2C with batch norm": (partial(sb3_first_ratio, "A2C"), "BP205", "body.1"),
    "SB3 TD3 that acts in train mode": (sb3_acts_in_train_mode, "BP203", "body.1"),
    "SB3 DQN that acts with dropout": (sb3_acts_with_dropout, "BP202", "body.1"),
}
