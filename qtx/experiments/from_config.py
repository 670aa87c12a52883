"""What a config describes: policy, rounding, outlier suppression, optimizer, evaluation.

Sections of a `qtx.experiments.config` in, the dataclasses of lower floors out; a value that does not exist is an error here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from qtx.errors import UserError, near_misses
from qtx.experiments.config import field_of, quantization
from qtx.methods.agnews_study import input_policy
from qtx.methods.bit_transformer import bit_policy
from qtx.methods.efficient_quantization import Value, policy_of, with_value
from qtx.methods.layer_rounding import AdaRound
from qtx.methods.outlier_suppression import OutlierSuppression, suppression_policy
from qtx.methods.patterns import pattern_policy
from qtx.methods.teacher_intervention import ACTIVATIONS, PARTS, PARTS_OF_SOME, student_policy
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
from qtx.quant.spec import CODEBOOKS, STATES
from qtx.train.evaluation import Evaluation
from qtx.train.optimizer import OptimizerConfig

GRANULARITIES = {
    "tensor": per_tensor,
    "channel": per_channel,
    "embedding": per_embedding,
    "position": per_position,
    "token": per_token,
}

# Fields of `quant` that say how weights and activations are quantized. Those that a scheme does not read are refused, so that
# no field is set in vain.
_OF_WEIGHTS = (
    "weight_granularity",
    "weight_rounding",
    "weight_scale",
    "weight_gradient",
    "weight_estimator",
    "weight_options",
)
_OF_ACTIVATIONS = (
    "activation_scheme",
    "activation_granularity",
    "activation_estimator",
    "activation_options",
    "activation_range",
    "padding",
)
_OF_RANGES = ("scale_domain", "range_gradient")
_UNIFORM = {"weight_granularity", "weight_rounding", "weight_estimator", "weight_options"}
_READ = {  # of the fields of weights, by codebook
    "ternary": {"weight_granularity", "weight_scale", "weight_gradient"},
    "binary": {"weight_granularity", "weight_scale", "weight_gradient"},
    "magnitude": {"weight_granularity", "weight_rounding", "weight_scale"},
    "magnitude_int8": {"weight_granularity", "weight_rounding"},
    "sign": set(),
}
_WEIGHT_KEYS = ("Et", "wP", "wC")  # short names of weights in `overrides`, where the others are activations
# Of full precision: tables set these for all of their rows, those without quantized weights included.
_TOLERATED = {"weight_granularity", "weight_estimator", "weight_options"}


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
      UserError: on unknown schemes, estimators, granularities, keys or values, and on a field that the others leave without
        effect.
    """
    if section.bit.states or section.bit.gcn_states:
        return _bit_policy(section)
    suppression = _suppression(section)
    if suppression is not None:
        return suppression_policy(suppression, num_layers)
    _refuse(section, (f"bit.{name}" for name in section.bit), "it is read with quant.bit.states from 2 to 5 alone")
    if section.evaluation_rounding not in ("nearest", "drawn"):
        raise UserError(f"quant.evaluation_rounding is {section.evaluation_rounding!r}; choose from 'nearest', 'drawn'")
    weights = _weight_spec(section)
    if section.evaluation_rounding == "drawn" and (weights is None or weights.rounding != "stochastic"):
        raise UserError(
            "quant.evaluation_rounding is 'drawn', but no weight is rounded at random; set it to 'nearest', "
            "or quant.weight_rounding to 'stochastic'"
        )
    if section.student:
        return _student_policy(section, weights)
    _refuse(section, ("student_activations", "student_clip", "student_without"), "it is read with quant.student alone")
    activations = _activation_spec(section)
    _refuse_of_ranges(section, weights, activations)
    granularity = _granularity(section.activation_granularity)
    everywhere = None if granularity == per_tensor() else granularity
    overrides = parse_overrides(section.overrides)
    own = parse_overrides(section.weight_overrides, "quant.weight_overrides")
    if weights is None and activations is None:
        return None
    if own and weights is None:
        raise UserError("quant.weight_overrides is given, but quant.weight_bits is 32: give the other weights bits too")
    for key in overrides:
        kind, spec = ("weight", weights) if key in _WEIGHT_KEYS else ("activation", activations)
        if spec is None:
            raise UserError(
                f"quant.overrides names {key!r}, but quant.{kind}_bits is 32: give the other {kind}s bits too"
            )
    if section.pattern or section.activation_sites == "inputs":
        return _pattern_policy(section, weights, activations, overrides | own)
    if section.activation_sites != "outputs":
        raise UserError(f"quant.activation_sites is {section.activation_sites!r}; choose from 'outputs', 'inputs'")
    if weights is None or not weights.is_codebook:
        found = policy_of(weights, activations, overrides, num_layers, section.setup, everywhere)
        rules: dict[str, Spec | None] = {}
        base = weights
    else:
        own = {key: overrides.pop(key) for key in _WEIGHT_KEYS if key in overrides} | own
        found = policy_of(None, activations, overrides, num_layers, section.setup, everywhere)
        # Norm scales are not on a codebook: three values cannot hold them. What leaves the codebook has a uniform grid.
        rules = {"**": weights, "**/norm/scale": None}
        base = Spec(8, "symmetric", per_channel(), range="static")
    if base is not None:
        rules |= {key: with_value(base, value) for key, value in own.items()}
    return dataclasses.replace(found, weights=found.weights + make_policy(weights=rules).weights)


