"""The lab's networks against torch modules with the same weights, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from batchproof.errors import BatchproofError
from batchproof.lab import nets
from batchproof.lab.nets import MLP, Network
from batchproof.lab.norms import Norm
from batchproof.modes import E, T

O, A, B = 3, 2, 12  # noqa: E741
WIDTHS = (7, 5)


@pytest.fixture(autouse=True, scope="module")
def _float64():
    # Nearly all the time goes into compiling, so compile fast.
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def draw_network(seed, init, *sizes):
    """What ``init(key, *sizes)`` makes, with other numbers: also norms and statistics away from 0.

    Drawing them in NumPy saves compiling a generator for each shape.
    """
    rng = np.random.default_rng(seed)

    def leaf(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(rng.uniform(0.1, 1, x.shape) * rng.choice([-1, 1], x.shape))

    params, stats = jax.eval_shape(lambda key: init(key, *sizes), jax.random.key(0))
    stats = jax.tree.map(leaf, stats)
    for layer in stats.values():
        if layer:
            layer["var"] = jnp.abs(layer["var"])
    return Network(jax.tree.map(leaf, params), stats)


def norm_in_torch(norm, features):
    if norm.kind == "layer":
        return nn.LayerNorm(features, eps=norm.eps)
    return nn.BatchNorm1d(features, eps=norm.eps, momentum=norm.momentum)


class ActionAtSecondLayer(nn.Module):
    """DDPG's critic: obs -> [BN] -> Linear -> BN -> ReLU -> concat action -> Linear -> ReLU."""

    def __init__(self, norm):
        super().__init__()
        self.before = nn.Sequential(
            norm_in_torch(norm, O), nn.Linear(O, 7), norm_in_torch(norm, 7), nn.ReLU()
        )
        self.after = nn.Sequential(nn.Linear(7 + A, 5), nn.ReLU(), nn.Linear(5, 1))

    def forward(self, obs, action):
        return self.after(torch.cat([self.before(obs), action], dim=1))


class ActionAtInput(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, obs, action):
        return self.layers(torch.cat([obs, action], dim=1))


def torch_layers(norm, in_size, out_size):
    """Each placement spelt out, with the names of our layers in the same order."""

    def make(features):
        return norm_in_torch(norm, features)

    def linears():
        return nn.Linear(in_size, 7), nn.Linear(7, 5), nn.Linear(5, out_size)

    first, second, last = linears()
    return {
        "input": [make(in_size), first, nn.ReLU(), second, nn.ReLU(), last],
        "pre": [first, make(7), nn.ReLU(), second, make(5), nn.ReLU(), last],
        "post": [first, nn.ReLU(), make(7), second, nn.ReLU(), make(5), last],
        "input+post": [make(in_size), first, nn.ReLU(), make(7), second, nn.ReLU(), make(5), last],
        "input+pre": [make(in_size), first, make(7), nn.ReLU(), second, make(5), nn.ReLU(), last],
    }[norm.placement]


NAMES = {
    "input": ["norm_input", "linear_0", "linear_1", "linear_out"],
    "pre": ["linear_0", "norm_pre_0", "linear_1", "norm_pre_1", "linear_out"],
    "post": ["linear_0", "norm_post_0", "linear_1", "norm_post_1", "linear_out"],
    "before-action": ["norm_input", "linear_0", "norm_pre_0", "linear_1", "linear_out"],
}
NAMES["input+post"] = ["norm_input", *NAMES["post"]]
NAMES["input+pre"] = ["norm_input", *NAMES["pre"]]


def pairs(module, names):
    """Our layers' names with the torch layers that have parameters, in order."""
    layers = [
        m for m in module.modules() if isinstance(m, nn.Linear | nn.BatchNorm1d | nn.LayerNorm)
    ]
    return list(zip(names, layers, strict=True))


