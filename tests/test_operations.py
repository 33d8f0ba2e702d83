"Operations in batches against torchvision's one by one, the policies against torchvision's own tables, and what an image gets wherever it stands."
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from aaai_lt.core import ConfigError
from aaai_lt.data.augment import augment_batch, augment_options, draws, erase
from aaai_lt.data.operations import AUTOAUGMENT, COLOURS, INCREASING, MATRICES, MOST_OPS, NAMES, POLICIES, RANGES, RAUG15, apply_policy, cutout, plan, sample_affine, strengths

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
SEEDS, SIZES = st.integers(0, 2 ** 31), st.tuples(st.integers(1, 40), st.integers(1, 40))
THEIRS = {'identity': 'Identity', 'shear_x': 'ShearX', 'shear_y': 'ShearY', 'translate_x': 'TranslateX', 'translate_y': 'TranslateY', 'rotate': 'Rotate', 'brightness': 'Brightness', 'color': 'Color',
          'contrast': 'Contrast', 'sharpness': 'Sharpness', 'posterize': 'Posterize', 'solarize': 'Solarize', 'autocontrast': 'AutoContrast', 'equalize': 'Equalize', 'invert': 'Invert'}
EXACT = ('identity', 'posterize', 'autocontrast', 'equalize', 'invert', 'translate_x', 'translate_y')


def pictures(seed, count, size, smooth=False):
    random = np.random.default_rng(seed)
    if not smooth: return torch.from_numpy(random.integers(0, 256, (count, 3, *size), dtype='uint8'))
    coarse = torch.from_numpy(random.integers(0, 256, (count, 3, 4, 4), dtype='uint8')).float()
    return torch.nn.functional.interpolate(coarse, size, mode='bilinear').round().to(torch.uint8)


def torchvision_one(name, image, level, share, negative):
    "What torchvision's RandAugment does to one image with this operation, and its strength, from its own table: the magnitude and the sign are set."
    height, width = image.shape[1:]
    values, signed = v2.AutoAugment._AUGMENTATION_SPACE[THEIRS[name]] if name == 'invert' else v2.RandAugment._AUGMENTATION_SPACE[THEIRS[name]]
    table = values(share + 1, height, width)
    magnitude = 0.0 if table is None else float(table[level]) * (-1 if signed and negative else 1)
    return v2.RandAugment()._apply_image_or_video_transform(image, THEIRS[name], magnitude, interpolation=InterpolationMode.NEAREST, fill={torch.Tensor: None}), magnitude


def ours(name, images, strength):
    s = torch.as_tensor(strength, dtype=torch.float64)
    return sample_affine(images, name, s) if name in MATRICES else COLOURS[name](images, s)


@pytest.mark.parametrize('name', list(THEIRS))
@pytest.mark.parametrize('smooth', [False, True])
@given(seed=SEEDS, size=SIZES)
def test_each_operation_is_that_of_torchvision(name, smooth, seed, size):
    "A batch of different strengths and signs against one image at a time: exact, or the last digit of a value, or the nearest pixel at a tie."
    random = np.random.default_rng(seed)
    images, levels, negative = pictures(seed, 6, size, smooth), random.integers(0, 31, 6), random.random(6) < 0.5
    expected, magnitudes = zip(*(torchvision_one(name, image, int(level), 30, bool(minus)) for image, level, minus in zip(images, levels, negative)))
    expected, strength = torch.stack(expected), strengths(RANGES, np.full(6, NAMES.index(name)), levels / 30, negative)
    blended = name in ('brightness', 'color', 'contrast', 'sharpness')
    if blended: assert np.allclose(strength, magnitudes, atol=1e-6)
    found = ours(name, images, magnitudes if blended else strength)  # theirs is float32: a product that is a whole number may fall to the other side
    assert found.dtype == torch.uint8 and found.shape == expected.shape
    if name in EXACT: assert torch.equal(found, expected)
    elif name in MATRICES: assert (found != expected).any(1).float().mean() <= 0.02 + 1.5 / images[0, 0].numel()  # a coordinate that lies between two pixels, to the last bit
    elif name == 'solarize': assert torch.equal(found[far := (images - 255 * (1 - torch.from_numpy(levels) / 30)[:, None, None, None]).abs() > 1e-3], expected[far])  # the value of the threshold itself: float32 against float64
    else: assert (found.int() - expected.int()).abs().max() <= 1 and (smooth or (found != expected).sum() <= 3 + 0.01 * found.numel())


