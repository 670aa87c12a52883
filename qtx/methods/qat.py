"""Phases for quantization-aware training: calibrate, then train through the grids.

Straight-through gradients reach weights and, with `ranges='learned'`, scales and zero points (Esser et al. 2020, Bhalgat et
al. 2020). Their scaling of these gradients is off by default, as in Bondarenko et al. 2021 (`Spec.range_gradient`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
from flax import traverse_util

from qtx.errors import UserError
from qtx.methods.calibrate import Args, calibrate, weight_ranges
from qtx.nn.sites import SiteInfo
from qtx.quant.policy import Policy
from qtx.quant.spec import Spec
from qtx.train.optimizer import OptimizerConfig
from qtx.train.phase import Phase

Ranges = Literal["learned", "fixed", "updated"]


def training_policy(
    policy: Policy,
    ranges: Ranges = "learned",
    weight_ranges: Ranges | None = None,
    backward: Literal["exact", "compact"] = "compact",
) -> Policy:
    """Returns the policy in the form that training needs.

    Args:
      policy: of the quantized model.
      ranges: `'learned'` trains every static range; `'fixed'` keeps what calibration found, also where the policy's own ranges
        are learned; `'updated'` re-estimates: weight ranges from the present weights at every step, activation ranges by their
        estimator.
      weight_ranges: the same for weights alone; None: as `ranges`.
      backward: of learned ranges: what is kept for the gradients of the scales, see `qtx.quant.spec.Spec`.
    """
    of_weights = ranges if weight_ranges is None else weight_ranges
    for rule in (ranges, of_weights):
        if rule not in get_args(Ranges):
            choices = ", ".join(map(repr, get_args(Ranges)))
            raise UserError(f"unknown rule {rule!r} for ranges in training; choose from {choices}")

    def learned(spec: Spec) -> Spec:
        return dataclasses.replace(spec, range="learned", backward=backward) if spec.range == "static" else spec

    def dynamic(spec: Spec) -> Spec:
        return dataclasses.replace(spec, range="dynamic")

    def fixed(spec: Spec) -> Spec:
        return dataclasses.replace(spec, range="static") if spec.range == "learned" else spec

    found = policy.map_specs(learned if ranges == "learned" else fixed)
    changes = {"learned": learned, "updated": dynamic, "fixed": fixed}
    return dataclasses.replace(found, weights=policy.map_specs(changes[of_weights]).weights)


def known_ranges(
    ranges: Mapping[str, Any], sites: Mapping[str, SiteInfo]
) -> Callable[[nn.Module, Any], dict[str, Any]]:
    """Returns what prepares a phase, in place of calibration: ranges of activations as given, those of weights from these.

    Args:
      ranges: nested, of activations and inputs.
      sites: of the model.
    """

    def prepare(model: nn.Module, params: Any) -> dict[str, Any]:
        policy: Policy = model.policy  # type: ignore[attr-defined]
        flat = traverse_util.flatten_dict(weight_ranges(policy, sites, params))
        return traverse_util.unflatten_dict(flat | traverse_util.flatten_dict(dict(ranges)))

    return prepare


def qat_phase(
    name: str,
    model: nn.Module,
    policy: Policy,
    calibration: Sequence[Args],
    optimizer: OptimizerConfig,
    ranges: Ranges = "learned",
    calibration_options: dict[str, Any] | None = None,
    weight_ranges: Ranges | None = None,
    **options: Any,
) -> Phase:
    """Returns a phase that calibrates the model and trains it quantized.

    Args:
      name: of the phase.
      model: the full-precision module.
      policy: what is quantized, and how.
      calibration: argument tuples for the model.
      optimizer: its settings.
      ranges: see `training_policy`.
      calibration_options: further arguments of `calibrate`.
      weight_ranges: see `training_policy`.
      **options: further fields of `Phase`. Grids that depend on the progress of training see it by the epoch, as in IR-Net,
        unless `schedule` says otherwise.
    """
    trained = training_policy(policy, ranges, weight_ranges)
    depends = any(rule.spec is not None and rule.spec.needs_progress for rule in trained.weights)
    options.setdefault("schedule", "epoch" if depends else "none")
    return Phase(
        name,
        model.clone(policy=trained),
        optimizer,
        prepare=lambda model, params: calibrate(model, params, calibration, **(calibration_options or {})),
        update_ranges=ranges == "updated",
        **options,
    )
