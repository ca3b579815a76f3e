"""Trained actors of the lab as PyTorch modules, ONNX files and Stable-Baselines3 models.

A run's checkpoint is read by the names of its arrays, with NumPy: nothing here needs JAX. Each
export is proven: the written file is read back, acts on real observations, and must give the lab's
own actions up to rounding, or it is not written. The lab's actions are handed in
(`batchproof.lab.load.actions`), so that neither half imports the other.

Shapes: ``B`` rows, ``O`` obs, ``A`` action, ``C`` critics, ``P`` seeds of a run.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from batchproof import records, run_record
from batchproof.clinic.subject import Subject, Transitions
from batchproof.errors import BatchproofError
from batchproof.layers import BatchRenorm1d, create_norm
from batchproof.modes import Plan, Slot

FORMATS = {"torch": ".safetensors", "onnx": ".onnx", "sb3": ".zip"}
"""What can be written, and how such a file's name ends."""

ROUNDING = 32
"""Times of rounding, as measured against float64, that an export may differ from the lab by."""

ALGORITHMS = ("td3", "sac", "ddpg", "crossq", "xqc", "maddpg", "reinforce")
HIDDEN = re.compile(r"agent\.(actor|critic)s?(?:\.\d+)?\.params\.linear_(\d+)\.weight")
FEWEST = 64  # transitions that make a replay worth speaking of
SQUASHED = ("sac", "crossq", "xqc")  # actors whose output is mean and log std, (B, 2 A)
CLIP, NORMALIZER_EPS, REWARD_EPS = 10.0, 1e-8, 1e-8  # as `batchproof.lab.obs_norm` and its xqc
FILE_FORMAT = "batchproof.actor.1"
RENORM_OPTIONS = ("formula", "warmup", "warmup_steps", "r_max", "d_max")
Bounds = tuple[np.ndarray, np.ndarray]
Act = Callable[[np.ndarray], np.ndarray]
Layers = dict[str, nn.Module]


class ObsNormalizer(nn.Module):
    """Observations (B, O) less the mean, over the standard deviation, clipped to +-10.

    What ``--normalize-obs`` does; its statistics stay as they are, also after ``train()``.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))

    def forward(self, obs: Tensor) -> Tensor:
        """Normalize."""
        return ((obs - self.mean) * torch.rsqrt(self.var + NORMALIZER_EPS)).clamp(-CLIP, CLIP)


class ActionScale(nn.Module):
    """Actions (B, A) from [-1, 1] to the environment's bounds."""

    low: Tensor
    high: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("low", -torch.ones(features))
        self.register_buffer("high", torch.ones(features))

    def forward(self, action: Tensor) -> Tensor:
        """Scale."""
        return self.low + 0.5 * (action + 1) * (self.high - self.low)


class Part(nn.Module):
    """Columns ``begin`` to ``end`` of a team's observations: those of one agent."""

    def __init__(self, begin: int, end: int) -> None:
        super().__init__()
        self.begin, self.end = begin, end

    def forward(self, obs: Tensor) -> Tensor:
        """Take the columns."""
        return obs[..., self.begin : self.end]


class AgentCode(nn.Module):
    """A one-hot beside the observation: which agent a shared network acts for."""

    code: Tensor

    def __init__(self, count: int, index: int) -> None:
        super().__init__()
        code = torch.zeros(count)
        code[index] = 1
        self.register_buffer("code", code)

    def forward(self, obs: Tensor) -> Tensor:
        """Put the code behind the observation."""
        return torch.cat([obs, self.code.expand(len(obs), -1)], -1)


class Critics(nn.Module):
    """A run's critics on the same rows.

    Attributes:
        start: what an observation goes through first.
        before, after: what each critic runs until the action enters, and from there.
        atoms: values of a categorical critic's atoms, (N,); None where it gives Q itself.
    """

    atoms: Tensor | None

    def __init__(
        self,
        start: nn.Sequential,
        nets: list[tuple[nn.Sequential, nn.Sequential]],
        atoms: Tensor | None,
    ) -> None:
        super().__init__()
        self.start = start
        self.before = nn.ModuleList(before for before, _ in nets)
        self.after = nn.ModuleList(after for _, after in nets)
        self.register_buffer("atoms", atoms)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, ...]:
        """Q of each critic, (B, 1) each, on ``obs`` (B, O) and ``action`` (B, A) in [-1, 1]."""
        obs = self.start(obs)
        values = []
        for before, after in zip(self.before, self.after, strict=True):
            output = after(torch.cat([before(obs), action], -1))
            if self.atoms is not None:
                output = (torch.softmax(output, -1) @ self.atoms)[:, None]
            values.append(output)
        return tuple(values)


