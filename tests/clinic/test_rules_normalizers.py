"""BP5xx: normalizers that are missing, moving or other ones at evaluation."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, sync_envs_normalization
from torch import nn

from batchproof.clinic.rules import Status, audit
from batchproof.clinic.rules_normalizers import normalizer_of
from batchproof.clinic.subject import Subject

torch.set_num_threads(1)


class Shifted(gym.Env):
    """Observations far from standard normal, so that a normalizer matters."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        return self._obs(), float(self.np_random.normal()), False, False, {}

    def _obs(self):
        return self.np_random.normal([1, 2, 3], [1, 2, 4]).astype(np.float32)


def vec_normalize(steps=200, **options):
    env = VecNormalize(DummyVecEnv([Shifted]), **options)
    env.seed(0)
    env.reset()
    for _ in range(steps):
        env.step(np.zeros((1, 2)))
    return env


def evaluation(train=None):
    env = VecNormalize(DummyVecEnv([Shifted]), training=False, norm_reward=False)
    if train is not None:
        sync_envs_normalization(train, env)
    return env


def examine(normalizers, code, **more):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    obs = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    subject = Subject.from_module(network, obs, normalizers=normalizers, **more)
    return audit(subject, only=[code]).outcomes[code], network, obs


def test_missing_at_evaluation_with_the_size_of_the_action_gap():
    train = vec_normalize()
    outcome, network, obs = examine({"train": train, "eval": DummyVecEnv([Shifted])}, "BP501")
    assert outcome.status is Status.FAIL
    raw = torch.as_tensor(train.unnormalize_obs(obs.numpy())).float()
    expected = float((network(raw) - network(obs)).abs().max().detach())
    assert outcome.findings[0].value == pytest.approx(expected, rel=1e-5)
    assert outcome.findings[0].site == "evaluation environment"
    assert examine({"train": train, "eval": None}, "BP501")[0].status is Status.FAIL


def test_missing_but_without_consequence_is_for_review():
    fresh = VecNormalize(DummyVecEnv([Shifted]), epsilon=0.0)
    assert examine({"train": fresh, "eval": None}, "BP501")[0].status is Status.REVIEW


def test_action_gap_of_a_discrete_policy_counts_other_choices():
    outcome, *_ = examine({"train": vec_normalize(), "eval": None}, "BP501", discrete=True)
    assert "another action on" in outcome.findings[0].effect


def test_healthy_pair_passes():
    train = vec_normalize()
    pair = {"train": train, "eval": evaluation(train)}
    for code in ("BP501", "BP502", "BP503"):
        assert examine(pair, code)[0].status is Status.PASS


@pytest.mark.parametrize("code", ["BP501", "BP502", "BP503"])
def test_not_applicable_without_normalizers(code):
    plain = DummyVecEnv([Shifted])
    unknown = examine({}, code)[0]
    assert unknown.status is Status.NOT_APPLICABLE
    assert "normalizers['train']" in unknown.reason
    # A library's model may have been given the id of an environment.
    unknown = examine({}, code, model=object())[0]
    assert "an environment id says nothing" in unknown.reason
    assert "--vecnormalize FILE" in unknown.reason
    assert examine({"train": plain, "eval": plain}, code)[0].status is Status.NOT_APPLICABLE
    assert examine({"train": plain}, code)[0].status is Status.NOT_APPLICABLE


@pytest.mark.parametrize("code", ["BP501", "BP502", "BP503"])
def test_an_unknown_evaluation_environment_is_no_pass(code):
    outcome, *_ = examine({"train": vec_normalize()}, code)
    assert outcome.status is Status.SKIPPED
    assert "normalizers['eval']" in outcome.reason


def test_updating_at_evaluation():
    train = vec_normalize()
    outcome, *_ = examine({"train": train, "eval": vec_normalize(training=True)}, "BP502")
    assert outcome.status is Status.FAIL
    assert outcome.findings[0].value > 0
    outcome, *_ = examine({"train": train, "eval": train}, "BP502")
    assert "training environment's own" in outcome.findings[0].message


def test_gymnasium_wrappers_are_found_through_other_wrappers():
    wrapped = gym.wrappers.NormalizeObservation(Shifted())
    wrapped.reset(seed=0)
    outer = gym.wrappers.TimeLimit(wrapped, 10)
    found = normalizer_of(outer)
    np.testing.assert_array_equal(found.obs[""][0], wrapped.obs_rms.mean)
    assert found.updating is True
    assert examine({"train": outer, "eval": outer}, "BP502")[0].status is Status.FAIL
    wrapped.update_running_mean = False
    assert examine({"train": outer, "eval": outer}, "BP502")[0].status is Status.PASS
    assert normalizer_of(DummyVecEnv([lambda: wrapped])).obs
    assert normalizer_of(gym.wrappers.NormalizeReward(Shifted())).reward is not None
    assert normalizer_of(Shifted()) is None


