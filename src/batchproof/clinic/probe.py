"""What modules do, found by watching them: coupling of rows, state, chance. No class names.

A layer is known by three facts about its output on a batch that really reached it: does row i
depend on row j (coupling), do its buffers move (state), do two runs differ (chance).

Shapes: ``B`` rows of one batch, ``F`` features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from batchproof.clinic.subject import Obs, Subject, tensors

ROUNDING = 64.0
"""A difference below this many rounding errors of the compared values is rounding."""


@dataclass(frozen=True)
class Call:
    """One forward call of one module.

    Attributes:
        role: the network's name in the subject.
        path: the module's path within it, '' for the network itself.
        module: the module.
        inputs: its positional arguments, tensors detached and cloned.
        kwargs: its keyword arguments, likewise.
        output: detached and cloned.
        training: its own flag at the call.
        grad: whether gradients were recorded.
        buffers: its own buffers before the call.
        moved: names of the buffers that the call changed.
        children: whether it contains other modules.
    """

    role: str
    path: str
    module: nn.Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    training: bool
    grad: bool
    buffers: dict[str, Tensor]
    moved: tuple[str, ...]
    children: bool

    @property
    def name(self) -> str:
        """Role and path, as reports print it: ``critic.qf0.1``."""
        return f"{self.role}.{self.path}" if self.path else self.role

    @property
    def batch(self) -> int:
        """Rows of its first tensor input, 0 where it has none."""
        for value in self.inputs:
            if isinstance(value, Tensor) and value.ndim:
                return len(value)
        return 0


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return (
            type(value)(_detached(item) for item in value)
            if type(value) in (tuple, list)
            else value
        )
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return value


@contextmanager
def recorded(networks: Mapping[str, nn.Module], keep: int | None = None) -> Iterator[list[Call]]:
    """Record every forward call of every module inside the block, in the order of return.

    Args:
        networks: by role.
        keep: record only the first so many calls of each module; None keeps all.
    """
    calls: list[Call] = []
    handles = []
    before: dict[int, list[dict[str, Tensor]]] = {}
    counts: dict[int, int] = {}

    def pre(module: nn.Module, *_: Any) -> None:
        own = dict(module.named_buffers(recurse=False))
        before.setdefault(id(module), []).append({k: v.detach().clone() for k, v in own.items()})

    def post(role: str, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            old = before[id(module)].pop()
            counts[id(module)] = counts.get(id(module), 0) + 1
            if keep is not None and counts[id(module)] > keep:
                return
            new = dict(module.named_buffers(recurse=False))
            moved = tuple(k for k, v in new.items() if k not in old or not same(old[k], v))
            calls.append(
                Call(
                    role=role,
                    path=path,
                    module=module,
                    inputs=_detached(tuple(args)),
                    kwargs=_detached(kwargs),
                    output=_detached(output),
                    training=module.training,
                    grad=torch.is_grad_enabled(),
                    buffers=old,
                    moved=moved,
                    children=any(True for _ in module.children()),
                )
            )

        return hook

    seen: set[int] = set()
    for role, network in networks.items():
        for path, module in network.named_modules():
            if id(module) in seen:
                continue
            seen.add(id(module))
            handles.append(module.register_forward_pre_hook(pre))
            handles.append(module.register_forward_hook(post(role, path), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two states are one: NaN in the same place is the same, though NaN != NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextmanager
def in_float64(subject: Subject) -> Iterator[None]:
    """All networks in float64 for a block, whatever precision their inputs come in.

    Rounding is told apart from meaning here: a gap that is rounding shrinks by nine orders of
    magnitude, a gap with a meaning stays. Use it inside `subject.unchanged`.
    """
    handles = []
    saved = []

    def cast(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _to_double(args), _to_double(kwargs)

    for _, _, module in subject.modules():
        for holder in (module._parameters, module._buffers):
            for value in holder.values():
                if value is not None and value.dtype in (
                    torch.float32,
                    torch.float16,
                    torch.bfloat16,
                ):
                    saved.append((value, value.data))
                    value.data = value.data.double()
        handles.append(module.register_forward_pre_hook(cast, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for value, data in saved:
            # What a forward in float64 did to a buffer is not carried back.
            value.data = data


def _to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(_to_double(item) for item in value)
    if isinstance(value, dict):
        return {key: _to_double(item) for key, item in value.items()}
    return value


def rerun(call: Call, *inputs: Any, training: bool | None = None) -> Any:
    """The module's output on other inputs, from the state that it had before the call.

    Works on a copy: the module itself is not touched, and neither is torch's random state.

    Args:
        call: a recorded call.
        inputs: positional arguments instead of the recorded ones.
        training: the mode of the copy; None takes the recorded one.
    """
    return output_and_state(call, *inputs, training=training)[0]


def output_and_state(
    call: Call, *inputs: Any, training: bool | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """As `rerun`, with the copy's buffers after the run."""
    module = replica(call)
    module.train(call.training if training is None else training)
    with _seeded(0):
        output = module(*(inputs or call.inputs), **call.kwargs)
    return output, {k: v.detach().clone() for k, v in module.named_buffers()}


