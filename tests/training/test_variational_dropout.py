"""Learned noise: the divergence, local noise against its mean and variance, and weights that drown."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secateur.training import Reparametrised, VariationalDropout
from secateur.training.variational_dropout import kl
from secateur.types import Moment, Weight


def test_divergence_at_known_places() -> None:
    at = torch.tensor([8.0, -5.0, 30.0], dtype=torch.float64)
    assert kl(at).tolist() == pytest.approx([0.0002, 3.14, 0.0], abs=5e-3)
    assert float(kl(at)[0]) == pytest.approx(0.0002, abs=5e-5)
    # By hand, at log alpha = 0: k1 - k1 / (1 + exp(-k2)) + log(2) / 2.
    want = 0.63576 - 0.63576 / (1 + math.exp(-1.8732)) + math.log(2) / 2
    assert float(kl(torch.zeros((), dtype=torch.float64))) == pytest.approx(want, rel=1e-12)


def test_divergence_is_near_the_exact_one() -> None:
    """KL up to a constant is E log|1 + sqrt(alpha) e| - log(alpha) / 2 with e normal; summed over a fine grid."""
    e = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    density = torch.exp(-e.square() / 2) / math.sqrt(2 * math.pi) * (e[1] - e[0])

    def exact(log_alpha: float) -> float:
        inside = (1 + math.exp(log_alpha / 2) * e).square() + 1e-18
        return float((density * 0.5 * inside.log()).sum()) - log_alpha / 2

    endless = exact(25.0)
    for log_alpha in (-6.0, -3.0, -1.0, 0.0, 1.0, 3.0):
        assert float(kl(torch.tensor(log_alpha))) == pytest.approx(exact(log_alpha) - endless, abs=0.02)


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(6, 3), torch.randn(6)),
    "convolution": lambda: (nn.Conv2d(4, 4, 3, padding=1, groups=2, stride=2), torch.randn(4, 5, 5)),
    "reflected": lambda: (nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect"), torch.randn(2, 6)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_local_noise_has_the_mean_and_variance_of_noise_on_the_weights(layer: str) -> None:
    torch.manual_seed(0)
    module, x = LAYERS[layer]()
    module.double()
    x, samples = x.double(), 40_000
    log_variance = torch.randn(module.weight.shape, dtype=torch.float64) * 0.5 - 2.0
    local = Reparametrised(module, VariationalDropout(limit=20.0))
    local.latents["weight"].data.copy_(log_variance)
    with torch.no_grad():
        drawn = local(x.expand(samples, *x.shape))
        clean = module(x[None])[0]
        # The same from weights that are drawn here, each sample its own.
        noise = torch.randn((2_000, *module.weight.shape), dtype=torch.float64) * (log_variance / 2).exp()
        weights = module.weight + noise
        direct = torch.stack([torch.func.functional_call(module, {"weight": w}, (x[None],))[0] for w in weights])
    assert (drawn.mean(0) - clean).abs().max() < 5 * drawn.std(0).max() / samples**0.5
    torch.testing.assert_close(drawn.var(0), direct.var(0), rtol=0.2, atol=0.0)
    if layer == "linear":
        torch.testing.assert_close(drawn.var(0), log_variance.exp() @ x.square(), rtol=0.03, atol=0.0)
        independent = torch.corrcoef(drawn.T) - torch.eye(3)
        assert independent.abs().max() < 0.03
        between = torch.corrcoef(drawn.view(-1, 2, 3)[:, :, 0].T)[0, 1]
        assert abs(float(between)) < 0.03, "samples of one batch have noise of their own"


def test_noise_on_weights_is_one_sample_per_pass() -> None:
    layer = nn.Linear(2, 1, bias=False).double()
    layer.weight.data.copy_(torch.tensor([[2.0, -3.0]]))
    wrapped = Reparametrised(layer, VariationalDropout(local=False))
    wrapped.latents["weight"].data.copy_(torch.tensor([[0.0, 1.0]]))  # variances of 1 and e
    with torch.no_grad():
        first = wrapped(torch.eye(2).double().repeat(2, 1))
        assert torch.equal(first[:2], first[2:])
        drawn = torch.stack([wrapped(torch.eye(2).double()).flatten() for _ in range(4000)])
    assert drawn.mean(0).tolist() == pytest.approx([2.0, -3.0], abs=0.1)
    assert drawn.var(0).tolist() == pytest.approx([1.0, math.e], rel=0.1)


def test_weights_drown_at_the_threshold_and_zero_weights_do() -> None:
    theta = torch.tensor([1.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    latents = {"w": torch.tensor([2.99, 3.01, -10.0, 3 + 2 * math.log(0.5) - 1e-6], dtype=torch.float64)}
    at = Moment({"w": theta}, latents, {"w": Weight("w", (4,))})
    weights, masks = VariationalDropout().final(at)
    assert masks["w"].tolist() == [True, False, False, True]
    assert weights["w"].tolist() == [1.0, 0.0, 0.0, 0.5]


def test_log_alpha_is_cut_off_and_the_penalty_warms_up() -> None:
    at = Moment({"w": torch.ones(2)}, {"w": torch.tensor([-50.0, 50.0])}, {"w": Weight("w", (2,))})
    part = VariationalDropout(0.5, warm_up=10)
    assert part.log_alpha(at)["w"].tolist() == [-8.0, 8.0]
    whole = 0.5 * float(kl(torch.tensor([-8.0, 8.0])).sum())
    for step, share in ((0, 0.0), (4, 0.4), (10, 1.0), (99, 1.0)):
        later = Moment(at.weights, at.latents, at.layouts, step)
        assert float(part.penalty(later)) == pytest.approx(share * whole, rel=1e-6)


def test_inputs_that_mean_nothing_drown() -> None:
    torch.manual_seed(0)
    wrapped = Reparametrised(nn.Linear(8, 1), VariationalDropout(1 / 100))
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.05)
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 1000) ** 2
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        loss = (wrapped(x) - x[:, :2].sum(1, keepdim=True)).square().mean() / (2 * 0.1)
        optimizer.zero_grad()
        (loss + wrapped.penalty()).backward()
        optimizer.step()
        wrapped.step()
    weight = wrapped.finish_().masks["weight"][0]
    assert weight.tolist() == [True] * 2 + [False] * 6
    assert wrapped.model.weight[0, :2].tolist() == pytest.approx([1.0, 1.0], abs=0.05)


def test_layers_called_twice_or_by_keyword_and_hooks_of_the_user() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(self.fc(input=x))
            return out

    wrapped, seen = Reparametrised(Net(), VariationalDropout(start_log_variance=0.0)), []
    wrapped.model.fc.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with torch.no_grad():
        out = wrapped(torch.ones(1, 4))
    assert torch.equal(seen[1], out), "a user's hook sees what the layer hands on"
    assert len(wrapped.model.fc._forward_hooks) == 1
    with pytest.raises(RuntimeError):
        wrapped(torch.ones(1, 3))
    assert len(wrapped.model.fc._forward_hooks) == 1
