"""`batchproof audit`, `trace`, `fix`, `explain` and `rules`."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from batchproof.cli import words
from batchproof.errors import BatchproofError

if TYPE_CHECKING:
    from batchproof.clinic.subject import Subject
    from batchproof.clinic.trace import Trace

FORMATS = ("text", "json", "sarif", "junit", "html")
AUDITED = 512  # transitions that a run of the lab is audited on
MODEL = (
    "a Stable-Baselines3 or sb3-contrib .zip; the folder of a `batchproof train` run; or "
    "package.module:factory, a function of yours that gives a torch module or a Subject (runs "
    "your code, so it needs --trust)"
)
MODEL_TO_FIX = (
    "a Stable-Baselines3 or sb3-contrib .zip, such as `batchproof export RUN --format sb3` writes; "
    "or package.module:factory, a function of yours that gives a Subject of such a model (runs "
    "your code, so it needs --trust)"
)
REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")  # package.module:factory


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
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
    add_whose(audit)
    add = audit.add_argument
    codes = "codes or their beginnings, such as BP3,BP401"
    add("--only", type=words.codes, metavar="CODES", help=f"run only these rules: {codes}")
    add("--ignore", type=words.codes, metavar="CODES", help=f"leave these rules out: {codes}")
    kind = words.one_of("format", FORMATS)
    add("--format", type=kind, default="text", metavar="F", help=f"{words.either(FORMATS)} [text]")
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
    add_whose(trace)
    two = FORMATS[:2]
    help_ = f"{words.either(two)} [text]"
    trace.add_argument(
        "--format", type=words.one_of("format", two), default="text", metavar="F", help=help_
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
    _add_model(fix, MODEL_TO_FIX)
    add = fix.add_argument
    add(
        *words.output("-o", "--output"),
        required=True,
        type=words.file,
        metavar="OUT",
        help="the mended model, a .zip",
    )
    add(
        "--only",
        type=words.names,
        metavar="NAMES",
        help="only these codes of rules or names of fixes",
    )
    add("--unsafe", action="store_true", help="also fixes that change outputs or learning")

    explain = commands.add_parser("explain", help="explain a rule", allow_abbrev=False)
    explain.set_defaults(run=_explain)
    explain.add_argument("code", type=words.code, metavar="CODE", help="for example BP401")
    rules = commands.add_parser("rules", help="list the rules of an audit", allow_abbrev=False)
    rules.set_defaults(run=_rules)


def _add_model(parser: argparse.ArgumentParser, model: str = MODEL) -> None:
    add = parser.add_argument
    add("model", type=words.model, metavar="MODEL", help=model)
    help_ = "observations: .npy, .npz or Parquet [the model's replay buffer, where it has one]"
    add("--obs", type=words.file, metavar="FILE", help=help_)
    help_ = (
        "collect observations, and transitions for critics, in this environment, with the policy"
    )
    add("--env", metavar="ID", help=help_)
    help_ = (
        "put the normalizer that VecNormalize.save wrote in training around --env (a pickle, so it "
        "needs --trust)"
    )
    add("--vecnormalize", type=words.file, metavar="FILE", help=help_)
    help_ = "run code that comes with MODEL: unpickle it, or import package.module"
    add("--trust", action="store_true", help=help_)


def add_whose(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose among the agents of a run."""
    add = parser.add_argument
    help_ = "of a run: whose agent, of the seeds that were trained [the first]"
    add("--seed", type=words.whole(0), metavar="N", help=help_)
    add("--agent", metavar="NAME", help="of a run with several agents: which one")


def _add_output(parser: argparse.ArgumentParser) -> None:
    help_ = "write there, not to standard output"
    names = words.output("--output")
    parser.add_argument(*names, type=words.file, metavar="FILE", help=help_)


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


@_uncollected()
def _audit(args: argparse.Namespace, command: str) -> int:
    _check_model(args)
    from batchproof.clinic import formats, rules

    _check_rules(args)  # a mistyped code is told before the work
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


@_uncollected()
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


@_uncollected()
def _fix(args: argparse.Namespace, command: str) -> int:
    _check_model(args)
    out = args.output
    if out.suffix != ".zip":
        raise BatchproofError(f"-o {out}: the fixed model is a .zip: write {out}.zip")
    from batchproof import records
    from batchproof.clinic import formats
    from batchproof.clinic.fix import FIXES, fix, only_named
    from batchproof.clinic.rules import Status, all_rules, audit

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
            if one.fall:
                print(f"  {one.fall}")
            if not math.isnan(one.gap):
                print(f"  action as deployed: changed by at most {one.gap:.3g}")
        else:
            wanted = FIXES[one.name].safe or args.unsafe
            why = one.reason if wanted else "outputs or learning would change: add --unsafe"
            print(f"not applied {label}: {why}")
    if not any(one.applied for one in done):
        print(f"nothing was changed, and {out} was not written")
        to_name = only_named(subject, report)
        if to_name and report.clean and not args.only:
            named = ",".join(to_name)
            print(f"what is to be reviewed is mended where you name it: --only {named} --unsafe")
        return 0 if report.clean else 1
    with records.replacing(out) as file:
        _save(subject.model, file, out)
    with _progress() as tell:
        report = audit(subject, only=codes, progress=tell)
    failing = [code for code, outcome in report.outcomes.items() if outcome.status is Status.FAIL]
    print(f"after: {formats.summary(report)}")
    if failing:
        print(f"still failing: {', '.join(failing)}")
    print(f"{out}: the fixed model")
    return 0 if report.clean else 1


