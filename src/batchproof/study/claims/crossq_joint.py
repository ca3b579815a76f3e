"""crossq-joint: why CrossQ puts (s, a) and (s', a') through its critics in one forward pass.

CrossQ (arXiv 1902.05605) removes the target network, adds batch norm, and normalizes the replayed
batch and the batch of its targets by the statistics of their mixture. Pull request 36 of sbx asks
why that one joint pass is needed, and not just faster; the paper's author lays out what else could
be done. This file holds those ways as conditions, with predictions and decision rules written
before the runs.

What differs is slots 4 and 5, the critic's passes on (s, a) and on (s', a'):

    JJ   one joint forward                            CrossQ
    TE   replay on its batch, target on running       statistics only ever see the replayed actions
    TT   each on its own batch                        each has its own mean
    ET   replay on running, target on its batch       the mirror image of TE
    EE   both on running, moved in slot 3 by M        one mixture for both, without a joint forward

each without a target network and with one. The cause that is put to the test: two passes that
are normalized by different statistics cannot be compared. In TT each batch's own mean is taken off,
so the critic's mean over (s', a') is its mean over (s, a), and how much better the policy's actions
are than the replayed ones is erased. That is measured at fixed weights, at the end of each
run, against PreciseBN: the statistics of both batches together, from many rows
(`batchproof.lab.recalibrate`).

Slot 3 is in E throughout (in M for EE), so that the common-mode effect (constant-reward) does not
mix in, and the actor has no norm.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.lab import checkpoint, nets
from batchproof.lab.agents import crossq
from batchproof.lab.load import up_to_date
from batchproof.lab.loop import Result, read_metrics, train
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.off_policy import Seed, Stepper, sample
from batchproof.lab.passes import Batch, replay_and_target_q
from batchproof.lab.recalibrate import recalibrate_critics
from batchproof.lab.squashed_gaussian import draw_noise
from batchproof.lab.training import NOT_DIVERGED, Training
from batchproof.modes import E, Plan, Slot
from batchproof.study import plots, report
from batchproof.study.conditions import Outcome, choose, write_outcome
from batchproof.study.judging import Finding, Judge, missed, verdict_above, verdict_below, words
from batchproof.study.statistics import Interval, difference_interval, mean_interval

NAME = "crossq-joint"
SOURCE = "CrossQ (arXiv 1902.05605) and pull request 36 of sbx"
SEEDS = 6  # two cores share them evenly
EVALUATIONS = 12  # in a run
LAST = 3  # evaluations whose mean is a seed's score

# Decision rules, in units of return on Pendulum-v1, where about -150 is as good as it gets.
SOLVED = -250.0
FAILED = -600.0
MARGIN = 100.0  # what counts as a difference
SWINGUP_MARGIN = 150.0  # of 1000 steps
SWINGUP_LEARNED = 400.0
ERASED = 0.5  # of the gap between both passes' means
KEPT = 0.25
MOST = 2.0  # what a seed's error of the gap counts at most
ROWS = 4096  # replayed transitions for it

NONE = Norm()
BATCH = Norm("batch", "input+post", momentum=0.01, eps=1e-3)
"""Where CrossQ has it, with its momentum and eps."""


@dataclass(frozen=True)
class Task:
    """A task and how it is trained.

    On swing-up an action lasts for four steps and observations are normalized by running
    statistics, as in `pendulum_swingup`: otherwise SAC fails there.
    """

    env_id: str
    title: str
    steps: int
    learning_starts: int
    eval_episodes: int
    worst: float  # score of a seed that diverged
    env_options: dict[str, Any] = field(default_factory=dict)
    normalize_obs: bool = False


TASKS = {
    "pendulum": Task("Pendulum-v1", "Pendulum-v1", 6000, 500, 5, -2000.0),
    "swingup": Task(
        "batchproof/PendulumSwingup-v0",
        "pendulum-swingup",
        100_000,
        1000,
        10,
        0.0,
        {"repeat": 4},
        True,
    ),
}


@dataclass(frozen=True)
class Condition:
    """One way to run slots 4 and 5, with or without a target network, on one task.

    Attributes:
        key: its name.
        task: a name in `TASKS`.
        forward: a name in `FORWARDS`.
        target: whether there is a target network.
        predicted: final return; None where nothing was predicted.
    """

    key: str
    task: str
    forward: str
    target: bool
    predicted: float | None

    @property
    def plan(self) -> str | None:
        """The mode plan, None without a norm."""
        return FORWARDS[self.forward][0]

    @property
    def label(self) -> str:
        """What a reader sees."""
        return FORWARDS[self.forward][1]


FORWARDS: dict[str, tuple[str | None, str]] = {
    "joint": ("TEEJJ", "joint forward"),
    "te": ("TEETE", "apart: replay T, target E"),
    "tt": ("TEETT", "apart: both T"),
    "et": ("TEEET", "apart: replay E, target T"),
    "ee": ("TEMEE", "apart: both E, moved in slot 3"),
    "none": (None, "no batch norm"),
}
_PREDICTED = {  # without and with a target network, on Pendulum-v1
    "joint": (-150.0, -150.0),
    "te": (-1000.0, -150.0),
    "tt": (-1000.0, -150.0),
    "et": (-1000.0, -150.0),
    "ee": (-150.0, -150.0),
    "none": (-400.0, -150.0),
}
NETWORKS = {"online": False, "target": True}
"""Which critic values (s', a'), and whether it is a target network."""

CONDITIONS = tuple(
    Condition(
        ("swingup-" if task == "swingup" else "") + f"{forward}-{network}",
        task,
        forward,
        target,
        _PREDICTED[forward][target] if task == "pendulum" else None,
    )
    for task in TASKS
    for forward in FORWARDS
    for network, target in NETWORKS.items()
)
DEFAULT = tuple(f"{forward}-{network}" for forward in ("joint", "te", "tt") for network in NETWORKS)


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
        seeds: for each condition, default `SEEDS`.
        steps: environment steps of each seed, default the task's.
        quick: a quarter of the steps.
        conditions: names from `CONDITIONS` with commas between, or ``all``; default `DEFAULT`.
        progress: show bars.
        command: what a user typed, for the record.

    Returns:
        The content of ``study.json``.
    """
    chosen = choose(CONDITIONS, DEFAULT, conditions)
    seeds = seeds if seeds is not None else SEEDS
    if seeds < 1:
        raise BatchproofError(f"seeds must be at least 1, got {seeds}")
    trainings = {}
    for condition in chosen:
        length = TASKS[condition.task].steps // (4 if quick else 1)
        trainings[condition.key] = training(condition, seeds, length if steps is None else steps)
    began = time.perf_counter()
    results: dict[str, Result] = {}
    biases: Biases = {}
    with records.locked(out):
        for i, (key, wanted) in enumerate(trainings.items()):
            results[key], biases[key] = _train(
                wanted, out / "cells" / key, progress, f"{i + 1}/{len(chosen)} {key}", command
            )
        outcome = Outcome(chosen, seeds, results)
        study = write_outcome(
            NAME, out, outcome, judge(outcome, biases), describe(outcome, biases),
            steps=max(int(result.metrics["step"].max()) for result in results.values()),
            began=began, command=command,
        )  # fmt: skip
        _render(outcome, biases, study, out)
    return study


