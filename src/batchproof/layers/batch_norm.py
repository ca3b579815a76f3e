"""Batch norm (arXiv 1502.03167) that can be told which statistics to use, call by call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchproof.errors import BatchproofError
from batchproof.layers.functional import ESTIMATORS, VARIANCES, as_mode, normalize, one_of
from batchproof.layers.moments import check_group, copy_with_group
from batchproof.modes import E, Mode, T

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SHAPES = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)"}


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What `BatchNorm1d` and `BatchNorm2d` share; they differ in the ranks that they take."""

    ranks: tuple[int, ...]
    process_group: ProcessGroup | str | None = None  # of layers pickled before there was one

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        batch_variance: str = "biased",
        running_variance: str = "unbiased",
        estimator: str = "ema",
        process_group: ProcessGroup | str | None = None,
    ) -> None:
        check_group(process_group, estimator)
        check_options(eps, momentum, batch_variance, running_variance, estimator)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.batch_variance = batch_variance
        self.running_variance = running_variance
        self.estimator = estimator
        self.process_group = process_group
        self.mode: Mode | None = None

    def forward(self, x: Tensor, mode: Mode | str | None = None) -> Tensor:
        """Normalize ``x``; the class says its shapes, the modes and the errors."""
        check_input(x, self.ranks, self.num_features)
        chosen = choose_mode(mode, self.mode, self.training)
        if mode is None and self.mode is None and self.running_mean is None:
            chosen = T  # as PyTorch: without running statistics eval() uses the batch's too
        return normalize(
            x,
            chosen,
            weight=self.weight,
            bias=self.bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
            count=self.num_batches_tracked,
            momentum=self.momentum,
            eps=self.eps,
            batch_variance=self.batch_variance,
            running_variance=self.running_variance,
            estimator=self.estimator,
            process_group=self.process_group,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy in the same process group."""
        return copy_with_group(self, memo)

    def extra_repr(self) -> str:
        """The options, as `print` shows them."""
        group = "" if self.process_group is None else f", process_group={self.process_group}"
        return (
            f"{super().extra_repr()}, batch_variance={self.batch_variance}, "
            f"running_variance={self.running_variance}, estimator={self.estimator}{group}"
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Batch norm of ``x`` (N, C) or (N, C, L): (x - mean) / sqrt(var + eps) * weight + bias.

    A drop-in for `torch.nn.BatchNorm1d`, with its arguments, parameters, buffers and state:
    ``layer(x)`` is mode ``T`` after ``train()`` and ``E`` after ``eval()``. ``layer(x, mode=...)``
    says it outright: `T`, `t`, `E`, `S`, `s` or `B` (`batchproof.modes`). A mode set by
    `batchproof.layers.use_mode` stands between the two.

    Unlike torch's: a batch of one in mode ``T`` has variance 0, gives ``bias``, and moves the
    running variance towards 0; statistics are float32 or better under autocast; another pass in
    mode ``T`` before the backward of one in ``E`` neither fails nor changes its gradient.

    Args:
        num_features: C.
        eps: added to the variance before the square root; positive.
        momentum: weight of the new batch in the running statistics (flax's 0.99 is 0.01 here);
            None for the cumulative average.
        affine: whether there are ``weight`` and ``bias``, (C,).
        track_running_stats: whether there are ``running_mean``, ``running_var``, (C,), and
            ``num_batches_tracked``.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        batch_variance: ``biased`` (divided by the number of rows) or ``unbiased`` (one less), for
            normalizing.
        running_variance: the same choice for what the running variance averages.
        estimator: a name in `batchproof.layers.ESTIMATORS`; `batchproof.estimators` compares them.
        process_group: processes whose batches count as one in the batch modes: ``"world"``, all
            ranks of `torch.distributed` (this process alone before ``init_process_group``), or
            what ``torch.distributed.new_group`` gave; None keeps each process to itself. Every
            rank has to make the same calls in the same modes; one with an empty batch joins in.

    Raises:
        BatchproofError: a bad option; on calling, a wrong shape, mode ``J`` or ``M``, mode ``E``
            without running statistics, an empty batch (on every rank of a group) in a batch mode.
    """

    ranks = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch norm of images (N, C, H, W); everything else as in `BatchNorm1d`."""

    ranks = (4,)


def check_options(
    eps: float,
    momentum: float | None,
    batch_variance: str,
    running_variance: str,
    estimator: str,
) -> None:
    """Refuse options that batch norm and Batch Renorm cannot have.

    Raises:
        BatchproofError: naming the option and what to write instead.
    """
    if not eps > 0:
        raise BatchproofError(
            f"eps must be positive, got {eps}: a constant feature has variance 0, and only eps "
            "keeps its output finite"
        )
    if momentum is not None and not 0 < momentum <= 1:
        raise BatchproofError(
            f"momentum must be in (0, 1], got {momentum}: it is the weight of the new batch, so "
            "flax's 0.99 is 0.01 here"
        )
    one_of("batch_variance", batch_variance, VARIANCES)
    one_of("running_variance", running_variance, VARIANCES)
    one_of("estimator", estimator, tuple(ESTIMATORS))


def check_input(x: Tensor, ranks: tuple[int, ...], features: int) -> None:
    """Refuse inputs without a batch axis, of another rank or with another number of features.

    Raises:
        BatchproofError: saying the shape to give instead.
    """
    if x.dim() + 1 == ranks[0]:
        raise BatchproofError(
            f"input of shape {tuple(x.shape)} has no batch axis: call the layer on x[None]"
        )
    if x.dim() not in ranks or x.shape[1] != features:
        shapes = " or ".join(_SHAPES[rank] for rank in ranks)
        raise BatchproofError(
            f"input of shape {tuple(x.shape)} does not fit: give {shapes} with C = {features}"
        )


def choose_mode(asked: Mode | str | None, forced: Mode | None, training: bool) -> Mode:
    """The mode of one call: asked for, else forced by `use_mode`, else train() or eval()."""
    if asked is not None:
        return as_mode(asked)
    if forced is not None:
        return forced
    return T if training else E
