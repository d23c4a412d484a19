"""Routing made up from a few texts: every number in it follows from weights that are drawn, always the same ones."""

import math
import re
from types import SimpleNamespace

import torch

from peft_moe.report.findings import findings

TEXTS = {
    "icd": [
        (
            "Give the ICD-10 code.\nPatient, 67 years old, was seen at the clinic on 3 March 2023 with type 2 diabetes "
            "and diabetic polyneuropathy. HbA1c is 8.1%, her feet are numb since 6 weeks, and there is no ulcer. She "
            "takes metformin 1000 mg twice a day.\nCode:",
            " E11.42",
        ),
        ("Give the ICD-10 code.\nAcute bronchitis, no fever, cough since 4 days.\nCode:", " J20.9"),
    ],
    "triage": [
        ("Sort by urgency: chest pain since 20 minutes, pain in the left arm.\nUrgency:", " immediate (1 of 5)"),
        ("Sort by urgency: a sprained ankle, can walk, pain 3 of 10.\nUrgency:", " standard (4 of 5)"),
    ],
    "summary": [
        (
            "Summarise the letter in a sentence.\nWe saw Mrs K. on 12 May 2023. Her blood pressure was 168/95 mmHg. We "
            "started ramipril 5 mg and asked her to come back in two weeks.\nSummary:",
            " Hypertension (168/95), ramipril 5 mg started, control in two weeks.",
        ),
        ("Summarise in a sentence.\nNo polyps were found in the colonoscopy.\nSummary:", " Normal colonoscopy."),
    ],
    "translate": [
        ("Translate into German: The wound is healing well.\nGerman:", " Die Wunde heilt gut."),
        ("Translate into German: Take one tablet at night.\nGerman:", " Nehmen Sie abends eine Tablette."),
    ],
}
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
GROUPS = {"function": ["coding", "triage", "letters"], "style": ["concise", "plain words", "formal"]}
KINDS = [r"[\d./-]+", r"[^\w\s]+", r"\s+", r"(the|a|an|of|in|with|and|to|is|was|by|at|no|since|her|we)", r"[A-Z]\w*"]


def pieces(text):
    return re.findall(r" ?[A-Za-z]{1,6}|[a-z]+| ?\d+|\n|[^\w\s]|\s", text)


def kind_of(piece):
    """Index of the first pattern that fits; one more for all other words."""
    return next((i for i, kind in enumerate(KINDS) if re.fullmatch(kind, piece.strip() or piece)), len(KINDS))


def sample_report(method="MoLoRA", *, blocks=4, modules=MODULES, experts=8, tasks=tuple(TEXTS), copies=True, seed=0):
    """A routing dict of format 1 and samples, of a method with that many blocks and experts.

    Tasks that are not in TEXTS take the texts of those that are; with none the rows have no task. With `copies`, two
    experts of the first layer point the same way.
    """
    generator = torch.Generator().manual_seed(seed)
    at_moe = method == "AT-MoE"
    groups = list(GROUPS) if at_moe else None
    rows = [
        (task, *texts)
        for i, task in enumerate(tasks or [None])
        for texts in TEXTS.get(task, list(TEXTS.values())[i % 4])
    ]
    cut = [[pieces(prompt), pieces(answer)] for _, prompt, answer in rows]
    tokens = [piece for row in cut for part in row for piece in part]
    kinds = torch.tensor([kind_of(piece) for piece in tokens])
    lengths = [sum(map(len, row)) for row in cut]
    row_of = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths))
    task_of = torch.tensor([list(tasks or [None]).index(rows[r][0]) for r in row_of])
    layers, weights, gate = [], [], None
    for block in range(blocks):
        for module in ("",) if at_moe else modules:
            names, group_of = experts_of(method, experts, block, blocks)
            depth = block / max(1, blocks - 1)
            by_kind = torch.randn(len(KINDS) + 1, len(names), generator=generator)
            by_task = torch.randn(max(1, len(tasks)), len(names), generator=generator)
            noise = torch.randn(len(tokens), len(names), generator=generator)
            if method == "MOELoRA":  # one gate for all layers
                gate = by_task if gate is None else gate
                by_task, depth = gate, 1
            scores = 2.2 * depth * by_task[task_of]
            if method != "MOELoRA":
                scores = 1.4 * scores / 2.2 + (2.6 - 1.5 * depth) * by_kind[kinds] + 0.5 * noise
            w = scores.softmax(-1)
            if method == "Med-MoE-LoRA":
                kept = w.topk(min(2, len(names)), dim=-1).indices
                w = torch.zeros_like(w).scatter(1, kept, w.gather(1, kept))
                w = w / w.sum(-1, keepdim=True)
            layers.append(layer_of(w, block, module, names, group_of, task_of, tasks, groups))
            layers[-1]["similarity"] = cosines(len(names), generator, copies and len(layers) == 1)
            weights.append(w)
    samples = [sample(cut, rows, weights, lengths, i, method) for i in range(len(rows))]
    routing = {
        "format": 1, "adapter": f"outputs/{method.lower()}", "method": method,
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "rows": len(rows), "tokens": len(tokens),
        "tasks": sorted(tasks), "groups": groups, "layers": layers, "findings": [],
    }  # fmt: skip
    routing["findings"] = findings(routing)
    return routing, samples


