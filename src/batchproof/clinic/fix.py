"""Fixes: what the audit found, mended in place, measured again, and undone where it was no help.

A fix is **safe** when the outputs as deployed stay as they are; that is measured, and a safe fix
that fails it is rolled back. An **unsafe** fix is there to change outputs or learning, and is
applied only when asked for. See docs/fix.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from batchproof.clinic import probe
from batchproof.clinic.fold import affine_names, fold
from batchproof.clinic.precise import recalibrate
from batchproof.clinic.probe import LayerFacts
from batchproof.clinic.rules import (
    Examination,
    Outcome,
    Report,
    Status,
    all_rules,
    audit,
)
from batchproof.clinic.rules_statistics import initial, sound
from batchproof.clinic.subject import Subject, rows, take, unchanged
from batchproof.clinic.trace import trace
from batchproof.errors import BatchproofError
from batchproof.modes import Slot

PLAN = "TEETE"
"""The plan of set-modes where none can be traced: TD3's, with the critic in `E` in slot 3."""

TARGET_ACTION = "BP308"
"""The rule that needs slot 2 in `E` too."""


@dataclass(frozen=True)
class Fixed:
    """What came of one fix.

    Attributes:
        name: the fix's.
        code: the rule whose finding it was to mend; '' where it was asked for by its own name.
        applied: whether the subject is changed now.
        changed: what it changed, one entry a layer or network.
        reason: why it was not applied, '' where it was.
        before: the rule's measure before: the finding's value over its threshold, the largest one.
        after: the same afterwards, 0 where the rule finds nothing any more.
        gap: largest change of the action as deployed, NaN where it was not tried.
    """

    name: str
    code: str
    applied: bool
    changed: tuple[str, ...] = ()
    reason: str = ""
    before: float = float("nan")
    after: float = float("nan")
    gap: float = float("nan")

    @property
    def fall(self) -> str:
        """How far the measure fell, in words; '' where two numbers do not say it."""
        if not (0 < self.before < math.inf and math.isfinite(self.after)):
            return ""
        return f"measure over its threshold: {self.before:.3g} before, {self.after:.3g} after"


@dataclass(frozen=True)
class Asked:
    """What a fix is asked for.

    Attributes:
        code: the rule whose finding it is to mend; '' where it was asked for by its own name.
        plan: the mode plan to set; None leaves the choice to the fix.
    """

    code: str = ""
    plan: str | None = None


Way = Callable[[Subject, Asked], list[str]]
"""Changes a subject in place and says what it changed."""


@dataclass(frozen=True)
class Fix:
    """One way to mend something.

    Attributes:
        name: as rules give it in ``fix``.
        title: what it does, in one line.
        safe: whether the outputs as deployed stay as they are and learning is not its purpose.
        ways: functions that change the subject in place and say what they changed; the first that
            lowers the measure stays.
    """

    name: str
    title: str
    safe: bool
    ways: tuple[Way, ...]


FIXES: dict[str, Fix] = {}
"""Every fix by name."""


def fix(
    subject: Subject,
    outcomes: Report | Mapping[str, Outcome] | Iterable[Outcome],
    *,
    only: Sequence[str] | str | None = None,
    unsafe: bool = False,
    plan: str | None = None,
) -> list[Fixed]:
    """Mend what an audit found, in place.

    Rules that failed are mended in the order of their codes. Each fix is followed by its own rule:
    where the measure did not fall, everything that the fix changed is put back.

    Args:
        subject: its networks, and its library's model, are changed.
        outcomes: a report, or outcomes of rules.
        only: codes of rules or names of fixes, or a single one. None takes every failure. What is
            only to be reviewed is mended where it is named here, and a fix named here without any
            finding is applied on its own.
        unsafe: apply unsafe fixes too.
        plan: the mode plan of ``set-modes``; None takes the traced one, changed where the rule
            needs it.

    Returns:
        One entry for each fix that was wanted, with what it did or why it did nothing.

    Raises:
        BatchproofError: a name in ``only`` that is neither a code nor a fix.
    """
    only = [only] if isinstance(only, str) else only
    done: list[Fixed] = []
    for code, name in _wanted(_by_code(outcomes), only):
        one = FIXES[name]
        if not one.safe and not unsafe:
            reason = "unsafe: it changes outputs or learning; ask for it with unsafe=True"
            done.append(Fixed(name, code, False, reason=reason))
        else:
            done.append(_try(subject, one, Asked(code, plan)))
    return done


