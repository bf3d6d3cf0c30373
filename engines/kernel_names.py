"""Classify kernels by name: sparse weights, dense weights, or unknown.

Only full names match. Each family of names has a fixed sequence of parts, and each part a short list of values; a name with
an extra, unknown or missing part is `unknown`:

| family | sparse | dense |
|---|---|---|
| convolutions, `smNN_xmma_` | `fprop_sparse_conv`, `fprop_avdt_sparse` | `fprop_implicit_gemm`, `fprop_avdt_dense`, others |
| matrix products, `smNN_xmma_` | `sparse_gemm` | `gemm` |
| `cutlass_` | `tensorop_...spgemm` | `tensorop_...gemm`, `tensorop_...fprop`, `simt_...gemm` |
| `trt_ampere_` and similar | none | `cudnn`, `gemm` |

The parts must also be consistent. An instruction for 2:4 weights has twice the K of the dense one of the same type (PTX:
m16n8k32 for FP16 with `mma.sp`, m16n8k16 without), so a sparse name without its `sp` does not match as dense. Sparse kernels
require compute capability 8.0, the first with sparse tensor cores.

Sources of names: NVIDIA's documentation, NVIDIA/TensorRT issues 4020 and 4056, and public traces of TensorRT, cuDNN, CUTLASS
and cuSPARSELt.
"""

from __future__ import annotations

import re

from maskplan.pipeline.core.choices import DENSE, SPARSE, UNKNOWN, LayerState

_SM_SPARSE = r"sm(?:80|86|87|89|90|100|101|103|110|120|121)"
_SM = r"sm(?:50|52|53|60|61|62|70|72|75|80|86|87|89|90|100|101|103|110|120|121)"

# Side lengths of a tile in elements: multiples of 8 up to 512.
_SIDE = f"(?:{'|'.join(str(8 * n) for n in range(1, 65))})"
_TILE = rf"_tilesize{_SIDE}x{_SIDE}x{_SIDE}"
_STAGES = r"_stage[1-9]_warpsize[1248]x[1248]x[1248]"

_CONV_LAYOUT = (
    r"_(?:nhwckrsc_nhwc|nhwckrsc_nchw|nchwkcrs_nchw"
    r"|nchw_vect_c_(?:4|16|32)kcrs_vect_c_(?:4|16|32)_nchw(?:_vect_c_(?:4|16|32))?)"
)
_GEMM_LAYOUT = r"_[nt][nt]_[nt]"

# Types of input and output, weights and accumulator, epilogue; then the instruction.
_F16 = r"(?:f16f16_f16f16_f16|f16f(?:16|32)_f16f32_f32|bf16(?:bf16|f32)_bf16f32_f32)"
_TF32 = r"(?:f32f32|tf32f32|tf32tf32)_tf32f32_f32"
_F32 = r"f32f32_f32f32_f32"
_I8 = r"i8(?:i8|f16|f32)_i8i32_f32"
_E4M3 = r"e4m3(?:e4m3|f16|bf16|f32)_e4m3f32_f32"
_DENSE_MATHS = (
    (_F16, r"_tensor(?:8x8x4|16x8x8|16x8x16)"),
    (_TF32, r"_tensor16x8x8"),
    (_F32, r"_ffma"),
    (_I8, r"_tensor(?:8x8x16|16x8x16|16x8x32)"),
    (_E4M3, r"_tensor16x8x32"),
)
_SPARSE_MATHS = ((_F16, r"_sptensor16x8x32"), (_I8, r"_sptensor16x8x64"))

_VARIANTS = (
    r"(?:_(?:t1r[1357]s[1357]|simple|align[ac](?:1|2|4|8|16|32)|beta0|packed_stride|epifadd|bias_f32|nchw|linkable))*"
)
_LAUNCH = (
    r"(?:_kernel|_kernel_trt|_execute_kernel_trt|_execute_kernel_cudnn"
    r"|_execute(?:_split_k)?_kernel__5x_cu(?:blas|dnn))?"
)
_SPARSE_LAUNCH = r"(?:_execute_kernel_trt|_execute(?:_split_k)?_kernel_(?:5x_)?cusparse(?:lt)?)?"
_AVDT = (
    r"_int8int8" + _TILE + r"_tapsperload[1-9]_threadspercta(?:32|64|128|256|512)"
    r"_r[1-7]s[1-7]_u[12]v[12](?:_scalebias)?(?:_relu)?"
)

_CUTLASS = r"cutlass_(?:(?:70|75|80|86|89|90)_)?"
_CUTLASS_TILE = rf"_{_SIDE}x{_SIDE}_{_SIDE}x(?:10|[2-9])"
_CUTLASS_END = r"_[nt][nt]_align(?:1|2|4|8|16|32)"

