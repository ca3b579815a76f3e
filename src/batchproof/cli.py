"""The ``batchproof`` command: words on the command line become calls into the package.

Nothing heavy is imported before the words are known to be good, so help and mistakes answer at
once. Names that live in modules which need JAX are repeated here for that reason; a test compares
the two.

Exit codes: 0 done, 1 an audit with findings, 2 bad input or a machine's limit (one line on standard
error), 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from batchproof import __version__
from batchproof.errors import BatchproofError
from batchproof.modes import PRESETS, Mode, Plan, Slot

if TYPE_CHECKING:
    from batchproof.clinic.subject import Subject
    from batchproof.clinic.trace import Trace
    from batchproof.lab.loop import Result
    from batchproof.lab.training import Training

ALGORITHMS = ("td3", "sac", "ddpg", "crossq", "xqc", "maddpg", "reinforce")
NORMALIZED = {"crossq": "renorm", "xqc": "batch"}  # the norm of those that have one by default
AGENT_PRESETS = {
    "td3": (),
    "sac": (),
    "ddpg": ("paper",),
    "crossq": ("crossq", "sb3-contrib", "wn"),
    "xqc": (),
    "maddpg": ("openai",),
    "reinforce": (),
}
NORMS = ("none", "batch", "renorm", "layer", "group", "rms")
ESTIMATORS = ("ema", "debiased", "cumulative", "chan", "winsorized", "huber", "median-of-means")
RUNNING_NORMS = ("batch", "renorm")  # those that keep running statistics, so modes matter
PLACEMENTS = ("input", "pre", "post", "before-action")
TARGET_STATS = ("copy", "polyak", "stale")
ENDINGS = ("terminated", "truncated", "both")
STUDY_OPTIONS = ("ending",)  # those that only some studies have
LETTERS = "TESJMB"
RESUMED = ("train", "study", "compare")  # commands that go on where they were stopped
MAX_SEEDS = 10_000
FORMATS = ("text", "json", "sarif", "junit", "html")
EXPORTS = {"torch": ".safetensors", "onnx": ".onnx", "sb3": ".zip"}
PROVEN = 1000  # observations that an export is proven on
AUDITED = 512  # steps that a run of the lab is audited on
EXTRAS = {"stable_baselines3": "sb3", "sb3_contrib": "sb3"}  # what brings a package; else lab
REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")  # package.module:factory


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``batchproof``; None takes them from the process.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BatchproofError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        resumes = ": the same command resumes" if words[:1] and words[0] in RESUMED else ""
        print(f"batchproof: interrupted{resumes}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141  # what a shell reports for a process that SIGPIPE ended
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "batchproof":
            raise
        name = error.name.split(".")[0]
        extra = EXTRAS.get(name, "lab")
        return _complain(f"{name} is not installed: pip install 'batchproof[{extra}]'")
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        _drop_output_if_full()
        return _complain(f"{name}{error.strerror or error}")


def _run(words: list[str]) -> int:
    try:
        args = _parser().parse_args(words)
    except SystemExit as done:  # --help and --version, which have printed what they had to say
        return int(done.code or 0)
    with _uncollected() if args.run in (_audit, _trace, _fix) else nullcontext():
        return args.run(args, shlex.join(["batchproof", *words]))


def run() -> NoReturn:
    """The console script: `main`, and an exit that does not look for cycles among all modules."""
    code = main()
    gc.freeze()
    sys.exit(code)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Do not look for garbage cycles: among the objects of torch's modules that costs a second."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _complain(message: str) -> int:
    print(f"batchproof: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _drop_output() -> None:
    """Send what is still buffered nowhere: the interpreter flushes once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _drop_output_if_full() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


# --- train -----------------------------------------------------------------------------------


def _train(args: argparse.Namespace, command: str) -> int:
    _check_effects(args)
    training = _training(args, _pairs("--env-option", args.env_option))
    finished = _is_finished(args.out)

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
    both = args.norm or NORMALIZED.get(args.algo, "batch" if args.preset else "none")
    return {"actor": args.actor_norm or both, "critic": args.critic_norm or both}


def _check_effects(args: argparse.Namespace) -> None:
    """Raise a `BatchproofError` for an option that could change nothing."""
    if args.preset is not None and args.preset not in AGENT_PRESETS[args.algo]:
        known = _either(AGENT_PRESETS[args.algo]) or "none"
        raise BatchproofError(f"unknown preset {args.preset!r}: {args.algo} has {known}")
    kinds = _kinds(args)
    used = {kind for kind in kinds.values() if kind != "none"}
    running = used.intersection(RUNNING_NORMS)

    def refuse(option: str, why: str) -> NoReturn:
        raise BatchproofError(f"{option} has no effect {why}")

    keeps = f"without a norm that keeps running statistics ({' or '.join(RUNNING_NORMS)})"
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


def _training(args: argparse.Namespace, env_options: dict[str, Any]) -> Training:
    from batchproof.lab.agents import AGENTS
    from batchproof.lab.training import Training

    agent = AGENTS[args.algo]
    config = agent.PRESETS[args.preset] if args.preset else agent.Config()
    known = {field.name for field in fields(config)}
    changes = _given(args, "learning_rate", "gamma", "tau", "batch_size", "target_stats")
    if args.modes is not None:
        changes["plan"] = args.modes
    if args.no_target_network:
        changes["target_network"] = False
    changes |= {network: _mlp(args, network, config) for network in ("actor", "critic")}
    for name, value in _pairs("--set", args.set).items():
        changes[name] = _setting(args.algo, config, name, value)
    for name in [name for name in changes if name not in known]:
        if changes[name] is not None:
            option = "no-target-network" if name == "target_network" else name.replace("_", "-")
            raise BatchproofError(f"--{option} has no effect in {args.algo}: leave it out")
        del changes[name]
    names = ("learning_starts", "buffer_size", "gradient_steps", "update_every")
    steps = _given(args, *names, "eval_every", "eval_episodes")
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
        hint = f"did you mean {close[0]}?" if close else f"it has {_either(known)}"
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
    own = {name: value for name, value in own.items() if value is not None}
    if held is None:
        for name in own:
            raise BatchproofError(f"--{network}-{name} has no effect: {args.algo} has no {network}")
        return None
    asked = _given(args, "hidden", "norm", "placement") | own
    norm = replace(held.norm, kind=asked["norm"]) if "norm" in asked else held.norm
    if "placement" in asked:
        norm = replace(norm, placement=asked["placement"])
    if norm.kind != "none":
        norm = replace(norm, **_given(args, "momentum", "eps", "groups", "estimator"))
    changes = {"norm": norm} | ({"hidden": asked["hidden"]} if "hidden" in asked else {})
    if args.project_weights and held.project == "none":
        changes["project"] = "hidden"
    return replace(held, **changes)


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were written: the others keep the library's defaults."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _pairs(option: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise BatchproofError(f"{option} {name} is given twice: keep one")
    return dict(pairs)


