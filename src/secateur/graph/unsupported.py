"""Models that cannot be cut, and what to do instead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.errors import GraphError
from secateur.graph.changes import class_name


def refuse_unsupported(model: nn.Module) -> None:
    """Refuse what cannot be sliced.

    Raises:
        GraphError: For wrapped, compiled, quantised, sharded or exported models; says what to do.
    """
    kind = type(model)
    name = class_name(model)
    if not isinstance(model, nn.Module):
        raise GraphError(f"expected a torch.nn.Module, got {kind.__name__}")
    if kind.__name__ in {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}:
        raise GraphError(f"the model is wrapped in {kind.__name__}: prune model.module first, then wrap it")
    if name == "torch._dynamo.eval_frame.OptimizedModule":
        raise GraphError("the model is compiled: prune model._orig_mod first, then compile it")
    if isinstance(model, torch.jit.ScriptModule):
        raise GraphError("the model is a ScriptModule, whose sizes are baked in: prune the nn.Module it was made from")
    if isinstance(model, torch.fx.GraphModule) and "export" in name:
        raise GraphError("the model is an exported program: prune the nn.Module it was made from")
    for path, module in model.named_modules():
        _refuse_module(path or "the model", module)
    for path, parameter in model.named_parameters():
        _refuse_parameter(path, parameter)


def _refuse_module(path: str, module: nn.Module) -> None:
    where = type(module).__module__
    if ".quantized" in where or ".ao.nn" in where or "torchao" in where or "bitsandbytes" in where:
        raise GraphError(f"{path} is a quantised {type(module).__name__}: prune first, then quantise")
    if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
        raise GraphError(f"{path} is sharded (FSDP): prune first, then shard")


def _refuse_parameter(path: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise GraphError(f"{path} has no shape yet (a lazy module): run one forward first")
    if type(parameter.data) is not Tensor and not isinstance(parameter.data, torch._subclasses.FakeTensor):
        raise GraphError(f"{path} is a {type(parameter.data).__name__}: prune before sharding or quantising")
    if parameter.is_quantized or not (parameter.is_floating_point() or parameter.is_complex()):
        raise GraphError(f"{path} has dtype {parameter.dtype}: prune the floating-point model, then quantise")
