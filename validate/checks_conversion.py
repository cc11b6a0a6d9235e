"""The structure of a conversion: the artifact's float32 twin on the runtime against transformers float32.

What must agree here is arithmetic on the same numbers, so the limits are those of float32 rounding, five orders of
magnitude below any quantization loss. Causes a failure: rope scaling dropped or wrong, a wrong epsilon, window, head
count, activation, multiplier, a tensor under a wrong name, a BOS that the runtime does not see.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from llmx.errors import IntegrityError
from llmx.exporters.gguf_tensors import restore
from llmx.validate import twin
from llmx.validate.case import Case, chunks
from llmx.validate.metrics import Comparison
from llmx.validate.oracle import Reference
from llmx.validate.report import Check, at_most, not_run

MAX_LOGIT_DIFFERENCE = 1e-3
LOGIT_ORIGIN = "measured maximum 5e-5 on float32 conversions, times 20"
FLOORS = {
    # activation -> (KL limit, origin)
    "silu": (1e-6, "float32 rounding: measured floor 9e-12 on llama.cpp"),
    "gelu": (1e-5, "ggml computes GELU through a float16 table, which raises the floor"),
    "gelu_tanh": (1e-5, "ggml computes GELU through a float16 table, which raises the floor"),
}
NAMES = ("conversion.kl", "conversion.logits", "conversion.decode")


@dataclass(frozen=True, slots=True)
class _Twins:
    artifact: Path
    reference: Path
    layers: int | None  # None: the whole model

    @property
    def note(self) -> str:
        return "" if self.layers is None else f"; the first {self.layers} layers, as the whole twin exceeds its budget"


def check_conversion(case: Case) -> Iterator[Check]:
    """Yields conversion.kl, .logits, .decode and, for a model with a sliding window, .window."""
    plan = _plan(case)
    if isinstance(plan, str):
        yield from (not_run(name, plan) for name in NAMES)
        return
    try:
        twins = _make(case, plan)
    except IntegrityError as error:  # tensors are missing or misshapen; the check of the bytes names them
        yield from (not_run(name, str(error)) for name in NAMES)
        return
    try:
        with closing(Reference(twins.reference, case.settings.threads)) as reference:
            yield from _judge(case, twins, reference)
    finally:
        shutil.rmtree(case.scratch / "twin", ignore_errors=True)


def _plan(case: Case) -> int | str | None:
    """Returns how many layers the twin has (None: all), or why there can be none."""
    budget = case.settings.twin_bytes
    wanted = [None, *range(case.model.architecture.layers - 1, 0, -1)]
    fitting = next((n for n in wanted if twin.twin_bytes(case.file, n) <= budget), "none")
    if fitting == "none":
        size = twin.twin_bytes(case.file, 1)
        return f"even one layer of the float32 twin takes {size} bytes; its budget is {budget}"
    free = shutil.disk_usage(case.scratch).free
    if 2 * twin.twin_bytes(case.file, fitting) > free:  # pyright: ignore[reportArgumentType]
        return f"the float32 twins need {2 * twin.twin_bytes(case.file)} bytes of disk in {case.scratch}; {free} free"
    return fitting  # pyright: ignore[reportReturnType]


def _make(case: Case, layers: int | None) -> _Twins:
    folder = case.scratch / "twin"
    folder.mkdir()
    if layers is None and twin.is_its_own_twin(case.file):
        return _Twins(case.artifact, case.model.checkpoint.folder, None)
    twin.write_gguf_twin(case.file, folder / "twin.gguf", layers)
    twin.write_checkpoint_twin(restore(case.file, case.model, case.entries), case.model, folder / "checkpoint", layers)
    return _Twins(folder / "twin.gguf", folder / "checkpoint", layers)


def _judge(case: Case, twins: _Twins, reference: Reference) -> Iterator[Check]:
    settings, length = case.settings, case.chunk
    count = -(-settings.positions // length)
    sequences = list(chunks(case.ids, case.leading, length, count))
    if not sequences:
        yield from (not_run(name, f"the text has fewer tokens than one chunk of {length}") for name in NAMES)
        return
    kl_limit, kl_origin = FLOORS[case.model.architecture.activation]
    with case.runtime.open(twins.artifact, threads=settings.threads, context=length, exact=True) as session:
        whole, decode = Comparison(), Comparison()
        for tokens in sequences:
            whole.add_streams(tokens, reference.logits(tokens), session.logits(tokens), range(length))
        tokens, cached = sequences[0], range(length // 2, length)
        decode.add_streams(tokens, reference.logits(tokens), session.logits(tokens, cached.start), cached)
    found = whole.summary()
    detail = f"{found.positions} positions, KL(transformers f32 ‖ runtime, f32 KV, exact kernels){twins.note}"
    yield at_most("conversion.kl", found.kl_mean, kl_limit, "nats", kl_origin, detail=detail)
    yield at_most(
        "conversion.logits", found.max_logit_difference, MAX_LOGIT_DIFFERENCE, "logits", LOGIT_ORIGIN, detail=detail
    )
    found = decode.summary()
    detail = f"{found.positions} positions fed one at a time through the KV cache{twins.note}"
    yield at_most("conversion.decode", found.kl_mean, kl_limit, "nats", kl_origin, detail=detail)
    yield from _window(case, twins, reference)


def _window(case: Case, twins: _Twins, reference: Reference) -> Iterator[Check]:
    """Past the sliding window, where a wrong window shows."""
    a = case.model.architecture
    if a.sliding_window is None or a.sliding_window >= a.context_length or "sliding" not in a.layer_kinds:
        return
    length = min(a.sliding_window + 64, a.context_length)
    sequence = next(chunks(case.ids, case.leading, length, 1), None)
    if length > case.settings.window_tokens or sequence is None:
        reason = "the text is too short" if sequence is None else f"at most {case.settings.window_tokens} are run"
        yield Check("conversion.window", None, detail=f"needs {length} tokens; {reason}", required=False)
        return
    past = Comparison()
    settings = case.settings
    with case.runtime.open(twins.artifact, threads=settings.threads, context=length, exact=True) as session:
        past.add_streams(
            sequence, reference.logits(sequence), session.logits(sequence), range(a.sliding_window, length)
        )
    found = past.summary()
    limit, origin = FLOORS[a.activation]
    detail = f"{found.positions} positions past the sliding window of {a.sliding_window}{twins.note}"
    yield at_most("conversion.window", found.kl_mean, limit, "nats", origin, detail=detail)
