"""The trace names what really happened: plans, layers, rows, statistics and targets."""

import copy
import functools
import hashlib
import importlib.util
import json
import random
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sb3_contrib import QRDQN, CrossQ
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import get_parameters_by_name
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import nn

from batchproof.clinic.subject import Subject, fingerprint
from batchproof.clinic.trace import Trace, trace
from batchproof.errors import BatchproofError
from batchproof.modes import PRESETS

_path = Path(__file__).resolve().parents[2] / "benchmarks" / "sb3_constant_reward.py"
_spec = importlib.util.spec_from_file_location("sb3_constant_reward", _path)
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

N = 12  # rows of the replay batch


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------ an update written out by hand


class Stirrer(nn.Module):
    """A normalization with names of its own and a switch that is no training flag."""

    def __init__(self, n):
        super().__init__()
        self.register_buffer("level", torch.randn(n))
        self.register_buffer("width", torch.rand(n) + 0.5)
        self.gain = nn.Parameter(torch.rand(n) + 0.5)
        self.offset = nn.Parameter(torch.randn(n))
        self.how = "E"

    def forward(self, x):
        if self.how == "B":
            return x
        level, width = self.level, self.width
        if self.how != "E":
            level, width = x.mean(0), x.var(0, correction=0)
            if self.how in "TS":
                with torch.no_grad():
                    self.level.lerp_(level, 0.1)
                    self.width.lerp_(width, 0.1)
            if self.how in "Ss":
                level, width = level.detach(), width.detach()
        return (x - level) / (width + 1e-5).sqrt() * self.gain + self.offset


def overridden(layer, how):
    """Stock batch norm made to act in a mode by a forward on the instance."""

    def forward(x):
        if how == "B":
            return x
        mean, var = layer.running_mean, layer.running_var
        if how != "E":
            mean, var = x.mean(0), x.var(0, correction=0)
            if how in "TS":
                F.batch_norm(x.detach(), layer.running_mean, layer.running_var, training=True)
            if how in "Ss":
                mean, var = mean.detach(), var.detach()
        return (x - mean) / (var + layer.eps).sqrt() * layer.weight + layer.bias

    layer.__dict__["forward"] = forward


def set_mode(network, how):
    """Put every normalizing layer of a network in a mode."""
    how = {"J": "T", "M": "T", "j": "t", "m": "t"}.get(how, how)
    for layer in network.modules():
        if isinstance(layer, Stirrer):
            layer.how = how
        elif isinstance(layer, nn.BatchNorm1d):
            overridden(layer, how)


class Critic(nn.Module):
    """Q of (s, a) in one tensor, (B, 1)."""

    def __init__(self, norm):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), norm(6), nn.ReLU(inplace=True), nn.Linear(6, 1))

    def forward(self, obs, action):
        return self.net(torch.cat([obs, action], 1))


def make_actor(norm):
    return nn.Sequential(nn.Linear(3, 6), norm(6), nn.ReLU(), nn.Linear(6, 2), nn.Tanh())


class Agent:
    """Actor-critic with target networks and an update that follows a plan by hand."""

    def __init__(self, norm=Stirrer, actor=make_actor, critic=Critic):
        self.actor, self.critic = actor(norm), critic(norm)
        self.actor_target = copy.deepcopy(self.actor)
        self.critic_target = copy.deepcopy(self.critic)
        self.obs, self.next_obs = torch.randn(N, 3), torch.randn(N, 3) + 1
        self.action, self.reward = torch.rand(N, 2) * 2 - 1, torch.randn(N, 1)
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), 1e-2)
        self.critic_opt = torch.optim.Adam(self.critic.parameters(), 1e-2)

    @property
    def networks(self):
        names = ("actor", "critic", "actor_target", "critic_target")
        return {name: getattr(self, name) for name in names}

    def critic_loss(self, plan, next_action):
        obs, next_obs = self.obs, self.next_obs
        set_mode(self.critic, plan[3])
        if plan[4] in "Jj":
            both = self.critic(torch.cat([obs, next_obs]), torch.cat([self.action, next_action]))
            q, next_q = both.split(N)
        else:
            q = self.critic(obs, self.action)
            set_mode(self.critic_target, plan[4])
            with torch.no_grad():
                next_q = self.critic_target(next_obs, next_action)
        return F.mse_loss(q, self.reward + 0.9 * next_q.detach())

    def actor_loss(self, plan):
        set_mode(self.actor, plan[0])
        set_mode(self.critic, plan[2])
        action = self.actor(self.obs)
        if plan[2] in "Mm":
            obs = torch.cat([self.obs, self.obs])
            return -self.critic(obs, torch.cat([action, self.action]))[:N].mean()
        return -self.critic(self.obs, action).mean()

    def update(self, plan):
        set_mode(self.actor_target, plan[1])
        with torch.no_grad():
            next_action = self.actor_target(self.next_obs)
        loss = self.critic_loss(plan, next_action)
        self.critic_opt.zero_grad()
        loss.backward()
        self.critic_opt.step()
        loss = self.actor_loss(plan)
        self.actor_opt.zero_grad()
        loss.backward()
        self.actor_opt.step()


