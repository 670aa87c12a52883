"""Static-shape batches: examples of similar length share a batch, so that few shapes are compiled and little is padded.

An epoch's plan is a pure function of the seed and the epoch, and a batch one of its global step, so a saved step number
is all it takes to resume. Reading ahead and the saved position are grain's.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence

import grain
import numpy as np

from qtx.data.tokenize import Encoded
from qtx.errors import UserError, near_misses

PADDINGS = ("bucket", "max")
Plan = tuple[np.ndarray, np.ndarray]  # [batches, rows] example numbers, -1 in filler rows; [batches] bucket numbers
_ENDLESS = 2**48  # epochs have no end, but a grain source has a length


def bucket_lengths(lengths: np.ndarray, max_length: int, count: int = 4, padding: str = "bucket") -> tuple[int, ...]:
    """Chooses the lengths that batches are padded to.

    Args:
      lengths: [N] tokens per example.
      max_length: the longest allowed.
      count: how many lengths, and so compiled shapes, at most.
      padding: `bucket` minimises the padded tokens in total; `max` pads everything to `max_length`.

    Returns:
      Increasing lengths, multiples of 8 except where `max_length` itself is the last; none is shorter than needed for
      the longest example.

    Raises:
      UserError: a bad argument, or an example longer than `max_length`.
    """
    lengths = np.asarray(lengths)
    require_positive(max_length=max_length, count=count)
    if padding not in PADDINGS:
        raise UserError(f"unknown padding {padding!r}{near_misses(padding, PADDINGS)}")
    if lengths.size == 0:
        raise UserError("there are no examples to choose bucket lengths for")
    if lengths.max() > max_length:
        raise UserError(f"an example has {lengths.max()} tokens, more than max_length {max_length}; truncate in encode")
    if padding == "max":
        return (max_length,)
    ceilings = np.minimum(-(-np.maximum(lengths, 1) // 8) * 8, max_length)
    candidates, sizes = np.unique(ceilings, return_counts=True)
    chosen = cheapest_chain(candidates[:, None], np.cumsum(sizes), candidates, count)
    return tuple(int(candidates[i]) for i in chosen)


def cheapest_chain(sizes: np.ndarray, held: np.ndarray, price: np.ndarray, count: int) -> list[int]:
    """Chooses the shapes that all examples fit into at the least price, each example in the first that holds it.

    Args:
      sizes: [M, D] the sizes of the candidates; the last candidate holds every example.
      held: [M] how many examples fit into each candidate.
      price: [M] what a row of each candidate costs.
      count: the most candidates to choose.

    Returns:
      Candidate numbers, at most `count`; each candidate is at least as large as the one before in all D sizes, and the
      last candidate is the last of them.
    """
    smaller = np.all(sizes[:, None] <= sizes[None], axis=2)
    # step[i, j]: the price of going on from candidate i to j; what lies between them is padded to j.
    step = np.where(smaller, price * (held[None] - held[:, None]), np.inf)
    best, choices = price * held, []
    for _ in range(count - 1):
        options = best[:, None] + step
        choices.append(options.argmin(0))
        best = options.min(0)
    chosen = [len(sizes) - 1]
    for before in reversed(choices):
        chosen.append(int(before[chosen[-1]]))
    return list(dict.fromkeys(reversed(chosen)))


def plan_epoch(
    buckets: np.ndarray, batch_size: int | Sequence[int], seed: int = 0, epoch: int = 0, shuffle: bool = True
) -> Plan:
    """Distributes the examples of one epoch over batches.

    Args:
      buckets: [N] the bucket number of every example.
      batch_size: rows per batch, of all buckets or of each.
      seed: with `epoch` the seed of the shuffle.
      epoch: the number of the epoch.
      shuffle: shuffle the examples within their bucket, and the batches; otherwise both are in order.

    Returns:
      [batches, largest batch size] example numbers, -1 in filler rows and beyond the size of the bucket, and [batches]
      bucket numbers. Every example occurs once, and the number of batches depends on neither seed nor epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(buckets)) if shuffle else np.arange(len(buckets))
    sizes = np.broadcast_to(batch_size, np.max(buckets) + 1) if isinstance(batch_size, int) else np.asarray(batch_size)
    rows, numbers = [], []
    for bucket in np.unique(buckets):
        members, size = order[buckets[order] == bucket], sizes[bucket]
        members = np.pad(members, (0, -len(members) % size), constant_values=-1).reshape(-1, size)
        rows.append(np.pad(members, ((0, 0), (0, sizes.max() - size)), constant_values=-1))
        numbers.append(np.full(len(members), bucket))
    batches = rng.permutation(sum(map(len, rows))) if shuffle else slice(None)
    return np.concatenate(rows)[batches], np.concatenate(numbers)[batches]


