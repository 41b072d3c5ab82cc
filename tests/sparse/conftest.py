"""What the tests of whole compiled models share."""

import pytest

from secateur.sparse.tune import Option, Problem, Tuned, Tuner, options


@pytest.fixture
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose the first sparse option everywhere: which layer is faster depends on the machine."""

    def choose(self: Tuner, problem: Problem) -> Tuned:
        return Tuned(next(iter(options(problem))), 2.0, 1.0)

    monkeypatch.setattr(Tuner, "tune", choose)
    monkeypatch.setattr(Tuner, "tune_pool", lambda *_: Tuned(Option("kernel"), 2.0, 1.0))
