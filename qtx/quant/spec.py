"""What grid a tensor is put on, as one hashable value.

A `Spec` says everything about one quantizer: how many bits, which scheme, which elements share a range
(`Granularity`), how that range is found (`MinMax` or `Search`) and what becomes of it in training (`range`). It holds
no arrays, so it can be a static argument of a compiled function, a dictionary key or an attribute of a module.

The functions that do the work live beside it: `grid` (ranges to integers and back), `observe` (data to ranges),
`search` (ranges of least error) and `codebook` (grids whose scale comes from the tensor itself).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from qtx.errors import UserError, near_misses

UNIFORM = ("symmetric", "full", "narrow", "asymmetric", "offset", "shifted")
CODEBOOKS = {  # least and greatest number of bits
    "ternary": (2, 2),
    "twn": (3, 8),
    "loss_aware": (2, 8),
    "binary": (1, 1),
    "sign": (1, 1),
    "tanh": (1, 1),
    "magnitude": (1, 15),
    "magnitude_int8": (1, 8),  # beyond, magnitudes wrap round a signed byte more than once
    "absmean": (1, 3),
}
STATES = (2, 3, 4, 5)  # of `'absmean'`
SCHEMES = (*UNIFORM, *CODEBOOKS)


def _choice(what: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        raise UserError(f"unknown {what} {value!r}{near_misses(str(value), options)}")


@dataclasses.dataclass(frozen=True)
class Granularity:
    """Which elements of a tensor share one range.

    Attributes:
      axis: the axis (or axes) that keeps its own ranges; `None` for one range in all. `'channel'` is the site's own
        output axis (last of a Dense kernel, vocabulary rows of a table), `'token'` is every axis but the last.
      groups: `K` groups along `axis` instead of one range per index (per-embedding-group, PEG); must divide its size.
      permute: group members are chosen by sorting the channels by their range, not by position
        (Bondarenko et al. 2021, section 4); see `qtx.quant.rows.groups_by_range`.
    """

    axis: int | tuple[int, ...] | Literal["channel", "token"] | None = None
    groups: int | None = None
    permute: bool = False

    def __post_init__(self):
        if isinstance(self.axis, str):
            _choice("granularity axis", self.axis, ("channel", "token"))
        if self.groups is not None and (not isinstance(self.axis, int) or self.groups < 1):
            raise UserError(
                f"groups={self.groups} needs one axis to group along and at least one group; use per_group(K)"
            )
        if self.permute and self.groups is None:
            raise UserError("permute=True needs groups; use per_group(K, permute=True)")

    def __str__(self) -> str:
        if self.groups is not None:
            return f"{self.groups} groups on axis {self.axis}" + (", permuted" if self.permute else "")
        names = {None: "tensor", "channel": "channel", "token": "token", -1: "embedding", -2: "position"}
        return f"per {names[self.axis]}" if self.axis in names else f"per index of axis {self.axis}"


def per_tensor() -> Granularity:
    """One range for the whole tensor."""
    return Granularity()


def per_channel(axis: int | Literal["channel"] = "channel") -> Granularity:
    """One range per output channel of a weight: per vocabulary row for a table, per element for a norm's scale."""
    return Granularity(axis)


def per_token() -> Granularity:
    """One range for each token of each sequence, over the features; only sensible with `range='dynamic'`."""
    return Granularity("token")


def per_position() -> Granularity:
    """One range per position of `[batch, tokens, dim]`, shared by the batch (the published "per-token")."""
    return Granularity(-2)


def per_embedding() -> Granularity:
    """One range per embedding dimension, the last axis."""
    return Granularity(-1)


def per_group(groups: int, permute: bool = False, axis: int = -1) -> Granularity:
    """Per-embedding-group (PEG): `groups` ranges along `axis`, contiguous or sorted by range (`permute`)."""
    return Granularity(axis, groups, permute)


