"""The model card: what it says, and that neither peft nor a round through its own parser changes it."""

import ast
import copy
import hashlib
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_models import make_model

from peft_moe import GroupedMoeConfig, MedMoeLoraConfig, MoeConfig, MoeLoraConfig, MoLoraConfig
from peft_moe.card import model_card, tags_of
from peft_moe.card_methods import METHODS, TAGS
from peft_moe.data import TaskInfo

INFO = {"size": TaskInfo("size", "Small | tall?", "accuracy"), "leaf": TaskInfo("leaf", "Which leaf?", "macro_f1")}
RESULTS = {
    "size": {"metric": "accuracy", "score": 0.75, "exact_match": 0.75, "n": 8},
    "leaf": {"metric": "macro_f1", "score": 0.5, "exact_match": 0.625, "n": 8},
    "mean": {"metric": "mean", "score": 0.625, "exact_match": 0.6875, "n": 16},
}
# Adapters routed by tokens on the tiny Llama (2 layers), and what their cards have to say. Eq. 2 of Med-MoE-LoRA with
# γ = 2 gives its first layer 2 + ⌊6 / 4⌋ = 3 experts and its last one 8.
BY_TOKEN = [
    (
        MoLoraConfig(task_type="CAUSAL_LM", r=4, balance_loss="switch"),
        "MOLORA",
        [
            "A MoLoRA adapter (MING-MOE, [arXiv 2404.09027](https://arxiv.org/abs/2404.09027)) for `me/base`",
            "gives each token the best 2 of 8 LoRA experts of rank 4, weighed by their scores. Layers that",
            "| num_experts_pattern | `{'[^.]*(?i:attn\\|attention)",
            "| balance_loss | `{'switch': 0.01}` |",
            "| top_k | 2 |",
            "title     = {{MING-MOE}: Enhancing Medical Multi-Task Learning",
        ],
        ["top_p", "expert_groups", "shared ones", "2601.07935"],
    ),
    (
        MoLoraConfig(
            task_type="CAUSAL_LM", r=4, num_experts=4, top_p=0.5, num_shared_experts=1, num_experts_pattern={}
        ),
        "MOLORA",
        [
            "the fewest of 4 LoRA experts of rank 4 whose probabilities add up to 0.5, weighed by their scores, and 1 "
            "shared ones to all tokens. Experts",
            "| top_p | 0.5 |",
            "| balance_loss | none |",
        ],
        ["num_experts_pattern"],
    ),
    (
        MoLoraConfig(task_type="CAUSAL_LM", r=4, num_experts=2, top_k=4, num_experts_pattern={"down_proj": 3}),
        "MOLORA",
        ["gives each token all 2 LoRA experts of rank 4", "| num_experts_pattern | `{'down_proj': 3}` |"],
        ["Layers that num_experts_pattern"],
    ),
    (
        MedMoeLoraConfig(task_type="CAUSAL_LM", expert_ranks=[2, 4], inference_top_k=2),
        "MEDMOELORA",
        [
            "A Med-MoE-LoRA adapter ([arXiv 2601.07935](https://arxiv.org/abs/2601.07935)) for `me/base`",
            "weighs, for each token, 3 to 8 LoRA experts of ranks 2, 4 in turn and alpha of twice the rank, beside a "
            "base expert left at zero",
            "| experts_per_layer | `{'model.layers': [3, 8]}` |",
            "| expert_schedule | ascending |",
            "| expert_ranks | [2, 4] |",
            "| base_expert_mode | frozen |",
            "| balance_loss | `{'variance': 0.01}` |",
            "| inference_top_k | 2 |",
            "note      = {Med-MoE-LoRA, arXiv:2601.07935}",
        ],
        ["| lora_alpha |", "base_expert_rank", "2404.09027"],
    ),
    (
        MedMoeLoraConfig(
            task_type="CAUSAL_LM",
            expert_ranks=4,
            lora_alpha=8,
            expert_schedule="uniform",
            num_experts=3,
            num_base_experts=2,
            base_expert_mode="regularized",
            base_coefficient=0.5,
            balance_loss="none",
        ),
        "MEDMOELORA",
        [
            "weighs, for each token, 3 LoRA experts of ranks 4 in turn, beside 2 base experts held near zero by a loss "
            "of weight 0.5.",
            "| lora_alpha | 8 |",
            "| num_base_experts | 2 |",
        ],
        ["twice the rank"],
    ),
    (
        MedMoeLoraConfig(
            task_type="CAUSAL_LM", num_experts=3, base_expert_mode="general", tasks=list(INFO), general_tasks=["leaf"]
        ),
        "MEDMOELORA",
        [
            "drawn to the rows of the general tasks leaf by a localized loss of weight 0.01",
            "| 1 | leaf | Which leaf? |",
        ],
        ["left at zero"],
    ),
]
NAMES = ["molora", "molora-top-p-shared", "molora-dense", "medmoelora", "medmoelora-regularized", "medmoelora-general"]


