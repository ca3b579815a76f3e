"""The lab's networks against torch modules with the same weights, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from batchproof.errors import BatchproofError
from batchproof.lab import nets
from batchproof.lab.agents import sac, td3
from batchproof.lab.nets import MLP, Network
from batchproof.lab.norms import Norm
from batchproof.lab.passes import Batch
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


def test_no_hidden_layer_is_a_linear_network():
    norm = Norm("batch", "input")
    network = draw_network(1, nets.init, MLP((), norm), O, A)
    module = nn.Sequential(norm_in_torch(norm, O), nn.Linear(O, A))
    compare(MLP((), norm), network, module, ["norm_input", "linear_out"], T, [draw(2, B, O)])


def test_without_bias_only_the_output_layer_has_one():
    """Batch norm after a layer subtracts its bias, so the function is the one with any bias."""
    norm = Norm("batch", "pre", eps=0)
    network = draw_network(1, nets.init, MLP(WIDTHS, norm), O, A)
    bare = draw_network(1, nets.init, MLP(WIDTHS, norm, bias=False), O, A)
    having = {name for name, layer in bare.params.items() if "bias" in layer}
    assert having == {"norm_pre_0", "norm_pre_1", "linear_out"}
    for name in ("linear_0", "linear_1"):
        del network.params[name]["bias"]
    assert jax.tree.structure(network) == jax.tree.structure(bare)
    obs = jnp.asarray(draw(2, B, O))
    biased = Network(
        {
            name: layer | {"bias": jnp.full(layer["weight"].shape[1], 7.0)}
            if name in ("linear_0", "linear_1")
            else layer
            for name, layer in network.params.items()
        },
        network.stats,
    )
    ours, _ = nets.apply(MLP(WIDTHS, norm, bias=False), network, obs, T)
    equal(ours, nets.apply(MLP(WIDTHS, norm), biased, obs, T)[0])


# Projection


def lengths(layer, with_bias):
    square = (np.asarray(layer["weight"]) ** 2).sum(-2)
    return np.sqrt(square + with_bias * np.asarray(layer.get("bias", 0)) ** 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("project", nets.PROJECTIONS)
def test_projection_makes_each_units_weights_one_long(project, bias):
    """Of stacked critics: hidden weights with their bias, the output's without, norms untouched."""
    mlp = MLP(WIDTHS, Norm("batch", "input+pre"), bias=bias, project=project)
    critics = draw_network(1, nets.init_critics, mlp, O, A, 2)
    params = nets.project(mlp, critics.params)
    done = {"none": (), "hidden": ("linear_0", "linear_1")}.get(
        project, ("linear_0", "linear_1", "linear_out")
    )
    for name, layer in critics.params.items():
        if name not in done:
            equal(params[name], layer)
            continue
        out = name == "linear_out"
        np.testing.assert_allclose(lengths(params[name], not out), 1, rtol=1e-13)
        if out:
            equal(params[name]["bias"], layer["bias"])
        # The direction stays.
        ratio = layer["weight"] / params[name]["weight"]
        equal(ratio, jnp.broadcast_to(lengths(layer, not out)[:, None], ratio.shape))


@pytest.mark.parametrize("placement", ["pre", "input+post"])
@pytest.mark.parametrize("bias", [True, False])
def test_hidden_projection_leaves_the_function_of_a_batch_norm_network(placement, bias):
    """Batch norm before or after a ReLU does not see a unit's scale: exactly so with eps = 0."""
    mlp = MLP(WIDTHS, Norm("batch", placement, eps=0), bias=bias, project="hidden")
    network = draw_network(1, nets.init, mlp, O, A)
    obs = jnp.asarray(draw(2, 50, O))
    projected = Network(nets.project(mlp, network.params), network.stats)
    assert np.abs(lengths(network.params["linear_1"], bias) - 1).min() > 0.05
    before, after = (nets.apply(mlp, n, obs, T)[0] for n in (network, projected))
    np.testing.assert_allclose(after, before, rtol=1e-10)
    # Without a norm it is another function: the projection then constrains the network.
    before, after = (
        nets.apply(MLP(WIDTHS, bias=bias), Network(linear_layers(n.params), {}), obs, T)[0]
        for n in (network, projected)
    )
    assert np.abs(after - before).max() > 0.1


def linear_layers(params):
    return {name: layer for name, layer in params.items() if name.startswith("linear_")}


