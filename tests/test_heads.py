"Heads and margins against angles computed slowly, under autocast, in training, in the exported file; the prior folded into the classifier."
import math

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import check_same_run
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from aaai_lt.core import ConfigError, Stopped, table
from aaai_lt.hardware.export import export_onnx, export_run, read_metadata
from aaai_lt.losses.factory import LOSSES, make_loss
from aaai_lt.losses.longtail import prior_offset
from aaai_lt.losses.margins import LDAM, MarginLoss, add_margin, adaptive_margins, with_margin
from aaai_lt.models.heads import HEADS, fold_adjustment, make_head, reads_map
from aaai_lt.models.zoo import Classifier
from aaai_lt.training.config import make_config
from aaai_lt.training.loop import train
from aaai_lt.training.prepare import make_table

COUNTS = [200, 40, 8, 0]


def features(seed=0, n=6, d=16): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
def hard(seed=0, n=6): return torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(seed))


def by_angle(cosine, m, easy):
    "The margin through the arc cosine, as the paper writes it."
    angle = math.acos(cosine)
    if easy: return math.cos(angle + m) if cosine > 0 else cosine
    return math.cos(angle + m) if cosine > math.cos(math.pi - m) else cosine - m * math.sin(math.pi - m)


# -- margins

@pytest.mark.parametrize('degrees, m, expected', [(10, 0.5, 23.42996), (60, 0.2, 9.53942), (170, 0.5, -36.73562), (45, 0.0, 21.21320), (10, 0.0, 29.54423)])
def test_arcface_by_hand(degrees, m, expected):
    assert abs(30 * with_margin(torch.tensor(math.cos(math.radians(degrees)), dtype=torch.float64), torch.tensor(m)) - expected) < 1e-5


@given(st.floats(0.2, 179.8), st.floats(0, 1.57), st.booleans())
def test_margin_on_the_angle(degrees, m, easy):
    cosine = math.cos(math.radians(degrees))
    if abs(cosine - (0 if easy else math.cos(math.pi - m))) < 1e-6: return  # on the edge between two branches
    got = with_margin(torch.tensor(cosine, dtype=torch.float64), torch.tensor(m, dtype=torch.float64), easy)
    assert abs(got - by_angle(cosine, m, easy)) < 1e-6 and got <= cosine + 1e-9


@given(st.floats(-1.001, 1.001), st.floats(0, 1.57))
def test_margin_is_finite_where_rounding_leaves_the_circle(cosine, m):
    for value in (cosine, 1.0, -1.0, 1.0000001):
        c = torch.tensor(value, requires_grad=True)
        moved = with_margin(c, torch.tensor(m))
        assert torch.isfinite(moved) and torch.isfinite(torch.autograd.grad(moved, c)[0])


def test_adaptive_margins_of_the_seeds():
    aaai = table('aaai_per_class').set_index('class')
    margins = dict(zip(aaai.index, adaptive_margins(torch.tensor(aaai.total.to_numpy())).tolist()))
    assert [round(margins[c], 4) for c in (81, 68, 56, 0, 43, 85)] == [0.5, 0.4358, 0.4106, 0.1812, 0.0849, 0.05] and abs(np.mean(list(margins.values())) - 0.1844) < 5e-5
    assert torch.allclose(adaptive_margins([1, 16, 81, 256]), torch.tensor([0.5, 0.2, 0.1, 0.05]))
    assert torch.allclose(adaptive_margins([8, 34, 135, 502, 5121]), torch.tensor([0.5, 0.32952, 0.21546, 0.13790, 0.05]), atol=1e-5)
    assert torch.equal(adaptive_margins([7, 7, 7]), torch.full((3,), 0.05)) and torch.allclose(adaptive_margins([0, 1, 81]), torch.tensor([0.5, 0.5, 0.05]))  # alike, and empty


@given(st.integers(0, 10_000), st.floats(0, 0.5), st.booleans(), st.booleans())
def test_margin_loss_written_out(seed, smoothing, easy, mixed):
    "s · (t · phi + (1 - t) · cos) with the smoothed target t, row by row, then cross-entropy with the target as it came."
    margins, y, other = torch.tensor([0.1, 0.2, 0.3, 0.5]), hard(seed), hard(seed + 1)
    z = 10 * F.normalize(features(seed, 6, 4)).double() * 0.99
    soft = 0.7 * F.one_hot(y, 4).double() + 0.3 * F.one_hot(other, 4) if mixed else F.one_hot(y, 4).double()
    loss = MarginLoss(make_loss('cross_entropy', COUNTS), margins, 10.0, easy, smoothing)
    rows = []
    for i in range(6):
        m = sum(soft[i, j].item() * margins[j].item() for j in range(4))
        t = [(1 - smoothing) * soft[i, j].item() + smoothing / 4 for j in range(4)]
        c = [z[i, j].item() / 10 for j in range(4)]
        rows.append([10 * (t[j] * by_angle(c[j], m, easy) + (1 - t[j]) * c[j]) for j in range(4)])
    assert abs(loss(z, soft if mixed else y) - F.cross_entropy(torch.tensor(rows, dtype=torch.float64), soft)) < 1e-5
    assert torch.allclose(loss(z, F.one_hot(y, 4)), loss(z, y)) and torch.equal(loss.eval()(z, y), F.cross_entropy(z, y))