def _is_finished(out: Path) -> bool:
    """Whether the folder holds a finished run; `train` judges whether it is this one."""
    from batchproof.records import read_json

    path = out / "run.json"
    if not path.is_file():
        return False
    run = read_json(path)
    return isinstance(run, dict) and run.get("status") == "finished"


def _print_result(result: Result, out: Path, *, tensorboard: bool) -> None:
    sound = []
    print(f"{'seed':>10}  {'final return':>12}  status")
    for seed in result.seeds:
        value, status = seed["final_return"], seed["status"]
        value = math.nan if value is None else value  # NaN cannot stand in run.json
        if status == "ok":
            sound.append(value)
            shown = f"{value:.2f}"
        else:
            shown, status = "-", f"diverged at step {seed['diverged_at']}"
        print(f"{seed['seed']:>10}  {shown:>12}  {status}")
    count, lost = len(result.seeds), len(result.seeds) - len(sound)
    if sound:
        mean = math.fsum(sound) / len(sound)
        kept = f"over {_count(len(sound), 'seed')}" + (" that did not diverge" if lost else "")
        print(f"\nmean {mean:.2f}, min {min(sound):.2f}, max {max(sound):.2f} {kept}")
    if lost:
        print(f"\nDIVERGED: {lost} of {_count(count, 'seed')}; they have no final return.")
    metrics = out / "metrics.parquet"
    script = (
        "import pyarrow.parquet as pq; "
        f"[print(row) for row in pq.read_table({str(metrics)!r}).to_pylist()]"
    )
    print(f"\n{out / 'run.json'}: configuration, versions, seeds")
    print(f"{metrics}: a row for each evaluation and seed")
    print(f"{out / 'checkpoint'}: the agents, in safetensors")
    print(f"\nLook at the metrics with any Parquet reader, or: python -c {shlex.quote(script)}")
    if tensorboard:
        print(f"or: tensorboard --logdir {shlex.quote(str(out / 'tensorboard'))}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


# --- compare ---------------------------------------------------------------------------------

# Options of `train` that a comparison has in a form of its own, and those of its environments.
COMPARED = (
    "norm", "actor-norm", "critic-norm", "placement", "actor-placement", "critic-placement",
    "modes", "preset",
)  # fmt: skip
COMPARE_OWN = ("env", "out", "seeds", "no-progress", "tensorboard")
OF_TASK = ("steps", "eval-every", "eval-episodes", "env-option", "host-env")


def _compare(args: argparse.Namespace, command: str) -> int:
    from batchproof import compare

    extra: list[tuple[str, str, tuple[tuple[str, ...], ...]]] = []
    if args.file is not None:
        options = _option_names(_alone(_add_compare, "compare"))
        trained = _option_names(_alone(_add_train, "train"), (*COMPARE_OWN, *OF_TASK))
        words, extra = compare.read_file(args.file, options, trained)
        # What stands on the command line comes later, and so wins.
        args = _parser().parse_args(["compare", *words, *shlex.split(command)[2:]])
    for option in ("env", "out") if extra else ("algo", "env", "out"):
        if getattr(args, option) is None and not (args.list and option == "out"):
            raise BatchproofError(f"what to compare is not complete: add --{option}")
    train = _alone(_add_train, "train")

    def build(words: Sequence[str]) -> Training:
        one = train.parse_args([*words, "--out", "."])
        _check_effects(one)
        return _training(one, _pairs("--env-option", one.env_option))

    spec = compare.Spec(
        algos=args.algo or (),
        envs=args.env,
        norms=args.norm,
        placements=args.placement or (),
        modes=args.modes,
        shared=tuple(_shared(args, train)),
        extra=tuple(extra),
        seeds=args.seeds,
        at_once=args.seeds_at_once,
        baseline=args.baseline,
        budget_s=args.budget,
    )
    if args.list:
        print(compare.listing(spec, build))
        return 0
    progress = not args.no_progress
    record = compare.run(spec, args.out, build, on=args.on, progress=progress, command=command)
    print(compare.text(record))
    print(f"\n{args.out / 'compare.json'}: conditions, returns of each seed, statistics")
    print(f"{args.out / 'cells'}: the runs, as of `batchproof train`")
    page = shlex.join(["--out", str(args.out / "report.html")])
    print(f"\nCurves and more: batchproof report {shlex.quote(str(args.out))} {page}")
    if record["status"] == "interrupted":
        return 130
    # The table names the failed cells; the others stand.
    failed = [cell for cell in record["cells"] if cell["state"] == "failed"]
    if failed:
        first = next(p["error"] for p in failed[0]["populations"] if p["error"])
        count = f"{len(failed)} of {len(record['cells'])} cells failed"
        raise BatchproofError(f"{count}, the first with: {first}")
    return 0


def _alone(add: Callable[[Any], None], name: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    commands = _Parser(prog="batchproof").add_subparsers()
    add(commands)
    return commands.choices[name]


def _option_names(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> dict[str, bool]:
    """Options of a parser; True for those without a value."""
    found = {action.option_strings[-1][2:]: action.nargs == 0
             for action in parser._actions if action.option_strings}  # fmt: skip
    return {name: flag for name, flag in found.items() if name not in ("help", *without)}


def _shared(args: argparse.Namespace, train: argparse.ArgumentParser) -> Iterator[tuple[str, ...]]:
    """The options of `train` that were written for all conditions."""
    for name, flag in _option_names(train, (*COMPARED, *COMPARE_OWN)).items():
        value = getattr(args, name.replace("-", "_"))
        if flag and value:
            yield (f"--{name}",)
        elif not flag and value is not None:
            for text in value if isinstance(value, list) else [value]:
                yield f"--{name}", text


# --- study -----------------------------------------------------------------------------------


def _study(args: argparse.Namespace, command: str) -> int:
    from batchproof.study import STUDIES

    if args.list or args.name is None:
        width = max(map(len, STUDIES), default=0)
        for name, study in STUDIES.items():
            print(f"{name:<{width}}  {study.summary}")
        return 0
    if args.name not in STUDIES:
        raise BatchproofError(f"unknown study {args.name!r}: use one of {', '.join(STUDIES)}")
    if args.out is None:
        raise BatchproofError("a study needs a folder for its results: add --out DIR")
    study = STUDIES[args.name]
    own = _given(args, *STUDY_OPTIONS)
    for option in own:
        if option not in study.options:
            raise BatchproofError(f"--{option} has no effect in {args.name}: leave it out")
    outcome = import_module(study.module).run(
        args.out,
        seeds=args.seeds,
        steps=args.steps,
        quick=args.quick,
        conditions=args.conditions,
        progress=not args.no_progress,
        command=command,
        **own,
    )
    claims = outcome["claims"]
    width = max((len(claim["id"]) for claim in claims), default=0)
    for claim in claims:
        print(f"{claim['id']:<{width}}  {claim['verdict']:<12}  {claim['statement']}")
    print()
    for path in (args.out / "report.html", *sorted(args.out.glob("*.png"))):
        if path.exists():
            print(path)
    return 0


# --- report ----------------------------------------------------------------------------------


def _report(args: argparse.Namespace, command: str) -> int:
    for run in args.runs:
        if not run.is_dir():
            raise BatchproofError(f"{run}: no such folder: name a run's or a study's")
    from batchproof import report

    for paragraph in report.write(args.runs, args.out, args.threshold):
        print(f"{paragraph}\n")
    print(args.out)
    return 0


# --- modes -----------------------------------------------------------------------------------


def _modes(args: argparse.Namespace, command: str) -> int:
    print("Slots: the passes of an off-policy actor-critic update; acting is slot 0\n")
    for slot in Slot:
        print(f"  {slot.value}  {slot.name.lower():<14} {slot.title}")
    print("\nModes: the statistics that a normalized network uses in one pass\n")
    for letter in LETTERS:
        print(f"  {letter}  {Mode(letter).title}")
    print("\n  A lower-case letter leaves the running statistics alone.")
    print("\nPlans: five letters for slots 1 to 5 (slot 0 is E), or six with slot 0 in front\n")
    for name, letters in PRESETS.items():
        print(f"  {name:<8} {letters}")
    return 0


# --- clinic ----------------------------------------------------------------------------------


def _audit(args: argparse.Namespace, command: str) -> int:
    _check_model(args)
    from batchproof.clinic import formats, rules

    for codes in (args.only, args.ignore):  # a mistyped code is told before the work
        rules.select(codes)
    subject = _subject(args)
    with _progress() as tell:
        report = rules.audit(subject, only=args.only, ignore=args.ignore or (), progress=tell)
        trace = _trace_if_any(subject) if args.format == "html" else None
    if args.format == "text":
        terminal = args.output is None and sys.stdout.isatty()
        width = min(shutil.get_terminal_size().columns, 120) if terminal else 100
        shown = formats.text(report, color=terminal and "NO_COLOR" not in os.environ, width=width)
    elif args.format == "sarif":
        shown = formats.sarif(report, artifact=None if _is_reference(args.model) else args.model)
    elif args.format == "html":
        shown = formats.html(report, trace)
    else:
        shown = formats.FORMATS[args.format](report)
    _hand_over(shown, args.output, formats.summary(report))
    return 0 if report.clean else 1


def _trace(args: argparse.Namespace, command: str) -> int:
    _check_model(args)
    from batchproof import records

    found: Any
    if _is_run(args.model):
        from batchproof.lab.load import load_run
        from batchproof.lab.trace import trace as trace_run

        found = trace_run(load_run(Path(args.model)), args.seed)
    else:
        from batchproof.clinic.trace import trace

        found = trace(_subject(args))
    if args.format == "json":
        shown = json.dumps(records.to_json(found.to_json()), indent=1, allow_nan=False) + "\n"
    else:
        shown = f"{found}\n"
    _hand_over(shown, args.output, f"plan {found.plan}" if found.plan else "no plan")
    return 0


def _fix(args: argparse.Namespace, command: str) -> int:
    _check_model(args)
    out = args.output
    if out.suffix != ".zip":
        raise BatchproofError(f"-o {out}: the fixed model is a .zip: write {out}.zip")
    if out.exists() and Path(args.model).exists() and out.samefile(args.model):
        raise BatchproofError(f"-o {out} is MODEL itself, which is never overwritten: name another")
    from batchproof import records
    from batchproof.clinic import formats
    from batchproof.clinic.fix import FIXES, fix
    from batchproof.clinic.rules import all_rules, audit

    for name in args.only or ():
        if name not in FIXES and name not in all_rules():
            raise BatchproofError(
                f"{name!r} is neither a rule nor a fix: the fixes are {', '.join(FIXES)}"
            )
    subject = _subject(args)
    if not hasattr(subject.model, "save"):
        raise BatchproofError(
            f"{args.model} has no save method: only a library's model can be fixed from here, "
            "other modules with batchproof.clinic.fix in Python"
        )
    # Fixes asked for by their own names have no code to narrow the audit to.
    codes = args.only if args.only and all(name in all_rules() for name in args.only) else None
    with _progress() as tell:
        report = audit(subject, only=codes, progress=tell)
    print(f"before: {formats.summary(report)}")
    done = fix(subject, report, only=args.only, unsafe=args.unsafe)
    for one in done:
        label = f"{one.name} ({one.code})" if one.code else one.name
        if one.applied:
            print(f"applied {label}: {', '.join(one.changed)}")
            if one.code:
                print(
                    f"  measure over its threshold: {one.before:.3g} before, {one.after:.3g} after"
                )
            if not math.isnan(one.gap):
                print(f"  action as deployed: changed by at most {one.gap:.3g}")
        else:
            wanted = FIXES[one.name].safe or args.unsafe
            why = one.reason if wanted else "outputs or learning would change: add --unsafe"
            print(f"not applied {label}: {why}")
    if not any(one.applied for one in done):
        print(f"nothing was changed, and {out} was not written")
        return 0 if report.clean else 1
    with records.replacing(out) as file:
        subject.model.save(file)
    with _progress() as tell:
        report = audit(subject, only=codes, progress=tell)
    print(f"after: {formats.summary(report)}\n{out}: the fixed model")
    return 0 if report.clean else 1


def _trace_if_any(subject: Subject) -> Trace | None:
    """The trace of one update for a report's page, None where there is no update to trace."""
    from batchproof.clinic.trace import trace

    if subject.update is None:
        return None
    try:
        return trace(subject)
    except BatchproofError:
        return None


def _explain(args: argparse.Namespace, command: str) -> int:
    from batchproof.clinic import formats, rules

    known = rules.all_rules()
    if args.code not in known:
        raise BatchproofError(f"unknown rule {args.code!r}: see `batchproof rules`")
    rule = known[args.code]
    print(f"{rule.code} {rule.name}: {formats.title(rule)}\nfamily: {rule.family}")
    parts = {
        "What it does": rule.what,
        "How it is detected": rule.detected,
        "Why it matters": rule.why,
        "What to do": rule.mend,
        "Fix": formats.fix_in_words(rule),
        "References": "\n".join(rule.references),
    }
    for head, told in parts.items():
        if told:
            print(f"\n{head}\n{_filled(told)}")
    return 0


def _rules(args: argparse.Namespace, command: str) -> int:
    from batchproof.clinic import formats, rules

    known = rules.all_rules()
    width = max(len(rule.name) for rule in known.values())
    for number, family in rules.FAMILIES.items():
        print(f"{number}xx {family}")
        for rule in known.values():
            if rule.code[2] == str(number):
                print(f"  {rule.code}  {rule.name:<{width}}  {formats.title(rule)}")
    print("\nMore on a rule: batchproof explain CODE")
    return 0


def _is_reference(model: str) -> bool:
    """Whether MODEL names a function, ``package.module:factory``, and no file."""
    return REFERENCE.fullmatch(model) is not None and not Path(model).exists()


def _is_run(model: str) -> bool:
    """Whether MODEL is the folder of a run of the lab."""
    return Path(model).is_dir()


def _check_model(args: argparse.Namespace) -> None:
    """Raise a `BatchproofError` for files that are not there, before anything heavy is imported."""
    if _is_run(args.model):
        if args.run is _fix:
            raise BatchproofError(
                f"{args.model} is a folder: fix mends a Stable-Baselines3 .zip, such as "
                "`batchproof export RUN --format sb3` writes"
            )
        if args.run is _trace:
            for option in ("obs", "env", "agent"):
                if getattr(args, option) is not None:
                    raise BatchproofError(
                        f"--{option} has no effect on a run of the lab, whose update is traced on "
                        "a batch of its own: leave it out"
                    )
    elif args.run is not _fix and (args.seed is not None or args.agent is not None):
        option = "seed" if args.seed is not None else "agent"
        raise BatchproofError(
            f"--{option} is for the folder of a `batchproof train` run: leave it out"
        )
    if _is_run(args.model):
        pass
    elif _is_reference(args.model):
        if not args.trust:
            raise BatchproofError(
                f"{args.model} names Python code, which would run: add --trust if you trust it"
            )
        if args.env is not None:
            raise BatchproofError(
                f"--env has no effect on {args.model}: give its observations with --obs FILE"
            )
    elif not Path(args.model).is_file():
        raise BatchproofError(
            f"{args.model}: no such file; MODEL is a Stable-Baselines3 .zip, the folder of a "
            "`batchproof train` run, or package.module:factory with --trust"
        )
    if args.obs is not None and not args.obs.is_file():
        raise BatchproofError(f"--obs {args.obs}: no such file")
    if args.output is not None and not args.output.absolute().parent.is_dir():
        raise BatchproofError(f"{args.output}: its folder does not exist: make it first")


def _subject(args: argparse.Namespace) -> Subject:
    """What MODEL names, with its observations; it has been tried on two of them."""
    if _is_run(args.model):
        subject = _from_run(args)
    elif _is_reference(args.model):
        subject = _from_reference(args.model, args.obs)
    else:
        from batchproof.sb3.loading import load_subject

        subject = load_subject(Path(args.model), obs=args.obs, env=args.env, trust=args.trust)
    _try(subject)
    return subject


def _from_reference(reference: str, obs: Path | None) -> Subject:
    """The subject that a function of the user's gives; its code runs, so it needs --trust."""
    from dataclasses import replace

    from torch import nn

    from batchproof.clinic.subject import Subject

    module, _, path = reference.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` does: people name modules beside them
    try:
        found: Any = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        if not isinstance(found, Subject | nn.Module):
            found = found()
    except BatchproofError:
        raise
    except Exception as error:  # their code may raise anything
        raise BatchproofError(f"{reference}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(found, Subject | nn.Module):
        raise BatchproofError(
            f"{reference} gave a {type(found).__name__}: it must give a torch module or a Subject"
        )
    if obs is None:
        if isinstance(found, Subject):
            return found
        raise BatchproofError(f"{reference} gives a torch module: add its observations, --obs FILE")
    from batchproof.clinic.observations import read_observations

    given = read_observations(obs)
    if isinstance(found, Subject):
        return replace(found, obs=given)
    return Subject.from_module(found, given, name=reference)


def _from_run(args: argparse.Namespace) -> Subject:
    """The agent of a lab run, with observations and transitions from its environment."""
    from batchproof.export import read_run, to_subject

    folder = Path(args.model)
    run = read_run(folder)
    seed = run.training["seeds"][0] if args.seed is None else args.seed
    run.agent_index(args.agent)
    obs = None if args.obs is None else _observations(args.obs, run.spaces["obs_size"])
    transitions = bounds = None
    if obs is None or args.env is not None:
        from batchproof.lab import load

        lab = load.load_run(folder)
        lab.of_seed(seed)  # a wrong seed is told before the environment is stepped
        collected = load.collect(lab, seed, AUDITED, args.env)
        transitions, bounds = collected._asdict(), load.bounds(lab, seed)
        obs = collected.obs if obs is None else obs
    return to_subject(run, seed, obs, agent=args.agent, transitions=transitions, bounds=bounds)


def _observations(path: Path, size: int) -> Any:
    """A file's observations as a NumPy array (N, size)."""
    from batchproof.clinic.observations import check_against, read_observations

    found = read_observations(path)
    check_against(found, (size,), str(path))
    return found.float().numpy()  # type: ignore[union-attr]


def _try(subject: Subject) -> None:
    """Raise a `BatchproofError` where the policy cannot take the observations at all."""
    import torch

    from batchproof.clinic.subject import take, tensors, unchanged

    try:
        with unchanged(subject), torch.no_grad():
            subject.policy(take(subject.obs, slice(0, 2)))
    except BatchproofError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(part.shape)) for part in tensors(subject.obs))
        raise BatchproofError(
            f"{subject.name} cannot take these observations, {shapes}: "
            f"{type(error).__name__}: {error}"
        ) from error


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows which rule runs on standard error, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda code: None
        return
    try:
        yield lambda code: print(f"\r\x1b[Kchecking {code}", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _hand_over(shown: str, output: Path | None, summary: str) -> None:
    """Print a report, or write it and print where it is."""
    from batchproof import records

    if output is None:
        print(shown, end="")
        return
    with records.replacing(output) as file:
        file.write(shown.encode())
    print(f"{output}: {summary}")


def _filled(told: str) -> str:
    import textwrap

    lines = (
        textwrap.fill(
            line,
            100,
            initial_indent="  ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in told.splitlines()
    )
    return "\n".join(lines)


# --- export ----------------------------------------------------------------------------------


def _export(args: argparse.Namespace, command: str) -> int:
    out, kind = args.output, args.format
    ending = EXPORTS[kind]
    if out.suffix != ending:
        raise BatchproofError(f"-o {out}: --format {kind} writes a {ending} file: {out}{ending}")
    if not out.absolute().parent.is_dir():
        raise BatchproofError(f"{out}: its folder does not exist: make it first")
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
        obs = _observations(args.obs, lab.obs_size)
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


# --- words -----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        raise BatchproofError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="batchproof",
        description="Normalization for deep RL that acts the same alone and in a batch.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"batchproof {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_train(commands)
    _add_compare(commands)
    _add_study(commands)
    _add_report(commands)
    _add_clinic(commands)
    _add_export(commands)
    modes = commands.add_parser(
        "modes", help="show slots, modes and named plans", allow_abbrev=False
    )
    modes.set_defaults(run=_modes)
    return parser


def _add_train(commands: Any) -> None:
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
    parser.set_defaults(run=_train)
    add = parser.add_argument
    add("algo", metavar="ALGO", type=_one_of("algorithm", ALGORITHMS), help=_either(ALGORITHMS))
    help_ = "a Gymnasium id with continuous actions; for maddpg batchproof/Rally-v0 or mpe2/NAME"
    add("--env", required=True, metavar="ID", help=help_)
    add("--out", required=True, type=_folder, metavar="DIR", help="the run's folder")

    add = parser.add_argument_group("normalization").add_argument
    kind, place = _one_of("norm", NORMS), _placement
    add("--norm", type=kind, metavar="KIND", help=f"of both networks: {_either(NORMS)} [none]")
    add("--actor-norm", type=kind, metavar="KIND", help="of the actor [--norm]")
    add("--critic-norm", type=kind, metavar="KIND", help="of the critics [--norm]")
    help_ = f"where it sits: {_either(PLACEMENTS)}, or several joined with + [pre]"
    add("--placement", type=place, metavar="P", help=help_)
    add("--actor-placement", type=place, metavar="P", help="in the actor [--placement]")
    add("--critic-placement", type=place, metavar="P", help="in the critics [--placement]")
    help_ = "statistics of each pass, see `batchproof modes` [sb3-td3 or sb3-sac, by ALGO]"
    add("--modes", type=Plan.parse, metavar="PLAN", help=help_)
    help_ = "weight of the new batch in the running statistics, flax's 0.99 is 0.01 [0.1]"
    share = _real("in (0, 1], the weight of the new batch", 0, 1, open_low=True)
    add("--momentum", type=share, metavar="X", help=help_)
    help_ = "added to the variance before the square root [1e-5]"
    add("--eps", type=_real("a finite number, at least 0", 0), metavar="X", help=help_)
    add("--groups", type=_whole(1), metavar="N", help="feature groups of the norm `group` [8]")
    help_ = f"what keeps the running statistics: {_either(ESTIMATORS)} [ema]"
    add("--estimator", type=_one_of("estimator", ESTIMATORS), metavar="HOW", help=help_)
    help_ = "keep the rows of hidden weights at unit length"
    add("--project-weights", action="store_true", help=help_)
    help_ = f"how target networks get running statistics: {_either(TARGET_STATS)} [copy]"
    stats = _one_of("target statistics", TARGET_STATS)
    add("--target-stats", type=stats, metavar="HOW", help=help_)
    help_ = "let the online networks value the next step, as CrossQ does"
    add("--no-target-network", action="store_true", help=help_)

    add = parser.add_argument_group("networks and learning").add_argument
    presets = ", ".join(name for names in AGENT_PRESETS.values() for name in names)
    help_ = f"start from a named configuration of ALGO: {presets}"
    add("--preset", metavar="NAME", help=help_)
    help_ = "any setting of ALGO's configuration, value as JSON or text; may be repeated"
    add("--set", type=_pair, action="append", default=[], metavar="KEY=VALUE", help=help_)
    help_ = "widths of the hidden layers of both networks, or `linear` for none [by ALGO]"
    add("--hidden", type=_widths, metavar="N,N", help=help_)
    add("--actor-hidden", type=_widths, metavar="N,N", help="of the actor [--hidden]")
    add("--critic-hidden", type=_widths, metavar="N,N", help="of the critics [--hidden]")
    positive = _real("a positive finite number", 0, open_low=True)
    add("--learning-rate", type=positive, metavar="X", help="Adam's [by ALGO]")
    help_ = "discount per environment step [by ALGO]"
    add("--gamma", type=_real("in [0, 1]", 0, 1), metavar="X", help=help_)
    help_ = "step of the target networks [by ALGO]"
    add("--tau", type=_real("in (0, 1]", 0, 1, open_low=True), metavar="X", help=help_)
    add("--batch-size", type=_whole(1), metavar="N", help="transitions per update [by ALGO]")
    help_ = "updates each time that it learns [1]"
    add("--gradient-steps", type=_whole(1), metavar="N", help=help_)
    help_ = "environment steps between times that it learns [1; maddpg 100]"
    add("--update-every", type=_whole(1), metavar="N", help=help_)
    help_ = "environment steps with random actions and no learning [by ALGO]"
    add("--learning-starts", type=_whole(0), metavar="N", help=help_)
    help_ = "replay capacity in transitions [1000000]"
    add("--buffer-size", type=_whole(1), metavar="N", help=help_)

    add = parser.add_argument_group("run").add_argument
    help_ = "environment steps of each seed [100000]"
    add("--steps", type=_whole(1), default=100_000, metavar="N", help=help_)
    help_ = "a number N for seeds 0 to N-1, or a list such as 0,3,7 (one seed: 7,) [1]"
    add("--seeds", type=_seeds, default=(0,), metavar="N", help=help_)
    help_ = "environment steps between evaluations [a fortieth of --steps]"
    add("--eval-every", type=_whole(1), metavar="N", help=help_)
    help_ = "deterministic episodes per evaluation and seed [5]"
    add("--eval-episodes", type=_whole(1), default=5, metavar="N", help=help_)
    help_ = "keyword argument of gymnasium.make, value as JSON or text; may be repeated"
    add(
        "--env-option",
        type=_pair,
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


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="compare norms, placements and mode plans over algorithms, environments and seeds",
        description=(
            "Train every combination of what is listed, each with the same seeds, and say what "
            "differs. What is finished is kept: the same command continues, and one with more "
            "conditions or seeds runs only those. Options of `batchproof train` hold for all "
            "conditions; where one has no effect it is left away."
        ),
        epilog=(
            "example: batchproof compare --algo td3,sac --env Pendulum-v1 --norm none,batch,layer "
            "--modes default,TEETE --seeds 5 --steps 10000 --hidden 64,64 --out runs/pendulum"
        ),
        allow_abbrev=False,
    )
    parser.set_defaults(run=_compare)
    add = parser.add_argument
    help_ = "a TOML file with these options as its keys, and [[condition]] for single conditions"
    add("file", nargs="?", type=_file, metavar="FILE", help=help_)
    help_ = f"each ALGO or ALGO:PRESET: {_either(ALGORITHMS)}"
    add("--algo", type=_several(_algo), metavar="A,B", help=help_)
    add("--env", type=_several(_model), metavar="ID,ID", help="environments, as in train")
    help_ = (
        f"each {_either(NORMS)}, critic:KIND or actor:KIND for one network alone, or default, the "
        "algorithm's own [default]"
    )
    add("--norm", type=_several(_norm), default=("default",), metavar="KIND,KIND", help=help_)
    help_ = "where the norm sits, as in train [the algorithm's own]"
    add("--placement", type=_several(_placement), metavar="P,P", help=help_)
    help_ = "mode plans, as in train, or default, the algorithm's own [default]"
    add("--modes", type=_several(_plan), default=("default",), metavar="PLAN,PLAN", help=help_)
    help_ = "of every condition: a number N for 0 to N-1, or a list such as 0,3,7 [5]"
    add("--seeds", type=_seeds, default=tuple(range(5)), metavar="N", help=help_)
    help_ = "train so many seeds at once: every condition gets its first before any gets more [all]"
    add("--seeds-at-once", type=_whole(1), metavar="N", help=help_)
    help_ = "compare all with this condition [that without a norm, for each algorithm]"
    add("--baseline", metavar="NAME", help=help_)
    help_ = "stop in time, at an evaluation, with what is known: such as 30m or 2h"
    add("--budget", type=_duration, metavar="TIME", help=help_)
    add("--out", type=_folder, metavar="DIR", help="the comparison's folder")
    help_ = "train on a Ray cluster, all of whose nodes see DIR: ray or ray:HOST:PORT [here]"
    add("--on", type=_cluster, metavar="PLACE", help=help_)
    add("--list", action="store_true", help="show what would be trained, and train nothing")
    add("--no-progress", action="store_true", help="no table that follows along")

    group = parser.add_argument_group("for all conditions, see `batchproof train --help`")
    train = _alone(_add_train, "train")
    shared = _option_names(train, (*COMPARED, *COMPARE_OWN))
    for action in train._actions:
        name = action.option_strings[-1] if action.option_strings else ""
        if name[2:] not in shared:
            continue
        if action.nargs == 0:
            group.add_argument(name, action="store_true", help=action.help)
            continue
        many = "append" if isinstance(action.default, list) else "store"
        check = _checked(action.type)
        group.add_argument(name, type=check, action=many, metavar=action.metavar, help=action.help)


def _several(parse: Callable[[str], str]) -> Callable[[str], tuple[str, ...]]:
    return lambda text: tuple(dict.fromkeys(parse(part.strip()) for part in text.split(",")))


def _checked(parse: Any) -> Callable[[str], str]:
    """Accepts what `parse` accepts, and hands on the text."""

    def check(text: str) -> str:
        if parse is not None:
            parse(text)
        return text

    return check


def _algo(text: str) -> str:
    algo, colon, preset = text.partition(":")
    _one_of("algorithm", ALGORITHMS)(algo)
    if colon and preset not in AGENT_PRESETS[algo]:
        known = _either(AGENT_PRESETS[algo]) or "none"
        raise argparse.ArgumentTypeError(f"unknown preset {preset!r}: {algo} has {known}")
    return text


def _norm(text: str) -> str:
    networks = []
    for part in text.split("+"):
        network, colon, kind = part.rpartition(":")
        if colon:
            networks.append(_one_of("network", ("actor", "critic"))(network))
        _one_of("norm", NORMS if colon or "+" in text else (*NORMS, "default"))(kind)
    if len(set(networks)) != text.count("+") + (":" in text):
        raise argparse.ArgumentTypeError(
            f"{text!r} names no network, or one twice: write for example actor:layer+critic:batch"
        )
    return text


def _plan(text: str) -> str:
    # A plan that is well spelt and still impossible is left out of the comparison, with its reason.
    if text != "default" and not re.fullmatch(f"[{LETTERS}{LETTERS.lower()}]{{5,6}}", text):
        Plan.parse(text)
    return text


def _duration(text: str) -> float:
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    if not hours + minutes + seconds:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time: write for example 90s, 30m or 2h"
        )
    return 3600.0 * hours + 60 * minutes + seconds


def _cluster(text: str) -> str:
    if not re.fullmatch(r"ray(:[^:/\s]+:\d+)?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no place to train: write ray, or ray:HOST:PORT such as ray:10.0.0.1:6379"
        )
    return text


def _add_study(commands: Any) -> None:
    parser = commands.add_parser(
        "study",
        help="run a study and judge its claims",
        description=(
            "Run a study: DIR gets study.json, report.html, pictures and metrics.parquet. One "
            "that was stopped continues with the same command. Without NAME, list the studies."
        ),
        allow_abbrev=False,
    )
    parser.set_defaults(run=_study)
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="which study")
    add("--list", action="store_true", help="list the studies")
    add("--out", type=_folder, metavar="DIR", help="the study's folder")
    add("--seeds", type=_whole(1), metavar="N", help="seeds 0 to N-1 of each condition")
    add("--steps", type=_whole(1), metavar="N", help="environment steps of each seed")
    add("--quick", action="store_true", help="a small version that ends in minutes")
    add("--conditions", metavar="A,B", help="only these conditions, or `all`")
    help_ = f"constant-reward: how episodes end, {_either(ENDINGS)} [terminated]"
    add("--ending", type=_one_of("ending", ENDINGS), metavar="HOW", help=help_)
    add("--no-progress", action="store_true", help="no progress bar")


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="compare runs in one HTML file that opens offline",
        description=(
            "Compare runs in one HTML file: curves, statistics, mode plans and tables. It opens "
            "offline. The first condition is the baseline that the others are compared with."
        ),
        epilog="example: batchproof report runs/none runs/batch --out report.html",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_report)
    add = parser.add_argument
    help_ = "a folder of `batchproof train` or `batchproof study`, or a folder of runs"
    add("runs", nargs="+", type=_folder, metavar="RUN", help=help_)
    help_ = "the HTML file [report.html]"
    add("--out", type=_file, default=Path("report.html"), metavar="FILE", help=help_)
    help_ = "return that `steps to a threshold` asks for [the median of what conditions reach]"
    add("--threshold", type=_real("a finite number", -math.inf), metavar="RETURN", help=help_)


def _add_clinic(commands: Any) -> None:
    audit = commands.add_parser(
        "audit",
        help="say what is wrong with a policy's normalization, and where",
        description=(
            "Examine a policy and say what is wrong, in which layer and which pass, by how much, "
            "and what to do. Exit code 0: no rule failed; 1: some did; 2: it could not run."
        ),
        epilog="example: batchproof audit td3.zip --env Pendulum-v1",
        allow_abbrev=False,
    )
    audit.set_defaults(run=_audit)
    _add_model(audit)
    _add_whose(audit)
    add = audit.add_argument
    codes = "codes or their beginnings, such as BP3,BP401"
    add("--only", type=_codes, metavar="CODES", help=f"run only these rules: {codes}")
    add("--ignore", type=_codes, metavar="CODES", help=f"leave these rules out: {codes}")
    kind = _one_of("format", FORMATS)
    add("--format", type=kind, default="text", metavar="F", help=f"{_either(FORMATS)} [text]")
    _add_output(audit)

    trace = commands.add_parser(
        "trace",
        help="show which statistics each pass of one real update uses",
        description=(
            "Run one update of the model's own library on a copy of its state and show which "
            "statistics each pass used, as a mode plan and call by call."
        ),
        epilog="example: batchproof trace td3.zip --env Pendulum-v1",
        allow_abbrev=False,
    )
    trace.set_defaults(run=_trace)
    _add_model(trace)
    _add_whose(trace)
    two = FORMATS[:2]
    help_ = f"{_either(two)} [text]"
    trace.add_argument(
        "--format", type=_one_of("format", two), default="text", metavar="F", help=help_
    )
    _add_output(trace)

    fix = commands.add_parser(
        "fix",
        help="mend what an audit finds, and write the mended model to another file",
        description=(
            "Mend what an audit finds. A fix that does not lower its own measure is taken back. "
            "MODEL is never changed. Exit code 0: none of the rules that were looked at fails any "
            "more; 1: some do; 2: it could not run."
        ),
        epilog="example: batchproof fix td3.zip -o fixed.zip --env Pendulum-v1 --unsafe",
        allow_abbrev=False,
    )
    fix.set_defaults(run=_fix)
    _add_model(fix)
    add = fix.add_argument
    add("-o", "--output", required=True, type=_file, metavar="OUT", help="the mended model, a .zip")
    add("--only", type=_names, metavar="NAMES", help="only these codes of rules or names of fixes")
    add("--unsafe", action="store_true", help="also fixes that change outputs or learning")

    explain = commands.add_parser("explain", help="explain a rule", allow_abbrev=False)
    explain.set_defaults(run=_explain)
    explain.add_argument("code", type=_code, metavar="CODE", help="for example BP401")
    rules = commands.add_parser("rules", help="list the rules of an audit", allow_abbrev=False)
    rules.set_defaults(run=_rules)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    help_ = (
        "a Stable-Baselines3 or sb3-contrib .zip; the folder of a `batchproof train` run; or "
        "package.module:factory, a function of yours that gives a torch module or a Subject (runs "
        "your code, so it needs --trust)"
    )
    add("model", type=_model, metavar="MODEL", help=help_)
    help_ = "observations: .npy, .npz or Parquet [the model's replay buffer, where it has one]"
    add("--obs", type=_file, metavar="FILE", help=help_)
    help_ = (
        "collect observations, and transitions for critics, in this environment, with the policy"
    )
    add("--env", metavar="ID", help=help_)
    help_ = "run code that comes with MODEL: unpickle it, or import package.module"
    add("--trust", action="store_true", help=help_)


def _add_whose(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    help_ = "of a run: whose agent, of the seeds that were trained [the first]"
    add("--seed", type=_whole(0), metavar="N", help=help_)
    add("--agent", metavar="NAME", help="of a run with several agents: which one")


def _add_export(commands: Any) -> None:
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
    parser.set_defaults(run=_export)
    add = parser.add_argument
    add("folder", type=_folder, metavar="RUN", help="the folder of a `batchproof train` run")
    _add_whose(parser)
    kind = _one_of("format", tuple(EXPORTS))
    add("--format", required=True, type=kind, metavar="F", help=_either(EXPORTS))
    ends = ", ".join(f"{ending} ({name})" for name, ending in EXPORTS.items())
    add("-o", "--output", required=True, type=_file, metavar="FILE", help=ends)
    help_ = "put batch norms into the linear layers beside them"
    add("--fold", action="store_true", help=help_)
    help_ = "give actions in [-1, 1] and not in the environment's units"
    add("--unscaled", action="store_true", help=help_)
    help_ = (
        "observations to prove it on: .npy, .npz or Parquet; of several agents side by side "
        "[collected in the run's environment]"
    )
    add("--obs", type=_file, metavar="FILE", help=help_)
    add("--no-proof", action="store_true", help="write without a proof, which needs no JAX")


def _add_output(parser: argparse.ArgumentParser) -> None:
    help_ = "write there, not to standard output"
    parser.add_argument("--output", type=_file, metavar="FILE", help=help_)


def _model(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must name a file, got nothing")
    return text


def _file(text: str) -> Path:
    return Path(_model(text))


def _code(text: str) -> str:
    if not re.fullmatch(r"BP[0-9]{3}", text.upper()):
        raise argparse.ArgumentTypeError(
            f"unknown rule {text!r}: a code is BP and three digits, see `batchproof rules`"
        )
    return text.upper()


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    return [name.upper() if name.upper().startswith("BP") else name for name in names]


def _codes(text: str) -> list[str]:
    codes = [code.strip().upper() for code in text.split(",")]
    for code in codes:
        if not re.fullmatch(r"BP[0-9]{0,3}", code):
            raise argparse.ArgumentTypeError(
                f"unknown rule {code!r}: write codes such as BP401, or BP4 for a whole family"
            )
    return codes


def _either(names: Iterable[str]) -> str:
    return ", ".join(names)


def _one_of(what: str, names: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {text!r}: use one of {_either(names)}"
            )
        return text

    return parse


def _folder(text: str) -> Path:
    if not text:  # an unset shell variable, which must not mean the current folder
        raise argparse.ArgumentTypeError("must name a folder, got nothing")
    return Path(text)


def _placement(text: str) -> str:
    for place in text.split("+"):
        _one_of("placement", PLACEMENTS)(place)
    return text


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return parse


def _real(
    wanted: str, low: float, high: float = math.inf, open_low: bool = False
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        # NaN fails every comparison.
        above = value > low if open_low else value >= low
        if not (above and value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return parse


def _widths(text: str) -> tuple[int, ...]:
    if text == "linear":
        return ()
    try:
        return tuple(_whole(1)(width) for width in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of positive widths: write for example 256,256"
        ) from None


def _seeds(text: str) -> tuple[int, ...]:
    try:
        if "," not in text:
            count = _whole(1)(text)
            if count <= MAX_SEEDS:
                return tuple(range(count))
            raise argparse.ArgumentTypeError(
                f"{count} seeds are too many, and the one seed {count} is written '{count},'"
            )
        seeds = tuple(_whole(0)(seed) for seed in text.removesuffix(",").split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{error}; write a number of seeds, or distinct seeds such as 0,3,7"
        ) from None
    if len(set(seeds)) != len(seeds):
        raise argparse.ArgumentTypeError(f"{text} names a seed twice: seeds must be distinct")
    if max(seeds) >= 2**32:
        raise argparse.ArgumentTypeError(f"seeds must be less than 2**32, got {max(seeds)}")
    return seeds


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not KEY=VALUE: write for example ending=truncated"
        )

    def refuse(token: str) -> NoReturn:
        raise ValueError(token)

    try:
        return name, json.loads(value, parse_constant=refuse)
    except ValueError:
        return name, value
