"""Makes mobile.npz: reference values of tiny random MobileBERT and SqueezeBERT classifiers, by the published code.

    python make_mobile.py mobile.npz

Needs torch and transformers, which neither qtx nor its tests use; no test imports this file. Made with Python 3.11, torch
2.13.0 (CPU) and transformers 5.23.0, in float32, with eager attention and in eval mode. For each NAME of `MODELS`:

- `NAME/config`: a 0-d string array, the content of config.json.
- `NAME/state/TENSOR`: the state dict; all values are random, biases and norms too.
- `NAME/input_ids`, `NAME/attention_mask`, `NAME/token_type_ids`: int32 [3, 9]; padding on the right.
- `NAME/last_hidden_state`: float32 [3, 9, D]; compare positions that are no padding.
- `NAME/logits`: float32 [3, 3].
"""

import json
import sys

import numpy as np
import torch
from transformers import (
    MobileBertConfig,
    MobileBertForSequenceClassification,
    SqueezeBertConfig,
    SqueezeBertForSequenceClassification,
)

COMMON = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
    num_labels=3,
)
MOBILE = dict(COMMON, intermediate_size=24, embedding_size=12, intra_bottleneck_size=16)
SQUEEZE = dict(COMMON, intermediate_size=64, embedding_size=32)
MODELS = {
    "mobilebert": dict(MOBILE, classifier_activation=False),  # the flags of the published checkpoint
    "mobilebert_plain": dict(
        MOBILE,
        use_bottleneck=False,
        normalization_type="layer_norm",
        classifier_activation=True,
        num_feedforward_networks=2,
        trigram_input=False,
        hidden_act="gelu",
    ),
    "mobilebert_attention": dict(
        MOBILE,
        use_bottleneck_attention=True,
        normalization_type="layer_norm",
        num_feedforward_networks=1,
        trigram_input=False,
        embedding_size=32,
        layer_norm_eps=1e-3,
    ),
    "squeezebert": dict(SQUEEZE, layer_norm_eps=1e-3),
    "squeezebert_groups": dict(
        SQUEEZE, q_groups=2, k_groups=8, v_groups=1, post_attention_groups=4, intermediate_groups=16, output_groups=2
    ),
}


def main(target):
    torch.set_num_threads(1)
    out = {}
    for seed, (name, settings) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        config, kind = (
            (MobileBertConfig, MobileBertForSequenceClassification)
            if name.startswith("mobile")
            else (SqueezeBertConfig, SqueezeBertForSequenceClassification)
        )
        model = kind(config(**settings, attn_implementation="eager")).eval()
        with torch.no_grad():  # biases start at 0 and norm scales at 1: move them, so that each one matters
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.copy_(0.15 * torch.randn_like(parameter))  # the padding's row starts at 0
        mask = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
        inputs = {
            "input_ids": torch.randint(1, 50, (3, 9)) * mask,
            "attention_mask": mask,
            "token_type_ids": (torch.arange(9) >= torch.tensor([[5], [9], [2]])).long() * mask,
        }
        with torch.no_grad():
            found = model(**inputs, output_hidden_states=True)
        saved = model.config.to_dict() | {"architectures": [kind.__name__]}
        out[f"{name}/config"] = np.array(json.dumps(saved))
        out |= {f"{name}/state/{key}": value.numpy() for key, value in model.state_dict().items()}
        out |= {f"{name}/{key}": value.numpy().astype(np.int32) for key, value in inputs.items()}
        out[f"{name}/last_hidden_state"] = found.hidden_states[-1].numpy()
        out[f"{name}/logits"] = found.logits.numpy()
        size = {key: float(out[f"{name}/{key}"].std()) for key in ("last_hidden_state", "logits")}
        print(name, len(model.state_dict()), size)
    np.savez_compressed(target, **out)


if __name__ == "__main__":
    main(sys.argv[1])
