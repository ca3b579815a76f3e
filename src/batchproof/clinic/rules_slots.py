"""BP3xx, online vs target and the five slots: what each pass of an update normalizes with.

Where the subject has an ``update`` the modes are those that a real update ran (`trace`). Elsewhere
they are those of the networks as they were handed over, and a finding says so.

Shapes: ``B`` rows of one batch, ``A`` action, ``C`` critics, ``F`` features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from batchproof.clinic import measures, probe
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
    skipped,
)
from batchproof.clinic.rules_statistics import (
    at,
    in_return_units,
    part_of,
    reward_scale,
    several,
    train_batch,
)
from batchproof.clinic.subject import Obs, Subject, join, rows, take, training_mode
from batchproof.modes import Plan, Slot

NO_TARGETS = "no target network whose online network is known"
BY_BATCH = "TtSs"  # the pass's own batch, in letters of a plan


def slot_name(slot: Slot) -> str:
    """A slot as reports print it: ``slot 3 policy_q``."""
    return f"slot {int(slot)} {slot.name.lower()}"


def plan_of(exam: Examination) -> str:
    """The plan of a traced update; without an update the one that was chosen; '' where neither."""
    subject = exam.subject
    if subject.update is not None:
        return exam.trace.plan
    return (subject.plan() or "") if subject.plan is not None else ""


def letter(exam: Examination, slot: Slot) -> str:
    """The mode of a slot in `plan_of`, '' where there is no plan."""
    plan = plan_of(exam)
    return plan[-5:][int(slot) - 1] if plan else ""


def of_targets(exam: Examination) -> dict[str, list[LayerFacts]]:
    """Layers with running statistics that each target network and its online network have."""
    found: dict[str, list[LayerFacts]] = {}
    for target, online in exam.subject.targets.items():
        by_path = {f.path: f for f in exam.layers if f.role in (target, online) and f.running}
        paths = dict(exam.subject.networks[target].named_modules())
        found[target] = [f for path, f in by_path.items() if path in paths]
    return found


def statistics_of(network: nn.Module, layer: LayerFacts) -> dict[str, Tensor]:
    """A layer's running statistics in another network of the same build, by buffer name.

    Counters are left out: no output in eval mode depends on them.
    """
    module = network.get_submodule(layer.path)
    own = dict(module.named_buffers(recurse=False))
    names = {layer.mean_buffer, layer.var_buffer, *layer.moves_train} - {""}
    return {k: own[k] for k in sorted(names) if k in own and own[k].is_floating_point()}


# --------------------------------------------------------------------------- BP301 and BP302


@dataclass(frozen=True)
class Followed:
    """Which running statistics of a target network follow those of the online network.

    Attributes:
        weights: whether the target's weights moved.
        yes: layer and buffer of those that follow, ``qf0.1.running_mean``.
        no: of those that do not.
        how: how this was found.
    """

    weights: bool
    yes: list[str]
    no: list[str]
    how: str


_FOLLOWED: WeakKeyDictionary[Examination, dict[str, Followed]] = WeakKeyDictionary()


def followed(exam: Examination) -> dict[str, Followed]:
    """By target network; found once for both rules."""
    if exam not in _FOLLOWED:
        static = _followed_so_far(exam)
        # Statistics that moved and are bit-identical in both were copied: no update need show it.
        told = exam.subject.update is None or _equal_as_they_stand(exam)
        update = {} if told else _followed_in_update(exam)
        _FOLLOWED[exam] = static | {k: v for k, v in update.items() if v.weights}
    return _FOLLOWED[exam]


def _followed_so_far(exam: Examination) -> dict[str, Followed]:
    """By what the buffers hold: at their initial values while the online network's moved."""
    networks, targets = exam.subject.networks, exam.subject.targets
    result = {}
    for target, layers in of_targets(exam).items():
        yes: list[str] = []
        no: list[str] = []
        for layer in layers:
            ours = statistics_of(networks[targets[target]], layer)
            for name, value in statistics_of(networks[target], layer).items():
                if name not in ours or _constant(ours[name]):
                    continue  # nothing to follow yet
                (no if _constant(value) else yes).append(f"{layer.path}.{name}".lstrip("."))
        result[target] = Followed(bool(yes or no), yes, no, "as they stand")
    return result


def _equal_as_they_stand(exam: Examination) -> bool:
    """Whether every target's statistics moved and equal the online network's, bit for bit."""
    networks, targets = exam.subject.networks, exam.subject.targets
    pairs = [
        (value, statistics_of(networks[targets[target]], layer).get(name))
        for target, layers in of_targets(exam).items()
        for layer in layers
        for name, value in statistics_of(networks[target], layer).items()
    ]
    return bool(pairs) and all(
        ours is not None and torch.equal(value, ours) and not _constant(value)
        for value, ours in pairs
    )


def _constant(value: Tensor) -> bool:
    """Whether a statistic still has an initial value: all 0 or all 1."""
    return bool((value == 0).all()) or bool((value == 1).all())


