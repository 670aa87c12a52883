"""Makes the reference vectors of the encoder families: `python make.py [NAME ...]` beside this file.

Needs torch and transformers (made with torch 2.13.0 on a CPU, transformers 5.23.0, numpy 2.4.6); no test imports it. For
each family a small random model in float32 and eval mode; every parameter is random, biases and norms too. NAME.npz holds

    config                                      content of config.json, as JSON in a 0-d string array
    state/NAME                                  the state dict
    input_ids, attention_mask, token_type_ids   int32 [4, 9]; padding on the right, ids of padding are the family's
    hidden                                      float32 [4, 9, D], the last layer's output; compare unpadded positions
    logits                                      float32 [4, 3]; of masked language models [4, 9, 40]
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

SIZES = dict(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=20,
    num_labels=3,
)
MASKED = {name: size for name, size in SIZES.items() if name != "num_labels"}
DISTIL = dict(vocab_size=40, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=20, num_labels=3)
FAMILIES = {
    "roberta": (transformers.RobertaForSequenceClassification, SIZES | dict(type_vocab_size=1, layer_norm_eps=1e-5)),
    "distilbert": (transformers.DistilBertForSequenceClassification, DISTIL),
    "albert": (
        transformers.AlbertForSequenceClassification,
        SIZES | dict(num_hidden_layers=3, num_hidden_groups=2, embedding_size=16),
    ),
    "bert_masked_lm": (transformers.BertForMaskedLM, MASKED | dict(num_hidden_layers=1)),
    "roberta_masked_lm": (
        transformers.RobertaForMaskedLM,
        MASKED | dict(num_hidden_layers=1, type_vocab_size=1, layer_norm_eps=1e-5),
    ),
}
TIED = [
    f"{head}.decoder.{leaf}" for head in ("cls.predictions", "lm_head") for leaf in ("weight", "bias")
]  # not in files
LENGTHS = (9, 6, 3, 1)

torch.set_num_threads(1)
for name in sys.argv[1:] or FAMILIES:
    architecture, sizes = FAMILIES[name]
    torch.manual_seed(0)
    config = architecture.config_class(**sizes, attn_implementation="eager")
    model = architecture(config).float().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
            if "norm" in path.lower() and path.endswith("weight"):
                parameter.add_(1)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    ids = torch.where(mask, torch.randint(3, sizes["vocab_size"], mask.shape), config.pad_token_id)
    if name.startswith("roberta"):
        ids[0, 4] = config.pad_token_id  # within the text: it has the position of padding, and is attended to
    types = (torch.arange(max(LENGTHS))[None] >= 4) & mask
    inputs = dict(input_ids=ids, attention_mask=mask.int())
    if name in ("albert", "bert_masked_lm"):
        inputs["token_type_ids"] = types.int()
    with torch.no_grad():
        found = model(**inputs, output_hidden_states=True)
    hf = config.to_dict() | {"architectures": [architecture.__name__]}
    values = {
        "config": json.dumps(hf),
        "input_ids": ids.numpy().astype(np.int32),
        "attention_mask": mask.numpy().astype(np.int32),
        "token_type_ids": types.numpy().astype(np.int32),
        "hidden": found.hidden_states[-1].numpy(),
        "logits": found.logits.numpy(),
    }
    values |= {f"state/{path}": value.numpy() for path, value in model.state_dict().items() if path not in TIED}
    np.savez_compressed(Path(__file__).parent / f"{name}.npz", **values)
