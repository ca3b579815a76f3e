"""A subject says what the library's own model says, and leaves the model as it was."""

import copy
import importlib.util
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import TQC, CrossQ, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

import batchproof.sb3
from batchproof.clinic.rules import NOT_FINITE, Status, audit
from batchproof.clinic.subject import fingerprint, take, training_mode, unchanged
from batchproof.errors import BatchproofError
from batchproof.sb3.adapter import _Explorer, subject_from_model
from batchproof.sb3.policies import NormTD3Policy

_path = Path(__file__).with_name("healthy.py")
_spec = importlib.util.spec_from_file_location("healthy", _path)
healthy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(healthy)
Reach = healthy.Reach

torch.set_num_threads(1)
OFF = {"buffer_size": 200, "learning_starts": 30, "batch_size": 16}
SMALL = {"net_arch": [8]}
OBS = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)


def make(algorithm, env="Pendulum-v1", policy="MlpPolicy", steps=0, **more):
    if algorithm not in (PPO, A2C):
        more = OFF | more
    more.setdefault("policy_kwargs", dict(SMALL))
    model = algorithm(policy, env, seed=0, device="cpu", **more)
    return model.learn(steps) if steps else model


def state_of(model):
    """All that building a subject could have moved."""
    return (
        {k: v.clone() for k, v in model.policy.state_dict().items()},
        [m.training for m in model.policy.modules()],
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
        set(vars(model)),
    )


def same(a, b):
    return (
        all(torch.equal(a[0][k], b[0][k]) for k in a[0])
        and a[1] == b[1]
        and torch.equal(a[2], b[2])
        and np.array_equal(a[3], b[3])
        and a[4] == b[4]
    )


@pytest.mark.parametrize("algorithm", [TD3, SAC, TQC, CrossQ])
def test_actor_critics(algorithm):
    env = Reach("vector")
    model = make(algorithm, env, steps=80)
    model.policy.train()
    before = state_of(model)
    subject = subject_from_model(model)
    assert same(state_of(model), before)
    model.policy.eval()
    assert len(subject.obs) == 80
    obs, data = subject.obs, subject.transitions
    action = subject.policy(obs)
    assert action.requires_grad
    # Bounds that are not symmetric: the way from [-1, 1] to environment units is seen.
    predicted, _ = model.predict(obs.numpy(), deterministic=True)
    np.testing.assert_allclose(action.detach().numpy(), predicted, atol=1e-6)
    np.testing.assert_array_equal(subject.act(obs).numpy(), predicted)
    np.testing.assert_array_equal(subject.action_low.numpy(), env.action_space.low)
    np.testing.assert_array_equal(subject.action_high.numpy(), env.action_space.high)
    scaled = subject.critic_actor(obs).detach()
    np.testing.assert_allclose(model.policy.unscale_action(scaled.numpy()), predicted, atol=1e-6)
    q = subject.critic(data.obs, data.action)
    assert q.shape == (2, len(data)) == (2, 80)
    raw = model.critic(data.obs, data.action)
    expected = raw.mean(2).T if algorithm is TQC else torch.cat(raw, 1).T
    assert torch.equal(q, expected)
    assert (subject.target_critic is None) == (algorithm is CrossQ)
    assert (subject.target_actor is not None) == (algorithm is TD3)
    assert subject.targets == {r: r[:-7] for r in subject.networks if r.endswith("_target")}
    assert data.action.abs().max() <= 1
    # Truncated episodes do not count as ended: the goal alone ends one.
    assert data.terminated.sum() <= model.replay_buffer.dones.sum()


def test_replayed_transitions_belong_together():
    """Each next observation is the one that its own action leads to."""
    model = make(SAC, Reach("vector"), steps=100)
    data = subject_from_model(model).transitions
    move = torch.as_tensor(model.policy.unscale_action(data.action.numpy()))
    moved = (data.obs[:, :2] + 0.2 * move).clamp(-1, 1)
    torch.testing.assert_close(data.next_obs[:, :2], moved, atol=1e-5, rtol=0)


