"""Batch Renorm (arXiv 1702.03275) that can be told which statistics to use, call by call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchproof.layers.batch_norm import check_input, check_options, choose_mode
from batchproof.layers.functional import Renorm, normalize
from batchproof.layers.moments import check_group, copy_with_group
from batchproof.modes import Mode

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _BatchRenorm(nn.Module):
    """What `BatchRenorm1d` and `BatchRenorm2d` share; they differ in the ranks that they take.

    Not a subclass of torch's batch norm: tools that swap those for something else (SyncBatchNorm's
    converter, fusion) would drop r and d without a word.
    """

    ranks: tuple[int, ...]
    process_group: ProcessGroup | str | None = None  # of layers pickled before there was one
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        formula: str = "canonical",
        warmup: str = "hard",
        warmup_steps: int = 0,
        r_max: float = 3.0,
        d_max: float = 5.0,
        batch_variance: str = "biased",
        running_variance: str = "unbiased",
        estimator: str = "ema",
        process_group: ProcessGroup | str | None = None,
    ) -> None:
        check_group(process_group, estimator)
        check_options(eps, momentum, batch_variance, running_variance, estimator)
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.renorm = Renorm(formula, warmup, warmup_steps, r_max, d_max)
        self.batch_variance = batch_variance
        self.running_variance = running_variance
        self.estimator = estimator
        self.process_group = process_group
        self.mode: Mode | None = None
        zeros = torch.zeros(num_features, device=device, dtype=dtype)
        ones = torch.ones_like(zeros)
        self.weight = nn.Parameter(ones.clone()) if affine else None
        self.bias = nn.Parameter(zeros.clone()) if affine else None
        self.register_buffer("running_mean", zeros)
        self.register_buffer("running_var", ones)
        count = torch.tensor(0, dtype=torch.long, device=device)
        self.register_buffer("num_batches_tracked", count)

    def forward(self, x: Tensor, mode: Mode | str | None = None) -> Tensor:
        """Normalize ``x``; the class says its shapes, the modes and the errors."""
        check_input(x, self.ranks, self.num_features)
        return normalize(
            x,
            choose_mode(mode, self.mode, self.training),
            weight=self.weight,
            bias=self.bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
            count=self.num_batches_tracked,
            momentum=self.momentum,
            eps=self.eps,
            batch_variance=self.batch_variance,
            running_variance=self.running_variance,
            renorm=self.renorm,
            estimator=self.estimator,
            process_group=self.process_group,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy in the same process group."""
        return copy_with_group(self, memo)

    def extra_repr(self) -> str:
        """The options, as `print` shows them."""
        options = {"eps": self.eps, "momentum": self.momentum, **vars(self.renorm)}
        options["batch_variance"] = self.batch_variance
        options["running_variance"] = self.running_variance
        options["estimator"] = self.estimator
        if self.process_group is not None:
            options["process_group"] = self.process_group
        return ", ".join([str(self.num_features), *(f"{k}={v}" for k, v in options.items())])


class BatchRenorm1d(_BatchRenorm):
    """Batch Renorm of ``x`` (N, C) or (N, C, L): ((x - mean) / std * r + d) * weight + bias.

    r = clip(std / running_std, 1 / r_max, r_max) and d = clip((mean - running_mean) / running_std,
    -d_max, d_max) carry no gradient and tie the batch's statistics to the running ones, which move
    afterwards. std is sqrt(var + eps) throughout. In mode ``E`` the layer is batch norm's ``E``.

    Used like `batchproof.layers.BatchNorm1d`: ``train()`` and ``eval()``, ``layer(x, mode=...)`` or
    `batchproof.layers.use_mode`; its state is that of `torch.nn.BatchNorm1d`, both ways.

    A batch of one in mode ``T`` gives d * weight + bias, which is mode ``E``'s output unless d is
    clipped; the folded formula, and batch norm, give ``bias`` alone.

    Args:
        num_features: C.
        eps: added to the variance before the square root; positive.
        momentum: weight of the new batch in the running statistics (flax's 0.99 is 0.01 here);
            None for the cumulative average.
        affine: whether there are ``weight`` and ``bias``, (C,).
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        formula: ``canonical``, or CrossQ's ``folded``, which puts r and d into the mean and the
            variance: (x - mean + d sqrt(var) / r) / sqrt(var / r^2 + eps). They differ where the
            variance is near eps. The folded form has no gradient where a variance is exactly 0; it
            is taken as 0 there.
        warmup: ``hard`` (r = 1, d = 0 until `warmup_steps`) or ``smooth`` (the schedule of arXiv
            1702.03275, scaled: plain batch norm for 1/8 of `warmup_steps`, then d_max grows
            until 5/8 and r_max until the end).
        warmup_steps: passes that moved the running statistics.
        r_max: upper bound of r; the lower one is its inverse.
        d_max: bound of d.
        batch_variance: ``biased`` (divided by the number of rows) or ``unbiased`` (one less), for
            normalizing.
        running_variance: the same choice for what the running variance averages.
        estimator: a name in `batchproof.layers.ESTIMATORS`; `batchproof.estimators` compares them.
        process_group: as in `batchproof.layers.BatchNorm1d`.

    Raises:
        BatchproofError: a bad option; on calling, a wrong shape, mode ``J`` or ``M``, an empty
            batch (on every rank of a group) in a batch mode.
    """

    ranks = (2, 3)


class BatchRenorm2d(_BatchRenorm):
    """Batch Renorm of images (N, C, H, W); everything else as in `BatchRenorm1d`."""

    ranks = (4,)
