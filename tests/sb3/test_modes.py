"""Plans inside Stable-Baselines3, held against updates written out here in plain torch."""

import copy
import pickle

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.td3.policies import TD3Policy
from torch import nn

from batchproof.envs.constant_reward import ConstantRewardEnv
from batchproof.errors import BatchproofError
from batchproof.sb3.modes import clear_modes, get_modes, remembered_modes, set_modes
from batchproof.sb3.policies import NormSACPolicy, NormTD3Policy

OBS, ACTION, BATCH = 3, 2, 32


class Spaces(gymnasium.Env):
    """Nothing but spaces: the transitions below are drawn at random."""

    observation_space = spaces.Box(-1, 1, (OBS,), np.float32)
    action_space = spaces.Box(-2, 2, (ACTION,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(OBS, np.float32), {}

    def step(self, action):
        return np.full(OBS, float(action[0]), np.float32), float(action[0]), False, False, {}


class DictSpaces(Spaces):
    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(-1, 1, (1,))})


class TorchNormPolicy(TD3Policy):
    """torch's own batch norm in actor and critics."""

    def make_actor(self, features_extractor=None):
        actor = super().make_actor(features_extractor)
        layers = create_mlp(OBS, ACTION, [8, 8], squash_output=True, **self.norms())
        actor.mu = nn.Sequential(*layers)
        return actor

    def make_critic(self, features_extractor=None):
        critic = super().make_critic(features_extractor)
        for i in range(critic.n_critics):
            layers = create_mlp(OBS + ACTION, 1, [8, 8], **self.norms())
            critic.q_networks[i] = nn.Sequential(*layers)
            setattr(critic, f"qf{i}", critic.q_networks[i])
        return critic

    @staticmethod
    def norms():
        return {"post_linear_modules": [nn.BatchNorm1d]}


def filled(model, rows=100, seed=0):
    """The model with random transitions in its buffer and a logger."""
    rng = np.random.default_rng(seed)
    box = isinstance(model.observation_space, spaces.Box)
    for _ in range(rows):
        flat = rng.uniform(-1, 1, (2, OBS)).astype(np.float32)
        obs, next_obs = flat if box else [{"a": f[None, :2], "b": f[None, 2:]} for f in flat]
        action = rng.uniform(-1, 1, (1, ACTION)).astype(np.float32)
        reward, done = rng.normal(size=1).astype(np.float32), rng.random(1) < 0.1
        model.replay_buffer.add(obs, next_obs, action, reward, done, [{}])
    model.set_logger(Logger(None, []))
    return model


def make(kind=TD3, policy=NormTD3Policy, env=Spaces, norms=None, **kwargs):
    norms = {"norm": "batch"} if norms is None else norms
    policy_kwargs = {"net_arch": [8, 8], **norms}
    torch.set_num_threads(1)
    return filled(
        kind(
            policy,
            env(),
            policy_kwargs=policy_kwargs,
            buffer_size=1000,
            seed=0,
            device="cpu",
            **kwargs,
        )
    )


# A bias before batch norm has no gradient but rounding, which Adam would blow up to a full step.
SGD = {"optimizer_class": torch.optim.SGD}


def torch_model():
    return make(policy=TorchNormPolicy, norms=SGD, policy_delay=1, learning_rate=0.1)


def train(model, steps=2):
    np.random.seed(1)
    torch.manual_seed(1)
    model.train(gradient_steps=steps, batch_size=BATCH)
    return state(model)


def state(model):
    return {key: value.clone() for key, value in model.policy.state_dict().items()}


def assert_same(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=atol, msg=key)


# ------------------------------------------------------------------------- the reference update


def run(net, x, mode):
    """An MLP whose norms do what the letter says, formula by formula."""
    for layer in net:
        if not hasattr(layer, "running_mean"):
            x = layer(x)
            continue
        if mode == "B":
            continue
        if mode == "E":
            mean, var = layer.running_mean.clone(), layer.running_var.clone()
        else:
            mean, var = x.mean(0), x.var(0, correction=0)
        if mode in "TS":
            with torch.no_grad():
                layer.running_mean += layer.momentum * (mean - layer.running_mean)
                layer.running_var += layer.momentum * (x.var(0) - layer.running_var)
        if mode in "Ss":
            mean, var = mean.detach(), var.detach()
        x = (x - mean) / (var + layer.eps).sqrt() * layer.weight + layer.bias
    return x


def critics(nets, obs, actions, mode):
    x = torch.cat([obs, actions], 1)
    return [run(net, x, mode) for net in nets]


