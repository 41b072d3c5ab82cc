"""Every part on a CUDA device, beside the same part on the CPU. Skipped where there is none."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cases
from secateur import Method, Pruner, Target, prune_
from secateur.checkpoint import load_model, save_model
from secateur.metrics import measure_energy, measure_latency, measure_memory
from secateur.patterns import PATTERNS, Channel, Unstructured
from secateur.penalties import PENALTIES, Penalised, PenalisedActivity
from secateur.schedules import cubic, iterative
from secateur.scores import GROUP_SCORES, SCORES
from secateur.solvers import SOLVERS
from secateur.stats import PathIntegral
from secateur.structure import shrink_, verify
from secateur.training import DYNAMICS, PARAMETRISATIONS, Reparametrised, SparseTraining
from secateur.types import ActivityPenalty

NAMES = ("conv", "bn1", "relu1", "conv2", "bn2", "relu2", "pool", "flat", "fc", "relu3", "head")
"""Of the layers of the network, as the table's includes and excludes know them."""

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    ).double()


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batches(*shape: int, device: str) -> list[tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(1)
    drawn = [torch.randn(4, *shape, generator=noise, dtype=torch.float64) for _ in range(3)]
    return [(x.to(device), torch.arange(4, device=device)) for x in drawn]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def outputs(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits: Tensor = model(batch[0])
    return logits


def steps(device: str, count: int = 6) -> Any:
    """Batches for a few steps."""
    return itertools.islice(itertools.cycle(batches(8, 6, 6, device=device)), count)


def asked_of(case: cases.Case) -> Any:
    """The loss, or the outputs where the part differentiates those."""
    return outputs if case.kwargs.get("gradients") == "output" or case.name == "sensitivity" else loss_fn


def equal_masks(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n].cpu(), b[n].cpu()) for n in a)


@pytest.mark.parametrize("case", cases.SCORES, ids=str)
def test_score_takes_the_same_weights(case: cases.Case) -> None:
    if case.name in ("karnin", "movement"):
        pytest.skip("collected while training")
    found = {}
    for device in ("cpu", "cuda"):
        model = small_net().eval().to(device)
        method = Method(target=Target("sparsity", 0.5), score=SCORES[case.name](**case.kwargs))
        data = batches(6, device=device)
        found[device] = prune_(model, method, loss_fn=asked_of(case), batches=data, example_inputs=data[0][0]).masks
    assert all(m.is_cuda for m in found["cuda"].values())
    assert equal_masks(found["cpu"], found["cuda"])


@pytest.mark.parametrize("name", ["karnin", "movement"])
def test_score_that_watched_a_training_takes_the_same_weights(name: str) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        model = net().to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        path = PathIntegral(model, optimizer)
        for batch in steps(device):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
        found[device] = prune_(model, Method(target=Target("sparsity", 0.5), score=SCORES[name](path=path))).masks
    assert equal_masks(found["cpu"], found["cuda"])


@pytest.mark.parametrize("case", cases.PATTERNS, ids=str)
def test_pattern_takes_the_same_units(case: cases.Case) -> None:
    found = {}
    pattern = PATTERNS[case.name](**case.kwargs)
    level = 1 - case.kwargs.get("n", 2) / case.kwargs.get("m", 4) if case.name == "nm" else 0.5
    for device in ("cpu", "cuda"):
        model = net().to(device)
        method = Method(target=Target("sparsity", level), pattern=pattern, allow_empty=True)
        found[device] = prune_(model, method, example_inputs=batches(8, 6, 6, device=device)[0][0]).masks
    assert equal_masks(found["cpu"], found["cuda"])


