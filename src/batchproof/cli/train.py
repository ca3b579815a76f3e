"""`batchproof train`: words become a `Training`."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from batchproof import cpu
from batchproof.cli import words
from batchproof.errors import BatchproofError
from batchproof.modes import Plan, Slot

if TYPE_CHECKING:
    from batchproof.lab.loop import Result
    from batchproof.lab.training import Training


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "train",
        help="train an agent on an environment, many seeds at once",
        description=(
            "Train many seeds of an agent at once. A run that was stopped continues with the "
            "same command; a finished one is read back."
        ),
        epilog=(
            "example: batchproof train td3 --env batchproof/ConstantReward-v0 --norm batch "
            "--modes TEETE --steps 3000 --seeds 10 --out runs/td3-bn"
        ),
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "algo",
        metavar="ALGO",
        type=words.one_of("algorithm", words.ALGORITHMS),
        help=words.either(words.ALGORITHMS),
    )
    help_ = "a Gymnasium id with continuous actions; for maddpg batchproof/Rally-v0 or mpe2/NAME"
    add("--env", required=True, metavar="ID", help=help_)
    names, help_ = words.output("--out"), "the run's folder"
    add(*names, required=True, type=words.folder, metavar="DIR", help=help_)

    add = parser.add_argument_group("normalization").add_argument
    kind, place = words.one_of("norm", words.NORMS), words.placement
    add(
        "--norm",
        type=kind,
        metavar="KIND",
        help=f"of both networks: {words.either(words.NORMS)} [none]",
    )
    add("--actor-norm", type=kind, metavar="KIND", help="of the actor [--norm]")
    add("--critic-norm", type=kind, metavar="KIND", help="of the critics [--norm]")
    help_ = f"where it sits: {words.either(words.PLACEMENTS)}, or several joined with + [pre]"
    add("--placement", type=place, metavar="P", help=help_)
    add("--actor-placement", type=place, metavar="P", help="in the actor [--placement]")
    add("--critic-placement", type=place, metavar="P", help="in the critics [--placement]")
    help_ = "statistics of each pass, see `batchproof modes` [sb3-td3 or sb3-sac, by ALGO]"
    add("--modes", type=Plan.parse, metavar="PLAN", help=help_)
    help_ = "weight of the new batch in the running statistics, flax's 0.99 is 0.01 [0.1]"
    share = words.real("in (0, 1], the weight of the new batch", 0, 1, open_low=True)
    add("--momentum", type=share, metavar="X", help=help_)
    help_ = "added to the variance before the square root [1e-5]"
    add("--eps", type=words.real("a finite number, at least 0", 0), metavar="X", help=help_)
    add("--groups", type=words.whole(1), metavar="N", help="feature groups of the norm `group` [8]")
    help_ = f"what keeps the running statistics: {words.either(words.ESTIMATORS)} [ema]"
    add("--estimator", type=words.one_of("estimator", words.ESTIMATORS), metavar="HOW", help=help_)
    help_ = "keep the rows of hidden weights at unit length"
    add("--project-weights", action="store_true", help=help_)
    help_ = f"how target networks get running statistics: {words.either(words.TARGET_STATS)} [copy]"
    stats = words.one_of("target statistics", words.TARGET_STATS)
    add("--target-stats", type=stats, metavar="HOW", help=help_)
    help_ = "let the online networks value the next step, as CrossQ does"
    add("--no-target-network", action="store_true", help=help_)

    add = parser.add_argument_group("networks and learning").add_argument
    presets = ", ".join(name for names in words.AGENT_PRESETS.values() for name in names)
    help_ = f"start from a named configuration of ALGO: {presets}"
    add("--preset", metavar="NAME", help=help_)
    help_ = "any setting of ALGO's configuration, value as JSON or text; may be repeated"
    add("--set", type=words.pair, action="append", default=[], metavar="KEY=VALUE", help=help_)
    help_ = "widths of the hidden layers of both networks, or `linear` for none [by ALGO]"
    add("--hidden", type=words.widths, metavar="N,N", help=help_)
    add("--actor-hidden", type=words.widths, metavar="N,N", help="of the actor [--hidden]")
    add("--critic-hidden", type=words.widths, metavar="N,N", help="of the critics [--hidden]")
    help_ = (
        "what factors of the critics' hidden products are rounded to: "
        f"{words.either(words.PRECISIONS)} [float32]"
    )
    precision = words.one_of("precision", words.PRECISIONS)
    add("--critic-precision", type=precision, metavar="TYPE", help=help_)
    positive = words.real("a positive finite number", 0, open_low=True)
    add("--learning-rate", type=positive, metavar="X", help="Adam's [by ALGO]")
    help_ = "discount per environment step [by ALGO]"
    add("--gamma", type=words.real("in [0, 1]", 0, 1), metavar="X", help=help_)
    help_ = "step of the target networks [by ALGO]"
    add("--tau", type=words.real("in (0, 1]", 0, 1, open_low=True), metavar="X", help=help_)
    add("--batch-size", type=words.whole(1), metavar="N", help="transitions per update [by ALGO]")
    help_ = "updates each time that it learns [1]"
    add("--gradient-steps", type=words.whole(1), metavar="N", help=help_)
    help_ = "environment steps between times that it learns [1; maddpg 100]"
    add("--update-every", type=words.whole(1), metavar="N", help=help_)
    help_ = "environment steps with random actions and no learning [by ALGO]"
    add("--learning-starts", type=words.whole(0), metavar="N", help=help_)
    help_ = "replay capacity in transitions [1000000]"
    add("--buffer-size", type=words.whole(1), metavar="N", help=help_)

    add = parser.add_argument_group("run").add_argument
    help_ = "environment steps of each seed [100000]"
    add("--steps", type=words.whole(1), default=100_000, metavar="N", help=help_)
    help_ = "a number N for seeds 0 to N-1, or a list such as 0,3,7 (one seed: 7,) [1]"
    add("--seeds", type=words.seeds, default=(0,), metavar="N", help=help_)
    help_ = "environment steps between evaluations [a fortieth of --steps]"
    add("--eval-every", type=words.whole(1), metavar="N", help=help_)
    help_ = "deterministic episodes per evaluation and seed [5]"
    add("--eval-episodes", type=words.whole(1), default=5, metavar="N", help=help_)
    help_ = "keyword argument of gymnasium.make, value as JSON or text; may be repeated"
    add(
        "--env-option",
        type=words.pair,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=help_,
    )
    help_ = "step in Gymnasium even where the environment also exists in JAX"
    add("--host-env", action="store_true", help=help_)
    help_ = "scale observations by running statistics, kept with the checkpoint"
    add("--normalize-obs", action="store_true", help=help_)
    add("--tensorboard", action="store_true", help="also write DIR/tensorboard")
    add("--no-progress", action="store_true", help="no progress bar")


def say_if_bfloat16_is_slow() -> None:
    """One line where this CPU has no instructions for it."""
    if cpu.has_bfloat16() is False:
        print(
            "batchproof: this CPU has no instructions for bfloat16: without a GPU it will not be "
            "faster than float32",
            file=sys.stderr,
        )


def run(args: argparse.Namespace, command: str) -> int:
    """Run the command; ``command`` is what was typed."""
    check_effects(args)
    training = training_of(args, words.pairs("--env-option", args.env_option))
    finished = _is_finished(args.out)
    if args.critic_precision == "bfloat16":
        say_if_bfloat16_is_slow()

    from batchproof.lab.loop import train

    result = train(
        training,
        args.out,
        progress=not args.no_progress,
        label=f"{args.algo} {args.env}",
        tensorboard=args.tensorboard,
        command=command,
    )
    if finished:
        print("This run was finished before: nothing was run again.\n")
    _print_result(result, args.out, tensorboard=args.tensorboard)
    return 0


def _kinds(args: argparse.Namespace) -> dict[str, str]:
    """The norm of each network, as far as it is known without the agent's module."""
    both = args.norm or words.NORMALIZED.get(args.algo, "batch" if args.preset else "none")
    return {"actor": args.actor_norm or both, "critic": args.critic_norm or both}