def _followed_in_update(exam: Examination) -> dict[str, Followed]:
    """By one real update, before which every running statistic of the targets is put off."""
    from batchproof.clinic.handback import handed_back

    subject = exam.subject
    networks = subject.networks
    layers = of_targets(exam)
    assert subject.update is not None
    result = {}
    with handed_back(subject):
        before: dict[str, dict[str, Tensor]] = {}
        weights = {}
        for target, found in layers.items():
            weights[target] = [p.detach().clone() for p in networks[target].parameters()]
            before[target] = {}
            for layer in found:
                for name, value in statistics_of(networks[target], layer).items():
                    # Each feature by another amount, so that only the online values explain a
                    # move towards them.
                    off = torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape).to(value)
                    value.data.mul_(1.5).add_(off)
                    before[target][f"{layer.path}.{name}"] = value.detach().clone()
        with torch.enable_grad():
            subject.update()
        for target, found in layers.items():
            online = networks[subject.targets[target]]
            yes: list[str] = []
            no: list[str] = []
            for layer in found:
                ours = statistics_of(online, layer)
                for name, value in statistics_of(networks[target], layer).items():
                    full = f"{layer.path}.{name}"
                    moved = name in ours and _towards(before[target][full], value, ours[name])
                    (yes if moved else no).append(full.lstrip("."))
            pairs = zip(weights[target], networks[target].parameters(), strict=True)
            moved_weights = any(not torch.equal(a, b) for a, b in pairs)
            result[target] = Followed(moved_weights, yes, no, "in one real update")
    return result


def _towards(old: Tensor, new: Tensor, goal: Tensor) -> bool:
    """Whether one number rho > 0 gives new = old + rho (goal - old) for every feature."""
    old, new, goal = old.double(), new.double(), goal.double()
    gap, step = goal - old, new - old
    square = float((gap * gap).sum())
    rho = float((gap * step).sum()) / square if square > 0 else 0.0
    rounding = 1e-5 * float(old.abs().max())
    left = float((step - rho * gap).abs().max())
    return rho > 0 and left <= 1e-2 * float(step.abs().max()) + rounding


def _unsynced(exam: Examination, in_part: bool) -> Outcome:
    if not exam.subject.targets:
        return not_applicable(NO_TARGETS)
    if not any(of_targets(exam).values()):
        return not_applicable("no layer of the target networks keeps running statistics")
    findings = []
    seen = False
    for target, found in followed(exam).items():
        seen = seen or bool(found.yes or found.no)
        if not found.no or bool(found.yes) is not in_part:
            continue
        online = exam.subject.targets[target]
        layers = {name.rpartition(".")[0] for name in found.no}
        first = next(f for f in of_targets(exam)[target] if f.path in layers)
        largest = _farthest(exam, target, layers) or first.path
        if in_part:
            message = (
                f"{several(found.no)} of {target} do not follow {online}, while "
                f"{several(found.yes)} do ({found.how})"
            )
        else:
            message = (
                f"the running statistics of {target} ({several(found.no)}) never receive those of "
                f"{online} ({found.how})"
            )
        findings.append(
            Finding(
                message,
                target,
                first.path or target,
                largest or target,
                site=_slot_of(target),
                value=float(len(found.no)),
                floor=0.0,
                threshold=0.0,
                effect=_sync_effect(exam, target),
            )
        )
    if findings:
        return failed(*findings)
    return passed() if seen else not_applicable("no running statistic has moved yet")


def _slot_of(target: str) -> str:
    return slot_name(Slot.TARGET_ACTION if target.startswith("actor") else Slot.TARGET_Q)


def _farthest(exam: Examination, target: str, paths: set[str]) -> str:
    """The layer whose mean in the target is farthest from the online network's."""
    networks = exam.subject.networks
    best, name = -1.0, ""
    for layer in of_targets(exam)[target]:
        if layer.path not in paths:
            continue
        theirs = statistics_of(networks[target], layer)
        ours = statistics_of(networks[exam.subject.targets[target]], layer)
        gaps = [float((theirs[k] - ours[k]).abs().max()) for k in theirs if k in ours]
        if gaps and max(gaps) > best:
            best, name = max(gaps), layer.path
    return name


def _sync_effect(exam: Examination, target: str) -> str:
    """What copying all running statistics into a target would change."""
    subject = exam.subject
    data = subject.transitions
    if data is None:
        return ""
    kept = part_of(data.obs)
    obs, action = take(data.next_obs, kept), data.action[kept]
    if target.startswith("actor") and subject.target_actor is not None:
        actor = subject.target_actor

        def run() -> Tensor:
            return actor(obs)

    elif not target.startswith("actor") and subject.target_critic is not None:
        critic = subject.target_critic

        def run() -> Tensor:
            return subject.gamma * critic(obs, action)

    else:
        return ""
    networks = subject.networks
    with training_mode(subject, False), torch.no_grad():
        before = run()
        saved = []
        for layer in of_targets(exam)[target]:
            ours = statistics_of(networks[subject.targets[target]], layer)
            for name, value in statistics_of(networks[target], layer).items():
                saved.append((value, value.detach().clone()))
                value.data.copy_(ours[name])
        after = run()
        for value, content in saved:
            value.data.copy_(content)
    gap = (after - before).abs()
    if target.startswith("actor"):
        return f"synced, the target action moves by up to {float(gap.max()):.3g} (critic's units)"
    return "synced, the TD target moves by " + in_return_units(exam, float(gap.mean()))


@rule(
    "BP301",
    "target-statistics-never-synced",
    "running statistics of a target network never follow the online network's",
    what="Checks that target networks receive running statistics, not only weights.",
    detected=(
        "With an update: every running statistic s of the target is put off to 1.5 s + c, one real "
        "update is run and undone, the target's weights moved, and no statistic went towards the "
        "online one (s' = s + rho (s_online - s), residual below 1%). Without: all statistics of "
        "the target are 0 or 1 throughout while the online network's have moved. Statistics that "
        "have moved and are bit-identical in both were synced, and no update is run."
    ),
    why=(
        "The target's weights assume inputs that were normalized; with its initial statistics it "
        "values next states by another function, and the TD target is wrong from the first step."
    ),
    mend=(
        "Copy every buffer in the target update: `for t, o in zip(target.buffers(), "
        "online.buffers()): t.copy_(o)`."
    ),
    fix="sync-targets",
    safe=False,
    references=(
        "https://github.com/DLR-RM/stable-baselines3/issues/996",
        "https://github.com/Stable-Baselines-Team/stable-baselines3-contrib/issues/99",
    ),
)
def never_synced(exam: Examination) -> Outcome:
    """BP301."""
    return _unsynced(exam, in_part=False)


