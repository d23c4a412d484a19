"""How many experts each layer gets: reference lists, bands, what is refused, and names of real models' layers."""

import math
from fractions import Fraction

import pytest
from tiny_models import make_model

from peft_moe.schedule import SHAPES, bands, check_schedule, experts_per_layer, layer_of, power_law, stacks

# Med-MoE-LoRA's eq. 2 for N_min = 2, N_max = 8, L = 32, worked out by hand.
REFERENCE = {
    1: [2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 8],
    2: [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 7, 7, 8],
}  # fmt: skip


@pytest.mark.parametrize("gamma", REFERENCE)
def test_the_power_law_has_its_reference_values(gamma):
    assert power_law(32, smallest=2, largest=8, gamma=gamma) == REFERENCE[gamma]


# L, N_max - N_min, γ, and a layer whose product is whole and comes out just below that in floats
FALL_SHORT = [(22, 22, 1, 15), (26, 26, 1, 15), (28, 49, 2, 8), (6, 27, 3, 4)]


@pytest.mark.parametrize(("num_layers", "span", "gamma", "layer"), FALL_SHORT)
def test_the_floor_is_that_of_exact_arithmetic(num_layers, span, gamma, layer):
    exact = [2 + math.floor(span * Fraction(at, num_layers) ** gamma) for at in range(1, num_layers + 1)]
    assert 2 + math.floor(span * (layer / num_layers) ** gamma) == exact[layer - 1] - 1
    assert power_law(num_layers, smallest=2, largest=2 + span, gamma=gamma) == exact


def test_the_largest_number_is_at_the_last_layer_only_and_numbers_never_fall():
    for gamma in (1.0, 1.5, 4.0):
        numbers = power_law(32, smallest=2, largest=8, gamma=gamma)
        assert numbers == sorted(numbers)
        assert numbers.index(8) == 31


def test_two_experts_up_to_layer_10_need_a_gamma_above_1_54():
    """log(1/6) / log(10/32) = 1.5404: what the paper's experiments imply for its eq. 2."""
    assert power_law(32, smallest=2, largest=8, gamma=1.53)[9] == 3
    assert power_law(32, smallest=2, largest=8, gamma=1.55)[9] == 2


def test_bands_count_layers_from_0_and_end_before_their_stop():
    assert bands(5, [(0, 2, 1), (2, 5, 8)]) == [1, 1, 8, 8, 8]
    assert bands(5, [[2, 5, 8], [0, 2, 1]]) == [1, 1, 8, 8, 8]  # in any order
    paper = bands(32, [[0, 10, 2], [10, 19, 4], [19, 32, 8]])
    assert (paper[9], paper[10], paper[18], paper[19]) == (2, 4, 4, 8)
    assert [paper.count(n) for n in (2, 4, 8)] == [10, 9, 13]


DO_NOT_FIT = [  # what, layers, words of the error
    ([[0, 2, 2], [1, 4, 4]], 4, r"bands=\[\[0, 2, 2\], \[1, 4, 4\]\]: layer 1 is in two bands; each layer belongs"),
    ([[0, 5, 2]], 4, r"bands=\[\[0, 5, 2\]\]: layer 4 is beyond the model's 4 layers; each layer belongs to one"),
    ([[0, 1, 2], [3, 4, 8]], 4, r"bands=.* leave out layers \[1, 2\] of a model with 4; a layer is counted from 0"),
    ([[1, 4, 2]], 4, r"leave out layers \[0\] .* a band \[start, stop, experts\] ends before stop"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "num_layers", "message"), DO_NOT_FIT, ids=lambda v: str(v)[:30])
def test_bands_that_do_not_fit_the_model_are_refused(parts, num_layers, message):
    check_schedule({"type": "bands", "bands": parts})  # they may fit another
    with pytest.raises(ValueError, match=message):
        experts_per_layer({"type": "bands", "bands": parts}, num_layers, 8)