def load(module, names, network):
    module.double()
    for name, layer in pairs(module, names):
        ours = {key: torch.tensor(np.asarray(x)) for key, x in network.params[name].items()}
        if isinstance(layer, nn.Linear):
            layer.weight.data, layer.bias.data = ours["weight"].T.contiguous(), ours["bias"]
            continue
        layer.weight.data, layer.bias.data = ours["scale"], ours["bias"]
        if network.stats[name]:
            layer.running_mean.copy_(torch.tensor(np.asarray(network.stats[name]["mean"])))
            layer.running_var.copy_(torch.tensor(np.asarray(network.stats[name]["var"])))


def unload(module, names, attribute):
    """Parameters (``data``) or gradients (``grad``) of a torch module in our layout."""
    tree = {}
    for name, layer in pairs(module, names):
        weight, bias = (getattr(p, attribute).numpy() for p in (layer.weight, layer.bias))
        if isinstance(layer, nn.Linear):
            tree[name] = {"weight": weight.T, "bias": bias}
        else:
            tree[name] = {"scale": weight, "bias": bias}
    return tree


def unload_stats(module, names):
    return {
        name: {
            "mean": layer.running_mean.numpy(),
            "var": layer.running_var.numpy(),
            "count": layer.num_batches_tracked.numpy(),
        }
        for name, layer in pairs(module, names)
        if isinstance(layer, nn.BatchNorm1d)
    }


def equal(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree.map(
        lambda a, d: np.testing.assert_allclose(a, d, rtol=1e-11, atol=1e-12), actual, desired
    )


def compare(mlp, network, module, names, mode, inputs):
    """Output, statistics and all gradients of sum(output * cotangent) are the torch module's."""
    out_size = network.params["linear_out"]["bias"].shape[0]
    cotangent = draw(9, B, out_size)

    def weighted(params, inputs):
        y, stats = nets.apply(mlp, Network(params, network.stats), inputs[0], mode, *inputs[1:])
        return (y * cotangent).sum(), (y, stats)

    grad = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))
    (grad_params, grad_inputs), (y, stats) = grad(network.params, [jnp.asarray(x) for x in inputs])

    load(module, names, network)
    module.train(mode == T)
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    theirs = module(*tensors)
    (theirs * torch.tensor(cotangent)).sum().backward()

    equal(y, theirs.detach().numpy())
    equal(grad_params, unload(module, names, "grad"))
    equal(grad_inputs, [x.grad.numpy() for x in tensors])
    equal({name: s for name, s in stats.items() if s}, unload_stats(module, names))


@pytest.mark.parametrize(
    ("placement", "mode"),
    [("input", T), ("pre", T), ("post", T), ("input+post", T), ("input+pre", T), ("pre", E)],
)
def test_actor_is_the_torch_network(placement, mode):
    norm = Norm("batch", placement)
    mlp = MLP(WIDTHS, norm)
    network = draw_network(1, nets.init, mlp, O, A)
    module = nn.Sequential(*torch_layers(norm, O, A))
    compare(mlp, network, module, NAMES[placement], mode, [draw(2, B, O)])


def test_layer_norm_network_is_the_torch_network():
    norm = Norm("layer", "pre")
    mlp = MLP(WIDTHS, norm)
    network = draw_network(1, nets.init, mlp, O, A)
    module = nn.Sequential(*torch_layers(norm, O, A))
    compare(mlp, network, module, NAMES["pre"], T, [draw(2, B, O)])


@pytest.mark.parametrize("placement", ["pre", "input+post"])
def test_critic_is_the_torch_network(placement):
    """The input norm of a critic covers observation and action."""
    norm = Norm("batch", placement, momentum=0.3, eps=1e-3)
    mlp = MLP(WIDTHS, norm)
    network = draw_network(1, nets.init, mlp, O, 1, A)
    module = ActionAtInput(nn.Sequential(*torch_layers(norm, O + A, 1)))
    compare(mlp, network, module, NAMES[placement], T, [draw(2, B, O), draw(3, B, A)])


@pytest.mark.parametrize("mode", [T, E])
def test_critic_with_norm_before_the_action_is_the_torch_network(mode):
    norm = Norm("batch", "before-action")
    mlp = MLP(WIDTHS, norm)
    network = draw_network(1, nets.init, mlp, O, 1, A)
    module = ActionAtSecondLayer(norm)
    inputs = [draw(2, B, O), draw(3, B, A)]
    compare(mlp, network, module, NAMES["before-action"], mode, inputs)


