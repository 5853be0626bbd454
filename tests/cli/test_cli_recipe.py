"""Resolution of recipes: precedence, names, units, refusals, stages."""

import math

import pytest
import yaml

from fastdiff.engine import Settings
from fastdiff.methods import DMD2Config, LCMConfig
from fastdiff.recipes import RecipeError, resolve
from fastdiff.recipes.options import ALIASES, REFUSED
from fastdiff.recipes.recipe import check_name, sections, stage_recipe
from fastdiff.recipes.translate import TRANSLATED

DIFFUSERS_FLAGS = (
    *("pretrained_teacher_model", "pretrained_vae_model_name_or_path", "teacher_revision", "revision"),
    *("variant", "cache_dir", "pretrained_model_name_or_path", "train_shards_path_or_url", "dataset_name"),
    *("dataset_config_name", "train_data_dir", "image_column", "caption_column", "max_train_samples"),
    *("resolution", "interpolation_type", "center_crop", "random_flip", "dataloader_num_workers"),
    *("encode_batch_size", "vae_encode_batch_size", "proportion_empty_prompts", "output_dir", "seed"),
    *("train_batch_size", "num_train_epochs", "max_train_steps", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "mixed_precision", "allow_tf32", "cast_teacher_unet"),
    *("enable_xformers_memory_efficient_attention", "local_rank", "learning_rate", "scale_lr", "lr_scheduler"),
    *("lr_warmup_steps", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"),
    *("max_grad_norm", "ema_decay", "use_ema", "w_min", "w_max", "num_ddim_timesteps", "loss_type", "huber_c"),
    *("unet_time_cond_proj_dim", "timestep_scaling_factor", "lora_rank", "lora_alpha", "lora_dropout"),
    *("lora_target_modules", "rank", "output_kohya_format", "checkpointing_steps", "checkpoints_total_limit"),
    *("resume_from_checkpoint", "report_to", "logging_dir", "validation_steps", "tracker_project_name"),
    *("validation_prompts", "validation_prompt", "num_validation_images", "validation_epochs", "push_to_hub"),
    *("hub_token", "hub_model_id", "snr_gamma", "noise_offset", "prediction_type", "weighting_scheme"),
    *("guidance_scale", "cache_latents", "optimizer", "upcast_before_saving", "image_interpolation_mode"),
)


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_flags_over_yaml_over_defaults(recipe_file):
    recipe = resolve({"seed": "7", "timesteps": ["399"]}, recipe_file("seed: 3\nlearning_rate: 1e-5\n"))
    settings = recipe.build(Settings)
    assert (settings.seed, settings.learning_rate, settings.lora_rank) == (7, 1e-5, Settings().lora_rank)
    assert recipe.build(DMD2Config).timesteps == (399,)


def test_method_of_the_flag_wins(recipe_file):
    path = recipe_file("method: lcm\n")
    assert resolve({}, path).method == "lcm"
    assert resolve({"method": "dmd2"}, path).method == "dmd2"


def test_written_recipe_resolves_to_itself(tmp_path):
    recipe = resolve({"method": "lcm", "w_min": 3, "w_max": 15, "hub_token": "secret", "validation_prompts": "a, b"})
    recipe.write(tmp_path / "recipe.yaml")
    assert "secret" not in (tmp_path / "recipe.yaml").read_text()
    assert resolve({}, tmp_path / "recipe.yaml") == recipe.changed(hub_token=None)


def test_w_of_lcm_scripts_is_one_less():
    assert resolve({"method": "lcm", "w_min": "3", "w_max": "15"}).build(LCMConfig).guidance_range == (4.0, 16.0)


@pytest.mark.parametrize("given", [{"w_min": 3}, {"w_min": 3, "w_max": 5, "guidance_range": (1, 2)}])
def test_half_a_range_is_refused(given):
    with pytest.raises(RecipeError, match="w_min"):
        resolve({"method": "lcm"} | given)


def test_other_names():
    recipe = resolve(
        {"teacher": "t", "prompts": "p.txt", "rank": 8, "use_ema": True, "lora_target_modules": "to_q,to_k"}
    )
    assert recipe.values["pretrained_teacher_model"] == "t"
    assert recipe.values["data"] == "p.txt"
    assert recipe.values["lora_rank"] == 8
    assert recipe.values["ema_decay"] == 0.9999
    assert recipe.values["lora_target_modules"] == ("to_q", "to_k")


def test_prompts_keep_their_commas():
    assert resolve({"validation_prompt": "a cat, sitting"}).values["validation_prompts"] == ("a cat, sitting",)


def test_two_names_of_one_thing():
    with pytest.raises(RecipeError, match="train_data_dir and prompts"):
        resolve({"train_data_dir": "a", "prompts": "b"})


@pytest.mark.parametrize("flag", DIFFUSERS_FLAGS)
def test_every_known_flag_works_or_is_refused_with_a_reason(flag):
    if flag in REFUSED:
        with pytest.raises(RecipeError, match=f"^{flag} has no effect here: .{{20,}}"):
            resolve({flag: "1"})
    else:
        check_name(flag, ["dmd2", "lcm"], "")


def test_tables_agree():
    known = {option.name for method in ("dmd2", "lcm") for section in sections(method) for option in section.options}
    assert set(ALIASES.values()) <= known
    assert not (set(ALIASES) | set(REFUSED) | set(TRANSLATED)) & known


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learing_rate": 1}, "Did you mean 'learning_rate'"),
        ({"huber_c": 1}, "huber_c belongs to method .*lcm"),
        ({"method": "dmdd2"}, "Did you mean 'dmd2'"),
        ({"seed": "many"}, "seed must be a whole number, got 'many'"),
        ({"train_batch_size": 1.5}, "whole number"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number"),
        ({"learning_rate": "inf"}, "finite"),
        ({"center_crop": "perhaps"}, "true or false"),
        ({"student": "both"}, "one of lora, full"),
        ({"method": "lcm", "guidance_range": [1, 2, 3]}, "takes 2 values"),
    ],
)
def test_bad_values_are_named(given, message):
    with pytest.raises(RecipeError, match=message):
        resolve(given)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n", "1: 2\n", ""])
