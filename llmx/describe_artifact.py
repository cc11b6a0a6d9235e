"""What verify, sign, diff and chat print for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmx.printing import on_one_line

if TYPE_CHECKING:
    from llmx.chatting import Turn
    from llmx.differing import Differences
    from llmx.verifying import Verification

_SHOWN = 40


def verified(found: Verification) -> str:
    """Every difference, or what was found to be the same."""
    lines = [
        f"{d.file}: {d.detail}" if d.tensor is None else f"{d.file}: tensor {d.tensor} {d.detail}"
        for d in found.differences
    ]
    signed = "signature and hashes hold" if found.signed else "hashes hold (no signature was asked for)"
    counted = f"{found.files} files, {found.tensors} tensors, {found.nbytes:,} bytes"
    lines = [on_one_line(line) for line in lines]
    return "\n".join([*lines, f"not what the manifest says: {found.manifest}"] if lines else [f"{signed}: {counted}"])


def differences(found: Differences) -> str:
    """Metadata, tokenizer, tensors, sizes: a line a difference, like diff."""
    lines = [f"--- {found.first}", f"+++ {found.second}"]
    for title, changes in (("metadata", found.metadata), ("tokenizer", found.tokenizer)):
        if changes:
            lines += [title, *(f"  {on_one_line(str(change))}" for change in changes)]
    changed = [tensor for tensor in found.tensors if tensor.differs]
    if changed:
        lines += ["tensors", *(f"  {on_one_line(str(tensor))}" for tensor in changed[:_SHOWN])]
        if len(changed) > _SHOWN:
            lines.append(f"  and {len(changed) - _SHOWN} more (--json has all of them)")
    same = len(found.tensors) - len(changed)
    sizes = f"{found.first_bytes:,} and {found.second_bytes:,} bytes"
    return "\n".join([*lines, f"{same} tensors are the same, {len(changed)} differ; {sizes}"])


def turn(found: Turn) -> str:
    """The line under an answer."""
    rate = f"{found.tokens_per_second:.1f} tokens/s" if found.tokens_per_second else "no speed: one token"
    return f"[{found.tokens} tokens, {rate}, {found.stopped}]"
