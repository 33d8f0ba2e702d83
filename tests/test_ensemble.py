"Soups, blends, redistribution and submissions beside independent implementations, with awkward input, and end to end by papermill."
import itertools
import json
import re
import subprocess
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score
from test_train import papermill, report
from torch import nn

from aaai_lt.core import ConfigError, DataError, Stopped, StorageError, table
from aaai_lt.data.predictions import Predictions, load_predictions, probabilities, save_predictions
from aaai_lt.ensemble.blend import MEASURES, WEIGHTS, align, blend, bootstrap, contributions, greedy_weights, learn_weights, log_loss_weights, measured, metric_weights, out_of_fold, power_weights, read_member, read_scores, stacked
from aaai_lt.ensemble.inference import compare_precisions, predict_members, relative_changes
from aaai_lt.ensemble.redistribute import assign, balance_test, calibrate, candidates, class_prices, estimate_prior, fill_and_thin, fill_rare, fill_rare_protected, fit_calibration, quotas, redistribute, shares_in, transport
from aaai_lt.ensemble.soup import Average, member_files, reestimate_bn, soup
from aaai_lt.ensemble.submission import match_ids, submit
from aaai_lt.training.config import make_config
from aaai_lt.training.evaluate import evaluate
from aaai_lt.training.loop import train

TOY = np.array([[0.60, 0.30, 0.10], [0.55, 0.05, 0.40], [0.50, 0.45, 0.05], [0.70, 0.10, 0.20], [0.20, 0.70, 0.10], [0.40, 0.25, 0.35]])
SETTINGS = {'data': 'digits', 'quick': True, 'epochs': 3, 'device': 'cpu'}


def silent(text): pass


def made_up(n=300, c=6, noise=1.0, seed=0, multilabel=False):
    random = np.random.default_rng(seed)
    truth = np.random.default_rng(99).integers(0, c, n)
    if multilabel:
        labels = (np.random.default_rng(99).random((n, c)) < 0.3).astype('int8')
        return Predictions((2.0 * labels - 1 + random.normal(0, noise, (n, c))).astype('float32'), np.arange(n).astype(str), tuple('abcdef'[:c]), labels, {'activation': 'sigmoid'})
    logits = random.normal(0, noise, (n, c))
    logits[np.arange(n), truth] += 1.5
    return Predictions(logits.astype('float32'), np.arange(n).astype(str), tuple('abcdef'[:c]), truth)


@pytest.fixture(scope='module')
def module_home(tmp_path_factory):
    home = tmp_path_factory.mktemp('home')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('AAAI_LT_HOME', str(home))
        yield home


@pytest.fixture(scope='module')
def runs(module_home):
    return [train(make_config(**SETTINGS, name=name, seed=seed, loss=loss, keep_epochs=2), say=silent) for name, seed, loss in (('one', 0, 'cross_entropy'), ('two', 1, 'balanced_softmax'))]


# ---------------------------------------------------------------------------------------------- soups

@pytest.mark.parametrize('members', [2, 9, 10])
def test_integers_survive_a_soup(members, tmp_path):
    "2,209 relative positions, as Swin's windows of 24 × 24 have them: averaged in float32 they break with 9 and 10 members."
    index, random = torch.arange(47 * 47).reshape(47, 47), torch.Generator().manual_seed(0)
    states = [{'relative_position_index': index, 'w': torch.randn(5, generator=random), 'half': torch.randn(3, generator=random).half(), 'flag': torch.tensor([True, False])} for _ in range(members)]
    pot = Average()
    for state in states: pot.add(state)
    mean = pot.mean()
    assert torch.equal(mean['relative_position_index'], index) and mean['flag'].dtype == torch.bool and mean['half'].dtype == torch.float16
    assert torch.equal(mean['w'], torch.stack([s['w'].double() for s in states]).mean(0).float())
    naive = sum((index.float() * (1 / members) for _ in states), torch.zeros(index.shape)).long()
    assert (naive != index).sum() == {2: 0, 9: 412, 10: 749}[members]


def test_batch_statistics_are_those_of_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4, momentum=0.3))
    batches = [torch.randn(6, 3, 12, 12) * 3 + 1 for _ in range(5)]
    import copy
    other = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, other)
    reestimate_bn(model.eval(), batches)
    for a, b in zip(model.buffers(), other.buffers()): assert torch.allclose(a, b, atol=1e-6)
    assert not any(m.training for m in model.modules()) and model[4].momentum == 0.3


def test_batch_statistics_do_not_see_dropout():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(2)).eval()
    reestimate_bn(model, [torch.ones(50, 2) * 3 + torch.arange(50)[:, None] * 0.01])
    assert model[1].running_mean.allclose(torch.tensor(3.245), atol=1e-4)


