"""The reference: transformers in float32. Never our own decoder, so that a shared mistake cannot hide itself."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmx.errors import IntegrityError, UnsupportedError

GELU_CLASSES = ("GELUActivation", "NewGELUActivation", "GELUTanh", "PytorchGELUTanh", "FastGELUActivation")
HEAD_BYTES = 64 << 20  # the head runs on so many positions at a time that their logits stay under this


class Tokens:
    """The Hugging Face tokenizer of a folder. Remote code is never run and nothing is downloaded.

    A tokenizer.json is loaded as it stands: AutoTokenizer of transformers 5 rebuilds some families' tokenizers from
    the model type (qwen2: byte-level, whatever the file says), which then is not what the model was trained with.
    """

    def __init__(self, folder: Path) -> None:
        with quiet():
            from transformers import AutoTokenizer, PreTrainedTokenizerFast

            loader: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
            try:
                self._tokenizer: Any = loader.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, KeyError, ImportError) as error:
                raise UnsupportedError("transformers cannot load this tokenizer", where=folder) from error

    def encode(self, text: str, add_special: bool, parse_special: bool = True) -> list[int]:
        """Returns the ids of text; special tokens written in it are parsed, unless that is not wanted."""
        with quiet():
            made = self._tokenizer(text, add_special_tokens=add_special, split_special_tokens=not parse_special)
            return list(made["input_ids"])

    def spelling(self, token: int) -> str | None:
        """Returns what the vocabulary calls a token, or None for none."""
        return self._tokenizer.convert_ids_to_tokens(token) if 0 <= token < self.size else None

    @property
    def added(self) -> dict[int, str]:
        """Every special and added token: id -> text."""
        return {int(index): str(token) for index, token in sorted(self._tokenizer.added_tokens_decoder.items())}

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def special_texts(self) -> dict[str, str]:
        """bos_token, eos_token, ... as a chat template sees them."""
        return {key: str(value) for key, value in self._tokenizer.special_tokens_map.items() if isinstance(value, str)}

    @property
    def bos(self) -> int | None:
        return self._tokenizer.bos_token_id

    @property
    def eos(self) -> int | None:
        return self._tokenizer.eos_token_id

    @property
    def has_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """Returns the conversation in the checkpoint's chat template (transformers renders it in jinja2's sandbox)."""
        with quiet():
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )


class Reference:
    """A causal language model of a folder in float32 on the CPU with the plain ("eager") attention."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        import torch

        self._threads = threads or torch.get_num_threads()
        with quiet():
            from transformers import AutoModelForCausalLM

            try:
                model: Any = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=torch.float32,
                    attn_implementation="eager",
                    low_cpu_mem_usage=True,
                    local_files_only=True,
                    use_safetensors=True,
                )
            except (OSError, ValueError, KeyError) as error:
                raise UnsupportedError(f"transformers cannot load this model: {error}", where=folder) from error
        self._model: Any = model.eval()
        self._softcap = getattr(model.config, "final_logit_softcapping", None)
        self._check_head()

    def close(self) -> None:
        """Lets go of the weights."""
        self._model = None

    @property
    def vocab(self) -> int:
        return int(self._model.get_output_embeddings().weight.shape[0])

    def logits(self, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields f32[t, V] blocks in order that cover every position; [T, V] never exists as a whole."""
        import torch

        with quiet(), torch.inference_mode(), torch_threads(self._threads):
            hidden = self._model.base_model(input_ids=torch.tensor([list(tokens)]), use_cache=False)[0][0]
        rows = max(1, HEAD_BYTES // (4 * self.vocab))
        for start in range(0, len(tokens), rows):
            with torch.inference_mode(), torch_threads(self._threads):
                block = self._head(hidden[start : start + rows]).numpy()
            yield block

    @contextlib.contextmanager
    def gelu_table(self) -> Iterator[None]:
        """Within it, every GELU is computed as ggml does: looked up in a table of 16-bit floats.

        Below -10 it is 0, above 10 its argument; between, both argument and result are rounded to 16 bits.
        """
        from transformers import activations

        kinds = tuple(getattr(activations, name) for name in GELU_CLASSES if hasattr(activations, name))

        def looked_up(module: Any, arguments: Any, _: Any) -> Any:
            x = arguments[0]
            rounded = module.forward(x.half().float()).half().float()
            return rounded.masked_fill(x <= -10, 0.0).where(x < 10, x)

        found = [module for module in self._model.modules() if isinstance(module, kinds)]
        if not found:
            raise UnsupportedError("this reference model has no GELU that llmx knows", where=type(self._model).__name__)
        hooks = [module.register_forward_hook(looked_up) for module in found]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _head(self, hidden: Any) -> Any:
        logits = self._model.get_output_embeddings()(hidden)
        if self._softcap is not None:
            logits = (logits / self._softcap).tanh() * self._softcap
        return logits

    def _check_head(self) -> None:
        """The body and the head run apart; makes sure that nothing stands between them that this file forgot."""
        import torch

        tokens = [1, 2, 3]
        with quiet(), torch.inference_mode(), torch_threads(self._threads):
            whole = self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()
        parts = np.concatenate(list(self.logits(tokens)))
        if not np.allclose(whole, parts, rtol=1e-5, atol=1e-5, equal_nan=True):
            raise UnsupportedError(
                "the reference model changes its logits after the head in a way llmx does not know",
                where=type(self._model).__name__,
            )


def quiet() -> contextlib.AbstractContextManager[None]:
    """Silences transformers: its log lines, progress bars and Python warnings are not results of ours."""
    return _Quiet()


class _Quiet(contextlib.ContextDecorator):
    def __enter__(self) -> None:
        # The filter must stand before the import: transformers warns while it is imported, too.
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        from transformers.utils import logging

        self._verbosity = logging.get_verbosity()
        self._bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._verbosity)
        if self._bars:
            logging.enable_progress_bar()
        self._warnings.__exit__(None, None, None)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within it, torch computes on so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def end_ids(generation_config: Mapping[str, object], tokens: Tokens) -> set[int]:
    """Returns every id that ends generation: generation_config's eos_token_id (one or a list) and the tokenizer's."""
    listed = generation_config.get("eos_token_id")
    ids = listed if isinstance(listed, list) else [listed]
    bad = [item for item in ids if item is not None and not isinstance(item, int)]
    if bad:
        raise IntegrityError(f"generation_config.json: eos_token_id holds {bad}", fix="use token ids")
    return {int(item) for item in [*ids, tokens.eos] if isinstance(item, int)}
