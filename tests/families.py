"""Tiny random pipelines of the families that the tests run: `build(name, folder)` writes one, from a small config.

They draw noise and say nothing of quality. All weights are drawn anew, those that start at zero too, so that velocities
depend on latents, time and prompt. One byte-level BPE of the captions' words serves all text encoders.
"""
import json
from functools import cache

import diffusers as D
import torch
import transformers as T
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

COLOURS = "red green blue yellow orange pink purple teal".split()
SHAPES = "square triangle ring cross heart star circle moon".split()
TEMPLATES = ["system", "user", "assistant", "<Prompt Start> User Prompt:", "Describe the image by detailing the color, "
             "shape, size, texture, quantity, text, spatial relationships of the objects and background:"]
PAD, BOS, EOS = SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
WIDTH = 16  # of text embeddings
GAIN = 1.2  # of random weights: each layer makes its input a little larger


# ---------------------------------------------------------------- tokenizers

@cache
def trained():
    """The one byte-level BPE, as (vocab, merges): a token for each word of the captions and of Qwen-Image's template,
    whose start is thus the 34 tokens that the pipeline drops."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizer()
    captions = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(captions + 2 * TEMPLATES, trainers.BpeTrainer(
        vocab_size=640, show_progress=False, special_tokens=SPECIAL, initial_alphabet=letters))
    learned = json.loads(raw.to_str())["model"]
    return learned["vocab"], [tuple(merge) for merge in learned["merges"]]


def pre_tokenizer():
    """Qwen2's splitting into words, then bytes."""
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def vocab_size():
    """How many tokens there are."""
    return len(trained()[0])


def qwen_tokenizer():
    """The tokenizer as Qwen2Tokenizer, with a chat template; it adds no token of its own."""
    vocab, merges = trained()
    return T.Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges), unk_token=PAD, pad_token=PAD, eos_token=EOS,
                            bos_token=BOS, chat_template=CHAT, model_max_length=2048)


def fast_tokenizer(template="{} <|im_end|>", padding_side="right", length=256):
    """The tokenizer as PreTrainedTokenizerFast, for T5, Gemma, GLM and CLIP; `template` adds special tokens."""
    vocab, merges = trained()
    raw = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    raw.pre_tokenizer = pre_tokenizer()
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    raw.post_processor = processors.TemplateProcessing(
        single=template.format("$A"), special_tokens=[(token, i) for i, token in enumerate(SPECIAL)])
    return T.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=PAD, pad_token=PAD, bos_token=BOS, eos_token=EOS,
                                     chat_template=CHAT, padding_side=padding_side, model_max_length=length)


# ---------------------------------------------------------------- text encoders

def small(layers=2, heads=2, **more):
    """What the configs of all decoder-like text encoders share."""
    return dict(vocab_size=vocab_size(), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, **IDS, **more)


def qwen3(cls=T.Qwen3Model, layers=2):
    """Qwen3, the text encoder of Z-Image and FLUX.2 klein."""
    return cls(T.Qwen3Config(head_dim=8, tie_word_embeddings=True, **small(layers)))


def qwen25vl(layers=2):
    """Qwen2.5-VL, the text encoder of Qwen-Image and others; its eyes are as small as they can be."""
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2])
    text = small(layers, tie_word_embeddings=True, rope_parameters=rope)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=WIDTH,
                  fullatt_block_indexes=[0])
    config = T.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    return T.Qwen2_5_VLForConditionalGeneration(config)


def gemma2():
    """Gemma 2, the text encoder of SANA and Lumina 2. Without the soft cap it has a fast attention."""
    cap = {"attn_logit_softcapping": None}
    return T.Gemma2Model(T.Gemma2Config(head_dim=8, query_pre_attn_scalar=8, sliding_window=64, **cap, **small()))


def t5(cls=T.T5EncoderModel, config=T.T5Config):
    """T5, the text encoder of Chroma and others."""
    return cls(config(vocab_size=vocab_size(), d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=2, num_heads=2,
                      feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=2, dropout_rate=0.0))


