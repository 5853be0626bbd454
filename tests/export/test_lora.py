"""LoRA files give back the trained student in a fresh stock pipeline, and every way to lose a part is noticed."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastdiff.export.loadback import LoadBackError, LoadBackReport, check_lora
from fastdiff.export.lora import DIFFUSERS_FILE, KOHYA_FILE, count_modules, save_lora
from fastdiff.export.weights import low_rank_updates
from fastdiff.models.roles import adapter_layers, bind_adapter_layers


def check(trained, path, fresh, **options):
    return check_lora(
        path,
        fresh(trained.teacher.pipeline),
        trained.student.scheduler(),
        trained.probe(),
        trained.sampler,
        trained.family,
        **options,
    )


def test_both_files_load_in_a_stock_pipeline(trained, fresh, tmp_path):
    files = save_lora(tmp_path, trained.student.network, {"student": 1.0})
    layers = len(adapter_layers(trained.student.network))
    assert {type(layer).__name__ for _, layer in adapter_layers(trained.student.network)} == {"Linear", "Conv2d"}
    assert files.modules == layers
    assert [path.name for path in files.paths()] == [DIFFUSERS_FILE, KOHYA_FILE]
    checks = tuple(check(trained, path, fresh, expected_modules=files.modules) for path in files.paths())
    report = LoadBackReport(checks).require_ok()
    assert report.max_error < 1e-5
    assert all(item.modules_loaded == layers for item in checks)


def test_the_student_differs_from_the_teacher(trained_sd, fresh, tmp_path):
    """Without this the comparisons above could not fail."""
    files = save_lora(tmp_path, trained_sd.student.network, {"student": 1e-9})
    with pytest.raises(LoadBackError, match="network output differs"):
        LoadBackReport((check(trained_sd, files.diffusers, fresh),)).require_ok()


@pytest.mark.parametrize("name", [DIFFUSERS_FILE, KOHYA_FILE])
def test_dropped_modules_are_noticed(trained_sd, fresh, tmp_path, name):
    files = save_lora(tmp_path, trained_sd.student.network, {"student": 1.0})
    state = load_file(tmp_path / name)
    victim = sorted(state)[0].split(".lora_")[0].removesuffix(".alpha")
    with safe_open(tmp_path / name, "pt") as file:
        metadata = file.metadata()
    kept = {key: value for key, value in state.items() if not key.startswith(f"{victim}.")}
    save_file(kept, tmp_path / name, metadata=metadata)
    problems = check(trained_sd, tmp_path / name, fresh, expected_modules=files.modules).problems()
    assert any("modules were loaded" in problem for problem in problems)
    assert any("network output differs" in problem for problem in problems)


def test_a_key_of_no_module_is_noticed(trained_sd, fresh, tmp_path):
    files = save_lora(tmp_path, trained_sd.student.network, {"student": 1.0})
    state = load_file(files.diffusers)
    state["unet.no_such_block.to_q.lora_A.weight"] = torch.zeros(3, 16)
    save_file(state, files.diffusers)
    with pytest.raises(LoadBackError, match="unexpected keys"):
        LoadBackReport((check(trained_sd, files.diffusers, fresh),)).require_ok()


@pytest.mark.parametrize("settings", [{"lora_alpha": 1}, None])
def test_strength_survives_lost_metadata_but_not_wrong_metadata(trained_sd, fresh, tmp_path, settings):
    files = save_lora(tmp_path, trained_sd.student.network, {"student": 1.0})
    state = load_file(files.diffusers)
    with safe_open(files.diffusers, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    if settings is None:
        save_file(state, files.diffusers)
        assert not check(trained_sd, files.diffusers, fresh).problems()
        return
    config |= {f"unet.{key}": value for key, value in settings.items()}
    save_file(state, files.diffusers, metadata={"lora_adapter_metadata": json.dumps(config)})
    assert any("strength" in problem for problem in check(trained_sd, files.diffusers, fresh).problems())


def test_alpha_equals_rank_in_both_files(trained_sd, tmp_path):
    files = save_lora(tmp_path, trained_sd.student.network, {"student": 1.0})
    with safe_open(files.diffusers, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["unet.lora_alpha"] == config["unet.r"] == 3
    alphas = {int(value) for key, value in load_file(files.kohya).items() if key.endswith(".alpha")}
    assert alphas == {3}
    assert count_modules(files.kohya) == count_modules(files.diffusers) == files.modules


def test_update_is_the_scaled_delta_of_peft(trained_sd):
    network = trained_sd.student.network
    one = low_rank_updates(network, {"student": 1.0})
    twice = low_rank_updates(network, {"student": 2.0})
    for name, update in one.items():
        assert torch.allclose(twice[name].delta(), 2 * update.delta())
    layer_name, layer = next((n, layer) for n, layer in adapter_layers(network) if type(layer).__name__ == "Conv2d")
    expected = layer.get_delta_weight("student")
    assert torch.allclose(one[layer_name].delta(), expected, atol=1e-6)


def test_stacked_adapters_of_different_rank_round_trip(trained_sd, fresh, tmp_path):
    from peft import LoraConfig

    network = trained_sd.student.network
    network.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv1"]), adapter_name="style")
    with torch.no_grad():
        for _, layer in adapter_layers(network):
            if "style" in layer.lora_B:
                layer.lora_B["style"].weight.normal_(0, 0.1)
    trained_sd.roles.stack("student", {"student": 1.0, "style": 0.5})
    bind_adapter_layers(network, trained_sd.roles.active)
    files = save_lora(tmp_path, network, {"student": 1.0, "style": 0.5})
    for path in files.paths():
        assert not check(trained_sd, path, fresh, expected_modules=files.modules).problems()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_files(trained_sd, fresh, tmp_path, dtype, tolerance):
    files = save_lora(tmp_path, trained_sd.student.network, {"student": 1.0}, dtype=dtype)
    assert {value.dtype for value in load_file(files.diffusers).values()} == {dtype}
    assert not check(trained_sd, files.diffusers, fresh, tolerance=tolerance).problems()


@pytest.mark.parametrize(("flag", "match"), [("use_rslora", "rank-stabilised"), ("use_dora", "DoRA")])
def test_variants_without_a_common_form_are_refused(tiny_sd, tmp_path, flag, match):
    from peft import LoraConfig

    tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], **{flag: True}), adapter_name="student")
    with pytest.raises(ValueError, match=match):
        save_lora(tmp_path / "lora", tiny_sd.unet, {"student": 1.0})
    assert not (tmp_path / "lora").exists()


def test_bad_requests_are_refused(trained_sd, tmp_path):
    network = trained_sd.student.network
    with pytest.raises(ValueError, match=r"no adapter 'typo'.*student"):
        save_lora(tmp_path, network, {"typo": 1.0})
    with pytest.raises(ValueError, match="'unet' or 'transformer'"):
        save_lora(tmp_path, network, {"student": 1.0}, component="vae")
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        save_lora(tmp_path, network, {"student": 1.0}, dtype=torch.float64)
    with pytest.raises(ValueError, match="overflows"):
        save_lora(tmp_path, network, {"student": 1e9}, dtype=torch.float16)
    with torch.no_grad():
        adapter_layers(network)[0][1].lora_B["student"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        save_lora(tmp_path, network, {"student": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_exporting_does_not_touch_the_network(trained_sd, tmp_path):
    network = trained_sd.student.network
    before = {key: value.clone() for key, value in network.state_dict().items()}
    flags = [parameter.requires_grad for parameter in network.parameters()]
    save_lora(tmp_path, network, {"student": 1.0})
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in network.parameters()]
