"""BP4xx, health of statistics: what normalization layers remember, against the data they see.

Layers are those whose buffers were seen to follow the mean and variance of their input. Statistics
of target networks are left to BP3xx; BP404 looks at every network.

Shapes: ``N`` rows, ``F`` features of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from batchproof.clinic import measures, probe
from batchproof.clinic.fold import is_folded
from batchproof.clinic.probe import LayerFacts
from batchproof.clinic.rules import (
    NOT_FINITE,
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
from batchproof.clinic.subject import Obs, Subject, rows, take, tensors, training_mode

MOST_ROWS = 1024
MOST_NUMBERS = 2**22  # in the observations of one pass: about 150 frames of 84x84x4


@dataclass(frozen=True)
class Reached:
    """What reached one layer, in eval mode.

    Attributes:
        layer: the layer.
        parts: its input (n, F) by where it came from; positions of an image count as rows.
        rows: independent rows N of all parts together.
    """

    layer: LayerFacts
    parts: dict[str, Tensor]
    rows: int

    @property
    def pooled(self) -> Tensor:
        """All parts, (n, F), in float64."""
        return torch.cat(list(self.parts.values())).double()


_REACHED: WeakKeyDictionary[Examination, dict[str, Reached]] = WeakKeyDictionary()


def part_of(obs: Obs) -> slice:
    """The rows of a batch of observations that a rule looks at."""
    numbers = sum(part[0].numel() for part in tensors(obs))
    most = max(64, min(MOST_ROWS, MOST_NUMBERS // max(numbers, 1)))
    return slice(0, min(rows(obs), most))


def sources(subject: Subject) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Passes over the data at hand that reach the online networks: their rows, and how to run them.

    Run them in eval mode and inside `subject.unchanged`.
    """
    obs = take(subject.obs, part_of(subject.obs))
    passes: dict[str, tuple[int, Callable[[], Any]]] = {
        "the observations": (rows(obs), partial(subject.policy, obs))
    }
    data, critic = subject.transitions, subject.critic
    if data is None or critic is None or len(data) < 2:
        return passes
    kept = part_of(data.obs)
    replayed, following = take(data.obs, kept), take(data.next_obs, kept)
    passes["(s, a)"] = (rows(replayed), partial(critic, replayed, data.action[kept]))
    actor = subject.critic_actor
    if actor is not None and not subject.discrete:

        def on_policy(batch: Obs) -> Tensor:
            with torch.no_grad():
                return critic(batch, actor(batch))

        passes["(s, pi(s))"] = (rows(replayed), partial(on_policy, replayed))
        passes["(s', pi(s'))"] = (rows(following), partial(on_policy, following))
    return passes


def online(exam: Examination) -> list[LayerFacts]:
    """Layers with running statistics outside target networks."""
    return [f for f in exam.layers if f.running and f.role not in exam.subject.targets]


def reached(exam: Examination) -> dict[str, Reached]:
    """What reached every layer of `online`, by its name; found once for all rules."""
    if exam not in _REACHED:
        layers = online(exam)
        parts: dict[str, dict[str, Tensor]] = {}
        counts: dict[str, int] = {}
        with training_mode(exam.subject, False):
            for source, (count, run) in sources(exam.subject).items():
                # The actor's input is the observations' pass; a critic is asked about actions.
                wanted = [f for f in layers if source == "the observations" or _of_critic(f, exam)]
                for name, x in measures.inputs_of(wanted, run).items():
                    parts.setdefault(name, {})[source] = measures.by_feature(x)
                    counts[name] = counts.get(name, 0) + count
        _REACHED[exam] = {
            f.name: Reached(f, parts[f.name], counts[f.name]) for f in layers if f.name in parts
        }
    return _REACHED[exam]


def _of_critic(layer: LayerFacts, exam: Examination) -> bool:
    return layer.role not in exam.acting_roles


def buffer(layer: LayerFacts, name: str) -> Tensor:
    """A layer's own buffer as it stands in the subject."""
    return dict(layer.call.module.named_buffers(recurse=False))[name].detach()


def running(layer: LayerFacts) -> tuple[Tensor, Tensor | None]:
    """Running mean and variance (F,) in float64; no variance where the layer keeps none."""
    var = buffer(layer, layer.var_buffer).double() if layer.var_buffer else None
    return buffer(layer, layer.mean_buffer).double(), var


def initial(layer: LayerFacts) -> bool:
    """Whether running statistics are exactly those of a fresh layer: mean 0, variance 1 (or 0)."""
    mean, var = running(layer)
    if bool((mean != 0).any()):
        return False
    if var is None or bool((var == 1).all()):
        return True
    x = _input(layer)
    return bool((var == 0).all()) and x is not None and float(x.var(0).max()) > 0


def sound(layer: LayerFacts) -> bool:
    """Whether running statistics are finite and no variance is negative."""
    mean, var = running(layer)
    finite = bool(torch.isfinite(mean).all())
    return finite and (var is None or bool((torch.isfinite(var) & (var >= 0)).all()))


def _input(layer: LayerFacts) -> Tensor | None:
    value = next((v for v in layer.call.inputs if isinstance(v, Tensor)), None)
    return None if value is None else measures.by_feature(value).double()


