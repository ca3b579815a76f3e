"""Fixes lower the measure of their rule, or leave no trace; safe ones keep the deployed output."""

import importlib.util
import io
import json
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from batchproof.cli import main
from batchproof.clinic import fix as fixes
from batchproof.clinic import formats
from batchproof.clinic.fix import FIXES, Edit, Fix, Fixed, fix, only_named
from batchproof.clinic.rules import (
    RULES,
    Finding,
    Outcome,
    Report,
    Rule,
    Status,
    audit,
    failed,
    passed,
)
from batchproof.clinic.subject import Subject, fingerprint
from batchproof.errors import BatchproofError
from batchproof.sb3.adapter import subject_from_model
from batchproof.sb3.loading import load_subject
from batchproof.sb3.modes import get_modes, set_modes
from batchproof.sb3.policies import NormSACPolicy, NormTD3Policy

torch.set_num_threads(1)

_path = Path(__file__).with_name("planted_export.py")
_spec = importlib.util.spec_from_file_location("planted_export", _path)
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)

CODE = "BP999"


@pytest.fixture
def mean_rule(monkeypatch):
    """A rule that fails while any running mean is above 1, and measures the largest."""

    def check(exam):
        found = [
            Finding("off", first=path, value=float(buffer.abs().max()), threshold=1.0)
            for _, path, module in exam.subject.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name == "running_mean" and float(buffer.abs().max()) > 1
        ]
        return failed(*found) if found else passed()

    def register(fix_name):
        monkeypatch.setitem(RULES, CODE, Rule(CODE, "mean", "a mean", check, fix=fix_name))

    return register