def test_without_norm_nothing_is_remembered():
    network = draw_network(0, nets.init, MLP(WIDTHS, Norm()), O, A)
    assert network.stats == {}
    assert list(network.params) == ["linear_0", "linear_1", "linear_out"]


def test_actor_of_before_action_is_input_and_pre():
    mlp = MLP(WIDTHS, Norm("batch", "before-action", momentum=0.3))
    assert nets.without_action(mlp) == MLP(WIDTHS, Norm("batch", "input+pre", momentum=0.3))
    plain = MLP(WIDTHS, Norm("batch", "post"))
    assert nets.without_action(plain) == plain


@pytest.mark.parametrize("placement", ["pre", "before-action"])
def test_stacked_critics_are_separate_ones(placement):
    mlp = MLP(WIDTHS, Norm("batch", placement))
    critics = draw_network(1, nets.init_critics, mlp, O, A, 3)
    obs, action = jnp.asarray(draw(2, B, O)), jnp.asarray(draw(3, B, A))
    cotangent = draw(4, 3, B)

    def stacked(params):
        q, stats = nets.q_values(mlp, Network(params, critics.stats), obs, action, T)
        return (q * cotangent).sum(), (q, stats)

    grads, (q, stats) = jax.jit(jax.grad(stacked, has_aux=True))(critics.params)
    assert q.shape == (3, B)

    @jax.jit
    def separate(network, cotangent):
        def loss(params):
            y, stats = nets.apply(mlp, Network(params, network.stats), obs, T, action)
            return (y[:, 0] * cotangent).sum(), (y[:, 0], stats)

        return jax.grad(loss, has_aux=True)(network.params)

    for c in range(3):
        one = jax.tree.map(lambda leaf, c=c: leaf[c], (critics, grads, q, stats))
        alone_grads, (alone_q, alone_stats) = separate(one[0], cotangent[c])
        equal(one[1:], (alone_grads, alone_q, alone_stats))


def test_critics_start_different():
    critics = nets.init_critics(jax.random.key(0), MLP(WIDTHS), O, A, 2)
    weights = critics.params["linear_0"]["weight"]
    assert np.abs(weights[0] - weights[1]).max() > 0.1


def test_initial_weights_are_distributed_as_torchs():
    """Uniform within +-1/sqrt(inputs), weights and biases, as `torch.nn.Linear` draws them."""
    mlp = MLP((300, 200), Norm("batch"))
    critic = nets.init(jax.random.key(0), mlp, 20, 1, 5)
    sizes = {"linear_0": (25, 300), "linear_1": (300, 200), "linear_out": (200, 1)}
    for name, (inputs, outputs) in sizes.items():
        bound = inputs**-0.5
        layer = nn.Linear(inputs, outputs)
        assert layer.weight.abs().max() <= bound  # the reference's own bound
        assert critic.params[name]["weight"].shape == (inputs, outputs)
        assert critic.params[name]["bias"].shape == (outputs,)
        for key in ("weight", "bias"):
            values = np.asarray(critic.params[name][key]).ravel()
            assert np.abs(values).max() <= bound
            uniform = scipy.stats.uniform(-bound, 2 * bound)
            assert scipy.stats.kstest(values, uniform.cdf).pvalue > 1e-3


def test_initial_weights_and_biases_are_independent():
    params = nets.init(jax.random.key(0), MLP((50, 50)), 50, 50).params
    firsts = [params[name][key].ravel()[0] for name in params for key in params[name]]
    assert len({float(x) for x in firsts}) == 6


@pytest.mark.parametrize("hidden", [(), (4, 0), (-1,)])
def test_a_network_needs_hidden_layers(hidden):
    with pytest.raises(BatchproofError, match="at least one hidden layer of positive width"):
        MLP(hidden)


def test_before_action_needs_two_hidden_layers():
    with pytest.raises(BatchproofError, match="needs two hidden layers"):
        MLP((4,), Norm("batch", "before-action"))
