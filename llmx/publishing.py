"""The end of an export: its files get their final names, or those of a failed one, and the report its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import CheckFailed, LlmxError, ResourceError, RuntimeMissing, UsageError
from llmx.formats.json_text import read_object
from llmx.validating import REPORT_NAME, write_report

if TYPE_CHECKING:
    from llmx.validate.report import Report


def described(partial: Sequence[Path], targets: Sequence[Path]) -> tuple[dict[str, Any], ...]:
    """Name, bytes and sha256 of every file, under the name that it will have."""
    from llmx.exporters.artifact import ArtifactFile, file_sha256

    pairs = zip(partial, targets, strict=True)
    return tuple(ArtifactFile(target, path.stat().st_size, file_sha256(path)).to_json() for path, target in pairs)


def built(partial: Sequence[Path]) -> dict[str, Any]:
    """{"build": what the builder of an engine told}, from the report among the files; nothing where there is none."""
    from llmx.formats.json_text import read_object
    from llmx.formats.tensorrt import BUILD_REPORT_NAME

    told = [read_object(path) for path in partial if path.name == BUILD_REPORT_NAME]
    return {"build": told[0]} if told else {}


def publish(
    partial: list[Path],
    targets: list[Path],
    report: Report | None,
    facts: dict[str, object],
    derived: Sequence[Path] | None,
) -> Path:
    """Move the files to their final names, write the report and its page beside them, return the report's path.

    partial: those of targets, and last the manifest, which only an artifact that passed gets. derived: where the
    artifact is a whole folder, what may have been made of the one before it; a failed one then has another folder, else
    another name a file.
    Raises: CheckFailed, or what the report's exit code stands for, when it did not pass.
    """
    from llmx.exporters import artifact
    from llmx.exporters.manifest import manifest_path
    from llmx.validate.report import unproven

    passed = report is None or report.passed
    names = targets if passed else artifact.failed_names(targets, is_folder=derived is not None)
    if not passed:
        partial[-1].unlink()
    moved = partial[: None if passed else -1]
    final = [*names, *[manifest_path(targets[0])] * passed]
    if derived is not None:
        artifact.publish_folder(moved, final, _replaced(targets, derived) if passed else ())
    else:
        artifact.publish(moved, final)
    report_path = _report_path(names[0].with_name(targets[0].name))
    write_report(report_path, unproven(facts) if report is None else report.to_dict())
    if report is not None and not passed:
        raise _failure(report, names[0], report_path)
    return report_path


def _replaced(targets: Sequence[Path], derived: Sequence[Path]) -> list[Path]:
    """What the artifact that stood in this folder has and the new one has not, by the old one's manifest.

    A chat template of another model, say, would be taken for the new one's. A broken manifest says nothing. What was
    made of the old one is no more of use than the old one.
    """
    from llmx.exporters.manifest import manifest_path
    from llmx.exporters.manifest_reader import read_manifest

    try:
        had = read_manifest(manifest_path(targets[0])).files
    except LlmxError:
        return []
    left = [(targets[0].with_name(file.name), file.nbytes) for file in had]
    same = [path for path, nbytes in left if path.is_file() and path.stat().st_size == nbytes]
    return [path for path in (*same, *derived) if path not in targets and not path.is_symlink()]


def _report_path(artifact: Path) -> Path:
    """report.json beside the artifact; ARTIFACT.report.json where the folder's report tells of another artifact."""
    path = artifact.with_name(REPORT_NAME)
    try:
        told = read_object(path)["export"]["files"][0]["name"]
    except (LlmxError, KeyError, IndexError, TypeError):
        return path
    return path if told == artifact.name else artifact.with_name(f"{artifact.name}.{REPORT_NAME}")


def _failure(report: Report, artifact: Path, report_path: Path) -> LlmxError:
    problems = [f"{check.name}: {check.value} against {check.limit}: {check.detail}" for check in report.failed]
    problems += [f"{check.name}: not run: {check.detail}" for check in report.missing]
    where = f"{artifact}, report {report_path}"
    kinds = (UsageError, ResourceError, RuntimeMissing, CheckFailed)
    kind = next(kind for kind in kinds if kind.exit_code == report.exit_code)
    return kind("the artifact did not pass", problems=problems, where=where)