def two_passes(policy, batch, next_actions, plan):
    """Slots 5 and 4: target values and current ones."""
    s, a, s_next = batch.observations, batch.actions, batch.next_observations
    online, targets = policy.critic.q_networks, policy.critic_target.q_networks
    if plan[3] not in "Jj":
        with torch.no_grad():
            next_q = critics(targets, s_next, next_actions, plan[4])
        return next_q, critics(online, s, a, plan[3])
    letter = "T" if plan[3] == "J" else "t"
    obs, actions = torch.cat([s, s_next]), torch.cat([a, next_actions])
    with torch.no_grad():
        next_q = [q[BATCH:] for q in critics(targets, obs, actions, letter)]
    return next_q, [q[:BATCH] for q in critics(online, obs, actions, letter)]


def policy_values(nets, batch, actions, letter):
    """Slot 3."""
    s = batch.observations
    if letter not in "Mm":
        return critics(nets, s, actions, letter)
    mixed = torch.cat([s, s]), torch.cat([actions, batch.actions])
    return [q[:BATCH] for q in critics(nets, *mixed, "T" if letter == "M" else "t")]


def follow(target, online, tau):
    with torch.no_grad():
        for t, o in zip(target.parameters(), online.parameters(), strict=True):
            t.mul_(1 - tau).add_(tau * o)
        for (name, t), (_, o) in zip(target.named_buffers(), online.named_buffers(), strict=True):
            if "running_" in name:
                t.copy_(o)


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def reference_td3(model, plan, steps=2):
    policy = copy.deepcopy(model.policy)
    np.random.seed(1)
    torch.manual_seed(1)
    for _ in range(steps):
        batch = model.replay_buffer.sample(BATCH)
        noise = batch.actions.clone().normal_(0, 0.2).clamp(-0.5, 0.5)
        with torch.no_grad():
            next_actions = run(policy.actor_target.mu, batch.next_observations, plan[1]) + noise
        next_q, q = two_passes(policy, batch, next_actions.clamp(-1, 1), plan)
        not_done = 1 - batch.dones
        target = batch.rewards + not_done * 0.99 * torch.cat(next_q, 1).min(1, keepdim=True).values
        step(policy.critic.optimizer, sum(((x - target) ** 2).mean() for x in q))
        actions = run(policy.actor.mu, batch.observations, plan[0])
        # The library asks the first critic alone, so only its statistics may move here.
        (q_pi,) = policy_values(policy.critic.q_networks[:1], batch, actions, plan[2])
        step(policy.actor.optimizer, -q_pi.mean())
        follow(policy.critic_target, policy.critic, 0.005)
        follow(policy.actor_target, policy.actor, 0.005)
    return policy.state_dict()


def without_counters(tensors):
    """num_batches_tracked is torch's own count, which no output depends on."""
    return {key: value for key, value in tensors.items() if value.is_floating_point()}


PLANS = ["TEETE", "TETTE", "TTETT", "TESTE", "tEtsE", "TEEJJ", "TEMTE", "TEMJJ", "SEmjj", "BBEBE"]


@pytest.mark.parametrize("plan", PLANS)
def test_td3_runs_the_plan(plan):
    model = torch_model()
    expected = reference_td3(model, plan)
    set_modes(model, plan)
    found = train(model)
    assert_same(without_counters(found), without_counters(expected), atol=1e-6)


def test_the_reference_tells_plans_apart():
    results = [reference_td3(torch_model(), plan) for plan in PLANS]
    flat = [torch.cat([v.flatten() for v in without_counters(r).values()]) for r in results]
    gaps = torch.cdist(torch.stack(flat), torch.stack(flat)) + torch.eye(len(PLANS))
    assert float(gaps.min()) > 1e-4


def reference_sac(model, plan, steps=2):
    """With norms in the critics alone, so that the actor's passes are the library's own."""
    policy = copy.deepcopy(model.policy)
    alpha = 0.1
    np.random.seed(1)
    torch.manual_seed(1)
    for _ in range(steps):
        batch = model.replay_buffer.sample(BATCH)
        actions, log_prob = policy.actor.action_log_prob(batch.observations)
        with torch.no_grad():
            next_actions, next_log_prob = policy.actor.action_log_prob(batch.next_observations)
        next_q, q = two_passes(policy, batch, next_actions, plan)
        value = torch.cat(next_q, 1).min(1).values - alpha * next_log_prob
        target = batch.rewards + (1 - batch.dones) * 0.99 * value[:, None]
        step(policy.critic.optimizer, 0.5 * sum(((x - target) ** 2).mean() for x in q))
        q_pi = policy_values(policy.critic.q_networks, batch, actions, plan[2])
        least = torch.cat(q_pi, 1).min(1, keepdim=True).values
        step(policy.actor.optimizer, (alpha * log_prob[:, None] - least).mean())
        follow(policy.critic_target, policy.critic, 0.005)
    return policy.state_dict()


