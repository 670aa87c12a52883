"""Checkpoints and tokenizers in the Hugging Face layout, for tests."""

import json

import jax
import numpy as np
import safetensors.numpy


def write_checkpoint(directory, hf, tensors):
    """Writes config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf))
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    safetensors.numpy.save_file(contiguous, directory / "model.safetensors")


def make_tokenizer(family, words, **options):
    """Returns a family's own kind of tokenizer, in which each of `words` is one token (with a space before it, for RoBERTa)."""
    import transformers
    from tokenizers import pre_tokenizers

    if family in ("bert", "distilbert"):
        kind = transformers.BertTokenizerFast if family == "bert" else transformers.DistilBertTokenizerFast
        return kind(vocab=_numbered(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]), **options)
    if family == "albert":
        pieces = [(token, 0.0) for token in ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")]
        return transformers.AlbertTokenizerFast(vocab=pieces + [(f"▁{word}", -1.0) for word in words], **options)
    assert family == "roberta"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges, parts = [], []
    for word in words:
        so_far = "Ġ"
        for letter in word:
            if so_far + letter not in parts:
                merges.append((so_far, letter))
                parts.append(so_far + letter)
            so_far += letter
    vocab = _numbered(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, *parts])
    return transformers.RobertaTokenizerFast(vocab=vocab, merges=merges, **options)


def _numbered(tokens):
    return {token: number for number, token in enumerate(tokens)}


def make_checkpoint(directory, family, words, num_layers=2, **sizes):
    """Writes a tiny random model of a family (by name) with its own kind of tokenizer, and returns the directory."""
    from qtx import models

    family, tokenizer = models.get_family(family), make_tokenizer(family, words)
    kind = type(family.config_from_hf({}))
    config = kind(
        len(tokenizer), 16, num_layers, 2, 32, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id, **sizes
    )
    params = family.module(config=config).init(jax.random.key(0), *family.example_inputs())["params"]
    models.save(directory, family, config, params, tokenizer)
    return directory
