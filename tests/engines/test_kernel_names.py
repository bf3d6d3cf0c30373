"""What kernels' names say, and that a name changed in any way claims nothing it did not claim.

The names are those that users and NVIDIA's documentation quote; where only a pattern is quoted, the rest is filled in after
related names. Marks in them say what may differ, independently of the expressions under test: within angle brackets a
number or letter may be another one (`<128>`, `<t>`), `<>` is a place for a letter that some have, and a name may end, or
begin, at `|`.
"""

from __future__ import annotations

import fnmatch
import re
import string
from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from maskplan.engines.kernel_names import kernel_state
from maskplan.pipeline.core.choices import DENSE, SPARSE, UNKNOWN

_AVDT = (
    "_int8int8_tilesize<64>x<64>x<64>_tapsperload<3>_threadspercta<128>_r<3>s<3>_u<1>v<1>|_scalebias|_relu"
)  # fmt: skip
_VECT = "nchw_vect_c_<32>kcrs_vect_c_<32>_nchw_vect_c_<32>"
_TILE = "_tilesize<128>x<128>x<64>_stage<3>_warpsize<2>x<2>x<1>"
_ALIGN = "|_align<a><4>|_align<c><8>"

MARKED_SPARSE = (
    "sm<80>_xmma_fprop_avdt_sparse" + _AVDT,
    f"sm<80>_xmma_fprop_sparse_conv_f16f16_f16f16_f16_nhwckrsc_nhwc{_TILE}_g1_sptensor16x8x32|_t<1>r<3>s<3>",
    f"sm<80>_xmma_fprop_sparse_conv_interleaved_i8i8_i8i32_f32_{_VECT}{_TILE}_g1_sptensor16x8x64|_t<1>r<3>s<3>",
    "sm80_xmma_sparse_gemm",
    f"sm<80>_xmma_sparse_gemm_f16f16_f16f32_f32_<t><t>_<t>{_TILE}_sptensor16x8x32|_execute_kernel_5x_cusparse|lt",
    f"sm<80>_xmma_sparse_gemm_i8i8_i8i32_f32_<t><n>_<n>{_TILE}_sptensor16x8x64|_execute_split_k_kernel_cusparse",
    "cutlass_tensorop_<s>16832spgemm_<>f16_<256>x<128>_<64>x<3>_<t><n>_align<8>",
    "cutlass_tensorop_<>f16_<s>16832spgemm_<>f16_<128>x<128>_<64>x<3>_<n><t>_align<8>",
)
MARKED_DENSE = (
    "sm<70>_xmma_fprop_conv1x1_i8f32_f32_f32_nchw_vect_c_<4>kcrs_vect_c_<4>_nchw_simt_small_batch_bias|_relu",
    f"sm<80>_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc{_TILE}_g<1>_tensor16x8x16|_t<1>r<3>s<3>",
    f"sm<80>_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_{_VECT}{_TILE}_g<1>_tensor16x8x32|_simple|_t<1>r<1>s<1>"
    "|_epifadd",
    f"sm<80>_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw_vect_c_<32>kcrs_vect_c_<32>_nchw{_TILE}_g<1>"
    "_tensor16x8x32|_t<1>r<3>s<3>|_alignc<4>|_nchw",
    f"sm<75>_xmma_fprop_implicit_gemm_indexed_wo_smem_f16f16_f16f16_f16_nhwckrsc_nhwc{_TILE}_g<1>_tensor16x8x<8>"
    + _ALIGN,
    f"sm<80>_xmma_fprop_implicit_gemm_indexed_wo_smem_<>f32f32_tf32f32_f32_nhwckrsc_nhwc{_TILE}_g<1>_tensor16x8x8"
    + _ALIGN,
    f"sm<80>_xmma_fprop_implicit_gemm_indexed_f32f32_f32f32_f32_nchwkcrs_nchw{_TILE}_g<1>_ffma{_ALIGN}"
    "|_beta0|_packed_stride",
    "sm90_xmma_gemm_f16f16_f16f32_f32_<t><n>_<n>_tilesize<128>x<128>x<64>_warpgroupsize<1>x1x1"
    "_execute_segment_k_off_kernel__5x_cublas",
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize<128>x<128>x<64>_warpgroupsize<1>x1x1_g1"
    "_execute_segment_k_off_kernel__5x_cudnn",
    f"sm<80>_xmma_gemm_f16f16_f16f32_f32_<n><n>_<n>{_TILE}_tensor16x8x16|_align<a><2>|_align<c><2>|_execute_kernel_trt",
    f"sm<89>_xmma_gemm_e4m3e4m3_e4m3f32_f32_<t><n>_<n>{_TILE}_tensor16x8x32|_bias_f32|_execute_kernel_trt",
    f"sm<80>_xmma_gemm_f16f16_f16f32_f32_<t><n>_<n>{_TILE}_tensor16x8x16|_kernel",
    "sm<80>_xmma_fprop_avdt_dense" + _AVDT,
    "sm<80>_xmma_fprop_image_first_layer_f16f16_f32_f16_nhwckrsc_nhwc_hmma_k<48>c<4>r<3>",
    "sm<50>_xmma_fprop_direct_group_f32f32_f32_f32_nchwkcrs_nchw",
    "cutlass_<80>_tensorop_<>f16_<s>16816gemm_relu_<>f16_<128>x<256>_<32>x<3>_<n><n>_align<8>",
    "cutlass_<80>_simt_<s>gemm_<128>x<128>_<8>x<4>_<n><n>_align<1>",
    "cutlass_tensorop_<s>16816fprop_optimized_<>f16_<128>x<128>_<32>x<5>_nhwc",
    "trt_|ampere_<h>16816cudnn_<128>x<64>_sliced1x<2>_ldg<8>_relu_exp_stages_<64>x<4>_small_nhwc_<t><n>_v1",
    "trt_|turing_<h>1688cudnn_<256>x<64>_ldg<8>_relu_exp_small_nhwc_<t><n>_v1",
    "trt_|volta_int8x4_<i>cudnn_int8x4_<128>x<64>_relu_xregs_large_<n><n>_v1",
    "trt_|ampere_<h>16816gemm_<128>x<64>_ldg<8>_<n><n>|_v1",
    "volta_<s>cudnn_winograd_<128>x<128>_ldg<1>_ldg<4>_relu_tile148<t>_<n><t>_v1",
    "ampere_fp16_<s>16816gemm_fp16_<64>x<64>_sliced1x<2>_ldg<8>_relu_f2f_stages_<64>x<6>_<t><n>",
)
MARKED = [(name, SPARSE) for name in MARKED_SPARSE] + [(name, DENSE) for name in MARKED_DENSE]
MARKS = re.compile(r"[<>|]")
KNOWN = {MARKS.sub("", marked): state for marked, state in MARKED}