def with_letter(slot, letter):
    return "TETTE"[: slot - 1] + letter + "TETTE"[slot:]


EACH = [with_letter(slot, letter) for slot in range(1, 6) for letter in "TtESsB"]
JOINED = ["TEEJJ", "TEEjj", "TTTJJ", "TEMTE", "TEmTE"]


@pytest.mark.parametrize("norm", [Stirrer, nn.BatchNorm1d])
@pytest.mark.parametrize("plan", sorted({*EACH, *JOINED, "TTETT", "SEsTt", "BBBTB", "EEEEt"}))
def test_every_letter_in_every_slot(plan, norm):
    agent = Agent(norm)
    result = trace(lambda: agent.update(plan), agent.networks)
    assert (result.plan, result.reason, result.notes) == (plan, "", ())
    assert result.batch_size == N
    for call in result.calls:
        updates = call.mode in "TSJM"
        assert bool(call.moved) == updates, call
        # Slots 2 and 5 run without gradients; there, none flows through anything.
        recorded = call.slots in ((1,), (3,), (4,), (4, 5))
        assert call.gradient == (recorded and call.mode in "TtJjMm"), call
        assert call.rows == (2 * N if call.mode in "JjMm" else N)
        assert call.kind == norm.__name__


def test_calls_are_named_by_network_slot_and_layer():
    agent = Agent()
    calls = trace(lambda: agent.update("TETTE"), agent.networks).calls
    assert [(c.name, c.slots) for c in calls] == [
        ("actor_target.1", (2,)),
        ("critic.net.1", (4,)),
        ("critic_target.net.1", (5,)),
        ("actor.1", (1,)),
        ("critic.net.1", (3,)),
    ]
    assert calls[1].moved == ("level", "width")


def test_stock_layers_by_their_training_flag():
    agent = Agent(nn.BatchNorm1d)

    def update():
        agent.actor_target.eval()
        agent.critic_target.eval()
        with torch.no_grad():
            next_q = agent.critic_target(agent.next_obs, agent.actor_target(agent.next_obs))
        agent.critic.train()
        F.mse_loss(agent.critic(agent.obs, agent.action), next_q).backward()
        agent.critic.eval()
        (-agent.critic(agent.obs, agent.actor.train()(agent.obs))).mean().backward()

    assert trace(update, agent.networks).plan == "TEETE"


def test_the_flag_is_not_believed():
    agent = Agent(nn.BatchNorm1d)
    for network in agent.networks.values():
        network.eval()  # the overridden forwards do not look at it
    result = trace(lambda: agent.update("TETTE"), agent.networks)
    assert result.plan == "TETTE"
    assert not any(call.training for call in result.calls)


# -------------------------------------------------------------------------------- slots and passes


def test_target_computed_with_gradients_and_then_detached():
    agent = Agent()

    class Careless(Agent):
        def update(self, plan):
            set_mode(self.critic, plan[4])
            set_mode(self.actor, plan[1])
            next_q = self.critic(self.next_obs, self.actor(self.next_obs))
            set_mode(self.critic, plan[3])
            q = self.critic(self.obs, self.action)
            F.mse_loss(q, self.reward + next_q.detach()).backward()
            self.actor_loss(plan).backward()

    agent = Careless()
    result = trace(lambda: agent.update("TSEtT"), {"actor": agent.actor, "critic": agent.critic})
    assert result.plan == "TSEtT"


def test_joint_forward_of_online_and_target_critic():
    agent = Agent()

    def update():
        set_mode(agent.actor, "E")
        with torch.no_grad():
            next_action = agent.actor(agent.next_obs)
        obs = torch.cat([agent.obs, agent.next_obs])
        action = torch.cat([agent.action, next_action])
        set_mode(agent.critic, "T")
        set_mode(agent.critic_target, "T")
        with torch.no_grad():
            next_q = agent.critic_target(obs, action)[N:]
        F.mse_loss(agent.critic(obs, action)[:N], next_q).backward()
        agent.actor_loss("TEE").backward()

    roles = {k: v for k, v in agent.networks.items() if k != "actor_target"}
    result = trace(update, roles)
    assert result.plan == "TEEJJ"
    assert {c.network: c.slots for c in result.calls if c.mode == "J"} == {
        "critic": (4,),
        "critic_target": (5,),
    }


