"""Statistics over all ranks: real processes on gloo against one process with the whole batch.

Run as a program, this file is one rank: it writes what it computed into a folder, and the tests
compare that with the same computation on the concatenated batches.
"""

import copy
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchproof import layers
from batchproof.errors import BatchproofError
from batchproof.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchRenorm1d,
    BatchRenorm2d,
    check_in_sync,
    convert_sync,
    use_mode,
)

torch.set_num_threads(1)
PAGE = Path(__file__).parents[2] / "docs" / "sync.md"
FEATURES = 4
RENORM = {"eps": 1e-3, "warmup_steps": 2}
KINDS = {
    "batch": (BatchNorm1d, {}, ()),
    "batch-unbiased": (BatchNorm1d, {"batch_variance": "unbiased", "momentum": None}, ()),
    "batch-plain": (BatchNorm1d, {"affine": False, "track_running_stats": False}, ()),
    "batch-chan": (BatchNorm1d, {"estimator": "chan", "running_variance": "biased"}, (5,)),
    "batch-image": (BatchNorm2d, {}, (3, 5)),
    "renorm": (BatchRenorm1d, RENORM, ()),
    "renorm-unbiased": (BatchRenorm1d, {**RENORM, "batch_variance": "unbiased"}, ()),
    "renorm-smooth-image": (BatchRenorm2d, {"warmup": "smooth", "warmup_steps": 6}, (3, 3)),
    "renorm-folded": (BatchRenorm1d, {**RENORM, "formula": "folded"}, ()),
}
MODES = "TSts"
SPLITS = {2: [(5, 3), (7, 1), (0, 8)], 3: [(3, 4, 1), (0, 8, 0)]}  # rows of each rank, by ranks
ROWS = 8
STEPS = 3


def make(name, **more):
    """A layer away from its initial values: r and d are clipped in some features, not in others."""
    kind, options, _ = KINDS[name]
    layer = kind(FEATURES, **options, **more)
    rng = np.random.default_rng(7)
    for key, value in layer.state_dict().items():
        low, high = {"running_var": (0.1, 3.0), "weight": (0.5, 2.0)}.get(key, (-1.0, 1.0))
        drawn = torch.tensor(rng.uniform(low, high, FEATURES), dtype=torch.float32)
        value.copy_(torch.tensor(3) if key == "num_batches_tracked" else drawn)
    return layer


def draw(shape, seed):
    """A batch whose features have means and spreads of their own."""
    rng = np.random.default_rng(seed)
    features = (1, shape[1], *[1] * (len(shape) - 2))
    x = rng.normal(rng.normal(size=features), rng.uniform(0.3, 3, features), shape)
    return torch.tensor(x, dtype=torch.float32)


def run(layer, x, weighting, mode):
    """Output, gradients in x and in the parameters, statistics after two passes in `mode`."""
    x = x.clone().requires_grad_()
    y = layer(layer(x, mode=mode), mode=mode)
    (y * weighting).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        "parameters": [p.grad for p in layer.parameters()],
        "buffers": [b.clone() for b in layer.buffers()],
    }


def inputs(name):
    shape = (ROWS, FEATURES, *KINDS[name][2])
    return draw(shape, 0), draw(shape, 1)


def agent():
    """A critic as people write it: torch's batch norm, and Batch Renorm behind it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm1d(3), nn.Linear(3, 6), nn.ReLU(), nn.BatchNorm1d(6),
        nn.Linear(6, 6), BatchRenorm1d(6, warmup_steps=2), nn.ReLU(), nn.Linear(6, 1),
    )  # fmt: skip


def joint_steps(network, called, rows, share):
    """Updates whose one backward follows three passes: q and next q in T, q once more in E.

    `rows` are this process's and `share` makes a sum over them into its part of the mean.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        obs, next_obs = draw((ROWS, 3), 10 + step)[rows], draw((ROWS, 3), 20 + step)[rows]
        q, next_q = called(obs), called(next_obs)
        with use_mode(network, "E"):
            evaluated = called(obs)
        loss = share * ((q - 0.9 * next_q - 1).square().sum() + evaluated.sin().sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "state": {k: v.clone() for k, v in network.state_dict().items()}}


def says(function, *args, **options):
    """The one line that a call is refused with."""
    try:
        function(*args, **options)
    except BatchproofError as error:
        return str(error)
    return "nothing"


