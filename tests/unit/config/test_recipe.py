import pytest

from diffva_ray.config.recipe import RecipeError, fingerprint_difference, load_recipe, make_recipe, recipe_names
from diffva_ray.model.packaged import MODELS
from diffva_ray.progress import LOG


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert make_recipe(recipe.model_dump(mode="json")) == recipe


def test_overrides_are_typed_and_reach_lists() -> None:
    recipe = load_recipe("phantom", ["generate.strength=0.4", "train.stages.1.steps=7", "data.prompts.Normal=ok then"])
    assert recipe.generate.strength == 0.4
    assert recipe.train.stages[1].steps == 7
    assert recipe.data.prompt("Normal") == "ok then"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("generate.strenght=0.4", "generate.strenght"),
        ("generate.strength=2", "generate.strength"),
        ("generate.strength", "key=value"),
        ("train.stages.9.steps=1", "'9'"),
        ("nonsense.deeper.key=1", "nonsense"),
        ("model.base=somewhere", "either base"),
        ("evaluate.fid_subsets=1", "evaluate.fid_subsets"),  # a jackknife needs two groups: refused before the run
        ("train.cache_megabytes=-5", "train.cache_megabytes"),
    ],
)
def test_a_bad_override_is_named_in_one_line(override: str, named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("phantom", [override])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="phantom"):
        load_recipe("fantom")


def test_no_recipe_has_the_name_of_a_packaged_model(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--recipe small --model small`` would be two different things; the earlier name still loads, and says so."""
    assert not set(recipe_names()) & set(MODELS)
    monkeypatch.setattr(LOG, "propagate", True)
    with caplog.at_level("INFO", LOG.name):
        assert load_recipe("small") == load_recipe("cpu")
    assert "recipe small is called cpu now" in caplog.text


def test_a_recipe_file_is_read(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nmodel: {base: some/model}\n")
    assert load_recipe(str(tmp_path / "mine.yaml")).model.base == "some/model"
    with pytest.raises(RecipeError, match=r"other\.yaml"):
        load_recipe(str(tmp_path / "other.yaml"))


def test_difference_names_changed_added_and_removed_keys() -> None:
    assert fingerprint_difference({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "d": 4}) == ["b", "c", "d"]


def test_no_value_is_the_empty_text() -> None:
    """A shell removes the quotes of ``--set generate.source_prompt=""``."""
    recipe = load_recipe("phantom", ["generate.source_prompt="])
    assert recipe.generate.source_prompt == ""
