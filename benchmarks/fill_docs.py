"""Put the tables of measured results into the documentation, between their markers.

    python benchmarks/fill_docs.py

A table stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``; its content is from ``results/``.
A test fails while a page differs from what this script would write.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import learning

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


def _minutes(record: dict[str, Any]) -> str:
    minutes = round(record["wall_s"] / 60)
    return f"{minutes} minute{'' if minutes == 1 else 's'}"


def _cores(machine: dict[str, Any]) -> str:
    return f"{machine['cores']} core" + ("" if machine["cores"] == 1 else "s")


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _study(name: str) -> Any:
    return _load(RESULTS / name / "study.json")


def _claims(study: dict[str, Any], *, predicted: bool = False) -> str:
    """A study's verdicts, with what had been expected of them where it says so."""
    lines = ["| claim | | predicted | verdict | measured |", "|---|---|---|---|---|"]
    if not predicted:
        lines = ["| claim | | verdict | measured |", "|---|---|---|---|"]
    for c in study["claims"]:
        cells = [c["id"], c["statement"], f"**{c['verdict']}**", c["why"]]
        if predicted:
            cells.insert(2, c["prediction"] + (" (missed)" if c.get("missed") else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts() -> str:
    study = _study("constant-reward")
    return _claims(study) + (
        f"\n\n{study['seeds']} seeds, {study['steps']} steps, `{study['command']}`, "
        f"{_minutes(study)} on {_cores(study['machine'])} "
        f"({study['machine']['processor']}). Brackets are 95 % intervals of the mean."
    )


def conditions() -> str:
    study = _study("constant-reward")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for condition in study["conditions"]:
        key = (condition["row"], condition["label"])
        rows.setdefault(key, {})[condition["algo"], condition["ending"]] = condition

    def cell(condition: dict[str, Any] | None) -> str:
        if condition is None:
            return "-"
        known = [value for value in condition["returns"] if value is not None]
        lost = f", {condition['diverged']} diverged" if condition["diverged"] else ""
        spread = f"[{min(known):.1f}, {max(known):.1f}]"
        return f"{statistics.fmean(known):.1f} {spread}{lost}"

    def predicted(condition: dict[str, Any]) -> str:
        if condition["prediction"] is None:
            return "-"
        return condition["prediction"] + (" (missed)" if condition["missed"] else "")

    lines = [
        "| row | condition | TD3 | predicted | SAC | predicted | TD3 truncated | SAC truncated "
        "| kappa TD3, SAC |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (row, label), found in rows.items():
        td3, sac = found["td3", "terminated"], found["sac", "terminated"]
        lines.append(
            f"| {row} | {label} | {cell(td3)} | {predicted(td3)} | {cell(sac)} | {predicted(sac)} "
            f"| {cell(found.get(('td3', 'truncated')))} | {cell(found.get(('sac', 'truncated')))} "
            f"| {td3['kappa']:.1g}, {sac['kappa']:.1g} |"
        )
    return "\n".join(lines)


def sb3() -> str:
    rows = _load(RESULTS / "constant-reward-sb3" / "sb3.json")["rows"]
    names = {
        "none": "no batch norm",
        "library": "batch norm as the library runs it",
        "cure": "the same, slot 3 in `E`",
    }
    lines = ["| agent | condition | plan | mean | per seed | kappa |", "|---|---|---|---|---|---|"]
    for row in rows:
        returns = row["returns"]
        lines.append(
            f"| {row['algo'].upper()} | {names[row['condition']]} | {row['modes'] or '-'} "
            f"| {statistics.fmean(returns):.1f} | {' '.join(f'{value:.1f}' for value in returns)} "
            f"| {min(row['kappas']):.0e} to {max(row['kappas']):.0e} |"
        )
    return "\n".join(lines)


def _rounds(record: dict[str, Any]) -> str:
    return "1 round, " if record["rounds"] == 1 else f"{record['rounds']} rounds, "


def _benchmark(name: str) -> str:
    path = RESULTS / "benchmarks" / f"{name}.md"
    record = _load(RESULTS / "benchmarks" / f"{name}.json")
    if record is None:
        return "Not measured yet."
    machine = record["machine"]
    return (
        path.read_text(encoding="utf-8").strip()
        + f"\n\n{machine['processor']}, {_cores(machine)}, {_rounds(record)}"
        f"{_minutes(record)}.{_gemm(record)}"
    )


def _both_processors(name: str) -> str:
    return f"{_benchmark(name)}\n\n{_benchmark(f'avx512/{name}')}"


def _report() -> str:
    return (RESULTS / "benchmarks" / "report.md").read_text(encoding="utf-8").strip()


def _text(name: str) -> str:
    path = RESULTS / "benchmarks" / f"{name}.md"
    return path.read_text(encoding="utf-8").strip() if path.exists() else "Not measured yet."


def _gemm(record: dict[str, Any]) -> str:
    rates = [
        sample["gemm_gflops"]
        for samples in record.get("samples", {}).values()
        for sample in samples
        if "gemm_gflops" in sample
    ]
    return f" Best matrix product: {statistics.median(rates):.0f} GFLOP/s." if rates else ""


def planted() -> str:
    record = _load(RESULTS / "planted-defects" / "planted.json")
    if record is None:
        return "Not measured yet."
    rows = record["planted"]
    lines = ["| planted defect | rule | layer | found | outcome |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['name']} | [{r['code']}](rules/{r['code']}.md) | `{r['layer'] or '-'}` "
        f"| {'yes' if r['found'] else '**no**'} | {r['status']} |"
        for r in rows
    ]
    found = sum(row["found"] for row in rows)
    return f"{found} of {len(rows)} planted defects are found.\n\n" + "\n".join(lines)


def healthy() -> str:
    record = _load(RESULTS / "planted-defects" / "planted.json")
    if record is None:
        return "Not measured yet."
    rows = record["healthy"]
    lines = ["| healthy policy | failures | to review | skipped |", "|---|---|---|---|"]
    lines += [
        f"| {r['name']} | {', '.join(r['failed']) or '-'} | {', '.join(r['review']) or '-'} "
        f"| {', '.join(r['skipped']) or '-'} |"
        for r in rows
    ]
    alarms = sum(bool(row["failed"]) for row in rows)
    return (
        f"False alarms on {alarms} of {len(rows)} healthy policies.\n\n"
        + "\n".join(lines)
        + f"\n\n`{record['command']}`, {_minutes(record)}."
    )


def _interval(found: list[float | None] | None) -> str:
    if found is None or found[1] is None:
        return "-"
    return f"{found[0]:+.1f} [{found[1]:.1f}, {found[2]:.1f}]"


def breakout_verdicts() -> str:
    study = _study("naturecnn-breakout")
    if study is None:
        return "Not measured yet."
    return _claims(study, predicted=True) + (
        f"\n\n{study['steps']:,} agent steps ({study['frames']:,} frames), `{study['command']}`, "
        f"{study['wall_s'] / 3600:.1f} hours on {_cores(study['machine'])} "
        f"({study['machine']['processor']}). Brackets are 95 % intervals over seeds."
    )


def breakout_conditions() -> str:
    study = _study("naturecnn-breakout")
    if study is None:
        return "Not measured yet."
    lines = [
        "| condition | final score, mean [lowest, highest seed] | first half "
        "| after as many frames | first KL | clipped at first | update, CPU s | seeds | audit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in study["conditions"]:
        final = c["returns"]
        codes = [code for code, status in c["clinic"]["outcomes"].items() if status == "fail"]
        lines.append(
            f"| {c['label']} | {statistics.fmean(final):.1f} [{min(final):.1f}, {max(final):.1f}] "
            f"| {statistics.fmean(c['early']):.1f} | {statistics.fmean(c['at_frames']):.1f} "
            f"| {c['first_kl']:.2g} | {c['first_clip_fraction']:.1%} "
            f"| {statistics.fmean(c['update_cpu_s']):.1f} | {len(final)} "
            f"| {', '.join(codes) or '-'} |"
        )
    return "\n".join(lines)


def breakout_cures() -> str:
    study = _study("naturecnn-breakout")
    if study is None:
        return "Not measured yet."
    lines = [
        "| cure | score | minus BN as the library runs it | minus no norm |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{c['name']}` | {c['score']:.1f} | {_interval(c.get('minus_bn'))} "
        f"| {_interval(c.get('minus_none'))} |"
        for c in study["cures"]
    ]
    return "\n".join(lines)


def maddpg_verdicts() -> str:
    study = _study("maddpg-batchnorm")
    if study is None:
        return "Not measured yet."
    return _claims(study) + (
        f"\n\n{study['seeds']} seeds, `{study['command']}`, {_minutes(study)} on "
        "2 cores. Brackets are 95 % intervals of the mean."
    )


def maddpg_conditions() -> str:
    study = _study("maddpg-batchnorm")
    if study is None:
        return "Not measured yet."
    lines = [
        "| condition | agent | plan | score [lowest, highest] | predicted | solved |",
        "|---|---|---|---|---|---|",
    ]
    for c in study["conditions"]:
        returns, digits = c["returns"], 2 if c["task"] == "rally" else 1
        mean, low, high = statistics.fmean(returns), min(returns), max(returns)
        solved = "-"
        if c["solved_at"] is not None:
            solved = f"{sum(at is not None for at in c['solved_at'])} of {len(returns)}"
        lines.append(
            f"| {c['label']} | {c['algo'].upper()} | `{c['modes'] or '-'}` "
            f"| {mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}] "
            f"| {c['prediction'] or '-'}{' (missed)' if c['missed'] else ''} | {solved} |"
        )
    return "\n".join(lines)


def _predicted_verdicts(name: str) -> str:
    """Verdicts of a study whose claims say what was expected of them."""
    study = _study(name)
    if study is None:
        return "Not measured yet."
    return _claims(study, predicted=True) + (
        f"\n\n`{study['command']}`, {study['seeds']} seeds, {_minutes(study)} on "
        f"{_cores(study['machine'])} ({study['machine']['processor']})."
    )


def kappa_conditions() -> str:
    study = _study("kappa-predicts")
    if study is None:
        return "Not measured yet."
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for c in study["conditions"]:
        rows.setdefault((c["task"], c["label"]), {})[c["algo"]] = c

    def cells(c: dict[str, Any]) -> str:
        scores = c["scores"]
        kappa = "-" if c["kappa"] is None else f"{c['kappa']:.1g}"
        spread = f"{statistics.fmean(scores):.2f} [{min(scores):.2f}, {max(scores):.2f}]"
        return f"{kappa} | {spread} | {c['failed']} of {len(scores)}"

    lines = [
        "| task: condition | plan | predicted | TD3 kappa | score | failed "
        "| SAC kappa | score | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (_, label), found in rows.items():
        td3, sac = found["td3"], found["sac"]
        plan = f"`{td3['modes']}`" if td3["modes"] else "-"
        lines.append(f"| {label} | {plan} | {td3['prediction']} | {cells(td3)} | {cells(sac)} |")
    return "\n".join(lines)


def best_plan_final() -> str:
    study = _study("best-plan")
    if study is None:
        return "Not measured yet."
    tasks = list(study["tasks"])
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for c in study["conditions"]:
        if c["stage"] == "final":
            rows.setdefault((c["algo"], c["modes"] or "no norm"), {})[c["task"]] = c
    lines = [
        "| agent | plan | " + " | ".join(study["tasks"][task]["env"] for task in tasks) + " |",
        "|---|---|" + "---|" * len(tasks),
    ]
    for (algo, plan), found in rows.items():
        cells = (
            f"{statistics.fmean(found[task]['scores']):.2f} "
            f"[{min(found[task]['scores']):.2f}, {max(found[task]['scores']):.2f}]"
            for task in tasks
        )
        lines.append(f"| {algo.upper()} | `{plan}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_plan_factors() -> str:
    study = _study("best-plan")
    if study is None or not study["factors"]:
        return "Not measured yet."
    tasks = list(study["factors"][0]["by_task"])
    lines = [
        "| slots | modes | mean score | "
        + " | ".join(study["tasks"][task]["env"] for task in tasks)
        + " |",
        "|---|---|---|" + "---|" * len(tasks),
    ]
    lines += [
        f"| {row['slots']} | `{row['modes']}` | {row['mean']:.2f} | "
        + " | ".join(f"{row['by_task'][task]:.2f}" for task in tasks)
        + " |"
        for row in study["factors"]
    ]
    return "\n".join(lines)


def _study_verdicts(name: str) -> str:
    study = _study(name)
    if study is None:
        return "Not measured yet."
    return _claims(study) + (
        f"\n\n{study['seeds']} seeds, `{study['command']}`, {_minutes(study)} on "
        f"{_cores(study['machine'])} ({study['machine']['processor']}), shared with other "
        "work. Brackets are 95 % intervals over seeds."
    )


def _spread(values: list[float | None], digits: int = 0) -> str:
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    return f"{statistics.fmean(known):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def joint_conditions() -> str:
    study = _study("crossq-joint")
    if study is None:
        return "Not measured yet."
    lines = [
        "| condition | plan | score [lowest, highest] | predicted | gap | true gap "
        "| error of the gap |",
        "|---|---|---|---|---|---|---|",
    ]

    def gaps(condition: dict[str, Any], name: str) -> str:
        return _spread(condition["bias"][name], 1) if condition["bias"] else "-"

    for c in study["conditions"]:
        error = _spread(c["gap_error"], 2) if c["gap_error"] else "-"
        lines.append(
            f"| {c['label']} | `{c['modes'] or '-'}` | {_spread(c['returns'])} "
            f"| {c['prediction'] or '-'}{' (missed)' if c['missed'] else ''} "
            f"| {gaps(c, 'gap')} | {gaps(c, 'gap_reference')} | {error} |"
        )
    return "\n".join(lines)


def swingup_conditions() -> str:
    study = _study("pendulum-swingup")
    if study is None:
        return "Not measured yet."
    lines = [
        f"{study['steps']} steps of each seed.",
        "",
        "| condition | agent | score [lowest, highest] | predicted | solved | wall time |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c['label']} | {c['algo']} | {_spread(c['returns'])} "
        f"| {c['prediction']}{' (missed)' if c['missed'] else ''} "
        f"| {c['solved']} of {len(c['returns'])} | {c['wall_s'] / 60:.1f} min |"
        for c in study["conditions"]
    ]
    return "\n".join(lines)


def hopper_conditions() -> str:
    study = _study("hopper-decay")
    if study is None:
        return "Not measured yet."
    lines = [
        f"{study['steps']} steps of each seed.",
        "",
        "| condition | agent | last return [lowest, highest] | decay | predicted | fall "
        "| critics' weights grew | wall time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c['label']} | {c['algo']} | {_spread(c['returns'])} | {_spread(c['decay'])} "
        f"| {c['prediction']}{' (missed)' if c['missed'] else ''} | {_spread(c['fall'])} "
        f"| {statistics.fmean(c['weight_growth']):.2g} times | {c['wall_s'] / 60:.0f} min |"
        for c in study["conditions"]
    ]
    return "\n".join(lines)


TABLES = {
    "crossq-joint.md": {
        "verdicts": lambda: _study_verdicts("crossq-joint"),
        "conditions": joint_conditions,
    },
    "pendulum-swingup.md": {
        "verdicts": lambda: _study_verdicts("pendulum-swingup"),
        "conditions": swingup_conditions,
    },
    "hopper-decay.md": {
        "verdicts": lambda: _study_verdicts("hopper-decay"),
        "conditions": hopper_conditions,
    },
    "kappa-predicts.md": {
        "verdicts": lambda: _predicted_verdicts("kappa-predicts"),
        "conditions": kappa_conditions,
    },
    "best-plan.md": {
        "verdicts": lambda: _predicted_verdicts("best-plan"),
        "final": best_plan_final,
        "factors": best_plan_factors,
    },
    "maddpg-batchnorm.md": {"verdicts": maddpg_verdicts, "conditions": maddpg_conditions},
    "planted-defects.md": {"planted": planted, "healthy": healthy},
    "constant-reward.md": {"verdicts": verdicts, "conditions": conditions, "sb3": sb3},
    "naturecnn-breakout.md": {"verdicts": breakout_verdicts, "conditions": breakout_conditions},
    "reinforce.md": {"reinforce": lambda: _benchmark("reinforce")},
    "on-policy.md": {"cartpole": lambda: _text("on_policy"), "cures": breakout_cures},
    "maddpg.md": {
        "maddpg-speed": lambda: _benchmark("maddpg"),
        "maddpg-returns": lambda: _benchmark("maddpg_learning"),
    },
    "nature-cnn.md": {"nature_cnn": lambda: _benchmark("nature_cnn")},
    "atari.md": {"atari": lambda: _benchmark("atari")},
    "crossq.md": {
        "time-to-return": learning.time_to_return,
        "crossq-minus-sac": learning.crossq_minus_sac,
        "crossq": lambda: _benchmark("crossq"),
    },
    "estimators.md": {"recalibration": lambda: _benchmark("recalibration")},
    "growth.md": {"growth": lambda: _benchmark("growth")},
    "gpu.md": {"gpu": lambda: _benchmark("gpu_on_cpu")},
    "reliability.md": {
        "kills": lambda: _text("reliability_kills"),
        "faults": lambda: _text("reliability_faults"),
    },
    "benchmarks.md": {
        "constant_reward": lambda: "\n\n".join(
            _benchmark(f"constant_reward_{width}") for width in (64, 256)
        ),
        "halfcheetah": lambda: _both_processors("halfcheetah"),
        "hopper": lambda: _both_processors("hopper"),
        "gemm": lambda: _benchmark("gemm"),
        "audit": lambda: _benchmark("audit"),
        "layers": lambda: _benchmark("layers"),
        "monitor": lambda: _benchmark("monitor"),
        "report": _report,
        "learning": learning.table,
    },
}


def filled(page: str, text: str) -> str:
    """The page with its tables as the results have them."""
    for name, make in TABLES[page].items():
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.S)
        block = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text, count = pattern.subn(lambda _, block=block: block, text)
        if count != 1:
            raise SystemExit(f"docs/{page}: {count} places for the table {name}, expected one")
    return text


def main() -> None:
    for page in TABLES:
        path = ROOT / "docs" / page
        path.write_text(filled(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
