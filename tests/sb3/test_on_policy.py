"""The first minibatch of PPO and A2C under each way to use modes, on small images."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib.common.torch_layers import BatchRenorm1d
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from batchproof.clinic.precise import recalibrate
from batchproof.errors import BatchproofError
from batchproof.layers import create_norm
from batchproof.sb3.callback import MonitorCallback
from batchproof.sb3.on_policy import HOW, OnPolicyModes, refresh

CLIP = 2e-3  # small enough that the first minibatch of a new policy has rows beyond it
ROUNDING = 1e-5  # float32: a batch of 4 environments against a minibatch of 32


class Squares(gymnasium.Env):
    """Bright squares that drift; the reward is for naming the brighter half."""

    observation_space = spaces.Box(0, 255, (1, 12, 12), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(5, 12))
        return self._obs(), {}

    def _obs(self):
        image = self.np_random.integers(0, 120, (1, 12, 12)).astype(np.uint8)
        self.side = int(self.np_random.integers(2))
        image[:, :, self.side * 6 : self.side * 6 + 6] += 100
        return image

    def step(self, action):
        reward = float(action == self.side)
        self.left -= 1
        return self._obs(), reward, self.left == 0, False, {}


class Convolution(BaseFeaturesExtractor):
    """One convolution and a norm, in torch or from the registry."""

    def __init__(self, space, norm="torch", dropout=0.0):
        super().__init__(space, 4 * 25)
        layer = nn.BatchNorm2d(4) if norm == "torch" else create_norm(norm, 4, dims=2)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 4, 2), layer, nn.ReLU(), nn.Dropout(dropout), nn.Flatten()
        )

    def forward(self, x):
        return self.net(x)


class Kept(KVWriter):
    """A writer that keeps what it is given."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))

    def close(self):
        pass


def make(kind=PPO, norm="torch", envs=4, dropout=0.0, **settings):
    torch.set_num_threads(1)
    if kind is PPO:
        settings = {"n_steps": 32, "batch_size": 32, "n_epochs": 4, "clip_range": 0.1} | settings
    env = DummyVecEnv([Squares] * envs)
    kwargs = {
        "features_extractor_class": Convolution,
        "features_extractor_kwargs": {"norm": norm, "dropout": dropout},
        "net_arch": [8],
    }
    return kind("CnnPolicy", env, policy_kwargs=kwargs, seed=0, device="cpu", **settings)


def state(model):
    return {key: value.clone() for key, value in model.policy.state_dict().items()}


def learned(callback=None):
    """What two updates from the same seed arrive at."""
    model = make()
    model.learn(256, callback=callback)
    return state(model)


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


