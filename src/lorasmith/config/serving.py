"""Options of the server: where it listens and how much it accepts. Loads no torch."""

from typing import Annotated

from pydantic import ConfigDict, Field

from lorasmith.config.values import Typed
from lorasmith.i18n import _


class ServeConfig(Typed):
    """The options of `lorasmith serve`: one address and one base model, with any number of adapters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[
        str, Field(description=_("Address to listen on; one that other machines can reach requires --keys"))
    ] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, lt=65536, description=_("Port to listen on; 0 picks a free one"))] = 8000
    keys: Annotated[
        str | None,
        Field(
            description=_(
                "File of API keys, one per line: the key's SHA-256 in hex, then the models it may use (all if none "
                "are given)"
            )
        ),
    ] = None
    slots: Annotated[
        int, Field(gt=0, le=4096, description=_("Maximum number of requests answered at the same time; others wait"))
    ] = 16
    queue: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description=_("Maximum number of waiting requests; further ones are rejected with status 429"),
        ),
    ] = 256
    cache_tokens: Annotated[
        int | None,
        Field(
            gt=0,
            le=1_000_000_000,
            description=_("Size of the KV cache in tokens; a quarter of the free memory if not given"),
        ),
    ] = None
    context: Annotated[
        int | None,
        Field(
            gt=1,
            le=10_000_000,
            description=_(
                "Maximum length of prompt and reply together, in tokens; the model's context length if not given"
            ),
        ),
    ] = None
    body_mib: Annotated[
        float, Field(gt=0, le=1024, allow_inf_nan=False, description=_("Maximum size of a request in MiB"))
    ] = 4.0
    access_log: Annotated[bool, Field(description=_("Log a line for each request, without its content"))] = True
    drain: Annotated[
        float,
        Field(
            ge=0,
            le=86_400,
            allow_inf_nan=False,
            description=_("Grace period for running requests at shutdown, in seconds"),
        ),
    ] = 30.0
