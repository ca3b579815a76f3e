"""BP2xx, train vs eval: which mode acts, and what the other one would have done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchproof.clinic.locate import (
    Located,
    forced_mode,
    gap,
    in_precision,
    locate,
    once,
    reseed,
    tolerance,
)
from batchproof.clinic.probe import LayerFacts
from batchproof.clinic.rules import (
    Examination,
    Finding,
    Outcome,
    failed,
    not_applicable,
    passed,
    review,
    rule,
)
from batchproof.clinic.rules_batch import LARGE, acting, effect, largest
from batchproof.clinic.subject import Obs, Subject, rows, take, tensors, unchanged

SIZES = (2, 8, 32, 128)  # batch sizes at which the gap is measured
DRAWS = 8  # batches of each size
KL_LIMIT = 0.01  # the smallest target_kl in common use


def train_modes(subject: Subject) -> dict[int, bool]:
    """The mode of each module, by ``id``, after the networks' own ``train()``.

    A network that keeps some layers frozen by overriding ``train`` is taken at its word.
    """
    with unchanged(subject):
        for network in subject.networks.values():
            network.train()
        return {id(module): module.training for _, _, module in subject.modules()}


def mode_layers(exam: Examination) -> list[LayerFacts]:
    """Layers of the acting networks whose output or state depends on the mode."""
    return [
        layer
        for layer in exam.layers_of(*exam.acting_roles)
        if layer.mode_gap > 0
        or layer.moves_train != layer.moves_eval
        or layer.random_train != layer.random_eval
        or layer.couples_train != layer.couples_eval
    ]


def _in_train_mode(exam: Examination) -> list[LayerFacts]:
    """Those that ran in train mode when the subject acted."""
    modes = acting(exam).modes
    return [layer for layer in mode_layers(exam) if modes.get(id(layer.call.module), False)]


def output(exam: Examination, modes: bool | dict[int, bool], obs: Obs) -> Tensor:
    """The networks' output (B, K) in the given modes, from the state that the subject has."""
    with forced_mode(exam.subject, modes):
        return once(exam.subject, lambda: exam.subject.policy(obs))


def _locate_modes(
    exam: Examination,
    run: Callable[[], Tensor],
    modes_a: bool | dict[int, bool],
    modes_b: bool | dict[int, bool],
) -> Located:
    """The layers that make a run differ between two assignments of modes."""

    def under(modes: bool | dict[int, bool]) -> Tensor:
        with forced_mode(exam.subject, modes):
            return run()

    return locate(
        exam.subject, lambda: under(modes_a), lambda: under(modes_b), slice(None), slice(None)
    )


def gap_by_batch_size(exam: Examination) -> dict[int, float]:
    """Root mean square over rows of |train output - eval output|, by the size of the train batch.

    Rows are drawn without replacement from the subject's first 1024 observations, eight batches of
    each size; two batches from the first 64, where observations are images.
    """
    subject = exam.subject
    entries = sum(part[0].numel() for part in tensors(subject.obs))
    most, draws = (32, 2) if entries > LARGE else (SIZES[-1], DRAWS)
    count = min(rows(subject.obs), most * draws)
    pool = take(subject.obs, slice(0, count))
    modes = train_modes(subject)
    generator = np.random.default_rng(0)
    gaps: dict[int, float] = {}
    with in_precision(subject):
        evaluated = output(exam, False, pool)
        for size in (n for n in SIZES if n <= min(count, most)):
            squares = []
            for _ in range(draws):
                index = torch.as_tensor(generator.permutation(count)[:size])
                change = gap(output(exam, modes, take(pool, index)), evaluated[index])
                squares.append(float(change.square().mean()))
            gaps[size] = math.sqrt(sum(squares) / len(squares))
    return gaps


def exponent(gaps: dict[int, float]) -> float:
    """Slope of log gap against log batch size: -1/2 for sampling noise, 0 for a lasting bias."""
    points = [(math.log(n), math.log(g)) for n, g in gaps.items() if g > 0 and math.isfinite(g)]
    if len(points) < 2:
        return float("nan")
    x, y = np.array(points).T
    return float(np.polyfit(x, y, 1)[0])


def _sizes_in_words(exam: Examination) -> str:
    gaps = gap_by_batch_size(exam)
    if len(gaps) < 2:
        return ""
    values = ", ".join(f"{value:.2g}" for value in gaps.values())
    sizes = ", ".join(str(size) for size in gaps)
    return f"; root mean square {values} in batches of {sizes} (~ N^{exponent(gaps):.2f})"