def _refuse(section: ConfigDict, names: Iterable[str], why: str, remedy: str = "leave it") -> None:
    """Raises a `UserError` if a field that nothing reads has another value than its default.

    Args:
      section: `quant`.
      names: of the fields, dotted below it.
      why: the field is not read, for the error.
      remedy: what to do, before the default.
    """
    given, plain = section.to_dict(), quantization().to_dict()
    for name in names:
        value, default = field_of(given, name), field_of(plain, name)
        if value != default:
            raise UserError(f"quant.{name} is {value!r}, but {why}; {remedy} at {default!r}")


def _refuse_of_ranges(section: ConfigDict, weights: Spec | None, activations: Spec | None) -> None:
    """Raises a `UserError` on a field of ranges that are stored where there are none."""
    if not any(
        spec is not None and not spec.is_codebook and spec.range != "dynamic" for spec in (weights, activations)
    ):
        _refuse(section, _OF_RANGES, "nothing here has a range that is stored")


def _check_bits(field: str, bits: int, scheme: str) -> None:
    """Raises a `UserError` that names the field if a uniform grid cannot have so many bits."""
    least = 1 if scheme == "offset" else 2
    if isinstance(bits, int) and not least <= bits <= 16:
        fewer = "; for fewer set quant.weight_scheme to 'ternary' or 'binary'" if field == "quant.weight_bits" else ""
        raise UserError(f"{field} is {bits}: uniform grids take {least} to 16 bits, and 32 is full precision{fewer}")


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
        read = _READ.get(scheme, {"weight_granularity"})
        unread = [name for name in _OF_WEIGHTS if name not in read]
        _refuse(section, unread, f"quant.weight_scheme {scheme!r} does not read it")
        if (scheme, section.weight_scale) == ("binary", "one"):
            _refuse(section, ("weight_granularity",), "signs with quant.weight_scale='one' have no scale to share")
        if scheme == "ir_net":
            return ir_net(granularity)
        options = {}
        if scheme in ("ternary", "binary", "magnitude"):
            options = dict(scale=section.weight_scale, gradient=section.weight_gradient)
        return Spec(bits, scheme, granularity, range="dynamic", rounding=section.weight_rounding, **options)
    if bits == 32:
        unread = [name for name in _OF_WEIGHTS if name not in _TOLERATED]
        _refuse(section, (*unread, "published_evaluation"), "quant.weight_bits is 32, full precision")
        return None
    bits = 8 if bits is None else bits
    _check_bits("quant.weight_bits", bits, scheme)
    unread = [name for name in _OF_WEIGHTS if name not in _UNIFORM or (scheme, name) == ("shifted", "weight_rounding")]
    _refuse(section, unread, f"quant.weight_scheme {scheme!r} does not read it")
    return Spec(
        bits,
        scheme,
        granularity,
        estimator(section.weight_estimator, **section.weight_options),
        scale_domain=section.scale_domain,
        range_gradient=section.range_gradient,
        rounding="truncate" if scheme == "shifted" else section.weight_rounding,
    )