def check_effects(args: argparse.Namespace) -> None:
    """Raise a `BatchproofError` for an option that could change nothing."""
    if args.preset is not None and args.preset not in words.AGENT_PRESETS[args.algo]:
        known = words.either(words.AGENT_PRESETS[args.algo]) or "none"
        raise BatchproofError(f"unknown preset {args.preset!r}: {args.algo} has {known}")
    kinds = _kinds(args)
    used = {kind for kind in kinds.values() if kind != "none"}
    running = used.intersection(words.RUNNING_NORMS)

    def refuse(option: str, why: str) -> NoReturn:
        raise BatchproofError(f"{option} has no effect {why}")

    keeps = f"without a norm that keeps running statistics ({' or '.join(words.RUNNING_NORMS)})"
    if args.eps is not None and not used:
        refuse("--eps", "without a norm: add --norm, or leave it out")
    for option in ("momentum", "estimator"):
        if getattr(args, option) is not None and not running:
            refuse(f"--{option}", f"{keeps if used else 'without a norm'}: leave it out")
    if args.groups is not None and "group" not in used:
        refuse("--groups", "without --norm group: leave it out")
    # A mode says which statistics are used; skipping is the one that any layer can do.
    if args.modes is not None and not running:
        skips = any(args.modes[slot].bypass for slot in Slot)
        if not used or not skips:
            refuse("--modes", f"{keeps if used else 'without a norm'}: leave it out")
    # Where the action enters is a matter of the network, with a norm or without.
    for network in kinds:
        placement = getattr(args, f"{network}_placement")
        moves_action = network == "critic" and "before-action" in (placement or "")
        if placement is not None and kinds[network] == "none" and not moves_action:
            refuse(
                f"--{network}-placement", f"without a norm in the {network}: add --{network}-norm"
            )
    if args.placement is not None and not used and "before-action" not in args.placement:
        refuse("--placement", "without a norm: add --norm, or leave it out")
    if args.no_target_network:
        for option in ("target_stats", "tau"):
            if getattr(args, option) is not None:
                name = "--" + option.replace("_", "-")
                refuse(name, "with --no-target-network: leave one of the two out")
    if args.target_stats is not None and not running:
        refuse("--target-stats", f"{keeps}: leave it out")