@dataclasses.dataclass(frozen=True)
class MinMax:
    """Ranges from the extremes of the data.

    Attributes:
      over: `'current'` (the last batch wins), `'all'` (widest so far), `'mean'` (of all batches), `'running'` (moving average)
        or `'restarting'` (moving average that starts again from the batch while one of its ends is 0, as published in the
        AG_NEWS study).
      momentum: weight of the old range in the moving average; the first batch sets it outright.
      percentile: `p` replaces minimum and maximum by the p-th and (100-p)-th percentile, linearly interpolated; 0: off.
      ends: which ends the percentile trims; `'lower'` is what the published per-tensor path does.
      from_zero: the lower end is 0, whatever the data (outputs of a ReLU).
      padding: whether positions outside the attention mask count.
      token_quantile: below 1, tokens are pruned (Wei et al. 2022, "Outlier suppression"): the upper end is the
        greatest of the tokens' maxima that is not above this quantile of their magnitudes, the lower end likewise. One
        range for the tensor; a token is a vector along the last axis.
      deviations: the ends are mean -+ so many standard deviations (3 in LSQ+, Bhalgat et al. 2020); 0: off.
    """

    over: Literal["current", "all", "mean", "running", "restarting"] = "current"
    momentum: float = 0.9
    percentile: float = 0.0
    ends: Literal["both", "lower"] = "both"
    from_zero: bool = False
    padding: Literal["ignore", "include"] = "ignore"
    token_quantile: float = 1.0
    deviations: float = 0.0

    def __post_init__(self):
        _choice("min-max estimator", self.over, ("current", "all", "mean", "running", "restarting"))
        _choice("percentile ends", self.ends, ("both", "lower"))
        _choice("padding rule", self.padding, ("ignore", "include"))
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum {self.momentum} is outside [0, 1)")
        if not 0 <= self.percentile < 50:
            raise UserError(
                f"percentile {self.percentile} is outside [0, 50); 0 switches it off, 1 trims 1 % at each end"
            )
        if not 0 < self.token_quantile <= 1:
            raise UserError(f"token_quantile {self.token_quantile} is outside (0, 1]; 1 prunes no token")
        if self.deviations < 0:
            raise UserError(f"deviations {self.deviations} is negative; 3 is LSQ+'s, 0 switches it off")
        if (self.percentile > 0) + (self.token_quantile < 1) + (self.deviations > 0) > 1:
            raise UserError("percentile, token_quantile and deviations each say what the ends are; set one of them")


@dataclasses.dataclass(frozen=True)
class Search:
    """Ranges of least quantization error, found by search.

    The extent `S` of the search is the largest magnitude of the first batch plus a margin. A grid tries
    `candidates` ranges up to `S` (times shifts, for the asymmetric scheme on two-sided data) and adds the losses of all
    batches; Brent's bounded method finds one range on each batch.

    Attributes:
      loss: `'mse'`, or `'cross_entropy'` of the softmax over the last axis (for logits).
      method: `'grid'` or `'brent'` (published as `golden_section`).
      candidates: number of range widths on the grid.
      margin: added to the extent; absolute as published, or a fraction of it with `relative_margin`.
      relative_margin: the margin is a fraction of the largest magnitude, so small tensors get a fine grid too.
      extent: every row (channel, group) has its own extent, or all share the tensor's (as published).
      padding: whether positions outside the attention mask count.
      over: of Brent's method: `'current'` (the last batch wins) or `'mean'` (of the ranges of all batches, each with an extent
        of its own).
      sample: look at so many elements of a row at most, spread evenly (the extent is that of all); 0: at all of them.
    """

    loss: Literal["mse", "cross_entropy"] = "mse"
    method: Literal["grid", "brent"] = "grid"
    candidates: int = 100
    margin: float = 0.5
    relative_margin: bool = False
    extent: Literal["row", "tensor"] = "row"
    padding: Literal["ignore", "include"] = "ignore"
    over: Literal["current", "mean"] = "current"
    sample: int = 0

    def __post_init__(self):
        _choice("search loss", self.loss, ("mse", "cross_entropy"))
        _choice("search method", self.method, ("grid", "brent"))
        _choice("search extent", self.extent, ("row", "tensor"))
        _choice("rule for several batches", self.over, ("current", "mean"))
        if self.over == "mean" and self.method == "grid":
            raise UserError("a grid adds the losses of all batches: over='mean' is for method='brent'")
        _choice("padding rule", self.padding, ("ignore", "include"))
        if self.candidates < 1:
            raise UserError(f"a search needs at least one candidate, not {self.candidates}")
        if self.sample < 0 or (self.sample and self.loss != "mse"):
            raise UserError(f"sample={self.sample}: a number of elements, for loss='mse'; 0 looks at all of them")
        if self.margin < 0:
            raise UserError(f"the search margin {self.margin} is negative")