def make_adapter(config) -> PeftModel:
    base = make_model("llama")
    base.name_or_path = base.config._name_or_path = "me/base"
    base.add_model_tags(tags_of(config))
    return get_peft_model(base, copy.deepcopy(config))  # which settles open fields in it


def make_moelora() -> PeftModel:
    return make_adapter(
        MoeLoraConfig(task_type="CAUSAL_LM", r=4, num_experts=2, tasks=list(INFO), target_modules=["v_proj", "q_proj"])
    )


def make_card(model: PeftModel, **changes) -> ModelCard:
    arguments = {"name": "me/trees", "dataset": "me/forest", "info": INFO, "hyperparameters": {"learning rate": 2e-4}}
    return model_card(model, **arguments | {"results": RESULTS, "license": "apache-2.0"} | changes)


def metadata(card: ModelCard) -> dict:
    return yaml.safe_load(card.content.split("---\n")[1])


def test_metadata_is_what_the_hub_reads():
    data = metadata(make_card(make_moelora()))
    model_index = data.pop("model-index")
    assert data == {
        "base_model": "me/base",
        "datasets": "me/forest",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": list(TAGS),
    }
    scores = {result["dataset"]["config"]: result["metrics"][0] for result in model_index[0]["results"]}
    assert scores == {
        "size": {"type": "accuracy", "value": 0.75},
        "leaf": {"type": "macro_f1", "value": 0.5},
    }


def test_text_tells_tasks_scores_parameters_and_how_to_load_and_fold():
    model = make_moelora()
    text = make_card(model).text
    trainable, total = model.get_nb_trainable_parameters()
    for line in [
        "| 0 | size | Small \\| tall? |",
        "| 1 | leaf | Which leaf? |",
        "| leaf | macro_f1 | 0.500 | 0.625 | 8 |",
        "| mean | mean | 0.625 | 0.688 | 16 |",
        "| num_experts | 2 |",
        "| target_modules | q_proj, v_proj |",
        "| learning rate | 0.0002 |",
        f"Trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%}).",
        "import peft_moe  # registers MOELORA with peft",
        'model = AutoPeftModelForCausalLM.from_pretrained("me/trees")',
        "peft-moe fold me/trees --task size --out size-lora",
    ]:
        assert line in text.splitlines()
    assert "arXiv 2310.18339" in text
    assert "pages     = {1104--1114}" in text


def test_odd_names_and_texts_stay_in_their_cells_and_arguments():
    names = ['the "leaf"', "size & form"]
    info = {names[0]: TaskInfo(names[0], "Which leaf?\nOne word."), names[1]: TaskInfo(names[1])}
    config = MoeLoraConfig(task_type="CAUSAL_LM", r=4, num_experts=2, tasks=names, target_modules=["v_proj"])
    lines = make_card(make_adapter(config), name="out put/trees", info=info).text.splitlines()
    for line in [
        '| 0 | the "leaf" | Which leaf? One word. |',
        'model.set_task("the \\"leaf\\"")  # or task_ids=[...] per call, one task for each row',
        "peft-moe fold 'out put/trees' --task 'the \"leaf\"' --out 'the \"leaf\"-lora'",
    ]:
        assert line in lines


@pytest.mark.parametrize(("dataset", "said"), [("data/medmulti/tiny", True), ("me/forest", False)])
def test_only_medmulti_comes_with_its_note(dataset, said):
    assert ("medical advice" in make_card(make_moelora(), dataset=dataset).text) is said


def test_a_windows_path_is_a_title_and_code_that_can_be_run():
    text = make_card(make_moelora(), name="outputs\\new").text
    assert text.lstrip().startswith("# new\n")
    assert r'from_pretrained("outputs\\new")' in text


def test_local_paths_stay_out_of_the_metadata(tmp_path):
    model = make_moelora()
    model.active_peft_config.base_model_name_or_path = str(tmp_path)
    card = make_card(model, dataset=str(tmp_path))
    assert not {"base_model", "datasets"} & metadata(card).keys()
    assert f"The base model is a local folder, `{tmp_path}`" in card.text


def test_a_card_without_results_or_task_info_has_no_empty_sections():
    text = make_card(make_moelora(), info={}, results=None).text
    assert "## Scores" not in text
    assert "| 1 | leaf |  |" in text


