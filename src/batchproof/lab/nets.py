"""Multilayer perceptrons with a norm at a visible place, and twin critics as one stacked network.

Shapes: ``B`` batch, ``O`` obs, ``A`` action, ``C`` critics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.errors import BatchproofError
from batchproof.lab import norms
from batchproof.lab.norms import Norm
from batchproof.modes import Mode

Tree = Any


PROJECTIONS = ("none", "hidden", "all")
PRECISIONS = ("float32", "bfloat16")
WATCHERS: list[Callable[[str, Norm, Array, Mode, Tree], None]] = []
"""Called as each pass is traced and before each of its norms: the layer's name ('' for the pass),
the norm, what goes in, the mode and the network's statistics. See `batchproof.lab.trace`."""


class Network(NamedTuple):
    """What a network learns and what it remembers: parameters and running statistics."""

    params: Tree
    stats: Tree


@dataclass(frozen=True)
class MLP:
    """Hidden layers of a network: ``Linear [norm] ReLU [norm]`` each, after an optional input norm.

    Attributes:
        hidden: width of each hidden layer; none at all is a linear network.
        norm: what normalizes it, and where.
        bias: False leaves out the hidden layers' biases, as XQC does: a norm right after the
            layer would subtract them. The output layer always has one.
        project: which layers' weights are scaled to length 1 after each optimizer step, see
            `project`: ``none``, ``hidden`` or ``all``, the output layer too.
        precision: what the factors of the hidden layers' products are rounded to, forward and
            backward: ``bfloat16`` is faster where the CPU has instructions for it. Sums,
            parameters, norms and the output layer stay as they are.
    """

    hidden: tuple[int, ...] = (256, 256)
    norm: Norm = field(default_factory=Norm)
    bias: bool = True
    project: str = "none"
    precision: str = "float32"

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise BatchproofError(f"hidden layers need positive widths, got {self.hidden}")
        if self.project not in PROJECTIONS:
            raise BatchproofError(
                f"unknown projection {self.project!r}: use one of {', '.join(PROJECTIONS)}"
            )
        if self.precision not in PRECISIONS:
            raise BatchproofError(
                f"unknown precision {self.precision!r}: use one of {', '.join(PRECISIONS)}"
            )
        if "before-action" in self.norm.placement.split("+") and len(self.hidden) < 2:
            raise BatchproofError(
                "placement before-action needs two hidden layers: the action enters at the second"
            )

    @property
    def action_layer(self) -> int:
        """Index of the layer where a critic's action enters; 0 is beside the observation."""
        return int("before-action" in self.norm.placement.split("+"))


def without_action(mlp: MLP) -> MLP:
    """The same network for an actor, which has no action input: ``before-action`` is ``input+pre``.

    DDPG normalizes the state input and all layers of its actor (arXiv 1509.02971, section 3).
    """
    if not mlp.action_layer:
        return mlp
    places = set(mlp.norm.placement.split("+")) - {"before-action"} | {"input", "pre"}
    return replace(mlp, norm=replace(mlp.norm, placement="+".join(sorted(places))))


def _sits(mlp: MLP, place: str, layer: int) -> bool:
    """Whether the norm stands at `place` of hidden layer `layer` (the input counts as layer 0)."""
    before = mlp.norm.sits("before-action") and layer < mlp.action_layer and place != "post"
    return mlp.norm.sits(place) or before


def init(key: Array, mlp: MLP, in_size: int, out_size: int, action_size: int = 0) -> Network:
    """A network from ``in_size`` (and ``action_size``) to ``out_size``.

    It starts as PyTorch's would: weights (in, out) and biases are uniform in +-1/sqrt(in), then
    projected where `mlp` says so.
    """
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}

    def add_norm(name: str, features: int) -> None:
        params[name], stats[name] = norms.init(mlp.norm, features)

    size = in_size + (action_size if mlp.action_layer == 0 else 0)
    if _sits(mlp, "input", 0):
        add_norm("norm_input", size)
    keys = jax.random.split(key, len(mlp.hidden) + 1)
    for layer, width in enumerate(mlp.hidden):
        if layer == mlp.action_layer and layer > 0:
            size += action_size
        params[f"linear_{layer}"] = _init_linear(keys[layer], size, width, mlp.bias)
        for place in ("pre", "post"):
            if _sits(mlp, place, layer):
                add_norm(f"norm_{place}_{layer}", width)
        size = width
    params["linear_out"] = _init_linear(keys[-1], size, out_size, True)
    return Network(project(mlp, params), stats)


def _init_linear(key: Array, in_size: int, out_size: int, bias: bool) -> dict[str, Array]:
    bound = in_size**-0.5
    # One draw for both: each draw takes long to compile.
    values = jax.random.uniform(key, (in_size + 1, out_size), minval=-bound, maxval=bound)
    return {"weight": values[:-1], "bias": values[-1]} if bias else {"weight": values[:-1]}


def project(mlp: MLP, params: Tree) -> Tree:
    """Scale each unit's incoming weights to length 1: what follows an optimizer step.

    Per unit and not per matrix, as in the code of arXiv 2502.07523 and 2509.25174: what a batch
    norm does not see is the length of each unit's own weight vector, so each has an effective
    learning rate of its own to be held constant. A hidden layer's bias belongs to the vector, so
    that the unit's output is scaled as a whole: with eps = 0 a norm before or after the ReLU then
    gives the same function. The output layer keeps its bias out.

    Args:
        mlp: what to project is its ``project``.
        params: of one network, or of stacked critics.
    """
    if mlp.project == "none":
        return params
    projected = dict(params)
    for name, layer in params.items():
        if not name.startswith("linear_") or (name == "linear_out" and mlp.project == "hidden"):
            continue
        scale = jax.lax.rsqrt(squared_lengths(name, layer))
        projected[name] = layer | {"weight": layer["weight"] * scale[..., None, :]}
        if "bias" in layer and name != "linear_out":
            projected[name]["bias"] = layer["bias"] * scale
    return projected


