"""The name of the repository that is uploaded to."""

from lorasmith.errors import ConfigError
from lorasmith.i18n import _
from lorasmith.loading.hub import HUB_NAME


def repository_name(name: str, run: str) -> str:
    """ORG/NAME on Hugging Face, from `org/name` or `hf:org/name`. Raises ConfigError for another name or hub."""
    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise ConfigError(
            _("{name!r} is not the name of a repository. Give it as ORG/NAME, such as my-name/my-adapter.", name=name)
        )
    if match["hub"] == "modelscope":
        raise ConfigError(
            _(
                "{name}: lorasmith uploads to Hugging Face only. For ModelScope, write a folder with lorasmith export "
                "{run} --to peft --output FOLDER, and upload it with: modelscope upload {id} FOLDER",
                name=name,
                run=run,
                id=match["id"],
            )
        )
    return match["id"]
