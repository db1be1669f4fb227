"""Where the server listens and what it admits. Pydantic only: loads no torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.i18n import _


class ServeConfig(BaseModel):
    """One address, one base, any number of adapters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[str, Field(description=_("address to listen at; one that others can reach needs --keys"))] = (
        "127.0.0.1"
    )
    port: Annotated[int, Field(ge=0, lt=65536, description=_("port to listen at; 0: any that is free"))] = 8000
    keys: Annotated[
        str | None,
        Field(description=_("file of API keys, a line each: the key's SHA-256 in hex, then the models it may use")),
    ] = None
    slots: Annotated[int, Field(gt=0, description=_("requests that are answered at once; others wait"))] = 16
    queue: Annotated[int, Field(ge=0, description=_("requests that may wait; one more is refused with 429"))] = 256
    cache_tokens: Annotated[
        int | None,
        Field(gt=0, description=_("tokens in the key/value cache; a quarter of the free memory if not given")),
    ] = None
    context: Annotated[
        int | None,
        Field(gt=1, description=_("longest prompt and reply together, in tokens; what the model admits if not given")),
    ] = None
    body_mib: Annotated[float, Field(gt=0, allow_inf_nan=False, description=_("largest request in MiB"))] = 4.0
    drain: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description=_("seconds that running requests have once the server must end")),
    ] = 30.0