def _layers_in_words(where: Located) -> str:
    parts = sorted(where.effects.items(), key=lambda item: -item[1])[:4]
    if len(parts) < 2:
        return ""
    return "; by layer: " + ", ".join(f"{path} {value:.2g}" for path, value in parts)


@rule(
    "BP201",
    "train-eval-gap",
    "Train and eval mode give different outputs",
    what="Compares the networks' outputs in train and in eval mode, for the actor and for the "
    "critic, layer by layer and by batch size, and both with the output as deployed.",
    detected="value = max|output in train mode - output in eval mode| on the probe batch, in "
    "float64; a matter for review above max(1e-9, 16 eps) * max|output| where the policy acts in "
    "eval mode. A failure where the output as deployed differs by more than that from both: some "
    "layers act in one mode and some in the other. Train mode is what the networks' own train() "
    "sets. The effect states the root-mean-square gap in batches of 2, 8, 32 and 128 rows and the "
    "exponent fitted to it: -1/2 where the batch's sampling noise is all, nearer 0 where running "
    "statistics are off the data's.",
    why="The loss is computed for the train-mode policy and the eval-mode policy acts. A gap in "
    "action units is the error of that stand-in; in the critic it is an error of the TD target.",
    mend="Nothing, where the gap is small against the action range and shrinks with the batch. "
    "Else use larger batches, recalibrate the running statistics (an off-policy agent's on its "
    "replay), or replace the layer by Batch Renorm, or by LayerNorm, which has no gap. Where modes "
    "are mixed, call eval() on the whole network.",
    fix="recalibrate",
    safe=False,
    references=(
        "Ioffe 2017, arXiv 1702.03275",
        "Wu & Johnson 2021, arXiv 2105.07576",
        "Stable-Baselines3 issue 614",
    ),
)
def train_eval_gap(exam: Examination) -> Outcome:
    """BP201."""
    subject, deployed = exam.subject, acting(exam)
    if not subject.networks:
        return not_applicable("no network is named, so no mode can be set")
    batch, train = deployed.batch, train_modes(subject)
    with in_precision(subject):
        in_eval = output(exam, False, batch)
        in_train = output(exam, train, batch)
        as_deployed = output(exam, deployed.modes, batch)
    limit = tolerance(in_eval, in_train, eps=deployed.eps)
    floor = probe_floor(exam, batch, in_eval)
    change = gap(in_train, in_eval)
    off_eval, off_train = gap(as_deployed, in_eval), gap(as_deployed, in_train)
    if not largest(off_eval) <= limit and not largest(off_train) <= limit:
        where = _locate_modes(exam, lambda: subject.policy(batch), False, deployed.modes)
        return failed(
            Finding(
                message="some layers act in train mode and some in eval mode: the output as "
                "deployed is neither the train-mode nor the eval-mode one",
                network=where.network,
                first=where.first,
                largest=where.largest,
                site="act",
                value=largest(off_eval),
                floor=floor,
                threshold=limit,
                effect=f"{effect(exam, off_eval)} from eval mode, {effect(exam, off_train)} from "
                f"train mode{_layers_in_words(where)}",
            )
        )
    findings = []
    if not largest(change) <= limit:
        if not largest(off_eval) <= limit:
            return not_applicable(
                "acting runs in train mode: see BP203 for batch statistics, BP202 for dropout"
            )
        where = _locate_modes(exam, lambda: subject.policy(batch), False, train)
        findings.append(
            Finding(
                message="the train-mode policy is another one than the eval-mode policy that acts",
                network=where.network,
                first=where.first,
                largest=where.largest,
                site="act",
                value=largest(change),
                floor=floor,
                threshold=limit,
                effect=effect(exam, change) + _sizes_in_words(exam) + _layers_in_words(where),
            )
        )
    critic = _critic_gap(exam)
    if critic is not None:
        findings.append(critic)
    if findings:
        return review(*findings)
    return passed(f"train and eval mode agree to {largest(change):.2g}")


def probe_floor(exam: Examination, batch: Obs, exact: Tensor) -> float:
    """The rounding error of the eval-mode output in the precision in which it is deployed."""
    return largest(gap(once_in_eval(exam, lambda: exam.subject.policy(batch)), exact))


