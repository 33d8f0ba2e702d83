"What the analysis notebooks cannot show: a million rows in seconds, corrections that are refused, tails by their definitions, and the report by papermill."
import dataclasses
import time

import numpy as np
import pandas as pd
import pytest
from helpers import image_folder, noise
from hypothesis import given
from hypothesis import strategies as st

from aaai_lt.analysis import copies, counts, drift, labels, resolution
from aaai_lt.core import ConfigError, DataError
from aaai_lt.data import longtail
from aaai_lt.data.table import ImageTable, read_folder, read_images
from aaai_lt.training.config import make_config
from aaai_lt.training.prepare import look_at_data, make_table


# -- tails

@given(st.integers(1, 5000), st.integers(1, 300), st.floats(1, 1000), st.sampled_from(sorted(longtail.TAILS)))
def test_tails_fall_from_head_to_tail(largest, classes, factor, shape):
    sizes = longtail.tail_counts(largest, classes, factor, shape)
    assert sizes[0] == largest and (np.diff(sizes) <= 0).all() and sizes.min() >= 1
    if classes > 1: assert abs(sizes[-1] - max(largest / factor, 1)) <= 1 + 1e-6


def test_a_pareto_tail_is_straight_on_two_log_axes_and_a_step_has_two_sizes():
    sizes = longtail.tail_counts(10 ** 12, 100, 1000, 'pareto')
    slope = np.diff(np.log(sizes)) / np.diff(np.log(np.arange(1, 101)))
    assert np.allclose(slope, -np.log(1000) / np.log(100), atol=1e-5)
    assert np.unique(longtail.tail_counts(1000, 11, 50, 'step'), return_counts=True)[1].tolist() == [5, 6]


@pytest.mark.parametrize('shape', sorted(longtail.TAILS))
def test_a_run_can_cut_each_tail(shape, home):
    before = make_table(make_config(data='digits'), progress=False).counts()
    after = make_table(make_config(data='digits', imbalance_factor=45.0, tail=shape), progress=False).counts()
    order = np.argsort(-before, kind='stable')
    assert (after[order] == np.minimum(before[order], longtail.tail_counts(before.max(), 10, 45, shape))).all() and after.sum() < before.sum()


def test_an_unknown_tail_is_refused():
    with pytest.raises(ConfigError, match="tail is 'paretto': did you mean 'pareto'"): make_config(tail='paretto')
    with pytest.raises(DataError, match='there are: exponential, pareto, step'): longtail.tail_counts(5, 5, 5, 'cliff')


# -- corrections

@pytest.fixture
def pets(tmp_path):
    for i, path in enumerate(f'{c}/{n}.png' for c in ('cat', 'dog') for n in range(4)): noise(tmp_path/'pets'/path, i)
    return tmp_path/'pets'


@pytest.mark.parametrize('row, said', [
    ('cat/9.png,drop,', r"row 2 \(line 3\): unknown path 'cat/9.png': pets holds no such image"),
    ('cat/1.png,delete,', r"row 2 \(line 3\): unknown action 'delete': there are: accept, drop, relabel"),
    ('cat/1.png,relabel,dgo', r"row 2 \(line 3\): unknown label 'dgo': did you mean 'dog'"),
    ('cat/1.png,relabel,', r"row 2 \(line 3\): unknown label ''"),
    ('cat/1.p', r"row 2 \(line 3\): unknown action ''"),  # torn in mid-row
])
def test_a_correction_that_cannot_be_applied_is_an_error(pets, tmp_path, row, said):
    fixes = tmp_path/'fixes.csv'
    fixes.write_text(f'path,action,label\ncat/0.png,accept,\n{row}\n')
    with pytest.raises(DataError, match=said): read_folder(pets).with_fixes(fixes)


@pytest.mark.parametrize('text, said', [('', 'is not a CSV'), ('path,label\na,b\n', "no column 'action'")])
def test_a_file_that_holds_no_corrections_is_an_error(pets, tmp_path, text, said):
    (tmp_path/'fixes.csv').write_text(text)
    with pytest.raises(DataError, match=said): read_folder(pets).with_fixes(tmp_path/'fixes.csv')


def test_a_run_reads_corrections_before_its_cut(pets, tmp_path, home):
    "A correction of an image that `where` leaves out is no error, and one that brings an image into the cut counts."
    fixes = tmp_path/'fixes.csv'
    fixes.write_text('path,action,label\ncat/0.png,drop,\ncat/1.png,relabel,dog\ndog/0.png,accept,\ndog/1.png,relabel,cat\ndog/1.png,accept,\n')
    whole = make_table(make_config(data=str(pets), fixes=str(fixes), val_fraction=0.0, select='last'), progress=False)
    dogs = look_at_data(make_config(data=str(pets), fixes=str(fixes), where='label == 1', val_fraction=0.0, select='last'), progress=False)
    assert list(whole.counts()) == [2, 5] and list(dogs.counts()) == [5] and dogs.classes == ('dog',)
    listed = whole.problems.set_index('path')
    assert listed.reason.to_dict() == {'cat/0.png': 'dropped', 'cat/1.png': 'relabelled'} and listed.detail['cat/1.png'] == 'cat to dog by fixes.csv'
    with pytest.raises(FileNotFoundError, match='fixs.csv'): make_table(make_config(data=str(pets), fixes='fixs.csv'), progress=False)