@pytest.mark.parametrize("plan", ["TTETE", "TTMTE", "TTEJJ", "TTSTT"])
def test_sac_runs_the_plan(plan):
    norms = {"critic_norm": "batch", **SGD}
    model = make(SAC, NormSACPolicy, norms=norms, ent_coef=0.1, learning_rate=0.1)
    expected = reference_sac(model, plan)
    set_modes(model, plan)
    assert_same(without_counters(train(model)), without_counters(expected), atol=1e-6)


# ------------------------------------------------------------------------ the library untouched


@pytest.mark.parametrize(
    ("kind", "policy", "plan"),
    [
        (TD3, NormTD3Policy, "sb3-td3"),
        (TD3, TorchNormPolicy, "sb3-td3"),
        (DDPG, NormTD3Policy, "TETTE"),
        (SAC, NormSACPolicy, "sb3-sac"),
    ],
)
def test_the_librarys_own_plan_changes_nothing(kind, policy, plan):
    norms = SGD if policy is TorchNormPolicy else {"norm": "batch"}
    expected = make(kind, policy, norms=norms).learn(180)
    found = make(kind, policy, norms=norms)
    set_modes(found, plan)
    found.learn(180)
    # torch's own layers round their running statistics in another order.
    assert_same(state(found), state(expected), atol=1e-6 if policy is TorchNormPolicy else 0)


@pytest.mark.parametrize("plan", ["TEMJJ", "TTEETE"])
def test_cleared_is_bit_for_bit_the_library(plan):
    expected = train(make())
    model = make()
    before = {id(n): dict(vars(n)) for n in model.policy.modules()}
    set_modes(model, plan)
    assert get_modes(model) == plan
    clear_modes(model)
    assert get_modes(model) is None
    assert remembered_modes(model) is None
    assert {id(n): dict(vars(n)) for n in model.policy.modules()} == before
    assert_same(train(model), expected)


def test_a_new_plan_replaces_the_former():
    expected = make()
    set_modes(expected, "TEETE")
    model = make()
    set_modes(model, "TEMJJ")
    set_modes(model, "TEETE")
    assert get_modes(model) == "TEETE"
    assert "sample" not in vars(model.replay_buffer)
    assert_same(train(model), train(expected))


def test_acting_is_slot_0():
    model = make()
    train(model)
    obs = np.random.default_rng(0).uniform(-1, 1, (16, OBS)).astype(np.float32)
    alone = model.predict(obs[:1])[0]
    before = state(model)
    set_modes(model, "TEETE")
    assert np.abs(model.predict(obs, deterministic=True)[0][:1] - alone).max() < 1e-6
    set_modes(model, "tTEETE")
    assert np.abs(model.predict(obs, deterministic=True)[0][:1] - alone).max() > 1e-3
    assert_same(state(model), before)
    set_modes(model, "TTEETE")
    model.predict(obs, deterministic=True)
    moved = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    assert moved
    assert all(key.startswith("actor.") for key in moved)


def test_networks_in_eval_mode_are_left_alone():
    model = make()
    obs, actions = torch.rand(6, OBS), torch.rand(6, ACTION, requires_grad=True)
    model.policy.set_training_mode(False)
    expected = model.critic(obs, actions)
    set_modes(model, "TTTTT")
    found = model.critic(obs, actions)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("plan", ["TEETE", "TEMJJ"])
def test_tqc_and_dict_observations(plan):
    from sb3_contrib.tqc.policies import TQCPolicy

    class Policy(TQCPolicy):
        def make_critic(self, features_extractor=None):
            critic = super().make_critic(features_extractor)
            for i in range(critic.n_critics):
                layers = create_mlp(OBS + ACTION, 25, [8], post_linear_modules=[nn.BatchNorm1d])
                critic.q_networks[i] = nn.Sequential(*layers)
                setattr(critic, f"qf{i}", critic.q_networks[i])
            return critic

    tqc = make(TQC, Policy, norms={})
    set_modes(tqc, plan)
    assert all(bool(value.isfinite().all()) for value in train(tqc).values())

    from stable_baselines3.common.torch_layers import CombinedExtractor

    norms = {"norm": "batch", "features_extractor_class": CombinedExtractor}
    keyed = make(env=DictSpaces, norms=norms)
    plain = make()
    for model in (keyed, plain):
        set_modes(model, plan)
    # The same transitions, cut in two keys: the same update.
    keyed.policy.load_state_dict(plain.policy.state_dict())
    assert_same(train(keyed), train(plain), atol=1e-6)