class Firsts(OnPolicyModes):
    """Keeps every update's figures."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.all = []

    def _finish_update(self):
        super()._finish_update()
        self.all.append(self.first)


def firsts(how, norm="torch", updates=3, kind=PPO, **options):
    model = make(kind, norm)
    watch = Firsts(how, **options)
    model.learn(updates * model.n_steps * 4, callback=watch)
    return watch.all[1:]  # before the first rollout there is none


def test_the_library_starts_away_from_ratio_one_with_batch_norm():
    for figures in firsts("library"):
        # Small, because a policy that has just begun hardly depends on what it sees.
        assert figures["first_ratio_error"] > 1e-3
        assert figures["first_kl"] > 1e-7


def test_without_a_norm_the_first_ratio_is_one():
    for figures in firsts("library", "none"):
        assert figures["first_ratio_error"] < ROUNDING
        assert abs(figures["first_kl"]) < ROUNDING**2
        assert figures["first_clip_fraction"] == 0.0


@pytest.mark.parametrize("norm", ["torch", "batch", "renorm"])
@pytest.mark.parametrize("how", ["frozen", "preserved"])
def test_new_statistics_leave_a_first_ratio_of_one_from_the_first_update_on(how, norm):
    for figures in firsts(how, norm):
        assert figures["first_ratio_error"] < ROUNDING
        assert abs(figures["first_kl"]) < ROUNDING**2
        assert figures["first_clip_fraction"] == 0.0


def test_eval_after_is_one_once_warm():
    errors = [f["first_ratio_error"] for f in firsts("eval-after", warmup=2, updates=4)]
    assert min(errors[:2]) > 1e-3
    assert max(errors[2:]) < ROUNDING


def test_renorm_is_one_while_r_and_d_are_within_their_bounds():
    # r and d turn the batch's normalization into the running one; clipped they cannot.
    settled = firsts("renorm", "renorm", 6)[3:]
    assert max(f["first_ratio_error"] for f in settled) < ROUNDING


@pytest.mark.parametrize("how", ["train", "mdr"])
def test_train_and_mdr_do_not_promise_a_first_ratio_of_one(how):
    assert all(f["first_ratio_error"] > ROUNDING for f in firsts(how))


def test_figures_are_those_of_the_first_minibatch():
    model = make(clip_range=CLIP)
    seen = []
    evaluate, get = type(model.policy).evaluate_actions, type(model.rollout_buffer).get

    class Watched(OnPolicyModes):
        def _on_rollout_end(self):
            super()._on_rollout_end()
            rng = np.random.get_state()
            buffer = self.model.rollout_buffer
            ready = buffer.generator_ready
            kept = {k: v for k, v in vars(buffer).items() if isinstance(v, np.ndarray)}
            sample = next(get(buffer, 32))
            vars(buffer).update(kept)
            buffer.generator_ready = ready
            np.random.set_state(rng)
            before = state(self.model)
            self.model.policy.set_training_mode(True)
            with torch.no_grad():
                new = evaluate(
                    self.model.policy, sample.observations, sample.actions.long().flatten()
                )[1]
            self.model.policy.load_state_dict(before)
            ratio = (new - sample.old_log_prob).double().exp().numpy()
            kl = (ratio - 1 - np.log(ratio)).mean()
            seen.append((np.abs(ratio - 1).max(), (np.abs(ratio - 1) > CLIP).mean(), kl))

    watch = Watched("library")
    model.learn(128, callback=watch)
    error, clipped, kl = seen[0]
    assert watch.first["first_ratio_error"] == pytest.approx(error, rel=1e-4)
    assert watch.first["first_clip_fraction"] == pytest.approx(clipped)
    assert watch.first["first_kl"] == pytest.approx(kl, rel=1e-3)
    assert 0 < clipped < 1


def test_figures_reach_the_librarys_logger():
    model = make()
    kept = Kept()
    model.set_logger(Logger(None, [kept]))
    model.learn(3 * 128, callback=OnPolicyModes("library"))
    keys = {key for row in kept.rows for key in row}
    assert {
        "batchproof/first_kl",
        "batchproof/first_ratio_error",
        "batchproof/first_clip_fraction",
    } <= keys


def test_a2c_has_no_clip_range():
    figures = firsts("library", kind=A2C)[-1]
    assert set(figures) == {"first_kl", "first_ratio_error"}
    assert figures["first_ratio_error"] > ROUNDING
    assert firsts("frozen", kind=A2C)[-1]["first_ratio_error"] < ROUNDING


def test_watching_the_library_changes_nothing():
    assert same(learned(), learned(OnPolicyModes("library")))


@pytest.mark.parametrize("how", [how for how in HOW if how not in ("library", "renorm")])
def test_every_other_way_trains_another_policy(how):
    options = {"warmup": 1} if how == "eval-after" else {}
    assert not same(learned(), learned(OnPolicyModes(how, **options)))


def test_frozen_statistics_are_those_of_the_last_rollout_at_the_new_weights():
    model = make()
    rollout = []

    class Keep(MonitorCallback):
        def _on_rollout_end(self):
            buffer = self.model.rollout_buffer.observations
            rollout[:] = [buffer.reshape(-1, *buffer.shape[2:]).copy()]

    model.learn(2 * 128, callback=[OnPolicyModes("frozen"), Keep()])
    norm = model.policy.features_extractor.net[1]
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    images = torch.as_tensor(rollout[0]).float() / 255
    recalibrate(model.policy.features_extractor, images)
    torch.testing.assert_close(mean, norm.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, norm.running_var, rtol=1e-5, atol=1e-6)


def test_after_refresh_eval_and_train_mode_agree_on_those_rows():
    model = make(norm="batch")
    rows = torch.randint(0, 255, (64, 1, 12, 12), dtype=torch.uint8)
    policy = model.policy
    refresh(policy, rows)
    policy.set_training_mode(False)
    evaled = policy.get_distribution(rows).distribution.logits
    policy.set_training_mode(True)
    trained = policy.get_distribution(rows).distribution.logits
    torch.testing.assert_close(evaled, trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["torch", "batch", "renorm"])
def test_preserved_changes_the_statistics_and_not_the_policy(norm):
    model = make(norm=norm)
    model.learn(128)  # so that weights and biases are no longer 1 and 0
    policy = model.policy
    rows = torch.randint(0, 255, (64, 1, 12, 12), dtype=torch.uint8)
    policy.set_training_mode(False)
    before, was = policy.get_distribution(rows).distribution.logits, state(model)
    refresh(policy, rows, preserve=True)
    after = policy.get_distribution(rows).distribution.logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    inputs = []
    layer = policy.features_extractor.net[1]
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        policy.get_distribution(rows)
        handle.remove()
    dims = [0, *range(2, inputs[0].ndim)]
    torch.testing.assert_close(layer.running_mean, inputs[0].mean(dims), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer.running_mean, was["features_extractor.net.1.running_mean"])


def test_what_new_statistics_change_is_measured():
    kls = {}
    for how in ("frozen", "preserved", "library"):
        watch = OnPolicyModes(how)
        learned(watch)
        kls[how] = watch.refresh_kl
    assert kls["frozen"] > max(1e-7, 10 * abs(kls["preserved"]))
    assert abs(kls["preserved"]) < 1e-6
    assert kls["library"] == 0.0


def test_preserved_needs_layers_with_weight_and_bias():
    model = make(norm="batch")
    model.policy.features_extractor.net[1].bias = None
    with pytest.raises(BatchproofError, match="affine=True"):
        model.learn(128, callback=OnPolicyModes("preserved"))


class Drift(gymnasium.Env):
    """Three numbers of very different sizes; the reward is for a small action."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 10
        return self._obs(), {}

    def _obs(self):
        return (self.np_random.normal(size=3) * [1, 10, 0.1] + [0, 5, 1]).astype(np.float32)

    def step(self, action):
        self.left -= 1
        return self._obs(), -float(np.square(action).sum()), self.left == 0, False, {}


