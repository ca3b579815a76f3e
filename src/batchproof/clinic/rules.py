"""Rules, what they find, and the audit that runs them all.

A rule is a function of an `Examination` and a page of text. It never guesses: what it could not
check is ``skipped`` or ``not_applicable`` with a reason, never a pass.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from batchproof.clinic import probe
from batchproof.clinic.probe import Call, LayerFacts
from batchproof.clinic.subject import (
    Subject,
    check_runs,
    fingerprint,
    rows,
    sound_weights,
    take,
    training_mode,
    unchanged,
)
from batchproof.errors import BatchproofError

if TYPE_CHECKING:
    from batchproof.clinic.trace import Trace

FAMILIES = {
    1: "alone vs batch",
    2: "train vs eval",
    3: "online vs target and slots",
    4: "statistics health",
    5: "observation and reward normalizers",
    6: "save, load and export",
}
"""Rule families by the first digit of the code."""

NOT_FINITE = "weights or outputs are not finite, see BP404"
"""Why a rule could not be checked that compares numbers where some are NaN or infinite."""

Whose = Literal["all", "act", "none"]
"""Networks by what they do: all, those that act, none."""

RULE_MODULES = ("batch", "modes", "slots", "statistics", "normalizers", "export")


class Status(StrEnum):
    """What came of a rule."""

    FAIL = "fail"
    REVIEW = "review"
    PASS = "pass"
    NOT_APPLICABLE = "not_applicable"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, where, and by how much.

    Attributes:
        message: what is wrong, one plain sentence.
        network: the network's role, '' where it is not one network's matter.
        first: path of the first module whose output differs, '' where unknown.
        largest: path of the module that adds most to the difference.
        site: the slot or the call, for example ``slot 3 policy_q`` or ``act``.
        value: what was measured.
        floor: what rounding alone would give.
        threshold: above (or below) what it is a finding.
        effect: the value in units that a user thinks in: action units and percent of the
            range, TD-target units and percent of the reward scale.
    """

    message: str
    network: str = ""
    first: str = ""
    largest: str = ""
    site: str = ""
    value: float = float("nan")
    floor: float = float("nan")
    threshold: float = float("nan")
    effect: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of one rule on one subject."""

    status: Status
    reason: str = ""
    findings: tuple[Finding, ...] = ()
    code: str = ""
    seconds: float = 0.0


def failed(*findings: Finding) -> Outcome:
    """Something is wrong for certain."""
    return Outcome(Status.FAIL, findings=findings)


def review(*findings: Finding) -> Outcome:
    """Something that may be meant: a person should look."""
    return Outcome(Status.REVIEW, findings=findings)


def passed(reason: str = "") -> Outcome:
    """Checked, and nothing found."""
    return Outcome(Status.PASS, reason)


def not_applicable(reason: str) -> Outcome:
    """There is nothing here that the rule speaks about."""
    return Outcome(Status.NOT_APPLICABLE, reason)


def skipped(reason: str) -> Outcome:
    """The rule speaks about this subject but could not be checked."""
    return Outcome(Status.SKIPPED, reason)


@dataclass(frozen=True)
class Rule:
    """One rule and its page.

    Attributes:
        code: ``BPnnn``, never reused.
        name: a few words with hyphens, ``action-depends-on-batch``.
        title: what is wrong, in one short line.
        check: the rule.
        what: what the rule does.
        detected: how, with the threshold's formula.
        why: why it matters.
        mend: what to do.
        fix: the name of the fix in `batchproof.clinic.fix`, '' where none is automatic.
        safe: whether that fix leaves outputs as deployed unchanged.
        references: issues and papers.
        on_request: takes seconds, so it runs only where `audit` is told codes and its own fits.
        finite: whose weights and outputs must be finite for it to be checked: those of ``all``
            networks, of those that ``act``, or of ``none``.
    """

    code: str
    name: str
    title: str
    check: Callable[[Examination], Outcome] = field(repr=False)
    what: str = ""
    detected: str = ""
    why: str = ""
    mend: str = ""
    fix: str = ""
    safe: bool = True
    references: tuple[str, ...] = ()
    on_request: bool = False
    finite: Whose = "all"

    @property
    def family(self) -> str:
        """Its family's name."""
        return FAMILIES[int(self.code[2])]


RULES: dict[str, Rule] = {}
"""Every rule by code; filled by `all_rules`."""


def rule(
    code: str, name: str, title: str, **page: object
) -> Callable[[Callable[[Examination], Outcome]], Callable[[Examination], Outcome]]:
    """Register the decorated function as a rule; the keywords are fields of `Rule`."""

    def register(check: Callable[[Examination], Outcome]) -> Callable[[Examination], Outcome]:
        if code in RULES and RULES[code].check.__module__ != check.__module__:
            raise AssertionError(f"rule {code} is defined twice")
        RULES[code] = Rule(code, name, title, check, **page)  # type: ignore[arg-type]
        return check

    return register