@pytest.mark.parametrize("project", ["hidden", "all"])
def test_networks_start_projected(project):
    mlp = MLP((4, 3), project=project)
    params = nets.init(jax.random.key(0), mlp, O, A).params
    equal(params, nets.project(mlp, params))
    np.testing.assert_allclose(lengths(params["linear_0"], True), 1, rtol=1e-13)


@pytest.mark.parametrize("algo", ["td3", "sac"])
def test_updates_of_every_agent_end_projected(algo):
    """After two updates, the second of which also moves TD3's actor."""
    agent = {"td3": td3, "sac": sac}[algo]
    mlp = MLP((4,), Norm("batch"), project="hidden")
    config = agent.Config(actor=mlp, critic=mlp, learning_rate=0.1)
    state = jax.jit(agent.init, static_argnums=(0, 2, 3))(config, jax.random.key(0), O, A)
    rng = np.random.default_rng(0)
    batch = Batch(*(jnp.asarray(rng.normal(size=s)) for s in ((B, O), (B, A), B, (B, O), B)))
    update = jax.jit(partial(agent.update, config))
    for step in (1, 2):
        new, _ = update(state, batch, jax.random.key(step), step)
        state, old = new, state
    for network, before in ((state.actor, old.actor), (state.critic, old.critic)):
        np.testing.assert_allclose(lengths(network.params["linear_0"], True), 1, rtol=1e-12)
        moved = network.params["linear_0"]["weight"] - before.params["linear_0"]["weight"]
        assert np.abs(moved).max() > 1e-3


# Precision


class RoundedProduct(torch.autograd.Function):
    """x @ w with all factors rounded to bfloat16, forward and backward; sums in float64."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(rounded(x), rounded(w))
        return rounded(x) @ rounded(w)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return rounded(grad) @ w.T, x.T @ rounded(grad)


def rounded(x):
    return x.bfloat16().double()


@pytest.mark.parametrize("rows", [B, B - 1])
def test_bfloat16_rounds_the_factors_of_hidden_products_and_nothing_else(rows):
    x, weight = draw(1, rows, O), draw(2, rows, A)
    found = {}
    for precision in nets.PRECISIONS:
        mlp = MLP(WIDTHS, precision=precision)
        network = draw_network(3, nets.init, mlp, O, A)

        def loss(params, x, mlp=mlp):
            return (nets.apply(mlp, Network(params, {}), x, T)[0] * weight).sum()

        found[precision] = jax.grad(loss, argnums=(0, 1))(network.params, jnp.asarray(x))
    ours, ours_x = found["bfloat16"]

    theirs = {
        name: {key: torch.tensor(np.asarray(value), requires_grad=True) for key, value in p.items()}
        for name, p in network.params.items()
    }
    given = torch.tensor(x, requires_grad=True)
    h = given
    for name in ("linear_0", "linear_1"):
        h = torch.relu(RoundedProduct.apply(h, theirs[name]["weight"]) + theirs[name]["bias"])
    y = h @ theirs["linear_out"]["weight"] + theirs["linear_out"]["bias"]
    (y * torch.tensor(weight)).sum().backward()
    np.testing.assert_allclose(ours_x, given.grad, rtol=1e-5, atol=1e-5)
    for name, layer in theirs.items():
        for key, value in layer.items():
            np.testing.assert_allclose(ours[name][key], value.grad, rtol=1e-5, atol=1e-5)
    # It is another result than without rounding, by more than these tolerances.
    off = np.abs(ours_x - found["float32"][1]).max()
    assert 1e-3 < off < 0.1 * np.abs(ours_x).max()


# Mistakes


@pytest.mark.parametrize("hidden", [(4, 0), (-1,)])
def test_hidden_layers_need_positive_widths(hidden):
    with pytest.raises(BatchproofError, match="hidden layers need positive widths"):
        MLP(hidden)


def test_an_unknown_projection_says_what_to_write():
    with pytest.raises(BatchproofError, match="'unit': use one of none, hidden, all"):
        MLP(project="unit")


def test_an_unknown_precision_says_what_to_write():
    with pytest.raises(BatchproofError, match="'half': use one of float32, bfloat16"):
        MLP(precision="half")


def test_before_action_needs_two_hidden_layers():
    with pytest.raises(BatchproofError, match="needs two hidden layers"):
        MLP((4,), Norm("batch", "before-action"))
