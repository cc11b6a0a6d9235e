"""The command line: click, no logic. Results go to stdout, progress and errors to stderr.

Exit codes: 0 passed, 1 internal, 2 usage, 3 unsupported, 4 a check failed, 5 not enough disk or memory,
6 integrity or security, 7 runtime missing.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llmx.errors import LlmxError

JSON_OPTION = "--json"

_json = click.option(JSON_OPTION, "as_json", is_flag=True, help="Print one JSON object on stdout.")
_revision = click.option("--revision", metavar="REV", help="Revision of a hub model (branch, tag or commit).")
_threads = click.option("--threads", type=int, default=0, show_default="all cores", help="Worker threads.")
_FILE = click.Path(path_type=Path, dir_okay=False)
_ANY = click.Path(path_type=Path)


def _several(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One decorator from many, in reading order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_what = _several(
    click.option("--format", "format_", default="gguf", show_default=True, help="Target format: gguf."),
    click.option("--bits", type=int, help="Size class: 2, 3, 4, 5, 6, 8, 16 or 32. [default: 4]"),
    click.option("--type", "type_name", metavar="NAME", help="Exact file type, for example Q4_K_M, IQ4_XS, BF16."),
    click.option(
        "--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", help="Type of single tensors; repeatable."
    ),
    click.option("--imatrix", type=_FILE, help="Importance matrix file, GGUF or legacy .dat."),
    click.option("--split-max-size", metavar="SIZE", help="Split into files of at most this size, for example 2GB."),
    _revision,
)
_device = click.option("--device", default="auto", show_default=True, help="Where to calibrate: auto, cpu or cuda.")
_calibration = _several(
    click.option(
        "--calibration", type=_FILE, metavar="FILE", help="Text or JSON Lines to calibrate on. [default: built in]"
    ),
    click.option("--calibration-tokens", type=int, metavar="N", help="How many tokens of it. [default: by model size]"),
    _device,
)
_how = _several(
    click.option("--recipe", metavar="NAME|FILE", help="A recipe: q4_k_m+gptq, w4a16-awq, … or a YAML file."),
    click.option("--method", help="auto, rtn, awq or gptq. [default: auto, which calibrates where it takes minutes]"),
    click.option("--effort", help="fast, balanced or best. [default: balanced]"),
    _calibration,
    click.option(
        "--statistics", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
        help="Keep the calibration's statistics here, and go on from those that are.",
    ),
    click.option("--target-size", metavar="SIZE", help="Choose every tensor's type so that the file fits, e.g. 900MB."),
    click.option("--target-bpw", type=float, metavar="BITS", help="The same by bits per weight, for example 4.2."),
)  # fmt: skip
_limits = _several(
    click.option("--text", type=_FILE, help="Text to judge on. [default: a built-in mixed text]"),
    click.option("--max-kl", type=float, help="Largest mean KL divergence to pass."),
    click.option("--min-top1", type=float, help="Smallest share of equal most likely tokens to pass."),
    click.option("--max-ppl-ratio", type=float, help="Largest perplexity ratio to pass."),
    click.option("--min-tokens-per-second", type=float, help="Slowest decoding to pass."),
)


@click.group(
    epilog="Exit codes: 0 passed, 2 usage, 3 unsupported, 4 check failed, 5 resources, 6 integrity, 7 no runtime."
)
@click.version_option(package_name="llmx")
def commands() -> None:
    """Turn a Hugging Face checkpoint into a file that runs where people deploy, and prove it there."""


@commands.command(short_help="Quantize, write, rerun on the target runtime, report.")
@click.argument("model")
@_what
@_how
@click.option("-o", "--output", type=_ANY, default=Path(), show_default=".", help="A folder, or a .gguf file.")
@_threads
@click.option("--validate/--no-validate", default=True, show_default=True, help="Rerun the artifact on its runtime.")
@_limits
@click.option("--force", is_flag=True, help="Replace an artifact that exists.")
@_json
def export(output: Path, validate: bool, force: bool, as_json: bool, **chosen: Any) -> None:
    """Turn MODEL (a folder or a hub id) into an artifact, rerun it on its runtime and report.

    \b
    Examples:
      llmx export ./SmolLM2-135M --format gguf --bits 4
      llmx export HuggingFaceTB/SmolLM2-135M --type Q5_K_M -o out/
      llmx export ./model --type Q4_K_M --imatrix imatrix.gguf --tensor-type 'attn_v=Q8_0'
      llmx export ./model --bits 4 --method gptq --calibration my.txt --effort best
      llmx export ./model --target-bpw 4.2 --calibration chats.jsonl
    """
    from llmx import api, describe

    result = api.export(_request(output=output, validate=validate, force=force, **chosen))
    _answer(as_json, result.to_json(), lambda: describe.export(result))


@commands.command(short_help="Rerun an artifact and judge it against its model.")
@click.argument("artifact", type=_ANY)
@click.option("--reference", required=True, metavar="MODEL", help="The checkpoint it was made from: folder or hub id.")
@_revision
@click.option("-o", "--output", type=_ANY, help="Folder for report.json.")
@_threads
@_limits
@_json
def validate(artifact: Path, reference: str, output: Path | None, as_json: bool, **chosen: Any) -> None:
    """Rerun ARTIFACT, ours or anybody's, on its runtime and judge it against MODEL.

    \b
    Examples:
      llmx validate model-Q4_K_M.gguf --reference ./model
      llmx validate model-Q4_K_M.gguf --reference org/model --text my.txt --max-kl 0.05 -o reports/
    """
    from llmx import api, describe

    revision, threads = chosen.pop("revision"), chosen.pop("threads")
    text = chosen.pop("text")
    report = api.validate(
        artifact, reference, revision=revision, text=text, limits=api.limits(**chosen), output=output, threads=threads
    )
    _answer(as_json, report.to_dict(), lambda: describe.report(report))
    click.get_current_context().exit(api.exit_code(report))


@commands.command(short_help="What an export would write, before a weight is read.")
@click.argument("model")
@_what
@_how
@_threads
@_json
def plan(as_json: bool, **chosen: Any) -> None:
    """Print every tensor's type, the exact output size, the memory and the fall-backs, without reading a weight.

    \b
    Example:
      llmx plan ./model --format gguf --bits 4
    """
    from llmx import api, describe

    planned = api.plan(_request(**chosen))
    _answer(as_json, planned.described(), lambda: describe.plan(planned))


@commands.command(short_help="Measure an importance matrix.")
@click.argument("model")
@_calibration
@_revision
@click.option("-o", "--output", type=_FILE, required=True, help="The importance matrix to write, a .gguf file.")
@_threads
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@_json
def calibrate(as_json: bool, **chosen: Any) -> None:
    """Run MODEL over a text and write the mean squares of every matrix's inputs: an importance matrix.

    Both llama-quantize and `llmx export --imatrix` read it.

    \b
    Example:
      llmx calibrate ./model --calibration my.txt -o imatrix.gguf
    """
    from llmx import api, describe

    result = api.calibrate(api.CalibrateRequest(**chosen))
    _answer(as_json, result.to_json(), lambda: describe.calibrated(result))


@commands.command(short_help="What a GGUF file holds.")
@click.argument("file", type=_ANY)
@_json
def inspect(file: Path, as_json: bool) -> None:
    """Print the metadata, types and tensors of any GGUF FILE, split sets included.

    \b
    Example:
      llmx inspect model-Q4_K_M.gguf
    """
    from llmx import api, describe

    found = api.inspect(file)
    _answer(as_json, found, lambda: describe.file(found))


@commands.command(short_help="Which runtimes are here, and why not.")
@_json
def doctor(as_json: bool) -> None:
    """Print which runtimes and libraries are installed, and why a runtime cannot be used.

    \b
    Example:
      llmx doctor
    """
    from llmx import api, describe

    found = api.doctor()
    _answer(as_json, found, lambda: describe.doctor(found))


def _request(
    model: str,
    format_: str,
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_ppl_ratio: float | None = None,
    min_tokens_per_second: float | None = None,
    **chosen: Any,
) -> Any:
    from llmx import api

    judged = None
    if (limits := (max_kl, min_top1, max_ppl_ratio, min_tokens_per_second)) != (None,) * 4:
        judged = api.limits(*limits)
    return api.ExportRequest(model=model, format=format_, limits=judged, **chosen)


def _answer(as_json: bool, value: dict[str, Any], words: Callable[[], str]) -> None:
    """The result on stdout: one JSON object for scripts, words for people."""
    if as_json:
        _print_json(value)
    else:
        click.echo(words())


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


def main() -> None:
    """The `llmx` command."""
    # Asked to stop, it unwinds as for Ctrl-C, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(commands.main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: nothing was left under the final name", err=True)
        sys.exit(130)
    except LlmxError as error:
        if JSON_OPTION in sys.argv:
            _print_json({"error": error.to_json()})
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
