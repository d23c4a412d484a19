"""The hub that other tests publish to: what is pushed comes back the same."""

import urllib.error
import urllib.request

import pytest

PUSH_ADAPTER = """
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_inputs, make_model

torch.manual_seed(0)
config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
model = get_peft_model(make_model("llama"), config).eval()
model.push_to_hub("adapter", private=True)
torch.save(model(**make_inputs("llama")).logits.detach(), "logits.pt")
"""

PULL_ADAPTER = """
import torch
from peft import PeftModel
from tiny_models import make_inputs, make_model

model = PeftModel.from_pretrained(make_model("llama"), "local/adapter")
assert torch.equal(model(**make_inputs("llama")).logits, torch.load("logits.pt"))
"""

PUSH_AND_PULL_DATASET = """
from datasets import Dataset, load_dataset

rows = [{"task": "a", "prompt": "x", "completion": "y"}, {"task": "b", "prompt": "x", "completion": "z"}]
Dataset.from_list(rows).push_to_hub("local/data")
assert load_dataset("local/data", split="train").to_list() == rows
"""

PUSH_PRIVATE_NOTE = """
from huggingface_hub import HfApi

HfApi().create_repo("secret", private=True)
HfApi().upload_file(path_or_fileobj=b"note", path_in_repo="note.txt", repo_id="local/secret")
"""

REVISE = """
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

api = HfApi()
api.create_repo("notes")
first = api.upload_file(path_or_fileobj=b"old", path_in_repo="folder/note.txt", repo_id="local/notes").oid
api.upload_file(path_or_fileobj=b"new", path_in_repo="folder/note.txt", repo_id="local/notes")
api.upload_file(path_or_fileobj=b"gone", path_in_repo="other.txt", repo_id="local/notes")
api.delete_file("other.txt", repo_id="local/notes")
assert api.list_repo_files("local/notes") == ["folder/note.txt"]
assert open(api.hf_hub_download("local/notes", "folder/note.txt")).read() == "new"
assert open(api.hf_hub_download("local/notes", "folder/note.txt", revision=first)).read() == "old"
for error, asked in {
    EntryNotFoundError: ("local/notes", "other.txt", None),
    RevisionNotFoundError: ("local/notes", "folder/note.txt", "nowhere"),
    RepositoryNotFoundError: ("local/nothing", "note.txt", None),
}.items():
    try:
        api.hf_hub_download(asked[0], asked[1], revision=asked[2])
    except error:
        continue
    raise AssertionError(f"{asked} should have raised {error}")
"""


@pytest.mark.long
def test_a_pushed_adapter_pulled_in_a_new_process_gives_the_same_logits(run_with_hub):
    run_with_hub(PUSH_ADAPTER)
    run_with_hub(PULL_ADAPTER)


def test_a_pushed_dataset_comes_back_row_for_row(run_with_hub):
    run_with_hub(PUSH_AND_PULL_DATASET)


def test_revisions_deletions_and_missing_things_are_told_apart(run_with_hub):
    run_with_hub(REVISE)


def test_a_private_repository_needs_the_token(run_with_hub, hub):
    run_with_hub(PUSH_PRIVATE_NOTE)
    with pytest.raises(urllib.error.HTTPError, match="401") as error:
        urllib.request.urlopen(f"{hub}/local/secret/resolve/main/note.txt")
    error.value.close()
