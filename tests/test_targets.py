"""Which MLPs does a request reach? Layers, names, parts of a pair, names that are not there."""

import pytest
from helpers.models import CONFIG, assert_same, build, llama, opt, snapshot
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hf_subquad import NoMatchError, PatchError, SubquadConfig, WeightsError, patch_model, sparse_mlps


def config(**values: object) -> SubquadConfig:
    return SubquadConfig(**{**CONFIG.to_dict(), **values})


def patched_names(model: nn.Module) -> list[str]:
    return [mlp.name for mlp in sparse_mlps(model)]


def layers(*numbers: int) -> list[str]:
    return [f"model.decoder.layers.{n}" for n in numbers]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, layers(1, 2)),
        ({"layers_to_transform": "all"}, layers(0, 1, 2)),
        ({"layers_to_transform": [2, 0]}, layers(0, 2)),
        ({"layers_to_transform": [0]}, layers(0)),
        ({"target_modules": ["fc1", "fc2"]}, layers(1, 2)),
        ({"target_modules": ["layers.2.fc1", "layers.2.fc2"]}, layers(2)),
        ({"target_modules": ["layers.0.fc1", "layers.0.fc2"], "layers_to_transform": "all"}, layers(0)),
        ({"target_modules": ["model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"]}, layers(1)),
    ],
)
def test_request_reaches(values: dict[str, object], expected: list[str]) -> None:
    assert patched_names(patch_model(opt(), config(**values))) == expected


def test_all_but_first_counts_per_stack() -> None:
    names = patched_names(patch_model(build("t5"), CONFIG))
    assert names == [f"{side}.block.{n}.layer.{2 if side == 'decoder' else 1}.DenseReluDense"
                     for side in ("encoder", "decoder") for n in (1, 2)]  # fmt: skip


def test_first_named_layer_of_a_request_is_not_dropped() -> None:
    """all_but_first leaves out the first layer of the stack, not the first of what the names left over."""
    values = {"target_modules": ["layers.1.fc1", "layers.1.fc2", "layers.2.fc1", "layers.2.fc2"]}
    assert patched_names(patch_model(opt(), config(**values))) == layers(1, 2)


def two_towers() -> nn.Module:
    """LLaVA: a CLIP vision tower, a language model, and a projector between them that has the shape of an MLP."""
    sizes = {"hidden_size": 20, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    text = LlamaConfig(**sizes, vocab_size=61, num_key_value_heads=1)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


VISION = [name.removesuffix(".fc1") for name, _ in two_towers().named_modules() if name.endswith(".fc1")]
LANGUAGE = [f"model.language_model.layers.{n}.mlp" for n in range(3)]


@pytest.mark.parametrize(
    ("excluded", "expected"),
    [
        (None, VISION[1:] + LANGUAGE[1:]),
        (["vision_tower"], LANGUAGE[1:]),
        (["model.vision_tower"], LANGUAGE[1:]),
        (["vision_tower", "language_model.layers.2"], LANGUAGE[1:2]),
        (["layers.1"], [VISION[2], LANGUAGE[2]]),
        (["fc1"], LANGUAGE[1:]),  # projections of an MLP are left out together
        ([f"{LANGUAGE[1]}.up_proj", "model.language_model.layers.2.mlp"], VISION[1:]),
        (["encoder.layers.0"], VISION[1:] + LANGUAGE[1:]),  # the first layer stays the first
    ],
)
def test_excluded_modules_stay_as_they_are(excluded: list[str] | None, expected: list[str]) -> None:
    model = patch_model(two_towers(), config(exclude_modules=excluded))
    assert patched_names(model) == expected
    patched = {f"{name}.{path}" for mlp in sparse_mlps(model) for path in mlp.sources for name in [mlp.name]}
    assert all((name in patched) == ("Projection" in type(m).__name__) for name, m in model.named_modules()
               if name.endswith(("fc1", "fc2", "_proj")) and ".mlp." in name)  # fmt: skip


@pytest.mark.parametrize("excluded", [["lower"], ["tower"], ["vision_tower", "lm_head"], ["ayers.1"]])
def test_an_excluded_name_that_is_not_there(excluded: list[str]) -> None:
    with pytest.raises(NoMatchError, match=rf"exclude_modules.*{excluded[-1]!r}; nearest are.*all are.*vision_tower"):
        patch_model(two_towers(), config(exclude_modules=excluded))


def test_all_is_excluded() -> None:
    with pytest.raises(NoMatchError, match=r"nothing is left.*exclude_modules=\['model'\] leaves those in \[\]"):
        patch_model(two_towers(), config(exclude_modules=["model"]))
    with pytest.raises(NoMatchError, match="nothing is left"):
        patch_model(opt(), config(target_modules=["layers.1.fc1", "layers.1.fc2"], exclude_modules=["layers.1"]))


def test_excluding_what_cannot_be_patched() -> None:
    model = two_towers()
    model.get_parameter(f"{VISION[1]}.fc1.weight").data[3, 4] = float("nan")
    with pytest.raises(WeightsError, match="vision_tower"):
        patch_model(model, config())
    assert patched_names(patch_model(model, config(exclude_modules=["vision_tower"]))) == LANGUAGE[1:]


def test_names_are_excluded_inside_peft_alike() -> None:
    adapted = get_peft_model(two_towers(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert patched_names(patch_model(adapted, config(exclude_modules=["vision_tower"]))) == LANGUAGE[1:]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"target_modules": ["fc1"]}, ["part", "fc1", "fc2", "layers.0"]),
        ({"target_modules": ["fc2", "layers.1.fc1"]}, ["part"]),
        ({"target_modules": ["fc3", "fc2"]}, ["fc3", "nearest", "fc1"]),
        ({"target_modules": ["c1", "fc2"]}, ["c1"]),  # the end of a name is not the name
        ({"target_modules": ["q_proj"]}, ["q_proj"]),
        ({"layers_to_transform": [3]}, ["layers_to_transform", "[3]", "[0, 1, 2]"]),
        ({"layers_to_transform": [1, 7, 9]}, ["[7, 9]"]),
    ],
)
def test_request_that_matches_nothing_says_what_there_is(values: dict[str, object], words: list[str]) -> None:
    model = opt()
    before = snapshot(model)
    with pytest.raises(NoMatchError) as caught:
        patch_model(model, config(**values))
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, PatchError)
    assert_same(before, snapshot(model))


def test_a_part_of_a_gated_mlp() -> None:
    with pytest.raises(NoMatchError, match=r"gate_proj.*up_proj.*down_proj"):
        patch_model(llama(), config(target_modules=["gate_proj", "down_proj"]))


def test_one_layer_is_all_first() -> None:
    model = opt(num_hidden_layers=1)
    with pytest.raises(NoMatchError, match=r"all_but_first.*'all'"):
        patch_model(model, CONFIG)
    assert not sparse_mlps(model)
    assert patched_names(patch_model(model, config(layers_to_transform="all"))) == layers(0)


def test_a_model_without_mlps_lists_what_was_searched_and_near_names() -> None:
    model = nn.Sequential()
    model.add_module("fc_1", nn.Linear(3, 4))
    model.add_module("head", nn.Linear(4, 2))
    with pytest.raises(NoMatchError) as caught:
        patch_model(model, CONFIG)
    for word in ("Sequential", "gate_proj / up_proj / down_proj", "intermediate.dense", "fc_1", "nearest", "fc1"):
        assert word in str(caught.value)


def test_default_config_is_used_without_one() -> None:
    model = patch_model(opt(hidden_size=24, word_embed_proj_dim=24))
    assert sparse_mlps(model)[0].runtime.config == SubquadConfig()
