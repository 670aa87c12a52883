"""The numeric core: pure functions and hashable specs, no Flax."""

from qtx.quant.estimators import estimate, estimated_range, observe
from qtx.quant.grid import QParams, dequantize, effective_scale, effective_zero_point, fake_quant, qparams, quantize
from qtx.quant.minimize import minimize_bounded
from qtx.quant.rows import groups_by_range
from qtx.quant.spec import (
    ESTIMATORS,
    Granularity,
    MinMax,
    Search,
    Spec,
    asymmetric,
    binary,
    estimator,
    ir_net,
    magnitude,
    per_channel,
    per_embedding,
    per_group,
    per_position,
    per_tensor,
    per_token,
    symmetric,
    ternary,
)

__all__ = [
    "ESTIMATORS",
    "Granularity",
    "MinMax",
    "QParams",
    "Search",
    "Spec",
    "asymmetric",
    "binary",
    "dequantize",
    "effective_scale",
    "effective_zero_point",
    "estimate",
    "estimated_range",
    "estimator",
    "fake_quant",
    "groups_by_range",
    "ir_net",
    "magnitude",
    "minimize_bounded",
    "observe",
    "per_channel",
    "per_embedding",
    "per_group",
    "per_position",
    "per_tensor",
    "per_token",
    "qparams",
    "quantize",
    "symmetric",
    "ternary",
]