def main(folder, rank, ranks):
    """One rank: everything is computed here, and compared in the tests."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=200),
    )  # fmt: skip
    found = {}
    for split in SPLITS[ranks]:
        mine = slice(sum(split[:rank]), sum(split[: rank + 1]))
        for name in KINDS:
            x, weighting = inputs(name)
            for mode in MODES:
                layer = make(name, process_group="world")
                found[f"{name} {mode} {split}"] = run(layer, x[mine], weighting[mine], mode)
    if ranks == 3:
        mine = slice(3 * rank, min(3 * rank + 3, ROWS))
        for name in ("batch", "renorm-folded"):
            layer = torch.compile(make(name, process_group="world"), backend="aot_eager")
            x, weighting = inputs(name)
            found[f"{name} compiled"] = run(layer, x[mine], weighting[mine], "T")
        # The middle rank is not asked.
        pair = dist.new_group([0, 2])
        if rank != 1:
            layer = make("renorm", process_group=pair)
            x, weighting = inputs("renorm")
            mine = slice(0, 3) if rank == 0 else slice(3, ROWS)
            found["pair"] = run(layer, x[mine], weighting[mine], "T")
            found["copy"] = copy.deepcopy(layer).process_group is pair
        torch.save(found, f"{folder}/{rank}.pt")
        dist.destroy_process_group()
        return

    mine = slice(0, 5) if rank == 0 else slice(5, ROWS)
    network = convert_sync(agent())
    # DDP averages over ranks: each rank's loss is its sum, times ranks, over all rows.
    share = ranks / ROWS
    found["ddp"] = joint_steps(network, DistributedDataParallel(network), mine, share)
    found["in sync"] = check_in_sync(network)
    found["in sync, wrapped"] = check_in_sync(DistributedDataParallel(network))
    alone = agent()
    found["alone"] = joint_steps(alone, alone, mine, share)
    found["drift"] = says(check_in_sync, alone)
    found["allowed"] = check_in_sync(alone, tolerance=1e9)
    alone[0].running_mean[0] = torch.nan
    found["nan"] = says(check_in_sync, alone, tolerance=1e9)
    found["other layers"] = says(check_in_sync, alone[: 4 + rank * 2])
    found["nothing"] = check_in_sync(nn.Linear(2, 2))

    # The page's own training step: it raises where ranks are not in sync.
    page = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[
        :2
    ]:
        exec(block, page)
    batches = [(draw((ROWS, 8), i)[mine], draw((ROWS, 8), i + 1)[mine]) for i in range(2)]
    page["train"](page["critic"], [(*batch, torch.ones(len(batch[0]), 1)) for batch in batches])

    far = 1000 + draw((ROWS, FEATURES), 3)
    layer = BatchNorm1d(FEATURES, momentum=1.0, process_group="world")
    layer(far[mine])
    found["far"] = layer.running_var

    flat = torch.full((ROWS, FEATURES), 0.5, requires_grad=True)
    layer = make("renorm-folded", process_group="world")
    (layer(flat[mine]) * inputs("batch")[1][mine]).sum().backward()
    found["flat"] = flat.grad
    empty = torch.zeros(0, FEATURES)
    found["all empty"] = says(make("batch", process_group="world"), empty)
    found["evaluated empty"] = make("batch", process_group="world")(empty, mode="E")
    with torch.no_grad():
        found["no grad"] = make("batch", process_group="world")(inputs("batch")[0][mine])
    half = make("batch", process_group="world")(inputs("batch")[0][mine].bfloat16())
    found["bfloat16"] = half.detach()

    own = dist.new_group([0])  # what it gives on rank 1 is no group
    found["other group"] = says(make, "batch", process_group=own)
    mine_alone = dist.new_group([0]), dist.new_group([1])
    found["group of one"] = make("batch", process_group=mine_alone[rank])(
        inputs("batch")[0][mine]
    ).detach()
    kept = make("batch", process_group=mine_alone[rank])
    dist.barrier()
    dist.destroy_process_group()
    found["group gone"] = says(kept, inputs("batch")[0])
    torch.save(found, f"{folder}/{rank}.pt")


def start(folder, ranks):
    """What each of `ranks` processes found."""
    logs = [Path(folder) / f"{rank}.log" for rank in range(ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, __file__, str(folder), str(rank), str(ranks)]
            with log.open("wb") as file:
                processes.append(subprocess.Popen(command, stdout=file, stderr=file))
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(codes), [log.read_text() for log in logs]
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return start(tmp_path_factory.mktemp("two"), 2)


def close(actual, desired, tolerance=1e-6):
    """To 1e-6 of the largest element."""
    assert actual.shape == desired.shape
    if desired.numel():
        scale = max(1.0, float(desired.abs().max()))
        assert float((actual - desired).abs().max()) <= tolerance * scale


def compare(ranks, whole):
    close(torch.cat([rank["y"] for rank in ranks]), whole["y"])
    close(torch.cat([rank["x"] for rank in ranks]), whole["x"])
    for *own, of_all in zip(*(r["parameters"] for r in ranks), whole["parameters"], strict=True):
        close(sum(own), of_all)
    for first, *others, of_all in zip(
        *(rank["buffers"] for rank in ranks), whole["buffers"], strict=True
    ):
        assert all(torch.equal(first, other) for other in others)
        close(first, of_all)


@pytest.mark.parametrize("split", SPLITS[2], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KINDS)
def test_ranks_are_one_process(two, name, mode, split):
    """Values, gradients and statistics; the sums of the ranks' losses and of their gradients."""
    whole = run(make(name), *inputs(name), mode)
    compare([rank[f"{name} {mode} {split}"] for rank in two], whole)