def test_vector_wrapper_is_not_taken_for_the_one_it_forwards_to():
    from stable_baselines3.common.vec_env import VecFrameStack

    train = vec_normalize()
    assert normalizer_of(VecFrameStack(train, 2)).updating is True


@pytest.mark.parametrize(
    ("shift", "status"),
    [(0.0, Status.PASS), (0.005, Status.PASS), (0.05, Status.REVIEW), (0.2, Status.FAIL)],
)
def test_statistics_that_differ_by_a_known_number_of_sigmas(shift, status):
    train = vec_normalize()
    other = evaluation(train)
    sigma = np.sqrt(train.obs_rms.var + train.epsilon)
    other.obs_rms.mean = train.obs_rms.mean + np.array([0, shift, 0]) * sigma
    outcome, *_ = examine({"train": train, "eval": other}, "BP503")
    assert outcome.status is status
    if outcome.findings:
        assert outcome.findings[0].value == pytest.approx(shift, rel=1e-6)
        assert "feature 1" in outcome.findings[0].message


def test_scale_that_differs():
    train = vec_normalize()
    other = evaluation(train)
    other.obs_rms.var = train.obs_rms.var * 1.5**2
    outcome, *_ = examine({"train": train, "eval": other}, "BP503")
    assert outcome.status is Status.FAIL
    assert outcome.findings[0].value == pytest.approx(np.log(1.5), rel=1e-4)


def test_fresh_statistics_are_called_so():
    outcome, *_ = examine({"train": vec_normalize(), "eval": evaluation()}, "BP503")
    assert outcome.status is Status.FAIL
    assert "never fed" in outcome.findings[0].message


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_statistics_never_pass(broken):
    train = vec_normalize()
    other = evaluation(train)
    other.obs_rms.mean = other.obs_rms.mean + np.array([broken, 0, 0])
    assert examine({"train": train, "eval": other}, "BP503")[0].status is Status.FAIL


def test_clip_epsilon_shape_and_normalization_only_at_evaluation():
    train = vec_normalize()
    clipped = evaluation(train)
    clipped.clip_obs = 0.5
    outcome, *_ = examine({"train": train, "eval": clipped}, "BP503")
    assert outcome.status is Status.REVIEW
    assert "clip 0.5" in outcome.findings[0].message
    narrow = evaluation(train)
    narrow.obs_rms.mean, narrow.obs_rms.var = np.zeros(2), np.ones(2)
    assert examine({"train": train, "eval": narrow}, "BP503")[0].status is Status.FAIL
    assert examine({"train": None, "eval": evaluation()}, "BP503")[0].status is Status.FAIL


def test_rewards_normalized_at_evaluation():
    train = vec_normalize()
    other = evaluation(train)
    other.norm_reward = True
    outcome, *_ = examine({"train": train, "eval": other}, "BP503")
    assert outcome.status is Status.REVIEW
    sigma = float(np.sqrt(other.ret_rms.var + other.epsilon))
    assert outcome.findings[0].value == pytest.approx(sigma)


def test_dict_observations():
    space = {"a": gym.spaces.Box(-9, 9, (3,)), "b": gym.spaces.Box(-9, 9, (1,))}

    class Two(Shifted):
        observation_space = gym.spaces.Dict(space)

        def _obs(self):
            return {"a": super()._obs(), "b": np.full(1, 2.0, np.float32)}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, obs):
            return self.linear(torch.cat([obs["a"], obs["b"]], 1))

    train = VecNormalize(DummyVecEnv([Two]), norm_obs_keys=["a"])
    train.seed(0)
    train.reset()
    for _ in range(50):
        train.step(np.zeros((1, 2)))
    torch.manual_seed(0)
    obs = {"a": torch.randn(20, 3), "b": torch.full((20, 1), 2.0)}
    subject = Subject.from_module(Net(), obs, normalizers={"train": train, "eval": None})
    outcome = audit(subject, only=["BP501"]).outcomes["BP501"]
    raw = train.unnormalize_obs({"a": obs["a"].numpy()})["a"]
    raw = {"a": torch.as_tensor(raw).float(), "b": obs["b"]}
    net = subject.networks["policy"]
    expected = float((net(raw) - net(obs)).abs().max().detach())
    assert outcome.findings[0].value == pytest.approx(expected, rel=1e-5)


def test_normalizers_are_only_read():
    train = vec_normalize()
    before = (train.obs_rms.mean.copy(), train.obs_rms.var.copy(), train.obs_rms.count)
    examine({"train": train, "eval": train}, "BP502")
    examine({"train": train, "eval": evaluation()}, "BP503")
    np.testing.assert_array_equal(before[0], train.obs_rms.mean)
    np.testing.assert_array_equal(before[1], train.obs_rms.var)
    assert before[2] == train.obs_rms.count
