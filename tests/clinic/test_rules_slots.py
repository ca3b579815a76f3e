"""BP3xx: each rule fires on what it speaks about, and on nothing else."""

import copy
import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from batchproof.clinic import Status, Subject, rules_slots
from batchproof.clinic.rules import RULES, Examination
from batchproof.clinic.subject import fingerprint, unchanged

_path = Path(__file__).with_name("planted_slots.py")
_spec = importlib.util.spec_from_file_location("planted_slots", _path)
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)
Learner, Critic, OwnNorm = planted.Learner, planted.Critic, planted.OwnNorm

CODES = [f"BP30{i}" for i in range(1, 9)]
FAIL, REVIEW, PASS = Status.FAIL, Status.REVIEW, Status.PASS
NOT_APPLICABLE, SKIPPED = Status.NOT_APPLICABLE, Status.SKIPPED


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


def healthy(**options):
    return Learner(**options).subject(updates=20)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, OwnNorm, nn.LayerNorm, nn.Identity])
def test_nothing_fails_on_a_healthy_learner(norm):
    """Statistics synced, targets in eval mode, the critic in E in the actor's loss."""
    outcomes = check(healthy(actor=norm, critic=Critic(norm)), *CODES)
    assert {c: o.status for c, o in zip(CODES, outcomes, strict=True) if o.findings} == {}
    assert not any(o.status is SKIPPED for o in outcomes)
    if norm in (nn.LayerNorm, nn.Identity):
        assert {o.status for o in outcomes} == {NOT_APPLICABLE}


@pytest.mark.parametrize("code", CODES)
def test_a_plain_policy_is_not_spoken_about(code):
    subject = planted.policy_subject(planted.trained_policy(nn.BatchNorm1d))
    assert check(subject, code).status is NOT_APPLICABLE


@pytest.mark.parametrize("code", CODES)
def test_pages_are_whole(code):
    page = RULES[code]
    assert all((page.what, page.detected, page.why, page.mend))


# --------------------------------------------------------------------------- BP301 and BP302


@pytest.mark.parametrize("update", [True, False])
def test_statistics_that_never_follow(update):
    never, in_part = check(Learner(sync="none").subject(update=update), "BP301", "BP302")
    assert never.status is FAIL
    assert {f.network for f in never.findings} == {"actor_target", "critic_target"}
    assert in_part.status is PASS


def test_statistics_that_follow_slowly_are_synced():
    """Polyak averaging of buffers is a way to sync."""

    class Averaging(Learner):
        def _follow(self, target, online):
            pairs = zip(target.state_dict().values(), online.state_dict().values(), strict=True)
            for t, o in pairs:
                t.lerp_(o, 0.01) if t.is_floating_point() else t.copy_(o)

    never, in_part = check(Averaging().subject(), "BP301", "BP302")
    assert (never.status, in_part.status) == (PASS, PASS)


def test_statistics_that_a_name_leaves_out():
    learner = Learner(critic=Critic(second=OwnNorm), sync="running_")
    never, in_part = check(learner.subject(), "BP301", "BP302")
    assert never.status is PASS
    assert in_part.status is FAIL
    assert "net.4.centre" in in_part.findings[0].message
    assert in_part.findings[0].first == "net.4"


def test_a_target_that_moves_its_own_statistics_has_not_received_them():
    """In train mode the target's buffers move too, but not towards the online ones."""
    learner = Learner(sync="none", target_training=True)
    never = check(learner.subject(), "BP301")
    assert "critic_target" in {f.network for f in never.findings}


def test_untrained_targets_say_nothing():
    assert check(Learner().subject(updates=0, update=False), "BP301").status is NOT_APPLICABLE


# ---------------------------------------------------------------------------------------- BP303


@pytest.mark.parametrize("update", [True, False])
def test_target_in_train_mode(update):
    outcome = check(Learner(target_training=True).subject(update=update), "BP303")
    assert outcome.status is FAIL
    (finding,) = outcome.findings
    assert (finding.network, finding.first) == ("critic_target", "net.1")
    assert "slot 5" in finding.site
    assert "TD-target units" in finding.effect


