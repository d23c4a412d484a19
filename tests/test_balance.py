"""Balance losses reach the gradient: once, to the scale of the micro-batch's task loss, and never the loss's value."""

import socket

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from helpers import TARGETS, TASKS, WORD, adapter_gradients, checkpointing, enable_checkpointing, routed_layers, since
from peft import get_peft_model
from tiny_models import TASK_TYPES, VOCAB, make_inputs, make_model
from tiny_text import make_tokenizer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from peft_moe import MedMoeLoraConfig, MoLoraConfig
from peft_moe.callbacks import BalanceScale
from peft_moe.losses import BALANCE_LOSSES, Routed
from peft_moe.training import TaskCollator

ARCHITECTURES = ["llama", "gpt2", "opt", "bert", "t5", "vit"]
KINDS = ["molora", "medmoe"]
GROUPS = {"first": ["icd"], "second": ["rad", "def"]}
# Experts 0 and 1 are for icd, 2 and 3 for the others; rows of the tests have the tasks def, icd, rad.
IDS = torch.tensor([2, 0, 1])
MATCHES = torch.tensor([[False, False, True, True], [True, True, False, False], [False, False, True, True]])
LOSSES = {
    "molora": ["switch", "variance", "cv2", "z", "localized"],
    "medmoe": ["variance", "cv2", "z"],
}
RTOL = 1e-5
trainer_counts = since("5.15", "counted a label less in each row of an encoder-decoder model")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state per process, with the precision that the first to ask for it wanted."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make(name="llama", kind="molora", **changes):
    """A model in training with 4 experts per layer, whose adapter adds nothing (B = 0) and has balance losses."""
    fields = {
        "task_type": TASK_TYPES[name],
        "target_modules": TARGETS[name],
        "num_experts": 4,
        "lora_dropout": 0.0,
        "balance_loss": {"cv2": 0.5, "z": 0.03},
    }
    own = {"r": 4} if kind == "molora" else {"expert_ranks": [2, 4], "expert_schedule": "uniform"}
    torch.manual_seed(0)
    config = (MoLoraConfig if kind == "molora" else MedMoeLoraConfig)(**{**fields, **own, **changes})
    return without_dropout(get_peft_model(make_model(name), config).train())


def without_dropout(model):
    for module in model.modules():
        for field, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in field or (field == "p" and isinstance(module, nn.Dropout))):
                setattr(module, field, 0.0)
    return model


def padded_inputs(name="llama", *, seed=0, batch=3, seq=6):
    """A batch whose rows have different lengths; for T5 other lengths in the labels."""
    inputs = make_inputs(name, batch=batch, seq=seq, seed=seed)
    if name == "vit":
        return inputs
    inputs["attention_mask"] = (torch.arange(seq) < seq - torch.arange(batch).unsqueeze(1)).long()
    if name == "t5":
        inputs["labels"][0, 2:] = -100
    elif name != "bert":
        inputs["labels"][inputs["attention_mask"] == 0] = -100
    return inputs


def router_gradients(model):
    return {key: grad for key, grad in adapter_gradients(model).items() if "moelora_router" in key}


def assert_same(found, expected, rtol=RTOL):
    """Relative to the norm of each tensor."""
    assert found.keys() == expected.keys()
    assert found
    for key, value in expected.items():
        torch.testing.assert_close(
            (found[key] - value).norm(), torch.zeros(()), rtol=0, atol=rtol * float(value.norm()) + 1e-11,
            msg=lambda message, key=key: f"{key}: {message}",
        )  # fmt: skip


# the reference: scores that the gates of an adapter without balance losses return, and autograd alone


def by_hand(model, inputs, losses, *, matches=None):
    """The task loss and the balance loss of a model whose adapter has `balance_loss="none"`."""
    assert not next(iter(model.peft_config.values())).coefficients
    scores = {}
    hooks = [
        router.gate.register_forward_hook(lambda _gate, _x, out, key=key: scores.update({key: out}))
        for key, router in model.routers()
    ]
    loss = model(**inputs).loss
    for hook in hooks:
        hook.remove()
    found = []
    for key, values in scores.items():
        mask = mask_by_hand(model, key, inputs)
        rows = values.view(len(next(iter(inputs.values()))), -1, values.shape[-1])  # OPT's feed-forward is (n * s, in)
        dense = "MEDMOELORA" in {config.peft_type for config in model.peft_config.values()}
        smallest = rows.topk(rows.shape[-1] if dense else 2, dim=-1).values[..., -1:]
        weights = rows.masked_fill(rows < smallest, -torch.inf).softmax(-1)
        found.append(Routed(rows, weights, mask, matches, int(dense)))
    delta = {"localized": {"delta": 0.1}}
    means = {
        loss: torch.stack([BALANCE_LOSSES[loss](routed, **delta.get(loss, {})) for routed in found]).mean()
        for loss in losses
    }
    return loss, sum(coefficient * means[name] for name, coefficient in losses.items())


