"Several labels on an image, from the CSV to the exported file: read, split, trained, stopped, judged."
import numpy as np
import pandas as pd
import pytest
from helpers import content, noise
from hypothesis import given
from hypothesis import strategies as st

from aaai_lt.core import DataError
from aaai_lt.data.builtin import draw_mosaic, mosaic_rows, read_builtin
from aaai_lt.data.longtail import cut_tail
from aaai_lt.data.scan import scan, separate_copies
from aaai_lt.data.split import not_held_out, split_report, split_table, stratify
from aaai_lt.data.table import ImageTable, cut, find_separator, index_names, label_matrix, label_sets, read_csv, read_images

CLASSES = ('dock', 'mobile-home', 'sea 2', 'sea 10', 'water')
matrices = st.integers(2, 12).flatmap(lambda n: st.lists(st.lists(st.sampled_from([0, 1]), min_size=5, max_size=5), min_size=n, max_size=n)).map(np.array)


def sets_of(matrix, split='train', root='.'):
    return ImageTable(pd.DataFrame({'path': [f'{i:05}.png' for i in range(len(matrix))], 'archive': '', 'label': label_sets(*(np.asarray(matrix) == 1).nonzero(), len(matrix)), 'split': split}), tuple(f'c{i}' for i in range(np.shape(matrix)[1])), root, multilabel=True)


# -- reading

@given(matrices)
def test_sets_and_matrix_are_the_same(matrix):
    sets = label_sets(*(matrix == 1).nonzero(), len(matrix))
    assert sets == [tuple(i for i, v in enumerate(row) if v) for row in matrix.tolist()] and all(type(i) is int for s in sets for i in s)
    unknown = [tuple(i for i in range(5) if i not in s)[:2] for s in sets]
    both = label_matrix(sets, 5, unknown)
    assert np.array_equal(both == 1, matrix == 1) and all(np.flatnonzero(row == -1).tolist() == list(u) for row, u in zip(both, unknown))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "24 images and their labels, with several on most."
    folder = tmp_path_factory.mktemp('sets')
    for i in range(24): noise(folder/'train'/f'{i:02}.png', i, (24, 20))
    matrix = (np.random.default_rng(3).random((24, 5)) < [0.7, 0.5, 0.5, 0.4, 0.3]).astype(int)
    matrix[0], matrix[1] = [1, 1, 0, 0, 1], 0
    return folder, matrix


def rows_of(matrix): return pd.DataFrame({'img_id': [f'T_{i:03}' for i in range(len(matrix))], 'img_path': [f'./train/{i:02}.png' for i in range(len(matrix))]})


def test_three_forms_of_one_truth(folder):
    place, matrix = folder
    marks = rows_of(matrix).join(pd.DataFrame(matrix, columns=CLASSES))
    marks.to_csv(place/'marks.csv', index=False)
    names = [';'.join(np.array(CLASSES)[row == 1]) for row in matrix]
    rows_of(matrix).assign(label=names, lt=1, width=24).to_csv(place/'names.csv', index=False)
    rows_of(matrix).assign(label=[n.replace(';', ', ') for n in names]).to_csv(place/'commas.csv', index=False)
    for table in (read_csv(place/'marks.csv'), read_csv(place/'names.csv'), read_csv(place/'commas.csv')):
        assert table.multilabel and table.classes == CLASSES and 'several labels' in repr(table)
        assert np.array_equal(table.targets(), matrix) and list(table.frame.id) == [f'T_{i:03}' for i in range(24)]
        assert list(table.with_frame(table.frame.assign(split='train')).counts()) == list(matrix.sum(0))


def test_unknown_and_given_columns(folder):
    place, matrix = folder
    marks = pd.DataFrame(matrix, columns=CLASSES).astype(object)
    marks.iloc[2, 0], marks.iloc[3, 1], marks.iloc[4, 2] = -1, None, '1.0'
    rows_of(matrix).join(marks).assign(checked=1).to_csv(place/'partial.csv', index=False)
    everything, named, without = read_csv(place/'partial.csv'), read_csv(place/'partial.csv', {'labels': list(CLASSES)}), read_csv(place/'partial.csv', {'without': ['checked']})
    assert everything.classes == (*CLASSES, 'checked') and named.classes == without.classes == CLASSES and 'checked' in named.frame
    assert np.array_equal(named.targets(), without.targets()) and named.targets()[2, 0] == named.targets()[3, 1] == -1 and named.targets()[4, 2] == 1 and (named.targets() == -1).sum() == 2