def test_target_of_layer_norm_may_be_in_train_mode():
    learner = Learner(actor=nn.LayerNorm, critic=Critic(nn.LayerNorm), target_training=True)
    assert check(learner.subject(), "BP303").status is NOT_APPLICABLE


# ---------------------------------------------------------------------------------------- BP304


def renorm(features):
    layers = pytest.importorskip("sb3_contrib.common.torch_layers")
    return layers.BatchRenorm1d(features, warmup_steps=5)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, OwnNorm, renorm], ids=["bn", "own", "renorm"])
def test_critic_in_train_mode_in_the_actors_loss(norm):
    outcome = check(Learner(critic=Critic(norm), policy_q="T").subject(), "BP304")
    assert outcome.status is FAIL
    (finding,) = outcome.findings
    assert "cannot show the actor a common shift of the action" in finding.message
    assert finding.site == "slot 3 policy_q"
    assert (finding.network, finding.first) == ("critic", "net.1")
    assert finding.value < 1e-9


def test_the_lost_gradient_is_the_slope_with_running_statistics():
    """By finite differences: mean Q in eval mode, all actions shifted at once."""
    learner = Learner(policy_q="T")
    subject = learner.subject()
    (finding,) = check(subject, "BP304").findings
    obs, action = rules_slots._policy_batch(Examination(subject))
    critic = copy.deepcopy(learner.networks["critic"]).double().eval()
    slopes = []
    with torch.no_grad():
        for step in 1e-6 * torch.eye(2, dtype=torch.float64):
            up, down = (critic(obs.double(), action.double() + s).mean() for s in (step, -step))
            slopes.append(float((up - down).abs() / 2e-6))
    slope = float(re.search(r"changes Q by (\S+) ", finding.effect)[1])
    assert slope == pytest.approx(sum(slopes) / 2, rel=1e-2)


def test_without_an_update_it_is_for_a_person_to_look():
    outcome = check(Learner(policy_q="T").subject(update=False), "BP304")
    assert outcome.status is REVIEW
    assert "if your actor's loss runs the critic in train mode" in outcome.findings[0].message


def test_norm_before_the_action_shows_the_common_shift():
    """DDPG's placement: measured, not assumed."""
    outcome = check(Learner(critic=planted.BeforeAction(), policy_q="T").subject(), "BP304")
    assert outcome.status is PASS
    assert "kappa" in outcome.reason


def test_running_statistics_in_slot_3_pass():
    assert "mode E" in check(healthy(), "BP304").reason


def test_critic_without_transitions():
    """States and actions are enough."""
    subject = replace(Learner(policy_q="T").subject(update=False), transitions=None)
    assert check(subject, "BP304").status is REVIEW
    assert check(replace(subject, critic_actor=None), "BP304").status is SKIPPED


# --------------------------------------------------------------------------- BP305 and BP306


def test_a_joint_forward_over_the_pool_has_no_bias():
    """The reference's statistics are the joint batch's own."""
    subject = Learner(targets=False, joint=True).subject()
    examination = Examination(subject)
    with unchanged(subject):
        slots = rules_slots._slots(examination)
        assert "".join(slots.modes.values()) == "EJJ"
        bias = rules_slots.measured_bias(examination, slots)
    assert abs(bias.target) < 1e-5
    assert abs(bias.current) < 1e-5
    assert bias.action == 0


def test_bias_against_a_reference_by_momentum_one():
    """B3: the TD error is wrong by a measurable amount.

    The reference here is a copy whose layers took over the statistics of one pass over
    (s, a) and (s', a').
    """
    learner = Learner(critic=Critic(second=nn.Identity), target_training=True)
    subject = learner.subject()
    data, examination = learner.data, Examination(subject)
    with unchanged(subject):
        bias = rules_slots.measured_bias(examination, rules_slots._slots(examination))
        networks = copy.deepcopy(learner.networks)
        for network in networks.values():
            network.eval()
        with torch.no_grad():
            following = networks["actor_target"](data.next_obs)
            q = networks["critic"].train()(data.obs, data.action)
            next_q = networks["critic_target"].train()(data.next_obs, following)
            for role in ("critic", "critic_target"):
                networks[role].net[1].momentum = 1.0
                both = torch.cat([data.obs, data.next_obs])
                networks[role].train()(both, torch.cat([data.action, following]))
                networks[role].eval()
            q_ref = networks["critic"](data.obs, data.action)
            next_ref = networks["critic_target"](data.next_obs, following)
    assert bias.target == pytest.approx(0.9 * float((next_q - next_ref).mean()), abs=2e-4)
    assert bias.current == pytest.approx(-float((q - q_ref).mean()), abs=2e-4)
    assert abs(bias.target) > 1e-3