def only_named(
    subject: Subject, outcomes: Report | Mapping[str, Outcome] | Iterable[Outcome]
) -> list[str]:
    """Codes that are to be reviewed and have a fix: it is applied only where they are named."""
    rules = all_rules()
    possible = FIXES.keys() - ({"recalibrate"} if subject.lacks_replay else set())
    return [
        code
        for code, outcome in sorted(_by_code(outcomes).items())
        if outcome.status is Status.REVIEW and outcome.findings and rules[code].fix in possible
    ]


def _by_code(outcomes: Report | Mapping[str, Outcome] | Iterable[Outcome]) -> dict[str, Outcome]:
    if isinstance(outcomes, Report):
        return dict(outcomes.outcomes)
    if isinstance(outcomes, Mapping):
        return dict(outcomes)
    return {outcome.code: outcome for outcome in outcomes}


def _wanted(outcomes: dict[str, Outcome], only: Sequence[str] | None) -> list[tuple[str, str]]:
    """Codes with the names of their fixes; '' as the code for a fix asked for on its own."""
    rules = all_rules()
    named = set(only or ())
    unknown = [n for n in named if n.upper() not in rules and n not in FIXES]
    if unknown:
        raise BatchproofError(
            f"{sorted(unknown)[0]!r} is neither a rule nor a fix: the fixes are {', '.join(FIXES)}"
        )
    codes = {n.upper() for n in named if n not in FIXES}
    wanted: list[tuple[str, str]] = []
    for code, outcome in sorted(outcomes.items()):
        name = rules[code].fix if code in rules else ""
        if name not in FIXES or not outcome.findings:
            continue
        asked = code in codes or name in named
        if asked or (only is None and outcome.status is Status.FAIL):
            wanted.append((code, name))
    found = {name for _, name in wanted}
    return wanted + [("", n) for n in only or () if n in FIXES and n not in found]


def _try(subject: Subject, one: Fix, asked: Asked) -> Fixed:
    code = asked.code
    before = _measure(subject, code)
    if code and before[0] == 0:
        return Fixed(
            one.name, code, False, reason="nothing is found any more", before=0.0, after=0.0
        )
    result = Fixed(one.name, code, False, reason="there is nothing here that it could change")
    deployed: Tensor | None = None
    try:
        deployed = _deployed(subject)
    except BatchproofError as error:
        if one.safe:
            reason = f"the policy does not act, so that nothing shows it is safe: {error}"
            return replace(result, reason=reason, before=before[2])
    for way in one.ways:
        saved = Snapshot(subject)
        try:
            changed = way(subject, asked)
            if changed:
                result = _judged(subject, one, code, changed, before, deployed)
        except BatchproofError as error:
            result = Fixed(one.name, code, False, reason=str(error), before=before[2])
        except Exception as error:
            saved.restore()
            if deployed is not None:  # a policy that acted: what failed is ours
                raise
            reason = f"the policy does not act: {_line(error)}"
            result = Fixed(one.name, code, False, reason=reason, before=before[2])
        except BaseException:
            saved.restore()
            raise
        if result.applied:
            return result
        saved.restore()
    return result


def _judged(
    subject: Subject,
    one: Fix,
    code: str,
    changed: list[str],
    before: tuple[int, int, float],
    deployed: Tensor | None,
) -> Fixed:
    """Whether what a fix changed was any help, and left alone what it must.

    ``deployed`` is the action before; None where the policy did not act before either, which an
    unsafe fix may be there to mend.
    """
    try:
        after = _measure(subject, code)
        action = _deployed(subject)
    except BatchproofError as error:  # it broke the policy
        return Fixed(one.name, code, False, tuple(changed), f"rolled back: {error}", before[2])
    gap = math.nan if deployed is None else probe.difference(action, deployed)
    reason = ""
    if code and not after < before:
        reason = "rolled back: the measure did not fall"
    elif one.safe and deployed is not None and not gap <= _rounding(deployed):
        reason = f"rolled back: it would change the deployed output by {gap:.3g}"
    return Fixed(one.name, code, not reason, tuple(changed), reason, before[2], after[2], gap)