def patient():
    """Two norms whose running means are far off, on purpose."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8),
        nn.Linear(8, 2),
    )  # fmt: skip
    network[1].running_mean.fill_(3.0)
    network[4].running_mean.fill_(2.0)
    return Subject.from_module(network.eval(), planted.observations())


def register(monkeypatch, name, way, safe=False):
    monkeypatch.setitem(FIXES, name, Fix(name, name, safe, (way,)))


def test_a_fix_that_helps_stays(monkeypatch, mean_rule):
    def halve(subject, plan):
        subject.networks["policy"][1].running_mean.mul_(0.1)
        return ["policy.1: halved"]

    register(monkeypatch, "halve", halve)
    mean_rule("halve")
    subject = patient()
    report = audit(subject, only=[CODE])
    (done,) = fix(subject, report, unsafe=True)
    assert done.applied
    assert (done.before, done.after) == (3.0, 2.0)
    assert done.changed == ("policy.1: halved",)
    assert done.gap > 0
    assert float(subject.networks["policy"][1].running_mean.max()) == pytest.approx(0.3)


def nothing(subject, plan):
    return ["says that it did something"]


def worse(subject, plan):
    network = subject.networks["policy"]
    network[1].running_mean.mul_(2)
    network[1].extra = 5
    network[2] = nn.Identity()
    network[4].register_buffer("new", torch.ones(1))
    network[0].weight.data.zero_()
    network.train()
    torch.rand(1)
    subject.act = None
    return ["made it worse"]


def one_more(subject, plan):
    subject.networks["policy"][1].running_mean.mul_(0.5)
    subject.networks["policy"].append(nn.BatchNorm1d(2))
    subject.networks["policy"][-1].running_mean.fill_(2.0)
    return ["one better, one new"]


@pytest.mark.parametrize("way", [nothing, worse, one_more])
def test_a_fix_that_does_not_help_leaves_no_trace(monkeypatch, mean_rule, way):
    register(monkeypatch, "no-help", way)
    mean_rule("no-help")
    subject = patient()
    before, report = fingerprint(subject), audit(subject, only=[CODE])
    if way is worse:
        # The audit itself must survive a subject that can no longer act.
        monkeypatch.setattr(fixes, "_deployed", lambda subject: torch.zeros(1, 1))
    (done,) = fix(subject, report, unsafe=True)
    assert not done.applied
    assert "rolled back" in done.reason
    assert fingerprint(subject) == before
    assert not hasattr(subject.networks["policy"][1], "extra")
    assert isinstance(subject.networks["policy"][2], nn.Tanh)
    assert len(subject.networks["policy"]) == 6
    assert callable(subject.act)


def test_an_exception_in_a_fix_leaves_no_trace(monkeypatch, mean_rule):
    def interrupted(subject, plan):
        subject.networks["policy"][1].running_mean.zero_()
        raise KeyboardInterrupt

    register(monkeypatch, "interrupted", interrupted)
    mean_rule("interrupted")
    subject = patient()
    before, report = fingerprint(subject), audit(subject, only=[CODE])
    with pytest.raises(KeyboardInterrupt):
        fix(subject, report, unsafe=True)
    assert fingerprint(subject) == before


def test_a_safe_fix_that_changes_the_output_is_rolled_back(monkeypatch, mean_rule):
    def zero(subject, plan):
        for norm in (1, 4):
            subject.networks["policy"][norm].running_mean.zero_()
        return ["zeroed"]

    register(monkeypatch, "zero", zero, safe=True)
    mean_rule("zero")
    subject = patient()
    before = fingerprint(subject)
    (done,) = fix(subject, audit(subject, only=CODE), only=CODE)
    assert not done.applied
    assert "deployed output" in done.reason
    assert fingerprint(subject) == before


def test_what_is_unsafe_is_asked_for_and_reviews_are_named(mean_rule):
    mean_rule("recalibrate")
    subject = patient()
    report = audit(subject, only=[CODE])
    (left,) = fix(subject, report)
    assert not left.applied
    assert "unsafe=True" in left.reason
    review = [Outcome(Status.REVIEW, findings=report.outcomes[CODE].findings, code=CODE)]
    assert fix(subject, review, unsafe=True) == []
    assert fix(subject, report, only=["fold-batch-norm"])[0].name == "fold-batch-norm"
    subject = patient()
    (done,) = fix(subject, review, unsafe=True, only=["bp999"])
    assert done.applied
    assert done.after == 0
    with pytest.raises(BatchproofError, match="neither a rule nor a fix"):
        fix(subject, report, only=["mend-it"])


def test_what_an_earlier_fix_mended_is_left_alone(mean_rule):
    mean_rule("recalibrate")
    subject = patient()
    report = audit(subject, only=[CODE])
    assert fix(subject, report, unsafe=True)[0].applied
    (again,) = fix(subject, report, unsafe=True)
    assert not again.applied
    assert again.reason == "nothing is found any more"


def test_every_rule_names_a_fix_that_exists_and_agrees_on_safety():
    for code, rule in fixes.all_rules().items():
        if rule.fix:
            assert rule.fix in FIXES, (code, rule.fix)
            assert rule.safe == FIXES[rule.fix].safe, (code, rule.fix)


def test_the_page_lists_every_fix_and_its_safety():
    page = Path(__file__).resolve().parents[2] / "docs" / "fix.md"
    rows = [line.split("|") for line in page.read_text().splitlines() if line.startswith("| `")]
    listed = {row[1].strip(" `"): row[3].strip() == "yes" for row in rows}
    assert listed == {name: one.safe for name, one in FIXES.items()}


SAFE = [name for name, one in FIXES.items() if one.safe]


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("seed", range(5))
def test_a_safe_fix_leaves_the_deployed_output_as_it_was(name, seed):
    torch.manual_seed(seed)
    widths = torch.randint(4, 40, (2,)).tolist()
    network = nn.Sequential(
        nn.Linear(3, widths[0]), nn.BatchNorm1d(widths[0]), nn.ReLU(),
        nn.Linear(widths[0], widths[1], bias=False), nn.BatchNorm1d(widths[1]), nn.Tanh(),
        nn.Linear(widths[1], 2),
    )  # fmt: skip
    planted.trained(network)
    subject = Subject.from_module(network, planted.observations(seed=seed))
    before = network(subject.obs).detach()
    (done,) = fix(subject, [], only=[name])
    assert done.applied
    assert len(done.changed) == 2
    torch.testing.assert_close(network(subject.obs).detach(), before, rtol=1e-5, atol=1e-5)


def test_restore_eval():
    subject = planted.module_subject(nn.BatchNorm1d(8), train_mode=True)
    report = audit(subject, only=["BP602"])
    (done,) = fix(subject, report, unsafe=True)
    assert done.applied, done.reason
    assert not subject.networks["policy"].training
    assert audit(subject, only=["BP602"]).outcomes["BP602"].status is Status.PASS


def test_restore_eval_is_rolled_back_where_acting_sets_train_mode():
    subject = planted.module_subject(nn.BatchNorm1d(8))
    network = subject.networks["policy"]
    subject.act = lambda obs: network.train()(obs).detach()
    report = audit(subject, only=["BP602"])
    assert report.outcomes["BP602"].status is Status.FAIL
    (done,) = fix(subject, report, unsafe=True)
    assert not done.applied
    assert "rolled back" in done.reason


def actor_critic():
    torch.manual_seed(0)

    def net():
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()

    networks = {"actor": net(), "actor_target": net()}
    planted.trained(networks["actor"])
    return Subject.from_networks(
        networks, planted.observations(), targets={"actor_target": "actor"}
    )


def test_sync_targets_copies_every_buffer_and_no_weight():
    subject = actor_critic()
    weights = subject.networks["actor_target"][0].weight.clone()
    (done,) = fix(subject, [], only=["sync-targets"], unsafe=True)
    assert len(done.changed) == 3  # mean, variance and the count
    assert done.gap == 0
    target, online = subject.networks["actor_target"], subject.networks["actor"]
    for a, b in zip(target.buffers(), online.buffers(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(target[0].weight, weights)


def test_eval_targets():
    subject = actor_critic()
    subject.networks["actor_target"].train()
    (done,) = fix(subject, [], only=["eval-targets"], unsafe=True)
    assert done.applied
    assert not any(m.training for m in subject.networks["actor_target"].modules())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("replace-by-renorm", "BatchRenorm1d"), ("replace-by-layer-norm", "LayerNorm"),
     ("replace-by-group-norm", "GroupNorm")],
)  # fmt: skip
def test_replacing(name, kind):
    subject = planted.module_subject(nn.BatchNorm1d(8))
    network = subject.networks["policy"]
    before = network(subject.obs).detach()
    weight, bias = network[1].weight, network[1].bias
    (done,) = fix(subject, [], only=[name], unsafe=True)
    assert done.applied
    assert type(network[1]).__name__ == kind
    assert network[1].weight is weight  # an optimizer that holds it still trains it
    assert network[1].bias is bias
    assert not network[1].training
    if kind == "BatchRenorm1d":  # in eval mode it is batch norm
        torch.testing.assert_close(network(subject.obs).detach(), before, rtol=1e-5, atol=1e-5)
    else:
        network.train()
        torch.testing.assert_close(network(subject.obs[:1]), network(subject.obs)[:1])


def test_replacing_feature_maps():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(256, 2)
    )
    subject = Subject.from_module(network.eval(), torch.rand(10, 1, 6, 6))
    fix(subject, [], only=["replace-by-group-norm"], unsafe=True)
    assert network[1].num_groups == 2
    network.train()
    torch.testing.assert_close(network(subject.obs[:1]), network(subject.obs)[:1])


def test_replace_batch_norm_takes_the_first_that_helps(monkeypatch):
    def check(exam):
        found = [f for f in exam.layers if f.couples_train]
        return (
            failed(*(Finding("couples", value=1.0, threshold=0.0) for _ in found))
            if found
            else passed()
        )

    monkeypatch.setitem(
        RULES, CODE, Rule(CODE, "couples", "rows couple", check, fix="replace-batch-norm")
    )
    subject = planted.module_subject(nn.BatchNorm1d(8))
    (done,) = fix(subject, audit(subject, only=[CODE]), unsafe=True)
    assert done.applied
    assert isinstance(subject.networks["policy"][1], nn.LayerNorm)


def test_frozen_statistics_do_not_move_and_the_rest_stays():
    subject = planted.module_subject(nn.BatchNorm1d(8))
    network = subject.networks["policy"]
    state = set(network.state_dict())
    reference = pickle.loads(pickle.dumps(network)).train()
    (done,) = fix(subject, [], only=["freeze-statistics"], unsafe=True)
    assert done.applied
    assert done.gap == 0
    before = [b.clone() for b in network.buffers()]
    network.train()
    x = planted.observations(seed=7)
    out = network(x) + network(2 * x)  # two passes before one backward
    torch.testing.assert_close(network(x), reference(x))
    out.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, network.buffers(), strict=True))
    assert set(network.state_dict()) == state
    again = pickle.loads(pickle.dumps(network))
    again(x)
    assert all(torch.equal(a, b) for a, b in zip(before, again.buffers(), strict=True))


class Extractor(BaseFeaturesExtractor):
    def __init__(self, space):
        super().__init__(space, 8)
        self.net = nn.Sequential(nn.Linear(space.shape[0], 8), nn.BatchNorm1d(8), nn.Tanh())

    def forward(self, x):
        return self.net(x)


def sb3_subject(kind):
    kwargs = {"features_extractor_class": Extractor, "net_arch": [8]}
    options = (
        {"buffer_size": 200, "learning_starts": 20, "batch_size": 16}
        if kind is TD3
        else {"n_steps": 16, "batch_size": 8, "n_epochs": 1}
    )
    model = kind("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, seed=0, device="cpu", **options)
    model.learn(40)
    names = ("actor", "critic", "actor_target", "critic_target") if kind is TD3 else ()
    networks = {n: getattr(model, n) for n in names} or {"policy": model.policy}
    targets = {"actor_target": "actor", "critic_target": "critic"} if kind is TD3 else {}

    def act(batch):
        return torch.as_tensor(model.predict(batch.numpy(), deterministic=True)[0])

    def policy(batch):
        return model.actor(batch) if kind is TD3 else model.policy(batch, True)[0]

    return Subject(
        kind.__name__, networks, planted.observations(), act, policy, targets=targets, model=model
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [(TD3, "recalibrate"), (TD3, "replace-by-renorm"), (TD3, "replace-by-layer-norm"),
     (TD3, "freeze-statistics"), (TD3, "fold-batch-norm"),
     (PPO, "replace-by-group-norm"), (PPO, "fold-batch-norm")],
)  # fmt: skip
def test_the_fixed_model_acts_trains_saves_and_loads(kind, name):
    subject = sb3_subject(kind)
    model = subject.model
    (done,) = fix(subject, [], only=[name], unsafe=True)
    assert done.applied, done.reason
    if FIXES[name].safe:
        assert done.gap < 1e-5
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = kind.load(file, env=model.get_env(), device="cpu")
    obs = subject.obs.numpy()
    expected = model.predict(obs, deterministic=True)[0]
    torch.testing.assert_close(
        torch.as_tensor(loaded.predict(obs, deterministic=True)[0]), torch.as_tensor(expected)
    )
    kinds = [type(m).__name__ for m in model.policy.modules()]
    assert kinds == [type(m).__name__ for m in loaded.policy.modules()]
    held = {
        id(p)
        for m in loaded.policy.modules()
        if hasattr(m, "optimizer")
        for group in m.optimizer.param_groups
        for p in group["params"]
    }
    trained = loaded.policy.actor if kind is TD3 else loaded.policy
    if kind is PPO:
        assert {id(p) for p in trained.parameters()} <= held
    model.learn(40)
    loaded.learn(40)


def test_set_modes_runs_only_on_a_model_of_the_library():
    subject = planted.module_subject(nn.BatchNorm1d(8))
    (left,) = fix(subject, [], only=["set-modes"], unsafe=True)
    assert not left.applied
    subject = sb3_subject(TD3)
    (done,) = fix(subject, [], only=["set-modes"], unsafe=True)
    assert done.applied, done.reason
    assert "TEETE" in done.changed[0]
    subject.model.learn(40)
    file = io.BytesIO()
    subject.model.save(file)
    file.seek(0)
    TD3.load(file, device="cpu")


def norm_model(kind=SAC, norm="batch", steps=80):
    """A model of the library with norms, after a few updates."""
    policy = NormSACPolicy if kind is SAC else NormTD3Policy
    kwargs = {"norm": norm, "net_arch": [16]}
    options = {"buffer_size": 200, "learning_starts": 20, "batch_size": 16}
    model = kind(policy, "Pendulum-v1", policy_kwargs=kwargs, seed=0, device="cpu", **options)
    return model.learn(steps)


SLOTS = ("BP304", "BP308")


@pytest.mark.parametrize("codes", [["BP308"], ["BP304"], list(SLOTS), ["set-modes"]])
def test_set_modes_gives_each_rule_what_it_needs(codes):
    subject = subject_from_model(norm_model())
    report = audit(subject, only=SLOTS)
    assert [report.outcomes[code].status for code in SLOTS] == [Status.FAIL, Status.FAIL]
    done = fix(subject, report, only=codes, unsafe=True)
    wanted = SLOTS if "set-modes" in codes else codes
    assert [(one.code, one.applied) for one in done] == [(code, True) for code in wanted]
    # SAC's own is TTTTE; slot 3 is never left in T, whatever was asked for.
    assert get_modes(subject.model) == ("TTETE" if codes == ["BP304"] else "TEETE")
    after = audit(subject, only=wanted)
    assert [after.outcomes[code].status for code in wanted] == [Status.PASS] * len(wanted)


@pytest.mark.parametrize(
    ("chosen", "code", "expected"),
    [
        ("TTMTE", "BP308", "TEMTE"),  # M shows the actor a common shift: it may stay
        ("TTEJJ", "BP308", "TEEJJ"),
        ("TTTETE", "BP308", "TEETE"),  # six letters: slot 0 comes first, and acting counts too
        ("TTTTTE", "BP304", "TTTETE"),
        ("TEETT", "", "TEETT"),
    ],
)
def test_set_modes_leaves_the_other_slots_as_they_are(chosen, code, expected):
    model = norm_model()
    set_modes(model, chosen)
    subject = subject_from_model(model)
    assert fixes._cured(subject, code) == expected


def test_set_modes_takes_the_plan_that_it_is_given():
    subject = subject_from_model(norm_model())
    (done,) = fix(subject, [], only=["set-modes"], unsafe=True, plan="TEMJJ")
    assert done.applied
    assert get_modes(subject.model) == "TEMJJ"


def test_a_policy_that_a_fix_breaks_is_put_back(monkeypatch, mean_rule):
    def broken(subject, asked):
        subject.networks["policy"][0] = nn.Linear(9, 8)
        return ["broke it"]

    register(monkeypatch, "broken", broken)
    mean_rule("broken")
    subject = patient()
    before, report = fingerprint(subject), audit(subject, only=[CODE])
    (done,) = fix(subject, report, unsafe=True)
    assert not done.applied
    assert done.reason.startswith("rolled back: policy cannot take these observations")
    assert fingerprint(subject) == before


def refusing_nan():
    """A policy with batch norm whose actions come from a distribution of torch, which checks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).eval()

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, obs):
            return torch.distributions.Normal(self.net(obs), 1.0, validate_args=True).mean

    return Subject.from_module(Policy().eval(), torch.randn(50, 3)), net[1]


