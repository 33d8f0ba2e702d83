"Losses over several labels: published values and gradients, timm, slow plain formulas, their own derivatives, unknown entries, and what must not change them."
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.loss import AsymmetricLossMultiLabel, DistributionBalancedLoss, TwoWayLoss, ZlprLoss
from torch.nn import functional as F

from aaai_lt.core import ConfigError
from aaai_lt.losses.factory import LOSSES, make_loss
from aaai_lt.losses.margins import add_margin
from aaai_lt.losses.multilabel import MODES, entry_weights, rebalanced
from aaai_lt.models.heads import make_head
from aaai_lt.training.config import make_config
from aaai_lt.training.loop import epoch_order, train
from aaai_lt.training.stages import find_loss_options, stage_configs

COUNTS = [500, 60, 9, 0]  # the last class is empty
EVERY = sorted(name for name in LOSSES if getattr(LOSSES[name], 'multilabel', False))
ROUNDING = ['zlpr', 'two_way']
ENTRYWISE = [name for name in EVERY if name not in ROUNDING]
SEEDS = st.integers(0, 10_000)
VARIANTS = [(name, {}) for name in EVERY] + [('partial_asl', {'mode': mode, 'prior': [0.9, 0.1, 0.01, 0], 'top_k': 1}) for mode in MODES[1:]] + [('asl', {'gamma_pos': 0.5, 'gamma_neg': 0.3, 'detach_weight': False, 'clip': 0.0}), ('hill', {'gamma': 0.4})]

Z = torch.tensor([[2, -1, .5], [0, 1, -2]], dtype=torch.float64)
Y = torch.tensor([[1, 0, 1], [0, 1, 0]])
PARTIAL = torch.tensor([[1, -1, -1], [0, -1, 1]])


def logits(seed=0, n=6, c=4): return torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
def labels(seed=0, n=6, c=4, low=0): return torch.randint(low, 2, (n, c), generator=torch.Generator().manual_seed(seed + 1))
def equal(one, two, tolerance=1e-6): assert torch.allclose(torch.as_tensor(one, dtype=torch.float64), torch.as_tensor(two, dtype=torch.float64), rtol=tolerance, atol=tolerance), (one, two)


def step(loss, z, y):
    z = z.detach().clone().requires_grad_()
    value = loss(z, y)
    value.backward()
    return value.detach(), z.grad


# -- values and gradients that were computed elsewhere (float64, from the challenge system's own code)

@pytest.mark.parametrize('name, options, factor, value, gradient', [
    ('bce', {}, 1, .34126726, None),
    ('asl', {'reduction': 'sum'}, 1, .30344707, None),
    ('asl', {}, 1000, 50.57451179, None),  # the optimised form: 1,000 times the mean
    ('partial_asl', {'reduction': 'sum'}, 1, .72431540, [[-.014209, .072329, -.142537], [.25, -.072329, .014209]]),
    ('zlpr', {}, 1, .97005199, [[-.038848, .134471, -.174104], [.234155, -.134471, .031689]]),
    ('two_way', {}, 1, .80174511, [[-.170883, .361703, -.216106], [.169483, -.187042, .042846]]),
    ('binary_focal', {}, 60, 2.89783526, None)])
def test_published_values(name, options, factor, value, gradient):
    found, slope = step(make_loss(name, [9, 9, 9], **options), Z, Y)
    assert abs(factor * found - value) < 6e-9
    if gradient: assert (slope - torch.tensor(gradient)).abs().max() < 6e-7


@pytest.mark.parametrize('options, value', [({'mode': 'negative'}, 3.33703372), ({'mode': 'ignore'}, 2.23509576), ({'mode': 'ignore_normalize_classes'}, 2.98264946),
    ({'mode': 'selective'}, 2.25775381), ({'mode': 'selective', 'prior': [.01, .2, .01]}, 2.23509576)])
def test_published_values_of_partial_labels(options, value):
    assert abs(make_loss('partial_asl', [9, 9, 9], top_k=1, reduction='sum', **options)(Z, PARTIAL) - value) < (2e-7 if options['mode'] == 'ignore_normalize_classes' else 6e-9)  # whose weights that code had in float32


