"""Which layer is to blame, on networks where the answer is known by construction."""

import pytest
import torch
from torch import nn

from batchproof.clinic.locate import forced_mode, gap, locate, once, tolerance
from batchproof.clinic.subject import Subject, fingerprint, take

torch.set_num_threads(1)
OBS = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def net(*layers: nn.Module) -> Subject:
    return Subject.from_module(nn.Sequential(*layers), OBS)


def blamed(subject: Subject, modes_a: bool, modes_b: bool):
    def run(mode: bool):
        with forced_mode(subject, mode):
            return subject.policy(OBS)

    return locate(subject, lambda: run(modes_a), lambda: run(modes_b), slice(None), slice(None))


def linear(n: int = 6, m: int = 6) -> nn.Linear:
    torch.manual_seed(n * m)
    return nn.Linear(n, m)


def test_first_and_largest_are_told_apart():
    strong = nn.BatchNorm1d(6)
    strong.running_mean.fill_(5.0)
    weak = nn.BatchNorm1d(6, eps=1e-5)
    subject = net(linear(), weak, nn.ReLU(), linear(), strong, linear(6, 2))
    with torch.no_grad():  # the first norm's statistics are nearly those of the batch
        x = subject.networks["policy"][0](OBS)
        weak.running_mean.copy_(x.mean(0) + 1e-4)
        weak.running_var.copy_(x.var(0, correction=0))
    found = blamed(subject, False, True)
    assert (found.network, found.first, found.largest) == ("policy", "1", "4")
    assert list(found.effects) == ["1", "4"]
    assert found.effects["4"] > 100 * found.effects["1"]


def test_the_effect_of_the_only_source_is_the_whole_gap():
    subject = net(linear(), nn.BatchNorm1d(6), nn.ReLU(), linear(), nn.LayerNorm(6), linear(6, 2))
    module = subject.networks["policy"]
    with torch.no_grad():
        module.eval()
        evaluated = module(OBS)
        whole = float((module.train()(OBS) - evaluated).abs().max())
    module[1].reset_running_stats()
    found = blamed(subject, False, True)
    assert list(found.effects) == ["1"]
    assert found.effects["1"] == pytest.approx(whole, rel=1e-4)


def test_layers_that_pass_a_difference_on_are_not_blamed():
    subject = net(nn.BatchNorm1d(6), *[linear() for _ in range(4)], nn.LayerNorm(6), nn.Tanh())
    assert list(blamed(subject, False, True).effects) == ["0"]


def test_nothing_is_found_where_nothing_differs():
    subject = net(linear(), nn.LayerNorm(6), nn.Tanh())
    found = locate(
        subject,
        lambda: subject.policy(take(OBS, 3)),
        lambda: subject.policy(OBS),
        slice(0, 1),
        slice(3, 4),
    )
    assert (found.first, found.largest, found.network, found.effects) == ("", "", "", {})


def test_a_row_is_matched_with_itself_in_another_batch():
    subject = net(linear(), nn.BatchNorm1d(6, track_running_stats=False), linear(6, 2))
    found = locate(
        subject,
        lambda: subject.policy(OBS[[3, 4]]),
        lambda: subject.policy(OBS),
        slice(0, 1),
        slice(3, 4),
    )
    assert found.first == found.largest == "1"


class Centring(nn.Module):
    """Batch statistics in a container's own forward, between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x):
        h = self.a(x)
        return self.b(h - h.mean(0))


def test_a_container_is_blamed_for_what_its_own_code_does():
    subject = net(nn.LayerNorm(6), Centring(), nn.Tanh())
    found = locate(
        subject,
        lambda: subject.policy(OBS[:2]),
        lambda: subject.policy(OBS),
        slice(0, 2),
        slice(0, 2),
    )
    assert found.first == found.largest == "1"


def test_a_network_that_is_itself_the_source_goes_by_its_role():
    subject = Subject.from_module(Centring(), OBS, name="x")
    found = locate(
        subject, lambda: subject.policy(OBS[:2]), lambda: subject.policy(OBS), [0, 1], [0, 1]
    )
    assert (found.network, found.first) == ("policy", "policy")


def test_a_layer_that_only_one_run_calls_is_the_source():
    norm, first, last = nn.LayerNorm(6), linear(), linear(6, 2)
    body = nn.ModuleDict({"first": first, "norm": norm, "last": last})
    subject = Subject.from_callable(
        lambda x: last(norm(first(x))), OBS, networks={"actor": body}, name="x"
    )
    found = locate(
        subject, lambda: last(first(OBS)), lambda: last(norm(first(OBS))), slice(None), slice(None)
    )
    assert (found.network, found.first, found.largest) == ("actor", "norm", "norm")


def test_the_subject_comes_back_bit_for_bit_also_after_an_error():
    subject = net(linear(), nn.BatchNorm1d(6), nn.Dropout(0.3), linear(6, 2))
    before = fingerprint(subject)
    blamed(subject, False, True)
    assert fingerprint(subject) == before

    def broken():
        subject.policy(OBS)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        locate(subject, lambda: subject.policy(OBS), broken, slice(None), slice(None))
    assert fingerprint(subject) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for _, _, m in subject.modules())


def test_forced_mode_wins_over_code_that_switches_by_itself():
    module = nn.Sequential(nn.BatchNorm1d(6))

    def act(x):
        module.train()
        return module(x)

    subject = Subject.from_callable(act, OBS, networks={"policy": module})
    module.eval()
    expected = module(OBS)
    with forced_mode(subject, False):
        assert torch.equal(once(subject, lambda: subject.policy(OBS)), expected)
    with forced_mode(subject, {id(module[0]): True}):
        assert not torch.allclose(once(subject, lambda: subject.policy(OBS)), expected)
    assert not module.training


def test_once_starts_from_one_random_state_and_leaves_none():
    subject = net(linear(), nn.Dropout(0.5))
    subject.networks["policy"].train()
    before = fingerprint(subject)
    first = once(subject, lambda: subject.policy(OBS))
    assert torch.equal(first, once(subject, lambda: subject.policy(OBS)))
    assert not torch.equal(first, once(subject, lambda: subject.policy(OBS), seed=1))
    assert fingerprint(subject) == before


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float64, 1e-9), (torch.float32, 16 * 2.0**-23)]
)
def test_tolerance_follows_the_precision_and_the_scale(dtype, expected):
    assert tolerance(torch.tensor([-3.0, 2.0], dtype=dtype)) == pytest.approx(3 * expected)
    assert tolerance(torch.tensor([float("inf"), 2.0], dtype=dtype)) == pytest.approx(2 * expected)


def test_gap_of_equal_infinities_is_zero():
    inf, nan = float("inf"), float("nan")
    a, b = torch.tensor([inf, nan, inf, 1.0]), torch.tensor([inf, nan, 0.0, 3.0])
    assert gap(a, b).tolist() == [0.0, 0.0, inf, -2.0]
