"""Per-example clipping, from inside a Keras optimizer: one forward and one backward pass, no wrapper model.

Promise: what one example adds to `ClippedSum.sums` has l2 norm at most `l2_norm_clip`, over all variables together, and
depends on that example alone. An example whose gradient is not finite adds zero. Where a rule is not known to be exact
the slow path is taken, with a warning that names the layer; where examples see each other the model is refused.
The engine knows nothing of noise, samplers or accounts.
"""

import dataclasses
import functools
import logging
import warnings
from collections.abc import Sequence

import tensorflow as tf

from tfprivacy_ft import keras_compat
from tfprivacy_ft.clipping import graph as graphs
from tfprivacy_ft.clipping import one_by_one
from tfprivacy_ft.clipping.broadcast import ElementwiseSite
from tfprivacy_ft.clipping.convolution import ConvolutionSite
from tfprivacy_ft.clipping.embedding import EmbeddingSite
from tfprivacy_ft.clipping.layout import COUPLED, Layouts
from tfprivacy_ft.clipping.products import ProductSite
from tfprivacy_ft.clipping.rules import ClippingRule, Flat, weights_of
from tfprivacy_ft.clipping.sites import Contribution, UseSite, keep_rows, precision
from tfprivacy_ft.clipping.terms import Share, find_shares, find_terms
from tfprivacy_ft.clipping.weights import Use, find_uses, pulled_back
from tfprivacy_ft.errors import UnsupportedModelError

SITES: tuple[type[UseSite], ...] = (ProductSite, ConvolutionSite, ElementwiseSite, EmbeddingSite)

_log = logging.getLogger(__name__)


class SlowClippingWarning(UserWarning):
    """Gradients are taken one example at a time, because an op has no fast rule."""


class RoundedClipWarning(UserWarning):
    """The device rounds matrix products more coarsely than the clip's promise allows for."""


@dataclasses.dataclass(frozen=True)
class ClippedSum:
    """A sum over examples in which each has sensitivity `l2_norm_clip` (add or remove one, or zero one out).

    Args:
      sums: float32, or float64 for float64 variables; one tensor of each variable's shape.
      data_independent: gradients of regularisers, of the variables' shapes, or None; not clipped and needing no noise.
      norms: float32 or float64 [B], each example's gradient norm before the clip; private, not to be released.
      real: bool [B], False for what a sampler made to fill the batch.
      batch_size: int32 scalar, examples in this batch.
      rules: for each variable the rules that found its gradients; `None` where examples were taken one by one.
    """

    sums: list[tf.Tensor]
    data_independent: list[tf.Tensor | None]
    norms: tf.Tensor
    real: tf.Tensor
    batch_size: tf.Tensor
    rules: list[tuple[str, ...]] | None


