"""The numbers that two public texts on batch norm in reinforcement learning state or imply.

Against our layers and torch's own: a batch of three rows and a single row, dropout, and the
notebook's actor, where a layer that is skipped, in eval and in train are three different things.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from batchproof.layers import BatchNorm1d, mode_layers, use_mode

ROWS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
SINGLE = torch.tensor([[2.0, 3.0]])
LAYERS = {
    "ours": lambda: BatchNorm1d(2, eps=1e-8),
    "as the text": lambda: BatchNorm1d(2, eps=1e-8, running_variance="biased"),
    "torch": lambda: nn.BatchNorm1d(2, eps=1e-8),
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(tensor: torch.Tensor, numbers: list, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(tensor.detach().numpy(), numbers, atol=tolerance)


# --- batch norm on three rows, then on one --------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_a_train_mode_batch_of_three(name: str) -> None:
    """The output is the same in all; the text averages the biased variance, torch the unbiased."""
    layer = LAYERS[name]()
    layer.train()
    close(layer(ROWS), [[-1.224745, -1.224745], [0, 0], [1.224745, 1.224745]])
    close(layer.running_mean, [0.3, 0.4])
    close(layer.running_var, [1.166667] * 2 if name == "as the text" else [1.3] * 2)


def test_a_train_mode_row_alone_is_lost_and_drags_the_statistics() -> None:
    layer = LAYERS["as the text"]()
    layer.train()
    layer(ROWS)
    close(layer(SINGLE), [[0, 0]])  # whatever the row is, it is its own mean
    close(layer.running_mean, [0.47, 0.66])
    close(layer.running_var, [1.05, 1.05])
    layer.eval()
    close(layer(SINGLE), [[1.4931, 2.2836]], tolerance=5e-5)


def test_torch_refuses_a_train_mode_row_alone() -> None:
    layer = LAYERS["torch"]()
    layer.train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(SINGLE)


@pytest.mark.parametrize("name", LAYERS)
def test_in_eval_mode_batch_and_alone_agree_and_nothing_moves(name: str) -> None:
    layer = LAYERS[name]()
    layer.train()
    layer(ROWS)
    layer.eval()
    before = layer.running_mean.clone(), layer.running_var.clone()
    together = layer(ROWS)
    for i, row in enumerate(ROWS):
        close(layer(row[None])[0], together[i].tolist(), tolerance=1e-6)
    assert torch.equal(before[0], layer.running_mean)
    assert torch.equal(before[1], layer.running_var)


def test_the_gap_of_a_row_shrinks_as_one_over_the_root_of_the_batch() -> None:
    """Against the population's statistics, by least squares in the logarithms."""
    generator = torch.Generator().manual_seed(0)
    layer = BatchNorm1d(64)
    probe = torch.randn(1, 64, generator=generator)
    sizes, gaps = [16, 64, 256, 1024], []
    for size in sizes:
        draws = [torch.randn(size - 1, 64, generator=generator) for _ in range(40)]
        out = [layer(torch.cat([probe, rows]), mode="t")[0] for rows in draws]
        gap = torch.stack(out) - probe / (1 + 1e-5) ** 0.5
        gaps.append(gap.detach().abs().mean().item())
    slope = np.polyfit(np.log(sizes), np.log(gaps), 1)[0]
    assert -0.56 < slope < -0.44


def test_layer_norm_does_not_know_its_companions() -> None:
    layer = nn.LayerNorm(8).train()
    rows = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([layer(row[None]) for row in rows])
    close(layer(rows), alone.tolist())


# --- dropout --------------------------------------------------------------------------------------


def test_inverted_dropout_scales_what_it_keeps_and_eval_is_the_identity() -> None:
    torch.manual_seed(0)
    layer = nn.Dropout(0.5).train()
    x = torch.rand(1000, 8) + 1
    out = layer(x)
    kept = out != 0
    assert 0.47 < kept.float().mean() < 0.53
    assert torch.equal(out[kept], 2 * x[kept])
    layer.eval()
    assert torch.equal(layer(x), x)


