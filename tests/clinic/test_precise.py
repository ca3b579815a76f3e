"""Recalibration gives each layer the statistics of its own input, however the data is split."""

import pytest
import torch
from torch import nn

from batchproof.clinic.fold import fold
from batchproof.clinic.precise import recalibrate
from batchproof.clinic.subject import Subject, Transitions, fingerprint
from batchproof.errors import BatchproofError

torch.set_num_threads(1)


def net(seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(),
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2),
    )  # fmt: skip
    for norm in (module[1], module[4]):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return module.eval()


def data(n=500, seed=1):
    return 3 * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)) + 1


def test_each_layer_gets_the_statistics_of_its_input_with_the_layers_below_already_done():
    module, x = net(), data()
    recalibrate(module, x)
    with torch.no_grad():
        first = module[0](x).double()
        torch.testing.assert_close(
            module[1].running_mean.double(), first.mean(0), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            module[1].running_var.double(), first.var(0, correction=0), rtol=1e-5, atol=0
        )
        second = module[:4](x).double()  # in eval mode, on the new statistics of the first
        torch.testing.assert_close(
            module[4].running_mean.double(), second.mean(0), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            module[4].running_var.double(), second.var(0, correction=0), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("batch_size", [7, 64, 499, 500, 10_000])
def test_the_split_into_batches_does_not_matter(batch_size):
    x = data()
    whole, split = net().double(), net().double()
    recalibrate(whole, x.double(), batch_size=500)
    recalibrate(split, x[torch.randperm(500)].double(), batch_size=batch_size)
    for a, b in zip(whole.buffers(), split.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_feature_maps_are_pooled_over_positions():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.rand(30, 2, 8, 8)
    (done,) = recalibrate(module, x, batch_size=11)
    maps = module[0](x).double()
    torch.testing.assert_close(module[1].running_mean.double(), maps.mean((0, 2, 3)))
    torch.testing.assert_close(
        module[1].running_var.double(), maps.var((0, 2, 3), correction=0), rtol=1e-5, atol=0
    )
    assert done.samples == 30 * 6 * 6


def test_a_layer_of_unknown_class_is_found():
    class Centre(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("level", torch.zeros(3))
            self.register_buffer("power", torch.ones(3))

        def forward(self, x):
            if self.training:
                with torch.no_grad():
                    self.level += 0.2 * (x.mean(0) - self.level)
                    self.power += 0.2 * (x.var(0, correction=0) - self.power)
            return (x - self.level) / (self.power + 1e-3).sqrt()

    module, x = nn.Sequential(Centre()), data()
    recalibrate(module, x)
    torch.testing.assert_close(module[0].level, x.mean(0))
    torch.testing.assert_close(module[0].power, x.var(0, correction=0))


def test_a_critic_gets_the_mixture_of_replayed_and_policy_actions():
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.out = nn.Linear(4, 1)

        def forward(self, obs, action):
            return self.out(self.norm(torch.cat([obs, action], 1)))

    torch.manual_seed(0)
    x, y, action = data(200), data(200, seed=2) - 4, torch.rand(200, 1)
    actor = nn.Sequential(nn.Linear(3, 1), nn.Tanh())
    critic = Critic()
    transitions = Transitions(x, action, torch.zeros(200), y, torch.zeros(200))
    subject = Subject.from_networks({"actor": actor, "critic": critic}, x, transitions=transitions)
    (done,) = recalibrate(subject, batch_size=33)
    assert done.name == "critic.norm"
    both = torch.cat([torch.cat([x, action], 1), torch.cat([y, actor(y)], 1)]).detach()
    torch.testing.assert_close(critic.norm.running_mean, both.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        critic.norm.running_var, both.var(0, correction=0), rtol=1e-5, atol=1e-6
    )


def test_what_it_reports_and_what_it_leaves_alone():
    module, x = nn.Sequential(nn.BatchNorm1d(3)).train(), data()
    module[0].running_mean.copy_(x.mean(0) + 2 * x.std(0, correction=0))
    module[0].running_var.copy_(4 * x.var(0, correction=0))
    state = torch.get_rng_state()
    (done,) = recalibrate(module, x)
    assert done.mean_error == pytest.approx(2.0, rel=1e-4)
    assert done.log_variance_error == pytest.approx(1.3862944, rel=1e-4)  # log 4
    assert module[0].training
    assert torch.equal(torch.get_rng_state(), state)
    assert not module[0]._forward_pre_hooks
    assert int(module[0].num_batches_tracked) == 0


def test_recalibrating_twice_changes_nothing_more():
    module, x = net(), data(64)
    recalibrate(module, x)
    before = [b.clone() for b in module.buffers()]
    again = recalibrate(module, x)
    assert [r.name for r in again] == ["policy.1", "policy.4"]
    for a, b in zip(before, module.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_an_off_policy_agents_own_states_are_refused_unless_they_are_asked_for():
    module, x = net(), data()
    own = Subject.from_module(module, x, collected=True)
    assert recalibrate(own)  # on-policy: its statistics are of such states
    own = Subject.from_module(module, x, collected=True, critic=lambda obs, action: action.T)
    before = fingerprint(own)
    with pytest.raises(BatchproofError, match="those of its replay"):
        recalibrate(own)
    assert fingerprint(own) == before
    assert recalibrate(own, data(seed=3))


def test_nothing_to_do_and_bad_input():
    assert recalibrate(nn.Linear(3, 1), data()) == []
    with pytest.raises(BatchproofError, match="observations are needed"):
        recalibrate(net())
    with pytest.raises(BatchproofError, match="at least 2"):
        recalibrate(Subject.from_module(net(), data()), data(1))
    with pytest.raises(BatchproofError, match="batch_size"):
        recalibrate(net(), data(), batch_size=0)
    sick = net()
    sick[0].weight.data[0, 0] = float("nan")
    before = fingerprint(Subject.from_module(sick, data()))
    with pytest.raises(BatchproofError, match="parameters that are not finite"):
        recalibrate(sick, data())
    assert fingerprint(Subject.from_module(sick, data())) == before


def test_a_folded_layer_is_left_alone():
    """New statistics would undo its share of the fold: the other layers get theirs."""
    module, x = net(), data()
    fold(module[:3], x, keep_layers=True)  # the first norm alone
    before = {key: value.clone() for key, value in module[1].state_dict().items()}
    (done,) = recalibrate(module, x)
    assert done.name == "policy.4"
    for key, value in module[1].state_dict().items():
        assert torch.equal(value, before[key])
    assert bool(module[1].running_mean.signbit().all())
