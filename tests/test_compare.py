"Comparisons: what was trained is not trained again, what was stopped goes on, only equal images are compared, and one seed is never better."
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel
from test_train import papermill, report

from aaai_lt.analysis.comparison import class_table, compare, comparison_table, plan_comparison, result_rows, run_comparison
from aaai_lt.analysis.curves import plot_histories
from aaai_lt.core import ConfigError, DataError, Stopped
from aaai_lt.training.loop import train

SETTINGS = {'data': 'digits', 'quick': True, 'epochs': 1, 'warmup_epochs': 0.5, 'device': 'cpu'}


def silent(text): pass


@pytest.mark.recipes
def test_the_notebook_compares_what_it_is_given(home):
    code, output = papermill(home, 'compare.ipynb', '-p', 'losses', '["cross_entropy", "balanced_softmax"]', '-p', 'seeds', '[0, 1]', '-p', 'quick', 'True', '-p', 'settings', '{"epochs": 1, "warmup_epochs": 0.5}', '-p', 'split', 'test')
    assert code == 0, output[-3000:]
    text = report(home)
    assert '4 of 4  balanced_softmax, seed 1' in text and 'QUICK RUNS' in text and 'test: 719 images' in text
    folder, = (home/'outputs'/'comparisons').iterdir()
    rows, table, classes = (pd.read_csv(folder/f'{name}.csv') for name in ('runs', 'comparison', 'per_class'))
    assert len(rows) == 4 and set(table.variant) == {'cross_entropy', 'balanced_softmax'} and len(classes) == 20
    mine = table[(table.measure == 'balanced_accuracy')].set_index('variant')
    by_seed = rows.pivot(index='seed', columns='variant', values='balanced_accuracy')
    assert np.allclose(mine['mean'], by_seed.mean()[mine.index]) and np.allclose(mine.sd, by_seed.std()[mine.index])
    assert np.isclose(mine.difference['balanced_softmax'], (by_seed.balanced_softmax - by_seed.cross_entropy).mean())


def test_a_comparison_goes_on_and_grows(home):
    "Stopped in the middle of the second run; the same call ends it; a further variant and seed train only what is new."
    plan, steps = plan_comparison({'plain': {}, 'slow': {'lr': 1e-4}}, [0], **SETTINGS), []
    def stop(): steps.append(1); return len(steps) == 13  # ten steps a run
    with pytest.raises(Stopped): run_comparison(plan, stop, silent)
    finished = {p.parent.name: p.stat().st_mtime_ns for p in (home/'outputs').glob('*/summary.json')}
    assert len(finished) == 1
    runs, counted = run_comparison(plan, lambda: steps.append(1), silent), len(steps)
    assert counted - 13 == 7 and all(run.finished for run in runs.values())  # the rest of the second run
    before = {run.name: (run.folder/'summary.json').stat().st_mtime_ns for run in runs.values()}
    more = run_comparison(plan_comparison({'plain': {}, 'slow': {'lr': 1e-4}, 'slower': {'lr': 1e-5}}, [0], **SETTINGS), lambda: steps.append(1), silent)
    assert len(steps) == counted + 10 and {name: (home/'outputs'/name/'summary.json').stat().st_mtime_ns for name in before} == before
    rows = result_rows(more, 'test')
    assert set(compare(rows, 'plain').verdict) == {'', 'one seed'} and not comparison_table(compare(rows, 'plain')).astype(str).map(lambda t: '↑' in t).any(axis=None)
    other = train(plan_comparison({'plain': {}}, [0], **SETTINGS | {'where': '', 'seed': 0, 'quick': False, 'input_size': 32, 'data': 'aaai-profile:0.01', 'tiny_classes': 'both'})['plain', 0], say=silent)
    with pytest.raises(DataError, match='different images'): result_rows(more | {('other', 0): other}, 'val')
    with pytest.raises(DataError, match="no split 'test'"): result_rows({('other', 0): other}, 'test')


def test_plans_are_checked_before_anything_is_trained(home):
    with pytest.raises(ConfigError, match="variant 'b'.*epochz"): plan_comparison({'a': {}, 'b': {'epochz': 3}}, [0, 1])
    with pytest.raises(ConfigError, match='same settings: a, b'): plan_comparison({'a': {}, 'b': {'loss': 'balanced_softmax'}}, [0])
    with pytest.raises(ConfigError, match='different seeds'): plan_comparison({'a': {}}, [0, 0])
    with pytest.raises(ConfigError, match='reference'): compare(pd.DataFrame({'variant': ['a'], 'seed': [0], 'few': [0.5]}), 'b', ['few'])
    assert [c.name for c in plan_comparison({'a b': {}}, [3], name='try').values()] == ['try-a-b-3']
    assert not (home/'outputs').exists()


