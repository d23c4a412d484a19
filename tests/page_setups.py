"""What pages take for given: the names that a page's Python uses and does not make. Run in the page's own process.

All stand on `models/SmolLM2-135M-Instruct` in the working directory, which is a small model of that architecture with
its tokenizer.
"""

from typing import Any

BASE = "models/SmolLM2-135M-Instruct"
TEXTS = ["Chest pain since this morning.", "Patient well.", "Fracture of the left wrist."]


def base() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE)


def batch() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE, padding_side="left")(TEXTS, return_tensors="pt", padding=True)


def labelled() -> dict[str, Any]:
    given = batch()
    return {**given, "labels": given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)}


def rows() -> list[dict[str, Any]]:
    return [{key: values[i] for key, values in labelled().items()} for i in range(len(TEXTS))]


def adapter(config: Any) -> Any:
    """A model with an adapter that changes its output."""
    from peft import get_peft_model

    config.init_lora_weights = False
    return get_peft_model(base(), config)


def trainer(model: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments("out", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    return Trainer(model, arguments, train_dataset=rows())


def balance() -> dict[str, Any]:
    from peft_moe import MoLoraConfig

    model = adapter(MoLoraConfig(task_type="CAUSAL_LM", balance_loss="switch"))
    names = {"trainer": trainer(model), "gradient_accumulation_steps": 2}
    return names | {"MoLoraConfig": MoLoraConfig, "model": model, "batch": labelled()}


def folding() -> dict[str, Any]:
    from peft_moe import MoLoraConfig

    return {"model": adapter(MoLoraConfig(task_type="CAUSAL_LM")), "batches": [labelled()] * 5}


def saving() -> dict[str, Any]:
    from peft_moe import MoLoraConfig

    given = trainer(adapter(MoLoraConfig(task_type="CAUSAL_LM")))
    return {"trainer": given, "args": given.args}


def several_adapters() -> dict[str, Any]:
    from peft_moe import MoeLoraConfig

    for day in ("monday", "tuesday", "wednesday"):
        config = MoeLoraConfig(task_type="CAUSAL_LM", tasks=["icd", "rad"], default_task="icd")
        adapter(config).save_pretrained(day)
    return {"base_model": base(), "batch": batch()}


SETUPS = {f"docs/{setup.__name__}.md": setup for setup in (balance, folding, saving, several_adapters)}