def positions(offsets: np.ndarray, index: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the tokens of a batch lie among those of all examples, stored end to end.

    Args:
      offsets: [N + 1] where each example starts.
      index: [B] example numbers, -1 in filler rows.
      length: the length to pad to.

    Returns:
      [B, length] token numbers, 0 where there is none, and [B, length] whether there is one.
    """
    real = index >= 0
    example = np.where(real, index, 0)
    start, stop = offsets[example], np.where(real, offsets[example + 1], 0)
    token = start[:, None] + np.arange(length)
    inside = token < stop[:, None]
    return np.where(inside, token, 0), inside


def padded(values: np.ndarray, where: tuple[np.ndarray, np.ndarray], pad: int) -> np.ndarray:
    """Returns [B, length] int32 values [tokens] at `positions`, with `pad` where there is none."""
    token, inside = where
    if not len(values):  # of nothing but empty examples
        return np.full(token.shape, pad, np.int32)
    return np.where(inside, values[token], pad).astype(np.int32)


class PlannedBatches(abc.ABC):
    """What all batches of runs share: global steps, plans by epoch, the rows of a host, grain.

    `batches[epoch * batches_per_epoch + i]` is a batch. `iter(batches)` is a grain iterator, which reads ahead in a
    thread; its `get_state()` and `set_state()` are the position to save and restore. Subclasses are frozen dataclasses.

    Attributes:
      seed: of the shuffle.
      epochs: how many; None for no end.
      shard_index: which host this is.
      shard_count: how many hosts; each reads its own contiguous rows of every batch.
    """

    seed: int
    epochs: int | None
    shard_index: int
    shard_count: int

    @property
    @abc.abstractmethod
    def batches_per_epoch(self) -> int:
        """The number of batches, the same in every epoch."""

    @abc.abstractmethod
    def _make_plan(self, epoch: int) -> Plan:
        """Returns the batches of an epoch, a pure function of the fields and the epoch."""

    @abc.abstractmethod
    def _rows(self, bucket: int) -> int:
        """Returns the rows of a batch of this bucket, over all hosts together."""

    @abc.abstractmethod
    def _assemble(self, index: np.ndarray, bucket: int) -> dict[str, np.ndarray]:
        """Returns the batch of these example numbers, padded to this bucket's shape."""

    def _check_rows(self, batch_size: int) -> None:
        require_positive(batch_size=batch_size)
        if batch_size % self.shard_count:
            raise UserError(
                f"batch_size {batch_size} does not divide by {self.shard_count} hosts; "
                f"use {-(-batch_size // self.shard_count) * self.shard_count}"
            )

    def _check_run(self) -> None:
        require_positive(shard_count=self.shard_count)
        if self.epochs is not None:
            require_positive(epochs=self.epochs)
        if self.seed < 0:
            raise UserError(f"seed must not be negative, got {self.seed}")
        if not 0 <= self.shard_index < self.shard_count:
            raise UserError(f"shard_index must be from 0 to {self.shard_count - 1}, got {self.shard_index}")

    def __len__(self) -> int:
        """The number of steps of the whole run."""
        return _ENDLESS if self.epochs is None else self.epochs * self.batches_per_epoch

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """Returns this host's rows of the batch of a global step, counted from 0.

        Raises:
          IndexError: the run is over before that step.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is not in a run of {len(self)} steps")
        epoch, number = divmod(step, self.batches_per_epoch)
        rows, buckets = self._plan(epoch)
        bucket = int(buckets[number])
        share = self._rows(bucket) // self.shard_count
        return self._assemble(rows[number, self.shard_index * share : (self.shard_index + 1) * share], bucket)

    def __iter__(self) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        """Starts a grain iterator at step 0."""
        return iter(self.dataset())

    def dataset(self, prefetch: int = 4) -> grain.IterDataset[dict[str, np.ndarray]]:
        """Returns the batches as a grain dataset.

        Args:
          prefetch: how many batches to prepare ahead, in one thread; 0 prepares each when it is asked for.
        """
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        return grain.MapDataset.source(self).to_iter_dataset(options)

    def _plan(self, epoch: int) -> Plan:
        # Steps are read in order, so the current epoch's plan is all that is worth keeping. It is read and replaced as
        # a whole: several iterators may be at work.
        cached = vars(self).get("_cached_plan")
        if cached is None or cached[0] != epoch:
            cached = epoch, self._make_plan(epoch)
            vars(self)["_cached_plan"] = cached
        return cached[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Batches(PlannedBatches):
    """All batches of a run of a text task, by global step.

    A batch is a dict of numpy arrays with B = batch_size / shard_count rows and T one of `buckets`: `input_ids`,
    `attention_mask` and `token_type_ids` [B, T] int32; `labels` [B] int32 or float32; `weights` [B] float32, 0 in
    filler rows; `index` [B] int32, the example's number, -1 in filler rows. Filler rows are all padding.

    Attributes:
      encoded: the examples.
      batch_size: rows per batch over all hosts together.
      buckets: increasing lengths to pad to, from `bucket_lengths`; the last must hold the longest example.
      seed: of the shuffle.
      shuffle: a new order every epoch; otherwise always the same, shortest bucket first.
      pad_id: the token id to pad with.
      epochs: how many; None for no end.
      shard_index: which host this is.
      shard_count: how many hosts; each reads its own contiguous rows of every batch.

    Raises:
      UserError: a bad argument.
    """

    encoded: Encoded
    batch_size: int
    buckets: tuple[int, ...]
    seed: int = 0
    shuffle: bool = True
    pad_id: int = 0
    epochs: int | None = None
    shard_index: int = 0
    shard_count: int = 1

    def __post_init__(self) -> None:
        self._check_run()
        self._check_rows(self.batch_size)
        if not self.buckets or self.buckets[0] < 1 or list(self.buckets) != sorted(set(self.buckets)):
            raise UserError(f"buckets must be increasing positive lengths, got {self.buckets}; see bucket_lengths")
        if not len(self.encoded):
            raise UserError("there are no examples to make batches of")
        if (longest := self.encoded.lengths.max()) > self.buckets[-1]:
            raise UserError(f"an example has {longest} tokens, more than the last bucket's {self.buckets[-1]}")

    @functools.cached_property
    def bucket_of(self) -> np.ndarray:
        """[N]: the number of the shortest bucket that holds each example."""
        return np.searchsorted(self.buckets, self.encoded.lengths)

    @functools.cached_property
    def batches_per_epoch(self) -> int:
        """The number of batches, the same in every epoch."""
        return int(np.sum(-(-np.bincount(self.bucket_of) // self.batch_size)))

    def _make_plan(self, epoch: int) -> Plan:
        return plan_epoch(self.bucket_of, self.batch_size, self.seed, epoch, self.shuffle)

    def _rows(self, bucket: int) -> int:
        return self.batch_size

    def _assemble(self, index: np.ndarray, bucket: int) -> dict[str, np.ndarray]:
        encoded, real = self.encoded, index >= 0
        where = positions(encoded.offsets, index, self.buckets[bucket])
        return {
            "input_ids": padded(encoded.ids, where, self.pad_id),
            "attention_mask": where[1].astype(np.int32),
            "token_type_ids": padded(encoded.token_type_ids, where, 0),
            "labels": np.where(real, encoded.labels[np.where(real, index, 0)], 0).astype(encoded.labels.dtype),
            "weights": real.astype(np.float32),
            "index": index.astype(np.int32),
        }


def in_order(values: Sequence[np.ndarray], indices: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Puts what was computed batch by batch back into the order of the examples.

    Args:
      values: per batch [B, ...].
      indices: per batch [B], the batch's `index`; filler rows (-1) are left out.
      count: the number of examples, N.

    Returns:
      [N, ...].

    Raises:
      ValueError: an example is missing or occurs twice.
    """
    index = np.concatenate(indices)
    real = index >= 0
    order = np.argsort(index[real], kind="stable")
    if not np.array_equal(index[real][order], np.arange(count)):
        raise ValueError("the batches do not hold every example exactly once")
    return np.concatenate(values)[real][order]


def require_positive(**values: int) -> None:
    """Raises a `UserError` that names the first value below 1."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
