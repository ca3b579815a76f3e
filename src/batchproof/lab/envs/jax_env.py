"""What the lab asks of an environment that runs inside its compiled loop."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.errors import BatchproofError


class Step(NamedTuple):
    """The result of one environment step."""

    state: Any
    obs: Array  # (O,), of the state just reached: the loop resets, not the environment
    reward: Array  # (), or (n,) with several agents
    terminated: Array  # () bool
    truncated: Array  # () bool


class JaxEnv(Protocol):
    """A pytree whose leaves are the environment's parameters, so that seeds may differ in them.

    Actions come in [-1, 1]; an environment with other bounds scales them itself. One with several
    agents also has a class attribute ``layout`` (`batchproof.lab.envs.layout`).
    """

    obs_size: ClassVar[int]
    action_size: ClassVar[int]
    max_steps: ClassVar[int]

    @classmethod
    def make(cls, **options: Any) -> JaxEnv:
        """Build it from the keyword arguments that `gymnasium.make` takes for the same id."""
        ...

    def reset(self, key: Array) -> tuple[Any, Array]:
        """First state and observation (O,) of an episode."""
        ...

    def step(self, key: Array, state: Any, action: Array) -> Step:
        """One step with ``action`` (A,)."""
        ...


def make(env: Any, options: dict[str, Any]) -> Any:
    """An environment of the class ``env``.

    Raises:
        BatchproofError: an option that it does not take, or cannot.
    """
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BatchproofError(f"cannot make environment: option {name} is {value}")
    try:
        return env.make(**options)
    except (TypeError, ValueError) as error:
        line = f"cannot make environment: {error} (--host-env takes the original's options)"
        raise BatchproofError(line) from None


def stacked(envs: list[Any]) -> Any:
    """Environments of one class as one whose parameters have a leading axis P."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *envs)
