"""BP2xx: what the mode does to the action, and claims A1, A2, A4 and A6."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from batchproof.clinic.rules import Examination, Status, audit
from batchproof.clinic.rules_modes import exponent, gap_by_batch_size, train_modes
from batchproof.clinic.subject import Subject, Transitions, fingerprint

_spec = importlib.util.spec_from_file_location(
    "planted_batch", Path(__file__).with_name("planted_batch.py")
)
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)

torch.set_num_threads(1)
OBS = planted.observations()


def outcomes_of(subject: Subject, *codes: str):
    before = fingerprint(subject)
    outcomes = audit(subject, only=codes or ["BP2"]).outcomes
    assert fingerprint(subject) == before
    return outcomes


def normed(norm: nn.Module, obs: torch.Tensor = OBS) -> Subject:
    """In eval mode, with running statistics equal to those of the observations."""
    return Subject.from_module(planted.settled(planted.mlp(norm), obs), obs, **planted.bounds())


def test_a1_train_batch_and_eval_alone_differ_and_eval_agrees_with_itself():
    subject = normed(nn.BatchNorm1d(32))
    outcomes = outcomes_of(subject, "BP101", "BP201")
    assert outcomes["BP101"].status is Status.PASS
    found = outcomes["BP201"].findings[0]
    assert outcomes["BP201"].status is Status.REVIEW
    net = subject.networks["policy"].double()
    with torch.no_grad():
        alone = torch.cat([net(OBS[i : i + 1].double()) for i in range(64)])
        trained = net.train()(OBS[:64].double())
    assert found.value == pytest.approx(float((trained - alone).abs().max()), rel=1e-5)
    assert found.floor < 1e-6 < found.value
    assert (found.network, found.first, found.largest) == ("policy", "1", "1")
    assert "% of the range" in found.effect


def test_a2_the_gap_shrinks_as_one_over_the_root_of_the_batch():
    obs = planted.observations(2048)
    subject = normed(nn.BatchNorm1d(32), obs)
    gaps = gap_by_batch_size(Examination(subject))
    assert list(gaps) == [2, 8, 32, 128]
    assert exponent(gaps) == pytest.approx(-0.5, abs=0.07)
    found = outcomes_of(subject, "BP201")["BP201"].findings[0]
    assert f"N^{exponent(gaps):.2f}" in found.effect


def test_a2_stale_statistics_leave_a_gap_that_does_not_shrink():
    subject = normed(nn.BatchNorm1d(32), planted.observations(2048))
    subject.networks["policy"][1].running_mean += 1.0
    assert exponent(gap_by_batch_size(Examination(subject))) > -0.2


@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.GroupNorm(4, 32), nn.RMSNorm(32)])
def test_a4_norms_over_features_have_no_gap(norm):
    outcomes = outcomes_of(normed(norm))
    assert outcomes["BP201"].status is Status.PASS
    assert "agree to 0" in outcomes["BP201"].reason
    assert outcomes["BP203"].status is Status.NOT_APPLICABLE


def test_a6_dropout_by_mode():
    subject = normed(nn.Dropout(0.5))
    in_eval = outcomes_of(subject)
    assert in_eval["BP202"].status is Status.PASS
    assert in_eval["BP201"].status is Status.REVIEW  # train mode acts with sub-networks
    assert in_eval["BP201"].findings[0].first == "1"
    gaps = gap_by_batch_size(Examination(subject))
    assert exponent(gaps) == pytest.approx(0, abs=0.1)  # masks do not average out in a batch
    subject.networks["policy"].train()
    in_train = outcomes_of(subject)
    assert in_train["BP202"].status is Status.FAIL
    assert in_train["BP202"].findings[0].first == "1"
    assert in_train["BP203"].status is Status.NOT_APPLICABLE


def test_two_sub_networks_of_one_layer_differ_by_what_the_finding_says():
    subject = planted.dropout_in_train_mode()
    found = outcomes_of(subject, "BP202")["BP202"].findings[0]
    with torch.no_grad():
        torch.manual_seed(1)
        first = subject.act(OBS[:64])
        torch.manual_seed(0)
        second = subject.act(OBS[:64])
    assert found.value == pytest.approx(float((first - second).abs().max()), rel=1e-5)


def test_dropout_of_zero_is_nothing():
    assert outcomes_of(normed(nn.Dropout(0.0)), "BP202")["BP202"].status is Status.NOT_APPLICABLE


def test_train_mode_left_on_is_one_failure_of_modes():
    outcomes = outcomes_of(planted.bn_in_train_mode())
    assert outcomes["BP203"].status is Status.FAIL
    assert outcomes["BP201"].status is Status.NOT_APPLICABLE
    assert "BP203" in outcomes["BP201"].reason


def test_mixed_modes_are_a_failure_of_bp201_alone():
    outcomes = outcomes_of(planted.one_norm_of_two_in_train_mode())
    assert outcomes["BP201"].status is Status.FAIL
    assert outcomes["BP203"].status is Status.NOT_APPLICABLE


def test_the_gap_is_split_by_layer():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(24, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32),
        nn.ReLU(), nn.Linear(32, 2),
    )  # fmt: skip
    planted.settled(net)
    net[4].running_mean += 3.0
    found = outcomes_of(Subject.from_module(net, OBS), "BP201")["BP201"].findings[0]
    assert (found.first, found.largest) == ("1", "4")
    assert "by layer: 4 " in found.effect


def test_a_norm_frozen_by_its_own_train_method_has_no_train_mode():
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True):
            super().train(mode)
            self[1].eval()
            return self

    net = planted.settled(planted.mlp(nn.BatchNorm1d(32)))
    frozen = Frozen(*net).eval()
    subject = Subject.from_module(frozen, OBS)
    assert not train_modes(subject)[id(frozen[1])]
    assert outcomes_of(subject, "BP201")["BP201"].status is Status.PASS


def test_a_function_that_switches_the_mode_itself_is_caught_in_the_act():
    net = planted.settled(planted.mlp(nn.BatchNorm1d(32)))

    def act(obs):
        net.train()
        return net(obs)

    subject = Subject.from_callable(act, OBS, networks={"actor": net})
    outcomes = outcomes_of(subject, "BP203", "BP204")
    assert outcomes["BP203"].status is Status.FAIL
    assert outcomes["BP203"].findings[0].first == "1"
    assert outcomes["BP204"].status is Status.FAIL
    assert "in train mode although it was in eval mode" in outcomes["BP204"].findings[0].message


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(
            nn.Linear(26, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1)
        )

    def forward(self, obs, action):
        return self.body(torch.cat([obs, action], 1))


@pytest.mark.parametrize("replayed", [True, False])
def test_the_critic_is_compared_on_its_own(replayed):
    actor, critic = planted.mlp().eval(), Critic().eval()
    transitions = Transitions(
        OBS, torch.rand(256, 2) * 2 - 1, torch.zeros(256), OBS, torch.zeros(256)
    )
    subject = Subject.from_networks(
        {"actor": actor, "critic": critic}, OBS, transitions=transitions if replayed else None
    )
    outcome = outcomes_of(subject, "BP201")["BP201"]
    assert outcome.status is Status.REVIEW
    (found,) = outcome.findings
    assert (found.network, found.first, found.site) == ("critic", "body.1", "critic")
    with torch.no_grad():
        action = transitions.action[:64] if replayed else actor(OBS[:64])
        gap = critic.train()(OBS[:64], action) - critic.eval()(OBS[:64], action)
    critic.body[1].reset_running_stats()
    assert found.value == pytest.approx(float(gap.abs().max()), rel=0.2)
    assert "in Q" in found.effect


def test_restored_modes_pass_and_flags_without_meaning_are_for_review():
    net = planted.settled(planted.mlp(nn.BatchNorm1d(32))).train()

    def careful(obs):
        net.eval()
        try:
            return net(obs)
        finally:
            net.train()

    subject = Subject.from_callable(careful, OBS, networks={"actor": net})
    assert outcomes_of(subject, "BP204")["BP204"].status is Status.PASS

    plain = planted.mlp().train()
    subject = Subject.from_callable(lambda x: plain.eval()(x), OBS, networks={"actor": plain})
    assert outcomes_of(subject, "BP204")["BP204"].status is Status.REVIEW


def test_a_librarys_habit_of_leaving_eval_mode_passes():
    net = planted.settled(planted.mlp(nn.BatchNorm1d(32))).train()
    subject = Subject.from_callable(
        lambda x: net.eval()(x), OBS, networks={"actor": net}, model=object()
    )
    assert outcomes_of(subject, "BP204")["BP204"].status is Status.PASS


class GaussianPolicy(nn.Module):
    """The interface of Stable-Baselines3's ActorCriticPolicy, without the library."""

    def __init__(self, *between: nn.Module, std: float = 0.5) -> None:
        super().__init__()
        self.body = planted.mlp(*between)[:3] if not between else planted.mlp(*between)[:4]
        self.log_std = nn.Parameter(torch.full((2,), std).log())

    def distribution(self, obs):
        return torch.distributions.Normal(self.body(obs), self.log_std.exp())

    def forward(self, obs):
        law = self.distribution(obs)
        action = law.sample()
        return action, torch.zeros(len(action)), law.log_prob(action).sum(1)

    def evaluate_actions(self, obs, actions):
        law = self.distribution(obs)
        return torch.zeros(len(obs)), law.log_prob(actions).sum(1), law.entropy().sum(1)


