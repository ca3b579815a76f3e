"""Planted defects of BP3xx (slots and targets) and BP4xx (health of statistics).

Plain modules learn by a small TD3 update that is written out here, with one thing wrong.
"""

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from batchproof.clinic import Subject, Transitions

OBS, ACTION, WIDTH, ROWS = 4, 2, 16, 256


class OwnNorm(nn.Module):
    """Batch norm under names that nobody would guess."""

    def __init__(self, features, rho=0.1):
        super().__init__()
        self.rho = rho
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("width", torch.ones(features))

    def forward(self, x):
        centre, width = self.centre, self.width
        if self.training:
            centre, width = x.mean(0), x.var(0, correction=0)
            self.centre += self.rho * (centre.detach() - self.centre)
            self.width += self.rho * (width.detach() - self.width)
        return (x - centre) / (width + 1e-5).sqrt()


class Actor(nn.Module):
    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(OBS, WIDTH), norm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, ACTION), nn.Tanh()
        )

    def forward(self, obs):
        return self.net(obs)


class Critic(nn.Module):
    def __init__(self, norm=nn.BatchNorm1d, second=None):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(OBS + ACTION, WIDTH),
            norm(WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            (second or norm)(WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 1),
        )

    def forward(self, obs, action):
        return self.net(torch.cat([obs, action], 1))


