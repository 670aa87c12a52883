"""Static-shape batches of sentence pairs with a budget of tokens: long sentences come in small batches.

Two plans say which pairs share a batch. `buckets` sorts them into a few shapes and fills each batch; `published` is the
batching of "Compressed Transformers" (section 1.1, the rules of torchtext 0.6), whose batches are padded to these shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import numpy as np

from qtx.data.batching import Plan, PlannedBatches, cheapest_chain, padded, plan_epoch, positions, require_positive
from qtx.data.pair_tokenizer import PAD, EncodedPairs
from qtx.errors import UserError, near_misses

PLANS = ("buckets", "published")
Shape = tuple[int, int]
_CANDIDATES = 32  # lengths of each side that shapes are chosen from, at most; the time grows with the fourth power


def bucket_shapes(encoded: EncodedPairs, count: int = 6, multiple: int = 4) -> tuple[Shape, ...]:
    """Chooses the shapes that batches are padded to, so that the padded tokens of both sides are the fewest.

    Args:
      encoded: the pairs.
      count: how many shapes, and so compiled programs, at most.
      multiple: lengths are multiples of it; it is doubled until no side has more than 32 lengths to choose from.

    Returns:
      (S, T) of every bucket, source and decoder lengths, neither smaller than in the bucket before; the last holds every
      pair. A target of n tokens, markers counted, has n - 1 decoder positions.

    Raises:
      UserError: a bad argument, or no pairs.
    """
    require_positive(count=count, multiple=multiple)
    if not len(encoded):
        raise UserError("there are no pairs to choose shapes for")
    sides = []
    for lengths in (encoded.source.lengths, decoder_lengths(encoded)):
        step = multiple
        while len(ceilings := np.unique(-(-np.maximum(lengths, 1) // step) * step)) > _CANDIDATES:
            step *= 2
        sides.append((ceilings, np.searchsorted(ceilings, lengths)))
    (sources, source_of), (targets, target_of) = sides
    pairs = np.zeros((len(sources), len(targets)), np.int64)
    np.add.at(pairs, (source_of, target_of), 1)
    held = pairs.cumsum(0).cumsum(1).ravel()
    sizes = np.stack(np.meshgrid(sources, targets, indexing="ij"), -1).reshape(-1, 2)
    return tuple((int(sizes[i, 0]), int(sizes[i, 1])) for i in cheapest_chain(sizes, held, sizes.sum(1), count))


def decoder_lengths(encoded: EncodedPairs) -> np.ndarray:
    """[N]: decoder positions per pair, its target tokens and one marker."""
    return encoded.target.lengths - 1


def shifted(target_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the decoder's input and the labels of target rows (section 1.2).

    Args:
      target_ids: [B, T + 1] from `<s>` to `</s>`, then padding.

    Returns:
      [B, T] without the last column, and [B, T] without the first.
    """
    return target_ids[:, :-1], target_ids[:, 1:]


