"A condition chooses rows, wherever it is written, and can do nothing else."
import os
from itertools import product

import pandas as pd
import pytest

from aaai_lt.analysis.explorer import chosen_rows
from aaai_lt.challenge.ladder import divided
from aaai_lt.core import ConfigError, DataError
from aaai_lt.data.condition import condition
from aaai_lt.data.table import cut, read_images
from aaai_lt.training.config import make_config

ATTACKS = [
    "@os.system('touch canary') == 0 or label > -1", "@pd.io.common.os.system('touch canary') == 0", "path.to_csv('canary') == '' or label > -1", "label.to_pickle('canary')", "path.str.cat().to_csv('canary')",
    "label.map(print)", "label.pipe(print) == 1", "label.apply('to_csv', args=['canary'])", "label.isin(path.to_csv('canary'))", "label.isin([path.to_csv('canary')])", "label.between(0, path.to_csv('canary'))", "label.isin(values=label.to_csv('canary'))", "label.isin(**{'values': [1]})",
    "path.__class__ == 1", "path.str.__init__.__globals__ == 1", "path.str._data.to_csv('canary')", "path.array._ndarray.tofile('canary')", "'x'.__class__.__mro__ == 1", "().__class__.__base__.__subclasses__() == 1",
    "(lambda: label.to_csv('canary'))() == 1", "[label.to_csv('canary') for i in [1]] == 1", "(x := label.to_csv('canary')) == 1", "__import__('os').system('touch canary') == 0", "open('canary', 'w') == 1", "eval('1') == 1", "exec('x = 1')",
    "f'{label.to_csv(\"canary\")}' == ''", "f'{label}' == '3'", "label[0] == 1", "label == {'a': 1}", "label if label.to_csv('canary') else label", "label is None", "path.str.format() == ''", "'{0.__class__}'.format(label) == ''", "path * 1000000000 == ''", "'a' * 1000000000 == path", "'%s' % label == ''", "label ** 9 == 1", "label << 9 == 1",
    "`label`.to_csv('canary') == 1", "`label`@`label` == 1", "label = 1", "label == 1; label.to_csv('canary')", "label == 1\nlabel.to_csv('canary')", "import os", "label == 1)", "(label == 1) or (label", "label == 1 #", "not " * 5000 + "label == 1", "(" * 500 + "label" + ")" * 500 + " == 1x", "\0", "", "`", "''' == label", "...", "1", "True", "'a'", "label", "path",
]


@pytest.fixture
def frame(): return pd.DataFrame({'path': ['a.png', 'b.png', 'c/a.png', 'd.png'], 'label': [0, 1, 2, 1], 'split': ['train', 'val', 'train', 'test'], 'image width': [9, 30, 41, 41], 'class': ['x', 'y', 'z', 'y'], 'source': ['cam', None, 'web', 'cam']})


@pytest.mark.parametrize('text', ATTACKS, ids=range(len(ATTACKS)))
def test_nothing_else_than_a_choice_of_rows(frame, text, tmp_path, monkeypatch):
    "No file is made, no command is run; the message is for the person who wrote it."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, 'system', lambda command: pytest.fail(f'ran {command}'))
    if text == 'label == 1 #': return assert_rows(frame, text, [1, 3])  # a comment is no harm
    with pytest.raises(DataError, match='cannot be used|is not a condition'): condition(frame, text)
    assert not list(tmp_path.iterdir())


def assert_rows(frame, text, rows): assert condition(frame, text).to_numpy().nonzero()[0].tolist() == rows


@pytest.mark.parametrize('text, rows', [
    ("label == 1", [1, 3]), ("label != 1 and split == 'train'", [0, 2]), ("label == 1 & split == 'val' | label == 0", [0, 1]), ("(label == 1) & (split == 'val')", [1]), ("not label == 1", [0, 2]), ("~(label == 1)", [0, 2]),
    ("0 < label <= 1", [1, 3]), ("label in [0, 2]", [0, 2]), ("label not in (0, 2)", [1, 3]), ("label == [0, 2]", [0, 2]), ("label != [0, 2]", [1, 3]), ("label in [-1, 1]", [1, 3]), ("label > -1", [0, 1, 2, 3]), ("1 == label", [1, 3]),
    ("`image width` / 2 + label >= 20.5", [2, 3]), ("`image width` % 2 == 1 and `class` != 'x'", [2, 3]), ("-label < 0", [1, 2, 3]), ("(label - 1).abs() == 1", [0, 2]),
    ("label.isin([0, 2])", [0, 2]), ("label.between(1, 2, inclusive='left')", [1, 3]), ("source.isna()", [1]), ("source.notna() and label > 0", [2, 3]), ("source == 'cam'", [0, 3]), ("source != 'cam'", [1, 2]), ("source.str.contains('a')", [0, 3]),
    ("path.str.contains('/')", [2]), ("path.str.contains('A', case=False, regex=False)", [0, 2]), ("path.str.startswith(('a', 'b'))", [0, 1]), ("path.str.endswith('a.png')", [0, 2]), ("path.str.lower().str.len() == 5", [0, 1, 3]),
    ("path == 'it`s & that|other' or split == \"val\"", [1]), ("  label == 1\n", [1, 3]), ("path < 'c'", [0, 1]), ("label < `image width`", [0, 1, 2, 3]), ("label == 9", []),
])
def test_the_language(frame, text, rows): assert_rows(frame, text, rows)


def test_as_pandas_reads_it(frame):
    "Without brackets `&` and `|` bind as in pandas' queries, not as in Python."
    for a, b, c in (("label == 1", "split != 'train'", "`image width` > 30"), ("`image width` > 30", "not label == 2", "label in [0, 1]")):
        for first, second in product((' and ', ' or ', ' & ', ' | '), repeat=2): assert condition(frame, text := a + first + b + second + c).tolist() == frame.eval(text).tolist(), text


def test_what_would_be_right(frame):
    with pytest.raises(DataError, match="no column 'lable'.*did you mean 'label'.*Columns: path, label"): condition(frame, 'lable == 1')
    with pytest.raises(DataError, match=r"'path.to_csv\(\)' is not allowed.*\.str\.contains\(\)"): condition(frame, 'path.to_csv()')
    with pytest.raises(DataError, match='invalid syntax.*made of columns'): condition(frame, 'label = 1')


def test_every_door(tmp_path, monkeypatch):
    "A recipe's cut, the explorer's query and the parts of a test set are the same language."
    monkeypatch.chdir(tmp_path)
    for name in ('cat/a.png', 'dog/b.png'): (tmp_path/'set'/name).parent.mkdir(parents=True, exist_ok=True), (tmp_path/'set'/name).write_bytes(b'')
    table = read_images(tmp_path/'set')
    attack = "path.to_csv('canary') == '' or label > -1"
    for door in (lambda text: cut(table, text), lambda text: chosen_rows(table, text), lambda text: divided(table.frame, {'a': text})):
        with pytest.raises(DataError, match='is not allowed'): door(attack)
        door('label == 1')
    assert list(chosen_rows(table, 'label == 1').path) == ['dog/b.png'] and not (tmp_path/'canary').exists()


def test_no_way_out_of_the_brackets():
    "The ladder hides the test rows by a condition around that of the settings."
    with pytest.raises(ConfigError, match="where: 'label == 1. or .label == 2' cannot be used"): make_config(where='label == 1) or (label == 2')
