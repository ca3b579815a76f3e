"""BP4xx: each rule fires on what it speaks about, and on nothing else."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from batchproof.clinic import Status, Subject, rules_statistics
from batchproof.clinic.fold import fold
from batchproof.clinic.rules import RULES, Examination
from batchproof.clinic.subject import fingerprint, unchanged

_path = Path(__file__).with_name("planted_slots.py")
_spec = importlib.util.spec_from_file_location("planted_slots", _path)
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)
OwnNorm, policy_subject, trained_policy = (
    planted.OwnNorm,
    planted.policy_subject,
    planted.trained_policy,
)

CODES = [f"BP40{i}" for i in range(1, 9)]
FAIL, REVIEW, PASS = Status.FAIL, Status.REVIEW, Status.PASS
NOT_APPLICABLE, SKIPPED = Status.NOT_APPLICABLE, Status.SKIPPED
DEFECTS = {name: entry for name, entry in planted.PLANTED.items() if entry[1].startswith("BP4")}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(subject, *codes):
    """Outcomes of some rules, which leave the subject as it was."""
    before = fingerprint(subject)
    examination = Examination(subject)
    outcomes = []
    for code in codes:
        with unchanged(subject):
            outcomes.append(RULES[code].check(examination))
    assert fingerprint(subject) == before
    return outcomes[0] if len(codes) == 1 else outcomes


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found_with_its_layer(name):
    build, code, layer = DEFECTS[name]
    outcome = check(build(), code)
    assert outcome.status in (FAIL, REVIEW)
    assert layer in {f"{f.network}.{f.first}" for f in outcome.findings}
    assert all(f.message and f.largest for f in outcome.findings)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, OwnNorm], ids=["bn", "own"])
def test_sound_statistics(norm):
    subject = policy_subject(trained_policy(norm))
    assert [o.status for o in check(subject, *CODES)] == [PASS] * 8


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.Identity], ids=["layer", "none"])
def test_without_running_statistics_only_finiteness_is_asked(norm):
    outcomes = check(policy_subject(trained_policy(norm)), *CODES)
    found = dict(zip(CODES, (o.status for o in outcomes), strict=True))
    assert found.pop("BP404") is PASS
    assert set(found.values()) == {NOT_APPLICABLE}


def test_sound_statistics_of_feature_maps():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)
    )
    obs = torch.rand(64, 3, 8, 8)
    with torch.no_grad():
        for _ in range(100):
            net(obs)
    outcomes = check(Subject.from_module(net.eval(), obs), *CODES)
    assert [o.status for o in outcomes] == [PASS] * 8


@pytest.mark.parametrize("code", CODES)
def test_pages_are_whole(code):
    page = RULES[code]
    assert all((page.what, page.detected, page.why, page.mend))


def test_a_learner_with_synced_statistics_fails_nothing():
    outcomes = check(planted.Learner().subject(updates=100), *CODES)
    assert {c for c, o in zip(CODES, outcomes, strict=True) if o.status is FAIL} == set()


# ---------------------------------------------------------------------------------------- BP401


def test_a_fresh_policy_is_for_a_person_to_look():
    assert check(policy_subject(planted.Actor().eval()), "BP401").status is REVIEW


def test_a_fresh_model_of_a_library_is_not_spoken_about():
    subject = policy_subject(planted.Actor().eval())
    fresh = replace(subject, model=SimpleNamespace(_n_updates=0, num_timesteps=0))
    assert check(fresh, "BP401").status is NOT_APPLICABLE
    updated = replace(subject, model=SimpleNamespace(_n_updates=5, num_timesteps=9))
    assert check(updated, "BP401").status is FAIL


def folded_actor():
    """A trained actor whose norm was folded and left in its place; all else is as trained."""
    actor = trained_policy(nn.BatchNorm1d)
    with torch.no_grad():
        actor.net[1].weight.uniform_(0.5, 1.5)
        actor.net[1].bias.uniform_(-0.5, 0.5)
    assert len(fold(policy_subject(actor), keep_layers=True)) == 1
    return actor


TRAINED = SimpleNamespace(_n_updates=5, num_timesteps=9)


def test_a_folded_layer_has_no_statistics_to_update():
    subject = replace(policy_subject(folded_actor()), model=TRAINED)
    outcome = check(subject, "BP401")
    assert outcome.status is PASS
    assert outcome.reason == "policy.net.1: folded into the layer before"


@pytest.mark.parametrize("tracked", [0, 100])
def test_a_neutral_layer_that_nobody_folded_still_fails(tracked):
    """Mean +0: whatever its counter says, its scale 1 and shift 0 are those of a fresh layer."""
    actor = folded_actor()
    actor.net[1].reset_parameters()
    actor.net[1].num_batches_tracked.fill_(tracked)
    assert check(replace(policy_subject(actor), model=TRAINED), "BP401").status is FAIL


def test_a_fresh_layer_beside_a_folded_one_fails():
    actor = folded_actor()
    late = nn.Sequential(actor.net, nn.BatchNorm1d(2)).eval()
    subject = replace(Subject.from_module(late, planted.batch().obs), model=TRAINED)
    outcome = check(subject, "BP401")
    assert outcome.status is FAIL
    assert [f.first for f in outcome.findings] == ["1"]


# ---------------------------------------------------------------------------------------- BP402


@pytest.mark.parametrize("rho", [0.01, 0.1])
def test_an_average_over_batches_is_not_stale(rho):
    """Its own noise and that of the sample stay below the threshold, for Gaussian inputs."""
    for seed in range(5):
        torch.manual_seed(seed)
        actor = planted.Actor(lambda n: nn.BatchNorm1d(n, momentum=rho))
        with torch.no_grad():
            for step in range(int(10 / rho)):
                actor(planted.batch(64, seed=1000 * seed + step).obs)
        subject = policy_subject(actor.eval(), planted.batch(64, seed=77 + seed).obs)
        assert check(subject, "BP402").status is PASS


@pytest.mark.parametrize(("shift", "status"), [(0.0, PASS), (3.0, REVIEW), (20.0, FAIL)])
def test_shifted_observations(shift, status):
    """In units of the layer's input, whose standard deviations are near 1/2."""
    actor = trained_policy(nn.BatchNorm1d)
    actor.net[1].running_mean += shift * actor.net[1].running_var.sqrt()
    outcome = check(policy_subject(actor), "BP402")
    assert outcome.status is status
    if shift:
        assert outcome.findings[0].value == pytest.approx(shift, rel=0.2)


