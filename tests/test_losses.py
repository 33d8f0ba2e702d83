"Losses against slow plain formulas, torch, timm and torchvision, their own derivatives, and what must not change them."
import functools
import math
import re

import pytest
import torch
from helpers import Child
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from aaai_lt.core import ConfigError, table
from aaai_lt.losses.equalization import EQL, SoftEQL, random_mask
from aaai_lt.losses.factory import LOSSES, make_loss
from aaai_lt.losses.longtail import class_gradients, effective_weights, prior_offset, set_progress
from aaai_lt.losses.margins import MarginLoss, adaptive_margins, ldam_margins
from aaai_lt.training.checkpoint import tensor_bytes

COUNTS = [500, 60, 9, 0]  # the last class is empty
EVERY = sorted(name for name in LOSSES if not getattr(LOSSES[name], 'multilabel', False))  # the others are in test_multilabel_losses.py
HARD_ONLY = ['seesaw']
SOFT = [name for name in EVERY if name not in HARD_ONLY]
LINEAR_IN_TARGET = [name for name in SOFT if name not in ('ldam', 'symmetric')]  # margins and log t do not mix linearly
SUMS = ['eqlv2', 'soft_eql', 'seesaw']


def logits(seed=0, n=7, c=len(COUNTS)): return torch.randn(n, c, generator=torch.Generator().manual_seed(seed)) * 2
def hard(seed=0, n=7, c=len(COUNTS)): return torch.randint(0, c, (n,), generator=torch.Generator().manual_seed(seed))


def step(loss, z, y):
    "One training step of a loss: forward and backward, on logits of its own."
    z = z.detach().clone().requires_grad_()
    value = loss(z, y)
    value.backward()
    return value.detach(), z.grad


def settled(name, counts=COUNTS, **options):
    "A loss in evaluation, its running sums far from their start, its training three quarters done."
    loss = make_loss(name, counts, **options)
    for seed in range(20): step(loss, logits(seed, c=len(counts)), hard(seed, c=len(counts)) % 2)
    set_progress(loss, 0.75)
    return loss.eval()


same = functools.lru_cache(settled)  # for those who do not change it


def equal(one, two, tolerance=1e-5): assert torch.allclose(torch.as_tensor(one).double(), torch.as_tensor(two).double(), rtol=tolerance, atol=tolerance), (one, two)


# -- the formulas, written out slowly in double precision: one image, hard target, plain Python

def softmax(z):
    e = [math.exp(v) for v in z]
    return [v / sum(e) for v in e]


def reference(name, z, y, n, q=None):
    "The loss of one image of class y: logits z, class counts n, collected gradients (or images seen) q."
    c, total = range(len(z)), sum(n)
    log_p = [math.log(p) for p in softmax(z)]
    p = math.exp(log_p[y])
    if name == 'cross_entropy': return -0.9 * log_p[y] - 0.1 * sum(log_p) / len(z)
    if name == 'focal': return -(1 - p) ** 1.5 * log_p[y]
    if name == 'class_balanced':
        weights = [(1 - 0.99) / (1 - 0.99 ** k) for k in n]
        return -weights[y] / sum(weights) * len(n) * log_p[y]
    if name == 'ldam':
        margin = [0.4 * min(n) ** 0.25 / k ** 0.25 for k in n]
        return -math.log(softmax([z[j] - 3 * margin[j] * (j == y) for j in c])[y])
    if name == 'balanced_softmax': return -math.log(n[y] * math.exp(z[y]) / sum(n[j] * math.exp(z[j]) for j in c))
    if name == 'logit_adjustment': return math.log(1 + sum((n[j] / n[y]) ** 0.7 * math.exp(z[j] - z[y]) for j in c if j != y))
    if name == 'label_aware_smoothing':
        e = 0.05 + 0.25 * math.sin(math.pi / 2 * (n[y] - min(n)) / (max(n) - min(n)))
        return -sum((1 - e if j == y else e / (len(z) - 1)) * log_p[j] for j in c)
    if name == 'eql': return -math.log(math.exp(z[y]) / sum(math.exp(z[j]) for j in c if j == y or n[j] / total >= 0.05))
    if name == 'eqlv2':
        w = [1 / (1 + math.exp(-12 * (r - 0.8))) for r in q]
        return sum((1 + 4 * (1 - w[j])) * math.log(1 + math.exp(-z[j])) if j == y else w[j] * math.log(1 + math.exp(z[j])) for j in c)
    if name == 'soft_eql': return -math.log(softmax([z[j] + (0.7 * math.log(max(q[j], 1e-4) / max(q[y], 1e-4)) if j != y else 0) for j in c])[y])
    if name == 'seesaw':
        s = softmax(z)
        factor = [(1 if q[y] <= q[j] else (q[j] / q[y]) ** 0.8) * (1 if s[j] <= s[y] else (s[j] / s[y]) ** 2) for j in c]
        return -math.log(math.exp(z[y]) / (sum(factor[j] * math.exp(z[j]) for j in c if j != y) + math.exp(z[y])))
    if name == 'gce': return (1 - p ** 0.4) / 0.4
    if name == 'symmetric': return -0.3 * log_p[y] + 2 * 4 * sum(softmax(z)[j] for j in c if j != y)