def training_of(args: argparse.Namespace, env_options: dict[str, Any]) -> Training:
    """What the options ask for."""
    from batchproof.lab.agents import AGENTS
    from batchproof.lab.training import Training

    agent = AGENTS[args.algo]
    config = agent.PRESETS[args.preset] if args.preset else agent.Config()
    known = {field.name for field in fields(config)}
    changes = words.given(args, "learning_rate", "gamma", "tau", "batch_size", "target_stats")
    if args.modes is not None:
        changes["plan"] = args.modes
    if args.no_target_network:
        changes["target_network"] = False
    changes |= {network: _mlp(args, network, config) for network in ("actor", "critic")}
    for name, value in words.pairs("--set", args.set).items():
        changes[name] = _setting(args.algo, config, name, value)
    for name in [name for name in changes if name not in known]:
        if changes[name] is not None:
            option = "no-target-network" if name == "target_network" else name.replace("_", "-")
            raise BatchproofError(f"--{option} has no effect in {args.algo}: leave it out")
        del changes[name]
    names = ("learning_starts", "buffer_size", "gradient_steps", "update_every")
    steps = words.given(args, *names, "eval_every", "eval_episodes")
    return Training(
        algo=args.algo,
        config=replace(config, **changes),
        env_id=args.env,
        env_options=env_options,
        seeds=args.seeds,
        steps=args.steps,
        host_env=args.host_env,
        normalize_obs=args.normalize_obs,
        **(agent.TRAINING | steps),
    )


