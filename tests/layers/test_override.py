"""use_mode on Batchproof's, torch's and sb3-contrib's layers."""

import pytest
import torch
from sb3_contrib.common.torch_layers import BatchRenorm1d as Sb3BatchRenorm1d
from torch import nn

from batchproof.errors import BatchproofError
from batchproof.layers import BatchNorm1d, BatchRenorm1d, mode_layers, use_mode

torch.set_num_threads(1)
FEATURES = 4


def warmed(warmup_steps=2):
    layer = Sb3BatchRenorm1d(FEATURES, warmup_steps=warmup_steps).double()
    layer.steps += 3
    layer.ra_mean += 0.3
    layer.ra_var *= 1.7
    nn.init.normal_(layer.scale)
    return layer


KINDS = {
    "ours": (lambda: BatchNorm1d(FEATURES).double(), (8, FEATURES)),
    "ours-renorm": (lambda: BatchRenorm1d(FEATURES).double(), (8, FEATURES)),
    "torch-1d": (lambda: nn.BatchNorm1d(FEATURES).double(), (8, FEATURES)),
    "torch-2d": (lambda: nn.BatchNorm2d(FEATURES).double(), (8, FEATURES, 3, 3)),
    "torch-3d": (lambda: nn.BatchNorm3d(FEATURES, momentum=None).double(), (8, FEATURES, 2, 2, 2)),
    "sb3-contrib": (warmed, (8, FEATURES)),
    "sb3-contrib-cold": (lambda: warmed(3), (8, FEATURES)),
}


def draw(shape, seed=0):
    return 3 * torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(seed)) + 1


def run(network, x):
    x = x.clone().requires_grad_()
    y = network(x)
    grads = torch.autograd.grad(y.pow(3).sum(), (x, *network.parameters()))
    return [y.detach(), *grads]


def copies(name):
    torch.manual_seed(0)
    make, shape = KINDS[name]
    layer = make()
    twin = make()
    twin.load_state_dict(layer.state_dict())
    return nn.Sequential(nn.Identity(), layer), nn.Sequential(nn.Identity(), twin), draw(shape)


