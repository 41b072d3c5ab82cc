"""Small modules of every kind: pruned exactly, or frozen, or refused with a reason; none may come back different."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.allocate import Layerwise
from secateur.errors import SecateurError
from secateur.method import Method
from secateur.patterns import Channel
from secateur.structure import ShrinkReport, shrink_
from secateur.targets import Target
from tests.graph.modules import HARD, PLAIN, UNSTEADY, Case
from tests.graph.modules_more import MORE, ramp

METHOD = Method(target=Target("channels", 0.6), pattern=Channel(), allocate=Layerwise())


def built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build()


def inputs_of(case: Case, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return case.inputs(seed), dict(case.kwargs)


def run(model: nn.Module, case: Case, seed: int) -> list[Tensor]:
    args, kwargs = copy.deepcopy(inputs_of(case, seed))
    with torch.no_grad():
        return [t for t in tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]


def masked(model: nn.Module, report: ShrinkReport) -> nn.Module:
    """The dense model with zeros where the plan removes something: no label, no recorder, plain indexing."""
    with torch.no_grad():
        tensors = dict(model.named_parameters(remove_duplicate=False))
        for name, dims in report.plan.kept.items():
            if name in tensors:
                for dim, kept in dims.items():
                    gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                    gone[torch.from_numpy(kept)] = False
                    tensors[name].index_fill_(dim, gone.nonzero().flatten(), 0.0)
    return model


def outcome(case: Case) -> tuple[str, nn.Module, ShrinkReport | None]:
    model = built(case)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        report = shrink_(model, METHOD, inputs_of(case, 0))
    except SecateurError as refusal:
        reason = str(refusal)
        report = None
    if report is None:
        assert len(reason) > 20
        after = model.state_dict()
        assert all(torch.equal(before[n], after[n]) for n in before), "refused, and changed all the same"
        return "refused", model, None
    assert report.proof.equal
    assert report.parameters[1] < report.parameters[0]
    assert sum(p.numel() for p in model.parameters()) == report.parameters[1]
    return "pruned", model, report


@pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.name)
def test_plain_modules_are_pruned_exactly(case: Case) -> None:
    result, small, report = outcome(case)
    assert result == "pruned"
    assert report is not None
    check(case, small, report)


@pytest.mark.parametrize("case", [*HARD, *MORE], ids=lambda c: c.name)
def test_hard_modules_never_come_back_different(case: Case) -> None:
    result, small, report = outcome(case)
    assert result in case.expect or (result == "refused" and "frozen" in case.expect), case.why
    if report is not None:
        check(case, small, report)


@pytest.mark.parametrize("name", ["training flip", "many exits", "nested branch"])
def test_what_the_example_does_not_do_is_right_too(name: str) -> None:
    (case,) = (c for c in MORE if c.name == name)
    result, small, report = outcome(case)
    assert result == "pruned"
    assert report is not None
    dense = masked(built(case), report)
    for training in (False, True):
        for seed in (0, 1, 2):
            ours, theirs = run(small.train(training), case, seed), run(dense.train(training), case, seed)
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_recordings_leave_no_trace() -> None:
    (case,) = (c for c in MORE if c.name == "remembers in an object")
    model: Any = built(case)
    (x,) = case.inputs(0)
    before = x.clone(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    shrink_(model, METHOD, (x,))
    assert model.notes.last is None
    assert model.notes.table == {"calls": {"rows": []}}
    assert model.notes.count == [torch.zeros(1)]
    adds, draws = (built(next(c for c in MORE if c.name == name)) for name in ("adds to its input", "draws outside"))
    for other in (adds, draws):
        shrink_(other, METHOD, (x,))
    assert torch.equal(x, before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[2:]


def test_tables_that_outlive_the_model_keep_their_dtype() -> None:
    (case,) = (c for c in MORE if c.name == "cached by batch size")
    ramp.cache_clear()
    model = built(case)
    shrink_(model, METHOD, case.inputs(0))
    for rows in (1, 2, 3):
        assert ramp(rows).dtype == torch.float32
        model(torch.randn(rows, 12))


def check(case: Case, small: nn.Module, report: ShrinkReport) -> None:
    if case.name in UNSTEADY:
        return
    replayed = built(case)
    report.plan.apply_(replayed)
    replayed.load_state_dict(small.state_dict())
    normalised = bool(report.proof.normalised)
    dense = masked(built(case), report)
    for seed in (0, 1, 2):
        ours = run(small, case, seed)
        assert all(torch.equal(a, b) for a, b in zip(ours, run(replayed, case, seed), strict=True)), "replay differs"
        if normalised or any("weight_g" in n or "original0" in n for n in small.state_dict()):
            continue  # statistics over kept channels, or 0/0 in the rows that are gone: the proof itself knows how
        for a, b in zip(ours, run(dense, case, seed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    small.train()
    try:
        out = [t for t in tree_leaves(small(*case.inputs(0), **dict(case.kwargs))) if isinstance(t, Tensor)]
    except Exception:
        built(case).train()(*case.inputs(0), **dict(case.kwargs))  # the dense one trains: then this is ours
        raise
    floating = [t.float().square().mean() for t in out if t.is_floating_point() and t.requires_grad]
    if floating:
        torch.stack(floating).sum().backward()
        torch.optim.SGD(small.parameters(), lr=1e-3).step()