OPTIONS = {'cross_entropy': {'smoothing': 0.1}, 'focal': {'gamma': 1.5}, 'class_balanced': {'beta': 0.99}, 'ldam': {'largest': 0.4, 'scale': 3.0}, 'logit_adjustment': {'tau': 0.7},
           'label_aware_smoothing': {'head': 0.3, 'tail': 0.05}, 'eql': {'drop': 1.0, 'threshold': 0.05}, 'soft_eql': {'tau': 0.7}, 'gce': {'q': 0.4}, 'symmetric': {'alpha': 0.3, 'beta': 2.0}}


@pytest.mark.parametrize('name', EVERY)
@given(z=st.lists(st.floats(-6, 6), min_size=4, max_size=4), n=st.lists(st.integers(1, 5000), min_size=4, max_size=4, unique=True), y=st.integers(0, 3), sums=st.lists(st.floats(0.2, 50), min_size=4, max_size=4))
def test_formula(name, z, n, y, sums):
    loss = make_loss(name, n, **OPTIONS.get(name, {}))
    if name != 'eql': loss.eval()  # which drops in training only
    q = sums
    if name == 'eqlv2':
        loss.pos_grad.copy_(torch.tensor(sums)), loss.neg_grad.copy_(torch.tensor(sums[::-1]))
        q = [a / b for a, b in zip(sums, sums[::-1])]
    if name == 'soft_eql': loss.pos_grad.copy_(torch.tensor(sums))
    if name == 'seesaw':
        q = [max(1, round(v)) for v in sums]
        loss.seen.copy_(torch.tensor(q))
    others = [[0.0] * 4, [1.0, -1, 2, 0]]  # the mean over a batch of three
    expected = sum(reference(name, row, c, n, q) for row, c in zip([z, *others], (y, 1, 2))) / 3
    equal(loss(torch.tensor([z, *others], dtype=torch.float64), torch.tensor([y, 1, 2])), expected, 3e-5)


@given(st.integers(0, 10_000), st.floats(0, 0.9))
def test_cross_entropy_is_that_of_timm(seed, smoothing):
    z, y = logits(seed), hard(seed)
    if smoothing: equal(make_loss('cross_entropy', COUNTS, smoothing=smoothing)(z, y), LabelSmoothingCrossEntropy(smoothing)(z, y))
    soft = torch.softmax(logits(seed + 1), 1)
    equal(make_loss('cross_entropy', COUNTS)(z, soft), SoftTargetCrossEntropy()(z, soft))


