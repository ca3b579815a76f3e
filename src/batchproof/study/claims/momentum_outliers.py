"""momentum-outliers: a linear policy with batch norm that works in train mode and fails in eval.

A forum thread trains a linear policy on batches of episodes with batch norm. It reports that only
train mode with rho > .9 converges, that switching to eval mode right after training fails, that a
few train-mode batches without learning in between help, that training in eval mode never
converges, and blames a few outliers that small rho averages into the running statistics. This file
holds the conditions, the predictions and the decision rules; all were written before the full run,
after a pilot of 16 seeds at rho = .1 that fixed the outliers' probability and size.

Three explanations are put to the test. *Outliers*: rare, huge ones are in few batches, but a slow
average never gets rid of them. *Weight lag*: running statistics belong to the weights of past
batches; this needs a norm behind a layer that learns, so a linear policy normalized at its input
cannot have it and an MLP normalized inside can. *Start-up*: an average of few batches still
contains its initial 0 and 1.

In train mode nothing depends on the running statistics: one training serves every estimator
and every rho, each of which watches the same batches. All of them are then switched to eval mode on
the same weights.
"""

from __future__ import annotations

import math
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchproof import records
from batchproof.envs.linear_outliers import EPISODE_STEPS
from batchproof.errors import BatchproofError
from batchproof.estimators import Batch
from batchproof.lab import norms, population
from batchproof.lab.agents import reinforce
from batchproof.lab.episodic import Seed, Stepper, alone, collect, evaluate_in_jax, together
from batchproof.lab.estimators import ESTIMATORS
from batchproof.lab.nets import MLP, Network
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.modes import Mode, Plan
from batchproof.study import plots, report
from batchproof.study.judging import Finding, Judge
from batchproof.study.statistics import Interval, difference_interval, mean_interval
from batchproof.study.study import Cell, run_cells, write_study

NAME = "momentum-outliers"
SOURCE = "forum thread: episodic policy learning, batch norm, train and eval mode"
ENV = "batchproof/LinearOutliers-v0"
ARMS = ("off", "on")  # outliers
OUTLIERS = {"outlier_probability": 3e-4, "outlier_size": 1000.0}  # one batch in ten has one
OFFSET = 10_000  # seeds of the second arm are the first's plus this: one population holds both
BEST = float(EPISODE_STEPS)  # the best return; 0 is the best without looking at the observation
EPISODES = 32
UPDATE_STEPS = EPISODES * EPISODE_STEPS

# Decision rules. A score is a seed's mean reward per step of deterministic episodes, at least 0:
# 1 is perfect, 0 is no better than a constant action.
WORKS = 0.5  # works: the 95 % interval of the mean score lies above; fails: below
CLEAR = 0.25  # a difference counts when its interval lies above
FEWEST_SEEDS = 10
FEW = 10  # "a few batches": as many frozen batches before the switch

DEFAULT_RHO, THREAD_RHO = 0.1, 0.95
RHOS = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
ROBUST = ("winsorized", "huber", "median-of-means")


class Watcher(NamedTuple):
    """One way to keep running statistics."""

    estimator: str
    rho: float

    @property
    def name(self) -> str:
        """The estimator's name and rho."""
        return f"{self.estimator} {self.rho:g}"


SWEEP = tuple(Watcher("ema", rho) for rho in RHOS)
OTHERS = tuple(
    Watcher(estimator, rho)
    for estimator in ("debiased", "cumulative", "chan", *ROBUST)
    for rho in ((DEFAULT_RHO,) if estimator == "cumulative" else (0.01, DEFAULT_RHO))
)
WATCHERS = SWEEP + OTHERS
SHOWN = (Watcher("ema", DEFAULT_RHO), Watcher("ema", THREAD_RHO), Watcher("huber", DEFAULT_RHO))

AGENTS = {"linear": MLP((), Norm("batch", "input")), "mlp": MLP((16,), Norm("batch", "input+pre"))}
GROUPS = ("linear", "mlp", "eval-only", "act-eval")
DEFAULT = ("linear", "mlp", "eval-only")
ACT_EVAL_RHOS = (DEFAULT_RHO, THREAD_RHO)

PREDICTED = {
    # (agent, outliers, statistics): score of eval mode right after training
    ("linear", "off", "train mode"): 0.95,
    ("linear", "on", "train mode"): 0.93,
    ("mlp", "off", "train mode"): 0.95,
    ("mlp", "on", "train mode"): 0.9,
    **{("linear", "off", w.name): 0.97 for w in WATCHERS if w.rho > 0.01},
    ("linear", "off", "ema 0.01"): 0.3,  # start-up
    ("linear", "off", "chan 0.01"): 0.3,  # start-up
    ("linear", "off", "winsorized 0.01"): 0.3,  # start-up
    ("linear", "off", "median-of-means 0.01"): 0.3,  # start-up
    ("linear", "off", "debiased 0.01"): 0.97,
    ("linear", "off", "huber 0.01"): 0.97,  # its first batch is taken as it is
    **{("linear", "on", f"ema {rho:g}"): 0.15 for rho in (0.01, 0.03, 0.1)},
    ("linear", "on", "ema 0.3"): 0.3,
    ("linear", "on", "ema 0.5"): 0.45,
    ("linear", "on", "ema 0.7"): 0.58,
    ("linear", "on", "ema 0.9"): 0.75,
    ("linear", "on", "ema 0.95"): 0.8,
    ("linear", "on", "ema 0.99"): 0.85,
    **{("linear", "on", f"{e} {r:g}"): 0.15 for e in ("debiased", "chan") for r in (0.01, 0.1)},
    ("linear", "on", "cumulative 0.1"): 0.15,
    **{("linear", "on", f"{e} {DEFAULT_RHO:g}"): 0.95 for e in ROBUST},
    ("linear", "on", "winsorized 0.01"): 0.3,  # start-up
    ("linear", "on", "median-of-means 0.01"): 0.3,  # start-up
    ("linear", "on", "huber 0.01"): 0.9,
    ("mlp", "off", "ema 0.01"): 0.2,  # start-up and weight lag
    ("mlp", "off", "ema 0.1"): 0.95,  # lag of ten updates, but they are small at the end
    ("mlp", "off", "ema 0.95"): 0.97,
    ("mlp", "on", "ema 0.1"): 0.1,
    ("mlp", "on", "ema 0.95"): 0.8,
    ("eval-only", "off", "raw"): 0.0,
    ("eval-only", "off", "standardized"): 0.95,
    ("act-eval", "on", "ema 0.1"): 0.2,
    ("act-eval", "on", "ema 0.95"): 0.7,
}


