"""Checking an artifact against its manifest, byte for byte: `llmx verify`; and signing manifests: `llmx sign`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmx.errors import IntegrityError, LlmxError, ResourceError, UsageError

if TYPE_CHECKING:
    from llmx.exporters.manifest_reader import HashedFile, HashedTensor, Manifest

SIGNATURE = ".sig"
MISSING, RENAMED, EXCHANGED, SIZE, TENSOR, REST = "missing", "renamed", "exchanged", "size", "tensor", "rest"
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an artifact differs from its manifest. tensor: None where it is not one tensor's bytes."""

    kind: str
    file: str
    tensor: str | None
    detail: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "file": self.file, "tensor": self.tensor, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared. signed: whether a signature was checked too."""

    manifest: Path
    files: int
    tensors: int
    nbytes: int
    signed: bool
    differences: tuple[Difference, ...]

    @property
    def exit_code(self) -> int:
        """0 where every byte is as it should be, 2 where files are just not there, 6 otherwise."""
        if not self.differences:
            return 0
        absent = all(difference.kind == MISSING for difference in self.differences)
        return UsageError.exit_code if absent else IntegrityError.exit_code

    def to_json(self) -> dict[str, Any]:
        """The object `llmx verify --json` prints."""
        return {
            "passed": not self.differences,
            "manifest": str(self.manifest),
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "signed": self.signed,
            "differences": [difference.to_json() for difference in self.differences],
        }


def verify(
    target: Path,
    *,
    manifest: Path | None = None,
    public_key: Path | None = None,
    signature: Path | None = None,
) -> Verification:
    """Compare every file and every tensor with the hashes of a manifest, reading each file once.

    target: an artifact (of a set any file, or the folder of a graph), or its manifest. manifest: where it is not beside
    the artifact; a single file may then have another name. public_key: the signature of the manifest, SIGNATURE beside
    it unless `signature` says where, is checked first.
    Raises: UsageError for files that are not there, IntegrityError for a broken manifest or a wrong signature,
    RuntimeMissing without the package that checks signatures.
    """
    from llmx.exporters.manifest import file_of, manifest_path
    from llmx.exporters.manifest_reader import read_manifest

    target = file_of(target)
    if signature is not None and public_key is None:
        raise UsageError("--signature needs the key that it is checked with", fix="give --public-key")
    if not target.is_file():
        raise UsageError("there is no such file", where=target)
    is_manifest = manifest is None and _is_manifest(target)
    path = manifest or (target if is_manifest else manifest_path(target))
    if not path.is_file():
        raise UsageError("the artifact has no manifest", where=path, fix="say with --manifest where it is")
    if public_key is not None:
        check_signature(path, signature or signature_path(path), public_key)
    told = read_manifest(path)
    places = {file.name: target.with_name(file.name) for file in told.files}
    if not is_manifest and target.name not in places:
        if len(places) > 1:
            raise UsageError(f"{target.name} is no file of this manifest", where=path, problems=sorted(places))
        places = dict.fromkeys(places, target)
    differences = tuple(_differences(told, places))
    total = sum(file.nbytes for file in told.files)
    placed = sum(tensor.file is not None for tensor in told.tensors)
    return Verification(path, len(told.files), placed, total, public_key is not None, differences)


def _is_manifest(target: Path) -> bool:
    """Whether a file is a manifest itself, and not one that has another beside it: a checkpoint's configuration."""
    from llmx.exporters.manifest import manifest_path

    return target.suffix == ".json" and not manifest_path(target).is_file()


def signature_path(manifest: Path) -> Path:
    """Where a manifest's signature stands."""
    return manifest.with_name(manifest.name + SIGNATURE)


def sign(target: Path, key: Path, *, output: Path | None = None, force: bool = False) -> Path:
    """Sign the manifest of an artifact, or a manifest itself, with a private key; return the signature's path.

    key: PEM, on an elliptic curve. The signature is a Sigstore bundle of the package model-signing, made offline.
    Raises: UsageError for files that are not there, a signature that is, or a key that cannot be used; IntegrityError
    for a broken manifest; RuntimeMissing without the package.
    """
    from llmx.exporters import artifact
    from llmx.exporters.manifest import file_of, manifest_path
    from llmx.exporters.manifest_reader import read_manifest
    from llmx.signing import sign_file

    target = file_of(target)
    if not target.is_file():
        raise UsageError("there is no such file", where=target)
    path = target if _is_manifest(target) else manifest_path(target)
    read_manifest(path)
    final = output or signature_path(path)
    artifact.check_targets([final], (path, key), force)
    artifact.make_folder(final.parent)
    with artifact.partial_files([final]) as [partial]:
        sign_file(path, partial, key)
        artifact.publish([partial], [final])
    return final