# The other names and patterns of the reference on TensorRT, as they are quoted.
SPARSE_PATTERNS = (
    "sm80_xmma_fprop_sparse_conv_*_sptensor*",
    "sm80_xmma_fprop_sparse_conv_interleaved_*",
    "sm80_xmma_sparse_gemm*",
    "sm80_xmma_fprop_avdt_sparse_int8int8_*",
)
SPARSE_WORDS = re.compile("spars|spmma|sptensor|sp_?gemm")

AVDT, SPARSE_CONV, *_ = (name for name, state in KNOWN.items() if state == SPARSE)
SPARSE_GEMM = next(name for name in KNOWN if name.startswith("sm80_xmma_sparse_gemm_f16"))
SIMT, IMPLICIT, *_ = (name for name, state in KNOWN.items() if state == DENSE)
GEMM = next(name for name in KNOWN if name.startswith("sm80_xmma_gemm_f16") and name.endswith("tensor16x8x16_kernel"))

# Of known families, but other kernels; or cut, misspelt, contradictory.
NOT_SPARSE = (
    "sm80_xmma_fprop_sparse_c",
    "sm80_xmma_fprop_sparse_conv",
    "sm80_xmma_fprop_sparse_banana",
    "sm80_xmma_fprop_sparse_gather_f16f16",
    "sm80_xmma_fprop_sparse_weights_unpack_f16f16_tensor16x8x16",
    "sm80_xmma_fprop_avdt_sparse",
    "sm80_xmma_fprop_avdt_sparse_x",
    "sm80_xmma_sparse_conv",
    "sm80_xmma_sparse_gemm_",
    "sm80_xmma_sparse_gemm…",
    "sm80_xmma_sparse_gemm_f16f16",
    "sm80_xmma_sparse_gemm_to_banana",
    "sm80_xmma_sparse_gemm_metadata_reorder",
    "sm80_xmma_sparse_conv_weight_compress_kernel",
    "sm70_xmma_sparse_gemm_f16f16",
    "sm50_xmma_fprop_sparse_conv_f32f32",
    "sm99_xmma_sparse_gemm",
    "sm90_xmma_warp_specialized_sparse_gemm_f16f16",
    "cutlass_tensorop_banana_s1spgemm_x",
    "cutlass_sptensorop_s1spgemm_",
    "cutlass3x_sm90_sptensorop_s64x128x32spgemm_f16_f16_f32_f16_f16_128x128x64_warpspecialized",
    *(
        SPARSE_CONV.replace("sm80", sm)
        for sm in ("sm00", "sm50", "sm61", "sm70", "sm75", "sm99", "sm8", "sm800", "SM80")
    ),
    *(AVDT.replace("sm80", sm) for sm in ("sm61", "sm70", "sm75", "sm99")),
    SPARSE_CONV[:40],
    SPARSE_CONV.replace("sptensor16x8x32", "tensor16x8x16"),
    SPARSE_CONV.replace("sptensor16x8x32", "tensor16x8x32"),
    SPARSE_CONV.replace("_sptensor16x8x32", "_sptensor16x8x32_tensor16x8x16"),
    SPARSE_CONV.replace("_sptensor16x8x32", ""),
    SPARSE_CONV.replace("sptensor16x8x32", "sptensor16x8x64"),
    SPARSE_CONV.replace("f16f16_f16f16_f16_", ""),
    SPARSE_CONV.replace("f16f16_f16f16_f16", "f32f32_f32f32_f32"),
    SPARSE_CONV.replace("_g1_", "_g32_"),
    SPARSE_CONV.replace("_tilesize128x128x64", ""),
    SPARSE_CONV.replace("_sparse_", "_nonsparse_"),
    SPARSE_CONV.replace("_sparse_", "_non_sparse_"),
    SPARSE_CONV.replace("_sparse_", "_sparsity_"),
    SPARSE_CONV.replace("_sparse_", "_dense_sparse_"),
    SPARSE_CONV.replace("_sparse_", "_"),
    SPARSE_CONV.replace("sptensor", "nosptensor"),
    SPARSE_CONV.upper(),
    "x" + SPARSE_CONV,
    SPARSE_CONV + "\n",
    SPARSE_GEMM.replace("sparse_", ""),
    AVDT.replace("int8int8", "banana"),
    AVDT.replace("_sparse_", "_"),
    AVDT.replace("_sparse_", "_spars_"),
    AVDT.replace("_sparse_", "_sparse_dense_"),
)
NOT_DENSE = (
    "sm80_xmma_fprop_conv",
    "sm80_xmma_fprop_implicit_gemm",
    "sm80_xmma_fprop_implicit_gemm_f16f16_sarse_tensor16x8x16",
    "sm80_xmma_fprop_conv1x1_f16f16_banana_1x1",
    "sm80_xmma_gemm_f16f16_simt",
    "sm80_xmma_gemm_f16f16_banana_simt",
    "sm80_xmma_gemm_f16f16_24_structured_tilesize64x64x64",
    "sm80_xmma_gemm_f16f16_2to4_tilesize64x64x64",
    "sm90_xmma_gemm_f16f16_structured_tilesize64x64x64",
    "sm50_xmma_pooling_fw_4d_FP16FP32NHWC_Average_FastDiv_GenericWindowWidth_CAlign4",
    "sm50_xmma_cublas_gemvx_f16f16_f32_f32_tn_n_int32_unit_n_launch_param4x32x32_strided_unit_stride",
    "cutlass_tensorop_hgemm_1x1",
    "cutlass_80_tensorop_banana_sgemm_1x1",
    "ampere_sgemm_1x1",
    "trt_hopper_hcudnn_8x8",
    "void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_128x256_32x3_nn_align8>(int)",
    *(GEMM.replace("_f16f16_", f"_{word}_f16f16_") for word in ("24", "2to4", "structured", "sp", "24_structured")),
    *(GEMM.replace("_tilesize", f"_{word}_tilesize") for word in ("24", "2to4", "structured", "sp", "compressed")),
    *(IMPLICIT.replace("tensor16x8x16", f"{word}16x8x32") for word in ("tensor", "stensor", "ptensor", "sptensor")),
    *(GEMM.replace("tensor16x8x16", f"{word}16x8x32") for word in ("tensor", "stensor", "ptensor", "sptensor")),
    IMPLICIT.replace("sm80", "sm99"),
    IMPLICIT.replace("implicit", "explicit"),
    IMPLICIT.replace("_tensor16", "_sparsetensor16"),
    IMPLICIT.replace("_g1_", "_nonsparse_"),
    IMPLICIT.replace("_g1_", "_sparse_"),
    IMPLICIT.replace("_implicit_gemm_", "_implicit_gemm_sparse_"),
    IMPLICIT + "_sparsetc",
    IMPLICIT.upper(),
    "x" + IMPLICIT,
    IMPLICIT + "\n",
)
STRANGE = (
    *(
        "",
        " ",
        "0x00000000000003e8",
        "foo_sparsely",
        "nonsparse_conv",
        "sparse",
        "sparse_conv",
        "sparse_to_dense_gather",
    ),
    *("foo_sparse_conv_f16f16_tilesize64x64x64", "sparsemax_kernel", "parse_gemm", "generatedNativePointwise"),
    *("__myl_FcCastAddErf_0x1234", "sm80_xmma_fprop", "sm80_xmma_fprop_avdt", *SPARSE_PATTERNS),
)


