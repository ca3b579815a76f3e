"""BatchNorm1d and BatchNorm2d against torch's and by hand, and the modes' contract."""

import numpy as np
import pytest
import torch
from torch import nn

from batchproof.errors import BatchproofError
from batchproof.layers import BatchNorm1d, BatchNorm2d, BatchRenorm1d, BatchRenorm2d
from batchproof.modes import E, Mode, S, T

torch.set_num_threads(1)
FEATURES = 6
RENORM = {"eps": 1e-3, "momentum": 0.05}
# One of each kind, as a factory, with the shape of its batch.
LAYERS = {
    "batch": (BatchNorm1d, {}, (16, FEATURES)),
    "batch-unbiased": (BatchNorm1d, {"batch_variance": "unbiased"}, (16, FEATURES)),
    "batch-sequence": (BatchNorm1d, {}, (8, FEATURES, 5)),
    "batch-image": (BatchNorm2d, {}, (4, FEATURES, 3, 5)),
    "renorm": (BatchRenorm1d, RENORM, (16, FEATURES)),
    "renorm-folded": (BatchRenorm1d, {**RENORM, "formula": "folded"}, (16, FEATURES)),
    "renorm-image": (BatchRenorm2d, RENORM, (4, FEATURES, 3, 5)),
    "renorm-folded-image": (BatchRenorm2d, {"formula": "folded"}, (4, FEATURES, 3, 5)),
}


def draw(shape, seed=0):
    """A batch whose features have means and spreads of their own."""
    rng = np.random.default_rng(seed)
    features = (1, shape[1], *[1] * (len(shape) - 2))
    x = rng.normal(rng.normal(size=features), rng.uniform(0.5, 3, features), shape)
    return torch.tensor(x)


def make(name, **more):
    """A layer with parameters and statistics away from their initial values, in float64."""
    kind, options, shape = LAYERS[name]
    layer = kind(FEATURES, dtype=torch.float64, **{**options, **more})
    rng = np.random.default_rng(7)
    state = layer.state_dict()
    for key, (low, high) in {
        "weight": (0.5, 2),
        "bias": (-1, 1),
        "running_mean": (-1, 1),
        "running_var": (0.5, 3),
    }.items():
        state[key].copy_(torch.tensor(rng.uniform(low, high, FEATURES)))
    state["num_batches_tracked"] += 3
    return layer, shape


def equal(actual, desired, tolerance=1e-11):
    torch.testing.assert_close(
        actual, torch.as_tensor(desired), rtol=tolerance, atol=tolerance, check_dtype=False
    )


def run(layer, x, mode=None, seed=99):
    """Output and the gradients in x and the parameters of a random weighting of it."""
    x = x.clone().requires_grad_()
    y = layer(x) if mode is None else layer(x, mode=mode)
    grads = torch.autograd.grad(
        (y * draw(y.shape, seed).to(y.dtype)).sum(), (x, *layer.parameters()), allow_unused=True
    )
    return y.detach(), grads


# Drop-in for torch


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (BatchNorm1d, nn.BatchNorm1d, (16, FEATURES)),
        (BatchNorm1d, nn.BatchNorm1d, (8, FEATURES, 5)),
        (BatchNorm2d, nn.BatchNorm2d, (4, FEATURES, 3, 5)),
    ],
)
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_train_and_eval_are_torchs(ours, theirs, shape, momentum):
    ours = ours(FEATURES, eps=1e-3, momentum=momentum).double()
    theirs = theirs(FEATURES, eps=1e-3, momentum=momentum).double()
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    for step, training in enumerate([True, True, False, True, False]):
        x = draw(shape, step)
        ours.train(training)
        theirs.train(training)
        (y, grads), (their_y, their_grads) = run(ours, x), run(theirs, x)
        equal(y, their_y)
        for grad, their_grad in zip(grads, their_grads, strict=True):
            equal(grad, their_grad)
        for name, value in theirs.state_dict().items():
            equal(ours.state_dict()[name], value)


@pytest.mark.parametrize("kind", [BatchNorm1d, BatchRenorm1d])
def test_states_of_torch_load_both_ways(kind):
    theirs = nn.BatchNorm1d(3)
    theirs(torch.randn(8, 3))
    ours = kind(3)
    ours.load_state_dict(theirs.state_dict())
    back = nn.BatchNorm1d(3)
    back.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


def test_it_is_an_instance_of_torchs():
    assert isinstance(BatchNorm1d(3), nn.BatchNorm1d)
    assert isinstance(BatchNorm2d(3), nn.BatchNorm2d)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_without_parameters_or_statistics_it_is_torchs(options):
    ours, theirs = BatchNorm1d(FEATURES, **options), nn.BatchNorm1d(FEATURES, **options)
    x = draw((16, FEATURES)).float()
    for training in (True, False):
        equal(ours.train(training)(x), theirs.train(training)(x), 1e-5)