@given(st.integers(2, 6), st.integers(0, 10 ** 6))
def test_verdicts_are_two_standard_errors_of_paired_differences(seeds, draw):
    random = np.random.default_rng(draw)
    base = random.normal(0.5, 0.1, seeds)
    values = base + random.normal(0.01, 0.02, seeds)
    rows = pd.DataFrame({'variant': ['new'] * seeds + ['base'] * seeds, 'seed': [*range(seeds), *reversed(range(seeds))], 'few': [*values, *base[::-1]], 'many': np.nan})
    table = compare(rows, 'base', ['few', 'many']).set_index('variant')
    t = ttest_rel(values, base).statistic
    assert table.verdict['new'] == ('better' if t > 2 else 'worse' if t < -2 else 'not shown') and table.verdict['base'] == '' and list(table.measure.unique()) == ['few']
    assert np.isclose(table.sd['new'], values.std(ddof=1)) and table.seeds['new'] == seeds


def test_seeds_that_the_reference_lacks_are_not_paired():
    rows = pd.DataFrame({'variant': ['base', 'base', 'new', 'new', 'new'], 'seed': [0, 1, 1, 2, 3], 'few': [0.1, 0.2, 0.9, 0.9, 0.9]})
    table = compare(rows, 'base', ['few']).set_index('variant')
    assert table.verdict['new'] == 'one seed' and np.isclose(table.difference['new'], 0.7) and table.seeds['new'] == 3


def test_classes_are_listed_largest_first():
    rows = pd.DataFrame([{'variant': v, 'seed': s, 'class': c, 'band': 'many', 'train_images': n, 'support': 10, 'accuracy': a} for v, a in (('base', 0.5), ('new', 0.6)) for s in (0, 1) for c, n in (('x', 120), ('y', 300))])
    assert class_table(rows, 'base')[['class', 'base', 'new']].values.tolist() == [['y', '50.0', '60.0 ↑'], ['x', '50.0', '60.0 ↑']]


# -- curves of several runs

def with_histories(**columns):
    "(variant, seed) -> what has a history of three epochs; each column is a list of rows, one for each seed."
    seeds = len(next(iter(columns.values())))
    return {('a', seed): SimpleNamespace(history=pd.DataFrame({'epoch': [1, 2, 3]} | {name: rows[seed] for name, rows in columns.items()})) for seed in range(seeds)}


def drawn(ax):
    "What a panel shows of its only variant: the line, and the lowest and highest value of its band at each epoch."
    line, = ax.lines
    edge = pd.DataFrame(ax.collections[0].get_paths()[0].vertices, columns=['epoch', 'value']).groupby('epoch').value.agg(['min', 'max'])
    return list(line.get_xdata()), list(line.get_ydata()), edge['min'].tolist(), edge['max'].tolist()


@pytest.mark.parametrize('measure, title', [('val_balanced_accuracy', 'balanced accuracy'), ('val_mAP', 'mAP')])
def test_a_line_is_the_mean_and_a_band_goes_from_the_lowest_seed_to_the_highest(measure, title):
    runs = with_histories(train_loss=[[3, 2, 1], [6, 2, 4], [3, 5, 4]], val_loss=[[1, 1, 1], [2, 3, 4], [3, 2, 1]], **{measure: [[0.1, 0.2, 0.9], [0.3, 0.4, 0.6], [0.2, 0.3, 0.3]]})
    fig = plot_histories(runs)
    assert drawn(fig.axes[0]) == ([1, 2, 3], [4, 3, 3], [3, 2, 1], [6, 5, 4]) and drawn(fig.axes[1])[1:] == ([2, 2, 2], [1, 1, 1], [3, 3, 4])
    _, mean, low, high = drawn(fig.axes[2])
    assert np.allclose(mean, [0.2, 0.3, 0.6]) and np.allclose(low, [0.1, 0.2, 0.3]) and np.allclose(high, [0.3, 0.4, 0.9]) and fig.axes[2].get_title() == f'validation {title}'
    plt.close(fig)


def test_curves_of_runs_that_are_not_alike():
    "More epochs than the others, no validation images, many variants: what is there is drawn, in the order of the variants, each in its own style."
    one = with_histories(train_loss=[[3, 2, 1]])['a', 0]
    longer = SimpleNamespace(history=pd.DataFrame({'epoch': range(1, 6), 'train_loss': range(5), 'val_loss': range(5)}))
    fig = plot_histories({(f'v{i}', 0): one for i in range(12)} | {('longer', 0): longer})
    first, second, third = fig.axes
    assert [line.get_label() for line in first.lines] == [*(f'v{i}' for i in range(12)), 'longer'] and len({(line.get_color(), line.get_linestyle()) for line in first.lines}) == 13
    assert [line.get_label() for line in second.lines] == ['longer'] and len(second.lines[0].get_xdata()) == 5 and not third.lines and not third.axison
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [line.get_label() for line in first.lines]
    plt.close(fig)
