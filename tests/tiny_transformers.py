"""Tiny random pipelines of the transformer families: 32 px images, 16 x 16 latents, real text encoders of a few rows."""

from __future__ import annotations

import string

import torch
from tiny_parts import BETAS, clip_text_config, clip_tokenizer

LATENTS = 4
CHARACTERS = sorted(set(string.printable) - set(string.whitespace))


def _finished(cls, **components):
    pipeline = cls(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _autoencoder(**settings):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENTS,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5,
        **settings,
    ).eval()


def _clip(projected: bool):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    return cls(clip_text_config(len(clip_tokenizer()))).eval()


def _t5():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(CHARACTERS) + 4,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config).eval()


def _t5_tokenizer():
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=special + [(character, -3.0) for character in CHARACTERS], extra_ids=0)


def _flow(**settings):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)


def stable_diffusion_3():
    """Two blocks, the first with dual attention as in SD3.5-medium; shift 3."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    network = SD3Transformer2DModel(
        sample_size=16,
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return _finished(
        StableDiffusion3Pipeline,
        transformer=network.eval(),
        scheduler=_flow(shift=3.0),
        vae=_autoencoder(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_clip(True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(),
        tokenizer_3=_t5_tokenizer(),
    )


def pixart_sigma():
    """Epsilon and a variance, linear betas."""
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    network = PixArtTransformer2DModel(
        sample_size=16,
        in_channels=LATENTS,
        out_channels=2 * LATENTS,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    scheduler = DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=True, steps_offset=1, timestep_spacing="trailing"
    )
    return _finished(
        PixArtSigmaPipeline,
        transformer=network.eval(),
        scheduler=scheduler,
        vae=_autoencoder(),
        text_encoder=_t5(),
        tokenizer=_t5_tokenizer(),
    )


def flux(guidance_embeds: bool = True):
    """One block of each kind; FLUX.1-dev's dynamic shift."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    network = FluxTransformer2DModel(
        in_channels=4 * LATENTS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return _finished(
        FluxPipeline,
        transformer=network.eval(),
        scheduler=_flow(shift=3.0, use_dynamic_shifting=True),
        vae=_autoencoder(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
    )


def flux_schnell():
    """Without an embedding of guidance, and without a shift."""
    pipeline = flux(guidance_embeds=False)
    pipeline.register_modules(scheduler=_flow())
    return pipeline


def sana():
    """A deep-compression autoencoder of two blocks; the solver of the published config, with a shift of 3."""
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *CHARACTERS]
    network = SanaTransformer2DModel(
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        timestep_scale=1.5,
    )
    encoder = Gemma2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    autoencoder = AutoencoderDC(
        latent_channels=LATENTS,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    return _finished(
        SanaPipeline,
        transformer=network.eval(),
        scheduler=_flow(shift=3.0),
        vae=autoencoder.eval(),
        text_encoder=Gemma2Model(encoder).eval(),
        tokenizer=GemmaTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[]),
    )


def _qwen_tokenizer():
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    return Qwen2Tokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


_QWEN = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def qwen_image():
    """A video autoencoder with one mean and deviation a channel; the published dynamic shift."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    network = QwenImageTransformer2DModel(
        in_channels=4 * LATENTS,
        out_channels=LATENTS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENTS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.4],
        latents_std=[1.5, 0.7, 2.0, 0.9],
    )
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(text_config=_QWEN | {"rope_parameters": rope}, vision_config=vision)
    return _finished(
        QwenImagePipeline,
        transformer=network.eval(),
        scheduler=_flow(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192),
        vae=autoencoder.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=_qwen_tokenizer(),
    )


def z_image():
    """One refiner and two layers; shift 3."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    network = ZImageTransformer2DModel(
        in_channels=LATENTS,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[600, 32, 32],
    )
    for token in (network.x_pad_token, network.cap_pad_token):
        torch.nn.init.normal_(token)  # they start at zero, where nothing would tell them from padding
    tokenizer = _qwen_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    return _finished(
        ZImagePipeline,
        transformer=network.eval(),
        scheduler=_flow(shift=3.0),
        vae=_autoencoder(shift_factor=0.1),
        text_encoder=Qwen3Model(Qwen3Config(**_QWEN, head_dim=8)).eval(),
        tokenizer=tokenizer,
    )


BUILDERS = (stable_diffusion_3, pixart_sigma, flux, flux_schnell, sana, qwen_image, z_image)


def build(name: str, seed: int = 0):
    """A pipeline by the name of its builder, with random weights of a seed; output layers that start at zero do not."""
    torch.manual_seed(seed)
    pipeline = next(builder for builder in BUILDERS if builder.__name__ == name)()
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    return pipeline