# -- a million rows

@pytest.fixture(scope='module')
def million():
    "A table of a million images in 1,000 classes: sizes, splits, and a percent of copies."
    random = np.random.default_rng(0)
    share = longtail.tail_counts(10 ** 6, 1000, 500, 'pareto') / 1.0
    n = 10 ** 6
    label = random.choice(1000, n, p=share / share.sum())
    short = np.exp(random.normal(5, 0.5, n))
    content = np.where(random.random(n) < 0.01, random.integers(0, n, n), np.arange(n))
    frame = pd.DataFrame({'path': np.char.add('i', np.arange(n).astype(str)).astype(object), 'archive': '', 'label': label, 'split': random.choice(['train', 'val', 'test'], n, p=[0.8, 0.1, 0.1]),
                          'width': (short * random.choice([1, 1.5], n)).astype(int), 'height': short.astype(int), 'sha1': np.char.mod('%040x', content).astype(object)})
    return ImageTable(frame, tuple(f'class {i}' for i in range(1000)), root='.', name='million')


def timed(limit, function, *arguments):
    import matplotlib.pyplot as plt
    began = time.process_time()
    result = function(*arguments)
    plt.close('all')
    spent = time.process_time() - began
    assert spent < limit, f'{function.__name__} took {spent:.1f} s'
    return result


def drawn(plot, *arguments):
    "A plot with the pixels that it costs."
    import matplotlib
    matplotlib.use('agg')
    result = plot(*arguments)
    getattr(result, 'figure', result).canvas.draw()


def test_a_million_rows_take_seconds(million):
    frame = million.frame
    facts = timed(2, counts.describe_counts, million.counts())
    assert facts['images'] == (frame.split == 'train').sum() and facts['classes'] == 1000
    sizes = timed(3, resolution.describe_resolution, frame.width, frame.height, 224)
    assert sizes['distinct resolutions'] == len(frame[['width', 'height']].drop_duplicates())
    by_split, images = timed(5, drift.split_counts, frame.split, frame.label, million.classes)
    assert by_split.to_numpy().sum() == 10 ** 6 and (by_split['val'] == pd.crosstab(frame.label, frame.split)['val'].to_numpy()).all()
    found = timed(2, drift.drift_table, by_split, images)
    assert (found.verdict == 'drifts').sum() <= 5  # the splits were drawn by chance
    groups = timed(15, copies.copy_groups, million)
    assert groups.files.sum() == frame.sha1.duplicated(keep=False).sum()
    conflicts = timed(15, copies.conflicting_copies, million)
    assert len(conflicts) == groups.files[groups.labels > 1].sum()
    for plot, arguments in ((counts.plot_counts, (million.counts(), million.classes)), (resolution.plot_resolution, (frame.width, frame.height, 224)), (resolution.plot_aspect, (frame.width, frame.height)),
                            (resolution.plot_upsampled, (frame.width, frame.height, 224)), (drift.plot_drift, (found, images))): timed(8, drawn, plot, *arguments)


def test_a_million_rows_of_labels_take_seconds():
    random = np.random.default_rng(0)
    matrix = pd.DataFrame((random.random((10 ** 6, 60), dtype='float32') < random.random(60, dtype='float32') * 0.2).astype('int8'), columns=[f'l{i}' for i in range(60)])
    facts = timed(12, labels.describe_labels, matrix)
    both = timed(8, labels.cooccurrence, matrix)
    assert np.isclose(facts['labels an image'], np.diag(both).sum() / 10 ** 6)
    timed(8, labels.say_labels, matrix, labels.label_pairs(both, len(matrix)))
    for plot, arguments in ((labels.plot_label_counts, (matrix,)), (labels.plot_correlation, (labels.correlation(both, len(matrix)),))): timed(8, drawn, plot, *arguments)


# -- real matrices and tables

def test_the_label_matrix_of_mlrsnet(pack):
    folder = pack('mlrsnet-labels')
    packed = np.load(folder/'labels.npz')
    matrix = pd.DataFrame(np.unpackbits(packed['y_packed'], axis=1, count=60).astype('int8'), columns=(folder/'classes.txt').read_text().split('\n')[:60])
    facts, shares = labels.describe_labels(matrix), labels.prevalence(matrix)
    assert (facts['images'], facts['labels'], facts['images without a label'], facts['most labels on one image'], facts['distinct label sets']) == (109_161, 60, 10, 40, 2_919)  # as its README says
    assert round(facts['labels an image'], 2) == 5.77 and (shares.positives.iloc[0], shares.positives.iloc[-1]) == (70_728, 1_108) and shares.index[0] == 'trees'
    both = labels.cooccurrence(matrix)
    assert np.allclose(labels.correlation(both, len(matrix)), np.corrcoef(matrix.T))
    top = labels.label_pairs(both, len(matrix), 1).iloc[0]
    assert top.both == (matrix[top.a] * matrix[top.b]).sum()