def test_twice_the_rows_in_slot_4_alone_is_no_joint_forward():
    agent = Agent()

    def update():
        set_mode(agent.critic_target, "E")
        set_mode(agent.actor_target, "E")
        with torch.no_grad():
            next_q = agent.critic_target(agent.next_obs, agent.actor_target(agent.next_obs))
        set_mode(agent.critic, "T")
        obs, action = torch.cat([agent.obs] * 2), torch.cat([agent.action] * 2)
        F.mse_loss(agent.critic(obs, action)[:N], next_q).backward()
        agent.actor_loss("TET").backward()

    result = trace(update, agent.networks)
    assert result.plan == "TETTE"
    assert result.notes == (f"slot 4 sees {2 * N} rows where the batch has {N}",)


def test_batches_joined_within_a_networks_own_call():
    class Joins(Critic):
        with_rows = None

        def forward(self, obs, action):
            if self.with_rows is None:
                return super().forward(obs, action)
            other_obs, other_action = self.with_rows
            both = torch.cat([obs, other_obs]), torch.cat([action, other_action])
            return super().forward(*both)[:N]

    agent = Agent(critic=Joins)

    def update():
        agent.critic.with_rows = agent.next_obs, agent.action
        agent.critic_target.with_rows = agent.obs, agent.action
        set_mode(agent.critic, "T")
        set_mode(agent.critic_target, "T")
        set_mode(agent.actor_target, "E")
        with torch.no_grad():
            next_q = agent.critic_target(agent.next_obs, agent.actor_target(agent.next_obs))
        F.mse_loss(agent.critic(agent.obs, agent.action), next_q).backward()
        agent.critic.with_rows = agent.obs, agent.action
        agent.actor_loss("TET").backward()

    result = trace(update, agent.networks)
    assert (result.plan, result.batch_size) == ("TEMJJ", N)
    assert [c.mode for c in result.calls if c.network == "critic"] == ["J", "M"]
    assert [c.mode for c in result.calls if c.network == "critic_target"] == ["J"]


def test_layer_that_a_pass_goes_around_is_b():
    class Around(Critic):
        def forward(self, obs, action, around=False):
            x = self.net[0](torch.cat([obs, action], 1))
            return self.net[3](F.relu(x if around else self.net[1](x)))

    class Skips(Agent):
        def actor_loss(self, plan):
            set_mode(self.actor, plan[0])
            return -self.critic(self.obs, self.actor(self.obs), around=True).mean()

    agent = Skips(critic=Around)
    result = trace(lambda: agent.update("TETTE"), agent.networks)
    assert result.plan == "TEBTE"
    skipped = [call for call in result.calls if call.mode == "B"]
    assert [(c.name, c.slots, c.rows, c.kind) for c in skipped] == [
        ("critic.net.1", (3,), N, "Stirrer")
    ]


def test_target_network_that_always_goes_around_is_b():
    class Around(Critic):
        around = False

        def forward(self, obs, action):
            x = self.net[0](torch.cat([obs, action], 1))
            return self.net[3](F.relu(x if self.around else self.net[1](x)))

    agent = Agent(critic=Around)
    agent.critic_target.around = True
    assert trace(lambda: agent.update("TETTE"), agent.networks).plan == "TETTB"


