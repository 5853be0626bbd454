"""Small students: sizes, what is copied from where, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fastdiff.models.small import SmallShape, small_unet


def unet(**changes):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    settings = {
        "sample_size": 16,
        "block_out_channels": (16, 32, 48),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "cross_attention_dim": 16,
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 2, 2),
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(settings | changes)).eval()


def call(network):
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return network(x, torch.tensor([10, 900]), encoder_hidden_states=text).sample


def size(network):
    return sum(p.numel() for p in network.parameters())


def test_a_whole_student_is_its_teacher():
    teacher = unet()
    student, kept = small_unet(teacher, SmallShape())
    assert torch.equal(call(student), call(teacher))
    assert kept.new == () and kept.copied == kept.parameters == kept.teacher_parameters == size(teacher)
    assert SmallShape().whole and not SmallShape(layers_per_block=1).whole


def test_narrower_channels_are_whole_groups_with_heads_that_divide_them():
    teacher = unet(block_out_channels=(40, 64, 88), attention_head_dim=4)
    student, kept = small_unet(teacher, SmallShape(width=0.5))
    assert student.config.block_out_channels == (24, 32, 48)  # 20 and 44 rounded up to multiples of 8
    assert student.config.attention_head_dim == (4, 4, 4)
    odd, _ = small_unet(unet(attention_head_dim=16, block_out_channels=(32, 48, 64)), SmallShape(width=0.75))
    assert odd.config.block_out_channels == (24, 40, 48)
    assert odd.config.attention_head_dim == (12, 10, 16)  # the largest numbers up to 16 that divide them
    assert call(student).shape == call(odd).shape == (2, 4, 16, 16)
    assert kept.parameters == size(student) < 0.5 * size(teacher)
    assert "conv_out.weight" in kept.new and "conv_out.bias" not in kept.new
    assert torch.equal(student.conv_out.bias, teacher.conv_out.bias)
    assert kept.copied == sum(t.numel() for name, t in student.state_dict().items() if name not in kept.new)


def test_fewer_layers_keep_the_teachers_by_place():
    teacher = unet()
    student, kept = small_unet(teacher, SmallShape(layers_per_block=1))
    own, theirs = student.state_dict(), teacher.state_dict()
    pairs = {
        "down_blocks.1.resnets.0.conv1.weight": "down_blocks.1.resnets.0.conv1.weight",
        "up_blocks.1.resnets.0.conv1.weight": "up_blocks.1.resnets.0.conv1.weight",
        "up_blocks.1.resnets.1.conv1.weight": "up_blocks.1.resnets.2.conv1.weight",  # the last takes the last
        "up_blocks.1.attentions.1.proj_in.weight": "up_blocks.1.attentions.2.proj_in.weight",
        "mid_block.resnets.1.conv2.weight": "mid_block.resnets.1.conv2.weight",
    }
    for mine, source in pairs.items():
        assert torch.equal(own[mine], theirs[source]), mine
    assert kept.new == ()  # every layer left has a counterpart of its shape
    assert kept.copied == kept.parameters < kept.teacher_parameters


def test_shallower_transformers():
    teacher = unet()
    student, kept = small_unet(teacher, SmallShape(transformer_layers=1))
    assert student.config.transformer_layers_per_block == (1, 1, 1)
    assert kept.new == () and kept.parameters < kept.teacher_parameters
    assert call(student).shape == (2, 4, 16, 16)


@pytest.mark.parametrize(("level", "up"), [(0, 2), (1, 1), (2, 0)])
def test_removed_levels_leave_the_others_in_their_place(level, up):
    teacher = unet()
    student, kept = small_unet(teacher, SmallShape(removed_levels=(level,)))
    left = [n for n in range(3) if n != level]
    assert student.config.block_out_channels == tuple((16, 32, 48)[n] for n in left)
    assert student.config.attention_head_dim == tuple((2, 4, 4)[n] for n in left)
    assert student.config.up_block_types == tuple(t for n, t in enumerate(teacher.config.up_block_types) if n != up)
    own, theirs = student.state_dict(), teacher.state_dict()
    for block, source in enumerate(left):
        name = "resnets.1.conv2.weight"
        assert torch.equal(own[f"down_blocks.{block}.{name}"], theirs[f"down_blocks.{source}.{name}"])
        assert torch.equal(own[f"up_blocks.{1 - block}.{name}"], theirs[f"up_blocks.{2 - source}.{name}"])
    assert 0 < kept.copied < kept.parameters and kept.new
    assert call(student).shape == (2, 4, 16, 16)


def test_all_at_once_and_what_it_says():
    teacher = unet()
    student, kept = small_unet(teacher, SmallShape(0.5, 1, 1, (0,)))
    assert call(student).isfinite().all()
    assert f"{size(student) / 1e6:.1f} M" in str(kept) and kept.new[0] in str(kept)


def test_sdxl_and_sd15_shapes_can_be_built():
    from diffusers import UNet2DConditionModel

    sdxl = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**sdxl)
        for shape in (SmallShape(transformer_layers=4), SmallShape(width=0.75), SmallShape(layers_per_block=1)):
            student, kept = small_unet(teacher, shape)
            assert kept.parameters < 0.8 * kept.teacher_parameters
    assert size(student) == kept.parameters


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ({"width": 0.0}, "width"),
        ({"width": 1.5}, "width"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"transformer_layers": 0}, "transformer_layers"),
        ({"removed_levels": (1, 1)}, "removed_levels"),
        ({"removed_levels": (-1,)}, "removed_levels"),
    ],
)
def test_bad_sizes_are_named(shape, named):
    with pytest.raises(ValueError, match=named):
        SmallShape(**shape)


def test_what_cannot_be_made_smaller():
    with pytest.raises(ValueError, match="must leave some of the teacher's 3 levels"):
        small_unet(unet(), SmallShape(removed_levels=(0, 1, 2)))
    with pytest.raises(ValueError, match="removed_levels"):
        small_unet(unet(), SmallShape(removed_levels=(3,)))
    with pytest.raises(ValueError, match="UNet2DConditionModel, got Linear"):
        small_unet(torch.nn.Linear(2, 2), SmallShape(width=0.5))