def test_bias_of_a_target_with_foreign_statistics():
    outcome = check(planted.far_target(), "BP305")
    assert outcome.status is REVIEW
    assert outcome.findings[0].site == "slot 5 target_q"
    assert outcome.findings[0].network == "critic_target"


def test_bias_is_not_measured_without_transitions():
    subject = replace(Learner().subject(update=False), transitions=None)
    assert [o.status for o in check(subject, "BP305", "BP306")] == [SKIPPED, SKIPPED]


def test_mixture_mismatch():
    """Next states are elsewhere than states, and the critic depends on them."""

    subject = planted.next_states_elsewhere
    assert check(subject(0.0), "BP306").status is PASS
    outcome = check(subject(4.0), "BP306")
    assert outcome.status is REVIEW
    assert outcome.findings[0].value > 2
    joint = check(subject(4.0, targets=False, joint=True), "BP306")
    assert joint.status is PASS
    assert "one forward" in joint.reason


# ---------------------------------------------------------------------------------------- BP307


def test_joint_forward():
    missing = check(Learner(targets=False).subject(), "BP307")
    assert missing.status is FAIL
    assert missing.findings[0].first == "net.1"
    assert check(Learner(targets=False, joint=True).subject(), "BP307").status is PASS
    assert check(healthy(), "BP307").status is NOT_APPLICABLE
    untraced = check(Learner(targets=False).subject(update=False), "BP307")
    assert untraced.status is REVIEW


# ---------------------------------------------------------------------------------------- BP308


def test_local_and_target_actor_of_the_notebook():
    """B2: identical weights, one state, two actions."""
    subject = planted.notebook_actor()
    actor, target = subject.networks["actor"], subject.networks["actor_target"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(actor.state_dict().values(), target.state_dict().values(), strict=True)
    )
    outcome = check(subject, "BP308")
    assert outcome.status is FAIL
    (finding,) = outcome.findings
    assert finding.first == "net.1"
    assert "% of the range" in finding.effect
    with unchanged(subject), torch.no_grad():
        obs = subject.obs[:64]
        gap = (torch.stack([actor(row) for row in obs]) - target(obs)).abs().max()
    assert finding.value == pytest.approx(float(gap), rel=1e-4)


def test_same_modes_give_the_same_action():
    subject = planted.notebook_actor()
    subject = replace(subject, act=lambda obs: subject.networks["actor"](obs).detach())
    subject.networks["actor_target"].eval()
    assert check(subject, "BP308").status is PASS


def test_actor_in_train_mode_in_the_td_target():
    """As SAC does it: the target action is the actor's own, in train mode."""

    class LikeSAC(Learner):
        def update(self):
            actor = self.networks["actor"]
            forward, actor.eval = actor.eval, lambda: actor.train()
            try:
                super().update()
            finally:
                actor.eval = forward
                actor.eval()

    learner = LikeSAC()
    learner.targets.pop("actor_target")
    learner.networks.pop("actor_target")
    outcome = check(learner.subject(), "BP308")
    assert outcome.status is FAIL
    assert "mode T" in outcome.findings[0].message


# ------------------------------------------------------------------------- Stable-Baselines3


