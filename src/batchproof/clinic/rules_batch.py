"""BP1xx, alone vs batch: an action must depend on its own observation and on nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from batchproof.clinic import probe
from batchproof.clinic.locate import (
    Located,
    acting_calls,
    acting_modes,
    forced_mode,
    gap,
    in_precision,
    locate,
    once,
    reseed,
    tolerance,
)
from batchproof.clinic.probe import Call
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
from batchproof.clinic.subject import Obs, join, rows, take, tensors, unchanged

ALONE = 8  # rows that are acted on one by one
LARGE = 4096  # entries of an observation above which it is an image, and fewer rows are used
ACTS = 10  # calls after which a changed state is measured
SHRINKS = 1e-4  # a gap that falls below this share of itself in float64 was rounding


@dataclass(frozen=True)
class Variant:
    """Observations some of whose rows are rows of the probe batch."""

    obs: Obs
    rows: Tensor
    base_rows: Tensor


class Acting:
    """The action of a subject as deployed, in float64 where that can be had.

    Attributes:
        exam: the examination.
        batch: the probe batch; its rows differ.
        calls: each module's first call while acting.
        modes: each module's mode while acting.
        eps: of the least precise type that a module gave although its weights were float64.
        same: whether ``policy`` in those modes is what ``act`` gives, but for clipping or argmax.
    """

    def __init__(self, exam: Examination) -> None:
        self.exam, self.subject = exam, exam.subject
        self.batch = varied(probe_batch(exam))
        with in_precision(self.subject):
            self.calls = acting_calls(self.subject, self.batch)
            self.modes = acting_modes(self.calls)
            outputs = [probe.first_tensor(call.output) for call in self.calls]
            self.eps = max(
                (torch.finfo(y.dtype).eps for y in outputs if y is not None), default=0.0
            )
            self.act = once(self.subject, lambda: self.subject.act(self.batch))
            policy = once(self.subject, lambda: self.policy(self.batch))
        self.same = self._agree(self.act, policy)
        self.base = policy if self.same else self.act

    def _agree(self, act: Tensor, policy: Tensor) -> bool:
        if not act.is_floating_point():
            if policy.ndim != 2 or act.numel() != len(policy):
                return False
            best = policy.topk(min(2, policy.shape[1]), dim=1).values
            clear = best[:, 0] - best[:, -1] > tolerance(policy, eps=1e-6)
            return bool((policy.argmax(1) == act.reshape(-1))[clear].all())
        if act.shape != policy.shape:
            return False
        low, high = self.subject.action_low, self.subject.action_high
        if low is not None and high is not None and low.shape == act.shape[1:]:
            policy = policy.clamp(low.to(policy), high.to(policy))
        return float(gap(act, policy).abs().max()) <= 1e-4 * float(policy.abs().max())

    def policy(self, obs: Obs) -> Tensor:
        """The networks' output (B, K) in the modes in which they act."""
        with forced_mode(self.subject, self.modes):
            return self.subject.policy(obs)

    def run(self, obs: Obs) -> Tensor:
        """``policy`` where it is what ``act`` gives before clipping or argmax, else ``act``."""
        return self.policy(obs) if self.same else self.subject.act(obs)

    @cached_property
    def random(self) -> bool:
        """Whether two acts on one batch differ by the random state alone."""
        with in_precision(self.subject):
            other = once(self.subject, lambda: self.run(self.batch), seed=1)
        return not float(gap(other, self.base).abs().max()) <= tolerance(self.base, eps=self.eps)

    @cached_property
    def floor(self) -> float:
        """The rounding error of the action in the precision in which it is deployed."""
        return probe.difference(once(self.subject, lambda: self.run(self.batch)), self.base)

    def gaps(self, variant: Variant) -> Tensor:
        """Change (R, K) of the shared rows, in float64 inside `in_precision`."""
        output = once(self.subject, lambda: self.run(variant.obs))
        change = gap(output[variant.rows], self.base[variant.base_rows])
        if self.same and not largest(change) <= tolerance(self.base, eps=self.eps):
            # The policy depends on its companions, but does the action, for which it stands in?
            act = once(self.subject, lambda: self.subject.act(variant.obs))
            if not self._agree(act, output):
                change = gap(act[variant.rows], self.act[variant.base_rows])
        return change

    def threshold(self, value: float, *variants: Variant) -> float:
        """``max(max(1e-9, 16 eps) * max|action|, 1e-4 * the gap in the deployed precision)``."""
        limit = tolerance(self.base, eps=self.eps)
        if value <= limit or self.eps > 1e-9:
            return limit
        base = once(self.subject, lambda: self.run(self.batch))
        for variant in variants:
            output = once(self.subject, lambda v=variant: self.run(v.obs))  # type: ignore[misc]
            coarse = float(gap(output[variant.rows], base[variant.base_rows]).abs().max())
            if np.isfinite(coarse):
                limit = max(limit, SHRINKS * coarse)
        return limit

    def located(self, variant: Variant, worst: int) -> Located:
        """The layers that make row ``worst`` of a variant differ from the same row in the batch."""
        row, base_row = int(variant.rows[worst]), int(variant.base_rows[worst])
        return locate(
            self.subject,
            lambda: self.run(variant.obs),
            lambda: self.run(self.batch),
            slice(row, row + 1),
            slice(base_row, base_row + 1),
        )

    def effect(self, change: Tensor) -> str:
        """A change (R, K) of the action in words, with the share of argmaxes that it moves."""
        return effect(self.exam, change)