@tf.autograph.experimental.do_not_convert  # what is traced here is written with ops throughout
def clipped_sum(
    loss: tf.Tensor,
    variables: list[tf.Variable | tf.Tensor],
    l2_norm_clip: tf.Tensor | float,
    rule: ClippingRule | None = None,
    *,
    rows_per_example: int = 1,
    loss_scale: float | None = None,
    one_by_one_only: bool = False,
    constants: Sequence[tf.Tensor] = (),
    real: tf.Tensor | None = None,
) -> ClippedSum:
    """Sum over examples of the gradient of each example's loss, clipped to norm `l2_norm_clip`.

    Args:
      loss: the scalar loss, symbolic, as Keras hands it to an optimizer inside `train_step`.
      variables: the trainable variables; arguments of the traced function may stand for them.
      l2_norm_clip: scalar, > 0; the bound on the norm over all variables together.
      rule: how gradients are shortened to that; None for `Flat()`.
      rows_per_example: consecutive rows of the batch that are one example; its loss is the one Keras gives them together.
      loss_scale: what the loss is multiplied by while it is differentiated, and gradients divided by; for float16. An
        example whose scaled gradient overflows is left out.
      one_by_one_only: whether to use no fast rule, to compare them with.
      constants: arguments of the traced function that are the same for all examples, and not trained.
      real: bool [B], False for rows that only fill the batch and add nothing; None for what the step's sample weights say.

    Returns:
      A `ClippedSum`.

    Raises:
      UnsupportedModelError: examples see each other (BatchNormalization in training mode), the loss is eager, or it is
        computed in float16 without `loss_scale`.

    Source: Abadi et al. 2016, Algorithm 1; Lee & Kifer 2021 and Bu et al. 2023 for clipping without per-example loops.
    """
    if not hasattr(loss, "graph"):
        raise UnsupportedModelError(
            "the loss is an eager tensor, whose examples cannot be told apart: compile without run_eagerly=True."
        )
    _warn_of_rounded_products()
    weights = graphs.arguments(loss, variables)
    data = graphs.data_tensors(loss, [*weights, *graphs.arguments(loss, constants)])
    if loss_scale is None:
        _refuse_float16(loss, weights)
    loss_scale = loss_scale or 1.0
    batch_size = _count_examples(data[0], rows_per_example)
    layouts = Layouts(loss, data, rows_per_example)
    terms = find_terms(loss, layouts, weights)
    independent = _gradients_of(loss, terms.data_independent, variables)
    clip = tf.cast(l2_norm_clip, precision(variables))
    layers = [keras_compat.layer_path(v) for v in variables]

    def weigh(squared_norms: list[tf.Tensor]) -> list[tf.Tensor]:
        return weights_of(rule or Flat(), squared_norms, layers, clip)

    shares = find_shares(loss, terms, layouts, data, batch_size) if terms.per_example else None
    _refuse_batch_in_state(loss, data)
    real = one_by_one.real_examples(loss, batch_size) if real is None else real
    matched, reason = (None, None) if one_by_one_only else _match(loss, variables, shares, layouts)
    rules = None
    if matched is None or shares is None:
        _refuse_coupling(loss, variables, layouts)
        suspect = reason or layouts.first_unknown or layouts.first_coupling
        if data[0].shape[0] != rows_per_example:  # one example is as fast one by one
            _warn_slow(suspect)
        terms = find_terms(loss, layouts, weights, one_by_one=True)
        shares = find_shares(loss, terms, layouts, data, batch_size) if terms.per_example else None
        objective = one_by_one.Objective(loss, shares, terms.data_independent)
        coupled = str(_coupled(layouts.first_unknown or suspect or loss.op))
        sums, norms = one_by_one.clipped_sum(
            objective, variables, weigh, data, layouts, coupled, batch_size, real, loss_scale
        )
    else:
        rules = [tuple(type(site).__name__.removesuffix("Site") for _, site in sites) for sites in matched]
        scaled = [dataclasses.replace(s, row=s.row * tf.cast(loss_scale, s.row.dtype)) for s in shares]
        contributions = _contributions(matched, scaled, batch_size)
        sums, norms = _clip_and_sum(contributions, variables, weigh, real, loss_scale)
    return ClippedSum(sums, independent, norms, real, batch_size, rules)


_Matched = list[list[tuple[Use, UseSite]]]


def _match(
    loss: tf.Tensor, variables: list[tf.Variable | tf.Tensor], shares: list[Share] | None, layouts: Layouts
) -> tuple[_Matched | None, tf.Operation | None]:
    """Each variable's uses with their rules, or None and the op that has no rule."""
    if shares is None:
        return None, None
    upstream = set(graphs.ancestors([share.term for share in shares]))
    matched: _Matched = []
    for variable in variables:
        uses, stranger = find_uses(variable, loss, upstream, layouts)
        if stranger is not None:
            return None, stranger
        sites = []
        for use in uses:
            site = next((s for kind in SITES if (s := kind.match(use.meeting)) is not None), None)
            if site is None:
                return None, use.meeting.op
            sites.append((use, site))
        matched.append(sites)
    _log.debug("fast rules: %s", [(type(s).__name__, s.meeting.op.name) for sites in matched for _, s in sites])
    return matched, None


