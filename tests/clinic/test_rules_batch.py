"""BP1xx: fires on planted defects with the right layer, stays silent on healthy policies."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from batchproof.clinic.rules import RULES, Examination, Status, audit
from batchproof.clinic.subject import Subject, fingerprint, take

_spec = importlib.util.spec_from_file_location(
    "planted_batch", Path(__file__).with_name("planted_batch.py")
)
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)

torch.set_num_threads(1)
OBS = planted.observations()
BATCH_RULES = ("BP101", "BP102", "BP103", "BP104", "BP105")


def outcome_of(code: str, subject: Subject):
    before = fingerprint(subject)
    outcome = audit(subject, only=[code]).outcomes[code]
    assert fingerprint(subject) == before
    return outcome


@pytest.mark.parametrize("name", [n for n in planted.PLANTED if not n.startswith("SB3")])
def test_planted_defect_names_its_layer(name):
    build, code, layer = planted.PLANTED[name]
    outcome = outcome_of(code, build())
    assert outcome.status in (Status.FAIL, Status.REVIEW), outcome.reason
    found = outcome.findings[0]
    assert f"{found.network}.{found.first}" == layer
    assert f"{found.network}.{found.largest}" == layer
    assert found.value > found.threshold
    assert found.effect


def scaled(net: nn.Sequential, layer: int, factor: float) -> nn.Sequential:
    with torch.no_grad():
        net[layer].weight *= factor
    return net


def saturated() -> Subject:
    return Subject.from_module(scaled(planted.mlp(), 2, 1e3), OBS, **planted.bounds())


def near_zero() -> Subject:
    net = scaled(planted.mlp(), 2, 1e-9)
    nn.init.zeros_(net[2].bias)
    return Subject.from_module(net, OBS)


def huge() -> Subject:
    net = scaled(planted.mlp(size=512)[:3], 2, 1e4)
    assert float(net(OBS).detach().abs().max()) > 1e3
    return Subject.from_module(net, OBS)


def cancelling() -> Subject:
    """The output is what is left of two terms 1e5 times as large: float32 keeps two digits."""

    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = planted.mlp(), planted.mlp(seed=1)

        def forward(self, x):
            big = 1e5 * self.a(x)
            return (big + self.b(x)) - big

    return Subject.from_module(Difference(), OBS)


def tied() -> Subject:
    """Two logits always equal: rounding decides the argmax."""
    net = planted.mlp(actions=7)[:3]
    with torch.no_grad():
        net[2].weight[6], net[2].bias[6] = net[2].weight[0], net[2].bias[0]
        net[2].bias[[0, 6]] += 10
    return Subject.from_callable(
        lambda x: net(x), OBS, networks={"policy": net}, discrete=True
    )  # as SB3 deploys it: the argmax alone


def tied_argmax() -> Subject:
    subject = tied()
    subject.act = lambda x: subject.policy(x).detach().argmax(1, keepdim=True)
    return subject


def images() -> Subject:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
    )
    obs = torch.randint(0, 256, (40, 3, 40, 40), generator=torch.Generator().manual_seed(0))

    def act(x):
        return net(x.float() / 255)

    act(obs)
    return Subject.from_callable(act, obs.to(torch.uint8), networks={"q_net": net}, discrete=True)


def equal_rows() -> Subject:
    return Subject.from_module(planted.mlp(nn.LayerNorm(32)), torch.zeros(16, 24))


def dict_observations() -> Subject:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = planted.mlp()

        def forward(self, obs):
            return self.body(torch.cat([obs["a"], obs["b"]], 1))

    return Subject.from_module(Both(), {"a": OBS[:, :10], "b": OBS[:, 10:]})


def casts_to_float32() -> Subject:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = planted.mlp()

        def forward(self, x):
            return (self.body(x).float() * 3).float()

    return Subject.from_module(Casting(), OBS)


def rows_one_by_one() -> Subject:
    """Acts on each row by itself, so what its layer does to batches does not matter."""
    net = planted.settled(planted.mlp(planted.SmallBatchNorm()))
    subject = Subject.from_module(net, OBS)
    subject.act = lambda x: torch.cat([net(take(x, i)) for i in range(len(x))]).detach()
    return subject


def clipped_float32() -> Subject:
    """As Stable-Baselines3's predict: NumPy float32 out, clipped to the action space."""
    net = scaled(planted.mlp()[:3], 2, 30.0)
    subject = Subject.from_module(net, OBS, **planted.bounds())
    subject.act = lambda x: torch.as_tensor(
        np.clip(net(x).detach().numpy().astype(np.float32), -1, 1)
    )
    return subject


def settled_norm() -> Subject:
    return Subject.from_module(planted.settled(planted.mlp(nn.BatchNorm1d(32))), OBS)


def untrained_mlp_in_train_mode() -> Subject:
    return Subject.from_module(planted.mlp(nn.LayerNorm(32)).train(), OBS, **planted.bounds())