def test_statistics_that_are_nan_are_mended_in_a_policy_that_refuses_to_act_on_nan():
    subject, norm = refusing_nan()
    norm.running_var[2] = float("nan")
    norm.running_mean[1] = float("nan")
    safe, unsafe = (fix(subject, audit(subject), unsafe=u)[0] for u in (False, True))
    assert (safe.applied, unsafe.applied) == (False, True)
    assert unsafe.name == "recalibrate"
    assert "nan" not in unsafe.changed[0]
    assert torch.isfinite(subject.act(subject.obs)).all()


def test_an_off_policy_agent_is_not_recalibrated_on_its_own_states():
    """Its statistics are the replay's; worthless ones are mended with any states."""
    model = norm_model()
    subject = subject_from_model(model, env="Pendulum-v1")
    before = fingerprint(subject)
    (done,) = fix(subject, [], only=["recalibrate"], unsafe=True)
    assert not done.applied
    assert "replay" in done.reason
    assert fingerprint(subject) == before
    norm = next(m for m in model.actor.modules() if isinstance(m, nn.BatchNorm1d))
    norm.running_var[0] = float("nan")
    (done,) = fix(subject, audit(subject, only=["BP404"]), unsafe=True)
    assert done.applied
    assert torch.isfinite(norm.running_var).all()


