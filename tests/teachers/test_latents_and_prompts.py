"""Cached latents of images and cached text embeddings."""

import copy
import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
import torch
from rich.console import Console

from distillbench import Denoiser, Teacher
from distillbench.diffusion.conditioning import Condition, Conditioning
from distillbench.diffusion.denoiser import guided
from distillbench.diffusion.schedules import VPCosine
from distillbench.networks.architectures import ResidualMLP
from distillbench.system.offloading import Offloaded
from distillbench.system.progress import Progress
from distillbench.teachers import encoded_prompts
from distillbench.teachers import teacher as teachers
from distillbench.teachers.encoded_prompts import PlaceholderPrompts, encode_prompts
from distillbench.teachers.latents import placeholder, training_data
from distillbench.teachers.teacher import Clip
from random_pictures import Pictures
from toy_encoders import PROMPTS, encode, latent_teacher

SILENT = Progress(Console(file=io.StringIO()))


def test_latents_are_cached_and_read_by_row(tmp_path):
    calls, pictures = [], Pictures()
    teacher = latent_teacher(calls)
    latents = training_data(pictures, teacher, tmp_path, "cpu", SILENT)
    assert sum(calls) == len(pictures) == len(latents) and latents.shape == (1, 4, 4)
    indices = torch.tensor([3, 39, 0])
    expected = torch.nn.functional.avg_pool2d(pictures.images[indices] / 127.5 - 1, 2)
    torch.testing.assert_close(latents.read(indices), expected.float())
    assert torch.equal(latents.labels(indices), indices % 3)
    again = training_data(pictures, teacher, tmp_path, "cpu", SILENT)
    assert sum(calls) == 40 and torch.equal(again.read(indices), latents.read(indices))


def test_posteriors_of_latents_are_cached_beside_the_means(tmp_path):
    calls, pictures = [], Pictures()
    means = latent_teacher(calls)
    of_means = lambda x: torch.cat([means.to_latents(x), means.to_latents(x.abs())], dim=1)
    teacher = dataclasses.replace(means, to_posterior=of_means)
    latents = training_data(pictures, teacher, tmp_path, "cpu", SILENT)
    indices = torch.tensor([3, 39, 0])
    pool = lambda x: torch.nn.functional.avg_pool2d(x, 2).float()
    x = pictures.images[indices] / 127.5 - 1
    rows = latents.read(indices)
    torch.testing.assert_close(rows, torch.cat([pool(x), pool(x.abs())], dim=1))
    assert latents.shape == (1, 4, 4) and torch.equal(latents.labels(indices), indices % 3)
    eps = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(latents.drawn(rows, eps), pool(x) + pool(x.abs()) * eps)
    assert training_data(pictures, means, tmp_path, "cpu", SILENT).read(indices).shape == (3, 1, 4, 4)
    before = sum(calls)
    assert torch.equal(training_data(pictures, teacher, tmp_path, "cpu", SILENT).read(indices), rows)
    assert sum(calls) == before and len([*tmp_path.glob("*.npy")]) == 2
    assert placeholder(pictures, teacher).shape == (1, 4, 4)


@pytest.mark.parametrize("call", ["to_images", "encoded"])
def test_images_are_decoded_and_encoded_in_parts(monkeypatch, call):
    """As many pixels at a time as fit, and at least one image: the same as all at once."""
    whole, sizes = latent_teacher([]), []
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.GroupNorm(2, 4), torch.nn.Conv2d(4, 1, 1)
    )

    @torch.no_grad()
    def convolved(x):
        sizes.append(len(x))
        return network(x)

    whole = dataclasses.replace(whole, decode=convolved, to_latents=convolved)
    x = torch.randn(7, 1, 8, 8)
    expected = getattr(whole, call)(x)
    for pixels, parts in ((64 * 7, [7]), (64 * 3 + 63, [3, 3, 1]), (1, [1] * 7)):
        monkeypatch.setattr(teachers, "MOST_PIXELS", pixels)
        sizes.clear()
        torch.testing.assert_close(getattr(whole, call)(x), expected, rtol=0, atol=1e-6)
        assert sizes == parts
    pixels_alone = dataclasses.replace(whole, decode=None, to_latents=None)
    assert torch.equal(pixels_alone.encoded(x), x) and torch.equal(pixels_alone.to_images(x), x.clamp(-1, 1))


class Moves(torch.nn.Linear):
    """Notes where it is moved to."""

    def to(self, device):
        self.moves = [*getattr(self, "moves", []), device]
        return self