class Dense(BaseFeaturesExtractor):
    """One linear layer and sb3-contrib's own Batch Renorm, whose buffers have other names."""

    def __init__(self, space, affine=True):
        super().__init__(space, 8)
        self.norm = BatchRenorm1d(8, momentum=0.1, affine=affine, warmup_steps=2)
        self.net = nn.Sequential(nn.Linear(3, 8), self.norm, nn.ReLU())

    def forward(self, x):
        return self.net(x)


def make_dense(use_sde, **settings):
    torch.set_num_threads(1)
    kwargs = {"features_extractor_class": Dense, "net_arch": [8]}
    kwargs["features_extractor_kwargs"] = settings
    options = {"n_steps": 32, "batch_size": 32, "n_epochs": 4, "use_sde": use_sde, "seed": 0}
    env = DummyVecEnv([Drift] * 4)
    return PPO("MlpPolicy", env, policy_kwargs=kwargs, device="cpu", **options)


@pytest.mark.parametrize("use_sde", [False, True], ids=["gaussian", "gsde"])
def test_new_statistics_of_sb3_contribs_renorm_on_continuous_actions(use_sde):
    kls = {}
    for how in ("frozen", "preserved"):
        model = make_dense(use_sde)
        watch = Firsts(how)
        model.learn(3 * 128, callback=watch)
        kls[how] = watch.refresh_kl
        norm = model.policy.features_extractor.norm
        assert norm.ra_mean.abs().min() > 1e-3  # no longer where they start
        assert all(figures["first_ratio_error"] < 1e-4 for figures in watch.all[1:])
    assert abs(kls["preserved"]) < 1e-6
    assert kls["frozen"] > max(1e-7, 10 * abs(kls["preserved"]))


def test_a_renorm_whose_weight_and_bias_are_not_used_cannot_preserve():
    with pytest.raises(BatchproofError, match="affine=True"):
        make_dense(False, affine=False).learn(128, callback=OnPolicyModes("preserved"))


def test_statistics_stand_still_within_an_update_and_a_rollout():
    model = make()
    norm = model.policy.features_extractor.net[1]
    seen = []

    class Look(MonitorCallback):
        def _on_rollout_start(self):
            seen.append(norm.running_mean.clone())

        def _on_step(self):
            seen.append(norm.running_mean.clone())
            return True

        def _on_rollout_end(self):
            seen.append(norm.running_mean.clone())

    model.learn(2 * 128, callback=[OnPolicyModes("frozen"), Look()])
    per_rollout = len(seen) // 2
    first, second = seen[:per_rollout], seen[per_rollout:]
    assert all(torch.equal(part, first[0]) for part in first)
    assert all(torch.equal(part, second[0]) for part in second)
    assert not torch.equal(first[0], second[0])
    assert int(norm.num_batches_tracked) == 0


def test_eval_after_moves_the_statistics_in_the_warm_up_only():
    model = make()
    model.learn(3 * 128, callback=OnPolicyModes("eval-after", warmup=2))
    # 2 updates of 4 epochs of 4 minibatches.
    assert int(model.policy.features_extractor.net[1].num_batches_tracked) == 32