def test_ddp_with_several_passes_before_a_backward(two):
    """The parameters after three updates under DDP, which broadcasts buffers before each pass."""
    network = agent()
    whole = joint_steps(network, network, slice(None), 1 / ROWS)
    for rank in two:
        assert list(rank["ddp"]["state"]) == list(whole["state"])
        for name, value in whole["state"].items():
            close(rank["ddp"]["state"][name].double(), value.double())
            assert torch.equal(rank["ddp"]["state"][name], two[0]["ddp"]["state"][name])
    losses = np.mean([rank["ddp"]["losses"] for rank in two], axis=0)
    np.testing.assert_allclose(losses, whole["losses"], rtol=1e-6)


def test_ranks_in_sync_are_found_so(two):
    for rank in two:
        assert rank["in sync"] == {"0": 0, "3": 0, "5": 0}
        assert rank["in sync, wrapped"] == {"module.0": 0, "module.3": 0, "module.5": 0}
        assert rank["nothing"] == {}


def test_drift_is_found_on_every_rank(two):
    gaps = two[0]["allowed"]
    assert two[1]["allowed"] == gaps
    assert list(gaps) == ["0", "3", "5"]
    worst = max(gaps, key=gaps.get)
    for rank in two:
        assert "running statistics differ between ranks in 3 of 3 layers, by" in rank["drift"]
        assert f"of {worst!r}: give the layers a process group" in rank["drift"]
        assert "by inf at most, in running_mean of '0'" in rank["nan"]
        assert rank["other layers"].startswith("ranks hold different layers")
    buffers = [rank["alone"]["state"] for rank in two]
    for path, gap in gaps.items():
        names = [f"{path}.running_mean", f"{path}.running_var", f"{path}.num_batches_tracked"]
        largest = max(float((buffers[0][n] - buffers[1][n]).abs().max()) for n in names)
        assert gap == pytest.approx(largest)


def test_a_large_mean_does_not_cancel(two):
    """Mean 1000, spread about 1: the difference of raw squares would be off by several percent."""
    far = (1000 + draw((ROWS, FEATURES), 3)).double()
    for rank in two:
        torch.testing.assert_close(rank["far"].double(), far.var(0), rtol=1e-4, atol=0)


def test_edges(two):
    x, _ = inputs("batch")
    plain = make("batch")(x).detach()
    close(torch.cat([rank["no grad"] for rank in two]), plain)
    low = torch.cat([rank["bfloat16"] for rank in two])
    assert low.dtype == torch.bfloat16
    close(low.float(), plain, 0.02)
    for rank in two:  # of the folded form the root of a variance of 0 has no gradient
        assert rank["flat"].isfinite().all()
    parts = [make("batch")(x[:5]), make("batch")(x[5:])]
    for rank, part in zip(two, parts, strict=True):
        close(rank["group of one"], part.detach(), 0)
        assert rank["all empty"].startswith("an empty batch on every rank has no statistics")
        assert rank["evaluated empty"].shape == (0, FEATURES)
        assert "the layer's process group is gone" in rank["group gone"]
    assert two[0]["other group"] == "nothing"
    assert "what torch.distributed.new_group gave to a rank of that group" in two[1]["other group"]


@pytest.mark.full
def test_three_ranks_and_a_group_of_two_of_them(tmp_path):
    three = start(tmp_path, 3)
    for split in SPLITS[3]:
        for name in KINDS:
            for mode in MODES:
                whole = run(make(name), *inputs(name), mode)
                compare([rank[f"{name} {mode} {split}"] for rank in three], whole)
    for name in ("batch", "renorm-folded"):
        compare([rank[f"{name} compiled"] for rank in three], run(make(name), *inputs(name), "T"))
    compare([three[0]["pair"], three[2]["pair"]], run(make("renorm"), *inputs("renorm"), "T"))
    assert three[0]["copy"]