def test_a_policy_that_does_not_act_is_told_of_and_left_alone():
    subject, norm = refusing_nan()
    norm.weight.data[2] = float("nan")
    before = fingerprint(subject)
    done = fix(subject, audit(subject), only=["fold-batch-norm", "recalibrate"], unsafe=True)
    assert [d.applied for d in done] == [False, False]
    (fold,) = (d for d in done if d.name == "fold-batch-norm")
    assert fold.reason.startswith("the policy does not act")
    assert "\n" not in fold.reason
    assert fingerprint(subject) == before


def test_on_the_policy_s_own_states_statistics_worth_nothing_are_mended_and_no_others():
    model = TD3(
        NormTD3Policy, "Pendulum-v1", learning_starts=10, device="cpu", seed=0,
        policy_kwargs={"actor_norm": "batch", "critic_norm": "batch", "net_arch": [16, 16]},
    )  # fmt: skip
    model.learn(60)
    norm = next(m for m in model.critic.qf0.modules() if hasattr(m, "running_var"))
    norm.running_var[2] = float("nan")
    model.replay_buffer.reset()  # as after saving and loading
    subject = subject_from_model(model, env="Pendulum-v1")
    assert subject.lacks_replay
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    (done,) = fix(subject, audit(subject, only=["BP404"]), unsafe=True)
    assert done.applied, done.reason
    after = model.policy.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name.rsplit(".", 1)[0] for name in changed} == {
        next(name for name, module in model.policy.named_modules() if module is norm)
    }