def test_every_documented_kernel_is_known() -> None:
    assert {name: kernel_state(name) for name in KNOWN} == KNOWN
    assert len(KNOWN) == len(MARKED)


@pytest.mark.parametrize("pattern", SPARSE_PATTERNS)
def test_every_documented_pattern_has_a_kernel(pattern: str) -> None:
    assert SPARSE in {kernel_state(name) for name in fnmatch.filter(KNOWN, pattern)}


def test_the_words_that_others_look_for_are_in_all_sparse_names_and_in_no_dense_one() -> None:
    for name, state in KNOWN.items():
        assert (SPARSE_WORDS.search(name) is not None) == (state == SPARSE), name


@pytest.mark.parametrize("names", [NOT_SPARSE, NOT_DENSE, STRANGE], ids=["not_sparse", "not_dense", "strange"])
def test_what_is_changed_cut_or_of_another_family_claims_nothing(names: tuple[str, ...]) -> None:
    assert not set(names) & set(KNOWN)
    assert {name: kernel_state(name) for name in names} == dict.fromkeys(names, UNKNOWN)


def test_no_name_is_unknown() -> None:
    assert kernel_state(None) == UNKNOWN


def test_no_kernel_runs_sparse_before_compute_capability_8() -> None:
    for old in (50, 52, 53, 60, 61, 62, 70, 72, 75):
        assert kernel_state(IMPLICIT.replace("sm80", f"sm{old}")) == DENSE
        assert {kernel_state(n.replace("sm80", f"sm{old}")) for n in KNOWN if n.startswith("sm80_xmma_sparse")} == {
            UNKNOWN
        }
    for new in (86, 87, 89, 90, 100, 120):
        assert kernel_state(SPARSE_CONV.replace("sm80", f"sm{new}")) == SPARSE