def test_layers_that_disagree_in_one_slot_are_named():
    def two(norm):
        layers = nn.Linear(3, 6), norm(6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        return nn.Sequential(*layers)

    agent = Agent(actor=two)
    # The second layer goes back to its class's forward, and so to its training flag.
    agent.actor.register_forward_pre_hook(lambda net, _: vars(net[3]).pop("forward") and None)
    result = trace(lambda: agent.update("EETTE"), agent.networks)
    assert result.plan == "EETTE"
    assert result.notes == ("slot 1 has more than one mode: E in actor.1; T in actor.3",)


def test_mode_switched_by_hooks_around_the_layer():
    agent = Agent(nn.BatchNorm1d)
    layer = agent.critic.net[1]

    def update():
        agent.critic.train()
        agent.actor.train()
        agent.actor_target.eval()
        agent.critic_target.eval()
        with torch.no_grad():
            next_q = agent.critic_target(agent.next_obs, agent.actor_target(agent.next_obs))
        F.mse_loss(agent.critic(agent.obs, agent.action), next_q).backward()
        before = layer.register_forward_pre_hook(lambda module, _: module.eval() and None)
        after = layer.register_forward_hook(lambda module, *_: module.train() and None)
        (-agent.critic(agent.obs, agent.actor(agent.obs))).mean().backward()
        before.remove()
        after.remove()

    assert trace(update, agent.networks).plan == "TEETE"


def test_critics_with_roles_of_their_own():
    agent, second = Agent(), Agent()
    networks = agent.networks | {"critic2": second.critic, "target_critic2": second.critic_target}

    def update():
        agent.update("TETTE")
        set_mode(second.critic, "t")
        set_mode(second.critic_target, "E")
        with torch.no_grad():
            next_q = second.critic_target(agent.next_obs, agent.action)
        F.mse_loss(second.critic(agent.obs, agent.action), next_q).backward()

    result = trace(update, networks)
    assert result.plan == "TETTE"
    assert result.notes == ("slot 4 has more than one mode: T in critic.net.1; t in critic2.net.1",)
    assert set(result.synced) == {"actor_target", "critic_target", "target_critic2"}


def test_acting_within_the_update_is_no_slot():
    agent = Agent()

    def update():
        set_mode(agent.actor, "E")
        with torch.no_grad():
            agent.actor(agent.obs[:3])
        agent.update("TETTE")

    result = trace(update, agent.networks)
    assert result.plan == "TETTE"
    assert (result.calls[0].label, result.calls[0].slots, result.calls[0].mode) == (
        "act",
        (0,),
        "E",
    )


def test_one_row_in_and_out_of_mode():
    agent = Agent()

    def update():
        for how in "EBT":
            set_mode(agent.actor, how)
            with torch.no_grad():
                agent.actor(agent.obs[:1])
        agent.update("TETTE")

    assert [c.mode for c in trace(update, agent.networks).calls][:3] == ["E", "B", "T"]


# -------------------------------------------------------------------------------------- the layers


def plan_of(actor):
    """Trace of an update in which the actor is used as it stands, and its letters."""
    agent = Agent(actor=lambda _: actor)
    agent.actor_target = agent.actor

    def update():
        set_mode(agent.critic, "T")
        with torch.no_grad():
            agent.critic(agent.next_obs, agent.actor(agent.next_obs)[:, :2])
        agent.critic(agent.obs, agent.action).mean().backward()
        agent.critic(agent.obs, agent.actor(agent.obs)[:, :2]).mean().backward()

    return trace(update, {"actor": agent.actor, "critic": agent.critic})


class Empirical(nn.Module):
    """Moves its running statistics and then normalizes with them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            self.var.lerp_(x.detach().var(0), 0.1)
        return (x - self.mean) / (self.var + 1e-2).sqrt()


def test_running_normalizer_that_includes_the_batch_is_told_apart():
    result = plan_of(nn.Sequential(Empirical(), nn.Linear(3, 2)))
    assert result.plan == "SSTTT"
    assert "slot 1: actor.0 mixes running statistics into the batch's" in result.notes


def test_switched_layer_that_stays_in_e_is_known_by_what_it_does_at_rest():
    agent = Agent()
    for network in agent.networks.values():
        set_mode(network, "T")  # at rest; the update itself uses E alone
    assert trace(lambda: agent.update("EEEEE"), agent.networks).plan == "EEEEE"


def test_layer_that_first_shows_itself_in_a_late_call():
    agent = Agent()

    def update():
        for plan in ["EEEEE"] * 6 + ["TETTE"]:
            agent.update(plan)

    result = trace(update, agent.networks)
    assert [c.mode for c in result.calls if c.slots == (4,)] == ["E"] * 6 + ["T"]
    assert "slot 4 has more than one mode: E in critic.net.1; T in critic.net.1" in result.notes


def test_calls_within_torch_func_are_owned_up_to():
    agent = Agent(nn.BatchNorm1d)
    params = torch.func.stack_module_state([agent.critic.net.eval()] * 2)[0]
    buffers = dict(agent.critic.net.named_buffers())

    def update():
        agent.update("TETTE")
        set_mode(agent.critic, "E")
        x = torch.cat([agent.obs, agent.action], 1)
        torch.func.vmap(lambda p: torch.func.functional_call(agent.critic.net, (p, buffers), (x,)))(
            params
        ).sum().backward()

    notes = trace(update, agent.networks).notes
    assert "critic ran within torch.func, where its layers cannot be measured" in notes


def test_stopped_batch_statistics_mix_nothing():
    agent = Agent()
    assert trace(lambda: agent.update("SETTE"), agent.networks).notes == ()


class FlattenTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x[:, None])[0][:, 0])


class Scaled(nn.Module):
    """An action range in buffers, which is no statistic."""

    def __init__(self):
        super().__init__()
        self.register_buffer("action_scale", torch.tensor([2.0, 3.0]))
        self.net = nn.Linear(3, 2)

    def forward(self, x):
        return self.net(x) * self.action_scale


@pytest.mark.parametrize(
    "actor",
    [
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)),
        nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 2)),
        FlattenTime(),
        Scaled(),
    ],
    ids=["layer", "group", "dropout", "spectral", "lstm", "buffers"],
)
def test_what_uses_no_statistics_of_the_batch_is_not_listed(actor):
    result = plan_of(actor)
    assert {call.network for call in result.calls} == {"critic"}
    assert result.plan == "TTTTT"
    assert any("no layer of actor normalizes" in note for note in result.notes)
    assert ("1", "actor", N) in result.bare


def test_batch_norm_without_running_statistics_leaves_none_moved():
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    result = plan_of(nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2)))
    assert result.plan == "ttTTT"


def test_statistics_that_already_fit_the_batch_count_as_updated():
    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("count", torch.tensor(0))

        def forward(self, x):
            mean = x.mean(0)
            if self.training:
                self.count += 1
                self.mean.copy_(mean.detach())
            return x - (mean if self.training else self.mean)

    still = Still()
    actor = nn.Sequential(still, nn.Linear(3, 2))
    agent = Agent(actor=lambda _: actor)
    still.mean.copy_(agent.obs.mean(0))
    agent.actor_target = nn.Sequential(nn.Linear(3, 2))
    assert trace(lambda: agent.update("TETTE"), agent.networks).plan[0] == "T"


def test_input_norm_without_a_gradient_to_its_input():
    for how in "TSsE":
        layer = Stirrer(3)
        agent = Agent(actor=lambda _, layer=layer: nn.Sequential(layer, nn.Linear(3, 2)))
        result = trace(lambda how=how, a=agent: a.update(how + "ETTE"), agent.networks)
        assert result.plan == how + "ETTE"


def test_statistics_computed_in_a_parents_own_forward():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.a(x)
            return self.b((x - x.mean(0)) / x.std(0))

    result = plan_of(Plain())
    assert result.plan == "ttTTT"
    assert result.calls[0].name == "actor"


def test_batch_norm_on_images():
    net = nn.Sequential(
        nn.Unflatten(1, (1, 3, 1)),
        nn.Conv2d(1, 2, 1),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    assert plan_of(net).plan == "TTTTT"


def test_layer_whose_scale_is_zero_is_not_skipped():
    norm = nn.BatchNorm1d(4).eval()
    nn.init.zeros_(norm.weight)
    net = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2))
    assert plan_of(net).plan == "EETTT"


def test_values_that_are_not_finite_have_no_letter():
    agent = Agent()
    agent.actor[0].weight.data.fill_(float("nan"))
    result = trace(lambda: agent.update("TETTE"), agent.networks)
    assert result.plan == ""
    assert any("slot 1: could not be measured: actor.1" in note for note in result.notes)


# ------------------------------------------------------------------------------------- the targets


def test_what_reaches_the_targets_is_named_buffer_by_buffer():
    agent = Agent()

    def update():
        agent.update("TETTE")
        with torch.no_grad():
            for name, rho in (("level", 1.0), ("width", 0.25)):
                target = getattr(agent.critic_target.net[1], name)
                target.lerp_(getattr(agent.critic.net[1], name), rho)
        # More passes of the online network do not take back what the target was given.
        agent.critic(agent.obs, agent.action)

    synced = trace(update, agent.networks).synced
    assert synced == {
        "actor_target": {"1.level": "never", "1.width": "never"},
        "critic_target": {"net.1.level": "synced", "net.1.width": "polyak 0.25"},
    }


def test_target_that_moves_by_its_own_passes():
    agent = Agent()
    synced = trace(lambda: agent.update("TETTT"), agent.networks).synced
    assert set(synced["critic_target"].values()) == {"moved by its own passes"}
    assert set(synced["actor_target"].values()) == {"never"}


def test_targets_that_nothing_can_be_said_about():
    agent = Agent(nn.BatchNorm1d)
    synced = trace(lambda: agent.update("EEEEE"), agent.networks).synced
    assert {s for fates in synced.values() for s in fates.values()} == {"equal, nothing moved"}


def test_target_buffer_that_the_online_network_lacks():
    agent = Agent()
    agent.actor = make_actor(nn.BatchNorm1d)
    synced = trace(lambda: agent.update("TETTE"), agent.networks).synced
    assert set(synced["actor_target"].values()) == {"not in the online network"}


# ----------------------------------------------------------------------------------- the libraries


def with_norms(model):
    """The model with batch norm after its actor's first Linear as well, told to the library."""
    for role in ("actor", "actor_target"):
        actor = getattr(model, role, None)
        if actor is not None:
            body = actor.latent_pi if isinstance(model, SAC) else actor.mu
            body.insert(1, nn.BatchNorm1d(body[0].out_features).train(role == "actor"))
    if isinstance(model, TD3):
        model.actor_target.load_state_dict(model.actor.state_dict())
        model.actor_batch_norm_stats = get_parameters_by_name(model.actor, ["running_"])
        model.actor_batch_norm_stats_target = get_parameters_by_name(
            model.actor_target, ["running_"]
        )
    return model


def learner(algo, policy, steps=40, env="Pendulum-v1", **kwargs):
    """A model with a filled replay buffer that has not learnt yet."""
    policy_kwargs = {"net_arch": [8, 8]} | kwargs.pop("policy_kwargs", {})
    model = algo(
        policy,
        env,
        learning_starts=steps,
        policy_kwargs=policy_kwargs,
        buffer_size=200,
        seed=0,
        device="cpu",
        **kwargs,
    )
    return model.learn(steps)


def networks_of(model):
    names = ("actor", "critic", "actor_target", "critic_target", "q_net", "q_net_target")
    names += ("quantile_net", "quantile_net_target")
    found = {name: getattr(model, name, None) for name in names}
    found = {name: network for name, network in found.items() if network is not None}
    return found or {"policy": model.policy}


def traced(model, steps=2) -> Trace:
    return trace(lambda: model.train(gradient_steps=steps, batch_size=N), networks_of(model))


TD3_BN = toy.policy_with(TD3Policy, toy.BatchNormCritic)
TD3_CURED = toy.policy_with(TD3Policy, toy.CuredCritic)
SAC_BN = toy.policy_with(SACPolicy, toy.BatchNormCritic)
SAC_CURED = toy.policy_with(SACPolicy, toy.CuredCritic)


@pytest.mark.parametrize(
    ("algo", "policy", "plan"),
    [
        (TD3, TD3_BN, PRESETS["sb3-td3"]),
        (DDPG, TD3_BN, PRESETS["sb3-td3"]),
        (SAC, SAC_BN, PRESETS["sb3-sac"]),
        (TD3, TD3_CURED, "TEETE"),
        (DDPG, TD3_CURED, "TEETE"),
        (SAC, SAC_CURED, "TTETE"),
    ],
    ids=["td3", "ddpg", "sac", "td3-cured", "ddpg-cured", "sac-cured"],
)
def test_plans_of_stable_baselines3(algo, policy, plan):
    result = traced(with_norms(learner(algo, policy)))
    assert (result.plan, result.notes, result.batch_size) == (plan, (), N)
    assert {call.kind for call in result.calls} == {"BatchNorm1d"}
    slot_3 = {call.layer for call in result.calls if call.slots == (3,)}
    # TD3 and DDPG ask their first critic alone, and the second counts as unasked, not skipped.
    assert slot_3 == ({"qf0.1", "qf0.4", "qf1.1", "qf1.4"} if algo is SAC else {"qf0.1", "qf0.4"})
    critic = result.synced["critic_target"]
    assert {s for name, s in critic.items() if "running_" in name} == {"synced"}
    assert {s for name, s in critic.items() if "num_batches" in name} == {"never"}


def test_without_norms_in_the_actor_its_letters_are_those_of_the_flags():
    result = traced(learner(TD3, TD3_BN))
    assert result.plan == "TETTE"
    assert {(label, network) for label, network, _ in result.bare} == {
        ("1", "actor"),
        ("2", "actor_target"),
    }
    assert len(result.notes) == 2


@pytest.mark.parametrize("warmup", [100_000, -1])
def test_plan_of_crossq(warmup):
    model = learner(CrossQ, "MlpPolicy", policy_kwargs={"renorm_warmup_steps": warmup})
    result = traced(model, steps=3)
    assert (result.plan, result.notes) == (PRESETS["crossq"], ())
    assert {call.kind for call in result.calls} == {"BatchRenorm1d"}
    assert {c.rows for c in result.calls if c.slots == (4, 5)} == {2 * N}
    assert {c.label for c in result.calls if c.mode == "J"} == {"4+5"}


def test_update_without_the_actors_turn_has_no_plan_and_says_why():
    result = traced(learner(CrossQ, "MlpPolicy"), steps=1)
    assert result.plan == ""
    assert "slot 1 (actor on s, in its own loss), 3 (" in result.reason


class NormedFeatures(BaseFeaturesExtractor):
    def __init__(self, space, norm=True):
        super().__init__(space, 4)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())

    def forward(self, obs):
        return self.net(obs)