def test_collected_transitions_belong_together():
    model = make(TD3, Reach("vector"))
    subject = subject_from_model(model, env=Reach("vector", length=7), count=40)
    data = subject.transitions
    assert subject.obs.shape == (40, 4)
    assert len(data) == 40
    move = torch.as_tensor(model.policy.unscale_action(data.action.numpy()))
    moved = (data.obs[:, :2] + 0.2 * move).clamp(-1, 1)
    torch.testing.assert_close(data.next_obs[:, :2], moved, atol=1e-5, rtol=0)
    distance = (data.next_obs[:, :2] - data.next_obs[:, 2:]).norm(dim=1)
    torch.testing.assert_close(data.reward, -distance, atol=1e-5, rtol=0)
    assert torch.equal(data.terminated, (distance < 0.1).float())
    # It explored: actions are not the actor's own.
    assert (data.action - subject.critic_actor(data.obs)).abs().max() > 0.05


def test_dqn():
    model = make(DQN, "CartPole-v1", steps=100)
    subject = subject_from_model(model)
    assert list(subject.networks) == ["q_net", "q_net_target"]
    assert subject.targets == {"q_net_target": "q_net"}
    assert subject.discrete
    values = subject.policy(subject.obs)
    assert torch.equal(values.argmax(1, keepdim=True), subject.act(subject.obs))
    data = subject.transitions
    assert data.action.dtype == torch.int64
    rows = torch.arange(len(data))
    assert torch.equal(
        subject.critic(data.obs, data.action)[0], model.q_net(data.obs)[rows, data.action]
    )
    assert subject.action_low is None


@pytest.mark.parametrize("actions", ["box", "discrete", "multi", "binary"])
def test_ppo(actions):
    model = make(PPO, Reach("dict", actions), "MultiInputPolicy", n_steps=32, batch_size=16)
    model.learn(32)
    subject = subject_from_model(model)
    assert list(subject.networks) == ["policy"]
    assert subject.transitions is None
    output, action = subject.policy(subject.obs), subject.act(subject.obs)
    if actions == "box":
        torch.testing.assert_close(output.detach(), action)
    elif actions == "discrete":
        assert torch.equal(output.argmax(1, keepdim=True), action)
    elif actions == "multi":
        assert torch.equal(torch.stack([o.argmax(1) for o in output.split(3, 1)], 1), action)
    else:
        assert torch.equal((output > 0).long(), action)


def test_ppo_actions_are_clipped_as_predict_clips_them():
    model = make(PPO, n_steps=8, batch_size=8)
    nn.init.constant_(model.policy.action_net.bias, 5.0)
    subject = subject_from_model(model, OBS)
    assert subject.act(subject.obs).unique().item() == 2.0
    assert subject.policy(subject.obs).unique().item() == 2.0


@pytest.mark.parametrize("seen", ["image", "mixed"])
def test_images_keep_their_bytes_and_come_channel_first(seen):
    policy, kwargs = {
        "image": ("CnnPolicy", healthy._cnn),
        "mixed": ("MultiInputPolicy", {"features_extractor_kwargs": {"cnn_output_dim": 8}}),
    }[seen]
    env = Reach(seen, "discrete")
    model = make(A2C, env, policy, n_steps=4, policy_kwargs=copy.deepcopy({**SMALL, **kwargs}))
    given = [env.reset(seed=i)[0] for i in range(4)]
    frames = np.stack(given if seen == "image" else [g["frame"] for g in given])
    points = None if seen == "image" else np.stack([g["point"] for g in given])

    def obs(frames):
        return frames if points is None else {"frame": frames, "point": points}

    last = subject_from_model(model, obs(frames))
    first = subject_from_model(model, obs(frames.transpose(0, 3, 1, 2)))
    frame = first.obs if seen == "image" else first.obs["frame"]
    assert frame.dtype == torch.uint8
    assert frame.shape == (4, 1, 36, 36)
    assert torch.equal(first.policy(first.obs), last.policy(last.obs))
    with pytest.raises(BatchproofError, match="fractions"):
        subject_from_model(model, obs(frames / 255.0))
    collected = subject_from_model(model, env=Reach(seen, "discrete"), count=5)
    assert len(collected.act(collected.obs)) == 5


