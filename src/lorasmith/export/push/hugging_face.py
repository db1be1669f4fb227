"""Uploading to Hugging Face with its client. HF_ENDPOINT, HF_TOKEN and the token of `hf auth login` are the client's.

The client's uploads in chunks (Xet) draw bars of their own, so files are given to it as streams that report how far
they were read; it then uploads them over HTTP.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from lorasmith.errors import LorasmithError, RunError
from lorasmith.export.push.content import Content
from lorasmith.i18n import _
from lorasmith.loading.hub_client import failure_reason, quiet_hub
from lorasmith.report import Report
from lorasmith.system.ownership import short_list

CREATED = frozenset((".gitattributes",))  # what a hub puts into a new repository
MEGABYTE = 1e6


@dataclass(frozen=True)
class Repository:
    """A repository on the hub. files: what is in it, or None if it does not exist."""

    name: str
    endpoint: str
    token: str
    files: frozenset[str] | None = None
    private: bool = True

    @classmethod
    def find(cls, name: str) -> Self:
        """Ask the hub. Raises RunError without a token, without network, or if access is refused."""
        hub: Any = import_module("huggingface_hub")
        endpoint, token = hub.constants.ENDPOINT, hub.get_token()
        if not token:
            raise RunError(
                _(
                    "There is no token of {endpoint} here, so nothing was uploaded. Create one with write access at "
                    "{endpoint}/settings/tokens, and set HF_TOKEN to it or run `hf auth login`.",
                    endpoint=endpoint,
                )
            )
        try:
            info = hub.HfApi().model_info(name, token=token, timeout=10)
        except hub.errors.GatedRepoError as error:
            raise _failure(name, endpoint, error) from error
        except hub.errors.RepositoryNotFoundError:
            return cls(name, endpoint, token)
        except _refused(hub) as error:
            raise _failure(name, endpoint, error) from error
        files = frozenset(file.rfilename for file in info.siblings or ())
        return cls(name, endpoint, token, files, bool(info.private))

    @property
    def url(self) -> str:
        """Its page."""
        return f"{self.endpoint}/{self.name}"

    def require_allowed(self, files: Mapping[str, Path], public: bool, overwrite: bool, report: Report) -> None:
        """Say what will happen. Raises RunError if something would become public or be replaced without being asked."""
        if self.files is None:
            report.say(
                _("{url} does not exist yet and is created, public.", url=self.url)
                if public
                else _("{url} does not exist yet and is created, private.", url=self.url)
            )
            return
        if not self.private and not public:
            raise RunError(
                _(
                    "{url} is public, so everybody could read the upload. Allow it with --public, or choose another "
                    "repository.",
                    url=self.url,
                )
            )
        replaced, kept = sorted(self.files & files.keys()), sorted(self.files - files.keys() - CREATED)
        if replaced and not overwrite:
            raise RunError(
                _(
                    "{url} already has {names}. Replace them with --overwrite, or choose another repository; the "
                    "previous versions stay in its history.",
                    url=self.url,
                    names=short_list(replaced),
                )
            )
        report.say(
            _("{url} exists and is private; it stays so.", url=self.url)
            if self.private
            else _("{url} exists and is public.", url=self.url)
        )
        if replaced:
            report.say(_("These files are replaced: {names}", names=short_list(replaced)))
        if kept:
            report.say(_("These files in it are kept: {names}", names=short_list(kept)))

    def upload(self, content: Content, public: bool, message: str, report: Report) -> str:
        """Create the repository if need be and upload in one commit. Returns the commit's URL. Raises RunError."""
        hub: Any = import_module("huggingface_hub")
        api = hub.HfApi(token=self.token)
        progress = _Progress(report, _("uploading {name}", name=self.name), content.size)
        try:
            with quiet_hub():
                if self.files is None:
                    api.create_repo(self.name, private=not public)
                for name, path in content.files.items():
                    stream = progress.stream(path)
                    operation = hub.CommitOperationAdd(name, stream)
                    _hashed = operation.upload_info.sha256  # reads the whole file once
                    stream.tells = True
                    api.preupload_lfs_files(self.name, [operation], free_memory=False)
                    progress.operations.append(operation)
                done = api.create_commit(self.name, progress.operations, commit_message=message)
        except _refused(hub) as error:
            raise _failure(self.name, self.endpoint, error) from error
        finally:
            progress.close()
        progress.finish()
        return str(done.commit_url)


class _Progress:
    """Megabytes of all files that were read for the upload."""

    def __init__(self, report: Report, task: str, size: int) -> None:
        self.report, self.task, self.total = report, task, max(1, round(size / MEGABYTE))
        self.operations: list[Any] = []
        self._most = 0
        self._streams: list[_Stream] = []

    def stream(self, path: Path) -> "_Stream":
        """A file that reports how far it was read."""
        before = sum(stream.size for stream in self._streams)
        one = _Stream(path, lambda done: self._tell(before + done))
        self._streams.append(one)
        return one

    def finish(self) -> None:
        """All is uploaded."""
        self.report.progress(self.task, self.total, self.total)

    def close(self) -> None:
        """Close the files."""
        for stream in self._streams:
            stream.close()

    def _tell(self, done: int) -> None:
        self._most = max(self._most, min(int(done / MEGABYTE), self.total - 1))  # small files are read last
        self.report.progress(self.task, self._most, self.total)


class _Stream(io.BufferedReader):
    """A file that tells how far it was read, once `tells` is set."""

    def __init__(self, path: Path, tell: Any) -> None:
        super().__init__(io.FileIO(path))
        self.size, self._tell, self.tells = path.stat().st_size, tell, False

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes."""
        found = super().read(size)
        if self.tells:
            self._tell(self.tell())
        return found


def _refused(hub: Any) -> tuple[type[Exception], ...]:
    return (OSError, ValueError, RuntimeError, hub.errors.HTTPError)


def _failure(name: str, endpoint: str, error: Exception) -> LorasmithError:
    cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
    return RunError(
        _(
            "{name} could not be uploaded to {endpoint} ({why}). Check the network, that the token may write to "
            "{name}, and HF_ENDPOINT if you use a mirror.",
            name=name,
            endpoint=endpoint,
            why=failure_reason(cause, f"{endpoint}/{name}"),
        )
    )
