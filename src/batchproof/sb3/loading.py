"""A `Subject` from a Stable-Baselines3 ``.zip``, without unpickling.

The library's files hold ``data`` (JSON, in which what JSON cannot say is a base64 pickle beside
readable text), ``policy.pth``, the optimizers' states and a few lines on versions. Here the JSON's
plain values and readable text are read, the classes that they name are looked up in tables, and
weights go through ``torch.load(weights_only=True)``. A policy is built on torch's ``meta`` device
first and its shapes are compared with the weights, so that a file cannot ask for more memory than
it brings. What is only in a pickle is refused; ``trust=True`` hands the file to the library's own
``load``, which runs what its pickles say.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import re
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.distributions import Distribution

from batchproof.clinic.observations import read_observations
from batchproof.clinic.subject import Subject
from batchproof.errors import BatchproofError

MOST_BYTES = 4 << 30
"""A member that unpacks to more is refused."""

MOST_RATIO = 200
"""A member of more than 1 MiB that is this many times its packed size is refused."""

MOST_JSON = 64 << 20
"""A ``data`` member of more bytes is refused."""

MOST_ENTRIES = 1 << 24
"""Entries of one observation; one of more is refused."""

MOST_EDITS = 1000
"""A file with more replaced layers is refused."""

SMALL_BUFFER = 2048
"""Rows of the empty replay buffer that a loaded model is given: an audit needs no more."""

_SB3, _CONTRIB = "stable_baselines3", "sb3_contrib"

_ALGORITHMS = {
    "A2C": _SB3,
    "DDPG": _SB3,
    "DQN": _SB3,
    "PPO": _SB3,
    "SAC": _SB3,
    "TD3": _SB3,
    "ARS": _CONTRIB,
    "CrossQ": _CONTRIB,
    "MaskablePPO": _CONTRIB,
    "QRDQN": _CONTRIB,
    "TQC": _CONTRIB,
    "TRPO": _CONTRIB,
}

_POLICIES = {
    f"{_SB3}.common.policies": (
        "ActorCriticPolicy",
        "ActorCriticCnnPolicy",
        "MultiInputActorCriticPolicy",
    ),
    f"{_SB3}.dqn.policies": ("DQNPolicy", "CnnPolicy", "MultiInputPolicy"),
    f"{_SB3}.sac.policies": ("SACPolicy", "CnnPolicy", "MultiInputPolicy"),
    f"{_SB3}.td3.policies": ("TD3Policy", "CnnPolicy", "MultiInputPolicy"),
    f"{_CONTRIB}.ars.policies": ("ARSPolicy", "ARSLinearPolicy"),
    f"{_CONTRIB}.common.maskable.policies": (
        "MaskableActorCriticPolicy",
        "MaskableActorCriticCnnPolicy",
        "MaskableMultiInputActorCriticPolicy",
    ),
    f"{_CONTRIB}.crossq.policies": ("CrossQPolicy",),
    f"{_CONTRIB}.qrdqn.policies": ("QRDQNPolicy", "CnnPolicy", "MultiInputPolicy"),
    f"{_CONTRIB}.tqc.policies": ("TQCPolicy", "CnnPolicy", "MultiInputPolicy"),
    "batchproof.sb3.nature_cnn": ("CnnPolicy",),
    "batchproof.sb3.policies": (
        "NormActorCriticPolicy",
        "NormDQNPolicy",
        "NormSACPolicy",
        "NormTD3Policy",
    ),
}
"""Policy classes that a file may name, by module."""

_ACTIVATIONS = ("ELU", "GELU", "LeakyReLU", "Mish", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid",
                "Softplus", "Softsign", "Tanh")  # fmt: skip
_EXTRACTORS = {
    f"{_SB3}.common.torch_layers": ("CombinedExtractor", "FlattenExtractor", "NatureCNN"),
    "batchproof.sb3.nature_cnn": ("CombinedExtractor", "NatureCNN"),
}
_OPTIMIZERS = ("Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")

_KWARG_KINDS: dict[str, str] = {
    "activation_fn": "activation",
    "features_extractor_class": "extractor",
    "optimizer_class": "optimizer",
}

_POSITIVE = ("batch_size", "gradient_steps", "n_envs", "n_epochs", "policy_delay",
             "target_update_interval", "cg_max_steps", "line_search_max_iter", "n_critic_updates",
             "sub_sampling_factor")  # fmt: skip
_COUNTS = ("_n_updates", "num_timesteps", "top_quantiles_to_drop_per_net", "learning_starts")
_NUMBERS = ("gamma", "tau", "gae_lambda", "vf_coef", "max_grad_norm", "target_policy_noise",
            "target_noise_clip", "target_kl", "exploration_fraction",
            "exploration_initial_eps", "exploration_final_eps", "cg_damping",
            "line_search_shrinking_factor", "_current_progress_remaining")  # fmt: skip
_FLAGS = ("normalize_advantage", "use_sde")


def load_subject(
    path: Path | str,
    *,
    obs: Any = None,
    env: Any = None,
    trust: bool = False,
    count: int = 512,
    seed: int = 0,
    name: str | None = None,
    vecnormalize: Path | str | None = None,
) -> Subject:
    """A subject from a model that Stable-Baselines3 or sb3-contrib saved.

    Args:
        path: the ``.zip``.
        obs: observations, or a file of them (`batchproof.clinic.observations`).
        env: an environment or its id, to collect observations in.
        trust: load with the library's own ``load``, which unpickles and so can run any code.
        count: observations to collect in ``env``.
        seed: of the collection.
        name: what reports call it; None takes the file's name.
        vecnormalize: the file that ``VecNormalize.save`` wrote in training, to put around ``env``;
            it is a pickle, so it needs ``trust``.

    Raises:
        BatchproofError: not such a file, damaged or unsafe, or something that only a pickle says.
    """
    path = Path(path)
    if vecnormalize is not None:
        check_vecnormalize(vecnormalize, env, trust)
    from_file = isinstance(obs, str | Path)
    given = read_observations(obs) if from_file else obs
    # Importing the library takes long: a file that is none is refused before.
    members = _members(path)
    model = _trusted(path, members) if trust else _rebuilt(path, members)
    from batchproof.sb3.adapter import subject_from_model, under_vecnormalize

    def subject_in(env: Any) -> Subject:
        return subject_from_model(
            model,
            given,
            env=env,
            count=count,
            seed=seed,
            name=name or path.name,
            obs_name=str(obs) if from_file else "observations",
        )

    if vecnormalize is None:
        return subject_in(env)
    with under_vecnormalize(env, Path(vecnormalize)) as normalized:
        subject = subject_in(normalized)
    # The file is training's. It says nothing about how the policy is evaluated.
    subject.normalizers = {"train": normalized}
    return subject


def check_vecnormalize(path: Path | str, env: Any, trust: bool) -> None:
    """Refuse a normalizer's file that nobody vouches for, or that has no environment to go around.

    Raises:
        BatchproofError: one of the two.
    """
    if env is None:
        raise BatchproofError(
            f"{path}: a normalizer goes around an environment: name it with --env ID (env=...)"
        )
    if not trust:
        raise BatchproofError(
            f"{path}: VecNormalize.save writes a pickle, which could run any code: add --trust "
            "(trust=True) if you know where it comes from"
        )


def _members(path: Path) -> dict[str, bytes]:
    """The members that are known by name, after the archive as a whole has been found safe."""
    if path.is_dir():
        raise BatchproofError(f"{path} is a folder: name the .zip that model.save wrote")
    if not path.is_file():
        raise BatchproofError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            _check_archive(path, infos)
            members = {}
            for info in infos:
                # Optimizers keep their attributes' names: actor.optimizer.pth.
                wanted = info.filename == "data" or re.fullmatch(
                    r"[A-Za-z_][\w.]{0,63}\.pth", info.filename
                )
                if wanted:
                    with archive.open(info) as member:
                        members[info.filename] = member.read(info.file_size)
            return members
    except BatchproofError:
        raise
    except zipfile.BadZipFile as error:
        kind = "a damaged .zip" if path.suffix == ".zip" else "no Stable-Baselines3 .zip"
        raise BatchproofError(
            f"{path}: {kind} ({_line(error)}): save the model again with model.save"
        ) from None
    except Exception as error:  # zipfile raises many kinds on damaged files
        raise BatchproofError(
            f"{path}: a damaged .zip ({_line(error)}): save the model again with model.save"
        ) from None


def _check_archive(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    names = [info.filename for info in infos]
    if len(names) > 64 and "data" not in names:
        raise BatchproofError(f"{path}: no Stable-Baselines3 .zip: it holds {len(names)} files")
    for info in infos:
        name = info.filename
        pure = PurePosixPath(name.replace("\\", "/"))
        drive = re.match(r"[A-Za-z]:", name) is not None
        if pure.is_absolute() or ".." in pure.parts or drive or "\0" in name:
            raise BatchproofError(f"{path}: unsafe: it holds the path {name!r}")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise BatchproofError(f"{path}: unsafe: {name!r} in it is a symbolic link")
        if info.flag_bits & 0x1:
            raise BatchproofError(f"{path}: {name!r} in it is encrypted: save it without password")
        packed = max(info.compress_size, 1)
        bomb = info.file_size > 1 << 20 and info.file_size > MOST_RATIO * packed
        if info.file_size > MOST_BYTES or bomb:
            raise BatchproofError(
                f"{path}: unsafe: {name!r} in it unpacks from {info.compress_size} to "
                f"{info.file_size} bytes"
            )
    if len(set(names)) != len(names):
        raise BatchproofError(f"{path}: unsafe: two files in it have one name")
    if "data" in names and "policy.pth" in names:
        return
    if infos and min(info.header_offset for info in infos) > 0:
        # What was found is the end of an archive inside of it: torch's weights are zips too.
        raise BatchproofError(
            f"{path}: a .zip that was cut short: copy it again, or save the model again"
        )
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        kind = (
            "a TorchScript file" if any("/code/" in name for name in names) else "a torch.save file"
        )
    elif any("exported_program" in name or name.endswith("archive_format") for name in names):
        kind = "a torch.export file"
    elif "data" in names:
        kind = "a Stable-Baselines3 .zip without weights (policy.pth)"
    else:
        kind = "no Stable-Baselines3 .zip"
    raise BatchproofError(
        f"{path}: {kind}: name a .zip that model.save wrote, or package.module:factory --trust"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__


def _json(path: Path, raw: bytes) -> dict[str, Any]:
    if len(raw) > MOST_JSON:
        raise BatchproofError(f"{path}: unsafe: its data member has {len(raw)} bytes")
    try:
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BatchproofError(
            f"{path}: its data member is not JSON ({_line(error)}): save the model again"
        ) from None
    if not isinstance(data, dict):
        raise BatchproofError(f"{path}: its data member is a {type(data).__name__}, not a model's")
    return data


def _weights(path: Path, name: str, raw: bytes) -> dict[str, Any]:
    """A state dict; ``torch.load`` builds nothing but tensors and plain containers."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as inner:
            # torch stores without compression; a small file cannot become a large one.
            if sum(info.file_size for info in inner.infolist()) > len(raw):
                raise BatchproofError(f"{path}: unsafe: {name} in it is compressed")
        state = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except BatchproofError:
        raise
    except Exception as error:  # pickles that are damaged or hold more than tensors
        raise BatchproofError(
            f"{path}: {name} in it holds no plain weights ({_line(error)}): "
            "load it with --trust if you know where it comes from"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise BatchproofError(f"{path}: {name} in it is no state dict: save the model again")
    return state


def _algorithm(path: Path, data: dict[str, Any], state: dict[str, Any]) -> type:
    """The algorithm's class, from the names of its own settings and networks."""
    prefixes = {key.split(".")[0] for key in state}
    module, _ = _class_of(data.get("policy_class"))
    if "recurrent" in module or {"lstm_actor", "lstm_critic"} & prefixes:
        raise BatchproofError(
            f"{path}: RecurrentPPO keeps a hidden state between steps, which an audit of single "
            "observations cannot follow: use a policy without memory"
        )
    if "cg_max_steps" in data:
        found = "TRPO"
    elif "n_delta" in data:
        found = "ARS"
    elif "gae_lambda" in data:
        plain = "PPO" if "clip_range" in data else "A2C"
        found = "MaskablePPO" if "maskable" in module else plain
    elif "exploration_fraction" in data:
        found = "QRDQN" if "quantile_net" in prefixes else "DQN"
    elif "top_quantiles_to_drop_per_net" in data:
        found = "TQC"
    elif "target_policy_noise" in data:
        kwargs = data.get("policy_kwargs")
        ddpg = isinstance(kwargs, dict) and kwargs.get("n_critics") == 1
        ddpg = ddpg and data.get("policy_delay") == 1 and data.get("target_noise_clip") == 0.0
        found = "DDPG" if ddpg else "TD3"
    elif "ent_coef" in data and "actor" in prefixes:
        found = "SAC" if "critic_target" in prefixes else "CrossQ"
    else:
        raise BatchproofError(
            f"{path}: its settings are of no algorithm that is known here: use one of "
            f"{', '.join(sorted(_ALGORITHMS))}"
        )
    return _import(path, _ALGORITHMS[found], found)


def _import(path: Path, module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        package = {_SB3: "stable-baselines3", _CONTRIB: "sb3-contrib"}.get(
            module.partition(".")[0], "batchproof"
        )
        raise BatchproofError(
            f"{path}: it needs {module}.{name}: pip install -U {package}"
        ) from None


def _class_of(entry: Any) -> tuple[str, str]:
    """Module and name of a pickled class, from the readable text beside the pickle.

    One that `batchproof fix` made says which class it edits.
    """
    if not isinstance(entry, dict):
        return "", ""
    edited = re.fullmatch(r"([\w.]+)\.(\w+)", str(entry.get("batchproof_policy")))
    if edited is not None:
        return edited[1], edited[2]
    module, init = entry.get("__module__"), entry.get("__init__")
    named = re.match(r"<function (\w+)\.__init__ at ", init) if isinstance(init, str) else None
    return (module if isinstance(module, str) else ""), (named.group(1) if named else "")


def _trusted(path: Path, members: dict[str, bytes]) -> Any:
    data = _json(path, members["data"])
    state = _weights(path, "policy.pth", members["policy.pth"])
    algorithm: Any = _algorithm(path, data, state)
    # An empty replay buffer of the saved size would be of no use and may not fit into memory.
    small = {"buffer_size": SMALL_BUFFER} if "buffer_size" in data else {}
    try:
        model = algorithm.load(path, device="cpu", **small)
    except Exception as error:  # whatever their pickles raise
        raise BatchproofError(
            f"{path}: {algorithm.__name__}.load: {type(error).__name__}: {_line(error)}"
        ) from error
    return _under_its_plan(path, model)


def _under_its_plan(path: Path, model: Any) -> Any:
    """A model that was saved under a mode plan is examined under it."""
    if isinstance(getattr(model, "batchproof_modes", None), str):
        from batchproof.sb3.modes import set_modes

        try:
            set_modes(model)
        except BatchproofError as error:
            raise BatchproofError(f"{path}: {error}") from None
    return model


def _rebuilt(path: Path, members: dict[str, bytes]) -> Any:
    data = _json(path, members["data"])
    state = _weights(path, "policy.pth", members["policy.pth"])
    if not state or not all(
        isinstance(value, Tensor) and value.layout == torch.strided for value in state.values()
    ):
        raise BatchproofError(f"{path}: policy.pth in it is no state dict: save the model again")
    try:
        model = _built(path, data, state)
        return _under_its_plan(path, _with_state(path, model, members, state))
    except BatchproofError:
        raise
    except Exception as error:  # a damaged file can ask the library for anything
        raise BatchproofError(
            f"{path}: no model could be built from it ({type(error).__name__}: {_line(error)}): "
            "save it again, or load it with --trust if you know where it comes from"
        ) from None


def _built(path: Path, data: dict[str, Any], state: dict[str, Any]) -> Any:
    """The model with fresh weights."""
    algorithm: Any = _algorithm(path, data, state)
    policy_class = _policy_class(path, data)
    settings: dict[str, Any] = {
        "observation_space": _space(path, data, "observation_space"),
        "action_space": _space(path, data, "action_space"),
        "policy_kwargs": _policy_kwargs(path, data, policy_class),
    }
    later = _settings(path, data)
    on_policy = "gae_lambda" in data
    n_steps = later.pop("n_steps", 1)
    # Buffers are allocated small; the true numbers are put back below.
    settings |= {
        "n_envs": 1,
        "seed": None,
        "verbose": 0,
        "learning_rate": _learning_rate(data),
        "use_sde": later.get("use_sde", False),
    }
    if on_policy:
        settings |= {"n_steps": min(n_steps, 256)}
        if "clip_range" in data:
            settings |= {"clip_range": _constant(data["clip_range"], 0.2), "clip_range_vf": None}
    elif "buffer_size" in data:
        settings |= {"buffer_size": SMALL_BUFFER, "n_steps": 1, "train_freq": (1, "step")}
    if "ent_coef" in data:
        settings["ent_coef"] = _entropy(path, data["ent_coef"])
    if "target_entropy" in data:
        # The default, -dim(A); where it is a NumPy number only a pickle holds it.
        entropy, shape = data["target_entropy"], settings["action_space"].shape
        number = isinstance(entropy, int | float) and math.isfinite(entropy)
        settings["target_entropy"] = float(entropy) if number else -float(math.prod(shape))
    sizes = {key: value for key, value in later.items() if key not in ("n_envs",)}
    model = algorithm(policy_class, None, device="cpu", _init_setup_model=False)
    model.__dict__.update(sizes | settings)
    _compare_shapes(path, model, policy_class, state)
    with torch.random.fork_rng(devices=[]):
        model._setup_model()
    if "n_envs" in later:
        model.n_envs = later["n_envs"]
    if "n_steps" in data:
        model.n_steps = n_steps
    plan = data.get("batchproof_modes")
    if isinstance(plan, str):
        model.batchproof_modes = plan
    return model


def _policy_class(path: Path, data: dict[str, Any]) -> Any:
    entry = data.get("policy_class")
    module, name = _class_of(entry)
    edits = entry.get("batchproof_edits") if isinstance(entry, dict) else None
    if name not in _POLICIES.get(module, ()):
        called = f"{module}.{name}".strip(".") or "unknown"
        if module == "batchproof.clinic.fix":  # its files did not always say which class it edits
            called = "with layers that an earlier `batchproof fix` replaced"
        elif edits is not None:
            called += ", with layers that `batchproof fix` replaced,"
        raise _only_pickled(path, f"its policy class {called}")
    policy = _import(path, module, name)
    return policy if edits is None else _edited(path, policy, edits)


def _edited(path: Path, policy: Any, plain: Any) -> Any:
    """The policy class with the layers that `batchproof fix` put in others' places."""
    from batchproof.clinic.fix import Edit, rebuilding

    try:
        if not isinstance(plain, list) or len(plain) > MOST_EDITS:
            raise ValueError
        edits = [Edit.from_plain(edit) for edit in plain]
    except ValueError:
        raise BatchproofError(
            f"{path}: what it says of layers that `batchproof fix` replaced is damaged: run "
            "`batchproof fix` again"
        ) from None
    return rebuilding(policy, edits)


def _only_pickled(path: Path, what: str) -> BatchproofError:
    return BatchproofError(
        f"{path}: {what} is only in a pickle, which could run any code: "
        "add --trust (trust=True) if you know where it comes from"
    )


def _policy_kwargs(path: Path, data: dict[str, Any], policy_class: Any) -> dict[str, Any]:
    entry = data.get("policy_kwargs", {})
    if not isinstance(entry, dict):
        raise _only_pickled(path, "policy_kwargs")
    pickled = ":serialized:" in entry
    if pickled and entry.get(":type:") not in (
        "<class 'dict'>",
        "<class 'collections.OrderedDict'>",
    ):
        raise _only_pickled(path, "policy_kwargs")
    kwargs: dict[str, Any] = {}
    for key, value in entry.items():
        if key in (":type:", ":serialized:", "device"):
            continue
        kind = _KWARG_KINDS.get(key)
        if kind is not None and value is not None:
            kwargs[key] = _known_class(path, key, kind, value)
        elif key == "net_arch":
            kwargs[key] = _net_arch(path, value)
        elif (
            pickled and isinstance(value, str) and key not in ("norm", "actor_norm", "critic_norm")
        ):
            # The readable text of something that JSON could not say.
            raise _only_pickled(path, f"policy_kwargs[{key!r}]")
        elif key == "n_critics" and not (type(value) is int and 1 <= value <= 100):
            raise BatchproofError(
                f"{path}: its n_critics is {str(value)[:40]!r}, not a small count"
            )
        elif not _plain(value):
            raise BatchproofError(f"{path}: policy_kwargs[{key!r}] is too deep to be a setting")
        else:
            kwargs[key] = value
    return kwargs


def _plain(value: Any, depth: int = 0) -> bool:
    if depth > 4:
        return False
    if isinstance(value, dict):
        return len(value) < 100 and all(_plain(item, depth + 1) for item in value.values())
    if isinstance(value, list):
        return len(value) < 100 and all(_plain(item, depth + 1) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return abs(value) < 1e9
    return value is None or isinstance(value, str | bool)


def _known_class(path: Path, key: str, kind: str, text: Any) -> Any:
    named = re.fullmatch(r"<class '([\w.]+)\.(\w+)'>", text) if isinstance(text, str) else None
    module, name = named.groups() if named else ("", "")
    if kind == "activation" and module == "torch.nn.modules.activation" and name in _ACTIVATIONS:
        return getattr(torch.nn, name)
    if kind == "extractor" and name in _EXTRACTORS.get(module, ()):
        return _import(path, module, name)
    if kind == "optimizer" and module == f"torch.optim.{name.lower()}" and name in _OPTIMIZERS:
        return getattr(torch.optim, name)
    if kind == "optimizer" and name == "RMSpropTFLike" and module.startswith(f"{_SB3}."):
        return _import(path, f"{_SB3}.common.sb2_compat.rmsprop_tf_like", name)
    raise _only_pickled(path, f"policy_kwargs[{key!r}] = {str(text)[:80]}")


def _net_arch(path: Path, value: Any) -> Any:
    def widths(layers: Any) -> bool:
        return (
            isinstance(layers, list)
            and len(layers) <= 64
            and all(type(n) is int and 1 <= n <= 1 << 20 for n in layers)
        )

    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0]  # as the library wrote it before version 1.8
    if value is None or widths(value):
        return value
    if isinstance(value, dict) and set(value) <= {"pi", "vf", "qf"}:
        found = {key: layers for key, layers in value.items() if widths(layers)}
        if len(found) == len(value):
            return found
    raise BatchproofError(f"{path}: its net_arch is no list of layer widths: save the model again")


def _settings(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Plain settings of the algorithm, each with the kind that it must have."""
    found: dict[str, Any] = {}

    def keep(names: tuple[str, ...], good: Callable[[Any], bool], kind: str) -> None:
        for name in names:
            if name not in data or data[name] is None:
                continue
            value = data[name]
            if isinstance(value, bool) != (kind == "a flag") or not good(value):
                raise BatchproofError(f"{path}: its {name} is {str(value)[:40]!r}, not {kind}")
            found[name] = value

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e15

    keep(("n_steps", *_POSITIVE), lambda v: isinstance(v, int) and -1 <= v <= 1 << 31, "a count")
    keep(_COUNTS, lambda v: isinstance(v, int) and 0 <= v <= 1 << 62, "a count")
    keep(_NUMBERS, number, "a number")
    keep(_FLAGS, lambda v: True, "a flag")
    for name in ("n_steps", *_POSITIVE):
        if name in found and found[name] < 1 and name != "gradient_steps":
            raise BatchproofError(f"{path}: its {name} is {found[name]}, not a count")
    if "exploration_fraction" in data:
        found |= {"exploration_rate": 0.0, "_n_calls": 0}
    return found


def _learning_rate(data: dict[str, Any]) -> float:
    value = data.get("learning_rate")
    if isinstance(value, int | float) and 0 <= value < 1e3:
        return float(value)
    return _constant(data.get("lr_schedule"), 3e-4)


def _constant(entry: Any, default: float) -> float:
    """The number in a constant schedule's readable text, or the default."""
    if isinstance(entry, int | float) and 0 <= entry < 1e3:
        return float(entry)
    text = entry.get("value_schedule") if isinstance(entry, dict) else None
    named = re.fullmatch(r"ConstantSchedule\(val=([\d.e+-]{1,24})\)", str(text))
    try:
        value = float(named.group(1)) if named else default
    except ValueError:
        return default
    return value if 0 <= value < 1e3 else default


def _entropy(path: Path, value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    if isinstance(value, str) and re.fullmatch(r"auto(_\d{1,6}(\.\d{1,12})?)?", value):
        return value
    raise BatchproofError(f"{path}: its ent_coef is {str(value)[:40]!r}, not a number or 'auto'")


def _space(path: Path, data: dict[str, Any], name: str) -> spaces.Space:
    """A space from the text beside its pickle."""
    entry = data.get(name)
    kind = entry.get(":type:") if isinstance(entry, dict) else None
    named = re.fullmatch(r"<class 'gym(?:nasium)?\.spaces\.\w+\.(\w+)'>", str(kind))
    try:
        if named is None:
            raise ValueError
        assert isinstance(entry, dict)
        space = _space_of(named.group(1), entry, action=name == "action_space")
    except (ValueError, TypeError, KeyError, OverflowError):
        raise _only_pickled(path, f"its {name} ({str(kind)[:60]})") from None
    return space


def _space_of(kind: str, entry: dict[str, Any], *, action: bool) -> spaces.Space:
    if kind == "Box":
        shape = entry.get("_shape", entry.get("shape"))
        low, high = str(entry["low"]), str(entry["high"])
        return _box(low, high, _shape(shape), str(entry["dtype"]), action=action)
    if kind == "Discrete":
        return spaces.Discrete(_count(entry["n"]), start=int(str(entry.get("start", 0))))
    if kind == "MultiBinary":
        n = entry["n"]
        return spaces.MultiBinary([_count(v) for v in n] if isinstance(n, list) else _count(n))
    if kind == "MultiDiscrete":
        return _multi_discrete(str(entry["nvec"]), str(entry.get("start", "[]")))
    if kind == "Dict" and not action:
        return _dict(str(entry["spaces"]))
    raise ValueError


def _count(value: Any) -> int:
    number = int(str(value))
    if not 1 <= number <= 1 << 20:
        raise ValueError
    return number


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > 8:
        raise ValueError
    shape = tuple(_count(size) for size in value)
    if math.prod(shape) > MOST_ENTRIES:
        raise ValueError
    return shape


def _multi_discrete(nvec: str, start: str) -> spaces.Space:
    sizes = re.fullmatch(r"\[\s*(\d+(?:\s+\d+)*)\s*\]", nvec)
    if sizes is None or re.fullmatch(r"\[[\s0]*\]", start) is None:
        raise ValueError
    return spaces.MultiDiscrete([_count(size) for size in sizes.group(1).split()])


_KINDS = {"float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64"}
_NUMBER = re.compile(r"[+-]?(?:inf|\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)")


def _box(low: str, high: str, shape: tuple[int, ...], kind: str, *, action: bool) -> spaces.Box:
    if kind not in _KINDS:
        raise ValueError
    dtype = np.dtype(kind)
    try:
        bounds = [_bounds(text, shape) for text in (low, high)]
    except ValueError:
        # Only `is_image_space` and the sampling of actions look at bounds, so for observations of
        # fractions those that are too long to be written out do not matter.
        if action or dtype.kind != "f" or "..." not in low + high:
            raise
        bounds = [np.full(shape, -np.inf), np.full(shape, np.inf)]
    if dtype.kind != "f" and not all(np.isfinite(bound).all() for bound in bounds):
        raise ValueError
    return spaces.Box(bounds[0].astype(dtype), bounds[1].astype(dtype), shape, dtype.type)


def _bounds(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array (shape) from NumPy's text; one that is cut short only if all that shows is equal."""
    words = text.replace("[", " ").replace("]", " ").split()
    cut = "..." in words
    words = [word for word in words if word != "..."]
    if not words or not all(_NUMBER.fullmatch(word) for word in words):
        raise ValueError
    numbers = [float(word) for word in words]
    if cut or len(numbers) == 1:
        if len(set(numbers)) != 1:
            raise ValueError
        return np.full(shape, numbers[0])
    if len(numbers) != math.prod(shape):
        raise ValueError
    return np.array(numbers).reshape(shape)


_PART = re.compile(
    r"'(?P<key>[^'\\]{1,100})': (?:"
    r"Box\((?P<low>[^(),]+), (?P<high>[^(),]+), \((?P<shape>[\d, ]+)\), (?P<dtype>\w+)\)"
    r"|Discrete\((?P<n>\d+)(?:, start=(?P<start>-?\d+))?\)"
    r"|MultiBinary\((?P<bits>\d+)\)"
    r"|MultiDiscrete\((?P<nvec>\[[\d ]+\])\))(?:, |\}$)"
)


def _dict(text: str) -> spaces.Dict:
    if not text.startswith("{") or not text.endswith("}"):
        raise ValueError
    parts: dict[str, spaces.Space] = {}
    at = 1
    while at < len(text):
        found = _PART.match(text, at)
        if found is None or found["key"] in parts:
            raise ValueError
        at = found.end()
        if found["low"] is not None:
            shape = _shape([size for size in found["shape"].split(",") if size.strip()])
            space: spaces.Space = _box(
                found["low"], found["high"], shape, found["dtype"], action=False
            )
        elif found["n"] is not None:
            space = spaces.Discrete(_count(found["n"]), start=int(found["start"] or 0))
        elif found["bits"] is not None:
            space = spaces.MultiBinary(_count(found["bits"]))
        else:
            space = _multi_discrete(found["nvec"], "[]")
        parts[found["key"]] = space
    return spaces.Dict(parts)


def _compare_shapes(path: Path, model: Any, policy_class: Any, state: dict[str, Any]) -> None:
    """Build the policy without memory and compare it with the weights."""
    kwargs = dict(model.policy_kwargs)
    schedule = () if hasattr(model, "n_delta") else (lambda _: 1e-3,)
    if getattr(model, "use_sde", False):
        kwargs["use_sde"] = True
    checks = Distribution._validate_args
    try:
        Distribution.set_default_validate_args(False)  # it looks at values, and there are none
        # Its parts follow the policy's own device.
        shapeless = type(policy_class.__name__, (policy_class,), {"device": torch.device("meta")})
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            policy = shapeless(model.observation_space, model.action_space, *schedule, **kwargs)
        expected = {key: tuple(value.shape) for key, value in policy.state_dict().items()}
    except Exception as error:  # settings that its constructor does not take
        raise BatchproofError(
            f"{path}: no {policy_class.__name__} could be built from its settings "
            f"({type(error).__name__}: {_line(error)}): save the model again, or load it with "
            "--trust if you know where it comes from"
        ) from None
    finally:
        Distribution.set_default_validate_args(checks)
    given = {key: tuple(value.shape) for key, value in state.items()}
    if given != expected:
        key = next(k for k in (*expected, *given) if given.get(k) != expected.get(k))
        raise BatchproofError(
            f"{path}: its weights are not those of the {policy_class.__name__} that its settings "
            f"describe: {key} is {given.get(key, 'missing')}, expected "
            f"{expected.get(key, 'nothing')}"
        )


def _with_state(path: Path, model: Any, members: dict[str, bytes], state: dict[str, Any]) -> Any:
    """Weights, optimizers and single tensors put back in place."""
    params: dict[str, Any] = {"policy": state}
    names, tensors = model._get_torch_save_params()
    for name in names:
        member = f"{name}.pth"
        if name != "policy" and member in members:
            params[name] = _weights(path, member, members[member])
    try:
        model.set_parameters(params, exact_match=False, device="cpu")
    except Exception as error:  # the library's loaders raise many kinds
        raise BatchproofError(
            f"{path}: its weights or optimizers do not fit ({type(error).__name__}: "
            f"{_line(error)}): save the model again"
        ) from None
    if tensors and "pytorch_variables.pth" in members:
        variables = _weights(path, "pytorch_variables.pth", members["pytorch_variables.pth"])
        for name in tensors:
            value, own = variables.get(name), getattr(model, name, None)
            if value is None or own is None:
                continue
            if not isinstance(value, Tensor) or value.shape != own.shape:
                raise BatchproofError(f"{path}: its {name} is no tensor {tuple(own.shape)}")
            own.data = value.detach().to(own)
    model.policy.set_training_mode(False)
    return model