def _setting(algo: str, config: Any, name: str, value: Any) -> Any:
    """The value of ``--set NAME=VALUE`` where the agent's configuration can hold it."""
    types = {field.name: str(field.type) for field in fields(config)}
    known = sorted(types.keys() - {"actor", "critic", "plan"})
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has {words.either(known)}"
        raise BatchproofError(f"--set {name}: {algo} has no such setting: {hint}")
    kinds = types[name].split(" | ")
    given = "None" if value is None else type(value).__name__
    if given not in kinds and not (given == "int" and "float" in kinds):
        held = json.dumps(getattr(config, name))
        raise BatchproofError(f"--set {name}={value}: expected a value such as {held}")
    return value


def _mlp(args: argparse.Namespace, network: str, config: Any) -> Any:
    """A network of the agent's configuration with what was asked for; None where it has none."""
    held = getattr(config, network, None)
    own = {name: getattr(args, f"{network}_{name}") for name in ("hidden", "norm", "placement")}
    if network == "critic":
        own["precision"] = args.critic_precision
    own = {name: value for name, value in own.items() if value is not None}
    if held is None:
        for name in own:
            raise BatchproofError(f"--{network}-{name} has no effect: {args.algo} has no {network}")
        return None
    asked = words.given(args, "hidden", "norm", "placement") | own
    norm = replace(held.norm, kind=asked["norm"]) if "norm" in asked else held.norm
    if "placement" in asked:
        norm = replace(norm, placement=asked["placement"])
    if norm.kind != "none":
        norm = replace(norm, **words.given(args, "momentum", "eps", "groups", "estimator"))
    changes = {"norm": norm} | {key: asked[key] for key in ("hidden", "precision") if key in asked}
    if args.project_weights and held.project == "none":
        changes["project"] = "hidden"
    return replace(held, **changes)


def _is_finished(out: Path) -> bool:
    """Whether the folder holds a finished run; `train` judges whether it is this one."""
    from batchproof.records import read_json

    path = out / "run.json"
    if not path.is_file():
        return False
    run = read_json(path)
    return isinstance(run, dict) and run.get("status") == "finished"


def _print_result(result: Result, out: Path, *, tensorboard: bool) -> None:
    sound = {}
    print(f"{'seed':>10}  {'final return':>12}  status")
    for seed in result.seeds:
        value, status = seed["final_return"], seed["status"]
        value = math.nan if value is None else value  # NaN cannot stand in run.json
        if status == "ok":
            sound[seed["seed"]] = value
            shown = f"{value:.2f}"
        else:
            shown, status = "-", f"diverged at step {seed['diverged_at']}"
        print(f"{seed['seed']:>10}  {shown:>12}  {status}")
    count, lost = len(result.seeds), len(result.seeds) - len(sound)
    if sound:
        final = sound.values()
        mean = math.fsum(final) / len(final)
        kept = f"over {words.count(len(sound), 'seed')}" + (" that did not diverge" if lost else "")
        print(f"\nmean {mean:.2f}, min {min(final):.2f}, max {max(final):.2f} {kept}")
    if lost:
        print(f"\nDIVERGED: {lost} of {words.count(count, 'seed')}; they have no final return.")
    metrics = out / "metrics.parquet"
    print(f"\n{out / 'run.json'}: configuration, versions, seeds")
    print(f"{metrics}: a row for each evaluation and seed")
    print(f"{out / 'checkpoint'}: the agents, in safetensors")
    folder = shlex.quote(str(out))
    print(f"\nCurves and more: batchproof report {folder}")
    if sound:
        which = f" --agent {shlex.quote(result.agents[0])}" if result.agents else ""
        first = next(iter(sound))
        print(f"What is wrong with an agent: batchproof audit {folder} --seed {first}{which}")
    if tensorboard:
        print(f"Or: tensorboard --logdir {shlex.quote(str(out / 'tensorboard'))}")