Estimator = MinMax | Search

ESTIMATORS: dict[str, Estimator] = {
    "current_minmax": MinMax("current"),
    "all_minmax": MinMax("all"),
    "mean_minmax": MinMax("mean"),
    "lsq_plus": MinMax("current", deviations=3.0),
    "running_minmax": MinMax("running"),
    "restarting_minmax": MinMax("restarting"),
    "percentile": MinMax("current", percentile=0.1),
    "mse": Search("mse", "grid", relative_margin=True),
    "mse_brent": Search("mse", "brent", relative_margin=True),
    "mean_mse_brent": Search("mse", "brent", margin=0.0, over="mean"),
    "cross_entropy": Search("cross_entropy", "grid", relative_margin=True),
}


def estimator(name: str, **options: Any) -> Estimator:
    """Returns a range estimator by its short name, with some of its fields replaced.

    Args:
      name: a key of `ESTIMATORS`.
      **options: fields of `MinMax` or `Search` to change, such as `momentum=0.95`.

    Raises:
      UserError: on an unknown name or an option that the estimator does not have.
    """
    if name not in ESTIMATORS:
        raise UserError(f"unknown range estimator {name!r}{near_misses(name, ESTIMATORS)}")
    base = ESTIMATORS[name]
    fields = [field.name for field in dataclasses.fields(base)]
    for option in options:
        if option not in fields:
            raise UserError(f"range estimator {name!r} has no option {option!r}{near_misses(option, fields)}")
    return dataclasses.replace(base, **options)


