"""How far each type takes a tensor from its source: usually, and at most in a sound file."""

from __future__ import annotations

from collections.abc import Mapping

USUAL_RMS: Mapping[str, float] = {
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
    "Q3_K": 0.148,
    "Q2_K": 0.269,
}
RMS_LIMITS: Mapping[str, float] = {
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
    "Q3_K": 0.26,
    "Q2_K": 0.50,
}
RMS_ORIGIN = "1.5 to 2.5 times the largest error measured on the ten test checkpoints, by type"
MOVED_LIMITS: Mapping[str, float] = {
    **RMS_LIMITS,
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
    "Q3_K": 0.7,
    "Q2_K": 1.25,
}
MOVED_ORIGIN = (
    "by type, about twice the most that was measured on solved files (Q2_K, Q3_K, Q4_K: ten checkpoints; Q4_0, IQ4_XS, "
    "Q5_K, Q6_K, Q8_0: one; others: as their neighbours); a tensor in another's place is √2 away"
)