FORMS = [  # schedule, number of layers, num_experts, result
    ("uniform", 4, 6, [6, 6, 6, 6]),
    ("ascending", 4, 8, [2, 3, 5, 8]),  # 2 + ⌊6 (l/4)²⌋ = 2 + ⌊0.375⌋, ⌊1.5⌋, ⌊3.375⌋, 6
    ("descending", 4, 8, [8, 5, 3, 2]),
    ("ascending", 32, 8, REFERENCE[2]),
    ("ascending", 3, 1, [1, 1, 1]),
    ("ascending", 1, 8, [8]),
    ({"type": "power", "min": 2, "max": 8}, 32, 4, REFERENCE[2]),
    ({"type": "power", "min": 2, "max": 8, "gamma": 1}, 32, 4, REFERENCE[1]),
    ({"type": "power", "min": 3, "max": 3, "gamma": 1.5}, 2, 4, [3, 3]),
    ({"type": "bands", "bands": [[0, 1, 2], [1, 3, 5]]}, 3, 4, [2, 5, 5]),
    ([4, 1, 2], 3, 8, [4, 1, 2]),
    ((4, 1, 2), 3, 8, [4, 1, 2]),
]


@pytest.mark.parametrize(("schedule", "num_layers", "num_experts", "expected"), FORMS, ids=lambda v: str(v)[:30])
def test_every_form_of_schedule(schedule, num_layers, num_experts, expected):
    check_schedule(schedule)
    assert experts_per_layer(schedule, num_layers, num_experts) == expected


def test_a_list_for_a_layer_is_a_copy():
    schedule = [1, 2]
    experts_per_layer(schedule, 2, 8).append(3)
    assert schedule == [1, 2]


@pytest.mark.parametrize("schedule", [[2, 4], [2, 4, 8, 8]])
def test_a_list_of_another_length_is_refused(schedule):
    said = (
        rf"expert_schedule=\[2, 4.*\] has {len(schedule)} entries, and the model has 3 layers; give one per layer, or"
    )
    with pytest.raises(ValueError, match=said):
        experts_per_layer(schedule, 3, 8)


NO_SCHEDULE = [
    ("linear", "this shape is not known"),
    ("", "this shape is not known"),
    (8, "a int is no schedule"),
    (None, "a NoneType is no schedule"),
    (2.5, "a float is no schedule"),
    ([], "from 1 up"),
    ([2, 0], "from 1 up"),
    ([2, -1], "from 1 up"),
    ([2, 2.0], "from 1 up"),
    ([2, True], "from 1 up"),
    ([2, "4"], "from 1 up"),
    ([[0, 2, 2]], "from 1 up"),  # bands without their name
    ({}, "type is 'power' or 'bands'"),
    ({"min": 2, "max": 8}, "type is 'power' or 'bands'"),
    ({"type": "cosine"}, "type is 'power' or 'bands'"),
    ({"type": "power"}, "has min, max and, if not 2, gamma"),
    ({"type": "power", "min": 2}, "has min, max and, if not 2, gamma"),
    ({"type": "power", "min": 2, "max": 8, "power": 2}, "has min, max and, if not 2, gamma"),
    ({"type": "power", "min": 0, "max": 8}, "1 <= min <= max"),
    ({"type": "power", "min": 8, "max": 2}, "1 <= min <= max"),
    ({"type": "power", "min": 2, "max": 8.0}, "1 <= min <= max"),
    ({"type": "power", "min": True, "max": 8}, "1 <= min <= max"),
    ({"type": "power", "min": 2, "max": 8, "gamma": 0}, "gamma is a number above 0"),
    ({"type": "power", "min": 2, "max": 8, "gamma": -1}, "gamma is a number above 0"),
    ({"type": "power", "min": 2, "max": 8, "gamma": math.inf}, "gamma is a number above 0"),
    ({"type": "power", "min": 2, "max": 8, "gamma": math.nan}, "gamma is a number above 0"),
    ({"type": "power", "min": 2, "max": 8, "gamma": True}, "gamma is a number above 0"),
    ({"type": "power", "min": 2, "max": 8, "gamma": "2"}, "gamma is a number above 0"),
    ({"type": "bands"}, "bands has a list of"),
    ({"type": "bands", "bands": []}, "bands has a list of"),
    ({"type": "bands", "bands": "0-10"}, "bands has a list of"),
    ({"type": "bands", "bands": [[0, 2, 2]], "gamma": 2}, "bands has a list of"),
    ({"type": "bands", "bands": [[0, 2]]}, "a band is"),
    ({"type": "bands", "bands": [0, 2, 2]}, "a band is"),
    ({"type": "bands", "bands": [[2, 2, 4]]}, "a band is"),
    ({"type": "bands", "bands": [[3, 2, 4]]}, "a band is"),
    ({"type": "bands", "bands": [[-1, 2, 4]]}, "a band is"),
    ({"type": "bands", "bands": [[0, 2, 0]]}, "a band is"),
    ({"type": "bands", "bands": [[0, 2, 2.0]]}, "a band is"),
    ({"type": "bands", "bands": [[0, True, 2]]}, "a band is"),
]


