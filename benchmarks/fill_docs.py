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

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def verdicts() -> str:
    study = _load(RESULTS / "constant-reward" / "study.json")
    lines = ["| claim | | verdict | measured |", "|---|---|---|---|"]
    lines += [
        f"| {c['id']} | {c['statement']} | **{c['verdict']}** | {c['why']} |"
        for c in study["claims"]
    ]
    return "\n".join(lines) + (
        f"\n\n{study['seeds']} seeds, {study['steps']} steps, `{study['command']}`, "
        f"{study['wall_s'] / 60:.0f} minutes on {study['machine']['cores']} cores "
        f"({study['machine']['processor']}). Brackets are 95 % intervals of the mean."
    )


def conditions() -> str:
    study = _load(RESULTS / "constant-reward" / "study.json")
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


def _benchmark(name: str) -> str:
    path = RESULTS / "benchmarks" / f"{name}.md"
    record = _load(RESULTS / "benchmarks" / f"{name}.json")
    if record is None:
        return "Not measured yet."
    machine = record["machine"]
    return (
        path.read_text(encoding="utf-8").strip()
        + f"\n\n{machine['processor']}, {machine['cores']} cores, {record['rounds']} rounds, "
        f"{record['wall_s'] / 60:.0f} minutes.{_gemm(record)}"
    )


def _report() -> str:
    return (RESULTS / "benchmarks" / "report.md").read_text(encoding="utf-8").strip()


def _gemm(record: dict[str, Any]) -> str:
    rates = [
        sample["gemm_gflops"]
        for samples in record["samples"].values()
        for sample in samples
        if "gemm_gflops" in sample
    ]
    return f" Best matrix product: {statistics.median(rates):.0f} GFLOP/s." if rates else ""


def learning() -> str:
    lines = [
        "| task | agent | steps | seeds | mean final return | per seed | wall time | reference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    references = {
        ("Pendulum-v1", "td3"): "-152 at 20k",
        ("Pendulum-v1", "sac"): "-157 at 20k",
        ("HalfCheetah-v5", "sac"): "6156 +- 738 at 100k (v4, ten seeds)",
    }
    commands = []
    for path in sorted((RESULTS / "learning").glob("*/run.json")):
        run = _load(path)
        if run["status"] != "finished":
            continue
        training = run["training"]
        returns = [seed["final_return"] for seed in run["seeds"]]
        env, algo = training["env_id"], training["algo"]
        lines.append(
            f"| {env} | {algo.upper()} | {training['steps']} | {len(returns)} "
            f"| {statistics.fmean(returns):.0f} | {' '.join(f'{value:.0f}' for value in returns)} "
            f"| {run['wall_s'] / 60:.0f} min | {references.get((env, algo), '-')} |"
        )
        commands.append(f"    {run['command']}")
    return "\n".join([*lines, "", *commands])


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
        + f"\n\n`{record['command']}`, {record['wall_s'] / 60:.0f} minutes."
    )


def _breakout() -> Any:
    return _load(RESULTS / "naturecnn-breakout" / "study.json")


def _interval(found: list[float | None] | None) -> str:
    if found is None or found[1] is None:
        return "-"
    return f"{found[0]:+.1f} [{found[1]:.1f}, {found[2]:.1f}]"


def breakout_verdicts() -> str:
    study = _breakout()
    if study is None:
        return "Not measured yet."
    lines = ["| claim | | predicted | verdict | measured |", "|---|---|---|---|---|"]
    lines += [
        f"| {c['id']} | {c['statement']} | {c['prediction']} | **{c['verdict']}** | {c['why']} |"
        for c in study["claims"]
    ]
    return "\n".join(lines) + (
        f"\n\n{study['steps']:,} agent steps ({study['frames']:,} frames), `{study['command']}`, "
        f"{study['wall_s'] / 3600:.1f} hours on {study['machine']['cores']} cores "
        f"({study['machine']['processor']}). Brackets are 95 % intervals over seeds."
    )


def breakout_conditions() -> str:
    study = _breakout()
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
    study = _breakout()
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
    study = _load(RESULTS / "maddpg-batchnorm" / "study.json")
    if study is None:
        return "Not measured yet."
    lines = ["| claim | | verdict | measured |", "|---|---|---|---|"]
    lines += [
        f"| {c['id']} | {c['statement']} | **{c['verdict']}** | {c['why']} |"
        for c in study["claims"]
    ]
    return "\n".join(lines) + (
        f"\n\n{study['seeds']} seeds, `{study['command']}`, {study['wall_s'] / 60:.0f} minutes on "
        "2 cores. Brackets are 95 % intervals of the mean."
    )


def maddpg_conditions() -> str:
    study = _load(RESULTS / "maddpg-batchnorm" / "study.json")
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


TABLES = {
    "maddpg-batchnorm.md": {"verdicts": maddpg_verdicts, "conditions": maddpg_conditions},
    "planted-defects.md": {"planted": planted, "healthy": healthy},
    "constant-reward.md": {"verdicts": verdicts, "conditions": conditions, "sb3": sb3},
    "naturecnn-breakout.md": {"verdicts": breakout_verdicts, "conditions": breakout_conditions},
    "reinforce.md": {"reinforce": lambda: _benchmark("reinforce")},
    "on-policy.md": {"cures": breakout_cures},
    "benchmarks.md": {
        "constant_reward": lambda: "\n\n".join(
            _benchmark(f"constant_reward_{width}") for width in (64, 256)
        ),
        "half_cheetah": lambda: _benchmark("half_cheetah"),
        "gemm": lambda: _benchmark("gemm"),
        "audit": lambda: _benchmark("audit"),
        "layers": lambda: _benchmark("layers"),
        "monitor": lambda: _benchmark("monitor"),
        "report": _report,
        "learning": learning,
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
