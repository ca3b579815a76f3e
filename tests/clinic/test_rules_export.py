"""BP6xx: what save, load and export lose."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from stable_baselines3 import PPO, TD3
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from batchproof.clinic.rules import RULES, Examination, Status, audit
from batchproof.clinic.subject import Subject, fingerprint

torch.set_num_threads(1)

_path = Path(__file__).with_name("planted_export.py")
_spec = importlib.util.spec_from_file_location("planted_export", _path)
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)

EXPORTS = ("BP602", "BP603")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra onnx",
)


def outcome(subject, code):
    before = fingerprint(subject)
    result = audit(subject, only=[code]).outcomes[code]
    assert fingerprint(subject) == before
    return result


@pytest.mark.parametrize("name", planted.PLANTED)
def test_planted_defect_is_found(name):
    build, code, layer = planted.PLANTED[name]
    result = outcome(build(), code)
    assert result.status is Status.FAIL, result.reason
    found = result.findings[0]
    text = f"{found.network}.{found.first} {found.network}.{found.largest} {found.site}"
    assert layer in text
    assert found.value > found.threshold


@pytest.mark.parametrize("code", ["BP601", *EXPORTS])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(8), planted.PlainStatistics(8, persistent=True)], ids=["torch", "own"]
)
def test_healthy_batch_norm_passes(norm, code):
    result = outcome(planted.module_subject(norm), code)
    assert result.status is Status.PASS, (result.reason, result.findings)


def test_state_that_is_nan_is_not_lost():
    """Asked on its own: an audit leaves such a policy to BP404."""
    subject = planted.module_subject(nn.BatchNorm1d(8))
    subject.networks["policy"].register_buffer("late", torch.tensor([math.nan]), persistent=False)
    norm = next(m for m in subject.networks["policy"].modules() if hasattr(m, "running_var"))
    norm.running_var[0] = math.nan
    assert RULES["BP601"].check(Examination(subject)).status is Status.PASS


@pytest.mark.parametrize("code", [*EXPORTS, "BP604"])
def test_exports_are_not_tried_without_a_layer_that_could_differ(code):
    network = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    subject = Subject.from_module(network, planted.observations())
    result = outcome(subject, code)
    assert result.status is Status.NOT_APPLICABLE
    assert result.seconds < 0.5


def test_lost_statistics_are_measured_as_the_output_change_of_a_fresh_layer():
    subject = planted.module_subject(planted.PlainStatistics(8))
    network = subject.networks["policy"]
    result = outcome(subject, "BP601")
    with torch.no_grad():
        before = network(subject.obs)
        norm = network[1]
        kept = norm.mean, norm.var
        norm.mean, norm.var = torch.zeros(8), torch.ones(8)
        expected = float((network(subject.obs) - before).abs().max())
        norm.mean, norm.var = kept
    assert result.findings[0].value == pytest.approx(expected, rel=1e-5)
    assert "1.mean" in result.findings[0].message
    assert "1.var" in result.findings[0].message


def test_state_that_no_output_depends_on_is_for_review():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("passes", torch.zeros(()), persistent=False)

        def forward(self, x):
            if self.training:
                self.passes += 1
            return self.linear(x)

    module = Counting().eval()
    module.passes += 3
    result = outcome(Subject.from_module(module, planted.observations()), "BP601")
    assert result.status is Status.REVIEW
    assert "passes" in result.findings[0].message


def test_an_untrained_network_is_warned_about_what_it_will_lose():
    network = planted.policy(planted.PlainStatistics(8))
    result = outcome(Subject.from_module(network, planted.observations()), "BP601")
    assert result.status is Status.REVIEW
    assert "once the network has trained" in result.findings[0].message
    healthy = planted.policy(nn.BatchNorm1d(8))
    assert (
        outcome(Subject.from_module(healthy, planted.observations()), "BP601").status is Status.PASS
    )


def test_constants_and_caches_are_not_lost_state():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]), persistent=False)
            self.last = None

        def forward(self, x):
            self.last = self.linear(x * self.scale).detach()
            return self.linear(x * self.scale)

    module = Positions().eval()
    module(planted.observations(n=4))
    result = outcome(Subject.from_module(module, planted.observations()), "BP601")
    assert result.status is Status.PASS


def test_a_state_dict_that_leaves_out_a_parameter_fails():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x)

        def _save_to_state_dict(self, *args):
            super()._save_to_state_dict(*args)

        def state_dict(self, *args, **kwargs):
            state = super().state_dict(*args, **kwargs)
            return {key: value for key, value in state.items() if "bias" not in key}

    result = outcome(Subject.from_module(Forgetful(), planted.observations()), "BP601")
    assert result.status is Status.FAIL
    assert "cannot be loaded back" in result.findings[0].message


class Extractor(BaseFeaturesExtractor):
    """Features through a norm that is lost, or kept, when Stable-Baselines3 saves."""

    def __init__(self, space, norm="batch"):
        super().__init__(space, 8)
        width = space.shape[0]
        kinds = {"batch": nn.BatchNorm1d, "plain": planted.PlainStatistics}
        self.norm = kinds[norm](width)
        self.linear = nn.Linear(width, 8)

    def forward(self, x):
        return self.linear(self.norm(x))


def sb3_subject(kind, norm):
    kwargs = {
        "features_extractor_class": Extractor,
        "features_extractor_kwargs": {"norm": norm},
        "net_arch": [8],
    }
    options = {"buffer_size": 100} if kind is TD3 else {"n_steps": 8, "batch_size": 8}
    model = kind("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, seed=0, device="cpu", **options)
    obs = 2 * planted.observations() + 1
    networks = (
        {"actor": model.policy.actor, "critic": model.policy.critic}
        if kind is TD3
        else {"policy": model.policy}
    )
    model.policy.set_training_mode(True)
    with torch.no_grad():
        for _ in range(5):
            for network in networks.values():
                network.extract_features(obs, *_extractors(network))
    model.policy.set_training_mode(False)

    def act(batch):
        return torch.as_tensor(model.predict(batch.numpy(), deterministic=True)[0])

    def policy(batch):
        return model.policy.actor(batch) if kind is TD3 else model.policy(batch, True)[0]

    return Subject(
        name=kind.__name__, networks=networks, obs=obs, act=act, policy=policy, model=model
    )


def _extractors(network):
    return [network.features_extractor] if not hasattr(network, "action_net") else []


@pytest.mark.parametrize("kind", [TD3, PPO])
def test_stable_baselines3_round_trip(kind):
    healthy, broken = sb3_subject(kind, "batch"), sb3_subject(kind, "plain")
    assert outcome(healthy, "BP601").status is Status.PASS
    result = outcome(broken, "BP601")
    assert result.status is Status.FAIL, result.reason
    assert "features_extractor.norm" in result.findings[0].first


def test_a_model_whose_networks_were_changed_by_hand_cannot_be_loaded():
    subject = sb3_subject(TD3, "batch")
    subject.networks["actor"].features_extractor.linear = nn.Sequential(nn.Linear(3, 8), nn.ReLU())
    result = outcome(subject, "BP601")
    assert result.status is Status.FAIL
    assert "cannot be loaded" in result.findings[0].message


@pytest.mark.parametrize("code", EXPORTS)
@pytest.mark.parametrize("kind", [TD3, PPO])
def test_stable_baselines3_policies_export_as_they_act(kind, code):
    subject = sb3_subject(kind, "batch")
    subject.model.policy.set_training_mode(True)  # as learn() leaves it; predict() acts in eval
    result = outcome(subject, code)
    assert result.status in (Status.PASS, Status.SKIPPED), result.findings
    if kind is TD3:
        assert result.status is Status.PASS, result.reason


@pytest.mark.parametrize("code", EXPORTS)
def test_dict_observations_and_dropout(code):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)
            )

        def forward(self, obs):
            return self.net(torch.cat([obs["a"], obs["b"]], 1))

    obs = {"a": torch.randn(30, 3), "b": torch.randn(30, 1)}
    result = outcome(Subject.from_module(Two().eval(), obs), code)
    assert result.status is Status.PASS, (result.reason, result.findings)


@needs_onnx
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), planted.PlainStatistics(8)])
def test_the_onnx_file_of_a_healthy_policy_passes(norm):
    result = outcome(planted.module_subject(norm), "BP604")
    assert result.status is Status.PASS, (result.reason, result.findings)


@needs_onnx
def test_an_onnx_file_of_a_policy_in_train_mode_fails():
    build, _, _ = planted.PLANTED["torch.export of a policy in train mode"]
    result = outcome(build(), "BP604")
    assert result.status is Status.FAIL, result.reason
    assert "run on 64" in result.findings[0].message


def test_onnx_waits_to_be_asked_for():
    result = audit(planted.module_subject(nn.BatchNorm1d(8))).outcomes["BP604"]
    assert result.status is Status.SKIPPED
    assert "--only BP604" in result.reason


def test_missing_onnx_packages_are_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "onnx" in name else find_spec(name)
    )
    result = outcome(planted.module_subject(nn.BatchNorm1d(8)), "BP604")
    assert result.status is Status.SKIPPED
    assert "batchproof[onnx]" in result.reason