def _save(model: Any, file: IO[bytes], out: Path) -> None:
    try:
        model.save(file)
    except OSError:  # of the file, which is told as such
        raise
    except Exception as error:  # what somebody keeps in a model may refuse to be pickled
        line = " ".join(str(error).split())
        raise BatchproofError(
            f"{out} was not written: the fixed model's own save fails "
            f"({type(error).__name__}: {line}): take out of the model what it cannot save"
        ) from error


def _trace_if_any(subject: Subject) -> Trace | None:
    """The trace of one update for a report's page, None where there is no update to trace."""
    from batchproof.clinic.trace import trace

    if subject.update is None:
        return None
    try:
        return trace(subject)
    except Exception:  # an update may do anything, and the report has its findings without it
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
    elif not _is_reference(args.model) and not Path(args.model).is_file():
        raise BatchproofError(
            f"{args.model}: no such file; MODEL is a Stable-Baselines3 .zip, the folder of a "
            "`batchproof train` run, or package.module:factory with --trust"
        )
    elif args.run is not _fix and (args.seed is not None or args.agent is not None):
        option = "seed" if args.seed is not None else "agent"
        raise BatchproofError(
            f"--{option} is for the folder of a `batchproof train` run: leave it out"
        )
    elif _is_reference(args.model):
        if not args.trust:
            raise BatchproofError(
                f"{args.model} names Python code, which would run: add --trust if you trust it"
            )
        if args.env is not None:
            raise BatchproofError(
                f"--env has no effect on {args.model}: give its observations with --obs FILE"
            )
    _check_vecnormalize(args)
    for option in ("obs", "vecnormalize"):
        path = getattr(args, option)
        if path is not None and not path.is_file():
            what = "a folder: name a file" if path.is_dir() else "no such file"
            raise BatchproofError(f"--{option} {path}: {what}")
    if args.output is not None and not args.output.absolute().parent.is_dir():
        raise BatchproofError(f"{args.output}: its folder does not exist: make it first")
    words.check_output(args.output, *_model_files(args.model), args.obs, args.vecnormalize)


def _check_vecnormalize(args: argparse.Namespace) -> None:
    """Raise a `BatchproofError` where a normalizer's file has nothing to go around."""
    if args.vecnormalize is None:
        return
    if _is_run(args.model) or _is_reference(args.model):
        raise BatchproofError("--vecnormalize is for a Stable-Baselines3 .zip: leave it out")
    if args.env is None:
        raise BatchproofError("--vecnormalize goes around an environment: add --env ID")


def _model_files(model: str) -> list[Path]:
    """The files that MODEL may name; of Python code those that it is looked for in first."""
    if not _is_reference(model):
        return [Path(model)]
    module = Path(*model.partition(":")[0].split("."))
    return [module.with_suffix(".py"), module / "__init__.py"]


def _check_rules(args: argparse.Namespace) -> None:
    """Raise a `BatchproofError` where no rule would run: nothing found would pass for all well."""
    from batchproof.clinic import rules

    left_out = rules.select(args.ignore or ())
    chosen = rules.select(args.only)
    if all(
        code in left_out or (rule.on_request and args.only is None) for code, rule in chosen.items()
    ):
        only = f" of --only {','.join(args.only)}" if args.only is not None else ""
        raise BatchproofError(
            f"--ignore {','.join(args.ignore)} leaves no rule{only} to run: ignore fewer"
        )


def _subject(args: argparse.Namespace) -> Subject:
    """What MODEL names, with its observations; it can act on them."""
    from batchproof.clinic.subject import check_runs

    if _is_run(args.model):
        subject = _from_run(args)
    elif _is_reference(args.model):
        subject = _from_reference(args.model, args.obs)
    else:
        from batchproof.sb3.loading import load_subject

        subject = load_subject(
            Path(args.model),
            obs=args.obs,
            env=args.env,
            trust=args.trust,
            vecnormalize=args.vecnormalize,
        )
    if args.run is not _audit:  # an audit tries it itself
        # Weights that are NaN have a rule, and statistics that are a mend.
        check_runs(subject, sick=args.run is _fix)
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
    except (BatchproofError, KeyboardInterrupt):
        raise
    except BaseException as error:  # their code may raise anything, and sys.exit(0) is no audit
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
    """The agent of a lab run, with a sample of its replay, or what it does in an environment."""
    from batchproof.export import read_run, to_subject

    folder = Path(args.model)
    run = read_run(folder)
    seed = run.training["seeds"][0] if args.seed is None else args.seed
    run.agent_index(args.agent)
    obs = None if args.obs is None else observations(args.obs, run.spaces["obs_size"])
    transitions = bounds = None
    collected = False
    if obs is None or args.env is not None:
        from batchproof.lab import load

        lab = load.load_run(folder)
        lab.of_seed(seed)  # a wrong seed is told before the environment is stepped
        transitions = run.replayed(seed, AUDITED) if args.env is None else None
        if transitions is None:
            collected = True
            transitions = load.collect(lab, seed, AUDITED, args.env)._asdict()
        bounds = load.bounds(lab, seed)
        obs = transitions["obs"] if obs is None else obs
    return to_subject(
        run,
        seed,
        obs,
        agent=args.agent,
        transitions=transitions,
        bounds=bounds,
        collected=collected,
    )


def observations(path: Path, size: int) -> Any:
    """A file's observations as a NumPy array (N, size)."""
    from batchproof.clinic.observations import check_against, read_observations

    found = read_observations(path)
    check_against(found, (size,), str(path))
    return found.float().numpy()  # type: ignore[union-attr]


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
