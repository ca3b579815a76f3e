"""What modules do is found by watching them: layers with odd names against what is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from batchproof.clinic import probe
from batchproof.clinic.rules import Examination
from batchproof.clinic.subject import Subject, fingerprint, unchanged

torch.set_num_threads(1)
OBS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1


def facts_of(layer: nn.Module, obs: torch.Tensor = OBS) -> list[probe.LayerFacts]:
    return Examination(Subject.from_module(layer, obs)).layers


class HomeMade(nn.Module):
    """Normalizes by the batch; its buffers are named after fruit, and its momentum is its own."""

    def __init__(self, rho: float) -> None:
        super().__init__()
        self.rho = rho
        self.register_buffer("plum", torch.ones(6))
        self.register_buffer("apple", torch.zeros(6))
        self.register_buffer("pear", torch.zeros(()))
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self.gain * (x - self.apple) / (self.plum + 1e-3).sqrt()
        mean, var = x.mean(0), x.var(0, correction=0)
        with torch.no_grad():
            self.apple += self.rho * (mean - self.apple)
            self.plum += self.rho * (var - self.plum)
            self.pear += 1
        return self.gain * (x - mean) / (var + 1e-3).sqrt()


@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.9])
def test_batch_norm(momentum):
    (found,) = facts_of(nn.BatchNorm1d(6, momentum=momentum))
    assert (found.mean_buffer, found.var_buffer) == ("running_mean", "running_var")
    assert found.momentum == pytest.approx(momentum, rel=1e-4)
    assert found.couples_train
    assert not found.couples_eval
    assert set(found.moves_train) == {"running_mean", "running_var", "num_batches_tracked"}
    assert found.moves_eval == ()
    assert not found.random_train
    assert not found.random_eval
    x = found.call.inputs[0].double()
    assert torch.equal(x, OBS[: len(x)].double())
    trained = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    evaluated = x / math.sqrt(1 + 1e-5)
    assert found.mode_gap == pytest.approx(float((trained - evaluated).abs().max()), rel=1e-5)


def test_batch_norm_of_images():
    obs = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found, *rest = facts_of(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()), obs)
    assert (found.path, found.mean_buffer, found.var_buffer) == ("0", "running_mean", "running_var")
    assert found.momentum == pytest.approx(0.1, rel=1e-4)
    assert rest == []


@pytest.mark.parametrize("rho", [0.03, 0.5])
def test_a_home_made_layer_is_found_by_what_its_buffers_follow(rho):
    (found,) = facts_of(HomeMade(rho))
    assert (found.mean_buffer, found.var_buffer) == ("apple", "plum")
    assert found.momentum == pytest.approx(rho, rel=1e-3)
    assert found.normalizes
    assert found.running


def test_batch_renorm_of_sb3_contrib():
    layers = pytest.importorskip("sb3_contrib.common.torch_layers")
    (found,) = facts_of(nn.Sequential(layers.BatchRenorm1d(6, momentum=0.02)))
    assert (found.mean_buffer, found.var_buffer) == ("ra_mean", "ra_var")
    assert found.momentum == pytest.approx(0.02, rel=1e-3)
    assert found.couples_train
    assert set(found.moves_train) == {"ra_mean", "ra_var", "steps"}


def test_batch_norm_without_running_statistics_couples_in_both_modes():
    (found,) = facts_of(nn.BatchNorm1d(6, track_running_stats=False))
    assert found.couples_train
    assert found.couples_eval
    assert not found.running


def test_dropout_is_random_and_couples_nothing():
    (found,) = facts_of(nn.Sequential(nn.Dropout(0.5)))
    assert found.random_train
    assert not found.random_eval
    assert not found.couples_train


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(6),
        nn.GroupNorm(2, 6),
        nn.RMSNorm(6),
        nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2), nn.Tanh()),
        nn.Softmax(dim=1),
        nn.Sequential(nn.Linear(6, 6), nn.Identity(), nn.Dropout(0.0)),
    ],
)
def test_layers_that_treat_each_row_by_itself_are_not_listed(layer):
    assert facts_of(layer) == []


def test_a_container_is_listed_only_where_its_layers_do_not_explain_it():
    class Centring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return self.inner(x - x.mean(0))

    inside = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.BatchNorm1d(6)), nn.Tanh())
    assert [f.path for f in facts_of(inside)] == ["1.0"]
    assert [f.path for f in facts_of(nn.Sequential(Centring(), nn.Tanh()))] == ["0"]


def test_gradient_coupling_is_zero_where_statistics_are_detached():
    class Detached(nn.Module):
        def forward(self, x):
            return x - x.mean(0).detach()

    calls = {}
    for name, layer in {"detached": Detached(), "batch": nn.BatchNorm1d(6)}.items():
        with probe.recorded({"policy": layer}) as found:
            layer(OBS)
        calls[name] = found[0]
    assert probe.coupling(calls["detached"]) > 0
    assert probe.gradient_coupling(calls["detached"]) == 0
    assert probe.gradient_coupling(calls["batch"]) > 0
    assert probe.gradient_coupling(calls["batch"], training=False) == 0


def test_gradient_coupling_against_the_jacobian():
    layer = nn.BatchNorm1d(6).double().train()
    x = OBS[:5].double()
    with probe.recorded({"policy": layer}) as calls:
        layer(x)
    jacobian = torch.autograd.functional.jacobian(nn.BatchNorm1d(6).double().train(), x)
    weights = torch.linspace(0.5, 1.5, 24, dtype=torch.float64).reshape(4, 6)
    expected = (jacobian[1:, :, 0] * weights[:, :, None]).sum((0, 1)).abs().max()
    assert probe.gradient_coupling(calls[0]) == pytest.approx(float(expected), rel=1e-9)


def test_recorded_calls_carry_the_state_before_and_what_moved():
    layer = nn.BatchNorm1d(6)
    with probe.recorded({"actor": nn.Sequential(layer)}) as calls:
        layer(OBS)
        layer.eval()
        with torch.no_grad():
            layer(OBS)
    assert [call.name for call in calls] == ["actor.0", "actor.0"]
    assert [call.training for call in calls] == [True, False]
    assert [call.grad for call in calls] == [True, False]
    assert torch.equal(calls[0].buffers["running_mean"], torch.zeros(6))
    assert calls[1].moved == ()
    assert calls[0].batch == 64


def test_rerun_starts_from_the_state_before_the_call_and_touches_nothing():
    layer = nn.BatchNorm1d(6)
    with probe.recorded({"actor": layer}) as calls:
        trained = layer(OBS)
    after = layer.running_mean.clone()
    state = torch.get_rng_state()
    assert torch.allclose(probe.rerun(calls[0]), trained)
    expected = OBS / math.sqrt(1 + 1e-5)  # statistics 0 and 1, as before the call
    assert torch.allclose(probe.rerun(calls[0], training=False), expected)
    assert torch.equal(layer.running_mean, after)
    assert torch.equal(torch.get_rng_state(), state)


def test_float64_tells_rounding_from_meaning():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 2))
    subject = Subject.from_module(net, OBS)
    before = fingerprint(subject)
    weights = [p.detach().double().numpy() for p in net.parameters()]
    hidden = np.tanh(OBS.double().numpy() @ weights[0].T + weights[1])
    exact = hidden @ weights[2].T + weights[3]
    with unchanged(subject), torch.no_grad(), probe.in_float64(subject):
        output = subject.policy(OBS)
    assert output.dtype == torch.float64
    assert np.abs(output.numpy() - exact).max() < 1e-14
    assert np.abs(net(OBS).detach().numpy() - exact).max() > 1e-9
    assert fingerprint(subject) == before


def test_float64_leaves_buffers_that_a_forward_moved_as_they_were():
    layer = nn.BatchNorm1d(6).train()
    subject = Subject.from_module(layer, OBS)
    before = fingerprint(subject)
    with unchanged(subject), probe.in_float64(subject):
        subject.policy(OBS)
    assert fingerprint(subject) == before


# --------------------------------------------------------------------------------- NaN and types

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("a", "b", "same", "gap"),
    [
        ([1.0, NAN], [1.0, NAN], True, 0.0),
        ([1.0, NAN], [1.5, NAN], False, 0.5),
        ([1.0, NAN], [1.0, 2.0], False, INF),
        ([INF, -INF], [INF, -INF], True, 0.0),
        ([INF, 0.0], [-INF, 0.0], False, INF),
        ([], [], True, 0.0),
    ],
)
def test_nan_in_one_place_is_the_same(a, b, same, gap):
    assert probe.same(torch.tensor(a), torch.tensor(b)) is same
    assert probe.largest_gap(torch.tensor(a), torch.tensor(b)) == gap


def test_states_of_other_shapes_or_of_whole_numbers():
    assert not probe.same(torch.zeros(2), torch.zeros(3))
    assert probe.same(torch.arange(3), torch.arange(3))
    assert not probe.same(torch.arange(3), torch.ones(3, dtype=torch.long))


def test_a_buffer_that_stays_nan_has_not_moved():
    layer = nn.BatchNorm1d(6).eval()
    layer.running_var[0] = NAN
    subject = Subject.from_module(layer, OBS)
    with probe.recorded(subject.networks) as calls:
        subject.policy(OBS)
    assert calls[0].moved == ()


def test_no_layer_is_random_or_without_statistics_for_a_nan():
    layer = nn.BatchNorm1d(6)
    layer.running_var[0] = NAN
    obs = OBS.clone()
    (sound,) = facts_of(nn.BatchNorm1d(6))
    (found,) = facts_of(layer, obs)
    assert (found.random_train, found.random_eval) == (False, False)
    assert (found.mean_buffer, found.var_buffer) == (sound.mean_buffer, sound.var_buffer)
    assert found.couples_train
    assert not found.couples_eval
    assert facts_of(nn.Sequential(nn.Linear(6, 6), nn.ReLU())) == []


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.01, 0.1])
def test_statistics_of_three_digits_are_followed(kind, momentum):
    (found,) = facts_of(nn.BatchNorm1d(6, momentum=momentum).to(kind), OBS)
    assert (found.mean_buffer, found.var_buffer) == ("running_mean", "running_var")
    assert found.momentum == pytest.approx(momentum, rel=1e-4)