def ratio_subject(policy: GaussianPolicy) -> Subject:
    planted.settled(policy.body)
    return Subject.from_callable(
        lambda x: policy.body(x), OBS, networks={"policy": policy.eval()}, name="gaussian"
    )


@pytest.mark.parametrize("layers", [(), (nn.LayerNorm(32),)])
def test_the_first_ratio_is_one_without_batch_norm(layers):
    outcome = outcomes_of(ratio_subject(GaussianPolicy(*layers)), "BP205")["BP205"]
    assert outcome.status is Status.PASS
    assert "KL 0" in outcome.reason


def test_the_first_ratio_with_batch_norm_against_the_gaussian_formula():
    policy = GaussianPolicy(nn.BatchNorm1d(32))
    subject = ratio_subject(policy)
    policy.body[1].running_mean += 0.5
    outcome = outcomes_of(subject, "BP205")["BP205"]
    found = outcome.findings[0]
    assert outcome.status is Status.FAIL
    assert (found.network, found.first) == ("policy", "body.1")
    with torch.no_grad():
        torch.manual_seed(0)
        action = policy(OBS)[0].double()
        x = OBS.double()
        policy.double()
        evaluated = policy.body(x)
        trained = policy.body.train()(x)
        square = ((action - evaluated) ** 2 - (action - trained) ** 2).sum(1)
        ratio = (square / (2 * 0.5**2)).exp()
    assert found.value == pytest.approx(float((ratio - 1).abs().max()), rel=1e-4)
    kl = float((ratio - 1 - ratio.log()).mean())
    assert f"KL {kl:.3g} and {float(((ratio - 1).abs() > 0.2).double().mean()):.0%}" in found.effect


