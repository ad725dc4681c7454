"""Tiny text-to-image pipelines of random weights, written to disk by diffusers itself, and runs with them.

Import it after ``pytest.importorskip("transformers")``.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    IFPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from rich.console import Console
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from distillbench import Dataset, DatasetConfig, option
from distillbench.execution.run import run
from distillbench.registry import Entry, Plugin, load_registry
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.system.progress import Progress

PROMPTS = ["a cat", "two dogs in the snow", "seven seas", "an owl on a tree", "red shoes", "a house by a river"]
TOKENS = 12  # of a text, for CLIP
WIDTH = 16  # of a token


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer without any merges: every byte is a token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(rest))]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": TOKENS}))
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def clip_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        initializer_factor=8.0,  # so that texts differ
    )
    return CLIPTextModel(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with a token for each letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=pieces + [(chr(97 + k), -3.0) for k in range(26)], extra_ids=0)


def t5_encoder() -> T5EncoderModel:
    config = T5Config(vocab_size=32, d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def text_unet(in_channels: int, out_channels: int, size: int, **more) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        **more,
    ).eval()


def autoencoder(channels: int = 4) -> AutoencoderKL:
    """Two pixels to a latent, each way."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    ).eval()


def stable_diffusion_scheduler(prediction_type: str = "epsilon", **more) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=prediction_type,
        **more,
    )


def stable_diffusion(folder: Path, prediction_type: str = "epsilon", size: int = 16, seed: int = 0) -> Path:
    """A pipeline of Stable Diffusion's layout for images of `size` pixels, in `folder`."""
    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(folder.parent / f"{folder.name}-tokenizer"),
        unet=text_unet(4, 4, size // 2, cross_attention_dim=WIDTH),
        scheduler=stable_diffusion_scheduler(prediction_type, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def if_scheduler(**more) -> DDPMScheduler:
    """As DeepFloyd IF comes: cosine betas, a learned variance, dynamic thresholding."""
    settings = {
        "beta_schedule": "squaredcos_cap_v2",
        "variance_type": "learned_range",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
        "sample_max_value": 1.5,
        "clip_sample": False,
        "prediction_type": "epsilon",
    }
    return DDPMScheduler(**(settings | more))


def _if_unet(in_channels: int, size: int, **more) -> UNet2DConditionModel:
    return text_unet(
        in_channels,
        6,
        size,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_dim=8,
        time_embedding_act_fn="gelu",
        **more,
    )


def deepfloyd_1(folder: Path, size: int = 8, seed: int = 0, **scheduler) -> Path:
    """The first stage of DeepFloyd IF's layout, for images of `size` pixels, in `folder`."""
    torch.manual_seed(seed)
    IFPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        unet=_if_unet(3, size),
        scheduler=if_scheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def deepfloyd_2(folder: Path, size: int = 16, seed: int = 1, **scheduler) -> Path:
    """The second stage, an upscaler to `size` pixels, in `folder`; with the text encoder of the same `seed` - 1."""
    torch.manual_seed(seed - 1)
    encoder = t5_encoder()
    torch.manual_seed(seed)
    IFSuperResolutionPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=encoder,
        unet=_if_unet(6, size, class_embed_type="timestep"),
        scheduler=if_scheduler(**scheduler),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


# --- runs ------------------------------------------------------------------------------------------------------------


class Captions(Dataset):
    """Random images with a caption each."""

    name, licence = "captions", "none"

    @dataclasses.dataclass
    class Config(DatasetConfig):
        size: int = option(16, "pixels a side")
        images: int = option(6, "number of images; 0: texts alone")

    def __init__(self, config):
        generator = torch.Generator().manual_seed(0)
        self.shape = (3, config.size, config.size)
        self.sha256 = f"{config.size:064d}"
        self.images = torch.randint(0, 256, (config.images, *self.shape), dtype=torch.uint8, generator=generator)
        self.prompts, self.classes = list(PROMPTS), len(PROMPTS)

    def __len__(self):
        return len(self.images)

    def read(self, indices):
        return self.images[indices]

    def labels(self, indices):
        return indices % self.classes


TINY = [
    "dataset=captions",
    "isolate=false",
    "conditional=true",
    "budget.images=24",
    "batch_size=8",
    "evaluation.images=7",
    "evaluation.batch_size=4",
    "evaluation.teacher_steps=[1,2]",
    "evaluation.nfe=[1]",
    "evaluation.timing=off",
    "evaluation.metrics=[teacher_rmse,clip_score_vit_l14]",
    "device=cpu",
]


def run_here(results, family, *words):
    """The table of a run of teachers of `family` with settings `words`, which must end well."""
    registry = load_registry()
    here = {cls.name: Entry(cls, Plugin(cls.name, "here", "1.0")) for cls in (Captions, family)}
    registry = dataclasses.replace(
        registry,
        datasets=registry.datasets | {Captions.name: here[Captions.name]},
        teachers=registry.teachers | {family.name: here[family.name]},
    )
    configs = compose_runs([*TINY, f"teacher={family.name}", *words, f'results_dir="{results}"'], registry)
    log = io.StringIO()
    outcome = run(plan(configs, registry), configs, Progress(Console(file=log, width=300)), lambda table: None)
    assert outcome.failed == [], log.getvalue()
    return outcome.table
