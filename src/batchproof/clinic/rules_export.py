"""BP6xx: what is lost when a policy is saved, loaded or exported.

Exports are tried for policies whose acting networks hold a layer that couples rows, keeps state or
draws at random. A network without one computes each row by weights alone, and tracing that takes
seconds to say nothing.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from batchproof.clinic import probe
from batchproof.clinic.probe import Call, LayerFacts
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
from batchproof.clinic.subject import Obs, Subject, rows, take, training_mode, unchanged

TRACED = 6
"""Rows of the batch that an export is made with; it is then run on other numbers of rows."""


def _floor(*values: Tensor) -> float:
    """What rounding gives: `probe.ROUNDING` rounding errors of the largest value."""
    numbers = [v[v.isfinite()] for v in values]
    scale = max((float(v.abs().max()) for v in numbers if v.numel()), default=0.0)
    floating = next((v for v in values if v.is_floating_point()), torch.empty(0))
    return probe.ROUNDING * torch.finfo(floating.dtype).eps * max(scale, 1e-30)


# ---------------------------------------------------------------------------------------- BP601


@rule(
    "BP601",
    "buffers-lost-in-round-trip",
    "saving and loading loses state that the output depends on",
    what=(
        "Saves the networks and loads them into freshly built ones: a Stable-Baselines3 model by "
        "its own `save` and `load`; plain modules by their `state_dict`, into a copy in which all "
        "that training can change was put back to initial values."
    ),
    detected=(
        "Outputs of the loaded networks in eval mode, on the inputs that the networks had on the "
        "probe batch, differ by more than 64 rounding errors, or loading fails: a failure. State "
        "that moves in training is not in the `state_dict` (a buffer with persistent=False, or a "
        "plain attribute) but changes no output yet: review."
    ),
    why=(
        "The policy that was evaluated is not the policy in the file. Running statistics kept as a "
        "plain attribute or in a non-persistent buffer start over at 0 and 1, without a warning: "
        "`load_state_dict(strict=True)` does not know them either."
    ),
    mend="`self.register_buffer(name, tensor)`, without persistent=False, for all that is learned.",
    references=(
        "https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html",
        "https://github.com/DLR-RM/stable-baselines3/issues/996",
    ),
)
def lost_in_round_trip(exam: Examination) -> Outcome:
    """BP601."""
    subject = exam.subject
    if not subject.networks:
        return not_applicable("no network is known")
    certain: list[Finding] = []
    doubtful: list[Finding] = []
    try:
        library = _reloaded_model(subject)
    except _NotLoaded as error:
        message = f"the saved model cannot be loaded: {error}"
        return failed(Finding(message, site="save and load"))
    for role, network in subject.networks.items():
        calls = _outermost(exam.calls, role)
        if not calls:
            continue
        path = _path_in_policy(subject, network) if library is not None else None
        try:
            if library is not None and path is not None:
                loaded = library.policy.get_submodule(path)
            else:
                loaded = _reloaded_copy(network, calls)
        except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
            line = " ".join(str(error).split())[:160]
            certain.append(Finding(f"{role} cannot be loaded back: {line}", network=role))
            continue
        lost = _lost(network, loaded, calls)
        gap, floor = _output_gap(network, loaded, calls)
        when = ""
        if gap <= floor and (library is None or path is None):
            # Before any training, what is lost may still be what a fresh network starts with.
            later = _after_training(network, calls)
            fresh = _reloaded_copy(later, calls)
            lost = _lost(later, fresh, calls)
            if not _output_gap(later, fresh, calls)[0] <= floor:
                when = "; it makes a difference once the network has trained"
        if gap <= floor and not when:
            # A plain attribute that no output depends on may be a cache.
            lost = [key for key in lost if key[1] in network.get_submodule(key[0])._buffers]
            when = "; no output depends on it yet"
            if not lost:
                continue
        names = ", ".join(f"{path}.{name}".lstrip(".") for path, name in lost) or "some state"
        first = (lost[0][0] if lost else "") or role
        found = Finding(
            f"{role}: {names} is not saved{when}",
            network=role,
            first=first,
            largest=first,
            site="save and load",
            value=gap,
            floor=floor,
            threshold=floor,
            effect=f"outputs of the loaded network differ by up to {gap:.3g}",
        )
        (doubtful if when else certain).append(found)
    if certain:
        return failed(*certain, *doubtful)
    return review(*doubtful) if doubtful else passed("all outputs come back")


class _NotLoaded(Exception):
    """The library could save the model and not load it."""


def _reloaded_model(subject: Subject) -> Any:
    """The library's model after its own save and load; None for plain modules."""
    model = subject.model
    if not hasattr(type(model), "load") or not hasattr(model, "save"):
        return None
    buffer = io.BytesIO()
    # The buffer holds what this very process wrote, so reading it back trusts nobody new.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(buffer)
        buffer.seek(0)
        # Loading would set aside memory for a full replay buffer.
        try:
            return type(model).load(buffer, device="cpu", custom_objects={"buffer_size": 1})
        except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
            raise _NotLoaded(" ".join(str(error).split())[:160]) from error