def _measure(subject: Subject, code: str) -> tuple[int, int, float]:
    """How bad a rule finds the subject: its verdict, how many findings, the largest excess."""
    if not code:
        return 0, 0, float("nan")
    outcome = audit(subject, only=[code]).outcomes[code]
    rank = {Status.SKIPPED: 3, Status.FAIL: 2, Status.REVIEW: 1}.get(outcome.status, 0)
    excess = max((_excess(f.value, f.threshold) for f in outcome.findings), default=0.0)
    return rank, len(outcome.findings), excess


def _excess(value: float, threshold: float) -> float:
    """How far a finding's value is on the wrong side of its threshold, as a ratio."""
    if math.isnan(value):
        return math.inf
    if not math.isfinite(threshold) or threshold == 0:
        return abs(value)
    if value == 0:  # too small by any factor
        return math.inf
    ratio = abs(value / threshold)
    return max(ratio, 1 / ratio)


def _deployed(subject: Subject) -> Tensor:
    """The action (B, A) as deployed on up to 64 observations.

    Raises:
        BatchproofError: the policy does not act; what it raises, in one line.
    """
    batch = take(subject.obs, slice(0, min(rows(subject.obs), Examination.BATCH)))
    with unchanged(subject), torch.no_grad():
        try:
            return subject.act(batch).detach().clone()
        except Exception as error:
            raise BatchproofError(_line(error)) from error


def _line(error: Exception) -> str:
    """The first line of what was raised: torch's go on with the whole tensor."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _rounding(action: Tensor) -> float:
    eps = torch.finfo(action.dtype if action.is_floating_point() else torch.float32).eps
    return probe.ROUNDING * eps * max(float(action.double().abs().max()), 1e-30)


class Snapshot:
    """All that a fix may change, and the way back: modules put in another's place included."""

    def __init__(self, subject: Subject) -> None:
        model = subject.model
        owners: list[Any] = [subject, *(module for _, _, module in subject.modules())]
        owners += [] if model is None else [model, getattr(model, "replay_buffer", None)]
        self.owners = [
            (owner, type(owner), dict(vars(owner)))
            for owner in owners
            if hasattr(owner, "__dict__")
        ]
        # A module's own tables of parameters, buffers, children and hooks are changed in place.
        self.tables = [
            (value, value.copy())
            for _, _, attributes in self.owners
            for value in attributes.values()
            if isinstance(value, dict)
        ]
        self.contents = [
            (value, value.detach().clone(), value.requires_grad)
            for _, _, module in subject.modules()
            for holder in (module._parameters, module._buffers)
            for value in holder.values()
            if value is not None
        ]
        self.random = torch.get_rng_state()

    def restore(self) -> None:
        """Put everything back."""
        for owner, kind, attributes in self.owners:
            owner.__class__ = kind
            vars(owner).clear()
            vars(owner).update(attributes)
        for table, items in self.tables:
            table.clear()
            table.update(items)
        for value, content, requires_grad in self.contents:
            if value.dtype == content.dtype and value.shape == content.shape:
                value.data.copy_(content)
            else:
                value.data = content
            value.requires_grad_(requires_grad)
        torch.set_rng_state(self.random)


# ------------------------------------------------------------------------------------- the fixes


def _register(name: str, title: str, safe: bool, *ways: Way) -> None:
    FIXES[name] = Fix(name, title, safe, ways)


def _eval_when_acting(subject: Subject, asked: Asked) -> list[str]:
    with unchanged(subject), torch.no_grad(), probe.recorded(subject.networks) as calls:
        subject.act(take(subject.obs, slice(0, 2)))
    changed = {}
    for call in calls:
        if call.training:
            changed[call.role] = f"{call.role}: eval mode"
            call.module.training = False
    for role in changed:
        subject.networks[role].eval()
    return list(changed.values())


def _eval_targets(subject: Subject, asked: Asked) -> list[str]:
    chosen = subject.plan() if subject.plan is not None else None
    if chosen is not None:
        raise BatchproofError(
            f"the model trains under the mode plan {chosen}, which says how its targets run: "
            'set another one, for example batchproof.sb3.set_modes(model, "TEETE")'
        )
    changed = []
    for target in subject.targets:
        network = subject.networks[target]
        if any(module.training for module in network.modules()):
            network.eval()
            changed.append(f"{target}: eval mode")
    return changed