@rule(
    "BP302",
    "target-statistics-synced-in-part",
    "some running statistics of a target network follow, others do not",
    what="Finds target updates that choose buffers by name and miss some.",
    detected=(
        "As BP301, buffer by buffer: at least one follows and at least one does not. Counters are "
        "left out."
    ),
    why=(
        "Libraries copy buffers whose name contains a known word: Stable-Baselines3 takes "
        "`running_`. A layer that calls its statistics otherwise (`ra_mean`) stays at its initial "
        "ones in the target."
    ),
    mend="Copy every buffer, or name the statistics as the library expects (`running_mean`).",
    fix="sync-targets",
    safe=False,
    references=(
        "https://github.com/DLR-RM/stable-baselines3/issues/996",
        "https://github.com/Stable-Baselines-Team/stable-baselines3-contrib/issues/99",
    ),
)
def synced_in_part(exam: Examination) -> Outcome:
    """BP302."""
    return _unsynced(exam, in_part=True)


# ---------------------------------------------------------------------------------------- BP303


@rule(
    "BP303",
    "target-in-train-mode",
    "a target network normalizes with the batch's statistics",
    what="Finds target networks whose pass uses the statistics of its own batch.",
    detected=(
        "With an update: a layer of a target network ran in mode T or S (slot 2 or 5). A joint "
        "pass J is meant and is left alone. Without: a layer of a target network is in train mode "
        "and couples rows there; of a run of the lab its plan says it. Review where a mode plan "
        "asks for it (`set_modes`, `--modes`): then it is meant."
    ),
    why=(
        "The TD target of one transition then depends on the others of the batch, the target's "
        "statistics drift on their own, and a target critic in T values the behaviour policy, not "
        "the learned one (the mean over the batch is subtracted). It can still be the better of "
        "two evils: in E the target's statistics lag behind weights that move fast. On Pendulum "
        "plans with T in slot 5 (TEETT, TTETT) learned better than those with E."
    ),
    mend=(
        "Call `.eval()` on the target networks once they are built, or run slots 4 and 5 jointly. "
        "Where a plan was chosen with T there, compare it on your task with the plan that has E; "
        "there is nothing else to mend."
    ),
    fix="eval-targets",
    safe=False,
    references=("https://arxiv.org/abs/1902.05605", "https://arxiv.org/abs/2509.23750"),
)
def target_in_train(exam: Examination) -> Outcome:
    """BP303."""
    targets = exam.subject.targets
    if not targets:
        return not_applicable(NO_TARGETS)
    layers = [f for f in exam.layers if f.role in targets and f.couples_train]
    if not layers:
        return not_applicable("no layer of a target network uses a batch's statistics")
    findings = []
    doubtful = False
    for target in targets:
        own = [f for f in layers if f.role == target]
        slot = Slot.TARGET_ACTION if target.startswith("actor") else Slot.TARGET_Q
        if exam.subject.update is None and letter(exam, slot):
            wrong = own if letter(exam, slot) in BY_BATCH else []
            how, site = "in training", slot_name(slot)
        elif exam.subject.update is None:
            wrong = [f for f in own if f.call.module.training]
            how, site = "as it was handed over", _slot_of(target)
        else:
            hit = [c for c in exam.trace.calls if c.network == target and c.mode in BY_BATCH]
            wrong = [f for f in own if f.path in {c.layer for c in hit}]
            how = "in one real update"
            site = f"slot {hit[0].label}" if hit else ""
        if not wrong:
            continue
        meant = _chosen(exam, slot)
        doubtful |= not meant
        gap = max(f.mode_gap for f in wrong)
        worst = max(wrong, key=lambda f: f.mode_gap)
        findings.append(
            Finding(
                f"{target} normalizes with the statistics of its own batch {how}{meant}: "
                f"{several([f.name for f in wrong])}",
                target,
                wrong[0].path or target,
                worst.path or target,
                site=site,
                value=gap,
                threshold=0.0,
                effect=_target_mode_effect(exam, target),
            )
        )
    if not findings:
        return passed()
    return failed(*findings) if doubtful else review(*findings)


def _chosen(exam: Examination, slot: Slot) -> str:
    """What to add to a finding about a slot that a plan runs by the batch; '' where none does."""
    chosen = exam.subject.plan() if exam.subject.plan is not None else None
    if chosen is None or Plan.parse(chosen)[slot].kind not in "TS":
        return ""
    return f", as its mode plan {chosen} asks"


def _target_mode_effect(exam: Examination, target: str) -> str:
    subject = exam.subject
    data = subject.transitions
    if data is None:
        return ""
    kept = part_of(data.obs)
    obs, action = take(data.next_obs, kept), data.action[kept]
    values = []
    for training in (True, False):
        with training_mode(subject, training), torch.no_grad():
            if target.startswith("actor") and subject.target_actor is not None:
                values.append(subject.target_actor(obs))
            elif not target.startswith("actor") and subject.target_critic is not None:
                values.append(subject.gamma * subject.target_critic(obs, action))
    if len(values) < 2:
        return ""
    gap = (values[0] - values[1]).abs()
    if target.startswith("actor"):
        return f"the target action differs from eval mode's by up to {float(gap.max()):.3g}"
    return "the TD target differs from eval mode's by " + in_return_units(exam, float(gap.mean()))


