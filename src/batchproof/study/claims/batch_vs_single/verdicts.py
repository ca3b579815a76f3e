"""The claims A1 to A6 and B1 to B3, each judged by its rule; and which predictions were missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from batchproof.study.claims.batch_vs_single.conditions import (
    ARTICLE,
    BATCH_SIZE,
    EXPONENT,
    FAILED,
    FLOORS,
    KEPT,
    LEARNED,
    NOTEBOOK,
    POPULATION,
    PREDICTED_ACTING,
    REMOVED,
    SEEN,
    SIZES,
    SYNC_SIZES,
    TD_PLANS,
    WAYS,
    WRONG_TD,
    config_of,
)
from batchproof.study.claims.batch_vs_single.training import Trained
from batchproof.study.judging import Finding, claim_row, verdict_above
from batchproof.study.statistics import Interval, mean_interval, paired_difference_interval

FLOOR = FLOORS["float32"]
LEAST_GAP = SEEN * FLOOR


@dataclass(frozen=True)
class Evidence:
    """What claims are judged on.

    Attributes:
        found: the measures, each a list with one number a seed.
        cells: the trained conditions by name.
    """

    found: dict[str, Any]
    cells: dict[str, Trained]

    def mean(self, name: str) -> Interval:
        """The mean of a measure over seeds, with its interval."""
        return mean_interval(self.found[name])

    def most(self, name: str) -> float:
        """The largest of a measure over seeds."""
        return float(np.max(self.found[name]))

    def change(self, name: str, reference: str) -> Interval:
        """The mean difference of two measures, paired by seed."""
        return paired_difference_interval(self.found[name], self.found[reference])


class Judged(NamedTuple):
    """A claim, its rule, and what the rule found: the verdict, its number, and both in words."""

    id: str
    source: str
    statement: str
    rule: str
    verdict: str
    interval: Interval | None
    why: str


def judge(found: dict[str, Any], cells: dict[str, Trained], seeds: int) -> list[dict[str, Any]]:
    """Verdicts on A1 to A6 and B1 to B3, as ``study.json`` holds them."""
    evidence = Evidence(found, cells)
    rows = []
    for claim in (a1, a2, a3, a4, a5, a6, b1, b2, b3):
        judged = claim(evidence)
        finding = Finding(judged.verdict, judged.interval, judged.why).on(seeds)
        rows.append(
            claim_row(judged.id, judged.source, judged.statement, judged.rule, finding, n=seeds)
        )
    return rows


def a1(evidence: Evidence) -> Judged:
    """In a train-mode batch against alone in eval mode."""
    mean, most = evidence.mean, evidence.most
    gap = mean("gap T in a batch, E alone")
    agree = all(most(f"floor {p}") < bound for p, bound in FLOORS.items())
    verdict = (
        "refuted" if not agree or gap.hi < LEAST_GAP
        else "supported" if gap.lo > LEAST_GAP else "inconclusive"
    )  # fmt: skip
    return Judged(
        "A1", ARTICLE,
        "The same state acts differently in a train-mode batch and alone in eval mode; in eval "
        "mode, batch and alone agree.",
        "supported when the 95 % interval of the mean gap of an action lies above "
        f"{LEAST_GAP:g} and in E batch and alone agree to {FLOORS['float32']:g} in float32 and "
        f"{FLOORS['float64']:g} in float64 for every seed; refuted when they do not, or the gap "
        "is smaller",
        verdict, gap,
        f"Mean gap of an action in [-1, 1], T in a batch of {BATCH_SIZE} against E alone: "
        f"{_words(gap)}. In E, batch and alone differ by at most {most('floor float32'):.0e} "
        f"in float32 and {most('floor float64'):.0e} in float64: rounding. In T a state alone "
        f"is no state at all: over {BATCH_SIZE} states the action varies by "
        f"{most('spread of T alone'):.0e}.",
    )  # fmt: skip


def a2(evidence: Evidence) -> Judged:
    """The exponent with which the gap shrinks."""
    gaps = np.array([evidence.found[f"gap {size}"] for size in SIZES[1:]])
    k = mean_interval([exponent(SIZES[1:], one) for one in gaps.T])
    low, high = EXPONENT
    verdict = (
        "supported" if k.lo > low and k.hi < high
        else "refuted" if k.hi < low or k.lo > high else "inconclusive"
    )  # fmt: skip
    return Judged(
        "A2", ARTICLE,
        "The gap shrinks with the batch size N as about 1/sqrt(N).",
        f"supported when the interval of the fitted exponent lies within {low:g} to {high:g}, "
        "refuted when it lies outside",
        verdict, k,
        f"gap ~ N^k from N = {SIZES[1]} to {SIZES[-1]}, against the statistics of all "
        f"{POPULATION} visited states: k = {_words(k)}. Against E it does not vanish: "
        f"{_words(evidence.mean(f'gap from E {SIZES[-1]}'))} is left at {SIZES[-1]}, for the "
        "running statistics are the replay's, not those of the states that this policy visits.",
    )  # fmt: skip


def exponent(sizes: Any, gaps: Any) -> float:
    """k in gap ~ N^k, by least squares in the logarithms."""
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(gaps), 1)[0])


def a3(evidence: Evidence) -> Judged:
    """Two processes with shared statistics against two without."""
    found = evidence.found
    statement = "SyncBN removes the gap."
    rule = (
        "supported when the interval of the gap with SyncBN, as a share of the gap without, lies "
        f"below {REMOVED:g}; refuted when it lies above {KEPT:g} and SyncBN equals one process "
        "with the whole batch to 1e-9"
    )
    if f"sync {SYNC_SIZES[0]}" not in found:
        why = "Not run: it needs PyTorch."
        return Judged("A3", ARTICLE, statement, rule, "inconclusive", None, why)
    ratios = [np.divide(found[f"sync {n}"], found[f"half {n}"]) for n in SYNC_SIZES]
    ratio = mean_interval(np.mean(ratios, axis=0))
    exact = max(evidence.most(f"sync error {n}") for n in SYNC_SIZES)
    verdict = (
        "supported" if ratio.hi < REMOVED
        else "refuted" if ratio.lo > KEPT and exact < 1e-9 else "inconclusive"
    )  # fmt: skip
    why = (
        f"Two processes on gloo. Gap with shared statistics over the gap without: "
        f"{_words(ratio)} (predicted {0.5**0.5:.2f}, a batch twice as large). It equals one "
        f"process with the whole batch to {exact:.0e}: SyncBN makes N larger, no more."
    )
    return Judged("A3", ARTICLE, statement, rule, verdict, ratio, why)


def a4(evidence: Evidence) -> Judged:
    """Layer norm, in a train-mode batch against alone in eval mode."""
    worst = {p: evidence.most(f"layer {p}") for p in FLOORS}
    none = all(worst[p] < bound for p, bound in FLOORS.items())
    verdict = (
        "supported" if none
        else "refuted" if worst["float32"] > LEAST_GAP else "inconclusive"
    )  # fmt: skip
    which = "trained" if "layer" in evidence.cells else "fresh"
    return Judged(
        "A4", ARTICLE,
        "LayerNorm has no gap.",
        f"supported when the largest gap is below {FLOORS['float32']:g} in float32 and "
        f"{FLOORS['float64']:g} in float64 for every seed, refuted when it is above {LEAST_GAP:g}",
        verdict, evidence.mean("layer float32"),
        f"Largest gap of a {which} layer-norm actor, train mode in a batch against eval alone: "
        f"{worst['float32']:.0e} in float32, {worst['float64']:.0e} in float64.",
    )  # fmt: skip


def a5(evidence: Evidence) -> Judged:
    """What acting in train mode changes: return, visited states, and data collected."""
    cells = evidence.cells
    change = evidence.change("return T8", "return E")
    moved = evidence.change("shift T8", "shift E")
    data = None
    if "collected shift" in evidence.found:
        data = evidence.change("collected shift", "collected floor")
    returns = change.lo > 0 or change.hi < 0
    parts = [returns, moved.lo > 0, data is not None and data.lo > 0]
    verdict = (
        "supported" if all(parts)
        else "refuted" if not any(parts) and data is not None else "inconclusive"
    )  # fmt: skip
    why = (
        f"Trained actors that act in T in a batch of 8 environments instead of alone in E: "
        f"return {_words(change)}, state distribution (Wasserstein-1 in standard deviations, "
        f"above that of other episodes) {_words(moved)}. With 32 environments the return changes "
        f"by {_words(evidence.change('return T32', 'return E'))}. "
    )
    why += "Data collected: not run (add --conditions act-T)." if data is None else (
        f"Data collected when acting so throughout training: {_words(data)} above that of "
        "other seeds."
    )  # fmt: skip
    for key in ("act-T-1", "act-T-2", "act-T", "act-T-32", "act-B"):
        if key in cells:
            gain = paired_difference_interval(
                cells[key].returns[:, -1], cells["act-E"].returns[:, -1]
            )
            why += f" Final return, {key} minus act-E, both deployed in E: {_words(gain)}."
    return Judged(
        "A5", ARTICLE,
        "Acting in a batch of vectorized environments in train mode shifts the state distribution, "
        "the return and the data collected.",
        "supported when the intervals of all three changes, with 8 environments, exclude zero: "
        "return of trained actors (paired by seed and start), their states' shift above that of "
        "other episodes, and the replay's shift above that of other seeds when trained so; "
        "refuted when none does",
        verdict, change, why,
    )  # fmt: skip


def a6(evidence: Evidence) -> Judged:
    """Dropout in train mode against eval mode."""
    most = evidence.most
    gap = evidence.mean("dropout train, eval")
    exact = max(most("dropout eval floor"), most("dropout sub-network"))
    verdict = (
        "refuted" if exact > SEEN * FLOORS["float64"] or gap.hi < LEAST_GAP
        else "supported" if gap.lo > LEAST_GAP and exact < FLOORS["float64"] else "inconclusive"
    )  # fmt: skip
    return Judged(
        "A6", ARTICLE,
        "Dropout does the same, by mode; train-mode policies are sub-networks.",
        f"supported when the interval of the train-eval gap lies above {LEAST_GAP:g}, and eval in "
        f"batch and alone, and a mask and its sub-network, agree to {FLOORS['float64']:g} in "
        "float64; refuted when one of these does not hold",
        verdict, gap,
        f"Dropout .5 in a 64-64 actor, float64. Train against eval: {_words(gap)}. Eval in a "
        f"batch against alone: {most('dropout eval floor'):.0e}. A mask's output against the "
        f"network with the dropped units cut out: {most('dropout sub-network'):.0e}. Unlike "
        f"batch norm, companions do not matter: {most('dropout companions'):.0e}.",
    )  # fmt: skip


def b1(evidence: Evidence) -> Judged:
    """A single state: the layer skipped against eval mode."""
    mean, most = evidence.mean, evidence.most
    own = mean("gap B, E")
    moved, fresh = mean("notebook moved B, E"), mean("notebook fresh B, E")
    rounding = most("notebook moved floor")
    agree = rounding < FLOOR and most("floor float32") < FLOOR
    verdict = (
        "refuted" if agree and own.lo > LEAST_GAP and moved.lo > SEEN * rounding
        else "supported" if own.hi < FLOOR and moved.hi < FLOOR else "inconclusive"
    )  # fmt: skip
    return Judged(
        "B1", NOTEBOOK,
        "Batch norm does not apply to a single input.",
        f"refuted when eval on a single state equals eval in a batch to {FLOOR:g} and the "
        f"interval of its gap from a skipped layer lies above {LEAST_GAP:g} for trained actors, "
        f"and above {SEEN:g} times the rounding for the notebook's; supported when eval and "
        "skipping agree",
        verdict, own,
        "Eval mode takes a single state and gives what it gives in a batch (to "
        f"{rounding:.0e}); the notebook skips the layer instead. Its "
        f"actor, bypass against eval: {_words(fresh)} when fresh, {_words(moved)} once the "
        f"statistics moved, where actions are {mean('notebook moved size').mean:.3f} in size; "
        "train in a batch of three against eval "
        f"{_words(mean('notebook moved T of three, E'))}. Trained actors "
        f"of act-E, bypass against eval: {_words(own)}; their return in B is "
        f"{_words(mean('return B'))}, in E {_words(mean('return E'))}.",
    )  # fmt: skip


def b2(evidence: Evidence) -> Judged:
    """A local and a target actor of identical weights."""
    mean, most = evidence.mean, evidence.most
    gap = mean("twin T, E")
    same = most("twin E, E") < FLOOR
    verdict = (
        "supported" if gap.lo > LEAST_GAP and same
        else "refuted" if gap.hi < FLOOR else "inconclusive"
    )  # fmt: skip
    return Judged(
        "B2", NOTEBOOK,
        "Local and target actor with identical weights pick different actions.",
        "supported when the interval of the mean gap, local in T and target in E, lies above "
        f"{LEAST_GAP:g}, and with both in E there is none; refuted when it is below {FLOOR:g}",
        verdict, gap,
        f"Equal weights, equal states: local in T, target in E {_words(gap)}; local skipped, "
        f"target in T {_words(mean('twin B, T'))}; both in E, target statistics never synced "
        f"{_words(mean('twin E, E never synced'))}; both in E, synced: "
        f"{most('twin E, E'):.0e}.",
    )  # fmt: skip


def b3(evidence: Evidence) -> Judged:
    """The TD error in Stable-Baselines3's modes against the one with all the data's statistics."""
    mean = evidence.mean
    wrong = mean("td ETE wrong")
    sizes = ", ".join(f"{p} {_words(mean(f'td {p} wrong'))}" for p in TD_PLANS)
    return Judged(
        "B3", NOTEBOOK,
        "The TD error is wrong by a measurable amount.",
        "supported when the interval of its mean absolute error in Stable-Baselines3's modes, "
        f"against the statistics of all the data, lies above {WRONG_TD:g} of the TD error's own "
        "mean size; refuted when it lies below",
        verdict_above([wrong], WRONG_TD), wrong,
        "Mean error of the TD error by normalization, as a share of the TD error's own mean "
        f"size; the letters are slots 2, 4 and 5: {sizes}. The TD error's size is "
        f"{mean('td size').mean:.2f}.",
    )  # fmt: skip


def _words(interval: Interval) -> str:
    mean, lo, hi = (f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}" for x in interval)
    return f"{mean} [{lo}, {hi}]"


def describe(found: dict[str, Any], cells: dict[str, Trained]) -> list[dict[str, Any]]:
    """The conditions of ``study.json``: what was trained, and how act-E's actors acted after."""
    rows = []

    def add(name: str, label: str, returns: Any, predicted: float | None, **more: Any) -> None:
        missed = predicted is not None and (
            outcome_class(predicted) != outcome_class(float(np.mean(returns)))
        )
        rows.append(
            {
                "name": name,
                "label": label,
                "algo": "ddpg",
                **more,
                "returns": [float(value) for value in returns],
                "prediction": None if predicted is None else f"{predicted:g}",
                "missed": None if predicted is None else missed,
            }
        )

    for key, cell in cells.items():
        c = cell.condition
        add(
            key, c.label, cell.returns[:, -1], c.predicted,
            norm=c.norm.kind, modes=str(config_of(c).plan), wall_s=cell.wall_s,
        )  # fmt: skip
    for way, label in WAYS.items():
        add(
            f"acting-{way}", f"trained act-E, then acts {label}", found[f"return {way}"],
            PREDICTED_ACTING.get(way), norm="batch", modes=way[0], wall_s=0.0,
        )  # fmt: skip
    return rows


def outcome_class(mean: float) -> str:
    """``learned`` from `LEARNED` up, ``failed`` below `FAILED`, ``partly`` between."""
    return "learned" if mean >= LEARNED else "failed" if mean < FAILED else "partly"