def test_geometry_at_full_size():
    "At 224 px hardly a pixel falls to the other side of a tie."
    images = pictures(0, 4, (224, 224))
    for name, values in {'rotate': (9.0, -9, 30, -17.3), 'shear_x': (0.09, -0.09, 0.3, -0.21), 'shear_y': (0.09, -0.09, 0.3, -0.21)}.items():
        found = ours(name, images, values)
        for one, image, s in zip(found, images, values): assert (one != v2.RandAugment()._apply_image_or_video_transform(image, THEIRS[name], float(s), interpolation=InterpolationMode.NEAREST, fill={torch.Tensor: None})).any(0).float().mean() < 2e-3


def test_fill():
    images = torch.full((2, 3, 20, 20), 200, dtype=torch.uint8)
    for name, s in (('rotate', 30.0), ('shear_x', 0.3), ('translate_y', 0.4)):
        for fill in (0, 128): assert set(sample_affine(images, name, torch.tensor([s, -s], dtype=torch.float64), fill).unique().tolist()) == {fill, 200}


@pytest.mark.parametrize('amount', [0, 1, 60, 110, 154])
def test_solarize_add(amount):
    values = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert ours('solarize_add', values, [amount])[0, 0, 0].tolist() == [min(v + amount, 255) if v < 128 else v for v in range(256)]


