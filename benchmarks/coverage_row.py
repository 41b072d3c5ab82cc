"""One row of the coverage table: a model is pruned with no configuration, and everything claimed of it is tried.

    python benchmarks/coverage_row.py ZOO NAME FILE [--onnx]

`coverage.py` does this in a process of its own for each model. The row is written to the file before each stage, so
that a crash or a time limit leaves what was known by then. `plain` is a second opinion: it shares no code with the
engine, neither labels nor recorder, and zeroes the removed indices in the dense model's parameters by plain indexing.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from _torchvision_ops import declare
from coverage_models import Case, Inputs, cases, outputs, scatter
from secateur import export_model
from secateur.allocate import Layerwise
from secateur.errors import SecateurError
from secateur.method import Method
from secateur.patterns import Channel
from secateur.structure import ShrinkReport, load_pruned, save_pruned, shrink_, verify
from secateur.targets import Target

CHANNELS_KEPT = 0.6
METHOD = Method(target=Target("channels", CHANNELS_KEPT), pattern=Channel(), allocate=Layerwise())
TOLERANCE = 1e-10  # relative to the largest output, or 1
SINGLE = 1e-4  # the same, where the model itself insists on computing in float32
EXPORT_TOLERANCE = 1e-5
SEEDS = {"weights": 0, "example": 0, "unseen": 1, "train": 4, "save": 5}
PLAIN_SEEDS = (2, 3)
MOMENTA = 50_000_000  # elements of momentum that are compared
LONGEST = 300  # characters of a reason

Row = dict[str, Any]
Check = dict[str, Any]
"""`ok` is true, false, or null where there is nothing to check; `why` says what happened."""


class Sheet:
    """A row that is on disk before every stage.

    Args:
        path: Where.
        case: Of which model.
    """

    def __init__(self, path: Path, case: Case) -> None:
        self.path = path
        self.row: Row = {"zoo": case.zoo, "name": case.name, "works": "crashed", "why": ""}

    def stage(self, name: str) -> None:
        """Say what is about to be tried."""
        gc.collect()
        self.row["stage"] = name
        self.write()

    def write(self) -> None:
        """Write the row, whole or not at all."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.row), encoding="utf-8")
        part.replace(self.path)

    def check(self, name: str, attempt: Callable[[], Check]) -> None:
        """Try something; what goes wrong in it is a result."""
        self.stage(name)
        try:
            self.row[name] = attempt()
        except Exception as problem:  # noqa: BLE001 - a table of what works must survive what does not
            self.row[name] = {"ok": False, "why": short(problem)}


