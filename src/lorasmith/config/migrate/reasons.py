"""What happens to keys that become no option of ours, in sentences.

Functions instead of tables of module level, because the language is chosen after this module is imported.
"""

from lorasmith.i18n import _


def unmatched(name: str, **values: object) -> str:
    """Why a key is not taken over, and what to do instead."""
    texts = {
        "none": _("lorasmith has no such option."),
        "added_tokens": _("lorasmith reads no file of tokens; give the tokens themselves with data.add_tokens."),
        "beside_all_linear": _(
            "all-linear is used, which has the linear layers without the output head; to adapt other modules too, list "
            "all of them in lora.target_modules."
        ),
        "blocks": _(
            "there only so many of the last blocks of the model are trained (-1: all), and no embeddings; here all "
            "weights are."
        ),
        "column": _("lorasmith does not read this column; if you need it, put its text into the others."),
        "data_part": _("lorasmith reads all rows of the training split; save the part that you want as a file."),
        "evaluation_files": _("lorasmith evaluates on one file; only the first one is taken over."),
        "exists": _(
            "the folder is not empty, and lorasmith replaces no files; give a new one to lorasmith train --output."
        ),
        "held_out_part": _(
            "lorasmith would evaluate on all rows of the training split; save this part as a file and give it with "
            "data.held_out."
        ),
        "keep_end": _(
            "answers of preferences are cut at their end, or dropped with data.too_long = \"drop\"."
        ),
        "languages": _("lorasmith fills in one value in all languages, the second; to change it, set data.fill."),
        "loss": _("the loss counts every token of an answer equally."),
        "max_length": _("{program} takes the model's context length then; set data.max_length."),
        "mlx_model": _(
            "this is a model converted for MLX; if its weights are quantized, give the original with --model."
        ),
        "packing": _(
            "lorasmith always packs, but its batch_size counts examples and not packed rows; raise batch_size so that "
            "a step has as many examples as before."
        ),
        "patience": _("it counts evaluations, and there are none during training; set training.eval_every too."),
        "peft_targets": _(
            "{program} leaves them to PEFT, which adapts q_proj and v_proj in most models; here all-linear is used."
        ),
        "per_epoch": _("how many steps an epoch has is known only from the data; set {ours} to a number of steps."),
        "processes": _(
            "a step has as many examples from each of {count} processes; multiply training.accumulate by it, or train "
            "in as many processes with torchrun."
        ),
        "reference": _(
            "there the reference is the base model without the adapter; here it is the model as it is when the "
            "training starts, with the adapter."
        ),
        "remote_code": _(
            "not taken over, because a model that transformers knows needs no code of its own; if yours does and you "
            "trust it, set model.trust_remote_code."
        ),
        "resume": _("lorasmith cannot continue a checkpoint of {program}; the training begins anew."),
        "roles": _("lorasmith knows these keys and roles under other names; see docs/formats.md and rename them."),
        "schedule": _("lorasmith has the schedules linear, cosine and constant; {used} is used."),
        "schedule_length": _(
            "there the learning rate falls over {length} steps after {warmup} of warmup; here over the whole training, "
            "{steps} steps. Set training.max_steps, or training.min_learning_rate, so that it ends as you want."
        ),
        "special_token": _("lorasmith takes it from the tokenizer; if it is another one there, change it there."),
        "template": _("lorasmith has no such chat template; save it as a file and give it with --template FILE.jinja."),
        "tracker_mode": _(
            "nothing is sent then; to use it with lorasmith, set {variable} in the environment, and "
            "training.report_to = [\"{tracker}\"]."
        ),
        "tracker_project": _("the client of the service reads this from the environment; set it there."),
        "trackers": _("lorasmith sends nothing to this service; it writes metrics.jsonl, and TensorBoard files."),
        "trl_learn": _(
            "{program} learns the whole text of rows with messages then, and the completion of prompt/completion rows; "
            "here the answers are learned. To learn the whole text, set data.learn = \"all\"."
        ),
        "trl_trainer": _(
            "the file does not say which trainer it is for, and {trainer} is assumed; for another one, set "
            "training.method."
        ),
        "twice": _("named twice, but lorasmith reads it once; to use its rows more often, give the files weights."),
        "unquantized": _("the weights are loaded as model.quantize says."),
        "warmup_constant": _("the schedule 'constant' of {program} has no warmup."),
    }  # fmt: skip
    return texts[name].format(**values)