@pytest.mark.parametrize(
    ("algo", "shared", "plan"),
    [(TD3, False, "TETTE"), (SAC, False, "TTTTE"), (SAC, True, "TTTTE")],
)
def test_norms_in_a_features_extractor(algo, shared, plan):
    kwargs = {"features_extractor_class": NormedFeatures, "share_features_extractor": shared}
    result = traced(learner(algo, "MlpPolicy", policy_kwargs=kwargs))
    assert (result.plan, result.notes) == (plan, ())
    in_actor_loss = [c for c in result.calls if c.slots == (3,)]
    assert {c.name for c in in_actor_loss} == {"critic.features_extractor.net.1"}


@pytest.mark.parametrize("algo", [PPO, A2C])
def test_on_policy_updates_have_letters_and_no_plan(algo):
    kwargs = {"features_extractor_class": NormedFeatures, "net_arch": [8]}
    more = {"batch_size": 8, "n_epochs": 1} if algo is PPO else {}
    model = algo("MlpPolicy", "Pendulum-v1", n_steps=16, policy_kwargs=kwargs, seed=0, **more)
    model.learn(16)

    def act_and_update():
        with torch.no_grad():
            model.policy.set_training_mode(False)
            model.policy(torch.zeros(4, 3))
        model.train()

    result = trace(act_and_update, networks_of(model))
    assert result.plan == ""
    assert "the update called policy" in result.reason
    modes = {(c.label, c.layer, c.mode) for c in result.calls}
    assert modes == {
        ("act", "features_extractor.net.1", "E"),
        ("update", "features_extractor.net.1", "T"),
    }


