"""Models whose layers run sparse where that was measured to be faster."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurWarning, SparseError, check_whole
from secateur.inputs import split_inputs
from secateur.metrics.latency import measure_latency, torch_threads
from secateur.sparse.chain import Chained
from secateur.sparse.fuse import Fused, activations_behind, fuse, keep_blocked_, keep_feature_major_, take_in_
from secateur.sparse.image_layers import MaxPool2d
from secateur.sparse.images import Convolution
from secateur.sparse.known import PaddedConv2d
from secateur.sparse.layers import SparseLayer
from secateur.sparse.library import engine, reason
from secateur.sparse.plain import replace_
from secateur.sparse.report import CompileReport, LayerReport
from secateur.sparse.tune import Option, Problem, Tuned, Tuner, build, default_cache
from secateur.sparse.watch import LARGEST_DIFFERENCE, answers, copied, difference, inputs_of, weights_used_elsewhere

LEAST_SPARSITY = 0.4
"""Layers with fewer zeros stay dense without being measured: no kernel gains there."""

RUNS = 20


class Compiled(nn.Module):
    """A model whose layers run sparse where that is faster, and what was measured of it.

    For inference alone, on the CPU, in float32. Calls go to the model inside; it can be given to ``torch.compile`` and
    ``torch.export``, saved with :func:`save` and loaded with :func:`load`.

    Attributes:
        model: The model inside.
        report: What was chosen for each layer, and why.
    """

    def __init__(self, model: nn.Module, report: CompileReport, fused: Fused) -> None:
        super().__init__()
        self.model = model
        self.report = report
        self.fused = fused
        self._chained: Chained | None = None  # a tuple: no child, since it shares the model's layers
        self.eval()
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        if torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        return self.chained(*args, **kwargs)

    @property
    def chained(self) -> nn.Module:
        """The model, with layers that follow each other in one call of the library."""
        if self._chained is None or not self._chained.valid(self.model):
            self._chained = Chained.of(self.model)
        return self._chained.model

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_chained": None}

    def train(self, mode: bool = True) -> Compiled:
        """Stay in evaluation mode: packed weights cannot be trained.

        Raises:
            SparseError: When training mode is asked for.
        """
        if mode:
            raise SparseError("a compiled model cannot be trained; train the masked model and compile it again")
        super().train(False)
        return self


def compile(  # as torch.compile
    model: nn.Module,
    example_inputs: Any,
    *,
    threads: int | None = None,
    cache: str | Path | bool = True,
    measure: bool = True,
) -> Compiled:
    """Compile a pruned model for the CPU: batch norms folded, layers with many zeros packed where that is faster.

    Every linear and convolutional layer with at least 40 % zeros is measured with cold caches, as it is and packed in
    several ways, on an input of the size that the example gives it. The fastest wins; what follows it (activation,
    residual sum) is taken into the same call where the kernels know it. Layers that gain nothing stay dense. Then the
    whole is compared with the dense model: its answers, and its time.

    Where the kernels are not installed, linear layers with at least 70 % zeros are tried with torch's own sparse
    matrices, and a warning says so.

    Args:
        model: A model whose pruned weights are zero, in float32 on the CPU; it is left as it is.
        example_inputs: What one forward takes, of the sizes that matter: a tensor, a tuple, a dict, or
            ``(tuple, dict)``. Other sizes work, but were not measured.
        threads: That the model will run with; by default torch's number.
        cache: Remember measurements in ``~/.cache/secateur/sparse.json`` (``True``), in another file, or not at all.
        measure: Compare the whole model's time with the dense one's, and go back to the dense one where it is not
            faster.

    Returns:
        The compiled model; ``print(compiled.report)`` shows what was chosen.

    Raises:
        SparseError: When the model is not in float32 on the CPU, or its answers change by more than rounding.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.mul_(torch.rand(64, 64) > 0.9)
        >>> compiled = compile(model, torch.randn(4, 64), cache=False)
        >>> x = torch.randn(4, 64)
        >>> torch.allclose(compiled(x), model(x), atol=1e-5)
        True
    """
    args, kwargs = split_inputs(example_inputs)
    dense = copy.deepcopy(model).eval()
    _check_model(dense)
    threads = torch.get_num_threads() if threads is None else threads
    check_whole("threads", threads, error=SparseError)
    path = default_cache() if cache is True else Path(cache) if cache else None
    with torch_threads(threads), torch.inference_mode(False), torch.no_grad():
        expected = answers(dense, args, kwargs)
        fused = fuse(copy.deepcopy(dense), args, kwargs)
        tuner = Tuner(threads, path)
        candidates = {n for n, m in fused.model.named_modules() if _candidate(m) or isinstance(m, nn.MaxPool2d)}
        elsewhere = weights_used_elsewhere(fused.model, candidates, args, kwargs)
        inputs = inputs_of(fused.model, candidates - elsewhere, args, kwargs)
        layers = _tune(fused, inputs, args, kwargs, tuner)
        names = {name for name, (_, tuned) in layers.items() if tuned.option.kind != "dense"}
        take_in_(fused, names, args, kwargs)
        for name in names:
            problem, tuned = layers[name]
            replace_(fused.model, name, build(problem, tuned.option, threads))
        pools = _replace_pools_(fused.model, inputs, tuner) if names else []
        tuner.save()
        keep_blocked_(fused.model)
        keep_feature_major_(fused.model, args, kwargs)
        places = {name: place for place, (name, _) in enumerate(fused.model.named_modules())}
        rows = [_row(name, problem, tuned, fused) for name, (problem, tuned) in layers.items()] + pools
        rows.sort(key=lambda row: places[row.name])
        report = CompileReport(
            rows, threads, engine(), fused.traced, fused.folded, left=_left(fused.model, set(layers), elsewhere)
        )
        compiled = Compiled(fused.model, report, fused)
        report.difference = difference(expected, answers(compiled, args, kwargs))
        if not report.difference <= LARGEST_DIFFERENCE:
            raise SparseError(
                f"the compiled model's answers differ from the dense one's by {report.difference:.1e} of the largest, "
                f"more than {LARGEST_DIFFERENCE:.0e}: rounding alone does not explain it. Does the model give the same "
                "answer twice?"
            )
    if measure:
        _measure(compiled, dense, args, kwargs)
    return compiled


def _measure(compiled: Compiled, dense: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    report = compiled.report
    args, kwargs = copied(args, kwargs)  # a model may work on them in place
    found = measure_latency(
        {"dense": dense, "sparse": compiled}, args, kwargs, runs=RUNS, warmup=3, threads=report.threads
    )
    report.dense_ms, report.sparse_ms = found["dense"].median_ms, found["sparse"].median_ms
    if report.sparse_ms > report.dense_ms:
        compiled.model, compiled.fused = dense, Fused(dense, traced=False)
        report.gave_up = True
        warnings.warn(
            f"the compiled model took {report.sparse_ms:.2f} ms and the dense one {report.dense_ms:.2f} ms: the "
            "dense one is returned. Nothing is gained at this sparsity, on this machine, for inputs of this size",
            SecateurWarning,
            stacklevel=3,
        )


def _check_model(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise SparseError(
                f"sparse kernels run float32 models on the CPU, and {name} is {tensor.dtype} on {tensor.device}; "
                "convert the model with model.float().cpu()"
            )


def _tune(
    fused: Fused, inputs: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], tuner: Tuner
) -> dict[str, tuple[Problem, Tuned]]:
    """Measure every layer that has enough zeros, with what would follow it in the same call.

    Depthwise convolutions are measured too, and taken where anything sparse stands beside them.
    """
    possible = {name for name, module in fused.model.named_modules() if name in inputs and _candidate(module)}
    activations = activations_behind(fused, possible, args, kwargs)
    layers = {}
    for name, module in fused.model.named_modules():
        if name not in possible:
            continue
        problem = _problem(module, activations.get(name, "none"), inputs[name])
        if 1 - problem.density < LEAST_SPARSITY and not problem.depthwise:
            layers[name] = (problem, Tuned(Option(), math.nan, math.nan))
        else:
            layers[name] = (problem, tuner.tune(problem))
    if all(problem.depthwise for problem, tuned in layers.values() if tuned.option.kind != "dense"):
        return {name: (problem, replace(tuned, option=Option())) for name, (problem, tuned) in layers.items()}
    return layers


def _replace_pools_(model: nn.Module, inputs: Mapping[str, Tensor], tuner: Tuner) -> list[LayerReport]:
    """Replace maxima over images by those of the kernels, which keep images in blocks, where they are faster."""
    if reason():
        return []
    rows = []
    for name, module in list(model.named_modules()):
        ours = MaxPool2d.of(module) if name in inputs else None
        if ours is None:
            continue
        tuned = tuner.tune_pool(module, ours, inputs[name])
        if tuned.option.kind != "dense":
            replace_(model, name, ours)
        rows.append(
            LayerReport(
                name=name,
                shape=(),
                sparsity=0.0,
                choice=str(tuned.option),
                dense_ms=tuned.dense_ms,
                sparse_ms=tuned.ms,
                dense_bytes=0,
                bytes=0,
                activation="none",
                residual=False,
                cached=tuned.cached,
            )
        )
    return rows


def _left(model: nn.Module, measured: set[str], elsewhere: set[str]) -> dict[str, str]:
    """Return the weights with many zeros that were not measured, and why."""
    found = {}
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".")
        if owner in measured or parameter.dim() < 2 or parameter.numel() == 0:
            continue
        if 1 - float(parameter.count_nonzero()) / parameter.numel() < LEAST_SPARSITY:
            continue
        module = model.get_submodule(owner)
        if owner in elsewhere:
            found[name] = "since the model also computes with it outside of its layer"
        elif own == "weight" and _candidate(module):
            found[name] = "since the example does not reach it"
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            found[name] = f"a convolution in {module.groups} groups"
        elif isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            found[name] = f"padded by {module.padding_mode}"
        elif type(module) is nn.Module:  # tracing puts weights that no layer was called for into such
            found[name] = "since the model computes with it without calling its layer"
        else:
            found[name] = f"a weight of {type(module).__name__}, which the kernels do not run"
    return found


def _candidate(module: nn.Module) -> bool:
    if type(module) in (nn.Conv2d, PaddedConv2d):
        assert isinstance(module, nn.Conv2d)
        depthwise = module.groups == module.in_channels and not reason()
        return (module.groups == 1 or depthwise) and module.padding_mode == "zeros"
    return type(module) is nn.Linear


def _problem(module: nn.Module, activation: str, x: Tensor) -> Problem:
    assert isinstance(module, nn.Linear | nn.Conv2d)
    bias = None if module.bias is None else module.bias.detach()
    if isinstance(module, nn.Linear):
        return Problem(module.weight.detach(), bias, activation, None, x)
    kernel, stride, dilation = (tuple(int(n) for n in v) for v in (module.kernel_size, module.stride, module.dilation))
    if isinstance(module, PaddedConv2d):
        padding = module.pads
    elif isinstance(module.padding, str):
        whole = [d * (k - 1) if module.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        top, left = whole[0] // 2, whole[1] // 2
        padding = (top, left, whole[0] - top, whole[1] - left)
    else:
        padding = (int(module.padding[0]), int(module.padding[1]), int(module.padding[0]), int(module.padding[1]))
    convolution = Convolution((kernel[0], kernel[1]), (stride[0], stride[1]), padding, (dilation[0], dilation[1]))
    return Problem(module.weight.detach(), bias, activation, convolution, x if x.dim() == 4 else x.unsqueeze(0))


def _row(name: str, problem: Problem, tuned: Tuned, fused: Fused) -> LayerReport:
    module = fused.model.get_submodule(name)
    return LayerReport(
        name=name,
        shape=tuple(problem.weight.shape),
        sparsity=1 - problem.density,
        choice=str(tuned.option),
        dense_ms=tuned.dense_ms,
        sparse_ms=tuned.ms,
        dense_bytes=problem.weight.numel() * 4,
        bytes=module.nbytes if isinstance(module, SparseLayer) else problem.weight.numel() * 4,
        activation=fused.activations.get(name, "none"),
        residual=name in fused.residuals,
        cached=tuned.cached,
    )
