"""A subject comes back bit for bit, whatever happened to it meanwhile."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from batchproof.clinic.subject import (
    Subject,
    Transitions,
    as_parameters,
    check_runs,
    fingerprint,
    join,
    output_of,
    rows,
    sound_weights,
    stacked_q,
    take,
    training_mode,
    unchanged,
)
from batchproof.errors import BatchproofError


def subject(**more):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    net(torch.randn(8, 3)).sum().backward()
    net[0].bias.requires_grad_(False)
    net[1].eval()
    return Subject.from_module(net, torch.randn(8, 3), **more)


def train_forward(s):
    s.networks["policy"].train()
    s.policy(s.obs).sum().backward()


def weights_in_place(s):
    with torch.no_grad():
        for p in s.networks["policy"].parameters():
            p.add_(1)


def weights_replaced(s):
    s.networks["policy"][0].weight = nn.Parameter(torch.zeros(4, 3))


def to_double(s):
    s.networks["policy"].double()


def grown(s):
    p = s.networks["policy"][0].weight
    p.data = torch.zeros(9, 9, dtype=torch.float64)


def buffer_added(s):
    s.networks["policy"][0].register_buffer("extra", torch.zeros(2))


def buffer_replaced(s):
    s.networks["policy"][1].running_mean = torch.full((4,), 7.0)


def buffer_removed(s):
    del s.networks["policy"][1].running_mean


def buffer_set_to_none(s):
    s.networks["policy"][1].running_mean = None


def gradients(s):
    for p in s.networks["policy"].parameters():
        p.grad = None
        p.requires_grad_(not p.requires_grad)


def gradients_in_place(s):
    s.networks["policy"][0].weight.grad.fill_(3)


def modes(s):
    s.networks["policy"].eval()
    s.networks["policy"][1].train()


def hooks_and_forwards(s):
    layer = s.networks["policy"][0]
    layer.register_forward_hook(lambda *_: torch.zeros(8, 4))
    layer.register_forward_pre_hook(lambda *_: None)
    layer.forward = lambda x: torch.ones(8, 4)


def hooks_with_keywords(s):
    layer = s.networks["policy"][0]
    layer.register_forward_hook(lambda *_: torch.zeros(8, 4), with_kwargs=True)
    layer.register_forward_pre_hook(lambda *_: None, with_kwargs=True)


def randomness(s):
    torch.rand(3), np.random.rand(3), random.random()


def grad_off(s):
    torch.set_grad_enabled(False)


CHANGES = [
    train_forward, weights_in_place, weights_replaced, to_double, grown, buffer_added,
    buffer_replaced, buffer_removed, buffer_set_to_none, gradients, gradients_in_place, modes,
    hooks_and_forwards, hooks_with_keywords, randomness, grad_off,
]  # fmt: skip


@pytest.mark.parametrize("raised", [None, RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("change", CHANGES)
def test_unchanged_restores(change, raised):
    s = subject()
    net = s.networks["policy"]
    before, tensors = fingerprint(s), {k: v for k, v in net.named_parameters()}
    with torch.no_grad(), training_mode(s, False):
        output = s.policy(s.obs).clone()
    with pytest.raises(raised) if raised else nullcontext(), unchanged(s):
        change(s)
        if raised is not None:
            raise raised
    assert torch.is_grad_enabled()
    assert fingerprint(s) == before
    # An optimizer or a target update holds these very objects.
    assert all(value is tensors[key] for key, value in net.named_parameters())
    with torch.no_grad(), training_mode(s, False):
        assert torch.equal(s.policy(s.obs), output)


@pytest.mark.parametrize(
    "change",
    [
        weights_in_place,
        to_double,
        buffer_added,
        buffer_replaced,
        gradients,
        gradients_in_place,
        modes,
        randomness,
        train_forward,
    ],
)
def test_fingerprint_sees(change):
    s = subject()
    before = fingerprint(s)
    assert fingerprint(s) == before
    change(s)
    assert fingerprint(s) != before


def test_training_mode_gives_each_flag_back():
    s = subject()
    flags = [m.training for _, _, m in s.modules()]
    assert len(set(flags)) == 2
    with training_mode(s, False):
        assert not any(m.training for _, _, m in s.modules())
    assert [m.training for _, _, m in s.modules()] == flags


def test_shared_modules_are_listed_once():
    trunk = nn.Linear(3, 4)
    actor, critic = nn.Sequential(trunk, nn.Linear(4, 1)), nn.Sequential(trunk, nn.ReLU())
    s = Subject.from_networks({"actor": actor, "critic": critic}, torch.randn(4, 3))
    assert [(role, path) for role, path, m in s.modules() if m is trunk] == [("actor", "0")]


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 1), nn.Linear(5, 1)

    def forward(self, obs, action):
        x = torch.cat([obs, action], 1)
        return self.a(x), self.b(x).squeeze(1)


def test_from_networks():
    actor, critic, target = nn.Linear(3, 2), Critic(), Critic()
    obs = torch.randn(6, 3)
    s = Subject.from_networks(
        {"actor": actor, "critic": critic, "critic_target": target},
        obs,
        targets={"critic_target": "critic"},
    )
    action = torch.randn(6, 2)
    joined = torch.cat([obs, action], 1)
    expected = torch.stack([critic.a(joined)[:, 0], critic.b(joined)[:, 0]])
    assert torch.equal(s.critic(obs, action), expected)
    assert s.target_critic(obs, action).shape == (2, 6)
    assert torch.equal(s.critic_actor(obs), actor(obs))
    assert s.target_actor is None
    assert not s.act(obs).requires_grad
    assert s.policy(obs).requires_grad


def test_from_networks_errors():
    obs = torch.randn(4, 3)
    with pytest.raises(BatchproofError, match="'actor' or 'policy', got critic"):
        Subject.from_networks({"critic": Critic()}, obs)
    with pytest.raises(BatchproofError, match="not there: critic_target"):
        Subject.from_networks(
            {"actor": nn.Linear(3, 2), "critic": Critic()},
            obs,
            targets={"critic_target": "critic"},
        )


@pytest.mark.parametrize("obs", [torch.zeros(1, 3), {"a": torch.zeros(1, 3)}])
def test_one_observation_is_too_few(obs):
    with pytest.raises(BatchproofError, match="at least 2 observations, got 1"):
        Subject.from_module(nn.Linear(3, 2), obs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_observations_must_be_finite(bad):
    with pytest.raises(BatchproofError, match="NaN or infinity"):
        Subject.from_module(nn.Linear(3, 2), torch.full((2, 3), bad))


@pytest.mark.parametrize(
    ("obs", "match"),
    [
        ({"a": torch.zeros(5, 3), "b": torch.zeros(3, 3)}, "equally many rows, got a 5, b 3"),
        ({}, "got none"),
        (torch.tensor(1.0), "batch axis"),
        (np.zeros((4, 3)), "got a ndarray: write torch.as_tensor"),
        ({"a": [1.0, 2.0]}, "got a list for a"),
    ],
)
def test_observations_are_tensors_with_rows(obs, match):
    with pytest.raises(BatchproofError, match=match):
        Subject.from_module(nn.Linear(3, 2), obs)


@pytest.mark.parametrize("function", ["td3.zip", None, 3])
def test_a_policy_can_be_called(function):
    with pytest.raises(BatchproofError, match=f"a {type(function).__name__} is no policy"):
        Subject.from_callable(function, torch.zeros(2, 3))


def test_only_floating_observations_are_cast():
    obs = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 1, dtype=torch.uint8)}
    cast = as_parameters(obs, nn.Flatten(), nn.Linear(3, 2).double())
    assert [part.dtype for part in cast.values()] == [torch.float64, torch.uint8]
    assert as_parameters(obs["a"], nn.Flatten()) is obs["a"]


def test_what_runs_is_tried_and_left_alone():
    s = subject()
    before = fingerprint(s)
    check_runs(s)
    assert fingerprint(s) == before
    s.obs = s.obs[:, :2]
    with pytest.raises(BatchproofError, match=r"cannot take these observations, \(8, 2\)"):
        check_runs(s)
    with pytest.raises(BatchproofError, match="cannot take these"):
        check_runs(s, sick=True)
    assert fingerprint(s) == before


def test_a_policy_whose_action_alone_fails_does_not_run():
    s = subject()
    s.act = lambda batch: 1 / 0
    with pytest.raises(BatchproofError, match="ZeroDivisionError"):
        check_runs(s)


def test_weights_that_are_no_numbers_may_be_why_it_does_not_run():
    s = subject()
    s.act = lambda batch: torch.distributions.Normal(s.policy(batch), 1.0).mean
    s.networks["policy"][0].weight.data[0, 0] = float("nan")
    check_runs(s, sick=True)
    with pytest.raises(BatchproofError, match="weights are not finite"):
        check_runs(s)


def test_infinite_buffers_are_masks_and_infinite_weights_are_wrong():
    net = nn.Linear(2, 2)
    net.register_buffer("mask", torch.full((2,), -float("inf")))
    assert sound_weights(net)
    net.mask[0] = float("nan")
    assert not sound_weights(net)
    other = nn.Linear(2, 2)
    other.weight.data[0, 0] = float("inf")
    assert not sound_weights(other)


def test_from_callable_has_what_it_is_given():
    net = nn.Linear(3, 2)
    s = Subject.from_callable(lambda x: (net(x), None), torch.ones(2, 3), networks={"mine": net})
    assert torch.equal(s.policy(s.obs), net(s.obs))
    assert [role for role, _, _ in s.modules()] == ["mine"]


def test_outputs_and_batches():
    x = torch.arange(6.0)
    assert output_of((x, None)).shape == (6, 1)
    assert output_of(x.reshape(2, 3, 1)).shape == (2, 3)
    with pytest.raises(BatchproofError, match="gave a str"):
        output_of("text")
    assert stacked_q((x[:, None], x)).shape == (2, 6)
    both = {"a": x, "b": x[:, None]}
    assert rows(both) == 6
    assert take(both, 2)["b"].shape == (1, 1)
    assert take(x, slice(1, 3)).tolist() == [1, 2]
    assert join(both, both)["a"].shape == (12,)
    assert len(Transitions(x, x, x, x, x)) == 6


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_torchscript_is_refused_by_name(inside, traced):
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    x = torch.randn(8, 3)
    script = torch.jit.trace(network, x) if traced else torch.jit.script(network)
    with pytest.raises(BatchproofError, match=r"TorchScript.*the module that it was made from"):
        Subject.from_module(nn.Sequential(script) if inside else script, x)
