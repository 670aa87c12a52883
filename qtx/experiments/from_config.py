"""What a config describes: policy, rounding, outlier suppression, optimizer, evaluation.

Sections of a `qtx.experiments.config` in, the dataclasses of lower floors out; a value that does not exist is an error here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from qtx.errors import UserError, near_misses
from qtx.experiments.config import quantization
from qtx.methods.agnews_study import input_policy
from qtx.methods.bit_transformer import bit_policy
from qtx.methods.efficient_quantization import Value, policy_of, with_value
from qtx.methods.layer_rounding import AdaRound
from qtx.methods.outlier_suppression import OutlierSuppression, suppression_policy
from qtx.methods.patterns import pattern_policy
from qtx.methods.teacher_intervention import CLIP, student_policy
from qtx.nn.aliases import policy as make_policy
from qtx.quant import (
    Spec,
    estimator,
    ir_net,
    per_channel,
    per_embedding,
    per_group,
    per_position,
    per_tensor,
    per_token,
)
from qtx.quant.policy import Policy
from qtx.quant.spec import CODEBOOKS
from qtx.train.evaluation import Evaluation
from qtx.train.optimizer import OptimizerConfig

GRANULARITIES = {
    "tensor": per_tensor,
    "channel": per_channel,
    "embedding": per_embedding,
    "position": per_position,
    "token": per_token,
}


def parse_overrides(text: str, field: str = "quant.overrides") -> dict[str, Value]:
    """Parses `'y=16, h=ngp6, C=fp32'`; raises a `UserError` that shows the broken part of a field."""
    found: dict[str, Value] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not key or not value:
            raise UserError(f"{field}: {part!r} is not of the form name=value, such as y=16 or h=ngp6")
        found[key] = int(value) if value.isdigit() else value
    return found


def _granularity(name: str):
    groups = re.fullmatch(r"(\d+)(p?)", str(name))
    if groups:
        return per_group(int(groups[1]), permute=bool(groups[2]))
    if name not in GRANULARITIES:
        raise UserError(
            f"unknown granularity {name!r}{near_misses(name, GRANULARITIES)} (or a number of groups, '6' or '6p')"
        )
    return GRANULARITIES[name]()


def policy_from(section: ConfigDict, num_layers: int) -> Policy | None:
    """Builds the policy that a `quant` section describes; None if everything stays in full precision.

    Args:
      section: as made by `quantization`.
      num_layers: of the model.

    Raises:
      UserError: on unknown schemes, estimators, granularities, keys or values.
    """
    if section.bit.states:
        return _bit_policy(section)
    suppression = _suppression(section)
    if suppression is not None:
        return suppression_policy(suppression, num_layers)
    weights, activations = _weight_spec(section), _activation_spec(section)
    granularity = _granularity(section.activation_granularity)
    everywhere = None if granularity == per_tensor() else granularity
    if section.evaluation_rounding not in ("nearest", "drawn"):
        raise UserError(f"quant.evaluation_rounding is {section.evaluation_rounding!r}; choose from 'nearest', 'drawn'")
    overrides = parse_overrides(section.overrides)
    own = parse_overrides(section.weight_overrides, "quant.weight_overrides")
    if weights is None and activations is None:
        return None
    if own and weights is None:
        raise UserError("quant.weight_overrides is given, but quant.weight_bits is 32: give the other weights bits too")
    if section.student:
        return _student_policy(section, weights, overrides | own)
    if section.pattern or section.activation_sites == "inputs":
        return _pattern_policy(section, weights, activations, overrides | own)
    if section.activation_sites != "outputs":
        raise UserError(f"quant.activation_sites is {section.activation_sites!r}; choose from 'outputs', 'inputs'")
    if weights is None or not weights.is_codebook:
        found = policy_of(weights, activations, overrides, num_layers, section.setup, everywhere)
        rules: dict[str, Spec | None] = {}
        base = weights
    else:
        own = {key: overrides.pop(key) for key in ("Et", "wP", "wC") if key in overrides} | own
        found = policy_of(None, activations, overrides, num_layers, section.setup, everywhere)
        # Norm scales are not on a codebook: three values cannot hold them. What leaves the codebook has a uniform grid.
        rules = {"**": weights, "**/norm/scale": None}
        base = Spec(8, "symmetric", per_channel(), range="static")
    if base is not None:
        rules |= {key: with_value(base, value) for key, value in own.items()}
    return dataclasses.replace(found, weights=found.weights + make_policy(weights=rules).weights)


def _weight_spec(section: ConfigDict) -> Spec | None:
    scheme, bits = section.weight_scheme, section.weight_bits
    granularity = _granularity(section.weight_granularity)
    if scheme == "absmean":
        raise UserError("quant.weight_scheme 'absmean' has states, not bits: set quant.bit.states (2 to 5) instead")
    if scheme == "ir_net" or scheme in CODEBOOKS:
        least, most = CODEBOOKS.get(scheme, (1, 1))
        if bits is None:
            bits = min(most, 8)
        if not least <= bits <= most:
            has = f"{least} bit{'s' * (least > 1)}" if least == most else f"{least} to {most} bits"
            raise UserError(f"quant.weight_scheme {scheme!r} has {has}, not {bits}: leave quant.weight_bits out")
        if scheme == "ir_net":
            return ir_net(granularity)
        options = {}
        if scheme in ("ternary", "binary", "magnitude"):
            options = dict(scale=section.weight_scale, gradient=section.weight_gradient)
        return Spec(bits, scheme, granularity, range="dynamic", rounding=section.weight_rounding, **options)
    if bits == 32:
        return None
    return Spec(
        8 if bits is None else bits,
        scheme,
        granularity,
        estimator(section.weight_estimator, **section.weight_options),
        scale_domain=section.scale_domain,
        range_gradient=section.range_gradient,
        rounding="truncate" if scheme == "shifted" else section.weight_rounding,
    )


def _activation_spec(section: ConfigDict) -> Spec | None:
    if section.activation_bits == 32:
        return None
    return Spec(
        section.activation_bits,
        section.activation_scheme,
        estimator=estimator(section.activation_estimator, padding=section.padding, **section.activation_options),
        range=section.activation_range,
        scale_domain=section.scale_domain,
        range_gradient=section.range_gradient,
        rounding="truncate" if section.activation_scheme == "shifted" else "nearest",
    )


def _bit_policy(section: ConfigDict) -> Policy:
    """Returns the policy of a BitTransformer."""
    others = {name: section[name] for name in ("student", "pattern", "overrides", "weight_overrides") if section[name]}
    if others:
        raise UserError(f"quant.bit says which sites are quantized: leave quant.{next(iter(others))} empty")
    return bit_policy(**section.bit)


def _student_policy(section: ConfigDict, weights: Spec | None, overrides: dict[str, Value]) -> Policy:
    """Returns the policy of teacher intervention, with a grid for weights."""
    if section.student not in ("corrected", "published", "layers"):
        raise UserError(f"quant.student is {section.student!r}; choose from 'corrected', 'published', 'layers', ''")
    if overrides or section.pattern:
        raise UserError("quant.student says which sites are quantized: leave pattern and overrides empty")
    if weights is None:
        raise UserError(f"quant.student is {section.student!r}, but quant.weight_bits is 32: give the weights bits")
    weights = dataclasses.replace(weights, clip=CLIP)
    table = dataclasses.replace(weights, granularity=per_channel())
    around = section.student != "layers"
    return student_policy(weights, table, emb=around, cls=around, published=section.student == "published")


def _pattern_policy(
    section: ConfigDict, weights: Spec | None, activations: Spec | None, overrides: dict[str, Value]
) -> Policy:
    """Returns the policy of a pattern study: weights by pattern, activations at the inputs of linear layers."""
    if overrides:
        raise UserError(
            f"quant.pattern and activation_sites='inputs' do not go with overrides, such as {next(iter(overrides))!r}"
        )
    if section.pattern and weights is None:
        raise UserError(f"quant.pattern is {section.pattern!r}, but quant.weight_bits is 32: give the weights bits")
    found = make_policy() if weights is None else pattern_policy(section.pattern or "ALL", weights)
    if activations is not None and section.activation_sites != "inputs":
        raise UserError(
            "quant.pattern names weights: set quant.activation_bits=32, or quant.activation_sites='inputs' to quantize what "
            "linear layers see"
        )
    everywhere = _granularity(section.activation_granularity)
    inputs = activations and dataclasses.replace(activations, granularity=everywhere)
    return dataclasses.replace(found, inputs=input_policy(inputs).inputs if inputs is not None else ())


def rounding_from(quant: ConfigDict, adaround: ConfigDict) -> AdaRound | None:
    """Reads the section `adaround` if `quant` asks for it, else None; raises a `UserError` on a value that does not exist."""
    if not quant.adaround:
        return None
    fields = adaround.to_dict()
    fields.pop("examples")
    return AdaRound(**fields | {name: tuple(fields[name]) for name in ("layers", "annealing")})


def suppression_from(quant: ConfigDict, section: ConfigDict) -> OutlierSuppression | None:
    """Reads the section `outlier_suppression` if `quant` asks for it, else None; raises a `UserError` on what does not fit."""
    found = _suppression(quant)
    return None if found is None else dataclasses.replace(found, **section.to_dict())


def _suppression(quant: ConfigDict) -> OutlierSuppression | None:
    if not quant.outlier_suppression:
        return None
    given = quant.to_dict()
    for name, value in quantization().to_dict().items():
        if name not in ("outlier_suppression", "weight_bits", "activation_bits") and given[name] != value:
            raise UserError(
                f"quant.outlier_suppression says how everything is quantized: leave quant.{name} at {value!r}"
            )
    if quant.weight_bits not in (None, quant.activation_bits):
        raise UserError(
            f"outlier suppression has one number of bits: set quant.weight_bits to {quant.activation_bits}, as "
            f"quant.activation_bits, not {quant.weight_bits}"
        )
    return OutlierSuppression(quant.outlier_suppression, quant.activation_bits)


def evaluation_from(
    name: str, section: ConfigDict, run: Callable[[Any, Mapping[str, Any]], Mapping[str, float]]
) -> Evaluation | None:
    """Reads how a phase is evaluated while it trains; None: it is not.

    Args:
      name: of the phase, for errors.
      section: of the phase.
      run: does it: `(phase, variables) -> {metric: value}`.

    Raises:
      UserError: on a negative value, or on choosing among evaluations that there are none of.
    """
    if section.evaluate_every == 0:
        if section.keep_best or section.patience:
            raise UserError(
                f"phase {name!r}: keep_best and patience choose among evaluations while training; set evaluate_every "
                "(epochs) above 0"
            )
        return None
    start = -math.inf if section.patience_start is None else section.patience_start
    return Evaluation(run, section.evaluate_every, section.metric, section.keep_best, section.patience, start)


def optimizer_from(section: ConfigDict) -> OptimizerConfig:
    """Reads a phase's `optimizer` section."""
    return OptimizerConfig(**section.to_dict())