def replica(call: Call) -> nn.Module:
    """A copy of the module as it was before the call, without hooks."""
    # Libraries hang optimizers and spaces on their networks; no forward pass changes those.
    shared = {
        id(value): value
        for part in call.module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.optim.Optimizer) or _is_space(value)
    }
    module = copy.deepcopy(call.module, shared)
    for part in module.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            getattr(part, name).clear()
        part._forward_hooks_with_kwargs.clear()
        part._forward_pre_hooks_with_kwargs.clear()
    own = dict(module.named_buffers(recurse=False))
    for key, value in call.buffers.items():
        if key in own and own[key].shape == value.shape:
            own[key].data.copy_(value)
    return module


def _is_space(value: Any) -> bool:
    return type(value).__module__.startswith("gymnasium.spaces")


def first_tensor(value: Any) -> Tensor | None:
    """The first floating tensor in an output, None where there is none."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, tuple | list):
        found = (first_tensor(item) for item in value)
        return next((item for item in found if item is not None), None)
    if isinstance(value, dict):
        return first_tensor(list(value.values()))
    return None


@dataclass(frozen=True)
class LayerFacts:
    """What one module does to a batch, in train and in eval mode.

    Attributes:
        role: the network.
        path: the module's path in it.
        kind: its class's name, for people to read; nothing depends on it.
        couples_train: some row depends on another row of the batch.
        couples_eval: likewise in eval mode.
        moves_train: buffers that a pass changes.
        moves_eval: likewise in eval mode.
        random_train: two passes over one batch differ.
        random_eval: likewise in eval mode.
        mode_gap: largest difference between train and eval output on one batch.
        mean_buffer: the buffer that follows the batch mean of the input, '' where none does.
        var_buffer: the buffer that follows its variance.
        momentum: weight of the new batch in them, NaN where unknown.
        call: the call that it was found on.
    """

    role: str
    path: str
    kind: str
    couples_train: bool
    couples_eval: bool
    moves_train: tuple[str, ...]
    moves_eval: tuple[str, ...]
    random_train: bool
    random_eval: bool
    mode_gap: float
    mean_buffer: str
    var_buffer: str
    momentum: float
    call: Call

    @property
    def name(self) -> str:
        """Role and path, as reports print it."""
        return self.call.name

    @property
    def normalizes(self) -> bool:
        """Whether it uses statistics of the batch or running ones in place of them."""
        return self.couples_train or self.couples_eval or bool(self.mean_buffer)

    @property
    def running(self) -> bool:
        """Whether it keeps running statistics."""
        return bool(self.mean_buffer)


PROBE_ROWS = 8  # rows that a single module is tried on


def layer_facts(calls: list[Call]) -> list[LayerFacts]:
    """The modules that couple rows, keep state or draw at random: the innermost ones.

    From the outside in: what a network without buffers does not do as a whole, nothing in it does,
    so a healthy one costs one look. A module whose own children explain it is left out. ``calls``
    should come from a batch of at least two different rows.
    """
    first: dict[tuple[str, str], tuple[int, Call]] = {}
    for index, call in enumerate(calls):
        if call.batch >= 2:
            first.setdefault((call.role, call.path), (index, call))
    inner: dict[tuple[str, str] | None, list[tuple[str, str]]] = {}
    for role, path in first:
        inner.setdefault(_nearest(first, role, path), []).append((role, path))

    def look(key: tuple[str, str]) -> list[tuple[int, LayerFacts]]:
        index, call = first[key]
        ran, facts = _facts(_without_nan(_fewer_rows(call)))
        # A dead network hides what its layers do, so one with buffers is looked into all the same.
        if ran and facts is None and not any(True for _ in call.module.buffers()):
            return []
        found = [item for child in inner.get(key, []) for item in look(child)]
        return found or ([(index, facts)] if facts is not None else [])

    found = [item for key in inner.get(None, []) for item in look(key)]
    return [facts for _, facts in sorted(found, key=lambda item: item[0])]


def _nearest(known: Mapping[tuple[str, str], Any], role: str, path: str) -> tuple[str, str] | None:
    """The innermost recorded module around a path."""
    while path:
        path = path.rpartition(".")[0]
        if (role, path) in known:
            return role, path
    return None


def _fewer_rows(call: Call) -> Call:
    def cut(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.ndim > 0 and len(value) == call.batch
        return value[:PROBE_ROWS] if whole else value

    return replace(
        call,
        inputs=tuple(cut(value) for value in call.inputs),
        kwargs={key: cut(value) for key, value in call.kwargs.items()},
    )


def _without_nan(call: Call) -> Call:
    """The call on normal noise where its input is not a number.

    A NaN from a layer before would hide what this one does to rows that are numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        if not floating or not bool(value.isnan().any()):
            return value
        noise = torch.randn(value.shape, generator=generator).to(value)
        return torch.where(value.isfinite(), value, noise)

    return replace(
        call,
        inputs=tuple(numbers(value) for value in call.inputs),
        kwargs={key: numbers(value) for key, value in call.kwargs.items()},
    )


