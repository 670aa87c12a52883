"""The edges of text graphs as sparse matrices: windows of words, words of documents, neighbours of documents.

Tokens of D documents are stored end to end: `tokens` [T] word ids, `offsets` [D + 1].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

Track = Callable[[Sequence[Any], str], Iterable[Any]]  # yields the items, and may show how far it is

_POSITIONS = 500_000  # tokens that windows are counted for at a time: 10 million pairs of words
_ROWS = 256  # documents whose similarities to all others are in memory at a time
_FEATURE = re.compile(r"\b\w\w+\b")


def untracked(items: Sequence[Any], description: str) -> Iterable[Any]:
    """Yields the items and shows nothing."""
    del description
    return items


class Windows(NamedTuple):
    """What `count_windows` counts.

    Attributes:
      total: windows in all documents.
      words: [V] int64, windows that each word occurs in.
      pairs: [V, V] int64, above the diagonal: pairs of positions in a window that hold the two words, over all windows.
    """

    total: int
    words: np.ndarray
    pairs: sp.csr_matrix


def count_windows(
    tokens: np.ndarray, offsets: np.ndarray, vocabulary_size: int, window: int, track: Track = untracked
) -> Windows:
    """Counts words and pairs of words in windows of consecutive words, one starting at each word of a document.

    A document of at most `window` words is one window. Repeated words count several times in pairs, as published.

    No window is made: of two positions i < j of a document with L words, `min(i, S) - max(0, j - window + 1) + 1` windows
    hold both, where S = max(L - window, 0) is the last start. So each position meets `window - 1` others, once.

    Args:
      tokens: [T] word ids.
      offsets: [D + 1] where documents begin; empty documents have no window.
      vocabulary_size: V.
      window: words in a window.
      track: shows the progress.
    """
    lengths = np.diff(offsets)
    total = int(np.sum((np.maximum(lengths - window, 0) + 1)[lengths > 0]))
    words = np.zeros(vocabulary_size, np.int64)
    pairs = sp.csr_matrix((vocabulary_size, vocabulary_size), dtype=np.int64)
    borders = np.unique(np.searchsorted(offsets, np.arange(0, len(tokens), _POSITIONS)).tolist() + [len(lengths)])
    chunks = list(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True))
    for first, last in track(chunks, "windows"):
        chunk = tokens[offsets[first] : offsets[last]]
        length = np.repeat(lengths[first:last], lengths[first:last])
        position = np.arange(len(chunk)) - np.repeat(offsets[first:last] - offsets[first], lengths[first:last])
        last_start = np.maximum(length - window, 0)
        words += _windows_of_words(chunk, position, last_start, vocabulary_size, window)
        pairs = pairs + _pairs(chunk, position, length, last_start, vocabulary_size, window)
    return Windows(total, words, pairs)


def _windows_of_words(
    tokens: np.ndarray, position: np.ndarray, last_start: np.ndarray, vocabulary_size: int, window: int
) -> np.ndarray:
    """[V]: every occurrence counts the windows that hold it and not the occurrence before it in the document."""
    document = np.cumsum(position == 0)
    order = np.lexsort((position, tokens, document))
    newest = np.minimum(position, last_start)[order]
    oldest = np.maximum(position - window + 1, 0)[order]
    repeated = (np.diff(tokens[order]) == 0) & (np.diff(document[order]) == 0)
    oldest[1:][repeated] = np.maximum(oldest[1:], newest[:-1] + 1)[repeated]
    count = np.maximum(newest - oldest + 1, 0)
    # Sums below 2^53 are exact in the float64 of bincount.
    return np.bincount(tokens[order], count, vocabulary_size).astype(np.int64)


def _pairs(
    tokens: np.ndarray,
    position: np.ndarray,
    length: np.ndarray,
    last_start: np.ndarray,
    vocabulary_size: int,
    window: int,
) -> sp.csr_matrix:
    """[V, V] above the diagonal: B^T B for the windows B of these documents, without B."""
    ahead = np.arange(1, window)
    other = position[:, None] + ahead
    inside = other < length[:, None]
    shared = np.minimum(position, last_start)[:, None] - np.maximum(other - window + 1, 0) + 1
    columns = tokens[np.minimum(np.arange(len(tokens))[:, None] + ahead, len(tokens) - 1)]
    starts = np.concatenate([[0], np.cumsum(inside.sum(1))])
    following = sp.csr_matrix((shared[inside], columns[inside], starts), (len(tokens), vocabulary_size))
    here = sp.csr_matrix(
        (np.ones(len(tokens), np.int64), tokens, np.arange(len(tokens) + 1)), (len(tokens), vocabulary_size)
    )
    ordered = here.T.tocsr() @ following
    return (sp.triu(ordered, 1, format="csr") + sp.tril(ordered, -1).T.tocsr()).tocsr()


def word_word(windows: Windows) -> sp.csr_matrix:
    """Returns [V, V] float64 pointwise mutual information of words in windows, where it is positive; symmetric."""
    pairs, n = windows.pairs.tocoo(), windows.total
    seen = windows.words.astype(np.float64)
    information = np.log((pairs.data / n) / (seen[pairs.row] * seen[pairs.col] / (n * n)))
    keep = information > 0
    upper = sp.csr_matrix((information[keep], (pairs.row[keep], pairs.col[keep])), pairs.shape)
    return (upper + upper.T).tocsr()


def inverse_document_frequency(counts: sp.csr_matrix) -> np.ndarray:
    """Returns [V] ln(D / documents with the word) for counts [D, V]; 0 for a word of no document."""
    found = np.bincount(counts.indices, minlength=counts.shape[1])
    return np.log(counts.shape[0] / np.where(found, found, counts.shape[0]))


def features_of_words(vocabulary: Sequence[str]) -> sp.csr_matrix:
    r"""Returns [V, F] how often each feature, a run of at least two word characters (`\b\w\w+\b`), occurs in each word.

    Counts of words [D, V] times this are counts of features: no feature crosses a blank. Single letters and punctuation
    vanish, and a word with an apostrophe falls in two, as scikit-learn's vectorizers have it.
    """
    found = [_FEATURE.findall(word.lower()) for word in vocabulary]
    number = {feature: i for i, feature in enumerate(sorted({feature for word in found for feature in word}))}
    columns = [number[feature] for word in found for feature in word]
    starts = np.concatenate([[0], np.cumsum([len(word) for word in found])])
    return sp.csr_matrix((np.ones(len(columns), np.int64), columns, starts), (len(vocabulary), len(number)))


def directions(features: sp.csr_matrix, weights: np.ndarray) -> sp.csr_matrix:
    """Returns counts [M, F] weighted by feature [F], as rows of length 1; rows of zeros stay."""
    weighted = sp.csr_matrix(features.multiply(weights))
    norm = np.sqrt(weighted.multiply(weighted).sum(1).A1)
    return sp.csr_matrix(sp.diags(1 / np.where(norm, norm, 1)) @ weighted)


def nearest(
    queries: sp.csr_matrix, documents: sp.csr_matrix, count: int, same: bool, track: Track = untracked
) -> sp.csr_matrix:
    """Returns [M, D] cosine similarities of each query to its nearest documents, where they are positive.

    Args:
      queries: [M, F] rows of length 1, or of zeros.
      documents: [D, F] likewise.
      count: neighbours of each query at most; of equally near ones, those that come first.
      same: the queries are the documents, and no document is its own neighbour.
      track: shows the progress.
    """
    across = documents.T.tocsr()
    # The largest value of each of at least `count` stretches of a row: `count` values are no smaller than the last of these
    # by size, so most of a row needs no look.
    stretches = np.unique(np.linspace(0, documents.shape[0], 8 * count, endpoint=False).astype(int))
    found = []
    for start in track(range(0, queries.shape[0], _ROWS), "neighbours"):
        block = (queries[start : start + _ROWS] @ across).toarray()
        if same:
            block[np.arange(len(block)), start + np.arange(len(block))] = 0
        largest = np.maximum.reduceat(block, stretches, axis=1)
        enough = np.partition(largest, -count, axis=1)[:, [-count]]
        row, column = np.nonzero((block >= enough) & (block > 0))
        value = block[row, column]
        order = np.lexsort((column, -value, row))
        first = np.searchsorted(row, np.arange(len(block)))
        kept = order[np.arange(len(row)) - first[row] < count]
        found.append((start + row[kept], column[kept], value[kept]))
    rows, columns, values = map(np.concatenate, zip(*found, strict=True)) if found else ([], [], [])
    return sp.csr_matrix((values, (rows, columns)), (queries.shape[0], documents.shape[0]))


def symmetrised(raw: sp.csr_matrix) -> sp.csr_matrix:
    """Returns the larger of each two opposite edges in both directions: max(A, A^T)."""
    return sp.csr_matrix(raw.maximum(raw.T.tocsr()))


def normalised(raw: sp.csr_matrix) -> sp.csr_matrix:
    """Returns D^-1/2 (max(A, A^T) + I) D^-1/2, where D is the row sum (Kipf and Welling 2017)."""
    found = sp.csr_matrix(symmetrised(raw) + sp.identity(raw.shape[0], format="csr"))
    degrees = np.asarray(found.sum(1)).ravel()
    scale = np.divide(1, np.sqrt(degrees), out=np.zeros(len(degrees)), where=degrees > 0)
    found.data *= np.repeat(scale, np.diff(found.indptr))
    found.data *= scale[found.indices]
    return found
