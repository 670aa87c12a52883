"""Experiments on sentence pairs: translation by an encoder-decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from qtx import models
from qtx.data import pair_tokenizer
from qtx.data.pair_batching import PairBatches, bucket_shapes
from qtx.data.pair_tokenizer import EncodedPairs, encode_pairs
from qtx.data.parallel import Pairs, ParallelDataset, load_pairs, load_parallel
from qtx.data.tasks import CORPORA, TranslationTask, get_translation_task, languages_of
from qtx.errors import UserError
from qtx.experiments.experiment import LABELLED, Experiment, check_model, family_and_sizes, from_nothing, load_model
from qtx.methods.translation import Decoding, TranslationLoss, check_positions, smoothed_kl, translate_all
from qtx.nn.encoder_decoder import EncoderDecoderConfig
from qtx.train.phase import inputs
from qtx.train.sharding import replicate, shard_batch
from qtx.train.translation_metrics import nltk_bleu, sacrebleu_scores

TASKS = (*CORPORA, "parallel")


@dataclasses.dataclass(frozen=True, eq=False)
class Translation(Experiment):
    """An experiment on sentence pairs; see `Experiment` for the other attributes.

    Attributes:
      dataset: sentences and their translations by split.
    """

    dataset: ParallelDataset

    @classmethod
    def make(cls, config: ConfigDict) -> Translation:
        """Loads and checks everything that a run needs, cheapest first.

        Raises:
          UserError: on anything in the configuration, the data or the checkpoint that does not fit.
        """
        mesh = check_model(config.model, config.model_parallel)
        _, sizes = family_and_sizes(config.model)
        if not isinstance(sizes, EncoderDecoderConfig):
            raise UserError(
                f"task {config.task!r} is translation, but model {config.model.name!r} is no encoder-decoder; "
                "see configs/translation.py"
            )
        for name in ("source_vocab_size", "target_vocab_size"):
            if name in config.model.sizes:
                raise UserError(f"model.sizes: {name} is the tokenizer's; leave it out, see translation.vocabulary")
        c = config.translation
        decoding_of(config)  # both check their fields
        TranslationLoss(c.label_smoothing, c.divisor)
        check_positions(sizes, {"data.max_length": config.data.max_length, "translation.limit": c.limit})
        if from_nothing(config.model):
            _check_tied(config, sizes)
        dataset = load_dataset(config)
        train = dataset.splits["train"]
        if from_nothing(config.model):
            tokenizer = pair_tokenizer.fit(
                c.tokenizer, train, dataset.task, c.vocabulary, c.joint, config.data.max_length
            )
        else:
            directory = models.locate(config.model.name)
            tokenizer = pair_tokenizer.load(directory, dataset.task.direction)
            tokenizer.check_sizes(sizes.source_vocab_size, sizes.target_vocab_size, sizes.tied == "all")
        model, ranges, pretrained = load_model(
            config,
            None,
            source_vocab_size=tokenizer.source_vocab_size,
            target_vocab_size=tokenizer.target_vocab_size,
        )
        encoded: dict[str, Any] = {}
        found = cls(config, tokenizer, pretrained, model, ranges, encoded, mesh, dataset)
        for split in ("train", *LABELLED):
            if split in dataset.splits:
                found.encode(split)
        return found

    def encode(self, split: str) -> EncodedPairs:
        """Returns the token ids of a split. Those of further tests, which training does not read, are made when asked for.

        The first time a line says how many pairs were left out or cut, if any were.
        """
        if split not in self.encoded:
            pairs, longest = self.dataset.splits[split], self.config.data.max_length
            self.encoded[split] = encode_pairs(self.tokenizer, pairs, longest, train=split == "train")
            if said := _left_out(split, pairs, self.encoded[split], longest):
                print(said, flush=True)
        return self.encoded[split]

    @property
    def measured(self) -> str:
        """The signatures of sacrebleu's scores."""
        return "; ".join(f"{score.name}|{score.signature}" for score in sacrebleu_scores(["a"], ["a"]).values())

    def training(self) -> dict[str, Any]:
        """Returns the objective: divergence from smoothed labels."""
        c = self.config.translation
        return {"objective": TranslationLoss(c.label_smoothing, c.divisor, self.pad_id)}

    @property
    def pad_id(self) -> int:
        """The token id to pad with."""
        sizes = self.pretrained.config
        assert isinstance(sizes, EncoderDecoderConfig), "only an encoder-decoder translates"
        return sizes.pad_token_id

    def batches(self, split: str, batch_size: int, shuffle: bool, epochs: int | None, seed: int = 0) -> PairBatches:
        encoded, c = self.encoded[split], self.config.data
        return PairBatches(
            encoded,
            batch_size,
            bucket_shapes(encoded, c.buckets if shuffle else c.eval_buckets),
            seed=seed,
            shuffle=shuffle,
            epochs=epochs,
            plan=c.plan if shuffle else "buckets",
            rows_multiple=self.mesh.shape["data"],
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )

    def first_batches(self, count: int, batch_size: int) -> Sequence[Mapping[str, np.ndarray]]:
        encoded = self.encoded["train"]
        shapes = bucket_shapes(encoded, 1)
        found = PairBatches(encoded, batch_size * max(shapes[0]), shapes, seed=self.config.seed)
        whole = (b for b in (found[i] for i in range(found.batches_per_epoch)) if b["weights"].all())
        return list(islice(whole, count))  # the others of the epoch are never made

    def evaluate(
        self, model: nn.Module, variables: Mapping[str, Any], splits: Sequence[str] = LABELLED, quick: bool = False
    ) -> dict[str, float]:
        """Returns BLEU and chrF (0 to 100) and the loss per token, with `score`, a hundredth of BLEU on validation.

        The loss is that of labels that are not smoothed, its exponential the perplexity. `quick`: greedy search.
        """
        variables, drawn = self.published_form(model, variables)
        if drawn is None:
            model, variables = self.frozen(model, variables)
        greedy = dataclasses.replace(decoding_of(self.config), beam=1)
        decoding = greedy if quick else decoding_of(self.config)
        found: dict[str, float] = {}
        for split in splits:
            if split not in self.dataset.splits:
                continue
            encoded, references = self.encode(split), self.dataset.splits[split].target
            ids = translate_all(model, variables, encoded.source, decoding, self.mesh, drawn)
            prefix = "" if split == "validation" else f"{split}_"
            texts = self.tokenizer.decode_target(ids)
            values = {name: score.value for name, score in sacrebleu_scores(texts, references).items()}
            if self.config.translation.published_bleu:
                pad = self.pad_id
                if decoding != greedy:  # as published
                    ids = translate_all(model, variables, encoded.source, greedy, self.mesh, drawn)
                tokens = [[token for token in row if token != pad] for row in ids.tolist()]
                right = [encoded.target[row].tolist() for row in range(len(encoded))]
                values["published_bleu"] = 100 * nltk_bleu(tokens, right)
            values["loss"] = self.loss(model, variables, split, drawn)
            found |= {prefix + name: value for name, value in values.items()}
        return found | ({"score": found["bleu"] / 100} if "bleu" in found else {})

    def loss(
        self, model: nn.Module, variables: Mapping[str, Any], split: str, rounding_seed: int | None = None
    ) -> float:
        """Returns the mean cross-entropy of the target tokens of a split, in nats.

        Args:
          model: module.
          variables: what it is applied to.
          split: of the data.
          rounding_seed: of random rounding, drawn anew for every batch; None: nothing is drawn.
        """
        longest = max(max(shape) for shape in bucket_shapes(self.encoded[split], 1))
        size = self.mesh.shape["data"] * jax.process_count() * max(1, self.config.data.eval_batch_size // 2)
        batches = self.batches(split, size * longest, shuffle=False, epochs=1)
        with jax.set_mesh(self.mesh):
            key = None if rounding_seed is None else replicate(jax.random.key(rounding_seed), self.mesh)
            sums = [
                _loss(model, variables, shard_batch(batch, self.mesh), key, number)
                for number, batch in enumerate(batches)
            ]
        total, words = np.sum(jax.device_get(sums), 0)
        return float(total / max(words, 1))


@partial(jax.jit, static_argnums=0)
def _loss(
    model: nn.Module,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    key: jax.Array | None,
    number: jax.typing.ArrayLike,
) -> jax.Array:
    rngs = None if key is None else {"rounding": jax.random.fold_in(key, number)}
    outputs: Any = model.apply(variables, *inputs(model, batch), rngs=rngs)
    pad = model.config.pad_token_id  # type: ignore[attr-defined]
    losses = smoothed_kl(outputs.logits, batch["labels"], 0.0, pad)
    return jnp.stack([jnp.sum(losses), jnp.sum(batch["labels"] != pad)])


def decoding_of(config: ConfigDict) -> Decoding:
    """Reads how sentences are translated; raises a `UserError` on a value out of range."""
    c = config.translation
    return Decoding(c.beam, c.length_penalty, c.limit, config.data.eval_batch_size, config.data.eval_buckets)


def _check_tied(config: ConfigDict, sizes: EncoderDecoderConfig) -> None:
    """Raises a `UserError` if a model from nothing has one table for two vocabularies, whatever their sizes."""
    c = config.translation
    two = {"words": "translation.tokenizer='words'"} | ({} if c.joint else {"subwords": "translation.joint=False"})
    if sizes.tied != "all" or c.tokenizer not in two:
        return
    raise UserError(
        f"model.sizes: tied='all' is one table of one vocabulary, but {two[c.tokenizer]} makes two vocabularies; set "
        "--config.model.sizes.tied=target (or none)"
    )


def _left_out(split: str, pairs: Pairs, encoded: EncodedPairs, longest: int) -> str:
    """Returns what is to be said of the pairs of a split that were left out or cut; '' if none were."""
    empty, long, cut = pairs.dropped + encoded.dropped_empty, encoded.dropped_long, int(encoded.cut.sum())
    all_pairs = f"{len(pairs) + pairs.dropped:,} pairs"
    if empty or long:
        reasons = f"{long:,} longer than {longest} tokens, {empty:,} with an empty side"
        return f"{split}: {empty + long:,} of {all_pairs} left out ({reasons})"
    return f"{split}: {cut:,} of {all_pairs} cut after {longest} tokens" if cut else ""


def load_dataset(config: ConfigDict) -> ParallelDataset:
    """Loads the sentence pairs that a configuration names."""
    c = config.data
    limits = c.limit_train or None, c.limit_eval or None
    if config.task != "parallel":
        return load_pairs(get_translation_task(config.task, c.direction), c.dir, c.seed, *limits)
    files = {split: tuple(paths) for split, paths in c.pairs.items() if any(paths)}
    for split, paths in files.items():
        if len(paths) != 2 or not all(paths):
            side = "source" if not paths[0] else "target"
            raise UserError(
                f"data.pairs.{split}: the {side} file is missing in {paths}; give both, as in ('a.en', 'a.de')"
            )
    return load_parallel(TranslationTask("parallel", *languages_of(c.direction)), files, c.seed, *limits)