@pytest.mark.parametrize(("shift", "status"), [(0.0, PASS), (3.0, SKIPPED), (20.0, FAIL)])
def test_an_off_policy_agents_own_states_show_gross_errors_alone(shift, status):
    """Its statistics are those of its replay: what they are of can not be compared with these."""
    subject = planted.Learner().subject(updates=100)
    norm = subject.networks["critic"].net[4]
    norm.running_mean += shift * norm.running_var.sqrt()
    assert check(subject, "BP402").status is (REVIEW if shift == 3 else status)
    outcome = check(replace(subject, collected=True), "BP402")
    assert outcome.status is status
    assert shift != 3 or "replay" in outcome.reason
    alone = replace(subject, collected=True, critic=None)  # on-policy: its states are these
    assert check(alone, "BP402").status is not SKIPPED


def test_stale_statistics_of_a_critic_are_told_in_td_units():
    learner = planted.Learner()
    subject = learner.subject(updates=100)
    learner.networks["critic"].net[4].running_var *= 1e4
    outcome = check(subject, "BP402")
    assert outcome.status is FAIL
    assert outcome.findings[0].first == "net.4"
    assert "% of the reward scale" in outcome.findings[0].effect


# ---------------------------------------------------------------------------------------- BP403


def test_a_heavy_tail_is_not_a_few_rows():
    """Laplace inputs: outliers in the robust sense, without much of the variance."""
    draw = torch.distributions.Laplace(0.0, 1.0)
    torch.manual_seed(0)
    obs = draw.sample((512, planted.OBS))
    assert check(policy_subject(trained_policy(nn.BatchNorm1d, obs), obs), "BP403").status is PASS


def test_statistics_that_did_not_follow_the_outliers():
    obs = planted.batch().obs.clone()
    actor = trained_policy(nn.BatchNorm1d, obs)
    obs[:4] *= 1000
    assert check(policy_subject(actor, obs), "BP403").status is PASS


def test_outliers_ask_for_enough_rows():
    obs = planted.batch().obs[:16]
    subject = policy_subject(trained_policy(nn.BatchNorm1d, obs), obs)
    assert check(subject, "BP403").status is SKIPPED


# ---------------------------------------------------------------------------------------- BP404


def test_infinite_masks_are_meant():
    class Masked(planted.Actor):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((3,), -math.inf))

    assert check(policy_subject(Masked().eval()), "BP404").status is PASS