# --- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabRun:
    """A run of ``batchproof train``, as NumPy arrays.

    Attributes:
        folder: where it is.
        training: what was trained, as ``run.json`` says it.
        spaces: sizes of observations and actions, and the agents where there are several.
        step: environment steps done.
        arrays: the checkpoint by name, for example ``agent.actor.params.linear_0.weight``; each
            has a leading axis P. ``rows`` is the replay (`batchproof.lab.replay`), a sample of it
            where the run is finished.
    """

    folder: Path
    training: dict[str, Any]
    spaces: dict[str, Any]
    step: int
    arrays: dict[str, np.ndarray]

    @property
    def algo(self) -> str:
        """The algorithm's name."""
        return self.training["algo"]

    @property
    def config(self) -> dict[str, Any]:
        """The algorithm's configuration."""
        return self.training["config"]

    @property
    def plan(self) -> Plan:
        """The mode plan."""
        return Plan.parse(self.config["plan"])

    @property
    def agents(self) -> tuple[str, ...]:
        """Names of the agents, () where there is one."""
        return tuple(self.spaces["agents"]["names"]) if self.spaces["agents"] else ()

    def of(self, seed: int, *names: str | int) -> dict[str, np.ndarray]:
        """The arrays of one seed below a name: what follows it to the array.

        Raises:
            BatchproofError: no such seed.
        """
        seeds = self.training["seeds"]
        if seed not in seeds:
            known = ", ".join(map(str, seeds))
            raise BatchproofError(f"seed {seed} was not trained in this run: it has {known}")
        index, start = seeds.index(seed), ".".join(map(str, names)) + "."
        return {
            name.removeprefix(start): array[index]
            for name, array in self.arrays.items()
            if name.startswith(start)
        }

    def replayed(self, seed: int, count: int) -> dict[str, np.ndarray] | None:
        """Up to ``count`` transitions of a seed's replay, for `to_subject`; the same in each call.

        None where the checkpoint holds fewer than `FEWEST`: of an agent without replay, or made
        before runs kept a sample.

        Raises:
            BatchproofError: the record speaks of other sizes than were saved.
        """
        rows = self.arrays.get("rows")
        if rows is None:
            return None
        obs, rewards = self.spaces["obs_size"], len(self.agents) or 1
        cuts = np.cumsum([obs, self.spaces["action_size"], rewards, 1])
        if rows.ndim != 3 or rows.shape[2] != cuts[-1] + obs:
            run_record.refuse(self.folder / "run.json", "sizes that the replay has not")
        if rows.shape[1] < FEWEST:
            return None
        # In no order of time, for rules look at the first rows: the oldest are random actions'.
        chosen = np.random.default_rng(seed).permutation(rows.shape[1])[:count]
        own = rows[self.training["seeds"].index(seed), chosen]
        parts = np.split(own, cuts, axis=1)
        parts[2] = parts[2] if self.agents else parts[2][:, 0]
        names = ("obs", "action", "reward", "terminated", "next_obs")
        return dict(zip(names, parts, strict=True)) | {"terminated": parts[3][:, 0]}

    def agent_index(self, agent: str | None) -> int | None:
        """Number of the agent that is meant, None in a run of one.

        Raises:
            BatchproofError: no such agent, or none named where there are several.
        """
        if not self.agents:
            if agent is not None:
                raise BatchproofError(f"--agent {agent}: this run has one agent: leave it out")
            return None
        if agent not in self.agents:
            which = f"unknown agent {agent!r}" if agent else f"{len(self.agents)} agents"
            raise BatchproofError(
                f"{self.folder}: {which}: name one with --agent: {', '.join(self.agents)}"
            )
        return self.agents.index(agent)