# ---------------------------------------------------------------------------------------- BP304

NO_COMMON_MODE = 1e-9  # of kappa in float64, where rounding is near 1e-15


@rule(
    "BP304",
    "critic-blind-to-common-shift",
    "the critic cannot show the actor a common shift of the action",
    what=(
        "Measures the part of the actor's gradient that moves all actions of a batch alike, with "
        "the critic as the actor's loss runs it (slot 3) and in eval mode."
    ),
    detected=(
        "kappa = |sum_i dQbar/da_i| / sum_i |dQbar/da_i|, averaged over action dimensions, in "
        "float64, at pi(s) + 0.1 n with normal n (at equal actions it is 0/0). A failure where "
        "kappa <= 1e-9, slot 3 of a real update, or of the plan of a run of the lab, is T, and "
        "there is a gradient in eval mode; review where neither is known. Passed for E, S and M in "
        "slot 3."
    ),
    why=(
        "Batch norm in train mode subtracts the batch's mean: if every action moves by the same "
        "amount, no normalized value changes, so sum_i dQ/da_i = 0 whatever the rewards are. The "
        "actor learns differences between states but not the level of its action; with a constant "
        "state it learns nothing. Batch Renorm does not help: it corrects values, not this "
        "gradient."
    ),
    mend=(
        "Run the critic with running statistics in the actor's loss: `batchproof.sb3.set_modes("
        'model, "TEETE")` for TD3, the traced plan with E in slot 3. In the lab: `--modes TEETE`. '
        "In your own loop: `critic.eval()` around the actor's loss."
    ),
    fix="set-modes",
    safe=False,
    references=(
        "https://github.com/DLR-RM/stable-baselines3/issues/553",
        "https://arxiv.org/abs/2509.23750",
        "https://arxiv.org/abs/1502.03167",
    ),
)
def blind_critic(exam: Examination) -> Outcome:
    """BP304."""
    subject = exam.subject
    if subject.critic is None or subject.discrete:
        return not_applicable("no critic of continuous actions")
    if subject.critic_actor is None and subject.transitions is None:
        return skipped("no actor and no transitions to take actions from")
    layers = _critic_layers(exam)
    if not any(f.couples_train for f in layers):
        return not_applicable("no layer of the critic uses a batch's statistics")
    mode = letter(exam, Slot.POLICY_Q)
    traced = [
        call
        for call in (exam.trace.calls if subject.update is not None else ())
        if int(Slot.POLICY_Q) in call.slots
    ]
    by_batch = [c for c in traced if c.mode in "Tt"]
    if traced and not by_batch:
        used = ", ".join(dict.fromkeys(c.mode for c in traced))
        return passed(f"slot 3 runs in mode {used}")
    if not traced and mode and mode not in "Tt":
        return passed(f"slot 3 runs in mode {mode}")
    obs, action = _policy_batch(exam)
    only_first = _first_critic_alone(exam)
    blind = _shown(subject, obs, action, True, only_first)
    seeing = _shown(subject, obs, action, False, only_first)
    if seeing.total == 0:
        return not_applicable("the critic's value does not depend on the action")
    if blind.kappa > NO_COMMON_MODE:
        return passed(f"kappa {blind.kappa:.2g} in train mode")
    paths = [c.layer for c in by_batch] or [f.path for f in layers if f.couples_train]
    candidates = [f for f in layers if f.path in paths and f.couples_train] or layers
    first = _first_after_action(subject, candidates, obs, action)
    plan = plan_of(exam)
    cure = plan[:-3] + "E" + plan[-2:] if plan else "TEETE"
    certain = bool(by_batch) or (subject.update is None and bool(mode))
    scale = reward_scale(subject)
    share = f" ({seeing.slope / scale:.0%} of the reward scale)" if scale > 0 else ""
    if certain:
        where = f"{slot_name(Slot.POLICY_Q)}, the critic on (s, pi(s)) in the actor's loss,"
        doubt = ""
    else:
        where = f"in train mode {slot_name(Slot.POLICY_Q)}, the critic on (s, pi(s)),"
        doubt = " if your actor's loss runs the critic in train mode"
    message = (
        f"the critic cannot show the actor a common shift of the action{doubt}: {where} "
        f"normalizes with the batch's statistics at {first.name}, which subtracts it; "
        + (
            f'batchproof.sb3.set_modes(model, "{cure}") cures it'
            if subject.model is not None
            else f"train it with the mode plan {cure}"
            if plan
            else "run the critic in eval mode there"
        )
    )
    finding = at(
        first,
        message,
        site=slot_name(Slot.POLICY_Q),
        value=blind.kappa,
        floor=NO_COMMON_MODE,
        threshold=NO_COMMON_MODE,
        effect=(
            f"lost gradient: a shift of all actions by 1 changes Q by {seeing.slope:.3g}{share} "
            f"with running statistics (kappa {seeing.kappa:.2g}), and the actor is shown "
            f"{blind.slope:.1g}"
        ),
    )
    return failed(finding) if certain else review(finding)


def critic_roles(exam: Examination) -> set[str]:
    """Networks that are neither targets nor acting."""
    subject = exam.subject
    return {r for r in subject.networks if r not in subject.targets} - set(exam.acting_roles)


def _critic_layers(exam: Examination) -> list[LayerFacts]:
    """Layers that the critic's pass reaches, found on a pass of its own without transitions."""
    subject = exam.subject
    if subject.transitions is not None:
        roles = critic_roles(exam)
        return [f for f in exam.layers if f.role in roles and f.normalizes]
    obs, action = _policy_batch(exam)
    assert subject.critic is not None
    with training_mode(subject, False), torch.no_grad(), probe.recorded(subject.networks) as calls:
        subject.critic(obs, action)
    return [f for f in probe.layer_facts(calls) if f.normalizes and f.role not in subject.targets]