@given(SEEDS, SIZES, st.integers(0, 60))
def test_cutout(seed, size, side):
    "The box by a slow plain rule: centre uniform, cut off at the edges, one colour, nothing else touched."
    images, u = pictures(seed, 5, size), draws(seed, 0, range(5), 5)
    colours = (256 * u[:, 2:]).to(torch.uint8)
    found = cutout(images, torch.full((5,), side), u[:, :2], colours)
    for one, before, (x, y), colour in zip(found, images, u[:, :2].tolist(), colours):
        expected, (h, w) = before.clone(), size
        cx, cy = int(x * w), int(y * h)
        expected[:, max(cy - side // 2, 0):max(cy + side // 2, 0), max(cx - side // 2, 0):max(cx + side // 2, 0)] = colour[:, None, None]
        assert torch.equal(one, expected)


# -- policies

def test_tables_are_those_of_torchvision():
    "Names, and the strength of every level of 31 and of 10, signed ones apart."
    space = v2.AutoAugment._AUGMENTATION_SPACE
    assert {THEIRS[name] for name in RANGES if name != 'identity'} == set(space) and {THEIRS[name] for name in RANGES if name != 'invert'} == set(v2.RandAugment._AUGMENTATION_SPACE)
    assert [[(THEIRS[n], p, s) for n, p, s in pair] for pair in AUTOAUGMENT] == [[(n, p, s or 0) for n, p, s in pair] for pair in v2.AutoAugment()._policies]
    for bins in (31, 10):
        for name, (values, signed) in ((name, space[theirs]) for name, theirs in THEIRS.items() if theirs in space):
            table = values(bins, 331, 331)
            if table is None: continue
            found = strengths(RANGES, np.full(bins, NAMES.index(name)), np.arange(bins) / (bins - 1), np.zeros(bins, bool)) * (331 if 'translate' in name else 1 / 255 if name == 'solarize' else 1)
            assert np.allclose(found, table, atol=1e-5)
            flipped = strengths(RANGES, np.full(bins, NAMES.index(name)), np.arange(bins) / (bins - 1), np.ones(bins, bool)) * (331 if 'translate' in name else 1 / 255 if name == 'solarize' else 1)
            assert np.allclose(flipped, -table if signed else table, atol=1e-5)


def planned(policy, num_ops=2, count=30_000):
    which, strength = plan(draws(1, 0, range(count), 70).numpy().astype('float64'), policy, num_ops, 9)
    return np.array(NAMES, dtype=object)[which], strength


def test_randaugment_draws():
    "Nine rounds, 14 operations alike, both signs alike, strength 9 of 30."
    names, strength = planned('randaugment', 9)
    assert names.shape == (30_000, 9)
    for i in (0, 8):
        found, counts = np.unique(names[:, i], return_counts=True)
        assert set(found) == set(RANGES) - {'invert'} and abs(counts / 30_000 - 1 / 14).max() < 0.006
    turned = strength[names == 'rotate']
    assert np.allclose(np.abs(turned), 9) and abs((turned < 0).mean() - 0.5) < 0.02
    assert set(strength[names == 'posterize']) == {7} and np.allclose(strength[names == 'solarize'], 255 * 0.7)
    assert abs(np.corrcoef((names[:, 0] == 'rotate'), (names[:, 1] == 'rotate'))[0, 1]) < 0.03


def test_autoaugment_draws():
    "Each operation comes as often as the 25 pairs and their probabilities say."
    names, _ = planned('autoaugment')
    for i in range(2):
        for name in RANGES:
            expected = sum(pair[i][1] for pair in AUTOAUGMENT if pair[i][0] == name) / 25
            if name != 'identity': assert abs((names[:, i] == name).mean() - expected) < 0.01, (i, name)


def test_raug15_draws():
    "16 operations alike; levels 0 to 14 of nominally 10; bits and sizes as whole numbers; level 0 keeps no bit and inverts all."
    names, strength = planned('raug15')
    found, counts = np.unique(names, return_counts=True)
    assert set(found) == set(RAUG15) and len(found) == 16 and abs(counts / 60_000 - 1 / 16).max() < 0.006
    assert set(strength[names == 'posterize']) == {0, 1, 2, 3, 4, 5} and set(np.round(strength[names == 'brightness'], 6)) == {round(0.18 * level - 0.9, 6) for level in range(15)}
    assert set(np.round(np.abs(strength[names == 'rotate']), 6)) == {3.0 * level for level in range(15)} and abs((strength[names == 'rotate'] < 0).mean() - 0.5 * 14 / 15) < 0.03
    assert strength[names == 'solarize'].min() == 0 and strength[names == 'cutout'].max() == 56


def test_increasing_is_timms():
    "Kinds and strengths of timm's rand-m9-mstd0.5-inc1, by its own functions from a level to a strength."
    from timm.data import auto_augment as theirs
    names = {'autocontrast': 'AutoContrast', 'equalize': 'Equalize', 'invert': 'Invert', 'rotate': 'Rotate', 'posterize': 'PosterizeIncreasing', 'solarize': 'SolarizeIncreasing', 'solarize_add': 'SolarizeAdd', 'color': 'ColorIncreasing', 'contrast': 'ContrastIncreasing',
             'brightness': 'BrightnessIncreasing', 'sharpness': 'SharpnessIncreasing', 'shear_x': 'ShearX', 'shear_y': 'ShearY', 'translate_x': 'TranslateXRel', 'translate_y': 'TranslateYRel'}
    assert set(names) == set(INCREASING) and set(names.values()) == set(theirs._RAND_INCREASING_TRANSFORMS)
    for level in (0.0, 2.6, 7.77, 8.5, 9.0, 9.31, 10.0):
        for name, other in names.items():
            value = strengths(INCREASING, np.array([[NAMES.index(name)]]), np.array([[level / 10]]), np.array([[False]]), np.ceil)[0, 0]
            function = theirs.LEVEL_TO_ARG[other]
            expected = abs(function(level, {})[0] - (1.0 if name in ('color', 'contrast', 'brightness', 'sharpness') else 0.0)) if function else 0.0
            if name in ('solarize', 'solarize_add'): assert np.floor(value) == expected or np.ceil(value) == expected  # theirs is cut to whole numbers, a comparison of bytes does not see it
            else: assert np.isclose(value, expected, atol=1e-12), (name, level)
    which, strength = plan(draws(0, 0, range(20000), 64).numpy(), 'increasing', 2, 9)
    assert abs((which == NAMES.index('identity')).mean() - 0.5) < 0.01
    turned = abs(strength[which == NAMES.index('rotate')]) / 3
    assert abs(np.median(turned) - 9) < 0.05 and turned.max() == 10 and 0.015 < (turned == 10).mean() < 0.031  # one of 44 normal draws lies two deviations above


@pytest.mark.parametrize('name', ['accv_vit', 'accv_swin'])
def test_accv_presets(name):
    "The same for the same draw; without the noise, whole bytes between black and white; only one of them crops."
    images, u, options = pictures(3, 16, (24, 24)).permute(0, 2, 3, 1), draws(5, 2, range(16)), augment_options(name)
    def made(**changes): return augment_batch(images, torch.zeros(16, dtype=torch.long), u, options | changes, 24, MEAN, STD, 2)[0]
    assert made().shape == (16, 3, 24, 24) and torch.equal(made(), made()) and not torch.equal(made(), made(erase=0.0))
    values = 255 * (made(erase=0.0) * STD[:, None, None] + MEAN[:, None, None])
    assert values.min() > -0.01 and values.max() < 255.01 and (values - values.round()).abs().max() < 0.01
    assert torch.equal(made(erase=0.0, policy='', hflip=0.0), made(erase=0.0, policy='', hflip=0.0, scale=[1.0, 1.0], ratio=[1.0, 1.0])) == (name == 'accv_swin')


def test_erasing_with_noise():
    "Boxes as large and as many as with the mean colour, filled with noise of deviation 1; everything else as it was."
    u, images = draws(0, 0, range(600)), torch.full((600, 3, 32, 32), 7.0)
    plain, noisy = erase(images.clone(), u, 0.25), erase(images.clone(), u, 0.25, noise=1.0)
    assert torch.equal(plain == 0, noisy != 7) and abs((noisy != 7).any(1).any(1).any(1).float().mean() - 0.25) < 0.06
    assert abs(noisy[noisy != 7].mean()) < 0.02 and abs(noisy[noisy != 7].std() - 1) < 0.02
    assert torch.equal(erase(images[40:60].clone(), u[40:60], 0.25, noise=1.0), noisy[40:60])  # alone or in company


@pytest.mark.parametrize('policy, num_ops', [('randaugment', 9), ('autoaugment', 2), ('raug15', 2), ('raug15', MOST_OPS), ('increasing', 2)])
@given(seed=SEEDS, count=st.integers(1, 7), size=SIZES)
def test_an_image_does_not_depend_on_its_batch(policy, num_ops, seed, count, size):
    images, u, before = (made := pictures(seed, count, size)), draws(seed, 1, range(count))[:, 26:], made.clone()
    together = apply_policy(images, u, policy, num_ops)
    assert torch.equal(images, before) and together.shape == images.shape and together.dtype == torch.uint8
    for i in range(count):
        alone = apply_policy(images[i:i + 1], u[i:i + 1], policy, num_ops)
        assert torch.equal(alone[0], together[i])


def test_too_few_numbers():
    with pytest.raises(ValueError, match='9 operations need 46 random numbers for each image; there are 20'): apply_policy(pictures(0, 2, (8, 8)), torch.zeros(2, 20), 'randaugment', 9)


# -- the presets

def batch(count, size, seed=0): return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype='uint8'))
def augmented(images, u, name, changes=None, size=24): return augment_batch(images, torch.zeros(len(images), dtype=torch.long), u, augment_options(name, changes), size, MEAN, STD, 10)[0]
def as_bytes(images): return (255 * (images * STD[:, None, None] + MEAN[:, None, None])).round()