@pytest.mark.parametrize("case", cases.SOLVERS, ids=str)
def test_solver_finds_the_same_survivors(case: cases.Case) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        model = small_net().to(device)
        method = Method(target=Target("sparsity", 0.5), solver=SOLVERS[case.name](**case.kwargs))
        prune_(model, method, loss_fn=asked_of(case), batches=batches(6, device=device))
        found[device] = {n: p.detach().cpu() for n, p in model.named_parameters()}
    for name, value in found["cpu"].items():
        torch.testing.assert_close(found["cuda"][name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", cases.PENALTIES, ids=str)
def test_penalty_presses_alike(case: cases.Case) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        model = nn.Sequential()
        for name, layer in zip(NAMES, net(), strict=True):
            model.add_module(name, layer)
        model.to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        penalty = PENALTIES[case.name](**case.kwargs)
        activity = PenalisedActivity(model, penalty) if isinstance(penalty, ActivityPenalty) else None
        pressing = None if activity else Penalised(model, penalty, optimizer=optimizer)
        for batch in steps(device):
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            if pressing:
                pressing.observe(loss.item())
            (loss + activity.value() if activity else loss).backward()
            optimizer.step()
        found[device] = {n: p.detach().cpu() for n, p in model.named_parameters()}
    for name, value in found["cpu"].items():
        torch.testing.assert_close(found["cuda"][name], value, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", cases.PARAMETRISATIONS, ids=str)
def test_parametrisation_trains_and_finishes(case: cases.Case) -> None:
    model = net().to("cuda")
    wrapped = Reparametrised(
        model,
        PARAMETRISATIONS[case.name](**case.kwargs),
        include=["3.weight", "8.weight"] if case.name == "sr_ste" else [],
        seed=3,
    )
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=1e-2)
    for batch in steps("cuda"):
        optimizer.zero_grad()
        (loss_fn(wrapped, batch) + wrapped.penalty()).backward()
        optimizer.step()
        wrapped.step()
    finished = wrapped.finish_()
    named = dict(model.named_parameters())
    assert finished.masks
    for name, mask in finished.masks.items():
        assert mask.is_cuda
        assert not named[name][~mask].any()
    assert torch.isfinite(model(batch[0])).all()


@pytest.mark.parametrize("case", cases.DYNAMICS, ids=str)
def test_dynamics_moves_alike(case: cases.Case) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        model = net().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        pattern = Channel() if case.name == "soft_filter" else Unstructured()
        method = Method(target=Target("sparsity", 0.5), pattern=pattern)
        kwargs: dict[str, Any] = {}
        if case.name == "soft_filter":
            kwargs["example_inputs"] = batches(8, 6, 6, device=device)[0][0]
        trainer = SparseTraining(
            model, method, DYNAMICS[case.name](**case.kwargs), optimizer=optimizer, steps_per_epoch=2, **kwargs
        )
        trainer.start()
        for batch in steps(device, 24):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            if trainer.step() is None:
                optimizer.step()
        found[device] = {n: m.clone() for n, m in trainer.masks.items()}
        trainer.detach()
    assert equal_masks(found["cpu"], found["cuda"])


@pytest.mark.parametrize("case", cases.GROUP_SCORES, ids=str)
def test_group_score_cuts_the_same_channels(case: cases.Case) -> None:
    if case.name == "block_influence":
        pytest.skip("of layers, not of channels")
    if case.kwargs.get("over") == "norm" or case.name == "norm_scale":
        pytest.skip("the small network has channels without a norm")
    found = {}
    for device in ("cpu", "cuda"):
        model = net().eval().to(device)
        dense = copy.deepcopy(model)
        data = batches(8, 6, 6, device=device)
        method = Method(target=Target("sparsity", 0.5), pattern=Channel(), score=GROUP_SCORES[case.name](**case.kwargs))
        report = shrink_(model, method, data[0][0], loss_fn=asked_of(case), batches=data)
        assert report.proof is not None
        assert all(p.device.type == device for p in model.parameters())
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
        found[device] = model(data[0][0]).detach().cpu()
    torch.testing.assert_close(found["cuda"], found["cpu"])


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_masks_hold_under_mixed_precision(amp: torch.dtype | None, fused: bool) -> None:
    model = net().float().to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cuda", enabled=amp is torch.float16)
    schedule = cubic(begin=0, end=10, every=2, unit="steps")
    method = Method(target=Target("sparsity", 0.8), schedule=schedule, when="during")
    pruner = Pruner(model, method, optimizer=optimizer)
    for x, y in steps("cuda", 14):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=amp or torch.bfloat16, enabled=amp is not None):
            loss = F.cross_entropy(model(x.float()), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
        named = dict(model.named_parameters())
        assert all(not named[n][~m].any() for n, m in pruner.masks.items())
    assert pruner.finished
    assert abs(pruner.sparsity - 0.8) < 0.01


def test_state_moves_between_devices(tmp_path: Path) -> None:
    model = net().to("cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, Target("sparsity", 0.5), optimizer=optimizer)
    pruner.prune()
    save_model(tmp_path / "model.safetensors", model, masks=pruner.masks)
    other = net()
    load_model(other, tmp_path / "model.safetensors")
    again = Pruner(other, Target("sparsity", 0.5))
    again.load_state_dict(pruner.state_dict())
    assert equal_masks(pruner.masks, again.masks)
    assert not any(m.is_cuda for m in again.masks.values())
    assert all(torch.equal(p.cpu(), q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_model_may_move_between_rounds() -> None:
    model = net()
    pruner = Pruner(model, Method(target=Target("sparsity", 0.75), schedule=iterative(rounds=3)))
    pruner.prune()
    model.to("cuda")
    pruner.prune()
    assert all(m.is_cuda for m in pruner.masks.values())
    model.to("cpu")
    pruner.prune()
    assert not any(m.is_cuda for m in pruner.masks.values())
    assert pruner.sparsity == pytest.approx(0.75, abs=0.01)


def test_dynamics_follow_a_model_that_moves() -> None:
    model = net()
    trainer = SparseTraining(model, Method(target=Target("sparsity", 0.75)), DYNAMICS["rigl"](end=100, every=1))
    trainer.start()
    model.to("cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer.attach(optimizer)
    before = int(sum(m.sum() for m in trainer.masks.values()))
    for batch in steps("cuda"):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        if trainer.step() is None:
            optimizer.step()
    assert int(sum(m.sum().cpu() for m in trainer.masks.values())) == before


def test_latency_memory_and_energy_are_those_of_the_device() -> None:
    dense, pruned = net().float().to("cuda").eval(), net().float().to("cuda").eval()
    x = torch.randn(16, 8, 6, 6, device="cuda")
    report = shrink_(pruned, Method(target=Target("macs", 0.5), pattern=Channel()), x[:2])
    found = measure_latency({"dense": dense, "pruned": pruned}, (x,), runs=20, warmup=5)
    assert all(latency.median_ms > 0 for latency in found.values())
    memory = measure_memory(dense, (x,))
    assert memory.kind == "measured (CUDA allocator)"
    assert memory.peak_rss_bytes is not None
    assert memory.peak_rss_bytes >= memory.weight_bytes
    assert verify(dense, pruned, x[:2], report).equal
    energy = measure_energy(lambda: dense(x), device="cuda", seconds=2)
    pytest.importorskip("pynvml")
    assert energy.kind == "measured (NVML)"
    assert energy.joules is not None
    assert energy.joules > 0


def test_compiled_model_is_pruned_in_place() -> None:
    model = net().float().to("cuda")
    compiled = torch.compile(model)
    pruned = prune_(compiled, Target("sparsity", 0.5))
    assert all(not dict(model.named_parameters())[n][~m].any() for n, m in pruned.masks.items())
