"""Draw the pictures of docs/concepts.md: the passes of an update, and what each mode letter does.

    python benchmarks/draw_slots.py

writes docs/images/slots.svg and docs/images/modes.svg. Slots, their names and the letters are read
from `batchproof.modes`; a test fails while the pictures differ from what this script would draw.
Colours follow the reader's light or dark setting, which an SVG in an ``<img>`` sees by itself.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from batchproof.modes import Mode, Slot

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"

STYLE = """
  text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
         font-size: 18px; fill: #1b1f24; }
  .page { fill: #ffffff; stroke: #d0d7de; }
  .small { font-size: 16px; }
  .head { font-size: 19px; font-weight: 600; }
  .letter { font-size: 30px; font-weight: 700; }
  .muted { fill: #57606a; }
  .middle { text-anchor: middle; }
  .data { fill: #f1f3f5; stroke: #8c959f; }
  .actor { fill: #e3f0fa; stroke: #0072b2; }
  .critic { fill: #fdeee0; stroke: #b85400; }
  .actor-dot { fill: #0072b2; }
  .critic-dot { fill: #b85400; }
  .running { fill: #e2f5ec; stroke: #00785a; }
  .dot { fill: #ffffff; font-weight: 700; }
  .wire { stroke: #57606a; stroke-width: 1.6; fill: none; }
  .tip { fill: #57606a; }
  .extra { stroke: #a23b86; stroke-width: 2; fill: none; stroke-dasharray: 6 4; }
  .extra-ink { fill: #a23b86; font-weight: 600; }
  .back { stroke: #b85400; stroke-width: 1.8; fill: none; stroke-dasharray: 4 3; }
  .back-tip { fill: #b85400; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .page { fill: #14181d; stroke: #30363d; }
    .muted { fill: #9aa6b2; }
    .data { fill: #262c33; stroke: #768390; }
    .actor { fill: #0f2c42; stroke: #56b4e9; }
    .critic { fill: #3d2410; stroke: #f0964a; }
    .actor-dot { fill: #2b8fca; }
    .critic-dot { fill: #c9661a; }
    .running { fill: #0d3427; stroke: #2fbf93; }
    .dot { fill: #ffffff; }
    .wire { stroke: #9aa6b2; }
    .tip { fill: #9aa6b2; }
    .extra { stroke: #e08ac8; }
    .extra-ink { fill: #e08ac8; }
    .back { stroke: #f0964a; }
    .back-tip { fill: #f0964a; }
  }
"""

TIPS = "".join(
    f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
    f'orient="auto-start-reverse"><path class="{name}" d="M0 0 L10 5 L0 10 z"/></marker>'
    for name in ("tip", "back-tip", "extra-ink")
)


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, words: str = "") -> str:
    drawn = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" '
    drawn += f'class="{kind}"/>'
    return drawn + (text(x + width / 2, y + height / 2 + 5, words, "middle") if words else "")


def arrow(path: str, kind: str = "wire") -> str:
    tip = {"wire": "tip", "back": "back-tip", "extra": "extra-ink"}[kind]
    return f'<path class="{kind}" d="{path}" marker-end="url(#{tip})"/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole SVG file on a page of its own colour."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(title)}">'
    )
    page = f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10" class="page"/>'
    defs = f"<defs>{TIPS}</defs>"
    return (
        "\n".join(
            [
                head,
                f"<title>{escape(title)}</title>",
                f"<style>{STYLE}</style>",
                defs,
                page,
                *parts,
                "</svg>",
            ]
        )
        + "\n"
    )


# --- the passes --------------------------------------------------------------------------------

LANE, IN, ACTOR, BETWEEN, CRITIC, OUT = 20, 168, 318, 560, 712, 950  # left edges of the columns
NETWORK_WIDTH, DATA_WIDTH, ROW = 190, 100, 58


def network(slot: Slot, x: float, y: float, kind: str, words: str) -> str:
    """One pass of a network: its slot's number and name, and which network it is."""
    middle = y + ROW / 2
    return "".join(
        [
            box(x, y, NETWORK_WIDTH, ROW, kind),
            f'<circle cx="{x + 27}" cy="{middle}" r="15" class="{kind}-dot"/>',
            text(x + 27, middle + 6, str(slot.value), "middle dot"),
            text(x + 52, middle - 4, words, ""),
            text(x + 52, middle + 16, slot.name.lower(), "small muted"),
        ]
    )


def lane(y: float, first: str, second: str) -> str:
    return text(LANE, y + 25, first, "head") + text(LANE, y + 45, second, "small muted")


def slots() -> str:
    """The six passes, left to right, in the order in which an update runs them."""
    act, target, critics, actor = 62, 182, 282, 382
    middle = ROW / 2
    parts = [
        text(ACTOR, 40, "passes of the actor", "muted"),
        text(CRITIC, 40, "passes of the critics", "muted"),
        # acting
        lane(act, "Acting", "every step"),
        box(IN, act + 9, DATA_WIDTH, 40, "data", "obs"),
        arrow(f"M{IN + DATA_WIDTH} {act + middle} H{ACTOR - 3}"),
        network(Slot.ACT, ACTOR, act, "actor", "actor"),
        arrow(f"M{ACTOR + NETWORK_WIDTH} {act + middle} H{BETWEEN - 3}"),
        box(BETWEEN, act + 9, DATA_WIDTH, 40, "data", "action"),
        arrow(f"M{BETWEEN + DATA_WIDTH} {act + middle} H{CRITIC - 3}"),
        text(CRITIC + 6, act + middle + 5, "to the environment", ""),
        f'<path class="wire" stroke-dasharray="2 5" d="M{LANE} 146 H1120"/>',
        text(LANE, 168, "One update, on a replayed batch of (s, a, r, s')", "muted small"),
        # the TD target
        lane(target, "TD target", "no gradient"),
        box(IN, target + 9, DATA_WIDTH, 40, "data", "s'"),
        arrow(f"M{IN + DATA_WIDTH} {target + middle} H{ACTOR - 3}"),
        network(Slot.TARGET_ACTION, ACTOR, target, "actor", "(target) actor"),
        arrow(f"M{ACTOR + NETWORK_WIDTH} {target + middle} H{BETWEEN - 3}"),
        box(BETWEEN, target + 9, DATA_WIDTH, 40, "data", "(s', a')"),
        arrow(f"M{BETWEEN + DATA_WIDTH} {target + middle} H{CRITIC - 3}"),
        network(Slot.TARGET_Q, CRITIC, target, "critic", "(target) critic"),
        arrow(f"M{CRITIC + NETWORK_WIDTH} {target + middle} H{OUT - 3}"),
        text(OUT + 4, target + middle - 3, "y = r + gamma Q'", ""),
        text(OUT + 4, target + middle + 16, "(0 beyond an end)", "small muted"),
        # the critics' loss
        lane(critics, "Critics' loss", "moves the critics"),
        box(BETWEEN, critics + 9, DATA_WIDTH, 40, "data", "(s, a)"),
        arrow(f"M{BETWEEN + DATA_WIDTH} {critics + middle} H{CRITIC - 3}"),
        network(Slot.REPLAY_Q, CRITIC, critics, "critic", "critic"),
        arrow(f"M{CRITIC + NETWORK_WIDTH} {critics + middle} H{OUT - 3}"),
        text(OUT + 4, critics + middle + 5, "minimize (Q - y)²", ""),
        # the actor's loss
        lane(actor, "Actor's loss", "moves the actor"),
        box(IN, actor + 9, DATA_WIDTH, 40, "data", "s"),
        arrow(f"M{IN + DATA_WIDTH} {actor + middle} H{ACTOR - 3}"),
        network(Slot.ACTOR_UPDATE, ACTOR, actor, "actor", "actor"),
        arrow(f"M{ACTOR + NETWORK_WIDTH} {actor + middle} H{BETWEEN - 3}"),
        box(BETWEEN, actor + 9, DATA_WIDTH, 40, "data", "(s, pi(s))"),
        arrow(f"M{BETWEEN + DATA_WIDTH} {actor + middle} H{CRITIC - 3}"),
        network(Slot.POLICY_Q, CRITIC, actor, "critic", "critic"),
        arrow(f"M{CRITIC + NETWORK_WIDTH} {actor + middle} H{OUT - 3}"),
        text(OUT + 4, actor + middle + 5, "maximize Q", ""),
        # what J and M join
        f'<path class="extra" d="M{CRITIC + 95} {target + ROW} V{critics}"/>',
        text(CRITIC + 105, target + ROW + 27, "J: both in one forward", "small extra-ink"),
        arrow(
            f"M{BETWEEN + 50} {critics + 50} V{critics + 70} H{CRITIC + 95} V{actor - 3}", "extra"
        ),
        text(CRITIC + 105, actor - 14, "M: these rows as well", "small extra-ink"),
    ]
    return picture(1140, 462, "The five passes of an off-policy update, and acting", parts)


# --- the modes ---------------------------------------------------------------------------------

TILE_WIDTH, TILE_HEIGHT = 368, 214

IN_WORDS = {
    "T": "the batch's",
    "E": "the running ones",
    "S": "the batch's",
    "J": "of slots 4 and 5 together",
    "M": "of policy and replay together",
    "B": "none: the layer is skipped",
}


def tile(letter: str, x: float, y: float) -> str:
    """What one layer does in a mode: where its statistics come from and what they change."""
    mode = Mode(letter)
    batch, norm, stats = (x + 26, y + 64), (x + 190, y + 78), (x + 178, y + 14)
    flows = mode.uses_batch
    parts = [box(x, y, TILE_WIDTH - 16, TILE_HEIGHT - 16, "page")]
    parts.append(text(x + 16, y + 38, letter, "letter"))
    colours = {"J": ("critic", "actor"), "M": ("actor", "data")}.get(letter, ("data", "data"))
    for row in range(4):  # the rows of the batch
        parts.append(box(batch[0], batch[1] + 17 * row, 56, 13, colours[row // 2]))
    labels = {"J": ("(s, a)", "(s', a')"), "M": ("(s, pi)", "(s, a)")}.get(letter)
    for i, label in enumerate(labels or ()):
        parts.append(text(batch[0] + 62, batch[1] + 20 + 34 * i, label, "small muted"))
    if not labels:
        parts.append(text(batch[0] + 62, batch[1] + 24, "batch", "small muted"))
    parts.append(box(*norm, 66, 40, "data", "norm"))
    line = norm[1] + 20
    if mode.bypass:
        parts.append(arrow(f"M{batch[0] + 60} {line + 2} H{norm[0] - 12} V{line + 34} "
                           f"H{norm[0] + 80} V{line + 2} H{norm[0] + 118}"))  # fmt: skip
    else:
        parts.append(arrow(f"M{batch[0] + 60} {line} H{norm[0] - 3}"))
        parts.append(arrow(f"M{norm[0] + 66} {line} H{norm[0] + 118}"))
        parts.append(box(*stats, 90, 30, "data" if flows else "running"))
        parts.append(text(stats[0] + 45, stats[1] + 20, "mean, var", "middle small"))
        parts.append(arrow(f"M{norm[0] + 33} {stats[1] + 30} V{norm[1] - 3}"))
    if flows:
        parts.append(arrow(f"M{batch[0] + 28} {batch[1] - 4} V{stats[1] + 15} H{stats[0] - 3}"))
        parts.append(box(stats[0] + 116, stats[1], 52, 30, "running"))
        parts.append(text(stats[0] + 142, stats[1] + 20, "kept", "middle small"))
        parts.append(arrow(f"M{stats[0] + 90} {stats[1] + 15} H{stats[0] + 113}"))
    if flows and mode.gradient:
        parts.append(arrow(f"M{norm[0] + 18} {norm[1] - 2} V{stats[1] + 33}", "back"))
        parts.append(arrow(f"M{stats[0] - 2} {stats[1] + 24} H{batch[0] + 40} V{batch[1] - 5}",
                           "back"))  # fmt: skip
    if not flows and not mode.bypass:
        parts.append(text(stats[0] + 98, stats[1] + 20, "kept", "small muted"))
    words = [f"statistics: {IN_WORDS[letter]}"]
    if flows:
        words.append(f"gradient through them: {'yes' if mode.gradient else 'stopped'}")
        words.append("running statistics: updated")
    else:
        words.append("running statistics: untouched")
    for i, line_of_words in enumerate(words):
        parts.append(text(x + 16, y + 150 + 20 * i, line_of_words, "small"))
    return "".join(parts)


def modes() -> str:
    """A tile for each letter."""
    tiles = [
        tile(letter, 24 + TILE_WIDTH * (i % 3), 24 + TILE_HEIGHT * (i // 3))
        for i, letter in enumerate("TESJMB")
    ]
    note = [
        arrow("M40 470 H84", "back"),
        text(94, 475, "gradient through the statistics", "small muted"),
        text(384, 475, "kept: the running mean and variance", "small muted"),
        text(728, 475, "a lower-case letter leaves them alone", "small muted"),
    ]
    return picture(1136, 496, "What a layer does in each mode", tiles + note)


PICTURES = {"slots.svg": slots, "modes.svg": modes}


def main() -> None:
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(draw(), encoding="utf-8")
        print(IMAGES / name)


if __name__ == "__main__":
    main()