def test_soups_are_runs(runs, module_home):
    made = soup(['one/epochs'], 'kitchen', say=silent)
    assert made.finished and made.summary['members'] == ['one/epochs/epoch-002.safetensors', 'one/epochs/epoch-003.safetensors'] and made.summary['soup'] == 'uniform'
    state, members = load_file(made.folder/'best.safetensors'), [load_file(f) for f in member_files(['one/epochs'])]
    for name, value in state.items():
        if 'running' in name: continue
        expected = (members[0][name].double() + members[1][name].double()) / 2 if value.is_floating_point() else members[0][name]
        if 'num_batches' not in name: assert torch.equal(value, expected.to(value.dtype)), name
    assert np.allclose(evaluate('kitchen', 'val', say=silent).scores, made.predictions('val').scores, atol=1e-5)
    assert {'members.csv', 'per_class.csv', 'predictions', 'config.yaml', 'data.json'} <= {p.name for p in made.folder.iterdir()}
    assert not (made.folder/'soup.safetensors').exists()
    with pytest.raises(ConfigError, match='is there already'): soup(['one/epochs'], 'kitchen', greedy=True)


def test_a_greedy_soup_is_no_worse_in_validation(runs):
    made = soup(['one/epochs', 'one', 'two'], 'picky', greedy=True, say=silent)
    members = pd.read_csv(made.folder/'members.csv')
    assert members.in_soup.any() and made.summary['val']['balanced_accuracy'] >= members.value.max() - 1e-9
    assert members.loc[members.value.idxmax(), 'in_soup']


def test_soups_of_what_does_not_fit(runs, tmp_path):
    state = load_file(runs[0].folder/'best.safetensors')
    save_file({k: v for k, v in state.items() if k != 'head.fc.bias'}, tmp_path/'lacking.safetensors')
    with pytest.raises(ConfigError, match='lacking.safetensors does not fit.*head.fc.bias'): soup(['one', tmp_path/'lacking.safetensors'], 'spoilt')
    with pytest.raises(ConfigError, match='two members'): soup(['one'], 'alone')
    with pytest.raises(ConfigError, match='named twice'): soup(['one', 'one'], 'twice')
    save_file(state, tmp_path/'foreign.safetensors')
    with pytest.raises(ConfigError, match='lies in no run'): soup([tmp_path/'foreign.safetensors', 'one'], 'foreign')
    with pytest.raises(FileNotFoundError, match="did you mean 'one'"): soup(['onne', 'two'], 'typo')
    assert not any((runs[0].folder.parent/name).exists() for name in ('spoilt', 'alone', 'twice', 'foreign', 'typo'))


