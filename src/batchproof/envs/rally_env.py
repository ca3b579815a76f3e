"""Rally as a PettingZoo environment; the rules are in `batchproof.envs.rally`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from pettingzoo import ParallelEnv

from batchproof.envs.rally import (
    ACTION_SIZE,
    EPISODE_STEPS,
    NAMES,
    OBS_SIZE,
    check_max_steps,
    observe,
    play,
    serve,
)


class RallyEnv(ParallelEnv):
    """The PettingZoo environment: agents ``left`` and ``right``.

    Observations Box((24,)): three moments, the newest last, each the agent's racket and the ball
    as x, y, vx, vy in its view. Actions Box(-1, 1, (2,)): run and jump. Whoever hit the ball
    that flies over the net gets .1; -.01 goes to whoever lets it drop on the own side, or hits it
    into the net or out. Then the episode terminates; it is truncated after ``max_steps``.
    """

    metadata: dict[str, Any] = {"name": "rally_v0", "render_modes": []}  # noqa: RUF012
    render_mode = None

    def __init__(self, max_steps: int = EPISODE_STEPS) -> None:
        """Episodes of at most ``max_steps`` environment steps."""
        check_max_steps(max_steps)
        self.max_steps = max_steps
        self.possible_agents = list(NAMES)
        self.agents: list[str] = []
        box = gymnasium.spaces.Box
        self.observation_spaces = {name: box(-np.inf, np.inf, (OBS_SIZE,)) for name in NAMES}
        self.action_spaces = {name: box(-1.0, 1.0, (ACTION_SIZE,)) for name in NAMES}
        self._random = np.random.default_rng()
        self.rally = serve(np, self._random.random(6, np.float32))

    def observation_space(self, agent: str) -> Any:
        """The same space at every call."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Any:
        """The same space at every call."""
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
        """Serve: an observation (24,) for each agent."""
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self.agents = list(NAMES)
        self.rally = serve(np, self._random.random(6, np.float32))
        return self._by_agent(observe(self.rally)), {name: {} for name in NAMES}

    def step(self, actions: dict[str, np.ndarray]) -> tuple[dict[str, Any], ...]:
        """Play one environment step of 0.1 seconds."""
        joint = np.stack([np.asarray(actions[name], np.float32) for name in NAMES])
        self.rally, reward, over = play(np, self.rally, joint)
        truncated = not over and self.rally.steps >= self.max_steps
        if over or truncated:
            self.agents = []
        return (
            self._by_agent(observe(self.rally)),
            self._by_agent(reward.tolist()),
            dict.fromkeys(NAMES, bool(over)),
            dict.fromkeys(NAMES, bool(truncated)),
            {name: {} for name in NAMES},
        )

    def _by_agent(self, values: Any) -> dict[str, Any]:
        return dict(zip(NAMES, values, strict=True))