def test_sb3_td3_on_a_constant_reward_and_its_cure():
    pytest.importorskip("stable_baselines3")
    from batchproof.sb3.adapter import subject_from_model
    from batchproof.sb3.modes import set_modes

    subject = planted.sb3_constant_reward(steps=300)
    outcome = check(subject, "BP304")
    assert outcome.status is FAIL
    (finding,) = outcome.findings
    assert finding.site == "slot 3 policy_q"
    assert (finding.network, finding.first) == ("critic", "qf0.1")
    assert 'set_modes(model, "TEETE")' in finding.message
    set_modes(subject.model, "TEETE")
    cured = subject_from_model(subject.model)
    assert check(cured, "BP304").status is PASS


@pytest.mark.parametrize("algo", ["td3", "sac"])
def test_sb3_critic_that_switches_by_itself(algo):
    pytest.importorskip("stable_baselines3")
    codes = CODES[:4]
    outcomes = check(planted.sb3_constant_reward("cure", algo), *codes)
    assert [o.status for o in outcomes] == [PASS] * 4


def test_sb3_sync_by_name():
    pytest.importorskip("sb3_contrib")
    never, in_part = check(planted.sb3_renorm_by_another_name(), "BP301", "BP302")
    assert never.status is PASS
    assert in_part.status is FAIL
    assert "qf0.4.ra_mean" in in_part.findings[0].message


def test_sb3_contrib_crossq_is_healthy():
    contrib = pytest.importorskip("sb3_contrib")
    from batchproof.sb3.adapter import subject_from_model

    model = contrib.CrossQ(
        "MlpPolicy",
        "Pendulum-v1",
        learning_starts=50,
        batch_size=32,
        policy_kwargs={"net_arch": {"pi": [16], "qf": [16]}},
        seed=0,
        device="cpu",
    )
    model.learn(80)
    outcomes = check(subject_from_model(model), *CODES)
    assert {c for c, o in zip(CODES, outcomes, strict=True) if o.findings} == set()
    assert not any(o.status is SKIPPED for o in outcomes)


def test_networks_given_alone():
    """Without transitions and without an update nothing fails for want of them."""
    torch.manual_seed(0)
    subject = Subject.from_networks(
        {"actor": planted.Actor().eval(), "critic": Critic().eval()}, planted.batch().obs
    )
    assert not any(o.status is FAIL for o in check(subject, *CODES))


def test_sb3_plan_with_targets_in_train_mode_is_to_be_reviewed_not_wrong():
    """MA-BN's plan runs slots 2 and 5 in T: who set it means it. Without a plan both fail."""
    pytest.importorskip("stable_baselines3")
    from stable_baselines3 import TD3

    from batchproof.clinic.fix import fix
    from batchproof.sb3.adapter import subject_from_model
    from batchproof.sb3.modes import clear_modes, set_modes
    from batchproof.sb3.policies import NormTD3Policy

    model = TD3(
        NormTD3Policy,
        "Pendulum-v1",
        policy_kwargs={"norm": "batch", "net_arch": [16]},
        learning_starts=50,
        batch_size=32,
        seed=0,
        device="cpu",
    )
    set_modes(model, "TTETT")
    model.learn(200)
    subject = subject_from_model(model)
    in_train, differ = check(subject, "BP303", "BP308")
    assert [in_train.status, differ.status] == [REVIEW, REVIEW]
    assert {f.network for f in in_train.findings} == {"actor_target", "critic_target"}
    assert all("as its mode plan TTETT asks" in f.message for f in in_train.findings)
    assert "as its mode plan TTETT asks" in differ.findings[0].message
    found = {"BP303": in_train}
    assert fix(subject, found, unsafe=True) == []  # what is to be reviewed is left alone
    (refused,) = fix(subject, found, only=["BP303"], unsafe=True)
    assert not refused.applied
    assert "mode plan TTETT" in refused.reason

    set_modes(model, "TEETT")  # slot 2 in E: the target actor has nothing to answer for
    in_train, differ = check(subject_from_model(model), "BP303", "BP308")
    assert [in_train.status, differ.status] == [REVIEW, PASS]
    assert {f.network for f in in_train.findings} == {"critic_target"}

    clear_modes(model)
    for target in (model.actor_target, model.critic_target):
        target.train()
    assert check(subject_from_model(model), "BP303").status is FAIL