def _path_in_policy(subject: Subject, network: nn.Module) -> str | None:
    policy = getattr(subject.model, "policy", None)
    if not isinstance(policy, nn.Module):
        return None
    named = policy.named_modules(remove_duplicate=False)
    return next((path for path, module in named if module is network), None)


def _reloaded_copy(network: nn.Module, calls: list[Call]) -> nn.Module:
    """The network after its state_dict went into a copy that knows nothing of training."""
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    fresh = copy.deepcopy(network)
    saved = set(network.state_dict())
    moving = _moving_attributes(network, calls)
    with torch.no_grad():
        for path, module in fresh.named_modules():
            for parameter in module.parameters(recurse=False):
                parameter.data.mul_(0.5).add_(0.1)  # so that one that does not come back shows
            for name, buffer in module.named_buffers(recurse=False):
                if (path, name) in moving or f"{path}.{name}".lstrip(".") in saved:
                    buffer.data.copy_(_initial(buffer))
            for where, name in moving:
                if where == path and name in vars(module):
                    vars(module)[name] = _initial(vars(module)[name])
    # weights_only=False: the bytes were written a moment ago, by this process.
    fresh.load_state_dict(torch.load(file, weights_only=False))
    return fresh


def _initial(value: Any) -> Any:
    """As a fresh layer starts: variances, which are positive everywhere, at 1, the rest at 0."""
    if isinstance(value, Tensor):
        positive = value.is_floating_point() and bool((value > 0).all())
        return torch.ones_like(value) if positive else torch.zeros_like(value)
    return type(value)(0)


def _after_training(network: nn.Module, calls: list[Call]) -> nn.Module:
    """A copy after one more pass in train mode."""
    moved = copy.deepcopy(network).train()
    for call in calls:
        _run(moved.get_submodule(call.path), call)
    return moved


def _moving_attributes(network: nn.Module, calls: list[Call]) -> set[tuple[str, str]]:
    """Path and name of what a pass in train mode changes and the state_dict does not hold."""
    before, after = dict(_unsaved(network)), dict(_unsaved(_after_training(network, calls)))
    return {key for key in before if key in after and not _equal(before[key], after[key])}