@pytest.mark.parametrize('positives', range(6))
def test_closed_forms_at_zero(positives):
    zero, target = torch.zeros(3, 5), torch.tensor([[1] * positives + [0] * (5 - positives)] * 3)
    equal(make_loss('zlpr', [1] * 5)(zero, target), math.log(1 + positives) + math.log(1 + 5 - positives))
    equal(make_loss('partial_asl', [1] * 5)(zero, target), 0.346574)
    if 0 < positives < 5:
        rows = math.log1p((5 - positives) * positives ** 4)
        columns = math.log1p(0 * 3 ** 4)  # all three images show the same labels: no image to be told from
        equal(make_loss('two_way', [1] * 5)(zero, target), rows + columns)


# -- timm

@given(SEEDS, st.just(0.0) | st.floats(1, 5), st.just(0.0) | st.floats(1, 5), st.floats(0, 0.3), st.booleans())  # between 0 and 1 timm's gradient is NaN below the clip
def test_asl_is_that_of_timm(seed, gamma_pos, gamma_neg, clip, detach):
    z, y = logits(seed), labels(seed)
    for reduction in ('sum', 'mean'):
        ours, theirs = (step(loss, z, y) for loss in (make_loss('asl', COUNTS, gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip, detach_weight=detach, reduction=reduction),
            AsymmetricLossMultiLabel(gamma_neg, gamma_pos, clip, disable_torch_grad_focal_loss=detach, reduction=reduction)))
        equal(ours[0], theirs[0], 1e-5), equal(ours[1], theirs[1], 1e-5)


@given(SEEDS)
def test_ranking_losses_are_those_of_timm(seed):
    z, y = logits(seed), labels(seed)
    for name, theirs in (('zlpr', ZlprLoss()), ('two_way', TwoWayLoss()), ('two_way', TwoWayLoss(2.0, 0.7))):
        options = {} if name == 'zlpr' else {'temperature_pos': theirs.tp, 'temperature_neg': theirs.tn}
        for one, two in zip(step(make_loss(name, COUNTS, **options), z, y), step(theirs, z, y)): equal(one, two, 1e-5)


@given(SEEDS, st.booleans())
def test_distribution_balanced_is_that_of_timm(seed, soft):
    z, y = logits(seed), labels(seed).float() * (torch.rand(6, 4, generator=torch.Generator().manual_seed(seed)) if soft else 1)
    for options, theirs in (({}, {}), ({'alpha': 0.3, 'beta': 5.0, 'mu': 0.4, 'neg_scale': 3.0, 'bias': 0.2, 'gamma': 1.0, 'balance': 1.5}, dict(map_alpha=0.3, map_beta=5.0, map_mu=0.4, neg_scale=3.0, init_bias=0.2, focal_gamma=1.0, focal_balance=1.5))):
        for one, two in zip(step(make_loss('distribution_balanced', COUNTS, images=600, **options), z, y), step(DistributionBalancedLoss(COUNTS, 600, **theirs), z, y)): equal(one, two, 1e-5)


# -- slow plain formulas

def sigmoid(z): return 1 / (1 + math.exp(-z))


@given(SEEDS, st.sampled_from(['bce', 'binary_focal', 'hill', 'partial_asl']))
def test_formulas(seed, name):
    z, y, total = logits(seed), labels(seed, low=-1), 0.0
    for i in range(6):
        for c in range(4):
            p, t = sigmoid(z[i, c].item()), y[i, c].item()
            pt = p if t == 1 else 1 - p
            if name == 'partial_asl': total -= (1 - pt) ** (2.0 if t < 0 else 1.0) * math.log(pt)
            elif t < 0: continue
            elif name == 'bce': total -= math.log(pt)
            elif name == 'binary_focal': total -= (1 - pt) ** 2 * math.log(pt)
            elif t == 1: total -= (1 - sigmoid(z[i, c].item() - 1)) ** 2 * math.log(sigmoid(z[i, c].item() - 1))
            else: total += (1.5 - p) * p ** 2
    equal(make_loss(name, COUNTS, reduction='sum')(z, y), total, 1e-9)
    equal(make_loss(name, COUNTS)(z, y), total / 24, 1e-9)