HEALTHY = [
    saturated, near_zero, huge, cancelling, tied, tied_argmax, images, equal_rows,
    dict_observations, casts_to_float32, rows_one_by_one, clipped_float32, settled_norm,
    untrained_mlp_in_train_mode,
]  # fmt: skip


@pytest.mark.parametrize("build", HEALTHY, ids=lambda f: f.__name__)
def test_healthy_policy_raises_no_alarm(build):
    subject = build()
    before = fingerprint(subject)
    report = audit(subject, only=["BP1"])
    assert fingerprint(subject) == before
    assert {c: (o.status, o.reason) for c, o in report.outcomes.items() if o.status != "pass"} == {}
    assert tuple(report.outcomes) == BATCH_RULES


def test_rounding_is_there_in_float32_and_yet_no_alarm():
    subject = huge()
    with torch.no_grad():
        alone = torch.cat([subject.policy(OBS[i : i + 1]) for i in range(64)])
        assert float((alone - subject.policy(OBS[:64])).abs().max()) > 1e-5
    assert outcome_of("BP101", subject).status is Status.PASS


def test_the_floor_is_the_rounding_error_of_the_action():
    subject = planted.batch_statistics_in_eval()
    found = outcome_of("BP101", subject).findings[0]
    assert 1e-9 < found.floor < 1e-6
    assert found.value > 1e-2


def test_effect_is_in_action_units_and_percent_of_the_range():
    torch.manual_seed(0)
    half = nn.BatchNorm1d(24, affine=False, track_running_stats=False)
    subject = Subject.from_module(
        half, OBS, action_low=torch.full((24,), -5.0), action_high=torch.full((24,), 5.0)
    )
    found = outcome_of("BP101", subject).findings[0]
    assert found.effect == f"{found.value:.3g} action units, {found.value / 10:.2%} of the range"
    # A pair normalized by itself is -1 and +1 in every feature.
    x = OBS[:64].double()
    batch = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    chosen = sorted({int(i) for i in np.linspace(0, 63, 8)})
    gaps = []
    for i in chosen:
        pair = x[[i, (i + 1) % 64]]
        own = (pair - pair.mean(0)) / (pair.var(0, correction=0) + 1e-5).sqrt()
        gaps.append(float((own[0] - batch[i]).abs().max()))
    assert found.value == pytest.approx(max(gaps), rel=1e-6)


def test_refusing_a_single_row_alone_is_a_matter_for_review():
    net = planted.mlp().eval()

    def act(x):
        if len(x) < 2:
            raise ValueError("vectorized environments only")
        return net(x)

    outcome = outcome_of("BP101", Subject.from_callable(act, OBS, networks={"actor": net}))
    assert outcome.status is Status.REVIEW
    assert "vectorized environments only" in outcome.findings[0].message


def test_not_a_number_alone_is_a_failure():
    renorm = pytest.importorskip("sb3_contrib.common.torch_layers").BatchRenorm1d
    net = planted.mlp(renorm(32)).train()
    outcome = outcome_of("BP101", Subject.from_module(net, OBS))
    assert outcome.status is Status.FAIL
    assert outcome.findings[0].first == "1"
    assert outcome.findings[0].effect == "the action is not a number"


def test_one_cause_is_not_reported_twice():
    report = audit(planted.batch_statistics_in_eval(), only=["BP101", "BP102"])
    assert report.outcomes["BP101"].status is Status.FAIL
    assert report.outcomes["BP102"].status is Status.NOT_APPLICABLE
    assert "BP101" in report.outcomes["BP102"].reason


@pytest.mark.parametrize(
    ("layer", "where"),
    [
        (lambda x: x + torch.linspace(0, 1e-3, len(x), dtype=x.dtype)[:, None], "another order"),
        (lambda x: x + (x == 0).all(1).any() * 1e-3, "padded with zeros"),
        (lambda x: x + (x.abs().amax() > 5) * 1e-3, "other companions"),
    ],
)
def test_each_kind_of_companion_is_told_apart(layer, where):
    class Layer(nn.Module):
        def forward(self, x):
            # The first row and batches of one escape the comparison of BP101.
            return layer(x) if len(x) >= 64 else x

    obs = OBS.clamp(-2, 2)
    obs[100:] *= 4
    net = nn.Sequential(Layer(), *planted.mlp())
    outcome = audit(Subject.from_module(net, obs), only=["BP101", "BP102"]).outcomes
    if where == "another order":  # rows alone differ from their place in the batch as well
        assert outcome["BP101"].status is Status.FAIL
        assert f"in {where} 0.0" in outcome["BP102"].reason
    else:
        assert outcome["BP101"].status is Status.PASS
        assert [f.message.count(where) for f in outcome["BP102"].findings] == [1]
        assert outcome["BP102"].findings[0].first == "0"


