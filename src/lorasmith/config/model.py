"""Options of the base model: which one, on which device, in which dtype. Loads no torch."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from lorasmith.config.values import Typed
from lorasmith.i18n import _


class ModelConfig(Typed):
    """The [model] section: the pretrained model, whose weights stay frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[
        str,
        Field(
            description=_(
                "Base model: a folder in Hugging Face format, a GGUF file, the name of a model on a hub "
                "(org/name), or smollm2-135m-instruct"
            )
        ),
    ] = "smollm2-135m-instruct"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        Field(description=_("Data type of the frozen weights; auto chooses the one that is fast on this machine")),
    ] = "auto"
    quantize: Annotated[
        Literal["none", "nf4", "int8", "gguf"],
        Field(
            description=_(
                "Load the frozen weights in 4 bits (nf4) or 8 bits (int8), to save memory (needs lorasmith[quant]), or "
                "leave them as they are in a GGUF file (gguf)"
            )
        ),
    ] = "none"
    device: Annotated[str, Field(description=_("Device: auto, cpu, cuda, cuda:1 or mps"))] = "auto"
    trust_remote_code: Annotated[
        bool, Field(description=_("Run Python code that comes with the model; use it only for models you trust"))
    ] = False
