"What a batch becomes on its way to the network: the same for an image wherever it stands, finite for odd images, with targets that follow the pixels."
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from aaai_lt.core import ConfigError
from aaai_lt.data import augment
from aaai_lt.data.augment import augment_batch, augment_options, eval_batch

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
SEEDS, EPOCHS = st.integers(0, 2 ** 31), st.integers(0, 1000)
ALPHAS = st.just(0.0) | st.floats(0.01, 3)
POSITIONS = st.lists(st.integers(0, 10 ** 7), min_size=1, max_size=8, unique=True)


def batch(count, size, seed=0): return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype='uint8'))
def augmented(images, u, name='none', changes=None, size=24, targets=None): return augment_batch(images, torch.zeros(len(images), dtype=torch.long) if targets is None else targets, u, augment_options(name, changes), size, MEAN, STD, 10)


def check_draws_vary():
    "Another seed, epoch or position is another draw: none of 1,000 rows comes twice."
    rows = torch.cat([augment.draws(seed, epoch, range(10)) for seed in range(10) for epoch in range(10)])
    assert len(torch.unique(rows[:, :2], dim=0)) == 1000


def test_draws_vary(): check_draws_vary()


@given(SEEDS, EPOCHS, POSITIONS, st.randoms())
def test_draws_do_not_depend_on_the_batch(seed, epoch, positions, random):
    together = augment.draws(seed, epoch, positions)
    order = list(range(len(positions)))
    random.shuffle(order)
    assert torch.equal(augment.draws(seed, epoch, [positions[i] for i in order]), together[order])
    assert torch.equal(augment.draws(seed, epoch, positions[-1:]), together[-1:])
    assert together.dtype == torch.float32 and 0 <= together.min() and together.max() < 1


@pytest.mark.parametrize('name', ['light', 'standard'])
@given(SEEDS, EPOCHS, POSITIONS)
def test_an_image_does_not_depend_on_its_batch(name, seed, epoch, positions):
    "Split over two processes, or alone: the same picture, up to the rounding of a batched product."
    images = batch(len(positions), 20)
    together, _ = augmented(images, augment.draws(seed, epoch, positions), name)
    half = len(positions) // 2
    for part in (slice(0, half), slice(half, None), slice(0, 1)):
        if len(images[part]):
            alone, _ = augmented(images[part], augment.draws(seed, epoch, positions[part]), name)
            assert torch.allclose(alone, together[part], atol=1e-4)


@pytest.mark.parametrize('options, dims', [({'hflip': 1}, [3]), ({'vflip': 1}, [2]), ({'hflip': 1, 'vflip': 1}, [2, 3])])
def test_flips_are_exact(options, dims):
    images, u = batch(4, 16), augment.draws(0, 0, range(4))
    assert torch.allclose(augmented(images, u, changes=options, size=16)[0], augmented(images, u, size=16)[0].flip(dims), atol=1e-3)


def test_flip_probability():
    images = torch.zeros(2000, 2, 2, 3, dtype=torch.uint8)
    images[:, :, 0] = 255
    flipped = augmented(images, augment.draws(0, 0, range(2000)), changes={'hflip': 0.3}, size=2)[0]
    assert abs((flipped[:, 0, 0, 0] < 0).float().mean() - 0.3) < 0.04  # four standard errors


def test_quarter_turn():
    "Rotation keeps the shape of things: a plus sign turned by a right angle is a plus sign."
    images = torch.zeros(1, 15, 15, 3, dtype=torch.uint8)
    images[:, 7, 2:13] = images[:, 2:13, 7] = 255
    u = augment.draws(0, 0, [0])
    u[:, 6] = 1.0  # the largest angle
    assert torch.allclose(augmented(images, u, changes={'rotate': 90}, size=15)[0], augmented(images, u, size=15)[0], atol=1e-2)


@given(SEEDS, ALPHAS, ALPHAS, st.integers(2, 6))
def test_targets_follow_the_pixels(seed, mixup, cutmix, count):
    "Image i is bright in channel i % 3 only: whatever is mixed, the mean of a channel is the target of its class."
    assume(mixup or cutmix)
    images = torch.eye(3)[torch.arange(count) % 3][:, :, None, None].expand(count, 3, 16, 16).contiguous()
    own = torch.eye(3)[torch.arange(count) % 3]
    mixed, targets = augment.mix(images, own, augment.draws(seed, 0, range(count)), mixup, cutmix)
    assert torch.allclose(mixed.mean((2, 3)), targets, atol=1e-5)
    assert torch.allclose(targets.sum(1), torch.ones(count), atol=1e-5) and targets.min() >= 0


def test_mixing_does_mix():
    _, targets = augmented(batch(256, 8), augment.draws(0, 0, range(256)), changes={'mixup': 1.0}, targets=torch.arange(256) % 10)
    assert 0.2 < 1 - targets.max(1).values.mean() < 0.3  # Beta(1, 1): the smaller part is a quarter on average