def test_b1_bypass_eval_and_train_are_told_apart():
    """Claim B1: 'batchnorm does not apply to a single input' is a bypass, not eval mode."""
    actor = planted.settled(planted.NotebookActor())
    state = OBS[0]
    with torch.no_grad():
        bypass, evaluated = actor(state), actor(state[None])[0]
        trained = actor.train()(OBS[:3])[0]
        without = torch.relu(actor.fc1(state))
        without = torch.tanh(actor.fc3(torch.relu(actor.fc2(without))))
    actor.eval()
    assert torch.allclose(bypass, without, atol=1e-7)
    gaps = {
        "bypass-eval": float((bypass - evaluated).abs().max()),
        "bypass-train": float((bypass - trained).abs().max()),
        "train-eval": float((trained - evaluated).abs().max()),
    }
    assert min(gaps.values()) > 1e-4  # the floor is below 1e-8
    in_eval = audit(Subject.from_module(actor, OBS), only=["BP103", "BP203"]).outcomes
    assert (
        in_eval["BP103"]
        .findings[0]
        .message.startswith("an observation without a batch axis skips policy.bn")
    )
    assert in_eval["BP203"].status is Status.PASS
    actor.train()
    in_train = audit(Subject.from_module(actor, OBS), only=["BP103", "BP203"]).outcomes
    assert in_train["BP103"].findings[0].first == "bn"
    assert in_train["BP203"].findings[0].first == "bn"


def test_refusing_input_without_a_batch_axis_passes():
    subject = settled_norm()
    outcome = outcome_of("BP103", subject)
    assert outcome.status is Status.PASS
    assert "refuses it (ValueError)" in outcome.reason


def test_state_that_acting_moves_is_measured_exactly():
    subject = planted.scaler_that_never_stops()
    found = outcome_of("BP104", subject).findings[0]
    x = OBS[:64].double()
    middle = (1 - 0.95**10) * x.mean(0)
    width = 1 + (1 - 0.95**10) * (x.var(0, correction=0) - 1)
    expected = max(float(middle.abs().max()), float((width - 1).abs().max()))
    assert found.value == pytest.approx(expected, rel=1e-4)
    assert "policy.0.middle, policy.0.width" in found.message


def test_a_counter_alone_is_a_matter_for_review():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.calls += 1
            return x

    outcome = outcome_of("BP104", Subject.from_module(nn.Sequential(Counting()), OBS))
    assert outcome.status is Status.REVIEW
    assert outcome.findings[0].value == 10


def test_state_needs_a_named_network():
    subject = Subject.from_callable(lambda x: x, OBS)
    assert outcome_of("BP104", subject).status is Status.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("draw", "name"), [(lambda: torch.rand(1), "torch"), (lambda: np.random.rand(), "NumPy")]
)
def test_consumed_random_state_is_a_matter_for_review(draw, name):
    net = planted.mlp()

    def act(x):
        draw()
        return net(x)

    outcome = outcome_of("BP105", Subject.from_callable(act, OBS, networks={"actor": net}))
    assert outcome.status is Status.REVIEW
    assert name in outcome.findings[0].message


def test_a_generator_of_its_own_is_random_too():
    net, generator = planted.mlp(), np.random.default_rng(0)

    def act(x):
        return net(x) + float(generator.normal())

    outcome = outcome_of("BP105", Subject.from_callable(act, OBS, networks={"actor": net}))
    assert outcome.status is Status.FAIL
    assert "generator of its own" in outcome.findings[0].message


def test_rules_that_compare_acts_are_skipped_where_acts_are_random():
    outcomes = audit(planted.noise_inside(), only=["BP101", "BP102", "BP103"]).outcomes
    assert {o.status for o in outcomes.values()} == {Status.SKIPPED}
    assert all("BP105" in o.reason for o in outcomes.values())


def test_statistics_that_are_no_buffers_are_found_and_put_back():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.total, self.count = torch.zeros(24), np.zeros(24), 0

        def forward(self, x):
            self.mean = self.mean + 0.1 * (x.detach().mean(0) - self.mean)
            self.total += x.detach().double().numpy().sum(0)
            self.count += len(x)
            return x - self.mean

    scaler = Plain()
    kept, total = scaler.mean, scaler.total
    outcome = outcome_of("BP104", Subject.from_module(nn.Sequential(scaler), OBS))
    assert outcome.status is Status.FAIL
    assert "policy.0.mean" in outcome.findings[0].message
    assert scaler.mean is kept
    assert not kept.any()
    assert scaler.total is total
    assert not total.any()
    assert scaler.count == 0


def test_a_policy_that_takes_no_batch_either_does_not_pass_as_refusing():
    """Observations of another type than the weights: as deployed it takes nothing at all."""
    net = planted.mlp().eval()
    subject = Subject.from_callable(lambda x: net(x), OBS.double(), networks={"policy": net})
    outcome = RULES["BP103"].check(Examination(subject))
    assert outcome.status is Status.SKIPPED
    assert outcome.reason.startswith("act refuses a batch too")


def test_actions_that_are_ruled_out_do_not_hide_randomness():
    """The largest number among them is infinite, and no tolerance."""
    net = planted.mlp(planted.Noise()).eval()
    masked = torch.tensor([0.0, -float("inf")])
    subject = Subject.from_callable(lambda x: net(x) + masked, OBS, networks={"policy": net})
    assert outcome_of("BP105", subject).status is Status.FAIL
