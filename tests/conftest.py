"""Makes ``tests/cases.py`` importable as ``cases`` however pytest was started; skips what needs the sparse kernels."""

import sys
from pathlib import Path

import pytest

_TESTS = str(Path(__file__).resolve().parent)
if _TESTS not in sys.path:
    sys.path.append(_TESTS)

_SPARSE = Path("src", "secateur", "sparse")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Examples in docstrings cannot be marked where they are."""
    sparse = [item for item in items if item.path.is_relative_to(config.rootpath / _SPARSE)]
    if not sparse:
        return
    from secateur.sparse import reason

    if reason():
        for item in sparse:
            if item.path.name != "fallback.py":
                item.add_marker(pytest.mark.skip(reason=reason()))