def no_effect(name: str, program: str) -> str:
    """Why a group of keys is not needed."""
    texts = {
        "always": _("lorasmith always does this"),
        "default": _("the value is what lorasmith does without the key"),
        "files": _("files, caches and logs of {program}"),
        "inactive": _("options of methods that are switched off"),
        "inference": _("generation, not training"),
        "machine": _("speed, memory and processes, which lorasmith chooses itself"),
        "media": _("images, audio and the parts of a model that read them"),
        "stop": _("padding and stop tokens, which lorasmith takes from the template"),
    }
    return texts[name].format(program=program)


def refusal(name: str, **values: object) -> str:
    """Why a file cannot be converted, and what to do. `where` names the file, the key and its value."""
    texts = {
        "adapter": _("{where}: lorasmith cannot start from this. Remove the key to train a new adapter."),
        "dataset_info": _(
            "{where}: no dataset_info.json in {folders}. Run the command where {program} is run, or give the files "
            "after --from FILE."
        ),
        "dataset_kind": _(
            "{where}: lorasmith cannot read this kind of dataset. Give the data files after --from FILE."
        ),
        "dataset_unknown": _("{where}: {file} does not describe this dataset. Give the data files after --from FILE."),
        "full_preference": _(
            "{where}: lorasmith trains an adapter on preferences, not all weights. Give a configuration of LoRA."
        ),
        "loss": _("{where}: lorasmith does not have this loss. Remove the key to train with the usual one."),
        "media": _("{where}: the dataset contains images, audio or video, and lorasmith trains on text. Leave it out."),
        "method": _(
            "{where}: lorasmith trains LoRA adapters (and DoRA) or all weights. Give a configuration of one of them."
        ),
        "new_adapter": _(
            "{where}: lorasmith does not train a second adapter on top of another (create_new_adapter). Merge this one "
            "with lorasmith merge, name the merged model as the base model, and remove the key."
        ),
        "no_data": _("{file}: does not name training data. Give the data files after --from FILE."),
        "no_model": _("{file}: does not name a base model. Give one with --model."),
        "optimizer": _(
            "{where}: lorasmith does not have this optimizer. Set the key to adamw_torch and choose a learning rate "
            "for AdamW."
        ),
        "megatron": _("{where}: lorasmith does not read configurations of Megatron-SWIFT. Give one of ms-swift."),
        "no_preference": _(
            "{where}: this is preference data, but the configuration trains on examples. Leave it out, or give a "
            "configuration of DPO, ORPO, KTO or SimPO."
        ),
        "prompt": _(
            "{where}: lorasmith does not know this prompt format. Convert the rows (see docs/formats.md), give them "
            "after --from FILE, and choose a template with --template."
        ),
        "quantized": _(
            "{where}: lorasmith quantizes a base model to NF4 or int8 with bitsandbytes, and in no other way. Add "
            "--quantize nf4 to the command, or --quantize none for unquantized weights, which need more memory."
        ),
        "reference": _(
            "{where}: the reference of lorasmith is the model as it is when the training starts. Remove the key."
        ),
        "stage": _(
            "{where}: lorasmith trains on examples, or on preferences with DPO, ORPO, KTO or SimPO. It has no reward "
            "models and no reinforcement learning."
        ),
        "task": _("{where}: lorasmith trains models that generate text, for no other task."),
        "templates": _(
            "{where}: the datasets need different templates, {first} and {second}, and lorasmith uses one. Choose it "
            "with --template."
        ),
        "variable": _("{where}: contains a variable. Write the value itself."),
    }  # fmt: skip
    return texts[name].format(**values)
