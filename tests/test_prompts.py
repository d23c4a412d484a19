"""Routing by prompt: what a prompt is in training, and that generation keeps to it."""

import copy
import inspect
import pickle
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from grouped_helpers import answered, grouped, grouped_config, make_lora
from helpers import first_logits, logits, since
from peft import get_peft_model
from tiny_models import PAD, SIZES, make_inputs, make_model
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl.trainer.utils import add_fused_lm_head

from peft_moe import GroupedMoeConfig

CAUSAL = ["llama", "gpt2", "opt"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the experts of this file are."""
    return tmp_path_factory.mktemp("experts")


def by_prompt(arch, folder, **fields):
    return grouped(arch, folder, router_input="prompt", **fields)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def routers(model):
    return dict(model.base_model.routers("default"))


def decided(model, inputs):
    """The weights of groups and of experts within them, for each row, of all blocks above each other."""
    found = model.explain(inputs)
    assert not found.per_token
    return torch.cat([torch.cat([found.group_weights[b], found.within[b]], -1) for b in found.blocks], -1)


@contextmanager
def watched(model):
    """What enters each block, and the weights (n, E) that its layers get, forward by forward."""
    entering, weights = {block: [] for block in routers(model)}, {block: [] for block in routers(model)}
    hooks = []
    for block, router in routers(model).items():
        module = model.get_base_model().get_submodule(block)
        hooks.append(module.register_forward_pre_hook(lambda _m, args, b=block: entering[b].append(args[0])))
        hooks.append(module.register_forward_pre_hook(lambda _m, _args, b=block: weights[b].append(None)))

        def keep(_router, _args, out, b=block):
            rows = out.reshape(len(entering[b][-1]), -1, out.shape[-1])  # OPT's feed-forward has (n s, E)
            assert weights[b][-1] is None or torch.equal(rows[:, 0], weights[b][-1])  # all layers get the same
            assert torch.equal(rows, rows[:, :1].expand_as(rows))
            weights[b][-1] = rows[:, 0]

        hooks.append(router.register_forward_hook(keep))
    yield entering, weights
    for hook in hooks:
        hook.remove()


def mean(e, mask=None):
    """Of tokens with a root mean square of 1, in float64."""
    e = e.double()
    e = e / (e.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    mask = torch.ones(e.shape[:-1]) if mask is None else mask
    return (e * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def weights_by_hand(router, read):
    """Of groups (a, b) and (c) and the general expert, for what a router reads (n, d)."""
    scores = read @ router.gate.weight.double().T
    groups, first = scores[:, :2].softmax(-1), scores[:, 2:4].softmax(-1)
    weights = torch.cat([groups[:, :1] * first, groups[:, 1:]], -1) / 2
    return torch.cat([weights, torch.full_like(weights[:, :1], 0.5)], -1).float()


def left_padded(lengths=(5, 3, 4, 2), seed=0):
    inputs = make_inputs("llama", batch=len(lengths), seq=max(lengths), labels=False, seed=seed)
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - n).long() for n in lengths])
    return {"input_ids": inputs["input_ids"] * mask, "attention_mask": mask}


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arch", CAUSAL)
def test_answers_have_no_say_and_every_token_of_the_prompt_has(arch, training, folder):
    model, inputs = by_prompt(arch, folder), answered(arch, prompt=3, seq=6)
    if training and arch == "llama":  # has no dropout
        model.train()
    before, said = logits(model, inputs), decided(model, inputs)
    other = copy.deepcopy(inputs)
    other["input_ids"][:, 3:] = torch.flip(other["input_ids"][:, 3:], (0,))
    other["labels"][:, 3:] = other["input_ids"][:, 3:]
    after = logits(model, other)
    assert torch.equal(decided(model, other), said)
    close(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3:], before[:, 3:], atol=1e-3)
    for position in range(3):
        other = copy.deepcopy(inputs)
        other["input_ids"][:, position] = torch.flip(other["input_ids"][:, position], (0,))
        assert ((decided(model, other) - said).abs().amax(1)[[0, 2]] > 1e-5).all()


def test_what_comes_after_the_first_label_is_no_prompt(folder):
    """Such as the questions of later turns, which have no labels."""
    model, inputs = by_prompt("llama", folder), answered("llama", prompt=2, seq=6)
    expected = decided(model, inputs)
    inputs["labels"][:, 4:] = -100
    assert torch.equal(decided(model, inputs), expected)
    inputs["input_ids"][:, 4:] += 1
    assert torch.equal(decided(model, inputs), expected)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "t5", "bert", "vit"])
def test_a_router_reads_the_mean_over_the_prompt_and_all_layers_of_its_block_get_the_same(arch, folder):
    model, inputs = by_prompt(arch, folder), answered(arch, prompt=3)
    with watched(model) as (entering, weights):
        outputs = model(**inputs)
    prompt = (torch.arange(5) < 3).expand(3, 5) if arch in CAUSAL else None
    for block, router in routers(model).items():
        decoder = arch == "t5" and block.startswith("decoder.")
        read = mean(outputs.encoder_last_hidden_state if decoder else entering[block][0], prompt)
        close(weights[block][0], weights_by_hand(router, read))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", CAUSAL)
def test_padding_is_no_part_of_a_prompt(arch, side, folder):
    model, inputs = by_prompt(arch, folder), answered(arch, seq=6)
    pad, real = 4, slice(4, None) if side == "left" else slice(6)
    garbage = torch.randint(3, 100, (3, pad), generator=torch.Generator().manual_seed(1))
    fill = {"input_ids": garbage, "attention_mask": 0 * garbage, "labels": 0 * garbage - 100}
    padded = {
        key: torch.cat([fill[key], value] if side == "left" else [value, fill[key]], 1) for key, value in inputs.items()
    }
    if arch == "gpt2":
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    close(decided(model, padded), decided(model, inputs))
    close(logits(model, padded)[:, real], logits(model, inputs))
    close(logits(model.train() if arch == "llama" else model, padded)[:, real], logits(model.eval(), inputs))


def test_a_first_token_belongs_to_the_prompt_whatever_its_label(folder):
    model, inputs = by_prompt("llama", folder), make_inputs("llama")
    inputs["labels"][:, :2] = -100
    inputs["labels"][0] = inputs["input_ids"][0]
    first = {key: value[:1].clone() for key, value in inputs.items()}
    first["labels"][:, 0] = -100
    close(decided(model, inputs)[:1], decided(model, first))
    close(decided(model, inputs)[:1], decided(model, {"input_ids": first["input_ids"][:, :1]}))
    model.train()(**inputs)  # no warning, since other rows have prompts


def test_training_without_prompts_warns_once(folder):
    model, inputs = by_prompt("llama", folder).train(), make_inputs("llama")
    with pytest.warns(UserWarning, match="no prompt is left and router_input='prompt' sees the first token only"):
        model(**inputs)
    model(**inputs)
    model.eval()(**inputs)
    by_prompt("llama", folder)(**inputs)  # outside of training there is nothing to warn of


REMEDY = r"cannot tell them from prompts; pass labels, or prompt_mask= .*router_input='token' needs neither"


@pytest.mark.parametrize("arch", CAUSAL)
def test_training_without_labels_is_an_error_that_says_the_remedy(arch, folder):
    model, inputs = by_prompt(arch, folder), make_inputs(arch, labels=False)
    model.train()
    for call in (model, model.get_base_model(), lambda **kw: model(kw["input_ids"])):
        with pytest.raises(ValueError, match=REMEDY):
            call(**inputs)
    with model.disable_adapter():
        model(**inputs)
    with torch.no_grad():
        model(**inputs)
    model.eval()(**inputs)


def test_a_prompt_mask_is_as_good_as_labels(folder):
    model, inputs = by_prompt("llama", folder).train(), answered("llama")
    expected = logits(model, inputs)
    prompt = inputs["labels"] == -100
    without = {key: value for key, value in inputs.items() if key != "labels"}
    for mask in (prompt, prompt.long()):
        for call in (model, model.base_model, model.get_base_model()):
            assert torch.equal(call(**without, prompt_mask=mask).logits, expected)
    assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"], prompt_mask=prompt).logits, expected)
    assert not torch.allclose(logits(model, without), expected, atol=1e-4)
    # and it goes before labels
    assert torch.equal(logits(model, {**inputs, "labels": inputs["input_ids"]}, prompt_mask=prompt), expected)
    # padding counts no more than it does elsewhere
    assert torch.equal(logits(model, without, prompt_mask=prompt), expected)
    padded = {key: F.pad(value, (2, 0)) for key, value in without.items()}
    close(logits(model, padded, prompt_mask=F.pad(prompt, (2, 0), value=True))[:, 2:], expected)


def test_labels_of_next_tokens_are_as_good_as_labels(folder):
    model, inputs = by_prompt("llama", folder), answered("llama")
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    without = {key: value for key, value in inputs.items() if key != "labels"}
    assert torch.equal(decided(model, {**without, "shift_labels": shifted}), decided(model, inputs))
    found, expected = model.train()(**inputs, shift_labels=shifted), model(**inputs)
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(3, 5),
        torch.ones(5, dtype=torch.bool),
        torch.ones(3, 5, 1, dtype=torch.bool),
        [[True] * 5] * 3,
        torch.ones(3, 4, dtype=torch.bool),
        torch.ones(3, 6, dtype=torch.bool),
        torch.ones(2, 5, dtype=torch.bool),
    ],
    ids=["float", "one axis", "three axes", "a list", "too narrow", "too wide", "too few rows"],
)
def test_a_prompt_mask_that_does_not_fit_is_an_error(mask, folder):
    model, inputs = by_prompt("llama", folder), make_inputs("llama", labels=False)
    for call in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"prompt_mask.*give bool \(batch, tokens\), true for the tokens of the "):
            call(**inputs, prompt_mask=mask)


def test_a_row_without_a_prompt_is_an_error(folder):
    model, inputs = by_prompt("llama", folder), make_inputs("llama", labels=False)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="prompt_mask leaves a row without a prompt; mark at least one token of"):
            call(**inputs, prompt_mask=mask)


PACKED = torch.tensor([[0, 1, 2, 0, 1]] * 3)
MANY = {
    "positions": {"position_ids": PACKED},
    "lengths": {"cu_seq_lens_q": torch.tensor([0, 3, 5]), "position_ids": PACKED},
}


@pytest.mark.parametrize("told", ["labels", "prompt_mask", "neither", "attention_mask"])
@pytest.mark.parametrize("packed", MANY.values(), ids=MANY)
def test_packed_rows_are_refused_with_the_remedy(packed, told, folder):
    model, inputs = by_prompt("llama", folder), answered("llama")
    if told != "attention_mask":
        del inputs["attention_mask"]
    if told in ("prompt_mask", "neither"):
        prompt = inputs.pop("labels") == -100
        inputs |= {"prompt_mask": prompt} if told == "prompt_mask" else {}
    for training in (True, False) if told != "neither" else (False,):
        with pytest.raises(ValueError, match=r"packed one after the other.*turn off packing.*use router_input='token'"):
            model.train(training)(**inputs, **packed)
    model(**inputs, position_ids=torch.arange(5).expand(3, 5))  # one text to a row


PADDED = {  # attention mask and positions
    "left": ([0, 0, 1, 1, 1], [1, 1, 0, 1, 2]),
    "left, all 0": ([0, 0, 1, 1, 1], [0, 0, 0, 1, 2]),
    "right": ([1, 1, 1, 0, 0], [0, 1, 2, 0, 0]),
    "right, counted": ([1, 1, 1, 0, 0], [0, 1, 2, 2, 2]),
}


@pytest.mark.parametrize(("mask", "positions"), PADDED.values(), ids=PADDED)
def test_positions_of_padding_are_no_packing(mask, positions, folder):
    model, inputs = by_prompt("llama", folder), make_inputs("llama")
    inputs["attention_mask"][:] = torch.tensor(mask)
    inputs["labels"] = torch.where(torch.tensor(positions) == 2, inputs["input_ids"], -100)
    model.train()(**inputs, position_ids=torch.tensor([positions] * 3))


@pytest.mark.parametrize("batch_size", [2, 6])
def test_evaluation_in_trainer_is_the_training_loss(batch_size, folder, tmp_path):
    model = by_prompt("llama", folder)
    inputs = answered("llama", batch=6)
    expected = model.train()(**inputs).loss.item()
    rows = Dataset.from_dict({key: value.tolist() for key, value in inputs.items()})
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=batch_size
    )
    assert Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    whole = {key: value for key, value in inputs.items() if key != "labels"}
    scores = logits(model, whole)[:, :-1].flatten(0, 1)
    assert F.cross_entropy(scores, inputs["labels"][:, 1:].flatten()).item() != pytest.approx(expected, rel=1e-4)


def test_trainer_keeps_a_column_of_prompt_masks(folder, tmp_path):
    """For models that learn to predict prompts too."""
    inputs = make_inputs("llama", batch=6)
    inputs["prompt_mask"] = (torch.arange(5) < 3).expand(6, 5)
    model, twin = by_prompt("llama", folder).train(), by_prompt("llama", folder).train()
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 6}
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_grad_norm=0,
        **settings,
    )
    rows = Dataset.from_dict({key: value.tolist() for key, value in inputs.items()})
    Trainer(model, arguments, train_dataset=rows).train()
    twin(**inputs).loss.backward()
    for block, router in routers(twin).items():
        step = router.gate.weight - 0.1 * router.gate.weight.grad
        torch.testing.assert_close(routers(model)[block].gate.weight, step)


def test_label_smoothing_needs_a_prompt_mask_and_says_so(folder, tmp_path):
    """Trainer then keeps the labels from the model."""
    inputs = answered("llama", batch=6)
    rows = Dataset.from_dict({key: value.tolist() for key, value in inputs.items()})
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, **settings)
    with pytest.raises(ValueError, match=REMEDY):
        Trainer(by_prompt("llama", folder), arguments, train_dataset=rows).train()
    rows = rows.add_column("prompt_mask", [[True] * 3 + [False] * 2] * 6)
    Trainer(by_prompt("llama", folder), arguments, train_dataset=rows).train()


def test_a_part_of_the_model_called_by_itself_has_no_prompt_and_is_an_error(folder):
    model, inputs = by_prompt("llama", folder), make_inputs("llama", labels=False)
    with pytest.raises(RuntimeError, match=r"needs to know the rows' prompts.*call the adapted model, or use router"):
        model.get_base_model().model(**inputs)
    with model.disable_adapter():
        model.get_base_model().model(**inputs)


def test_layers_outside_of_blocks_are_refused(folder, tmp_path):
    path = make_lora(tmp_path, seed=1, target_modules=["lm_head", "v_proj"])
    config = GroupedMoeConfig(task_type="CAUSAL_LM", groups={"f": {"a": path}}, router_input="prompt")
    with pytest.raises(ValueError, match=r"'lm_head' is in none.*Use router_input='token'"):
        get_peft_model(make_model("llama"), config)


# -- generation -------------------------------------------------------------------------------------------------------


def by_full_forwards(model, arch, inputs, steps=5, prompt=None):
    """Tokens and logits of greedy decoding without `generate` or a cache."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    prompt, found = mask.bool() if prompt is None else prompt, []
    for _ in range(steps):
        more = {} if arch == "opt" else {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}  # OPT counts by itself
        step = logits(model, {"input_ids": ids, "attention_mask": mask, **more}, prompt_mask=prompt)[:, -1]
        ids = torch.cat([ids, step.argmax(-1, keepdim=True)], 1)
        mask, prompt = F.pad(mask, (0, 1), value=1), F.pad(prompt, (0, 1), value=False)
        found.append(step)
    return ids, torch.stack(found, 1)


def generated(model, inputs, **variant):
    """Tokens and logits of greedy decoding."""
    out = model.generate(**inputs, **{**GREEDY, **variant}, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, 1)


CACHES = [
    {},
    {"use_cache": False},
    {"prefill_chunk_size": 9},
    {"cache_implementation": "static", "disable_compile": True},
    {"cache_implementation": "dynamic"},
]


@pytest.mark.parametrize("variant", CACHES, ids=str)
@pytest.mark.parametrize("arch", CAUSAL)
def test_generation_keeps_to_the_weights_of_the_prompt(arch, variant, folder):
    model, inputs = by_prompt(arch, folder), left_padded()
    ids, scores = by_full_forwards(model, arch, inputs)
    found = generated(model, inputs, **variant)
    close(found[1], scores)
    assert torch.equal(found[0], ids)
    # with the answer as a part of the prompt it would be another
    whole = {"input_ids": ids, "attention_mask": F.pad(inputs["attention_mask"], (0, 5), value=1)}
    more = {} if arch == "opt" else {"position_ids": (whole["attention_mask"].cumsum(1) - 1).clamp_min(0)}
    assert not torch.allclose(logits(model, {**whole, **more})[:, 4:-1], scores, atol=1e-3)


VARIANTS = [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("arch", [*CAUSAL, "t5"])
def test_generating_for_a_left_padded_batch_is_as_each_row_alone(arch, variant, folder):
    model, inputs = by_prompt(arch, folder), left_padded()
    together = model.generate(**inputs, **GREEDY, **variant)
    n = len(together) // 4
    for i, mask in enumerate(inputs["attention_mask"].bool()):
        row = {key: value[i : i + 1, mask] for key, value in inputs.items()}
        alone = model.generate(**row, **GREEDY, **variant)
        assert torch.equal(together[i * n : (i + 1) * n, -5:], alone[:, -5:])
    scores = first_logits(model, **inputs, **GREEDY, **variant)
    with model.disable_adapter():  # or the comparison would say nothing about the adapter
        assert not torch.allclose(first_logits(model, **inputs, **GREEDY, **variant), scores, atol=1e-2)


def test_sampled_return_sequences_keep_the_weights_of_their_row(folder):
    model, inputs = by_prompt("llama", folder), left_padded()
    torch.manual_seed(0)
    sampled = model.generate(**inputs, **{**GREEDY, "do_sample": True, "top_k": 0}, num_return_sequences=3)
    mask = F.pad(inputs["attention_mask"].repeat_interleave(3, 0), (0, 5), value=1)
    prompt = F.pad(inputs["attention_mask"].repeat_interleave(3, 0), (0, 5)).bool()
    scores = logits(model, {"input_ids": sampled, "attention_mask": mask}, prompt_mask=prompt)
    torch.manual_seed(0)  # the draws of generate again
    for position in range(5, 10):
        drawn = torch.multinomial(scores[:, position - 1].softmax(-1), 1)[:, 0]
        assert torch.equal(drawn, sampled[:, position])


def test_a_second_generation_starts_afresh(folder):
    model, first, second = by_prompt("llama", folder), left_padded(), left_padded((2, 4), seed=1)
    before = generated(model, second)
    generated(model, first)
    after = generated(model, second)
    fresh = generated(by_prompt("llama", folder), second)
    for found in (after, fresh):
        assert torch.equal(found[0], before[0])
        assert torch.equal(found[1], before[1])


LOOKUP = pytest.param(None, marks=since("5.23", "looked prompts up only with an end token"))


@pytest.mark.parametrize("assistant", [0, 1, LOOKUP])
def test_assisted_decoding_gives_what_greedy_decoding_gives(assistant, folder):
    """Its first forward has the prompt and candidates for the answer, which are not to be taken for prompt."""
    model = by_prompt("llama", folder)
    prompt = {key: value[:1] for key, value in left_padded().items()}
    helped = {"assistant_model": make_model("llama", seed=assistant)} if assistant is not None else {}
    if assistant == 1:
        del prompt["attention_mask"]
    if not helped:  # candidates that are copied from the prompt
        prompt["input_ids"] = prompt["input_ids"][:, [0, 1, 2, 0, 1]]
        helped = {"prompt_lookup_num_tokens": 2}
    expected = model.generate(**prompt, **GREEDY)
    lengths = []
    hook = model.get_base_model().model.embed_tokens.register_forward_hook(
        lambda _module, args, _out: lengths.append(args[0].shape[1])
    )
    assert torch.equal(model.generate(**prompt, **GREEDY, **helped), expected)
    hook.remove()
    assert lengths[0] > 5
    close(generated(model, prompt, **helped)[1], generated(model, prompt)[1])


@pytest.mark.parametrize("variant", CACHES, ids=str)
def test_padding_is_known_without_a_mask_where_generate_knows_it(variant, folder):
    model, inputs = by_prompt("llama", folder), left_padded()
    expected = generated(model, inputs)
    found = generated(model, {"input_ids": inputs["input_ids"]}, **variant)
    close(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


def test_embeddings_for_token_ids_are_the_same_prompt(folder):
    model, inputs = by_prompt("llama", folder), left_padded()
    expected = model.generate(**inputs, **GREEDY)[:, 5:]
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    rest = {"attention_mask": inputs["attention_mask"]}
    assert torch.equal(model.generate(inputs_embeds=embeddings, **rest, **GREEDY), expected)


@pytest.mark.parametrize("chunk", [None, 2])
def test_generation_takes_a_prompt_mask(chunk, folder):
    """Parts of the input that are to have no say, such as examples."""
    model, inputs = by_prompt("llama", folder), left_padded()
    prompt = inputs["attention_mask"].bool() & (torch.arange(5) > 3)
    ids, scores = by_full_forwards(model, "llama", inputs, prompt=prompt)
    assert not torch.allclose(scores, by_full_forwards(model, "llama", inputs)[1], atol=1e-3)
    variant = {"prompt_mask": prompt} | ({} if chunk is None else {"prefill_chunk_size": chunk})
    found = generated(model, inputs, **variant)
    if chunk is None:  # else what is read before the prompt is routed as yet unknown
        close(found[1], scores)
        assert torch.equal(found[0], ids)
    with watched(model) as (entering, weights):
        generated(model, inputs, **variant)
    for block, router in routers(model).items():
        read = torch.cat(entering[block][: -(-5 // chunk) if chunk else 1], 1)
        close(weights[block][-1], weights_by_hand(router, mean(read, prompt)))


# -- the weights that are kept ----------------------------------------------------------------------------------------


# transformers 5.24 takes both
CACHE_NAMES = {"past_key_values", *inspect.signature(LlamaForCausalLM.forward).parameters} & {
    "past_key_values",
    "cache",
}


@pytest.mark.parametrize("cache_name", sorted(CACHE_NAMES))
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("arch", CAUSAL)
def test_decoding_by_hand_keeps_to_the_prompt_that_the_cache_began_with(arch, grad, cache_name, folder):
    model, ids = by_prompt(arch, folder), make_inputs(arch, batch=2, seq=7)["input_ids"]
    prompt = (torch.arange(7) < 3).expand(2, 7)
    expected = logits(model, {"input_ids": ids}, prompt_mask=prompt)
    other = logits(model, {"input_ids": ids.flip(0)[:, :3]})
    steps, cache = [], None
    for part in [slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7)]:
        with torch.set_grad_enabled(grad):
            outputs = model(input_ids=ids[:, part], use_cache=True, **{cache_name: cache})
        steps, cache = [*steps, outputs.logits.detach()], outputs[cache_name]
        assert torch.equal(logits(model, {"input_ids": ids.flip(0)[:, :3]}), other)  # has a prompt of its own
    close(torch.cat(steps, 1), expected)
    close(logits(model, {"input_ids": ids[:, :3]}), expected[:, :3])
    # a mask of the prompt reads anew
    again = logits(
        model, {"input_ids": ids[:, :3]}, past_key_values=DynamicCache(), use_cache=True, prompt_mask=prompt[:, :3]
    )
    close(again, expected[:, :3])


AGAIN = {  # what is done with a cache before it is used again
    "copied": copy.deepcopy,
    "copied by pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "as a tuple's part": lambda cache: cache,
}


@pytest.mark.parametrize("how", AGAIN)
def test_a_prompt_stays_with_its_cache(how, folder):
    model, ids = by_prompt("llama", folder), make_inputs("llama", batch=2, seq=6)["input_ids"]
    expected = logits(model, {"input_ids": ids}, prompt_mask=(torch.arange(6) < 3).expand(2, 6))
    with torch.no_grad():
        if how == "as a tuple's part":
            cache = model(input_ids=ids[:, :3], use_cache=True, return_dict=False)[-1]
        else:
            cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    logits(model, {"input_ids": ids.flip(0)})
    for _ in range(2):  # as prefixes of several texts are used
        twin = AGAIN[how](cache)
        close(logits(model, {"input_ids": ids[:, 3:]}, past_key_values=twin), expected[:, 3:])
        if twin is cache:
            break


@pytest.mark.parametrize("of", ["the base model", "another model"])
def test_a_cache_whose_prompt_is_not_known_is_an_error_that_says_the_remedy(of, folder):
    model, ids = by_prompt("llama", folder), make_inputs("llama", batch=2, seq=6)["input_ids"]
    with torch.no_grad():
        if of == "the base model":
            with model.disable_adapter():
                cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
        else:
            cache = make_model("llama")(input_ids=ids[:, :3], use_cache=True).past_key_values
    rest = {"input_ids": ids[:, 3:], "past_key_values": cache}
    with pytest.raises(ValueError, match=r"A cache of 3 tokens.*does not know the prompt.*say with prompt_mask= which"):
        model(**rest)
    model(**rest, prompt_mask=torch.ones(2, 3, dtype=torch.bool))


def test_a_prompt_mask_with_a_cache_reads_anew(folder):
    model, ids = by_prompt("llama", folder), make_inputs("llama", batch=2, seq=6)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    new = torch.tensor([[True, True, False]] * 2)
    with watched(model) as (entering, weights):
        logits(model, {"input_ids": ids[:, 3:]}, past_key_values=cache, prompt_mask=new)
        logits(model, {"input_ids": ids[:, :1]}, past_key_values=cache)  # which is kept then
    for block, router in routers(model).items():
        expected = weights_by_hand(router, mean(entering[block][0], new))
        close(weights[block][0], expected)
        close(weights[block][1], expected)


def test_an_emptied_cache_begins_with_another_prompt(folder):
    model, ids = by_prompt("llama", folder), make_inputs("llama", batch=2, seq=6)["input_ids"]
    expected = logits(model, {"input_ids": ids[:, 3:]})
    with torch.no_grad():
        cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    cache.crop(-3)
    assert cache.get_seq_length() == 0
    close(logits(model, {"input_ids": ids[:, 3:]}, past_key_values=cache), expected)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_chunks_of_a_prompt_are_routed_by_what_has_been_read_of_it_and_the_answer_by_all(chunk, folder):
    model, inputs = by_prompt("llama", folder), left_padded((5, 3, 4))
    count = -(-5 // chunk)
    with watched(model) as (entering, weights):
        ids = model.generate(**inputs, **GREEDY, prefill_chunk_size=chunk)
    assert ids.shape == (3, 10)
    for block, router in routers(model).items():
        lengths = [e.shape[1] for e in entering[block]]
        assert lengths == [min(chunk, 5 - chunk * i) for i in range(count)] + [1] * 4
        for i in range(count + 4):
            read = torch.cat(entering[block][: min(i + 1, count)], 1)
            mask = inputs["attention_mask"][:, : read.shape[1]]
            some = mask.any(1)  # the others have read padding only
            close(weights[block][i][some], weights_by_hand(router, mean(read, mask))[some])
            assert weights[block][i].isfinite().all()
    if chunk == 5:
        assert torch.equal(ids, model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("chunk", [None, pytest.param(2, marks=since("5.23", "read what is in the cache once more"))])
@pytest.mark.parametrize("given", ["all of the text", "its new part"])
def test_a_further_turn_is_routed_by_its_own_tokens(given, chunk, folder):
    """What is in the cache was routed when it was made."""
    model, inputs = by_prompt("llama", folder), left_padded((5, 3))
    turn = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([turn.sequences, make_inputs("llama", batch=2, seq=3, seed=7)["input_ids"]], 1)
    mask = F.pad(inputs["attention_mask"], (0, 8), value=1)
    cache = turn.past_key_values
    assert cache.get_seq_length() == 9  # the last token of the answer has not been read yet
    positions = (mask.cumsum(1) - 1)[:, 9:]
    alone = {"input_ids": ids[:, 9:], "attention_mask": mask, "past_key_values": copy.deepcopy(cache)}
    alone |= {"position_ids": positions}
    expected = logits(model, alone, prompt_mask=torch.ones(2, 4, dtype=torch.bool))[:, -1]
    variant = {} if chunk is None else {"prefill_chunk_size": chunk}
    if given == "its new part" and chunk is not None:
        variant["prefill_chunk_size"] = 3
    with watched(model) as (entering, weights):
        found = generated(
            model,
            {"input_ids": ids if given == "all of the text" else ids[:, 9:], "attention_mask": mask},
            past_key_values=cache,
            **variant,
        )
    if chunk is None:
        close(found[1][:, 0], expected)
    for block, router in routers(model).items():
        parts = [e for e in entering[block] if e.shape[1] > 1] if chunk is None else entering[block][:2]
        read = torch.cat(parts, 1)
        assert read.shape[1] == 4
        for used in weights[block][len(parts) - 1 :]:
            close(used, weights_by_hand(router, mean(read)))


def test_decoding_by_hand_after_generate_goes_on_with_its_prompt(folder):
    model, inputs = by_prompt("llama", folder), left_padded((5, 3))
    ids, scores = by_full_forwards(model, "llama", inputs, steps=6)
    turn = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    mask = F.pad(inputs["attention_mask"], (0, 5), value=1)
    positions = (mask.cumsum(1) - 1)[:, -1:]
    more = {"attention_mask": mask, "position_ids": positions, "past_key_values": turn.past_key_values}
    close(logits(model, {"input_ids": ids[:, 9:10], **more})[:, 0], scores[:, 5])


def test_what_is_fixed_in_the_middle_of_an_answer_holds_from_there(folder):
    model, inputs = by_prompt("llama", folder), left_padded((5, 3))
    ids = inputs["input_ids"]
    with watched(model) as (entering, weights), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
        with model.routing({"f": {"a": 1.0}}, mix=0.75):
            model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)
        model(input_ids=ids[:, :1], attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=cache)
    for block, router in routers(model).items():
        free = weights_by_hand(router, mean(entering[block][0], inputs["attention_mask"]))
        close(weights[block][0], free)
        close(weights[block][2], free)
        a, b, c, _ = free.unbind(-1)
        fixed = torch.stack([1.5 * (a + b), 0 * b, 1.5 * c, torch.full_like(a, 0.25)], -1)
        close(weights[block][1], fixed)


def test_an_adapter_that_has_not_read_the_prompt_in_a_cache_says_so(folder):
    model, inputs = by_prompt("llama", folder), left_padded((5, 3))
    model.add_adapter("second", grouped_config("llama", folder, router_input="prompt"))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    step = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": F.pad(inputs["attention_mask"], (0, 1), value=1)}
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match="a cache whose prompt this adapter has not read.*read the prompt again"):
        model(**step, past_key_values=cache)
    model.set_adapter("default")
    model(**step, past_key_values=cache)


# -- compiled ---------------------------------------------------------------------------------------------------------


def small(tmp_path):
    """With few layers to compile, which takes seconds."""
    a, b = (make_lora(tmp_path / name, seed=i, target_modules=["gate_proj"]) for i, name in enumerate("ab"))
    fields = {"groups": {"f": {"a": a, "b": b}}, "router_input": "prompt", "init_lora_weights": False}
    torch._dynamo.reset()
    torch.manual_seed(0)
    return get_peft_model(make_model("llama"), GroupedMoeConfig(task_type="CAUSAL_LM", **fields)).eval()


@pytest.mark.long
def test_a_compiled_block_keeps_to_the_weights_of_the_prompt(tmp_path):
    """As accelerate's regional compilation has it."""
    model = small(tmp_path)
    expected = [by_full_forwards(model, "llama", inputs) for inputs in (left_padded(), left_padded(seed=1))]
    model.get_base_model().model.layers[0].compile(backend="aot_eager", fullgraph=True)
    for inputs, (ids, scores) in zip((left_padded(), left_padded(seed=1)), expected, strict=True):
        found = generated(model, inputs)
        close(found[1], scores)
        assert torch.equal(found[0], ids)


@pytest.mark.slow
def test_a_compiled_model_that_decodes_by_hand_keeps_to_the_prompt(tmp_path):
    model, ids = small(tmp_path), make_inputs("llama", batch=2, seq=6)["input_ids"]
    expected = logits(model, {"input_ids": ids}, prompt_mask=(torch.arange(6) < 3).expand(2, 6))
    assert not torch.allclose(logits(model, {"input_ids": ids}), expected, atol=1e-4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    steps, cache = [], None
    for part in (slice(0, 3), slice(3, 6)):
        with torch.no_grad():
            outputs = compiled(input_ids=ids[:, part], past_key_values=cache, use_cache=True)
        steps, cache = [*steps, outputs.logits], outputs.past_key_values
    close(torch.cat(steps, 1), expected)


# -- models of other kinds --------------------------------------------------------------------------------------------


def encoder_decoder_inputs():
    return {**left_padded((5, 3, 4)), "labels": make_inputs("t5")["labels"]}


def test_a_decoder_is_routed_by_what_the_encoder_has_read_and_by_nothing_else(folder):
    model, inputs = by_prompt("t5", folder), encoder_decoder_inputs()
    said = decided(model, inputs)
    assert torch.equal(decided(model, {**inputs, "labels": inputs["labels"].flip(0, 1)}), said)
    assert torch.equal(decided(model, {**inputs, "labels": F.pad(inputs["labels"], (0, 2), value=-100)}), said)
    inputs["input_ids"] = inputs["input_ids"].roll(1, 0) * inputs["attention_mask"]
    assert ((decided(model, inputs) - said).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_an_encoder_does_not_count(side, folder):
    model, inputs = by_prompt("t5", folder), make_inputs("t5")
    pad = (3, 0) if side == "left" else (0, 3)
    padded = {key: value if key == "labels" else F.pad(value, pad) for key, value in inputs.items()}
    if side == "right":
        padded["input_ids"][:, -3:] = 100  # garbage
    close(decided(model, padded), decided(model, inputs))
    close(logits(model, padded), logits(model, inputs))
    found = {key: value for key, value in padded.items() if key != "labels"}
    alone = {key: value for key, value in inputs.items() if key != "labels"}
    close(generated(model, found)[1], generated(model, alone)[1])


@pytest.mark.parametrize("variant", [{}, {"use_cache": False}], ids=str)
def test_an_encoder_decoder_generates_what_full_forwards_say(variant, folder):
    model, inputs = by_prompt("t5", folder), left_padded()
    ids, scores = torch.full((4, 1), PAD), []
    for _ in range(5):
        scores.append(logits(model, inputs, decoder_input_ids=ids)[:, -1])
        ids = torch.cat([ids, scores[-1].argmax(-1, keepdim=True)], 1)
    found = generated(model, inputs, **variant)
    close(found[1], torch.stack(scores, 1))
    assert torch.equal(found[0], ids)


def test_what_an_encoder_has_read_before_is_read_again_by_the_decoder_s_routers(folder):
    model, inputs = by_prompt("t5", folder), encoder_decoder_inputs()
    expected = logits(model, inputs)
    with torch.no_grad():
        read = model.get_base_model().get_encoder()(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )
    del inputs["input_ids"]
    close(logits(model, inputs, encoder_outputs=read), expected)


def test_a_prompt_mask_holds_for_encoder_and_decoder(folder):
    model, inputs = by_prompt("t5", folder), make_inputs("t5")
    prompt = (torch.arange(5) < 2).expand(3, 5)
    for generates in (False, True):
        with watched(model) as (entering, weights):
            if generates:
                rest = {key: value for key, value in inputs.items() if key != "labels"}
                out = model.generate(
                    **rest, **GREEDY, prompt_mask=prompt, return_dict_in_generate=True, output_hidden_states=True
                )
                read = out.encoder_hidden_states[-1]
            else:
                read = model(**inputs, prompt_mask=prompt).encoder_last_hidden_state
        for block, router in routers(model).items():
            of = read if block.startswith("decoder.") else entering[block][0]
            for used in weights[block]:
                close(used, weights_by_hand(router, mean(of, prompt)))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_all_of_a_classifier_s_input_is_its_prompt_without_the_padding(kind, folder):
    if kind == "bert":
        model = by_prompt("bert", folder)
    else:
        torch.manual_seed(0)
        base = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)).eval()
        config = grouped_config("llama", folder, task_type="SEQ_CLS", router_input="prompt")
        model = get_peft_model(base, config).eval()
    inputs = make_inputs("bert")
    said = decided(model, inputs)
    with watched(model) as (entering, weights):
        found = logits(model, inputs)
    for block, router in routers(model).items():
        close(weights[block][0], weights_by_hand(router, mean(entering[block][0])))
    for position in range(5):
        other = copy.deepcopy(inputs)
        other["input_ids"][:, position] = other["input_ids"][:, position].flip(0)
        assert ((decided(model, other) - said).abs().amax(1)[[0, 2]] > 1e-6).all()
    padded = {key: value if key == "labels" else F.pad(value, (0, 3)) for key, value in inputs.items()}
    close(decided(model, padded), said)
    close(logits(model, padded), found)
    model.train()(**padded).loss.backward()
    assert all(router.gate.weight.grad.abs().sum() > 0 for router in routers(model).values())


# -- TRL --------------------------------------------------------------------------------------------------------------


def test_trl_s_head_that_calls_the_backbone_itself_lets_no_answer_choose(folder):
    model = by_prompt("llama", folder).train()
    add_fused_lm_head(model.get_base_model())  # what SFTTrainer does to a PeftModel that it is given
    ids = make_inputs("llama", batch=2, seq=6)["input_ids"]
    labels = ids.masked_fill(torch.arange(6) < 3, -100)
    found = []
    for answer in (5, 7):
        inputs = {"input_ids": ids.masked_fill(torch.arange(6) >= 4, answer), "labels": labels}
        with watched(model) as (_, weights):
            model(**inputs, fused_lm_head=True)
        found.append(weights)
    for block in routers(model):
        assert torch.equal(found[0][block][-1], found[1][block][-1])
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    with pytest.raises(ValueError, match="Rows hold several texts, packed"):
        model(input_ids=ids, labels=labels, position_ids=packed, fused_lm_head=True)