def mask_by_hand(model, key, inputs):
    if "attention_mask" not in inputs:
        return None
    if key.startswith("decoder.") and not key.endswith(("EncDecAttention.k", "EncDecAttention.v")):
        return inputs["labels"] != -100
    return inputs["attention_mask"].bool()


def balance_gradients(inputs, name="llama", kind="molora", losses=None, **changes):
    """Router gradients of the balance loss alone."""
    model = make(name, kind, **{**changes, "balance_loss": "none"})
    by_hand(model, inputs, losses or {"cv2": 0.5, "z": 0.03})[1].backward()
    return router_gradients(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_at_the_start_the_routers_gradient_is_that_of_the_balance_loss_alone(name, kind):
    """B = 0, so that the task loss gives the routers none."""
    inputs = padded_inputs(name)
    model = make(name, kind)
    model(**inputs).loss.backward()
    gradients = router_gradients(model)
    assert_same(gradients, balance_gradients(inputs, name, kind))
    assert all(grad.norm() > 1e-6 for grad in gradients.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_gradients_are_those_of_task_loss_plus_balance_loss(name, kind):
    """Banks too: what a layer adds moves the routers after it."""
    inputs, losses = padded_inputs(name), {"cv2": 0.5, "z": 0.03}
    model, none = (make(name, kind, init_lora_weights=False, balance_loss=loss) for loss in (losses, "none"))
    model(**inputs).loss.backward()
    task, balance = by_hand(none, inputs, losses)
    (task + balance).backward()
    assert_same(adapter_gradients(model), adapter_gradients(none))
    assert torch.isclose(model.balance_loss, balance, rtol=RTOL)


@pytest.mark.parametrize(("kind", "loss"), [(kind, loss) for kind in KINDS for loss in LOSSES[kind]])
def test_each_loss_comes_with_its_coefficient(kind, loss):
    inputs, losses = padded_inputs(), {loss: 0.7}
    labels = {"tasks": TASKS, "expert_groups": GROUPS} if loss == "localized" else {}
    model = make(kind=kind, balance_loss=loss, balance_coefficient=0.7, **labels)
    none = make(kind=kind, balance_loss="none")
    model(**inputs, **({"task_ids": IDS} if labels else {})).loss.backward()
    balance = by_hand(none, inputs, losses, matches=MATCHES if labels else None)[1]
    balance.backward()
    assert_same(router_gradients(model), router_gradients(none))
    assert torch.isclose(model.balance_loss, balance, rtol=RTOL)


def test_layers_with_one_expert_do_not_count_as_routed():
    inputs = padded_inputs()
    recipe = {"target_modules": None, "num_experts_pattern": None}  # a plain LoRA in attention
    model = make(**recipe)
    model(**inputs).loss.backward()
    assert len(list(model.routers())) == 6
    assert len(routed_layers(model)) == 14
    assert_same(router_gradients(model), balance_gradients(inputs, **recipe))


# every way to train


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimiser gets."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = adapter_gradients(getattr(model, "module", model))  # DDP's


def train_a_step(how, model, batches, folder, *, collator=default_data_collator, steps=None, callback=None, **settings):
    """Adapter gradients of one optimiser step over micro-batches: a loop, transformers' Trainer or TRL's SFTTrainer."""
    if how == "loop":
        if (again := settings.get(f"{WORD}_checkpointing_kwargs")) is not None:
            enable_checkpointing(model.get_base_model(), **again)
        for batch in batches:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.get("bf16", False)):
                loss = model(**batch).loss / len(batches)
            loss.backward()
        return adapter_gradients(model)
    rows = [
        {key: value[i].tolist() for key, value in batch.items()}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]
    world = int(settings.pop("world", 1))
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(batches[0]["labels"]),
        "gradient_accumulation_steps": steps or len(batches) // world,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **settings,
    }
    more = {"train_dataset": Dataset.from_list(rows), "data_collator": collator, "callbacks": [kept := Gradients()]}
    if how == "trainer":
        trainer = Trainer(model, TrainingArguments(**arguments), **more)
    else:
        from trl import SFTConfig, SFTTrainer

        arguments.setdefault(f"{WORD}_checkpointing", False)  # TRL's default is True
        config = SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = SFTTrainer(model, config, processing_class=make_tokenizer(), **more)
    if callback is not None:
        trainer.add_callback(callback(trainer))
    trainer.train()
    return kept.found