def test_yaml_that_is_no_recipe(recipe_file, text):
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        resolve({}, recipe_file(text))


def test_yaml_cannot_make_objects(recipe_file):
    with pytest.raises(RecipeError, match="not readable YAML"):
        resolve({}, recipe_file("seed: !!python/object/apply:os.getpid []\n"))


def test_stages(recipe_file):
    path = recipe_file(
        yaml.safe_dump(
            {
                "output_dir": "out",
                "student": "full",
                "huber_c": 0.01,
                "stages": [
                    {"name": "warm", "method": "lcm", "max_train_steps": 5},
                    {"name": "match", "init_from": "warm", "gan_weight": 0.5},
                ],
            }
        )
    )
    recipe = resolve({"seed": 4}, path)
    warm, match = (stage_recipe(recipe, stage) for stage in recipe.stages)
    assert (warm.method, warm.values["max_train_steps"], warm.values["huber_c"]) == ("lcm", 5, 0.01)
    assert (match.method, match.values["gan_weight"], match.values["student"]) == ("dmd2", 0.5, "full")
    assert warm.values["seed"] == match.values["seed"] == 4
    short = resolve({"max_train_steps": 2}, path)
    assert stage_recipe(short, short.stages[0]).values["max_train_steps"] == 2


def test_unknown_key_in_a_stage(recipe_file):
    with pytest.raises(RecipeError, match=r"gan_wieght.*stage.*Did you mean 'gan_weight'"):
        resolve({}, recipe_file("stages: [{gan_wieght: 1}]\n"))
