"""Channel by channel: the running statistics of each layer beside those of the data.

Eval mode normalizes by the running statistics. Where a channel's are off, eval and train mode give
different features, and one channel is enough: the picture shows which. A channel whose input does
not vary carries nothing, and eps decides its scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from batchproof.clinic.subject import Obs, Subject, training_mode
from batchproof.errors import BatchproofError
from batchproof.layers import mode_layers

FAR = 0.5
"""A running mean further than this many standard deviations of the data is marked as off."""

FACTOR = 2.0
"""A running standard deviation further than this factor from that of the data is marked as off."""

_RUNNING = (("running_mean", "running_var"), ("ra_mean", "ra_var"))


@dataclass(frozen=True)
class Channels:
    """One layer's statistics, each (C,); the data's are biased variances over rows and positions.

    Attributes:
        name: role and path of the layer.
        running_mean: what eval mode subtracts.
        running_var: what eval mode divides by, the root of it and eps.
        data_mean: of the layer's input on the given observations, in eval mode.
        data_var: the same.
        eps: the layer's.
    """

    name: str
    running_mean: NDArray[np.float64]
    running_var: NDArray[np.float64]
    data_mean: NDArray[np.float64]
    data_var: NDArray[np.float64]
    eps: float

    @property
    def mean_error(self) -> NDArray[np.float64]:
        """(running mean - data mean) / sqrt(data variance + eps), (C,)."""
        return (self.running_mean - self.data_mean) / np.sqrt(self.data_var + self.eps)

    @property
    def scale_ratio(self) -> NDArray[np.float64]:
        """sqrt((running variance + eps) / (data variance + eps)), (C,)."""
        return np.sqrt((self.running_var + self.eps) / (self.data_var + self.eps))

    @property
    def off(self) -> NDArray[np.bool_]:
        """Channels beyond `FAR` or `FACTOR`, (C,)."""
        scale = np.abs(np.log(self.scale_ratio)) > np.log(FACTOR)
        return (np.abs(self.mean_error) > FAR) | scale

    @property
    def still(self) -> NDArray[np.bool_]:
        """Channels whose variance in the data is below eps, (C,)."""
        return self.data_var < self.eps

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for a file; `Channels.from_json` reads them."""
        arrays = ("running_mean", "running_var", "data_mean", "data_var")
        return {"name": self.name, "eps": self.eps} | {
            key: getattr(self, key).tolist() for key in arrays
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Channels:
        """What `to_json` gave."""
        arrays = ("running_mean", "running_var", "data_mean", "data_var")
        return cls(
            name=found["name"],
            eps=float(found["eps"]),
            **{key: np.asarray(found[key], dtype=np.float64) for key in arrays},
        )


def channels(subject_or_module: Subject | nn.Module, obs: Obs | None = None) -> list[Channels]:
    """Statistics by channel of every layer with running statistics that acting goes through.

    Everything is as it was afterwards.

    Args:
        subject_or_module: a subject, or a module that maps observations (B, ...).
        obs: (B, ...), one batch; None takes the subject's own.

    Returns:
        One entry for each layer, in the order of the forward pass; empty where no layer keeps
        running statistics.

    Raises:
        BatchproofError: a module without observations.
    """
    if isinstance(subject_or_module, Subject):
        subject = subject_or_module
        given = subject.obs if obs is None else obs
    else:
        if obs is None:
            raise BatchproofError("channels(module, obs): observations are needed")
        subject, given = Subject.from_module(subject_or_module, obs), obs
    found: dict[str, Channels] = {}
    handles = []
    for role, path, module in subject.modules():
        names = _running_names(module)
        if names is None:
            continue

        def see(
            layer: Any,
            inputs: tuple[Tensor, ...],
            name: str = f"{role}.{path}" if path else role,
            names: tuple[str, str] = names,
        ) -> None:
            found[name] = _channels_of(name, layer, inputs[0], names)

        handles.append(module.register_forward_pre_hook(see))
    try:
        with training_mode(subject, False), torch.no_grad():
            subject.policy(given)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _running_names(module: nn.Module) -> tuple[str, str] | None:
    if module not in mode_layers(module):
        return None
    return next((pair for pair in _RUNNING if getattr(module, pair[0], None) is not None), None)


def _channels_of(name: str, layer: Any, x: Tensor, names: tuple[str, str]) -> Channels:
    x = x.detach().double()
    var, mean = torch.var_mean(x, [axis for axis in range(x.ndim) if axis != 1], correction=0)

    def values(part: Tensor) -> NDArray[np.float64]:
        return part.detach().double().cpu().numpy().copy()

    return Channels(
        name=name,
        running_mean=values(getattr(layer, names[0])),
        running_var=values(getattr(layer, names[1])),
        data_mean=values(mean),
        data_var=values(var),
        eps=float(layer.eps),
    )


def channels_picture(
    found: Sequence[Channels], path: str | Path, *, headline: str = "", dpi: int = 150
) -> None:
    """Draw the layers, a row each: means on the left, the ratio of scales on the right.

    Left: each channel's mean in the data with a bar of one standard deviation, and the running mean
    as a dot. Right: running over data standard deviation, 1 where they agree. Channels are sorted
    by their mean in the data; those that are `Channels.off` are in another colour, those that are
    `Channels.still` are crosses.

    Args:
        found: what `channels` gave.
        path: where to write; the suffix (.png, .svg, .pdf) decides the format.
        headline: one sentence on top.
        dpi: dots per inch of a PNG.

    Raises:
        BatchproofError: no layers.
    """
    if not found:
        raise BatchproofError("no layer keeps running statistics, so there is nothing to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from batchproof.study import plots

    top = 0.9 if headline else 0.4
    height = top + 2.9 * len(found)
    figure = Figure(figsize=(12.0, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    if headline:
        figure.text(
            0.02, 1 - 0.2 / height, headline, fontsize=16, weight="bold", va="top",
            color=plots.BLACK,
        )  # fmt: skip
    for row, layer in enumerate(found):
        bottom = (height - top - 2.9 * (row + 1) + 0.65) / height
        left, right = (
            figure.add_axes((x, bottom, width, 1.85 / height))
            for x, width in ((0.07, 0.54), (0.68, 0.3))
        )
        _draw(left, right, layer, plots)
    figure.savefig(path, facecolor="white")


def _draw(left: Any, right: Any, layer: Channels, plots: Any) -> None:
    order = np.argsort(layer.data_mean, kind="stable")
    where = np.arange(len(order))
    off, still = layer.off[order], layer.still[order]
    mean, spread = layer.data_mean[order], np.sqrt(layer.data_var[order])
    left.errorbar(where, mean, yerr=spread, fmt="none", ecolor="#b5b5b5", elinewidth=2.2, zorder=1)
    left.plot(where, mean, "_", color=plots.GREY, markersize=5, zorder=2)
    running, ratio = layer.running_mean[order], layer.scale_ratio[order]
    for chosen, marker, color in (
        (~off & ~still, "o", plots.BLUE),
        (off & ~still, "o", plots.VERMILLION),
        (~off & still, "x", plots.BLUE),
        (off & still, "x", plots.VERMILLION),
    ):
        left.plot(where[chosen], running[chosen], marker, color=color, markersize=4, zorder=3)
        right.plot(where[chosen], ratio[chosen], marker, color=color, markersize=4, zorder=3)
    count = f"{int(off.sum())} of {len(off)} channels off"
    if still.any():
        count += f", {int(still.sum())} do not vary"
    left.set_title(f"{layer.name}: {count}", loc="left", fontsize=12, color=plots.BLACK)
    right.set_title("running / data standard deviation", loc="left", fontsize=12, color=plots.GREY)
    right.axhline(1.0, color=plots.GREY, linewidth=1.0)
    right.axhspan(1 / FACTOR, FACTOR, color="#f2f2f2", zorder=0)
    low, high = min(ratio.min(), 1 / FACTOR) / 1.3, max(ratio.max(), FACTOR) * 1.3
    right.set_yscale("log")
    right.set_ylim(low, high)
    step = 1 if high / low < 40 else 3
    powers = range(-step * 20, step * 21, step)
    ticks = [2.0**power for power in powers if low <= 2.0**power <= high]
    right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    left.set_xlabel("channels, by their mean in the data (bar: one standard deviation)", fontsize=9)
    right.set_xlabel("the same channels", fontsize=9)
    for axes in (left, right):
        axes.tick_params(colors=plots.GREY, labelsize=9, length=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
