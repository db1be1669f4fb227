"""The tutorial's own script, which was written for PEFT, with its import changed to lorasmith.peft.

    python examples/peft/tutorial.py --data alpaca_data_zh --model bloom-389m-zh --output chatbot_lora_tuned

Besides the import, this differs from the tutorial only where its script runs with no library today: it imports
LoraConfig, says processing_class= where transformers 5 no longer knows tokenizer=, and takes its folders as options.
examples/tutorial does the same with lorasmith's own API.
"""

# Step 1: imports
import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from lorasmith.peft import LoraConfig, PeftModel, TaskType, get_peft_model

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="../data/alpaca_data_zh/")
parser.add_argument("--model", default="bloom-389m-zh")
parser.add_argument("--output", default="./chatbot_lora_tuned")
options = parser.parse_args()

# Step 2: the data set: 'instruction', 'input' (optional), 'output'
ds = Dataset.load_from_disk(options.data)

# Step 3: preprocessing
tokenizer = AutoTokenizer.from_pretrained(options.model)


def process_func(example: dict[str, str]) -> dict[str, list[int]]:
    """Token ids of prompt and answer, and labels for the answer alone."""
    MAX_LENGTH = 256
    prompt = "\n".join(["Human: " + example["instruction"], example["input"]]).strip() + "\n\nAssistant: "
    instruction_tokenized = tokenizer(prompt, add_special_tokens=False)
    response_tokenized = tokenizer(example["output"] + tokenizer.eos_token, add_special_tokens=False)
    input_ids = instruction_tokenized["input_ids"] + response_tokenized["input_ids"]
    attention_mask = instruction_tokenized["attention_mask"] + response_tokenized["attention_mask"]
    labels = [-100] * len(instruction_tokenized["input_ids"]) + response_tokenized["input_ids"]
    if len(input_ids) > MAX_LENGTH:
        input_ids = input_ids[:MAX_LENGTH]
        attention_mask = attention_mask[:MAX_LENGTH]
        labels = labels[:MAX_LENGTH]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


tokenized_ds = ds.map(process_func, remove_columns=ds.column_names)
print("\n检查第2条数据处理结果:")
print("输入序列 (input_ids解码):", tokenizer.decode(tokenized_ds[1]["input_ids"]))
target_labels = list(filter(lambda x: x != -100, tokenized_ds[1]["labels"]))
print("标签序列 (labels解码,过滤-100后):", tokenizer.decode(target_labels))

# Step 4: the model and LoRA
model = AutoModelForCausalLM.from_pretrained(options.model)
config = LoraConfig(
    task_type=TaskType.CAUSAL_LM,
    target_modules=".*\\.1.*query_key_value",
    r=8,
    lora_alpha=32,
    lora_dropout=0.1,
    modules_to_save=["word_embeddings"],
)
print("\nLoRA配置详情:", config)
model = get_peft_model(model, config)
print("\n应用LoRA后的模型可训练参数:")
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        print(name)
print("\n可训练参数统计:")
model.print_trainable_parameters()

# Step 5: training arguments
args = TrainingArguments(
    output_dir=options.output,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=8,
    logging_steps=10,
    num_train_epochs=1,
    save_strategy="epoch",
    learning_rate=1e-4,
    warmup_steps=100,
)

# Step 6: the trainer
trainer = Trainer(
    model=model,
    args=args,
    processing_class=tokenizer,
    train_dataset=tokenized_ds,
    data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
)

# Step 7: training
trainer.train()

# Step 8: inference, merge, save
model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)
print("基础模型加载完成:", type(model))
p_model = PeftModel.from_pretrained(model, model_id=get_last_checkpoint(options.output))
print("Lora模型加载结果:", p_model)
ipt = tokenizer("Human: {}\\n{}".format("考试有哪些技巧?", "").strip() + "\\n\\nAssistant: ", return_tensors="pt")
generated = p_model.generate(**ipt, do_sample=False)
response = tokenizer.decode(generated[0], skip_special_tokens=True)
print("生成的回答:", response)
merge_model = p_model.merge_and_unload()
print("合并后的模型结构:", merge_model)
ipt_merged = tokenizer(
    "Human: {}\\n{}".format("考试有哪些技巧?", "").strip() + "\\n\\nAssistant: ", return_tensors="pt"
)
merged_response = tokenizer.decode(
    merge_model.generate(
        **ipt_merged,
        max_length=1024,
        max_new_tokens=500,
        do_sample=True,
        temperature=0.8,
        top_p=0.9,
        repetition_penalty=1.2,
        early_stopping=False,
    )[0],
    skip_special_tokens=True,
)
print("合并模型生成的回答:", merged_response)
merge_model.save_pretrained(options.output + "/merge_model")
print("模型已保存至:", options.output + "/merge_model")