def equal(actual, desired):
    for a, d in zip(actual, desired, strict=True):
        torch.testing.assert_close(a, d, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_t_is_train_and_e_is_eval_whatever_the_flag_says(name, training):
    one, other, x = copies(name)
    for step, (letter, flag) in enumerate([("T", True), ("E", False), ("T", True)]):
        one.train(training)
        other.train(flag)
        with use_mode(one, letter) as same:
            assert same is one
            ours = run(one, x + step)
            assert one.training == one[1].training == training
        equal(ours, run(other, x + step))
        equal(one.state_dict().values(), other.state_dict().values())


@pytest.mark.parametrize("name", KINDS)
def test_t_in_lower_case_leaves_the_statistics_alone(name):
    one, other, x = copies(name)
    before = {key: value.clone() for key, value in one.named_buffers()}
    with use_mode(one, "t"):
        ours = run(one, x)
    equal(ours, run(other.train(), x))
    assert all(torch.equal(value, before[key]) for key, value in one.named_buffers())


@pytest.mark.parametrize("name", KINDS)
def test_s_stops_the_gradient_through_the_statistics(name):
    one, other, x = copies(name)
    x.requires_grad_()
    with use_mode(one, "S"):
        y = one(x)
    equal([y], [other.train()(x)])
    equal(one.buffers(), other.buffers())
    cotangent = torch.zeros_like(x)
    cotangent[0] = 1
    (grad,) = torch.autograd.grad(y, x, cotangent)
    assert (grad[1:] == 0).all()
    assert (grad[0] != 0).all()


@pytest.mark.parametrize("name", KINDS)
def test_b_skips_the_layer(name):
    one, _, x = copies(name)
    with use_mode(one, "B"):
        assert one(x) is x


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_of_one_is_finite(name):
    one, _, x = copies(name)
    for letter in "TSE":
        with use_mode(one, letter):
            row = x[:1, :, :1, :1, :1] if x.dim() == 5 else x[:1, :, :1, :1] if x.dim() == 4 else x
            assert one(row[:1]).isfinite().all()
    assert all(value.isfinite().all() for value in one.buffers())


@pytest.mark.parametrize("name", KINDS)
def test_layers_are_given_back(name):
    network, _, x = copies(name)
    layer = network[1]
    before = {key: value for key, value in vars(layer).items() if key != "_buffers"}
    network.eval()
    expected = network(x)
    with pytest.raises(IndexError), use_mode(network, "t"):
        network(x)[len(x)]
    assert {**before, "training": False} == {k: v for k, v in vars(layer).items() if k in before}
    assert "forward" not in vars(layer)
    assert torch.equal(network(x), expected)


@pytest.mark.parametrize("name", KINDS)
def test_blocks_nest(name):
    network, _, x = copies(name)
    with use_mode(network, "E"):
        outer = network(x)
        with use_mode(network[1], "B"):
            assert network(x) is x
        assert torch.equal(network(x), outer)


def test_a_shared_layer_is_given_back_once():
    layer = nn.BatchNorm1d(FEATURES)
    with use_mode(nn.Sequential(layer, nn.Sequential(layer)), "E"):
        pass
    assert "forward" not in vars(layer)


def test_a_forward_of_the_users_own_is_given_back():
    layer = nn.BatchNorm1d(FEATURES)
    layer.forward = mine = lambda x: x
    with use_mode(layer, "E"):
        assert layer.forward is not mine
    assert layer.forward is mine


def test_a_mode_in_the_call_wins():
    layer, x = BatchNorm1d(FEATURES), torch.randn(8, FEATURES)
    with use_mode(layer, "E"):
        assert layer(x, mode="B") is x


def test_mode_layers():
    torch_layer, ours = nn.BatchNorm2d(3), BatchRenorm1d(3)
    theirs = Sb3BatchRenorm1d(3)
    network = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), torch_layer, nn.Sequential(ours))
    assert mode_layers(network) == [torch_layer, ours]
    assert mode_layers(theirs) == [theirs]
    assert mode_layers(nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True))) == []


class Odd(nn.BatchNorm1d):
    def forward(self, input):
        return 2 * super().forward(input)


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("ra_mean", torch.zeros(3))


@pytest.mark.parametrize(
    ("layer", "mode", "says"),
    [
        (nn.BatchNorm1d(3), "J", "mode J is T on a concatenated batch"),
        (nn.BatchNorm1d(3), "x", "unknown mode 'x'"),
        (Odd(3), "E", "Odd computes batch norm in a way of its own.*replace it by"),
        (nn.SyncBatchNorm(3), "E", "SyncBatchNorm computes batch norm in a way of its own"),
        (nn.LazyBatchNorm1d(), "E", "run the network once on a batch first"),
        (Foreign(), "E", "Foreign looks like sb3-contrib's batch renorm but lacks some of"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_done_is_refused_before_anything_is_touched(layer, mode, says):
    first = nn.BatchNorm1d(3)
    with pytest.raises(BatchproofError, match=says), use_mode(nn.Sequential(first, layer), mode):
        pass
    assert "forward" not in vars(first)


def test_torch_without_running_statistics_has_no_e():
    layer = nn.BatchNorm1d(3, track_running_stats=False)
    x = torch.randn(8, 3)
    with use_mode(layer, "E"), pytest.raises(BatchproofError, match="track_running_stats=True"):
        layer(x)
    with use_mode(layer, "T"):
        torch.testing.assert_close(layer(x), layer.train()(x))


def test_sb3_contrib_takes_rows_only():
    layer = Sb3BatchRenorm1d(3)
    with use_mode(layer, "E"), pytest.raises(BatchproofError, match=r"give \(N, C\)"):
        layer(torch.randn(2, 3, 4))