@pytest.mark.parametrize('columns, message', [({'labels': ['dock', 'see']}, "no column 'see'"), ({'labels': 'dock'}, 'a list of columns'), ({'labels': ['dock', 'img_path']}, "'img_path'"), ({'label': 'img_path', 'separater': ';'}, 'separator'), ({'without': [*CLASSES[1:]]}, 'no column for label')])
def test_columns_that_cannot_be(folder, columns, message):
    place, matrix = folder
    rows_of(matrix).join(pd.DataFrame(matrix, columns=CLASSES)).to_csv(place/'bad.csv', index=False)
    with pytest.raises(DataError, match=message): read_csv(place/'bad.csv', columns)


def test_single_names_are_not_cut():
    for names in (['Chair, office', 'Bowl, glass', 'Felis, catus'], ['a;b'], ['red', 'green;', 'blue'], ['x | y', 'x | z', 'w']):
        assert find_separator(pd.Series(names * 5)) == '', names
    assert index_names(pd.Series(['b ;a;', '', 'a;a']), ';') == ([(0, 1), (), (0,)], ('a', 'b'))
    with pytest.raises(DataError, match='no image has a label'): index_names(pd.Series(['', None]), ';')


@pytest.mark.parametrize('name', ['gtsrb', 'grocery', 'tinyimagenet-lt'])
def test_packs_of_one_label_stay_so(pack, name): assert not read_images(pack(name)).multilabel


def test_names_beside_columns_that_say_the_same(pack):
    "The columns know the classes that no image shows; a column with ones that is no name stays what it is."
    columns = 'airplane bare-soil buildings cars chaparral court dock field grass mobile-home pavement sand sea ship tanks trees water'.split()
    table = read_images(pack('tiny')/'multilabel.csv')
    assert list(table.classes) == columns and table.multilabel and {'scene', 'label_text'} <= set(table.frame)
    assert (table.counts('train') == 0).any()  # which the names alone would have lost
    named = read_images(pack('tiny')/'multilabel.csv', columns={'label': 'label'})
    assert set(named.classes) < set(columns)
    for one, other in zip(table.frame.label, named.frame.label): assert {table.classes[i] for i in one} == {named.classes[i] for i in other}


def test_ucm_is_read_as_it_is(pack):
    table, rows = read_images(pack('ucm-multilabel')), pd.read_csv(pack('ucm-multilabel')/'labels.csv')
    assert len(table.classes) == 17 and not {'lt', 'width', 'height', 'scene'} & set(table.classes)
    assert np.array_equal(table.targets(), rows[list(table.classes)].to_numpy())  # names in the cells and the columns of 0 and 1 say the same
    marked = read_images(pack('ucm-multilabel'), columns={'labels': list(table.classes)})
    assert np.array_equal(marked.targets(), table.targets()) and list(table.counts()) == list(marked.counts())
    tail = cut(table, "lt == 1 and split == 'train'")
    assert len(tail) == 889 and dict(zip(tail.classes, tail.counts()))['airplane'] == 3