def test_each_fix_says_in_one_line_that_a_policy_does_not_act():
    for name in FIXES:
        if name == "recalibrate":  # it mends this one
            continue
        subject, norm = refusing_nan()
        norm.running_var[2] = float("nan")
        before = fingerprint(subject)
        (done,) = fix(subject, audit(subject), only=[name], unsafe=True)
        assert not done.applied
        assert "\n" not in done.reason
        assert fingerprint(subject) == before


def test_a_mistake_of_ours_is_not_taken_for_a_policy_that_broke(monkeypatch):
    subject, norm = refusing_nan()
    norm.running_mean.fill_(3.0)
    report = audit(subject, only=["BP402"])
    before, measure, calls = fingerprint(subject), fixes._measure, []

    def wrong(*args):
        calls.append(args)
        if len(calls) > 1:
            raise AttributeError("ours")
        return measure(*args)

    monkeypatch.setattr(fixes, "_measure", wrong)
    with pytest.raises(AttributeError, match="ours"):
        fix(subject, report, only=["BP402"], unsafe=True)
    assert fingerprint(subject) == before


def test_a_value_of_zero_is_as_far_from_its_threshold_as_can_be():
    assert fixes._excess(0.0, 1e-9) == float("inf")  # kappa to rounding
    assert fixes._excess(1e-12, 1e-9) == pytest.approx(1e3)
    assert fixes._excess(0.0, 0.0) == 0