@given(st.integers(0, 10_000), st.floats(0, 4))
def test_focal_is_that_of_torchvision(seed, gamma):
    "A softmax over two classes is a sigmoid of the difference."
    z, y = logits(seed, 20, 2), hard(seed, 20, 2)
    equal(make_loss('focal', [1, 1], gamma=gamma)(z, y), sigmoid_focal_loss(z[:, 1] - z[:, 0], y.float(), alpha=-1, gamma=gamma, reduction='mean'))


@given(st.integers(0, 10_000), st.lists(st.integers(0, 5000), min_size=4, max_size=4), st.integers(1, 5000))
def test_special_cases_are_cross_entropy(seed, counts, same):
    z, y, alike = logits(seed), hard(seed), [same] * 4
    plain = F.cross_entropy(z, y)
    for loss in (make_loss('logit_adjustment', counts, tau=0.0), make_loss('balanced_softmax', alike), make_loss('logit_adjustment', alike, tau=2.5), make_loss('focal', counts, gamma=0.0),
                 make_loss('class_balanced', alike), make_loss('class_balanced', counts if sum(counts) else alike, beta=0.0), make_loss('class_balanced', counts if sum(counts) else alike, reweight_from=1.0),
                 make_loss('ldam', counts if sum(counts) else alike, largest=0.0), make_loss('label_aware_smoothing', counts, head=0.0), make_loss('eql', alike), make_loss('eql', alike, threshold=1.0, drop=0.0),
                 make_loss('soft_eql', alike), make_loss('seesaw', alike, p=0.0, q=0.0), make_loss('symmetric', alike, alpha=1.0, beta=0.0)):
        equal(loss(z, y), plain)
    equal(make_loss('logit_adjustment', counts, tau=1.0)(z, y), make_loss('balanced_softmax', counts)(z, y))


# -- what holds for all

@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('soft', [False, True])
def test_gradient(name, soft):
    "Against finite differences, in double precision."
    if soft and name in HARD_ONLY: pytest.skip(f'{name} takes class indices only')
    loss, target = settled(name, **({'q': 0.0} if name == 'seesaw' else {})), torch.softmax(logits(5), 1).double() if soft else hard()  # seesaw's compensation is a constant to its gradient
    assert torch.autograd.gradcheck(lambda z: loss(z, target), logits(1).double().requires_grad_())


@pytest.mark.parametrize('name', [n for n in EVERY if n not in ('eqlv2',)])
def test_a_constant_on_all_logits_changes_nothing(name): equal(settled(name)(logits() + 7.5, hard()), settled(name)(logits(), hard()))


@pytest.mark.parametrize('name', ['balanced_softmax', 'logit_adjustment', 'eql'])
def test_only_proportions_count(name):
    for loss in (one := make_loss(name, [10, 20, 70, 1])), (two := make_loss(name, [100, 200, 700, 10])): torch.manual_seed(0); loss.value = loss(logits(), hard())
    equal(one.value, two.value)


@pytest.mark.parametrize('name', SOFT)
def test_a_one_hot_target_is_a_hard_one(name):
    for dtype in (torch.float32, torch.float16, torch.int64): equal(settled(name)(logits(), F.one_hot(hard(), 4).to(dtype)), settled(name)(logits(), hard()))
    for loss, target in ((one := make_loss(name, COUNTS), hard()), (two := make_loss(name, COUNTS), F.one_hot(hard(), 4).float())):  # in training too, sums included
        torch.manual_seed(0)
        loss.value, loss.gradient = step(loss, logits(), target)
    equal(one.value, two.value), equal(one.gradient, two.gradient)
    for key, value in one.state_dict().items(): equal(value, two.state_dict()[key])


@pytest.mark.parametrize('name', LINEAR_IN_TARGET)
def test_soft_targets_are_the_mix_of_hard_ones(name):
    "Mixup's targets: a share of one label and the rest of another give that share of both losses."
    loss, (one, two) = settled(name), (F.one_hot(hard(seed), 4).float() for seed in (1, 2))
    equal(loss(logits(), 0.3 * one + 0.7 * two), 0.3 * loss(logits(), one) + 0.7 * loss(logits(), two))


