"""Conservation of the flow, and a model that is bit for bit as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import MissingStatsError
from secateur.stats import SynapticFlow
from secateur.types import Source


def convolutional(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
        net[1].weight.normal_()
    return net


def collect(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    return SynapticFlow().collect(Source(model, dict(model.named_parameters()), example_inputs=inputs))


def test_by_numpy_like_products() -> None:
    """Three linear layers: forward ones times backward ones, written out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    w1, w2, w3 = (net[i].weight.detach().double().abs() for i in (0, 2, 4))
    h0 = torch.ones(4, dtype=torch.float64)
    h1, b2 = w1 @ h0, w3.T @ torch.ones(2, dtype=torch.float64)
    h2, b1 = w2 @ h1, w2.T @ b2
    total = (w3 @ h2).sum()
    got = collect(net, (torch.zeros(1, 4),))
    torch.testing.assert_close(got["0.weight"], torch.outer(b1, h0) * w1 / total)
    torch.testing.assert_close(got["2.weight"], torch.outer(b2, h1) * w2 / total)
    torch.testing.assert_close(got["4.weight"], h2.expand(2, 6) * w3 / total)
    assert all(not got[f"{i}.bias"].any() for i in (0, 2, 4))


def test_shares_of_a_layer_add_up_to_one_and_in_is_out() -> None:
    got = collect(convolutional(), (torch.zeros(1, 1, 8, 8),))
    for name in ("0.weight", "1.weight", "4.weight", "7.weight", "9.weight"):
        assert float(got[name].sum()) == pytest.approx(1.0, rel=1e-12), name
    torch.testing.assert_close(got["7.weight"].sum(1), got["9.weight"].sum(0))  # hidden units of the head
    torch.testing.assert_close(got["0.weight"].sum((1, 2, 3)), got["4.weight"].sum((0, 2, 3)))  # feature maps
    torch.testing.assert_close(got["0.weight"].sum((1, 2, 3)), got["1.weight"])  # through their norm


def test_residual_networks_conserve_what_crosses() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.branch, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x + torch.relu(self.branch(x)))

    torch.manual_seed(0)
    got = collect(Residual(), (torch.zeros(1, 4),))
    assert float(got["first.weight"].sum()) == pytest.approx(1)
    assert float(got["last.weight"].sum()) == pytest.approx(1)
    assert 0 < float(got["branch.weight"].sum()) < 1  # some flow takes the shortcut


def test_depth_does_not_overflow() -> None:
    """At 2e3 per layer a hundred and fifty layers make 1e500: far beyond float64."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8, bias=False) for _ in range(150)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.uniform_(100, 500)
    got = collect(nn.Sequential(*layers), (torch.zeros(1, 8),))
    for share in got.values():
        assert float(share.sum()) == pytest.approx(1.0)
    huge = nn.Sequential(*(nn.Linear(8, 8, bias=False).double() for _ in range(20)))
    with torch.no_grad():
        for layer in huge:
            layer.weight.fill_(1e200)
    with pytest.raises(MissingStatsError, match="more flows than float64"):
        collect(huge, (torch.zeros(1, 8),))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_bit_for_bit_as_it_was(fails: bool) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if fails:
                raise ZeroDivisionError
            return x

    net = nn.Sequential(convolutional(), Failing()).train()
    net[0][0].weight.requires_grad_(False)
    tensors = {n: (t, t.clone(), t.requires_grad) for n, t in net.state_dict(keep_vars=True).items()}
    try:
        collect(net, (torch.zeros(1, 1, 8, 8),))
    except ZeroDivisionError:
        assert fails
    for name, tensor in net.state_dict(keep_vars=True).items():
        same, value, wanted = tensors[name]
        assert tensor is same
        assert torch.equal(tensor, value)
        assert tensor.requires_grad == wanted
        assert tensor.grad is None
    assert all(m.training for m in net.modules())


def test_inputs_in_any_form() -> None:
    net = nn.Sequential(nn.Linear(4, 2))
    want = collect(net, (torch.zeros(1, 4),))["0.weight"]
    for inputs in (torch.rand(3, 4), [torch.zeros(2, 4)], {"input": torch.zeros(1, 4)}, ((torch.zeros(1, 4),), {})):
        torch.testing.assert_close(collect(net, inputs)["0.weight"], want)


def test_nothing_flows() -> None:
    net = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.zero_()
    with pytest.raises(MissingStatsError, match="no path of non-zero weights"):
        collect(net, (torch.zeros(1, 4),))
    with pytest.raises(MissingStatsError, match="norm takes the mean off"):
        collect(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), (torch.zeros(1, 4),))
    with pytest.raises(MissingStatsError, match="example_inputs"):
        SynapticFlow().collect(Source(net, dict(net.named_parameters())))