def only_routers(gradients):
    return {key: grad for key, grad in gradients.items() if "moelora_router" in key}


WAYS = ["loop", "trainer", "sft"]


@pytest.mark.parametrize(("steps", "kind"), [(1, "molora"), (2, "molora"), (4, "molora"), (2, "medmoe")])
@pytest.mark.parametrize("how", WAYS)
def test_repeats_of_one_micro_batch_add_up_to_its_own_gradient(how, steps, kind, tmp_path):
    inputs = padded_inputs()
    gradients = train_a_step(how, make(kind=kind), [inputs] * steps, tmp_path)
    assert_same(only_routers(gradients), balance_gradients(inputs, kind=kind))


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", pytest.param("t5", marks=trainer_counts), "vit"])
def test_repeats_of_one_micro_batch_add_up_in_trainer_for_every_loss_that_models_have(name, tmp_path):
    inputs = padded_inputs(name)
    gradients = train_a_step("trainer", make(name), [inputs] * 2, tmp_path)
    assert_same(only_routers(gradients), balance_gradients(inputs, name))


def uneven_batches(name="llama"):
    """Two micro-batches, and their shares of the step's label tokens by Trainer's own count."""
    first, second = padded_inputs(name, seed=1), padded_inputs(name, seed=2)
    second["labels"][:, 2:] = -100
    # A first label has nothing before it that could predict it; of GPT-2's class Trainer does not know that.
    start = 1 if name == "llama" else 0
    counts = [int((batch["labels"][:, start:] != -100).sum()) for batch in (first, second)]
    return [first, second], [count / sum(counts) for count in counts]


def weighted(batches, shares, **model):
    """Sum of the micro-batches' own balance gradients."""
    own = [balance_gradients(batch, **model) for batch in batches]
    return {key: sum(share * grads[key] for share, grads in zip(shares, own, strict=True)) for key in own[0]}


@pytest.mark.parametrize(
    ("how", "name"),
    [("trainer", "llama"), ("trainer", "gpt2"), pytest.param("trainer", "t5", marks=trainer_counts), ("sft", "llama")],
)
def test_trainers_weigh_a_micro_batch_by_its_share_of_the_steps_label_tokens(how, name, tmp_path):
    batches, shares = uneven_batches(name)
    if name == "llama":  # rows of 6, 5 and 4 labels and of 2, 2 and 2, of which the first does not count
        assert shares == [12 / 15, 3 / 15]
    gradients = only_routers(train_a_step(how, make(name), batches, tmp_path))
    assert_same(gradients, weighted(batches, shares, name=name))


def test_a_loop_that_takes_the_mean_over_micro_batches_weighs_them_evenly(tmp_path):
    batches, _ = uneven_batches()
    gradients = only_routers(train_a_step("loop", make(), batches, tmp_path))
    assert_same(gradients, weighted(batches, [1 / 2, 1 / 2]))


CHECKPOINTED = [
    ("loop", "llama"), ("loop", "gpt2"), ("loop", "opt"), ("loop", "bert"), ("loop", "t5"),
    ("trainer", "llama"), ("trainer", "t5"), ("sft", "llama"), ("sft", "gpt2"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "name"), CHECKPOINTED)
def test_checkpointing_of_either_kind_changes_no_gradient(how, name, tmp_path):
    """With B other than 0, so that gradients of banks are compared too."""
    inputs = padded_inputs(name)
    settings = [{}, checkpointing(use_reentrant=True), checkpointing(use_reentrant=False)]
    plain, *again = (
        train_a_step(how, make(name, init_lora_weights=False), [inputs] * 2, tmp_path, **more) for more in settings
    )
    for gradients in again:
        assert_same(gradients, plain)


