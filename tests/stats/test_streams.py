"""How far blocks turn their stream, where PyTorch would take a shortcut."""

import pytest
import torch
from torch import nn

from secateur.stats.streams import collect_turns


def test_padded_sequences_keep_their_shape() -> None:
    """In evaluation mode PyTorch packs padded sequences into nested tensors, which have no shape to compare."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    x = torch.randn(3, 5, 8)
    got = collect_turns(encoder, ["layers.0", "layers.1"], lambda m, b: m(b, src_key_padding_mask=padding), [x])
    encoder.eval()
    for layer, turn in zip(encoder.layers, got.tolist(), strict=True):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            after = layer(x, src_key_padding_mask=padding).detach()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        cosines = torch.nn.functional.cosine_similarity(x.double(), after.double(), dim=-1)
        assert turn == pytest.approx(float(1 - cosines.mean()), abs=1e-6)
        x = after
