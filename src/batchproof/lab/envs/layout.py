"""Whose is what in a multi-agent environment, where all agents' values lie side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax
import numpy as np
from jax import Array

SCORES: dict[str, Callable[..., Any]] = {"mean": np.mean, "max": np.max, "sum": np.sum}


@jax.tree_util.register_static
@dataclass(frozen=True)
class Layout:
    """The agents of an environment, in the order of their values.

    To the loop they are one agent with the observations and actions of all, and a reward for each.

    Attributes:
        names: one an agent.
        obs_sizes: O_i of each agent.
        action_sizes: A_i of each agent.
        score: how the agents' returns of an episode become one number: ``mean``, ``max`` or
            ``sum``.
    """

    names: tuple[str, ...]
    obs_sizes: tuple[int, ...]
    action_sizes: tuple[int, ...]
    score: str

    def split_obs(self, obs: Array) -> list[Array]:
        """Observations (..., O) by agent, each (..., O_i)."""
        return _split(obs, self.obs_sizes)

    def split_actions(self, action: Array) -> list[Array]:
        """Actions (..., A) by agent, each (..., A_i)."""
        return _split(action, self.action_sizes)

    def score_of(self, returns: np.ndarray) -> np.ndarray:
        """One number (...) for the agents' returns (..., n)."""
        return SCORES[self.score](returns, axis=-1)


def layout_of(env: Any) -> Layout | None:
    """The layout of an environment, None where it has one agent."""
    return getattr(env, "layout", None)


def _split(values: Array, sizes: tuple[int, ...]) -> list[Array]:
    ends = list(accumulate(sizes))
    return [values[..., end - size : end] for end, size in zip(ends, sizes, strict=True)]
