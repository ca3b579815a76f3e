"""BP5xx: the normalizers of observations and rewards around the environment.

Stable-Baselines3's ``VecNormalize`` and Gymnasium's ``NormalizeObservation`` and
``NormalizeReward`` are known by their attributes, through any chain of wrappers; nothing is
imported. A subject's observations are as its networks take them, so the raw ones are got back
with the training normalizer's numbers: raw = z sqrt(var + eps) + mean (a clipped entry stays
clipped).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchproof.clinic import probe
from batchproof.clinic.rules import (
    Examination,
    Finding,
    Outcome,
    failed,
    not_applicable,
    passed,
    review,
    rule,
    skipped,
)
from batchproof.clinic.subject import Obs, unchanged

WRONG = 0.1
"""Statistics that differ by more than this many standard deviations fail."""

NOTICED = 0.01
"""Statistics that differ by more than this many standard deviations are to be reviewed."""


@dataclass(frozen=True)
class Normalizer:
    """What an environment's wrappers do to observations and rewards.

    Attributes:
        obs: running statistics (mean, var) by key of the observation, '' for a plain one; empty
            where observations are not normalized.
        count: rows that they come from, NaN where unknown.
        epsilon: added to the variance.
        clip: bound of the normalized observation, infinity for none.
        updating: whether a step moves the statistics; None where it cannot be told.
        reward: variance that rewards are divided by the root of, None where they are not.
    """

    obs: dict[str, tuple[np.ndarray, np.ndarray]]
    count: float
    epsilon: float
    clip: float
    updating: bool | None
    reward: float | None

    def normalize(self, raw: Obs) -> Obs:
        """Raw observations (B, ...) as the networks take them."""
        return self._each(raw, lambda x, mean, std: ((x - mean) / std).clamp(-self.clip, self.clip))

    def raw(self, obs: Obs) -> Obs:
        """The way back; what was clipped stays clipped."""
        return self._each(obs, lambda x, mean, std: x * std + mean)

    def _each(self, obs: Obs, change: Any) -> Obs:
        def one(x: Tensor, key: str) -> Tensor:
            if key not in self.obs:
                return x
            mean, var = (torch.as_tensor(part, dtype=torch.float64) for part in self.obs[key])
            return change(x.double(), mean.to(x.device), (var + self.epsilon).sqrt().to(x.device))

        if isinstance(obs, dict):
            return {key: one(part, key) for key, part in obs.items()}
        return one(obs, "")


def normalizer_of(env: Any) -> Normalizer | None:
    """What the chain of wrappers around an environment does; None where it normalizes nothing."""
    chain = list(_chain(env))
    of_obs = next((e for e in chain if _has(e, "obs_rms") and getattr(e, "norm_obs", True)), None)
    of_reward = next((e for e in chain if _reward_variance(e) is not None), None)
    if of_obs is None and of_reward is None:
        return None
    statistics: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    count, source = math.nan, of_obs if of_obs is not None else of_reward
    if of_obs is not None:
        parts = of_obs.obs_rms if isinstance(of_obs.obs_rms, dict) else {"": of_obs.obs_rms}
        for key, part in parts.items():
            statistics[key] = (
                np.asarray(part.mean, dtype=np.float64),
                np.asarray(part.var, dtype=np.float64),
            )
            count = float(getattr(part, "count", math.nan))
    updating = [u for u in (_updating(e) for e in (of_obs, of_reward)) if u is not None]
    return Normalizer(
        obs=statistics,
        count=count,
        epsilon=float(getattr(source, "epsilon", 0.0)),
        clip=float(getattr(source, "clip_obs", math.inf)),
        updating=any(updating) if updating else None,
        reward=None if of_reward is None else _reward_variance(of_reward),
    )


def _chain(env: Any) -> Iterator[Any]:
    """The wrappers from the outside in; of a vector of environments the first."""
    seen: set[int] = set()
    while env is not None and id(env) not in seen:
        seen.add(id(env))
        yield env
        # Their own attributes only: vector wrappers answer for those that they wrap.
        own = getattr(env, "__dict__", {})
        inner = own.get("venv", own.get("env"))
        env = inner if inner is not None else next(iter(own.get("envs") or ()), None)


def _has(env: Any, name: str) -> bool:
    own = name in getattr(env, "__dict__", {}) or hasattr(type(env), name)
    return own and getattr(env, name, None) is not None


def _reward_variance(env: Any) -> float | None:
    for name in ("ret_rms", "return_rms"):
        if _has(env, name) and getattr(env, "norm_reward", True):
            return float(np.asarray(getattr(env, name).var))
    return None


def _updating(env: Any) -> bool | None:
    for name in ("training", "update_running_mean"):
        if env is not None and _has(env, name):
            return bool(getattr(env, name))
    return None


def _not_known(exam: Examination) -> Outcome:
    """Nothing can be said where no environment was handed over."""
    how = (
        "in Python give them as normalizers['train'] and normalizers['eval']"
        if exam.subject.model is None
        else "an environment id says nothing about them; give --vecnormalize FILE, in Python the "
        "environment itself"
    )
    return not_applicable(f"no normalizers around the environment are known: {how}")


def _pair(exam: Examination) -> tuple[Normalizer | None, Normalizer | None] | Outcome:
    """The normalizers in training and at evaluation, or why there is nothing to compare."""
    known = exam.subject.normalizers
    if not known:
        return _not_known(exam)
    train, evaluation = (normalizer_of(known.get(name)) for name in ("train", "eval"))
    for name, found in (("train", evaluation), ("eval", train)):
        if name not in known:
            if found is None:
                return not_applicable("no normalizer is around the environment that was given")
            return skipped(
                f"the {'training' if name == 'train' else 'evaluation'} environment is not known: "
                f"in Python give it as normalizers[{name!r}], None where nothing normalizes"
            )
    if train is None and evaluation is None:
        return not_applicable("neither environment has a normalizer")
    return train, evaluation


def _gap(exam: Examination, changed: Obs) -> tuple[float, float, str]:
    """Largest action gap when the networks get other observations, its rounding, and in words."""
    subject = exam.subject
    batch: Any = exam.batch
    if isinstance(changed, dict):
        changed = {k: v.to(batch[k].dtype) for k, v in changed.items()}
    else:
        changed = changed.to(batch.dtype)
    run = subject.policy if subject.discrete else subject.act
    with unchanged(subject), torch.no_grad():
        before, after = run(batch).double(), run(changed).double()
    gap = after - before
    floor = probe.ROUNDING * torch.finfo(torch.float32).eps * max(float(before.abs().max()), 1e-30)
    words = exam.in_action_units(gap)
    if subject.discrete:
        share = float((before.argmax(-1) != after.argmax(-1)).double().mean())
        words += f"; another action on {share:.0%} of the observations"
    return float(gap.abs().max()), floor, f"the action changes by up to {words}"


# ---------------------------------------------------------------------------------------- BP501


@rule(
    "BP501",
    "normalizer-missing-at-evaluation",
    "observations are normalized in training and not at evaluation",
    what=(
        "Looks for a normalizer of observations (VecNormalize, NormalizeObservation, anything with "
        "`obs_rms`) around the training environment and around the evaluation environment."
    ),
    detected=(
        "The training environment has one and the evaluation environment has none. Measured: "
        "max |a(raw observation) - a(normalized observation)|. A failure where it is above 64 "
        "rounding errors of the actions; review where these observations show no gap."
    ),
    why=(
        "The networks have never seen raw observations. The policy still acts, only badly, and "
        "nothing warns: evaluation in a plain environment is the usual way to get there."
    ),
    mend=(
        "Save the normalizer with the model and load it around the evaluation environment: "
        "`VecNormalize.load(path, env)`, then `training = False` and `norm_reward = False`. "
        "Or put the normalization into the policy, where it is saved with the weights."
    ),
    references=(
        "https://stable-baselines3.readthedocs.io/en/master/guide/examples.html",
        "https://github.com/isaac-sim/IsaacLab/issues/2635",
    ),
    finite="act",
)
def missing_at_evaluation(exam: Examination) -> Outcome:
    """BP501."""
    pair = _pair(exam)
    if isinstance(pair, Outcome):
        return pair
    train, evaluation = pair
    if train is None or not train.obs:
        return not_applicable("training does not normalize observations")
    if evaluation is not None and evaluation.obs:
        return passed("observations are normalized at evaluation too")
    gap, floor, effect = _gap(exam, train.raw(exam.batch))  # type: ignore[arg-type]
    found = Finding(
        "training normalizes observations and evaluation does not: the policy is evaluated on "
        "inputs that it was never trained on",
        site="evaluation environment",
        value=gap,
        floor=floor,
        threshold=floor,
        effect=effect,
    )
    return review(found) if gap <= floor else failed(found)


# ---------------------------------------------------------------------------------------- BP502


@rule(
    "BP502",
    "normalizer-updates-at-evaluation",
    "the evaluation environment's normalizer keeps learning",
    what="Reads whether the evaluation environment's normalizer moves its statistics at each step.",
    detected=(
        "`training` (VecNormalize) or `update_running_mean` (Gymnasium) is true on the evaluation "
        "environment's normalizer. Value: the largest share of a standard deviation by which one "
        "more batch of the given observations would move the mean, n/(count + n) |mean_batch - "
        "mean| / sigma; threshold 0."
    ),
    why=(
        "The input of the policy then depends on how long and in which order it was evaluated: two "
        "evaluations of one policy differ. Where the normalizer is shared with training, "
        "evaluation also leaks into training."
    ),
    mend="`eval_env.training = False`; in Gymnasium `env.update_running_mean = False`.",
    references=(
        "https://stable-baselines3.readthedocs.io/en/master/guide/vec_envs.html#vecnormalize",
        "https://gymnasium.farama.org/api/wrappers/observation_wrappers/",
    ),
    finite="none",
)
def updates_at_evaluation(exam: Examination) -> Outcome:
    """BP502."""
    known = exam.subject.normalizers
    if not known:
        return _not_known(exam)
    evaluation = normalizer_of(known.get("eval"))
    if evaluation is None:
        pair = _pair(exam)
        return pair if isinstance(pair, Outcome) else not_applicable("evaluation has no normalizer")
    if evaluation.updating is None:
        return skipped("the normalizer has neither `training` nor `update_running_mean`")
    if not evaluation.updating:
        return passed("its statistics stay as they are")
    shared = known.get("train") is known["eval"]
    train = normalizer_of(known.get("train"))
    value = _one_batch_moves(exam, train or evaluation, evaluation)
    return failed(
        Finding(
            "the evaluation environment's normalizer moves its statistics at every step"
            + (", and it is the training environment's own" if shared else ""),
            site="evaluation environment",
            value=value,
            threshold=0.0,
            effect=f"one more batch moves the mean by up to {value:.3g} sigma",
        )
    )


def _one_batch_moves(exam: Examination, train: Normalizer, evaluation: Normalizer) -> float:
    raw = train.raw(exam.batch)  # type: ignore[arg-type]
    largest = 0.0
    for key, (mean, var) in evaluation.obs.items():
        part = raw[key] if isinstance(raw, dict) else raw
        if part.shape[1:] != mean.shape:
            continue
        n = len(part)
        share = 1.0 if math.isnan(evaluation.count) else n / (evaluation.count + n)
        shift = np.abs(part.double().mean(0).cpu().numpy() - mean)
        largest = max(largest, float((share * shift / np.sqrt(var + evaluation.epsilon)).max()))
    return largest


# ---------------------------------------------------------------------------------------- BP503


@rule(
    "BP503",
    "normalizer-differs",
    "training and evaluation normalize differently",
    what=(
        "Compares the statistics, epsilon and clipping of the training and of the evaluation "
        "environment's normalizer, and what the difference does to the action; and looks for "
        "rewards that are normalized at evaluation."
    ),
    detected=(
        "e = max over features of |mean_eval - mean_train| / sigma_train and |log(sigma_eval / "
        "sigma_train)|, sigma = sqrt(var + eps). A failure above 0.1 (or not finite, or another "
        "shape), review above 0.01: statistics that were synced some time ago lag that much. Equal "
        "statistics with another epsilon or clip: review where normalized observations differ by "
        "more than 0.01. Rewards normalized at evaluation: review."
    ),
    why=(
        "The policy sees every state shifted and scaled against what it learned on. A fresh "
        "normalizer at evaluation starts at mean 0 and variance 1 and is wrong for thousands of "
        "steps. Normalized rewards are not returns: they cannot be compared between runs."
    ),
    mend=(
        "Copy the statistics: `sync_envs_normalization(train_env, eval_env)`, or load the saved "
        "normalizer. `eval_env.norm_reward = False`."
    ),
    references=(
        "https://stable-baselines3.readthedocs.io/en/master/guide/vec_envs.html#vecnormalize",
        "https://github.com/isaac-sim/IsaacLab/issues/3836",
    ),
    finite="none",
)
def differs(exam: Examination) -> Outcome:
    """BP503."""
    pair = _pair(exam)
    if isinstance(pair, Outcome):
        return pair
    train, evaluation = pair
    if evaluation is None:
        return not_applicable("evaluation has no normalizer: see BP501")
    certain: list[Finding] = []
    doubtful: list[Finding] = []
    if evaluation.obs:
        found = _statistics_finding(exam, train, evaluation)
        if found is not None:
            (certain if found.threshold == WRONG else doubtful).append(found)
    if evaluation.reward is not None:
        sigma = math.sqrt(evaluation.reward + evaluation.epsilon)
        doubtful.append(
            Finding(
                "rewards are normalized at evaluation: what it reports are not returns",
                site="evaluation environment",
                value=sigma,
                threshold=1.0,
                effect=f"each reward is divided by {sigma:.3g}",
            )
        )
    if certain:
        return failed(*certain, *doubtful)
    return review(*doubtful) if doubtful else passed("the same statistics in both")


def _statistics_finding(
    exam: Examination, train: Normalizer | None, evaluation: Normalizer
) -> Finding | None:
    site = "evaluation environment"
    if train is None or not train.obs:
        _, floor, effect = _gap(exam, evaluation.normalize(exam.batch))  # type: ignore[arg-type]
        message = "evaluation normalizes observations and training does not"
        return Finding(
            message, site=site, value=math.inf, floor=floor, threshold=WRONG, effect=effect
        )
    for key, (mean, _) in train.obs.items():
        other = evaluation.obs.get(key)
        if other is None or other[0].shape != mean.shape:
            had = "nothing" if other is None else f"shape {other[0].shape}"
            message = (
                f"training normalizes {key or 'observations'} of shape {mean.shape}, "
                f"evaluation {had}"
            )
            return Finding(message, site=site, value=math.inf, threshold=WRONG)
    where, error = _statistic_error(train, evaluation)
    raw = train.raw(exam.batch)  # type: ignore[arg-type]
    seen_in_training, seen = train.normalize(raw), evaluation.normalize(raw)
    effect = _gap(exam, seen)[2]
    # Rounding of the way back and forth, through the networks.
    floor = _gap(exam, seen_in_training)[0]
    fresh = evaluation.count < 1
    if not error <= NOTICED:
        message = (
            f"the statistics at evaluation are not training's: {error:.3g} sigma off at {where}"
        )
        if fresh:
            message += "; they were never fed, and still hold mean 0 and variance 1"
        threshold = WRONG if not error <= WRONG else NOTICED
        value = error if math.isfinite(error) else math.inf
        return Finding(
            message, site=site, value=value, floor=floor, threshold=threshold, effect=effect
        )
    moved = _largest_difference(seen_in_training, seen)
    if not moved <= NOTICED:
        return Finding(
            f"the same statistics, but epsilon {evaluation.epsilon:g} and clip {evaluation.clip:g} "
            f"at evaluation against {train.epsilon:g} and {train.clip:g} in training",
            site=site,
            value=moved,
            floor=floor,
            threshold=NOTICED,
            effect=effect,
        )
    return None


def _statistic_error(train: Normalizer, evaluation: Normalizer) -> tuple[str, float]:
    """Which feature is furthest off, and by how many standard deviations."""
    worst = ("", 0.0)
    for key, (mean, var) in train.obs.items():
        other_mean, other_var = evaluation.obs[key]
        with np.errstate(all="ignore"):
            sigma = np.sqrt(var + train.epsilon)
            other_sigma = np.sqrt(other_var + evaluation.epsilon)
            error = np.maximum(
                np.abs(other_mean - mean) / sigma, np.abs(np.log(other_sigma / sigma))
            ).reshape(-1)
        error = np.where(np.isfinite(error), error, math.inf)
        index = int(error.argmax()) if error.size else 0
        if error.size and error[index] > worst[1]:
            worst = (f"{key} feature {index}".strip(), float(error[index]))
    return worst


def _largest_difference(a: Obs, b: Obs) -> float:
    if isinstance(a, dict) and isinstance(b, dict):
        return max(probe.difference(a[key], b[key]) for key in a)
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return probe.difference(a, b)
