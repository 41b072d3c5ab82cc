"""A forward that changes what its modules hold leaves no trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.graph.state import preserved


class Restless(nn.Module):
    """Moves some of its buffers, by value, by a fused kernel and by replacing them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("still", torch.arange(5.0))
        self.register_buffer("moved", torch.arange(3.0))
        self.register_buffer("large", torch.zeros(200, 200))
        self.register_buffer("odd", torch.tensor([float("nan"), 1.0]))
        self.register_buffer("swapped", torch.ones(2))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.moved += 1
        self.large[3, 4] = 7
        self.odd[1] = 2
        self.swapped = torch.zeros(9)
        self.seen.append(1)
        return self.norm(x)  # type: ignore[no-any-return]


def test_every_buffer_is_put_back_by_value() -> None:
    torch.manual_seed(0)
    model = Restless().train()
    before = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    with preserved(model), torch.no_grad():
        model(torch.randn(8, 4))
        assert not torch.equal(model.norm.running_mean, before["norm.running_mean"][1])
    for name, buffer in model.named_buffers():
        assert id(buffer) == before[name][0], name
        assert torch.equal(buffer.nan_to_num(5.0), before[name][1].nan_to_num(5.0)), name
    assert model.seen == []
