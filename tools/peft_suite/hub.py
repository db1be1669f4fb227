"""Stand-ins for the tiny models that PEFT's tests take from the hub: the same architectures with random weights.

They are written in the layout of the hub's cache, so that the tests find them offline under the names that they use.
"""

from pathlib import Path

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SIZES = {"vocab_size": 1000, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 32, "max_position_embeddings": 512}  # fmt: skip
KEY_VALUE = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 1000, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
OPT = {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}
MOE = {**KEY_VALUE, "num_local_experts": 4, "num_experts_per_tok": 2}
T5 = {"vocab_size": 1000, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0}  # fmt: skip
BART = {"vocab_size": 1000, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
BERT = {**SIZES, "type_vocab_size": 2}
GEMMA3 = {**KEY_VALUE, "head_dim": 4, "sliding_window": 16}
LLAMA4 = {**MOE, "head_dim": 4, "intermediate_size_mlp": 32}
QWEN3_MOE = {**KEY_VALUE, "head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT_OSS = {**MOE, "head_dim": 4}

# the name on the hub: the class of the model, and the options of its configuration
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", OPT),
    "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab": ("OPTForCausalLM", {**OPT, "vocab_size": 1010}),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", OPT),
    "facebook/opt-125m": ("OPTForCausalLM", OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT2, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", SIZES),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM", {"vocab_size": 1000, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", KEY_VALUE),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", KEY_VALUE),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", KEY_VALUE),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification", {**KEY_VALUE, "pad_token_id": 0}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", KEY_VALUE),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", KEY_VALUE),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {**KEY_VALUE, "head_dim": 4}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", GEMMA3),
    "trl-internal-testing/tiny-Llama4ForCausalLM": ("Llama4ForCausalLM", LLAMA4),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", GPT_OSS),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", QWEN3_MOE),
    "hf-internal-testing/tiny-qwen3-moe": ("Qwen3MoeForCausalLM", QWEN3_MOE),
    "hf-internal-testing/Mixtral-tiny": ("MixtralForCausalLM", MOE),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", BERT),
}  # fmt: skip

ADAPTERS = {  # the name on the hub: the model that it adapts, the class that it is loaded with, and the task
    "peft-internal-testing/tiny-OPTForCausalLM-lora": ("OPTForCausalLM", "CAUSAL_LM"),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": ("OPTForSequenceClassification", "SEQ_CLS"),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": ("GPT2ForTokenClassification", "TOKEN_CLS"),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": ("OPTForQuestionAnswering", "QUESTION_ANS"),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": ("OPTModel", "FEATURE_EXTRACTION"),
}
BASES = {
    "OPT": "peft-internal-testing/tiny-random-OPTForCausalLM",
    "T5F": "peft-internal-testing/tiny-random-T5ForConditionalGeneration",
    "GPT": "peft-internal-testing/tiny-random-GPT2LMHeadModel",
}


def write(cache: Path) -> None:
    """Write every stand-in that is not there yet to `cache`, a folder of the kind that HF_HUB_CACHE names."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = _tokenizer()
    for name, (kind, options) in MODELS.items():
        if (snapshot := _snapshot(cache, name)).is_dir():
            continue
        torch.manual_seed(0)
        model_class = getattr(transformers, kind)
        model = model_class(model_class.config_class(**options))
        model.save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
    for name, (kind, task) in ADAPTERS.items():
        if not (snapshot := _snapshot(cache, name)).is_dir():
            torch.manual_seed(0)
            base = BASES[kind[:3]]
            model = getattr(transformers, kind).from_pretrained(_snapshot(cache, base))
            model.config.name_or_path = model.name_or_path = base
            peft.get_peft_model(model, peft.LoraConfig(task_type=task)).save_pretrained(snapshot)


def _snapshot(cache: Path, name: str) -> Path:
    """The folder of a repository's files; its branch main refers to it."""
    folder = cache / ("models--" + name.replace("/", "--"))
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("stand-in", "utf-8")
    return folder / "snapshots" / "stand-in"


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of a few hundred tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["Hello world", "I love cheese"], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