def _critic_gap(exam: Examination) -> Finding | None:
    """The critic's gap between train and eval mode on the same observations and actions."""
    subject = exam.subject
    critic = subject.critic
    if critic is None:
        return None
    if subject.transitions is not None:
        few = slice(0, min(len(subject.transitions), exam.BATCH))
        obs, action = take(subject.transitions.obs, few), subject.transitions.action[few]
    elif subject.critic_actor is not None:
        obs = acting(exam).batch
        actor = subject.critic_actor
        with forced_mode(subject, False):
            action = once(subject, lambda: actor(obs))
    else:
        return None
    if len(action) < 2:
        return None

    def values() -> Tensor:
        return critic(obs, action).T  # rows first, as locate compares them

    def under(modes: bool | dict[int, bool]) -> Tensor:
        with forced_mode(subject, modes):
            return once(subject, values)

    train = train_modes(subject)
    with in_precision(subject):
        in_eval, in_train = under(False), under(train)
    change, limit = gap(in_train, in_eval), tolerance(in_eval, in_train)
    if largest(change) <= limit:
        return None
    where = _locate_modes(exam, values, False, train)
    spread = float(in_eval.std(0).mean())
    share = f", {largest(change) / spread:.0%} of Q's own spread over the batch" if spread else ""
    return Finding(
        message="the critic's values differ between train and eval mode",
        network=where.network,
        first=where.first,
        largest=where.largest,
        site="critic",
        value=largest(change),
        floor=largest(gap(under(False), in_eval)),
        threshold=limit,
        effect=f"{largest(change):.3g} in Q{share}{_layers_in_words(where)}",
    )


@rule(
    "BP202",
    "dropout-active-when-acting",
    "A layer draws at random while acting",
    what="Looks for layers that draw at random in the mode in which they act, dropout above all.",
    detected="A layer is random where two runs of it on one input, from one state and with two "
    "seeds, differ. It is a finding where it is random in the mode that it had while acting. value "
    "= max|act(batch; seed 1) - act(batch; seed 0)|; floor and threshold are 0 because both take "
    "one path.",
    why="Each action is that of another sub-network drawn at random: the return is noisier and "
    "usually lower, and no evaluation can be repeated.",
    mend="Call eval() on the policy before acting. A functional dropout must be given "
    "training=self.training: its default is to be active always.",
    fix="eval-when-acting",
    safe=False,
    references=(
        "Srivastava et al. 2014, JMLR 15",
        "Gal & Ghahramani 2016, arXiv 1506.02142",
        "DroQ, arXiv 2110.02034",
    ),
    finite="act",
)
def dropout_active_when_acting(exam: Examination) -> Outcome:
    """BP202."""
    layers = [
        layer
        for layer in exam.layers_of(*exam.acting_roles)
        if layer.random_train or layer.random_eval
    ]
    if not layers:
        return not_applicable("no layer of the acting networks draws at random")
    deployed = acting(exam)
    active = [
        layer
        for layer in layers
        if id(layer.call.module) in deployed.modes
        and (layer.random_train if deployed.modes[id(layer.call.module)] else layer.random_eval)
    ]
    if not active:
        return passed(f"{', '.join(layer.name for layer in layers)}: at rest while acting")
    subject, batch = exam.subject, deployed.batch

    def run(seed: int) -> Tensor:
        reseed(seed)
        return deployed.run(batch)

    change = gap(once(subject, lambda: run(1)), once(subject, lambda: run(0)))
    where = locate(subject, lambda: run(0), lambda: run(1), slice(None), slice(None))
    return failed(
        Finding(
            message=f"{', '.join(layer.name for layer in active)} "
            + ("draws" if len(active) == 1 else "draw")
            + " at random while acting",
            network=active[0].role,
            first=active[0].path or active[0].role,
            largest=where.largest or active[0].path or active[0].role,
            site="act",
            value=largest(change),
            floor=0.0,
            threshold=0.0,
            effect=effect(exam, change) if change.dtype.is_floating_point else "",
        )
    )