def _facts(call: Call) -> tuple[bool, LayerFacts | None]:
    """Whether the module could be tried, and what it does if it does anything."""
    x = next((v for v in call.inputs if isinstance(v, Tensor) and v.is_floating_point()), None)
    if x is None or first_tensor(call.output) is None:
        return False, None
    try:
        with torch.no_grad():
            train, after_train = output_and_state(call, training=True)
            evaled, after_eval = output_and_state(call, training=False)
            again = _second_draw(call, training=True)
            again_eval = _second_draw(call, training=False)
    # It cannot run alone, for example because it waits for a hook's state or a replayed batch.
    except Exception:
        return False, None
    train_y, eval_y = first_tensor(train), first_tensor(evaled)
    if train_y is None or eval_y is None or train_y.ndim == 0:
        return False, None
    own = call.buffers
    moves_train = tuple(k for k in own if k in after_train and not same(own[k], after_train[k]))
    moves_eval = tuple(k for k in own if k in after_eval and not same(own[k], after_eval[k]))
    random_train = not same(train_y, first_tensor(again))  # type: ignore[arg-type]
    random_eval = not same(eval_y, first_tensor(again_eval))  # type: ignore[arg-type]
    try:
        couples_train = not random_train and coupling(call, training=True) > 0
        couples_eval = not random_eval and coupling(call, training=False) > 0
    except RuntimeError:
        return False, None  # it casts its input to float32 itself: its children are looked at
    mean, var, momentum = (
        _running_buffers(x, own, _precisely(call, after_train))
        if moves_train
        else ("", "", float("nan"))
    )
    gap = largest_gap(train_y, eval_y) if train_y.shape == eval_y.shape else 0.0
    if not (
        couples_train or couples_eval or moves_train or moves_eval or random_train or random_eval
    ):
        return True, None
    return True, LayerFacts(
        role=call.role,
        path=call.path,
        kind=type(call.module).__name__,
        couples_train=couples_train,
        couples_eval=couples_eval,
        moves_train=moves_train,
        moves_eval=moves_eval,
        random_train=random_train,
        random_eval=random_eval,
        mode_gap=gap,
        mean_buffer=mean,
        var_buffer=var,
        momentum=momentum,
        call=call,
    )