# ---------------------------------------------------------------------------- save, load, copies


def test_save_and_load(tmp_path):
    model = make()
    keys = list(model.policy.state_dict())
    set_modes(model, "TEMJJ")
    train(model)
    assert list(model.policy.state_dict()) == keys
    assert set(model.get_parameters()) == {"policy", "actor.optimizer", "critic.optimizer"}
    model.save(tmp_path / "model.zip")
    loaded = TD3.load(tmp_path / "model.zip", env=Spaces(), device="cpu")
    assert_same(state(loaded), state(model))
    assert remembered_modes(loaded) == "TEMJJ"
    assert get_modes(loaded) is None
    set_modes(loaded)
    assert get_modes(loaded) == "TEMJJ"
    loaded.replay_buffer = copy.deepcopy(model.replay_buffer)
    set_modes(loaded)
    loaded.set_logger(Logger(None, []))
    assert_same(train(loaded), train(model))


def test_replay_buffer_saves_as_the_librarys_own(tmp_path):
    model = make(policy_delay=1)
    set_modes(model, "TEEJJ")
    train(model)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    raw = (tmp_path / "buffer.pkl").read_bytes()
    assert b"batchproof" not in raw
    expected = train(copy.deepcopy(model))
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    with pytest.raises(BatchproofError, match="call set_modes"):
        train(model)
    set_modes(model)
    assert_same(train(model), expected)


def test_copies_train_apart():
    model = make()
    set_modes(model, "TEMJJ")
    before = state(model)
    twin = copy.deepcopy(model)
    after = train(twin)
    assert_same(state(model), before)
    assert any(not torch.equal(after[key], before[key]) for key in before)
    assert_same(train(model), after)
    policy = pickle.loads(pickle.dumps(model.policy))
    assert policy.actor.forward.network is policy.actor
    assert_same(policy.state_dict(), after)
    buffer = copy.deepcopy(model.replay_buffer)
    assert len(buffer.sample(4).rewards) == 4


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", [PPO, DQN, CrossQ])
def test_algorithms_without_the_five_slots(kind):
    env = "CartPole-v1" if kind is DQN else Spaces()
    model = kind("MlpPolicy", env, device="cpu")
    with pytest.raises(BatchproofError, match="SAC, TD3, DDPG and TQC") as caught:
        set_modes(model, "TEETE")
    assert "\n" not in str(caught.value)
    assert kind.__name__ in str(caught.value)


def test_mistakes_raise_one_line():
    with pytest.raises(BatchproofError, match="not for a Linear"):
        set_modes(nn.Linear(1, 1), "TEETE")
    with pytest.raises(BatchproofError, match="changes nothing"):
        set_modes(make(norms={"norm": "layer"}), "TEETE")
    model = make()
    with pytest.raises(BatchproofError, match="not saved under a mode plan"):
        set_modes(model)
    with pytest.raises(BatchproofError, match="impossible mode plan"):
        set_modes(model, "TEEJE")
    assert get_modes(model) is None
    set_modes(model, "TEEJJ")
    model.policy.set_training_mode(True)
    with pytest.raises(BatchproofError, match="eval mode"):
        model.critic(torch.rand(4, OBS), torch.rand(4, ACTION))


# --------------------------------------------------------------------------------- the cure


@pytest.mark.full
def test_one_line_cures_constant_reward():
    returns = {}
    for plan in ("TETTE", "TEETE"):
        torch.set_num_threads(1)
        model = TD3(
            NormTD3Policy,
            ConstantRewardEnv(),
            policy_kwargs={"net_arch": [64, 64], "critic_norm": "batch"},
            learning_rate=1e-3,
            seed=0,
            device="cpu",
        )
        if plan == "TEETE":
            set_modes(model, plan)
        model.learn(1200)
        action, _ = model.predict(np.zeros(3, np.float32), deterministic=True)
        returns[plan] = 30 * float(action[0])
    assert returns["TETTE"] < 10
    assert returns["TEETE"] > 29