def test_eval_after_goes_on_counting_after_a_load(tmp_path):
    model = make()
    model.learn(2 * 128, callback=OnPolicyModes("eval-after", warmup=2))
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    loaded.learn(128, callback=OnPolicyModes("eval-after", warmup=2), reset_num_timesteps=False)
    assert int(loaded.policy.features_extractor.net[1].num_batches_tracked) == 32


@pytest.mark.parametrize(("rectified", "batches"), [(None, 8), (1, 12), (3, 4)])
def test_mdr_moves_statistics_in_its_first_epochs_only(rectified, batches):
    model = make()
    model.learn(128, callback=OnPolicyModes("mdr", rectified=rectified))
    assert int(model.policy.features_extractor.net[1].num_batches_tracked) == batches


def test_train_moves_statistics_in_every_step_and_prediction_stays_in_eval():
    model = make()
    model.learn(128, callback=OnPolicyModes("train"))
    norm = model.policy.features_extractor.net[1]
    assert int(norm.num_batches_tracked) == 32 + 16
    obs = np.zeros((1, 1, 12, 12), np.uint8)
    before = state(model)
    model.predict(obs)
    assert same(before, state(model))


def test_a_monitor_beside_it_changes_nothing():
    both = [OnPolicyModes("train"), MonitorCallback(every=1)]
    assert same(learned(OnPolicyModes("train")), learned(both))


def test_early_stopping_by_kl_leaves_frozen_at_ratio_one():
    model = make(target_kl=1e-6)
    watch = Firsts("frozen")
    model.learn(3 * 128, callback=watch)
    assert max(f["first_ratio_error"] for f in watch.all[1:]) < ROUNDING


def test_model_is_given_back_and_saves_as_the_librarys_own(tmp_path):
    model = make()
    for how in ("train", "frozen"):
        model.learn(128, callback=OnPolicyModes(how), reset_num_timesteps=False)
    assert not {"forward", "evaluate_actions", "set_training_mode"} & set(vars(model.policy))
    assert "get" not in vars(model.rollout_buffer)
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert same(state(model), state(loaded))


def test_saving_and_loading_in_between_goes_on_as_frozen(tmp_path):
    model = make()
    model.learn(128, callback=OnPolicyModes("frozen"))
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    watch = Firsts("frozen")
    loaded.learn(256, callback=watch, reset_num_timesteps=False)
    assert max(f["first_ratio_error"] for f in watch.all[1:]) < ROUNDING


def test_dropout_is_cured_too():
    for how, one in (("library", False), ("eval-after", True)):
        model = make(norm="none", dropout=0.5)
        watch = Firsts(how, **({"warmup": 0} if how == "eval-after" else {}))
        model.learn(128, callback=watch)
        assert (watch.first["first_ratio_error"] < ROUNDING) == one


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"how": "frosen"}, "frozen"),
        ({"how": "eval-after", "warmup": -1}, "warmup"),
        ({"how": "library", "warmup": 99}, "warmup has no effect with 'library'.*eval-after"),
        ({"how": "mdr", "warmup": 10}, "eval-after"),
        ({"how": "frozen", "rectified": 2}, "mdr"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(BatchproofError, match=words):
        OnPolicyModes(**options)


def test_the_warm_up_has_a_length_of_its_own():
    assert OnPolicyModes("eval-after").warmup == 10
    assert OnPolicyModes("eval-after", warmup=0).warmup == 0


@pytest.mark.parametrize(
    ("how", "model", "words"),
    [
        ("frozen", lambda: make(norm="none"), "changes nothing"),
        ("renorm", lambda: make(norm="batch"), 'norm="renorm"'),
        ("train", lambda: make(envs=1), "2 environments"),
        ("mdr", lambda: make(n_epochs=1), "n_epochs"),
        ("mdr", lambda: make(A2C), "n_epochs"),
        ("frozen", lambda: make(norm="none", dropout=0.5), "none"),
        ("library", lambda: SAC("MlpPolicy", "Pendulum-v1", buffer_size=10), "SAC"),
    ],
)
def test_models_that_it_cannot_help_are_refused(how, model, words):
    with pytest.raises(BatchproofError, match=words):
        model().learn(8, callback=OnPolicyModes(how))


def test_rectified_must_leave_an_epoch_to_train():
    with pytest.raises(BatchproofError, match="rectified"):
        make().learn(8, callback=OnPolicyModes("mdr", rectified=4))
    assert math.isinf(OnPolicyModes("mdr")._update.eval_from)