def test_a_stock_lora_is_not_called_moelora():
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    card = make_card(get_peft_model(make_model("llama"), config))
    assert metadata(card)["tags"] == ["lora"]
    assert "rank 4" in card.text
    assert "peft_moe  #" not in card.text
    assert "moelora" not in card.content.lower()


@pytest.mark.parametrize(("config", "peft_type", "said", "unsaid"), BY_TOKEN, ids=NAMES)
def test_the_card_of_a_token_routed_adapter_is_its_own(config, peft_type, said, unsaid):
    model = make_adapter(config)
    card = make_card(model)
    trainable, total = model.get_nb_trainable_parameters()
    for part in [*said, f"Trainable parameters: {trainable:,} of {total:,} ("]:
        assert part in card.text
    assert f"import peft_moe  # registers {peft_type} with peft" in card.text.splitlines()
    assert 'model = AutoPeftModelForCausalLM.from_pretrained("me/trees")' in card.text.splitlines()
    assert "merged or folded only as what comes closest to it over calibration data (`peft_moe.calibrate`" in card.text
    for part in [*unsaid, "set_task", "task_ids", "MOELoRA", "2310.18339", "None"]:
        assert part not in card.text
    assert metadata(card)["tags"] == tags_of(config)


def test_the_card_lists_the_schedule_that_the_model_has():
    model = make_adapter(MedMoeLoraConfig(task_type="CAUSAL_LM", expert_ranks=2, expert_schedule=[1, 5]))
    (listed,) = re.findall(r"^\| experts_per_layer \| `(.*)` \|$", make_card(model).text, flags=re.MULTILINE)
    ranks = [layer.moelora_bank["default"].ranks for key, layer in model.named_modules() if key.endswith("up_proj")]
    assert ast.literal_eval(listed) == {"model.layers": [len(r) for r in ranks]} == {"model.layers": [1, 5]}


def test_each_method_has_a_card_of_existing_fields_and_tags_of_its_own():
    grouped = GroupedMoeConfig(groups={"style": ["concise"]}, train_experts=True)
    configs = [LoraConfig(), MoeLoraConfig(), MoLoraConfig(), MedMoeLoraConfig(), grouped]
    assert [METHODS[config.peft_type] for config in configs] == list(METHODS.values())
    for config in configs:
        assert set(METHODS[config.peft_type].fields) <= {f.name for f in fields(config)}
    tags = [frozenset(tags_of(config)) for config in configs]
    assert len(set(tags)) == len(configs)
    assert [("peft-moe" in found) for found in tags] == [isinstance(config, MoeConfig) for config in configs]
    assert tags_of(MoeLoraConfig()) == list(TAGS)


def test_the_card_of_composed_loras_says_where_each_came_from(tmp_path):
    stock = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    stock.save_pretrained(tmp_path / "lora")
    sha256 = hashlib.sha256((tmp_path / "lora" / "adapter_model.safetensors").read_bytes()).hexdigest()
    source = {"source": str(tmp_path), "subfolder": "lora"}
    config = GroupedMoeConfig(
        task_type="CAUSAL_LM", groups={"style": {"concise": source}}, general_expert=str(tmp_path / "lora"), mix=0.25
    )
    card = make_card(make_adapter(config))
    for part in [
        "An AT-MoE adapter ([arXiv 2410.10896](https://arxiv.org/abs/2410.10896)) for `me/base`",
        "weighs them for each token, over groups, and within each group. The general expert has the share 1 - λ",
        "with λ 0.25.",
        f"| style/concise | `{tmp_path} lora` |  | {sha256[:16]} |",
        f"| general_expert | `{tmp_path / 'lora'}` |  | {sha256[:16]} |",
        "| router_input | token |",
        "author    = {Li, Xurui and Yao, Juanjuan}",
    ]:
        assert part in card.text
    assert "set_task" not in card.text


def test_an_adapter_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="no card for a .*PROMPT_TUNING adapter; there are for LORA, MOELORA, MOLORA"):
        tags_of(PromptTuningConfig(num_virtual_tokens=2))


@pytest.mark.parametrize(
    "make", [make_moelora, lambda: make_adapter(BY_TOKEN[0][0]), lambda: make_adapter(BY_TOKEN[3][0])]
)
def test_saving_the_model_over_the_card_keeps_it(make, tmp_path: Path):
    model = make()
    before = make_card(model)
    before.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # else peft looks for me/base on the Hub
    after = ModelCard.load(tmp_path / "README.md")
    assert after.text.strip() == before.text.strip()
    assert set(after.data.tags) >= set(tags_of(model.active_peft_config))
    assert metadata(after)["model-index"] == metadata(before)["model-index"]
