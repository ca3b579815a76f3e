"""NatureCNN: off it is the library's own, on each norm sits after each convolution."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common import torch_layers as library
from stable_baselines3.common.logger import Logger
from torch import nn

from batchproof.clinic import audit
from batchproof.errors import BatchproofError
from batchproof.layers import LAYERS, BatchNorm2d, mode_layers
from batchproof.sb3 import CnnPolicy, CombinedExtractor, NatureCNN, subject_from_model
from batchproof.sb3 import nature_cnn as module

FRAMES = spaces.Box(0, 255, (4, 36, 36), np.uint8)
NORMS = sorted(set(LAYERS) - {"none", "rms"})  # rms refuses images


class Square(gymnasium.Env):
    """Bring a white square near the middle; observed as an image alone or beside its place."""

    def __init__(self, seen="image", actions="discrete"):
        image = spaces.Box(0, 255, (36, 36, 3), np.uint8)
        place = spaces.Box(0, 32, (2,), np.float32)
        self.seen = seen
        self.observation_space = (
            image if seen == "image" else spaces.Dict({"frame": image, "place": place})
        )
        self.action_space = (
            spaces.Discrete(4) if actions == "discrete" else spaces.Box(-1, 1, (2,), np.float32)
        )

    def observed(self):
        frame = np.full((36, 36, 3), 40, np.uint8)
        row, column = self.place.astype(int)
        frame[row : row + 4, column : column + 4] = 255
        return frame if self.seen == "image" else {"frame": frame, "place": self.place}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(0, 32, 2).astype(np.float32)
        self.left = 20
        return self.observed(), {}

    def step(self, action):
        if isinstance(self.action_space, spaces.Discrete):
            action = np.array([(1, 0), (-1, 0), (0, 1), (0, -1)][int(action)])
        self.place = np.clip(self.place + 3 * action, 0, 32).astype(np.float32)
        self.left -= 1
        distance = float(np.abs(self.place - 16).sum()) / 32
        return self.observed(), -distance, distance < 0.1, self.left == 0, {}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def images(rows=5):
    return torch.rand(rows, *FRAMES.shape)


def built(kind, **options):
    """A network, and what the generator draws next."""
    torch.manual_seed(3)
    FRAMES.seed(3)
    return kind(FRAMES, **options), torch.rand(1)


def model(algorithm, policy="CnnPolicy", seen="image", extractor=None, **kwargs):
    settings = {
        PPO: {"n_steps": 16, "batch_size": 8, "n_epochs": 2},
        A2C: {},
        DQN: {"learning_starts": 8, "buffer_size": 40, "batch_size": 8},
        QRDQN: {"learning_starts": 8, "buffer_size": 40, "batch_size": 8},
        SAC: {"learning_starts": 8, "buffer_size": 40, "batch_size": 8},
    }[algorithm]
    policy_kwargs = {} if extractor is None else {"features_extractor_class": extractor}
    if kwargs:
        policy_kwargs["features_extractor_kwargs"] = kwargs
    env = Square(seen, "box" if algorithm is SAC else "discrete")
    return algorithm(policy, env, policy_kwargs=policy_kwargs, seed=0, device="cpu", **settings)


@pytest.mark.parametrize("algorithm", [DQN, QRDQN, SAC])
def test_policy_for_ppo_says_so_to_other_algorithms(algorithm):
    with pytest.raises(AttributeError, match="for PPO and A2C"):
        model(algorithm, CnnPolicy)


def test_off_is_the_librarys_own_with_its_gradients():
    ours, after = built(NatureCNN)
    theirs, after_theirs = built(library.NatureCNN)
    assert torch.equal(after, after_theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    x = images()
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    expected.square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slow", [True, False])
def test_the_linear_layer_is_the_librarys_however_it_is_computed(monkeypatch, slow):
    monkeypatch.setattr(module, "mkl_is_slow", lambda: slow)
    ours = built(NatureCNN)[0].linear[0]
    convolutions = []
    real = module.functional.conv2d
    monkeypatch.setattr(
        module.functional, "conv2d", lambda *args: convolutions.append(args) or real(*args)
    )
    theirs = nn.Linear(ours.in_features, ours.out_features)
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    for rows in (ours.FEWEST_ROWS - 1, ours.FEWEST_ROWS):
        x = torch.randn(rows, ours.in_features, generator=generator)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(given) for layer, given in zip((ours, theirs), inputs, strict=True)]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        for output in outputs:
            output.square().mean().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-6)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-6)
    assert len(convolutions) == slow
    with torch.no_grad():  # acting is the library's to the last bit
        assert torch.equal(ours(x), theirs(x))


def test_the_convolutions_run_with_channels_last():
    network, _ = built(NatureCNN)
    seen = []
    for layer in network.cnn:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    network(images())
    assert [output.shape[-1] for output in seen[:4]] == [8, 8, 3, 3]
    for output in seen[:4]:
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert not output.is_contiguous()


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN, QRDQN, SAC])
def test_a_model_is_the_librarys_whole(algorithm):
    ours, theirs = model(algorithm, extractor=NatureCNN), model(algorithm)
    state = theirs.policy.state_dict()
    assert list(ours.policy.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in ours.policy.state_dict().items())


def test_a_dict_models_too():
    make = (PPO, "MultiInputPolicy", "mixed")
    ours, theirs = model(*make, extractor=CombinedExtractor), model(*make)
    state = theirs.policy.state_dict()
    assert list(ours.policy.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in ours.policy.state_dict().items())
    obs, _ = Square("mixed").reset(seed=0)
    obs["frame"] = obs["frame"].transpose(2, 0, 1)
    tensors = {key: torch.as_tensor(value[None]) for key, value in obs.items()}
    torch.testing.assert_close(
        ours.policy.predict_values(tensors), theirs.policy.predict_values(tensors)
    )
    ours.learn(16)


@pytest.mark.parametrize(("first", "second"), [(None, NatureCNN), (NatureCNN, None)])
def test_checkpoints_load_both_ways(tmp_path, first, second):
    saved = model(PPO, extractor=first).learn(16)
    saved.save(tmp_path / "model.zip")
    other = model(PPO, extractor=second)
    other.set_parameters(str(tmp_path / "model.zip"), exact_match=True)
    x = np.random.default_rng(0).integers(0, 256, (6, 3, 36, 36), np.uint8)
    value, log_prob, entropy = saved.policy.evaluate_actions(torch.as_tensor(x), torch.zeros(6))
    again = other.policy.evaluate_actions(torch.as_tensor(x), torch.zeros(6))
    for found, expected in zip(again, (value, log_prob, entropy), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Losses(Logger):
    """Every update's losses."""

    def __init__(self):
        super().__init__(folder=None, output_formats=[])
        self.rows = []

    def record(self, key, value, exclude=None):
        if key == "train/entropy_loss":
            self.rows.append({})
        if key.endswith(("loss", "approx_kl")):
            self.rows[-1][key] = float(value)