def read_run(folder: Path | str) -> LabRun:
    """Read ``run.json`` and ``checkpoint/`` of a run's folder.

    Raises:
        BatchproofError: missing, damaged, or made by another version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    run = run_record.read(folder)
    state_path = folder / "checkpoint" / "state.json"
    if not state_path.is_file():
        raise BatchproofError(f"{folder}: no checkpoint yet: let the run come further first")
    state = records.read_json(state_path)
    kinds = {"arrays": str, "sha256": str, "step": int}
    if not isinstance(state, dict) or not all(
        isinstance(state.get(name), kind) for name, kind in kinds.items()
    ):
        raise BatchproofError(f"{state_path}: not a checkpoint of this version")
    arrays = folder / "checkpoint" / Path(state["arrays"]).name
    if not arrays.is_file() or records.file_digest(arrays) != state["sha256"]:
        raise BatchproofError(f"{arrays}: missing or damaged: its checksum differs from state.json")
    try:
        loaded = load_file(arrays)
    except SafetensorError as error:
        raise BatchproofError(f"{arrays}: not a safetensors file ({error})") from None
    _check_fit(run, folder / "run.json", loaded)
    # The steps of a run that was not finished keep the agent within what else they carry.
    return LabRun(folder, run["training"], run["spaces"], int(state["step"]), loaded)


def _check_fit(run: run_record.Part, path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Raise a `BatchproofError` where the record speaks of other networks than were saved."""
    training = run["training"]
    config, count = training["config"], len(training["seeds"])
    if training["algo"] not in ALGORITHMS:
        run_record.refuse(path, f"unknown algorithm {training['algo']}")
    if training.get("normalize_obs") and "obs_moments.mean" not in arrays:
        run_record.refuse(path, "normalize_obs, and the checkpoint has no statistics for it")
    held: dict[str, dict[int, int]] = {"actor": {}, "critic": {}}
    for name, array in arrays.items():
        if name.startswith("agent.actor") and array.shape[:1] < (count,):
            run_record.refuse(path, f"{count} seeds, and fewer in the checkpoint")
        if part := HIDDEN.fullmatch(name):
            held[part[1]][int(part[2])] = array.shape[-1]
    for role, widths in held.items():
        said = config[role]["hidden"] if role in config else None
        if said is not None and said != [widths[i] for i in sorted(widths)]:
            run_record.refuse(path, f"hidden layers of the {role} that the checkpoint has not")
    first, last = (
        arrays.get(f"agent.actor.params.{name}.weight")
        for name in ("linear_0" if held["actor"] else "linear_out", "linear_out")
    )
    spaces = run["spaces"]
    if spaces["agents"] is None and first is not None and last is not None:
        outputs = spaces["action_size"] * (1 + (training["algo"] in SQUASHED))
        if (first.shape[-2], last.shape[-1]) != (spaces["obs_size"], outputs):
            run_record.refuse(path, "sizes of observations or actions that the checkpoint has not")


# --- building ----------------------------------------------------------------------------------


class _Affine(NamedTuple):
    """What a norm that runs on running statistics does: scale * x + shift, in float64."""

    scale: np.ndarray
    shift: np.ndarray


def to_torch(
    run: LabRun,
    seed: int,
    *,
    agent: str | None = None,
    bounds: Bounds | None = None,
    fold: bool = False,
) -> nn.Sequential:
    """The deterministic actor as a module from observations (B, O) to actions (B, A), in eval mode.

    Layers are torch's, norms those of `batchproof.layers`; where the run normalizes observations,
    that is its first layer. SAC, CrossQ and XQC give the mean action, REINFORCE its clipped mean.

    Args:
        run: from `read_run`.
        seed: one of the run's.
        agent: whose actor, in a run of several.
        bounds: the environment's lowest and highest actions, (A,) each; None leaves actions in
            [-1, 1], where the lab keeps them.
        fold: put batch norms into the linear layers beside them.

    Raises:
        BatchproofError: no such seed or agent; a slot 0 that uses the batch's statistics; nothing
            to fold.
    """
    if acting_letter(run) in ("T", "t"):
        raise BatchproofError(
            f"{run.folder}: slot 0 of its plan {run.plan} acts on the batch's statistics, so what "
            "it does depends on who else is in the batch: train with E in slot 0 to export it"
        )
    return _actor(run, seed, run.agent_index(agent), bounds=bounds, fold=fold).eval()


def acting_letter(run: LabRun) -> str:
    """The mode in which the lab's evaluations act; REINFORCE's is ``E`` where slot 0 is not."""
    letter = run.plan[Slot.ACT].letter
    return "E" if run.algo == "reinforce" and letter != "B" else letter