def test_kept_epochs_survive_a_stop(runs, module_home):
    "Stopped in the last epoch but one and continued: the same epochs, byte for byte, as the run that was not."
    config, steps = make_config(**SETTINGS, name='again', seed=0, loss='cross_entropy', keep_epochs=2), []
    def stop(): steps.append(1); return len(steps) == 14
    with pytest.raises(Stopped): train(config, stop=stop, say=silent)
    again = train(config, say=silent)
    kept = sorted(p.name for p in (again.folder/'epochs').iterdir())
    assert kept == ['SHA256SUMS', 'epoch-002.safetensors', 'epoch-003.safetensors']
    for name in kept: assert (again.folder/'epochs'/name).read_bytes() == (runs[0].folder/'epochs'/name).read_bytes()
    assert subprocess.run(['sha256sum', '--strict', '-c', 'SHA256SUMS'], cwd=again.folder/'epochs', capture_output=True).returncode == 0
    file = again.folder/'epochs'/'epoch-003.safetensors'
    file.write_bytes((whole := file.read_bytes())[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StorageError, match='epoch-003.safetensors is damaged'): soup(['again/epochs'], 'of damaged', say=silent)
    assert not (again.folder.parent/'of damaged').exists()


# ---------------------------------------------------------------------------------------------- members and blends

def test_scores_from_elsewhere(tmp_path):
    said = []
    (tmp_path/'padded.csv').write_text('file,07,x\na.jpg,0.9,0.1\nb.jpg,0.2,0.8\na.jpg,0.9,0.1\nb.jpg,0.4,0.6\n')
    read = read_scores(tmp_path/'padded.csv', say=said.append)
    assert list(read.ids) == ['a.jpg', 'b.jpg'] and np.allclose(read.scores, [[0.9, 0.1], [0.3, 0.7]]) and read.classes == ('07', 'x')
    assert '2 repeated rows of 2 images are counted once; 1 of them differ' in said[0]
    np.save(tmp_path/'s.npy', read.scores)
    (tmp_path/'ids.csv').write_text('id\na.jpg\nb.jpg\n')
    assert np.array_equal(read_scores(tmp_path/'s.npy', tmp_path/'ids.csv', ['7', 'x']).scores, read.scores)
    for text, match in (('id,a\nx,high\n', "'a' does not hold numbers"), ('id,a,b\nx,1.5,2\n', "kind='logits'"), ('id,a,b\nx,,0.5\n', 'row 1')):
        (tmp_path/'bad.csv').write_text(text)
        with pytest.raises(DataError, match=match): read_member(str(tmp_path/'bad.csv'))
    with pytest.raises(DataError, match='give ids= and classes='): read_scores(tmp_path/'s.npy')
    with pytest.raises(DataError, match=r'shape \(2, 2\)'): read_scores(tmp_path/'s.npy', tmp_path/'ids.csv', ['7'])


@given(st.permutations(range(6)), st.permutations(range(40)), st.booleans())
def test_order_does_not_matter(classes, images, multilabel):
    "A member whose classes and images stand in another order is the same member."
    a, b = (made_up(40, seed=s, multilabel=multilabel) for s in (1, 2))
    inverse = np.argsort(classes)
    targets = b.targets[images][:, classes] if multilabel else inverse[b.targets[images]]
    turned = Predictions(b.scores[np.ix_(images, classes)], b.ids[images], tuple(b.classes[i] for i in classes), targets, b.meta)
    assert np.allclose(blend([a, b], [1, 3]).scores, blend([a, turned], [1, 3]).scores) and np.array_equal(align([a, turned])[1].targets, a.targets)
    back = blend([turned, a], [3, 1])
    assert back.classes == turned.classes and np.allclose(back.scores, blend([a, b], [1, 3]).scores[np.ix_(images, classes)])


def test_missing_is_said_or_left_out():
    a = made_up(10)
    fewer = Predictions(a.scores[2:, :5], a.ids[2:], a.classes[:5])
    with pytest.raises(DataError, match="class.*'f', which member 2 lacks"): align([a, fewer])
    with pytest.raises(DataError, match="2 image.*'0', which member 2 lacks"): align([a, Predictions(a.scores[2:], a.ids[2:], a.classes)])
    said = []
    kept = align([a, fewer], 'drop', said.append)
    assert len(kept[0]) == (a.targets[2:] < 5).sum() and kept[0].classes == a.classes[:5] and len(said) >= 2
    other = Predictions(a.scores, a.ids, a.classes, (a.targets + 1) % 6)
    with pytest.raises(DataError, match='differ about the labels'): align([a, other])
    with pytest.raises(DataError, match='twice'): align([Predictions(a.scores, a.ids, ('1', '01', 'c', 'd', 'e', 'f'))])


def test_a_blend_is_the_weighted_mean(tmp_path):
    a, b = made_up(seed=1), made_up(seed=2)
    assert np.allclose(blend([a, b]).scores, (probabilities(a) + probabilities(b)) / 2, atol=1e-6)
    assert np.allclose(blend([a, b], [3, 1]).scores, 0.75 * probabilities(a) + 0.25 * probabilities(b), atol=1e-6)
    geometric = np.sqrt(probabilities(a) * probabilities(b))
    assert np.allclose(blend([a, b], logits=True).scores, geometric / geometric.sum(1, keepdims=True), atol=1e-6)
    save_predictions(blend([a, b], [3, 1]), tmp_path/'blend')
    assert load_predictions(tmp_path/'blend').meta['weights'] == [0.75, 0.25]
    eql = Predictions(a.scores, a.ids, a.classes, a.targets, {'activation': 'sigmoid'})
    assert np.allclose(blend([eql, b]).scores.sum(1), 1, atol=1e-5)  # yes-or-no scores beside shares of one
    for weights in ([1], [-1, 2], [0, 0], [np.nan, 1]):
        with pytest.raises(ConfigError, match='weights that are not negative'): blend([a, b], weights)


def test_power_weights_are_the_printed_ones():
    seeds = table('accv_models')
    assert len(seeds) == 17 and np.allclose(power_weights(seeds.score_in_filename), seeds.adaptive_factor_p25, rtol=0, atol=1e-12)
    assert power_weights([7400, 7570, 7620])[1:].tolist() == pytest.approx([1.764428216, 2.080085996], abs=1e-9)
    for scores in (['vit-0.4-7473', '7400'], [0.7, 0.0], [], [np.nan, 1.0]):  # a name is no score, and a score of nothing has no ratio
        with pytest.raises(ConfigError, match='number above 0'): power_weights(scores)


@pytest.mark.parametrize('multilabel', [False, True])
def test_learned_weights_are_the_minimum(multilabel):
    members = [made_up(noise=n, seed=s, multilabel=multilabel) for n, s in ((0.8, 1), (1.2, 2), (2.0, 3))]
    p, targets = stacked(members).astype('float64'), members[0].targets
    def loss(w):
        q = np.tensordot(w, p, 1)
        return -np.log(q[np.arange(len(q)), targets]).mean() if not multilabel else -np.where(targets == 1, np.log(q), np.log(1 - q)).mean()
    grid = [np.array([a, b, 1 - a - b]) for a, b in itertools.product(np.linspace(0, 1, 41), repeat=2) if a + b <= 1]
    found = log_loss_weights(p, targets)
    assert found.min() >= 0 and np.isclose(found.sum(), 1) and loss(found) <= min(map(loss, grid)) + 1e-9
    assert np.abs(found - min(grid, key=loss)).max() < 0.05


@pytest.mark.parametrize('multilabel', [False, True])
def test_climbing_and_greedy_help_where_they_look(multilabel):
    members = [made_up(noise=n, seed=s, multilabel=multilabel) for n, s in ((0.8, 1), (1.2, 2), (2.0, 3), (4.0, 4))]
    p, targets = stacked(members), members[0].targets
    def value(w): return measured(targets, np.tensordot(w, p, 1))
    best = max(measured(targets, own) for own in p)
    assert value(metric_weights(p, targets)) >= value(np.full(4, 0.25)) and value(greedy_weights(p, targets)) >= best - 1e-9
    for weights in (metric_weights(p, targets), greedy_weights(p, targets), greedy_weights(p, targets, bags=4)): assert np.isclose(weights.sum(), 1) and weights.min() >= 0
    judged = out_of_fold(members, rounds=20)
    assert list(judged.weights) == list(WEIGHTS) and (judged.best_low <= judged.over_best + 1e-9).all() and np.isclose(judged.value[0], value(np.full(4, 0.25)), atol=1e-6)


def test_out_of_fold_is_not_fooled():
    "Members that guess: what was chosen looks good where it was chosen, and not elsewhere."
    random, truth = np.random.default_rng(0), np.random.default_rng(1).integers(0, 2, 60)
    members = [Predictions(random.normal(0, 1, (60, 2)).astype('float32'), np.arange(60).astype(str), ('a', 'b'), truth) for _ in range(25)]
    judged = out_of_fold(members, ('greedy',), rounds=50).iloc[0]
    assert judged.seen > 0.65 and judged.value < judged.seen - 0.08


def test_multilabel_values_are_those_of_sklearn():
    members = [made_up(noise=n, seed=s, multilabel=True) for n, s in ((1.0, 1), (1.5, 2))]
    both, truth = blend(members), members[0].targets
    assert np.isclose(measured(truth, both.scores), average_precision_score(truth, both.scores, average='macro'))
    worth = contributions(members, [2, 1], names=['x', 'y'], rounds=20)
    mixed = (2 * probabilities(members[0]) + probabilities(members[1])) / 3
    assert np.isclose(worth.difference[0], average_precision_score(truth, mixed, average='macro') - average_precision_score(truth, probabilities(members[1]), average='macro'))
    with pytest.raises(ConfigError, match='measure is'): learn_weights(members, 'greedy', 'accuracy')
    with pytest.raises(ConfigError, match="weights is 'learnt'"): learn_weights(members, 'learnt')


@pytest.mark.parametrize('measure', ['accuracy', 'balanced_accuracy', 'log_loss'])
def test_bootstrap(measure):
    a, b = made_up(seed=1, noise=0.5), made_up(seed=2, noise=2.0)
    (low, high), (zero, also) = bootstrap(a.targets, [probabilities(a), probabilities(b)], [(0, 1), (1, 1)], measure)
    difference = measured(a.targets, probabilities(a), measure) - measured(a.targets, probabilities(b), measure)
    assert 0 < low < difference < high and zero == also == 0 and measure in MEASURES


# ---------------------------------------------------------------------------------------------- redistribution

def plain_rule(p, least):
    "The winners' rule image by image and class by class."
    labels = p.argmax(1).tolist()
    counts = {c: labels.count(c) for c in range(p.shape[1])}
    groups = {}
    for c in range(p.shape[1]):
        if counts[c] < least: groups.setdefault(counts[c], []).append(c)
    new = list(labels)
    for n, classes in groups.items():
        for c in classes:
            column = [0 if labels[i] == c else p[i, c] for i in range(len(p))]
            for i in sorted(range(len(p)), key=lambda i: -column[i])[:least - n]: new[i] = c
    return new


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(2, 9))
def test_the_rule_is_the_rule(seed, least, classes):
    p = np.random.default_rng(seed).dirichlet(np.full(classes, 0.5) * np.arange(1, classes + 1), 40)
    assert fill_rare(p, least).tolist() == plain_rule(p, least) == fill_rare(p, least, block=2).tolist()