def short(problem: BaseException | str) -> str:
    """An error in one line."""
    if isinstance(problem, BaseException):
        problem = f"{type(problem).__name__}: {problem}"
    text = " ".join(problem.split())
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def fill(sheet: Sheet, case: Case, *, onnx: bool) -> None:
    """Fill the row of one model.

    Args:
        sheet: The row.
        case: The model.
        onnx: Whether to export to ONNX, which takes longer than all the rest.
    """
    row = sheet.row
    sheet.stage("build")
    model = case.build()
    scatter(model, SEEDS["weights"])
    ties = tied(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    sheet.stage("dense_step")
    row["dense_step"] = dense_step(model, optimizer, case.inputs(SEEDS["train"]))
    momenta = some_momenta(model, optimizer)
    dense = copy.deepcopy(model)
    sheet.stage("shrink")
    report = shrunk(row, model, dense, case.inputs(SEEDS["example"]), optimizer)
    if report is None:
        return
    plan = report.plan.kept
    checks_of_equality(sheet, case, dense, model, report)
    del dense
    sheet.check("ties", lambda: same_ties(ties, tied(model)))
    checks_of_training(sheet, case, model, optimizer, momenta, plan)
    del optimizer, momenta
    sheet.check("save", lambda: saved(model, report, case))
    sheet.check("export", lambda: exported(model, case))
    if onnx:
        sheet.check("onnx", lambda: to_onnx(model, case))


def checks_of_equality(sheet: Sheet, case: Case, dense: nn.Module, small: nn.Module, report: ShrinkReport) -> None:
    """Compare with the dense model, which is not to be used again."""
    sheet.check("sliced", lambda: sliced(dense, small, report.plan.kept))
    sheet.check("unseen", lambda: unseen(dense, small, case.inputs(SEEDS["unseen"]), report))
    sheet.check("plain", lambda: plain(dense, small, report, [case.inputs(seed) for seed in PLAIN_SEEDS]))


def checks_of_training(
    sheet: Sheet,
    case: Case,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    momenta: dict[str, Tensor],
    kept: Any,
) -> None:
    """Look at the momentum, and make a step, which changes the model."""
    sheet.check("state", lambda: same_state(model, optimizer, momenta, kept))
    sheet.check("step", lambda: step(model, optimizer, case.inputs(SEEDS["train"]), sheet.row["dense_step"]))


# ------------------------------------------------------------------------------------------------------------ shrinking


def shrunk(row: Row, model: nn.Module, dense: nn.Module, inputs: Inputs, optimizer: Any) -> ShrinkReport | None:
    """Prune, and note how it went; None where it did not."""
    began, clock = time.process_time(), time.perf_counter()
    try:
        report = shrink_(model, METHOD, inputs, optimizer=optimizer)
    except SecateurError as refusal:
        row |= {"works": "refused", "error": type(refusal).__name__, "why": short(str(refusal))}
        report = None
    except Exception as problem:  # noqa: BLE001 - an untyped error is what the table is to show
        row |= {"works": "crashed", "error": type(problem).__name__, "why": short(str(problem))}
        report = None
    row |= {"seconds": time.process_time() - began, "wall_seconds": time.perf_counter() - clock}
    if report is None:
        row["untouched"] = same_values(model, dense)
        return None
    before, after = count(dense), count(model)
    proof = report.proof
    row |= {
        "works": "pruned",
        "parameters": [before, after],
        "counted_right": [before, after] == list(report.parameters),
        "macs": list(report.macs),
        "difference": proof.difference,
        "scale": proof.scale,
        "inputs": proof.inputs,
        "equal": proof.equal,
        "normalised": dict(proof.normalised),
        "achieved": report.achieved,
        "attempts": getattr(report, "attempts", None),
        "groups": len(report.groups),
        "whole": sum(group.kept == group.units for group in report.groups),
        "skipped": dict(Counter(reason_only(why) for why in report.skipped.values()).most_common(3)),
        "frozen": {short(name): short(why) for name, why in list(report.frozen.items())[:5]},
        "unknown": sorted(report.unknown),
        "edits": len(report.plan.edits),
    }
    return report


def reason_only(why: str) -> str:
    """A reason without the numbers that tell groups apart."""
    return short("".join("N" if c.isdigit() else c for c in why).replace("NN", "N").replace("NN", "N"))


def count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def same_values(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same parameters and buffers, bit for bit."""
    ours, theirs = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (model, other))
    return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN to NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


# ------------------------------------------------------------------------------------------------------------- equality


def unseen(dense: nn.Module, small: nn.Module, inputs: Inputs, report: ShrinkReport) -> Check:
    """The engine's own proof, on inputs that planning has not seen."""
    proof = verify(dense, small, inputs, report)
    ok = proof.equal
    why = "" if ok else f"differs by {proof.difference:.1e} of {proof.scale:.1e}"
    return {"ok": ok, "difference": proof.difference, "scale": proof.scale, "inputs": proof.inputs, "why": why}


def plain(dense: nn.Module, small: nn.Module, report: ShrinkReport, inputs: list[Inputs]) -> Check:
    """The pruned model against the dense one with zeros, in float64, without any code of the engine.

    Where statistics run over pruned channels, normalisation modules of the dense model are given the kept channels
    only. Statistics outside such modules cannot be imitated this way; then the outputs are only held to be finite, of
    the same shapes, and others than the dense ones, and `how` says "shapes".
    """
    over = bool(report.proof.normalised)
    with float64():
        dense.double()
        wide = copy.deepcopy(small).double()
        with Precision() as precision:
            unpruned = [run(dense, doubled(one)) for one in inputs]
            zero(dense, report.plan.kept)
            if over:
                narrow_norms(dense, wide, report.plan.kept)
            ours = [run(wide, doubled(one)) for one in inputs]
            theirs = [run(dense, doubled(one)) for one in inputs]
    difference, scale = gap(ours, theirs)
    changed, _ = gap(ours, unpruned)
    tolerance = SINGLE if precision.single else TOLERANCE
    equal = difference <= tolerance * max(1.0, scale)
    finite = all(bool(t.isfinite().all()) for t in flat(ours) if not_minus_infinity(t))
    resized = sum(a.shape != b.shape for a, b in zip(flat(ours), flat(theirs), strict=True))
    result = {"difference": difference, "scale": scale, "inputs": len(inputs), "single": precision.single}
    result |= {"finite": finite, "changed": changed, "outputs": len(flat(ours)), "resized": resized}
    if equal or not over:
        how = "kept channels" if over else "zeros"
        ok = equal and finite and changed > 0
        why = "" if ok else f"differs by {difference:.1e} of {scale:.1e}; finite: {finite}; from dense: {changed:.1e}"
        return result | {"ok": ok, "how": how, "why": why}
    why = f"differs by {difference:.1e} of {scale:.1e}, with statistics outside of modules"
    return result | {"ok": finite and 0 < changed < float("inf"), "how": "shapes", "why": why}


def sliced(dense: nn.Module, small: nn.Module, kept: Any) -> Check:
    """Whether parameters and buffers are those of the dense model, indexed plainly, and nothing else has changed."""
    wrong = []
    for kind in ("parameters", "buffers"):
        before, after = (dict(getattr(m, f"named_{kind}")(remove_duplicate=False)) for m in (dense, small))
        wrong += sorted(before.keys() ^ after.keys())
        dims = {id(tensor): kept[name] for name, tensor in before.items() if name in kept}
        for name in before.keys() & after.keys():
            expected = before[name]
            for dim, indices in dims.get(id(expected), {}).items():
                expected = expected.index_select(dim, torch.from_numpy(indices.copy()))
            if not same(expected, after[name]):
                wrong.append(name)
    named = ", ".join(sorted(wrong)[:3])
    return {"ok": not wrong, "why": short(f"{len(wrong)} others: {named}") if wrong else ""}


def zero(model: nn.Module, kept: Any) -> None:
    """Zero what a plan removes, by plain indexing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            for dim, indices in kept.get(name, {}).items():
                parameter.index_fill_(dim, torch.tensor(gone(parameter.shape[dim], indices)), 0.0)


def gone(size: int, indices: Any) -> list[int]:
    """The other indices."""
    stay = set(indices.tolist())
    return [i for i in range(size) if i not in stay]


def narrow_norms(dense: nn.Module, small: nn.Module, kept: Any) -> None:
    """Let normalisation modules of the dense model see kept channels only: those of the pruned one take their place."""
    for name, module in dense.named_modules():
        is_norm = "norm" in type(module).__name__.lower() and not isinstance(module, nn.modules.batchnorm._NormBase)
        dims = kept.get(f"{name}.weight", {})
        if is_norm and isinstance(getattr(module, "weight", None), Tensor) and set(dims) == {0}:
            size = int(module.weight.shape[0])
            other = small.get_submodule(name)
            module.forward = on_kept(other, torch.from_numpy(dims[0].copy()), size)


def on_kept(small: nn.Module, index: Tensor, size: int) -> Callable[..., Tensor]:
    """A forward that takes the kept channels, gives them to a module, and puts the results in their places."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dim = next(d for d in (x.dim() - 1, 1) if x.shape[d] == size)
        y: Tensor = small(x.index_select(dim, index), *args, **kwargs)
        return torch.zeros_like(x).index_copy(dim, index, y)

    return forward


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Make models that ask for float32 compute in float64: what they name `torch.float32` is another thing here."""
    names = torch.float32, torch.float, Tensor.float
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.float32, torch.float, Tensor.float = names  # type: ignore[method-assign]
        torch.set_default_dtype(default)


class Precision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes in float64 what PyTorch has no kernel for, and notices results in less."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.single = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and look."""
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float64:
            return experts(args[0], args[1], kwargs["offs"] if kwargs and "offs" in kwargs else args[2])
        out = func(*args, **(kwargs or {}))
        found = {t.dtype for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()}
        self.single += bool(found - {torch.float64})
        return out


def experts(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply each run of rows by its own matrix; rows after the last run are zero."""
    parts = [rows[low:high] @ m for low, high, m in zip([0, *ends[:-1].tolist()], ends.tolist(), matrices, strict=True)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - int(ends[-1]), matrices.shape[2])])


def doubled(inputs: Inputs) -> Inputs:
    """Inputs in float64, indices as they are."""
    made: Inputs = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    return made


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The floating outputs of a model."""
    args, kwargs = copy.deepcopy(inputs)
    return outputs(model(*args, **kwargs))


def flat(results: list[list[Tensor]]) -> list[Tensor]:
    """All outputs of all inputs."""
    return [tensor for one in results for tensor in one]


def not_minus_infinity(tensor: Tensor) -> bool:
    """Whether an output is no mask."""
    return not bool((tensor == float("-inf")).any())


def gap(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> tuple[float, float]:
    """Largest difference and largest value; infinite where shapes differ or one is NaN.

    Outputs whose shape pruning may change (hidden states beside logits) are left out.
    """
    worst = scale = 0.0
    compared = 0
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        if a.shape != b.shape:
            continue
        compared += 1
        difference = torch.where(a == b, 0.0, (a - b).abs())
        worst = max(worst, float(difference.nan_to_num(nan=float("inf")).max()))
        scale = max(scale, float(b[b.isfinite()].abs().max()))
    return (worst, scale) if compared else (float("inf"), scale)


# ------------------------------------------------------------------------------------------- ties, optimizer, training


def tied(model: nn.Module) -> list[list[str]]:
    """Groups of names that share one parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


def same_ties(before: list[list[str]], after: list[list[str]]) -> Check:
    """Whether what was shared is shared."""
    if not before:
        return {"ok": None, "count": 0, "why": "nothing is tied"}
    return {"ok": before == after, "count": len(before), "why": "" if before == after else short(f"now {after}")}


def momentum(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor | None:
    """The momentum of a parameter, if it has one."""
    found = optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
    return found if isinstance(found, Tensor) else None


def some_momenta(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of the momentum by name: of all parameters, or as many of the smaller ones as memory is spent on."""
    found: dict[str, Tensor] = {}
    room = MOMENTA
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[1].numel()):
        held = momentum(optimizer, parameter)
        room -= parameter.numel()
        if held is not None and room >= 0:
            found[name] = held.clone()
    return found


def dense_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Inputs) -> Check:
    """One step at learning rate 0, which fills the momentum; buffers are put back."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    tried: list[str] = []
    try:
        for mode in ("train", "eval"):
            try:
                one_step(model, optimizer, inputs, mode)
                return {"ok": True, "mode": mode, "why": "; ".join(tried)}
            except Exception as problem:  # noqa: BLE001 - models that cannot be trained on these inputs are many
                tried.append(f"{mode}: {short(problem)}")
        return {"ok": False, "mode": None, "why": "; ".join(tried)}
    finally:
        model.train()
        model.eval()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Inputs, mode: str) -> None:
    """Forward, backward, step. The loss is the sum of the outputs' mean squares."""
    torch.manual_seed(SEEDS["train"])
    model.train(mode == "train")
    optimizer.zero_grad(set_to_none=True)
    args, kwargs = copy.deepcopy(inputs)
    found = [t for t in outputs(model(*args, **kwargs)) if t.requires_grad]
    loss = torch.stack([t[t.isfinite()].square().mean() for t in found]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Inputs, dense: Check) -> Check:
    """One SGD step of the pruned model, in the mode in which the dense one could make one."""
    if dense["mode"] is None:
        return {"ok": None, "why": "dense cannot: " + dense["why"]}
    steepest = max(
        (float(m.abs().max()) for p in model.parameters() if (m := momentum(optimizer, p)) is not None), default=1.0
    )
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 / max(steepest, 1e-3)
    one_step(model, optimizer, inputs, dense["mode"])
    model.train()
    model.eval()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    shapes = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.shape != p.shape]
    states = [
        n for n, p in model.named_parameters() if (m := momentum(optimizer, p)) is not None and m.shape != p.shape
    ]
    wild = [n for n, g in grads.items() if not bool(g.isfinite().all())]
    wrong = [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]
    optimizer.zero_grad(set_to_none=True)
    bad = {"shape": shapes, "state": states, "gradient not finite": wild, "weight not finite": wrong}
    why = "; ".join(f"{what}: {', '.join(names[:3])}" for what, names in bad.items() if names)
    return {"ok": not why and bool(grads), "mode": dense["mode"], "why": short(why or dense["why"])}


def same_state(model: nn.Module, optimizer: torch.optim.Optimizer, momenta: dict[str, Tensor], kept: Any) -> Check:
    """Whether the momentum of before, indexed plainly, is the momentum of now."""
    if not momenta:
        return {"ok": None, "why": "there was no momentum"}
    wrong = []
    for name, parameter in model.named_parameters():
        if name not in momenta:
            continue
        expected = momenta[name]
        for dim, indices in kept.get(name, {}).items():
            expected = expected.index_select(dim, torch.from_numpy(indices.copy()))
        found = momentum(optimizer, parameter)
        if found is None or found.shape != parameter.shape or not same(found, expected):
            wrong.append(name)
    return {"ok": not wrong, "count": len(momenta), "why": short(", ".join(wrong))}


# --------------------------------------------------------------------------------------------------- files and programs


def saved(model: nn.Module, report: ShrinkReport, case: Case) -> Check:
    """Save the model, trained by one step, and load it into a fresh one: outputs must be equal bit for bit."""
    inputs = case.inputs(SEEDS["save"])
    expected = run(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(folder, model, report)
        fresh = case.build()
        load_pruned(fresh, folder)
    found = run(fresh, inputs)
    equal = len(found) == len(expected) and all(same(a, b) for a, b in zip(found, expected, strict=True))
    return {"ok": equal and same_values(fresh, model), "why": "" if equal else "outputs differ"}


def exported(model: nn.Module, case: Case) -> Check:
    """`torch.export` of the pruned model, its program run on other inputs."""
    return unless_dense_cannot(lambda m: export_one(m, case), model, case)


def export_one(model: nn.Module, case: Case) -> Check:
    """Capture, and run the program on inputs it has not seen."""
    args, kwargs = case.inputs(SEEDS["example"])
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, strict=False).module()
    inputs = case.inputs(SEEDS["unseen"])
    expected, found = run(model, inputs), run(program, inputs)
    difference, scale = gap([found], [expected])
    ok = [t.shape for t in found] == [t.shape for t in expected] and difference <= EXPORT_TOLERANCE * max(1.0, scale)
    return {"ok": ok, "difference": difference, "scale": scale, "why": "" if ok else "the program's outputs differ"}


def to_onnx(model: nn.Module, case: Case) -> Check:
    """ONNX of the pruned model, run by ONNX Runtime."""
    return unless_dense_cannot(lambda m: onnx_one(m, case), model, case)


def onnx_one(model: nn.Module, case: Case) -> Check:
    """Export; `export_model` runs the file and compares, on up to four inputs."""
    args, kwargs = case.inputs(SEEDS["example"])
    with tempfile.TemporaryDirectory() as folder:
        (done,) = export_model(model, args, kwargs, out_dir=folder, formats=["onnx"])
    return {"ok": True, "difference": done.max_difference, "why": short("; ".join(done.notes))}


def unless_dense_cannot(attempt: Callable[[nn.Module], Check], model: nn.Module, case: Case) -> Check:
    """Try something on the pruned model; where it fails, on the dense one, whose failure excuses it."""
    try:
        found = attempt(model)
    except Exception as problem:  # noqa: BLE001 - exporters raise everything
        found = {"ok": False, "why": short(problem)}
    if found["ok"]:
        return found
    try:
        dense = attempt(case.build())
    except Exception as problem:  # noqa: BLE001
        dense = {"ok": False, "why": short(problem)}
    if dense["ok"]:
        return found
    return {"ok": None, "why": short(f"dense cannot: {dense['why']}")}


def preload() -> None:
    """Import what models are made from, once for all processes that are forked from this one."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    declare()
    for zoo in ("torchvision", "timm", "transformers"):
        with contextlib.suppress(ImportError):
            importlib.import_module(zoo)
    torch.export.export(nn.Identity(), (torch.zeros(1),))  # its imports come with the first use
    gc.freeze()


def make(zoo: str, name: str, path: Path, *, onnx: bool) -> None:
    """Make one row.

    Args:
        zoo: Where the model comes from.
        name: What it is called there.
        path: The file for the row.
        onnx: Whether to export to ONNX.
    """
    (case,) = (c for c in cases(zoo) if c.name == name)
    sheet = Sheet(path, case)
    try:
        fill(sheet, case, onnx=onnx)
    except BaseException as problem:
        sheet.row["why"] = sheet.row["why"] or short(problem)
        sheet.write()
        raise
    sheet.stage("done")


if __name__ == "__main__":
    preload()
    make(sys.argv[1], sys.argv[2], Path(sys.argv[3]), onnx="--onnx" in sys.argv)