@pytest.mark.parametrize("algorithm", [SAC, PPO])
def test_vecnormalize_is_respected_and_left_alone(algorithm):
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    more = {"n_steps": 64, "batch_size": 32} if algorithm is PPO else {}
    model = make(algorithm, env, steps=64, **more)
    mean, count = env.obs_rms.mean.copy(), env.obs_rms.count
    subject = subject_from_model(model)
    assert subject.normalizers == {"train": env}
    # Normalized: about one standard deviation wide, where raw angular speeds are wider.
    assert subject.obs.std(0).max() < 2
    if algorithm is SAC:
        raw = model.replay_buffer.observations[: model.replay_buffer.size(), 0]
        # All of them, in no order of time.
        rows = (np.unique(part, axis=0) for part in (subject.obs.numpy(), env.normalize_obs(raw)))
        np.testing.assert_allclose(*rows, atol=1e-6)
        assert not np.allclose(subject.obs[0], env.normalize_obs(raw)[0])
    plain = subject_from_model(model, env="Pendulum-v1", count=50)
    assert plain.obs.abs().max() <= env.clip_obs
    evaluation = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    other = subject_from_model(model, env=evaluation, count=50)
    assert other.normalizers["eval"] is evaluation
    assert evaluation.training
    assert np.array_equal(evaluation.obs_rms.mean, np.zeros(3))
    assert np.array_equal(env.obs_rms.mean, mean)
    assert env.obs_rms.count == count


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN, TD3, SAC, TQC, CrossQ])
def test_update_is_the_library_s_own(algorithm, trained, tmp_path):
    env = "CartPole-v1" if algorithm is DQN else "Pendulum-v1"
    more = {"n_steps": 32} if algorithm in (PPO, A2C) else {}
    if algorithm is PPO:
        more["batch_size"] = 16
    model = make(algorithm, env, steps=96 if trained else 0, **more)
    if not trained:
        model.save(tmp_path / "m.zip")
        model = algorithm.load(tmp_path / "m.zip", device="cpu")
        assert model.env is None
    size = 4 if algorithm is DQN else 3
    subject = subject_from_model(model, np.random.default_rng(0).normal(size=(24, size)))
    held = set(vars(model)), getattr(model, "replay_buffer", None), model._n_updates
    weights = {k: v.clone() for k, v in model.policy.state_dict().items()}
    subject.update()
    assert (set(vars(model)), getattr(model, "replay_buffer", None)) == held[:2]
    steps = {TD3: 2, CrossQ: 3}.get(algorithm, 1)
    assert model._n_updates == held[2] + steps
    now = model.policy.state_dict()
    moved = {k.split(".")[0] for k, v in weights.items() if not torch.equal(v, now[k])}
    roles = set(subject.networks) - {"policy"}
    assert roles <= moved if algorithm not in (PPO, A2C) else moved


def test_ppo_ratio_is_one_in_the_first_minibatch():
    """What the update's rollout holds is what the policy says now, batch norm apart."""
    model = make(PPO, steps=64, n_steps=32, batch_size=16)
    subject = subject_from_model(model)
    ratios = []
    evaluate = model.policy.evaluate_actions

    def watched(obs, actions):
        values, log_prob, entropy = evaluate(obs, actions)
        ratios.append(log_prob.detach())
        return values, log_prob, entropy

    seen = []
    get = type(model.rollout_buffer).get

    def got(buffer, size=None):
        for batch in get(buffer, size):
            seen.append(batch.old_log_prob)
            yield batch

    model.policy.evaluate_actions = watched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.rollout_buffer), "get", got)
        subject.update()
    del model.policy.evaluate_actions
    torch.testing.assert_close(ratios[0], seen[0], atol=1e-5, rtol=0)
    assert len(ratios) == 2


