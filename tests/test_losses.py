"Losses against torch, timm, their own derivatives, and what must not change them."
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn import functional as F

from aaai_lt.core import ConfigError
from aaai_lt.losses.factory import LOSSES, make_loss
from aaai_lt.training.checkpoint import tensor_bytes

COUNTS = [500, 60, 9, 0]  # the last class is empty
SOFTMAX = ['cross_entropy', 'balanced_softmax', 'logit_adjustment']
EVERY = sorted(LOSSES)


def logits(seed=0, n=7, c=len(COUNTS)): return torch.randn(n, c, generator=torch.Generator().manual_seed(seed)) * 2
def hard(seed=0, n=7, c=len(COUNTS)): return torch.randint(0, c, (n,), generator=torch.Generator().manual_seed(seed))


def settled(name, counts=COUNTS, **options):
    "A loss in evaluation, its running sums far from their start."
    loss = make_loss(name, counts, **options)
    for seed in range(20): loss(logits(seed, c=len(counts)), hard(seed, c=len(counts)) % 2)
    return loss.eval()


def equal(one, two, tolerance=1e-5): assert torch.allclose(one, two, rtol=tolerance, atol=tolerance), (one, two)


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('soft', [False, True])
def test_gradient(name, soft):
    "Against finite differences. The losses compute in float32, hence the wide step."
    loss, target = settled(name), torch.softmax(logits(5), 1) if soft else hard()
    assert torch.autograd.gradcheck(lambda z: loss(z, target.double() if soft else target).double(), logits(1).double().requires_grad_(), eps=1e-2, atol=2e-3)


@given(st.integers(0, 10_000), st.floats(0, 0.9))
def test_cross_entropy_is_that_of_timm(seed, smoothing):
    z, y = logits(seed), hard(seed)
    if smoothing: equal(make_loss('cross_entropy', COUNTS, smoothing=smoothing)(z, y), LabelSmoothingCrossEntropy(smoothing)(z, y))
    soft = torch.softmax(logits(seed + 1), 1)
    equal(make_loss('cross_entropy', COUNTS)(z, soft), SoftTargetCrossEntropy()(z, soft))


@given(st.integers(0, 10_000), st.lists(st.integers(0, 5000), min_size=4, max_size=4), st.integers(1, 5000))
def test_special_cases_are_cross_entropy(seed, counts, same):
    z, y = logits(seed), hard(seed)
    plain = F.cross_entropy(z, y)
    equal(make_loss('logit_adjustment', counts, tau=0.0)(z, y), plain)
    equal(make_loss('balanced_softmax', [same] * 4)(z, y), plain)
    equal(make_loss('logit_adjustment', [same] * 4, tau=2.5)(z, y), plain)
    equal(make_loss('logit_adjustment', counts, tau=1.0)(z, y), make_loss('balanced_softmax', counts)(z, y))


@pytest.mark.parametrize('name', SOFTMAX)
def test_a_constant_on_all_logits_changes_nothing(name): equal(make_loss(name, COUNTS)(logits() + 7.5, hard()), make_loss(name, COUNTS)(logits(), hard()))


@pytest.mark.parametrize('name', ['balanced_softmax', 'logit_adjustment'])
def test_only_proportions_count(name): equal(make_loss(name, [10, 20, 70, 1])(logits(), hard()), make_loss(name, [100, 200, 700, 10])(logits(), hard()))


@pytest.mark.parametrize('name', EVERY)
def test_soft_targets_are_the_mix_of_hard_ones(name):
    "Mixup's targets: a share of one label and the rest of another give that share of both losses."
    loss, (one, two) = settled(name), (F.one_hot(hard(seed), 4).float() for seed in (1, 2))
    equal(loss(logits(), 0.3 * one + 0.7 * two), 0.3 * loss(logits(), one) + 0.7 * loss(logits(), two))


@pytest.mark.parametrize('name', EVERY)
def test_order_of_images_and_classes_is_no_matter(name):
    z, y, order = logits(), hard(), torch.tensor([2, 0, 3, 1])
    loss, renamed = settled(name), make_loss(name, [COUNTS[i] for i in order]).eval()
    for key, value in loss.state_dict().items(): renamed.state_dict()[key].copy_(value[order])
    equal(renamed(z[:, order], torch.argsort(order)[y]), loss(z, y))
    equal(loss(z.flip(0), y.flip(0)), loss(z, y))
    equal(loss(torch.cat([z, z]), torch.cat([y, y])), loss(z, y))  # a mean over images


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('scale', [0, 1, 1e4])
def test_empty_class_and_large_logits(name, scale):
    "Class 3 has no training image: loss and gradient are finite for it, in train and evaluation."
    for loss in (make_loss(name, COUNTS), settled(name)):
        z = (logits() * scale).requires_grad_()
        value = loss(z, torch.full((7,), 3))
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(z.grad).all()


@pytest.mark.parametrize('name', EVERY)
def test_half_precision_logits(name):
    z = logits().bfloat16()
    value = settled(name)(z, hard())
    assert value.dtype == torch.float32
    equal(value, settled(name)(z.float(), hard()), 0)


@pytest.mark.parametrize('name', ['balanced_softmax', 'logit_adjustment'])
def test_the_rare_are_asked_for_more(name):
    "At equal logits an image of a rarer class costs more, and pulls its own logit up more."
    z = torch.zeros(1, 3, requires_grad=True)
    values = [make_loss(name, [900, 90, 9])(z, torch.tensor([c])) for c in range(3)]
    pulls = [-torch.autograd.grad(v, z)[0][0, c].item() for c, v in enumerate(values)]
    assert values[0] < values[1] < values[2] and pulls[0] < pulls[1] < pulls[2]


def test_eqlv2_goes_on_from_a_checkpoint():
    "Its running sums are state: with them the next losses are the same, without them they are not."
    whole, stopped = make_loss('eqlv2', COUNTS), make_loss('eqlv2', COUNTS)
    for seed in range(8):
        whole(logits(seed), hard(seed)), stopped(logits(seed), hard(seed))
    resumed, forgetful = make_loss('eqlv2', COUNTS), make_loss('eqlv2', COUNTS)
    resumed.load_state_dict(load(tensor_bytes(stopped.state_dict())))
    for seed in range(8, 16): expected, got, other = (loss(logits(seed), hard(seed)) for loss in (whole, resumed, forgetful))
    assert torch.equal(expected, got) and not torch.equal(expected, other)


def test_eqlv2_collects_only_in_training():
    loss = settled('eqlv2')
    before = json.dumps({k: v.tolist() for k, v in loss.state_dict().items()})
    loss(logits(99), hard(99))
    assert json.dumps({k: v.tolist() for k, v in loss.state_dict().items()}) == before


@pytest.mark.parametrize('name, options, message', [
    ('balanced_softmx', {}, "did you mean 'balanced_softmax'"), ('logit_adjustment', {'tua': 1}, "no option 'tua': did you mean 'tau'"),
    ('cross_entropy', {'tau': 1}, "no option 'tau'"), ('cross_entropy', {'smoothing': 1.0}, 'smoothing'), ('cross_entropy', {'smoothing': -0.1}, 'smoothing'),
    ('cross_entropy', {'smoothing': '0.1'}, 'a number'), ('eqlv2', {'gamma': True}, 'a number'), ('logit_adjustment', {'tau': float('nan')}, 'tau'), ('eqlv2', {'mu': float('inf')}, 'mu'),
])
def test_option_errors(name, options, message):
    with pytest.raises(ConfigError, match=message): make_loss(name, COUNTS, **options)