@dataclasses.dataclass(frozen=True)
class Spec:
    """One quantizer, fully described.

    Attributes:
      bits: 2 to 16 for the uniform schemes (`'offset'`: from 1); ternary counts as 2, binary as 1; `'magnitude'` has a sign
        besides its bits.
      scheme: `'symmetric'` (no zero point; unsigned when the range is one-sided), `'narrow'` (symmetric, signed in any case and
        without the least integer: as many levels on both sides of zero), `'full'` (symmetric, signed in any case, step
        `2 max|x| / (2^b - 1)`: the ends lie half a step outside the outermost levels), `'asymmetric'` (integer zero point),
        `'offset'` (the lower end itself is on the grid, and zero need not be); with a scale from the tensor itself
        `'ternary'` (threshold 0.7 mean|x|, TWN), `'binary'` (signs), `'loss_aware'` (the scale of least error, found by
        alternation), `'twn'` (TWN's threshold for more bits), `'magnitude'` (sign and magnitude) or `'absmean'` (2 to 5 states
        around zero, in units of mean|x|), see `qtx.quant.codebook`. As published, where results depend on it: `'shifted'` (the
        lower end is added without having been subtracted), `'magnitude_int8'` (codes wrap in a signed byte), `'sign'` (signs
        without a scale, zero stays zero) and `'tanh'` (a soft sign that hardens in training).
      granularity: which elements share a range.
      estimator: how the range is found.
      range: `'static'` (calibrated once), `'learned'` (calibrated, then trained) or `'dynamic'` (from the tensor itself at
        every call; ternary and binary are always so).
      scale_domain: what is stored and trained: the scale (`'linear'`, floored at `eps` when it is read), its logarithm
        (`'log'`) or its inverse softplus (`'softplus'`), which keep it positive.
      eps: least scale of the linear domain, and of `'absmean'`, and least upper end of a range.
      backward: of a learned range: `'exact'` keeps the tensor for the gradient of the scale, `'compact'` one byte an element
        (see `qtx.quant.ste.uniform_compact`).
      rounding: `'nearest'`, or `'stochastic'`: up or down at random so that the mean is kept, in training (where the random
        stream `rounding` is given), else to nearest; for `'shifted'`: `'truncate'` or `'floor'`.
      scale: of signs and ternary values: `'mean'` (of the magnitudes), `'shift'` (the power of two nearest to it) or `'one'`;
        of `'magnitude'`: `'norm'` puts the Euclidean norm in the place of the largest magnitude.
      gradient: of a codebook: `'straight'` (all of it passes), `'clipped'` (where |x| <= 1, inclusive) or `'decay'` (IR-Net's
        error decay estimator, which depends on the progress of training).
      standardize: of a codebook: each row is centred and scaled to unit standard deviation first (IR-Net).
      range_gradient: of a learned range: `'plain'`, or `'lsq'`: those of scale and zero point are divided by `sqrt(n
        q_max)`, with `n` elements sharing the range (Esser et al. 2020, section 2.2).
      clip: `(low, high)`: the tensor is clamped to it before anything else, statistics included; what is not strictly
        inside has no gradient. Any scheme; None: no clamp. A clip that is learned is a range that is learned (`range`): its
        ends are the scale times the ends of the grid.
      iterations: of `'loss_aware'`: how often scale and codes are found in turn.
      states: of `'absmean'`, and of it alone: the number of values, 2 to 5; `bits` is what holds them (1, 2, 2, 3).
    """

    bits: int = 8
    scheme: str = "symmetric"
    granularity: Granularity = Granularity()
    estimator: Estimator = MinMax()
    range: Literal["static", "dynamic", "learned"] = "static"
    scale_domain: Literal["linear", "log", "softplus"] = "linear"
    eps: float = 1e-8
    backward: Literal["exact", "compact"] = "exact"
    range_gradient: Literal["plain", "lsq"] = "plain"
    rounding: Literal["nearest", "stochastic", "truncate", "floor"] = "nearest"
    scale: Literal["mean", "shift", "one", "norm"] = "mean"
    gradient: Literal["straight", "clipped", "decay"] = "straight"
    standardize: bool = False
    clip: tuple[float, float] | None = None
    iterations: int = 11
    states: int | None = None

    def __post_init__(self):
        self._check_clip()
        _choice("rounding", self.rounding, ("nearest", "stochastic", "truncate", "floor"))
        _choice("codebook scale", self.scale, ("mean", "shift", "one", "norm"))
        _choice("codebook gradient", self.gradient, ("straight", "clipped", "decay"))
        _choice("backward pass", self.backward, ("exact", "compact"))
        _choice("range gradient", self.range_gradient, ("plain", "lsq"))
        _choice("scheme", self.scheme, SCHEMES)
        _choice("range rule", self.range, ("static", "dynamic", "learned"))
        _choice("scale domain", self.scale_domain, ("linear", "log", "softplus"))
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise UserError(f"bits must be a whole number, not {self.bits!r}")
        if self.is_codebook:
            least, most = CODEBOOKS[self.scheme]
            if not least <= self.bits <= most:
                allowed = least if least == most else f"{least} to {most}"
                raise UserError(f"{self.scheme} takes bits={allowed}, not {self.bits}")
            if self.range != "dynamic":
                raise UserError(
                    f"{self.scheme} scales come from the tensor itself; use range='dynamic', not {self.range!r}"
                )
        elif not (1 if self.scheme == "offset" else 2) <= self.bits <= 16:
            raise UserError(
                f"{self.bits} bits: uniform grids take 2 to 16; for fewer use qtx.ternary() or qtx.binary()"
            )
        if self.iterations < 1 or (self.iterations != 11 and self.scheme != "loss_aware"):
            raise UserError(
                f"iterations={self.iterations}: at least one, and for loss_aware grids, not {self.scheme!r}"
            )
        self._check_states()
        truncated = self.rounding in ("truncate", "floor")
        if truncated != (self.scheme == "shifted"):
            raise UserError(
                f"scheme {self.scheme!r} does not go with rounding={self.rounding!r}: 'truncate', 'floor' belong to 'shifted'"
            )
        if self.rounding == "stochastic" and self.scheme in CODEBOOKS and "magnitude" not in self.scheme:
            raise UserError(f"the codes of {self.scheme!r} are not rounded: use rounding='nearest'")
        if self.scale == "norm" and self.scheme != "magnitude":
            raise UserError(f"scale='norm' is for magnitude grids, not {self.scheme!r}")
        own = self.scale in ("shift", "one") or self.gradient != "straight" or self.standardize
        if own and self.scheme not in ("ternary", "binary"):
            raise UserError(f"scale, gradient and standardize are for ternary and binary grids, not {self.scheme!r}")
        if self.scheme in ("offset", "shifted") and isinstance(self.estimator, Search):
            raise UserError(
                f"scheme {self.scheme!r} takes ranges from minimum and maximum; searches are for the other schemes"
            )
        is_entropy = isinstance(self.estimator, Search) and self.estimator.loss == "cross_entropy"
        prunes = isinstance(self.estimator, MinMax) and self.estimator.token_quantile < 1
        if prunes and self.granularity.axis is not None:
            raise UserError("token_quantile prunes whole tokens: it needs per_tensor() granularity")
        if is_entropy and self.granularity.axis is not None:
            raise UserError("the cross-entropy search looks at whole rows of logits: it needs per_tensor() granularity")

    def _check_states(self) -> None:
        if self.scheme != "absmean":
            if self.states is not None:
                raise UserError(
                    f"states={self.states}: scheme {self.scheme!r} has bits; use scheme='absmean' for states"
                )
        elif self.states not in STATES:
            raise UserError(f"absmean takes states={STATES[0]} to {STATES[-1]}, not {self.states!r}")
        elif self.bits != (needed := (self.states - 1).bit_length()):
            raise UserError(f"{self.states} states take bits={needed}, not {self.bits}; use qtx.absmean({self.states})")

    def _check_clip(self) -> None:
        if self.clip is None:
            return
        if not isinstance(self.clip, tuple | list) or len(self.clip) != 2 or not self.clip[0] < self.clip[1]:
            raise UserError(f"clip={self.clip!r} is no pair of a low and a higher end, such as (-2.5, 2.5)")
        object.__setattr__(self, "clip", tuple(map(float, self.clip)))  # lists, as JSON has them, have no hash

    @property
    def is_codebook(self) -> bool:
        """Whether the scale comes from the tensor itself at every call, and no range is stored."""
        return self.scheme in CODEBOOKS

    @property
    def has_zero_point(self) -> bool:
        """Whether a zero point is stored with the scale."""
        return self.scheme in ("asymmetric", "offset", "shifted")

    @property
    def is_ternary(self) -> bool:
        """Whether the codes are -1, 0 and 1."""
        if self.scheme == "absmean":
            return self.states == 3
        return self.scheme in ("ternary", "sign") or (self.scheme == "loss_aware" and self.bits == 2)

    @property
    def storage_bits(self) -> float:
        """Bits that a value takes: log2(3) where there are three of them, 32 where they are real numbers."""
        if self.is_ternary:
            return math.log2(3)
        if self.states is not None:
            return math.log2(self.states)
        if self.scheme in ("magnitude", "twn"):
            return self.bits + 1
        if self.scheme == "magnitude_int8":
            return min(self.bits + 1, 8)
        return 32 if self.scheme in ("tanh", "shifted") else self.bits

    @property
    def needs_progress(self) -> bool:
        """Whether values or gradients depend on how far training has come."""
        return self.scheme == "tanh" or self.gradient == "decay"

    def at(self, channel_axis: int, ndim: int) -> Spec:
        """Returns the spec with symbolic axes replaced by those of a tensor with `ndim` axes.

        Args:
          channel_axis: what `'channel'` means for this tensor.
          ndim: number of axes of the tensor.
        """
        axis = self.granularity.axis
        if axis == "channel":
            axis = channel_axis
        elif axis == "token":
            axis = tuple(range(ndim - 1))
        if axis == self.granularity.axis:
            return self
        return dataclasses.replace(self, granularity=dataclasses.replace(self.granularity, axis=axis))

    def __str__(self) -> str:
        rounded: list[str] = [self.rounding] if self.rounding == "stochastic" else []
        rounded += [] if self.clip is None else [f"clip {self.clip[0]:g}..{self.clip[1]:g}"]
        if self.is_codebook:
            bits = f"{self.bits}-bit " if CODEBOOKS[self.scheme][1] > 2 else ""
            bits = bits if self.states is None else f"{self.states}-state "
            own = ["standardized"] * self.standardize
            own += [f"scale {self.scale}"] * (self.scale != "mean") + [f"gradient {self.gradient}"] * (
                self.gradient != "straight"
            )
            return ", ".join([f"{bits}{self.scheme}", str(self.granularity), *own, *rounded])
        return ", ".join([f"{self.bits}-bit {self.scheme}", str(self.granularity), self.range, *rounded])