@rule(
    "BP203",
    "acting-left-in-train-mode",
    "The policy acts in train mode",
    what="Compares the output as deployed with the train-mode and the eval-mode output.",
    detected="A failure where a layer with batch statistics ran in train mode while acting and "
    "value = max|deployed - eval| > max(1e-9, 16 eps) * max|output| while |deployed - train| is "
    "below it, in float64. Layers that are only random in train mode are BP202's.",
    why="The agent acts with the statistics of whatever is in the batch. With one environment that "
    "is a batch of one: batch norm refuses it or returns its shift alone, whatever the state; with "
    "many, each environment's action depends on the others, and every act drags the running "
    "statistics along.",
    mend="Call eval() (Stable-Baselines3: policy.set_training_mode(False)) before acting, and "
    "train() before the update.",
    fix="eval-when-acting",
    safe=False,
    references=(
        "Stable-Baselines3 issue 535",
        "tianshou issue 773",
        "ray issue 61961",
    ),
    finite="act",
)
def acting_left_in_train_mode(exam: Examination) -> Outcome:
    """BP203."""
    layers = [layer for layer in mode_layers(exam) if not layer.random_train]
    if not layers:
        return not_applicable("no layer of the acting networks has batch statistics to switch")
    active = [layer for layer in _in_train_mode(exam) if not layer.random_train]
    if not active:
        return passed(f"{', '.join(layer.name for layer in layers)}: in eval mode while acting")
    subject, deployed = exam.subject, acting(exam)
    batch, train = deployed.batch, train_modes(subject)
    with in_precision(subject):
        in_eval = output(exam, False, batch)
        in_train = output(exam, train, batch)
        as_deployed = output(exam, deployed.modes, batch)
    limit = tolerance(in_eval, in_train, eps=deployed.eps)
    off_eval, off_train = gap(as_deployed, in_eval), gap(as_deployed, in_train)
    names = ", ".join(layer.name for layer in active)
    if largest(off_eval) <= limit:
        return passed(f"{names}: in train mode while acting, but eval mode gives the same output")
    if not largest(off_train) <= limit:
        return not_applicable(f"only {names} acts in train mode, which BP201 reports")
    where = _locate_modes(exam, lambda: subject.policy(batch), False, deployed.modes)
    return failed(
        Finding(
            message=f"acting runs {names} in train mode: the action is that of the batch's "
            "statistics, not of the running ones",
            network=where.network,
            first=where.first,
            largest=where.largest,
            site="act",
            value=largest(off_eval),
            floor=probe_floor(exam, batch, in_eval),
            threshold=limit,
            effect=effect(exam, off_eval) + _layers_in_words(where),
        )
    )


@rule(
    "BP204",
    "mode-not-restored",
    "Acting leaves the networks in another mode",
    what="Lists the modules whose train/eval flag an action changes and leaves changed.",
    detected="value = number of modules whose training flag after one act differs from before; "
    "threshold 0. A failure where one of them depends on its mode, else a matter for review. A "
    "library's model passes: its own training switches the mode back.",
    why="Evaluating in the middle of training leaves it in eval mode: batch norm stops following "
    "the data and dropout stops, without a word. The other way round, evaluation runs in train "
    "mode from the second episode on.",
    mend="Remember each module's flag and put it back, for example in a context manager.",
    fix="",
    references=("lerobot issue 3668", "tianshou issue 773"),
    finite="none",
)
def mode_not_restored(exam: Examination) -> Outcome:
    """BP204."""
    subject = exam.subject
    if not subject.networks:
        return not_applicable("no network is named, so no flag can be watched")
    with unchanged(subject), torch.no_grad():
        before = {(role, path): module.training for role, path, module in subject.modules()}
        subject.act(acting(exam).batch)
        changed = [
            (role, path, module)
            for role, path, module in subject.modules()
            if module.training != before[role, path]
        ]
    if not changed:
        return passed("every module's flag is as it was")
    if subject.model is not None:
        return passed("predict leaves eval mode, and the library's own training switches it back")
    dependent = {id(layer.call.module) for layer in mode_layers(exam)}
    matter = [entry for entry in changed if id(entry[2]) in dependent]
    role, path, module = (matter or changed)[0]
    named = ", ".join(f"{r}.{p}" if p else r for r, p, _ in (matter or changed)[:6])
    was, now = ("train", "eval") if module.training else ("eval", "train")
    finding = Finding(
        message=f"acting leaves {named} in {now} mode although it was in {was} mode before",
        network=role,
        first=path or role,
        largest=path or role,
        site="act",
        value=float(len(changed)),
        floor=0.0,
        threshold=0.0,
        effect=f"{len(changed)} flags changed, {len(matter)} of layers that depend on them",
    )
    return failed(finding) if matter else review(finding)


