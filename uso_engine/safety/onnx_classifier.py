"""The safety classifier on ONNX Runtime, from a file that was exported and compared with PyTorch beforehand.

ONNX Runtime runs it on the CPU beside a GPU that is busy denoising, or on the GPU through kernels of its own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from uso_engine.conditioning.model_folder import require_model_files
from uso_engine.errors import BackendError, CheckpointError, MissingFileError
from uso_engine.weights.files.key_report import short_reason

from .classifier import WHAT, labels_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Provider = Literal["cpu", "cuda"]
INPUT, OUTPUT = "pixel_values", "logits"
MADE_FROM = "uso_engine_made_from"
"""Key of the file's metadata that holds the digest of the folder that it was made from."""
# Always as many threads, so that an answer does not depend on how many processors a machine has.
_THREADS = 4
_QUIET = 3  # errors only
_MOST_BYTES = 2**31
_PROVIDERS: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_PACKAGES: dict[Provider, str] = {"cpu": "onnxruntime (extra `cpu`)", "cuda": "onnxruntime-gpu (extra `gpu`)"}


class OnnxClassifier:
    """An open ONNX Runtime session.

    Args:
        session: of a graph from `INPUT` to `OUTPUT`.
        labels: name of each answer.
    """

    part = None

    def __init__(self, session: Any, labels: dict[int, str]) -> None:
        self._session = session
        self.labels = labels

    @classmethod
    def open(
        cls, path: Path, folder: Path, config: PreTrainedConfig, *, provider: Provider = "cpu", gpu: int = 0
    ) -> OnnxClassifier:
        """Open a file.

        Args:
            path: the file.
            folder: what it was made from.
            config: the classifier's configuration in there.
            provider: what ONNX Runtime runs it on.
            gpu: number of the GPU, for "cuda".

        Raises:
            MissingFileError: no such file, or the folder lacks one.
            CheckpointError: not an exported classifier, or made from another folder than this one.
            BackendError: ONNX Runtime is not here, or has no such provider.
        """
        session = open_session(_read(path), str(path), provider=provider, gpu=gpu)
        expected, found = folder_digest(folder), session.get_modelmeta().custom_metadata_map.get(MADE_FROM)
        if found != expected:
            has = f"it was made from files with SHA-256 {found}" if found else "it does not say what it was made from"
            raise CheckpointError(
                f"{WHAT}: {path} is not made from the files in {folder} (SHA-256 {expected}): {has}; "
                "`uso-engine export-safety` makes it again"
            )
        return cls(session, labels_of(config))

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        return run(self._session, pixels)


def run(session: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Classify one picture.

    Args:
        session: an `open_session`.
        pixels: [1, 3, height, width] float32 on the CPU.

    Returns:
        [1, labels] float32.
    """
    return torch.from_numpy(session.run([OUTPUT], {INPUT: pixels.contiguous().numpy()})[0])


def open_session(model: bytes, name: str, *, provider: Provider, gpu: int = 0) -> Any:
    """A session that computes the same in any company: one picture at a time, always as many threads.

    Args:
        model: the file's bytes; without a path, ONNX Runtime opens no file that they name.
        name: what to call it in errors.
        provider: what it runs on.
        gpu: number of the GPU, for "cuda".

    Raises:
        BackendError: ONNX Runtime is not here, or does not run on that.
        CheckpointError: bytes that are no model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"{WHAT} on ONNX Runtime: {short_reason(error)}; install {_PACKAGES[provider]}") from error
    wanted, offered = _PROVIDERS[provider], onnxruntime.get_available_providers()
    if wanted not in offered:
        raise BackendError(
            f"{WHAT}: provider {provider!r} needs {_PACKAGES[provider]}; the ONNX Runtime here has {', '.join(offered)}"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = _THREADS, 1
    options.log_severity_level = _QUIET
    # Threads that wait must not take processor time from the rest of the engine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings = {"device_id": str(gpu), "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    providers = [wanted if provider == "cpu" else (wanted, settings)]
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # of types that its C++ part defines
        raise CheckpointError(f"{WHAT}: {name} is no model that ONNX Runtime takes: {short_reason(error)}") from error
    if session.get_providers()[0] != wanted:  # it falls back to the CPU without a word
        raise BackendError(f"{WHAT}: ONNX Runtime does not run {name} on {provider}, but on {session.get_providers()[0]}")
    return session


def folder_digest(folder: Path) -> str:
    """SHA-256 of all that decides a classifier's answers: its weights and both settings files.

    Args:
        folder: config.json, preprocessor_config.json and weights.

    Raises:
        MissingFileError: a file is not there.
    """
    digest = hashlib.sha256()
    files = {folder / "config.json", folder / "preprocessor_config.json", *require_model_files(folder, WHAT)}
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise MissingFileError(f"{WHAT}: no file {path}; `uso-engine export-safety` makes it")
        if path.stat().st_size >= _MOST_BYTES:
            raise CheckpointError(
                f"{WHAT}: {path} has {path.stat().st_size:,} bytes; an ONNX file has less than {_MOST_BYTES:,}"
            )
        return path.read_bytes()
    except OSError as error:
        if isinstance(error, MissingFileError):
            raise
        raise MissingFileError(f"{WHAT}: {path} cannot be read: {error.strerror}") from error