def test_the_toy_of_six_images():
    assert [fill_rare(TOY, k).tolist() for k in (1, 2, 3)] == [[0, 2, 0, 0, 1, 0], [0, 2, 1, 0, 1, 2], [1, 2, 1, 2, 1, 2]]
    for labels in (fill_rare_protected(TOY, 2), fill_rare_protected(TOY, 3), assign(TOY, np.ones(3)), transport(TOY, np.ones(3))): assert np.bincount(labels).tolist() == [2, 2, 2]


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(2, 9))
def test_donors_are_protected(seed, least, classes):
    p = np.random.default_rng(seed).dirichlet(np.full(classes, 0.5) * np.arange(1, classes + 1), 40)
    before, after = (np.bincount(l, minlength=classes) for l in (p.argmax(1), fill_rare_protected(p, least)))
    floor = min(least, 40 // classes)
    assert after.min() >= floor and (after[before >= floor] <= before[before >= floor]).all() and after.sum() == 40


def test_the_second_version():
    p = np.random.default_rng(0).dirichlet(np.full(5, 0.4) * [5, 3, 1, 1, 0.5], 200)
    own, before = p.max(1), p.argmax(1)
    labels = fill_and_thin(p, 30, 60)
    assert (labels[own > np.median(own)] == before[own > np.median(own)]).all()  # the sure ones stay
    counts = np.bincount(before, minlength=5)
    left = (labels != before) & (counts[before] > 60)
    assert left.any() and (np.bincount(labels, minlength=5)[counts < 30] >= counts[counts < 30]).all()


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_transport_is_near_the_exact_assignment(seed, classes):
    random = np.random.default_rng(seed)
    p, prior = random.dirichlet(np.full(classes, 0.3), 60).astype('float32'), random.dirichlet(np.full(classes, 5.0))
    exact, near = assign(p, prior), transport(p, prior, smoothing=0.02)
    def value(labels): return np.log(np.maximum(p[np.arange(60), labels], 1e-30, dtype='float64')).sum()
    assert np.array_equal(np.bincount(exact, minlength=classes), quotas(prior, 60)) and quotas(prior, 60).sum() == 60
    assert np.abs(np.bincount(near, minlength=classes) - 60 * prior).sum() <= 12 and value(near) >= value(exact) - 12
    assert np.array_equal(transport(p, prior, 0.0), p.argmax(1))


def test_candidates_do_not_change_the_labels():
    random = np.random.default_rng(0)
    p = random.dirichlet(np.full(120, 0.1), 1500).astype('float32')
    few, all_of_them = transport(p, np.ones(120), classes=40), transport(p, np.ones(120), classes=120)
    assert (few == all_of_them).mean() > 0.99
    rows, columns = candidates(p, 5, 20)
    assert np.bincount(rows).min() >= 5 and np.bincount(columns).min() >= 20 and len(set(zip(rows.tolist(), columns.tolist()))) == len(rows)
    for i in (0, 700, 1499): assert set(np.argsort(-p[i])[:5]) <= set(columns[rows == i])
    prices = class_prices(np.log(p[rows, columns] + 1e-30), rows, columns, np.full(120, 12.5))
    assert np.isfinite(prices).all() and prices.dtype == np.float32


def test_the_estimated_prior_is_the_fixed_point():
    "Saerens et al., equation 2.9, image by image."
    random = np.random.default_rng(0)
    base, p = np.array([0.7, 0.2, 0.1]), random.dirichlet([1, 1, 1], 50).astype('float64')
    share = base.copy()
    for _ in range(3000):
        new = np.zeros(3)
        for row in p: weighted = row * share / base; new += weighted / weighted.sum()
        share = new / 50
    assert np.abs(estimate_prior(p, base, rounds=20_000, tolerance=1e-12) - share).max() < 1e-4
    assert np.abs(estimate_prior(p, base, counts=1e7) - base).max() < 1e-3


def test_calibration_finds_the_temperature():
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (4000, 5))
    truth = np.array([random.choice(5, p=np.exp(z) / np.exp(z).sum()) for z in logits])
    overconfident = Predictions((3 * logits).astype('float32'), np.arange(4000).astype(str), tuple('abcde'), truth)
    scale, shift = fit_calibration(overconfident)
    assert abs(scale - 1 / 3) < 0.02 and np.abs(shift - shift.mean()).max() < 0.15
    assert measured(truth, calibrate(overconfident, overconfident).scores, 'log_loss') > measured(truth, probabilities(overconfident), 'log_loss')
    assert np.isclose(shares_in(overconfident).sum(), 1)