def umt5():
    """UMT5, the text encoder of AuraFlow and Wan."""
    return t5(T.UMT5EncoderModel, T.UMT5Config)


# ---------------------------------------------------------------- VAEs and schedulers

def kl(channels=4, cls=D.AutoencoderKL, **more):
    """An AutoencoderKL that shrinks pictures 8 times."""
    return cls(block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=channels, norm_num_groups=2,
               sample_size=64, down_block_types=("DownEncoderBlock2D",) * 4,
               up_block_types=("UpDecoderBlock2D",) * 4, **more)


def flux_vae(channels=4):
    """An AutoencoderKL scaled and shifted as FLUX's."""
    return kl(channels, scaling_factor=0.3611, shift_factor=0.1159)


def wan_vae(cls=D.AutoencoderKLWan):
    """Wan's causal video VAE, or Qwen-Image's, its copy: 8 times smaller, 4 times shorter."""
    return cls(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
               latents_mean=[0.1, -0.1, 0.2, -0.2], latents_std=[1.1, 0.9, 1.2, 0.8])


def euler(**more):
    """The flow-matching Euler scheduler."""
    return D.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, **more)


# ---------------------------------------------------------------- the families

def z_image():
    """Z-Image: Qwen3, one transformer for text and picture after a refiner of each."""
    transformer = D.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[8, 4, 4], axes_lens=[1024, 64, 64])
    return D.ZImagePipeline(scheduler=euler(shift=3.0), vae=flux_vae(), text_encoder=qwen3(),
                            tokenizer=qwen_tokenizer(), transformer=transformer)


def qwen_image():
    """Qwen-Image: Qwen2.5-VL, double blocks only; true guidance."""
    transformer = D.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4))
    scheduler = euler(use_dynamic_shifting=True, time_shift_type="exponential", base_shift=0.5, max_shift=0.9,
                      base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02)
    return D.QwenImagePipeline(scheduler=scheduler, vae=wan_vae(D.AutoencoderKLQwenImage), text_encoder=qwen25vl(),
                               tokenizer=qwen_tokenizer(), transformer=transformer)


def flux2_transformer(text_layers=3, **more):
    """FLUX.2's: a double and a single block."""
    return D.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=text_layers * WIDTH, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), **more)


def flux2_scheduler():
    """FLUX.2's: shifted by what the pipeline says."""
    return euler(use_dynamic_shifting=True, time_shift_type="exponential", base_shift=0.5, max_shift=1.15, shift=3.0)


def flux2_klein():
    """FLUX.2 klein (base): Qwen3, whose layers 9, 18 and 27 are taken; guidance as usual."""
    return D.Flux2KleinPipeline(
        scheduler=flux2_scheduler(), vae=kl(cls=D.AutoencoderKLFlux2), tokenizer=qwen_tokenizer(),
        text_encoder=qwen3(T.Qwen3ForCausalLM, layers=28), transformer=flux2_transformer(guidance_embeds=False),
        is_distilled=False)


def dc_vae(stages=6):
    """AutoencoderDC; with 6 stages it shrinks pictures 32 times."""
    kinds = ("ResBlock",) * (stages - 1) + ("EfficientViTBlock",)
    scales = ((),) * (stages - 1) + ((5,),)
    return D.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, scaling_factor=0.41407,
        encoder_block_types=kinds, encoder_block_out_channels=(8,) * stages, encoder_layers_per_block=(1,) * stages,
        encoder_qkv_multiscales=scales, downsample_block_type="conv",
        decoder_block_types=kinds, decoder_block_out_channels=(8,) * stages, decoder_layers_per_block=(1,) * stages,
        decoder_qkv_multiscales=scales, upsample_block_type="interpolate")


def sana():
    """SANA: Gemma 2, linear attention, a 32 times smaller latent, and a multistep scheduler."""
    transformer = D.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
        sample_size=16)
    scheduler = D.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return D.SanaPipeline(tokenizer=fast_tokenizer("<|im_start|> {}", length=32), text_encoder=gemma2(),
                          vae=dc_vae(), transformer=transformer, scheduler=scheduler)


