"""Statistics by channel against NumPy, and the picture."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from batchproof.clinic.channels import Channels, channels, channels_picture
from batchproof.clinic.precise import recalibrate
from batchproof.errors import BatchproofError
from batchproof.layers import BatchNorm2d, BatchRenorm2d


def network(norm=BatchNorm2d):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 3), norm(4), nn.Flatten(),
        nn.Linear(4 * 36, 2),
    )  # fmt: skip


def images():
    return torch.rand(32, 1, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", [BatchNorm2d, BatchRenorm2d, nn.BatchNorm2d])
def test_statistics_of_the_first_layer_are_those_of_its_convolution(norm):
    net, obs = network(norm), images()
    net[1].running_mean.fill_(0.25)
    first, second = channels(net, obs)
    x = net[0](obs).detach().double().numpy()
    np.testing.assert_allclose(first.data_mean, x.mean((0, 2, 3)), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(first.data_var, x.var((0, 2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(first.running_mean, 0.25)
    error = (0.25 - x.mean((0, 2, 3))) / np.sqrt(x.var((0, 2, 3)) + 1e-5)
    np.testing.assert_allclose(first.mean_error, error, rtol=1e-5)
    assert (first.name, second.name) == ("policy.1", "policy.4")


def test_the_second_layer_sees_what_eval_mode_gives_it():
    net, obs = network(), images()
    net.eval()
    expected = net[3](net[2](net[1](net[0](obs)))).detach().numpy()
    net.train()
    second = channels(net, obs)[1]
    np.testing.assert_allclose(second.data_mean, expected.mean((0, 2, 3)), rtol=1e-5, atol=1e-7)


def test_after_recalibration_nothing_is_off():
    net, obs = network(), images()
    assert any(layer.off.any() for layer in channels(net, obs))
    recalibrate(net, obs)
    for layer in channels(net, obs):
        np.testing.assert_allclose(layer.mean_error, 0, atol=1e-5)
        np.testing.assert_allclose(layer.scale_ratio, 1, atol=1e-5)
        assert not layer.off.any()


def test_the_network_is_left_as_it_was():
    net = network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    channels(net, images())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.training
    assert not net[1]._forward_pre_hooks


def test_dead_and_far_channels_are_told():
    layer = Channels(
        "x",
        running_mean=np.array([0.0, 0.6, 0.0, 0.0]),
        running_var=np.array([1.0, 1.0, 5.0, 1.0]),
        data_mean=np.zeros(4),
        data_var=np.array([1.0, 1.0, 1.0, 0.0]),
        eps=1e-5,
    )
    assert layer.off.tolist() == [False, True, True, True]
    assert layer.still.tolist() == [False, False, False, True]


def test_json_and_back():
    layer = channels(network(), images())[0]
    again = Channels.from_json(json.loads(json.dumps(layer.to_json())))
    np.testing.assert_array_equal(again.mean_error, layer.mean_error)


def test_a_picture_is_written(tmp_path):
    from PIL import Image

    path = tmp_path / "channels.png"
    channels_picture(channels(network(), images()), path, headline="Two layers", dpi=60)
    with Image.open(path) as image:
        assert image.size[0] == 720
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_nothing_to_draw_and_nothing_to_see():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(100, 2))
    assert channels(plain, images()) == []
    with pytest.raises(BatchproofError, match="nothing to draw"):
        channels_picture([], "never.png")
    with pytest.raises(BatchproofError, match="observations"):
        channels(plain)
