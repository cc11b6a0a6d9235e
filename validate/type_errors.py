"""How far each type takes a tensor from its source: usually, and at most in a sound file.

Types are those of exporters/encoding.py; whole numbers in groups stand under every type that their scales may have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

GROUP_RMS: Mapping[str, tuple[float, ...]] = {
    # bits and kind -> ||rounded - source|| / ||source|| of normally distributed weights, by GROUPS
    "int8 sym": (0.0040, 0.0048, 0.0056, 0.0062, 0.0068, 0.0083),
    "int8 pos": (0.0040, 0.0048, 0.0056, 0.0062, 0.0068, 0.0083),
    "int8 zp": (0.0034, 0.0043, 0.0050, 0.0057, 0.0063, 0.0078),
    "int4 sym": (0.071, 0.082, 0.092, 0.100, 0.106, 0.114),
    "int4 pos": (0.075, 0.087, 0.097, 0.104, 0.109, 0.114),
    "int4 zp": (0.064, 0.077, 0.087, 0.096, 0.102, 0.110),
    "int2 sym": (0.307, 0.341, 0.365, 0.380, 0.389, 0.399),
    "int2 pos": (0.366, 0.386, 0.395, 0.399, 0.401, 0.402),
    "int2 zp": (0.303, 0.335, 0.356, 0.368, 0.376, 0.386),
}
GROUPS = ("g16", "g32", "g64", "g128", "g256", "channel")
STORES = ("", "-bfloat16", "-float32")
BELOW: Mapping[str, tuple[float, float]] = {
    # bits -> largest error of a tensor: over the usual one where it was rounded; of any size where a solver moved it
    "int8": (2.5, 0.15),
    "int4": (2.0, 0.35),
    "int2": (1.9, 1.25),
}


def _of_groups(value: Callable[[str, float], float]) -> dict[str, float]:
    """Every type of whole numbers in groups, and the value for its bits and its usual error."""
    found = {}
    for key, row in GROUP_RMS.items():
        bits, kind = key.split()
        for group, usual in zip(GROUPS, row, strict=True):
            found |= {f"{bits}-{group}-{kind}{store}": value(bits, usual) for store in STORES}
    return found


USUAL_RMS: Mapping[str, float] = {
    **_of_groups(lambda bits, usual: usual),
    # type -> ||rounded - source|| / ||source|| of normally distributed weights
    "F32": 0.0,
    "F16": 0.0002,
    "BF16": 0.0017,
    "Q8_0": 0.0051,
    "Q6_K": 0.017,
    "Q5_K": 0.035,
    "Q5_0": 0.041,
    "Q5_1": 0.034,
    "Q4_K": 0.071,
    "Q4_0": 0.082,
    "Q4_1": 0.070,
    "IQ4_NL": 0.075,
    "IQ4_XS": 0.076,
    "MXFP4": 0.112,
    "fp8-channel-float32": 0.026,
    "fp8-tensor-float32": 0.026,
    "Q3_K": 0.148,
    "Q2_K": 0.269,
}
RMS_LIMITS: Mapping[str, float] = {
    **_of_groups(lambda bits, usual: BELOW[bits][0] * usual),
    # type -> largest ||decoded - source|| / ||source|| of a tensor
    "F32": 1e-6,
    "F16": 5e-4,
    "BF16": 4e-3,
    "Q8_0": 0.012,
    "Q6_K": 0.03,
    "Q5_K": 0.06,
    "Q5_0": 0.08,
    "Q5_1": 0.07,
    "Q4_K": 0.12,
    "Q4_0": 0.16,
    "Q4_1": 0.13,
    "IQ4_NL": 0.12,
    "IQ4_XS": 0.12,
    "MXFP4": 0.2,
    "fp8-channel-float32": 0.05,
    "fp8-tensor-float32": 0.05,
    "Q3_K": 0.26,
    "Q2_K": 0.50,
}
RMS_ORIGIN = "1.5 to 2.5 times the largest error measured on the ten test checkpoints, by type"
MOVED_LIMITS: Mapping[str, float] = {
    **RMS_LIMITS,
    **_of_groups(lambda bits, usual: BELOW[bits][1]),
    "F32": 1e-5,  # a scaled norm gain is divided by its scale again
    # Moved by a solver, which makes fine types make up for what coarse ones in the file lost.
    "Q8_0": 0.15,
    "Q6_K": 0.2,
    "Q5_K": 0.25,
    "Q5_0": 0.25,
    "Q5_1": 0.25,
    "Q4_K": 0.35,
    "Q4_0": 0.35,
    "Q4_1": 0.35,
    "IQ4_NL": 0.35,
    "IQ4_XS": 0.35,
    "MXFP4": 0.4,
    "fp8-channel-float32": 0.25,
    "fp8-tensor-float32": 0.25,
    "Q3_K": 0.7,
    "Q2_K": 1.25,
}
PRUNED_LIMIT = 1.2  # of a sparse matrix, whatever its type: 0.36 to 0.6 were measured of 2:4
PRUNED_RMS = 0.6  # usual of one whose other weights make up for those that went
MOVED_ORIGIN = (
    "by type, about twice the most that was measured on solved files (Q2_K, Q3_K, Q4_K: ten checkpoints; Q4_0, IQ4_XS, "
    "Q5_K, Q6_K, Q8_0: one; others: as their neighbours); a tensor in another's place is √2 away"
)
