"""bytes.sparsity: zeros are counted in the file itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmx import api
from llmx.exporters.sparsity import SPARSITY_KEY, Sparsity
from llmx.formats.ggml_blocks import BLOCKS, row_bytes
from llmx.formats.ggml_packers import pack, unpack
from llmx.formats.gguf import GgufFile, read_gguf, text
from llmx.validate.checks_bytes import check_bytes
from llmx.validate.checks_sparsity import NAME, check_sparsity
from llmx.validate.gate import COARSEST, bound_of
from llmx.validate.report import Check

MODEL = "tiny-qwen3"
TENSOR = "blk.1.ffn_up.weight"


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[[str], Path]) -> tuple[Path, Path]:
    """(a sparse Q8_0 file, its checkpoint)"""
    model, target = checkpoint_of(MODEL), tmp_path_factory.mktemp("sparse") / "sparse.gguf"
    request = api.ExportRequest(
        str(model), type_name="Q8_0", sparsity="2:4", method="magnitude", output=target, validate=False, threads=1
    )
    api.export(request)
    return target, model


def filled(file: GgufFile) -> np.ndarray[Any, Any]:
    """The tensor with one of its zeros filled, in the first group of the first row that has two."""
    name = file.tensors[TENSOR].type_name
    size = row_bytes(name, file.tensors[TENSOR].shape[-1])
    blocks = file.bytes(TENSOR).reshape(-1, size).copy().reshape(-1, BLOCKS[name].bytes)
    scales, codes = unpack(name, blocks)
    zero = codes[0][np.flatnonzero(np.asarray(file_values(file)[0, :32]) == 0)[0]]
    group = next(g for g in range(8) if (codes[0, 4 * g : 4 * g + 4] == zero).sum() == 2)
    place = 4 * group + int(np.flatnonzero(codes[0, 4 * group : 4 * group + 4] == zero)[0])
    codes[0, place] = zero + 9
    return pack(name, scales, codes)


def file_values(file: GgufFile) -> np.ndarray[Any, Any]:
    from llmx.exporters.gguf_tensors import decoded_rows

    return decoded_rows(file, TENSOR, 0, 1)


def found(case: Any) -> Check:
    (check,) = check_sparsity(case)
    assert check.name == NAME
    return check


def test_a_sound_sparse_file_passes_and_says_how_many_matrices_were_counted(sparse, case_of) -> None:
    checks = {check.name: check for check in check_bytes(case_of(*sparse))}
    assert {name for name, check in checks.items() if check.passed is False} == set()
    assert (checks[NAME].value, checks[NAME].limit) == (0, 0)
    assert "28 matrices, 2:4 by magnitude" in checks[NAME].detail


def test_one_filled_zero_is_counted_and_its_tensor_named(sparse, case_of, rewrite, tmp_path) -> None:
    artifact, model = sparse
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors={TENSOR: filled(read_gguf(artifact))})
    check = found(case_of(bad, model))
    assert (check.passed, check.value) == (False, 1)
    assert f"{TENSOR}: 1" in check.detail


def test_a_share_is_counted_over_the_whole_matrix(sparse, case_of, rewrite, tmp_path) -> None:
    artifact, model = sparse
    for share, passed in (("50%", True), ("60%", False)):
        said = text(Sparsity(share, "magnitude").to_text())
        changed = rewrite(artifact, tmp_path / f"{share}.gguf", metadata={SPARSITY_KEY: said})
        assert found(case_of(changed, model)).passed is passed


@pytest.mark.parametrize("said", ["2:4", '{"pattern": "none", "method": "wanda", "others": {}}'])
def test_a_mark_that_names_no_zeros_fails(said, sparse, case_of, rewrite, tmp_path) -> None:
    artifact, model = sparse
    bad = rewrite(artifact, tmp_path / "bad.gguf", metadata={SPARSITY_KEY: text(said)})
    assert found(case_of(bad, model)).passed is False


def test_a_dense_file_is_not_asked(artifacts, case_of) -> None:
    assert list(check_sparsity(case_of(*artifacts(MODEL, "Q8_0")))) == []


def test_a_sparse_file_may_lose_more_than_its_types(sparse, artifacts) -> None:
    assert bound_of(read_gguf(sparse[0])) == COARSEST
    assert bound_of(read_gguf(artifacts(MODEL, "Q8_0")[0])).kl < 0.1 * COARSEST.kl