def test_an_autoencoder_stays_on_the_device_while_a_dataset_is_encoded(tmp_path):
    encoder, unused = Offloaded(Moves(8, 4), "there"), Offloaded(Moves(2, 2), "there")

    def to_latents(x):
        with encoder.on_device() as module:
            assert module.moves[-1] == "there"
            return x[..., ::2, ::2]

    teacher = dataclasses.replace(latent_teacher([]), to_latents=to_latents, offloaded=(encoder, unused))
    training_data(Pictures(100), teacher, tmp_path, "cpu", SILENT)
    assert encoder.module.moves == ["cpu"] + ["there"] * 4 + ["cpu"] and "there" not in unused.module.moves


def test_damaged_latents_are_computed_again(tmp_path):
    calls = []
    teacher = latent_teacher(calls)
    training_data(Pictures(), teacher, tmp_path, "cpu", SILENT)
    (file,) = tmp_path.glob("*.npy")
    file.write_bytes(file.read_bytes()[:100])
    assert len(training_data(Pictures(), teacher, tmp_path, "cpu", SILENT)) == 40 and sum(calls) == 80


def test_pixels_stay_as_they_are_and_a_dry_run_encodes_nothing(tmp_path):
    pictures, calls = Pictures(), []
    plain = Teacher("toy", Denoiser(ResidualMLP((1, 8, 8), 8, 1), VPCosine(), "v"), (1, 8, 8), "2" * 64)
    assert training_data(pictures, plain, tmp_path, "cpu", SILENT) is pictures is placeholder(pictures, plain)
    assert placeholder(pictures, latent_teacher(calls)).read(torch.tensor([1, 2])).shape == (2, 1, 4, 4) and not calls


def test_prompts_are_encoded_once_and_found_by_label(tmp_path):
    calls = []
    table = encode_prompts(PROMPTS, encode(calls), "e", tmp_path, "cpu", SILENT)
    assert calls == [[""], PROMPTS]
    assert table(torch.tensor([2, 0, 3]))[:, 0, 0].tolist() == [10, 5, 0]  # the last label: the empty text
    again = encode_prompts(PROMPTS, encode(calls), "e", tmp_path, "cpu", SILENT)
    assert len(calls) == 2
    for other in (again, pickle.loads(pickle.dumps(table)), copy.deepcopy(table)):
        assert torch.equal(other(torch.tensor([1])), table(torch.tensor([1])))


def test_the_time_of_encoding_is_stored_and_charged_by_share(tmp_path, monkeypatch):
    """Four prompts in 8 s, of which training asks for three. Loading the encoder, for the empty text, is nobody's."""
    now = [100.0]
    monkeypatch.setattr(encoded_prompts.time, "perf_counter", lambda: now[0])

    def slow(texts):
        now[0] += 50.0 if texts == [""] else 2.0 * len(texts)
        return torch.zeros(len(texts), 1, 2)

    four = [*PROMPTS, "one more"][:4]
    for _ in range(2):
        table = encode_prompts(four, slow, "e", tmp_path, "cpu", SILENT)
        assert table.seconds(4) == 8.0 and table.seconds(3) == 6.0
    assert pickle.loads(pickle.dumps(table)).seconds(1) == 2.0
    (file,) = tmp_path.glob("*.json")
    told = json.loads(file.read_text())
    assert told.pop("seconds") == 8.0
    file.write_text(json.dumps(told))  # as before costs were kept
    encode_prompts(four, slow, "e", tmp_path, "cpu", SILENT)
    assert now[0] == 100 + 2 * (50 + 8) and json.loads(file.read_text())["seconds"] == 8.0


def test_a_small_table_stays_on_the_gpu_and_of_a_large_one_only_the_empty_text(tmp_path, monkeypatch):
    """Once it has been copied its file is not read again."""
    table = encode_prompts(PROMPTS, encode([]), "e", tmp_path, "cpu", SILENT)
    labels, cpu = torch.tensor([2, 0, 3, 2]), torch.device("cpu")
    expected = table(labels)
    assert torch.equal(table.empty(2, cpu), table(torch.tensor([3, 3])))
    monkeypatch.setattr(encoded_prompts, "READ", 3)
    for fits, rows in ((True, 4), (False, 1)):
        monkeypatch.setattr(encoded_prompts, "fits_on", lambda device, size, fits=fits: fits and size == 4 * 2 * 3 * 4)
        other = pickle.loads(pickle.dumps(table))
        assert torch.equal(other(labels, cpu), expected) and len(other._held[cpu]) == rows
        if fits:
            other.rows = np.full_like(table.rows, -1)
            assert torch.equal(other(labels), expected) and not other.empty(3, cpu).any()