@given(SEEDS, st.integers(0, 30))
def test_selection(seed, top_k):
    "Known entries stay; of the unknown ones the common classes go, and the likeliest of the whole batch."
    z, known, common = logits(seed), labels(seed, low=-1) >= 0, torch.tensor([True, False, False, True])
    weights = entry_weights(z, known, 'selective', common, top_k)
    order = sorted(((z[i, c].item(), i, c) for i in range(6) for c in range(4) if not known[i, c]), reverse=True)
    gone = {(i, c) for _, i, c in order[:6 * top_k]} | {(i, c) for _, i, c in order if common[c]}
    assert {(i, c) for i, c in (weights == 0).nonzero().tolist()} == gone and (weights[known] == 1).all()


@given(SEEDS)
def test_rebalanced_weights(seed):
    y = labels(seed)
    found = rebalanced(y, torch.tensor([500., 60, 9, 1]))
    for i in range(6):
        drawn = sum(1 / n for n, t in zip((500, 60, 9, 1), y[i]) if t)
        for c, n in enumerate((500, 60, 9, 1)): equal(found[i, c], 0.1 + (sigmoid(10 * (1 / n / drawn - 0.2)) if drawn else 1.0), 1e-6)


# -- what holds for all

@pytest.mark.parametrize('name, options', VARIANTS)
def test_gradient(name, options):
    "Against finite differences, in double precision; the partial loss's weight is a constant to its gradient, so it is held fixed."
    loss, y = make_loss(name, COUNTS, **options), labels(3, low=-1)
    if name != 'partial_asl': assert torch.autograd.gradcheck(lambda z: loss(z, y), logits(1).requires_grad_())
    else:
        z, known = logits(1), y >= 0
        p, weights = torch.sigmoid(z), entry_weights(z, known, loss.mode, loss.common, loss.top_k)
        slope = torch.where(y == 1, -(1 - p) ** 2, torch.where(known, p * p, p ** 3))  # of (1 - p_t)^gamma · BCE with a constant first factor
        equal(step(loss, z, y)[1], slope * weights / 24, 1e-9)


@pytest.mark.parametrize('name', ENTRYWISE)
def test_soft_targets_are_the_mix_of_hard_ones(name):
    loss, one, two = make_loss(name, COUNTS), labels(1), labels(2)
    if name == 'distribution_balanced': two[:, :3] = one[:, :3]; one[:, 3] = two[:, 3]  # its weights depend on the other labels
    equal(loss(logits(), 0.3 * one + 0.7 * two), 0.3 * loss(logits(), one) + 0.7 * loss(logits(), two))


@pytest.mark.parametrize('name', ROUNDING)
def test_soft_targets_are_rounded(name): equal(make_loss(name, COUNTS)(logits(), labels() * 0.4 + 0.3), make_loss(name, COUNTS)(logits(), labels()))


@pytest.mark.parametrize('name, options', [v for v in VARIANTS if v[1].get('mode') is None and v[0] != 'partial_asl'] + [('partial_asl', {'mode': 'ignore'})])
@given(SEEDS)
def test_unknown_entries_are_as_if_not_there(name, options, seed):
    "No gradient, whatever their logit; a class that nobody annotated can be taken away."
    loss, z, y = make_loss(name, COUNTS, reduction='sum', **options), logits(seed), labels(seed, low=-1)
    value, slope = step(loss, z, y)
    assert (slope[y < 0] == 0).all()
    equal(loss(torch.where(y < 0, 50 * logits(seed + 9), z), y), value)
    y[:, 1] = -1
    if name != 'distribution_balanced' and not options: equal(make_loss(name, [500, 9, 0], reduction='sum')(z[:, [0, 2, 3]], y[:, [0, 2, 3]]), loss(z, y))
    assert make_loss(name, COUNTS, **options)(z, torch.full_like(y, -1)) == 0


@pytest.mark.parametrize('name, options', VARIANTS)
@given(seed=SEEDS, order=st.permutations(range(4)))
def test_order_of_images_and_classes_is_no_matter(name, options, seed, order):
    z, y = logits(seed), labels(seed, low=-1)
    loss, renamed = make_loss(name, COUNTS, **options), make_loss(name, [COUNTS[i] for i in order], **options | ({'prior': [options['prior'][i] for i in order]} if 'prior' in options else {}))
    equal(renamed(z[:, order], y[:, order]), loss(z, y)), equal(loss(z.flip(0), y.flip(0)), loss(z, y))


