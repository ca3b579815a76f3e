"""Layers by name: what each makes, and what is refused."""

import pytest
import torch
from torch import nn

from batchproof.errors import BatchproofError
from batchproof.layers import (
    LAYERS,
    BatchNorm1d,
    BatchNorm2d,
    BatchRenorm1d,
    BatchRenorm2d,
    create_norm,
)

SHAPES = {1: (5, 8), 2: (5, 8, 3, 3)}


@pytest.mark.parametrize(
    ("name", "dims", "kind"),
    [
        ("none", 1, nn.Identity),
        ("none", 2, nn.Identity),
        ("batch", 1, BatchNorm1d),
        ("batch", 2, BatchNorm2d),
        ("renorm", 1, BatchRenorm1d),
        ("renorm", 2, BatchRenorm2d),
        ("layer", 1, nn.LayerNorm),
        ("layer", 2, nn.GroupNorm),
        ("group", 1, nn.GroupNorm),
        ("group", 2, nn.GroupNorm),
        ("rms", 1, nn.RMSNorm),
    ],
)
def test_what_each_name_makes(name, dims, kind):
    layer = create_norm(name, 8, dims=dims)
    assert type(layer) is kind
    x = torch.randn(SHAPES[dims])
    y = layer(x)
    assert y.shape == x.shape
    if name != "none":
        (layer(x) ** 2).sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dims", [1, 2])
def test_layer_norm_normalizes_each_row(dims):
    x = 3 + 2 * torch.randn(SHAPES[dims])
    rows = create_norm("layer", 8, dims=dims)(x).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.var(1, correction=0), torch.ones(5), rtol=1e-4, atol=0)


def test_options_reach_the_layer():
    assert create_norm("batch", 8, momentum=0.01).momentum == 0.01
    assert create_norm("renorm", 8, formula="folded").renorm.formula == "folded"
    assert create_norm("group", 8, groups=2).num_groups == 2
    assert create_norm("rms", 8).eps == 1e-5
    assert create_norm("layer", 8, dims=2, eps=0.1).num_groups == 1


def test_names_are_the_labs():
    pytest.importorskip("jax", reason="needs JAX")
    from batchproof.lab.norms import KINDS

    assert list(LAYERS) == list(KINDS)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("batchnorm", {}, "unknown norm 'batchnorm': use one of none, batch, renorm, layer"),
        ("batch", {"dims": 3}, r"dims must be 1 for \(N, C\) or 2 for \(N, C, H, W\), got 3"),
        ("batch", {"groups": 2}, "norm 'batch' cannot take these options.*groups"),
        ("none", {"eps": 1e-3}, "norm 'none' cannot take these options.*eps"),
        ("group", {"groups": 3}, "8 features into 3 equal groups"),
        ("group", {"groups": 0}, "8 features into 0 equal groups"),
        ("rms", {"dims": 2}, "use 'layer' or 'group' on images"),
        ("batch", {"eps": 0.0}, "eps must be positive"),
    ],
)
def test_bad_requests_say_what_to_write(name, options, says):
    with pytest.raises(BatchproofError, match=says):
        create_norm(name, 8, **options)