def test_a_train_mode_policy_with_dropout_is_a_sub_network() -> None:
    """Cut the dropped units out and scale the kept ones up: the same output."""
    torch.manual_seed(1)
    first, second = nn.Linear(4, 16).double(), nn.Linear(16, 2).double()
    x = torch.randn(8, 4).double()
    mask = torch.rand(16) < 0.5
    whole = second(torch.relu(first(x)) * mask * 2)
    small = torch.relu(x @ first.weight[mask].T + first.bias[mask])
    np.testing.assert_allclose(
        whole.detach(), (small @ (2 * second.weight[:, mask]).T + second.bias).detach(), atol=1e-14
    )


# --- the notebook's actor -------------------------------------------------------------------------


class NotebookActor(nn.Module):
    """Linear(24, 256), BN(256), ReLU, Linear(256, 128), ReLU, Linear(128, 2), tanh."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.last = (
            nn.Linear(24, 256),
            nn.Linear(256, 128),
            nn.Linear(128, 2),
        )
        self.norm = norm
        for layer in (self.first, self.second):
            bound = layer.weight.shape[0] ** -0.5
            nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.uniform_(self.last.weight, -3e-3, 3e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.dim() > 1:  # as the notebook has it
            x = self.norm(x)
        return torch.tanh(self.last(torch.relu(self.second(torch.relu(x)))))


def notebook_pair(seed: int) -> tuple[NotebookActor, NotebookActor]:
    """The same actor with our batch norm and with torch's."""
    torch.manual_seed(seed)
    ours, theirs = NotebookActor(BatchNorm1d(256)), NotebookActor(nn.BatchNorm1d(256))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_torch_s_batch_norm_refuses_a_state_without_a_batch_axis() -> None:
    """Why the notebook skips it; a batch axis of one and eval mode would have done."""
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        nn.BatchNorm1d(256)(torch.zeros(256))
    assert nn.BatchNorm1d(256).eval()(torch.zeros(1, 256)).shape == (1, 256)


@pytest.mark.parametrize("kind", [0, 1], ids=["ours", "torch"])
def test_the_notebook_s_single_state_skips_the_layer(kind: int) -> None:
    """Mode B, exactly; neither eval nor train, once the statistics have moved."""
    actor = notebook_pair(0)[kind]
    states = 3 * torch.randn(64, 24) + 1
    actor.train()
    for _ in range(50):
        actor(states)
    state = states[0]
    bypassed = actor(state)
    actor.norm, norm = nn.Identity(), actor.norm
    assert torch.equal(actor(state[None])[0], actor(state))
    np.testing.assert_allclose(bypassed.detach(), actor(state[None])[0].detach(), atol=1e-7)
    actor.norm = norm
    train = actor(states[:3])[0]
    actor.eval()
    evaluated = actor(state[None])[0]
    outputs = [bypassed, evaluated, train]
    for i in range(3):
        for j in range(i):
            assert (outputs[i] - outputs[j]).abs().max() > 1e-4, (i, j)
    if kind == 0:
        assert len(mode_layers(actor)) == 1
        with use_mode(actor, "B"):
            np.testing.assert_allclose(actor(state[None])[0].detach(), bypassed.detach(), atol=1e-7)


def test_a_fresh_actor_hides_the_difference_between_skipping_and_eval() -> None:
    """Running statistics (0, 1) normalize by 1 / sqrt(1 + 1e-5): five millionths."""
    actor = notebook_pair(1)[0].eval()
    state = torch.randn(24)
    gap = (actor(state) - actor(state[None])[0]).abs().max()
    assert gap < 1e-6


def test_the_notebook_s_numbers_are_of_this_size() -> None:
    """[-.0143, .0236] alone and [-.0164, .0191] in a train-mode batch of three: a gap of .003.

    Its seed is not known; over 50 fresh actors the mean action and the mean gap are of that order.
    """
    actions, gaps = [], []
    for seed in range(50):
        actor = notebook_pair(seed)[0].train()
        states = torch.randn(3, 24)
        alone = actor(states[0])
        actions.append(alone.abs().mean().item())
        gaps.append((alone - actor(states)[0]).abs().mean().item())
    assert 0.005 < np.mean(actions) < 0.06
    assert 0.0005 < np.mean(gaps) < 0.01