@pytest.mark.parametrize('name', HARD_ONLY)
def test_soft_targets_are_refused(name):
    with pytest.raises(ConfigError, match='mixup'): make_loss(name, COUNTS)(logits(), torch.full((7, 4), 0.25))


@pytest.mark.parametrize('name', sorted(LOSSES))
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('shape', [(2,), (7,), (5, 1), (1, 4), (5, 3), (2, 4), (5, 4, 1), ()])
def test_targets_of_a_wrong_shape_are_refused(name, training, shape):
    "Five images of four classes; nothing is counted of a batch that was refused."
    loss, several = make_loss(name, COUNTS).train(training), getattr(LOSSES[name], 'multilabel', False)
    for z in (logits(n=5), logits(n=5).bfloat16()):
        for target in [torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)] + [torch.zeros(5, dtype=torch.int64)] * several:
            with pytest.raises(ValueError, match=re.escape('logits of shape (5, 4) and a target of shape ' + str(tuple(target.shape))) + '.*expected'): loss(z, target)
    assert all(torch.equal(v, make_loss(name, COUNTS).state_dict()[key]) for key, v in loss.state_dict().items())


def test_a_margin_looks_at_the_target_too():
    loss = MarginLoss(make_loss('focal', COUNTS), torch.full((4,), 0.2))
    for target in (torch.zeros(2, dtype=torch.int64), torch.full((5, 1), 0.25)):
        with pytest.raises(ValueError, match='target of shape'): loss(logits(n=5), target)


def test_logits_of_another_form_are_refused():
    "A map of logits, or those of one image without a batch, which torch's own cross-entropy would take."
    for name, z, target in (('focal', torch.zeros(5, 4, 3), hard(n=5)), ('cross_entropy', torch.zeros(4), torch.full((4,), 0.25)), ('bce', torch.zeros(4), torch.zeros(4))):
        with pytest.raises(ValueError, match='logits'): make_loss(name, COUNTS)(z, target)


@pytest.mark.parametrize('name', EVERY)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(4)))
def test_order_of_images_and_classes_is_no_matter(name, seed, order):
    z, y, order = logits(seed), hard(seed), torch.tensor(order)
    loss, renamed = same(name), make_loss(name, [COUNTS[i] for i in order]).eval()
    for key, value in loss.state_dict().items(): renamed.state_dict()[key].copy_(value[order] if value.ndim else value)
    equal(renamed(z[:, order], torch.argsort(order)[y]), loss(z, y))
    equal(loss(z.flip(0), y.flip(0)), loss(z, y))
    equal(loss(torch.cat([z, z]), torch.cat([y, y])), loss(z, y))  # a mean over images


@pytest.mark.parametrize('name', EVERY)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0, 1, 1e4]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), y=st.integers(0, 3), soft=st.booleans())
def test_empty_class_and_large_logits(name, seed, scale, dtype, y, soft):
    "Class 3 has no training image: loss, gradient and sums are finite for it, in training and evaluation, at logits of ±1e4."
    target = torch.full((7,), y) if not soft or name in HARD_ONLY else 0.6 * F.one_hot(torch.full((7,), y), 4) + 0.4 * F.one_hot(hard(seed), 4)
    for loss in (make_loss(name, COUNTS), same(name)):
        z = (scale * (logits(seed) / 2).clamp(-1, 1).round()).to(dtype)
        value, gradient = step(loss, z, target)
        assert value.dtype == torch.float32 and torch.isfinite(value) and torch.isfinite(gradient).all()
        assert all(torch.isfinite(v).all() for v in loss.state_dict().values())