def _policy_batch(exam: Examination) -> tuple[Obs, Tensor]:
    """Observations of one batch and actions that differ: the policy's with a jitter."""
    subject = exam.subject
    data = subject.transitions
    source = subject.obs if data is None else data.obs
    obs = take(source, slice(0, min(rows(source), exam.BATCH)))
    if subject.critic_actor is not None:
        with training_mode(subject, False), torch.no_grad():
            action = subject.critic_actor(obs)
    else:
        assert data is not None
        action = data.action[: rows(obs)]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(action.shape, generator=generator).to(action)
    return obs, action.detach() + measures.JITTER * noise


@dataclass(frozen=True)
class _Shown:
    """What the critic shows the actor: kappa, the common slope's size, and the whole gradient."""

    kappa: float
    slope: float
    total: float


def _shown(subject: Subject, obs: Obs, action: Tensor, training: bool, only_first: bool) -> _Shown:
    critic = subject.critic
    assert critic is not None

    def q(a: Tensor) -> Tensor:
        values = critic(obs, a)
        return values[0] if only_first else values.min(0).values

    with training_mode(subject, training), probe.in_float64(subject):
        action = action.double()
        gradient = measures.action_gradient(q, action)
        return _Shown(
            measures.kappa(q, action),
            float(gradient.sum(0).abs().mean()),
            float(gradient.abs().sum()),
        )


def _first_critic_alone(exam: Examination) -> bool:
    """Whether slot 3 runs fewer layers than slot 4: TD3 asks only its first critic there."""
    if exam.subject.update is None:
        return False
    at_slot = {
        slot: {(c.network, c.layer) for c in exam.trace.calls if int(slot) in c.slots}
        for slot in (Slot.POLICY_Q, Slot.REPLAY_Q)
    }
    return at_slot[Slot.POLICY_Q] < at_slot[Slot.REPLAY_Q]


def _first_after_action(
    subject: Subject, layers: Sequence[LayerFacts], obs: Obs, action: Tensor
) -> LayerFacts:
    """The first of these layers whose input the action reaches."""
    critic = subject.critic
    assert critic is not None
    with training_mode(subject, False):
        here = measures.inputs_of(layers, lambda: critic(obs, action))
        there = measures.inputs_of(layers, lambda: critic(obs, action + 0.5))
    for layer in layers:
        if layer.name in here and not torch.equal(here[layer.name], there[layer.name]):
            return layer
    return layers[0]


# ------------------------------------------------------------------------ passes of slots 2 to 5

BIAS = 0.1  # of the reward scale