@pytest.mark.parametrize('name, options', VARIANTS)
def test_parts_of_a_batch(name, options):
    "A mean over images: parts of any size, weighed by their images, give the whole and its gradient; unless the loss says that it is coupled. Sums add up."
    z, y = logits(7), labels(7, low=-1)
    for reduction in ('mean', 'sum'):
        loss = make_loss(name, COUNTS, **options | {'reduction': reduction})
        whole, parts = step(loss, z, y), [step(loss, z[s], y[s]) for s in (slice(0, 2), slice(2, 6))]
        shares = (2 / 6, 4 / 6) if reduction == 'mean' else (1, 1)
        value, slope = sum(w * part[0] for w, part in zip(shares, parts)), torch.cat([w * part[1] for w, part in zip(shares, parts)])
        same = torch.allclose(value, whole[0], rtol=1e-12) and torch.allclose(slope, whole[1], rtol=1e-12)
        assert same != loss.coupled, (name, reduction)


@pytest.mark.parametrize('name, options', VARIANTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@given(seed=SEEDS)
def test_large_logits_and_empty_class(name, options, dtype, seed):
    "Finite in value and gradient at logits of ±1e4, in any precision, whatever the target: all, none, unknown, shares."
    z = (1e4 * (logits(seed) / 2).clamp(-1, 1).round()).to(dtype)
    for target in (labels(seed, low=-1), torch.ones(6, 4), torch.zeros(6, 4, dtype=torch.int8), -torch.ones(6, 4), torch.full((6, 4), 0.3), labels(seed).bool().to(torch.float16)):
        loss = make_loss(name, COUNTS, **options)
        value, gradient = step(loss, z, target)
        assert value.dtype == torch.float32 and torch.isfinite(value) and torch.isfinite(gradient).all() and value >= 0
    assert all(torch.isfinite(v).all() for v in loss.state_dict().values())


@pytest.mark.parametrize('name', EVERY)
def test_a_missed_positive_is_still_pulled(name):
    "Where the probability is below what float32 can tell from 0, the gradient must not vanish."
    z = torch.full((2, 4), -30.0)
    assert (step(make_loss(name, COUNTS, reduction='sum'), z, torch.eye(4)[:2].long())[1].diagonal() < -0.05).all()


@pytest.mark.parametrize('name', EVERY)
def test_attributes_and_reductions(name):
    kind = LOSSES[name]
    assert kind.multilabel and kind.activation == 'sigmoid' and kind.coupled == (name == 'two_way')
    with pytest.raises(ConfigError, match="'mean' or 'sum'"): make_loss(name, COUNTS, reduction='none')
    with pytest.raises(ConfigError, match='one label an image'): add_margin(make_loss(name, COUNTS), make_head('arcface', 8, 4), COUNTS)


def test_coupled_is_said_by_the_mode():
    assert [make_loss('partial_asl', COUNTS, mode=mode).coupled for mode in MODES] == [False, False, False, True]
    assert not make_loss('partial_asl', COUNTS, mode='selective', top_k=0).coupled


def test_the_number_of_images():
    "It is told by `make_loss` to the loss that asks, an option of that name comes first, and it cannot be below a class's own."
    z, y = logits(), labels()
    told = make_loss('distribution_balanced', COUNTS, images=600)
    equal(make_loss('distribution_balanced', COUNTS, 600)(z, y), told(z, y)), equal(make_loss('bce', COUNTS, images=600)(z, y), make_loss('bce', COUNTS)(z, y))
    assert make_loss('distribution_balanced', COUNTS)(z, y) != told(z, y)
    with pytest.raises(ConfigError, match='images is 400, and a class has 500'): make_loss('distribution_balanced', COUNTS, 400)


# -- the prior

def test_prior_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'prior.csv').write_text('Classes,avg_pred\n"trees, tall",0.9\ncars,0.05\nships,0.050001\nsnow,0\n')
    for prior in ('prior.csv', str(tmp_path/'prior.csv'), [0.9, 0.05, 0.050001, 0]):
        assert make_loss('partial_asl', COUNTS, mode='selective', prior=prior).common.tolist() == [True, False, True, False]
    assert not make_loss('partial_asl', COUNTS, mode='selective').common.any() and 'common' not in make_loss('partial_asl', COUNTS).state_dict()