def squared_lengths(name: str, layer: Tree) -> Array:
    """Squared length of each unit's incoming weights, (..., out), a hidden layer's bias included.

    Args:
        name: of the layer, such as ``linear_0``.
        layer: its parameters, of one network or of stacked critics.
    """
    square = jnp.square(layer["weight"]).sum(-2)
    if "bias" in layer and name != "linear_out":
        square += jnp.square(layer["bias"])
    return square


def apply(
    mlp: MLP, network: Network, x: Array, mode: Mode, action: Array | None = None
) -> tuple[Array, Tree]:
    """Run the network on ``x`` (B, in) and, for a critic, ``action`` (B, A).

    Returns:
        The output (B, out) and the running statistics after the pass.
    """
    params, stats = network
    new_stats = dict(stats)

    def tell(layer: str, x: Array) -> None:
        for watch in WATCHERS:
            watch(layer, mlp.norm, x, mode, stats)

    def linear(name: str, x: Array) -> Array:
        # Q is a sum of many terms, and cheap: its last layer is not rounded.
        rounded = mlp.precision != "float32" and name != "linear_out"
        product = _product_of_bfloat16 if rounded else _product
        y = product(x, params[name]["weight"])
        return y + params[name]["bias"] if "bias" in params[name] else y

    def norm(name: str, x: Array) -> Array:
        if name not in params:
            return x
        tell(name, x)
        x, new_stats[name] = norms.apply(mlp.norm, params[name], stats[name], x, mode)
        return x

    def enter(layer: int, x: Array) -> Array:
        if action is None or layer != mlp.action_layer:
            return x
        return jnp.concatenate([x, action], axis=-1)

    tell("", x)
    x = norm("norm_input", enter(0, x))
    for layer in range(len(mlp.hidden)):
        x = linear(f"linear_{layer}", enter(layer, x) if layer else x)
        x = norm(f"norm_pre_{layer}", x)
        x = jax.nn.relu(x)
        x = norm(f"norm_post_{layer}", x)
    return linear("linear_out", x), new_stats


def _forward(x: Array, weight: Array) -> Array:
    # In float32 and float64 this is ``x @ weight``; products of bfloat16 are summed in float32.
    sums = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("bi,io->bo", x, weight, preferred_element_type=sums)


def _backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, weight = saved
    sums, rounded = jnp.promote_types(x.dtype, jnp.float32), grad.astype(x.dtype)
    grad_x = jnp.einsum("bo,io->bi", rounded, weight, preferred_element_type=sums)
    if x.dtype == jnp.bfloat16 and len(x) % 2 == 0:
        grad_weight = jnp.einsum("ib,bo->io", _turned(x), rounded, preferred_element_type=sums)
    else:
        grad_weight = jnp.einsum("bi,bo->io", x, rounded, preferred_element_type=sums)
    return grad_x.astype(grad.dtype), grad_weight.astype(grad.dtype)


def _turned(x: Array) -> Array:
    """``x`` (B, in), B even, as (in, B), in memory too.

    XLA puts a plain transposition into the product that follows, and on a CPU computes such a
    product of bfloat16 in float32. What is reshaped on the way stays apart.
    """
    rows, features = x.shape
    return jnp.moveaxis(x.reshape(rows // 2, 2, features), -1, 0).reshape(features, rows)


@jax.custom_vjp
def _product(x: Array, weight: Array) -> Array:
    """``x`` (B, in) times ``weight`` (in, out), whose gradient is not a transposed product.

    JAX forms a weight's gradient as (out, in) and transposes it. Under two `jax.vmap` XLA does not
    undo that on a CPU: every pass of Adam then reads its gradient column by column, which made an
    update of critics 1024 wide a quarter slower (docs/crossq.md).
    """
    return _forward(x, weight)


_product.defvjp(lambda x, weight: (_forward(x, weight), (x, weight)), _backward)


def _round(x: Array, weight: Array) -> tuple[Array, Array]:
    return x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)


@jax.custom_vjp
def _product_of_bfloat16(x: Array, weight: Array) -> Array:
    """The same with both factors rounded to bfloat16, in the backward pass too; sums in float32."""
    return _forward(*_round(x, weight)).astype(x.dtype)


def _product_of_bfloat16_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    rounded = _round(x, weight)
    return _forward(*rounded).astype(x.dtype), rounded


_product_of_bfloat16.defvjp(_product_of_bfloat16_forward, _backward)


def init_critics(
    key: Array, mlp: MLP, obs_size: int, action_size: int, critics: int, outputs: int = 1
) -> Network:
    """``critics`` independent Q networks, stacked: every leaf has a leading axis C."""
    keys = jax.random.split(key, critics)
    return jax.vmap(lambda k: init(k, mlp, obs_size, outputs, action_size))(keys)


def critic_outputs(
    mlp: MLP, critics: Network, obs: Array, action: Array, mode: Mode
) -> tuple[Array, Tree]:
    """Each critic on ``obs`` (B, O) and ``action`` (B, A): outputs (C, B, out), new statistics."""
    return jax.vmap(lambda network: apply(mlp, network, obs, mode, action))(critics)


def q_values(
    mlp: MLP, critics: Network, obs: Array, action: Array, mode: Mode
) -> tuple[Array, Tree]:
    """Q of each critic on ``obs`` (B, O) and ``action`` (B, A): values (C, B), new statistics."""
    q, stats = critic_outputs(mlp, critics, obs, action, mode)
    return q[..., 0], stats
