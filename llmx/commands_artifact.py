"""The commands that look at a finished artifact: verify, sign, diff and chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from llmx import options
from llmx.printing import harmless


@click.command(short_help="Compare an artifact's bytes with its manifest.")
@click.argument("artifact", type=options.ANY)
@click.option("--manifest", type=options.FILE, metavar="FILE", help="The manifest. [default: NAME.manifest.json]")
@click.option("--public-key", type=options.FILE, metavar="FILE", help="Check the manifest's signature with this key.")
@click.option("--signature", type=options.FILE, metavar="FILE", help="The signature. [default: MANIFEST.sig]")
@options.json_option
def verify(artifact: Path, as_json: bool, **chosen: Any) -> None:
    """Compare every file and tensor of ARTIFACT (or of its manifest) with the hashes of the manifest.

    Exit codes: 0 all the same, 6 something differs or the signature does not hold, 2 a file is missing.

    \b
    Examples:
      llmx verify model-Q4_K_M.gguf
      llmx verify model-Q4_K_M.manifest.json --public-key key.pub
      llmx verify renamed.gguf --manifest model-Q4_K_M.manifest.json
    """
    from llmx import api, describe_artifact

    found = api.verify(artifact, **chosen)
    options.answer(as_json, found.to_json(), lambda: describe_artifact.verified(found))
    click.get_current_context().exit(found.exit_code)


@click.command(short_help="Sign an artifact's manifest.")
@click.argument("artifact", type=options.ANY)
@click.option("--key", type=options.FILE, required=True, metavar="FILE", help="Private key on an elliptic curve, PEM.")
@click.option("-o", "--output", type=options.FILE, help="The signature to write. [default: MANIFEST.sig]")
@click.option("--force", is_flag=True, help="Replace a signature that exists.")
@options.json_option
def sign(artifact: Path, as_json: bool, **chosen: Any) -> None:
    """Sign the manifest of ARTIFACT (or the manifest itself), offline. It holds the hash of every byte.

    \b
    Example:
      llmx sign model-Q4_K_M.gguf --key key.pem
    """
    from llmx import api

    path = api.sign(artifact, **chosen)
    options.answer(as_json, {"signature": str(path)}, lambda: str(path))


@click.command(short_help="What two artifacts have differently.")
@click.argument("first", type=options.ANY)
@click.argument("second", type=options.ANY)
@options.json_option
def diff(first: Path, second: Path, as_json: bool) -> None:
    """Compare metadata, tokenizer and tensors of two GGUF files, split sets or checkpoint folders.

    A tensor's difference is the relative RMS of its decoded values. Exit codes: 0 equal, 1 different, as diff(1).

    \b
    Examples:
      llmx diff old-Q4_K_M.gguf new-Q4_K_M.gguf
      llmx diff ./model model-Q8_0.gguf --json
    """
    from llmx import api, describe_artifact

    found = api.diff(first, second)
    options.answer(as_json, found.to_json(), lambda: describe_artifact.differences(found))
    click.get_current_context().exit(found.exit_code)


@click.command(short_help="Talk to an artifact in its runtime.")
@click.argument("artifact", type=options.ANY)
@click.option("--message", "messages", multiple=True, metavar="TEXT", help="What to say; repeatable, a turn each.")
@click.option("--system", metavar="TEXT", help="The system's message, before all others.")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws, where --temperature is above 0.")
@click.option("--raw", is_flag=True, help="Continue plain text: no chat template, and no turn knows another.")
@options.threads
@options.json_option
def chat(messages: tuple[str, ...], as_json: bool, **chosen: Any) -> None:
    """Have a short conversation with ARTIFACT, through its own chat template.

    Without --message it reads a message a line, from the terminal or from a pipe, until the end of the input.

    \b
    Examples:
      llmx chat model-Q4_K_M.gguf
      llmx chat model-Q4_K_M.gguf --message "What is the capital of France?"
      llmx chat base-Q8_0.gguf --raw --message "Once upon a time"
    """
    from llmx import api, describe_artifact

    turns = []
    try:
        with api.Chat(api.ChatRequest(**chosen)) as conversation:
            for message in messages or _lines():
                turns.append(turn := conversation.say(message, (lambda text: None) if as_json else _show))
                if not as_json:
                    click.echo()
                    click.echo(describe_artifact.turn(turn), err=True)
            told = {"artifact": str(chosen["artifact"]), "runtime": conversation.build}
    except KeyboardInterrupt:
        click.echo("\nthe conversation was interrupted", err=True)
        click.get_current_context().exit(INTERRUPTED)
    if as_json:
        options.print_json({**told, "turns": [turn.to_json() for turn in turns]})


INTERRUPTED = 130
COMMANDS = (verify, sign, diff, chat)


def _lines() -> Iterator[str]:
    """Messages from standard input that are not empty; on a terminal, asked for."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _show(text: str) -> None:
    click.echo(harmless(text), nl=False)