@pytest.mark.parametrize("algo", [DQN, QRDQN])
def test_value_learners_have_letters_and_no_plan(algo):
    kwargs = {"features_extractor_class": NormedFeatures}
    env = gym.wrappers.TransformObservation(
        gym.make("CartPole-v1"),
        lambda obs: obs[:3],
        gym.spaces.Box(-1e6, 1e6, (3,), np.float32),
    )
    result = traced(learner(algo, "MlpPolicy", env=env, policy_kwargs=kwargs))
    assert result.plan == ""
    assert {(c.label, c.mode) for c in result.calls} == {("update", "T"), ("target", "E")}


# -------------------------------------------------------------------------------- nothing disturbed


def digest(*things) -> str:
    """SHA-256 of everything a model keeps, written without the code under test."""
    sha = hashlib.sha256()

    def add(thing, depth=0):
        if isinstance(thing, torch.Tensor):
            sha.update(f"{thing.dtype}{tuple(thing.shape)}{thing.requires_grad}".encode())
            sha.update(thing.detach().numpy().tobytes())
            if thing.is_leaf and thing.grad is not None:
                add(thing.grad)
        elif isinstance(thing, np.ndarray):
            sha.update(thing.tobytes())
        elif isinstance(thing, nn.Module):
            for name, part in thing.named_modules():
                sha.update(f"{name}{part.training}{sorted(vars(part))}".encode())
            add(list(thing.parameters()))
            add(list(thing.buffers()))
            add(getattr(thing, "optimizer", None))
        elif isinstance(thing, torch.optim.Optimizer):
            add(thing.state_dict())
        elif isinstance(thing, dict):
            for key, value in thing.items():
                sha.update(str(key).encode())
                add(value, depth)
        elif isinstance(thing, list | tuple):
            for value in thing:
                add(value, depth)
        elif isinstance(thing, str | int | float | bool) or thing is None:
            sha.update(repr(thing).encode())
        elif hasattr(thing, "__dict__") and depth < 2 and not hasattr(thing, "reset_infos"):
            add(dict(vars(thing)), depth + 1)

    add(list(things))
    add([torch.get_rng_state(), np.random.get_state()[1], repr(random.getstate())])
    return sha.hexdigest()