class BeforeAction(nn.Module):
    """DDPG's placement: the observation is normalized, then the action enters."""

    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.norm = norm(OBS)
        self.net = nn.Sequential(nn.Linear(OBS + ACTION, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def forward(self, obs, action):
        return self.net(torch.cat([self.norm(obs), action], 1))


def batch(rows=ROWS, seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    obs = scale * torch.randn(rows, OBS, generator=draw)
    action = 2 * torch.rand(rows, ACTION, generator=draw) - 1
    reward = action.sum(1) + obs[:, 0] / scale
    following = scale * torch.randn(rows, OBS, generator=draw)
    return Transitions(obs, action, reward, following, torch.zeros(rows))


class Learner:
    """TD3 without noise, delay or a second critic; every option is a way to do it wrong.

    Args:
        actor: its norm.
        critic: a critic.
        targets: whether there are target networks.
        sync: which buffers the targets receive: ``all``, ``none`` or ``running_`` by name.
        policy_q: mode of the critic in the actor's loss, ``T`` or ``E``.
        target_training: whether the target critic is left in train mode.
        joint: (s, a) and (s', a') in one forward.
        rows: rows of a batch.
    """

    def __init__(
        self,
        *,
        actor=nn.BatchNorm1d,
        critic=None,
        targets=True,
        sync="all",
        policy_q="E",
        target_training=False,
        joint=False,
        rows=64,
        seed=0,
    ):
        torch.manual_seed(seed)
        self.networks = {"actor": Actor(actor), "critic": critic or Critic()}
        self.targets = {}
        if targets:
            for role in ("actor", "critic"):
                network = self.networks[role]
                self.networks[f"{role}_target"] = (
                    copy.deepcopy(network).requires_grad_(False).eval()
                )
                self.targets[f"{role}_target"] = role
            self.networks["critic_target"].train(target_training)
        self.sync, self.policy_q, self.joint, self.rows = sync, policy_q, joint, rows
        self.data = batch()
        self.step = 0
        self.optimizers = {
            role: torch.optim.Adam(self.networks[role].parameters(), 1e-3)
            for role in ("actor", "critic")
        }

    def update(self):
        actor, critic = self.networks["actor"], self.networks["critic"]
        target_actor = self.networks.get("actor_target", actor)
        target_critic = self.networks.get("critic_target", critic)
        start = self.rows * (self.step % (ROWS // self.rows))
        part = slice(start, start + self.rows)
        self.step += 1
        obs, action, reward, following = (
            value[part]
            for value in (self.data.obs, self.data.action, self.data.reward, self.data.next_obs)
        )
        actor.eval()
        critic.train()
        with torch.no_grad():
            next_action = target_actor(following)
        if self.joint:
            both = critic(torch.cat([obs, following]), torch.cat([action, next_action]))
            q, next_q = both[: len(obs)], both[len(obs) :].detach()
        else:
            with torch.no_grad():
                next_q = target_critic(following, next_action)
            q = critic(obs, action)
        loss = F.mse_loss(q[:, 0], reward + 0.9 * next_q[:, 0])
        self._step("critic", loss)
        actor.train()
        critic.train(self.policy_q == "T")
        self._step("actor", -critic(obs, actor(obs)).mean())
        actor.eval()
        critic.eval()
        with torch.no_grad():
            for target, online in self.targets.items():
                self._follow(self.networks[target], self.networks[online])

    def _step(self, role, loss):
        self.optimizers[role].zero_grad()
        loss.backward()
        self.optimizers[role].step()

    def _follow(self, target, online):
        for t, o in zip(target.parameters(), online.parameters(), strict=True):
            t.lerp_(o, 0.05)
        for (name, t), o in zip(target.named_buffers(), online.buffers(), strict=True):
            if self.sync == "all" or self.sync in name:
                t.copy_(o)

    def subject(self, updates=40, update=True, **more):
        for _ in range(updates):
            self.update()
        given = {
            "name": "planted",
            "transitions": self.data,
            "action_low": -torch.ones(ACTION),
            "action_high": torch.ones(ACTION),
            "gamma": 0.9,
            "update": self.update if update else None,
        }
        return Subject.from_networks(
            self.networks, self.data.obs, targets=self.targets, **(given | more)
        )


def trained_policy(norm, obs=None, passes=100):
    """An actor whose statistics have seen the observations, in eval mode."""
    torch.manual_seed(0)
    actor = Actor(norm)
    obs = batch().obs if obs is None else obs
    with torch.no_grad():
        for parameter in actor.net[1].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(passes):
            actor(obs)
    return actor.eval()


def policy_subject(actor, obs=None):
    return Subject.from_module(
        actor,
        batch().obs if obs is None else obs,
        action_low=-torch.ones(ACTION),
        action_high=torch.ones(ACTION),
    )


class Bypass(Actor):
    """The course notebook's actor: the norm is left out for a single observation."""

    def forward(self, obs):
        if obs.ndim == 1:
            return torch.tanh(self.net[3](torch.relu(self.net[0](obs))))
        return self.net(obs)


def notebook_actor():
    """Acting goes around the norm, the target actor runs in train mode; equal weights."""
    torch.manual_seed(0)
    actor, target = Bypass().eval(), Bypass().train()
    target.load_state_dict(actor.state_dict())
    obs = batch().obs
    with torch.no_grad():
        for parameter in (*actor.parameters(), *target.parameters()):
            parameter.mul_(2)
    return Subject.from_networks(
        {"actor": actor, "actor_target": target},
        obs,
        targets={"actor_target": "actor"},
        act=lambda rows: torch.stack([actor(row) for row in rows]).detach(),
        action_low=-torch.ones(ACTION),
        action_high=torch.ones(ACTION),
    )


def never_updated():
    actor = trained_policy(nn.BatchNorm1d)
    actor.net[1].reset_running_stats()
    return policy_subject(actor)


def other_scale():
    return policy_subject(trained_policy(nn.BatchNorm1d), 200 * batch().obs + 100)


def with_outliers():
    obs = batch().obs.clone()
    obs[:4] *= 1000
    return policy_subject(trained_policy(nn.BatchNorm1d, obs), obs)


def nan_variance():
    actor = trained_policy(nn.BatchNorm1d)
    actor.net[1].running_var[3] = torch.nan
    return policy_subject(actor)


def negative_variance():
    actor = trained_policy(OwnNorm)
    actor.net[1].width[2] = -0.5
    return policy_subject(actor)


def constant_feature():
    actor = trained_policy(nn.BatchNorm1d)
    with torch.no_grad():
        actor.net[0].weight[5] = 0
        actor.train()
        for _ in range(200):
            actor(batch().obs)
    return policy_subject(actor.eval())


def with_momentum(momentum):
    return policy_subject(trained_policy(lambda n: nn.BatchNorm1d(n, momentum=momentum)))


def never_moving():
    return policy_subject(trained_policy(lambda n: nn.BatchNorm1d(n, momentum=0.0)))


def one_row_batches():
    torch.manual_seed(0)
    actor = Actor(OwnNorm)
    with torch.no_grad():
        for row in batch().obs:
            actor(row[None])
    return policy_subject(actor.eval())


def dead_after_norm():
    actor = trained_policy(nn.BatchNorm1d)
    with torch.no_grad():
        actor.net[1].bias.fill_(-20)
    return policy_subject(actor)


def sb3_constant_reward(critic="library", algo="td3", steps=150):
    """Stable-Baselines3 on the constant-reward environment, with batch norm in the critics."""
    from stable_baselines3 import SAC, TD3

    from batchproof.sb3.adapter import subject_from_model

    bench = _benchmark("sb3_constant_reward")
    classes = {"td3": TD3, "sac": SAC}
    _, base = bench.ALGOS[algo]
    model = classes[algo](
        bench.policy_with(base, bench.CRITICS[critic]),
        bench.ConstantReward("terminated"),
        learning_starts=50,
        batch_size=64,
        policy_kwargs={"net_arch": [16, 16]},
        seed=0,
        device="cpu",
    )
    model.learn(steps)
    return subject_from_model(model)


def sb3_renorm_by_another_name():
    """A critic with both batch norm and sb3-contrib's batch renorm, whose names SB3 misses."""
    from sb3_contrib.common.torch_layers import BatchRenorm1d
    from stable_baselines3 import TD3
    from stable_baselines3.common.torch_layers import create_mlp

    from batchproof.sb3.adapter import subject_from_model

    bench = _benchmark("sb3_constant_reward")

    class MixedCritic(bench.BatchNormCritic):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for i in range(self.n_critics):
                layers = create_mlp(OBS_OF_ENV, 1, [16, 16], post_linear_modules=[nn.BatchNorm1d])
                layers[4] = BatchRenorm1d(16)
                self.q_networks[i] = nn.Sequential(*layers)
                setattr(self, f"qf{i}", self.q_networks[i])

    _, base = bench.ALGOS["td3"]
    model = TD3(
        bench.policy_with(base, MixedCritic),
        bench.ConstantReward("terminated"),
        learning_starts=50,
        batch_size=64,
        policy_kwargs={"net_arch": [16, 16]},
        seed=0,
        device="cpu",
    )
    model.learn(100)
    return subject_from_model(model)


OBS_OF_ENV = 3 + 1  # the constant-reward environment's observation and action


def _benchmark(name):
    path = Path(__file__).resolve().parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def far_target():
    """The target's statistics are those of another task."""
    learner = Learner(sync="none")
    for _ in range(40):
        learner.update()
    learner.networks["critic_target"].net[4].running_mean += 30
    return learner.subject(updates=0, update=False)


def next_states_elsewhere(shift=4.0, **options):
    """The critic depends on the state, and next states are 4 standard deviations away."""
    learner = Learner(**options)
    data = learner.data
    learner.data = replace(data, reward=3 * data.obs[:, 0], next_obs=data.next_obs + shift)
    return learner.subject(updates=60)


PLANTED = {
    "target statistics never synced, seen in an update": (
        lambda: Learner(sync="none").subject(),
        "BP301",
        "critic_target.net.1",
    ),
    "target statistics never synced, as they stand": (
        lambda: Learner(sync="none").subject(update=False),
        "BP301",
        "critic_target.net.1",
    ),
    "targets synced by the name running_": (
        lambda: Learner(critic=Critic(second=OwnNorm), sync="running_").subject(),
        "BP302",
        "critic_target.net.4",
    ),
    "SB3 TD3 with batch renorm that its sync misses": (
        sb3_renorm_by_another_name,
        "BP302",
        "critic_target.qf0.4",
    ),
    "target critic left in train mode": (
        lambda: Learner(target_training=True).subject(),
        "BP303",
        "critic_target.net.1",
    ),
    "actor's loss through a critic in train mode": (
        lambda: Learner(policy_q="T").subject(),
        "BP304",
        "critic.net.1",
    ),
    "the same with a layer of unknown name": (
        lambda: Learner(critic=Critic(OwnNorm), policy_q="T").subject(),
        "BP304",
        "critic.net.1",
    ),
    "SB3 TD3 with batch norm on a constant reward": (sb3_constant_reward, "BP304", "critic.qf0.1"),
    "SB3 SAC with batch norm on a constant reward": (
        lambda: sb3_constant_reward(algo="sac"),
        "BP304",
        "critic.qf0.1",
    ),
    "target statistics of another task": (far_target, "BP305", "critic_target.net"),
    "next states that are elsewhere": (next_states_elsewhere, "BP306", "critic.net."),
    "no target network and no joint forward": (
        lambda: Learner(targets=False).subject(),
        "BP307",
        "critic.net.1",
    ),
    "the notebook's bypass": (notebook_actor, "BP308", "actor.net.1"),
    "statistics never updated": (never_updated, "BP401", "policy.net.1"),
    "observations on another scale": (other_scale, "BP402", "policy.net.1"),
    "four outliers": (with_outliers, "BP403", "policy.net.1"),
    "NaN in a running variance": (nan_variance, "BP404", "policy.net.1"),
    "negative running variance": (negative_variance, "BP404", "policy.net.1"),
    "constant feature": (constant_feature, "BP405", "policy.net.1"),
    "momentum 1": (lambda: with_momentum(1.0), "BP406", "policy.net.1"),
    "cumulative average": (lambda: with_momentum(None), "BP406", "policy.net.1"),
    "momentum 0": (never_moving, "BP406", "policy.net.1"),
    "batches of one row": (one_row_batches, "BP407", "policy.net.1"),
    "dead after the norm": (dead_after_norm, "BP408", "policy.net.1"),
}
