"Every table that was published can be seen again: a notebook cell tagged `table:<name>` regenerates it, and its output is stored."
import json
import re

import pytest
from conftest import ROOT

from aaai_lt.core import packaged

WITHOUT_CSV = {'aaai_results': 'four accuracies', 'aaai_counts': 'count, mean, quartiles of the class sizes', 'eqlv2_training': 'a table that its authors left empty'}
NAMES = [*packaged('tables'), *WITHOUT_CSV]


def tagged_cells(folder=ROOT/'nbs'):
    "The cells tagged `table:<name>`, by name: a list of (notebook, cell)."
    cells = {}
    for path in sorted(p for p in folder.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            for tag in cell['metadata'].get('tags', []):
                if tag.startswith('table:'): cells.setdefault(tag.removeprefix('table:'), []).append((path.relative_to(ROOT).as_posix(), cell))
    return cells


CELLS = tagged_cells()


def shown(cell):
    "Everything that a person sees under a cell, as text."
    return ''.join(''.join(output.get('text', '')) + ''.join(''.join(part) for kind, part in output.get('data', {}).items() if kind.startswith('text/')) for output in cell['outputs'])


@pytest.mark.parametrize('name', NAMES)
def test_a_published_table_is_shown_by_one_cell(name):
    "One cell, so that its name leads to it; what is stored under it is a table, and no error."
    assert len(CELLS.get(name, [])) == 1, f'{len(CELLS.get(name, []))} cells are tagged table:{name}'
    notebook, cell = CELLS[name][0]
    assert cell['cell_type'] == 'code' and not any(output['output_type'] == 'error' for output in cell['outputs'])
    assert '<table' in shown(cell) or ',' in shown(cell), f'{notebook}, cell {cell["id"]}: no table is stored under it'


def test_no_cell_names_a_table_that_does_not_exist():
    assert set(CELLS) == set(NAMES)


@pytest.mark.parametrize('name,texts', [
    ('aaai_results', ['88.23 %', '90.91 %', '89.42 %', '89.84 %', '4385', '4518', '4444', '4465']),
    ('aaai_latency', ['Failure', '–', 'Hexagon 698 DSP (uint8)', '14501.25']),
    ('aaai_model_table', ['color: crimson', '[0.25,0.25,0.25,0.1]', '252.95M']),
    ('accv_models', ['vit-arc b3', 'swin-l a3', 'swin-b b2']),
    ('eqlv2_training', ['ours: training split of aaai-profile', 'eqlv2']),
])
def test_what_was_missing_is_shown(name, texts):
    for text in texts: assert text in shown(CELLS[name][0][1])


@pytest.mark.parametrize('name,rows', [('aaai_per_class', 2 * 30), ('eqlv2_training', 30), ('accv_models', 17), ('aicoss_classes', 15), ('aicoss_params', 8), ('aaai_latency', 6)])
def test_no_row_is_left_out(name, rows):
    "Long tables stand in three or four columns of rows: 89 classes in 30 lines, 60 labels in 15."
    assert sum(len(re.findall('<tr', part)) for part in re.findall('<tbody>.*?</tbody>', shown(CELLS[name][0][1]), re.S)) >= rows


def test_evaluate_says_whose_figures_its_classes_are():
    cells = json.loads((ROOT/'nbs'/'evaluate.ipynb').read_text(encoding='utf-8'))['cells']
    caption, = re.findall('<caption>(.*?)</caption>', ''.join(shown(cell) for cell in cells if cell['cell_type'] == 'code'))
    assert re.fullmatch(r'ours: \S+, \w+, (train|val|test) of \S+, \d+ px', caption)