def test_every_broken_module_is_named():
    actor = trained_policy(nn.BatchNorm1d)
    with torch.no_grad():
        actor.net[0].weight[0, 0] = math.inf
        actor.net[1].running_mean[0] = math.nan
    outcome = check(policy_subject(actor), "BP404")
    assert [f.first for f in outcome.findings] == ["net.0", "net.1"]
    assert "1 infinite of 64 values" in outcome.findings[0].message


# ---------------------------------------------------------------------------------------- BP405


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.1])
def test_eps_is_measured(eps):
    subject = policy_subject(trained_policy(lambda n: nn.BatchNorm1d(n, eps=eps)))
    (layer,) = Examination(subject).layers
    assert rules_statistics.eps_of(layer) == pytest.approx(eps, rel=1e-6)


def test_a_larger_eps_does_not_amplify():
    def actor(eps):
        actor = trained_policy(lambda n: nn.BatchNorm1d(n, eps=eps))
        actor.net[1].running_var[5] = 0
        return policy_subject(actor)

    assert check(actor(1e-3), "BP405").status is PASS  # what the rule says to do, and CrossQ's
    outcome = check(actor(1e-5), "BP405")
    assert outcome.findings[0].value == pytest.approx(1e5**0.5, rel=1e-6)


# ---------------------------------------------------------------------------------------- BP406


@pytest.mark.parametrize("rho", [0.003, 0.1, 1.0])
def test_momentum_is_measured(rho):
    for norm in (lambda n: nn.BatchNorm1d(n, momentum=rho), lambda n: OwnNorm(n, rho)):
        (layer,) = Examination(policy_subject(trained_policy(norm))).layers
        first, second = rules_statistics.measured_momentum(layer)
        assert first == pytest.approx(rho, rel=1e-6)
        assert second == pytest.approx(rho, rel=1e-6) or rho == 1.0


def test_momentum_against_the_batch():
    """sqrt(.1 / 1.9 / 4) = .115, sqrt(.1 / 1.9 / 8) = .081."""
    subject = policy_subject(trained_policy(nn.BatchNorm1d))
    outcome = check(replace(subject, model=SimpleNamespace(batch_size=4)), "BP406")
    assert outcome.findings[0].value == pytest.approx((0.1 / 1.9 / 4) ** 0.5, rel=1e-6)
    fine = check(replace(subject, model=SimpleNamespace(batch_size=8)), "BP406")
    assert fine.status is PASS


def test_momentum_against_the_horizon():
    """.99^40 = .67 of the statistics are older than the last use."""
    subject = policy_subject(trained_policy(lambda n: nn.BatchNorm1d(n, momentum=0.01)))
    assert check(replace(subject, momentum_horizon=100), "BP406").status is PASS
    outcome = check(replace(subject, momentum_horizon=40), "BP406")
    assert outcome.status is REVIEW
    assert outcome.findings[0].value == pytest.approx(0.99**40, rel=1e-6)


# ---------------------------------------------------------------------------------------- BP407


def test_an_update_on_single_rows():
    subject = planted.Learner(critic=planted.Critic(OwnNorm), actor=nn.LayerNorm, rows=1).subject(
        updates=1
    )
    outcome = check(subject, "BP407")
    assert outcome.status is FAIL
    assert any(f.site == "update" for f in outcome.findings)
    assert outcome.findings[-1].network == "critic"


def test_unbiased_variance_of_one_row():
    class Unbiased(OwnNorm):
        def forward(self, x):
            if self.training:
                self.centre += self.rho * (x.mean(0).detach() - self.centre)
                self.width += self.rho * (x.var(0, correction=len(x) > 1).detach() - self.width)
                self.width += 0 if len(x) > 1 else math.nan
            return (x - self.centre) / (self.width + 1e-5).sqrt()

    torch.manual_seed(0)
    actor = planted.Actor(Unbiased)
    with torch.no_grad():
        actor(planted.batch().obs[:1])
    outcome = check(policy_subject(actor.eval()), "BP407")
    assert outcome.status is FAIL
    assert "width is NaN" in outcome.findings[0].message


# ---------------------------------------------------------------------------------------- BP408


def test_equal_observations_say_nothing_about_features():
    obs = torch.zeros(32, planted.OBS)
    subject = policy_subject(trained_policy(nn.BatchNorm1d), obs)
    assert check(subject, "BP408").status is NOT_APPLICABLE


def test_share_of_dead_features():
    actor = trained_policy(nn.BatchNorm1d)
    with torch.no_grad():
        actor.net[1].bias[:10] = -20
    outcome = check(policy_subject(actor), "BP408")
    assert outcome.status is REVIEW
    assert outcome.findings[0].value == pytest.approx(10 / 16)
    assert "net.2" in outcome.findings[0].message
