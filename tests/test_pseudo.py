"Pseudo-labels: the rules against plain loops, what may never enter training, and runs that read them."
import zipfile

import numpy as np
import pandas as pd
import pytest
from helpers import image_folder, noise
from hypothesis import given
from hypothesis import strategies as st

from aaai_lt.core import ConfigError, DataError
from aaai_lt.data.predictions import Predictions
from aaai_lt.data.pseudo import add_pseudo, read_pseudo
from aaai_lt.data.scan import scan
from aaai_lt.data.split import split_table
from aaai_lt.data.table import ImageTable, read_images
from aaai_lt.ensemble.pseudo import annotation_lines, pseudo_labels, pseudo_report, write_pseudo
from aaai_lt.losses.factory import make_loss
from aaai_lt.losses.margins import add_margin
from aaai_lt.models.heads import make_head
from aaai_lt.training.config import make_config, quick_config
from aaai_lt.training.loop import train
from aaai_lt.training.prepare import make_table, prepare


def answers(p, classes=None, targets=None, ids=None):
    p = np.asarray(p, 'float32')
    return Predictions(p, np.array(ids if ids is not None else [f'{i}.png' for i in range(len(p))], object), classes or tuple('abcdefgh'[:p.shape[1]]), targets, {'kind': 'probabilities'})


members = st.integers(0, 2 ** 32).map(lambda seed: [answers(np.random.default_rng([seed, m]).dirichlet(np.ones(4), 25).round(1)) for m in range(3)])


@given(members, st.sampled_from([0.0, 0.3, 0.4, 0.5, 0.8]))
def test_thresholds_are_strict(members, threshold):
    one = members[0]
    found = pseudo_labels(one, threshold=threshold)
    assert list(found.path) == [i for i, row in zip(one.ids, one.scores) if row.max() > np.float32(threshold) or (row.max() > threshold)]
    best = one.scores.max(1)
    half = pseudo_labels(one, 'median')
    assert len(half) <= len(best) / 2 and (half.score > np.median(best)).all()


@given(members, st.floats(0, 1), st.integers(0, 6), st.integers(0, 9))
def test_quantile_gives_every_predicted_class_its_part(members, share, least, most):
    one = members[0]
    said, score = one.scores.argmax(1), one.scores.max(1)
    found = pseudo_labels(one, 'quantile', share, least, most)
    for c, name in enumerate(one.classes):
        mine, taken = np.flatnonzero(said == c), found[found.label == name]
        assert len(taken) == min(len(mine), min(max(int(np.ceil(share * len(mine) - 1e-9)), least), most))
        if len(taken): assert np.allclose(sorted(taken.score, reverse=True), sorted(score[mine], reverse=True)[:len(taken)])


@given(members, st.integers(1, 3))
def test_agreement_counts_members(members, agree):
    found = dict(zip(*pseudo_labels(members, 'agreement', 0.4, agree=agree)[['path', 'label']].to_numpy().T)) if len(pseudo_labels(members, 'agreement', 0.4, agree=agree)) else {}
    mean = sum(m.scores for m in members) / np.float32(3)
    for i, path in enumerate(members[0].ids):
        c = mean[i].argmax()
        votes = sum(m.scores[i].argmax() == c for m in members)
        if abs(mean[i, c] - 0.4) > 1e-5: assert (path in found) == (votes >= agree and mean[i, c] > 0.4)
    assert set(pseudo_labels(members, 'agreement', 0.4, agree=3).path) <= set(found) or agree == 3


def test_members_are_matched_by_name():
    p = np.array([[0.9, 0.1, 0], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]])
    one, other = answers(p), answers(p[::-1][:, [2, 0, 1]], tuple('cab'), ids=['2.png', '1.png', '0.png'])
    assert pseudo_labels([one, other]).equals(pseudo_labels(one))
    with pytest.raises(DataError, match='other classes'): pseudo_labels([one, answers(p, tuple('abx'))])
    with pytest.raises(DataError, match='other images'): pseudo_labels([one, answers(p, ids=list('xyz'))])
    for wrong in ({'rule': 'valu'}, {'rule': 'agreement'}, {'threshold': 1.5}, {'agree': 2}):
        with pytest.raises(ConfigError): pseudo_labels(one, **wrong)


def test_report_and_forms(tmp_path):
    one = answers([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]], ('0007', 'x'), np.array([0, 1, 1]))
    found = pseudo_labels(one)
    row = pseudo_report(found, np.array([30, 2]), one.classes, 3).iloc[0]
    assert row.chosen == 3 and np.isclose(row.purity, 2 / 3) and row['medium purity'] == 0.5 and row['few purity'] == 1 and row['imbalance before'] == 15 and np.isclose(row['imbalance after'], 32 / 3)
    assert annotation_lines(found, 'testa/') == 'testa/0.png 0007\ntesta/1.png 0007\ntesta/2.png x\n'
    write_pseudo(found, tmp_path/'p.csv')
    assert list(read_pseudo(tmp_path/'p.csv').label) == ['0007', '0007', 'x'] and 'truth' not in pd.read_csv(tmp_path/'p.csv')
    with pytest.raises(DataError, match='white space'): annotation_lines(found.assign(label='two words'))
    (tmp_path/'bad.csv').write_text('file,label\na,b\n')
    with pytest.raises(DataError, match="no column 'path'"): read_pseudo(tmp_path/'bad.csv')


