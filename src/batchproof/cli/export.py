"""`batchproof export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from batchproof.cli import clinic, words
from batchproof.errors import BatchproofError

EXPORTS = {"torch": ".safetensors", "onnx": ".onnx", "sb3": ".zip"}
PROVEN = 1000  # observations that an export is proven on


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "export",
        help="write a trained actor as PyTorch, ONNX or a Stable-Baselines3 model",
        description=(
            "Write the deterministic actor of a run, normalizers included. The file is read back "
            "and must act as the lab does on real observations, or nothing is written."
        ),
        epilog="example: batchproof export runs/td3-bn --seed 0 --format onnx -o actor.onnx",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("folder", type=words.folder, metavar="RUN", help="the folder of a `batchproof train` run")
    clinic.add_whose(parser)
    kind = words.one_of("format", tuple(EXPORTS))
    add("--format", required=True, type=kind, metavar="F", help=words.either(EXPORTS))
    ends = ", ".join(f"{ending} ({name})" for name, ending in EXPORTS.items())
    names = words.output("-o", "--output")
    add(*names, required=True, type=words.file, metavar="FILE", help=ends)
    help_ = "put batch norms into the linear layers beside them"
    add("--fold", action="store_true", help=help_)
    help_ = "give actions in [-1, 1] and not in the environment's units"
    add("--unscaled", action="store_true", help=help_)
    help_ = (
        "observations to prove it on: .npy, .npz or Parquet; of several agents side by side "
        "[collected in the run's environment]"
    )
    add("--obs", type=words.file, metavar="FILE", help=help_)
    add("--no-proof", action="store_true", help="write without a proof, which needs no JAX")


def run(args: argparse.Namespace, command: str) -> int:
    """Run the command; ``command`` is what was typed."""
    out, kind = args.output, args.format
    ending = EXPORTS[kind]
    if out.suffix != ending:
        raise BatchproofError(f"-o {out}: --format {kind} writes a {ending} file: {out}{ending}")
    if not out.absolute().parent.is_dir():
        raise BatchproofError(f"{out}: its folder does not exist: make it first")
    words.check_output(out, args.obs)
    if kind == "sb3":
        for option in ("fold", "unscaled"):
            if getattr(args, option):
                raise BatchproofError(f"--{option} has no effect with --format sb3: leave it out")
    if args.no_proof and args.obs is not None:
        raise BatchproofError("--obs has no effect with --no-proof: leave one of the two out")
    from batchproof import export

    run = export.read_run(args.folder)
    seed = run.training["seeds"][0] if args.seed is None else args.seed
    index = run.agent_index(args.agent)
    run.of(seed, "agent")
    proof = bounds = None
    if not args.no_proof:
        proof = _proof(args, seed, index)
    if not args.unscaled:
        bounds = _bounds(args.folder, run, seed, index)
    if kind == "sb3":
        from batchproof.sb3.from_lab import write

        done = write(run, seed, out, proof)
    else:
        done = export.write(
            run, seed, kind, out, agent=args.agent, bounds=bounds, fold=args.fold, proof=proof
        )
    units = "in [-1, 1]" if args.unscaled else "in the environment's units"
    of = f" of {args.agent}" if args.agent else ""
    print(
        f"{out}: the actor{of} of {args.folder}, seed {seed}, at step {run.step}; actions {units}"
    )
    print(done if done is not None else "no proof was made")
    return 0


def _proof(args: argparse.Namespace, seed: int, agent: int | None) -> tuple[Any, Any]:
    """Real observations and what the lab does on them; of one agent where there are several."""
    try:
        from batchproof.lab import load
    except ModuleNotFoundError as error:
        raise BatchproofError(
            f"the proof runs the lab itself and {error.name} is not installed: pip install "
            "'batchproof[lab]', or add --no-proof"
        ) from None
    lab = load.load_run(args.folder)
    obs: Any
    actions: Any
    if args.obs is None:
        obs = load.collect(lab, seed, PROVEN).obs
    else:
        obs = clinic.observations(args.obs, lab.obs_size)
    actions = load.actions(lab, seed)(obs)
    if agent is not None and lab.layout is not None:
        obs, actions = lab.layout.split_obs(obs)[agent], lab.layout.split_actions(actions)[agent]
    return obs, actions


def _bounds(folder: Path, run: Any, seed: int, agent: int | None) -> tuple[Any, Any]:
    """The lowest and highest actions of an actor's environment."""
    if agent is None:
        from batchproof.export import env_bounds

        return env_bounds(run, seed)
    from batchproof.lab import load

    lab = load.load_run(folder)
    assert lab.layout is not None
    sides: Any = load.bounds(lab, seed)
    low, high = (lab.layout.split_actions(side)[agent] for side in sides)
    return low, high
