"""Makes vit.npz: reference values of tiny random ViT and DeiT classifiers, by the published code.

    python make_vit.py vit.npz

Needs torch and transformers, which neither qtx nor its tests use; no test imports this file. Made with Python 3.11, torch
2.13.0 (CPU) and transformers 5.23.0, in float32, with eager attention and in eval mode. For each NAME of `MODELS`:

- `NAME/config`: a 0-d string array, the content of config.json.
- `NAME/state/TENSOR`: the tensors of its model.safetensors; all values are random, biases, tokens and norms too.
- `NAME/pixels`: float32 [3, S, S, K], normalised images with the channels last.
- `NAME/hidden_states`: float32 [L, 3, T, D], the embeddings and the outputs of all layers but the last.
- `NAME/logits`: float32 [3, 5].
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=5)
MODELS = {
    "vit": (transformers.ViTForImageClassification, dict(SIZES, image_size=12, patch_size=4)),
    "vit_grey": (
        transformers.ViTForImageClassification,
        dict(SIZES, image_size=9, patch_size=3, num_channels=1, hidden_act="relu", layer_norm_eps=1e-6),
    ),
    "deit": (transformers.DeiTForImageClassification, dict(SIZES, image_size=8, patch_size=4)),
    "deit_teacher": (transformers.DeiTForImageClassificationWithTeacher, dict(SIZES, image_size=8, patch_size=4)),
}


def main(target):
    torch.set_num_threads(1)
    out = {}
    for seed, (name, (kind, sizes)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = kind(kind.config_class(**sizes, attn_implementation="eager")).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
                if "norm" in path and path.endswith("weight"):
                    parameter.add_(1)
        pixels = torch.randn(3, model.config.num_channels, sizes["image_size"], sizes["image_size"])
        with torch.no_grad():
            found = model(pixels, output_hidden_states=True)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            state = safetensors.numpy.load_file(Path(directory) / "model.safetensors")
            out[f"{name}/config"] = np.array(json.dumps(json.loads((Path(directory) / "config.json").read_text())))
        out |= {f"{name}/state/{key}": value for key, value in state.items()}
        out[f"{name}/pixels"] = pixels.permute(0, 2, 3, 1).numpy()
        layers = sizes["num_hidden_layers"]
        out[f"{name}/hidden_states"] = np.stack([state.numpy() for state in found.hidden_states[:layers]])
        out[f"{name}/logits"] = found.logits.numpy()
        print(name, len(state), float(found.logits.std()))
    np.savez_compressed(target, **out)


if __name__ == "__main__":
    main(sys.argv[1])