def subject_of(model, update):
    obs = torch.randn(8, *model.observation_space.shape)
    pairs = {n: n.replace("_target", "") for n in networks_of(model) if n.endswith("_target")}
    return Subject(
        "model",
        networks_of(model),
        obs,
        act=lambda x: x,
        policy=lambda x: x,
        targets=pairs,
        update=update,
        model=model,
    )


def off_policy(algo, policy):
    model = with_norms(learner(algo, policy))
    model.train(gradient_steps=2, batch_size=N)  # optimizers with state
    return model, functools.partial(model.train, gradient_steps=2, batch_size=N)


def on_policy():
    kwargs = {"features_extractor_class": NormedFeatures, "net_arch": [8]}
    model = PPO(
        "MlpPolicy",
        "Pendulum-v1",
        n_steps=16,
        batch_size=8,
        n_epochs=1,
        policy_kwargs=kwargs,
        seed=0,
    )
    model.learn(16)
    model.rollout_buffer.generator_ready = False
    model.rollout_buffer.observations = model.rollout_buffer.observations.reshape(16, 1, 3)
    return model, lambda: model.train()


BUILDERS = {
    "td3": lambda: off_policy(TD3, TD3_BN),
    "sac": lambda: off_policy(SAC, SAC_BN),
}


@pytest.mark.parametrize("name", ["td3", "sac"])
def test_a_subjects_model_is_handed_back_bit_for_bit(name):
    model, update = BUILDERS[name]()
    subject = subject_of(model, update)
    before, kept = digest(model), fingerprint(subject)
    first = trace(subject)
    assert digest(model) == before
    assert fingerprint(subject) == kept
    assert first.plan
    assert str(trace(subject)) == str(first)
    update()
    assert digest(model) != before


def test_a_rollout_buffer_is_handed_back():
    model, update = on_policy()
    subject = subject_of(model, update)
    before = digest(model)
    assert trace(subject).calls
    assert digest(model) == before