_ACTING: WeakKeyDictionary[Examination, Acting] = WeakKeyDictionary()


def acting(exam: Examination) -> Acting:
    """The action as deployed, found once for each examination."""
    if exam not in _ACTING:
        _ACTING[exam] = Acting(exam)
    return _ACTING[exam]


def probe_batch(exam: Examination) -> Obs:
    """The examination's batch, 16 rows of it where observations are images."""
    batch: Obs = exam.batch  # type: ignore[assignment]
    entries = sum(part[0].numel() for part in tensors(batch))
    return take(batch, slice(0, 16)) if entries > LARGE else batch


def varied(obs: Obs) -> Obs:
    """The same observations, or where all rows are equal, rows that are not: the first stays."""
    if probe.spread(obs) > 0:
        return obs

    def shifted(part: Tensor) -> Tensor:
        if not part.is_floating_point():
            return part
        steps = torch.linspace(0, 1, len(part), dtype=part.dtype, device=part.device)
        return part + steps.reshape(-1, *[1] * (part.ndim - 1))

    return {k: shifted(v) for k, v in obs.items()} if isinstance(obs, dict) else shifted(obs)


def effect(exam: Examination, change: Tensor) -> str:
    """A change (R, K) of the action in the units that a user thinks in."""
    if not bool(change.isfinite().all()):
        return "the action is not a number"
    width = exam.action_range
    if width is not None and change.shape[-1:] != width.shape:
        return f"{float(change.abs().max()):.3g} in the output"
    return exam.in_action_units(change)


def largest(change: Tensor) -> float:
    """Largest absolute entry, 0 of none."""
    return float(change.abs().max()) if change.numel() else 0.0


def _worst(change: Tensor) -> int:
    return int(change.abs().nan_to_num(nan=float("inf")).flatten(1).amax(1).argmax())


def _index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


@dataclass(frozen=True)
class _Dependence:
    """Largest gap of one kind of variant, with the variant and the row that show it."""

    value: float
    threshold: float
    variant: Variant
    change: Tensor
    error: str = ""

    @property
    def found(self) -> bool:
        return not self.value <= self.threshold


def _measure(subject: Acting, variants: list[Variant], error: str = "") -> _Dependence:
    with in_precision(subject.subject):
        changes = [subject.gaps(variant) for variant in variants]
    sizes = [float("inf") if np.isnan(largest(c)) else largest(c) for c in changes]
    at = int(np.argmax(sizes))
    value = largest(changes[at])
    return _Dependence(
        value, subject.threshold(value, variants[at]), variants[at], changes[at], error
    )


_ALONE: WeakKeyDictionary[Examination, _Dependence] = WeakKeyDictionary()


def _alone(exam: Examination) -> _Dependence:
    """Rows alone; in pairs, where the policy refuses a batch of one."""
    if exam not in _ALONE:
        subject = acting(exam)
        count = rows(subject.batch)
        chosen = sorted({int(i) for i in np.linspace(0, count - 1, min(ALONE, count))})
        try:
            _ALONE[exam] = _measure(
                subject, [Variant(take(subject.batch, i), _index(0), _index(i)) for i in chosen]
            )
        # Batch normalization in train mode, for one, refuses a single row.
        except Exception as caught:
            pairs = [
                Variant(take(subject.batch, _index(i, (i + 1) % count)), _index(0), _index(i))
                for i in chosen
            ]
            line = " ".join(str(caught).split())[:120]
            _ALONE[exam] = _measure(subject, pairs, f"{type(caught).__name__}: {line}")
    return _ALONE[exam]