def training(condition: Condition, seeds: int, steps: int) -> Training:
    """One condition as a run of the lab: CrossQ with networks 64x64, and an actor never delayed."""
    task = TASKS[condition.task]
    config = crossq.Config(
        actor=MLP((64, 64)),
        critic=MLP((64, 64), BATCH if condition.plan else NONE),
        plan=Plan.parse(condition.plan or "crossq"),
        batch_size=128,
        policy_delay=1,
        target_network=condition.target,
    )
    interval = max(1, steps // EVALUATIONS)
    return Training(
        algo="crossq",
        config=config,
        env_id=task.env_id,
        env_options=task.env_options,
        seeds=tuple(range(seeds)),
        # It is stopped one interval before its end, see `_train`.
        steps=(EVALUATIONS + 1) * interval,
        learning_starts=min(task.learning_starts, steps // 4),
        eval_every=interval,
        eval_episodes=task.eval_episodes,
        normalize_obs=task.normalize_obs,
    )


# --- the TD bias -----------------------------------------------------------------------------

Bias = dict[str, Any]
"""What was measured at the end of a run: its ``step``, the ``rows`` of the replay that it was
measured on, and of each quantity a list over seeds.

``current`` is -E[Q_4 - Q_ref] on (s, a) and ``target`` is gamma E[(1 - terminated)
(Q_5 - Q_ref)] on (s', a'): their sum is what normalization adds to the mean TD error. ``gap`` is
E[Q_5] - E[Q_4], ``gap_reference`` the same of Q_ref, ``spread`` the standard deviation of Q_ref
over (s, a); all in units of return, mean over critics.
"""
Biases = dict[str, Bias | None]
"""By condition; None without a norm."""


def _train(
    wanted: Training, folder: Path, progress: bool, label: str, command: str
) -> tuple[Result, Bias | None]:
    """Run a cell up to its last evaluation but one, where its replay is still there to measure."""
    path, at_rest = folder / "bias.json", folder / "run.json"
    if at_rest.exists():
        held = records.read_json(at_rest)["training"]
        if up_to_date(held, at_rest) != records.to_json(wanted.record()):
            raise BatchproofError(
                f"{folder} holds a run with other settings: choose another --out, or delete that "
                "folder"
            )
    measured = records.read_json(path) if path.exists() else {}
    if measured is not None and measured.get("rows") != ROWS:
        at = wanted.steps - wanted.evaluation_interval
        state = checkpoint.read_state(folder / "checkpoint")
        # A run that was killed while its bias was measured is there already.
        if state is None or state["step"] < at:
            train(
                wanted, folder, progress=progress, label=label, command=command,
                stop=lambda step, _: step >= at,
            )  # fmt: skip
        normed = wanted.config.critic.norm.kind != "none"
        records.write_json(path, measure_bias(wanted, folder) if normed else None)
    run = records.read_json(at_rest)
    metrics = read_metrics(folder / "metrics.parquet")
    return Result(metrics, run["seeds"], run["wall_s"]), records.read_json(path)


def measure_bias(wanted: Training, folder: Path) -> Bias:
    """The TD bias of each seed at the checkpoint of an unfinished run."""
    stepper = Stepper(wanted)
    stepper.restore(folder / "checkpoint")
    filled = min(stepper.step, wanted.capacity)
    config = wanted.config
    drawn = replace(wanted, config=replace(config, batch_size=ROWS))

    def of_seed(seed: Seed, key: Array) -> dict[str, Array]:
        sample_key, noise_key = jax.random.split(key)
        batch = sample(drawn, seed, sample_key, jnp.asarray(filled))
        return td_bias(config, seed.agent, batch, noise_key)

    count = len(wanted.seeds)
    seed = jax.tree.map(lambda leaf: leaf[:count], stepper.seed)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 2**31 - 3))(seed.key)
    compiled = jax.jit(
        jax.vmap(of_seed), compiler_options={"xla_backend_optimization_level": 0}
    )  # run once: compiled fast, not to be fast
    measured = compiled(seed, keys)
    sound = np.asarray(seed.diverged_at) == NOT_DIVERGED
    return {"step": stepper.step, "rows": ROWS} | {
        name: np.where(sound, np.asarray(values), np.nan).tolist()
        for name, values in measured.items()
    }