def world(n, balanced, seed, strength=2.2, classes=12, factor=30.0):
    random = np.random.default_rng(seed)
    prior = factor ** -(np.arange(classes) / (classes - 1))
    prior /= prior.sum()
    truth = random.choice(classes, n, p=np.full(classes, 1 / classes) if balanced else prior)
    x = random.normal(0, 1, (n, classes))
    x[np.arange(n), truth] += strength
    p = np.exp(strength * x) * prior
    p = 0.9 * p / p.sum(1, keepdims=True) + 0.1 / classes  # as label smoothing leaves them
    return Predictions(np.log(p).astype('float32'), np.arange(n).astype(str), tuple(map(str, range(classes))), truth), prior


def test_the_test_of_balance():
    "Twenty worlds of each kind: a natural tail is never taken for balance, and balance nearly always seen."
    verdicts = {True: [], False: []}
    for seed in range(20):
        validation, prior = world(1200, False, 1000 + seed)
        for balanced in verdicts: verdicts[balanced].append(balance_test(world(1000, balanced, seed)[0], validation, 2000 * prior, draws=100)['verdict'])
    assert 'balanced' not in verdicts[False] and verdicts[True].count('balanced') >= 14 and verdicts[False].count('natural') >= 14


def test_redistribution_is_gated():
    test, prior = world(600, False, 0)
    validation, counts = world(600, False, 1)[0], 2000 * prior
    labels, frame = redistribute(test, balance=balance_test(test, validation, counts))
    assert (labels == test.scores.argmax(1)).all() and frame.gained.sum() == frame.lost.sum() == 0
    blind, frame = redistribute(test)
    assert (blind == test.targets).mean() < (labels == test.targets).mean() and (frame.after - frame.before == frame.gained - frame.lost).all()
    balanced = world(600, True, 2)[0]
    moved, _ = redistribute(balanced, balance=balance_test(balanced, validation, counts))
    assert (moved == balanced.targets).mean() > max((redistribute(balanced, 'winners', least=45)[0] == balanced.targets).mean(), (balanced.scores.argmax(1) == balanced.targets).mean())
    for method, options, match in (('transprot', {}, "did you mean 'transport'"), ('winners', {}, 'least'), ('transport', {'strength': 2}, 'strength is 2'), ('transport', {'prior': [1, 2]}, 'a prior holds')):
        with pytest.raises(ConfigError, match=match): redistribute(balanced, method, **options)
    with pytest.raises(DataError, match='one label each'): balance_test(test, Predictions(test.scores, test.ids, test.classes), counts)