def test_a_multilabel_csv_is_read_with_its_other_columns_left_out(pack):
    matrix = labels.read_label_matrix(pack('ucm-multilabel')/'labels.csv', without=['lt'])
    listed = pd.read_csv(pack('ucm-multilabel')/'labels.csv')
    assert matrix.shape == (len(listed), 17) and (matrix.sum(axis=1).to_numpy() == listed.label.str.split(';').str.len()).all()
    assert matrix.index[0] == listed.path[0]
    with pytest.raises(DataError, match='scene.*something other than 0, 1'): labels.read_label_matrix(pack('ucm-multilabel')/'labels.csv', ['scene'])


def test_the_drift_of_a_label_matrix_agrees_with_a_test_by_label(pack):
    from scipy.stats import chi2_contingency
    listed = pd.read_csv(pack('ucm-multilabel')/'labels.csv')
    matrix = labels.read_label_matrix(pack('ucm-multilabel')/'labels.csv', without=['lt'])
    by_split, images = drift.split_counts(listed.split, matrix.to_numpy(), matrix.columns)
    found = drift.drift_table(by_split, images)
    for name in found.index[found.p.notna()]: assert np.isclose(found.p[name], chi2_contingency(pd.crosstab(matrix[name].to_numpy(), listed.split), correction=False).pvalue)


@given(st.lists(st.tuples(st.sampled_from('abc'), st.sampled_from('xyz'), st.integers(0, 2)), min_size=1, max_size=30))
def test_copies_are_those_that_share_their_bytes(rows):
    frame = pd.DataFrame(rows, columns=['split', 'sha1', 'label']).assign(path=[f'{i}' for i in range(len(rows))], archive='')
    table = ImageTable(frame, ('a', 'b', 'c'), root='.')
    by_hand = {sha1: [r for r in rows if r[1] == sha1] for sha1 in {r[1] for r in rows}}
    groups = copies.copy_groups(table)
    assert groups.files.to_dict() == {k: len(v) for k, v in by_hand.items() if len(v) > 1}
    assert groups.labels.to_dict() == {k: len({r[2] for r in v}) for k, v in by_hand.items() if len(v) > 1}
    assert len(copies.conflicting_copies(table)) == sum(len(v) for v in by_hand.values() if len({r[2] for r in v}) > 1)


def test_names_that_look_like_formulas(tmp_path):
    "Two dollars in a class's name, or in two names, are two dollars, in every plot that names classes."
    import matplotlib.pyplot as plt
    from aaai_lt.analysis import errors, explorer, roc, several, thresholds
    from aaai_lt.data.predictions import Predictions
    from aaai_lt.ensemble.pseudo import plot_balance
    names, random = ('$x_$', '$\\bad{$', 'a$', 'b\\$'), np.random.default_rng(0)
    truth = np.arange(40) % 4
    table = read_images(image_folder(tmp_path/'set', {name: 10 for name in ('0', '1', '2', '3')}))
    table = dataclasses.replace(table, classes=names)
    single = Predictions(random.normal(size=(40, 4)).astype('float32'), table.frame.path.to_numpy(object), names, truth, {'kind': 'logits', 'activation': 'softmax'})
    single = dataclasses.replace(single, targets=table.frame.label.to_numpy())
    marks = (random.random((40, 4)) < 0.5).astype('int8')
    many = Predictions(single.scores, single.ids, names, marks, {'kind': 'logits', 'activation': 'sigmoid', 'multilabel': True})
    counts.plot_counts(np.array([9, 7, 5, 3]), names)
    counts.sample_grid(table.with_frame(table.frame.assign(split='train')), columns=2)
    errors.plot_confusion(single), errors.show_pairs(single, table, errors.confused_pairs(single, 2), columns=2), roc.plot_class_curves(single)
    labels.plot_correlation(pd.DataFrame(marks, columns=names).corr())
    several.show_worst(many, table), thresholds.plot_class_confusion(thresholds.class_confusion(many, 0.5)), thresholds.plot_label_curves(many, np.full(4, 0.5)), thresholds.plot_cooccurrence(many), thresholds.plot_class_reliability(many)
    plot_balance(pd.DataFrame({'label': ['$x_$']}), np.array([9, 7, 5, 3]), names)
    ax = plt.subplots()[1]
    explorer.plot_taken(explorer.answers_of(single, table), 0, set(table.frame.path), names, ax)
    for number in plt.get_fignums(): plt.figure(number).canvas.draw()
    assert {'$x_$', 'a$'} & {text.get_text().replace('\\$', '$') for text in ax.get_yticklabels()}
    plt.close('all')
