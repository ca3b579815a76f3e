"""A number that is none is BP404's matter, and no other rule takes it for a difference."""

import math

import pytest
import torch
from torch import nn

from batchproof.clinic.fix import fix
from batchproof.clinic.rules import NOT_FINITE, Examination, Status, audit, select
from batchproof.clinic.subject import Subject, Transitions, fingerprint

torch.set_num_threads(1)
OBS = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))


def net(inputs: int = 3, outputs: int = 2, seed: int = 0) -> nn.Sequential:
    """With statistics and scales that are not the initial ones; in eval mode."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, outputs),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(60):
            module(torch.randn(64, inputs))
        for layer in (module[1], module[4]):
            layer.weight.uniform_(0.5, 1.5)
    return module.eval()


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(5, 1, seed=1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([obs, action], 1))


def agent(**more) -> Subject:
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    data = Transitions(OBS, noise, OBS[:, 0], OBS.flip(0), torch.zeros(64))
    networks = {"actor": net(), "critic": Critic(), "critic_target": Critic()}
    targets = {"critic_target": "critic"}
    return Subject.from_networks(networks, OBS, targets=targets, transitions=data, **more)


def ran(subject: Subject) -> dict:
    """Outcomes of an audit but for rules on request."""
    before = fingerprint(subject)
    outcomes = audit(subject).outcomes
    assert fingerprint(subject) == before
    return {code: one for code, one in outcomes.items() if code != "BP604"}


def test_a_nan_in_the_actor_fails_its_rule_and_no_other():
    subject = agent()
    subject.networks["actor"][1].running_var[0] = math.nan
    outcomes = ran(subject)
    failed = outcomes.pop("BP404")
    assert failed.status is Status.FAIL
    assert failed.findings[0].message == "actor.1: running_var has 1 NaN of 8 values"
    # They read flags, compare states, or look for normalizers around environments.
    decided = {"BP104", "BP204", "BP502", "BP503"}
    for code, one in outcomes.items():
        if code in decided:
            assert one.status in (Status.PASS, Status.NOT_APPLICABLE), code
        else:
            assert (one.status, one.reason) == (Status.SKIPPED, NOT_FINITE), code


def test_a_nan_in_the_critic_leaves_what_acts_to_its_rules():
    subject = agent()
    with torch.no_grad():
        subject.networks["critic"].net[0].weight[0, 0] = math.nan
    outcomes = ran(subject)
    assert [f.first for f in outcomes["BP404"].findings] == ["net.0"]
    sound = ran(agent())
    for code in select(["BP101", "BP102", "BP103", "BP105", "BP203", "BP602", "BP603"]):
        assert outcomes[code].status is sound[code].status is Status.PASS, code
    for code in select(["BP201", "BP3", "BP401", "BP402", "BP601"]):
        assert outcomes[code].reason == NOT_FINITE, code


def test_state_that_moves_while_acting_is_seen_beside_a_nan():
    subject = Subject.from_module(net().train(), OBS)
    subject.networks["policy"][1].running_var[0] = math.nan
    outcomes = ran(subject)
    assert outcomes["BP104"].status is Status.FAIL
    assert "1.running_mean" in outcomes["BP104"].findings[0].message
    assert outcomes["BP404"].status is Status.FAIL
    assert outcomes["BP101"].reason == NOT_FINITE


@pytest.mark.parametrize("layer", [1, 4])
def test_layers_behind_a_nan_are_known_all_the_same(layer):
    """What a NaN before them lets through says nothing; they are tried on numbers."""
    sound = Examination(Subject.from_module(net(), OBS)).layers
    broken = net()
    broken[layer].running_var[0] = math.nan
    found = Examination(Subject.from_module(broken, OBS)).layers
    for one, other in zip(found, sound, strict=True):
        for name in ("path", "mean_buffer", "var_buffer", "moves_train", "moves_eval"):
            assert getattr(one, name) == getattr(other, name)
        assert (one.couples_train, one.couples_eval) == (True, False)
        assert (one.random_train, one.random_eval) == (False, False)
        assert one.momentum == pytest.approx(0.1, rel=1e-3)


def test_the_fix_of_the_rule_mends_it():
    subject = agent()
    subject.networks["actor"][1].running_var[0] = math.nan
    (done,) = fix(subject, audit(subject, only="BP404"), unsafe=True)
    assert done.applied, done.reason
    assert ran(subject)["BP404"].status is Status.PASS


# ------------------------------------------------------- outputs of weights that are all finite


class Logarithm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - 1).log()


def test_an_action_that_is_no_number_although_the_weights_are():
    subject = Subject.from_module(nn.Sequential(net(), Logarithm()).eval(), OBS)
    outcomes = ran(subject)
    assert outcomes["BP404"].status is Status.FAIL
    message = outcomes["BP404"].findings[0].message
    assert message.startswith("the action as deployed has ")
    assert "all weights and statistics are finite" in message
    assert outcomes["BP101"].reason == NOT_FINITE


def test_a_critic_that_overflows():
    subject = agent(critic=lambda obs, action: obs.new_full((1, len(obs)), math.inf))
    outcomes = ran(subject)
    assert outcomes["BP404"].findings[0].site == "critic"
    assert outcomes["BP101"].status is Status.PASS
    assert outcomes["BP305"].reason == NOT_FINITE


class Masked(nn.Module):
    """Rules the second of three actions out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + torch.tensor([0.0, -math.inf, 0.0])


def test_actions_that_are_ruled_out_are_meant():
    outcomes = ran(Subject.from_module(Masked().eval(), OBS))
    assert {one.reason for one in outcomes.values()}.isdisjoint({NOT_FINITE})
    for code in ("BP101", "BP105", "BP404", "BP601", "BP602", "BP603"):
        assert outcomes[code].status is Status.PASS, (code, outcomes[code])
    # The same as actions of a robot, whose bounds are known, would be wrong.
    bounds = {"action_low": -torch.ones(3), "action_high": torch.ones(3)}
    bounded = ran(Subject.from_module(Masked().eval(), OBS, **bounds))
    assert bounded["BP404"].status is Status.FAIL


class Refusing(nn.Module):
    """As torch's distributions do with parameters that are not numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Told to check, for torch.compile switches checks off in the whole process.
        return torch.distributions.Normal(self.net(x), 1.0, validate_args=True).mean


def test_a_policy_that_refuses_its_own_nan_is_audited():
    module = Refusing().eval()
    with torch.no_grad():
        module.net[0].weight[0, 0] = math.nan
    outcomes = ran(Subject.from_module(module, OBS))
    assert [f.first for f in outcomes.pop("BP404").findings] == ["net.0"]
    assert all(
        one.reason == NOT_FINITE or one.status is Status.NOT_APPLICABLE for one in outcomes.values()
    )
