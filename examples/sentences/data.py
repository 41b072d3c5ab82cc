"""Real text without a download: news sentences to calibrate on and two word-similarity tests, from gensim's package.

``pip install --no-deps gensim`` (LGPL-2.1) brings the files, which are read where the package puts them and not shipped
here; gensim itself is never imported. The splits:

* ``calibration``: the sentences of 250 of the 300 news documents of ``lee_background.cor``, and single words and short
  spans from them; all that scores, repairs and distillation may see. No word of a test is among the single words.
* ``held_out``: the same of 25 more, for choices between settings; its words occur in no calibration document.
* ``agreement``: the same of the last 25, for comparison with the dense model only.
* the tests: WordSim-353 and SimLex-999, pairs of words with the mean judgement of people on how alike they are.
"""

from __future__ import annotations

import importlib.util
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.errors import DataError

SPLITS = {"held_out": 25, "agreement": 25}
"""Documents in each split; calibration has the others."""
SPANS_PER_DOCUMENT = 8
_FILES = {"text": "lee_background.cor", "wordsim353": "wordsim353.tsv", "simlex999": "simlex999.txt"}
_END = re.compile(r"(?<=[.!?])[\"']?\s+(?=[\"'A-Z])")


@dataclass(frozen=True)
class Texts:
    """One split.

    Attributes:
        sentences: Whole sentences, in the order of the documents.
        document: For each sentence, the number of its document.
        spans: Two to eight words in a row.
        words: Single words, each once.
    """

    sentences: tuple[str, ...]
    document: tuple[int, ...]
    spans: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Pairs:
    """A word-similarity test: two words each, and what people think."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    human: tuple[float, ...]


def folder() -> Path:
    """Return where gensim's package keeps its test data, without importing it.

    Raises:
        DataError: When the package is not installed.
    """
    spec = importlib.util.find_spec("gensim")
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise DataError("gensim is not installed; pip install --no-deps gensim, or name a folder with its test data")
    return Path(places[0]) / "test" / "test_data"


def _read(where: Path, name: str) -> list[str]:
    path = where / _FILES[name]
    if not path.is_file():
        raise DataError(f"{path} does not exist; the folder test/test_data of gensim's package has it")
    return path.read_text(encoding="utf-8").splitlines()


def load_pairs(name: str, where: Path) -> Pairs:
    """Read a test: tab-separated, the two words first.

    Args:
        name: ``wordsim353`` or ``simlex999``.
        where: The folder with gensim's test data.

    Returns:
        The pairs, in the file's order.
    """
    rows = [line.split("\t") for line in _read(where, name) if line and not line.startswith("#")]
    return Pairs(tuple(r[0] for r in rows), tuple(r[1] for r in rows), tuple(float(r[2]) for r in rows))


def load_texts(where: Path, *, without: frozenset[str] = frozenset(), seed: int = 0) -> dict[str, Texts]:
    """Split the documents, and these into sentences, spans and words.

    Args:
        where: The folder with gensim's test data.
        without: Words that are not given singly, in lower case: those of the tests.
        seed: Of the split and of the spans.

    Returns:
        Split by name.
    """
    documents = [line for line in _read(where, "text") if line.strip()]
    chance = random.Random(seed)
    order = list(range(len(documents)))
    chance.shuffle(order)
    chosen: dict[str, list[int]] = {}
    for name, count in SPLITS.items():
        chosen[name], order = sorted(order[:count]), order[count:]
    chosen = {"calibration": sorted(order), **chosen}
    known = _words([documents[i] for i in chosen["calibration"]])
    out = {}
    for name, numbers in chosen.items():
        words = _words([documents[i] for i in numbers]) - without - (set() if name == "calibration" else known)
        sentences = [(s.strip(), i) for i in numbers for s in _END.split(documents[i]) if len(s.split()) > 3]
        spans = [_span(documents[i].split(), chance) for i in numbers for _ in range(SPANS_PER_DOCUMENT)]
        out[name] = Texts(
            tuple(s for s, _ in sentences), tuple(i for _, i in sentences), tuple(spans), tuple(sorted(words))
        )
    return out


def _words(documents: list[str]) -> set[str]:
    return {w for text in documents for w in re.findall(r"[a-z]{3,}", text.lower())}


def _span(words: list[str], chance: random.Random) -> str:
    length = chance.randint(2, 8)
    start = chance.randrange(max(len(words) - length, 1))
    return " ".join(words[start : start + length])


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the rank correlation: Pearson's of the ranks, tied values sharing the mean of theirs."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    mean: NDArray[np.float64] = (last - (count - 1) / 2)[place]
    return mean
