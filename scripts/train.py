"""Trains an adapter of peft_moe, or a stock LoRA to compare it with, on several tasks at once.

    python scripts/train.py recipes/quickstart.yaml
    python scripts/train.py recipes/moelora.yaml --model_name_or_path Qwen/Qwen3-0.6B --learning_rate 1e-4
    accelerate launch scripts/train.py recipes/moelora.yaml

The first argument may be a YAML file; flags win over it. Every field of transformers' TrainingArguments is an argument
too: bf16, gradient_checkpointing, gradient_accumulation_steps, report_to, push_to_hub, resume_from_checkpoint (true for
the last complete one, or a folder) and so on. Writes to output_dir: the adapter, the tokenizer, README.md (the model
card) and all_results.json.
"""

import json
import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_moe import (
    GroupedMoeConfig,
    MedMoeLoraConfig,
    MoeConfig,
    MoeLoraConfig,
    MoLoraConfig,
    TokenRoutedConfig,
)
from peft_moe.answers import with_answer_logits
from peft_moe.arguments import parse_arguments
from peft_moe.callbacks import BalanceScale, RoutingCallback
from peft_moe.card import model_card, tags_of
from peft_moe.data import TaskInfo, encode, mix, read_examples, read_task_info, take_per_task, with_tasks
from peft_moe.dtypes import resolve_dtype
from peft_moe.evaluation import metrics_of, table
from peft_moe.matched import match_lora
from peft_moe.output import print_any_text
from peft_moe.reading import MissingSplitError
from peft_moe.resume import last_complete_checkpoint
from peft_moe.routing_images import RoutingImages, routes
from peft_moe.training import TaskCollator, TaskEvaluation, score_with_trainer