# In one process


def test_world_before_it_is_set_up_is_this_process():
    for name in KINDS:
        ours = run(make(name, process_group="world"), *inputs(name), "T")
        compare([ours], run(make(name), *inputs(name), "T"))
    with pytest.raises(BatchproofError, match="no other ranks to compare with"):
        check_in_sync(agent())


@pytest.mark.parametrize("kind", [BatchNorm1d, BatchRenorm1d])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"process_group": "all"}, "process_group must be 'world', None, or what"),
        ({"process_group": -100}, "process_group must be 'world'.*got -100"),
        (
            {"process_group": "world", "estimator": "huber"},
            "estimator 'huber' looks at the rows.*use one of ema, debiased, cumulative, chan",
        ),
    ],
)
def test_what_no_layer_can_have(kind, options, says):
    with pytest.raises(BatchproofError, match=says):
        kind(FEATURES, **options)


def test_the_group_shows_and_is_copied():
    for layer in (make("batch", process_group="world"), make("renorm", process_group="world")):
        assert repr(layer).endswith("process_group=world)")
        twin = copy.deepcopy(layer).eval()
        assert twin.process_group == "world"
        assert layer.training
        assert twin.running_mean is not layer.running_mean
        assert twin.weight is not layer.weight
        compare([run(layer, *inputs("batch"), "T")], run(twin, *inputs("batch"), "T"))
    assert "process_group" not in repr(make("batch"))


def test_conversion_keeps_parameters_buffers_and_outputs():
    network = nn.ModuleDict(
        {
            "torch": nn.BatchNorm1d(FEATURES, eps=1e-3, momentum=0.2).eval(),
            "image": nn.BatchNorm2d(FEATURES, affine=False, momentum=None),
            "ours": BatchNorm1d(FEATURES, estimator="chan"),
            "bare": nn.BatchNorm1d(FEATURES, track_running_stats=False),
            "deep": nn.Sequential(nn.Linear(FEATURES, FEATURES), BatchRenorm1d(FEATURES)),
        }
    )
    network["again"] = network["torch"]
    network["torch"].weight.requires_grad_(False)
    before = copy.deepcopy(network)
    parameters, buffers = list(network.parameters()), list(network.buffers())
    ours, renorm = network["ours"], network["deep"][1]
    assert convert_sync(network) is network
    kinds = [BatchNorm1d, BatchNorm2d, BatchNorm1d, BatchNorm1d]
    assert [type(network[key]) for key in ("torch", "image", "ours", "bare")] == kinds
    assert network["ours"] is ours
    assert network["deep"][1] is renorm
    assert network["again"] is network["torch"]
    assert all(layer.process_group == "world" for layer in layers.mode_layers(network))
    for new, old in zip(network.parameters(), parameters, strict=True):
        assert new is old
    for new, old in zip(network.buffers(), buffers, strict=True):
        assert new is old
    assert list(network.state_dict()) == list(before.state_dict())
    for key, seed in (("torch", 0), ("image", 1), ("bare", 2), ("torch", 3)):
        x = draw((6, FEATURES, 2, 2) if key == "image" else (6, FEATURES), seed)
        close(network[key](x).detach(), before[key](x).detach())
        assert network[key].training == before[key].training
    close(network["image"].running_var, before["image"].running_var)
    alone = nn.BatchNorm1d(3)
    assert type(convert_sync(alone)) is BatchNorm1d
    assert convert_sync(network["ours"]) is network["ours"]


def _sb3_contribs():
    from sb3_contrib.common.torch_layers import BatchRenorm1d

    return BatchRenorm1d(2)


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (lambda: nn.BatchNorm3d(2), "BatchNorm3d cannot share its statistics: replace it by"),
        (lambda: nn.SyncBatchNorm(2), "SyncBatchNorm cannot share"),
        (nn.LazyBatchNorm1d, "LazyBatchNorm1d cannot share"),
        (_sb3_contribs, "BatchRenorm1d cannot share.*sb3-contrib's by from_state"),
        (
            lambda: BatchNorm1d(2, estimator="winsorized"),
            "estimator 'winsorized' looks at the rows",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_nothing_is_converted_where_something_is_refused(odd, says):
    network = nn.Sequential(nn.BatchNorm1d(2), BatchNorm1d(2), odd())
    with pytest.raises(BatchproofError, match=says):
        convert_sync(network)
    assert type(network[0]) is nn.BatchNorm1d
    assert network[1].process_group is None


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
