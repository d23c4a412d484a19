"""Scores a base model, or an adapter on it, on every task of a dataset: prints a table and writes JSON.

    python scripts/evaluate.py --model_name_or_path models/SmolLM2-135M-Instruct --data data/medmulti/tiny
    python scripts/evaluate.py --adapter outputs/moelora --data data/medmulti/mini --split test --output results.json

The adapter may be one of peft_moe, a stock LoRA or any other that peft loads, as a folder or a Hub id; its base model
need not be given. The first argument may be a YAML file; flags win over it.
"""

import importlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class EvaluationArguments:
    """What is scored, and on what."""

    dataset: str = field(
        metadata={
            "help": "A Hub id, a JSONL, CSV or Parquet file, or a folder of such files.",
            "aliases": ["--data"],
        }
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model: a Hub id or a folder. Default: the one the adapter names."}
    )
    adapter: str | None = field(
        default=None, metadata={"help": "Adapter: a Hub id or a folder. Default: none, the base model is scored."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})
    adapter_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the adapter."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    split: str | None = field(
        default=None, metadata={"help": "Split to score on. Default: test; for a file, the split it is."}
    )
    task_column: str = field(
        default="task",
        metadata={"help": "Column with the name of the row's task. Without it all rows have one, except for MOELoRA."},
    )
    protocol: Literal["instruction", "bare"] = field(
        default="instruction", metadata={"help": "bare: without the instruction, so that only the id tells the task."}
    )
    limit: int | None = field(default=None, metadata={"help": "Score the first rows of each task only."})
    dtype: Literal["auto", "fastest", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "Type of the base weights. auto: the checkpoint's; fastest: bfloat16 where the device computes "
            "with it, else float32."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Rows answered at once."})
    max_new_tokens: int = field(default=48, metadata={"help": "Longest answer, in tokens."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the scores and these arguments."})

    def __post_init__(self) -> None:
        if self.model_name_or_path is None and self.adapter is None:
            raise ValueError("Nothing to score; give --model_name_or_path, --adapter, or both.")
        if self.output is not None and Path(self.output).is_dir():
            raise ValueError(f"output={self.output!r} is a folder; name a JSON file to write.")
        if self.split is None and not Path(self.dataset).is_file():
            self.split = "test"


def main(argv: list[str]) -> None:
    """Load, score, write and print."""
    from peft import PeftConfig

    import peft_moe  # noqa: F401  # makes its adapters known to peft
    from peft_moe.arguments import parse_arguments
    from peft_moe.data import read_examples, read_task_info, take_per_task, with_tasks
    from peft_moe.evaluation import evaluate_tasks, table
    from peft_moe.output import print_any_text

    print_any_text()
    (args,) = parse_arguments([EvaluationArguments], argv)
    info = read_task_info(args.dataset, revision=args.dataset_revision)
    config = PeftConfig.from_pretrained(args.adapter, revision=args.adapter_revision) if args.adapter else None
    examples = with_tasks(
        read_examples(
            args.dataset,
            split=args.split,
            task_column=args.task_column,
            task_needed=getattr(config, "needs_tasks", False) or args.task_column != "task",
            protocol=args.protocol,
            revision=args.dataset_revision,
        )
    )
    if args.limit is not None:
        examples = take_per_task(examples, args.limit)
    model, tokenizer = load(args, config)
    results = evaluate_tasks(
        model, tokenizer, examples, info, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens
    )
    if args.output:
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"arguments": asdict(args), "results": results}, indent=2) + "\n", encoding="utf-8")
    print(table({Path(args.adapter or args.model_name_or_path).name: results}))
    if args.output:
        print(f"The scores and these arguments are in {args.output}.")


def load(
    args: EvaluationArguments, config: "PeftConfig | None"
) -> "tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]":
    """The model with its adapter, and the tokenizer saved with the adapter or else the base model's."""
    from accelerate import PartialState
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft_moe.dtypes import resolve_dtype

    if config and args.model_name_or_path is None:  # noted in args, which are written beside the scores
        args.model_name_or_path, args.revision = config.base_model_name_or_path, args.revision or config.revision
    base = {"pretrained_model_name_or_path": args.model_name_or_path, "revision": args.revision or "main"}
    device = PartialState().device
    args.dtype = resolve_dtype(args.dtype, device)
    model = AutoModelForCausalLM.from_pretrained(**base, dtype=args.dtype)
    if args.adapter is None:
        tokenizer = AutoTokenizer.from_pretrained(**base)
    else:
        own = {"pretrained_model_name_or_path": args.adapter, "revision": args.adapter_revision or "main"}
        tokenizer = AutoTokenizer.from_pretrained(**(own if has_tokenizer(args) else base))
        model = PeftModel.from_pretrained(model, args.adapter, revision=args.adapter_revision)
    return model.to(device), tokenizer


def has_tokenizer(args: EvaluationArguments) -> bool:
    """Whether a tokenizer was saved with the adapter."""
    from transformers.utils import cached_file

    try:
        cached_file(args.adapter, "tokenizer_config.json", revision=args.adapter_revision)
    except OSError:
        return False
    return True


def stand_aside() -> None:
    """Import the library `evaluate`, in whose place Python finds this file when it looks in this folder first."""
    here = Path(__file__).resolve().parent
    sys.path.sort(key=lambda folder: Path(folder).resolve() == here)  # last, not gone: other scripts are found here too
    del sys.modules["evaluate"]
    importlib.import_module("evaluate")


if __name__ == "__main__":
    main(sys.argv[1:])
elif __name__ == "evaluate":  # imported by what a script of this folder uses, and meant is the library
    stand_aside()