def _unsaved(network: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """Tensors and numbers of every module that its state_dict does not hold."""
    for path, module in network.named_modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers.get(name) is not None:
                yield (path, name), module._buffers[name]
        for name, value in vars(module).items():
            if name != "training" and isinstance(value, Tensor | int | float):
                yield (path, name), value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return probe.same(a, b)
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _outermost(calls: list[Call], role: str) -> list[Call]:
    """The network's recorded calls that no other recorded call of it contains."""
    own = [call for call in calls if call.role == role]
    paths = {call.path for call in own}
    return [
        call
        for call in own
        if not any(
            path != call.path and (path == "" or call.path.startswith(path + ".")) for path in paths
        )
    ]


def _run(module: nn.Module, call: Call) -> Tensor:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = probe.first_tensor(module(*call.inputs, **call.kwargs))
    return torch.zeros(1) if output is None else output


def _output_gap(network: nn.Module, loaded: nn.Module, calls: list[Call]) -> tuple[float, float]:
    """Largest difference of the outputs in eval mode, and what rounding alone would give."""
    original, loaded = copy.deepcopy(network).eval(), copy.deepcopy(loaded).eval()
    gap, floor = 0.0, 0.0
    for call in calls:
        y, z = (
            _run(original.get_submodule(call.path), call),
            _run(loaded.get_submodule(call.path), call),
        )
        found = probe.largest_gap(y, z) if y.shape == z.shape else float("inf")
        if not found <= gap:
            gap, floor = found, _floor(y)
    return gap, floor


def _lost(network: nn.Module, loaded: nn.Module, calls: list[Call]) -> list[tuple[str, str]]:
    """Path and name of the state that the loaded network does not have."""
    moving = _moving_attributes(network, calls)
    there = dict(_unsaved(loaded))
    lost = [
        key
        for key, value in _unsaved(network)
        # A plain attribute may be a cache: one that is not state changes no output.
        if key in moving and (key not in there or not _equal(value, there[key]))
    ]
    others = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        path, _, last = name.rpartition(".")
        if (path, last) not in lost and (name not in others or not _equal(value, others[name])):
            unsaved = last in getattr(
                network.get_submodule(path), "_non_persistent_buffers_set", ()
            )
            if not unsaved or (path, last) in moving:
                lost.append((path, last))
    return lost


# ------------------------------------------------------------------------------------ the exports


class Whole(nn.Module):
    """The policy as one module, which exporters can take apart.

    Shapes: observations (B, ...) to outputs (B, K).
    """

    def __init__(self, subject: Subject, roles: Iterable[str]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(subject.networks[role] for role in roles)
        self.policy = subject.policy
        self.train(False)

    def train(self, mode: bool = True) -> Whole:
        """Leaves the networks' own modes alone: they are exported as they act."""
        self.training = mode
        return self

    def forward(self, obs: Obs) -> Tensor:
        """The policy's output."""
        return self.policy(obs)


Exported = Callable[[Obs], Tensor]
Exporter = Callable[[nn.Module, tuple[Any, ...]], Exported]


def _compared(exam: Examination, export: Exporter, what: str, site: str) -> Outcome:
    """Export the policy as it acts, and compare it with itself on several numbers of rows."""
    subject = exam.subject
    layers = exam.layers_of(*exam.acting_roles)
    if not layers:
        return not_applicable(
            "no layer of the acting networks couples rows, keeps state or draws at random"
        )
    batch: Any = exam.batch
    acting = _acting_modes(subject, batch)
    frozen = [f for f in layers if acting.get(id(f.call.module), False) and f.mode_gap > 0]
    with unchanged(subject), _modes(subject, acting), _quiet():
        example = take(batch, slice(0, min(TRACED, rows(batch))))
        exported = export(Whole(subject, exam.acting_roles), (example,))
        findings = _differences(subject, exported, batch, what, site)
        if findings:
            findings = [_blamed(exam, export, found) for found in findings]
        elif frozen:
            findings = [_train_mode(subject, exported, batch, frozen, what, site)]
    findings = [found for found in findings if not found.value <= found.threshold]
    return failed(*findings) if findings else passed(f"{what} gives what the policy gives")


@contextmanager
def _quiet() -> Iterator[None]:
    # Exporters warn about what is measured here, and print the graph where they give up. The
    # checks of a distribution's arguments read values, which an exported program does not have.
    level, checks = logging.root.manager.disable, Distribution._validate_args
    logging.disable(logging.CRITICAL)
    Distribution.set_default_validate_args(False)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        Distribution.set_default_validate_args(checks)


def _acting_modes(subject: Subject, batch: Obs) -> dict[int, bool]:
    """The training flag of each module when the policy acts."""
    with unchanged(subject), torch.no_grad(), probe.recorded(subject.networks) as calls:
        subject.act(take(batch, slice(0, 2)))
    return {id(call.module): call.training for call in calls}


@contextmanager
def _modes(subject: Subject, acting: dict[int, bool]) -> Iterator[None]:
    with training_mode(subject, False):
        for _, _, module in subject.modules():
            module.training = acting.get(id(module), False)
        yield


def _evaluated(subject: Subject, run: Exported, obs: Obs) -> Tensor:
    # Passes in train mode move buffers; weights stay, and copying them would take most of the time.
    saved = [(b, b.clone()) for _, _, m in subject.modules() for b in m.buffers(recurse=False)]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return run(obs).detach()
    finally:
        for buffer, content in saved:
            buffer.data.copy_(content)


def _differences(
    subject: Subject, exported: Exported, batch: Obs, what: str, site: str
) -> list[Finding]:
    """The worst of several numbers of rows, as one finding; none where they agree."""
    worst: Finding | None = None
    for n in (min(TRACED, rows(batch)), rows(batch), 1):
        part = take(batch, slice(0, n))
        try:
            eager = _evaluated(subject, subject.policy, part)
        except (ValueError, RuntimeError):
            continue  # torch's batch norm refuses a batch of one in train mode
        made = f"made with {min(TRACED, rows(batch))} rows, run on {n}"
        try:
            other = _evaluated(subject, exported, part)
        except Exception as error:  # an exported program may fail in any way
            line = " ".join(str(error).split())[:120]
            message = f"{what}, {made}, fails: {line}"
            return [Finding(message, site=site, value=float("inf"), threshold=0.0)]
        floor = _floor(eager)
        gap = probe.largest_gap(eager, other) if eager.shape == other.shape else float("inf")
        if not gap <= floor and (worst is None or gap > worst.value):
            message = f"{what}, {made}, differs from the policy by up to {gap:.3g}"
            worst = Finding(message, site=site, value=gap, floor=floor, threshold=floor)
    return [] if worst is None else [worst]


def _train_mode(
    subject: Subject, exported: Exported, batch: Obs, frozen: list[LayerFacts], what: str, site: str
) -> Finding:
    """An export of a policy that acts in train mode: its layers will never leave that mode."""
    got = _evaluated(subject, exported, batch)
    with training_mode(subject, False):
        wanted = _evaluated(subject, subject.policy, batch)
    gap, floor = probe.largest_gap(got, wanted), _floor(wanted)
    return Finding(
        f"{what} was made in train mode and stays in it: {frozen[0].name} normalizes by whatever "
        "batch comes, or draws at random",
        network=frozen[0].role,
        first=frozen[0].path or frozen[0].role,
        largest=max(frozen, key=lambda f: f.mode_gap).path or frozen[0].role,
        site=site,
        value=gap,
        floor=floor,
        threshold=floor,
    )


def _blamed(exam: Examination, export: Exporter, found: Finding) -> Finding:
    """The finding with the innermost modules that differ when they are exported on their own."""
    gaps: dict[str, float] = {}
    network = ""
    for call in exam.calls:  # children return before the modules around them
        around = any(name.startswith(f"{call.path}.") for name in gaps) or (
            call.path == "" and gaps
        )
        if call.role not in exam.acting_roles or call.batch < 2 or around:
            continue
        x = call.inputs[0]
        try:
            alone = Subject.from_module(call.module, x, name=call.name)
            exported = export(Whole(alone, alone.networks), (take(x, slice(0, TRACED)),))
            differences = _differences(alone, exported, x, "", "")
        # A module that cannot be exported on its own is not blamed.
        except Exception:
            continue
        if differences:
            network = network or call.role
            gaps[call.path or call.role] = differences[0].value
    effect = exam.in_action_units(torch.tensor(found.value))
    if not gaps:
        return replace(found, effect=effect)
    largest = max(gaps, key=gaps.__getitem__)
    return replace(found, network=network, first=next(iter(gaps)), largest=largest, effect=effect)


_MEND = (
    "Export in eval mode (`policy.eval()` first), and let the batch size come from the input: no "
    "Python numbers of rows, no branch on the number of rows, no state outside of buffers."
)


# ---------------------------------------------------------------------------------------- BP602


@rule(
    "BP602",
    "torchscript-differs",
    "the TorchScript trace is not the policy",
    what="Traces the policy with `torch.jit.trace` on 6 rows, in the modes in which it acts.",
    detected=(
        "max |trace(x) - policy(x)| on 6 rows, on the whole probe batch and on one row > 64 "
        "rounding errors of the largest output, or the trace fails on one of them. Where it acts "
        "in train mode, the trace is compared with eval mode. Not applicable where no layer of the "
        "acting networks couples rows, keeps state or draws at random."
    ),
    why=(
        "A trace keeps what Python computed on the way: a number of rows, the branch that was "
        "taken, the training flag. `trace.eval()` changes none of it. The robot then runs another "
        "policy than the simulator."
    ),
    mend=_MEND,
    fix="restore-eval",
    safe=False,
    references=("https://docs.pytorch.org/docs/stable/generated/torch.jit.trace.html",),
    finite="act",
)
def torchscript_differs(exam: Examination) -> Outcome:
    """BP602."""
    return _compared(exam, _traced, "the TorchScript trace", "torch.jit.trace")


def _traced(module: nn.Module, example: tuple[Any, ...]) -> Exported:
    with torch.no_grad():
        return torch.jit.trace(module, example, check_trace=False)


# ---------------------------------------------------------------------------------------- BP603


@rule(
    "BP603",
    "torch-export-differs",
    "the program of torch.export is not the policy",
    what=(
        "Exports the policy with `torch.export` on 6 rows, with the number of rows left open, in "
        "the modes in which it acts."
    ),
    detected=(
        "max |program(x) - policy(x)| on 6 rows, on the whole probe batch and on one row > 64 "
        "rounding errors of the largest output, or the program refuses one of them. Where it acts "
        "in train mode, the program is compared with eval mode. Not applicable as in BP602; "
        "skipped where the policy cannot be exported at all."
    ),
    why=(
        "An export that took the number of rows for a constant, or that was made in train mode, "
        "serves another policy than the one that was tested, or none."
    ),
    mend=_MEND,
    fix="restore-eval",
    safe=False,
    references=("https://docs.pytorch.org/docs/stable/export.html",),
    finite="act",
)
def torch_export_differs(exam: Examination) -> Outcome:
    """BP603."""
    return _compared(exam, _programmed, "the exported program", "torch.export")


def _open_batch(obs: Obs) -> Any:
    first = {0: torch.export.Dim.AUTO}
    return {key: first for key in obs} if isinstance(obs, dict) else first


def _programmed(module: nn.Module, example: tuple[Any, ...]) -> Exported:
    program = torch.export.export(
        module, example, dynamic_shapes={"obs": _open_batch(example[0])}, strict=False
    )
    return program.module()


# ---------------------------------------------------------------------------------------- BP604


@rule(
    "BP604",
    "onnx-differs",
    "the ONNX file is not the policy",
    what="Exports the policy to ONNX on 6 rows and runs it with onnxruntime.",
    detected=(
        "max |onnx(x) - policy(x)| on 6 rows, on the whole probe batch and on one row > 64 "
        "rounding errors of the largest output, or onnxruntime refuses one of them. Where it acts "
        "in train mode, the file is compared with eval mode. The export takes seconds, so the rule "
        "runs only on request: --only BP604. Not applicable as in BP602; skipped where onnx, "
        "onnxscript or onnxruntime is not installed (pip install 'batchproof[onnx]')."
    ),
    why="What runs on the robot is the file, not the module that was tested.",
    mend=_MEND,
    fix="restore-eval",
    safe=False,
    references=("https://docs.pytorch.org/docs/stable/onnx.html",),
    on_request=True,
    finite="act",
)
def onnx_differs(exam: Examination) -> Outcome:
    """BP604."""
    if not exam.layers_of(*exam.acting_roles):
        return _compared(exam, _onnx, "", "")
    missing = [
        name
        for name in ("onnx", "onnxscript", "onnxruntime")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        return skipped(f"not installed: {', '.join(missing)} (pip install 'batchproof[onnx]')")
    return _compared(exam, _onnx, "the ONNX file", "torch.onnx.export")


def _onnx(module: nn.Module, example: tuple[Any, ...]) -> Exported:
    import onnxruntime

    program = torch.onnx.export(
        module,
        example,
        dynamo=True,
        dynamic_shapes={"obs": _open_batch(example[0])},
        verbose=False,
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [part.name for part in session.get_inputs()]

    def run(obs: Obs) -> Tensor:
        values = list(obs.values()) if isinstance(obs, dict) else [obs]
        feed = {name: value.cpu().numpy() for name, value in zip(names, values, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run