def test_cut_keeps_the_classes_that_are_shown(folder):
    table = sets_of([[1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    table = table.with_frame(table.frame.assign(unknown=[(), (0, 2), (), (2,)], keep=[0, 1, 0, 1]))
    small = cut(table, 'keep == 1')
    assert small.classes == ('c1',) and list(small.frame.label) == [(0,), ()] and list(small.frame.unknown) == [(), ()]
    with pytest.raises(DataError, match='one label an image'): cut_tail(table, 10)


def test_copies_under_other_labels(tmp_path):
    for name in ('a', 'b'): noise(tmp_path/f'{name}.png', 1)
    noise(tmp_path/'c.png', 2)
    (tmp_path/'labels.csv').write_text('path,label\na.png,dock;ship\nb.png,ship\nc.png,dock;ship\n')
    table = separate_copies(split_table(scan(read_csv(tmp_path/'labels.csv', {'separator': ';'}), progress=False), val_fraction=0.0))
    assert list(table.problems.reason) == ['copy with another label']
    from aaai_lt.analysis.copies import conflicting_copies
    assert sorted(conflicting_copies(table).label) == ['dock;ship', 'ship']


# -- splits

def plain_stratification(matrix, share):
    "Algorithm 1 of Sechidis et al. for two parts, image by image, in the order of the images: number of held-out positives of each class."
    left, wishes, total, held = list(range(len(matrix))), np.array([(1 - share) * matrix.sum(0), share * matrix.sum(0)]), np.array([1 - share, share]) * len(matrix), []
    while left:
        number = matrix[left].sum(0)
        if not number.any(): break
        rarest = np.where(number, number, len(matrix) + 1).argmin()
        for i in [i for i in left if matrix[i, rarest]]:
            part = max((0, 1), key=lambda k: (round(wishes[k][rarest], 9), total[k]))
            wishes[part] -= matrix[i]; total[part] -= 1
            left.remove(i)
            if part: held.append(i)
    return matrix[held].sum(0)


@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.2, 0.34]))
def test_stratify_is_as_good_as_the_plain_algorithm(seed, share):
    random = np.random.default_rng(seed)
    matrix = (random.random((150, 8)) < np.geomspace(0.6, 0.02, 8)).astype(int)
    matrix[:8] |= np.eye(8, dtype=int)
    held = stratify(matrix, np.arange(150), share, seed)
    wish, rarest = share * matrix.sum(0), np.where(matrix.sum(0), matrix.sum(0), 999).argmin()
    plain = plain_stratification(matrix, share)
    assert matrix[held].sum(0)[rarest] == plain[rarest]  # the first class is cut in the same way, whichever its images
    assert np.abs(matrix[held].sum(0) - wish).mean() <= max(np.abs(plain - wish).mean() * 1.5, 1.2)
    shuffled = random.permutation(150)
    assert np.array_equal(stratify(matrix[shuffled], shuffled.astype(str), share, seed), stratify(matrix, np.arange(150).astype(str), share, seed)[shuffled])  # the listing's order does not matter


def test_real_labels_are_shared_out(pack):
    packed = np.load(pack('mlrsnet-labels')/'labels.npz')
    matrix = np.unpackbits(packed['y_packed'], axis=1, count=60)
    table = split_table(sets_of(matrix, ''), 0.1, 0.2)
    for split in ('val', 'test'): assert split_report(table, split).difference.abs().max() < 0.4 and not not_held_out(table, split)
    assert abs((table.frame.split == 'val').mean() - 0.1) < 0.001


def test_groups_of_sets_stay_whole():
    random = np.random.default_rng(0)
    table = sets_of(random.random((300, 6)) < [0.6, 0.4, 0.3, 0.2, 0.1, 0.05], '')
    table = table.with_frame(table.frame.assign(track=np.arange(300) // 6))
    cut_table = split_table(table, 0.2, group='track')
    assert (cut_table.frame.groupby('track').split.nunique() == 1).all()
    assert 0.08 < (cut_table.frame.split == 'val').mean() < 0.35 and (cut_table.counts('train') > 0).all()
    with pytest.raises(DataError, match="tiny_classes='both' is for one label"): split_table(table, tiny_classes='both')


# -- mosaics

def test_mosaics_share_no_digit(home):
    from aaai_lt.data import builtin
    digits, frame = builtin.digit_rows(1)
    parts = {s: {digits[i].tobytes() for i in np.flatnonzero(frame.split == s)} for s in ('train', 'val', 'test')}
    draw = builtin.draw_mosaic
    def watch(digits, labels, chances, random):
        assert {d.tobytes() for d in digits} <= next(part for part in parts.values() if digits[0].tobytes() in part)
        return draw(digits, labels, chances, random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin, 'draw_mosaic', watch)
        mosaic_rows({'train': 3, 'val': 3, 'test': 3})
    assert not parts['train'] & parts['val'] and not parts['train'] & parts['test'] and not parts['val'] & parts['test']
    one = read_builtin('digits-mosaic:0.02', home/'one')
    read_builtin('digits-mosaic:0.02', home/'two')
    assert {k: v[0] for k, v in content(home/'one').items()} == {k: v[0] for k, v in content(home/'two').items()}  # byte for byte
    assert one.multilabel and one.classes == tuple('0123456789') and 1 <= one.frame.label.map(len).min() and one.frame.label.map(len).max() <= 5


def test_a_mosaic_shows_what_it_says():
    digits = np.stack([np.full((8, 8), 20 * (i + 1), 'uint8') for i in range(10)])  # each class has its own grey
    for seed in range(50):
        canvas, shown = draw_mosaic(digits, np.arange(10), np.full(10, 0.1), np.random.default_rng(seed))
        assert set(np.unique(np.asarray(canvas))) - {0} == {20 * (i + 1) for i in shown}