@pytest.mark.parametrize("change", ["texts", "encoder", "damage"])
def test_other_prompts_another_encoder_and_damage_cause_encoding(tmp_path, change):
    calls = []
    encode_prompts(PROMPTS, encode(calls), "e", tmp_path, "cpu", SILENT)
    if change == "damage":
        (file,) = tmp_path.glob("*.npy")
        file.write_bytes(b"nothing")
    texts = [*PROMPTS, "more"] if change == "texts" else PROMPTS
    encode_prompts(texts, encode(calls), "f" if change == "encoder" else "e", tmp_path, "cpu", SILENT)
    assert len(calls) == 4


class Reads(torch.nn.Module):
    """x_0 = the sum of the text's numbers, plus the image that is enlarged."""

    embedding_channels = 1

    def forward(self, x, time, embedding, c):
        out = x * 0 + c.text.sum(dim=(1, 2)).view(-1, 1, 1, 1)
        return out if c.image is None else out + c.image


def test_guidance_leads_away_from_the_empty_text(tmp_path):
    """f_w = f_0 + w (f_c - f_0) with the empty text at 0: w times the text's numbers; the small image stays."""
    table = encode_prompts(PROMPTS, encode([]), "e", tmp_path, "cpu", SILENT)
    asked = Conditioning(3, 2.5, texts=table)
    c = asked.of_images(range(4), "cpu")
    assert c.labels.tolist() == [0, 1, 2, 0]
    denoiser, x = Denoiser(Reads(), VPCosine(), "x0"), torch.randn(4, 1, 2, 2)
    f = guided(denoiser, asked, x, torch.full((4, 1, 1, 1), 0.5).double(), c)
    numbers = torch.tensor([len(PROMPTS[i]) * 9.0 for i in c.labels])
    torch.testing.assert_close(f, (2.5 * numbers).view(-1, 1, 1, 1).expand(4, 1, 2, 2))
    assert denoiser.counted.counter.rows == 8
    small = Condition(c.labels, c.w, True, c.text, torch.ones(4, 1, 2, 2))
    torch.testing.assert_close(guided(denoiser, asked, x, torch.full((4, 1, 1, 1), 0.5).double(), small), f + 1)
    assert torch.equal(small[1:3].text, c.text[1:3]) and small[1:3].image.shape == (2, 1, 2, 2)


def test_training_and_evaluation_ask_for_their_own_prompts():
    asked = Conditioning(10, evaluated=range(7, 10), texts=PlaceholderPrompts(2, 3))
    assert asked.of_images(range(5), "cpu").labels.tolist() == [7, 8, 9, 7, 8]
    drawn = asked.draw(500, torch.Generator().manual_seed(0), "cpu", None)
    assert set(drawn.labels.tolist()) == set(range(7)) and drawn.text.shape == (500, 2, 3)
    assert asked.of_pairs(0, range(8), "cpu").labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 0]


class Doubled:
    """A base model whose answer to its noise is twice that noise."""

    shape = (1, 2, 2)

    def __call__(self, eps, c):
        return 2 * eps


def test_low_resolution_images_belong_to_the_sample_and_are_drawn_again_in_training():
    asked = Conditioning(3, small=Doubled())
    of = asked.of_images(range(6), "cpu").image
    torch.testing.assert_close(asked.of_images([4, 1], "cpu").image, of[[4, 1]])
    generator = torch.Generator().manual_seed(0)
    a, b = (asked.draw(6, generator, "cpu", None).image for _ in range(2))
    assert a.shape == (6, 1, 2, 2) and not torch.equal(a, b)


def test_predictions_are_clipped_if_asked_for():
    class Far(torch.nn.Module):
        embedding_channels = 1

        def forward(self, x, time, embedding, c):
            return 4 * x

    x, t = torch.linspace(-1, 1, 400).view(1, 1, 20, 20), torch.full((1, 1, 1, 1), 0.5).double()
    answers = {
        clip: Teacher("far", Denoiser(Far(), VPCosine(), "x0"), (1, 20, 20), "3" * 64, clip=Clip(clip))
        for clip in ("", "static", "dynamic")
    }
    f = {clip: teacher.denoise(x, t) for clip, teacher in answers.items()}
    torch.testing.assert_close(f[""], 4 * x)
    torch.testing.assert_close(f["static"], (4 * x).clamp(-1, 1))
    q = torch.quantile((4 * x).abs(), 0.995)
    torch.testing.assert_close(f["dynamic"], (4 * x).clamp(-q, q) / q)