@pytest.mark.parametrize('text, message', [(None, 'does not exist'), ('a,b\n1,2\n', 'no column avg_pred'), ('Classes,avg_pred\na,0.5\n', 'prior has 1 values.*4 values'), ('Classes,avg_pred\na,x\nb,1\nc,1\nd,1\n', 'a number for each class'), ('Classes,avg_pred\na,2\nb,1\nc,1\nd,1\n', 'from 1 to 2')])
def test_bad_prior(tmp_path, text, message):
    if text: (tmp_path/'p.csv').write_text(text)
    with pytest.raises(ConfigError, match=message): make_loss('partial_asl', COUNTS, prior=str(tmp_path/'p.csv'))


def test_prior_does_nothing_where_all_is_known():
    values = {make_loss('partial_asl', COUNTS, mode=mode, prior=[1, 0, 1, 0])(logits(), labels()).item() for mode in ('negative', 'ignore', 'selective')}
    assert len(values) == 1
    equal(values.pop(), (F.binary_cross_entropy_with_logits(logits(), labels().double(), reduction='none') * (labels() - torch.sigmoid(logits())).abs()).mean())
    assert np.isfinite(make_loss('partial_asl', COUNTS, mode='ignore_normalize_classes')(logits(), labels()).item())


def test_prior_of_a_run(home):
    "A stage's prior is the mean sigmoid score of the stage before over its training images, written into that run's folder, once."
    first, second = stage_configs(make_config(name='two', data='digits', quick=True, epochs=1, stages=[{'loss': 'eqlv2'}, {'loss': 'partial_asl', 'loss_options': {'mode': 'selective', 'prior': 'previous'}}]))
    assert second.loss_options == {'mode': 'selective', 'prior': 'two-1'}
    with pytest.raises(ConfigError, match='loss_options: prior'): find_loss_options(second)  # not trained yet
    run = train(first, say=lambda text: None)
    options = find_loss_options(second)
    file = run.folder/'prior.csv'
    assert options == {'mode': 'selective', 'prior': str(file)}
    from aaai_lt.training.evaluate import evaluate
    scores = evaluate(run, 'train').scores.astype('float64')
    rows = [line.split(',') for line in file.read_text().splitlines()]
    assert rows[0] == ['Classes', 'avg_pred'] and [r[0] for r in rows[1:]] == run.data['classes']
    assert np.allclose([float(r[1]) for r in rows[1:]], (1 / (1 + np.exp(-scores))).mean(0), atol=1e-6)
    made = make_loss('partial_asl', run.data['class_counts'], **options)
    assert made.common.tolist() == [float(r[1]) > 0.05 for r in rows[1:]]
    written = file.stat().st_mtime_ns
    assert find_loss_options(second) == options and file.stat().st_mtime_ns == written


@pytest.mark.parametrize('loss_options, message', [({'prior': 'previous'}, "prior is 'previous', and there is no stage before"), ({'prior': 'nothing-of-this-name'}, 'loss_options: prior')])
def test_prior_of_no_run(home, loss_options, message):
    with pytest.raises(ConfigError, match=message): find_loss_options(make_config(loss='partial_asl', loss_options=loss_options))


def test_a_prior_is_for_the_loss_that_has_one():
    with pytest.raises(ConfigError, match="bce has no option 'prior'"): make_config(loss='bce', loss_options={'prior': 'previous'})
    assert find_loss_options(make_config(loss='partial_asl', loss_options={'prior': [0.5, 0.1]})) == {'prior': [0.5, 0.1]}


# -- class-aware sampling

@given(SEEDS)
def test_class_aware_order(seed):
    "As many images as there are; each class is drawn equally often, through images that show it, none twice before all came; the same as for one label where there is one."
    random = np.random.default_rng(seed)
    several = (random.random((200, 5)) < [.5, .2, .05, .02, 0]).astype('int8')
    several[:4] = np.eye(5, dtype='int8')[:4]
    order = epoch_order(several, 'class_balanced', seed, 3)
    assert len(order) == 200 and several[order].max(1).all() and np.array_equal(order, epoch_order(several, 'class_balanced', seed, 3))
    assert (several[order].sum(0)[:4] >= 50).all()  # 200 draws for four classes that there are
    one = random.integers(0, 5, 200)
    assert np.array_equal(epoch_order(np.eye(5, dtype='int8')[one] * 2 - 1, 'class_balanced', seed, 1), epoch_order(one, 'class_balanced', seed, 1))
