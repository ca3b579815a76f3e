"""A folded layer is gone, and the policy's output in eval mode is what it was."""

import io

import pytest
import torch
from torch import nn

from batchproof.clinic.fold import fold, is_folded
from batchproof.clinic.rules import Examination
from batchproof.clinic.subject import Subject
from batchproof.errors import BatchproofError
from batchproof.layers import BatchNorm1d, BatchRenorm1d

torch.set_num_threads(1)


def warm(module, seed=0):
    """Statistics, scales and shifts that are not the initial ones."""
    torch.manual_seed(seed)
    for part in module.modules():
        if hasattr(part, "running_var"):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.2, 3.0)
            if part.weight is not None:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return module.eval()


def mlp(bias=True, **norm):
    torch.manual_seed(0)
    return warm(
        nn.Sequential(
            nn.Linear(3, 8, bias=bias), nn.BatchNorm1d(8, **norm), nn.ReLU(),
            nn.Linear(8, 8, bias=bias), nn.BatchNorm1d(8, **norm), nn.Tanh(), nn.Linear(8, 2),
        )
    )  # fmt: skip


class Linked(nn.Module):
    """Linked in the forward by attributes; ``skip`` uses the Linear's output twice."""

    def __init__(self, skip=False):
        super().__init__()
        self.norm, self.first, self.out = nn.BatchNorm1d(8), nn.Linear(3, 8), nn.Linear(8, 2)
        self.skip = skip

    def forward(self, x):
        h = self.first(x)
        y = self.norm(h).relu()
        return self.out(y + h if self.skip else y)


OBS = torch.randn(100, 3, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("keep", [False, True])
def test_algebra_to_float64_rounding(keep):
    module = mlp().double()
    before = module(OBS.double()).detach()
    done = fold(module, OBS.double(), keep_layers=keep)
    assert [(f.name, f.into) for f in done] == [("policy.1", "policy.0"), ("policy.4", "policy.3")]
    assert float((module(OBS.double()).detach() - before).abs().max()) < 1e-13
    assert max(f.error for f in done) < 1e-13


def test_the_norms_are_gone_or_neutral():
    removed, kept = mlp(), mlp()
    names = set(kept.state_dict())
    fold(removed, OBS)
    fold(kept, OBS, keep_layers=True)
    assert isinstance(removed[1], nn.Identity)
    assert set(kept.state_dict()) == names
    assert float(kept[1].running_mean.abs().max()) == 0
    assert torch.equal(kept[1].weight, torch.ones(8))
    torch.testing.assert_close(removed(OBS), kept(OBS), rtol=1e-5, atol=1e-5)


def facts(module):
    return {layer.path: layer for layer in Examination(Subject.from_module(module, OBS)).layers}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm1d, BatchRenorm1d])
@pytest.mark.parametrize("affine", [True, False])
def test_a_folded_layer_is_known_by_its_state(norm, affine):
    """Through a file, into a network built anew: its names and numbers are all that is kept."""

    def built():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), norm(8, affine=affine), nn.Linear(8, 2)).eval()

    module = warm(built())
    assert len(fold(module, OBS, keep_layers=True)) == 1
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = built()
    assert not is_folded(facts(loaded)["1"])
    loaded.load_state_dict(torch.load(file))
    assert is_folded(facts(loaded)["1"])
    assert torch.equal(loaded(OBS), module(OBS))
    # One step of training, and it has statistics of its own.
    loaded.train()(OBS)
    assert not is_folded(facts(loaded)["1"])


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.running_mean.zero_(),
        lambda norm: norm.running_mean[0].fill_(0.0),
        lambda norm: norm.running_var[0].fill_(2.0),
        lambda norm: norm.weight.data[0].fill_(2.0),
        lambda norm: norm.bias.data[0].fill_(2.0),
        lambda norm: norm.reset_parameters(),
    ],
)
def test_a_layer_that_is_not_as_folded_is_none(change):
    module = mlp()
    fold(module, OBS, keep_layers=True)
    assert is_folded(facts(module)["1"])
    change(module[1])
    assert not is_folded(facts(module)["1"])


def test_linked_by_attributes():
    module = warm(Linked())
    before = module(OBS)
    (done,) = fold(module, OBS)
    assert (done.name, done.into) == ("policy.norm", "policy.first")
    torch.testing.assert_close(module(OBS), before, rtol=1e-5, atol=1e-5)


def test_a_linear_whose_output_is_used_twice_is_left_alone():
    module = warm(Linked(skip=True))
    state = {k: v.clone() for k, v in module.state_dict().items()}
    assert fold(module, OBS) == []
    assert fold(module, OBS, keep_layers=True) == []
    assert isinstance(module.norm, nn.BatchNorm1d)
    assert set(module.state_dict()) == set(state)
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_a_linear_without_bias_gets_one_unless_names_must_stay():
    module = mlp(bias=False)
    before = module(OBS)
    assert fold(module, OBS, keep_layers=True) == []
    assert module[0].bias is None
    assert len(fold(module, OBS)) == 2
    torch.testing.assert_close(module(OBS), before, rtol=1e-5, atol=1e-5)


def test_norm_without_scale_and_shift():
    module = mlp(affine=False)
    before = module(OBS)
    assert len(fold(module, OBS, keep_layers=True)) == 2
    torch.testing.assert_close(module(OBS), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_convolution(keep):
    torch.manual_seed(0)
    module = warm(
        nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
        )
    )
    x = torch.rand(5, 2, 8, 8)
    before = module(x)
    assert len(fold(module, x, keep_layers=keep)) == 1
    torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_folded():
    assert fold(warm(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))), OBS) == []
    assert fold(warm(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4))), OBS) == []
    # A norm that reads the batch in eval mode too is no scale and shift.
    assert (
        fold(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)), OBS)
        == []
    )
    assert fold(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), OBS) == []
    with pytest.raises(BatchproofError, match="give observations"):
        fold(mlp())


def test_modes_and_random_state_stay():
    module = mlp().train()
    state = torch.get_rng_state()
    fold(Subject.from_module(module, OBS), keep_layers=True)
    assert module[1].training
    assert torch.equal(torch.get_rng_state(), state)