_LEGACY_TYPE = r"(?:fp16|bf16|fp32|int8|int8x4)"
_LEGACY_WORDS = (
    r"(?:_(?:sliced1x[248]|ldg(?:1|2|4|8|16)|relu|exp|f2f|xregs|small|medium|large|interior|nhwc|nhwc2nchw|singleBuffer"
    rf"|tile148[nt]|stages_{_SIDE}x[1-9]))*"
)
_LEGACY_OP = r"[his](?:884|1688|8816|16816|16832)?"

# Truncated in the only public report of a sparse MatMul chosen by TensorRT (onnxsim pull request 1764).
_QUOTED_SHORT = r"sm80_xmma_sparse_gemm"

_SPARSE_KERNEL = re.compile(
    "|".join(
        [_QUOTED_SHORT, rf"{_SM_SPARSE}_xmma_fprop_avdt_sparse{_AVDT}"]
        + [
            rf"{_SM_SPARSE}_xmma_(?:fprop_sparse_conv(?:_interleaved)?_{types}{_CONV_LAYOUT}{_TILE}{_STAGES}_g1"
            rf"|sparse_gemm_{types}{_GEMM_LAYOUT}{_TILE}{_STAGES}){instruction}{_VARIANTS}{_SPARSE_LAUNCH}"
            for types, instruction in _SPARSE_MATHS
        ]
        + [
            rf"{_CUTLASS}tensorop_(?:b?f16_)?[hs]16832spgemm_b?f16{_CUTLASS_TILE}{_CUTLASS_END}",
            rf"{_CUTLASS}tensorop_(?:s8_)?i16864spgemm_s8{_CUTLASS_TILE}{_CUTLASS_END}",
        ]
    )
)

_DENSE_KERNEL = re.compile(
    "|".join(
        [
            rf"{_SM}_xmma_fprop_avdt_dense{_AVDT}",
            rf"{_SM}_xmma_fprop_conv1x1_i8f32_f32_f32{_CONV_LAYOUT}_simt_small_batch_bias(?:_relu)?",
            # Kernels of the first layer and of grouped convolutions; their names have no tile size.
            rf"{_SM}_xmma_fprop_image_first_layer_f16f16_f32_f16{_CONV_LAYOUT}_hmma_k\d\dc\dr\d",
            rf"{_SM}_xmma_fprop_direct_group_(?:f32f32_f32_f32|f16f16_f32_f16){_CONV_LAYOUT}",
        ]
        + [
            rf"{_SM}_xmma_(?:(?:fprop|dgrad)_implicit_gemm(?:_interleaved|_indexed|_indexed_wo_smem)?_{types}{_CONV_LAYOUT}"
            rf"{_TILE}{_STAGES}_g[1-9]|gemm_{types}{_GEMM_LAYOUT}{_TILE}{_STAGES}){instruction}{_VARIANTS}{_LAUNCH}"
            for types, instruction in _DENSE_MATHS
        ]
        + [
            # Names of Hopper kernels have no instruction and end with the launcher.
            rf"sm90_xmma_(?:fprop_implicit_gemm_{types}{_CONV_LAYOUT}{_TILE}_warpgroupsize[124]x1x1_g1"
            rf"|gemm_{types}{_GEMM_LAYOUT}{_TILE}_warpgroupsize[124]x1x1)_execute_segment_k_off_kernel__5x_cu(?:blas|dnn)"
            for types, _ in _DENSE_MATHS
        ]
        + [
            rf"{_CUTLASS}tensorop_(?:b?f16_)?[hs](?:884|1688|16816)gemm(?:_relu)?_b?f16{_CUTLASS_TILE}{_CUTLASS_END}",
            rf"{_CUTLASS}tensorop_s1688(?:tf32)?gemm(?:_relu)?{_CUTLASS_TILE}{_CUTLASS_END}",
            rf"{_CUTLASS}tensorop_(?:s8_)?i(?:8816|16832)gemm(?:_relu)?_s8{_CUTLASS_TILE}{_CUTLASS_END}",
            rf"{_CUTLASS}tensorop_(?:b?f16_)?[hs]16816fprop_optimized_b?f16{_CUTLASS_TILE}_nhwc(?:_align(?:2|4|8))?",
            rf"{_CUTLASS}simt_[hs]gemm{_CUTLASS_TILE}{_CUTLASS_END}",
        ]
        + [
            rf"(?:trt_)?(?:maxwell|volta|turing|ampere)_(?:{_LEGACY_TYPE}_)?{_LEGACY_OP}{library}(?:_{_LEGACY_TYPE})?"
            rf"(?:_winograd)?_{_SIDE}x{_SIDE}{_LEGACY_WORDS}_[nt][nt]{version}"
            for library, version in (("cudnn", "_v1"), ("gemm", "(?:_v1)?"))
        ]
    )
)


def kernel_state(kernel: str | None) -> LayerState:
    """Classify a kernel; `unknown` unless its full name has a known form."""
    if kernel is None:
        return UNKNOWN
    if _SPARSE_KERNEL.fullmatch(kernel):
        return SPARSE
    return DENSE if _DENSE_KERNEL.fullmatch(kernel) else UNKNOWN
