"""HPSv2 against open_clip's network, written here with torch's attention, and torchvision's preprocessing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from distillbench import Unavailable
from distillbench.builtin.clip import ClipScore
from distillbench.builtin.hpsv2 import Hpsv2, Hpsv2Network, Hpsv21, Hpsv21Network, network_input
from distillbench.evaluation.pretrained_weights import fetch
from distillbench.storage.files import sha256_file
from distillbench.system.progress import Progress
from image_text_samples import PROMPTS, pictures, samples, write_vocabulary

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

WIDTH, JOINT, HEADS, LAYERS, PATCH = 32, 16, 2, 2, 56
FILE = Hpsv2Network.weights.file


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 2 * WIDTH), "c_proj": nn.Linear(2 * WIDTH, WIDTH)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


def blocks() -> nn.ModuleDict:
    return nn.ModuleDict({"resblocks": nn.ModuleList(Block() for _ in range(LAYERS))})


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(WIDTH))
        self.positional_embedding = nn.Parameter(torch.empty((224 // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = blocks()
        self.proj = nn.Parameter(torch.empty(WIDTH, JOINT))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            x = block(x, None)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """The names and the arithmetic of open_clip's CLIP (model.py, transformer.py), with GELU as in ViT-H-14."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.visual = Vision()
        self.transformer = blocks()
        self.token_embedding = nn.Embedding(vocabulary, WIDTH)
        self.positional_embedding = nn.Parameter(torch.empty(77, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.empty(WIDTH, JOINT))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def texts(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((77, 77), float("-inf")).triu(1)
        for block in self.transformer["resblocks"]:
            x = block(x, mask)
        x = self.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=-1)]  # at the end token, the highest
        return x @ self.text_projection


@pytest.fixture
def tiny(tmp_path) -> tuple[type[Hpsv2], OpenClip]:
    """The score on a small checkpoint in `tmp_path`, in the layout of the released one, and the same network."""
    folder = tmp_path / Hpsv2Network.also[0].file
    folder.parent.mkdir()
    count = write_vocabulary(folder.parent)
    torch.manual_seed(0)
    reference = OpenClip(count).eval()
    for parameter in reference.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, 0, 0.3)
    reference.half().float()  # the released file has half precision
    checkpoint = {name: tensor.half() for name, tensor in reference.state_dict().items()}
    (tmp_path / "by_hand").mkdir()
    torch.save({"state_dict": checkpoint}, tmp_path / "by_hand" / FILE)

    size = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    size |= {"num_attention_heads": HEADS, "hidden_act": Hpsv2Network.text["hidden_act"]}

    class TinyNetwork(Hpsv2Network):
        text = {**size, "vocab_size": count, "bos_token_id": count - 2, "eos_token_id": count - 1}
        vision = {**size, "image_size": 224, "patch_size": PATCH}
        also = tuple(replace(file, sha256=sha256_file(tmp_path / file.file)) for file in Hpsv2Network.also)
        width, batch = JOINT, 3

    class TinyScore(Hpsv2):
        network = TinyNetwork

    fetch("hpsv2", TinyNetwork.weights, tmp_path, tmp_path / "by_hand", Progress(None))
    return TinyScore, reference


def padded(folder) -> Tensor:
    """The prompts as open_clip's tokenizer has them: cut to 77 tokens, zeros after the end token."""
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    rows = [tokenizer(text, truncation=True, max_length=77)["input_ids"] for text in PROMPTS]
    assert [len(row) for row in rows][-1] == 77 and max(rows[0]) == rows[0][-1]
    return torch.tensor([row + [0] * (77 - len(row)) for row in rows])