@pytest.mark.parametrize(("schedule", "why"), NO_SCHEDULE, ids=lambda v: str(v)[:50])
def test_what_is_no_schedule_is_refused_with_its_value_the_rule_and_the_forms(schedule, why):
    with pytest.raises(ValueError) as error:
        check_schedule(schedule)
    said = str(error.value)
    assert said.startswith(f"expert_schedule={schedule!r}: ")
    assert why in said
    assert all(shape in said for shape in SHAPES)
    assert said.endswith("or a list.")


LAYERS = [  # name of a module, its stack and layer
    ("model.layers.3.mlp.up_proj", ("model.layers", 3)),
    ("model.layers.31", ("model.layers", 31)),
    ("transformer.h.11.attn.c_attn", ("transformer.h", 11)),
    ("encoder.block.2.layer.1.DenseReluDense.wi", ("encoder.block", 2)),  # not the 1 of the layer within the block
    ("model.layers.0.mlp.experts.7.w1", ("model.layers", 0)),
    ("0", ("", 0)),
    ("lm_head", None),
    ("model.layer2.fc", None),  # a number within a word is no index
    ("", None),
]


@pytest.mark.parametrize(("key", "expected"), LAYERS)
def test_the_layer_of_a_module_is_the_first_number_in_its_name(key, expected):
    assert layer_of(key) == expected


STACKS = {
    "llama": {"model.layers": 2},
    "gpt2": {"transformer.h": 2},
    "bert": {"bert.encoder.layer": 2},
    "opt": {"model.decoder.layers": 2},
    "t5": {"encoder.block": 2, "decoder.block": 2},
}


@pytest.mark.parametrize("name", STACKS)
def test_the_stacks_of_a_real_model_are_its_layers(name):
    keys = [key for key, _ in make_model(name).named_modules()]
    assert stacks(keys) == STACKS[name]
    inside = {layer_of(key) for key in keys} - {None}
    assert inside == {(stack, index) for stack, length in STACKS[name].items() for index in range(length)}


def test_a_model_without_numbered_layers_has_no_stacks():
    assert stacks(["", "fc1", "fc2"]) == {}


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        ("0.auto_model.encoder.layer.3.attention.q", ("0.auto_model.encoder.layer", 3)),  # nn.Sequential around a model
        ("1.dense", ("", 1)),
        ("model.layers.3.mlp.experts.7.up_proj", ("model.layers", 3)),
        ("lm_head", None),
    ],
)
def test_a_number_at_the_start_of_a_name_counts_only_if_there_is_no_other(key, layer):
    assert layer_of(key) == layer
