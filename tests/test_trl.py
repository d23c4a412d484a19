"""TRL's trainers take our configs as `peft_config`, as they take LoRA's: SFT, DPO and GRPO."""

import math

import pytest
import torch
from datasets import Dataset
from grouped_helpers import grouped_config
from helpers import TARGETS, TASKS, adapter_gradients, logits
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_inputs, make_model
from tiny_text import make_tokenizer
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_moe import MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig
from peft_moe.callbacks import BalanceScale
from peft_moe.rollouts import TaskRollouts
from peft_moe.routing import GroupedRouter, TaskRouter
from peft_moe.training import TaskCollator

pytestmark = [
    # TRL 1.16 calls transformers 5.23 by old names
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing[_a-z]*` is deprecated:FutureWarning"),
]

HOW = ["sft", "dpo", "grpo"]
KINDS = ["moelora", "molora", "medmoe", "at_moe", "at_moe by prompt"]
# Tasks come in another order than the adapter has them; prompts of different lengths, so that some are padded.
ROWS = [("ash", "rad"), ("the elm", "icd"), ("Name the fir", "def"), ("the the oak", "icd")]
ANSWERS = ["broad", "needle small", "tall", "large large"]
TASK_OF = {word: TASKS.index(task) for text, task in ROWS for word in text.split()[-1:]}


def pairs_of(first, second, *quick):
    """All pairs of two lists of names; those that are not named are slow."""
    every = [(a, b) for a in first for b in second]
    marks = {pair: () if pair in quick else pytest.mark.slow for pair in every}
    return [pytest.param(*pair, marks=marks[pair]) for pair in every]


def rows(how):
    prompts = [{"prompt": text, "task_ids": task} for text, task in ROWS]
    if how == "sft":
        return Dataset.from_list([p | {"completion": f" {a}"} for p, a in zip(prompts, ANSWERS, strict=True)])
    if how == "dpo":
        pairs = zip(ANSWERS, ANSWERS[::-1], strict=True)
        return Dataset.from_list(
            [p | {"chosen": f" {a}", "rejected": f" {b} box"} for p, (a, b) in zip(prompts, pairs, strict=True)]
        )
    return Dataset.from_list(prompts)


def config_of(kind, tmp_path, **fields):
    common = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    if kind.startswith("at_moe"):
        fields = {"router_input": "prompt" if "prompt" in kind else "token"} | fields
        return grouped_config("llama", tmp_path / "loras", **common | fields)
    common |= {"target_modules": TARGETS["llama"], "num_experts": 4, "lora_dropout": 0.0}
    cls = {"moelora": MoeLoraConfig, "molora": MoLoraConfig, "medmoe": MedMoeLoraConfig}[kind]
    common |= {"moelora": {"tasks": TASKS, "r": 8}, "molora": {}, "medmoe": {"balance_loss": "none"}}[kind]
    return cls(**common | fields)


class TaskGRPO(TaskRollouts, GRPOTrainer):
    pass


class TaskRLOO(TaskRollouts, RLOOTrainer):
    pass


def long_answers(completion_ids, **columns):
    return [float(sum(ids)) for ids in completion_ids]


def make_trainer(how, folder, *, tasks=False, model=None, reward=long_answers, cls=None, data=None, **settings):
    """A trainer of a tiny model; `tasks` brings the rows' tasks to the model in the way its kind of trainer has."""
    given = {name: settings.pop(name) for name in ("peft_config", "callbacks") if name in settings}
    arguments = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    if tasks:
        arguments["remove_unused_columns"] = False
    given["train_dataset"] = rows(how) if data is None else data
    given["processing_class"] = make_tokenizer()
    model = make_model("llama") if model is None else model
    if how in ("sft", "dpo"):
        trainer_cls, config_cls, collator = {
            "sft": (SFTTrainer, SFTConfig, DataCollatorForLanguageModeling),
            "dpo": (DPOTrainer, DPOConfig, DataCollatorForPreference),
        }[how]
        if tasks:
            given["data_collator"] = TaskCollator(collator(pad_token_id=0), TASKS)
        return trainer_cls(model, args=config_cls(**arguments | settings), **given)
    arguments |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    trainer_cls = cls or (TaskGRPO if tasks else GRPOTrainer)
    config_cls = RLOOConfig if issubclass(trainer_cls, RLOOTrainer) else GRPOConfig
    return trainer_cls(model, reward_funcs=reward, args=config_cls(**arguments | settings), **given)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimiser gets, and as a hook of the model the batches that it is trained on."""

    def __init__(self):
        self.batches = []

    def see(self, model, args, kwargs):
        if torch.is_grad_enabled():
            self.batches.append(dict(kwargs))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = adapter_gradients(model)


QUICK = [("sft", "molora"), ("dpo", "moelora"), ("dpo", "at_moe by prompt"), ("grpo", "at_moe")]


@pytest.mark.parametrize(("how", "kind"), pairs_of(HOW, KINDS, *QUICK))
def test_the_trainer_trains_routers_and_experts_and_nothing_else(how, kind, tmp_path):
    config = config_of(kind, tmp_path)
    trainer = make_trainer(how, tmp_path, peft_config=config, tasks=kind == "moelora")
    model = trainer.model
    before = weights(model)
    trainer.train()
    assert len(losses(trainer)) == 3
    assert all(math.isfinite(loss) for loss in losses(trainer))
    if how != "grpo":
        assert losses(trainer)[-1] < losses(trainer)[0]
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == trained
    assert any("moelora_router" in name for name in changed)
    assert any("moelora_bank" in name for name in changed) != kind.startswith("at_moe")  # whose LoRAs are frozen

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "adapter"))
    inputs, task = make_inputs("llama", labels=False), {"task_ids": "def"} if kind == "moelora" else {}
    torch.testing.assert_close(logits(loaded.eval(), inputs, **task), logits(model.eval(), inputs, **task))


ONE_EACH = [("sft", "moelora"), ("dpo", "molora"), ("grpo", "moelora")]


@pytest.mark.parametrize(("how", "kind"), pairs_of(HOW, ["moelora", "molora", "medmoe"], *ONE_EACH))
def test_one_expert_is_trained_as_a_stock_lora_is(how, kind, tmp_path):
    fields = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": TARGETS["llama"]}
    found = {}
    for name, peft_config in ("stock", LoraConfig(**fields)), ("ours", one_expert(kind, fields)):
        trainer = make_trainer(how, tmp_path / name, peft_config=peft_config)
        start_from_the_same(trainer.model, name)
        torch.manual_seed(0)
        trainer.train()
        found[name] = losses(trainer), pairs(trainer.model, name)
    assert found["ours"][0] == pytest.approx(found["stock"][0], rel=1e-5, abs=1e-7)
    for key, (a, b) in found["stock"][1].items():
        torch.testing.assert_close(found["ours"][1][key][0], a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["ours"][1][key][1], b, rtol=1e-4, atol=1e-5)


def one_expert(kind, fields):
    if kind == "medmoe":
        ours = {"expert_schedule": "uniform", "expert_ranks": 4, "num_base_experts": 0, "balance_loss": "none"}
        fields = {name: value for name, value in fields.items() if name != "r"} | ours | {"lora_dropout": 0.0}
        return MedMoeLoraConfig(**fields, num_experts=1)
    if kind == "moelora":
        return MoeLoraConfig(**fields, num_experts=1, tasks=TASKS, lora_dropout=0.0)
    return MoLoraConfig(**fields, num_experts=1, lora_dropout=0.0)


def pairs(model, name):
    """A and B of each adapted layer."""
    if name == "ours":
        banks = {
            key: layer.moelora_bank["default"] for key, layer in model.named_modules() if hasattr(layer, "moelora_bank")
        }
        return {key: (bank.lora_A.weight, bank.lora_B.weight) for key, bank in banks.items()}
    layers = {key: layer for key, layer in model.named_modules() if hasattr(layer, "lora_A")}
    return {key: (x.lora_A["default"].weight, x.lora_B["default"].weight) for key, x in layers.items()}


@torch.no_grad()
def start_from_the_same(model, name):
    generator = torch.Generator().manual_seed(1)
    for _, pair in sorted(pairs(model, name).items()):
        for weight in pair:
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))


# -- tasks of rows ----------------------------------------------------------------------------------------------------


class Routed:
    """Notes which task each row of each forward had, by the last word of its prompt."""

    def __init__(self, model):
        self.calls, self.prompts = [], []
        router = next(module for module in model.modules() if isinstance(module, TaskRouter))
        model.get_input_embeddings().register_forward_pre_hook(self.see_tokens)
        router.register_forward_pre_hook(self.see_tasks)

    def see_tokens(self, module, args):
        text = [make_tokenizer().convert_ids_to_tokens(row) for row in args[0].tolist()]
        if len(text[0]) > 1:  # and not a step of generate
            self.prompts = [next(word for word in row if word in TASK_OF) for row in text]

    def see_tasks(self, module, args):
        self.calls.append((list(self.prompts), args[1].ids.tolist()))


@pytest.mark.parametrize(
    ("how", "cls"), [*((how, None) for how in HOW), pytest.param("grpo", TaskRLOO, marks=pytest.mark.slow)]
)
def test_every_row_has_its_own_task_in_every_call(how, cls, tmp_path):
    # two rows at a time: GRPO shuffles answers among micro-batches, and scores the old policy in chunks
    split = {"per_device_train_batch_size": 2, "steps_per_generation": 2} if how == "grpo" and not cls else {}
    trainer = make_trainer(how, tmp_path, peft_config=config_of("moelora", tmp_path), tasks=True, cls=cls, **split)
    seen = Routed(trainer.model)
    trainer.train()
    assert len(seen.calls) >= 3
    for words, ids in seen.calls:
        assert ids == [TASK_OF[word] for word in words]
    assert {task for _, ids in seen.calls for task in ids} == {0, 1, 2}


def test_evaluation_has_the_tasks_of_its_rows_too(tmp_path):
    for how in HOW:
        trainer = make_trainer(how, tmp_path, peft_config=config_of("moelora", tmp_path), tasks=True)
        seen = Routed(trainer.model)
        data = trainer.train_dataset if how == "dpo" else rows(how)
        assert math.isfinite(trainer.evaluate(data)["eval_loss"])
        assert seen.calls
        assert all(ids == [TASK_OF[word] for word in words] for words, ids in seen.calls)


@pytest.mark.parametrize("how", HOW)
def test_tasks_that_are_lost_on_the_way_are_an_error_and_never_the_first_task(how, tmp_path):
    trainer = make_trainer(how, tmp_path, peft_config=config_of("moelora", tmp_path))
    with pytest.raises(ValueError, match="No task was given, and adapter 'default' knows 'icd' "):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("how", HOW)
def test_a_default_task_for_all_rows_is_warned_of_and_a_chosen_one_is_not(how, tmp_path):
    trainer = make_trainer(how, tmp_path, peft_config=config_of("moelora", tmp_path, default_task="rad"), max_steps=1)
    with pytest.warns(UserWarning, match="Training without task_ids: every row is routed as default_task='rad'"):
        trainer.train()
    trainer = make_trainer(how, tmp_path, peft_config=config_of("moelora", tmp_path), max_steps=1)
    trainer.model.set_task("rad")
    trainer.train()


def test_the_mixin_says_what_it_needs(tmp_path):
    with pytest.raises(TypeError, match="comes first: class Trainer"):

        class WrongWayRound(GRPOTrainer, TaskRollouts):
            pass

    with pytest.raises(TypeError, match="SFT has no _generate_and_score_completions.*to go before"):

        class SFT(TaskRollouts, SFTTrainer):
            pass

    moelora = config_of("moelora", tmp_path)
    with pytest.raises(ValueError, match="use_transformers_continuous_batching=True: answers then do not come"):
        make_trainer("grpo", tmp_path, peft_config=moelora, tasks=True, use_transformers_continuous_batching=True)
    for changes, message in (
        ({"peft_config": config_of("molora", tmp_path)}, "for an adapter that knows tasks"),
        ({"peft_config": moelora, "data": rows("grpo").remove_columns("task_ids")}, "A row has no 'task_ids', only"),
        ({"peft_config": moelora, "remove_unused_columns": True}, "set remove_unused_columns=False"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer("grpo", tmp_path, tasks=True, **changes).train()


# -- references of DPO and GRPO ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "kind"), pairs_of(["dpo"], KINDS, ("dpo", "moelora"), ("dpo", "at_moe by prompt")))
def test_dpo_s_reference_is_the_model_without_the_adapter(how, kind, tmp_path):
    config, tasks = config_of(kind, tmp_path), kind == "moelora"
    trainer = make_trainer(how, tmp_path, peft_config=config, tasks=tasks)
    batch = next(iter(trainer.get_train_dataloader()))
    base = make_model("llama").eval()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    scores = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    expected = scores.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1).masked_fill(labels == -100, 0).sum(1)
    found = torch.cat(trainer.compute_ref_log_probs(trainer.model, dict(batch)))
    torch.testing.assert_close(found, expected)

    before = make_trainer(how, tmp_path, peft_config=config, tasks=tasks, precompute_ref_log_probs=True)
    stored = before.train_dataset.with_format("torch")
    trainer.train()
    before.train()
    assert sorted(stored["ref_chosen_logps"][:].tolist()) == pytest.approx(sorted(expected[:4].tolist()), rel=1e-4)
    assert losses(before) == pytest.approx(losses(trainer), rel=1e-4)


@pytest.mark.parametrize(("how", "kind"), pairs_of(["dpo", "grpo"], KINDS, ("dpo", "moelora"), ("grpo", "at_moe")))
def test_an_adapter_that_goes_on_is_compared_with_a_frozen_copy_of_itself(how, kind, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama"), config_of(kind, tmp_path))
    if kind == "moelora":
        model.set_task("def")
    trainer = make_trainer(how, tmp_path, model=model)
    before = weights(model)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss" if how == "dpo" else "kl"] == pytest.approx(math.log(2) if how == "dpo" else 0, abs=1e-6)
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".default." in name for name in changed)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_routers_by_prompt_decide_in_grpo_s_training_as_they_did_when_answers_were_sampled(tmp_path):
    trainer = make_trainer("grpo", tmp_path, peft_config=config_of("at_moe by prompt", tmp_path), max_steps=1)
    model, found, prompts = trainer.model, {}, []

    def see_tokens(module, args):
        if args[0].shape[1] > 1:
            prompts[:] = [next(w for w in row if w in TASK_OF) for row in map(tokens, args[0].tolist())]

    def see_weights(module, args, output):
        for word, row in zip(prompts, output.flatten(1).detach(), strict=True):
            found.setdefault(word, []).append(row)

    tokens = make_tokenizer().convert_ids_to_tokens
    model.get_input_embeddings().register_forward_pre_hook(see_tokens)
    next(m for m in model.modules() if isinstance(m, GroupedRouter)).register_forward_hook(see_weights)
    trainer.train()
    assert len(found) == 2  # prompts, two answers each
    for decisions in found.values():
        assert len(decisions) >= 4
        for other in decisions:
            torch.testing.assert_close(other[: len(decisions[0])], decisions[0])
    one, two = (decisions[0] for decisions in found.values())
    assert not torch.allclose(one, two)


# -- balance losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "kind"), pairs_of(["dpo", "grpo"], ["molora", "medmoe"], ("dpo", "medmoe"), ("grpo", "molora"))
)
def test_a_balance_loss_has_its_weight_where_the_loss_is_of_preferences_or_rewards(how, kind, tmp_path):
    fields = {"balance_loss": "cv2", "balance_coefficient": 0.5}
    config = config_of(kind, tmp_path, **fields)
    # a loss without gradient, so that routers only get that of the balance loss
    nothing = {"dpo": {"beta": 0.0}, "grpo": {"reward": no_difference, "beta": 0.0, "steps_per_generation": 2}}[how]
    per_device = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    for callback in (True, False):
        trainer = make_trainer(how, tmp_path, peft_config=config, max_grad_norm=0.0, **per_device, **nothing)
        trainer.add_callback(kept := Gradients())
        trainer.add_callback(BalanceScale(trainer)) if callback else trainer.model.set_balance_scale(1 / 2)
        trainer.model.register_forward_pre_hook(kept.see, with_kwargs=True)
        trainer.train()
        assert len(kept.batches) == 2
        expected = [balance_gradient(kind, tmp_path, batch, fields) for batch in kept.batches]
        found = {name: grad for name, grad in kept.found.items() if "moelora_router" in name}
        assert found
        for name, grad in found.items():
            torch.testing.assert_close(grad, sum(e[name] for e in expected) / 2, rtol=1e-4, atol=1e-7)
            assert grad.abs().sum() > 0


def no_difference(completion_ids, **columns):
    return [1.0 for _ in completion_ids]


def balance_gradient(kind, tmp_path, batch, fields):
    """What the balance loss of one batch adds to the gradient of the model's own mean loss."""
    found = []
    for coefficient in (fields["balance_coefficient"], 0.0):
        torch.manual_seed(42)  # TRL's
        model = make_model("llama")
        torch.manual_seed(42)
        config = config_of(kind, tmp_path, **fields | {"balance_coefficient": coefficient})
        model = get_peft_model(model, config).train()
        model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss.backward()
        found.append(adapter_gradients(model))
    return {name: grad - found[1][name] for name, grad in found[0].items()}


# -- packing ----------------------------------------------------------------------------------------------------------

PACKED = {
    "bfd": {"packing": True, "max_length": 64},
    "padding_free": {"padding_free": True, "max_length": None},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 8},
}


@pytest.mark.parametrize("packed", PACKED)
def test_packing_is_refused_where_the_task_of_a_row_chooses_the_experts(packed, tmp_path):
    trainer = make_trainer("sft", tmp_path, peft_config=config_of("moelora", tmp_path), **PACKED[packed])
    # wrapped rows look like rows of one text: only that they have no task can be seen
    why = (
        "Packing mixes tasks and drops it"
        if packed == "wrapped"
        else "that mixes tasks within a row.*no task was given"
    )
    with pytest.raises(ValueError, match=why):
        trainer.train()
    assert trainer.state.global_step == 0

    trainer = make_trainer("sft", tmp_path, peft_config=config_of("moelora", tmp_path), **PACKED[packed])
    trainer.model.set_task("rad")
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_a_default_task_is_no_reason_to_train_on_packed_rows(tmp_path):
    config = config_of("moelora", tmp_path, default_task="rad")
    for packed in ("bfd", "padding_free"):
        trainer = make_trainer("sft", tmp_path, peft_config=config, **PACKED[packed])
        with pytest.raises(ValueError, match=r"packed one after the other.*choose it with model.set_task"):
            trainer.train()
    trainer = make_trainer("sft", tmp_path, peft_config=config, **PACKED["wrapped"])
    with pytest.warns(UserWarning, match="every row is routed as default_task='rad'.*Packing mixes tasks"):
        trainer.train()


def test_rows_that_were_packed_cannot_be_given_the_tasks_of_their_texts(tmp_path):
    model = get_peft_model(make_model("llama"), config_of("moelora", tmp_path)).eval()
    packed = {"input_ids": torch.tensor([[4, 5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    for tasks in (["icd", "rad"], torch.tensor([0, 1])):
        with pytest.raises(ValueError, match=r"mixes tasks within a row.*2 were given for 1 row"):
            model(**packed, task_ids=tasks)
    with pytest.raises(ValueError, match=r"mixes tasks within a row.*no task was given"):
        model(**packed)
    assert model(**packed, task_ids="icd").logits.shape[:2] == (1, 5)
    with model.disable_adapter():
        model(**packed)
    plain = {"input_ids": packed["input_ids"].repeat(2, 1), "position_ids": torch.arange(5).repeat(2, 1)}
    with pytest.raises(ValueError, match="task_ids has 3 entries and the batch has 2 rows"):
        model(**plain, task_ids=["icd", "rad", "def"])
    one = get_peft_model(make_model("llama"), config_of("moelora", tmp_path, num_experts=1))
    one.train()(**packed, labels=packed["input_ids"]).loss.backward()  # has no use for tasks


BY_TOKEN = ["molora", "medmoe", "at_moe"]
ONE_KIND_EACH = [("bfd", "molora"), ("padding_free", "medmoe"), ("bfd", "at_moe")]


@pytest.mark.parametrize(("packed", "kind"), pairs_of(["bfd", "padding_free"], BY_TOKEN, *ONE_KIND_EACH))
def test_routers_by_token_train_on_packed_rows_as_on_padded_ones(packed, kind, tmp_path):
    fields = {} if kind == "at_moe" else {"balance_loss": {"cv2": 0.5, "z": 0.1}}
    found = []
    for settings in ({}, PACKED[packed]):
        config = config_of(kind, tmp_path, **fields)
        trainer = make_trainer("sft", tmp_path, peft_config=config, max_steps=1, max_grad_norm=0.0, **settings)
        trainer.add_callback(kept := Gradients())
        trainer.train()
        found.append((losses(trainer), kept.found))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-4, atol=1e-6)
    assert any("moelora_router" in name for name in found[0][1])


@pytest.mark.parametrize("packed", ["bfd", "padding_free"])
def test_packing_is_refused_where_the_prompt_of_a_row_chooses_the_experts(packed, tmp_path):
    trainer = make_trainer("sft", tmp_path, peft_config=config_of("at_moe by prompt", tmp_path), **PACKED[packed])
    with pytest.raises(ValueError, match="Rows hold several texts.*router_input='prompt' has one decision for a row"):
        trainer.train()
    assert trainer.state.global_step == 0
