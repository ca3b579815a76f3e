"""Planted defects of families 5 and 6: normalizers around environments, save, load and export."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from batchproof.clinic.subject import Subject


def observations(n=64, width=3, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def policy(norm, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), norm, nn.Tanh(), nn.Linear(8, 2)).eval()


def normalizer(mean=5.0, var=4.0, training=False, norm_reward=False, count=1e4):
    """What SB3's VecNormalize shows of itself."""
    return SimpleNamespace(
        obs_rms=SimpleNamespace(mean=np.full(3, mean), var=np.full(3, var), count=count),
        ret_rms=SimpleNamespace(mean=np.zeros(()), var=np.full((), 9.0), count=count),
        norm_obs=True,
        norm_reward=norm_reward,
        epsilon=1e-8,
        clip_obs=10.0,
        training=training,
    )


def normalized(train, evaluation):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    return Subject.from_module(
        network, observations(), normalizers={"train": train, "eval": evaluation}
    )


class PlainStatistics(nn.Module):
    """Batch norm that keeps its running statistics where the state_dict does not look."""

    def __init__(self, features, persistent=None):
        super().__init__()
        mean, var = torch.zeros(features), torch.ones(features)
        if persistent is None:
            self.mean, self.var = mean, var
        else:
            self.register_buffer("mean", mean, persistent=persistent)
            self.register_buffer("var", var, persistent=persistent)

    def forward(self, x):
        if not self.training:
            return (x - self.mean) / (self.var + 1e-5).sqrt()
        mean, var = x.mean(0), x.var(0, correction=0)
        with torch.no_grad():
            self.mean += 0.1 * (mean - self.mean)
            self.var += 0.1 * (var - self.var)
        return (x - mean) / (var + 1e-5).sqrt()


class RowsAsNumber(nn.Module):
    """Batch norm whose eval mode branches on the number of rows, and divides by it in Python."""

    def __init__(self, features):
        super().__init__()
        self.norm = nn.BatchNorm1d(features)

    def forward(self, x):
        mean = x.sum(0) / int(x.shape[0])
        return self.norm(x) + 0.5 * (x - mean)


def trained(subject_module, steps=20):
    """A network whose running statistics are not the initial ones."""
    subject_module.train()
    with torch.no_grad():
        for step in range(steps):
            subject_module(3 * observations(seed=step) + 1)
    return subject_module.eval()


def module_subject(norm, train_mode=False, name="policy"):
    network = trained(policy(norm))
    return Subject.from_module(network.train(train_mode), observations(), name=name)


PLANTED = {
    "evaluation without VecNormalize": (
        lambda: normalized(normalizer(), None), "BP501", "evaluation environment"),
    "VecNormalize updating at evaluation": (
        lambda: normalized(normalizer(), normalizer(training=True)),
        "BP502", "evaluation environment"),
    "fresh VecNormalize at evaluation": (
        lambda: normalized(normalizer(), normalizer(mean=0.0, var=1.0, count=1e-4)),
        "BP503", "evaluation environment"),
    "running statistics as plain attributes": (
        lambda: module_subject(PlainStatistics(8)), "BP601", "policy.1"),
    "running statistics in buffers that are not persistent": (
        lambda: module_subject(PlainStatistics(8, persistent=False)), "BP601", "policy.1"),
    "TorchScript trace of a policy in train mode": (
        lambda: module_subject(nn.BatchNorm1d(8), train_mode=True), "BP602", "policy.1"),
    "TorchScript trace with the number of rows as a constant": (
        lambda: module_subject(RowsAsNumber(8)), "BP602", "policy.1"),
    "torch.export of a policy in train mode": (
        lambda: module_subject(nn.BatchNorm1d(8), train_mode=True), "BP603", "policy.1"),
}  # fmt: skip
"""How to build the subject, its rule's code, and the layer or site that a finding must name."""