@dataclass
class ModelArguments:
    """The frozen base model."""

    model_name_or_path: str = field(metadata={"help": "Base model: a Hub id or a folder."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the base model."})
    dtype: Literal["auto", "fastest", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "Type of the base weights; the adapter is float32 in any case. auto: the checkpoint's; fastest: "
            "bfloat16 where the device computes with it, else float32."
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Such as sdpa, eager, flash_attention_2."})


@dataclass
class DataArguments:
    """The rows and what is made of them."""

    dataset: str = field(metadata={"help": "A Hub id, a JSONL, CSV or Parquet file, or a folder of such files."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    train_tasks: list[str] | None = field(
        default=None, metadata={"help": "Train on the rows of these tasks only, and score them; default: all."}
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split for evaluation during training."})
    test_split: str | None = field(default=None, metadata={"help": "Split to score at the end instead of eval_split."})
    task_column: str = field(
        default="task",
        metadata={"help": "Column with the name of the row's task. Without it all rows have one, except for moelora."},
    )
    protocol: Literal["instruction", "bare"] = field(
        default="instruction", metadata={"help": "bare: without the instruction, so that only the id tells the task."}
    )
    mixing: Literal["proportional", "uniform", "temperature"] = field(
        default="proportional", metadata={"help": "How often each task is drawn in an epoch."}
    )
    mixing_temperature: float = field(default=2.0, metadata={"help": "T of temperature mixing, p ~ rows^(1/T)."})
    max_length: int = field(default=512, metadata={"help": "Longest row in tokens; longer prompts lose their start."})
    max_rows_per_task: int | None = field(default=None, metadata={"help": "Train on the first rows of each task only."})
    max_new_tokens: int = field(default=48, metadata={"help": "Longest answer generated in evaluation, in tokens."})
    answer_logits: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={
            "help": "Compute logits where rows have labels only, which changes nothing but the work; auto: where the "
            "model can."
        },
    )
    card_license: str | None = field(default=None, metadata={"help": "The adapter's licence, such as apache-2.0."})


METHODS = {
    "moelora": MoeLoraConfig,
    "molora": MoLoraConfig,
    "medmoelora": MedMoeLoraConfig,
    "at_moe": GroupedMoeConfig,
    "lora": LoraConfig,
}


@dataclass
class AdapterArguments:
    """The adapter. What is not given has the default of the method's config, which is the paper's."""

    method: Literal["moelora", "molora", "medmoelora", "at_moe", "lora"] = field(
        default="moelora", metadata={"help": "lora: peft's stock LoRA, to compare with."}
    )
    match_lora: Literal["parameters", "active"] | None = field(
        default=None,
        metadata={
            "help": "Train the stock LoRA that matches the method instead, to compare with: of as many parameters, or "
            "of the rank that is at work for a token."
        },
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers to adapt, or all-linear, which is the default; at_moe: the experts'."},
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "Names in order of their ids; default: the data's."}
    )
    default_task: str | None = field(default=None, metadata={"help": "moelora: task of calls that name none."})
    r: int | None = field(default=None, metadata={"help": "Rank: moelora's experts share it, molora's have it each."})
    lora_alpha: float | None = field(default=None, metadata={"help": "The adapter is scaled by lora_alpha / r."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout of the adapter's input."})
    num_experts: int | None = field(default=None, metadata={"help": "Experts per layer."})
    num_experts_pattern: str | None = field(
        default=None, metadata={"help": "JSON of module name or regex to number of experts, where it differs."}
    )
    task_embedding_dim: int | None = field(default=None, metadata={"help": "moelora: size of a task's embedding."})
    gate_scope: Literal["model", "layer"] | None = field(default=None, metadata={"help": "moelora: gates in all."})
    top_k: int | None = field(default=None, metadata={"help": "molora: experts per token."})
    router_bias: bool | None = field(default=None, metadata={"help": "molora: whether routers have a bias."})
    num_shared_experts: int | None = field(default=None, metadata={"help": "molora: experts that every token gets."})
    expert_schedule: str | None = field(
        default=None, metadata={"help": "medmoelora: uniform, ascending, descending, or JSON of a law, bands or list."}
    )
    expert_ranks: list[int] | None = field(default=None, metadata={"help": "medmoelora: ranks, taken in turn."})
    base_expert_mode: str | None = field(default=None, metadata={"help": "medmoelora: frozen, regularized or general."})
    general_tasks: list[str] | None = field(default=None, metadata={"help": "medmoelora: tasks that are general data."})
    inference_top_k: int | None = field(default=None, metadata={"help": "medmoelora: experts kept when not training."})
    balance_loss: str | None = field(
        default=None, metadata={"help": "none, switch, variance, cv2, localized, z, or JSON of names and weights."}
    )
    balance_coefficient: float | None = field(default=None, metadata={"help": "Weight of the balance loss."})
    groups: str | None = field(
        default=None, metadata={"help": "at_moe: JSON (in YAML a mapping) of group to expert to its folder or Hub id."}
    )
    general_expert: str | None = field(default=None, metadata={"help": "at_moe: folder or Hub id of the general LoRA."})
    mix: float | None = field(default=None, metadata={"help": "at_moe: share of the mixture beside the general one."})
    learn_mix: bool | None = field(default=None, metadata={"help": "at_moe: train that share, one for each block."})
    router_input: Literal["token", "prompt"] | None = field(
        default=None, metadata={"help": "at_moe: route each token by itself, or a row by its prompt."}
    )
    within_group: Literal["projection", "static"] | None = field(
        default=None, metadata={"help": "at_moe: whether weights within a group depend on the input."}
    )
    flat_routing: bool | None = field(default=None, metadata={"help": "at_moe: one softmax over all experts."})
    group_temperature: float | None = field(default=None, metadata={"help": "at_moe: of the softmax over groups."})
    expert_temperature: float | None = field(default=None, metadata={"help": "at_moe: of the one within a group."})
    router_norm: bool | None = field(default=None, metadata={"help": "at_moe: whether tokens are normalised for it."})
    train_experts: bool | None = field(default=None, metadata={"help": "at_moe: train the experts too."})
    stage1: str | None = field(
        default=None,
        metadata={"help": "JSON (in YAML a mapping) for scripts/train_experts.py; train.py leaves it alone."},
    )
    adapter_options: str | None = field(
        default=None, metadata={"help": "JSON (in YAML a mapping) of other fields of the method's config."}
    )
    log_routing: Literal["no", "summary", "layers"] = field(
        default="summary",
        metadata={
            "help": "What to log of the routers; layers has every expert of every layer. Unless no, evaluations also "
            "print a line about them."
        },
    )
    routing_images: bool | None = field(
        default=None,
        metadata={
            "help": "Heat maps of the routers in TensorBoard at each evaluation; default: where report_to has "
            "tensorboard, matplotlib is installed and log_routing is not no."
        },
    )

    def config(self, tasks: list[str]) -> PeftConfig:
        """The config of the chosen method.

        Raises:
            ValueError: an argument that the method does not have.
        """
        own = {
            "method",
            "match_lora",
            "target_modules",
            "tasks",
            "stage1",
            "adapter_options",
            "log_routing",
            "routing_images",
        }
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        given = {name: value for name, value in given.items() if value is not None}
        options = read_json("adapter_options", self.adapter_options or "{}")
        if not isinstance(options, dict):
            raise ValueError(f"--adapter_options={self.adapter_options!r} holds no names; write a mapping of fields.")
        if twice := sorted(options.keys() & (given.keys() | {"target_modules", "tasks", "task_type"})):
            raise ValueError(f"--adapter_options has {', '.join(twice)}, which flags or the method give; leave it out.")
        given |= options
        config_cls = METHODS[self.method]
        if self.match_lora and config_cls is LoraConfig:
            raise ValueError(
                f"--match_lora {self.match_lora} trains the LoRA that matches a method with experts, and --method lora "
                "is none; give the method to compare with, or leave --match_lora out."
            )
        known = {f.name for f in fields(config_cls)}
        if foreign := sorted(given.keys() - known):
            raise ValueError(f"--method {self.method} has no {', '.join(foreign)}; leave out what is of other methods.")
        for name, value in given.items():
            if isinstance(value, str) and value.startswith(("{", "[")):
                given[name] = read_json(name, value)
        targets: list[str] | str | None = self.target_modules
        if targets == ["all-linear"] or (targets is None and config_cls is not GroupedMoeConfig):
            targets = "all-linear"
        if "tasks" in known:
            given["tasks"] = tasks
        return config_cls(task_type="CAUSAL_LM", target_modules=targets, **given)


def read_json(name: str, text: str) -> Any:
    """What a flag says in JSON.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name}={text!r} is no JSON ({error}); keys and texts need double quotes.") from None


def main(argv: list[str]) -> None:
    """Train, score every task, save and publish."""
    print_any_text()
    model_args, data_args, adapter_args, args = parse_arguments(
        (ModelArguments, DataArguments, AdapterArguments, TrainingArguments), argv
    )
    set_seed(args.seed)
    check_evaluation(args, data_args)
    with args.main_process_first(desc="reading the data"):
        info = read_task_info(data_args.dataset, revision=data_args.dataset_revision)
        splits = (data_args.train_split, data_args.eval_split, data_args.test_split)
        needed = adapter_args.method == "moelora"
        examples = {split: read_split(data_args, split, args.seed, task_needed=needed) for split in splits if split}
    split = data_args.test_split or data_args.eval_split
    for part in {part for part in (data_args.eval_split, split) if part}:
        metrics_of(examples[part], info)  # what cannot be scored is found out before training
    if adapter_args.method == "at_moe" and not adapter_args.train_experts:
        args.ddp_broadcast_buffers = False  # frozen experts are buffers, the same in all processes
    config = adapter_args.config(adapter_args.tasks or task_names(examples[data_args.train_split], info))
    model_args.dtype = resolve_dtype(model_args.dtype, args.device)
    model, tokenizer = load_model(model_args, config, adapter_args.match_lora)
    config, trained = model.active_peft_config, adapter_args.method
    if adapter_args.match_lora:
        trained = f"lora of {trained}'s {adapter_args.match_lora}"
    trainer = build_trainer(args, data_args, model, tokenizer, examples)
    generation = {"batch_size": args.per_device_eval_batch_size, "max_new_tokens": data_args.max_new_tokens}
    scored = not is_sharded(trainer)
    if not scored:
        check_best_model(args)
        if trainer.is_world_process_zero():
            print("The model is split over processes and cannot answer: score what is saved with scripts/evaluate.py.")
    if data_args.eval_split and scored:
        trainer.add_callback(TaskEvaluation(trainer, examples[data_args.eval_split], info, **generation))

    if isinstance(config, TokenRoutedConfig) and any(model.routers()):  # one expert everywhere is a plain LoRA
        trainer.add_callback(BalanceScale(trainer))
        if adapter_args.log_routing != "no":
            trainer.add_callback(RoutingCallback(trainer, per_layer=adapter_args.log_routing == "layers"))
    show_routing(trainer, adapter_args)

    resume = checkpoint_to_resume(args)
    if resume is None and trainer.is_world_process_zero():  # or scores of an earlier adapter would stay in it
        Path(args.output_dir, "all_results.json").unlink(missing_ok=True)
    metrics = trainer.train(resume_from_checkpoint=resume).metrics
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    results: dict[str, dict[str, Any]] = {}
    if split and scored:
        save(trainer, data_args, info, results, split, push=False)  # whatever may go wrong while answering
        results = score_with_trainer(trainer, examples[split], info, **generation)
        trainer.save_metrics(split, {split: results})
    save(trainer, data_args, info, results, split)
    if trainer.is_world_process_zero():
        print(table({trained: results}) if results else "No eval_split or test_split to score.")
        print(f"The adapter, its card and all_results.json are in {args.output_dir}.")


def check_evaluation(args: TrainingArguments, data_args: DataArguments) -> None:
    """Raise a ValueError if there is to be evaluation and nothing to evaluate on."""
    if args.eval_strategy != "no" and not data_args.eval_split:
        raise ValueError(
            f"--eval_strategy {args.eval_strategy.value} scores a split, and none is named; give --eval_split, or "
            "--eval_strategy no --load_best_model_at_end false."
        )


def show_routing(trainer: Trainer, adapter_args: AdapterArguments) -> None:
    """A line about the routers for each evaluation, and heat maps in TensorBoard, as the arguments say."""
    line, images = adapter_args.log_routing != "no", adapter_args.routing_images
    if routes(trainer.model) and (line or images):
        trainer.add_callback(RoutingImages(trainer, line=line, images=images))


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The folder to go on from, if any: a run that was killed may have left its newest checkpoint half written.

    Raises:
        ValueError: the last complete checkpoint is asked for, and there is none.
    """
    resume = args.resume_from_checkpoint
    wanted = str(resume).lower()  # a flag arrives as a string
    if wanted == "true":
        resume = last_complete_checkpoint(args.output_dir)
        if resume is None:
            raise ValueError(f"{args.output_dir} has no complete checkpoint; leave --resume_from_checkpoint out.")
    return None if wanted == "false" else resume


def read_split(data_args: DataArguments, split: str, seed: int, *, task_needed: bool = True) -> Dataset:
    """One split of the data, of the tasks to train on; of the split to train on, the rows that the arguments choose.

    Where tasks are not needed and no flag is about them, rows may have none.
    """
    task_needed |= data_args.task_column != "task" or data_args.train_tasks is not None
    try:
        examples = with_tasks(
            read_examples(
                data_args.dataset,
                split=split,
                task_column=data_args.task_column,
                task_needed=task_needed,
                protocol=data_args.protocol,
                revision=data_args.dataset_revision,
            )
        )
    except MissingSplitError as error:
        flag = next(name for name in ("train_split", "eval_split", "test_split") if getattr(data_args, name) == split)
        without = "" if flag == "train_split" else f" --{flag} null leaves it out."
        raise ValueError(f"--{flag} {split}: {error}{without}") from None
    if data_args.train_tasks is not None:  # of every split: an adapter of some tasks is scored on these alone
        examples = select_tasks(examples, data_args.train_tasks, split)
    if split == data_args.train_split:
        if data_args.max_rows_per_task is not None:
            examples = take_per_task(examples, data_args.max_rows_per_task)
        examples = mix(examples, strategy=data_args.mixing, temperature=data_args.mixing_temperature, seed=seed)
    return examples


def select_tasks(examples: Dataset, tasks: list[str], split: str) -> Dataset:
    """The rows that have none but these tasks.

    Raises:
        ValueError: a task that no row has, or only rows that have others beside it.
    """
    found = task_names(examples, {})
    if unknown := sorted(set(tasks) - set(found)):
        raise ValueError(f"--train_tasks has {unknown}, which no row of split {split!r} has; use some of {found}.")
    wanted = set(tasks)
    rows = [i for i, row in enumerate(examples["task"]) if wanted.issuperset([row] if isinstance(row, str) else row)]
    if not rows:
        raise ValueError(
            f"--train_tasks {' '.join(tasks)} leaves split {split!r} without rows: all rows that have these tasks "
            "have others too; name those as well, or use data with rows of these tasks alone."
        )
    return examples.select(rows)


def task_names(examples: Dataset, info: dict[str, TaskInfo]) -> list[str]:
    """The tasks that occur in the rows: first those of tasks.json in its order, then the others by name."""
    found = {name for row in examples["task"] for name in ([row] if isinstance(row, str) else row)}
    return [name for name in info if name in found] + sorted(found - info.keys())


def load_model(
    model_args: ModelArguments, config: PeftConfig, match: Literal["parameters", "active"] | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model with a new adapter, or with the stock LoRA that matches it, and its tokenizer."""
    source = {"pretrained_model_name_or_path": model_args.model_name_or_path, "revision": model_args.revision}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    base = AutoModelForCausalLM.from_pretrained(**source, **options)
    if match:
        found = match_lora(config, base, match)
        config = found.config
        if PartialState().is_main_process:
            print(f"--match_lora {match}: {found}.")
    base.add_model_tags(tags_of(config))  # peft puts these on every card
    return get_peft_model(base, config, revision=model_args.revision), tokenizer


def build_trainer(
    args: TrainingArguments,
    data_args: DataArguments,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: dict[str, Dataset],
) -> Trainer:
    """The stock Trainer on the encoded rows, drawn from the tasks as the arguments say."""
    config = model.active_peft_config
    tasks = (config.task_names or None) if isinstance(config, MoeConfig) else None
    with args.main_process_first(desc="encoding the data"):
        # the test split too: a row that cannot be used shows before training
        encoded = partial(encode, tokenizer=tokenizer, tasks=tasks, max_length=data_args.max_length)
        rows = {split: encoded(part) for split, part in examples.items()}
    # GPUs are quicker at such lengths; a CPU would only have more to compute
    collator: Any = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=None if args.device.type == "cpu" else 8)
    if tasks:
        collator = TaskCollator(collator, tasks)
    return Trainer(
        model,
        args,
        data_collator=with_answer_logits(collator, model, args, wanted=data_args.answer_logits),
        train_dataset=rows[data_args.train_split],
        eval_dataset=rows.get(data_args.eval_split),
        processing_class=tokenizer,
    )


def is_sharded(trainer: Trainer) -> bool:
    """Whether FSDP or ZeRO-3 keeps a part of the weights in each process, so that none of them can generate."""
    deepspeed = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return bool(trainer.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3))


def check_best_model(args: TrainingArguments) -> None:
    """Raise a ValueError if the best model is to be chosen by scores that there will not be."""
    if args.load_best_model_at_end and args.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is a score of generated answers, and a model that "
            "FSDP or ZeRO-3 splits over processes cannot generate; use --load_best_model_at_end false, or "
            "--metric_for_best_model loss --greater_is_better false."
        )


def save(
    trainer: Trainer,
    data_args: DataArguments,
    info: dict[str, TaskInfo],
    results: dict[str, dict[str, Any]],
    split: str | None,
    *,
    push: bool = True,
) -> None:
    """Write the adapter, the tokenizer and the card, and push them if the arguments say so too."""
    args = trainer.args

    def write_card(**_: object) -> None:
        card = model_card(
            trainer.model,
            name=trainer.hub_model_id if args.push_to_hub else args.output_dir,
            dataset=data_args.dataset,
            info=info,
            hyperparameters=hyperparameters(trainer, data_args),
            results=results,
            split=split or "",
            license=data_args.card_license,
        )
        card.save(f"{args.output_dir}/README.md")

    if args.push_to_hub and push:
        trainer.create_model_card = write_card  # the Trainer would push its own draft instead
        trainer.push_to_hub()
    else:
        trainer.save_model(_internal_call=True)  # else it would push its own draft of a card
        if trainer.is_world_process_zero():
            write_card()


def hyperparameters(trainer: Trainer, data_args: DataArguments) -> dict[str, object]:
    """What the card lists after the adapter's own settings."""
    args = trainer.args
    return {
        "protocol": data_args.protocol,
        "mixing": data_args.mixing,
        "learning rate": args.learning_rate,
        "schedule": args.lr_scheduler_type.value,
        "rows per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "rows": len(trainer.train_dataset),
        "steps": trainer.state.global_step,
        "seed": args.seed,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