def test_the_fall_is_told_where_two_numbers_say_it():
    assert "3 before, 0 after" in Fixed("a", CODE, True, before=3.0, after=0.0).fall
    for before in (0.0, float("inf"), float("nan")):
        assert Fixed("a", CODE, True, before=before, after=0.0).fall == ""


def test_reviews_that_have_a_fix_are_known(mean_rule):
    mean_rule("recalibrate")
    finding = Finding("off")
    review = Outcome(Status.REVIEW, findings=(finding,), code=CODE)
    assert only_named(patient(), [review]) == [CODE]
    assert only_named(patient(), {CODE: Outcome(Status.FAIL, findings=(finding,), code=CODE)}) == []
    mean_rule("")
    assert only_named(patient(), [review]) == []


@pytest.mark.parametrize(
    "names",
    [["replace-by-renorm"], ["replace-by-renorm", "replace-by-layer-norm"],
     ["replace-by-group-norm"], ["freeze-statistics"], ["replace-by-renorm", "freeze-statistics"]],
)  # fmt: skip
@pytest.mark.parametrize("trust", [False, True])
def test_replaced_layers_come_back_without_unpickling(names, trust, tmp_path):
    subject = subject_from_model(norm_model(TD3))
    model = subject.model
    for name in names:
        (done,) = fix(subject, [], only=[name], unsafe=True)
        assert done.applied, done.reason
    model.save(tmp_path / "fixed.zip")
    loaded = load_subject(tmp_path / "fixed.zip", obs=subject.obs, trust=trust)
    kinds = [type(module) for module in model.policy.modules()][1:]
    assert [type(module) for module in loaded.model.policy.modules()][1:] == kinds
    assert torch.equal(loaded.act(loaded.obs), subject.act(subject.obs))
    loaded.model.save(tmp_path / "again.zip")  # and once more
    again = load_subject(tmp_path / "again.zip", obs=subject.obs)
    assert torch.equal(again.act(again.obs), subject.act(subject.obs))
    assert len(again.model.policy_class.batchproof_edits) == 6 * len(names)
    again.update()