def all_rules() -> dict[str, Rule]:
    """Every rule by code, in order; imports their modules."""
    for name in RULE_MODULES:
        importlib.import_module(f"batchproof.clinic.rules_{name}")
    return dict(sorted(RULES.items()))


class Examination:
    """A subject and what several rules want to know about it, each found once.

    Attributes:
        subject: what is examined.
    """

    BATCH = 64  # rows of a probe batch: enough to average, few enough to compare one by one

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @cached_property
    def batch(self) -> object:
        """Up to `BATCH` observations."""
        return take(self.subject.obs, slice(0, min(rows(self.subject.obs), self.BATCH)))

    @cached_property
    def calls(self) -> list[Call]:
        """Every module's first call when all networks run on the probe batch, in eval mode."""
        subject = self.subject
        with (
            unchanged(subject),
            training_mode(subject, False),
            torch.no_grad(),
            probe.recorded(subject.networks, keep=1) as calls,
        ):
            subject.policy(self.batch)  # type: ignore[arg-type]
            transitions = subject.transitions
            if transitions is not None:
                for critic in (subject.critic, subject.target_critic):
                    if critic is not None:
                        critic(transitions.obs, transitions.action)
                if subject.target_actor is not None:
                    subject.target_actor(transitions.next_obs)
        return calls

    @cached_property
    def wrong_outputs(self) -> dict[str, Tensor]:
        """Outputs that are not finite by what they are, ``act`` and ``policy`` of those that act.

        Where actions have no known bounds, -inf beside finite entries is how others are ruled out.
        """
        subject, data = self.subject, self.subject.transitions
        bounded = self.subject.action_low is not None
        runs: dict[str, tuple[Callable[[], Tensor], bool]] = {
            "act": (lambda: subject.act(self.batch), bounded),  # type: ignore[arg-type]
            "policy": (lambda: subject.policy(self.batch), bounded),  # type: ignore[arg-type]
        }
        if data is not None:
            critics = {"critic": subject.critic, "target critic": subject.target_critic}
            for name, q in critics.items():
                if q is not None:
                    runs[name] = (partial(q, data.obs, data.action), True)
            if subject.target_actor is not None:
                runs["target actor"] = (partial(subject.target_actor, data.next_obs), True)
        found = {}
        for name, (run, strict) in runs.items():
            output = self._tried(run, as_handed_over=name == "act")
            if output is not None and not _are_numbers(output, strict):
                found[name] = output
        return found

    def _tried(self, run: Callable[[], Tensor], as_handed_over: bool) -> Tensor | None:
        """What a run gives, in eval mode where it has none of its own; None where it raises."""
        with unchanged(self.subject), torch.no_grad():
            try:
                if as_handed_over:
                    return run().detach()
                with training_mode(self.subject, False):
                    return run().detach()
            except Exception:  # a rule that needs it will say so
                return None

    def is_finite(self, whose: Whose = "all") -> bool:
        """Whether weights and outputs are finite, so that differences mean something.

        Args:
            whose: as in `Rule.finite`.
        """
        return whose == "none" or (self._acts_finite if whose == "act" else self._all_finite)

    @cached_property
    def _all_finite(self) -> bool:
        return not self.wrong_outputs and sound_weights(*self.subject.networks.values())

    @cached_property
    def _acts_finite(self) -> bool:
        networks = self.subject.networks
        outputs = {"act", "policy"} & set(self.wrong_outputs)
        return not outputs and sound_weights(*(networks[role] for role in self.acting_roles))

    @cached_property
    def layers(self) -> list[LayerFacts]:
        """Modules that couple rows, keep state or draw at random, in the order of the forward."""
        with unchanged(self.subject):
            return probe.layer_facts(self.calls)

    @cached_property
    def trace(self) -> Trace:
        """The trace of one real update; only where the subject has an ``update``."""
        from batchproof.clinic.trace import trace

        with torch.enable_grad():  # a rule may ask from within a block without gradients
            return trace(self.subject)

    def layers_of(self, *roles: str) -> list[LayerFacts]:
        """Those of some networks."""
        return [layer for layer in self.layers if layer.role in roles]

    @property
    def acting_roles(self) -> tuple[str, ...]:
        """Networks that choose the action: all but critics and targets."""
        return tuple(
            role
            for role in self.subject.networks
            if role not in self.subject.targets and not role.startswith("critic")
        )

    @cached_property
    def action_range(self) -> Tensor | None:
        """Width (A,) of the action space, None where it is unknown or discrete."""
        low, high = self.subject.action_low, self.subject.action_high
        if low is None or high is None:
            return None
        width = high - low
        return width if bool(torch.isfinite(width).all()) else None

    def in_action_units(self, gap: Tensor) -> str:
        """A gap of actions (..., A) in words: largest entry, and percent of the range."""
        largest = float(gap.abs().max())
        if self.subject.discrete:
            return f"{largest:.3g} in the values that the argmax is taken of"
        if self.action_range is None:
            return f"{largest:.3g} action units"
        share = float((gap.abs() / self.action_range.to(gap)).max())
        return f"{largest:.3g} action units, {share:.2%} of the range"