def test_a_small_first_ratio_is_a_matter_for_review():
    policy = GaussianPolicy(nn.BatchNorm1d(32), std=20.0)
    assert outcomes_of(ratio_subject(policy), "BP205")["BP205"].status is Status.REVIEW


def test_policies_without_log_probabilities_have_no_ratio():
    outcome = outcomes_of(normed(nn.LayerNorm(32)), "BP205")["BP205"]
    assert outcome.status is Status.NOT_APPLICABLE


@pytest.mark.parametrize("algorithm", ["PPO", "A2C"])
def test_the_first_ratio_of_stable_baselines3(algorithm):
    pytest.importorskip("stable_baselines3")
    with_norm, obs = planted._sb3(algorithm, lambda: nn.BatchNorm1d(16))
    without, _ = planted._sb3(algorithm, nn.Identity)
    for model, expected in ((with_norm, Status.FAIL), (without, Status.PASS)):
        subject = Subject.from_callable(
            lambda x, m=model: m.policy.get_distribution(x).distribution.mean,
            torch.as_tensor(obs),
            networks={"policy": model.policy},
            model=model,
        )
        outcome = outcomes_of(subject, "BP205")["BP205"]
        assert outcome.status is expected, (outcome.reason, outcome.findings)
        if expected is Status.FAIL:
            assert outcome.findings[0].first == "features_extractor.body.1"


@pytest.mark.parametrize("name", [n for n in planted.PLANTED if n.startswith("SB3")])
def test_planted_defect_in_stable_baselines3(name):
    pytest.importorskip("batchproof.sb3.adapter")
    build, code, layer = planted.PLANTED[name]
    outcome = outcomes_of(build(), code)[code]
    assert outcome.status is Status.FAIL, outcome.reason
    assert layer in f"{outcome.findings[0].network}.{outcome.findings[0].first}"


def test_subjects_without_networks_have_no_modes():
    outcomes = outcomes_of(Subject.from_callable(lambda x: x.tanh(), OBS))
    assert {o.status for o in outcomes.values()} == {Status.NOT_APPLICABLE}