@dataclasses.dataclass(frozen=True, eq=False)
class PairBatches(PlannedBatches):
    """All batches of a run of a translation task, by global step.

    A batch is a dict of numpy arrays with (S, T) one of `shapes` and a fixed number of rows B for each: `source_ids`
    [B, S]; `target_ids` [B, T], which begin with `<s>`, the decoder's input; `labels` [B, T], the same shifted by one,
    which end with `</s>`; `weights` [B] float32, 0 in filler rows; `index` [B], the pair's number, -1 in filler rows. All
    but the weights are int32. Filler rows are all padding.

    With the plan `buckets` a batch has `token_budget // max(S, T)` rows, and every epoch holds every pair once. With
    `published` the budget counts as published, rows are as many as a batch of that shape can have, and epochs differ by a
    few batches: steps go through them one after the other, and `batches_per_epoch` counts those of the first.

    Attributes:
      encoded: the pairs.
      token_budget: tokens of the longer side, padding counted, in a batch over all hosts together.
      shapes: from `bucket_shapes`; the last must hold every pair.
      seed: of the shuffle.
      shuffle: a new order every epoch; otherwise always the same, the shortest pairs first.
      epochs: how many; None for no end.
      plan: one of `PLANS`.
      rows_multiple: the rows of every batch are a multiple of it, such as the number of devices.
      shard_index: which host this is.
      shard_count: how many hosts; each reads its own contiguous rows of every batch.

    Raises:
      UserError: a bad argument, or a budget that does not hold the longest pair.
    """

    encoded: EncodedPairs
    token_budget: int
    shapes: tuple[Shape, ...]
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None
    plan: str = "buckets"
    rows_multiple: int = 1
    shard_index: int = 0
    shard_count: int = 1

    def __post_init__(self) -> None:
        require_positive(rows_multiple=self.rows_multiple)
        self._check_run()
        if self.plan not in PLANS:
            raise UserError(f"unknown plan {self.plan!r}{near_misses(self.plan, PLANS)}")
        if not len(self.encoded):
            raise UserError("there are no pairs to make batches of")
        steps = zip(self.shapes, self.shapes[1:], strict=False)
        grow = all(a != b and a[0] <= b[0] and a[1] <= b[1] for a, b in steps)
        if not self.shapes or min(self.shapes[0]) < 1 or not grow:
            raise UserError(f"shapes must be growing pairs of positive lengths, got {self.shapes}; see bucket_shapes")
        longest = int(self.encoded.source.lengths.max()), int(decoder_lengths(self.encoded).max())
        if longest[0] > self.shapes[-1][0] or longest[1] > self.shapes[-1][1]:
            raise UserError(f"the longest pair has {longest} tokens, more than the last shape's {self.shapes[-1]}")
        if self.plan == "published":
            least, what = int(_costs(self.encoded).max()), "the longest pair"
        else:
            (source, target), many = self.shapes[-1], self._multiple
            devices = "" if many == 1 else f" for each of {many} devices"
            least, what = max(source, target) * many, f"a pair of {source} source and {target} target tokens{devices}"
        if self.token_budget < least:
            raise UserError(
                f"a batch of {self.token_budget} tokens (phases.*.batch_size) does not hold {what}; use at least {least}"
            )

    @property
    def _multiple(self) -> int:
        return math.lcm(self.rows_multiple, self.shard_count)

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        """Rows of a batch of every shape, over all hosts together."""
        if self.plan == "buckets":
            counts = [self.token_budget // max(shape) for shape in self.shapes]
            return tuple(count // self._multiple * self._multiple for count in counts)
        # A batch has a pair that the shape before does not hold, and n rows cost at least as much as the n cheapest pairs.
        costs = np.sort(_costs(self.encoded))
        least = [1, *(min(source + 1, decoder + 2) for source, decoder in self.shapes[:-1])]
        possible = np.arange(1, len(costs) + 1) * np.maximum(costs, np.array(least)[:, None]) <= self.token_budget
        return tuple(-(-int(count) // self._multiple) * self._multiple for count in possible.sum(1))

    @property
    def batch_size(self) -> int:
        """The largest number that divides the rows of all batches: what parts of equal size must divide."""
        return math.gcd(*self.rows)

    @functools.cached_property
    def bucket_of(self) -> np.ndarray:
        """[N]: the number of the first shape that holds each pair."""
        sources, decoders = np.array(self.shapes).T
        longer = (
            np.searchsorted(sources, self.encoded.source.lengths),
            np.searchsorted(decoders, decoder_lengths(self.encoded)),
        )
        return np.maximum(*longer)

    @functools.cached_property
    def batches_per_epoch(self) -> int:
        """The number of batches of the first epoch, and with the plan `buckets` of every one."""
        if self.plan == "published":
            return len(self._published_epoch(0))
        return int(np.sum(-(-np.bincount(self.bucket_of, minlength=len(self.rows)) // np.array(self.rows))))

    @functools.cached_property
    def padding_share(self) -> float:
        """The share of padding among the tokens of both sides in the first epoch, filler rows counted."""
        rows, buckets = self._plan(0)
        area = sum(self.rows[bucket] * sum(self.shapes[bucket]) for bucket in buckets)
        members = rows[rows >= 0]
        real = self.encoded.source.lengths[members].sum() + decoder_lengths(self.encoded)[members].sum()
        return float(1 - real / area)

    def _make_plan(self, epoch: int) -> Plan:
        if self.plan == "buckets":
            return plan_epoch(self.bucket_of, self.rows, self.seed, epoch, self.shuffle)
        batches = self._published_batches(epoch * self.batches_per_epoch, self.batches_per_epoch)
        rows = np.full((len(batches), max(self.rows)), -1)
        for row, batch in zip(rows, batches, strict=True):
            row[: len(batch)] = batch
        return rows, np.array([self.bucket_of[batch].max() for batch in batches])

    def _published_batches(self, first: int, count: int) -> list[np.ndarray]:
        """Returns batches of the published epochs in a row; where each epoch starts is kept, as it takes all before."""
        starts: tuple[int, ...] = vars(self).get("_published_starts", (0,))
        epoch = max(int(np.searchsorted(starts, first, side="right")) - 1, 0)
        found: list[np.ndarray] = []
        while len(found) < count:
            batches = self._published_epoch(epoch)
            start = starts[epoch]
            if epoch + 1 == len(starts):
                starts = vars(self)["_published_starts"] = (*starts, start + len(batches))
            found += batches[max(first - start, 0) :]
            epoch += 1
        return found[:count]

    def _published_epoch(self, epoch: int) -> list[np.ndarray]:
        targets = self.encoded.target.lengths - 2
        options = (self.seed, epoch) if self.shuffle else None
        return published_epoch(self.encoded.source.lengths, targets, self.token_budget, options)

    def _rows(self, bucket: int) -> int:
        return self.rows[bucket]

    def _assemble(self, index: np.ndarray, bucket: int) -> dict[str, np.ndarray]:
        (source, target), (source_length, decoder_length) = (
            (self.encoded.source, self.encoded.target),
            self.shapes[bucket],
        )
        rows = padded(target.ids, positions(target.offsets, index, decoder_length + 1), PAD)
        target_ids, labels = shifted(rows)
        return {
            "source_ids": padded(source.ids, positions(source.offsets, index, source_length), PAD),
            "target_ids": np.ascontiguousarray(target_ids),
            "labels": np.ascontiguousarray(labels),
            "weights": (index >= 0).astype(np.float32),
            "index": index.astype(np.int32),
        }


# ------------------------------------------------------------------------------------------------ as published


def interleaved_key(source_lengths: np.ndarray, target_lengths: np.ndarray) -> np.ndarray:
    """Returns the published sort key: the 16 bits of both lengths in turn, source first, so that 5 and 3 give 39.

    Args:
      source_lengths: [N] tokens, from 0 to 65,535.
      target_lengths: [N] the same.

    Returns:
      [N] int64.
    """
    bits = np.arange(16)
    source, target = (np.asarray(side, np.int64)[:, None] >> bits & 1 for side in (source_lengths, target_lengths))
    return ((source << 2 * bits + 1) | (target << 2 * bits)).sum(1)


def token_batches(
    order: Iterable[int], source_lengths: np.ndarray, target_lengths: np.ndarray, budget: int
) -> list[np.ndarray]:
    """Cuts a sequence of examples where the next one would exceed the budget.

    A batch costs its number of examples times the longest source, or the longest target with its two markers, whichever is
    longer.

    Args:
      order: example numbers.
      source_lengths: [N] tokens of every example.
      target_lengths: [N] tokens, without markers.
      budget: the most that a batch may cost; an example that exceeds it alone is a batch of its own.

    Returns:
      Example numbers per batch.
    """
    costs = np.maximum(source_lengths, np.asarray(target_lengths) + 2).tolist()
    batches: list[np.ndarray] = []
    members: list[int] = []
    longest = 0
    for example in order:
        longest = max(longest, costs[example])
        if members and (len(members) + 1) * longest > budget:
            batches.append(np.array(members))
            members, longest = [], costs[example]
        members.append(int(example))
    return [*batches, np.array(members)] if members else batches


def training_pools(
    order: np.ndarray, source_lengths: np.ndarray, target_lengths: np.ndarray, budget: int, pool_factor: int = 100
) -> list[list[np.ndarray]]:
    """Returns the batches of training, pool by pool, before they are shuffled within their pool.

    Args:
      order: [N] the shuffled example numbers.
      source_lengths: [N] tokens of every example.
      target_lengths: [N] tokens, without markers.
      budget: of a batch.
      pool_factor: the budget of a pool is so many times as large.

    Returns:
      Example numbers per pool and batch; a pool is sorted by the key before it is cut, a batch has the largest key first.
    """
    keys = interleaved_key(source_lengths, target_lengths)
    pools = []
    for pool in token_batches(order, source_lengths, target_lengths, budget * pool_factor):
        pool = pool[np.argsort(keys[pool], kind="stable")]
        batches = token_batches(pool, source_lengths, target_lengths, budget)
        pools.append([batch[np.argsort(-keys[batch], kind="stable")] for batch in batches])
    return pools


def evaluation_batches(source_lengths: np.ndarray, target_lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Returns the batches of evaluation: all examples sorted by the key, cut, each batch reversed."""
    order = np.argsort(interleaved_key(source_lengths, target_lengths), kind="stable")
    return [batch[::-1] for batch in token_batches(order, source_lengths, target_lengths, budget)]


def published_epoch(
    source_lengths: np.ndarray, target_lengths: np.ndarray, budget: int, shuffle: tuple[int, int] | None
) -> list[np.ndarray]:
    """Returns the example numbers of every batch of an epoch as published (section 1.1).

    Args:
      source_lengths: [N] tokens of every example.
      target_lengths: [N] tokens, without markers.
      budget: of a batch.
      shuffle: the seed and the epoch of the shuffles of training; None for the batches of evaluation.
    """
    if shuffle is None:
        return evaluation_batches(source_lengths, target_lengths, budget)
    rng = np.random.default_rng(shuffle)
    pools = training_pools(rng.permutation(len(source_lengths)), source_lengths, target_lengths, budget)
    return [pool[i] for pool in pools for i in rng.permutation(len(pool))]


def _costs(encoded: EncodedPairs) -> np.ndarray:
    return np.maximum(encoded.source.lengths, encoded.target.lengths)