def _contributions(matched: _Matched, shares: list[Share], batch_size: tf.Tensor) -> list[Contribution | None]:
    """Each variable's contribution; None where it is not used."""
    flat = [site for sites in matched for _, site in sites]
    outputs = [site.meeting.output for site in flat]
    seeds = [share.spread(batch_size) for share in shares]
    gradients = iter(tf.gradients([share.term for share in shares], outputs, grad_ys=seeds))
    result: list[Contribution | None] = []
    for sites in matched:
        parts = []
        for use, site in sites:
            gradient = next(gradients)
            if gradient is not None:
                parts.append(pulled_back(site.at(tf.convert_to_tensor(gradient), batch_size), use))
        # A variable used in several places: its gradients are added up for each example, then measured.
        result.append(functools.reduce(lambda one, other: one.added_to(other), parts) if parts else None)
    return result


def _clip_and_sum(
    contributions: list[Contribution | None],
    variables: list[tf.Variable | tf.Tensor],
    weigh: one_by_one.Weigh,
    real: tf.Tensor,
    loss_scale: float,
) -> tuple[list[tf.Tensor], tf.Tensor]:
    dtype = precision(variables)
    none = tf.zeros(tf.shape(real), dtype)
    squares = [none if c is None else tf.cast(c.squared_norms(), dtype) / loss_scale**2 for c in contributions]
    norms = tf.sqrt(tf.add_n(squares)) if squares else none
    finite = tf.math.is_finite(norms)
    weights = [tf.where(finite & real, w / loss_scale, 0.0) for w in weigh(squares)] if squares else []
    used = [(c, w) for c, w in zip(contributions, weights, strict=True) if c is not None]
    parts = [c.parts() for c, _ in used]
    # Zero times NaN is NaN, so bad rows are blanked; that costs a copy, and is done only where there are any.
    if parts:
        parts = tf.cond(
            tf.reduce_all(finite),
            lambda: parts,
            lambda: [[keep_rows(part, finite) for part in of_variable] for of_variable in parts],
        )
    sums = iter([c.weighted_sum(of_variable, w) for (c, w), of_variable in zip(used, parts, strict=True)])
    return [
        tf.zeros(v.shape, precision([v])) if c is None else tf.ensure_shape(next(sums), v.shape)
        for c, v in zip(contributions, variables, strict=True)
    ], norms


def _count_examples(batch: tf.Tensor, rows_per_example: int) -> tf.Tensor:
    """Examples in a batch; fails where its rows are no multiple of `rows_per_example`, and nothing is computed then."""
    rows = tf.shape(batch)[0]
    if rows_per_example == 1:
        return rows
    sentence = (
        f"a batch has to hold rows_per_example={rows_per_example} rows for each example, and no part of one more."
    )
    if batch.shape[0] is not None and batch.shape[0] % rows_per_example:
        raise UnsupportedModelError(f"the batch has {batch.shape[0]} rows: {sentence}")
    whole = tf.debugging.assert_equal(rows % rows_per_example, 0, message=sentence)
    with tf.control_dependencies([] if whole is None else [whole]):
        return rows // rows_per_example


def _refuse_float16(loss: tf.Tensor, weights: list[tf.Tensor]) -> None:
    """Refuses models that compute in float16, where small gradients become zero before they can be measured."""
    made_of_variables: set[int] = set()
    for op in graphs.ancestors([loss]):
        if graphs.reads_weight(op, weights) or any(id(t) in made_of_variables for t in op.inputs):
            made_of_variables.update(id(t) for t in op.outputs)
            if any(t.dtype == tf.float16 for t in op.outputs):
                raise UnsupportedModelError(
                    f"layer {graphs.layer_of(op)!r} computes in float16, where small gradients become zero: give the "
                    "optimizer loss_scale=1024.0, or another power of two, or use mixed_bfloat16."
                )