def lumina2():
    """Lumina-Image 2.0: Gemma 2, one transformer for text and picture after refiners; time runs upwards."""
    transformer = D.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 4, 4), axes_lens=(300, 64, 64),
        cap_feat_dim=WIDTH)
    return D.Lumina2Pipeline(transformer=transformer, scheduler=euler(shift=6.0), vae=flux_vae(),
                             text_encoder=gemma2(), tokenizer=fast_tokenizer("<|im_start|> {}"))


def chroma():
    """Chroma: T5 with a mask, FLUX's double and single blocks, modulated by an approximator."""
    transformer = D.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=1)
    return D.ChromaPipeline(scheduler=euler(shift=3.0), vae=flux_vae(), text_encoder=t5(), tokenizer=fast_tokenizer(),
                            transformer=transformer)


def aura_flow():
    """AuraFlow: UMT5, a double and a single block."""
    transformer = D.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=32,
        pos_embed_max_size=256)
    return D.AuraFlowPipeline(tokenizer=fast_tokenizer(), text_encoder=umt5(), vae=kl(scaling_factor=0.13025),
                              transformer=transformer, scheduler=euler(shift=1.73))


def cogview4():
    """CogView4: GLM padded on the left, integer timesteps, the picture's size as a condition."""
    transformer = D.CogView4Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, text_embed_dim=WIDTH, time_embed_dim=32, condition_dim=8)
    scheduler = euler(use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75)
    glm = T.GlmModel(T.GlmConfig(head_dim=8, **small()))
    return D.CogView4Pipeline(tokenizer=fast_tokenizer("<|im_start|> {}", "left"), text_encoder=glm,
                              vae=kl(scaling_factor=1.0), transformer=transformer, scheduler=scheduler)


def prx():
    """PRX: T5Gemma's encoder, with a whole T5Gemma's config, as diffusers loads it: it runs once loaded. Needs ftfy."""
    config = T5GemmaModuleConfig(head_dim=8, query_pre_attn_scalar=8, sliding_window=64, dropout_rate=0.0, **small())
    encoder = T5GemmaEncoder(config)
    encoder.config = T.T5GemmaConfig(encoder=config, decoder=config, is_encoder_decoder=False)
    transformer = D.PRXTransformer2DModel(
        patch_size=2, in_channels=4, context_in_dim=WIDTH, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[8, 8])
    return D.PRXPipeline(transformer=transformer, scheduler=euler(shift=3.0), text_encoder=encoder,
                         tokenizer=fast_tokenizer("<|im_start|> {}", length=64), vae=flux_vae(),
                         default_sample_size=256)


def wan_transformer():
    """Wan's: self- and cross-attention in each block."""
    return D.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=64)


def wan():
    """Wan 2.1 text to video: UMT5, and UniPC on flow sigmas."""
    scheduler = D.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return D.WanPipeline(tokenizer=fast_tokenizer(length=512), text_encoder=umt5(), vae=wan_vae(), scheduler=scheduler,
                         transformer=wan_transformer())


# ---------------------------------------------------------------- odd ones, and ones to be refused

def kandinsky5_transformer():
    """Kandinsky 5's: text and picture blocks."""
    return D.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 8), visual_cond=False,
        attention_type="regular")


def kandinsky5_t2v():
    """Kandinsky 5 Video Lite: channels last, a condition behind the latents; a tokenizer for its processor."""
    return D.Kandinsky5T2VPipeline(
        vae=hunyuan_video_vae(), text_encoder=qwen25vl(), tokenizer=qwen_tokenizer(), text_encoder_2=clip(),
        tokenizer_2=fast_tokenizer("<|im_start|> {} <|im_end|>", length=77), transformer=kandinsky5_transformer(),
        scheduler=euler(shift=5.0))


def hunyuan_video_vae():
    """HunyuanVideo's VAE: 8 times smaller, 4 times shorter."""
    return D.AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1,
        norm_num_groups=2, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, scaling_factor=0.476986, spatial_compression_ratio=8,
        temporal_compression_ratio=4)