@pytest.mark.parametrize('name', sorted(name for name in LOSSES if not getattr(LOSSES[name], 'multilabel', False)))
def test_any_loss_takes_a_margin(name):
    "It trains, its margins and the inner sums go through its state, and it says of itself what the inner one does."
    head = make_head('arcface', 16, 4, sub_centers=2, margin='adaptive')
    loss = add_margin(make_loss(name, COUNTS), head, COUNTS)
    loss(head(features()), hard()).backward()
    assert torch.isfinite(head.weight.grad).all() and head.weight.grad.abs().sum() > 0
    assert (loss.activation, loss.adjusted) == (LOSSES[name].activation, LOSSES[name].adjusted)
    again = add_margin(make_loss(name, COUNTS), head, [1, 1, 1, 1])
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.margins, adaptive_margins(COUNTS)) and torch.equal(again.eval()(head(features(1)), hard(1)), loss.eval()(head(features(1)), hard(1)))


def test_margin_gradient():
    loss = MarginLoss(make_loss('cross_entropy', COUNTS), adaptive_margins(COUNTS), 5.0, smoothing=0.1)
    for target in (hard(), torch.softmax(features(3, 6, 4), 1).double()):
        assert torch.autograd.gradcheck(lambda z: loss(z, target), (5 * F.normalize(features(2, 6, 4))).double().requires_grad_())


def test_a_margin_makes_the_rare_harder_and_others_alike():
    z = torch.full((1, 4), 15.0)  # all at 60 degrees
    losses = [add_margin(make_loss('cross_entropy', COUNTS), make_head('arcface', 16, 4, margin='adaptive'), COUNTS)(z, torch.tensor([c])).item() for c in range(4)]
    assert math.log(4) < losses[0] < losses[1] < losses[2] < losses[3]
    plain = make_loss('cross_entropy', COUNTS)
    assert add_margin(plain, make_head('cosine', 16, 4), COUNTS) is plain and add_margin(plain, make_head('linear', 16, 4), COUNTS) is plain


def test_ldam_takes_the_scale_of_its_head():
    for head, scale in ((make_head('cosine', 16, 4, scale=20), 20), (make_head('linear', 16, 4), 1), (make_head('arcface', 16, 4, scale=8), 8)):
        loss = LDAM(torch.tensor(COUNTS))
        add_margin(loss, head, COUNTS)
        assert loss.scale == scale
    assert add_margin(LDAM(torch.tensor(COUNTS), scale=3.0), make_head('cosine', 16, 4), COUNTS).scale == 3


# -- heads

@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from(['cosine', 'arcface']))
def test_sub_centers_written_out(seed, k, name):
    head, x = make_head(name, 16, 4, scale=7.0, sub_centers=k), features(seed)
    expected = [[max(7 * (x[i] @ w / x[i].norm() / w.norm()).item() for w in head.weight[c * k:(c + 1) * k]) for c in range(4)] for i in range(6)]
    assert torch.allclose(head(x), torch.tensor(expected), atol=1e-4)
    assert torch.allclose(head(1000 * x), head(x), atol=1e-4) and head(x).abs().max() <= 7.00001


@pytest.mark.parametrize('name', ['cosine', 'arcface'])
def test_cosines_are_float32_under_autocast(name):
    head, x = make_head(name, 64, 4), features(0, 5, 64)
    with torch.autocast('cpu', dtype=torch.bfloat16): logits = head(x)
    assert logits.dtype == torch.float32 and torch.equal(logits, head(x))
    with torch.autocast('cpu', dtype=torch.bfloat16): half = head(x.bfloat16())
    assert half.dtype == torch.float32 and torch.equal(half, head(x.bfloat16().float()))


def test_a_feature_of_zero_is_finite():
    head = make_head('arcface', 16, 4)
    x = torch.zeros(2, 16, requires_grad=True)
    add_margin(make_loss('cross_entropy', COUNTS), head, COUNTS)(head(x), torch.tensor([0, 3])).backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(head.weight.grad).all()