@pytest.mark.parametrize('name, options', [('focal', {'gamma': 0.3}), ('focal', {'gamma': 1.0}), ('class_balanced', {'gamma': 0.5}), ('gce', {'q': 0.01}), ('gce', {'q': 1.0})])
def test_steep_powers_are_finite(name, options):
    "Where p is 1 or 0 to the last bit, powers of p and 1 - p have infinite slopes."
    for z in ([1e4, 0, 0, 0], [-1e4, 0, 0, 0], [90, 0, 0, 0], [17, 0, 0, 0], [0, 0, 0, 0]):
        value, gradient = step(make_loss(name, COUNTS, **options), torch.tensor([z], dtype=torch.float32), torch.tensor([0]))
        assert torch.isfinite(value) and torch.isfinite(gradient).all() and gradient[0, 0] <= 0


@pytest.mark.parametrize('name', EVERY)
@given(seed=st.integers(0, 10_000))
def test_half_precision_logits(name, seed):
    "The loss adds no error of its own to what the logits lost."
    for dtype in (torch.bfloat16, torch.float16):
        z = logits(seed).to(dtype)
        value = same(name)(z, hard(seed))
        assert value.dtype == torch.float32
        equal(value, same(name)(z.float(), hard(seed)), 0)
        equal(value, same(name)(logits(seed), hard(seed)), 0.1)


@pytest.mark.parametrize('name', EVERY)
def test_half_precision_target(name):
    if name in HARD_ONLY: pytest.skip(f'{name} takes class indices only')
    soft = torch.full((7, 4), 0.25)
    equal(settled(name)(logits(), soft.bfloat16()), settled(name)(logits(), soft))


@pytest.mark.parametrize('name', EVERY)
def test_state_goes_through_a_checkpoint(name):
    "With its state the next losses are the same; what has sums forgets without it."
    whole, stopped = make_loss(name, COUNTS), make_loss(name, COUNTS)
    for seed in range(8):
        for loss in (whole, stopped): step(loss, logits(seed), hard(seed))
    set_progress(stopped, 0.9), set_progress(whole, 0.9)
    resumed, forgetful = make_loss(name, COUNTS), make_loss(name, COUNTS)
    resumed.load_state_dict(load(tensor_bytes(stopped.state_dict())))
    expected, got, other = [], [], []
    for loss, values in ((whole, expected), (resumed, got), (forgetful, other)):
        torch.manual_seed(0)  # of EQL's drop
        values += [step(loss, logits(seed), hard(seed))[0] for seed in range(8, 16)]
    assert expected == got and (expected != other) == (name in [*SUMS, 'ldam'])


@pytest.mark.parametrize('name', SUMS)
def test_sums_grow_only_in_training(name):
    loss = settled(name)
    def sums(): return torch.cat([v.flatten().clone() for v in loss.state_dict().values()])
    before = sums()
    step(loss, logits(99), hard(99))
    with torch.no_grad(): loss(logits(99), hard(99))
    assert torch.equal(sums(), before)
    step(loss.train(), logits(99), hard(99))
    assert not torch.equal(sums(), before)


# -- head and tail

