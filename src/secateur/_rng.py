"""The global random generators, captured and restored."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import CheckpointError


def capture_rng() -> dict[str, Any]:
    """Return the state of every global random generator: PyTorch (CPU, all CUDA devices), NumPy and Python.

    Returns:
        A tree that :func:`save_tree` can hold.
    """
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else None,
        "numpy": _map_arrays(np.random.get_state(legacy=False)),
        "python": random.getstate(),
    }


def _map_arrays(value: Any) -> Any:
    """Turn arrays into tensors, so that a tree can hold NumPy's state."""
    if isinstance(value, dict):
        return {key: _map_arrays(item) for key, item in value.items()}
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _map_tensors(value: Any) -> Any:
    """Turn tensors back into arrays."""
    if isinstance(value, dict):
        return {key: _map_tensors(item) for key, item in value.items()}
    return value.numpy() if isinstance(value, Tensor) else value


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set every global random generator back to a captured state, or none of them.

    Args:
        state: What :func:`capture_rng` returned, perhaps saved and loaded in between.

    Raises:
        CheckpointError: The state is not one, or was captured with other CUDA devices than there are.
    """
    before = capture_rng()
    try:
        if state["cuda"] is not None and len(state["cuda"]) != torch.cuda.device_count():
            raise CheckpointError(
                f"the random state was captured with {len(state['cuda'])} CUDA devices and there are "
                f"{torch.cuda.device_count()}: the run would not continue bit for bit. Use the same machine, "
                "or set state['cuda'] = None to leave CUDA's generators as they are"
            )
        _set_rng(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        _set_rng(before)
        raise CheckpointError(f"not a state of the random generators, see capture_rng: {error!r}") from error


def _set_rng(state: Mapping[str, Any]) -> None:
    """Set the generators, in the order in which a wrong state is most easily seen."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(_map_tensors(state["numpy"]))
    random.setstate(state["python"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state_all(state["cuda"])