# ---------------------------------------------------------------------------------------------- submissions

def test_accv_is_a_zip_of_lines_without_header(tmp_path):
    p = Predictions(TOY[:, :2].astype('float32'), np.array([f'testb/{i}.jpg' for i in range(6)]), ('12', '4999'), None, {'kind': 'probabilities'})
    file = submit(p, tmp_path/'pred_results.csv', 'accv', labels=[1, 0, 0, 0, 0, 1])
    with zipfile.ZipFile(file) as archive: assert archive.namelist() == ['pred_results.csv'] and archive.read('pred_results.csv').decode() == '0.jpg,4999\n1.jpg,0012\n2.jpg,0012\n3.jpg,0012\n4.jpg,0012\n5.jpg,4999\n'
    first = file.read_bytes()
    assert submit(p, tmp_path/'pred_results.zip', 'accv', labels=[1, 0, 0, 0, 0, 1]).read_bytes() == first
    (tmp_path/'sample.csv').write_text('3.jpg,0000\n0.jpg,0000\n1.jpg,0000\n2.jpg,0000\n5.jpg,0000\n4.jpg,0000\n')
    with zipfile.ZipFile(submit(p, tmp_path/'in_order.zip', 'accv', tmp_path/'sample.csv', [1, 0, 0, 0, 0, 1])) as archive: assert archive.read('in_order.csv').decode().split()[:2] == ['3.jpg,0012', '0.jpg,4999']
    with pytest.raises(DataError, match='is no number'): submit(Predictions(p.scores, p.ids, ('12', 'cat')), tmp_path/'no.zip', 'accv')
    (tmp_path/'more.csv').write_text('3.jpg,\nbroken.jpg,\n0.jpg,\n')
    with pytest.raises(DataError, match="1 of the 3 images.*'broken.jpg'.*fill_missing=True"): submit(p, tmp_path/'no.zip', 'accv', tmp_path/'more.csv')
    with zipfile.ZipFile(submit(p, tmp_path/'filled.zip', 'accv', tmp_path/'more.csv', [1, 0, 0, 0, 0, 1], fill_missing=True)) as archive: assert archive.read('filled.csv').decode().split() == ['3.jpg,0012', 'broken.jpg,0012', '0.jpg,4999']  # class 0 is said most often
    (tmp_path/'others.csv').write_text('x.jpg,\ny.jpg,\n')
    with pytest.raises(DataError, match='2 of the 2 images'): submit(p, tmp_path/'no.zip', 'accv', tmp_path/'others.csv', fill_missing=True)
    with pytest.raises(DataError, match='two images have the name'): submit(Predictions(p.scores[:2], np.array(['a/1.jpg', 'b/1.jpg']), p.classes), tmp_path/'no.zip', 'accv')
    assert not (tmp_path/'no.zip').exists()


