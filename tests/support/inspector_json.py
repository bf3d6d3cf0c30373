"""Layers as the inspector of TensorRT writes them, with kernel names that users and NVIDIA's documentation quote."""

from __future__ import annotations

import json
from typing import Any

from maskplan.pipeline.core.choices import DENSE, SPARSE

SIMT = "sm70_xmma_fprop_conv1x1_i8f32_f32_f32_nchw_vect_c_4kcrs_vect_c_4_nchw_simt_small_batch_bias_relu"
AVDT = "sm80_xmma_fprop_avdt_sparse_int8int8_tilesize64x64x64_tapsperload3_threadspercta128_r3s3_u1v1_scalebias_relu"
SPARSE_CONV = (
    "sm80_xmma_fprop_sparse_conv_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x128x64_stage3_warpsize2x2x1_g1"
    "_sptensor16x8x32_t1r3s3"
)
IMPLICIT = (
    "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize64x64x64_stage4_warpsize2x2x1_g1"
    "_tensor16x8x16_t1r3s3"
)
INT8_OUT = (
    "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw_vect_c_32"
    "_tilesize256x128x64_stage4_warpsize4x2x1_g1_tensor16x8x32_simple_t1r1s1_epifadd"
)
FLOAT_OUT = INT8_OUT.replace("i8i8_", "i8f32_")
GEMM = "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas"

KNOWN = dict.fromkeys((AVDT, SPARSE_CONV), SPARSE) | dict.fromkeys((SIMT, IMPLICIT, INT8_OUT, FLOAT_OUT, GEMM), DENSE)
STRANGE_KERNELS = (
    "",
    " ",
    "0x00000000000003e8",
    "foo_sparsely",
    "sparse_conv",
    "__myl_FcCastAddErf_0x1234",
    "sm80_xmma_fprop_sparse_c",
    SPARSE_CONV[:40],
    SPARSE_CONV.replace("sptensor16x8x32", "tensor16x8x16"),
    AVDT.replace("sm80", "sm61"),
    IMPLICIT.replace("_g1_", "_sparse_"),
)


def conv(name: str, kernel: str | None, c: int = 256, k: int = 256, groups: int = 1, **more: Any) -> dict[str, Any]:
    """A 3x3 convolution as TensorRT 10 describes it."""
    layer = {
        "Name": name,
        "LayerType": "CaskConvolution",
        "Inputs": [tensor("x", [8, c, 14, 14])],
        "Outputs": [tensor("y", [8, k, 14, 14])],
        "ParameterType": "Convolution",
        "Kernel": [3, 3],
        "OutMaps": k,
        "Groups": groups,
        "Weights": {"Type": "Half", "Count": c * k * 9 // groups},
        "HasSparseWeights": 1,
        "TacticName": kernel,
        "TacticValue": "0x11bde0e1d9f2f35d",
        "Metadata": f"[ONNX Layer: {name}]",
    }
    return {key: value for key, value in (layer | more).items() if value is not None}


def tensor(name: str, shape: list[int], kind: str = "Half") -> dict[str, Any]:
    return {"Name": name, "Location": "Device", "Dimensions": shape, "Format/Datatype": kind}


def text(*layers: Any) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["input", "logits"]})


QUANTIZED = [tensor("x", [8, 256, 14, 14], "Int8")]