def _sync_targets(subject: Subject, asked: Asked) -> list[str]:
    changed = []
    for target, online in subject.targets.items():
        source = dict(subject.networks[online].named_buffers())
        for name, buffer in subject.networks[target].named_buffers():
            other = source.get(name)
            if other is not None and other.shape == buffer.shape and not torch.equal(other, buffer):
                buffer.data.copy_(other)
                changed.append(f"{target}.{name}: copied from {online}")
    return changed


def _recalibrate(subject: Subject, asked: Asked) -> list[str]:
    # Statistics that never moved or are NaN are worth nothing: for them any states are better.
    if asked.code in ("BP401", "BP404") and subject.lacks_replay:
        found = recalibrate(subject, subject.obs, where=lambda one: initial(one) or not sound(one))
    else:
        found = recalibrate(subject)
    return [str(done) for done in found]


def _fold(subject: Subject, asked: Asked) -> list[str]:
    # A library that loads by building the networks anew needs the names of the state to stay.
    return [str(done) for done in fold(subject, keep_layers=subject.model is not None)]


def _cured(subject: Subject, code: str) -> str:
    """The plan that the model trains under, changed where the rule needs it.

    That is slot 3, the critic in the actor's loss, in `E`. Where target actions are at fault it is
    slot 2 and acting, and slot 3 only if it is in `T`, in which no plan may leave it.
    """
    traced = trace(subject).plan if subject.update is not None else ""
    if len(traced) != 5:
        return PLAN
    letters = list(traced)  # of slots 1 to 5
    chosen = (subject.plan() or "") if subject.plan is not None else ""
    acting = chosen[0] if len(chosen) == 6 else ""
    if code == TARGET_ACTION:
        acting = ""
        letters[Slot.TARGET_ACTION - 1] = "E"
    if code != TARGET_ACTION or letters[Slot.POLICY_Q - 1] in "Tt":
        letters[Slot.POLICY_Q - 1] = "E"
    return acting + "".join(letters)


def _set_modes(subject: Subject, asked: Asked) -> list[str]:
    if not type(subject.model).__module__.startswith(
        ("stable_baselines3.", "sb3_contrib.")
    ) and not any(
        base.__module__.startswith("stable_baselines3.") for base in type(subject.model).__mro__
    ):
        return []
    from batchproof.sb3.modes import set_modes

    plan = asked.plan or _cured(subject, asked.code)
    set_modes(subject.model, plan)
    return [f"the model trains under the mode plan {plan}"]


def _replace_by(kind: str) -> Way:
    def way(subject: Subject, asked: Asked) -> list[str]:
        return _edit(subject, kind, [f for f in _running(subject) if f.couples_train])

    return way


def _freeze(subject: Subject, asked: Asked) -> list[str]:
    return _edit(subject, "frozen", [f for f in _running(subject) if f.moves_train or f.moves_eval])


def _running(subject: Subject) -> list[LayerFacts]:
    return [layer for layer in Examination(subject).layers if layer.running]


# ------------------------------------------------------------- layers that take another's place


KINDS = ("renorm", "layer", "group", "frozen")


