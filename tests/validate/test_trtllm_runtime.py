"""TensorRT-LLM checkpoints emulated: what they round is rounded, what they do not is computed in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import CASES, random_tokens, save
from modelopt_folders import Layout, make
from safetensors.torch import load_file, save_file
from torch.nn import functional

from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.validate.runtimes import find_runtime
from llmx.validate.runtimes.emulation import Inputs, RoundedInputs, round_float8, round_int8
from llmx.validate.runtimes.transformers_cpu import TransformersCpu, TransformersSession

STEP = 0.05
TOKENS = random_tokens(24)
Opened = Callable[..., TransformersSession]


@pytest.fixture
def opened(tmp_path: Path, checkpoint_of) -> Opened:
    """opened(layout, ...): a session of tiny-qwen3 in that layout."""

    def session(layout: Layout, change: Callable[[dict], object] | None = None, **options: Any) -> TransformersSession:
        folder = tmp_path / "folder"
        if not folder.exists():
            make(checkpoint_of("tiny-qwen3"), folder, layout)
        if change is not None:
            stored = load_file(folder / "model.safetensors")
            change(stored)
            save_file(stored, folder / "model.safetensors", {"format": "pt"})
        return TransformersCpu().open(folder, **{"threads": 1, "context": 64, **options})

    return session


def logits(session: TransformersSession, tokens: list[int], decode_from: int | None = None) -> np.ndarray:
    return np.concatenate(list(session.logits(tokens, decode_from)))


# Rounding.


def test_int8_is_whole_numbers_of_steps_and_ends_at_its_ends():
    x = torch.tensor([0.0, 0.12, -0.13, 0.3, 100.0, -100.0])
    found = round_int8(x, torch.tensor(0.25))
    assert found.tolist() == [0.0, 0.0, -0.25, 0.25, 127 * 0.25, -128 * 0.25]


def test_float8_is_its_nearest_number_and_ends_at_448_steps():
    x = torch.tensor([1.0, 1.06, 1.07, 17.0, 1e6, -1e6])
    assert round_float8(x, torch.tensor(1.0)).tolist() == [1.0, 1.0, 1.125, 16.0, 448.0, -448.0]
    assert round_float8(x, torch.tensor(0.5)).tolist()[-1] == -224.0


def test_inputs_without_a_scale_are_rounded_by_token():
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [50.0], [1e-3]])
    found = Inputs(None, "INT8", None)(x)
    largest = x.abs().amax(-1, keepdim=True)
    assert torch.all((found - x).abs() <= largest / 127 / 2 * 1.001)


def test_only_the_named_matrix_and_its_experts_have_their_inputs_changed():
    experts, other = torch.randn(3, 4, 8), torch.randn(4, 8)
    change, x = Inputs(torch.full((8,), 2.0), None, None), torch.randn(5, 8)
    with RoundedInputs([(experts, change)]):
        found = [functional.linear(x, experts[expert]) for expert in range(3)]
        plain = functional.linear(x, other)
    for expert in range(3):
        torch.testing.assert_close(found[expert], 2 * functional.linear(x, experts[expert]))
    torch.testing.assert_close(plain, functional.linear(x, other))


# Sessions.


def test_inputs_are_rounded_and_an_exact_run_rounds_none(opened):
    layout = Layout("W8A8_SQ_PER_CHANNEL", step=STEP, factors=True)
    with opened(layout) as rounded, opened(layout, exact=True) as exact:
        one, two = logits(rounded, TOKENS), logits(exact, TOKENS)
    assert "emulation" in rounded.build
    assert np.abs(one - two).max() > 0.05
    model = find_runtime("transformers")
    assert model.unavailable() is None


def test_what_is_rounded_is_what_pre_hooks_on_every_linear_layer_round(opened):
    """The same numbers by the plainest means: a hook on each module, and no look at where matrices lie."""
    with opened(Layout("W8A8_SQ_PER_CHANNEL", step=STEP)) as session:
        found = logits(session, TOKENS)
        model = session._model
        hooks = [
            module.register_forward_pre_hook(lambda _, given: (round_int8(given[0], torch.tensor(STEP)),))
            for name, module in model.named_modules()
            if name.endswith("_proj")
        ]
        assert len(hooks) == 28
        with torch.inference_mode():
            wanted = model(torch.tensor([TOKENS])).logits[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_rounded_cache_is_what_the_next_position_reads(opened):
    layout = Layout("FP8", step=0.05, cache="FP8")
    with opened(layout) as session:
        whole, cached = logits(session, TOKENS), logits(session, TOKENS, decode_from=10)
    # E4M3 steps are one part in sixteen: what float32 adds otherwise may round to the next one.
    np.testing.assert_allclose(whole, cached, atol=0.5)

    def coarser(stored: dict[str, torch.Tensor]) -> None:
        for name in stored:
            if name.endswith(("k_scale", "v_scale")):
                stored[name] *= 100

    with opened(layout, coarser) as session:
        assert np.abs(logits(session, TOKENS) - whole).max() > 0.5


def test_a_session_generates_extends_and_reads_text(opened, checkpoint_of):
    with opened(Layout("W8A16")) as session:
        made = session.generate(TOKENS, 5)
        row = session.extend(TOKENS)
        assert row.argmax() == made[0]
        longer = session.extend([made[0]], keep=len(TOKENS))
        np.testing.assert_allclose(longer, logits(session, [*TOKENS, made[0]])[-1], atol=1e-4)
        ids = session.tokenize("Once upon a time", add_special=False)
        assert b"".join(session.piece(token) for token in ids).decode().strip() == "Once upon a time"
        assert session.special()["eos"] in session.special()["end_of_generation"]
        assert session.render([{"role": "user", "content": "Hi"}]) is None
        assert session.template_unavailable() is not None
        with pytest.raises(UsageError):
            session.extend([1], keep=1000)
        with pytest.raises(UsageError):
            logits(session, TOKENS * 5)
        with pytest.raises(UnsupportedError, match="speed"):
            session.speed(8, 2)


@pytest.mark.parametrize("ending", ["k_proj.k_scale", "o_proj.input_scale"])
def test_a_scale_that_is_missing_is_refused(ending, opened):
    with pytest.raises(IntegrityError, match="scale"):
        opened(Layout("FP8", step=0.05, cache="FP8"), lambda stored: stored.pop(f"model.layers.2.self_attn.{ending}"))


def test_an_algorithm_that_nothing_emulates_is_refused(opened, tmp_path):
    opened(Layout("W8A16")).close()
    path = tmp_path / "folder" / "hf_quant_config.json"
    told = json.loads(path.read_text())
    told["quantization"]["quant_algo"] = "NVFP4"
    path.write_text(json.dumps(told))
    with pytest.raises(UnsupportedError, match="NVFP4"):
        TransformersCpu().open(path.parent, threads=1, context=8)


# Ranks: every family's configuration, there and back.

LLAMAS = ("llama, all biases", "llama, llama3 rope")
WINDOWS = (
    "mistral past its window",
    "mixtral past its window",
    "phi3 past its window",
    "qwen2, its later layers slide",
    "qwen3, its later layers slide",
    "qwen3_moe past its window",
)
FAMILIES = (*LLAMAS, "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3", "phi3", "gpt2", *WINDOWS)


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_compute_what_their_checkpoint_computes(name, tmp_path):
    from llmx import api

    model = save(CASES[name], tmp_path / "model")
    target = tmp_path / "ranks"
    options = {"layout": "ranks", "tp": 2, "pp": 2, "output": target, "validate": False, "threads": 1}
    api.export(api.ExportRequest(str(tmp_path / "model"), format="trtllm", type_name="F16", **options))
    tokens = random_tokens(20)
    with TransformersCpu().open(target, threads=1, context=64) as session:
        found, cached = logits(session, tokens), logits(session, tokens, decode_from=9)
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0].numpy()
    scale = np.abs(wanted).max()
    assert np.abs(found - wanted).max() < 0.02 * scale  # weights in float16
    np.testing.assert_allclose(cached, found, atol=1e-3 * scale)


def test_a_rank_configuration_of_another_class_is_refused(tmp_path, checkpoint_of):
    from llmx import api

    target = tmp_path / "ranks"
    options = {"layout": "ranks", "output": target, "validate": False, "threads": 1}
    api.export(api.ExportRequest(str(checkpoint_of("tiny-qwen3")), format="trtllm", type_name="F16", **options))
    told = json.loads((target / "config.json").read_text())
    changes = (({"architecture": "BloomForCausalLM"}, UnsupportedError), ({"head_size": "no"}, IntegrityError))
    for change, error in changes:
        (target / "config.json").write_text(json.dumps({**told, **change}))
        with pytest.raises(error):
            TransformersCpu().open(target, threads=1, context=8)
