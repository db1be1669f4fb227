"""Which base model, on which device, in which dtype. Pydantic only: loads no torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.i18n import _


class ModelConfig(BaseModel):
    """The pretrained model that stays frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[
        str,
        Field(description=_("a Hugging Face folder, a GGUF file, org/name of a hub, or smollm2-135m-instruct")),
    ] = "smollm2-135m-instruct"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        Field(description=_("dtype of the frozen weights; auto follows from what the machine is fast at")),
    ] = "auto"
    device: Annotated[str, Field(description=_("auto, cpu, cuda, cuda:1, mps"))] = "auto"
    trust_remote_code: Annotated[
        bool, Field(description=_("run Python code that comes with the model (only from people you trust)"))
    ] = False