def _finding(subject: Acting, found: _Dependence, message: str) -> Finding:
    where = subject.located(found.variant, _worst(found.change))
    return Finding(
        message=message,
        network=where.network,
        first=where.first,
        largest=where.largest,
        site="act",
        value=found.value,
        floor=subject.floor,
        threshold=found.threshold,
        effect=subject.effect(found.change),
    )


_THRESHOLD = (
    "The gap counts where it exceeds max(max(1e-9, 16 eps) * max|action|, 1e-4 * gap32): the "
    "networks run in float64, eps is that of the least precise type that they gave nevertheless "
    "(2.2e-16, or 1.2e-7 where code casts to float32), and gap32 is the same gap in the precision "
    "as deployed. Rounding shrinks by nine orders of magnitude in float64, a gap with a meaning "
    "does not shrink. The floor is the rounding error of the action as deployed, |action in "
    "float32 - action in float64|."
)


@rule(
    "BP101",
    "action-depends-on-batch",
    "A row acts differently alone than in a batch",
    what="Acts on rows one by one and on all of them in one batch, as deployed, and compares.",
    detected=f"value = max over 8 rows |act(row) - act(batch)[row]|. {_THRESHOLD} Where the policy "
    "refuses a batch of one, rows are compared in pairs, and the refusal is reported. Discrete "
    "actions are compared by the values that their argmax is taken of.",
    why="The action of a state depends on which other environments happen to be in the batch: "
    "evaluation with one environment runs another policy than collection with many, and neither "
    "is the one that the loss was computed for.",
    mend="Put the networks in eval mode when acting. A layer that uses the batch in eval mode too "
    "(batch norm without running statistics) must be replaced by one that does not.",
    fix="eval-when-acting",
    safe=False,
    references=(
        "Stable-Baselines3 issue 535",
        "d3rlpy issue 434",
        "Ioffe & Szegedy 2015, arXiv 1502.03167",
    ),
    finite="act",
)
def action_depends_on_batch(exam: Examination) -> Outcome:
    """BP101."""
    subject = acting(exam)
    if subject.random:
        return skipped("two acts on one batch differ already: see BP105")
    found = _alone(exam)
    if found.found and found.error:
        return failed(
            _finding(
                subject,
                found,
                f"acting on one observation alone raises {found.error}; in a pair the action of a "
                "row differs from its action in the batch",
            )
        )
    if found.found:
        return failed(
            _finding(subject, found, "the action of a row alone differs from its action in a batch")
        )
    if found.error:
        return review(
            Finding(
                f"acting on one observation alone raises {found.error}",
                site="act",
                floor=subject.floor,
            )
        )
    return passed(f"alone and in the batch agree to {found.value:.2g}")