def trained(exam: Examination) -> bool | None:
    """Whether the subject has been trained; None where nothing tells.

    A library's own counter of updates or time steps, else normalization parameters or running
    statistics that left their initial values.
    """
    model = exam.subject.model
    counters = [getattr(model, name, None) for name in ("_n_updates", "num_timesteps")]
    known = [value for value in counters if isinstance(value, int)]
    if known:
        return any(value > 0 for value in known)
    for layer in exam.layers:
        if layer.running and not initial(layer):
            return True
        for value in layer.call.module.parameters(recurse=False):
            if not (bool((value == 1).all()) or bool((value == 0).all())):
                return True
    return None


NO_STATISTICS = "no layer keeps running statistics"


def at(layer: LayerFacts, message: str, **more: Any) -> Finding:
    """A finding about one layer."""
    path = layer.path or layer.role
    return Finding(message, layer.role, path, path, **more)


def several(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def seen_extreme(features: int) -> float:
    """What the largest of so many standard normal errors hardly exceeds, in standard deviations."""
    return math.sqrt(2 * math.log(2 * max(features, 1))) + 2


# ---------------------------------------------------------------------------------------- BP401


@rule(
    "BP401",
    "statistics-never-updated",
    "running statistics still have their initial values",
    what="Finds layers whose running mean is 0 and whose running variance is 1 for every feature.",
    detected=(
        "mean == 0 and var == 1, exactly, for all features (var == 0 counts where the data "
        "varies). A failure where something shows that training took place: the library's own "
        "counters, or normalization parameters or other statistics that moved; review otherwise. "
        "Layers that `fold-batch-norm` left in their place pass: their mean is -0 for all "
        "features, which no fresh layer has, their scale 1 and their shift 0."
    ),
    why=(
        "In eval mode such a layer is an affine map that never normalizes. Weights that were "
        "trained with the batch's statistics act on inputs of another scale when deployed."
    ),
    mend=(
        "Let training forwards run in train mode, check that the momentum is not 0, or recalibrate "
        "the statistics on observations (PreciseBN)."
    ),
    fix="recalibrate",
    safe=False,
    references=(
        "https://github.com/DLR-RM/stable-baselines3/issues/614",
        "https://arxiv.org/abs/2105.07576",
    ),
)
def never_updated(exam: Examination) -> Outcome:
    """BP401."""
    layers = online(exam) + frozen(exam)
    if not layers:
        return not_applicable(NO_STATISTICS)
    untouched = [
        f for f in layers if (initial(f) and not is_folded(f) if f.running else fresh_buffers(f))
    ]
    if not untouched:
        folded = [f.name for f in layers if f.running and is_folded(f)]
        return passed(f"{several(folded)}: folded into the layer before" if folded else "")
    evidence = trained(exam)
    if evidence is False:
        return not_applicable("nothing has been trained yet")
    findings = [
        at(
            f,
            f"{f.name} has never updated its running statistics: mean 0, variance 1 for all "
            "features" + ("" if evidence else "; right only if nothing has been trained yet"),
            value=0.0,
            threshold=0.0,
            effect=eval_effect(exam, f),
        )
        for f in untouched
    ]
    return failed(*findings) if evidence else review(*findings)


def fresh_buffers(layer: LayerFacts) -> bool:
    """Whether a layer that updates nothing has one buffer of zeros and one of ones."""
    held = feature_buffers(layer)
    zeros = any(bool((v == 0).all()) for v in held.values())
    return zeros and any(bool((v == 1).all()) for v in held.values())


def eval_effect(exam: Examination, layer: LayerFacts) -> str:
    """What replacing a layer's statistics by those of the data does to the action or to Q."""
    subject = exam.subject
    if not layer.running:
        return ""
    passes = sources(subject)
    source = "(s, a)" if _of_critic(layer, exam) and "(s, a)" in passes else "the observations"
    run = passes[source][1]
    with training_mode(subject, False), torch.no_grad():
        before = run()
        with measures.precise_statistics([layer], run):
            after = run()
    gap = (after - before).detach()
    if source == "the observations":
        return "with the data's statistics the action moves by " + exam.in_action_units(gap)
    return "with the data's statistics Q moves by " + in_return_units(exam, float(gap.abs().max()))


def in_return_units(exam: Examination, gap: float) -> str:
    """A gap of Q in words: TD-target units, and percent of the reward scale."""
    scale = reward_scale(subject=exam.subject)
    share = f", {gap / scale:.1%} of the reward scale" if scale > 0 else ""
    return f"{gap:.3g} TD-target units{share}"


def reward_scale(subject: Subject) -> float:
    """Standard deviation of the rewards, their mean size where they are all equal; 0 if unknown."""
    if subject.transitions is None:
        return 0.0
    reward = subject.transitions.reward.double()
    spread = float(reward.std()) if len(reward) > 1 else 0.0
    size = float(reward.abs().mean())
    return spread if spread > 1e-6 * size else size


# ---------------------------------------------------------------------------------------- BP402

SHIFT = 0.5  # standard deviations
LOG_RATIO = math.log(4)  # a standard deviation that is off by a factor of 2
NO_REPLAY = (
    "the statistics of an off-policy agent are those of its replay: to compare, load the replay "
    "buffer or give observations of it (--obs FILE), and in either case no environment"
)
HARDLY = 1e-3  # of the largest variance in the layer: dying features are BP408's
FAR_SHIFT, FAR_LOG_RATIO = 5.0, math.log(100)  # another distribution


@rule(
    "BP402",
    "statistics-stale-against-data",
    "running statistics are not those of the data",
    what=(
        "Compares running statistics with those of the layer's own input in eval mode, on the "
        "observations and, for critics, on (s, a), (s, pi(s)) and (s', pi(s')) of the replay."
    ),
    detected=(
        "|rm - mu| / sigma > 0.5 + z e + w or |log(rv / var)| > log 4 + z e sqrt(k - 1) + u, "
        "largest over features; e = sqrt(1/N + rho / ((2 - rho) B)) is the sampling error of N "
        "rows and of an average with momentum rho over batches of B rows (the library's, else "
        "256), z = sqrt(2 log 2F) + 2 the largest of F such errors, k the kurtosis, w and u how "
        "far apart the sources of data are themselves. Features with less than 1e-3 of the "
        "layer's largest variance are left out. A failure where the median over features exceeds "
        "the same with 5 in place of 0.5, or log 100 in place of log 4, and the initial values "
        "weigh less than 5% by the layer's own counter; review otherwise. "
        "Of an off-policy agent on states of its present policy, whose replay is not here, only "
        "failures are told: there its statistics are rightly others."
    ),
    why=(
        "Acting normalizes with numbers that do not fit what the layer sees, so that the action is "
        "not the one that was trained. It happens when weights move faster than the statistics, "
        "when the data has changed, or when observations come on another scale."
    ),
    mend=(
        "Look at the observations' scale first: a policy that was trained under VecNormalize must "
        "be given them as it had them there (`--vecnormalize FILE`). Then recalibrate (PreciseBN), "
        "an on-policy agent on current observations, an off-policy agent on those of its replay "
        "alone; or raise the momentum."
    ),
    fix="recalibrate",
    safe=False,
    references=("https://arxiv.org/abs/2105.07576", "https://arxiv.org/abs/1902.05605"),
)
def stale(exam: Examination) -> Outcome:
    """BP402."""
    if not online(exam):
        return not_applicable(NO_STATISTICS)
    found = [r for r in reached(exam).values() if not initial(r.layer) and sound(r.layer)]
    if not found:
        return not_applicable("no layer has sound statistics of its own, see BP401 and BP404")
    findings = []
    far = False
    for one in found:
        for error in staleness(exam, one):
            if not error.largest > error.threshold:
                continue
            far = far or (error.typical > error.far and not warming_up(one.layer))
            mean = error.which == "mean"
            size = (
                f"{error.largest:.2g} standard deviations off"
                if mean
                else (f"off by a factor of {math.exp(min(error.largest, 700.0)):.3g}")
            )
            early = " (few updates so far)" if warming_up(one.layer) else ""
            findings.append(
                at(
                    one.layer,
                    f"the running {error.which} of {one.layer.name} is {size} against its own "
                    f"input{early}",
                    value=error.largest,
                    threshold=error.threshold,
                    effect=eval_effect(exam, one.layer),
                )
            )
            break
    if not findings:
        return passed()
    if exam.subject.lacks_replay and not far:
        return skipped(NO_REPLAY)
    findings.sort(key=lambda f: -f.value / f.threshold)
    return failed(*findings) if far else review(*findings)


def warming_up(layer: LayerFacts) -> bool:
    """Whether more than 5% of an average is still its initial value, by the layer's own counter."""
    own = layer.call.module.named_buffers(recurse=False)
    counters = [int(v) for _, v in own if not v.is_floating_point() and v.numel() == 1]
    rho = layer.momentum
    return bool(counters) and 0 < rho < 1 and (1 - rho) ** max(counters) > 0.05


def train_batch(subject: Subject) -> int | None:
    """Rows of a training batch by the library's own record, None where it has none."""
    size = getattr(subject.model, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None


@dataclass(frozen=True)
class Staleness:
    """Error of one of a layer's statistics over its features.

    Attributes:
        which: ``mean`` or ``variance``.
        largest: of the feature that exceeds its threshold most.
        threshold: of that feature.
        typical: the median over features.
        far: the typical threshold of a failure.
    """

    which: str
    largest: float
    threshold: float
    typical: float
    far: float


def staleness(exam: Examination, one: Reached) -> list[Staleness]:
    """Errors of the running mean and of the running variance, the worse one first."""
    mean, var = running(one.layer)
    x = one.pooled
    mu, biased = x.mean(0), x.var(0, correction=0)
    varies = biased > HARDLY * float(biased.max())
    if not bool(varies.any()):
        return []
    mean, mu, biased, x = mean[varies], mu[varies], biased[varies], x[:, varies]
    rho = one.layer.momentum
    rho = min(max(rho, 0.0), 1.0) if math.isfinite(rho) else 0.1
    noise = math.sqrt(1 / one.rows + rho / (2 - rho) / (train_batch(exam.subject) or 256))
    z = seen_extreme(int(varies.sum()))
    apart_mean, apart_var = torch.zeros_like(mu), torch.zeros_like(mu)
    for part in one.parts.values():
        values = part.double()[:, varies]
        apart_mean = apart_mean.maximum((values.mean(0) - mu).abs() / biased.sqrt())
        part_var = values.var(0, correction=0).clamp_min(1e-3 * biased)
        apart_var = apart_var.maximum((part_var / biased).log().abs())
    errors = measures.statistic_error(mean, biased if var is None else var[varies], mu, biased)

    def judged(which: str, error: Tensor, slack: Tensor, limit: float, far: float) -> Staleness:
        bound = limit + slack
        index = int((error / bound).argmax())
        return Staleness(
            which,
            float(error[index]),
            float(bound[index]),
            float(error.median()),
            far + float(slack.median()),
        )

    found = [judged("mean", errors.shift, z * noise + apart_mean, SHIFT, FAR_SHIFT)]
    if var is not None:
        kurtosis = ((x - mu) ** 4).mean(0) / biased**2
        slack = z * noise * (kurtosis - 1).clamp_min(0).sqrt() + apart_var
        ratio = errors.log_ratio.abs().nan_to_num(math.inf)
        found.append(judged("variance", ratio, slack, LOG_RATIO, FAR_LOG_RATIO))
    return sorted(found, key=lambda error: -error.largest / error.threshold)


# ---------------------------------------------------------------------------------------- BP403

OUTLYING = 5.0  # robust standard deviations
FEW = 0.05  # share of rows
CARRIED = 0.5  # share of the variance
SQUASHED = 3.0  # plain over robust standard deviation


@rule(
    "BP403",
    "outlier-dominated-statistics",
    "a few rows carry the running variance",
    what="Finds features whose variance comes from a few rows, and statistics that follow them.",
    detected=(
        "Rows beyond median +- 5 * 1.4826 MAD are at most 5% of all and hold more than half of "
        "sum (x - mean)^2, and the running variance is nearer to the plain variance than to that "
        "of the other rows. A failure where the plain standard deviation is more than 3 times "
        "theirs. Features with MAD 0 are left out."
    ),
    why=(
        "Ordinary rows are squashed to a small part of the normalized range, and the statistics "
        "jump whenever such a row is drawn: eval mode differs from one training step to the next."
    ),
    mend=(
        "Clip or rescale the observations, or use a robust estimator (Winsorized, Huberized, "
        "median of means) for the running statistics."
    ),
    references=("https://arxiv.org/abs/1702.03275",),
)
def outliers(exam: Examination) -> Outcome:
    """BP403."""
    if not online(exam):
        return not_applicable(NO_STATISTICS)
    found = [r for r in reached(exam).values() if not initial(r.layer) and sound(r.layer)]
    if not found:
        return not_applicable("no layer has sound statistics of its own, see BP401 and BP404")
    if all(r.rows < 40 for r in found):
        return skipped("outliers are rare rows: give at least 40 observations")
    findings = []
    bad = False
    for one in found:
        share, ratio, feature, count = outlier_share(one)
        if share <= CARRIED:
            continue
        bad = bad or ratio > SQUASHED
        findings.append(
            at(
                one.layer,
                f"{count} of {len(one.pooled)} rows carry {share:.0%} of the variance of feature "
                f"{feature} of {one.layer.name}; the others use 1/{ratio:.2g} of the scale",
                value=share,
                threshold=CARRIED,
                effect=eval_effect(exam, one.layer),
            )
        )
    if not findings:
        return passed()
    findings.sort(key=lambda f: -f.value)
    return failed(*findings) if bad else review(*findings)


def outlier_share(one: Reached) -> tuple[float, float, int, int]:
    """The worst feature: variance share of its outliers, plain over robust sd, index, rows."""
    _, running_var = running(one.layer)
    x = one.pooled
    median = x.median(0).values
    mad = 1.4826 * (x - median).abs().median(0).values
    usable = mad > 1e-9 * (x.std(0) + 1e-30)
    out = ((x - median).abs() > OUTLYING * mad) & usable
    squares = (x - x.mean(0)) ** 2
    share = (squares * out).sum(0) / squares.sum(0).clamp_min(1e-300)
    inside = ~out
    kept = inside.sum(0).clamp_min(1)
    centre = (x * inside).sum(0) / kept
    robust = (((x - centre) ** 2) * inside).sum(0) / kept
    plain = squares.mean(0)
    few = (out.double().mean(0) <= FEW) & usable & (robust > 0)
    if running_var is not None:
        follows = running_var > (plain * robust).clamp_min(0).sqrt()
        few = few & follows
    share = torch.where(few, share, torch.zeros_like(share))
    index = int(share.argmax())
    if not float(share[index]) > 0:
        return 0.0, 1.0, index, 0
    ratio = float((plain[index] / robust[index]).sqrt())
    return float(share[index]), ratio, index, int(out[:, index].sum())


# ---------------------------------------------------------------------------------------- BP404


@rule(
    "BP404",
    "nan-or-inf",
    "parameters or statistics are not finite",
    what=(
        "Looks for NaN and infinity in all parameters and buffers, for negative variances, and, "
        "where there is none, in the action as deployed and in the critics' values."
    ),
    detected=(
        "isnan(v).any() in any parameter or buffer; isinf(v).any() in any parameter, or in a "
        "buffer of a layer that couples rows or moves its buffers; min(running variance) < 0. "
        "Infinite buffers elsewhere (masks, bounds) are left alone. Outputs: NaN or infinity in "
        "any entry; where the action has no known bounds, -inf beside finite entries is left "
        "alone (it rules an action out). Where this rule fails, those that compare outputs say "
        "that they are skipped: a difference from NaN means nothing."
    ),
    why="One NaN in a running variance makes every action NaN, though training goes on unharmed.",
    mend=(
        "Find what produced it (a reward or an observation that is not finite, a batch of one with "
        "the unbiased variance), mend that, then recalibrate where it is statistics, or go back to "
        "an earlier checkpoint where it is parameters."
    ),
    fix="recalibrate",
    safe=False,
    finite="none",
)
def not_finite(exam: Examination) -> Outcome:
    """BP404."""
    stateful = _stateful(exam)
    findings = []
    for role, path, module in exam.subject.modules():
        layer = stateful.get(id(module))
        wrong = []
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
                wrong.append(f"{name} has {_describe(weight)}")
        for name, value in module.named_buffers(recurse=False):
            if not value.is_floating_point():
                continue
            nan = bool(torch.isnan(value).any())
            if nan or (layer is not None and bool(torch.isinf(value).any())):
                wrong.append(f"{name} has {_describe(value)}")
            elif layer is not None and name == layer.var_buffer and bool((value < 0).any()):
                wrong.append(f"{name} is negative ({float(value.min()):.3g})")
        if wrong:
            where = f"{role}.{path}" if path else role
            findings.append(
                Finding(
                    f"{where}: {'; '.join(wrong)}",
                    role,
                    path or role,
                    path or role,
                    value=float(len(wrong)),
                    threshold=0.0,
                )
            )
    findings = findings or [_wrong_output(*item) for item in exam.wrong_outputs.items()]
    return failed(*findings) if findings else passed()


def _stateful(exam: Examination) -> dict[int, LayerFacts]:
    """Layers that couple rows or move buffers, by module; none where the networks cannot run."""
    try:
        return {id(f.call.module): f for f in exam.layers}
    except Exception:  # distributions refuse NaN, and the weights can be looked at all the same
        return {}


def _wrong_output(name: str, output: Tensor) -> Finding:
    what = "the action as deployed" if name == "act" else f"the output of the {name} in eval mode"
    return Finding(
        f"{what} has {_describe(output)}, although all weights and statistics are finite",
        site=name,
        value=float((~torch.isfinite(output)).sum()),
        threshold=0.0,
    )


def _describe(value: Tensor) -> str:
    nan, inf = int(torch.isnan(value).sum()), int(torch.isinf(value).sum())
    parts = [f"{nan} NaN"] * bool(nan) + [f"{inf} infinite"] * bool(inf)
    return f"{' and '.join(parts)} of {value.numel()} values"


# ---------------------------------------------------------------------------------------- BP405

NEAR = 10.0  # times eps
AMPLIFIED = 33.0  # eps = 1e-3, the mend, amplifies 31.6 times at most
STEP = 0.01
MOVED = 0.1  # of the action range, by one step


@rule(
    "BP405",
    "variance-near-eps",
    "a nearly constant feature is amplified by 1/sqrt(eps)",
    what="Finds features whose running variance is so small that eps alone sets their scale.",
    detected=(
        "rv < 10 eps and 1 / sqrt(rv + eps) > 33, with eps measured from the layer's own slope at "
        "variance 0 and 1. The effect is that of a step of 0.01 in that feature at the layer's "
        "input. A failure where rv < eps and this step moves the action by more than 10% of "
        "the range, review otherwise."
    ),
    why=(
        "A feature that never varied in training has variance 0, so that eval mode multiplies its "
        "smallest change by up to 316 (eps 1e-5). While weights move, a lag of the running mean is "
        "amplified as much."
    ),
    mend=(
        "Remove the constant feature or put the norm elsewhere, use a larger eps (1e-3 amplifies "
        "at most 32 times), or layer norm."
    ),
    references=("https://arxiv.org/abs/1902.05605",),
)
def near_eps(exam: Examination) -> Outcome:
    """BP405."""
    layers = [f for f in online(exam) if f.var_buffer]
    if not layers:
        return not_applicable("no layer keeps a running variance")
    findings = []
    bad = False
    for f in filter(sound, layers):
        eps = eps_of(f)
        var = running(f)[1]
        if eps is None or var is None:
            continue
        factor = (var.clamp_min(0) + eps).rsqrt()
        hit = (var < NEAR * eps) & (factor > AMPLIFIED)
        if not bool(hit.any()):
            continue
        feature = int(torch.where(hit, factor, torch.zeros_like(factor)).argmax())
        effect, share = step_effect(exam, f, feature)
        acts = not _of_critic(f, exam)
        bad = bad or (acts and float(var[feature]) < eps and share > MOVED)
        findings.append(
            at(
                f,
                f"{int(hit.sum())} of {len(var)} features of {f.name} have a running variance near "
                f"eps {eps:.1g}: changes of feature {feature} are amplified "
                f"{float(factor[feature]):.0f} times",
                value=float(factor[feature]),
                threshold=AMPLIFIED,
                effect=effect,
            )
        )
    if not findings:
        return passed()
    findings.sort(key=lambda f: -f.value)
    return failed(*findings) if bad else review(*findings)


def eps_of(layer: LayerFacts) -> float | None:
    """A layer's eps from its slope at variance 0 and 1: slope = w / sqrt(var + eps).

    None where the slope does not follow that law or the layer's parameters are all zero.
    """
    slopes = [_slope(layer, value) for value in (0.0, 1.0, 3.0)]
    if any(s is None for s in slopes):
        return None
    at_zero, at_one, at_three = (s.double() for s in slopes)  # type: ignore[union-attr]
    index = int(at_one.abs().argmax())
    if float(at_one[index]) == 0 or not math.isfinite(float(at_zero[index])):
        return None
    ratio = float(at_one[index] / at_zero[index]) ** 2  # eps / (1 + eps)
    if not 0 < ratio < 0.5:
        return None
    eps = ratio / (1 - ratio)
    predicted = float(at_one[index]) * math.sqrt((1 + eps) / (3 + eps))
    return eps if abs(predicted - float(at_three[index])) < 1e-3 * abs(predicted) else None


def _slope(layer: LayerFacts, variance: float) -> Tensor | None:
    """d output / d input per feature (F,) in eval mode with the given running variance."""
    module = probe.replica(layer.call).double().eval()
    dict(module.named_buffers(recurse=False))[layer.var_buffer].data.fill_(variance)
    inputs = [v.double() if isinstance(v, Tensor) else v for v in layer.call.inputs]
    index = next(i for i, v in enumerate(inputs) if isinstance(v, Tensor))
    x = inputs[index][:1].detach().requires_grad_(True)
    inputs[index] = x
    try:
        with torch.enable_grad():
            y = probe.first_tensor(module(*inputs, **layer.call.kwargs))
            if y is None or y.shape != x.shape:
                return None
            (slope,) = torch.autograd.grad(y.sum(), x)
    except RuntimeError:
        return None
    return measures.by_feature(slope)[0]


def step_effect(exam: Examination, layer: LayerFacts, feature: int) -> tuple[str, float]:
    """What `STEP` in one feature of a layer's input does: in words, and as a share.

    The share is of the action range, for critics of the reward scale; of 1 where that is unknown.
    """
    subject = exam.subject
    passes = sources(subject)
    of_critic = _of_critic(layer, exam)
    run = passes["(s, a)" if of_critic and "(s, a)" in passes else "the observations"][1]

    def push(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        if x.ndim > 1:
            x[:, feature] += STEP
        else:
            x += STEP
        return (x, *args[1:])

    with training_mode(subject, False), torch.no_grad():
        before = run()
        handle = layer.call.module.register_forward_pre_hook(push)
        try:
            after = run()
        finally:
            handle.remove()
    gap = (after - before).detach()
    largest = float(gap.abs().max())
    if of_critic:
        scale = reward_scale(subject) or 1.0
        return (
            f"a step of {STEP} in it moves Q by {in_return_units(exam, largest)}",
            largest / scale,
        )
    share = largest
    if exam.action_range is not None and not subject.discrete:
        share = float((gap.abs() / exam.action_range.to(gap)).max())
    return f"a step of {STEP} in it moves the action by {exam.in_action_units(gap)}", share


# ---------------------------------------------------------------------------------------- BP406

LAST_BATCH = 0.9
NOISE = 0.1  # standard deviations
LONG_HORIZON = 10  # gradient steps


@rule(
    "BP406",
    "momentum-against-horizon-and-batch",
    "the momentum does not fit the batch or the use of the statistics",
    what=(
        "Measures the weight rho of a new batch in the running statistics by running the layer, "
        "and compares it with the batch and with how often the statistics are used."
    ),
    detected=(
        "rho == 0 (statistics are used and never move), rho_t = 1/t (a cumulative average: 1/rho "
        "grows by 1 with each batch), rho > 0.9 (statistics of about the last batch), the noise of "
        "the running mean sqrt(rho / (2 - rho) / B) > 0.1 standard deviations, or, with h >= 10 "
        "gradient steps between two uses, (1 - rho)^h > 0.5."
    ),
    why=(
        "A small rho lags behind weights that move, a large one hands the noise and the outliers "
        "of one batch to acting, and a cumulative average never forgets the first random policy. "
        "rho is PyTorch's momentum: flax's 0.99 is 0.01 here."
    ),
    mend="Set the momentum so that 1/rho batches cover the steps between two uses: 0.01 to 0.1.",
    references=("https://arxiv.org/abs/1702.03275", "https://arxiv.org/abs/1902.05605"),
)
def momentum(exam: Examination) -> Outcome:
    """BP406."""
    stuck = frozen(exam)
    layers = online(exam)
    if not layers and not stuck:
        return not_applicable(NO_STATISTICS)
    findings = [
        at(
            f,
            f"{f.name} normalizes with the batch's statistics in train mode and never moves its "
            f"own ({several(list(feature_buffers(f)))}): momentum 0",
            value=0.0,
            threshold=0.0,
        )
        for f in stuck
    ]
    batch, horizon = train_batch(exam.subject), exam.subject.momentum_horizon
    # One finding for all the layers that share a momentum: they were set by one number.
    groups: dict[str, list[tuple[LayerFacts, float, float]]] = {}
    for f in layers:
        for text, value, threshold in _momentum_faults(f, batch, horizon):
            groups.setdefault(text, []).append((f, value, threshold))
    for text, members in groups.items():
        names = [f.name for f, _, _ in members]
        f, value, threshold = members[0]
        findings.append(at(f, f"{several(names)}: {text}", value=value, threshold=threshold))
    return review(*findings) if findings else passed()


def _momentum_faults(
    layer: LayerFacts, batch: int | None, horizon: int | None
) -> Iterator[tuple[str, float, float]]:
    rho, following = measured_momentum(layer)
    if not math.isfinite(rho):
        return
    if following > 0 and abs(1 / following - 1 / rho - 1) < 0.05:
        yield (
            "the momentum is 1/t, a cumulative average: the first policy's data weighs as much as "
            "the last's",
            rho,
            0.0,
        )
        return
    if rho > LAST_BATCH:
        yield (
            f"the momentum is {rho:.3g}: the running statistics are those of about the last batch",
            rho,
            LAST_BATCH,
        )
    noise = math.sqrt(rho / (2 - rho) / batch) if batch else 0.0
    if noise > NOISE:
        yield (
            f"with momentum {rho:.3g} and batches of {batch} the running mean is off by "
            f"{noise:.2g} standard deviations of noise",
            noise,
            NOISE,
        )
    if horizon is not None and horizon >= LONG_HORIZON and (1 - rho) ** horizon > 0.5:
        kept = (1 - rho) ** horizon
        yield (
            f"with momentum {rho:.3g}, {kept:.0%} of the running statistics are older than the "
            f"{horizon} gradient steps between two uses",
            kept,
            0.5,
        )


def measured_momentum(layer: LayerFacts) -> tuple[float, float]:
    """Weight of the new batch in the running mean, at the next train pass and at the one after."""
    module = probe.replica(layer.call).double().train()
    inputs = [_double(v) for v in layer.call.inputs]
    x = next(v for v in inputs if isinstance(v, Tensor))
    own = dict(module.named_buffers(recurse=False))
    target = measures.moments(x)[0]
    weights = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for _ in range(2):
            before = own[layer.mean_buffer].clone()
            module(*inputs, **layer.call.kwargs)
            own = dict(module.named_buffers(recurse=False))
            gap, step = target - before, own[layer.mean_buffer] - before
            square = float((gap * gap).sum())
            weights.append(float((gap * step).sum()) / square if square > 0 else math.nan)
    return weights[0], weights[1]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def frozen(exam: Examination) -> list[LayerFacts]:
    """Layers with the batch's statistics in train mode, and buffers that they never move."""
    return [
        f
        for f in exam.layers
        if f.role not in exam.subject.targets
        and f.couples_train
        and not f.couples_eval
        and not f.running
        and len(feature_buffers(f)) >= 1
        and not any(name in f.moves_train for name in feature_buffers(f))
    ]


def feature_buffers(layer: LayerFacts) -> dict[str, Tensor]:
    """A layer's floating buffers with one entry for each feature of its input."""
    x = _input(layer)
    if x is None:
        return {}
    own = layer.call.module.named_buffers(recurse=False)
    return {k: v for k, v in own if v.is_floating_point() and v.shape == (x.shape[1],)}


# ---------------------------------------------------------------------------------------- BP407

TINY = 1e-4  # of the data's variance


@rule(
    "BP407",
    "batch-of-one-statistics",
    "statistics were taken from batches of one row",
    what="Finds train-mode passes of a single row, and the running variances that they leave.",
    detected=(
        "In one real update, a pass of a layer in train mode over 1 row that moved its statistics; "
        "or a running variance that is NaN (the unbiased variance of one row), or below 1e-4 of "
        "the variance of the data and below 10 eps for every feature, while the running mean has "
        "moved."
    ),
    why=(
        "The variance of one row is 0 and its normalized value is 0 whatever it is: the layer "
        "forgets its input, and the running variance decays to 0 or turns NaN."
    ),
    mend=(
        "Train on batches of at least 32 rows, put the layer in eval mode while acting on one "
        "observation, or use layer norm."
    ),
    references=("https://github.com/DLR-RM/stable-baselines3/issues/535",),
    finite="none",
)
def batch_of_one(exam: Examination) -> Outcome:
    """BP407."""
    if not exam.is_finite() and not _stateful(exam):
        return skipped(NOT_FINITE)
    layers = [f for f in exam.layers if f.couples_train or f.running]
    suspects = [f for f in exam.layers if f not in layers and feature_buffers(f)]
    if not layers and not suspects:
        return not_applicable("no layer uses the statistics of a batch")
    findings = []
    for f in layers + suspects:
        broken = [k for k, v in feature_buffers(f).items() if bool(torch.isnan(v).all())]
        if broken:
            findings.append(
                at(
                    f,
                    f"{f.name}: {broken[0]} is NaN for every feature, as the unbiased variance of "
                    "one row leaves it",
                    value=math.nan,
                )
            )
    for name, one in reached(exam).items():
        mean, var = running(one.layer)
        data = one.pooled.var(0, correction=0)
        varies = data > 0
        if var is None or not bool(varies.any()) or not bool((mean != 0).any()):
            continue
        ratio = float((var[varies] / data[varies]).max())
        near_zero = float(var[varies].max()) < NEAR * (eps_of(one.layer) or 1e-5)
        if ratio < TINY and near_zero:
            findings.append(
                at(
                    one.layer,
                    f"the running variance of {name} is at most {ratio:.1g} of the data's for "
                    "every feature, as batches of one row leave it",
                    value=ratio,
                    threshold=TINY,
                    effect=eval_effect(exam, one.layer),
                )
            )
    if exam.subject.update is not None:
        findings += _single_rows(exam)
    if findings:
        return failed(*findings)
    return passed() if exam.is_finite() else skipped(NOT_FINITE)


def _single_rows(exam: Examination) -> list[Finding]:
    """Layers that one real update, run and undone, gives a single row in train mode."""
    from batchproof.clinic.handback import handed_back

    subject = exam.subject
    layers = [f for f in exam.layers if f.couples_train or f.running]
    seen: set[str] = set()

    def look(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = next((v for v in args if isinstance(v, Tensor) and v.ndim), None)
        # One frame has many positions, and statistics over those are meant.
        if module.training and x is not None and len(x) == 1 and x.ndim <= 2:
            seen.add(name)

    assert subject.update is not None
    with handed_back(subject), torch.enable_grad():
        handles = [f.call.module.register_forward_pre_hook(partial(look, f.name)) for f in layers]
        try:
            subject.update()
        finally:
            for handle in handles:
                handle.remove()
    message = "an update ran {} in train mode on a batch of one row"
    return [
        at(f, message.format(f.name), site="update", value=1.0, threshold=2.0)
        for f in layers
        if f.name in seen
    ]


# ---------------------------------------------------------------------------------------- BP408

DEAD = 0.5  # share of features


@rule(
    "BP408",
    "dead-or-constant-features",
    "normalized features do not vary over the observations",
    what=(
        "Looks at the output of every normalization layer, and of the activation right after it, "
        "over all observations in eval mode."
    ),
    detected=(
        "A feature is dead where max - min over rows is at most 64 rounding errors of its size. "
        "Review above 50% of a layer's features, a failure at 100%. Not applicable where the "
        "observations themselves are all equal."
    ),
    why=(
        "A dead feature tells the next layer nothing. Running statistics that are far off push "
        "every row to one side of the ReLU, and no gradient brings it back."
    ),
    mend="See BP402 and BP405 first; recalibrate the statistics, or lower the learning rate.",
    references=("https://arxiv.org/abs/2302.12902",),
)
def dead_features(exam: Examination) -> Outcome:
    """BP408."""
    if probe.spread(exam.subject.obs) == 0:
        return not_applicable("all observations are equal")
    layers = [
        f
        for f in exam.layers
        if f.role not in exam.subject.targets and (f.running or f.couples_train)
    ]
    if not layers:
        return not_applicable("no layer normalizes")
    findings = []
    whole = False
    calls = {id(call.module): call for call in reversed(exam.calls)}
    for f in layers:
        call = calls[id(f.call.module)]
        shares = {f"the output of {f.name}": dead_share(probe.first_tensor(call.output))}
        after = following(exam, call)
        if after is not None:
            shares[f"{after.name}, right after {f.name},"] = dead_share(
                probe.first_tensor(after.output)
            )
        what, share = max(shares.items(), key=lambda item: item[1])
        if share <= DEAD:
            continue
        whole = whole or share == 1
        findings.append(
            at(
                f,
                f"{share:.0%} of the features of {what} have one value for all observations",
                value=share,
                threshold=DEAD,
            )
        )
    if not findings:
        return passed()
    findings.sort(key=lambda f: -f.value)
    return failed(*findings) if whole else review(*findings)


def dead_share(y: Tensor | None) -> float:
    """Share of features that have one value for all rows and positions."""
    if y is None or len(y) < 2:
        return 0.0
    flat = measures.by_feature(y)
    size = flat.abs().amax(0).clamp_min(1e-30)
    width = flat.amax(0) - flat.amin(0)
    return float((width <= probe.ROUNDING * torch.finfo(flat.dtype).eps * size).double().mean())


def following(exam: Examination, layer: probe.Call) -> probe.Call | None:
    """The call that took the layer's output, where it keeps the shape: an activation."""
    output = probe.first_tensor(layer.output)
    for call in exam.calls:
        if call.role != layer.role or call.module is layer.module or call.children:
            continue
        x = next((v for v in call.inputs if isinstance(v, Tensor)), None)
        y = probe.first_tensor(call.output)
        if x is None or y is None or output is None or y.shape != output.shape:
            continue
        parameterless = not any(True for _ in call.module.parameters(recurse=False))
        if parameterless and x.shape == output.shape and bool(torch.equal(x, output)):
            return call
    return None