@pytest.mark.parametrize('name', ['balanced_softmax', 'logit_adjustment', 'class_balanced', 'ldam'])
def test_the_rare_are_asked_for_more(name):
    "At equal logits an image of a rarer class costs more, and pulls its own logit up more."
    z, loss = torch.zeros(1, 3, requires_grad=True), make_loss(name, [900, 90, 9])
    values = [loss(z, torch.tensor([c])) for c in range(3)]
    pulls = [-torch.autograd.grad(v, z)[0][0, c].item() for c, v in enumerate(values)]
    assert values[0] < values[1] < values[2] and pulls[0] < pulls[1] < pulls[2]


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=6))
def test_class_gradients_add_up(counts):
    "A softmax loss moves nothing on the whole: what one logit is pulled up, the others are pushed down."
    up, down = class_gradients(make_loss('logit_adjustment', counts, tau=0.3), counts)
    equal(up.sum() / sum(counts), down.sum() / sum(counts))


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=6), st.floats(0, 0.999999))
def test_effective_weights(counts, beta):
    "Exact sums of the geometric series, where they are short; rarer never lighter; mean 1 over the classes that have images."
    if not sum(counts): return
    weights, present = effective_weights(counts, beta), torch.tensor(counts) > 0
    assert torch.isfinite(weights).all() and abs(weights[present].mean() - 1) < 1e-4
    assert all(weights[i] >= weights[j] for i in range(len(counts)) for j in range(len(counts)) if counts[i] <= counts[j])
    short = [1 / sum(0.9 ** i for i in range(n)) for n in (1, 3, 20)]
    equal(effective_weights([1, 3, 20], 0.9), torch.tensor(short) / (sum(short) / 3))


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=8))
def test_margins_from_counts(counts):
    for margins, low, high in ((adaptive_margins(counts), 0.05, 0.5), (ldam_margins(counts), 0, 0.5)):
        assert torch.isfinite(margins).all() and margins.min() >= low - 1e-6 and margins.max() <= high + 1e-6
        assert all(margins[i] >= margins[j] - 1e-7 for i in range(len(counts)) for j in range(len(counts)) if counts[i] <= counts[j])
    assert adaptive_margins(counts).min() == torch.tensor(0.05)  # the commonest class; and all of them if they are alike


def test_priors_of_the_89_classes():
    aaai = table('aaai_per_class').set_index('class')
    offset = dict(zip(aaai.index, prior_offset(torch.tensor(aaai.total.to_numpy())).tolist()))
    equal([offset[85], offset[81]], [-2.2787, -8.7404], 5e-5)


# -- deferred re-weighting

@pytest.mark.parametrize('name, options', [('class_balanced', {'reweight_from': 0.6}), ('ldam', {'reweight_from': 0.6, 'largest': 0.0})])
def test_reweighting_begins_in_time(name, options):
    loss = make_loss(name, COUNTS, **options)
    weighted = F.cross_entropy(logits(), hard(), effective_weights(COUNTS), reduction='sum') / 7
    for done in (0, 0.3, 0.59): set_progress(loss, done); equal(loss(logits(), hard()), F.cross_entropy(logits(), hard()))
    for done in (0.6, 0.9, 1): set_progress(loss, done); equal(loss(logits(), hard()), weighted)


def test_progress_reaches_an_inner_loss():
    loss = MarginLoss(make_loss('class_balanced', COUNTS, reweight_from=0.5), torch.zeros(4))
    set_progress(loss, 0.7)
    assert abs(loss.loss.progress - 0.7) < 1e-6
    set_progress(make_loss('cross_entropy', COUNTS), 0.7)  # one that does not care


# -- EQL's drop

def test_random_mask():
    torch.manual_seed(1)
    for p in (0, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-9, 1):
        drawn = random_mask((2000, 101), p, 'cpu').double()
        assert abs(drawn.mean() - p) < 4 * math.sqrt(max(p * (1 - p), 1e-6) / drawn.numel()) + 2 ** -17
    torch.manual_seed(5)
    again = random_mask((3, 7), 0.5, 'cpu')
    torch.manual_seed(5)
    assert torch.equal(again, random_mask((3, 7), 0.5, 'cpu'))