@pytest.mark.parametrize("use_reentrant", [None, True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_two_forwards_before_one_backward_keep_a_loss_each(kind, use_reentrant):
    first, second = padded_inputs(seed=1), padded_inputs(seed=2)
    model = make(kind=kind)
    if use_reentrant is not None:
        enable_checkpointing(model.get_base_model(), use_reentrant)
    (3 * model(**first).loss + model(**second).loss / 4).backward()
    assert_same(router_gradients(model), weighted([first, second], [3, 1 / 4], kind=kind))


@pytest.mark.parametrize("how", WAYS)
def test_under_bf16_autocast_accumulation_still_changes_nothing(how, tmp_path):
    inputs = padded_inputs()
    one, two, four = (
        only_routers(train_a_step(how, make(), [inputs] * steps, tmp_path / str(steps), bf16=True))
        for steps in (1, 2, 4)
    )
    assert_same(two, one)
    assert_same(four, one)
    assert {grad.dtype for grad in one.values()} == {torch.float32}
    assert_same(
        one, balance_gradients(inputs), rtol=0.02
    )  # x has 8 bits of mantissa; the routers themselves are float32


def test_a_loss_scaler_scales_the_balance_loss_with_the_task_loss():
    inputs = padded_inputs()
    model, scaled = make(init_lora_weights=False), make(init_lora_weights=False)
    model(**inputs).loss.backward()
    (scaled(**inputs).loss * 1024).backward()
    assert_same({key: grad / 1024 for key, grad in adapter_gradients(scaled).items()}, adapter_gradients(model))


def compile_whole(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def compile_blocks(model):
    """As accelerate's regional compilation does."""
    for block in model.get_base_model().model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    return model


COMPILED = [("molora", compile_whole), ("medmoe", compile_whole), ("molora", compile_blocks)]
FEW = {"init_lora_weights": False, "target_modules": ["gate_proj"]}  # compiling takes seconds


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at it itself
@pytest.mark.parametrize(("kind", "compiled"), COMPILED)
def test_a_compiled_model_has_no_graph_breaks_and_the_same_gradients(kind, compiled):
    inputs = padded_inputs()
    eager, model = make(kind=kind, **FEW), make(kind=kind, **FEW)
    loss = eager(**inputs).loss
    loss.backward()
    same = compiled(model)(**inputs).loss
    torch.testing.assert_close(same, loss)
    same.backward()
    assert_same(adapter_gradients(model), adapter_gradients(eager))
    torch.testing.assert_close(model.balance_loss, eager.balance_loss)
    assert not model.balance_loss.requires_grad


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at it itself
def test_compiled_blocks_refuse_a_loss_that_is_computed_outside():
    model = compile_blocks(make(**FEW))
    with pytest.raises(RuntimeError, match="adds its balance loss to the loss it returns, and this call returns none"):
        loss_of_logits(model, padded_inputs())


# two processes


WORLD = 2
RANKS = [1, 2]  # seeds of their data


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_rank(rank, port, folder):
    """A process of the two: what it finds is saved by rank 0."""
    import os

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo")
    found = {}
    for find_unused in (True, False):
        model = make(init_lora_weights=False)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
        wrapped(**padded_inputs(seed=RANKS[rank])).loss.backward()
        found["ddp", find_unused] = adapter_gradients(model)
    batches, _ = uneven_batches()
    for how in ("trainer", "sft"):
        repeats = [*batches, *batches]  # two micro-batches on each rank
        found[how] = only_routers(train_a_step(how, make(), repeats, folder, world=WORLD))
    torch.distributed.barrier()
    if rank == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Started once for all tests, since importing everything takes most of their time."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (free_port(), folder), nprocs=WORLD)
    return torch.load(folder / "found.pt")


@pytest.mark.long
@pytest.mark.parametrize("find_unused", [True, False])
def test_under_ddp_the_gradient_is_the_mean_of_the_ranks_own(two_processes, find_unused):
    own = []
    for seed in RANKS:
        model = make(init_lora_weights=False, balance_loss="none")
        task, balance = by_hand(model, padded_inputs(seed=seed), {"cv2": 0.5, "z": 0.03})
        (task + balance).backward()
        own.append(adapter_gradients(model))
    assert_same(two_processes["ddp", find_unused], {key: (own[0][key] + own[1][key]) / 2 for key in own[0]})


@pytest.mark.parametrize("how", ["trainer", "sft"])
def test_trainers_weigh_a_rank_by_its_share_of_the_steps_label_tokens(two_processes, how):
    batches, shares = uneven_batches()
    assert_same(two_processes[how], weighted(batches, shares))


# padding

# An input with k tokens of padding, at either end; where the model needs to be told positions, they are given.
POSITIONS = ["gpt2", "bert"]


def pad_inputs(name, inputs, side, k=3):
    n, s = inputs["input_ids"].shape
    garbage = torch.randint(3, VOCAB, (n, k), generator=torch.Generator().manual_seed(9))

    def join(tokens, padding):
        return torch.cat([padding, tokens] if side == "left" else [tokens, padding], dim=1)

    padded = {
        "input_ids": join(inputs["input_ids"], garbage),
        "attention_mask": join(inputs["attention_mask"], torch.zeros_like(garbage)),
        "labels": inputs["labels"],
    }
    if name not in ("bert", "t5"):
        labels = inputs["labels"].clone()
        labels[:, 0] = -100  # has nothing before it, and padding on the left would
        inputs["labels"] = labels
        padded["labels"] = join(labels, torch.full_like(garbage, -100))
    if name in POSITIONS:
        padded["position_ids"] = join(torch.arange(s).expand(n, s), torch.zeros_like(garbage))
    return padded, slice(k, None) if side == "left" else slice(s)


SIDES = [(name, side) for name in ("llama", "gpt2", "opt", "t5") for side in ("left", "right")] + [("bert", "right")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "side"), SIDES)
def test_padding_changes_neither_outputs_nor_balance_loss_nor_gradients(name, side, kind):
    inputs = make_inputs(name)
    padded, real = pad_inputs(name, inputs, side)
    found = []
    for batch in (inputs, padded):
        model = make(name, kind, init_lora_weights=False)
        outputs = model(**batch)
        outputs.loss.backward()
        logits = outputs.logits[:, real] if batch is padded and name not in ("bert", "t5") else outputs.logits
        found.append((logits.detach(), model.balance_loss, adapter_gradients(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=RTOL, atol=0)
    assert_same(found[1][2], found[0][2], rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_of_bert_changes_its_pooled_token_but_no_balance_loss(kind):
    """With B = 0, so that the routers have no other gradient."""
    inputs = make_inputs("bert")
    padded, _ = pad_inputs("bert", inputs, "left")
    model = make("bert", kind)
    model(**padded).loss.backward()
    # attention adds up in another order over padded rows, which some CPUs show in the last digits
    assert_same(router_gradients(model), balance_gradients(inputs, "bert", kind), rtol=1e-4)


@pytest.mark.parametrize("given", ["labels", "decoder_attention_mask"])
def test_padding_of_a_decoder_does_not_count_either(given):
    """T5 makes its decoder's inputs from the labels, unless it is given both."""
    inputs, k = make_inputs("t5"), 3
    longer = torch.full((3, k), -100)
    padded = {**inputs, "labels": torch.cat([inputs["labels"], longer], dim=1)}
    if given == "decoder_attention_mask":
        shifted = torch.cat([torch.zeros(3, 1, dtype=torch.long), inputs["labels"][:, :-1]], dim=1)
        padded["decoder_input_ids"] = torch.cat([shifted, longer.abs()], dim=1)  # token 100 is garbage
        padded["decoder_attention_mask"] = (torch.arange(5 + k) < 5).long().expand(3, -1)
    found = []
    for batch in (inputs, padded):
        model = make("t5", init_lora_weights=False)
        model(**batch).loss.backward()
        found.append((model.balance_loss, adapter_gradients(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=RTOL, atol=0)
    assert_same(found[1][1], found[0][1], rtol=1e-4)


# what is reported


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_of_a_call_is_the_task_loss_bit_by_bit(name, training, kind):
    inputs = padded_inputs(name)
    model, none = (make(name, kind, init_lora_weights=False, balance_loss=loss) for loss in ({"z": 5.0}, "none"))
    assert torch.equal(model.train(training)(**inputs).loss, none.train(training)(**inputs).loss)
    assert none.balance_loss is None
    assert (model.balance_loss is not None) == training  # outside of training there is none to report
    assert not training or model.balance_loss > 1


def test_the_balance_loss_is_that_of_the_last_training_call():
    model = make(balance_loss="z")
    assert model.balance_loss is None
    found = []
    for seed in (1, 2):
        model(**padded_inputs(seed=seed))
        found.append(model.balance_loss)
    assert found[0] != found[1]
    with torch.no_grad():
        model(**padded_inputs(seed=3))
    model.eval()(**padded_inputs(seed=3))
    assert model.balance_loss == found[1]
    assert not model.balance_loss.requires_grad


@pytest.mark.parametrize("label_smoothing_factor", [0.0, 0.1])
def test_the_evaluation_loss_of_trainer_is_the_task_loss(label_smoothing_factor, tmp_path):
    rows = Dataset.from_dict({key: value.tolist() for key, value in padded_inputs().items()})
    losses = []
    for loss in ({"z": 5.0}, "none"):
        arguments = TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            label_smoothing_factor=label_smoothing_factor,
        )
        model = make(init_lora_weights=False, balance_loss=loss)
        losses.append(Trainer(model, arguments, eval_dataset=rows, data_collator=default_data_collator).evaluate())
    assert losses[0]["eval_loss"] == losses[1]["eval_loss"]


# losses that are computed outside of the model


OUTSIDE = "computed outside of the model.*added to each backward with weight 1.*set_balance_scale"


def loss_of_logits(model, inputs):
    """The same as the model's own, from its logits."""
    labels = inputs["labels"]
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_with_a_loss_from_logits_the_balance_loss_has_weight_1_and_a_warning_says_so_once():
    model, inputs = make(), padded_inputs()
    loss = loss_of_logits(model, inputs)
    with pytest.warns(UserWarning, match=OUTSIDE):
        (loss / 8).backward()
    assert_same(router_gradients(model), balance_gradients(inputs))
    model.zero_grad()
    loss_of_logits(model, inputs).backward()  # once is enough
    assert_same(router_gradients(model), balance_gradients(inputs))


def test_a_balance_scale_makes_a_loss_from_logits_right_under_accumulation():
    model, inputs = make(), padded_inputs()
    model.set_balance_scale(1 / 4)
    for _ in range(4):
        (loss_of_logits(model, inputs) / 4).backward()
    assert_same(router_gradients(model), balance_gradients(inputs))
    model.zero_grad()
    model(**inputs).loss.backward()  # the model's own loss needs no help
    assert_same(router_gradients(model), balance_gradients(inputs))


@pytest.mark.parametrize("how", ["trainer", "sft"])
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`:FutureWarning")
def test_label_smoothing_needs_a_balance_scale_and_says_so(how, tmp_path):
    inputs = padded_inputs()
    with pytest.warns(UserWarning, match=OUTSIDE):
        gradients = train_a_step(how, make(), [inputs] * 2, tmp_path, label_smoothing_factor=0.1)
    expected = balance_gradients(inputs)
    assert_same(only_routers(gradients), {key: 2 * grad for key, grad in expected.items()})
    model = make()
    model.set_balance_scale(1 / 2)
    assert_same(only_routers(train_a_step(how, model, [inputs] * 2, tmp_path, label_smoothing_factor=0.1)), expected)


@pytest.mark.parametrize("how", ["trainer", "sft"])
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`:FutureWarning")
def test_a_callback_tells_the_trainer_s_steps_also_at_the_end_of_an_epoch_and_for_this_run_only(how, tmp_path):
    inputs = padded_inputs()
    expected = balance_gradients(inputs)
    for steps in (4, 2, 1):  # micro-batches there are, of the 4 that a step may have
        model = make()
        found = train_a_step(
            how, model, [inputs] * steps, tmp_path, steps=4, callback=BalanceScale, label_smoothing_factor=0.1
        )
        assert_same(only_routers(found), expected)
        assert model.context.outside.usual is None


def weighted_log_probs(model, inputs, factors):
    """A loss made of TRL's log-probabilities, which the model returns beside its loss."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model.get_base_model())
    outputs = model(**inputs, fused_lm_head=True)
    return (outputs.log_probs * outputs.label_mask * factors).sum()


NOT_LIKELIHOODS = {  # factors of log-probabilities (3, 5)
    "preference": torch.tensor([[-1.0], [1.0], [-1.0]]),
    "advantages of one sign": torch.tensor([[-1.0], [-2.0], [-0.5]]),
    "raised by their probability": -torch.rand(3, 5, generator=torch.Generator().manual_seed(0)),
    "all lowered": torch.ones(3, 1),
}


@pytest.mark.parametrize("factors", NOT_LIKELIHOODS.values(), ids=NOT_LIKELIHOODS)
def test_a_loss_of_log_probabilities_that_is_no_likelihood_has_the_scale_that_was_set_or_a_warning(factors):
    model, inputs = make(), padded_inputs()
    with pytest.warns(UserWarning, match=OUTSIDE):
        weighted_log_probs(model, inputs, factors).backward()
    expected = balance_gradients(inputs)
    assert_same(router_gradients(model), expected)
    model = make()
    model.set_balance_scale(1 / 4)
    weighted_log_probs(model, inputs, factors).backward()
    assert_same(router_gradients(model), {key: grad / 4 for key, grad in expected.items()})


def test_a_scale_that_was_set_also_holds_for_a_likelihood_made_of_log_probabilities():
    inputs = padded_inputs()
    tokens = int((inputs["labels"][:, 1:] != -100).sum())
    for chosen, scale in ((None, 1.0), (0.25, 0.25)):
        model = make()
        if chosen is not None:
            model.set_balance_scale(chosen)
        weighted_log_probs(model, inputs, torch.tensor(-1 / tokens)).backward()
        assert_same(router_gradients(model), {key: scale * g for key, g in balance_gradients(inputs).items()})


def test_a_part_of_the_model_called_by_itself_says_that_its_balance_loss_is_lost():
    model, inputs = make(), padded_inputs()
    del inputs["labels"]
    with pytest.warns(UserWarning, match="run in training by a call of a part of the model.*call the adapted model"):
        model.get_base_model().model(**inputs).last_hidden_state.square().mean().backward()


def test_generating_in_training_mode_charges_nothing():
    model, inputs = make(), padded_inputs()
    model(**inputs).loss.backward()
    before = model.balance_loss
    del inputs["labels"]
    model.generate(**inputs, max_new_tokens=2, pad_token_id=0)
    assert torch.equal(model.balance_loss, before)


@pytest.mark.parametrize("mode", list(CheckpointImpl))
def test_torch_s_checkpoint_wrapper_sees_the_call_of_its_own_forward(mode):
    """What FSDP's activation checkpointing uses; two calls before one backward are where it would go wrong."""
    first, second = padded_inputs(seed=0), padded_inputs(seed=1)
    found = []
    for wrapped in (False, True):
        model = make(init_lora_weights=False)
        model.enable_input_require_grads()
        if wrapped:
            layers = model.get_base_model().model.layers
            for i, layer in enumerate(layers):
                layers[i] = checkpoint_wrapper(layer, checkpoint_impl=mode)
        losses = [model(**inputs, use_cache=False).loss for inputs in (first, second)]
        (losses[0] + 3 * losses[1]).backward()
        found.append({k.replace("_checkpoint_wrapped_module.", ""): g for k, g in router_gradients(model).items()})
    assert_same(found[1], found[0])


@pytest.mark.parametrize("scale", [-1, float("nan"), True, "half"])
def test_a_balance_scale_is_a_number_from_0_up(scale):
    with pytest.raises(ValueError, match=r"scale=.* is the factor on balance losses; give a number from 0 up"):
        make().set_balance_scale(scale)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_returns_a_tensor_gets_its_balance_loss_too(kind):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    common = {"num_experts": 4, "lora_dropout": 0.0, "target_modules": ["0", "2"]}
    config = (
        MoLoraConfig(balance_loss="z", **common) if kind == "molora" else MedMoeLoraConfig(balance_loss="z", **common)
    )
    model, x = get_peft_model(base, config).train(), torch.randn(5, 6)
    out = model(x)
    assert torch.equal(out, base(x))
    with pytest.warns(UserWarning, match=OUTSIDE):
        out.square().mean().backward()
    found = router_gradients(model)
    model.zero_grad()
    with torch.no_grad():
        hidden = {"0": x, "2": base[:2](x)}  # B = 0: nothing flows back to the first layer
    terms = [router.gate(hidden[key]).logsumexp(-1).square().mean() for key, router in model.routers()]
    (0.01 * torch.stack(terms).mean()).backward()
    assert_same(found, router_gradients(model))


def test_a_model_that_returns_a_tuple_gets_its_balance_loss_too():
    model, inputs = make(), padded_inputs()
    outputs = model(**inputs, return_dict=False)
    assert isinstance(outputs, tuple)
    (outputs[0] / 2).backward()
    assert_same(router_gradients(model), {key: grad / 2 for key, grad in balance_gradients(inputs).items()})


# losses that need labels or have no router


LOCALIZED = {"balance_loss": "localized", "balance_coefficient": 0.7, "tasks": TASKS, "expert_groups": GROUPS}
GENERAL = {
    "balance_loss": "none",
    "base_expert_mode": "general",
    "base_coefficient": 0.7,
    "tasks": TASKS,
    "general_tasks": ["def"],
    "num_experts": 3,
}
# experts: the base expert, for def, and three others, for icd and rad
GENERAL_MATCHES = torch.tensor([[True, False, False, False], [False, True, True, True], [False, True, True, True]])
# config, matching experts by task, and a config without loss whose layers are the same
LABELLED = {
    "molora": (LOCALIZED, MATCHES, {}),
    "medmoe": (LOCALIZED, MATCHES, {}),  # the base expert takes no part
    "medmoe-general": (
        GENERAL,
        GENERAL_MATCHES,
        {"base_expert_mode": "regularized", "base_coefficient": 0.0, "num_experts": 3},
    ),
}


def localized_gradients(case, inputs):
    _, matches, silent = LABELLED[case]
    none = make(kind=case.split("-")[0], **silent, balance_loss="none")
    by_hand(none, inputs, {"localized": 0.7}, matches=matches)[1].backward()
    return router_gradients(none)


@pytest.mark.parametrize("case", LABELLED)
def test_the_localized_loss_needs_labels_in_training_and_only_there(case):
    model, inputs = make(kind=case.split("-")[0], **LABELLED[case][0]), padded_inputs()
    with pytest.raises(ValueError, match="compares experts with the rows' groups, and no task_ids were given"):
        model(**inputs)
    model(**inputs, task_ids=IDS).loss.backward()
    assert_same(router_gradients(model), localized_gradients(case, inputs))
    model.eval()(**inputs)
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    model.generate(**prompt, max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("how", ["trainer", "sft"])
@pytest.mark.parametrize("case", LABELLED)
def test_labels_reach_the_localized_loss_through_a_task_collator(case, how, tmp_path):
    inputs = padded_inputs()
    model = make(kind=case.split("-")[0], **LABELLED[case][0])
    batches, collator = [inputs | {"task_ids": IDS}] * 2, TaskCollator(default_data_collator)
    gradients = train_a_step(how, model, batches, tmp_path, collator=collator)
    assert_same(only_routers(gradients), localized_gradients(case, inputs))


REGULARIZED = {"base_expert_mode": "regularized", "base_coefficient": 3.0, "balance_loss": "none"}
HOWS = [("loop", None), *((how, use_reentrant) for how in WAYS for use_reentrant in (True, False))]


@pytest.mark.parametrize(("how", "use_reentrant"), HOWS)
def test_the_anchor_of_a_base_expert_reaches_the_gradient_of_its_matrices(how, use_reentrant, tmp_path):
    """`c · mean over layers of ‖ΔW_base‖²` by the explicit product; B is not 0, since there its gradient is 0."""
    inputs = padded_inputs()
    settings = {} if use_reentrant is None else checkpointing(use_reentrant)
    model = make(kind="medmoe", init_lora_weights=False, **REGULARIZED)
    found = train_a_step(how, model, [inputs] * 2, tmp_path, **settings)
    free = make(kind="medmoe", init_lora_weights=False, **{**REGULARIZED, "base_coefficient": 0.0})
    anchors = []
    for layer in routed_layers(free):
        bank = layer.moelora_bank["default"]
        delta = 2.0 * bank.lora_B.weight[:, :2] @ bank.lora_A.weight[:2]  # rank 2, alpha 2r
        anchors.append(delta.square().sum())
    anchor = 3.0 * torch.stack(anchors).mean()
    (free(**inputs).loss + anchor).backward()
    expected = adapter_gradients(free)
    assert_same(found, expected)
    torch.testing.assert_close(model.balance_loss, anchor, rtol=RTOL, atol=0)
    free.zero_grad()
    free(**inputs).loss.backward()
    without = adapter_gradients(free)
    moved = {key for key in expected if not torch.allclose(expected[key], without[key], rtol=1e-3)}
    assert moved == {key for key in expected if "moelora_bank" in key}  # the anchor is what this test is about


# and it trains


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["trainer", "sft"])
def test_training_moves_every_parameter_of_every_router(how, kind, tmp_path):
    """By the task loss alone: in MING's code routers stay frozen unless the script thaws them."""
    model = make(kind=kind, init_lora_weights=False, balance_loss="none")
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_a_step(how, model, [padded_inputs()], tmp_path)
    routers = {name for name in before if "moelora_router" in name}
    parts = {"molora": {"weight", "bias"}, "medmoe": {"weight", "temperature_bias"}}[kind]
    assert {name.rpartition(".")[2] for name in routers} == parts
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "moelora" in name}