def test_update_works_under_a_joint_plan(tmp_path):
    from batchproof.sb3.modes import set_modes
    from batchproof.sb3.policies import NormSACPolicy

    model = make(SAC, policy=NormSACPolicy, policy_kwargs={**SMALL, "norm": "batch"})
    set_modes(model, "TEMJJ")
    subject = subject_from_model(model, OBS)
    subject.update()
    assert "sample" in vars(model.replay_buffer)


def test_the_policy_follows_the_modes_and_act_does_not():
    class Extractor(healthy.LayerNormExtractor):
        def __init__(self, space):
            super().__init__(space)
            self.net = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16))

    model = make(TD3, policy_kwargs={**SMALL, "features_extractor_class": Extractor})
    subject = subject_from_model(model, OBS)
    before = fingerprint(subject)
    with unchanged(subject):
        with training_mode(subject, True):
            train = subject.policy(subject.obs)
            alone = subject.policy(take(subject.obs, slice(0, 16)))
        assert (train[:16] - alone).abs().max() > 1e-3
        with training_mode(subject, True):
            assert not torch.allclose(subject.act(subject.obs), train)
    assert fingerprint(subject) == before


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "holds no observations"),
        ({"obs": OBS[:, :2]}, r"\(N, 3\), got \(32, 2\)"),
        ({"obs": OBS[0]}, "add the batch axis"),
        ({"obs": {"a": OBS}}, "got the keys a"),
        ({"obs": np.array([["a"] * 3] * 4)}, "not numbers"),
        ({"obs": OBS[:1]}, "at least 2"),
        ({"obs": np.full((4, 3), np.nan)}, "NaN"),
        ({"env": "NoSuch-v0"}, "cannot make the environment"),
        ({"env": "CartPole-v1"}, "does not fit"),
        ({"env": "Pendulum-v1", "count": 1}, "at least 2"),
    ],
)
def test_refusals(arguments, match):
    model = make(SAC)
    before = state_of(model)
    with pytest.raises(BatchproofError, match=match) as caught:
        subject_from_model(model, **arguments)
    assert "\n" not in str(caught.value)
    assert same(state_of(model), before)


def test_refused_models():
    with pytest.raises(BatchproofError, match="no Stable-Baselines3 model"):
        subject_from_model(nn.Linear(3, 2), OBS)
    model = RecurrentPPO(
        "MlpLstmPolicy", "Pendulum-v1", n_steps=4, batch_size=4,
        policy_kwargs={"lstm_hidden_size": 4},
    )  # fmt: skip
    with pytest.raises(BatchproofError, match="hidden state"):
        subject_from_model(model, OBS)


def test_discrete_observations_out_of_range():
    model = make(A2C, Reach("discrete", "discrete"), n_steps=4)
    assert isinstance(model.observation_space, spaces.Discrete)
    assert subject_from_model(model, [0, 3, 8]).obs.tolist() == [0, 3, 8]
    with pytest.raises(BatchproofError, match="from 0 to 8"):
        subject_from_model(model, [0, 9])


def test_an_environment_that_fails_is_one_line():
    class Broken(Reach):
        def step(self, action):
            raise RuntimeError("two\nlines")

    with pytest.raises(BatchproofError, match="RuntimeError: two lines"):
        subject_from_model(make(SAC, Reach("vector")), env=Broken("vector"))