class _Slots:
    """The passes of slots 2, 4 and 5 on the subject's transitions, in the modes of its update.

    Attributes:
        modes: letter by slot.
        assumed: whether they are the modes as handed over, not those of a traced update.
    """

    def __init__(self, exam: Examination) -> None:
        subject = exam.subject
        assert subject.transitions is not None
        assert subject.critic is not None
        actor = subject.target_actor or subject.critic_actor
        assert actor is not None
        data = subject.transitions
        kept = part_of(data.obs)
        self.exam = exam
        self.subject = subject
        self.obs, self.next_obs = take(data.obs, kept), take(data.next_obs, kept)
        self.action, self.terminated = data.action[kept], data.terminated[kept]
        self.actor = actor
        self.critic = subject.critic
        self.target = subject.target_critic or subject.critic
        self.batch = max(2, min(train_batch(subject) or 256, len(self.action)))
        slots = (Slot.TARGET_ACTION, Slot.REPLAY_Q, Slot.TARGET_Q)
        traced = {slot: letter(exam, slot) for slot in slots}
        self.assumed = not all(traced.values())
        self.modes = self._handed_over() if self.assumed else traced

    def _handed_over(self) -> dict[Slot, str]:
        networks, targets = self.subject.networks, self.subject.targets

        def flag(*roles: str) -> str:
            role = next((r for r in roles if r in networks), "")
            return "T" if role and networks[role].training else "E"

        target_critics = [r for r in targets if not r.startswith("actor")]
        return {
            Slot.TARGET_ACTION: flag("actor_target", "actor"),
            Slot.REPLAY_Q: "T",  # statistics can only come from there
            Slot.TARGET_Q: flag(*target_critics, "critic"),
        }

    def in_mode(self, mode: str, run: Callable[[slice], Tensor]) -> Tensor:
        """A pass over all transitions in batches of the training size, rows in dimension 0."""
        count = len(self.action)
        # A last batch of few rows would be noisier than any that training sees.
        whole = max(1, count // self.batch)
        edges = [round(i * count / whole) for i in range(whole + 1)]
        with training_mode(self.subject, False), torch.no_grad():
            # The layers alone: networks under `set_modes` would look for their own plan's batch.
            for layer in self.exam.layers:
                layer.call.module.training = mode not in "EB" and layer.normalizes
            parts = [run(slice(a, b)) for a, b in pairwise(edges)]
        return torch.cat(parts)

    def next_action(self, mode: str) -> Tensor:
        """a' without noise, (B, A)."""
        return self.in_mode(mode, lambda part: self.actor(take(self.next_obs, part)))

    def joint_values(self, critic: Callable[[Obs, Tensor], Tensor], following: Tensor) -> Tensor:
        """Q (B, 2, C) of (s, a) and (s', a') in one forward pass per batch."""

        def run(part: slice) -> Tensor:
            obs = join(take(self.obs, part), take(self.next_obs, part))
            q = critic(obs, torch.cat([self.action[part], following[part]]))
            count = q.shape[1] // 2
            return torch.stack([q[:, :count].T, q[:, count:].T], 1)

        return self.in_mode("J", run)

    def values(
        self, critic: Callable[[Obs, Tensor], Tensor], mode: str, obs: Obs, action: Tensor
    ) -> Tensor:
        """Q (B, C)."""
        return self.in_mode(mode, lambda part: critic(take(obs, part), action[part]).T)


def _slots(exam: Examination) -> _Slots | str:
    """The passes, or why there are none."""
    subject = exam.subject
    if subject.critic is None or subject.discrete:
        return "no critic of continuous actions"
    if subject.critic_actor is None:
        return "the actor's action as the critic takes it is not known"
    if subject.transitions is None or len(subject.transitions) < 8:
        return ""
    return _Slots(exam)


NO_SCALE = "the rewards of the transitions are all 0: there is no scale to compare with"
NEEDS_TRANSITIONS = "needs replayed transitions: give the subject some, at least 8"


@rule(
    "BP305",
    "td-bias-from-modes",
    "the modes of the passes bias the TD error",
    what=(
        "Splits what normalization adds to the TD error at fixed weights into the target's pass, "
        "the current value's pass and the next action's pass."
    ),
    detected=(
        "b_t = gamma E[(1 - d)(Q_m5 - Q_ref)(s', a')], b_c = -E[(Q_m4 - Q_ref)(s, a)], b_a = gamma "
        "E[(1 - d)(Q_ref(s', pi_m2(s')) - Q_ref(s', pi_E(s')))]; the reference has the statistics "
        "of (s, a) and (s', pi(s')) pooled (PreciseBN); Q is the mean over critics. Review where "
        "|b| > 0.1 reward scale + 3 standard errors over rows; the reward scale is the standard "
        "deviation of the rewards, or their mean size where they are all equal. Modes are those of "
        "a traced update, else those as handed over with T in slot 4."
    ),
    why=(
        "The critic is regressed on values that another normalization produced: it learns the "
        "bias, and bootstrapping multiplies it by up to 1 / (1 - gamma)."
    ),
    mend=(
        "Run slots 4 and 5 jointly (`J`, CrossQ), and recalibrate or sync the target's statistics; "
        "see BP301 and BP402. Both in E with fresh statistics has no such bias either, but without "
        "a target network it did not learn Pendulum in our study of the joint forward."
    ),
    references=("https://arxiv.org/abs/1902.05605", "https://arxiv.org/abs/2105.07576"),
)
def td_bias(exam: Examination) -> Outcome:
    """BP305."""
    slots = _slots(exam)
    if isinstance(slots, str):
        return not_applicable(slots) if slots else skipped(NEEDS_TRANSITIONS)
    layers = [f for f in exam.layers if f.normalizes and (f.couples_train or f.running)]
    if not layers:
        return not_applicable("no layer uses batch or running statistics")
    if "B" in slots.modes.values():
        return skipped("a pass goes around its normalization layers: see the trace")
    bias = measured_bias(exam, slots)
    scale = reward_scale(exam.subject)
    if not scale > 0:
        return skipped(NO_SCALE)
    roles = {
        Slot.TARGET_Q: [f for f in layers if f.role in exam.subject.targets] or layers,
        Slot.REPLAY_Q: [f for f in layers if f.role in critic_roles(exam)] or layers,
        Slot.TARGET_ACTION: [f for f in layers if "actor" in f.role] or layers,
    }
    roles[Slot.TARGET_Q] = [
        f for f in roles[Slot.TARGET_Q] if not f.role.startswith("actor")
    ] or roles[Slot.TARGET_Q]
    findings = []
    parts = (bias.target, bias.current, bias.action)
    slots_of = (Slot.TARGET_Q, Slot.REPLAY_Q, Slot.TARGET_ACTION)
    names = ("the target's value", "the current value", "the next action")
    for value, noise, slot, name in zip(parts, bias.noise, slots_of, names, strict=True):
        threshold = BIAS * scale + 3 * noise
        if not abs(value) > threshold:
            continue
        how = " (mode as handed over)" if slots.assumed else ""
        findings.append(
            at(
                roles[slot][0],
                f"{slot_name(slot)} in mode {slots.modes[slot]}{how} biases the TD error by "
                f"{value:.3g} through {name}",
                site=slot_name(slot),
                value=abs(value),
                floor=noise,
                threshold=threshold,
                effect=in_return_units(exam, value),
            )
        )
    findings.sort(key=lambda f: -f.value / f.threshold)
    if findings:
        return review(*findings)
    return passed(f"TD bias {bias.total:.2g}, {abs(bias.total) / scale:.1%} of the reward scale")


def measured_bias(exam: Examination, slots: _Slots) -> measures.TDBias:
    """The TD bias of the subject's passes, in the modes of its update."""
    layers = exam.layers
    modes = slots.modes
    following = slots.next_action(modes[Slot.TARGET_ACTION])
    by_running = slots.next_action("E")
    both = join(slots.obs, slots.next_obs)
    actions = torch.cat([slots.action, following])

    def reference(critic: Callable[[Obs, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        with (
            training_mode(slots.subject, False),
            measures.precise_statistics(layers, lambda: critic(both, actions)),
            torch.no_grad(),
        ):
            q = critic(slots.obs, slots.action)
            next_q = critic(slots.next_obs, following)
            other = critic(slots.next_obs, by_running)
        return q.mean(0), next_q.mean(0), other.mean(0)

    q_reference, *_ = reference(slots.critic)
    _, next_reference, next_running = reference(slots.target)
    if modes[Slot.REPLAY_Q] in "Jj":
        q = slots.joint_values(slots.critic, following)[:, 0]
    else:
        q = slots.values(slots.critic, modes[Slot.REPLAY_Q], slots.obs, slots.action)
    if modes[Slot.TARGET_Q] in "Jj":
        next_q = slots.joint_values(slots.target, following)[:, 1]
    else:
        next_q = slots.values(slots.target, modes[Slot.TARGET_Q], slots.next_obs, following)
    return measures.td_bias(
        gamma=slots.subject.gamma,
        terminated=slots.terminated,
        next_q=next_q.mean(1),
        next_q_reference=next_reference,
        q=q.mean(1),
        q_reference=q_reference,
        next_q_running_action=next_running,
    )


# ---------------------------------------------------------------------------------------- BP306

APART = 1.0  # standard deviations


@rule(
    "BP306",
    "mixture-mismatch",
    "the critic sees (s, a) and (s', pi(s')) from different distributions",
    what=(
        "Compares the statistics of each critic layer's input on replayed (s, a) and on "
        "(s', pi(s')), and what normalizing one with the other's does to Q."
    ),
    detected=(
        "|mu_1 - mu_2| / sigma > 1 + 5 sqrt(2 / N) for some feature that varies, sigma pooled, "
        "and E|Q_1(s', pi(s')) - Q_2(s', pi(s'))| > 0.1 reward scale, Q_1 with the statistics of "
        "(s, a) and Q_2 with those of (s', pi(s')). Passed where slots 4 and 5 run jointly (J)."
    ),
    why=(
        "Running statistics and batches of (s, a) do not fit the passes that value the policy's "
        "own actions: the policy is judged by a critic that sees its actions distorted."
    ),
    mend="Run slots 4 and 5 jointly (`J`), mix replayed rows into slot 3 (`M`), or use layer norm.",
    references=("https://arxiv.org/abs/1902.05605",),
)
def mixture_mismatch(exam: Examination) -> Outcome:
    """BP306."""
    slots = _slots(exam)
    if isinstance(slots, str):
        return not_applicable(slots) if slots else skipped(NEEDS_TRANSITIONS)
    layers = [f for f in exam.layers if f.role in critic_roles(exam) and f.running]
    if not layers:
        return not_applicable("no layer of the critic keeps running statistics")
    if slots.modes[Slot.TARGET_Q] in "Jj":
        return passed("slots 4 and 5 share one forward pass")
    following = slots.next_action("E")
    distance, layer = _distance(slots, layers, following)
    threshold = APART + 5 * math.sqrt(2 / len(slots.action))
    values = []
    for obs, action in ((slots.obs, slots.action), (slots.next_obs, following)):

        def own(obs: Obs = obs, action: Tensor = action) -> Tensor:
            return slots.critic(obs, action)

        with (
            training_mode(slots.subject, False),
            measures.precise_statistics(layers, own),
            torch.no_grad(),
        ):
            values.append(slots.critic(slots.next_obs, following))
    effect = float((values[0] - values[1]).abs().mean())
    scale = reward_scale(slots.subject)
    if not scale > 0:
        return skipped(NO_SCALE)
    if not (distance > threshold and effect > BIAS * scale):
        return passed(f"{distance:.2g} standard deviations apart, effect {effect / scale:.1%}")
    return review(
        at(
            layer,
            f"(s, a) and (s', pi(s')) are {distance:.2g} standard deviations apart at {layer.name}",
            site=f"{slot_name(Slot.REPLAY_Q)} against {slot_name(Slot.TARGET_Q)}",
            value=distance,
            threshold=threshold,
            effect="normalizing one with the other's statistics moves Q by "
            + in_return_units(exam, effect),
        )
    )


def _distance(
    slots: _Slots, layers: list[LayerFacts], following: Tensor
) -> tuple[float, LayerFacts]:
    """Largest |mu_1 - mu_2| / sigma over layers and features, and its layer."""
    both = join(slots.obs, slots.next_obs)
    actions = torch.cat([slots.action, following])
    with (
        training_mode(slots.subject, False),
        measures.precise_statistics(layers, lambda: slots.critic(both, actions)),
    ):
        ours = measures.inputs_of(layers, lambda: slots.critic(slots.obs, slots.action))
        theirs = measures.inputs_of(layers, lambda: slots.critic(slots.next_obs, following))
    best = (0.0, layers[0])
    for layer in layers:
        if layer.name not in ours:
            continue
        (mean_1, var_1), (mean_2, var_2) = (measures.moments(x[layer.name]) for x in (ours, theirs))
        pooled = (var_1 + var_2) / 2
        varies = pooled > 1e-6 * pooled.max()
        if not bool(varies.any()):
            continue
        gap = float(((mean_1 - mean_2).abs() / pooled.sqrt())[varies].max())
        if gap > best[0]:
            best = (gap, layer)
    return best


# ---------------------------------------------------------------------------------------- BP307


@rule(
    "BP307",
    "joint-forward-missing",
    "a critic without target network normalizes (s, a) and (s', a') apart",
    what=(
        "Finds agents whose critic values next states itself (as CrossQ does) but not in one "
        "forward pass with the replayed pairs."
    ),
    detected=(
        "No target critic, a critic layer that couples rows and keeps running statistics, and in a "
        "traced update, or the plan of a run of the lab, slot 4 in T or S while slot 5 is not J. "
        "Review where neither is known. Slots 4 and 5 both in E pass."
    ),
    why=(
        "Q(s, a) and the target Q(s', a') are then normalized by different statistics, and without "
        "a target network nothing damps the difference. In our study of the joint forward on "
        "Pendulum no seed learned with slot 5 in E; with both passes on batches of their own the "
        "difference between the two values was erased and the return somewhat lower."
    ),
    mend="Concatenate (s, a) and (s', a'), run one forward, split it and detach the second half.",
    references=(
        "https://arxiv.org/abs/1902.05605",
        "https://github.com/araffin/sbx/issues/36",
    ),
)
def joint_forward_missing(exam: Examination) -> Outcome:
    """BP307."""
    subject = exam.subject
    if subject.critic is None or subject.discrete:
        return not_applicable("no critic of continuous actions")
    if subject.target_critic is not None:
        return not_applicable("there is a target critic")
    if subject.critic_actor is None and subject.transitions is None:
        return skipped("no actor and no transitions to take actions from")
    layers = [f for f in _critic_layers(exam) if f.couples_train and f.running]
    if not layers:
        return not_applicable("no layer of the critic couples rows and keeps running statistics")
    replay, target = letter(exam, Slot.REPLAY_Q), letter(exam, Slot.TARGET_Q)
    if target in ("J", "j"):
        return passed("slots 4 and 5 share one forward pass")
    if replay and replay not in BY_BATCH:
        return passed(f"slot 4 runs in mode {replay}")
    site = f"{slot_name(Slot.REPLAY_Q)} and {slot_name(Slot.TARGET_Q)}"
    if replay:
        message = (
            f"there is no target critic, and (s, a) in mode {replay} and (s', a') in mode "
            f"{target} are normalized apart at {layers[0].name}"
        )
        return failed(at(layers[0], message, site=site))
    message = (
        f"there is no target critic: {layers[0].name} is sound only if (s, a) and (s', a') go "
        "through one forward pass in your update"
    )
    return review(at(layers[0], message, site=site))


# ---------------------------------------------------------------------------------------- BP308

DIFFERS = 0.01  # of the action range


@rule(
    "BP308",
    "local-and-target-actions-differ",
    "with identical weights the acting and the target actor choose different actions",
    what=(
        "Gives the actor the mode in which the target action is computed, with the very same "
        "weights and statistics, and compares its actions with those that it acts with."
    ),
    detected=(
        "max |a_act - a_target| over up to 64 observations > 1% of the action range (0.01 action "
        "units where the range is unknown) and > 64 rounding errors. a_act is the action as "
        "deployed, each observation alone; a_target is the actor's on the batch in slot 2's mode: "
        "of a traced update, else with the target network's own training flags. Review where a "
        "mode plan asks for T or S in slot 2 (`set_modes`)."
    ),
    why=(
        "The TD target is computed for actions that the agent never takes. The usual cause: acting "
        "runs one observation in eval mode or around the norm, and the target actor runs batches "
        "in train mode."
    ),
    mend='Put the target actor in eval mode, or slot 2 to E: `set_modes(model, "TEETE")`.',
    fix="set-modes",
    safe=False,
    references=("https://arxiv.org/abs/1509.02971",),
)
def actions_differ(exam: Examination) -> Outcome:
    """BP308."""
    subject = exam.subject
    if subject.discrete:
        return not_applicable("actions are discrete: no target action is computed")
    if subject.target_actor is None and subject.update is None:
        return not_applicable("no target actor, and no update that computes a target action")
    if subject.critic is None and subject.target_actor is None:
        return not_applicable("no critic, so no target action is computed")
    layers = [f for f in exam.layers if f.role in exam.acting_roles and f.normalizes]
    if not layers:
        return not_applicable("no layer of the actor uses batch or running statistics")
    batch = take(subject.obs, slice(0, min(rows(subject.obs), exam.BATCH)))
    with torch.no_grad():
        acting = torch.cat([subject.act(take(batch, i)) for i in range(rows(batch))])
        with _target_flags(exam) as mode:
            target = subject.policy(batch)
    gap = (acting - target).abs()
    width = exam.action_range
    share = gap if width is None else gap / width.to(gap)
    floor = probe.ROUNDING * torch.finfo(target.dtype).eps * float(target.abs().max())
    value = float(gap.max())
    if not (float(share.max()) > DIFFERS and value > floor):
        return passed(f"largest gap {value:.2g}")
    first, largest = layers[0], max(layers, key=lambda f: f.mode_gap)
    how = f"mode {mode}" if mode else "the target network's training flags"
    meant = _chosen(exam, Slot.TARGET_ACTION)
    verdict = review if meant else failed
    return verdict(
        Finding(
            "with identical weights and statistics the actor acts differently alone and as the "
            f"target action is computed ({how} in {slot_name(Slot.TARGET_ACTION)}{meant})",
            first.role,
            first.path or first.role,
            largest.path or largest.role,
            site=f"act against {slot_name(Slot.TARGET_ACTION)}",
            value=value,
            floor=floor,
            threshold=DIFFERS if width is None else DIFFERS * float(width.max()),
            effect=exam.in_action_units(gap),
        )
    )


@contextmanager
def _target_flags(exam: Examination) -> Iterator[str]:
    """The acting networks in the mode of the target action, for a block; gives slot 2's letter."""
    subject = exam.subject
    mode = letter(exam, Slot.TARGET_ACTION)
    saved = []
    for role in exam.acting_roles:
        theirs = {
            path: module
            for target, online in subject.targets.items()
            if online == role
            for path, module in subject.networks[target].named_modules()
        }
        for path, module in subject.networks[role].named_modules():
            saved.append((module, module.training))
            if mode:
                module.training = mode not in "EB"
            elif path in theirs:
                module.training = theirs[path].training
    try:
        yield mode
    finally:
        for module, training in saved:
            module.training = training
