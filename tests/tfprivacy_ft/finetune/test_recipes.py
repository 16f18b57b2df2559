import dataclasses
import json

import pytest

from tfprivacy_ft.clipping import Automatic
from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.finetune import Bias, Full, Head, LastLayers, LoRA, Staged, ZeroShot, recipes


def test_names_stand_for_recipes_and_recipes_for_themselves():
    assert recipes.find("head") == Head()
    assert recipes.find("one_stage") == Full()
    assert recipes.find("light") == Staged((Head(), LastLayers(2)))
    assert recipes.find(LoRA(2)) == LoRA(rank=2)
    with pytest.raises(InvalidArgumentError, match="recipe='heads' is not allowed: give one of bias, full, head"):
        recipes.find("heads")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Head(epochs=0), "epochs=0"),
        (lambda: Full(learning_rate=-1.0), "learning_rate=-1.0"),
        (lambda: Full(noise_ratio=0), "noise_ratio=0"),
        (lambda: Full(average_weights=1.0), "average_weights=1.0"),
        (lambda: Full(augmentations=4), "augmentations=4 without augment"),
        (lambda: LoRA(rank=0), "rank=0"),
        (lambda: LastLayers(0), "count=0"),
        (lambda: Head((0,)), "hidden_units=0"),
        (lambda: Staged(()), "stages="),
        (lambda: Staged((Head(), ZeroShot())), "stages="),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(make, text):
    with pytest.raises(InvalidArgumentError, match=text):
        make()


def test_defaults_depend_on_public_facts_and_give_way_to_what_is_said():
    head, full = recipes.stages_of(Staged((Head(), Full())), num_examples=10_000)
    assert None not in (head.epochs, head.batch_size, full.epochs, full.batch_size)
    (small,) = recipes.stages_of(Full(batch_size=5000, epochs=7, learning_rate=0.3), num_examples=400)
    assert (small.batch_size, small.epochs, rate(small)) == (400, 7, 0.3)
    assert recipes.stages_of(ZeroShot(), num_examples=400) == ()


def rate(stage, *, noise_multiplier=5.0, target_epsilon=3.0, unit_rows=True):
    facts = {"noise_multiplier": noise_multiplier, "target_epsilon": target_epsilon, "unit_rows": unit_rows}
    return recipes.with_learning_rate(stage, num_examples=1000, **facts).learning_rate


def test_more_noise_takes_smaller_steps_and_a_smaller_clip_larger_ones():
    (head,) = recipes.stages_of(Head(), num_examples=1000)
    assert rate(head) == pytest.approx(2 * rate(head, noise_multiplier=10.0))
    (full,) = recipes.stages_of(Full(), num_examples=1000)
    assert rate(full) > rate(full, target_epsilon=1.0)
    for stage in (head, full):
        narrow = dataclasses.replace(stage, l2_norm_clip=stage.l2_norm_clip / 4)
        assert rate(narrow) == pytest.approx(4 * rate(stage))


def test_a_head_on_rows_of_any_length_and_one_with_layers_take_the_careful_rate():
    linear, deep = (recipes.stages_of(head, num_examples=1000)[0] for head in (Head(), Head((8,))))
    assert rate(linear, unit_rows=False) < rate(deep) < rate(linear)
    assert rate(dataclasses.replace(linear, optimizer="Adam")) == 0.01


def test_a_recipe_is_told_in_json_without_the_folders_of_a_machine():
    told = recipes.describe(Staged((Head(cache="/some/where", clipping=Automatic()), Bias(optimizer="Adam"))))
    assert json.loads(json.dumps(told)) == told
    assert "/some/where" not in json.dumps(told)
    assert told["name"] == "head, bias" and told["stages"][1]["optimizer"] == "Adam"