def _gradients_of(
    loss: tf.Tensor, terms: list[tf.Tensor], variables: list[tf.Variable | tf.Tensor]
) -> list[tf.Tensor | None]:
    """Gradients of the data-independent terms of the loss."""
    factors = tf.gradients(loss, terms) if terms else []
    pairs = [(t, f) for t, f in zip(terms, factors, strict=True) if f is not None]
    if not pairs:
        return [None] * len(variables)
    handles = [loss.graph.capture(graphs.handle_of(v)) for v in variables]
    gradients = tf.gradients([t for t, _ in pairs], handles, grad_ys=[f for _, f in pairs])
    return [None if g is None else tf.convert_to_tensor(g) for g in gradients]


def _refuse_coupling(loss: tf.Tensor, variables: list[tf.Variable | tf.Tensor], layouts: Layouts) -> None:
    """Refuses models in which examples see each other before a trainable variable has met them."""
    for op in graphs.ancestors([loss]):
        if op.type == "FusedBatchNormV3" and layouts.of(op.outputs[0]) is COUPLED:
            raise _coupled(op)
    upstream = set(graphs.ancestors([loss]))
    for variable in variables:
        for use in find_uses(variable, loss, upstream, layouts)[0]:
            meeting = use.meeting
            inputs = [t for i, t in enumerate(meeting.op.inputs) if i != meeting.index]
            if any(layouts.of(t) is COUPLED for t in inputs) and meeting.output.shape.rank:
                raise _coupled(_where_coupled(inputs, layouts))


def _refuse_batch_in_state(loss: tf.Tensor, data: list[tf.Tensor]) -> None:
    """Refuses layers that write this step's batch to a variable, where examples meet, and leave without noise.

    The means that Keras keeps of its losses belong to no layer and are let be, unless the loss reads them.
    """
    handles = {id(op.inputs[0]) for op in graphs.ancestors([loss]) if op.type in ("ReadVariableOp", "ResourceGather")}
    for op in loss.graph.get_operations():
        resources = [t for t in op.inputs if t.dtype == tf.resource]
        values = [t for t in op.inputs if t.dtype != tf.resource]
        if not resources or not values or not graphs.writes_state(op):
            continue
        of_layer = graphs.scope_of(op) not in ("", keras_compat.LOSS_SCOPE)
        read = any(id(t) in handles for t in resources)
        if (of_layer or read) and any(graphs.depends_on(t, data) for t in values):
            raise _coupled(op)


def _where_coupled(tensors: list[tf.Tensor], layouts: Layouts) -> tf.Operation:
    """The first op upstream of `tensors` that mixes examples."""
    for op in graphs.ancestors(tensors):
        if any(layouts.of(t) is COUPLED for t in op.outputs):
            return op
    return tensors[0].op


def _coupled(op: tf.Operation) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {graphs.layer_of(op)!r} ({op.type}) lets one example see the others, so no clip bounds what one of "
        "them contributes: use GroupNormalization or LayerNormalization instead, or freeze it with `trainable=False`."
    )


def _warn_of_rounded_products() -> None:
    if tf.config.list_physical_devices("GPU") and tf.config.experimental.tensor_float_32_execution_enabled():
        warnings.warn(
            "TensorFloat-32 is on, in which a GPU rounds what it multiplies to 10 bits, so that a gradient may be about a "
            "thousandth longer than the clip: call tf.config.experimental.enable_tensor_float_32_execution(False) first.",
            RoundedClipWarning,
            stacklevel=2,
        )


def _warn_slow(op: tf.Operation | None) -> None:
    where = f"layer {graphs.layer_of(op)!r} ({op.type})" if op is not None else "the loss"
    warnings.warn(
        f"{where} has no fast clipping rule: gradients are exact, but each example is taken alone, which is slow.",
        SlowClippingWarning,
        stacklevel=2,
    )
