"""torch.compile and torch.export: no graph break, same outputs, same statistics."""

import copy

import pytest
import torch
from torch import nn

from batchproof.layers import BatchNorm1d, BatchRenorm1d, use_mode

torch.set_num_threads(1)
FEATURES = 5
LAYERS = {
    "batch": lambda: BatchNorm1d(FEATURES),
    "renorm": lambda: BatchRenorm1d(FEATURES, warmup_steps=1),
    "renorm-smooth-folded": lambda: BatchRenorm1d(
        FEATURES, formula="folded", warmup="smooth", warmup_steps=8
    ),
}
# What PyTorch itself warns about while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def network(name):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, FEATURES), LAYERS[name](), nn.ReLU())


def equal(actual, desired):
    torch.testing.assert_close(actual, desired, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_is_eager(name):
    eager = network(name)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for letter in ("T", "T", "S", "E", "t"):
        x = torch.randn(16, 3)
        with use_mode(eager, letter):
            y = eager(x)
        with use_mode(other, letter):
            same = compiled(x)
        equal(same, y)
        for net, out in ((eager, y), (other, same)):
            net.zero_grad()
            out.pow(2).sum().backward()
        # A compiled backward must not take r and d from the statistics as they are by then.
        for a, b in zip(other.parameters(), eager.parameters(), strict=True):
            equal(a.grad, b.grad)
        for a, b in zip(other.buffers(), eager.buffers(), strict=True):
            equal(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_an_explicit_mode_compiles(name):
    layer = LAYERS[name]()
    compiled = torch.compile(lambda x: layer(x, mode="t"), fullgraph=True, backend="aot_eager")
    x = torch.randn(8, FEATURES)
    equal(compiled(x), layer(x, mode="t"))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [False, True])
def test_exported_is_eager_for_any_batch_size(name, training):
    net = network(name).train(training)
    expected = copy.deepcopy(net)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (torch.randn(4, 3),), dynamic_shapes=({0: batch},))
    exported = program.module()
    for rows in (2, 7):
        x = torch.randn(rows, 3)
        equal(exported(x), expected(x))
    for key, value in expected.state_dict().items():
        equal(exported.state_dict()[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_inductor_is_eager(name):
    eager = network(name)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True)
    x = torch.randn(16, 3)
    y, same = eager(x), compiled(x)
    equal(same, y)
    same.pow(2).sum().backward()
    y.pow(2).sum().backward()
    for a, b in zip(other.parameters(), eager.parameters(), strict=True):
        equal(a.grad, b.grad)
    for a, b in zip(other.buffers(), eager.buffers(), strict=True):
        equal(a, b)