@pytest.fixture
def pool(tmp_path):
    "A labelled set, and unlabelled images beside it: files, and a zip."
    image_folder(tmp_path/'data', {'cat': 12, 'dog': 6})
    for i in range(3): noise(tmp_path/'new'/f'{i}.png', [9, i])
    with zipfile.ZipFile(tmp_path/'new'/'more.zip', 'w') as file:
        for i in range(2): file.write(noise(tmp_path/f'{i}.png', [8, i]), f'zipped/{i}.png')
    table = split_table(scan(read_images(tmp_path/'data'), progress=False), val_fraction=0.2)
    return table, tmp_path/'new'


def test_images_from_elsewhere_join(pool):
    table, folder = pool
    found = pd.DataFrame({'path': ['0.png', '2.png', 'zipped/1.png'], 'label': ['dog', 'dog', 'cat']})
    more = add_pseudo(table, found, folder, progress=False)
    new = more.frame[more.frame.pseudo == 1]
    assert new.path.tolist() == ['../new/0.png', '../new/2.png', 'zipped/1.png'] and new.archive.tolist() == ['', '', '../new/more.zip'] and (new.split == 'train').all() and new.sha1.notna().all()
    assert (more.counts() - table.counts()).tolist() == [1, 2]
    assert len(scan(more, progress=False)) == len(more)  # every file is where the table says
    with pytest.raises(DataError, match='neither beside'): add_pseudo(table, found.assign(path=['0.png', '1.png', 'gone.png']), folder, progress=False)
    with pytest.raises(DataError, match='unknown class'): add_pseudo(table, found.assign(label='owl'), folder, progress=False)


def test_no_validation_image_ever(pool):
    "Not by its name, and not as a copy under another name."
    table, folder = pool
    held = table.split('val').path[0]
    with pytest.raises(DataError, match='val split'): add_pseudo(table, pd.DataFrame({'path': [held], 'label': ['cat']}), progress=False)
    (folder/'copy.png').write_bytes((table.root/held).read_bytes())
    with pytest.raises(DataError, match='by name or by content'): add_pseudo(table, pd.DataFrame({'path': ['0.png', 'copy.png'], 'label': ['cat', 'cat']}), folder, progress=False)
    (folder/'known.png').write_bytes((table.root/table.split('train').path[0]).read_bytes())
    more = add_pseudo(table, pd.DataFrame({'path': ['0.png', 'known.png'], 'label': ['cat', 'dog']}), folder, progress=False)
    assert more.frame.pseudo.sum() == 1 and more.problems.reason.tolist() == ['pseudo-labelled copy']  # what is in training is not there twice
    (folder/'broken.png').write_bytes(b'\x89PNG')
    assert 'broken.png' in ' '.join(add_pseudo(table, pd.DataFrame({'path': ['0.png', 'broken.png'], 'label': ['cat', 'dog']}), folder, progress=False).problems.path)


@given(st.sets(st.integers(0, 17), max_size=6))
def test_training_grows_by_the_pseudo_labels_and_nothing_else(chosen):
    frame = pd.DataFrame({'path': [f'{i}.png' for i in range(18)], 'archive': 'a.zip', 'label': np.arange(18) % 3, 'split': ['train', 'val', 'test'] * 6, 'sha1': [f'{i:040}' for i in range(18)]})
    table = ImageTable(frame, ('a', 'b', 'c'), '.')
    pseudo = pd.DataFrame({'path': [f'{i}.png' for i in sorted(chosen)], 'label': ['b'] * len(chosen)})
    if any(i % 3 == 1 for i in chosen):
        with pytest.raises(DataError): add_pseudo(table, pseudo)
        return
    more = add_pseudo(table, pseudo)
    pool = [i for i in chosen if i % 3 == 2]
    assert (more.counts() - table.counts()).tolist() == [0, len(pool), 0] and more.frame[more.frame.pseudo == 0].drop(columns='pseudo').equals(frame)
    assert not set(more.split('val').path) & set(more.split('train').path)


def test_a_run_reads_them_and_its_counts_follow(home):
    "Adaptive margins and every loss see the counts of the round; the quick form leaves them out; the test split stays whole."
    settings = dict(epochs=1, warmup_epochs=0.0, input_size=16)
    table = make_table(make_config(**settings), False)
    test = table.split('test').iloc[:100]
    pd.DataFrame({'path': test.path, 'label': [table.classes[9]] * 100}).to_csv(home/'p.csv', index=False)
    config = make_config(name='round', pseudo='p.csv', head='arcface', head_options={'margin': 'adaptive'}, loss='cross_entropy', **settings)
    data = prepare(config, progress=False)
    assert data.class_counts[9] == table.counts()[9] + 100 and len(data.splits['test']) == 719
    run = train(config, data, say=lambda text: None)
    assert run.data['class_counts'] == data.class_counts.tolist() and run.data['hash'] != prepare(make_config(**settings), progress=False).hash
    head = make_head('arcface', 4, 10, margin='adaptive')
    margins = [next(v for n, v in add_margin(make_loss('cross_entropy', counts), head, counts).named_buffers() if 'margin' in n) for counts in (table.counts(), data.class_counts)]
    assert margins[0][9] == margins[0].max() and margins[1][9] == margins[1].min()  # the rarest class has become the commonest
    assert quick_config(make_config(pseudo='p.csv', quick=True)).pseudo == ''