def _actor(
    run: LabRun,
    seed: int,
    agent: int | None,
    *,
    target: bool = False,
    bounds: Bounds | None = None,
    fold: bool = False,
    normalize: bool = True,
) -> nn.Sequential:
    role = "target_actor" if target else "actor"
    start = _start(run, seed, agent, normalize=normalize)
    if agent is None:
        arrays = run.of(seed, "agent", role)
        output = run.spaces["action_size"]
    else:
        arrays = run.of(seed, "agent", f"{role}s", _network_of(run, agent))
        output = run.spaces["agents"]["action_sizes"][agent]
    if not any(name.startswith("params.") for name in arrays):
        raise BatchproofError(f"{run.folder}: this run keeps no {role.replace('_', ' ')}")
    skip = acting_letter(run) == "B"
    layers = start | _layers(arrays, run.config["actor"], skip_norms=skip)
    if run.algo in SQUASHED:
        last: Any = layers["linear_out"]
        layers["linear_out"] = _linear(last.weight[:output].detach(), last.bias[:output].detach())
    if fold:
        layers = _folded(layers, run)
    layers |= {"clip": nn.Hardtanh()} if run.algo == "reinforce" else {"tanh": nn.Tanh()}
    if bounds is not None and not (np.all(bounds[0] == -1) and np.all(bounds[1] == 1)):
        scale = ActionScale(output)
        _fill(scale, low=bounds[0], high=bounds[1])
        layers["action_scale"] = scale
    return _sequential(layers)


def _sequential(layers: Layers) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def actor_layers(run: LabRun, seed: int, role: str = "actor") -> list[nn.Module]:
    """The layers of a run's only actor, or of its ``target_actor``, as they were trained."""
    return list(_layers(run.of(seed, "agent", role), run.config["actor"]).values())


def critics(run: LabRun, seed: int, *, agent: str | None = None, target: bool = False) -> Critics:
    """The critics, or the target critics, on observations and actions in [-1, 1]; eval mode.

    Of several agents centralized critics take the observations and actions of all side by side.

    Raises:
        BatchproofError: no such seed or agent, or a run without such critics.
    """
    return _critics(run, seed, run.agent_index(agent), target=target).eval()


def _critics(
    run: LabRun, seed: int, agent: int | None, *, target: bool = False, normalize: bool = True
) -> Critics:
    role = "target_critic" if target else "critic"
    if agent is None:
        arrays = run.of(seed, "agent", role)
        start = _start(run, seed, None, normalize=normalize)
    else:
        arrays = run.of(seed, "agent", f"{role}s", _network_of(run, agent))
        whole = run.config["centralized"]
        start = _start(run, seed, agent, whole=whole, normalize=normalize)
    if not any(name.startswith("params.") for name in arrays):
        raise BatchproofError(f"{run.folder}: this run keeps no {role.replace('_', ' ')}")
    mlp = run.config["critic"]
    count = len(next(iter(arrays.values())))
    late = "before-action" in mlp["norm"]["placement"].split("+")
    nets = []
    for c in range(count):
        layers = list(_layers({k: v[c] for k, v in arrays.items()}, mlp).items())
        at = [name for name, _ in layers].index("linear_1") if late else 0
        nets.append((_sequential(dict(layers[:at])), _sequential(dict(layers[at:]))))
    atoms = None
    if "atoms" in run.config:
        values = np.linspace(run.config["low"], run.config["high"], run.config["atoms"])
        atoms = torch.as_tensor(values, dtype=torch.float32)
    return Critics(_sequential(start), nets, atoms)


def _network_of(run: LabRun, agent: int) -> int:
    """Number of the network that serves an agent: its own, or the shared one."""
    return 0 if run.config["share_parameters"] else agent


def _start(
    run: LabRun, seed: int, agent: int | None, *, whole: bool = False, normalize: bool = True
) -> Layers:
    """What an observation goes through first: the normalizer, and a shared network's agent code."""
    layers: Layers = {}
    columns = slice(None)
    if agent is not None and not whole:
        columns = _columns_of(run, agent)
    if normalize and run.training["normalize_obs"]:
        moments = run.of(seed, "obs_moments")
        normalizer = ObsNormalizer(len(moments["mean"][columns]))
        _fill(normalizer, mean=moments["mean"][columns], var=moments["var"][columns])
        layers["obs_normalizer"] = normalizer
    if agent is not None and run.config["share_parameters"] and len(run.agents) > 1:
        layers["agent_code"] = AgentCode(len(run.agents), agent)
    return layers


def _columns_of(run: LabRun, agent: int, kind: str = "obs_sizes") -> slice:
    """Where an agent's values stand among those of all."""
    ends = np.cumsum([0, *run.spaces["agents"][kind]])
    return slice(int(ends[agent]), int(ends[agent + 1]))


