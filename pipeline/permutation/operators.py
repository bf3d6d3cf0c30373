"""What each ATen operator does with channels: one rule for a kind of operator, by name.

A rule takes the operator's arguments by name, tensors as `Value`, and returns its result as a `Value`, or several. It ties
channels that must move together, and pins those whose order changes the result. Operators without a rule pin everything
that they read.
"""

from __future__ import annotations

from maskplan.pipeline.permutation import layers, movements
from maskplan.pipeline.permutation.axes import Channels, Value
from maskplan.pipeline.permutation.calls import Call, Result, Rule, broadcast, keep_disjoint, unknown


def follow(channels: Channels, call: Call, pointwise: bool) -> Result:
    """Apply the rule for an operator; `pointwise` if it works element by element."""
    rule = RULES.get(call.name, _elementwise if pointwise else unknown)
    result = rule(channels, call)
    if isinstance(result, Value):
        if _misshapen(result):
            return unknown(channels, call)
        return keep_disjoint(channels, result)
    return [value if value is None else keep_disjoint(channels, value) for value in result]


def _misshapen(value: Value) -> bool:
    """Whether places do not fit the tensor: the rule does not cover this overload of the operator."""
    return any(
        len(p.channels.shape) != len(value.shape)
        or any(size not in (1, whole) for size, whole in zip(p.channels.shape, value.shape, strict=True))
        for p in value.places
    )


def _elementwise(channels: Channels, call: Call) -> Result:
    return broadcast(channels, call.tensors(), call.shape)


def _uniform(channels: Channels, call: Call) -> Result:
    return Value(call.shape, constant=frozenset(range(len(call.shape))))


def _ignored(channels: Channels, call: Call) -> Result:
    return Value(())


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_named(_uniform, "full full_like zeros zeros_like ones ones_like scalar_tensor new_zeros new_ones new_full"),
    # Assertions of types and sizes, which export inserts.
    **_named(_ignored, "_assert_tensor_metadata _assert_async _assert_scalar"),
    # Elementwise, but not tagged so by PyTorch.
    **_named(_elementwise, "leaky_relu hardtanh elu celu selu hardswish hardsigmoid softplus threshold mish"),
    **_named(layers.convolution, "convolution"),
    **_named(layers.matmul, "mm bmm addmm baddbmm"),
    **_named(layers.batch_norm, "_native_batch_norm_legit_no_training _native_batch_norm_legit"),
    **_named(layers.layer_norm, "native_layer_norm"),
    **_named(layers.group_norm, "native_group_norm"),
    **_named(layers.softmax, "_softmax _log_softmax"),
    **_named(
        layers.reduce,
        "mean sum amax amin max min prod any all var std var_mean logsumexp linalg_vector_norm argmax argmin",
    ),
    **_named(
        layers.pooling,
        "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d"
        " _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d"
        " upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d"
        " _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d reflection_pad2d replication_pad2d",
    ),
    **_named(movements.same, "clone alias detach contiguous lift_fresh_copy _to_copy to dropout"),
    **_named(movements.permute, "permute transpose t"),
    **_named(movements.view, "view _unsafe_view reshape squeeze unsqueeze"),
    **_named(movements.as_strided, "as_strided"),
    **_named(movements.expand, "expand"),
    **_named(movements.repeat, "repeat"),
    **_named(movements.pick, "slice select flip"),
    **_named(movements.split, "split_with_sizes"),
    **_named(movements.concatenate, "cat"),
    **_named(movements.pad, "constant_pad_nd"),
    **_named(movements.index, "index _unsafe_index"),
    **_named(movements.index_select, "index_select"),
}