def td_bias(
    config: crossq.Config, agent: crossq.State, batch: Batch, key: Array
) -> dict[str, Array]:
    """What normalization adds to the mean TD error at fixed weights, see `Bias`.

    Args:
        config: of the agent.
        agent: one seed's.
        batch: N transitions, N a multiple of the agent's batch size: each minibatch is normalized
            on its own, as in training.
        key: source of the noise of a'.
    """
    noise = draw_noise(key, batch.action.shape).next_action
    mode = config.plan[Slot.TARGET_ACTION]
    next_action, _, _ = crossq.policy(config, agent.actor, batch.next_obs, noise, mode)

    def minibatches(values: Array) -> Array:
        return values.reshape(-1, config.batch_size, *values.shape[1:])

    def passes(part: Batch, action: Array) -> tuple[Array, Array]:
        found = replay_and_target_q(
            config.critic, agent.critic, agent.target_critic, part, action, config.plan
        )
        return found.q, found.next_q

    q, next_q = jax.lax.map(
        lambda parts: passes(*parts), (jax.tree.map(minibatches, batch), minibatches(next_action))
    )  # (K, C, B)
    both = jnp.concatenate([batch.obs, batch.next_obs])
    actions = jnp.concatenate([batch.action, next_action])
    online = recalibrate_critics(config.critic, agent.critic, both, actions)
    valuing = online
    if agent.target_critic is not None:
        valuing = recalibrate_critics(config.critic, agent.target_critic, both, actions)
    q_ref, _ = nets.q_values(config.critic, online, batch.obs, batch.action, E)  # (C, N)
    next_ref, _ = nets.q_values(config.critic, valuing, batch.next_obs, next_action, E)
    goes_on = 1 - batch.terminated
    rows = jnp.moveaxis(next_q, 0, 1).reshape(next_ref.shape)
    return {
        "current": -(q.mean() - q_ref.mean()),
        "target": config.gamma * (goes_on * (rows - next_ref)).mean(),
        "gap": next_q.mean() - q.mean(),
        "gap_reference": next_ref.mean() - q_ref.mean(),
        "spread": q_ref.std(-1).mean(),
    }