def symmetric(bits: int = 8, granularity: Granularity = Granularity(), **options: Any) -> Spec:
    """A symmetric uniform grid; `options` are further fields of `Spec`."""
    return Spec(bits, "symmetric", granularity, **options)


def asymmetric(bits: int = 8, granularity: Granularity = Granularity(), **options: Any) -> Spec:
    """An asymmetric uniform grid with an integer zero point; `options` are further fields of `Spec`."""
    return Spec(bits, "asymmetric", granularity, **options)


def ternary(granularity: Granularity = Granularity(), **options: Any) -> Spec:
    """{-a, 0, a} with threshold 0.7 mean|x| (Li et al. 2016, "Ternary weight networks")."""
    return Spec(2, "ternary", granularity, range="dynamic", **options)


def binary(granularity: Granularity = Granularity(), **options: Any) -> Spec:
    """{-a, a} with a = mean|x| (Rastegari et al. 2016, XNOR-Net, eq. 6); BinaryConnect's with `scale='one',
    gradient='clipped'` (Courbariaux et al. 2015)."""
    return Spec(1, "binary", granularity, range="dynamic", **options)


def ir_net(granularity: Granularity = Granularity("channel")) -> Spec:
    """Balanced and standardised signs with a power of two for a scale and decaying gradient error (Qin et al. 2020, IR-Net)."""
    return binary(granularity, scale="shift", gradient="decay", standardize=True)


