"""Atari: equal to the library's own wrappers, monitored in raw scores, and refused by name."""

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import NoopResetEnv
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage

from batchproof.errors import BatchproofError
from batchproof.sb3 import AtariVecEnv, make_atari


def with_their_wrappers(env, game_id, training):
    """The library's own, told how many no-ops each of our games began with."""
    their = {"terminal_on_life_loss": training, "clip_reward": training}
    reference = make_atari_env(
        game_id,
        n_envs=env.num_envs,
        wrapper_kwargs=their,
        # Of NoFrameskip-v4, whose id warns.
        env_kwargs={"frameskip": 1, "repeat_action_probability": 0.0},
    )
    for game, wrapped in zip(env.games, reference.envs, strict=True):
        noops = []

        def begin(seed=None, game=game, noops=noops, new_game=game._new_game):
            screen = new_game(seed)
            noops.append(game.frames)
            return screen

        game._new_game = begin
        while not isinstance(wrapped, NoopResetEnv):
            wrapped = wrapped.env

        def reset(wrapped=wrapped, noops=noops, reset=wrapped.reset, **kwargs):
            wrapped.override_num_noops = noops.pop(0)
            assert 1 <= wrapped.override_num_noops <= 30
            return reset(**kwargs)

        wrapped.reset = reset
    return VecTransposeImage(VecFrameStack(reference, 4))


@pytest.mark.parametrize(
    ("game", "game_id", "training", "steps"),
    [
        ("breakout", "ALE/Breakout-v5", True, 300),
        ("breakout", "ALE/Breakout-v5", False, 300),
        ("ms_pacman", "ALE/MsPacman-v5", True, 120),  # no FIRE at the start
    ],
)
def test_frames_rewards_and_ends_are_the_wrappers(game, game_id, training, steps):
    ours = make_atari(game, 2, training=training, seed=5)
    theirs = with_their_wrappers(ours, game_id, training)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    rng = np.random.default_rng(0)
    rewards, ends, games = 0, 0, 0
    for _ in range(steps):
        actions = rng.integers(ours.action_space.n, size=2)
        obs, reward, done, infos = ours.step(actions)
        their_obs, their_reward, their_done, their_infos = theirs.step(actions)
        np.testing.assert_array_equal(obs, their_obs)
        np.testing.assert_array_equal(reward, their_reward)
        np.testing.assert_array_equal(done, their_done)
        rewards, ends = rewards + reward.sum(), ends + done.sum()
        for info, their_info in zip(infos, their_infos, strict=True):
            for key in ("lives", "episode_frame_number", "TimeLimit.truncated"):
                assert info[key] == their_info[key]
            assert ("terminal_observation" in info) == ("terminal_observation" in their_info)
            if "terminal_observation" in info:
                # Where a game ends amid its 4 frames the newest is of an earlier step in both.
                np.testing.assert_array_equal(
                    info["terminal_observation"][:3], their_info["terminal_observation"][:3]
                )
            assert ("episode" in info) == ("episode" in their_info)
            if "episode" in info:
                games += 1
                assert info["episode"]["r"] == their_info["episode"]["r"]
                assert info["episode"]["l"] == their_info["episode"]["l"]
    assert rewards > 0
    if game == "breakout":
        assert games >= 2
        assert ends == games if not training else ends > games


def test_scores_are_raw_and_rewards_clipped():
    env = make_atari("ms_pacman", 1, seed=0)  # a dot is worth 10
    env.reset()
    rewards, rng = [], np.random.default_rng(0)
    for _ in range(120):
        rewards.append(float(env.step(rng.integers(9, size=1))[1][0]))
    assert set(rewards) == {0.0, 1.0}
    assert env.get_attr("score") == [10 * sum(rewards)]


def test_a_long_game_is_truncated():
    # Of whole games: after some of the random no-ops doing nothing loses a life before that.
    env = AtariVecEnv("breakout", 1, episodic_life=False, max_frames=100)
    env.reset()
    for _ in range(40):
        obs, _, done, infos = env.step([0])
        if done[0]:
            break
    assert done[0]
    assert infos[0]["TimeLimit.truncated"]
    assert 100 <= infos[0]["episode"]["l"] < 104
    assert infos[0]["terminal_observation"].shape == (4, 84, 84)
    assert not obs[0, :3].any()
    assert obs[0, 3].any()
    assert env.reset_infos[0]["episode_frame_number"] <= 30 + 8


def test_seeds_decide_and_a_reset_begins_new_games():
    def run(seed):
        env = make_atari("breakout", 2, seed=seed)
        frames = [env.reset()]
        frames += [env.step([1, 2])[0] for _ in range(10)]
        return env, np.stack(frames)

    env, first = run(1)
    np.testing.assert_array_equal(first, run(1)[1])
    starts = {tuple(info["episode_frame_number"] for info in env.reset_infos)}
    for _ in range(4):
        env.reset()
        starts.add(tuple(info["episode_frame_number"] for info in env.reset_infos))
    assert len(starts) > 1  # other no-ops each time
    assert env.get_attr("score") == [0.0, 0.0]


def test_observations_stay_as_they_were_handed_out():
    env = make_atari("breakout", 1, seed=0)
    first = env.reset()
    copy = first.copy()
    second, *_ = env.step([1])
    env.step([2])
    np.testing.assert_array_equal(first, copy)
    np.testing.assert_array_equal(second[0, :3], first[0, 1:])


def test_ppo_trains_in_it_and_its_evaluation_plays_whole_games():
    torch.set_num_threads(1)
    env = make_atari("breakout", 2)
    model = PPO("CnnPolicy", env, n_steps=64, batch_size=64, n_epochs=1, seed=0, device="cpu")
    assert model.env is env  # no wrapper around it
    model.learn(512)
    assert len(model.ep_info_buffer) > 0
    assert all(info["l"] > 4 for info in model.ep_info_buffer)
    whole = AtariVecEnv("breakout", 1, episodic_life=False, clip_reward=False, max_frames=200)
    _, lengths = evaluate_policy(model, whole, 1, return_episode_rewards=True)
    assert 200 <= lengths[0] < 204  # frames, as Monitor counts them


def test_what_it_says_of_itself():
    env = make_atari("breakout", 2, seed=0)
    env.reset()
    assert env.env_is_wrapped(Monitor) == [True, True]
    assert env.env_is_wrapped(NoopResetEnv) == [False, False]
    assert env.get_attr("lives", indices=[1]) == [5]
    assert not env.has_attr("ale_version")
    assert [image.shape for image in env.get_images()] == [(210, 160, 3)] * 2
    assert env.render("rgb_array").ndim == 3
    assert env.env_method("info", indices=0) == [env.reset_infos[0]]
    with pytest.raises(BatchproofError, match="make another AtariVecEnv"):
        env.set_attr("lives", 3)
    env.close()


@pytest.mark.parametrize("game", ["BreakoutNoFrameskip-v4", "ALE/Breakout-v5", "brekout"])
def test_an_unknown_game_is_refused(game):
    with pytest.raises(BatchproofError, match="write a ROM's name"):
        make_atari(game)


def test_environments_are_counted():
    with pytest.raises(BatchproofError, match="at least 1"):
        make_atari("breakout", 0)