@pytest.mark.parametrize('name', ['repvgg_weak', 'repvgg_raug15', 'aicoss_weak', 'aicoss_strong'])
@pytest.mark.parametrize('stored, size', [(1, 1), (1, 16), (40, 24), (24, 24)])
def test_presets_give_pictures(name, stored, size):
    "The right shape, values between black and white, whole bytes where the original worked on bytes; the same for the same draw."
    images, u = batch(16, stored), draws(5, 2, range(16))
    out = augmented(images, u, name, size=size)
    assert out.shape == (16, 3, size, size) and out.dtype == torch.float32 and torch.equal(out, augmented(images, u, name, size=size))
    values = 255 * (out * STD[:, None, None] + MEAN[:, None, None])
    assert values.min() > -0.01 and values.max() < 255.01
    if name != 'repvgg_weak': assert (values - values.round()).abs().max() < 0.01
    if stored > 1: assert not torch.equal(out, augmented(images, draws(5, 3, range(16)), name, size=size))


def test_flips_of_aicoss_strong():
    "At the stored size the flips are exact, each in half of the images."
    images, u = batch(400, 8), draws(0, 0, range(400))
    out = as_bytes(augmented(images, u, 'aicoss_strong', {'policy': '', 'cutout': 0.0}, size=8)).to(torch.uint8)
    plain = images.permute(0, 3, 1, 2)
    kinds = torch.stack([(out == other).flatten(1).all(1) for other in (plain, plain.flip(3), plain.flip(2), plain.flip(2, 3))])
    assert (kinds.sum(0) == 1).all() and (kinds.float().mean(1) - 0.25).abs().max() < 0.08