def test_aicoss_follows_the_sample(tmp_path):
    p = made_up(4, 3, multilabel=True)
    (tmp_path/'sample.csv').write_text('img_id,c,a,b\n2,0,0,0\n0,0,0,0\n3,0,0,0\n1,0,0,0\n')
    read = pd.read_csv(submit(p, tmp_path/'out.csv', 'aicoss', tmp_path/'sample.csv'), dtype={'img_id': str})
    assert list(read) == ['img_id', 'c', 'a', 'b'] and read.img_id.tolist() == ['2', '0', '3', '1']
    assert np.array_equal(read[['c', 'a', 'b']].to_numpy('float32'), probabilities(p)[np.ix_([2, 0, 3, 1], [2, 0, 1])])  # all digits of a float32
    for text, match in (('img_id,c,a,bee\n2,0,0,0\n', "lack the class 'bee'"), ('img_id,c,a\n2,0,0\n', 'the sample has 2 classes'), ('img_id,c,a,b\n2,0,0,0\n9,0,0,0\n', "such as '9'"), ('img_id,c,a,b\n2,0,0,0\n2,0,0,0\n', "'2' twice")):
        (tmp_path/'bad.csv').write_text(text)
        with pytest.raises(DataError, match=match): submit(p, tmp_path/'no.csv', 'aicoss', tmp_path/'bad.csv')
    with pytest.raises(DataError, match='shares of one'): submit(made_up(4), tmp_path/'no.csv', 'aicoss')
    broken = Predictions(np.where(np.arange(12).reshape(4, 3) == 5, np.nan, 0.5).astype('float32'), p.ids, p.classes, None, {'kind': 'probabilities', 'activation': 'sigmoid'})
    with pytest.raises(DataError, match='empty value in row 2'): submit(broken, tmp_path/'no.csv', 'aicoss')
    with pytest.raises(ConfigError, match="did you mean 'aicoss'"): submit(p, tmp_path/'no.csv', 'aicos')
    assert not (tmp_path/'no.csv').exists()


def test_names_are_matched_without_guessing():
    assert match_ids(['x/1.jpg', 'y/1.jpg'], ['y/1.jpg', 'x/1.jpg']).tolist() == [1, 0]
    with pytest.raises(DataError, match='fit several'): match_ids(['1.jpg'], ['x/1.jpg', 'y/1.jpg'])
    with pytest.raises(DataError, match='no prediction'): match_ids(['2.jpg'], ['x/1.jpg'])


# ---------------------------------------------------------------------------------------------- end to end

def test_the_notebook_blends_and_submits(runs, module_home):
    test_ids = runs[0].predictions('test').ids
    (module_home/'sample.csv').write_text('file,answer\n' + ''.join(f'{i},0\n' for i in sorted(test_ids, reverse=True)))
    code, output = papermill(module_home, 'ensemble.ipynb', '-p', 'runs', '["one", "two"]', '-p', 'split', 'test', '-p', 'weights', 'learned', '-p', 'sample', str(module_home/'sample.csv'), '-p', 'name', 'pair', '-p', 'rounds', '20')
    assert code == 0, output[-3000:]
    folder, text = module_home/'outputs'/'blends'/'pair', report(module_home)
    assert 'QUICK RUNS' in text and '2 members over 719 images of test and 180 of validation' in text
    mixed = load_predictions(folder/'predictions'/'test')
    weights = pd.read_csv(folder/'members.csv').set_index('member').weight
    ones = [probabilities(run.predictions('test')) for run in runs]
    assert np.allclose(mixed.scores, weights['one'] * ones[0] + weights['two'] * ones[1], atol=1e-4)
    assert np.allclose(weights, learn_weights([run.predictions('val') for run in runs]), atol=1e-3)
    sent = pd.read_csv(folder/'submission-test.csv', dtype=str)
    assert list(sent) == ['file', 'answer'] and sent.file.tolist() == sorted(test_ids, reverse=True)
    assert dict(zip(sent.file, sent.answer)) == dict(zip(mixed.ids, np.array(mixed.classes)[mixed.scores.argmax(1)]))
    assert set(pd.read_csv(folder/'weightings.csv').weights) == set(WEIGHTS) and json.loads((folder/'predictions'/'test'/'meta.json').read_text())['kind'] == 'probabilities'