def gap_error(bias: Bias) -> np.ndarray:
    """Each seed's error of the gap between both passes, as a share of the gap of the reference.

    (seeds,), at most `MOST`, which is also a diverged seed's: 1 where the gap is erased, 0 where
    both passes are normalized alike.
    """
    gap, reference = (np.array(bias[name], dtype=float) for name in ("gap", "gap_reference"))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.abs(gap - reference) / np.abs(reference)
    return np.minimum(np.nan_to_num(share, nan=MOST, posinf=MOST), MOST)


# --- verdicts --------------------------------------------------------------------------------


def score(outcome: Outcome[Condition], key: str) -> np.ndarray:
    """Each seed's score (seeds,): its mean return in the last evaluations."""
    condition = next(c for c in outcome.conditions if c.key == key)
    return outcome.last(key, LAST, TASKS[condition.task].worst)


def describe(outcome: Outcome[Condition], biases: Biases) -> list[dict[str, Any]]:
    """The conditions of ``study.json``."""
    rows = []
    for condition in outcome.conditions:
        scores = score(outcome, condition.key)
        bias, predicted = biases.get(condition.key), condition.predicted
        rows.append(
            {
                "name": condition.key,
                "label": f"{TASKS[condition.task].title}: {condition.label}, "
                + ("target network" if condition.target else "no target network"),
                "algo": "crossq",
                "task": condition.task,
                "norm": "critic batch input+post momentum 0.01 eps 0.001"
                if condition.plan
                else "none",
                "modes": condition.plan,
                "target_network": condition.target,
                "returns": scores.tolist(),
                "bias": bias,
                "gap_error": gap_error(bias).tolist() if bias else None,
                "prediction": None if predicted is None else f"{predicted:g}",
                "missed": None if predicted is None else _missed(predicted, scores),
                "diverged": outcome.diverged(condition.key),
                "wall_s": outcome.results[condition.key].wall_s,
            }
        )
    return rows


_missed = partial(missed, solved=SOLVED, failed=FAILED)