# The modes


@pytest.mark.parametrize("name", LAYERS)
def test_train_is_t_and_eval_is_e(name):
    for training, letter in ((True, "T"), (False, "E")):
        (one, shape), (other, _) = make(name), make(name)
        x = draw(shape)
        equal(one.train(training)(x), other.train(not training)(x, mode=letter))
        for key, value in one.state_dict().items():
            assert torch.equal(other.state_dict()[key], value)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("letter", ["T", "t", "E", "S", "s", "B"])
def test_only_t_and_s_move_the_statistics(name, letter):
    layer, shape = make(name)
    before = {key: value.clone() for key, value in layer.named_buffers()}
    layer(draw(shape), mode=letter)
    for key, value in layer.named_buffers():
        assert torch.equal(value, before[key]) == (letter not in "TS")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("letter", ["T", "S"])
def test_lower_case_gives_the_same_output(name, letter):
    (one, shape), (other, _) = make(name), make(name)
    (y, grads), (same, same_grads) = (
        run(layer, draw(shape), mode)
        for layer, mode in ((one, letter), (other, Mode(letter.lower())))
    )
    assert torch.equal(y, same)
    assert all(torch.equal(a, b) for a, b in zip(grads, same_grads, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_s_is_t_without_the_gradient_through_the_statistics(name):
    (one, shape), (other, _) = make(name), make(name)
    x = draw(shape)
    x.requires_grad_()
    y, stopped = one(x, mode=T), other(x, mode=S)
    equal(stopped, y)
    for key, value in one.named_buffers():
        equal(dict(other.named_buffers())[key], value)
    cotangent = torch.zeros(shape, dtype=torch.float64)
    cotangent[2] = 1
    (coupled,) = torch.autograd.grad(y, x, cotangent)
    (alone,) = torch.autograd.grad(stopped, x, cotangent)
    rest = [i for i in range(shape[0]) if i != 2]
    assert coupled[rest].abs().max() > 1e-4
    assert (alone[rest] == 0).all()
    assert alone[2].abs().min() > 1e-3


@pytest.mark.parametrize("name", LAYERS)
def test_b_gives_the_input_back(name):
    layer, shape = make(name)
    x = draw(shape)
    assert layer(x, mode="B") is x


@pytest.mark.parametrize("name", LAYERS)
def test_e_is_each_row_alone(name):
    layer, shape = make(name)
    x = draw(shape)
    rows = torch.cat([layer(row[None], mode=E) for row in x])
    equal(rows, layer(x, mode=E))


@pytest.mark.parametrize("letter", ["J", "M", "j", "m"])
def test_j_and_m_are_refused(letter):
    same = "T" if letter.isupper() else "t"
    with pytest.raises(BatchproofError, match=f"mode {letter} is {same} on a concatenated batch"):
        BatchNorm1d(3)(torch.randn(4, 3), mode=letter)


def test_an_unknown_mode_is_refused():
    with pytest.raises(BatchproofError, match="unknown mode 'train'"):
        BatchNorm1d(3)(torch.randn(4, 3), mode="train")


def test_e_without_running_statistics_is_refused():
    with pytest.raises(BatchproofError, match="track_running_stats=True"):
        BatchNorm1d(3, track_running_stats=False)(torch.randn(4, 3), mode="E")


# Where torch is a trap


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("letter", ["T", "t", "S", "E"])
def test_a_batch_of_one_is_finite(name, letter):
    layer, _ = make(name)
    shape = (1, FEATURES, *[1] * (len(LAYERS[name][2]) - 2))
    before = layer.running_var.clone()
    y, grads = run(layer, draw(shape), letter)
    assert y.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    if letter == "T":
        equal(layer.running_var, (1 - layer.momentum) * before)  # the variance of one row is 0
        assert (grads[0] == 0).all()
    if letter == "T" and (name.startswith("batch") or "folded" in name):
        equal(y.flatten(), layer.bias)
    if letter == "T" and name in ("renorm", "renorm-image"):
        fresh, _ = make(name)
        equal(y, fresh(draw(shape), mode="E"))  # d is not clipped here


def test_torch_refuses_a_batch_of_one():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3)(torch.randn(1, 3))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("letter", ["T", "S", "E"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_feature_is_finite(name, letter, dtype):
    layer, shape = make(name)
    layer.to(dtype)
    x = draw(shape).to(dtype)
    x[:, 2] = 0.75
    y, grads = run(layer, x, letter)
    assert y.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    assert (layer.running_var >= 0).all()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_low_precision_keeps_statistics_in_float32(name, kind):
    """A batch whose moments bfloat16 cannot hold: its statistics must be the float32 batch's."""
    layer, shape = make(name)
    other, _ = make(name)
    layer.float()
    other.float()
    x = (64 + draw(shape)).to(kind)
    y, full = layer(x, mode="T"), other(x.float(), mode="T")
    assert y.dtype == kind
    assert layer.running_mean.dtype == torch.float32
    equal(y, full.to(kind), 1e-6)
    for key, value in other.named_buffers():
        equal(dict(layer.named_buffers())[key], value, 1e-6)


@pytest.mark.parametrize("name", ["batch", "renorm", "renorm-folded"])
def test_autocast_and_low_precision_layers(name):
    layer, shape = make(name)
    layer.float()
    network = nn.Sequential(nn.Linear(FEATURES, FEATURES), layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(draw(shape).float())
    assert y.dtype == torch.bfloat16
    assert layer.running_var.dtype == torch.float32
    y.float().square().sum().backward()
    assert network[0].weight.grad.isfinite().all()
    network.bfloat16()
    for mode in ("T", "S", "E"):
        assert network[1](draw(shape).bfloat16(), mode=mode).dtype == torch.bfloat16


@pytest.mark.parametrize("name", LAYERS)
def test_a_pass_in_t_before_the_backward_of_one_in_e(name):
    """The gradient of the pass in E is that of the statistics which it used."""
    (layer, shape), (alone, _) = make(name), make(name)
    x = draw(shape).requires_grad_()
    y = layer(x, mode="E")
    layer(10 + x.detach(), mode="T")
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(alone(x, mode="E").square().sum(), x)
    equal(grad, expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("letter", ["t", "s", "E"])
def test_gradients_by_finite_differences(name, letter):
    layer, shape = make(name)
    x = draw((3, *shape[1:])).requires_grad_()
    if letter == "t" and name.startswith("batch"):
        assert torch.autograd.gradcheck(lambda x: layer(x, mode=letter), x)
        assert torch.autograd.gradgradcheck(lambda x: layer(x, mode=letter), x)
    elif letter == "E":
        assert torch.autograd.gradcheck(lambda x: layer(x, mode=letter), x)
    names = ("weight", "bias")
    buffers = dict(layer.named_buffers())

    def of_parameters(weight, bias):
        values = {**dict(zip(names, (weight, bias), strict=True)), **buffers}
        return torch.func.functional_call(layer, values, (x.detach(),), {"mode": letter})

    assert torch.autograd.gradcheck(of_parameters, (layer.weight, layer.bias))


# Errors


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("letter", ["T", "E", "B"])
def test_an_input_without_a_batch_axis_is_refused(name, letter):
    layer, shape = make(name)
    row = draw(shape)[0]
    if row.dim() + 1 == layer.ranks[0]:
        with pytest.raises(BatchproofError, match=r"no batch axis: call the layer on x\[None\]"):
            layer(row, mode=letter)


@pytest.mark.parametrize(
    ("layer", "shape", "says"),
    [
        (BatchNorm1d(3), (4, 5), r"shape \(4, 5\).*give \(N, C\) or \(N, C, L\) with C = 3"),
        (BatchNorm1d(3), (4, 3, 2, 2), r"\(N, C\) or \(N, C, L\) with C = 3"),
        (BatchRenorm2d(3), (4, 5, 2, 2), r"give \(N, C, H, W\) with C = 3"),
        (BatchRenorm2d(3), (4, 3), r"give \(N, C, H, W\)"),
        (BatchNorm1d(3), (0, 3), "empty batch has no statistics for mode T"),
        (BatchRenorm1d(3), (0, 3), "empty batch has no statistics for mode T"),
    ],
)
def test_wrong_shapes_say_what_to_give(layer, shape, says):
    with pytest.raises(BatchproofError, match=says):
        layer(torch.zeros(shape))


def test_an_empty_batch_passes_in_e():
    assert BatchNorm1d(3)(torch.zeros(0, 3), mode="E").shape == (0, 3)


@pytest.mark.parametrize("kind", [BatchNorm1d, BatchRenorm2d])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"eps": float("nan")}, "eps must be positive"),
        ({"momentum": 0.0}, "momentum must be in.*got 0.0"),
        ({"momentum": 1.1}, "flax's 0.99 is 0.01 here"),
        ({"batch_variance": "sample"}, "unknown batch_variance 'sample'.*biased, unbiased"),
        ({"running_variance": "sample"}, "unknown running_variance 'sample'"),
        ({"estimator": "median"}, "unknown estimator 'median': use one of ema"),
    ],
)
def test_bad_options_say_what_to_write(kind, options, says):
    with pytest.raises(BatchproofError, match=says):
        kind(3, **options)