# What may stand where a name has a mark.
CLASSES = (string.digits, "nt", "hsi", "ac", "b", "t")
ADDED = ("b", "t")
LETTERS = "0123456789bchinprstxz_S- "


def parse(marked: str) -> tuple[str, list[tuple[int, int]], set[int]]:
    """The bare name, the spans that may vary, and the places where it may be cut."""
    name, spans, cuts = "", [], set()
    for character in marked:
        if character == "<":
            spans.append((len(name), len(name)))
        elif character == ">":
            spans[-1] = (spans[-1][0], len(name))
        elif character == "|":
            cuts.add(len(name))
        else:
            name += character
    return name, spans, cuts


def may_keep(name: str, spans: list[tuple[int, int]], changed: str) -> bool:
    """Whether `changed` is `name` with something of the same kind in one span."""
    for start, end in spans:
        if (
            changed.startswith(name[:start])
            and changed.endswith(name[end:])
            and len(changed) >= start + len(name) - end
        ):
            inner = changed[start : len(changed) - (len(name) - end)]
            kinds = [kind for kind in CLASSES if set(name[start:end]) <= set(kind) and (end > start or kind in ADDED)]
            if any(set(inner) <= set(kind) for kind in kinds):
                return True
    return False


def neighbors(name: str, letters: str) -> Iterator[str]:
    """Every name that differs in one character."""
    for at in range(len(name) + 1):
        for letter in letters:
            yield name[:at] + letter + name[at:]
            yield name[:at] + letter + name[at + 1 :]
        yield name[:at] + name[at + 1 :]