def test_a_subject_is_handed_back_after_an_exception_in_the_update():
    model, update = BUILDERS["sac"]()

    def broken():
        update()
        raise KeyboardInterrupt

    subject = subject_of(model, broken)
    before = digest(model)
    with pytest.raises(KeyboardInterrupt):
        trace(subject)
    assert digest(model) == before
    assert not any(part._forward_hooks for part in model.actor.modules())


def test_what_an_update_holds_in_its_closure_is_handed_back():
    agent = Agent()
    agent.update("TETTE")
    rng, log_alpha = np.random.default_rng(0), nn.Parameter(torch.zeros(()))
    alpha_opt, losses = torch.optim.Adam([log_alpha]), []

    def update():
        agent.obs = agent.obs + float(rng.normal())
        agent.update("TETTE")
        log_alpha.square().add(log_alpha).backward()
        alpha_opt.step()
        losses.append(1.0)

    def state():
        optimizers = agent.actor_opt, agent.critic_opt, alpha_opt
        return digest(*agent.networks.values(), *optimizers, log_alpha, losses, agent.obs)

    subject = Subject(
        "agent",
        agent.networks,
        agent.obs,
        act=agent.actor,
        policy=agent.actor,
        targets={"actor_target": "actor", "critic_target": "critic"},
        update=update,
    )
    before, draws = state(), rng.bit_generator.state
    assert trace(subject).plan == "TETTE"
    assert state() == before
    assert rng.bit_generator.state == draws


@pytest.mark.parametrize("name", ["td3", "sac"])
def test_a_traced_function_learns_what_it_learns_untraced(name):
    outcomes = []
    for watched in (False, True):
        model, update = BUILDERS[name]()
        if watched:
            trace(update, networks_of(model))
        else:
            update()
        outcomes.append(digest(model.policy, model.actor, model.critic, model._n_updates))
    assert outcomes[0] == outcomes[1]


def test_a_traced_function_draws_what_it_draws_untraced():
    drawn = []
    for watched in (False, True):
        torch.manual_seed(1)
        agent = Agent(actor=lambda _: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)))
        if watched:
            trace(lambda agent=agent: agent.update("TETTE"), agent.networks)
        else:
            agent.update("TETTE")
        drawn.append(digest(*agent.networks.values(), torch.rand(3)))
    assert drawn[0] == drawn[1]


def test_hooks_and_forwards_are_gone_afterwards():
    agent = Agent()

    def fails():
        agent.update("TETTE")
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        trace(fails, agent.networks)
    for network in agent.networks.values():
        for part in network.modules():
            assert not part._forward_hooks
            assert not part._forward_pre_hooks


# ------------------------------------------------------------------------------ outputs and errors


def test_report_is_plain_text_and_json_is_strict():
    agent = Agent()
    result = trace(lambda: agent.update("TEMTE"), agent.networks)
    text = str(result)
    assert text.isascii()
    assert text.startswith("plan TEMTE\n")
    row = next(line for line in text.splitlines() if line.startswith("3"))
    assert row.split() == ["3", "critic", "net.1", "Stirrer", str(2 * N), "M", "yes", "yes", "1"]
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["plan"] == "TEMTE"
    assert data["calls"][-1]["slots"] == [3]
    assert data["calls"][-1]["mode"] == "M"


def test_batch_size_can_be_told():
    agent = Agent()
    result = trace(lambda: agent.update("TETTE"), agent.networks, batch_size=N // 2)
    assert result.batch_size == N // 2
    assert {c.mode for c in result.calls if c.slots == (3,)} == {"M"}


def test_networks_without_any_norm_have_no_plan():
    agent = Agent(norm=nn.LayerNorm)
    result = trace(lambda: agent.update("TETTE"), agent.networks)
    assert (result.plan, result.calls) == ("", ())
    assert result.reason == "no layer in these networks normalizes with a batch's statistics"


def test_an_update_that_calls_nothing_says_so():
    result = trace(lambda: None, Agent().networks)
    assert result.reason == "the update called none of the networks"
    assert str(result) == "no plan: the update called none of the networks"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: trace(lambda: None), "name the networks"),
        (lambda a: trace(a.actor, {}), "name the networks"),
        (lambda a: trace("train", a.networks), "a function without arguments"),
        (lambda a: trace(print, {"actor": 3}), "must be a torch.nn.Module, got int"),
        (lambda a: trace(print, a.networks, targets={"actor_targt": "actor"}), "actor_targt"),
        (lambda a: trace(Subject.from_module(a.actor, a.obs)), "update=function"),
        (lambda a: trace(Subject.from_module(a.actor, a.obs), a.networks), "its own networks"),
    ],
)
def test_mistakes_are_met_with_one_line(call, words):
    with pytest.raises(BatchproofError, match=words) as error:
        call(Agent())
    assert "\n" not in str(error.value)
