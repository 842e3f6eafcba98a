"""What an app ships: an artifact's files, its manifest with golden answers, its licence and a model card, under
checksums that can be signed. ``docs/bundles.md`` is the format that apps read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import BadArtifact, EdgekdError, MissingExtra
from .files import Json, atomic_file, atomic_folder, file_sha256, write_bytes, write_text
from .manifest import Artifact, Manifest, add_proof
from .proof import GoldenAnswer, Parity

Platform = Literal["android", "ios", "web"]
SUMS, SIGNATURE, CARD, LICENSE = "bundle.json", "bundle.sig", "MODEL_CARD.md", "LICENSE"
SCHEMA_VERSION = 1
_OWN = (SUMS, SIGNATURE, CARD, LICENSE)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in a zip, so that the same bundle is the same bytes


@dataclass(frozen=True)
class Limit:
    """A limit of a store or a platform, and where it says so."""

    what: str
    most_bytes: int
    source: str


RUNS = {"android": ("gguf", "executorch"), "ios": ("gguf", "coreml", "executorch"), "web": ("gguf", "onnx")}
"""The targets that each platform's app opens."""
_PLAY = "https://support.google.com/googleplay/android-developer/answer/9859372"
_ODR = "https://developer.apple.com/help/app-store-connect/reference/on-demand-resources-size-limits"
LIMITS: dict[str, tuple[Limit, ...]] = {
    "android": (
        Limit("Google Play's base module; put it into an asset pack", 200_000_000, _PLAY),
        Limit("an asset pack on Google Play", 1_500_000_000, _PLAY),
        Limit("all asset packs of an app on Google Play", 4_000_000_000, _PLAY),
    ),
    "ios": (
        Limit("an asset pack of on-demand resources before iOS 18", 512_000_000, _ODR),
        Limit("an app on the App Store from iOS 18 on; before, 2,000 MB", 4_000_000_000, _ODR),
        Limit("an asset pack of on-demand resources from iOS 18 on", 8_000_000_000, _ODR),
    ),
    "web": (Limit("a file in a browser's memory", 2**31 - 1, "https://github.com/ngxson/wllama"),),
}


def check_bundle(artifact: Artifact, platform: Platform, license_file: Path | None) -> Path:
    """The licence that goes along; refuse before the work what an app of that platform cannot open or ship.

    Raises:
        BadArtifact: it is of another runtime, or has files of the bundle's own names.
        EdgekdError: no licence is known.
    """
    manifest = artifact.manifest
    if manifest.target not in RUNS[platform]:
        raise BadArtifact(
            f"{artifact.folder}: an app for {platform} opens {', '.join(RUNS[platform])}, not {manifest.target}.",
            "Export the model for one of them.",
        )
    if taken := next((name for name in _OWN if name in manifest.files and name != LICENSE), None):
        raise BadArtifact(f"{artifact.folder}: its file {taken} has a name that the bundle needs.", "Export it again.")
    if license_file is None and LICENSE in manifest.files:
        return artifact.path(LICENSE)
    if license_file is None or not license_file.is_file():
        raise EdgekdError(
            f"{license_file or artifact.folder}: no licence of the model, which whoever ships it must give along.",
            "Name its text with --license FILE.",
        )
    return license_file


def exceeded(platform: Platform, sizes: Sequence[int]) -> list[str]:
    """The limits that files of these sizes exceed, a sentence each."""
    total = sum(sizes)
    largest = max(sizes, default=0)
    told = []
    for limit in LIMITS[platform]:
        size = largest if platform == "web" else total
        if size > limit.most_bytes:
            told.append(f"{size / 1e6:,.0f} MB exceed {limit.most_bytes / 1e6:,.0f} MB: {limit.what} ({limit.source})")
    return told


def write_bundle(
    artifact: Artifact,
    out: Path,
    platform: Platform,
    *,
    license_file: Path,
    golden: Sequence[GoldenAnswer],
    key: bytes | None = None,
) -> Json:
    """Write the bundle, a folder, or a zip where ``out`` is named so; what stands in its ``bundle.json``.

    Args:
        out: must not exist; appears only when whole.
        golden: what ``verify.golden.golden_texts`` gave; they come behind those that verification recorded.
        key: an Ed25519 private key, PEM; the signature is of ``bundle.json``, which has the sums of all files.

    Raises:
        EdgekdError: the key is none.
    """
    signer = None if key is None else _signer(key)
    proved = Artifact(artifact.folder, _with_golden(artifact.manifest, golden))
    if out.suffix != ".zip":
        with atomic_folder(out) as folder:
            return _fill(proved, folder, platform, license_file, signer)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as unpacked, atomic_file(out) as temporary:
        sums = _fill(proved, Path(unpacked), platform, license_file, signer)
        _pack(Path(unpacked), temporary)
    return sums


