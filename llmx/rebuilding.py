"""The manifest of an export, and making the same bytes again from it: `llmx export --from-manifest`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import CheckFailed, IntegrityError, UsageError

if TYPE_CHECKING:
    from llmx.exporters.manifest_reader import Manifest
    from llmx.exporters.target import WrittenTensor
    from llmx.models.model import Model
    from llmx.preparing import ExportRequest, Prepared
    from llmx.quant.recipe import Recipe
    from llmx.validate.report import Report

# What a manifest says, so that the command line must not say it too: field of the request -> its option.
SAID = {
    "bits": "--bits",
    "type_name": "--type",
    "dialect": "--dialect",
    "layout": "--layout",
    "tp": "--tp",
    "pp": "--pp",
    "kv_cache": "--kv-cache",
    "builder": "--builder",
    "max_batch": "--max-batch",
    "max_input": "--max-input",
    "max_length": "--max-length",
    "refit": "--refit",
    "portable": "--portable",
    "profiles": "--profiles",
    "wide_head": "--wide-head",
    "optimization_level": "--optimization-level",
    "method": "--method",
    "effort": "--effort",
    "sparsity": "--sparsity",
    "recipe": "--recipe",
    "calibration_tokens": "--calibration-tokens",
    "target_size": "--target-size",
    "target_bpw": "--target-bpw",
    "tensor_types": "--tensor-type",
    "split_max_size": "--split-max-size",
    "revision": "--revision",
}
SHOWN = 12


def as_it_was(request: ExportRequest) -> tuple[ExportRequest, Manifest | None]:
    """The request with what its manifest says filled in, and the manifest; None where none is given.

    Raises: UsageError when the request says something that the manifest says, lacks the model or a file that the
    manifest needs; IntegrityError for a manifest that is broken, or another calibration text or importance matrix.
    """
    if request.from_manifest is None:
        if not request.model:
            raise UsageError("MODEL is missing", fix="give the checkpoint's folder or hub id")
        return request, None
    from llmx.exporters.manifest_reader import read_manifest

    said = [option for field, option in SAID.items() if getattr(request, field) not in (None, ())]
    if request.device != "auto":
        said.append("--device")
    if said:
        raise UsageError("the manifest says these itself", problems=said, fix="leave them out")
    manifest = read_manifest(request.from_manifest)
    told = manifest.told
    source, options, calibration = told["source"], told["options"], told["calibration"]
    _check_inputs(request, manifest)
    budget, split = options["budget"] or {}, options["split_max_bytes"]
    filled = replace(
        request,
        model=request.model or _hub_id(source, request.from_manifest),
        revision=source["revision"] if not request.model or not Path(request.model).is_dir() else None,
        format=told["format"],
        dialect=options.get("dialect"),
        layout=options.get("layout"),
        tp=options.get("tp"),
        pp=options.get("pp"),
        kv_cache=options.get("kv_cache"),
        builder=options.get("builder"),
        max_batch=options.get("max_batch"),
        max_input=options.get("max_input"),
        max_length=options.get("max_length"),
        refit=options.get("refit") or None,
        portable=options.get("portable") or None,
        profiles=options.get("profiles"),
        wide_head=options.get("wide_head"),
        optimization_level=options.get("optimization_level"),
        tensor_types=tuple(options["tensor_types"]),
        split_max_size=None if split is None else str(split),
        target_size=None if "bytes" not in budget else str(budget["bytes"]),
        target_bpw=budget.get("bits_per_weight"),
        calibration_tokens=None if calibration is None else calibration["tokens"],
        device="cpu" if calibration is None else calibration["device"],
    )
    return filled, manifest


def manifest_of(
    prepared: Prepared,
    source_files: Sequence[Mapping[str, Any]],
    files: Sequence[Mapping[str, Any]],
    written: Sequence[WrittenTensor],
) -> dict[str, Any]:
    """The manifest of an export that has been written and not rerun."""
    from llmx.exporters.artifact import file_sha256
    from llmx.exporters.manifest import describe
    from llmx.formats.gguf import parse_size

    request, imatrix = prepared.request, prepared.request.imatrix
    size, bits = request.target_size, request.target_bpw
    return describe(
        prepared.exporter,
        prepared.quantization,
        libraries=prepared.format.libraries,
        source_files=source_files,
        files=files,
        written=written,
        importance=None if imatrix is None else {"name": imatrix.name, "sha256": file_sha256(imatrix)},
        budget={"bytes": parse_size(size)} if size else {"bits_per_weight": bits} if bits else None,
        tensor_types=request.tensor_types,
        runtime=None,
    )


def runtime_of(report: Report | None) -> dict[str, Any] | None:
    """Name and build of the runtime that a report tells of."""
    runtime = None if report is None else report.facts.get("runtime")
    return dict(runtime) if isinstance(runtime, Mapping) else None


def recipe_of(manifest: Manifest) -> Recipe:
    """The recipe that the manifest's export followed. Raises: UsageError as `parse_recipe`."""
    from llmx.quant.recipe_reader import from_data

    return from_data(manifest.told["recipe"], where=manifest.path)