def _companions(subject: Acting) -> Iterator[tuple[str, list[Variant]]]:
    batch, count = subject.batch, rows(subject.batch)
    everything = torch.arange(count)
    yield (
        "in another order",
        [Variant(take(batch, everything.flip(0)), everything, everything.flip(0))],
    )

    kept = max(1, count // 2)
    yield (
        "among other companions",
        [
            Variant(
                join(take(batch, slice(0, kept)), _others(subject, kept, count - kept)),
                everything[:kept],
                everything[:kept],
            )
        ],
    )
    few = max(1, count // 4)
    padded = join(take(batch, slice(0, few)), _zeros(take(batch, slice(few, count))))
    yield "in a batch padded with zeros", [Variant(padded, everything[:few], everything[:few])]

    sizes = [n for n in (2, 3, 8, 32) if n < count]
    if sizes:
        yield (
            "in a smaller batch",
            [Variant(take(batch, slice(0, n)), everything[:n], everything[:n]) for n in sizes],
        )


def _others(subject: Acting, first: int, count: int) -> Obs:
    """Observations outside the probe batch; its own rows, far out, where there are none."""
    obs = subject.subject.obs
    if rows(obs) >= 2 * rows(subject.batch):
        return take(obs, slice(rows(obs) - count, rows(obs)))

    def far(part: Tensor) -> Tensor:
        return 3 * part + 1 if part.is_floating_point() else part.flip(0)

    rest = take(subject.batch, slice(first, first + count))
    return {k: far(v) for k, v in rest.items()} if isinstance(rest, dict) else far(rest)


def _zeros(obs: Obs) -> Obs:
    if isinstance(obs, dict):
        return {key: torch.zeros_like(part) for key, part in obs.items()}
    return torch.zeros_like(obs)


@rule(
    "BP102",
    "depends-on-companions",
    "A row acts differently in another order, size or company",
    what="Acts on the same rows in another order, among other rows, in a batch padded with zeros "
    "and in smaller batches, as deployed, and compares. Speaks where the plain comparison of "
    "BP101 is silent.",
    detected="value = max over rows |act(other batch)[row] - act(batch)[row]|, once for each of: "
    "reversed order; half of the rows replaced; three quarters replaced by zeros; the first 2, 3, "
    f"8 and 32 rows. {_THRESHOLD}",
    why="Some paths are taken at some sizes or positions only: statistics of small batches, "
    "padding that is not masked, an index that leaks into the output. Vectorized evaluation then "
    "depends on the number of environments.",
    mend="Find the layer named, and let it treat each row by itself, or mask the padding.",
    references=("d3rlpy issue 434",),
    finite="act",
)
def depends_on_companions(exam: Examination) -> Outcome:
    """BP102."""
    subject = acting(exam)
    if subject.random:
        return skipped("two acts on one batch differ already: see BP105")
    measured = {name: _measure(subject, variants) for name, variants in _companions(subject)}
    text = ", ".join(f"{name} {found.value:.2g}" for name, found in measured.items())
    if _alone(exam).found:
        return not_applicable(f"a row alone differs already, which BP101 reports ({text})")
    findings = [
        _finding(subject, found, f"the action of a row differs {name} although alone it agrees")
        for name, found in measured.items()
        if found.found
    ]
    return failed(*findings) if findings else passed(f"largest change of a row: {text}")


@rule(
    "BP103",
    "unbatched-input-takes-another-path",
    "An observation without a batch axis takes another path",
    what="Gives the policy one observation without a batch axis, and the same with one.",
    detected="value = max over 4 observations |policy(obs) - policy(obs[None])[0]|, and the same "
    f"with act. {_THRESHOLD} A policy that refuses input without a batch axis passes; one that "
    "refuses a batch too is skipped.",
    why="Code that skips batch normalization for a single observation, because train mode refuses "
    "it, neither uses the batch's statistics nor the running ones: the layer is bypassed (mode "
    "B), and the agent acts with a policy that no loss ever saw.",
    mend="Add the batch axis before the network and put it in eval mode; drop the special case.",
    references=("Udacity MADDPG course projects", "MA-BN, arXiv 2509.23750"),
    finite="act",
)
def unbatched_input_takes_another_path(exam: Examination) -> Outcome:
    """BP103."""
    subject = acting(exam)
    if subject.random:
        return skipped("two acts on one batch differ already: see BP105")
    reasons: list[str] = []
    functions: dict[str, Callable[[Obs], Tensor]] = {
        "act": exam.subject.act,
        "policy": subject.policy,
    }
    for name, function in functions.items():
        refusal = _refusal(subject, function)
        if refusal:
            return skipped(f"{name} refuses a batch too, so nothing can be compared: {refusal}")
        try:
            finding = _unbatched(subject, name, function)
        # Refusing is the right thing to do.
        except Exception as caught:
            reasons.append(f"{name} refuses it ({type(caught).__name__})")
            continue
        if isinstance(finding, Finding):
            return failed(finding)
        reasons.append(f"{name} {finding}")
    return passed("without a batch axis: " + ", ".join(reasons))


def _refusal(subject: Acting, function: Callable[[Obs], Tensor]) -> str:
    """Why a function takes no batch, in the precision as deployed; '' where it does."""
    try:
        once(subject.subject, lambda: function(subject.batch))
    except Exception as caught:
        return f"{type(caught).__name__}: {' '.join(str(caught).split())[:120]}"
    return ""


def _unbatched(subject: Acting, name: str, function: Callable[[Obs], Tensor]) -> Finding | str:
    chosen = range(min(4, rows(subject.batch)))
    batch = subject.batch

    def bare(i: int) -> Obs:
        row = take(batch, i)
        return {k: v[0] for k, v in row.items()} if isinstance(row, dict) else row[0]

    def single(i: int) -> Tensor:
        return once(subject.subject, lambda: function(bare(i))).reshape(1, -1)

    def batched(i: int) -> Tensor:
        try:
            return once(subject.subject, lambda: function(take(batch, i))).reshape(1, -1)
        except Exception:  # train mode refuses a batch of one: take the row from the whole batch
            return once(subject.subject, lambda: function(batch))[i].reshape(1, -1)

    with in_precision(subject.subject):
        pairs = [(single(i), batched(i)) for i in chosen]
    if any(a.shape != b.shape for a, b in pairs):
        return f"gives another shape, {tuple(pairs[0][0].shape[1:])}"
    change = torch.cat([gap(a, b) for a, b in pairs])
    value, limit = largest(change), tolerance(*(b for _, b in pairs), eps=subject.eps)
    if value > limit and subject.eps < 1e-9:
        coarse = torch.cat([gap(single(i), batched(i)) for i in chosen])
        limit = max(limit, SHRINKS * largest(coarse) if np.isfinite(largest(coarse)) else 0.0)
    if value <= limit:
        return f"agrees to {value:.2g}"
    row = _worst(change)
    where = locate(
        subject.subject,
        lambda: function(bare(row)),
        lambda: function(batch),
        Ellipsis,
        row,
    )
    skipped_modules = _not_called(subject, lambda: function(bare(row)), lambda: function(batch))
    message = (
        f"an observation without a batch axis skips {', '.join(skipped_modules)}: neither the "
        "batch's nor the running statistics are used (mode B)"
        if skipped_modules
        else "an observation without a batch axis gives another output"
    )
    return Finding(
        message=message,
        network=where.network,
        first=where.first,
        largest=where.largest,
        site=name,
        value=value,
        floor=subject.floor,
        threshold=limit,
        effect=subject.effect(change),
    )


def _not_called(
    subject: Acting, run_a: Callable[[], Tensor], run_b: Callable[[], Tensor]
) -> list[str]:
    """Names of the leaves that the second run calls and the first does not."""
    ran: list[list[Call]] = []
    for run in (run_a, run_b):

        def recording(run: Callable[[], Tensor] = run) -> Tensor:
            with probe.recorded(subject.subject.networks, keep=1) as calls:
                result = run()
            ran.append(calls)
            return result

        once(subject.subject, recording)
    seen = {id(call.module) for call in ran[0]}
    return [c.name for c in ran[1] if id(c.module) not in seen and not c.children]


@rule(
    "BP104",
    "acting-changes-state",
    "Acting changes the policy",
    what="Acts ten times on the probe batch and looks at every parameter, buffer "
    "and plain tensor attribute afterwards.",
    detected="value = max|tensor after 10 acts - tensor before| over all of them; any "
    "change is a finding: a failure where a floating-point tensor moved, a matter for review "
    "where only counters did. The floor and the threshold are 0: nothing should be written at all.",
    why="A policy that learns from what it is asked is another one after each evaluation: results "
    "depend on the order of the episodes, and evaluating in the middle of training changes it.",
    mend="Put the networks in eval mode when acting; a home-made normalizer must update only in "
    "train mode.",
    fix="eval-when-acting",
    safe=False,
    references=("Stable-Baselines3 issue 535", "tianshou issue 773", "ray issue 61961"),
    finite="none",
)
def acting_changes_state(exam: Examination) -> Outcome:
    """BP104."""
    subject, batch = exam.subject, probe_batch(exam)
    if not subject.networks:
        return not_applicable("no network is named, so no state can be watched")
    before = {
        (role, path, key): value.detach().clone()
        for role, path, module in subject.modules()
        for key, value in _own_tensors(module)
    }

    def evaluated() -> Tensor:
        with forced_mode(subject, False):
            return once(subject, lambda: subject.policy(batch))

    with unchanged(subject), torch.no_grad():
        reseed(0)
        action_before = evaluated()
        for _ in range(ACTS):
            subject.act(batch)
        after = {
            (role, path, key): value.detach().clone()
            for role, path, module in subject.modules()
            for key, value in _own_tensors(module)
        }
        change = gap(evaluated(), action_before)
    moved = [
        (*name, old.is_floating_point(), _moved(old, after.get(name)))
        for name, old in before.items()
        if _moved(old, after.get(name)) > 0
    ]
    if not moved:
        return passed(f"no parameter, buffer or tensor attribute moves in {ACTS} acts")
    order = {(c.role, c.path): i for i, c in enumerate(acting_calls(subject, batch))}
    moved.sort(key=lambda m: order.get((m[0], m[1]), len(order)))
    role, first = moved[0][:2]
    most = max(moved, key=lambda m: (m[3], m[4]))
    names = ", ".join(".".join(part for part in m[:3] if part) for m in moved[:6])
    more = f" and {len(moved) - 6} more" if len(moved) > 6 else ""
    finding = Finding(
        message=f"acting changes {names}{more}",
        network=role,
        first=first or role,
        largest=most[1] or most[0],
        site="act",
        value=most[4],
        floor=0.0,
        threshold=0.0,
        effect=f"{ACTS} acts on {rows(batch)} rows move the eval-mode output by up to "
        + effect(exam, change),
    )
    return failed(finding) if any(m[3] for m in moved) else review(finding)


def _own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
    # Home-made normalizers often forget to register what they keep.
    yield from ((k, v) for k, v in vars(module).items() if isinstance(v, Tensor))


def _moved(old: Tensor, new: Tensor | None) -> float:
    if new is None or new.shape != old.shape:
        return float("inf")
    return probe.largest_gap(new, old)


@rule(
    "BP105",
    "deterministic-output-is-random",
    "The deterministic action is random",
    what="Acts twice on the probe batch from the same state, with two seeds and with one.",
    detected="value = max|act(batch; seed 1) - act(batch; seed 0)|; a failure where it exceeds 64 "
    "eps * max|action|, eps that of the action's type. Likewise for one seed twice, which shows "
    "state that is no parameter or buffer. A random state of torch, NumPy or Python that has moved "
    "after an action that is not random itself is a matter for review.",
    why="An evaluation that cannot be repeated, and a policy gradient of another action than the "
    "one that was taken. A consumed random state makes results depend on how often one evaluates.",
    mend="Put dropout and noise layers in eval mode when acting, pass deterministic=True down, and "
    "take the mean (or the argmax) instead of a sample.",
    references=("Gal & Ghahramani 2016, arXiv 1506.02142",),
    finite="act",
)
def deterministic_output_is_random(exam: Examination) -> Outcome:
    """BP105."""
    subject, batch = exam.subject, probe_batch(exam)

    def act(seed: int = 0) -> Tensor:
        reseed(seed)
        return subject.act(batch)

    base = once(subject, act)
    again, other = once(subject, act), once(subject, lambda: act(1))
    # Observations of one type and shape take one path: even the rounding is the same.
    limit = probe.ROUNDING * (torch.finfo(base.dtype).eps if base.is_floating_point() else 0.0)
    limit *= largest(base[base.isfinite()])
    change, hidden = gap(other, base), gap(again, base)
    if not largest(hidden) <= limit:
        change = hidden
        message = (
            "two acts from the same state and seed differ: the policy keeps state that is no "
            "parameter or buffer, or draws from a generator of its own"
        )
    elif not largest(change) <= limit:
        message = "the action that should be deterministic changes with the random seed"
    else:
        drawn = _consumed(exam, batch)
        if not drawn:
            return passed("two acts agree, and no random state is consumed")
        return review(
            Finding(
                f"acting consumes the random state of {', '.join(drawn)} although its result does "
                "not depend on it",
                site="act",
                value=0.0,
                floor=0.0,
                threshold=limit,
                effect="the action is the same; what is drawn after it is not",
            )
        )
    where = locate(subject, lambda: act(0), lambda: act(1), slice(None), slice(None))
    return failed(
        Finding(
            message=message,
            network=where.network,
            first=where.first,
            largest=where.largest,
            site="act",
            value=largest(change),
            floor=limit,
            threshold=limit,
            effect=effect(exam, change)
            if base.is_floating_point()
            else f"{float((change != 0).any(-1).double().mean()):.0%} of the actions change",
        )
    )


def _consumed(exam: Examination, batch: Obs) -> list[str]:
    with unchanged(exam.subject), torch.no_grad():
        reseed(0)
        before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
        exam.subject.act(batch)
        after = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    drawn = {
        "torch": not torch.equal(before[0], after[0]),
        "NumPy": before[1] != after[1],
        "Python": before[2] != after[2],
    }
    return [name for name, moved in drawn.items() if moved]