def mochi():
    """Mochi: T5, noise levels that rise; a VAE 8 times smaller, 6 times shorter."""
    transformer = D.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=WIDTH, time_embed_dim=8, max_sequence_length=256)
    vae = D.AutoencoderKLMochi(latent_channels=12, out_channels=3, encoder_block_out_channels=(32,) * 4,
                               decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5)
    return D.MochiPipeline(scheduler=euler(invert_sigmas=True), vae=vae, text_encoder=t5(), tokenizer=fast_tokenizer(),
                           transformer=transformer, force_zeros_for_empty_prompt=True)


def ernie_image():
    """ERNIE-Image: Mistral, FLUX.2's VAE, one stream; no prepare_latents."""
    transformer = D.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=64, in_channels=16, out_channels=16,
        text_in_dim=WIDTH, rope_axes_dim=(4, 4, 8))
    return D.ErnieImagePipeline(transformer=transformer, vae=kl(cls=D.AutoencoderKLFlux2),
                                text_encoder=mistral3(T.Mistral3Model, 2), tokenizer=fast_tokenizer("<|im_start|> {}"),
                                scheduler=euler(shift=3.0))


def mistral3(cls, layers):
    """Mistral 3, the text encoder of ERNIE-Image."""
    text = dict(model_type="mistral", head_dim=8, sliding_window=None, **small(layers))
    vision = dict(model_type="pixtral", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                  intermediate_size=16, image_size=28, patch_size=14, head_dim=8)
    return cls(T.Mistral3Config(text_config=text, vision_config=vision))


def clip(cls=T.CLIPTextModel, length=77):
    """CLIP's text model."""
    return cls(T.CLIPTextConfig(vocab_size=vocab_size(), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
                                num_hidden_layers=2, num_attention_heads=2, projection_dim=WIDTH,
                                max_position_embeddings=length, **IDS))


def stable_diffusion():
    """Stable Diffusion 1.5: a UNet that tells noise, not a velocity. To be refused."""
    unet = D.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 16), layers_per_block=1,
        norm_num_groups=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH, attention_head_dim=2)
    scheduler = D.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                                steps_offset=1)
    return D.StableDiffusionPipeline(vae=kl(), text_encoder=clip(), tokenizer=fast_tokenizer(length=77), unet=unet,
                                     scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                     requires_safety_checker=False)


def wan_a14b():
    """Wan 2.2 A14B: two transformers, one for noisy and one for clean latents. To be refused."""
    scheduler = D.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return D.WanPipeline(tokenizer=fast_tokenizer(length=512), text_encoder=umt5(), vae=wan_vae(), scheduler=scheduler,
                         transformer=wan_transformer(), transformer_2=wan_transformer(), boundary_ratio=0.875)


def qwen_image_edit():
    """Qwen-Image-Edit, which only edits pictures; it loads, but its processor is a mere tokenizer. To be refused."""
    return D.QwenImageEditPipeline(processor=qwen_tokenizer(), **qwen_image().components)


FAMILIES = {family.__name__: family for family in (
    z_image, qwen_image, flux2_klein, sana, lumina2, chroma, aura_flow, cogview4, prx, wan,
    kandinsky5_t2v, mochi, ernie_image, stable_diffusion, wan_a14b, qwen_image_edit)}


# ---------------------------------------------------------------- weights

@torch.no_grad()
def enliven(model):
    """Draw all weights of a model anew: matrices keep their input's size, biases are small, gains are near 1."""
    for name, p in model.named_parameters():
        if p.ndim == 0 or p.numel() == p.shape[0]:
            p.normal_(0 if "bias" in name else 1, 0.1)
        elif p.shape[0] == vocab_size():
            p.normal_()
        else:
            p.normal_(0, GAIN * max(1, p[0].numel()) ** -0.5)
    for name, b in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            b.copy_(torch.rand_like(b) * 0.4 + (0.8 if name.endswith("var") else -0.2))


def build(name: str, folder):
    """Build the pipeline `name` with random weights and save it in `folder`."""
    torch.manual_seed(0)
    pipe = FAMILIES[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            enliven(part.eval())
    pipe.save_pretrained(folder)