def test_edits_are_plain_values_and_come_back():
    for momentum in (0.1, float("nan")):
        edit = Edit("a.b", "renorm", "torch.nn.X", "mean", "", "weight", "", momentum, True)
        plain = json.loads(json.dumps(edit.to_plain(), allow_nan=False))
        assert repr(Edit.from_plain(plain)) == repr(edit)
    for wrong in (
        {"kind": "os"}, {"path": 1}, {"path": "a" * 2000}, {"momentum": True}, {"momentum": "1"},
        {"maps": 1}, {"more": 1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no edit"):
            Edit.from_plain(plain | wrong)
    for wrong in (None, [], {}):
        with pytest.raises(ValueError, match="no edit"):
            Edit.from_plain(wrong)


def test_set_modes_is_rolled_back_from_the_model(monkeypatch, mean_rule):
    mean_rule("set-modes")  # a rule that set_modes cannot help
    subject = sb3_subject(TD3)
    for part in subject.networks["critic"].modules():
        if hasattr(part, "running_mean"):
            part.running_mean.fill_(3.0)
    (done,) = fix(subject, audit(subject, only=[CODE]), unsafe=True)
    assert not done.applied
    assert "rolled back" in done.reason
    assert "forward" not in vars(subject.model.actor)
    assert not hasattr(subject.model, "batchproof_modes")


def test_batchproof_imports_the_library_only_when_it_is_asked_for():
    text = Path(fixes.__file__).read_text()
    assert "import stable_baselines3" not in text
    assert "from stable_baselines3" not in text


def test_what_no_command_can_save_is_told_to_be_fixed_in_python():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    subject = Subject.from_module(net, torch.randn(16, 3))
    report = audit(subject)
    shown = " ".join(formats.text(report).split())
    assert "batchproof fix MODEL" not in shown + formats.html(report)
    call = re.search(r"batchproof\.clinic\.fix\.(fix\(.*?\))", shown)[1]
    done = eval(call, {"fix": fix, "subject": subject, "report": report})
    assert any(one.applied for one in done)
    assert audit(subject, only=[done[0].code]).clean


@pytest.fixture(scope="module")
def sac(tmp_path_factory):
    """A SAC with batch norm under the library's own modes, as a file."""
    path = tmp_path_factory.mktemp("model") / "sac.zip"
    norm_model().save(path)
    return path


def command(sac, out, *words):
    return main(["fix", str(sac), "-o", str(out), "--env", "Pendulum-v1", *words])


def test_the_command_that_bp308_advertises_works(sac, tmp_path, capsys):
    out = tmp_path / "out.zip"
    assert command(sac, out, "--only", "BP308", "--unsafe") == 0
    shown = capsys.readouterr().out
    assert "applied set-modes (BP308): the model trains under the mode plan TEETE" in shown
    assert "still failing" not in shown
    assert main(["audit", str(out), "--env", "Pendulum-v1", "--only", "BP304,BP308"]) == 0


def test_the_command_says_what_still_fails(sac, tmp_path, capsys, monkeypatch):
    def check(exam):
        return failed(Finding("always"))

    monkeypatch.setitem(RULES, "BP998", Rule("BP998", "always", "always", check))
    assert command(sac, tmp_path / "out.zip", "--only", "BP308,BP998", "--unsafe") == 1
    assert "\nstill failing: BP998\n" in capsys.readouterr().out


def test_the_command_tells_no_fall_from_nothing_to_nothing(sac, tmp_path, capsys, monkeypatch):
    def check(exam):
        off = Finding("no plan", value=0.0, threshold=1e-9)
        return passed() if get_modes(exam.subject.model) else failed(off)

    monkeypatch.setitem(RULES, "BP998", Rule("BP998", "plan", "plan", check, fix="set-modes"))
    assert command(sac, tmp_path / "out.zip", "--only", "BP998", "--unsafe") == 0
    shown = capsys.readouterr().out
    assert "applied set-modes (BP998)" in shown
    assert "over its threshold" not in shown


def test_the_command_says_how_reviews_are_mended(sac, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.zip"

    def only_a_review(subject, **options):
        finding = Outcome(Status.REVIEW, findings=(Finding("perhaps"),), code="BP308")
        return Report("mine", {"BP308": finding}, 0.0)

    monkeypatch.setattr("batchproof.clinic.rules.audit", only_a_review)
    assert command(sac, out, "--unsafe") == 0
    shown = capsys.readouterr().out
    assert "nothing was changed" in shown
    assert "--only BP308 --unsafe" in shown
    assert not out.exists()


def test_a_model_that_cannot_be_saved_is_one_line(sac, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.zip"
    load = SAC._setup_model

    def with_a_lock(model):
        load(model)
        model.lock = threading.Lock()

    monkeypatch.setattr(SAC, "_setup_model", with_a_lock)
    assert command(sac, out, "--only", "BP308", "--unsafe") == 2
    err = capsys.readouterr().err
    assert "out.zip was not written" in err
    assert "cannot pickle" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