def prepared(images: Tensor) -> Tensor:
    """As the release does it, with torchvision: ResizeMaxSize of a tensor, zeros around it, Normalize."""
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    from torchvision.transforms import InterpolationMode

    x = images.float() / 255
    height, width = images.shape[-2:]
    scale = 224 / float(max(height, width))
    if scale != 1.0:
        size = [round(side * scale) for side in (height, width)]
        x = functional.resize(x, size, InterpolationMode.BICUBIC, antialias=True)
        up, left = (224 - size[0]) // 2, (224 - size[1]) // 2
        x = functional.pad(x, [left, up, 224 - size[1] - left, 224 - size[0] - up], fill=0)
    return functional.normalize(x, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


def test_score_is_that_of_open_clips_network(tiny, tmp_path):
    score, reference = tiny
    images = pictures(len(PROMPTS), 64, 48)
    with torch.inference_mode():
        vectors = reference.visual(prepared(images)), reference.texts(padded(tmp_path / "clip-vit-large-patch14"))
    seen, read = (nn.functional.normalize(each, dim=-1) for each in vectors)
    cosines = (seen @ read.T).diagonal()  # without exp(logit_scale)
    assert cosines.max() < -0.05 and cosines.std() > 0.01  # negative ones count
    found = score().score(samples(images, PROMPTS, tmp_path))
    assert found == pytest.approx(100 * cosines.mean().item(), abs=1e-3)


@pytest.mark.parametrize("size", [(32, 32), (33, 20), (20, 33), (300, 251), (224, 224), (224, 100)])
def test_images_are_prepared_as_by_torchvision(size):
    images = pictures(2, *size)
    torch.testing.assert_close(network_input(images), prepared(images), rtol=0, atol=1e-5)


@pytest.mark.nightly
def test_the_real_layout_is_that_of_vit_h_14():
    """986 million parameters, as open_clip's table of models has them; 2 bytes each are the size that is said."""
    config = transformers.CLIPConfig(
        text_config=Hpsv2Network.text, vision_config=Hpsv2Network.vision, projection_dim=Hpsv2Network.width
    )
    with torch.device("meta"):
        model = transformers.CLIPModel(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 986_109_441 and round(2 * count / 2**20) == Hpsv2Network.weights.mib


@pytest.mark.parametrize("damage", [
    lambda state: state.pop("visual.proj"),
    lambda state: state.update(extra=torch.zeros(1)),
    lambda state: state.update({"ln_final.weight": torch.zeros(3)}),
    lambda state: state.update({"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(2)}),
])  # fmt: skip
def test_a_file_with_other_tensors_gives_no_score(tiny, tmp_path, damage):
    score, _ = tiny
    state = torch.load(tmp_path / FILE, weights_only=True)
    damage(state["state_dict"])
    torch.save(state, tmp_path / FILE)
    with pytest.raises(Unavailable, match=f"{FILE} is no checkpoint of hpsv2: "):
        score.network(tmp_path / FILE, "cpu")


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_torch_cannot_read_gives_no_score(tiny, tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(Unavailable, match=f"{FILE} is no checkpoint of hpsv2: "):
        tiny[0].network(tmp_path / FILE, "cpu")


def test_a_pickle_with_code_is_not_run(tiny, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    torch.save({"state_dict": Attack()}, tmp_path / FILE)
    with pytest.raises(Unavailable, match="is no checkpoint"):
        tiny[0].network(tmp_path / FILE, "cpu")
    assert not (tmp_path / "run").exists()


def test_the_hash_of_the_first_fetch_is_part_of_the_identity(tiny, tmp_path):
    score, _ = tiny
    assert score.identity(tmp_path)["seen"]["weights_sha256"] == sha256_file(tmp_path / FILE)
    (tmp_path / f"{FILE}.sha256").unlink()
    assert score.identity(tmp_path)["seen"]["weights_sha256"] is None


def test_the_two_versions_have_their_own_columns_files_and_protocols():
    for metric, name, file in ((Hpsv2, "hpsv2", "HPS_v2_"), (Hpsv21, "hpsv2_1", "HPS_v2.1_")):
        assert metric.name == metric.network.name == name
        assert metric.network.weights.file == f"{file}compressed.pt"
        assert f"{file}compressed" in metric.network.protocol and metric.network.protocol.startswith(f"{name}/")
        assert metric.network.weights.url == f"https://huggingface.co/xswu/HPSv2/resolve/main/{file}compressed.pt"
    assert Hpsv21Network.text == Hpsv2Network.text and ClipScore.network.width != Hpsv2Network.width
