"""Engines built on a GPU by whatever TensorRT is there: run with `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmx import api
from llmx.errors import LlmxError, UnsupportedError
from llmx.exporters.tensorrt_build import find_builder, installed
from llmx.formats.tensorrt import read_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"


@pytest.fixture(scope="module", autouse=True)
def tensorrt_is_here() -> None:
    try:
        found = installed("tensorrt")
    except LlmxError as error:
        pytest.skip(error.what)
    if found.gpu is None:
        pytest.skip("there is no GPU")


def export(output: Path, **options: object) -> dict[str, object]:
    chosen = {"type_name": "F16", "max_input": 32, "max_length": 64, "validate": False, **options}
    request = api.ExportRequest(str(EXAMPLE), format="tensorrt", builder="tensorrt", output=output, **chosen)  # type: ignore[arg-type]
    api.export(request)
    return json.loads((output / "build-report.json").read_text())


@pytest.mark.gpu
def test_an_engine_is_bound_to_the_gpu_it_was_built_on_and_tells_its_layers_and_memory(tmp_path: Path) -> None:
    built = export(tmp_path / "made")
    found = installed("tensorrt")
    assert read_config(tmp_path / "made").compute_capability == found.capability
    engine = built["engine"]
    assert isinstance(engine, dict) and engine["layers"] > 0 and engine["device_memory_bytes"] > 0


@pytest.mark.gpu
def test_a_timing_cache_is_written_and_read_again(tmp_path: Path) -> None:
    cache = tmp_path / "timings"
    first = export(tmp_path / "first", timing_cache=cache)
    second = export(tmp_path / "second", timing_cache=cache)
    assert first["timing_cache_bytes"] == [0, cache.stat().st_size]
    assert second["seconds_building"] < first["seconds_building"]  # type: ignore[operator]
    cache.write_bytes(b"no cache at all")
    with pytest.raises(LlmxError, match="timing cache"):
        export(tmp_path / "third", timing_cache=cache)


@pytest.mark.gpu
def test_portable_engines_are_bound_to_no_gpu_and_refittable_ones_say_so(tmp_path: Path) -> None:
    export(tmp_path / "portable", portable=True)
    assert read_config(tmp_path / "portable").compute_capability is None
    built = export(tmp_path / "refit", refit=True)
    assert read_config(tmp_path / "refit").refit and built["engine"]["refittable"]  # type: ignore[index]


@pytest.mark.gpu
def test_types_that_this_version_lacks_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    lacking = {"W4A16", "FP8", "BF16"} - set(find_builder(installed("tensorrt")).types)
    for name in sorted(lacking):
        with pytest.raises(UnsupportedError, match=f"builds no {name} engine"):
            export(tmp_path / name, type_name=name)