def judge(outcome: Outcome[Condition], biases: Biases) -> list[dict[str, Any]]:
    """Verdicts by the rules above."""
    judge = Judge(outcome, SOURCE)

    def mean(key: str) -> Interval:
        return mean_interval(score(outcome, key))

    def gain(key: str, other: str) -> Interval:
        return difference_interval(score(outcome, key), score(outcome, other))

    def j1() -> Finding:
        joint, apart = mean("joint-online"), mean("te-online")
        verdict = (
            "refuted" if apart.lo > SOLVED
            else "supported" if joint.lo > SOLVED and apart.hi < FAILED else "inconclusive"
        )  # fmt: skip
        return Finding(verdict, apart, f"Return in TE {words(apart)}, joint {words(joint)}.")

    def j2() -> Finding:
        found = gain("joint-online", "tt-online")
        return Finding(
            verdict_above([found], MARGIN), found, f"Return joint minus TT: {words(found)}."
        )

    def j3() -> Finding:
        apart, joint = (
            mean_interval(gap_error(biases[key] or {})) for key in ("tt-online", "joint-online")
        )
        worse = j2().verdict
        verdict = (
            "refuted" if worse == "refuted" or apart.hi < KEPT
            else "supported" if worse == "supported" and apart.lo > ERASED and joint.hi < KEPT
            else "inconclusive"
        )  # fmt: skip
        why = (
            "Error of the gap between both passes, as a share of the true gap: in TT "
            f"{words(apart, 2)}, joint {words(joint, 2)}. Return joint minus TT: "
            f"{words(gain('joint-online', 'tt-online'))}."
        )
        return Finding(verdict, apart, why)

    def j4() -> Finding:
        found = {key: gain("joint-target", f"{key}-target") for key in ("te", "tt")}
        worst = max(found.values(), key=lambda interval: interval.hi)
        text = ", ".join(f"{key.upper()} {words(interval)}" for key, interval in found.items())
        return Finding(
            verdict_below(list(found.values()), MARGIN),
            worst,
            f"With a target network, return joint minus apart: {text}.",
        )

    def j5() -> Finding:
        found = gain("joint-online", "ee-online")
        return Finding(
            verdict_below([found], MARGIN), found, f"Return joint minus EE: {words(found)}."
        )

    def j6() -> Finding:
        found = gain("joint-online", "none-online")
        return Finding(
            verdict_above([found], MARGIN), found, f"Return joint minus no norm: {words(found)}."
        )

    def j7() -> Finding:
        found = {key: gain("swingup-joint-online", f"swingup-{key}-online") for key in ("te", "tt")}
        least = min(found.values(), key=lambda interval: interval.lo)
        text = ", ".join(f"{key.upper()} {words(interval)}" for key, interval in found.items())
        joint = mean("swingup-joint-online")
        why = f"Return joint {words(joint)}, joint minus apart: {text}."
        if joint.lo <= SWINGUP_LEARNED:
            return Finding("inconclusive", least, f"{why} CrossQ is not shown to learn the task.")
        return Finding(verdict_above(list(found.values()), SWINGUP_MARGIN), least, why)

    judge.claim(
        "J1",
        "Without a target network, valuing (s', a') on running statistics (TE) does not work.",
        f"a seed's score is its mean return in the last {LAST} of {EVALUATIONS} evaluations; "
        f"supported when the 95 % interval of the mean score lies below {FAILED:g} in TE and above "
        f"{SOLVED:g} with the joint forward; refuted when it lies above {SOLVED:g} in TE",
        ("joint-online", "te-online"),
        j1,
    )
    judge.claim(
        "J2",
        "Without a target network, both passes on their own batches (TT) do worse than one joint "
        "pass.",
        "supported when the 95 % interval of the difference in score, joint minus TT, lies above "
        f"{MARGIN:g}; refuted when it lies below",
        ("joint-online", "tt-online"),
        j2,
    )
    judge.claim(
        "J3",
        "TT does worse because its two passes are normalized by different statistics, which "
        "erases how much better the policy's actions are.",
        "the gap is the mean of Q(s', a') minus that of Q(s, a), its error is taken against "
        "PreciseBN statistics of both batches; supported when J2 is and the error, as a share of "
        f"the true gap, is above {ERASED:g} in TT and below {KEPT:g} with the joint forward (95 % "
        f"intervals over seeds); refuted when J2 is refuted, or the error in TT is below {KEPT:g}",
        ("joint-online", "tt-online"),
        j3,
    )
    judge.claim(
        "J4",
        "With a target network the joint forward is not needed.",
        "supported when the 95 % intervals of the difference in score, joint minus TE and joint "
        f"minus TT, both lie below {MARGIN:g}; refuted when one lies above",
        ("joint-target", "te-target", "tt-target"),
        j4,
    )
    judge.claim(
        "J5",
        "What is needed is one set of statistics of both batches, not one forward pass.",
        "supported when both passes on the same running statistics of a mixture (EE) are not worse "
        f"than the joint forward: the 95 % interval of the difference lies below {MARGIN:g}; "
        "refuted when it lies above",
        ("joint-online", "ee-online"),
        j5,
    )
    judge.claim(
        "J6",
        "Without a target network batch norm is needed at all.",
        "supported when the 95 % interval of the difference in score, joint forward minus no norm, "
        f"lies above {MARGIN:g}; refuted when it lies below",
        ("joint-online", "none-online"),
        j6,
    )
    judge.claim(
        "J7",
        "On pendulum-swingup too, the joint forward is needed without a target network.",
        "supported when the 95 % intervals of the difference in score, joint minus TE and joint "
        f"minus TT, both lie above {SWINGUP_MARGIN:g}; refuted when one lies below; neither unless "
        f"the joint forward's own lies above {SWINGUP_LEARNED:g}, which was added after a run of "
        "48 000 steps in which it learned nothing",
        ("swingup-joint-online", "swingup-te-online", "swingup-tt-online"),
        j7,
    )
    return judge.claims