def test_twenty_updates_follow_the_librarys_losses():
    sides = {
        "library": {},
        "extractor": {"extractor": NatureCNN},
        "policy": {"policy": CnnPolicy},
    }
    rows = {}
    for name, side in sides.items():
        agent = model(PPO, **side)
        losses = Losses()
        agent.set_logger(losses)
        agent.learn(20 * 16)
        rows[name] = losses.rows
    assert len(rows["library"]) == 20
    for side in ("extractor", "policy"):
        for step, (theirs, ours) in enumerate(zip(rows["library"], rows[side], strict=True)):
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (side, step, name)
    values = [row["train/value_loss"] for row in rows["library"]]
    assert abs(values[-1] - values[0]) > 1e-2


@pytest.mark.parametrize("shared", [True, False])
def test_the_policy_gives_its_network_the_librarys_numbers(shared):
    settings = {"share_features_extractor": shared}
    theirs = PPO(
        "CnnPolicy",
        Square(),
        policy_kwargs=settings | {"features_extractor_class": NatureCNN},
        seed=0,
        device="cpu",
    ).policy
    ours = PPO(CnnPolicy, Square(), policy_kwargs=settings, seed=0, device="cpu").policy
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.arange(256, dtype=torch.uint8).repeat(4 * 3 * 36 * 36 // 256 + 1)
    x = x[: 4 * 3 * 36 * 36].reshape(4, 3, 36, 36)
    taken = {}
    for name, policy in (("ours", ours), ("theirs", theirs)):
        policy.vf_features_extractor.register_forward_pre_hook(
            lambda layer, inputs, name=name: taken.update({name: inputs[0]})
        )
    for given in (x, x.float()):
        found = ours.evaluate_actions(given, torch.zeros(4))
        expected = theirs.evaluate_actions(given, torch.zeros(4))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert torch.equal(taken["ours"], taken["theirs"])
        turned = taken["ours"].is_contiguous(memory_format=torch.channels_last)
        assert turned == (given.dtype == torch.uint8)
    assert torch.equal(ours.predict_values(x), theirs.predict_values(x))


def test_the_policys_optimizer(tmp_path):
    agent = model(PPO, CnnPolicy)
    theirs = model(PPO)
    assert agent.policy.optimizer.defaults["fused"]
    assert agent.policy.optimizer.defaults["eps"] == theirs.policy.optimizer.defaults["eps"]
    assert type(model(A2C, CnnPolicy).policy.optimizer) is type(model(A2C).policy.optimizer)
    agent.learn(16).save(tmp_path / "agent.zip")
    again = PPO.load(tmp_path / "agent.zip", env=Square(), device="cpu")
    assert isinstance(again.policy, CnnPolicy)
    assert again.policy.optimizer.defaults["fused"]
    again.learn(16)
    theirs.set_parameters(str(tmp_path / "agent.zip"), exact_match=True)
    theirs.learn(16)
    chosen = PPO(
        CnnPolicy, Square(), policy_kwargs={"optimizer_kwargs": {"eps": 1e-8}}, device="cpu"
    )
    assert not chosen.policy.optimizer.defaults["fused"]
    assert chosen.policy.optimizer.defaults["eps"] == 1e-8


def test_the_policy_takes_the_networks_keywords():
    agent = model(PPO, CnnPolicy, use_batch_norm=True)
    assert len(mode_layers(agent.policy)) == 3
    agent.learn(16)


def test_batch_norm_sits_between_each_convolution_and_its_relu():
    network, _ = built(NatureCNN, use_batch_norm=True)
    kinds = [type(layer) for layer in network.cnn]
    assert kinds == 3 * [nn.Conv2d, BatchNorm2d, nn.ReLU] + [nn.Flatten]
    linear, relu = network.linear
    assert isinstance(linear, nn.Linear)
    assert isinstance(relu, nn.ReLU)
    seen = {}
    network.cnn[4].register_forward_hook(lambda layer, inputs, output: seen.update(y=output))
    network(images(64))
    by_channel = seen["y"].transpose(0, 1).flatten(1)
    torch.testing.assert_close(by_channel.mean(1), torch.zeros(64), rtol=0, atol=1e-4)
    torch.testing.assert_close(by_channel.std(1), torch.ones(64), rtol=0, atol=2e-2)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_by_name(norm):
    network, _ = built(NatureCNN, norm=norm, features_dim=7)
    assert network(images()).shape == (5, 7)
    network(images()).sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    convolutions = [i for i, layer in enumerate(network.cnn) if isinstance(layer, nn.Conv2d)]
    assert [type(network.cnn[i + 2]) for i in convolutions] == 3 * [nn.ReLU]
    assert len(mode_layers(network)) == (3 if norm in ("batch", "renorm") else 0)


def test_options_reach_the_norm():
    network, _ = built(NatureCNN, norm="batch", norm_options={"momentum": 0.01})
    assert {layer.momentum for layer in network.cnn if isinstance(layer, BatchNorm2d)} == {0.01}
    network, _ = built(NatureCNN, norm="group", norm_options={"groups": 4})
    assert network.cnn[1].num_groups == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_batch_norm": True, "norm": "layer"}, "give norm='layer' alone"),
        ({"norm": "batchnorm"}, "unknown norm"),
        ({"norm_options": {"momentum": 0.1}}, "give norm"),
        ({"norm": "batch", "norm_options": {"groups": 2}}, "cannot take these options"),
        ({"autocast": "float16"}, "unknown autocast"),
    ],
)
def test_what_is_refused(options, says):
    with pytest.raises(BatchproofError, match=says):
        NatureCNN(FRAMES, **options)


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN, QRDQN, SAC])
def test_agents_with_batch_norm_learn_save_and_load(tmp_path, algorithm):
    agent = model(algorithm, extractor=NatureCNN, use_batch_norm=True).learn(32)
    means = [v for k, v in agent.policy.state_dict().items() if k.endswith("running_mean")]
    assert len(means) >= 3
    assert any(mean.abs().max() > 0 for mean in means)
    agent.save(tmp_path / "agent.zip")
    again = algorithm.load(tmp_path / "agent.zip", device="cpu")
    state = again.policy.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in agent.policy.state_dict().items())
    obs, _ = Square("image").reset(seed=1)
    np.testing.assert_array_equal(
        agent.predict(obs, deterministic=True)[0], again.predict(obs, deterministic=True)[0]
    )


