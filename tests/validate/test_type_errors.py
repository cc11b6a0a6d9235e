"""The limits of the types stand in order, and moved weights are held to theirs."""

from __future__ import annotations

import numpy as np
import pytest

from llmx.exporters.encoding import ENCODINGS, GROUP_ENCODINGS, encoding
from llmx.exporters.gguf_types import WRITABLE_TYPES
from llmx.formats.ggml_blocks import BLOCKS
from llmx.formats.ggml_decode import decode
from llmx.formats.gguf import read_gguf
from llmx.quant.grid import encode
from llmx.validate.checks_bytes import check_bytes
from llmx.validate.type_errors import MOVED_LIMITS, RMS_LIMITS, USUAL_RMS


@pytest.mark.parametrize("type_name", sorted(USUAL_RMS))
def test_what_is_usual_is_measured_and_below_both_limits(type_name):
    source = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32)
    kept = encoding(type_name)
    data = kept.encode(source, effort="balanced" if type_name in GROUP_ENCODINGS else "fast")
    error = kept.decode(data, source.shape[1]) - source
    usual = float(np.linalg.norm(error) / np.linalg.norm(source))
    assert usual == pytest.approx(USUAL_RMS[type_name], rel=0.1, abs=1e-9)
    assert usual < RMS_LIMITS[type_name] <= MOVED_LIMITS[type_name] < np.sqrt(2) - 0.1


def test_every_type_that_can_be_written_has_its_limits():
    assert set(WRITABLE_TYPES) | set(ENCODINGS) - set(BLOCKS) <= set(RMS_LIMITS) & set(USUAL_RMS) & set(MOVED_LIMITS)


def test_a_solved_tensor_that_is_farther_than_its_type_moves_is_caught(solved, case_of, rewrite, tmp_path):
    """Half of the weights' size is less than the coarsest type may move, and more than this one does."""
    artifact, reference = solved("tiny-qwen3", "gptq")
    file, name = read_gguf(artifact), "blk.1.ffn_up.weight"
    type_name = file.tensors[name].type_name
    values = decode(type_name, file.bytes(name).reshape(file.tensors[name].shape[0], -1))
    noise = np.random.default_rng(0).standard_normal(values.shape).astype(np.float32) * 0.5 * values.std()
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors={name: encode(type_name, values + noise, effort="fast")})
    checks = {check.name: check for check in check_bytes(case_of(bad, reference))}
    assert {key for key, check in checks.items() if check.passed is False} == {"bytes.error"}
    assert "mlp.up_proj" in checks["bytes.error"].detail