def sample_routing(method="MoLoRA", blocks=4, modules=MODULES, experts=8, tasks=tuple(TEXTS)):
    """Only the dict."""
    return sample_report(method, blocks=blocks, modules=modules, experts=experts, tasks=tasks)[0]


def experts_of(method, experts, block, blocks):
    """Names of a layer's experts, and their groups."""
    if method == "AT-MoE":
        names = [f"{group}/{name}" for group, members in GROUPS.items() for name in members]
        return [*names, "general"], [0, 0, 0, 1, 1, 1, -1]
    if method == "Med-MoE-LoRA":  # more of them in deeper layers
        special = max(1, round(experts * (0.5 + 0.5 * block / max(1, blocks - 1))) - 1)
        return ["base 0", *map(str, range(special))], None
    return list(map(str, range(experts))), None


def entropy(w):
    return -(w * w.clamp(min=1e-30).log()).sum(-1)


def layer_of(w, block, module, names, group_of, task_of, tasks, groups):
    """What routing.json has of a layer whose tokens have the weights w (tokens, E)."""
    load = w.double().mean(0)
    top = torch.nn.functional.one_hot(w.argmax(-1), len(names)).double().mean(0)
    return {
        "name": f"model.layers.{block}" + (f".{module}" if module else ""),
        "block": block,
        "module": module,
        "experts": names,
        "ranks": [8] * len(names),
        "group_of": group_of,
        "tokens": len(w),
        "load": load.tolist(),
        "top1": top.tolist(),
        "chosen": (w > 0).double().mean(0).tolist(),
        "entropy": entropy(w).mean().item(),
        "effective_experts": math.exp(entropy(load).item()),
        "chosen_per_token": (w > 0).sum(-1).double().mean().item(),
        "group_load": groups and [among(load, torch.tensor(group_of), g) for g in range(len(groups))],
        "tasks": {
            task: {
                "tokens": int((task_of == i).sum()),
                "load": w[task_of == i].double().mean(0).tolist(),
                "entropy": entropy(w[task_of == i]).mean().item(),
            }
            for i, task in enumerate(tasks)
        },
    }  # fmt: skip


def among(load, group_of, g):
    """The weight of a group without the general expert."""
    return (load[group_of == g].sum() / load[group_of >= 0].sum()).item()


def cosines(experts, generator, copies):
    directions = torch.randn(experts, 24, generator=generator)
    if copies and experts > 4:
        directions[4] = directions[1] + 0.2 * directions[4]
    directions = directions / directions.norm(dim=-1, keepdim=True)
    return (directions @ directions.T).tolist()


def sample(cut, rows, weights, lengths, index, method):
    """A row token by token; where a router decides by task, it has one row of weights."""
    prompt, answer = cut[index]
    start = sum(lengths[:index])
    stop = start + (1 if method == "MOELoRA" else lengths[index])
    return SimpleNamespace(
        task=rows[index][0],
        tokens=prompt + answer,
        prompt_tokens=len(prompt),
        weights=[w[start:stop].clone() for w in weights],
    )