def _activation_spec(section: ConfigDict) -> Spec | None:
    if section.activation_bits == 32:
        unread = (*_OF_ACTIVATIONS, "activation_sites", "setup")
        _refuse(section, unread, "quant.activation_bits is 32, full precision")
        return None
    _check_bits("quant.activation_bits", section.activation_bits, section.activation_scheme)
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
    """Returns the policy of a BitTransformer, and of the graph convolutions beside it."""
    bit, given = section.bit, section.to_dict()
    # AdaRound and the published evaluation are applied, or refused, by what runs with the policy.
    own = ("bit", "adaround", "published_evaluation")
    for name, value in quantization().to_dict().items():
        if name not in own and given[name] != value:
            left = f"leave quant.{name} " + ("empty" if value in ("", {}) else f"at {value!r}")
            instead = f" and set quant.bit.{name}" if name in bit else ""
            raise UserError(f"quant.bit says which sites are quantized, and how: {left}{instead}")
    for name in ("states", "gcn_states"):
        if bit[name] not in (0, *STATES):
            takes = f"states={STATES[0]} to {STATES[-1]}, not {bit[name]}"
            raise UserError(f"quant.bit.{name}: weights take {takes}; 0 is full precision")
    if not bit.states:  # nothing of the encoder is quantized, attention included
        unread = ("bit.activation_bits", "bit.embeddings", "bit.attention", "bit.attention_act_32")
        _refuse(section, unread, "quant.bit.states is 0, full precision")
    if not bit.gcn_states:
        _refuse(section, ("bit.gcn_activation_bits",), "quant.bit.gcn_states is 0, full precision")
    fields = bit.to_dict() | {"attention": bit.attention and bit.states > 0}
    del fields["linear_bias"]  # of the parameters, not of a site
    return bit_policy(**fields)


def _student_policy(section: ConfigDict, weights: Spec | None) -> Policy:
    """Returns the policy of teacher intervention, with a grid for weights and one for activations."""
    if section.student not in ("corrected", "published", "layers"):
        raise UserError(f"quant.student is {section.student!r}; choose from 'corrected', 'published', 'layers', ''")
    if section.overrides or section.weight_overrides or section.pattern:
        raise UserError("quant.student says which sites are quantized: leave pattern and overrides empty")
    _refuse(section, ("setup", "activation_sites"), "quant.student says which sites are quantized")
    if weights is None:
        raise UserError(f"quant.student is {section.student!r}, but quant.weight_bits is 32: give the weights bits")
    if not 0 < section.student_clip < math.inf:
        raise UserError(f"quant.student_clip must be a positive number, got {section.student_clip}")
    clip = (-section.student_clip, section.student_clip)
    activations = _student_activations(section)
    _refuse_of_ranges(section, weights, activations)
    weights = dataclasses.replace(weights, clip=clip)
    activations = None if activations is None else dataclasses.replace(activations, clip=clip)
    table = dataclasses.replace(weights, granularity=per_channel())
    switches = _student_parts(section)
    found = student_policy(weights, table, activations, **switches, published=section.student == "published")
    if found == Policy():
        raise UserError(
            f"quant.student_without {section.student_without!r} leaves nothing to quantize: name fewer parts"
        )
    return found


def _student_parts(section: ConfigDict) -> dict[str, bool]:
    """Returns which parts of a student are quantized, by name."""
    switches = dict.fromkeys(PARTS, True)
    if section.student == "layers":
        switches |= {"emb": False, "cls": False}
    for part in filter(None, (part.strip() for part in section.student_without.split(","))):
        if not switches.get(part):
            has = [name for name, on in switches.items() if on]
            raise UserError(f"quant.student_without: {section.student!r} has no part {part!r}{near_misses(part, has)}")
        switches[part] = False
    return switches


def check_student(section: ConfigDict, sites: Iterable[str]) -> None:
    """Raises a `UserError` if a model does not have a part that its student quantizes: a word table, or a pooler.

    Args:
      section: `quant`.
      sites: names of the model's sites.
    """
    if not section.student:
        return
    names, switches = list(sites), _student_parts(section)
    missing = [
        part
        for part, weights in PARTS_OF_SOME.items()
        if switches[part] and not any(name.endswith(weights) for name in names)
    ]
    if missing:
        without = ", ".join([*filter(None, [section.student_without.strip(" ,")]), *missing])
        lacks = " and ".join({"emb": "no word table", "cls": "no pooler"}[part] for part in missing)
        raise UserError(
            f"quant.student is {section.student!r}, but the model has {lacks}; set quant.student_without={without!r}"
        )


def _student_activations(section: ConfigDict) -> Spec | None:
    """Returns the grid of what enters the products of a student; None: full precision."""
    if section.student_activations not in ("published", "fields"):
        raise UserError(
            f"quant.student_activations is {section.student_activations!r}; choose from 'published', 'fields'"
        )
    if section.student_activations == "published":
        reads = "a student reads it with quant.student_activations='fields' alone"
        _refuse(section, _OF_ACTIVATIONS, reads, "set that, or leave it")
        if section.activation_bits == 32:
            return None
        _check_bits("quant.activation_bits", section.activation_bits, ACTIVATIONS.scheme)
        return dataclasses.replace(ACTIVATIONS, bits=section.activation_bits)
    found = _activation_spec(section)
    if found is None:
        return None
    return dataclasses.replace(found, granularity=_granularity(section.activation_granularity))


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
    _refuse(section, ("setup",), "quant.pattern and activation_sites='inputs' do not read it")
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