# --- pictures --------------------------------------------------------------------------------

_COLORS = {
    "joint": plots.BLUE,
    "te": plots.VERMILLION,
    "tt": plots.PINK,
    "et": plots.ORANGE,
    "ee": plots.GREEN,
    "none": plots.BLACK,
}
_SHORT = {
    "joint": "joint (JJ)",
    "te": "apart, TE",
    "tt": "apart, TT",
    "et": "apart, ET",
    "ee": "apart, EE",
    "none": "no batch norm",
}
_COLUMNS = {False: "no target network", True: "target network"}


def _render(
    outcome: Outcome[Condition],
    biases: Biases,
    study: dict[str, Any],
    out: Path,
) -> None:
    sections = []
    verdicts = {claim["id"]: claim["verdict"] for claim in study["claims"]}
    for task in dict.fromkeys(c.task for c in outcome.conditions):
        mine = [c for c in outcome.conditions if c.task == task]
        title = TASKS[task].title
        panels = []
        for target, name in _COLUMNS.items():
            curves = [_curve(outcome, c) for c in mine if c.target == target]
            if curves:
                panels.append(plots.Panel(f"{title}, {name}", curves))
        headline = f"CrossQ's joint forward and what could stand in for it: {title}"
        if task == "pendulum" and verdicts["J2"] == "supported":
            headline = "Without a target network CrossQ needs its joint forward"
        elif task == "pendulum" and verdicts["J1"] == "supported":
            headline = "Valuing (s', a') on running statistics fails without a target network"
        path = out / ("curves.png" if task == "pendulum" else f"curves-{task}.png")
        plots.learning_curves(panels, path, headline=headline, best=None)
        sections.append(
            report.FigureSection(
                "Learning curves" if task == "pendulum" else f"Learning curves on {title}",
                f"{outcome.seeds} seeds: mean over seeds with the band from the worst to the best. "
                "The letters are slots 4 and 5, the critic's passes on (s, a) and (s', a').",
                path,
                alt=f"Learning curves on {title} for each way to run the two passes",
            )
        )
        path = out / ("conditions.png" if task == "pendulum" else f"conditions-{task}.png")
        plots.condition_table_plot(
            _score_rows(outcome, mine),
            path,
            headline=f"Every condition on {title}",
            best=None,
            x_label=f"mean return of the last {LAST} evaluations",
        )
        sections.append(
            report.FigureSection(
                f"Every condition ({title})",
                "Dots are seeds, the bar runs from the worst to the best, the hollow diamond is "
                "what was predicted. Predicted and found are compared by class: solved from "
                f"{SOLVED:g} up, failed below {FAILED:g}, partly between.",
                path,
                alt="Scores of every condition, a row each, with predictions",
            )
        )
        measured = {c: bias for c in mine if (bias := biases.get(c.key))}
        if measured:
            path = out / ("gap.png" if task == "pendulum" else f"gap-{task}.png")
            plots.condition_table_plot(
                _gap_rows(measured),
                path,
                headline="How wrongly are the two batches compared?",
                best=None,
                x_label=f"error of the gap, as a share of the true gap (at most {MOST:g})",
            )
            sections.append(
                report.FigureSection(
                    f"The gap between both passes ({title})",
                    "Mean Q(s', a') minus mean Q(s, a) at the end of the run, with weights fixed: "
                    "how far it is off, against statistics of both batches together (PreciseBN). "
                    "0: right; 1: erased, or off by as much as it is. study.json has both parts of "
                    "the TD bias that it is made of.",
                    path,
                    alt="Error of the gap between both passes for each condition",
                )
            )
    report.write_report(
        out / "report.html", study, sections, explanation(study),
        title="Why CrossQ needs one joint forward pass",
    )  # fmt: skip


