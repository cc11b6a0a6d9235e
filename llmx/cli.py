"""The command line: click, no logic. Results go to stdout, progress and errors to stderr.

Exit codes: 0 passed, 1 internal, 2 usage, 3 unsupported, 4 a check failed, 5 not enough disk or memory,
6 integrity or security, 7 runtime missing.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from llmx import commands_artifact, commands_compare, options
from llmx.errors import LlmxError
from llmx.printing import harmless
from llmx.system_errors import translated


@click.group(
    epilog="Exit codes: 0 passed, 2 usage, 3 unsupported, 4 check failed, 5 resources, 6 integrity, 7 no runtime."
)
@click.version_option(package_name="llmx")
def commands() -> None:
    """Turn a Hugging Face checkpoint into a file that runs where people deploy, and prove it there."""


@commands.command(short_help="Quantize, write, rerun on the target runtime, report.")
@click.argument("model", required=False, default="")
@options.what
@options.how
@click.option(
    "--from-manifest", type=options.FILE, metavar="FILE", help="Make the bytes of this manifest again, from MODEL."
)
@click.option(
    "-o", "--output", type=options.ANY,
    help="A folder, or a .gguf file. [default: the current folder; ONNX: a new one in it]",
)  # fmt: skip
@options.threads
@options.max_memory
@click.option("--validate/--no-validate", default=True, show_default=True, help="Rerun the artifact on its runtime.")
@options.limits
@click.option("--ort", is_flag=True, default=None, help="ONNX: write an .ort file too, for onnxruntime on phones.")
@click.option("--force", is_flag=True, help="Replace an artifact that exists.")
@click.option("--resume", is_flag=True, help="Go on with what the same export left when it was stopped.")
@options.json_option
def export(output: Path | None, validate: bool, force: bool, as_json: bool, **chosen: Any) -> None:
    """Turn MODEL (a folder, a hub id, or a GGUF file for ONNX) into an artifact, rerun it and report.

    \b
    Examples:
      llmx export ./SmolLM2-135M --format gguf --bits 4
      llmx export HuggingFaceTB/SmolLM2-135M --type Q5_K_M -o out/
      llmx export ./model --type Q4_K_M --imatrix imatrix.gguf --tensor-type 'attn_v=Q8_0'
      llmx export ./model --bits 4 --method gptq --calibration my.txt --effort best
      llmx export ./model --target-bpw 4.2 --calibration chats.jsonl
      llmx export ./model --format onnx --bits 16 -o model-onnx/
      llmx export ./model --format tensorrt --bits 4 -o engine/
      llmx export ./model --from-manifest model-Q4_K_M.manifest.json -o again/
    """
    from llmx import api, describe

    result = api.export(_request(output=output, validate=validate, force=force, **chosen))
    options.answer(as_json, result.to_json(), lambda: describe.export(result))


@commands.command(short_help="Rerun an artifact and judge it against its model.")
@click.argument("artifact", type=options.ANY)
@click.option("--reference", metavar="MODEL", help="The checkpoint it was made from: folder or hub id.")
@click.option(
    "--against", type=options.ANY, metavar="OTHER",
    help="Another artifact to judge it against; without --reference, what takes the checkpoint is left out.",
)  # fmt: skip
@options.revision
@click.option("-o", "--output", type=options.ANY, help="Folder for report.json, report.html and junit.xml.")
@options.threads
@options.max_memory
@options.limits
@click.option("--blame", is_flag=True, help="Name the tensor at fault even if no check fails; else only then.")
@options.json_option
def validate(artifact: Path, reference: str | None, output: Path | None, as_json: bool, **chosen: Any) -> None:
    """Rerun ARTIFACT, ours or anybody's, on its runtime and judge it against MODEL, OTHER or both.

    \b
    Examples:
      llmx validate model-Q4_K_M.gguf --reference ./model
      llmx validate model-Q4_K_M.gguf --reference org/model --text my.txt --max-kl 0.05 -o reports/
      llmx validate any.gguf --reference ./model --gate gate.yaml --text my.txt --positions 4096
      llmx validate broken.gguf --reference ./model --blame
      llmx validate new.gguf --against deployed.gguf --max-kl 0.01
    """
    from llmx import api, describe

    names = ("against", "revision", "text", "positions", "threads", "max_memory", "blame")
    how = {name: chosen.pop(name) for name in names}
    report = api.validate(artifact, reference, limits=api.limits(**chosen), output=output, **how)
    options.answer(as_json, report.to_dict(), lambda: describe.report(report))
    click.get_current_context().exit(api.exit_code(report))


@commands.command(short_help="What an export would write, before a weight is read.")
@click.argument("model")
@options.what
@options.how
@options.threads
@options.max_memory
@options.json_option
def plan(as_json: bool, **chosen: Any) -> None:
    """Print every tensor's type, the exact output size, the memory and the fall-backs, without reading a weight.

    \b
    Example:
      llmx plan ./model --format gguf --bits 4
    """
    from llmx import api, describe

    planned = api.plan(_request(**chosen))
    options.answer(as_json, planned.described(), lambda: describe.plan(planned))


@commands.command(short_help="Measure an importance matrix.")
@click.argument("model")
@options.calibration
@options.revision
@click.option("-o", "--output", type=options.FILE, required=True, help="The importance matrix to write, a .gguf file.")
@options.threads
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@options.json_option
def calibrate(as_json: bool, **chosen: Any) -> None:
    """Run MODEL over a text and write the mean squares of every matrix's inputs: an importance matrix.

    Both llama-quantize and `llmx export --imatrix` read it.

    \b
    Example:
      llmx calibrate ./model --calibration my.txt -o imatrix.gguf
    """
    from llmx import api, describe

    result = api.calibrate(api.CalibrateRequest(**chosen))
    options.answer(as_json, result.to_json(), lambda: describe.calibrated(result))


@commands.command(short_help="What a GGUF file or an ONNX graph holds.")
@click.argument("file", type=options.ANY)
@options.json_option
def inspect(file: Path, as_json: bool) -> None:
    """Print the metadata, types and tensors of any GGUF FILE, split sets included, or of an ONNX graph or its folder.

    \b
    Examples:
      llmx inspect model-Q4_K_M.gguf
      llmx inspect model-F32-onnx/
    """
    from llmx import api, describe

    found = api.inspect(file)
    options.answer(as_json, found, lambda: describe.file(found))


@commands.command(short_help="Which runtimes are here, and why not.")
@options.json_option
def doctor(as_json: bool) -> None:
    """Print which runtimes and libraries are installed, and why a runtime cannot be used.

    \b
    Example:
      llmx doctor
    """
    from llmx import api, describe

    found = api.doctor()
    options.answer(as_json, found, lambda: describe.doctor(found))


for command in (*commands_artifact.COMMANDS, commands_compare.compare):
    commands.add_command(command)


def _request(
    model: str,
    format_: str,
    gate: Path | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_ppl_ratio: float | None = None,
    min_tokens_per_second: float | None = None,
    **chosen: Any,
) -> Any:
    from llmx import api

    judged = None
    if (limits := (max_kl, min_top1, max_ppl_ratio, min_tokens_per_second, gate)) != (None,) * 5:
        judged = api.limits(*limits)
    return api.ExportRequest(model=model, format=format_, limits=judged, **chosen)


def main() -> None:
    """The `llmx` command."""
    # Asked to stop, it unwinds as for Ctrl-C, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(commands.main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as stop:
        click.echo("interrupted: nothing was left under the final name", err=True)
        _tell_notes(stop)
        sys.exit(130)
    except SystemExit as stop:
        _tell_notes(stop)
        raise
    except LlmxError as error:
        _refused(error, error)
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        told = translated(error)
        if told is None:
            raise
        _refused(told, error)


def _refused(told: LlmxError, noted: BaseException) -> NoReturn:
    """Say what went wrong, and end with its exit code. noted: what carries the notes."""
    if options.JSON_OPTION in sys.argv:
        options.print_json({"error": told.to_json()})
    click.echo(harmless(f"error: {told}"), err=True)
    _tell_notes(noted)
    sys.exit(told.exit_code)


def _tell_notes(stop: BaseException | None) -> None:
    """What was noted on the way out, by whoever keeps work for --resume."""
    while stop is not None:
        for note in getattr(stop, "__notes__", ()):
            click.echo(harmless(note), err=True)
        stop = stop.__cause__


if __name__ == "__main__":
    main()