def loss_aware(bits: int = 2, granularity: Granularity = Granularity(), **options: Any) -> Spec:
    """`2^bits - 1` levels at the scale of least squared error (Hou and Kwok 2018, "Loss-aware weight quantization")."""
    return Spec(bits, "loss_aware", granularity, range="dynamic", **options)


def magnitude(bits: int, granularity: Granularity = Granularity(), **options: Any) -> Spec:
    """Sign and `bits` bits of magnitude relative to the largest, rounded at random (Alistarh et al. 2017, QSGD)."""
    return Spec(bits, "magnitude", granularity, range="dynamic", **{"rounding": "stochastic", **options})


def absmean(states: int, granularity: Granularity = Granularity("channel"), **options: Any) -> Spec:
    """2 to 5 states in units of mean|x| (Ma et al. 2024, "The era of 1-bit LLMs"; BitTransGNN has 2 to 5 of them).

    Args:
      states: 2: -1 and 1, 3: -1 to 1, 4: -2 to 1, 5: -2 to 2.
      granularity: which elements share a mean.
      **options: further fields of `Spec`; `eps`, the least scale, is 1e-5 as published.

    Raises:
      UserError: on another number of states.
    """
    bits = (states - 1).bit_length() if states in STATES else 1  # the rest is for `Spec` to say
    return Spec(bits, "absmean", granularity, range="dynamic", states=states, **{"eps": 1e-5, **options})