@dataclass(frozen=True)
class Report:
    """What an audit found.

    Attributes:
        subject: its name.
        outcomes: of every rule that was asked for, by code.
        seconds: wall time.
        facts: what was found about layers, for the picture.
        saves: whether it is a library's model, which `batchproof fix` can write to a file. A
            module or a run of the lab is fixed in Python only.
    """

    subject: str
    outcomes: dict[str, Outcome]
    seconds: float
    facts: tuple[LayerFacts, ...] = ()
    saves: bool = True

    @property
    def findings(self) -> list[tuple[Rule, Finding]]:
        """Every finding with its rule, failures first."""
        order = {Status.FAIL: 0, Status.REVIEW: 1}
        found = [
            (order[outcome.status], code, finding)
            for code, outcome in self.outcomes.items()
            for finding in outcome.findings
            if outcome.status in order
        ]
        return [(RULES[code], finding) for _, code, finding in sorted(found, key=lambda f: f[:2])]

    @property
    def clean(self) -> bool:
        """Whether no rule failed. What should be reviewed does not fail an audit."""
        return all(outcome.status is not Status.FAIL for outcome in self.outcomes.values())


def _are_numbers(output: Tensor, strict: bool) -> bool:
    """Whether an output (B, K) is finite; -inf beside finite entries passes unless ``strict``."""
    if not output.is_floating_point():
        return True
    finite = torch.isfinite(output)
    if strict or output.ndim < 2:
        return bool(finite.all())
    return bool((finite | (output == -math.inf)).all() and finite.flatten(1).any(1).all())


def select(codes: Iterable[str] | str | None) -> dict[str, Rule]:
    """The rules of the given codes or prefixes (``BP3``), or of a single one; None is all.

    Raises:
        BatchproofError: a code that no rule has.
    """
    rules = all_rules()
    if codes is None:
        return rules
    chosen: dict[str, Rule] = {}
    for code in (codes,) if isinstance(codes, str) else codes:
        matching = {key: value for key, value in rules.items() if key.startswith(code.upper())}
        if not matching or not code.upper().startswith("BP"):
            raise BatchproofError(f"unknown rule {code!r}: see `batchproof rules`")
        chosen |= matching
    return dict(sorted(chosen.items()))


def audit(
    subject: Subject,
    *,
    only: Sequence[str] | str | None = None,
    ignore: Sequence[str] | str = (),
    progress: Callable[[str], None] = lambda code: None,
) -> Report:
    """Run every rule. The subject is bit-identical afterwards, whatever happens.

    Args:
        subject: what to examine.
        only: codes or prefixes (``BP3``) to run, or a single one; None runs all but those on
            request, which are reported as skipped.
        ignore: codes or prefixes to leave out, or a single one.
        progress: told each rule's code before it runs.

    Raises:
        BatchproofError: an unknown code, or a policy that cannot take its observations.
    """
    began = time.perf_counter()
    left_out = select(ignore) if ignore else {}
    rules = {code: rule for code, rule in select(only).items() if code not in left_out}
    # Else every rule would be skipped, and an audit that saw nothing be clean.
    check_runs(subject, sick=True)
    examination = Examination(subject)
    outcomes: dict[str, Outcome] = {}
    with unchanged(subject):
        before = fingerprint(subject)
        for code, one in rules.items():
            progress(code)
            if one.on_request and only is None:
                why = f"runs on request, since it takes seconds: --only {code}"
                outcomes[code] = Outcome(Status.SKIPPED, why, code=code)
            else:
                outcomes[code] = _run(one, examination)
        facts = _facts(examination)
        if fingerprint(subject) != before:
            raise AssertionError("a rule left the subject changed: please report this")
    saves = hasattr(subject.model, "save")
    return Report(subject.name, outcomes, time.perf_counter() - began, facts, saves)


def _facts(examination: Examination) -> tuple[LayerFacts, ...]:
    try:
        return tuple(examination.layers)
    except Exception:  # the policy could not run; every rule has said so
        return ()


def _run(one: Rule, examination: Examination) -> Outcome:
    began = time.perf_counter()
    try:
        with unchanged(examination.subject):
            decidable = examination.is_finite(one.finite)
            outcome = one.check(examination) if decidable else skipped(NOT_FINITE)
    # A policy may do anything; one that a rule cannot run is not an audit that fails.
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        why = f"could not run: {type(error).__name__}: {line}"
        outcome = skipped(why if examination.is_finite() else NOT_FINITE)
    seconds = time.perf_counter() - began
    return Outcome(outcome.status, outcome.reason, outcome.findings, one.code, seconds)