def _curve(outcome: Outcome[Condition], condition: Condition) -> plots.Curve:
    steps, values = outcome.curve(condition.key)
    forward = condition.forward
    return plots.Curve(_SHORT[forward], steps, values, _COLORS[forward])


def _score_rows(outcome: Outcome[Condition], conditions: list[Condition]) -> list[plots.ForestRow]:
    rows = []
    for forward in dict.fromkeys(c.forward for c in conditions):
        mine = {_COLUMNS[c.target]: c for c in conditions if c.forward == forward}
        scores = {name: score(outcome, c.key) for name, c in mine.items()}
        rows.append(
            plots.ForestRow(
                FORWARDS[forward][1],
                {name: values.tolist() for name, values in scores.items()},
                {name: c.predicted for name, c in mine.items()},
                detail=FORWARDS[forward][0] or "",
                missed=frozenset(
                    name
                    for name, c in mine.items()
                    if c.predicted is not None and _missed(c.predicted, scores[name])
                ),
            )
        )
    return rows


def _gap_rows(measured: dict[Condition, Bias]) -> list[plots.ForestRow]:
    return [
        plots.ForestRow(
            FORWARDS[forward][1],
            {
                _COLUMNS[c.target]: gap_error(bias).tolist()
                for c, bias in measured.items()
                if c.forward == forward
            },
            detail=FORWARDS[forward][0] or "",
        )
        for forward in dict.fromkeys(c.forward for c in measured)
    ]


def explanation(study: dict[str, Any]) -> str:
    """The question in a minute, as HTML; its last paragraph follows the measured verdicts."""
    verdict = {claim["id"]: claim["verdict"] for claim in study["claims"]}
    if verdict["J3"] == "supported":
        result = (
            "<p><strong>Here it was so.</strong> Without a target network two passes on their own "
            "statistics learn less than the joint one, and the difference between the two means "
            "is gone from their values.</p>"
        )
    elif verdict["J1"] == "supported":
        result = (
            "<p><strong>Here TE was what fails.</strong> Without a target network the agent does "
            "not learn when (s', a') is valued on running statistics. With both on their own "
            "batches it may: what is taken off is a constant, and the actor only hears "
            "differences. See J2 and J3 below for how far that goes.</p>"
        )
    else:
        result = "<p><strong>This run does not settle it</strong>: see J1 to J3 below.</p>"
    return (
        "<p>A critic learns that its value of (s, a) should be the reward plus its value of what "
        "comes next, (s', a'). So it is asked twice, on two batches. The replayed actions a were "
        "chosen by old policies, a' is the present policy's: the two batches differ.</p>"
        "<p>Batch norm subtracts a mean. If each batch has its own subtracted (<code>TT</code>), "
        "the mean of what comes next is pulled to the mean of what was replayed, however much "
        "better the policy has become. If the replayed batch has its own and the next one the "
        "running averages (<code>TE</code>), the averages have never seen the policy's actions. "
        "CrossQ puts both through in one pass (<code>JJ</code>), so that both are measured "
        "by one ruler.</p>" + result
    )