@pytest.mark.parametrize('name', ['none', 'light', 'standard'])
@pytest.mark.parametrize('stored, size', [(1, 1), (1, 32), (2, 7), (32, 24), (24, 33)])
@pytest.mark.parametrize('value', [None, 0, 255])
def test_shape_and_range(name, stored, size, value):
    "Noise, black and white, down to one pixel: finite, and within what black and white can be."
    images = batch(5, stored) if value is None else torch.full((5, stored, stored, 3), value, dtype=torch.uint8)
    labels = torch.arange(5)
    out, targets = augmented(images, augment.draws(3, 1, range(5)), name, size=size, targets=labels)
    assert out.shape == (5, 3, size, size) and out.dtype == torch.float32 and targets is labels
    low, high = (0 - MEAN) / STD, (1 - MEAN) / STD
    assert (out >= low[:, None, None] - 1e-4).all() and (out <= high[:, None, None] + 1e-4).all()


def test_mixed_one_pixel():
    out, targets = augmented(batch(3, 1), augment.draws(0, 0, range(3)), 'standard', {'mixup': 0.2, 'cutmix': 1.0}, size=1)
    assert torch.isfinite(out).all() and torch.allclose(targets.sum(1), torch.ones(3))


def test_batch_of_one():
    out, targets = augmented(batch(1, 8), augment.draws(0, 0, [0]), 'standard', {'mixup': 0.4}, targets=torch.tensor([7]))
    assert torch.isfinite(out).all() and targets[0, 7] == 1  # its only partner is itself


def test_evaluation_only_normalises():
    images = torch.full((2, 6, 6, 3), 51, dtype=torch.uint8)
    assert torch.allclose(eval_batch(images, 9, MEAN, STD), ((0.2 - MEAN) / STD)[:, None, None].expand(2, 3, 9, 9), atol=1e-5)


@pytest.mark.parametrize('name, changes, message', [
    ('lite', {}, "augment is 'lite': did you mean 'light'"),
    ('light', {'hflipp': 0}, "unknown 'hflipp': did you mean 'hflip'"),
    ('light', {'hflip': 1.5}, 'hflip is a probability'),
    ('light', {'hflip': '0.5'}, 'hflip'), ('light', {'mixup': True}, 'mixup'), ('light', {'rotate': -5}, 'rotate'),
    ('light', {'scale': 0.5}, 'scale.*range of two'), ('light', {'scale': [1, 0.5]}, 'scale'), ('light', {'scale': [0, 1]}, 'scale'), ('light', {'ratio': [1, 1, 1]}, 'ratio'),
    ('light', {'rotate': float('nan')}, 'rotate'), ('light', {'rotate': float('inf')}, 'rotate'), ('light', {'scale': [0.5, float('inf')]}, 'scale'),
])
def test_option_errors(name, changes, message):
    with pytest.raises(ConfigError, match=message): augment_options(name, changes)


def test_gamma_is_that_of_torchvision():
    from torchvision.transforms.v2.functional import adjust_gamma
    images, u = batch(5, 12).permute(0, 3, 1, 2).float(), augment.draws(3, 0, range(5))
    bent = augment.light(images, u, {'gamma': 0.8, 'shade': 0.0})
    for image, got, draw in zip(images, bent, u[:, 92]): torch.testing.assert_close(got / 255, adjust_gamma(image / 255, float(torch.exp((2 * draw - 1) * 0.8))), atol=1e-4, rtol=1e-4)


def test_a_shade_falls_off_in_one_direction_and_black_stays_black():
    flat, u = torch.full((6, 3, 21, 21), 50.0), augment.draws(1, 0, range(6))
    shaded = augment.light(flat, u, {'gamma': 0.0, 'shade': 0.6})
    logs = (shaded / 50).log()
    assert torch.allclose(logs + logs.flip((2, 3)), torch.zeros(()), atol=1e-4)  # as much brighter on one side as darker on the other
    assert torch.allclose(logs.diff(dim=3).flatten(2).std(2), torch.zeros(()), atol=1e-4) and torch.allclose(logs.diff(dim=2).flatten(2).std(2), torch.zeros(()), atol=1e-4)
    assert logs.abs().amax() <= 0.6 * 2 ** 0.5 and torch.equal(augment.light(0 * flat, u, {'gamma': 0.5, 'shade': 0.6}), 0 * flat)


def test_some_turn_grey():
    mean, std = torch.zeros(3), torch.ones(3)
    images, u = batch(64, 8).permute(0, 3, 1, 2).float(), augment.draws(0, 0, range(64))
    found = augment.colour(images, u, augment.augment_options('none', {'grey': 0.5}), mean, std)
    grey = (found - found[:, :1]).abs().amax((1, 2, 3)) < 1e-5
    assert torch.equal(grey, u[:, 95] < 0.5) and 20 < grey.sum() < 44
    torch.testing.assert_close(found[~grey], images[~grey] / 255)