def _layers(
    arrays: dict[str, np.ndarray], mlp: dict[str, Any], *, skip_norms: bool = False
) -> Layers:
    """One network's layers in their order, by the lab's names."""
    layers: Layers = {}

    def add(name: str) -> None:
        own = {key.rsplit(".", 1)[1]: value for key, value in arrays.items() if f".{name}." in key}
        if own and not (skip_norms and name.startswith("norm_")):
            linear = name.startswith("linear_")
            layers[name] = _linear_of(own) if linear else _norm(own, mlp["norm"])

    add("norm_input")
    for i in range(len(mlp["hidden"])):
        add(f"linear_{i}")
        add(f"norm_pre_{i}")
        layers[f"relu_{i}"] = nn.ReLU()
        add(f"norm_post_{i}")
    add("linear_out")
    return layers


def _linear_of(own: dict[str, np.ndarray]) -> nn.Linear:
    bias = own.get("bias")
    # The lab's weights are (in, out).
    weight = torch.from_numpy(np.array(own["weight"].T, order="C"))
    return _linear(weight, None if bias is None else torch.from_numpy(np.array(bias)))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight.float().clone()
    if bias is not None:
        layer.bias.data = bias.float().clone()
    return layer


def norm_options(norm: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `create_norm` for a norm of a run's configuration."""
    names = ["eps"]
    if norm["kind"] == "group":
        names += ["groups"]
    if norm["kind"] in ("batch", "renorm"):
        names += ["momentum", "batch_variance", "running_variance", "estimator"]
    if norm["kind"] == "renorm":
        names += RENORM_OPTIONS
    return {name: norm[name] for name in names}


def _norm(own: dict[str, np.ndarray], norm: dict[str, Any]) -> nn.Module:
    layer = create_norm(norm["kind"], len(own["scale"]), **norm_options(norm))
    names = {
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
        "count": "num_batches_tracked",
    }
    _fill(layer, **{names[name]: value for name, value in own.items()})
    return layer


def _fill(module: nn.Module, **values: np.ndarray) -> None:
    """Write arrays into a module's parameters and buffers, which must have their shapes."""
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, value in values.items():
        tensor = torch.as_tensor(np.array(value))
        held[name].data.copy_(tensor.reshape(held[name].shape))


def _folded(layers: Layers, run: LabRun) -> Layers:
    """The layers without batch norms: each goes into the linear layer before it, or after it."""
    done = dict(layers)
    for name, norm in layers.items():
        if not hasattr(norm, "running_mean"):
            continue
        affine, names = _affine(norm), list(done)
        at = names.index(name)
        before, after = names[at - 1] if at else "", names[at + 1]
        if before.startswith("linear_"):
            done[before] = _into_output(done[before], affine)
        else:  # on the input, or behind an activation: always before a linear layer
            done[after] = _into_input(done[after], affine)
        del done[name]
    if len(done) == len(layers):
        raise BatchproofError(
            f"--fold: the actor in {run.folder} has no norm with running statistics: leave it out"
        )
    return done


def _affine(norm: Any) -> _Affine:
    arrays = {k: v.detach().numpy().astype(np.float64) for k, v in norm.state_dict().items()}
    scale = arrays["weight"] / np.sqrt(arrays["running_var"] + norm.eps)
    return _Affine(scale, arrays["bias"] - scale * arrays["running_mean"])


def _into_output(linear: Any, norm: _Affine) -> nn.Linear:
    """scale * (W x + b) + shift."""
    weight, bias = _arrays(linear)
    return _rounded(norm.scale[:, None] * weight, norm.scale * bias + norm.shift)


def _into_input(linear: Any, norm: _Affine) -> nn.Linear:
    """W (scale * x + shift) + b."""
    weight, bias = _arrays(linear)
    return _rounded(weight * norm.scale, weight @ norm.shift + bias)


def _arrays(linear: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    weight = linear.weight.detach().numpy().astype(np.float64)
    bias = np.zeros(len(weight)) if linear.bias is None else linear.bias.detach().numpy()
    return weight, bias.astype(np.float64)


def _rounded(weight: np.ndarray, bias: np.ndarray) -> nn.Linear:
    return _linear(torch.from_numpy(weight), torch.from_numpy(bias))


# --- proof -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """What an export gives beside what the lab gives.

    Attributes:
        rows: observations compared.
        error: max |export(obs) - lab(obs)|, in the units of the export.
        tolerance: `ROUNDING` times what rounding does: the largest of one unit in the last place
            of the actions and the float32 module's distance from itself in float64.
    """

    rows: int
    error: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"proof: max |export - lab| = {self.error:.3g} on {self.rows} observations "
            f"(rounding: {self.tolerance:.3g})"
        )


def prove(
    act: Act, module: nn.Module, obs: np.ndarray, actions: np.ndarray, bounds: Bounds | None = None
) -> Proof:
    """Compare an export with the lab on observations.

    Args:
        act: what was written and read back: actions (B, A) for observations (B, O).
        module: the same as a torch module, whose rounding is measured.
        obs: real observations (N, O), float32.
        actions: the lab's on these, (N, A) in [-1, 1].
        bounds: what the export scales actions to.

    Raises:
        BatchproofError: they differ by more than rounding.
    """
    with torch.no_grad():
        given = torch.from_numpy(obs)
        single = module(given).numpy().astype(np.float64)
        double = _copy(module).double()(given.double()).numpy()
    lab = np.asarray(actions, np.float64)
    if bounds is not None:
        low, high = (np.asarray(side, np.float64) for side in bounds)
        lab = low + 0.5 * (lab + 1) * (high - low)
    error = float(np.abs(act(obs) - lab).max())
    unit = float(np.finfo(np.float32).eps) * max(1.0, float(np.abs(lab).max()))
    rounding: float = max(unit, float(np.abs(single - double).max()))
    proof = Proof(len(obs), error, ROUNDING * rounding)
    if not error <= proof.tolerance:  # a NaN fails too
        raise BatchproofError(
            f"not written: the export differs from the lab by {error:.3g}, where rounding explains "
            f"{proof.tolerance:.3g}: please report this with the run's run.json"
        )
    return proof


def _copy(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module)


# --- writing -----------------------------------------------------------------------------------


def save_torch(module: nn.Sequential, path: Path) -> None:
    """Write a module of `to_torch` as safetensors: its state, and its layers as JSON metadata."""
    from safetensors.torch import save

    layers = json.dumps([{"name": n} | _described(layer) for n, layer in module.named_children()])
    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    path.write_bytes(save(state, metadata={"format": FILE_FORMAT, "layers": layers}))


def load_torch(path: Path | str) -> nn.Sequential:
    """Read what `save_torch` wrote: an `nn.Sequential` in eval mode. Nothing is unpickled.

    Raises:
        BatchproofError: missing, damaged, or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise BatchproofError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BatchproofError(f"{path}: not a safetensors file ({error})") from None
    if metadata.get("format") != FILE_FORMAT:
        raise BatchproofError(f"{path}: not an actor of `batchproof export --format torch`")
    described = json.loads(metadata["layers"])
    module = _sequential({layer.pop("name"): _built(layer) for layer in described})
    module.load_state_dict(state)
    return module.eval()


_PLAIN = {"ReLU": nn.ReLU, "Tanh": nn.Tanh, "Hardtanh": nn.Hardtanh}
_SIZED = {"ObsNormalizer": ObsNormalizer, "ActionScale": ActionScale}


def _described(layer: Any) -> dict[str, Any]:
    kind = type(layer).__name__
    if kind in _PLAIN:
        return {"layer": kind}
    if isinstance(layer, nn.Linear):
        sizes = {"in": layer.in_features, "out": layer.out_features}
        return {"layer": kind, **sizes, "bias": layer.bias is not None}
    if kind in _SIZED:
        return {"layer": kind, "features": len(next(layer.buffers()))}
    if isinstance(layer, AgentCode):
        index = int(layer.code.argmax())
        return {"layer": kind, "count": len(layer.code), "index": index}
    return {"layer": kind} | _norm_options(layer)


def _norm_options(layer: Any) -> dict[str, Any]:
    """A norm's name and features, and its options by the names of `create_norm`."""
    if isinstance(layer, nn.GroupNorm):
        sizes = {"features": layer.num_channels, "groups": layer.num_groups}
        return {"norm": "group", **sizes, "eps": layer.eps}
    for kind, name in ((nn.LayerNorm, "layer"), (nn.RMSNorm, "rms")):
        if isinstance(layer, kind):
            return {"norm": name, "features": layer.normalized_shape[0], "eps": layer.eps}
    names = ("eps", "momentum", "batch_variance", "running_variance", "estimator")
    options = {name: getattr(layer, name) for name in names}
    if isinstance(layer, BatchRenorm1d):
        options |= {name: getattr(layer.renorm, name) for name in RENORM_OPTIONS}
        return {"norm": "renorm", "features": layer.num_features} | options
    return {"norm": "batch", "features": layer.num_features} | options


def _built(described: dict[str, Any]) -> nn.Module:
    options = dict(described)
    kind = options.pop("layer")
    if kind in _PLAIN:
        return _PLAIN[kind]()
    if kind == "Linear":
        return nn.Linear(options["in"], options["out"], bias=options["bias"])
    if kind in _SIZED:
        return _SIZED[kind](options["features"])
    if kind == "AgentCode":
        return AgentCode(options["count"], options["index"])
    return create_norm(options.pop("norm"), options.pop("features"), **options)


def save_onnx(module: nn.Sequential, path: Path, obs_size: int) -> None:
    """Write a module of `to_torch` as ONNX: ``obs`` (B, O) to ``action`` (B, A), B left open."""
    import logging
    import warnings

    _need_onnx()
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program = torch.onnx.export(
                module,
                (torch.zeros(6, obs_size),),
                dynamo=True,
                input_names=["obs"],
                output_names=["action"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    finally:
        logging.disable(disabled)
    assert program is not None
    path.write_bytes(program.model_proto.SerializeToString())


def run_onnx(path: Path) -> Act:
    """What an ONNX file of `save_onnx` gives, by onnxruntime."""
    _need_onnx()
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda obs: session.run(["action"], {"obs": obs})[0]


def _need_onnx() -> None:
    import importlib.util

    needed = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise BatchproofError(f"{', '.join(missing)} not installed: pip install 'batchproof[onnx]'")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; it takes its place once the block has ended well.

    It is in a new folder of its own, so that no link in ``path``'s folder is followed.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        raise BatchproofError(f"cannot write {path}: {error.strerror or error}") from error


def write(
    run: LabRun,
    seed: int,
    kind: str,
    path: Path,
    *,
    agent: str | None = None,
    bounds: Bounds | None = None,
    fold: bool = False,
    proof: tuple[np.ndarray, np.ndarray] | None = None,
) -> Proof | None:
    """Export an actor to a file, proven on the file itself.

    Args:
        run: from `read_run`.
        seed: one of the run's.
        kind: ``torch`` or ``onnx``.
        path: where to.
        agent: whose actor, in a run of several.
        bounds: as in `to_torch`.
        fold: as in `to_torch`.
        proof: observations (N, O) and the lab's actions on them, (N, A) in [-1, 1]; None writes
            without a proof.

    Returns:
        The proof; None where there was none to make.

    Raises:
        BatchproofError: as `to_torch` and `prove`; nothing is written then.
    """
    module = to_torch(run, seed, agent=agent, bounds=bounds, fold=fold)
    done = None
    with replacing(path) as temporary:
        if kind == "onnx":
            save_onnx(module, temporary, obs_size(run, agent))
        else:
            save_torch(module, temporary)
        if proof is not None:
            act = run_onnx(temporary) if kind == "onnx" else _act_of(load_torch(temporary))
            done = prove(act, module, proof[0], proof[1], bounds)
    return done


def env_bounds(run: LabRun, seed: int) -> Bounds:
    """The lowest and highest actions (A,) of a run's Gymnasium environment.

    Raises:
        BatchproofError: it is not installed.
    """
    env = make_env(run, seed)
    space: Any = env.action_space
    env.close()
    return space.low.reshape(-1), space.high.reshape(-1)


def make_env(run: LabRun, seed: int) -> Any:
    """A run's Gymnasium environment.

    Raises:
        BatchproofError: it is not installed.
    """
    from batchproof.envs import make

    env_id, options = run.training["env_id"], run.training["env_options"]
    if isinstance(options, list):
        options = options[run.training["seeds"].index(seed)]
    try:
        return make(env_id, options)
    except Exception as error:  # registries load other people's modules
        line = " ".join(str(error).split())[:160]
        raise BatchproofError(f"cannot make the environment {env_id!r}: {line}") from None


def _act_of(module: nn.Module) -> Act:
    def act(obs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(obs)).numpy()

    return act


def obs_size(run: LabRun, agent: str | None = None) -> int:
    """O of an actor."""
    index = run.agent_index(agent)
    return run.spaces["obs_size"] if index is None else run.spaces["agents"]["obs_sizes"][index]


# --- the clinic --------------------------------------------------------------------------------


def to_subject(
    run: LabRun,
    seed: int,
    obs: np.ndarray,
    *,
    agent: str | None = None,
    transitions: dict[str, np.ndarray] | None = None,
    bounds: Bounds | None = None,
    collected: bool = False,
) -> Subject:
    """A lab checkpoint for the clinic: actor, critics and their targets as torch modules.

    Each network is handed over as it acts: in train mode where slot 0 of the plan uses the batch's
    statistics. Observations are those of the environment; where the run normalizes them, they go
    to the networks normalized, and XQC's rewards scaled, as in training. With centralized critics
    an agent's networks take the observations and actions of all agents side by side.

    Args:
        run: from `read_run`.
        seed: one of the run's.
        obs: (N, O), of all agents side by side where there are several.
        agent: whose networks, in a run of several.
        transitions: ``obs``, ``action`` in [-1, 1], ``reward``, ``next_obs`` and ``terminated``.
        bounds: the environment's lowest and highest actions, of all agents.
        collected: as in `Subject`: whether the policy has just made these steps itself.
    """
    index = run.agent_index(agent)
    whole = index is not None and run.config["centralized"]
    columns, actions = slice(None), slice(None)
    if index is not None and not whole:
        columns = _columns_of(run, index)
        actions = _columns_of(run, index, "action_sizes")
    moments = run.of(seed, "obs_moments") if run.training["normalize_obs"] else None

    def as_taken(raw: np.ndarray) -> Tensor:
        if moments is not None:
            std = np.sqrt(moments["var"] + np.float32(NORMALIZER_EPS))
            raw = np.clip((raw - moments["mean"]) / std, -CLIP, CLIP)
        return torch.from_numpy(np.array(raw[:, columns], np.float32))

    def actor(number: int | None, *, target: bool) -> nn.Sequential:
        net = _actor(run, seed, number, target=target, normalize=False)
        if whole and number is not None:
            part = _columns_of(run, number)
            net = _sequential({"part": Part(part.start, part.stop)} | dict(net.named_children()))
        return net.train(acting_letter(run) in ("T", "t"))

    everyone: list[int | None] = list(range(len(run.agents))) if whole else [index]
    own = everyone.index(index)
    has_critic = any(name.startswith(("agent.critic.", "agent.critics.")) for name in run.arrays)
    networks: dict[str, nn.Module] = {}
    others: dict[str, list[nn.Sequential]] = {}
    for role, held in (("actor", "actor"), ("actor_target", "target_actor")):
        if any(name.startswith(f"agent.{held}") for name in run.arrays):
            others[role] = [actor(n, target=role != "actor") for n in everyone]
            networks[role] = others[role][own]
    if has_critic:
        networks["critic"] = _critics(run, seed, index, normalize=False).eval()
    if any(name.startswith("agent.target_critic") for name in run.arrays):
        networks["critic_target"] = _critics(run, seed, index, target=True, normalize=False).eval()

    def joint(role: str) -> Callable[[Any], Tensor] | None:
        team = others.get(role)
        return None if team is None else lambda batch: torch.cat([net(batch) for net in team], -1)

    more: dict[str, Any] = {"critic_actor": joint("actor"), "target_actor": joint("actor_target")}
    if bounds is not None:
        mine = slice(None) if index is None else _columns_of(run, index, "action_sizes")
        low, high = (torch.as_tensor(side[mine], dtype=torch.float32) for side in bounds)
        net = networks["actor"]
        more |= {
            "action_low": low,
            "action_high": high,
            "policy": lambda batch: low + 0.5 * (net(batch) + 1) * (high - low),
            "act": lambda batch: (low + 0.5 * (net(batch) + 1) * (high - low)).detach(),
        }
    if transitions is not None and has_critic:
        reward = transitions["reward"] if index is None else transitions["reward"][:, index]
        if run.config.get("normalize_rewards"):
            reward = reward / (np.sqrt(run.of(seed, "agent.returns.moments")["var"]) + REWARD_EPS)
        more["transitions"] = Transitions(
            obs=as_taken(transitions["obs"]),
            action=torch.from_numpy(np.array(transitions["action"][:, actions], np.float32)),
            reward=torch.as_tensor(reward, dtype=torch.float32),
            next_obs=as_taken(transitions["next_obs"]),
            terminated=torch.as_tensor(transitions["terminated"], dtype=torch.float32),
        )
    name = f"{run.folder.resolve().name} ({run.algo}, seed {seed}{f', {agent}' if agent else ''})"
    return Subject.from_networks(
        networks,
        as_taken(obs),
        targets={role: role.removesuffix("_target") for role in networks if "_target" in role},
        name=name,
        gamma=float(run.config["gamma"]),
        collected=collected,
        plan=lambda: str(run.plan),
        **more,
    )