def test_cutout_of_aicoss_weak():
    "Always there, of one colour; drawn before the operations, at the network's size."
    u = draws(0, 0, range(300))
    out = as_bytes(augmented(torch.full((300, 10, 10, 3), 7, dtype=torch.uint8), u, 'aicoss_weak', {'policy': ''}, size=20))
    hidden = (out != 7).any(1)
    assert hidden.flatten(1).any(1).all() and hidden.float().mean((1, 2)).max() == 0.25 and abs(hidden.float().mean() - 0.4375 ** 2) < 0.02
    for one, mask in zip(out, hidden): assert all(len(channel[mask].unique()) == 1 for channel in one)
    after = as_bytes(augmented(torch.full((300, 10, 10, 3), 7, dtype=torch.uint8), u, 'aicoss_weak', {'num_ops': 0}, size=20))
    assert torch.equal(after, out)


def test_mixing_unknown_labels():
    "A share of something unknown is unknown; what is known mixes as before; int8 targets are taken."
    images, u = batch(6, 8), draws(0, 0, range(6))
    targets = torch.tensor([[1, 0, -1], [0, 1, 1], [1, -1, 0], [0, 0, 0], [1, 1, 1], [-1, 0, 1]], dtype=torch.int8)
    _, mixed = augment_batch(images, targets, u, augment_options('none', {'mixup': 1.0}), 8, MEAN, STD, 3)
    _, plain = augment_batch(images, targets.clamp(min=0), u, augment_options('none', {'mixup': 1.0}), 8, MEAN, STD, 3)
    unknown = (targets < 0) | (targets.roll(-1, 0) < 0)
    assert (mixed[unknown] == -1).all() and torch.equal(mixed[~unknown], plain[~unknown])
    same = augment_batch(images, targets, u, augment_options('light'), 8, MEAN, STD, 3)[1]
    assert same is targets


@pytest.mark.parametrize('changes, message', [({'policy': 'randaug'}, "policy is 'randaug': did you mean 'randaugment'"), ({'policy': 3}, 'policy'), ({'cutout': 1.5}, 'cutout is a share'), ({'num_ops': 99}, f'whole number up to {MOST_OPS}'),
    ({'num_ops': 2.5}, 'whole number'), ({'magnitude': 31}, 'up to 30'), ({'magnitude': -1}, 'magnitude')])
def test_option_errors(changes, message):
    with pytest.raises(ConfigError, match=message): augment_options('aicoss_weak', changes)
    assert set(POLICIES) == {'randaugment', 'autoaugment', 'raug15', 'increasing'}