def run(
    out: Path,
    *,
    seeds: int | None = None,
    steps: int | None = None,
    quick: bool = False,
    conditions: str | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Run the study and write ``study.json``, ``report.html``, pictures and metrics into ``out``.

    Args:
        out: the study's folder.
        seeds: for each condition, default 16.
        steps: environment steps of each seed's training, default 48000: 150 batches.
        quick: 10 seeds of 60 batches.
        conditions: groups from `GROUPS` with commas between, or ``all``; default `DEFAULT`.
        progress: show bars.
        command: what a user typed, for the record.

    Returns:
        The content of ``study.json``.
    """
    chosen = _chosen(conditions)
    seeds = seeds if seeds is not None else 10 if quick else 16
    steps = steps if steps is not None else (60 if quick else 150) * UPDATE_STEPS
    if not 1 <= seeds <= OFFSET:
        raise BatchproofError(f"seeds must be from 1 to {OFFSET}, got {seeds}")
    if steps < (WINDOW + 1) * UPDATE_STEPS:
        raise BatchproofError(
            f"steps must be at least {(WINDOW + 1) * UPDATE_STEPS}: {WINDOW + 1} batches of "
            f"{UPDATE_STEPS}, got {steps}"
        )
    began = time.perf_counter()
    with records.locked(out):
        watched = {
            agent: watch_cell(agent, seeds, steps, out / "cells" / agent, progress)
            for agent in AGENTS
            if agent in chosen
        }
        results = run_cells(_lab_cells(chosen, seeds, steps), out, progress, command)
        spent = sum(w.wall_s for w in watched.values()) + sum(r.wall_s for r in results.values())
        outcome = Outcome(
            seeds,
            watched,
            {name: _final_returns(name, result.metrics, seeds) for name, result in results.items()},
        )
        study = write_study(
            out, NAME, judge(outcome), describe(outcome), list(_columns(outcome)),
            seeds=seeds, steps=steps, began=began, spent_s=spent, command=command,
        )  # fmt: skip
        _render(outcome, study, out)
    return study


def _chosen(names: str | None) -> tuple[str, ...]:
    if names == "all":
        return GROUPS
    keys = DEFAULT if names is None else tuple(dict.fromkeys(names.split(",")))
    for key in keys:
        if key not in GROUPS:
            raise BatchproofError(
                f"unknown condition {key!r}: use all, or some of {', '.join(GROUPS)}"
            )
    return keys


def training(
    mlp: MLP, plan: str, seeds: int, steps: int, arms: Sequence[Mapping[str, float]]
) -> Training:
    """A population of ``seeds`` seeds for each of ``arms``, the environment's options."""
    return Training(
        algo="reinforce",
        config=reinforce.Config(
            actor=mlp,
            plan=Plan.parse(plan),
            learning_rate=0.02,
            gamma=0.0,  # nothing carries over to the next step
            episodes_per_update=EPISODES,
            log_std=-1.0,
        ),
        env_id=ENV,
        env_options=tuple(dict(options) for options in arms for _ in range(seeds)),
        seeds=tuple(seed + OFFSET * i for i in range(len(arms)) for seed in range(seeds)),
        steps=steps,
        learning_starts=0,
        eval_every=max(steps // 5, 1),
        eval_episodes=EPISODES,
    )


RAW: dict[str, float] = {}
STANDARDIZED = {"shift": 0.0, "spread": 1.0}


def _lab_cells(chosen: tuple[str, ...], seeds: int, steps: int) -> list[Cell]:
    """The conditions in which running statistics act back on the training."""
    cells = []
    if "eval-only" in chosen:
        linear = AGENTS["linear"]
        arms = (RAW, STANDARDIZED)
        cells.append(Cell("eval-only", training(linear, "EEEEE", seeds, steps, arms)))
    if "act-eval" in chosen:
        for rho in ACT_EVAL_RHOS:
            mlp = MLP((), Norm("batch", "input", momentum=rho))
            made = training(mlp, "TEEEE", seeds, steps, (RAW, OUTLIERS))
            cells.append(Cell(f"act-eval-{rho:g}", made))
    return cells


# --- training once, watched by all -------------------------------------------------------------

WINDOW = 30  # batches that the picture shows on either side of the switch


@dataclass(frozen=True)
class Watched:
    """What one agent's training and switch gave, seeds of both arms first: P = 2 * seeds.

    Attributes:
        loss: of the batches around the end of training in train mode, (P, 2 WINDOW): WINDOW with
            learning, then WINDOW with frozen weights.
        train_return: mean return of the same batches.
        train_score_return: deterministic return in train mode after each, (P, 2 WINDOW).
        batch_std: standard deviation of each batch's first feature, in clean ones.
        eval_return: deterministic return in eval mode after each, (P, 2 WINDOW, watchers).
        std: running standard deviation of the first feature, in clean ones, likewise.
        mean: running mean of the first feature, in clean standard deviations from the clean mean.
        switched_loss: loss of WINDOW batches that act and are judged in eval mode right after
            training, weights frozen: (P, shown, WINDOW).
        wall_s: seconds that it took.
    """

    loss: np.ndarray
    train_return: np.ndarray
    train_score_return: np.ndarray
    batch_std: np.ndarray
    eval_return: np.ndarray
    std: np.ndarray
    mean: np.ndarray
    switched_loss: np.ndarray
    wall_s: float

    def after(self, frozen: int) -> int:
        """Index of the batch after ``frozen`` frozen ones."""
        return WINDOW - 1 + frozen


Stats = dict[str, dict[str, Array]]


def watch_cell(agent: str, seeds: int, steps: int, folder: Path, progress: bool) -> Watched:
    """Train one agent in train mode, watched by all `WATCHERS`; a finished cell is read back."""
    made = training(AGENTS[agent], "tTEEEE", seeds, steps, (RAW, OUTLIERS))
    path, note = folder / "watched.npz", folder / "watched.json"
    names = {"watchers": [w.name for w in WATCHERS], "shown": [w.name for w in SHOWN]}
    settings = records.to_json({"training": made.record(), "window": WINDOW} | names)
    if path.exists() and note.exists():
        held = records.read_json(note)
        if held.get("settings") != settings:
            raise BatchproofError(
                f"{folder} holds another run: choose another --out, or delete that folder"
            )
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return Watched(**arrays, wall_s=held["wall_s"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            line = " ".join(str(error).split())
            raise BatchproofError(
                f"{path}: not what was written ({line}): delete {folder} to train it again"
            ) from None
    if progress:
        print(f"{agent}: {2 * seeds} policies, {steps // UPDATE_STEPS} batches")
    began = time.perf_counter()
    arrays = watch(made)
    wall_s = time.perf_counter() - began
    records.make_folder(folder)
    with records.replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    records.write_json(note, {"settings": settings, "wall_s": wall_s})
    return Watched(**arrays, wall_s=wall_s)


def watch(made: Training) -> dict[str, np.ndarray]:
    """Train, freeze and switch: the arrays of `Watched`."""
    stepper = Stepper(made)
    over = population.over_seeds
    count = len(made.seeds)
    updates = math.ceil(made.steps / UPDATE_STEPS)
    seed = stepper.seed
    watchers = over(lambda seed: fresh_watchers(seed.agent), stepper.mesh, rare=True)(seed)
    before = over(
        lambda seed, watchers: _train(made, seed, watchers, updates - WINDOW), stepper.mesh
    )
    around = over(lambda seed, watchers: _around(made, seed, watchers, updates), stepper.mesh)
    switch = over(lambda seed, stats: _switch(made, seed, stats, updates), stepper.mesh)
    seed, watchers = before(seed, watchers)
    trained, seen, kept = around(seed, watchers)
    arrays = {name: np.asarray(values)[:count] for name, values in seen.items()}
    return arrays | {"switched_loss": np.asarray(switch(trained, kept))[:count]}


def fresh_watchers(agent: Any) -> list[Stats]:
    """The agent's initial statistics, once for each of `WATCHERS`."""
    return [agent.actor.stats for _ in WATCHERS]


def layer_inputs(config: reinforce.Config, actor: Network, rows: Array) -> dict[str, Array]:
    """What each norm of a network with at most one hidden layer sees in train mode: (B, F)."""
    norm, params = config.actor.norm, actor.params
    inputs = {"norm_input": rows}
    if "norm_pre_0" in params:
        x, _ = norms.apply(norm, params["norm_input"], actor.stats["norm_input"], rows, Mode("t"))
        inputs["norm_pre_0"] = x @ params["linear_0"]["weight"] + params["linear_0"]["bias"]
    return inputs


def move_watchers(watchers: list[Stats], inputs: dict[str, Array]) -> list[Stats]:
    """Every watcher's statistics after a batch."""
    moved = []
    batches = {}
    for layer, x in inputs.items():
        bessel = len(x) / (len(x) - 1)
        batches[layer] = (x.mean(0), x.var(0) * bessel, x, bessel)
    for watcher, stats in zip(WATCHERS, watchers, strict=True):
        new = {}
        for layer, held in stats.items():
            mean, var, x, bessel = batches[layer]
            number = held["count"] + 1
            m, v = ESTIMATORS[watcher.estimator](
                held["mean"], held["var"], Batch(mean, var, x, number, bessel), watcher.rho
            )
            new[layer] = {"mean": m, "var": v, "count": number}
        moved.append(new)
    return moved


def _batch(
    made: Training, seed: Seed, watchers: list[Stats], number: Array, learn: Array
) -> tuple[Seed, list[Stats], dict[str, Array], Array]:
    """One batch in train mode, with learning or with frozen weights."""
    key = jax.random.fold_in(seed.key, number)
    agent, episodes = collect(made, seed.env, seed.agent, key)
    rows = episodes.obs.reshape(-1, episodes.obs.shape[-1])
    watchers = move_watchers(watchers, layer_inputs(made.config, agent.actor, rows))
    new, metrics = reinforce.update(made.config, agent, episodes, key, 0)
    still = agent._replace(actor=Network(agent.actor.params, new.actor.stats))
    agent = jax.tree.map(lambda a, b: jnp.where(learn, a, b), new, still)
    return seed._replace(agent=agent), watchers, metrics, rows


def _train(
    made: Training, seed: Seed, watchers: list[Stats], updates: int
) -> tuple[Seed, list[Stats]]:
    def body(number: Array, carry: Any) -> Any:
        seed, watchers = carry
        return _batch(made, seed, watchers, number, jnp.asarray(True))[:2]

    return jax.lax.fori_loop(0, updates, body, (seed, watchers))


def _with_stats(seed: Seed, stats: Stats) -> Seed:
    actor = Network(seed.agent.actor.params, stats)
    return seed._replace(agent=seed.agent._replace(actor=actor))


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _around(
    made: Training, seed: Seed, watchers: list[Stats], updates: int
) -> tuple[Seed, dict[str, Array], Any]:
    """The last WINDOW batches with learning and WINDOW more without, and what they show."""
    scale, mean = seed.env.scale[0], seed.env.scale[0] * seed.env.shift

    def body(carry: Any, number: Array) -> Any:
        seed, watchers = carry
        seed, watchers, metrics, rows = _batch(made, seed, watchers, number, number < updates)
        stacked = _stack(watchers)
        eval_return = jax.vmap(
            lambda stats: evaluate_in_jax(alone(made), _with_stats(seed, stats)).mean()
        )(stacked)
        first = stacked["norm_input"]
        seen = {
            "loss": metrics["loss"],
            "train_return": metrics["train_return"],
            "train_score_return": evaluate_in_jax(together(made), seed).mean(),
            "batch_std": rows[:, 0].std() / scale,
            "eval_return": eval_return,
            "std": jnp.sqrt(first["var"][:, 0]) / scale,
            "mean": (first["mean"][:, 0] - mean) / scale,
        }
        shown = _stack([watchers[WATCHERS.index(w)] for w in SHOWN])
        return (seed, watchers), (seen, shown)

    numbers = jnp.arange(updates - WINDOW, updates + WINDOW)
    (seed, _), (seen, shown) = jax.lax.scan(body, (seed, watchers), numbers)
    return seed, seen, jax.tree.map(lambda stats: stats[WINDOW - 1], shown)


def _switch(made: Training, seed: Seed, stats: Any, updates: int) -> Array:
    """The loss of WINDOW batches in eval mode with frozen weights: (shown, WINDOW)."""
    evaluating = training(made.config.actor, "EEEEE", 1, made.steps, (RAW,))

    def of(stats: Stats) -> Array:
        start = _with_stats(seed, stats)

        def body(carry: None, number: Array) -> Any:
            key = jax.random.fold_in(seed.key, updates + WINDOW + number)
            agent, episodes = collect(evaluating, seed.env, start.agent, key)
            _, metrics = reinforce.refresh(evaluating.config, agent, episodes)
            return None, metrics["loss"]

        return jax.lax.scan(body, None, jnp.arange(WINDOW))[1]

    return jax.vmap(of)(stats)


# --- results -----------------------------------------------------------------------------------


def score(returns: np.ndarray) -> np.ndarray:
    """Mean reward per step, at least 0, which a constant action gets; NaN (diverged) is 0."""
    return np.clip(np.nan_to_num(returns, nan=0.0) / BEST, 0, 1)


def _final_returns(name: str, metrics: dict[str, np.ndarray], seeds: int) -> dict[str, np.ndarray]:
    """Final returns (seeds,) by arm of a lab cell."""
    arms = ("raw", "standardized") if name == "eval-only" else ARMS
    final = metrics["return"][-2 * seeds :]
    return dict(zip(arms, final.reshape(2, seeds), strict=True))


@dataclass(frozen=True)
class Outcome:
    """All results."""

    seeds: int
    watched: dict[str, Watched]
    lab: dict[str, dict[str, np.ndarray]]

    def has(self, *keys: str) -> bool:
        """Whether all of these groups were run."""
        return set(keys) <= {*self.watched, *(["eval-only"] if "eval-only" in self.lab else [])}

    def _arm(self, values: np.ndarray, arm: str) -> np.ndarray:
        return values.reshape(2, self.seeds, *values.shape[1:])[ARMS.index(arm)]

    def returns(self, agent: str, arm: str, watcher: Watcher, frozen: int = 0) -> np.ndarray:
        """Deterministic returns (seeds,) in eval mode, after ``frozen`` frozen batches."""
        cell = self.watched[agent]
        values = cell.eval_return[:, cell.after(frozen), WATCHERS.index(watcher)]
        return self._arm(values, arm)

    def train_returns(self, agent: str, arm: str) -> np.ndarray:
        """Deterministic returns (seeds,) in train mode at the end of training."""
        cell = self.watched[agent]
        return self._arm(cell.train_score_return[:, cell.after(0)], arm)

    def scores(self, agent: str, arm: str, watcher: Watcher, frozen: int = 0) -> np.ndarray:
        """The `score` of `returns`."""
        return score(self.returns(agent, arm, watcher, frozen))

    def series(self, agent: str, arm: str, name: str) -> np.ndarray:
        """One of `Watched`'s arrays for one arm, (seeds, ...)."""
        return self._arm(getattr(self.watched[agent], name), arm)


def works(interval: Interval) -> bool | None:
    """Whether the mean score's interval lies above `WORKS`; None when it straddles it."""
    return True if interval.lo > WORKS else False if interval.hi < WORKS else None


_AGENT_WORDS = {"linear": "linear policy", "mlp": "MLP policy"}


def describe(outcome: Outcome) -> list[dict[str, Any]]:
    """The conditions of ``study.json``."""
    rows = []

    def row(group: str, arm: str, statistics: str, returns: np.ndarray, **more: Any) -> None:
        predicted = PREDICTED.get((group, arm, statistics))
        mean = float(score(returns).mean())
        rows.append(
            {
                "name": f"{group}-{arm}-{statistics}".replace(" ", "-"),
                "group": group,
                "outliers": arm,
                "statistics": statistics,
                "algo": "REINFORCE",
                "returns": returns.tolist(),
                "score": mean,
                "prediction": None if predicted is None else f"score {predicted:g}",
                "missed": None if predicted is None else (predicted > WORKS) != (mean > WORKS),
                "diverged": int(np.isnan(returns).sum()),
                **more,
            }
        )

    for agent in outcome.watched:
        norm = "batch " + AGENTS[agent].norm.placement
        for arm in ARMS:
            words = f"{_AGENT_WORDS[agent]}, outliers {arm}"
            row(
                agent, arm, "train mode", outcome.train_returns(agent, arm),
                label=f"{words}: train mode", modes="tTEEEE", norm=norm, frozen=0,
            )  # fmt: skip
            for watcher in WATCHERS:
                after = score(outcome.returns(agent, arm, watcher, FEW)).mean()
                row(
                    agent, arm, watcher.name, outcome.returns(agent, arm, watcher),
                    label=f"{words}: eval mode, {watcher.name}", modes="tTEEEE", norm=norm,
                    frozen=0, score_after_frozen=float(after),
                )  # fmt: skip
    for name, arms in outcome.lab.items():
        for arm, returns in arms.items():
            if name == "eval-only":
                row(
                    "eval-only", "off", arm, returns,
                    label=f"linear policy, only eval mode, {arm} observations", modes="EEEEE",
                    norm="batch input",
                )  # fmt: skip
            else:
                rho = name.removeprefix("act-eval-")
                row(
                    "act-eval", arm, f"ema {rho}", returns,
                    label=f"linear policy acts in eval, learns in train mode, outliers {arm}: "
                    f"ema {rho}",
                    modes="TEEEE", norm="batch input",
                )  # fmt: skip
    return rows


def _words(interval: Interval) -> str:
    return f"{interval.mean:.2f} [{interval.lo:.2f}, {interval.hi:.2f}]"


def judge(outcome: Outcome) -> list[dict[str, Any]]:
    """Verdicts on C1 to C5, with the readings that the thread leaves open (b) and the lag (L)."""
    judged = Judge(outcome, SOURCE, FEWEST_SEEDS)
    claim = judged.claim
    default, thread = Watcher("ema", DEFAULT_RHO), Watcher("ema", THREAD_RHO)

    def of(agent: str, arm: str, watcher: Watcher, frozen: int = 0) -> Interval:
        return mean_interval(outcome.scores(agent, arm, watcher, frozen))

    def verdict(yes: bool | None, *more: bool | None) -> str:
        every = (yes, *more)
        if any(one is False for one in every):
            return "refuted"
        return "supported" if all(every) else "inconclusive"

    def negate(yes: bool | None) -> bool | None:
        return None if yes is None else not yes

    def c1() -> Finding:
        interval = mean_interval(score(outcome.train_returns("linear", "on")))
        why = (
            f"With outliers, at rho = {DEFAULT_RHO:g}, judged in train mode: {_words(interval)}. "
            "In train mode the running statistics are written and never read, so no rho can "
            "matter to the training."
        )
        return Finding(verdict(negate(works(interval))), interval, why)

    def c1b() -> Finding:
        sweep = {w.rho: of("linear", "on", w) for w in SWEEP if w.rho != 0.9}
        above = [works(i) for rho, i in sweep.items() if rho > 0.9]
        below = [negate(works(i)) for rho, i in sweep.items() if rho < 0.9]
        told = ", ".join(f"{rho:g}: {_words(i)}" for rho, i in sweep.items())
        yes = verdict(above[0], *above[1:], *below)
        return Finding(yes, sweep[THREAD_RHO], f"Score by rho {told}.")

    def c2() -> Finding:
        found = of("linear", "on", default)
        train = mean_interval(score(outcome.train_returns("linear", "on")))
        why = f"Train mode {_words(train)}, eval mode right after {_words(found)}."
        return Finding(verdict(works(train), negate(works(found))), found, why)

    def c2b() -> Finding:
        found = {agent: of(agent, "on", thread) for agent in AGENTS}
        why = ", ".join(f"{_AGENT_WORDS[a]} {_words(i)}" for a, i in found.items())
        fails = [negate(works(i)) for i in found.values()]
        return Finding(verdict(*fails), found["linear"], f"Eval mode right after: {why}.")

    def c3() -> Finding:
        found = of("linear", "on", default, FEW)
        later = of("linear", "on", default, WINDOW)
        at_once = of("linear", "on", thread, FEW)
        why = (
            f"After {FEW} frozen batches {_words(found)}, after {WINDOW} {_words(later)}. At rho = "
            f"{THREAD_RHO:g} after {FEW}: {_words(at_once)}."
        )
        return Finding(verdict(works(found)), found, why)

    def lag() -> Finding:
        before, after = of("mlp", "off", default), of("mlp", "off", default, FEW)
        why = f"MLP without outliers: {_words(before)} right after, {_words(after)} after {FEW}."
        return Finding(verdict(negate(works(before)), works(after)), before, why)

    def c4() -> Finding:
        found = mean_interval(score(outcome.lab["eval-only"]["raw"]))
        return Finding(verdict(negate(works(found))), found, f"Only eval mode: {_words(found)}.")

    def c4b() -> Finding:
        found = mean_interval(score(outcome.lab["eval-only"]["standardized"]))
        why = (
            "Only eval mode, on observations that have mean 0 and variance 1, as the initial "
            f"statistics say: {_words(found)}."
        )
        return Finding(verdict(negate(works(found))), found, why)

    def c5() -> Finding:
        off, on = (outcome.scores("linear", arm, default) for arm in ("off", "on"))
        outliers = difference_interval(off, on)
        frozen = difference_interval(outcome.scores("linear", "on", default, FEW), on)
        robust = {e: of("linear", "on", Watcher(e, DEFAULT_RHO)) for e in ROBUST}
        rescued = [works(i) for i in robust.values()]
        told = ", ".join(f"{e} {_words(i)}" for e, i in robust.items())
        why = (
            f"At rho = {DEFAULT_RHO:g}: without outliers minus with, {_words(outliers)}; {FEW} "
            f"frozen batches minus none, {_words(frozen)}; robust statistics of the same batches: "
            f"{told}."
        )
        clear = True if outliers.lo > CLEAR else False if outliers.hi < CLEAR else None
        return Finding(verdict(clear, *rescued), outliers, why)

    line = f"the 95 % interval of the mean score lies above {WORKS:g}"
    claim(
        "C1",
        "Training converges to a non-trivial policy only with rho > .9 (judged in train mode).",
        f"refuted when with outliers and rho = {DEFAULT_RHO:g} the policy works in train mode: "
        f"{line}; supported when it lies below",
        ("linear",),
        c1,
    )
    claim(
        "C1b",
        "The same, judged in eval mode right after training.",
        "supported when with outliers it works in eval mode at every rho above .9 of the sweep "
        "and at none below; refuted when one rho contradicts",
        ("linear",),
        c1b,
    )
    claim(
        "C2",
        f"Switching to eval right after training fails (rho = {DEFAULT_RHO:g}).",
        f"supported when with outliers train mode works, {line}, and eval mode's lies below",
        ("linear",),
        c2,
    )
    claim(
        "C2b",
        f"The same at the thread's own rho > .9 (rho = {THREAD_RHO:g}).",
        "supported when with outliers eval mode fails for both policies; refuted when one works",
        ("linear", "mlp"),
        c2b,
    )
    claim(
        "C3",
        f"A few train-mode batches without learning, then eval: works (rho = {DEFAULT_RHO:g}).",
        f"supported when with outliers and after {FEW} such batches {line}; refuted when below",
        ("linear",),
        c3,
    )
    claim(
        "L",
        "Weight lag explains C2 and C3.",
        "supported when the MLP without outliers fails in eval mode right after training and works "
        f"after {FEW} batches with frozen weights; refuted when it works at once, or still fails",
        ("mlp",),
        lag,
    )
    claim(
        "C4",
        "Training only in eval mode never converges.",
        f"supported when without outliers the score's interval lies below {WORKS:g}",
        ("eval-only",),
        c4,
    )
    claim(
        "C4b",
        "It is eval mode that keeps it from converging.",
        "refuted when training only in eval mode works on observations that are standardized "
        "already",
        ("eval-only",),
        c4b,
    )
    claim(
        "C5",
        "The cause: a few outliers shift the running mean and variance, small rho averages them "
        "in.",
        f"supported when at rho = {DEFAULT_RHO:g} eval mode is better without outliers (interval "
        f"of the difference above {CLEAR:g}) and every robust estimator at the same rho rescues "
        "it: winsorized, Huber and median of means all work; refuted when one does not",
        ("linear",),
        c5,
    )
    return judged.claims


def _columns(outcome: Outcome) -> Any:
    """The metrics file: a row for each condition, seed and batch of the window."""
    for agent, cell in outcome.watched.items():
        people, batches, watchers = cell.eval_return.shape
        seed, batch, watcher = np.meshgrid(
            np.arange(people), np.arange(batches), np.arange(watchers), indexing="ij"
        )
        rows = seed.size
        wide = (people, batches, watchers)
        yield {
            "group": np.full(rows, agent),
            "outliers": np.asarray(ARMS)[seed.ravel() // outcome.seeds],
            "statistics": np.asarray([w.name for w in WATCHERS])[watcher.ravel()],
            "seed": (seed % outcome.seeds).ravel().astype(np.int32),
            # 0 is the last batch with learning; those after it have frozen weights.
            "batch": (batch - WINDOW + 1).ravel().astype(np.int32),
            "return": cell.eval_return.ravel().astype(np.float32),
            "running_std": cell.std.ravel().astype(np.float32),
            "running_mean": cell.mean.ravel().astype(np.float32),
            "train_mode_return": np.broadcast_to(
                cell.train_score_return[..., None], wide
            ).ravel().astype(np.float32),
        }  # fmt: skip
    for name, arms in outcome.lab.items():
        for arm, returns in arms.items():
            count = len(returns)
            yield {
                "group": np.full(count, name),
                "outliers": np.full(count, arm),
                "statistics": np.full(count, "own"),
                "seed": np.arange(count, dtype=np.int32),
                "batch": np.zeros(count, np.int32),
                "return": returns.astype(np.float32),
            }


# --- pictures ----------------------------------------------------------------------------------

_COLORS = {"ema 0.1": plots.VERMILLION, "ema 0.95": plots.BLUE, "huber 0.1": plots.GREEN}
_LABELS = {"ema 0.1": "rho 0.1", "ema 0.95": "rho 0.95", "huber 0.1": "Huber, rho 0.1"}


def _render(outcome: Outcome, study: dict[str, Any], out: Path) -> None:
    sections = []
    verdict = {claim["id"]: claim["verdict"] for claim in study["claims"]}
    if "linear" in outcome.watched:
        headline = (
            "Eval mode was failing all along: the switch only shows it"
            if verdict["C2"] == "supported"
            else "Loss, performance and statistics across the switch"
        )
        _switch_picture(outcome, "linear", out / "switch.png", headline)
        sections.append(
            report.FigureSection(
                "Loss, performance and statistics across the switch",
                "The linear policy, batch by batch. Left of the line it learns in train mode; at "
                "the line the weights are frozen and the policy is switched to eval mode. Coloured "
                "lines before the switch: what eval mode would have given at that batch with the "
                "running statistics of that moment; after it neither weights nor statistics move, "
                "so performance stays what it is. Loss is that of a sampled batch, performance of "
                "deterministic episodes. Lines are means over seeds, bands hold the middle half.",
                out / "switch.png",
                alt="Loss, score and running standard deviation around the switch",
            )
        )
        headline = (
            "Small rho fails with outliers, unless the statistics are robust"
            if verdict["C5"] == "supported"
            else "Eval mode right after training, by statistics"
        )
        _rho_picture(outcome, out / "rho.png", headline)
        sections.append(
            report.FigureSection(
                "Which running statistics survive",
                "Score in eval mode right after training, against rho and by estimator, on the "
                "same batches and weights. Points are means with their 95 % intervals.",
                out / "rho.png",
                alt="Score against rho and by estimator, with and without outliers",
            )
        )
    if outcome.watched:
        _frozen_picture(outcome, out / "frozen.png")
        sections.append(
            report.FigureSection(
                "Frozen batches before the switch",
                "Score in eval mode after k train-mode batches without learning.",
                out / "frozen.png",
                alt="Score against the number of frozen batches",
            )
        )
    report.write_report(
        out / "report.html", study, sections, explanation(study),
        title="Running statistics and outliers",
    )  # fmt: skip


def _line(axes: Any, x: np.ndarray, values: np.ndarray, color: str, **style: Any) -> None:
    """Mean over seeds with the band of the middle half; ``values`` (seeds, T)."""
    low, high = np.quantile(values, [0.25, 0.75], axis=0)
    axes.plot(x, values.mean(0), color=color, linewidth=2, **style)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _switch_picture(outcome: Outcome, agent: str, path: Path, headline: str) -> None:
    figure = _grid(3, 2, headline, 10.4)
    before, after = np.arange(-WINDOW + 1, 1), np.arange(1, WINDOW + 1)
    shown = [WATCHERS.index(w) for w in SHOWN]
    for column, arm in enumerate(ARMS):
        top, middle, bottom = (figure.axes[2 * row + column] for row in range(3))
        top.set_title(f"outliers {arm}", loc="left", fontweight="bold", fontsize=14)
        series = {
            name: outcome.series(agent, arm, name)
            for name in ("loss", "train_score_return", "eval_return", "std", "batch_std")
        }
        losses = outcome.series(agent, arm, "switched_loss")
        _line(top, before, series["loss"][:, :WINDOW], plots.BLACK, label="train mode")
        _line(
            middle, before, score(series["train_score_return"][:, :WINDOW]), plots.BLACK,
            label="train mode",
        )  # fmt: skip
        _line(bottom, before, series["batch_std"][:, :WINDOW], plots.BLACK, label="the batch's")
        for i, watcher in zip(shown, SHOWN, strict=True):
            color, label = _COLORS[watcher.name], _LABELS[watcher.name]
            at = SHOWN.index(watcher)
            _line(top, after, losses[:, at], color, label=f"eval mode, {label}")
            returns = score(series["eval_return"][:, :WINDOW, i])
            middle.plot(before, returns.mean(0), color=color, linewidth=1.5, linestyle=":")
            kept = np.repeat(returns[:, -1:], WINDOW, axis=1)
            _line(middle, after, kept, color, label=f"eval mode, {label}")
            held = np.repeat(series["std"][:, WINDOW - 1 : WINDOW, i], WINDOW, axis=1)
            path_std = np.concatenate([series["std"][:, :WINDOW, i], held], axis=1)
            _line(bottom, np.concatenate([before, after]), path_std, color, label=label)
        top.set_yscale("symlog", linthresh=1)
        bottom.set_yscale("log")
        middle.set_ylim(-0.03, 1.03)
        for axes in (top, middle, bottom):
            axes.axvline(0.5, color=plots.GREY, linewidth=1, linestyle="--")
        bottom.set_xlabel("batches after the switch to eval mode", fontsize=12)
    for row, label in enumerate(
        ("loss of the batch", "score (1 best, 0 constant)", "std of a feature (clean: 1)")
    ):
        figure.axes[2 * row].set_ylabel(label, fontsize=12)
    for row in (0, 2):  # every row shares its limits between the two columns
        limits = [axes.get_ylim() for axes in figure.axes[2 * row : 2 * row + 2]]
        low, high = min(a for a, _ in limits), max(b for _, b in limits)
        for axes in figure.axes[2 * row : 2 * row + 2]:
            axes.set_ylim(low, high)
    figure.axes[2].legend(loc="center left", fontsize=10, frameon=False)
    figure.axes[4].legend(loc="upper left", fontsize=10, frameon=False)
    plots.save(figure, path, 150)


def _rho_picture(outcome: Outcome, path: Path, headline: str) -> None:
    figure = _grid(1, 2, headline, 4.9)
    sweep, others = figure.axes
    for agent in outcome.watched:
        for arm, style in (("off", "--"), ("on", "-")):
            means = [mean_interval(outcome.scores(agent, arm, w)) for w in SWEEP]
            color = plots.VERMILLION if agent == "linear" else plots.BLUE
            label = f"{_AGENT_WORDS[agent]}, outliers {arm}"
            _points(sweep, np.asarray(RHOS), means, color, label, linestyle=style)
    sweep.set_xscale("log")
    sweep.set_xticks([0.01, 0.03, 0.1, 0.3, 0.95], ["0.01", "0.03", "0.1", "0.3", "0.95"])
    sweep.set_xticks([], minor=True)
    sweep.set_title("plain moving average", loc="left", fontweight="bold", fontsize=14)
    sweep.set_xlabel("rho, the weight of the new batch", fontsize=12)
    sweep.set_ylabel("score in eval mode", fontsize=12)
    rows = [w for w in OTHERS if w.rho == DEFAULT_RHO]
    for arm, color, shift in (("off", plots.GREY, 0.12), ("on", plots.VERMILLION, -0.12)):
        means = [mean_interval(outcome.scores("linear", arm, w)) for w in rows]
        y = np.arange(len(rows))[::-1] + shift
        center = np.asarray([i.mean for i in means])
        ends = np.abs(np.asarray([[i.lo, i.hi] for i in means]).T - center)
        others.errorbar(
            center, y, xerr=ends, fmt="o", color=color, markersize=7, capsize=3,
            label=f"outliers {arm}",
        )  # fmt: skip
    others.set_yticks(np.arange(len(rows))[::-1], [w.estimator for w in rows], fontsize=12)
    others.set_xlim(-0.03, 1.03)
    others.set_title(
        f"other estimators at rho {DEFAULT_RHO:g}, linear policy", loc="left", fontweight="bold",
        fontsize=14,
    )  # fmt: skip
    others.set_xlabel("score in eval mode", fontsize=12)
    sweep.set_ylim(-0.03, 1.03)
    sweep.legend(fontsize=10, frameon=False, loc="upper left", bbox_to_anchor=(0.24, 0.92))
    others.legend(fontsize=10, frameon=False, loc="center", bbox_to_anchor=(0.6, 0.62))
    figure.subplots_adjust(wspace=0.42)
    plots.save(figure, path, 150)


def _points(
    axes: Any, x: np.ndarray, intervals: Sequence[Interval], color: str, label: str, **style: Any
) -> None:
    means = np.asarray([i.mean for i in intervals])
    ends = np.abs(np.asarray([[i.lo, i.hi] for i in intervals]).T - means)
    axes.errorbar(
        x, means, yerr=ends, marker="o", color=color, capsize=3, label=label, **style
    )  # fmt: skip


def _frozen_picture(outcome: Outcome, path: Path) -> None:
    agents = list(outcome.watched)
    figure = _grid(
        len(agents), 2, "Train-mode batches without learning, then eval", 1.2 + 3.4 * len(agents)
    )
    chosen = [Watcher("ema", rho) for rho in (0.01, 0.03, 0.1, 0.3, 0.95)]
    for row, agent in enumerate(agents):
        for column, arm in enumerate(ARMS):
            axes = figure.axes[2 * row + column]
            for watcher, color in zip(chosen, plots.PALETTE, strict=False):
                values = [outcome.scores(agent, arm, watcher, k).mean() for k in range(WINDOW + 1)]
                axes.plot(
                    np.arange(WINDOW + 1), values, color=color, linewidth=2,
                    label=f"rho {watcher.rho:g}",
                )  # fmt: skip
            title = f"{_AGENT_WORDS[agent]}, outliers {arm}"
            axes.set_title(title, loc="left", fontweight="bold", fontsize=14)
            axes.set_ylim(-0.03, 1.03)
            axes.axvline(FEW, color=plots.GREY, linewidth=1, linestyle="--")
        figure.axes[2 * row].set_ylabel("score in eval mode", fontsize=12)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("frozen batches before the switch", fontsize=12)
    figure.axes[0].legend(fontsize=10, frameon=False, loc="center", bbox_to_anchor=(0.6, 0.6))
    plots.save(figure, path, 150)


def _grid(rows: int, columns: int, headline: str, height: float) -> Any:
    figure = plots._figure()
    figure.set_size_inches(12, height)
    axes = figure.subplots(rows, columns, sharex="none")
    for one in np.ravel(axes):
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
        one.grid(axis="y", color="#ebebeb")
        one.set_axisbelow(True)
    figure.suptitle(headline, x=0.02, ha="left", fontsize=18, fontweight="bold")
    figure.subplots_adjust(
        left=0.075, right=0.985, top=1 - 0.95 / height, bottom=0.65 / height, hspace=0.3, wspace=0.2
    )
    return figure


def explanation(study: dict[str, Any]) -> str:
    """The answer in a minute, as HTML; its last paragraph follows the measured verdicts."""
    verdict = {claim["id"]: claim["verdict"] for claim in study["claims"]}
    start = (
        "<p>In train mode batch norm uses the batch's own mean and variance; the running ones are "
        "written and never read. So no momentum can make training converge or fail there: what it "
        "decides is what eval mode finds afterwards.</p>"
        "<p>One observation in three thousand is far off here, so nine batches in ten are clean. "
        "Train mode is hurt in the tenth alone. A slow running average carries that one batch's "
        "variance into all the others: every feature is divided by far too much, the policy sees "
        "almost nothing and acts as if it were constant. With rho near 1 the running statistics "
        "are those of the last batch, which was clean nine times in ten.</p>"
    )
    if verdict["C5"] == "supported":
        return start + (
            "<p><strong>Here the outliers were the cause.</strong> Without them the same rho "
            "works, and statistics that do not let a few rows decide (clipped, bounded or by "
            "medians) work with them, on the very same batches and weights.</p>"
        )
    return start + "<p><strong>This run does not settle the cause</strong> (see C5 below).</p>"