def _precisely(call: Call, after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Buffers after a pass in train mode, in float64 where their own type is coarser than float32.

    Rounding to three digits would hide by which share of the way they moved.
    """
    if all(torch.finfo(v.dtype).bits >= 32 for v in after.values() if v.is_floating_point()):
        return after
    module = replica(call).double().train()
    try:
        with torch.no_grad(), _seeded(0):
            module(*_to_double(call.inputs), **_to_double(call.kwargs))
    except RuntimeError:  # it casts its input itself
        return after
    return {k: v.detach() for k, v in module.named_buffers()}


def _second_draw(call: Call, training: bool) -> Any:
    module = replica(call)
    module.train(training)
    with _seeded(1):
        return module(*call.inputs, **call.kwargs)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a known random state of the CPU for a block, and put the present one back.

    `torch.manual_seed` would also seed a CUDA that starts later, and takes milliseconds.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def coupling(call: Call, training: bool | None = None) -> float:
    """Largest change of rows 1.. of the output when row 0 of the input is replaced.

    0 below rounding, measured in float64, so that any value above 0 means coupling.
    """
    module = replica(call).double()
    module.train(call.training if training is None else training)
    inputs, kwargs = _to_double(call.inputs), _to_double(call.kwargs)
    changed = tuple(_with_other_first_row(value) for value in inputs)
    state = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        with _seeded(0):
            before = first_tensor(module(*inputs, **kwargs))
        module.load_state_dict(state)
        with _seeded(0):
            after = first_tensor(module(*changed, **kwargs))
    if before is None or after is None or before.shape != after.shape or len(before) < 2:
        return 0.0
    gap = largest_gap(before[1:], after[1:])
    finite = before[before.isfinite()]
    scale = max(float(finite.abs().max()), 1e-30) if finite.numel() else 1.0
    return gap if gap > ROUNDING * torch.finfo(torch.float64).eps * scale else 0.0


def gradient_coupling(call: Call, training: bool | None = None) -> float:
    """Largest |d y_i / d x_j| over j = row 0 and all i != 0: 0 where statistics are detached."""
    module = replica(call).double()
    module.train(call.training if training is None else training)
    inputs = list(_to_double(call.inputs))
    index = next(
        (i for i, v in enumerate(inputs) if isinstance(v, Tensor) and v.is_floating_point()), None
    )
    if index is None:
        return 0.0
    x = inputs[index].detach().requires_grad_(True)
    inputs[index] = x
    with torch.enable_grad(), _seeded(0):
        y = first_tensor(module(*inputs, **_to_double(call.kwargs)))
        if y is None or not y.requires_grad or len(y) < 2:
            return 0.0
        weights = torch.linspace(0.5, 1.5, y[1:].numel(), dtype=y.dtype).reshape(y[1:].shape)
        (grad,) = torch.autograd.grad((y[1:] * weights).sum(), x, allow_unused=True)
    if grad is None:
        return 0.0
    largest = float(grad[0].abs().max())
    scale = max(float(grad.abs().max()), 1e-30)
    return largest if largest > ROUNDING * torch.finfo(torch.float64).eps * scale else 0.0


def _with_other_first_row(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim == 0:
        return value
    other = value.clone()
    # Far enough from what it was to move any mean, whatever the scale.
    other[0] = value[0] * -1.5 + value.std() + 1.0 if value.numel() > 1 else value[0] + 1.0
    return other


def _running_buffers(
    x: Tensor, before: dict[str, Tensor], after: dict[str, Tensor]
) -> tuple[str, str, float]:
    """Which buffers moved to the batch's mean and variance, and by which share.

    A buffer m follows a statistic b where one number rho gives m' = m + rho (b - m) for every
    feature at once; names are not read.
    """
    axes = [d for d in range(x.ndim) if d != 1] if x.ndim > 1 else [0]
    count = x.numel() // x.shape[1] if x.ndim > 1 else len(x)
    if count < 2:
        return "", "", float("nan")
    x = x.double()
    mean, biased = x.mean(axes), x.var(axes, correction=0)
    statistics = {"mean": [mean], "var": [biased, biased * count / (count - 1)]}
    best: dict[str, tuple[float, str, float]] = {}
    for name, old in before.items():
        new = after.get(name)
        if new is None or not old.is_floating_point() or old.shape != mean.shape:
            continue
        old, new = old.double(), new.double()
        sound = old.isfinite() & new.isfinite()  # features that a NaN is not stuck in
        if not bool(sound.any()):
            continue
        for which, choices in statistics.items():
            for statistic in choices:
                gap, step = (statistic - old)[sound], (new - old)[sound]
                if not float(gap.abs().max()) > 0 or not float(step.abs().max()) > 0:
                    continue
                rho = float((gap * step).sum() / (gap * gap).sum())
                residual = float((step - rho * gap).abs().max() / step.abs().max())
                if residual < best.get(which, (1e-3, "", 0.0))[0]:
                    best[which] = (residual, name, rho)
    _, mean_name, rho = best.get("mean", (0.0, "", float("nan")))
    var_name = best.get("var", (0.0, "", 0.0))[1]
    return mean_name, var_name if var_name != mean_name else "", rho


def largest_gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; 0 for two NaN or one infinity, infinite for NaN and a number."""
    if not a.numel():
        return 0.0
    a, b = a.double(), b.double()
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), torch.zeros_like(a), a - b)
    return float(gap.abs().nan_to_num(nan=math.inf, posinf=math.inf).max())


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, NaN where either is not finite."""
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def spread(obs: Obs) -> float:
    """Largest standard deviation of an observation's entry over the batch: 0 for equal rows."""
    return max(float(part.double().std(0).max()) if len(part) > 1 else 0.0 for part in tensors(obs))
