"""Test recipes: accepted values, refused values, and the text of the errors."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from training.recipes import MAX_TEACHERS, RECIPES, Recipe, RecipeError, format_value, make_recipe, parse_recipe


def test_an_unknown_recipe_is_an_error_listing_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="no recipe 'resnet50'; choose one of resnet-seed, shared-resnet, resnet, "):
        make_recipe("resnet50")


def test_a_mistyped_field_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match=r"no field 'learning-rate'; did you mean learning_rate\?"):
        make_recipe("resnet", {"learning-rate": "0.1"})


def test_a_field_like_no_other_is_an_error_listing_all() -> None:
    with pytest.raises(RecipeError, match="no field 'zzz'; the fields are network, epochs, batch_size"):
        make_recipe("resnet", {"zzz": 1})


def test_a_recipe_cannot_be_renamed() -> None:
    with pytest.raises(RecipeError, match="no field 'name'"):
        make_recipe("resnet", {"name": "mine"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", "three"),
        ("epochs", 2.5),
        ("batch_size", 1),
        ("learning_rate", 0),
        ("learning_rate", -0.1),
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("momentum", 1),
        ("label_smoothing", 1),
        ("dropout", 1.0),
        ("crop_padding", 17),
        ("width", 12),
        ("width", 0),
        ("flip", "perhaps"),
        ("optimizer", "lion"),
        ("schedule", "exponential"),
        ("precision", "float8"),
        ("seed", -1),
        ("validation_images", -1),
    ],
)
def test_an_impossible_value_is_an_error_naming_the_field(field: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"^{field}: "):
        make_recipe("resnet", {field: value})


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(RecipeError, match=r"^epochs: .*; width: "):
        make_recipe("resnet", {"epochs": 0, "width": 9})


@pytest.mark.parametrize(
    ("name", "overrides", "fault"),
    [
        ("resnet", {"image_size": 224}, "^image_size applies to network=resnet18, not to resnet"),
        ("resnet", {"weights": "imagenet"}, "weights=imagenet applies to network=resnet18, not"),
        ("resnet-seed", {"finetune_epochs": 1}, "finetune_epochs applies to network=resnet18, not to shared"),
        ("resnet", {"trainable": "layer4,fc"}, "trainable applies to network=resnet18, not"),
        ("resnet", {"batch_norm_statistics": "shared"}, "batch_norm_statistics applies to network=shared-resnet"),
        ("resnet", {"shortcuts": "identity"}, "shortcuts applies to network=shared-resnet"),
        ("resnet18", {"normalization": "half"}, "normalization applies to network=shared-resnet or resnet, not"),
        ("resnet", {"flip": False, "flip_alternates": True}, "flip_alternates applies only with flip=true"),
        ("resnet", {"crop_padding": 0, "crop_fill": "zeros"}, "crop_fill=zeros applies only if crop_padding shifts"),
        ("resnet", {"teacher_weight": 0.5}, "teacher_weight applies only with a teacher"),
        ("resnet", {"teacher_view": "augmented"}, "teacher_view applies only with a teacher"),
        (
            "resnet18",
            {"teacher": "resnet/1", "teacher_view": "augmented"},
            "teacher_view=augmented applies only if every stage trains",
        ),
        ("resnet", {"teacher_temperature": 1}, "teacher_temperature applies only with a teacher"),
        ("resnet18", {"momentum": 0.5}, "momentum applies to optimizer=sgd or muon, not to adam"),
        ("resnet18", {"mixup": 0.2, "cutmix": 1}, "mixup and cutmix exclude each other"),
        ("resnet18", {"trainable": ""}, "trainable must contain fc"),
        ("resnet18", {"trainable": "layer4"}, "trainable must contain fc"),
        ("resnet18", {"trainable": "layer5,fc"}, "layer5|trainable"),
    ],
)
def test_a_contradiction_is_an_error(name: str, overrides: dict[str, Any], fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        make_recipe(name, overrides)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("resnet18", {"width": 64}), ("resnet18", {"dropout": 0.5}), ("resnet", {"finetune_learning_rate": 1e-3})],
)
def test_a_field_without_effect_is_an_error(name: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="applies to"):
        make_recipe(name, overrides)


def test_strings_are_parsed() -> None:
    parsed = make_recipe(
        "resnet18",
        {
            "epochs": "3",
            "learning_rate": "2e-3",
            "flip": "false",
            "trainable": "layer3,layer4,fc",
            "reinitialize": "layer4",
            "weights": "/data/resnet18.pth",
        },
    )
    assert (parsed.epochs, parsed.learning_rate, parsed.flip) == (3, 2e-3, False)
    assert parsed.trainable == ("layer3", "layer4", "fc")
    assert parsed.reinitialize == ("layer4",)
    assert parsed.weights == "/data/resnet18.pth"
    assert parsed.total_epochs == 3 + 6


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name: str) -> None:
    original = make_recipe(name, {"seed": 7, "learning_rate": 0.123})
    assert parse_recipe(json.loads(original.model_dump_json())) == original != make_recipe(name)


def test_json_with_a_field_missing_or_too_many_is_an_error() -> None:
    values = make_recipe("resnet").model_dump()
    with pytest.raises(RecipeError, match="color: Extra"):
        parse_recipe(values | {"color": "red"})
    del values["network"]
    with pytest.raises(RecipeError, match="network: Field required"):
        parse_recipe(values)


def test_a_field_is_read_under_its_former_name_too() -> None:
    """Clients, cards, run folders and jobs of earlier releases have `reinitialise`."""
    recipe = make_recipe("resnet18", {"reinitialise": "layer4"})
    assert recipe == make_recipe("resnet18", {"reinitialize": "layer4"})
    values = recipe.model_dump()
    values["reinitialise"] = values.pop("reinitialize")
    assert parse_recipe(json.loads(json.dumps(values))) == recipe


def test_a_field_under_both_of_its_names_is_an_error() -> None:
    both = {"reinitialise": ("layer4",), "reinitialize": ("layer3",)}
    with pytest.raises(RecipeError, match="reinitialise is the former name of reinitialize"):
        make_recipe("resnet18", both)
    with pytest.raises(RecipeError, match="reinitialise is the former name of reinitialize"):
        parse_recipe(RECIPES["resnet18"].model_dump() | both)


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_recipe("resnet").epochs = 3


def test_each_network_is_a_model_of_its_own_in_the_store() -> None:
    assert {name: each.model for name, each in RECIPES.items()} == {
        "resnet-seed": "resnet-seed",
        "shared-resnet": "resnet-seed",
        "resnet": "resnet",
        "resnet18-seed": "resnet18",
        "resnet18": "resnet18",
    }


def test_every_text_and_list_of_a_recipe_has_a_greatest_length() -> None:
    """Each value is an argument of the training process, and every list of jobs repeats it."""
    for field, schema in Recipe.model_json_schema()["properties"].items():
        for form in schema.get("anyOf", [schema]):
            if form.get("type") == "string":
                assert form.get("maxLength", 10**9) <= 4096 or "enum" in form, field
            elif form.get("type") == "array":
                assert form["maxItems"] <= 6, field
    longest = parse_recipe(
        RECIPES["resnet18"].model_dump()
        | {"teacher": ",".join([f"{'x' * 64}/{'9' * 9}"] * MAX_TEACHERS), "weights": "x" * 4096}
    )
    # A process may have 128 KiB of arguments.
    assert sum(len(format_value(value)) for value in longest.model_dump().values()) < 16_000


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": ",".join(["resnet/1"] * (MAX_TEACHERS + 1))},
        {"teacher": f"{'x' * 65}/1"},
        {"teacher": "resnet/1," * 100_000},
        {"weights": "x" * 5000},
        {"trainable": ["fc"] * 7},
        {"trainable": "fc," * 300_000},
        {"reinitialize": ["fc"] * 1_000_000},
    ],
    ids=lambda changes: str(changes)[:30],
)
def test_text_or_list_that_is_too_long_is_refused_in_few_words(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as refused:
        make_recipe("resnet18", changes)
    assert len(str(refused.value)) < 1000
    assert next(iter(changes)) in str(refused.value)


def test_long_name_is_quoted_in_part() -> None:
    for name, overrides in (("x" * 10**6, {}), ("resnet", {"x" * 10**6: 1})):
        with pytest.raises(RecipeError, match=r"'x{99}…'") as refused:
            make_recipe(name, overrides)
        assert len(str(refused.value)) < 1000