def broken(algorithm, env="Pendulum-v1", policy="MlpPolicy", **kwargs):
    """A model with one NaN in the network that acts."""
    model = make(algorithm, env, policy, policy_kwargs={**SMALL, **kwargs})
    if kwargs:
        norm = next(m for m in model.actor.modules() if hasattr(m, "running_var"))
        norm.running_var[0] = np.nan
    else:
        model.policy.state_dict()[next(iter(model.policy.state_dict()))].view(-1)[0] = np.nan
    return model


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        (TD3, ("Pendulum-v1", NormTD3Policy)),
        (TD3, ()),
        (SAC, ()),
        (PPO, ()),
        (DQN, ("CartPole-v1",)),
    ],
)
def test_a_policy_with_nan_is_collected_with_and_fails_its_rule(algorithm, arguments):
    """Whether it gives NaN, or refuses to act, as distributions do."""
    norm = {"norm": "batch"} if NormTD3Policy in arguments else {}
    model = broken(algorithm, *arguments, **norm)
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Gymnasium's checker
        subject = subject_from_model(model, env=arguments[0] if arguments else "Pendulum-v1")
    after = model.policy.state_dict()
    assert all(torch.equal(v, after[k]) or v.isnan().any() for k, v in before[0].items())
    assert torch.isfinite(subject.obs).all()
    assert subject.transitions is None or torch.isfinite(subject.transitions.action).all()
    outcomes = audit(subject).outcomes
    assert outcomes["BP404"].status is Status.FAIL
    assert [c for c, o in outcomes.items() if o.status is Status.FAIL] == ["BP404"]
    assert outcomes["BP101"].reason == NOT_FINITE


@pytest.mark.parametrize(
    ("algorithm", "steps", "env", "collected", "lacks"),
    [
        (SAC, 150, None, False, False),
        (SAC, 150, "Pendulum-v1", True, True),
        (SAC, 0, "Pendulum-v1", True, True),
        (PPO, 0, "Pendulum-v1", True, False),
    ],
)
def test_whether_the_states_are_the_policys_own(algorithm, steps, env, collected, lacks):
    subject = subject_from_model(make(algorithm, steps=steps), env=env)
    assert (subject.collected, subject.lacks_replay) == (collected, lacks)


def test_hindsight_replay_without_a_finished_episode_is_no_replay_yet():
    env = BitFlippingEnv(n_bits=16, continuous=True, max_steps=200)
    model = SAC(
        "MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, learning_starts=1000,
        device="cpu",
    )  # fmt: skip
    model.learn(80)
    assert subject_from_model(model).transitions is None
    assert subject_from_model(model, env=env, count=70).lacks_replay


def test_given_states_are_no_collected_ones_unless_transitions_are():
    obs = np.zeros((4, 3), np.float32)
    assert not subject_from_model(make(SAC), obs).lacks_replay
    assert not subject_from_model(make(SAC, steps=150), obs, env="Pendulum-v1").lacks_replay
    assert subject_from_model(make(SAC), obs, env="Pendulum-v1").lacks_replay


def test_random_actions_stand_in_for_nan_alone():
    model = make(SAC, Reach("vector"))
    model.predict = lambda obs, **_: (np.array([[np.nan, 0.5], [0.25, 0.5]], np.float32), None)
    model.action_space.seed(1)
    before = model.action_space.np_random.bit_generator.state
    chosen = _Explorer(model, 0)
    first, second = (chosen(torch.zeros(2, 4)) for _ in range(2))
    assert model.action_space.contains(first[0])
    assert not np.array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], [0.25, 0.5])
    assert model.action_space.np_random.bit_generator.state == before


def test_an_error_of_a_sound_policy_is_told():
    model = make(SAC, Reach("vector"))

    def refuses(obs, **_):
        raise ValueError("its own reason")

    model.predict = refuses
    with pytest.raises(BatchproofError, match="ValueError: its own reason"):
        subject_from_model(model, env=Reach("vector"))


def test_an_environment_that_gives_nan_is_named():
    class Sick(Reach):
        def step(self, action):
            obs, *rest = super().step(action)
            return np.full_like(obs, np.nan), *rest

    model, id_ = make(SAC, Reach("vector")), "BatchproofSick-v0"
    gym.register(id_, entry_point=lambda: Sick("vector"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # Gymnasium's checker
            for env in (id_, Sick("vector")):
                with pytest.raises(BatchproofError, match="the environment gave observations that"):
                    subject_from_model(model, env=env)
    finally:
        del gym.registry[id_]


def test_public_names():
    for name in batchproof.sb3.__all__:
        assert getattr(batchproof.sb3, name) is not None
    with pytest.raises(AttributeError):
        batchproof.sb3.nothing  # noqa: B018


def test_healthy_policies_are_many():
    assert len(healthy.HEALTHY) >= 20
