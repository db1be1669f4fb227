"""Options of the server: where it listens and how much it accepts. Loads no torch."""

import re
from typing import Annotated

from pydantic import ConfigDict, Field, field_validator

from lorasmith.config.values import Typed
from lorasmith.i18n import _

ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^\s/]+")
HOST = re.compile(r"[\w.-]+|[0-9a-fA-F:]+")


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
    allowed_origins: Annotated[
        tuple[str, ...],
        Field(
            description=_(
                "Web pages of other addresses that may use the server (CORS), such as http://localhost:3000; * allows "
                "all"
            )
        ),
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...],
        Field(
            description=_(
                "Names of this machine, besides localhost, that requests may be sent to without --keys, such as "
                "host.docker.internal"
            )
        ),
    ] = ()
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

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not ORIGIN.fullmatch(origin):
                text = _("{found!r} is not an origin. An origin has a scheme, a host and possibly a port, but no path: "
                        "http://localhost:3000",
                         found=origin)  # fmt: skip
                raise ValueError(text)
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not HOST.fullmatch(host):
                text = _("{found!r} is not a host name. Give it without a scheme and a port: host.docker.internal",
                         found=host)  # fmt: skip
                raise ValueError(text)
        return hosts