@pytest.mark.recipes
def test_the_notebook_with_several_labels(home):
    "Two quick members on mosaics: the mAP with its interval, what each member adds, and the submission in the order of the sample, which the blend's scores are in."
    members = [train(make_config(data='digits-mosaic:0.1', model='test_resnet', loss=name, quick=True, batch_size=16, device='cpu', name=name, resize=resize), say=silent) for name, resize in (('asl', 'squash'), ('zlpr', 'pad'))]
    ids, classes = members[0].predictions('test').ids, members[0].data['classes']
    (home/'sample.csv').write_text('img_id,' + ','.join(reversed(classes)) + '\n' + ''.join(f'{i}{",0" * len(classes)}\n' for i in sorted(ids, reverse=True)))
    code, output = papermill(home, 'ensemble.ipynb', '-p', 'runs', '["asl", "zlpr"]', '-p', 'split', 'test', '-p', 'sample', str(home/'sample.csv'), '-p', 'rounds', '40', '-p', 'precision', 'bf16')
    assert code == 0, output[-3000:]
    folder, text = home/'outputs'/'blends'/'blend', report(home)
    known = blend([run.predictions('val') for run in members])
    found = re.search(r'the blend has mAP ([\d.]+) in validation.*?95 % interval of that mAP over images: ([\d.]+) to ([\d.]+)', text, re.S)
    value, low, high = map(float, found.groups())
    shown = known.targets.any(0)
    assert low < value < high and abs(value - average_precision_score(known.targets[:, shown], known.scores[:, shown], average='macro')) < 0.02  # bf16 against fp32
    worth = pd.read_csv(folder/'members.csv')
    assert worth.member.tolist() == ['asl', 'zlpr'] and np.allclose(worth.without + worth.difference, value, atol=2e-4) and (worth.low <= worth.high).all()
    mixed, sent = load_predictions(folder/'predictions'/'test'), pd.read_csv(folder/'submission-test.csv', dtype={'img_id': str})
    assert list(sent) == ['img_id', *reversed(classes)] and sent.img_id.tolist() == sorted(ids, reverse=True)
    order = [mixed.ids.tolist().index(i) for i in sent.img_id]
    assert np.array_equal(sent.iloc[:, 1:].to_numpy('float32'), mixed.scores[order][:, ::-1])
    fp32 = np.mean([probabilities(run.predictions('test')) for run in members], 0)
    assert 1e-6 < np.abs(mixed.scores - fp32).max() < 0.03


def test_the_precision_table():
    "The printed table of the challenge agrees with itself; ours has the same relations, and fp32 is what the runs themselves say."
    printed = table('aicoss_precision').set_index('metric')[['fp32', 'fp16']].T.astype(float)
    assert np.allclose(100 * relative_changes(printed).loc['fp16'], [-41.3793, 70.5940, -0.004098, -0.005117], atol=5e-5)
    assert [round(a * b) for a, b in zip(printed.inference_time_sec, printed.inference_speed_img_per_sec)] == [50_212, 50_214] and 6_550 + 43_664 == 50_214


def test_precisions_beside_each_other(home):
    members = [train(make_config(data='digits-mosaic:0.1', model='test_resnet', loss='bce', quick=True, epochs=2, batch_size=16, device='cpu', name=name, seed=seed, resize=resize), say=silent) for seed, (name, resize) in enumerate((('a', 'squash'), ('b', 'pad'), ('c', 'squash')))]
    ticks = iter(range(0, 10_000, 2))
    measured_ = compare_precisions(members, device='cpu', rounds=2, clock=lambda: next(ticks))
    assert measured_.index.tolist() == ['fp32', 'bf16'] and (measured_.seconds == 2).all() and (measured_.images_per_second == 25).all()
    both = blend([run.predictions('val') for run in members])
    shown = both.targets.any(0)
    assert np.isclose(measured_['mAP']['fp32'], average_precision_score(both.targets[:, shown], both.scores[:, shown], average='macro'), atol=1e-6) and abs(relative_changes(measured_)['mAP']['bf16']) < 0.05
    for precision in ('fp32', 'bf16'):
        for name, own in predict_members(members, device='cpu', precision=precision).items(): assert np.allclose(own.scores, next(r for r in members if r.name == name).predictions('val').scores, atol={'fp32': 1e-4, 'bf16': 0.2}[precision])
    with pytest.raises(ConfigError, match="precision is 'fp61': did you mean"): predict_members(members, precision='fp61')