def test_eql_drops_as_often_as_asked():
    "The mean loss over many draws, at equal logits, against the sum over all ways to drop two rare classes."
    loss, y = EQL(torch.tensor([90, 5, 5]), drop=0.7), torch.zeros(20000, dtype=torch.long)
    torch.manual_seed(0)
    expected = sum(math.comb(2, k) * 0.7 ** k * 0.3 ** (2 - k) * math.log(3 - k) for k in range(3))
    equal(loss(torch.zeros(20000, 3), y), expected, 0.01)
    equal(loss.eval()(torch.zeros(2, 3), y[:2]), math.log(3))


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_eql_of_soft_targets(seed, share):
    "The formula in plain Python: a rare class stays in by its share of the target."
    counts, z, (a, b) = [90, 5, 3, 2], logits(seed, 1).double(), hard(seed, 2).tolist()
    y = [share * (j == a) + (1 - share) * (j == b) for j in range(4)]
    w = [1 - (counts[j] < 10) * (1 - y[j]) for j in range(4)]
    total = sum(w[j] * math.exp(z[0, j]) for j in range(4))
    expected = sum(y[j] * (math.log(total) - z[0, j].item()) for j in range(4))
    equal(EQL(torch.tensor(counts), drop=1.0)(z, torch.tensor([y])), expected)


def test_eql_spares_the_rare():
    "A rare class that is left out gets no gradient from images of other classes, and its own in full."
    loss = EQL(torch.tensor([90, 5, 5]), drop=1.0)
    gradient = step(loss, torch.zeros(2, 3), torch.tensor([0, 1]))[1]
    assert gradient[0].tolist() == [0, 0, 0] and gradient[1].tolist() == [0.25, -0.25, 0]


# -- soft EQL's collector

def test_soft_eql_by_hand():
    loss = SoftEQL(torch.ones(3))
    loss.pos_grad.copy_(torch.tensor([4.0, 1, 2]))
    value, gradient = step(loss, torch.zeros(1, 3), torch.tensor([1]))
    equal(value, 1.945910, 1e-6), equal(gradient, torch.tensor([[4, -6, 2]]) / 7, 1e-6)
    equal(loss.pos_grad - torch.tensor([4.0, 1, 2]), torch.tensor([0, 0.857143, 0]), 1e-6), equal(loss.neg_grad, torch.tensor([0.571429, 0, 0.285714]), 1e-6)
    loss.pos_grad.copy_(torch.tensor([4.0, 0, 2]))
    equal(loss(torch.zeros(1, 3), torch.tensor([1])), 11.002116, 1e-6)


@pytest.mark.parametrize('indicator, q', [('pos', (4, 1, 2)), ('neg', (3, 5, 1)), ('pos_and_neg', (7, 6, 3))])
def test_soft_eql_indicators(indicator, q):
    loss = SoftEQL(torch.ones(3), indicator=indicator)
    loss.pos_grad.copy_(torch.tensor([4.0, 1, 2])), loss.neg_grad.copy_(torch.tensor([3.0, 5, 1]))
    equal(loss(torch.zeros(1, 3), torch.tensor([1])), math.log(sum(q) / q[1]))


def test_soft_eql_differs_from_cross_entropy():
    "The published code never collected, and was cross-entropy to the last bit."
    loss = SoftEQL(torch.ones(4))
    for seed in range(30): step(loss, logits(seed), hard(seed) * (hard(seed + 1) > 1))
    assert loss.pos_grad.min() > 0 and abs(loss(logits(50), hard(50)) - F.cross_entropy(logits(50), hard(50))) > 0.1


@pytest.mark.parametrize('factor', [1.0, 0.25, 65536.0, 1e-20])
def test_collected_gradients_do_not_depend_on_the_scale_of_the_loss(factor):
    "Gradient accumulation, the fp16 scaler and a loss weight multiply the loss; a factor of zero collects nothing."
    plain, scaled = SoftEQL(torch.ones(4)), SoftEQL(torch.ones(4))
    step(plain, logits(), hard())
    (scaled(logits().requires_grad_(), hard()) * factor).backward()
    equal(scaled.pos_grad, plain.pos_grad), equal(scaled.neg_grad, plain.neg_grad)
    (scaled(logits().requires_grad_(), hard()) * 0.0).backward()
    assert torch.isfinite(scaled.pos_grad).all()