@pytest.mark.parametrize(("marked", "state"), MARKED, ids=[f"{s}-{i}" for i, (_, s) in enumerate(MARKED)])
def test_one_wrong_character_claims_nothing_outside_the_marks(marked: str, state: str) -> None:
    name, spans, cuts = parse(marked)
    shorter = {name[:cut] for cut in cuts}
    kept = {changed for changed in set(neighbors(name, LETTERS)) - {name} if kernel_state(changed) != UNKNOWN}
    assert {kernel_state(changed) for changed in kept} <= {state}
    assert [changed for changed in kept if not may_keep(name, spans, changed) and changed not in shorter] == []


@pytest.mark.parametrize(("marked", "state"), MARKED, ids=[f"{s}-{i}" for i, (_, s) in enumerate(MARKED)])
def test_a_cut_name_claims_nothing_but_where_others_end(marked: str, state: str) -> None:
    name, _, cuts = parse(marked)
    first = {cut for cut in cuts if name[:cut] == "trt_"}
    last = cuts - first
    from_the_start = {cut for cut in range(len(name)) if kernel_state(name[:cut]) != UNKNOWN}
    from_the_end = {cut for cut in range(1, len(name) + 1) if kernel_state(name[cut:]) != UNKNOWN}
    quoted_short = {len(short) for short in KNOWN if short == "sm80_xmma_sparse_gemm" and name.startswith(short)}
    assert from_the_start - quoted_short == last
    assert from_the_end == first
    assert {kernel_state(name[:cut]) for cut in last} <= {state}


# Properties: whatever is done to a name, it never claims the opposite, and claims nothing where a foreign word is in it.

names = st.sampled_from(sorted(KNOWN))
NEAR_WORDS = [
    "sparsely", "nonsparse", "sparsity", "sparsemax", "unsparse", "sparser", "sparsed", "parse", "struct", "structured",
    "spars", "sparce", "sprse", "spare", "xsparse", "sparse1", "sparse", "sp", "24", "2to4", "2of4", "nosptensor16x8x32",
    "sptensor", "sptensor16x8", "stensor16x8x32", "spgemm", "notspgemm", "spmma", "SPARSE", "Sparse", "sptensor16x8x32x",
]  # fmt: skip


@given(names, st.data())
@settings(max_examples=400, deadline=None)
def test_any_character_in_any_place_claims_nothing_outside_the_marks(name: str, data: st.DataObject) -> None:
    _, spans, cuts = parse(next(marked for marked, _ in MARKED if MARKS.sub("", marked) == name))
    at = data.draw(st.integers(0, len(name)))
    changed = name[:at] + data.draw(st.characters()) + name[at + data.draw(st.integers(0, 1)) :]
    assume(changed != name and changed not in {name[:cut] for cut in cuts})
    assert kernel_state(changed) == UNKNOWN or (may_keep(name, spans, changed) and kernel_state(changed) == KNOWN[name])


@given(names, names, st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=400, deadline=None)
def test_parts_of_a_sparse_and_of_a_dense_name_together_claim_nothing_false(
    one: str, other: str, end: int, start: int
) -> None:
    """The start of one joined to the end of another: sparse only with a sparse word, dense only without any."""
    joined = one[: end % (len(one) + 1)] + other[start % (len(other) + 1) :]
    state = kernel_state(joined)
    assert state == UNKNOWN or (SPARSE_WORDS.search(joined) is not None) == (state == SPARSE)


@given(names, st.sampled_from(NEAR_WORDS), st.integers(0, 40), st.booleans())
@settings(max_examples=600, deadline=None)
def test_a_name_with_a_word_that_resembles_sparse_claims_nothing(
    kernel: str, word: str, at: int, instead: bool
) -> None:
    words = kernel.split("_")
    at %= len(words)
    words[at : at + instead] = [word]
    assume("_".join(words) not in KNOWN)
    assert kernel_state("_".join(words)) == UNKNOWN


@given(names, st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_words_in_another_order_never_turn_a_kernel_into_its_opposite(kernel: str, one: int, other: int) -> None:
    words = kernel.split("_")
    one, other = one % len(words), other % len(words)
    words[one], words[other] = words[other], words[one]
    assert kernel_state("_".join(words)) in (KNOWN[kernel], UNKNOWN)


@given(st.lists(st.sampled_from(["foo", "spars", "sparse", "sparsely", "conv", "gemm", "kernel", "64x64"]), max_size=8))
@settings(max_examples=300, deadline=None)
def test_an_unknown_family_claims_nothing(words: list[str]) -> None:
    assert kernel_state("_".join(words)) == UNKNOWN


@given(st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_text_claims_nothing(anything: str) -> None:
    assert kernel_state(anything) == UNKNOWN
