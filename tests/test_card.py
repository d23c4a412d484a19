"""The model card: what it says, and that neither peft nor a round through its own parser changes it."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_model

from peft_moe import MoeLoraConfig
from peft_moe.card import TAGS, model_card
from peft_moe.data import TaskInfo

INFO = {"size": TaskInfo("size", "Small | tall?", "accuracy"), "leaf": TaskInfo("leaf", "Which leaf?", "macro_f1")}
RESULTS = {
    "size": {"metric": "accuracy", "score": 0.75, "exact_match": 0.75, "n": 8},
    "leaf": {"metric": "macro_f1", "score": 0.5, "exact_match": 0.625, "n": 8},
    "mean": {"metric": "mean", "score": 0.625, "exact_match": 0.6875, "n": 16},
}


def make_moelora() -> PeftModel:
    base = make_model("llama")
    base.name_or_path = base.config._name_or_path = "me/base"
    base.add_model_tags(list(TAGS))
    config = MoeLoraConfig(
        task_type="CAUSAL_LM", r=4, num_experts=2, tasks=list(INFO), target_modules=["v_proj", "q_proj"]
    )
    return get_peft_model(base, config)


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


@pytest.mark.parametrize(("dataset", "said"), [("data/medmulti/tiny", True), ("me/forest", False)])
def test_only_medmulti_comes_with_its_note(dataset, said):
    assert ("medical advice" in make_card(make_moelora(), dataset=dataset).text) is said


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


def test_saving_the_model_over_the_card_keeps_it(tmp_path: Path):
    model = make_moelora()
    before = make_card(model)
    before.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # else peft looks for me/base on the Hub
    after = ModelCard.load(tmp_path / "README.md")
    assert after.text.strip() == before.text.strip()
    assert set(after.data.tags) >= set(TAGS)
    assert metadata(after)["model-index"] == metadata(before)["model-index"]
