"""EDM's augmentation in training steps: the same on any number of ranks and parts, and no random number without it."""

import pytest
import torch

from distillbench import Batch, Conditioning, Denoiser, UserError
from distillbench.datasets.augmentation import AugmentConfig, Transformations, draw_transformations
from distillbench.diffusion import VPCosine
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.networks import ResidualMLP
from distillbench.training.share import WHOLE, Share

SHAPE, SIZE = (2, 6, 6), 12
REAL = torch.rand(SIZE, *SHAPE, generator=torch.Generator().manual_seed(9))
LABELS = torch.arange(SIZE) % 3
ALL = AugmentConfig(probability=0.9)


def batch(share=WHOLE, augment=ALL, classes=3):
    read = lambda size: (share.of(REAL), share.of(LABELS))
    conditioning = Conditioning(classes) if classes else Conditioning()
    return Batch(SIZE, SHAPE, torch.Generator().manual_seed(0), "cpu", read, conditioning, share, augment=augment)


def asked(part):
    """What a method with real and generated images might ask for, in one tensor per image."""
    c = part.c
    x, c_x = part.augmented(part.noise(), part.random_c(), 0.5)
    return [part.x_0, c.labels, c.augmentation, x, c_x.labels, c_x.augmentation]


def test_real_images_and_their_labels_belong_together():
    """Recomputed from the same draws: x_0 is transformed by the rows whose labels c has."""
    whole = batch(classes=0)
    x_0, c = whole.x_0, whole.c
    transformations = Transformations(draw_transformations(SIZE, torch.Generator().manual_seed(0), 0.9))
    assert torch.equal(x_0, transformations(REAL)) and torch.equal(c.augmentation, transformations.labels)
    assert c.labels is None and whole.x_0 is x_0 and not torch.equal(x_0, REAL)


@pytest.mark.parametrize("group", [1, 2])
def test_parts_and_ranks_have_the_images_of_the_whole_batch(group):
    whole = asked(batch(Share(group=group)))
    for index in range(2):
        for mine, all_of_it in zip(asked(batch(Share(index, 2, group))), whole, strict=True):
            torch.testing.assert_close(mine, Share(index, 2, group).of(all_of_it))
    for index, part in enumerate(batch(Share(group=group)).parts(3)):
        for mine, all_of_it in zip(asked(part), whole, strict=True):
            torch.testing.assert_close(mine, Share(index, 3, group).of(all_of_it))


@pytest.mark.parametrize("augment", [None, AugmentConfig(), AugmentConfig(flip=True)])
def test_without_it_nothing_is_drawn(augment):
    plain = batch(augment=augment)
    x, c = plain.augmented(REAL, UNCONDITIONAL, 0.0)
    assert x is REAL and c is UNCONDITIONAL and torch.equal(plain.x_0, REAL) and plain.c.augmentation is None
    assert torch.equal(plain.noise(), torch.randn(SIZE, *SHAPE, generator=torch.Generator().manual_seed(0)))


def test_images_are_not_transformed_twice():
    whole = batch()
    with pytest.raises(ValueError, match="cannot be transformed again"):
        whole.augmented(whole.x_0, whole.c, 0.5)


def test_labels_go_with_their_images_through_conditions():
    c, conditioning = batch().c, Conditioning(3, w=2.0)
    assert torch.equal(c[torch.tensor([4, 1])].augmentation, c.augmentation[[4, 1]])
    assert torch.equal(conditioning.none(c).augmentation, c.augmentation)


def test_a_network_without_labels_for_it_is_refused():
    """With one message; the images would be augmented, and students could not be told."""
    denoiser, whole = Denoiser(ResidualMLP(SHAPE, width=8, depth=1), VPCosine(), "v"), batch(classes=0)
    t = torch.full((SIZE, 1, 1, 1), 0.5, dtype=torch.float64)
    with pytest.raises(
        UserError, match=r"9 labels, and this ResidualMLP takes none\..* augment.flip=true needs no labels"
    ):
        denoiser(whole.x_0, t, whole.c)
