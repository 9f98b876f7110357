"""Merged adapters give the images of diffusers with the same file, and are removed without a trace."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import stock_pipeline

from distill.errors import TeacherError
from distill.models.sd3 import load_transformer
from distill.models.sd3_folder import SD3Folder
from distill.student.adapters import FILE, Merger, read_adapter

MODULES = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2", "proj_out")
EMPTY = {"A": (0, 32), "B": (32, 0)}  # a pair of rank 0


@pytest.fixture(scope="module")
def adapter_folder(teacher, tmp_path_factory):
    torch.manual_seed(3)
    transformer = load_transformer(SD3Folder.read(teacher))
    factors = {}
    for rank, module in enumerate(MODULES, 2):
        out, width = transformer.get_submodule(module).weight.shape
        factors[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, width)
        factors[f"transformer.{module}.lora_B.weight"] = torch.randn(out, rank)
    folder = tmp_path_factory.mktemp("adapter")
    save_file(factors, folder / FILE, {"format": "pt"})
    return folder


def output(transformer):
    torch.manual_seed(4)
    x, embeds, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 48), torch.randn(2, 40)
    with torch.no_grad():
        return transformer(x, embeds, pooled, torch.full((2,), 1000.0), return_dict=False)[0]


def test_merged_is_what_diffusers_computes_beside_the_weights(teacher, adapter_folder):
    transformer = load_transformer(SD3Folder.read(teacher))
    adapter = read_adapter(adapter_folder, transformer)
    merger = Merger(transformer)
    untouched = output(transformer)
    stock = stock_pipeline(teacher)
    stock.load_lora_weights(adapter_folder, local_files_only=True, adapter_name="style")
    for scale in (1.0, -0.5):
        merger.merge(adapter, scale)
        stock.set_adapters(["style"], [scale])
        assert (output(transformer) - untouched).abs().max() > 0.01
        torch.testing.assert_close(output(transformer), output(stock.transformer), atol=1e-4, rtol=1e-4)


def test_weights_depend_on_nothing_that_was_merged_before(teacher, adapter_folder):
    transformer = load_transformer(SD3Folder.read(teacher), torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    adapter, merger = read_adapter(adapter_folder, transformer), Merger(transformer)
    merger.merge(adapter, 0.7)
    first = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    changed = {name for name in before if not before[name].equal(first[name])}
    assert changed == {f"{module}.weight" for module in MODULES}
    merger.merge(adapter, 2.0)
    merger.merge(adapter, 0.7)
    assert all(tensor.equal(first[name]) for name, tensor in transformer.state_dict().items())
    merger.merge(None)
    assert all(tensor.equal(before[name]) for name, tensor in transformer.state_dict().items())


def test_alpha_counts_from_either_place(teacher, adapter_folder, tmp_path):
    transformer = load_transformer(SD3Folder.read(teacher))
    factors = load_file(adapter_folder / FILE)
    name = MODULES[0]
    plain, _ = read_adapter(adapter_folder, transformer).factors[name]
    save_file(factors | {f"transformer.{module}.alpha": torch.tensor(6.0) for module in MODULES}, tmp_path / FILE)
    torch.testing.assert_close(read_adapter(tmp_path, transformer).factors[name][0], 3 * plain)  # rank 2
    save_file(factors, tmp_path / FILE, {"lora_adapter_metadata": '{"transformer.lora_alpha": 1}'})
    torch.testing.assert_close(read_adapter(tmp_path, transformer).factors[name][0], plain / 2)


@pytest.mark.parametrize("beside", [False, True])
def test_an_rslora_adapter_has_the_scale_that_peft_gives_it(beside, teacher, adapter_folder, tmp_path):
    factors = load_file(adapter_folder / FILE)
    config = {"lora_alpha": 3, "r": 2, "use_rslora": True, "target_modules": list(MODULES)}
    config["rank_pattern"] = {module: rank for rank, module in enumerate(MODULES, 2)}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in config.items()})}
    save_file(factors, tmp_path / FILE, {"format": "pt"} | metadata)
    stock = stock_pipeline(teacher)
    stock.load_lora_weights(tmp_path, local_files_only=True)
    if beside:
        save_file(factors, tmp_path / FILE)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    transformer = load_transformer(SD3Folder.read(teacher))
    adapter = read_adapter(tmp_path, transformer)
    Merger(transformer).merge(adapter)
    torch.testing.assert_close(output(transformer), output(stock.transformer), atol=1e-4, rtol=1e-4)
    plain = read_adapter(adapter_folder, transformer).factors[MODULES[2]][0]
    torch.testing.assert_close(adapter.factors[MODULES[2]][0], plain * 3 / 2)  # rank 4


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"alpha_pattern": {"proj_out": 4}}, "alpha_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights pissa_niter_16"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"lora_alpha": float("nan")}, "its change of .* is not finite"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', not a number"),
    ],
)
def test_an_adapter_that_is_merged_in_another_way_is_refused_by_name(setting, match, teacher, adapter_folder, tmp_path):
    shutil.copyfile(adapter_folder / FILE, tmp_path / FILE)
    (tmp_path / "adapter_config.json").write_text(json.dumps(setting))
    with pytest.raises(TeacherError, match=match):
        read_adapter(tmp_path, load_transformer(SD3Folder.read(teacher)))
    told = {f"transformer.{name}": value for name, value in setting.items()}
    save_file(load_file(adapter_folder / FILE), tmp_path / FILE, {"lora_adapter_metadata": json.dumps(told)})
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(TeacherError, match=match):
        read_adapter(tmp_path, load_transformer(SD3Folder.read(teacher)))


def test_any_file_name_is_accepted(teacher, adapter_folder, tmp_path):
    transformer = load_transformer(SD3Folder.read(teacher))
    plain = read_adapter(adapter_folder, transformer).factors[MODULES[0]][0]
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps({"lora_alpha": 1, "r": 2}))
    file = tmp_path / "style.safetensors"
    shutil.copyfile(adapter_folder / FILE, file)
    for path in (tmp_path, file):
        torch.testing.assert_close(read_adapter(path, transformer).factors[MODULES[0]][0], plain / 2)
    shutil.copyfile(file, tmp_path / "other.safetensors")
    torch.testing.assert_close(read_adapter(file, transformer).factors[MODULES[0]][0], plain)  # whose settings?
    with pytest.raises(TeacherError, match=r"holds other\.safetensors and style.safetensors; give the path"):
        read_adapter(tmp_path, transformer)
    shutil.copyfile(file, tmp_path / FILE)
    assert read_adapter(tmp_path, transformer).factors.keys() == set(MODULES)
    with pytest.raises(TeacherError, match=r"style.ckpt is neither a folder nor a .safetensors file"):
        read_adapter(tmp_path / "style.ckpt", transformer)


def test_settings_that_are_nested_without_end_are_refused(teacher, adapter_folder, tmp_path):
    (tmp_path / FILE).write_bytes((adapter_folder / FILE).read_bytes())
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(TeacherError, match="damaged"):
        read_adapter(tmp_path, load_transformer(SD3Folder.read(teacher)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"transformer.blocks.0.lora_A.weight": torch.zeros(2, 4)}, "there is no linear layer blocks.0"),
        ({f"transformer.{MODULES[0]}.lora_A.weight": torch.zeros(2, 5)}, "not a linear layer of its shape"),
        ({f"transformer.{MODULES[2]}.lora_A.weight": torch.full((4, 32), torch.nan)}, "lora_A.weight is not finite"),
        ({"text_encoder.x.weight": torch.zeros(1)}, "holds text_encoder.x.weight"),
        ({f"transformer.{MODULES[2]}.lora_A.weight": torch.full((4, 32), 3e38)}, "its change of .* is not finite"),
        (
            {f"transformer.{MODULES[2]}.lora_{part}.weight": torch.zeros(shape) for part, shape in EMPTY.items()},
            "not a linear layer of its shape",
        ),
    ],
)
def test_what_is_no_adapter_of_it_is_refused(teacher, adapter_folder, tmp_path, change, match):
    save_file(load_file(adapter_folder / FILE) | change, tmp_path / FILE)
    with pytest.raises(TeacherError, match=match):
        read_adapter(tmp_path, load_transformer(SD3Folder.read(teacher)))
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(TeacherError, match="damaged"):
        read_adapter(tmp_path, load_transformer(SD3Folder.read(teacher)))