@pytest.mark.parametrize('name, options, message', [
    ('arcfce', {}, "did you mean 'arcface'"), ('arcface', {'margin': 'adaptiv'}, "'adaptive'"), ('arcface', {'margin': -0.1}, 'margin'), ('arcface', {'margin': 2}, 'margin'), ('arcface', {'margin': True}, 'margin'),
    ('arcface', {'sub_centers': 0}, 'sub_centers'), ('arcface', {'sub_centers': 1.5}, 'whole'), ('arcface', {'easy_margin': 1}, 'true or false'), ('cosine', {'margin': 0.5}, "no option 'margin'"),
    ('cosine', {'scale': 0}, 'scale'), ('linear', {'dropout': 1}, 'dropout'),
])
def test_head_option_errors(name, options, message):
    with pytest.raises(ConfigError, match=message): make_head(name, 16, 4, **options)
    with pytest.raises(ConfigError, match=message): make_config(head=name, head_options=options)


# -- the prior in the classifier

@pytest.mark.parametrize('name', sorted(HEADS))
def test_folded_prior(name):
    head, offset = make_head(name, 16, 4).eval(), prior_offset(COUNTS, 0.7)
    before, x = {k: v.clone() for k, v in head.state_dict().items()}, features()[:, None] if reads_map(head) else features()  # a map of one place
    assert torch.allclose(fold_adjustment(head, offset)(x), head(x) - offset, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())  # a copy
    if name == 'linear': assert fold_adjustment(head, offset).state_dict().keys() == before.keys()  # at no cost


class Means(nn.Module):
    def forward(self, images): return images.mean((2, 3)).repeat(1, 6)[:, :16] * torch.arange(1, 17)


@pytest.mark.parametrize('name, options', [('arcface', {'sub_centers': 3, 'margin': 'adaptive'}), ('cosine', {}), ('linear', {})])
def test_heads_in_onnx(name, options, tmp_path):
    "The exported file gives the model's logits, without a margin; and with the prior folded in, less the offset."
    model, offset = Classifier(Means(), make_head(name, 16, 4, **options)).eval(), prior_offset(COUNTS)
    images, expected = torch.randn(5, 3, 8, 8), None
    for folded in (False, True):
        if folded: model.head = fold_adjustment(model.head, offset)
        session = onnxruntime.InferenceSession(str(export_onnx(model, tmp_path/'model.onnx', 8)), providers=['CPUExecutionProvider'])
        got = torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
        expected = expected - offset if folded else model(images).detach()
        assert torch.allclose(got, expected, atol=1e-4)


# -- whole runs

QUICK = {'data': 'digits', 'quick': True, 'device': 'cpu', 'epochs': 2, 'warmup_epochs': 0.5}


def test_an_adjusted_run_ships_adjusted(home):
    "model.onnx gives the scores of the saved predictions, which are adjusted; its metadata say so."
    config = make_config(**QUICK, loss='cross_entropy', adjust_tau=1.0)
    run = train(config, say=lambda text: None)
    comparison = export_run(run, make_table(run.config, False))
    assert (comparison.agreement == 1).all() and 'tau 1.0' in read_metadata(run.folder/'model.onnx')['adjusted']
    from aaai_lt.hardware.export import run_images
    split = comparison.split[0]
    session = onnxruntime.InferenceSession(str(run.folder/'model.onnx'), providers=['CPUExecutionProvider'])
    got = session.run(None, {'images': run_images(run, make_table(run.config, False), split, 40).numpy()})[0]
    assert np.allclose(got, run.predictions(split).scores[:40], atol=1e-3) and run.predictions(split).meta['adjusted'] == 'logit adjustment, tau 1.0'


@pytest.mark.parametrize('settings', [
    {'head': 'arcface', 'head_options': {'sub_centers': 3, 'margin': 'adaptive', 'scale': 30}, 'loss': 'soft_eql', 'ema': 0.9, 'accumulate': 2},
    {'head': 'cosine', 'loss': 'ldam', 'loss_options': {'reweight_from': 0.5}},
    {'loss': 'eql', 'loss_options': {'threshold': 0.1}},
], ids=['arcface, soft EQL', 'LDAM', 'EQL'])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(settings, home):
    config, steps = make_config(**QUICK, **settings, name='whole', save_every=3), iter(range(1000))
    whole = train(config, say=lambda text: None)
    again = make_config(**QUICK, **settings, name='stopped', save_every=3)
    with pytest.raises(Stopped): train(again, stop=lambda: next(steps) == 6, say=lambda text: None)
    stopped = train(again, say=lambda text: None)
    check_same_run(whole.folder, stopped.folder)