def test_a_shared_and_a_separate_extractor():
    shared = model(PPO, extractor=NatureCNN, use_batch_norm=True)
    kwargs = shared.policy_kwargs | {"share_features_extractor": False}
    separate = PPO(
        "CnnPolicy", Square("image", "discrete"), policy_kwargs=kwargs, batch_size=8, n_steps=8
    )
    assert len(mode_layers(separate.policy)) == 2 * len(mode_layers(shared.policy))


@pytest.mark.parametrize("options", [{}, {"use_batch_norm": True}])
def test_it_compiles_without_a_break(options):
    network, _ = built(NatureCNN, **options)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = images()
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)


def test_autocast_gives_float32_features_near_those_of_float32():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a CPU that emulates it
        low, _ = built(NatureCNN, autocast="bfloat16", use_batch_norm=True)
    network, _ = built(NatureCNN, use_batch_norm=True)
    x = images(8)
    y, expected = low(x), network(x)
    assert y.dtype == torch.float32
    assert not torch.equal(y, expected)
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()
    y.sum().backward()
    assert {p.grad.dtype for p in low.parameters()} == {torch.float32}


def test_autocast_warns_where_it_is_emulated(monkeypatch):
    monkeypatch.setattr(module.cpu, "has_bfloat16", lambda: False)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="slower than float32"):
        NatureCNN(FRAMES, autocast="bfloat16")
    for has in (True, None):  # None: nobody says
        monkeypatch.setattr(module.cpu, "has_bfloat16", lambda has=has: has)
        NatureCNN(FRAMES, autocast="bfloat16")


def audited(**options):
    agent = model(PPO, extractor=NatureCNN, **options).learn(64)
    report = audit(subject_from_model(agent, env=Square("image", "discrete"), count=64))
    return {rule.code for rule, _ in report.findings}


def test_the_audit_finds_nothing_off():
    assert audited() == set()


def test_the_audit_finds_the_rollouts_mismatch_on():
    found = audited(use_batch_norm=True)
    assert {"BP201", "BP205"} <= found
    # After so short a training the running statistics still lag behind the data.
    assert found <= {"BP201", "BP205", "BP402", "BP403"}