def test_accumulated_batches_collect_what_one_batch_does():
    "Three backward passes before a step of the optimizer (each batch against the same sums, as tau=0 makes them)."
    for name, options in (('soft_eql', {'tau': 0.0}), ('seesaw', {})):
        whole, parts = make_loss(name, COUNTS, **options), make_loss(name, COUNTS, **options)
        step(whole, logits(n=9), hard(n=9))
        for a, b in ((0, 4), (4, 6), (6, 9)):
            z = logits(n=9)[a:b].requires_grad_()
            (parts(z, hard(n=9)[a:b]) * ((b - a) / 9)).backward()
        for key, value in whole.state_dict().items(): equal(value, parts.state_dict()[key])


def test_the_hook_sees_its_own_loss_alone():
    "Another use of the same logits, and a graph that is never taken backward, are not counted."
    alone, shared = SoftEQL(torch.ones(4)), SoftEQL(torch.ones(4))
    step(alone, logits(), hard())
    z = logits().requires_grad_()
    shared(z, hard())  # dropped
    (shared(z, hard()) + 5 * z.square().sum()).backward()
    equal(shared.pos_grad, alone.pos_grad), equal(shared.neg_grad, alone.neg_grad)
    assert shared.pos_grad.sum() > 0


# -- several processes

def half_a_batch(rank, address, folder):
    "What one of two processes does: its half of each batch, under torch's distributed engine."
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{address}', rank=rank, world_size=2)
    for name in SUMS:
        loss = make_loss(name, COUNTS)
        for seed in range(3): step(loss, logits(seed, 8)[rank::2], hard(seed, 8)[rank::2])
        (folder/f'{name}-{rank}').write_bytes(tensor_bytes(loss.state_dict()))
    dist.destroy_process_group()


def test_two_processes_keep_the_books_of_one(tmp_path):
    children = [Child(tmp_path, half_a_batch, rank, tmp_path/'meet', tmp_path) for rank in range(2)]
    assert [c.wait() for c in children] == [0, 0], children[0].text() + children[1].text()
    for name in SUMS:
        alone, states = make_loss(name, COUNTS), [load((tmp_path/f'{name}-{rank}').read_bytes()) for rank in range(2)]
        for seed in range(3): step(alone, logits(seed, 8), hard(seed, 8))
        for key, value in alone.state_dict().items():
            assert torch.equal(states[0][key], states[1][key])
            equal(states[0][key], value)
            assert value.sum() > 0


# -- options

@pytest.mark.parametrize('name, options, message', [
    ('balanced_softmx', {}, "did you mean 'balanced_softmax'"), ('logit_adjustment', {'tua': 1}, "no option 'tua': did you mean 'tau'"),
    ('cross_entropy', {'tau': 1}, "no option 'tau'"), ('cross_entropy', {'smoothing': 1.0}, 'smoothing'), ('cross_entropy', {'smoothing': -0.1}, 'smoothing'),
    ('cross_entropy', {'smoothing': '0.1'}, 'a number'), ('eqlv2', {'gamma': True}, 'a number'), ('logit_adjustment', {'tau': float('nan')}, 'tau'), ('eqlv2', {'mu': float('inf')}, 'mu'),
    ('class_balanced', {'beta': 1}, 'beta'), ('focal', {'gamma': -1}, 'gamma'), ('gce', {'q': 0}, 'q is 0'), ('ldam', {'reweight_from': 80}, 'reweight_from'), ('ldam', {'scale': 0}, 'scale'),
    ('soft_eql', {'indicator': 'ratio'}, "'pos' or 'neg' or 'pos_and_neg'"), ('label_aware_smoothing', {'shape': 1}, "'concave'"), ('symmetric', {'log_zero': 0}, 'log_zero'), ('eql', {'drop': 1.1}, 'drop'),
    ('eql', {'threshold': None}, 'threshold'), ('seesaw', {'p': [1]}, 'a number'),
])
def test_option_errors(name, options, message):
    with pytest.raises(ConfigError, match=message): make_loss(name, COUNTS, **options)