def check_signature(manifest: Path, signature: Path, public_key: Path) -> None:
    """Raises: UsageError for files that are not there, IntegrityError where the signature is not of this manifest."""
    from llmx.signing import check_file

    for path, what in ((signature, "signature"), (public_key, "public key")):
        if not path.is_file():
            raise UsageError(f"there is no such {what}", where=path)
    check_file(manifest, signature, public_key)


def _differences(manifest: Manifest, places: dict[str, Path]) -> Iterator[Difference]:
    known = {file.sha256: file.name for file in manifest.files}
    for file in manifest.files:
        path = places[file.name]
        tensors = [tensor for tensor in manifest.tensors if tensor.file == file.name]
        if not path.is_file():
            yield _absent(file, path, set(places))
            continue
        try:
            digest, found = _hashes(path, tensors)
        except OSError as error:
            raise ResourceError(f"the file cannot be read: {error.strerror}", where=path) from error
        if digest != file.sha256 and digest in known:
            yield Difference(EXCHANGED, file.name, None, f"holds the bytes of {known[digest]}")
        else:
            yield from _inside(file, path, tensors, digest, found)


def _absent(file: HashedFile, path: Path, names: set[str]) -> Difference:
    """Missing, or there under a name that the manifest does not have."""
    others = (other for other in sorted(path.parent.glob(f"*{path.suffix}")) if other.name not in names)
    for other in others:
        if other.is_file() and other.stat().st_size == file.nbytes and _hashes(other, [])[0] == file.sha256:
            return Difference(RENAMED, file.name, None, f"its bytes are here under the name {other.name}")
    return Difference(MISSING, file.name, None, "is not there")


def _inside(
    file: HashedFile, path: Path, tensors: Sequence[HashedTensor], digest: str, found: dict[str, str]
) -> Iterator[Difference]:
    size = path.stat().st_size
    if size != file.nbytes:
        word = "is cut off" if size < file.nbytes else "has grown"
        yield Difference(SIZE, file.name, None, f"{word}: {size} bytes instead of {file.nbytes}")
    elsewhere = [tensor for tensor in tensors if found.get(tensor.name) != tensor.sha256]
    # Where the header has another length, tensors stand elsewhere: ask the file itself where.
    moved = _own_hashes(path) if elsewhere else {}
    changed = [tensor for tensor in elsewhere if moved.get(tensor.name) != tensor.sha256]
    for tensor in changed:
        behind = tensor.name not in found and tensor.name not in moved
        detail = "stands behind the end of the file" if behind else "has other bytes"
        yield Difference(TENSOR, file.name, tensor.name, detail)
    if digest != file.sha256 and not changed:
        yield Difference(REST, file.name, None, "has other bytes outside its tensors: in the metadata or the padding")


def _hashes(path: Path, tensors: Sequence[HashedTensor]) -> tuple[str, dict[str, str]]:
    """The sha256 of a file and of each tensor that lies in it whole, in one reading."""
    whole, found = hashlib.sha256(), {}
    with path.open("rb") as stream:
        for offset, tensor in sorted(((t.offset or 0, t) for t in tensors), key=lambda pair: pair[0]):
            for chunk in _chunks(stream, offset - stream.tell()):
                whole.update(chunk)
            own, left = hashlib.sha256(), tensor.nbytes
            for chunk in _chunks(stream, tensor.nbytes):
                whole.update(chunk)
                own.update(chunk)
                left -= len(chunk)
            if left == 0:
                found[tensor.name] = own.hexdigest()
        while chunk := stream.read(_CHUNK):
            whole.update(chunk)
    return whole.hexdigest(), found


def _chunks(stream: BinaryIO, count: int) -> Iterator[bytes]:
    while count > 0 and (chunk := stream.read(min(count, _CHUNK))):
        count -= len(chunk)
        yield chunk


def _own_hashes(path: Path) -> dict[str, str]:
    """Each tensor's sha256 where the file itself says that it stands; nothing where it cannot be read any more."""
    from llmx.formats.gguf import read_gguf

    try:
        file = read_gguf(path)
    except LlmxError:
        return {}
    found = {}
    for name in file.tensors:
        found[name] = hashlib.sha256(file.bytes(name).data).hexdigest()
        file.release(name)
    return found