@rule(
    "BP205",
    "first-ratio-not-one",
    "The first policy ratio is not one",
    what="Takes actions and log-probabilities as PPO and A2C collect them, in eval mode, and "
    "evaluates the same actions as they update, in train mode, before any step.",
    detected="r = exp(log pi_train(a|s) - log pi_eval(a|s)) on up to 256 observations, in float64. "
    "value = max|r - 1|; a finding above max(1e-9, 16 eps) * max(1, max|log pi|). A failure where "
    "rows are clipped already (|r - 1| above the clip range) or KL = mean(r - 1 - log r) exceeds "
    "0.01, else a matter for review. Without a norm or dropout the ratio is 1 to rounding.",
    why="The ratio measures how far the policy moved since the data were collected. Where it "
    "starts elsewhere, rows are clipped before anything was learned, target_kl stops early, and "
    "the gradient is that of another policy.",
    mend="Collect and update in the same mode: recompute the log-probabilities in the update's "
    "mode, keep the norm in eval mode in the update, or use LayerNorm or no dropout.",
    references=(
        "MDR, arXiv 2602.05619",
        "coinrun issue 41",
        "Stable-Baselines3 issues 614 and 2131",
    ),
    finite="act",
)
def first_ratio_not_one(exam: Examination) -> Outcome:
    """BP205."""
    subject = exam.subject
    policy = _stochastic_policy(subject)
    if policy is None:
        return not_applicable("no policy here evaluates log-probabilities (PPO, A2C)")
    obs = take(subject.obs, slice(0, _minibatch(exam)))
    train = train_modes(subject)
    collected: list[Tensor] = []

    def collect() -> Tensor:
        actions, _, log_prob = policy(obs)
        collected.append(actions.detach())
        return log_prob

    once_in_eval(exam, collect)
    actions = collected[0]

    def evaluate() -> Tensor:
        return policy.evaluate_actions(obs, actions)[1]

    with in_precision(subject):
        with forced_mode(subject, False):
            old = once(subject, evaluate)
        with forced_mode(subject, train):
            new = once(subject, evaluate)
    # The ratio is a difference of logarithms: its rounding is that of log pi, and at least of 1.
    limit = tolerance(old, new, torch.ones(1, dtype=old.dtype))
    log_ratio = gap(new, old)
    off = torch.expm1(log_ratio)
    value, kl = largest(off), float((off - log_ratio).mean())
    if value <= limit:
        return passed(f"ratio 1 to {value:.2g}, KL {kl:.2g} at epoch 0, minibatch 0")
    clip = _clip_range(subject.model)
    clipped = float((off.abs() > clip).double().mean())
    where = _locate_modes(exam, evaluate, False, train)
    finding = Finding(
        message="actions are collected in eval mode and evaluated in train mode, so the first "
        "ratio is not 1",
        network=where.network,
        first=where.first,
        largest=where.largest,
        site="evaluate_actions",
        value=value,
        floor=largest(gap(once_in_eval(exam, evaluate), old)),
        threshold=limit,
        effect=f"KL {kl:.3g} and {clipped:.0%} of {rows(obs)} rows outside the clip range {clip:g} "
        f"at epoch 0, minibatch 0{_layers_in_words(where)}",
    )
    return failed(finding) if clipped > 0 or not kl <= KL_LIMIT else review(finding)


def once_in_eval(exam: Examination, run: Callable[[], Tensor]) -> Tensor:
    """The result of a run in eval mode, in the precision as deployed."""
    with forced_mode(exam.subject, False):
        return once(exam.subject, run)


def _stochastic_policy(subject: Subject) -> Any:
    candidates: list[Any] = [getattr(subject.model, "policy", None), *subject.networks.values()]
    return next(
        (c for c in candidates if isinstance(c, nn.Module) and hasattr(c, "evaluate_actions")), None
    )


def _minibatch(exam: Examination) -> int:
    entries = sum(part[0].numel() for part in tensors(exam.subject.obs))
    size = getattr(exam.subject.model, "batch_size", None)
    wanted = size if isinstance(size, int) and size > 1 else 256
    return min(wanted, 32 if entries > LARGE else 256, rows(exam.subject.obs))


def _clip_range(model: Any) -> float:
    clip = getattr(model, "clip_range", 0.2)
    return float(clip(1.0)) if callable(clip) else float(clip)