def _pack(folder: Path, out: Path) -> None:
    """A zip of a folder, the same bytes each time; not compressed, since weights hardly are and apps map them."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _EPOCH)
            with archive.open(info, "w", force_zip64=True) as into, path.open("rb") as source:
                shutil.copyfileobj(source, into)


def _with_golden(manifest: Manifest, golden: Sequence[GoldenAnswer]) -> Manifest:
    """A manifest with the answers of texts, in place of those that it had."""
    parity = manifest.parity or Parity(windows=0, window_tokens=0, unusable_positions=0)
    recorded = [answer for answer in parity.golden if answer.text is None]
    return manifest.model_copy(update={"parity": parity.model_copy(update={"golden": [*recorded, *golden]})})


def _fill(artifact: Artifact, folder: Path, platform: Platform, license_file: Path, signer: Any) -> Json:
    manifest = artifact.manifest
    for name in manifest.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.path(name), folder / name)
    add_proof(Artifact(folder, manifest))
    if LICENSE not in manifest.files:
        shutil.copyfile(license_file, folder / LICENSE)
    write_text(folder / CARD, card(artifact))
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in paths
    }
    sums = {"schema_version": SCHEMA_VERSION, "name": manifest.name, "platform": platform, "files": files}
    data = json.dumps(sums, indent=2, ensure_ascii=False).encode() + b"\n"
    write_bytes(folder / SUMS, data)
    if signer is not None:
        write_text(folder / SIGNATURE, base64.b64encode(signer.sign(data)).decode() + "\n")
    return sums


def card(artifact: Artifact) -> str:
    """What the model is, how it was made and what was measured, in Markdown."""
    manifest = artifact.manifest
    lines = [
        f"# {manifest.name}",
        "",
        f"{manifest.parameters:,} parameters, {manifest.bits_per_weight:.2f} bits per weight ({manifest.recipe}"
        f"{f', integers by {manifest.method}' if manifest.method else ''}), for {manifest.runtime}; "
        f"context {manifest.contract.context_length:,} tokens. The licence is in `{LICENSE}`.",
    ]
    if manifest.dequantized_from:
        lines += ["", f"Its weights were quantized before: {', '.join(manifest.dequantized_from)}."]
    parity = manifest.parity
    if parity and parity.kl_mean is not None:
        lines += ["", f"Against the model in float32: KL {parity.kl_mean:.3g} nats per token on held-out text."]
    for score in manifest.tasks:
        kept = f", {score.kept} of {score.reference_name}" if score.kept else ""
        lines.append(f"- {score.task} {score.metric}: {score.score.value:.3f} on {score.documents:,} documents{kept}")
    return "\n".join([*lines, "", f"Student {manifest.student_digest}, made by edgekd.", ""])


# --- signatures -------------------------------------------------------------------------------------------------------


def _signer(key: bytes) -> Any:
    serialization, ed25519 = _cryptography()
    try:
        found = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        raise EdgekdError("--key: no private key in PEM, or one with a password.", _HOW) from error
    if not isinstance(found, ed25519.Ed25519PrivateKey):
        raise EdgekdError("--key: a private key, but not of Ed25519.", _HOW)
    return found


_HOW = "Make one: openssl genpkey -algorithm ed25519 -out key.pem"


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        raise MissingExtra("cryptography", "bundle") from error
    return serialization, ed25519


def public_key(key: bytes) -> str:
    """The raw public key, base64, that an app has built in."""
    serialization, _ = _cryptography()
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    return base64.b64encode(_signer(key).public_key().public_bytes(*raw)).decode()


def check_folder(folder: Path, public: str | None = None) -> Json:
    """A bundle's sums, every file compared with them, and their signature with a public key: what an app does.

    Raises:
        BadArtifact: a file is missing, changed or not listed, or the signature is none of this key.
    """
    data = _read(folder / SUMS)
    if public is not None:
        _check_signature(data, _read(folder / SIGNATURE), public, folder)
    try:
        sums: Json = json.loads(data)
        newer, files = sums["schema_version"] > SCHEMA_VERSION, sums["files"]
        listed = {name: (told["sha256"], told["bytes"]) for name, told in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadArtifact(f"{folder / SUMS}: not readable.", "Make the bundle again.") from error
    if newer:
        raise BadArtifact(f"{folder / SUMS} is of a newer version of edgekd.", "Update edgekd.")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {SUMS, SIGNATURE}
    if wrong := sorted(there ^ set(listed)):
        raise BadArtifact(f"{folder}: {wrong[0]!r:.200} is missing, or not listed.", "Make the bundle again.")
    for name, told in listed.items():
        if (file_sha256(folder / name), (folder / name).stat().st_size) != told:
            raise BadArtifact(f"{folder / name} is not the file that the bundle lists.", "Make the bundle again.")
    return {"files": files, "sha256": hashlib.sha256(data).hexdigest()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadArtifact(f"{path}: {error.strerror}.", "Make the bundle again.") from error


def _check_signature(data: bytes, signature: bytes, public: str, folder: Path) -> None:
    from cryptography.exceptions import InvalidSignature

    _, ed25519 = _cryptography()
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(base64.b64decode(public, validate=True))
        key.verify(base64.b64decode(signature), data)
    except (InvalidSignature, ValueError) as error:
        raise BadArtifact(f"{folder / SIGNATURE}: no signature of that key.", "Do not use the bundle.") from error