def call_it_as_before(model: Model, manifest: Manifest) -> None:
    """Give the model the name that the manifest has of it: general.name and file names are made from it."""
    source = manifest.told["source"]
    model.checkpoint.source = replace(model.checkpoint.source, name=source["name"], revision=source["revision"])


def check_source(found: Sequence[Mapping[str, Any]], manifest: Manifest) -> None:
    """Raises: IntegrityError naming every file of the checkpoint that is not the one that the manifest saw."""
    had = {file.name: file.sha256 for file in manifest.source_files}
    have = {file["name"]: file["sha256"] for file in found}
    problems = [f"{name} is not there" for name in sorted(had.keys() - have)]
    problems += [f"{name} is there now" for name in sorted(have.keys() - had)]
    problems += [f"{name} has other bytes" for name in sorted(had.keys() & have) if had[name] != have[name]]
    if problems:
        raise IntegrityError(
            "this is not the checkpoint that the manifest was made from",
            problems=problems,
            fix="give the checkpoint at that revision, with these files and no others of these names",
        )


def check_rebuilt(told: Mapping[str, Any], manifest: Manifest) -> None:
    """Compare a rebuilt artifact's manifest with the one it was rebuilt from.

    Where a builder made the artifact of the tensors, they are compared: it makes other bytes of the same ones.
    Raises: CheckFailed naming the tensors that differ and the libraries that have other versions here.
    """
    if [file["sha256"] for file in told["files"]] == [file.sha256 for file in manifest.files]:
        return
    had = {tensor.name: tensor.sha256 for tensor in manifest.tensors}
    differ = [t["name"] for t in told["tensors"] if had.get(t["name"]) != t["sha256"]]
    if not differ and len(had) == len(told["tensors"]) and all(t["file"] is None for t in told["tensors"]):
        return
    problems = [f"{name} has other bytes" for name in differ[:SHOWN]]
    problems += [f"and {len(differ) - SHOWN} tensors more"] * (len(differ) > SHOWN)
    problems += [] if differ else ["every tensor is the same; the metadata, the order or the split differs"]
    raise CheckFailed(
        "the rebuilt bytes are not those of the manifest",
        problems=[*problems, *other_versions(told, manifest)],
        fix="install the versions that the manifest names",
    )


def other_versions(told: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """What was another version when the manifest was made, in words."""
    then = {"llmx": manifest.told["tool"]["version"], **manifest.told["libraries"]}
    now = {"llmx": told["tool"]["version"], **told["libraries"]}
    names = sorted(then.keys() | now)
    return [
        f"{name} was {then.get(name)} and is {now.get(name)} here" for name in names if then.get(name) != now.get(name)
    ]


def _hub_id(source: Mapping[str, Any], where: Path) -> str:
    if source["revision"] is None:
        raise UsageError(
            f"the manifest was made from a folder called {source['name']}: MODEL must say where it is", where=where
        )
    return source["name"]


def _check_inputs(request: ExportRequest, manifest: Manifest) -> None:
    from llmx.models.calibration_text import CORPUS, CORPUS_NAME

    calibration, importance = manifest.told["calibration"], manifest.told["importance"]
    if calibration is not None and request.calibration is None and calibration["text"] == CORPUS_NAME:
        _check_file(CORPUS, calibration, "the built-in corpus is another one in this version of llmx")
    else:
        _check_given("--calibration", request.calibration, calibration and {"name": calibration["text"], **calibration})
    _check_given("--imatrix", request.imatrix, importance)


def _check_given(option: str, path: Path | None, wanted: Mapping[str, Any] | None) -> None:
    if wanted is None and path is not None:
        raise UsageError(f"the manifest was made without {option}", fix="leave it out")
    if wanted is not None and path is None:
        raise UsageError(f"the manifest was made with {option} {wanted['name']}", fix=f"give that file with {option}")
    if wanted is not None and path is not None:
        _check_file(path, wanted, f"the file of {option} is not {wanted['name']} that the manifest was made with")


def _check_file(path: Path, wanted: Mapping[str, Any], what: str) -> None:
    from llmx.exporters.artifact import file_sha256

    if not path.is_file():
        raise UsageError("there is no such file", where=path)
    found = file_sha256(path)
    if found != wanted["sha256"]:
        raise IntegrityError(what, where=path, problems=[f"sha256 {found} instead of {wanted['sha256']}"])
