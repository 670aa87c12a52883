"""qtx: quantized transformers in JAX and Flax.

    bert = qtx.load("all-MiniLM-L6-v2", num_labels=2)
    policy = qtx.policy(weights=qtx.symmetric(8), activations={"**": qtx.asymmetric(8), "y": qtx.asymmetric(16)})
    model = bert.family.module(config=bert.config, policy=policy)
    ranges = qtx.calibrate(model, bert.params, batches)

`qtx.quant` is the numeric core, `qtx.nn` modules with sites, `qtx.models` families and checkpoints, `qtx.data` tasks and
batches, `qtx.train` the loop, `qtx.methods` what the papers add, `qtx.export` packed artifacts.
"""

from qtx.errors import UserError
from qtx.export.packed_file import load_packed, save_packed
from qtx.methods.calibrate import calibrate
from qtx.methods.qat import training_policy
from qtx.models import load, save
from qtx.nn import check_policy, list_sites, policy, site
from qtx.nn.describe import describe
from qtx.quant import (
    MinMax,
    QParams,
    Search,
    Spec,
    absmean,
    asymmetric,
    binary,
    dequantize,
    estimate,
    estimator,
    fake_quant,
    ir_net,
    loss_aware,
    magnitude,
    per_channel,
    per_embedding,
    per_group,
    per_position,
    per_tensor,
    per_token,
    quantize,
    symmetric,
    ternary,
)
from qtx.quant.policy import Policy
from qtx.train.partition import combine, partition

__version__ = "0.1.0"
__all__ = [
    "MinMax",
    "Policy",
    "QParams",
    "Search",
    "Spec",
    "UserError",
    "absmean",
    "asymmetric",
    "binary",
    "calibrate",
    "check_policy",
    "combine",
    "dequantize",
    "describe",
    "estimate",
    "estimator",
    "fake_quant",
    "ir_net",
    "list_sites",
    "loss_aware",
    "load",
    "load_packed",
    "magnitude",
    "partition",
    "per_channel",
    "per_embedding",
    "per_group",
    "per_position",
    "per_tensor",
    "per_token",
    "policy",
    "quantize",
    "save",
    "save_packed",
    "site",
    "symmetric",
    "ternary",
    "training_policy",
]