@dataclass(frozen=True)
class Edit:
    """One layer put in another's place; kept so that a network built anew can be given it too.

    Attributes:
        path: the old layer's, from the root that the library builds.
        kind: one of `KINDS`.
        old: its class, by module and name.
        mean: its buffer of means.
        var: its buffer of variances, '' for none.
        scale: its scale, '' for none.
        shift: its shift, '' for none.
        momentum: weight of the new batch.
        maps: whether it normalizes feature maps (B, C, H, W).
    """

    path: str
    kind: str
    old: str
    mean: str
    var: str
    scale: str
    shift: str
    momentum: float
    maps: bool

    def to_plain(self) -> dict[str, Any]:
        """As JSON can say it: without NaN."""
        return asdict(self) | {"momentum": None if math.isnan(self.momentum) else self.momentum}

    @classmethod
    def from_plain(cls, plain: Any) -> Edit:
        """The way back.

        Raises:
            ValueError: something that `to_plain` does not give.
        """
        names = {each.name for each in fields(cls)}
        if not isinstance(plain, dict) or set(plain) != names or plain["kind"] not in KINDS:
            raise ValueError("no edit of a layer")
        momentum = math.nan if plain["momentum"] is None else plain["momentum"]
        words = [plain[name] for name in names - {"momentum", "maps"}]
        if (
            not all(isinstance(word, str) and len(word) <= 1000 for word in words)
            or type(momentum) not in (int, float)
            or type(plain["maps"]) is not bool
        ):
            raise ValueError("no edit of a layer")
        return cls(**plain | {"momentum": float(momentum)})

    def apply(self, root: nn.Module) -> bool:
        """Edit the layer at this path, or at an end of it, below ``root``; whether there is one."""
        parts = self.path.split(".")
        for start in range(len(parts)):
            *above, name = parts[start:]
            try:
                parent = root.get_submodule(".".join(above))
            except AttributeError:
                continue
            layer = parent._modules.get(name)
            if layer is not None and _class_name(layer) == self.old:
                parent._modules[name] = self.made_from(layer)
                return True
        return False

    def made_from(self, layer: nn.Module) -> nn.Module:
        """The new layer. Scale and shift are the old one's, so that optimizers still hold them."""
        if self.kind == "frozen":
            layer.__class__ = _frozen_class(type(layer))  # type: ignore[arg-type]
            return layer
        mean: Tensor = getattr(layer, self.mean)
        scale: nn.Parameter | None = getattr(layer, self.scale) if self.scale else None
        shift: nn.Parameter | None = getattr(layer, self.shift) if self.shift else None
        features, affine = mean.numel(), scale is not None
        new: nn.Module
        if self.kind == "renorm":
            from batchproof.layers import create_norm

            given = {} if math.isnan(self.momentum) else {"momentum": self.momentum}
            dims = 2 if self.maps else 1
            new = create_norm("renorm", features, dims=dims, affine=affine, **given)
            for name, buffer in (("running_mean", self.mean), ("running_var", self.var)):
                if buffer:
                    getattr(new, name).data.copy_(getattr(layer, buffer))
            if hasattr(layer, "eps"):
                new.eps = layer.eps
        elif self.kind == "group" or self.maps:
            # At least 8 features a group: fewer would leave little more than signs.
            sizes = [g for g in (32, 16, 8, 4, 2) if features % g == 0 and features // g >= 8]
            groups = sizes[0] if self.kind == "group" and sizes else 1
            new = nn.GroupNorm(groups, features, affine=affine)
        else:
            new = nn.LayerNorm(features, elementwise_affine=affine)
        if scale is not None:
            new.weight = scale
        if shift is not None:
            new.bias = shift
        new.to(device=mean.device, dtype=mean.dtype)
        return new.train(layer.training)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _edit(subject: Subject, kind: str, layers: list[LayerFacts]) -> list[str]:
    """Edit these layers, and those of the same class that no forward pass reached."""
    changed: list[str] = []
    edits: list[Edit] = []
    inside = {id(module): path for path, module in _library_modules(subject)}
    kinds: dict[str, Edit] = {}
    for layer in layers:
        scale, shift = affine_names(layer)
        x = next(v for v in layer.call.inputs if isinstance(v, Tensor))
        kinds[_class_name(layer.call.module)] = Edit(
            path="",
            kind=kind,
            old=_class_name(layer.call.module),
            mean=layer.mean_buffer,
            var=layer.var_buffer,
            scale=scale,
            shift=shift,
            momentum=layer.momentum,
            maps=x.ndim > 2,
        )
    # A network that is nothing but the layer has no place to put another into: it has no path.
    for role, path, old in [m for m in subject.modules() if m[1] and _class_name(m[2]) in kinds]:
        edit = replace(kinds[_class_name(old)], path=inside.get(id(old), path))
        new = edit.made_from(old)
        for _, _, parent in list(subject.modules()):
            for name, child in list(parent.named_children()):
                if child is old:
                    setattr(parent, name, new)
        edits.append(edit)
        what = "statistics frozen" if kind == "frozen" else f"replaced by {type(new).__name__}"
        changed.append(f"{role}.{path}: {what}")
    if edits and hasattr(subject.model, "policy_class"):
        subject.model.policy_class = rebuilding(subject.model.policy_class, edits)
    return changed


def _library_modules(subject: Subject) -> list[tuple[str, nn.Module]]:
    policy = getattr(subject.model, "policy", None)
    return list(policy.named_modules()) if isinstance(policy, nn.Module) else []


class Edited:
    """A Stable-Baselines3 policy that edits its networks before it makes their optimizers.

    Comes before the policy's own class. ``load`` builds the policy anew and then reads its weights,
    so the class must know the layers. It holds nothing but plain values, which the library's
    ``save`` writes as readable JSON too: `batchproof.sb3.loading` unpickles nothing.
    """

    batchproof_policy = ""
    batchproof_edits: tuple[dict[str, Any], ...] | list[dict[str, Any]] = ()

    def make_features_extractor(self) -> Any:
        """The policy's own, edited."""
        return self._edited(super().make_features_extractor())  # type: ignore[misc]

    def make_actor(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's own, edited."""
        return self._edited(super().make_actor(*args, **kwargs))  # type: ignore[misc]

    def make_critic(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's own, edited."""
        return self._edited(super().make_critic(*args, **kwargs))  # type: ignore[misc]

    def make_q_net(self) -> Any:
        """The policy's own, edited."""
        return self._edited(super().make_q_net())  # type: ignore[misc]

    def make_quantile_net(self) -> Any:
        """The policy's own, edited."""
        return self._edited(super().make_quantile_net())  # type: ignore[misc]

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()  # type: ignore[misc]
        self._edited(self.mlp_extractor)  # type: ignore[attr-defined]

    def _edited(self, root: nn.Module) -> nn.Module:
        return apply_all(root, [Edit.from_plain(edit) for edit in self.batchproof_edits])


def rebuilding(policy_class: Any, edits: Iterable[Edit]) -> Any:
    """The policy class with edits, after those that it has already."""
    plain = [edit.to_plain() for edit in edits]
    if "batchproof_edits" in vars(policy_class):
        plain = [*policy_class.batchproof_edits, *plain]
        policy_class = policy_class.__bases__[1]
    known = {
        "batchproof_policy": f"{policy_class.__module__}.{policy_class.__qualname__}",
        "batchproof_edits": plain,
        "__module__": __name__,
    }
    return type(policy_class.__name__, (Edited, policy_class), known)


def apply_all(root: nn.Module, edits: Iterable[Edit]) -> nn.Module:
    """The network with every edit that finds its layer applied."""
    for edit in edits:
        edit.apply(root)
    return root


class Frozen:
    """A layer whose buffers are after every pass what they were before; comes before its class."""

    plain: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward."""
        module: nn.Module = self  # type: ignore[assignment]
        held = {
            name: (value, value.detach().clone())
            for name, value in module._buffers.items()
            if value is not None
        }
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for name, (value, content) in held.items():
                module._buffers[name] = value
                # Through .data: two forwards before one backward must stay legal.
                value.data.copy_(content)

    def __reduce__(self) -> tuple[Any, ...]:
        return _frozen_instance, (self.plain,), self.__dict__


@cache
def _frozen_class(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Frozen{plain.__name__}", (Frozen, plain), {"plain": plain})


def _frozen_instance(plain: type[nn.Module]) -> nn.Module:
    kind = _frozen_class(plain)  # type: ignore[arg-type]
    return kind.__new__(kind)


_register("restore-eval", "the networks that act are put in eval mode", False, _eval_when_acting)
_register("eval-when-acting", "the same as restore-eval", False, _eval_when_acting)
_register("eval-targets", "target networks are put in eval mode", False, _eval_targets)
_register("sync-targets", "every buffer of a target is copied from online", False, _sync_targets)
_register("recalibrate", "running statistics computed anew (PreciseBN)", False, _recalibrate)
_register(
    "replace-batch-norm",
    "Batch Renorm in place of batch norm, LayerNorm where that does not help",
    False,
    _replace_by("renorm"),
    _replace_by("layer"),
)
_register("replace-by-renorm", "Batch Renorm in place of batch norm", False, _replace_by("renorm"))
_register("replace-by-layer-norm", "LayerNorm in place of batch norm", False, _replace_by("layer"))
_register("replace-by-group-norm", "GroupNorm in place of batch norm", False, _replace_by("group"))
_register("freeze-statistics", "running statistics no longer move", False, _freeze)
_register("fold-batch-norm", "batch norm folded into the layer before it, with proof", True, _fold)
_register("set-modes", "the model trains under a mode plan", False, _set_modes)
