"The explorer and the review panel: their widgets moved from Python, the report by papermill, and all of it used in a real browser; there too the sliders of the hardware notebook."
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from helpers import noise
from hypothesis import given
from hypothesis import strategies as st

from aaai_lt.analysis import explorer
from aaai_lt.core import DataError, StorageError
from aaai_lt.data.predictions import Predictions
from aaai_lt.data.scan import scan
from aaai_lt.data.table import ImageTable, read_csv, read_folder


@pytest.fixture
def pets(tmp_path):
    "Two classes; one picture stands under both."
    for i, path in enumerate(f'{c}/{n}.png' for c in ('cat', 'dog') for n in range(12)): noise(tmp_path/'pets'/path, i, (30 + i, 20 + i))
    shutil.copy(tmp_path/'pets'/'cat'/'0.png', tmp_path/'pets'/'dog'/'copy.png')
    return tmp_path/'pets'


@pytest.fixture
def table(pets): return scan(read_folder(pets), progress=False)


@pytest.fixture
def zoo(tmp_path):
    "Three classes, several on an image; of the last nobody knows on the first image."
    random, rows = np.random.default_rng(0), []
    for i in range(24):
        there = (random.random(3) < [0.7, 0.4, 0.2]).astype(int)
        noise(tmp_path/'zoo'/'images'/f'{i:02}.png', i, (30 + i, 20 + i))
        rows.append([f'images/{i:02}.png', ('train', 'val')[i % 2], *there])
    rows[0][4] = -1
    pd.DataFrame(rows, columns=['path', 'split', 'ape', 'bat', 'cat']).to_csv(tmp_path/'zoo'/'labels.csv', index=False)
    return scan(read_csv(tmp_path/'zoo'/'labels.csv'), progress=False)


def label_predictions(table, spoilt):
    "Answers of a run to the validation images that are right but for some: {place: {class: probability}}."
    targets, paths = table.targets('val'), table.split('val').path.to_numpy(object)
    p = np.where(targets == 1, 0.8, 0.2)
    for place, changes in spoilt.items():
        for c, value in changes.items(): p[place, c] = value
    return Predictions(p.astype('float32'), paths, table.classes, targets, {'kind': 'probabilities', 'activation': 'sigmoid', 'split': 'val'})


def walk(box): return [box, *(w for child in getattr(box, 'children', ()) for w in walk(child))]
def find(box, kind, description=''): return next(w for w in walk(box) if type(w).__name__ == kind and (not description or w.description == description))


# -- decisions

def test_decisions_are_rows_that_the_readers_apply(table, tmp_path):
    file = tmp_path/'new'/'fixes.csv'
    explorer.record(file, 'cat/0.png', 'relabel', 'dog')
    explorer.record(file, 'dog/3.png', 'drop')
    fixed = table.with_fixes(file)
    assert list(fixed.frame.label.value_counts().sort_index()) == [11, 13] and 'dog/3.png' not in set(fixed.frame.path)


@given(st.lists(st.tuples(st.text('a,"\n é/', min_size=1).map(str.strip).filter(bool), st.sampled_from(['accept', 'relabel', 'drop'])), min_size=1, max_size=8))
def test_any_path_survives_the_csv(rows):
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/'fixes.csv'
        for path, action in rows: explorer.record(file, path, action, 'a, "b"' if action == 'relabel' else '')
        read = pd.read_csv(file, dtype=str, keep_default_na=False)
        assert list(zip(read.path, read.action)) == rows and len(explorer.undecided(pd.DataFrame({'path': [p for p, _ in rows] + ['new']}), file)) == 1


def test_a_torn_row_swallows_no_decision(table, tmp_path):
    file = tmp_path/'fixes.csv'
    explorer.record(file, 'cat/0.png', 'accept')
    with open(file, 'a') as out: out.write('cat/1.p')  # the machine stopped here
    explorer.record(file, 'cat/2.png', 'drop')
    assert list(explorer.undecided(pd.DataFrame({'path': ['cat/0.png', 'cat/1.png', 'cat/2.png']}), file).path) == ['cat/1.png']
    with pytest.raises(DataError, match=r'row 2 \(line 3\)'): table.with_fixes(file)  # and it is not overlooked


def test_what_is_no_decision_is_refused(tmp_path):
    for action, label in (('delete', ''), ('relabel', ''), ('accept', 'dog')):
        with pytest.raises(DataError, match='is no decision'): explorer.record(tmp_path/'fixes.csv', 'a', action, label)
    assert not (tmp_path/'fixes.csv').exists()


def test_a_decision_that_cannot_be_written_is_asked_again(table, tmp_path):
    (tmp_path/'fixes.csv').mkdir()  # a folder in the place of the file
    with pytest.raises(StorageError, match='could not write'): explorer.record(tmp_path/'fixes.csv', 'cat/0.png', 'accept')
    panel = explorer.review(table, explorer.suspects(table), tmp_path/'fixes.csv')
    find(panel, 'Button', 'accept').click()
    assert 'could not write' in find(panel, 'HTML').value and '1 of 2' in find(panel, 'HTML').value


def test_review_goes_on_where_it_stopped(table, tmp_path):
    found, file = explorer.suspects(table), tmp_path/'fixes.csv'
    assert set(found.path) == {'cat/0.png', 'dog/copy.png'} and found.reason.str.contains('same bytes under').all()
    first = explorer.review(table, found, file)
    find(first, 'Button', 'skip').click()
    assert find(first, 'Button', 'back').disabled is False and not file.exists()
    find(first, 'Button', 'drop').click()
    assert 'All 2' in find(first, 'HTML').value and find(first, 'Button', 'drop').disabled
    second = explorer.review(table, found, file)
    assert '1 of 1' in find(second, 'HTML').value and found.path[0] in find(second, 'HTML').value
    find(second, 'Button', 'accept').click()
    assert 'All 2' in find(explorer.review(table, found, file), 'HTML').value
    assert list(pd.read_csv(file, keep_default_na=False).action) == ['drop', 'accept']


# -- the explorer

def test_many_classes_are_shown_in_pieces():
    frame = pd.DataFrame({'path': [f'{i}.png' for i in range(500)], 'archive': '', 'label': np.arange(500) % 250, 'split': 'train', 'width': 20, 'height': 20})
    table = ImageTable(frame, tuple(f'c{i}' for i in range(250)), root='.')
    rows = explorer.class_rows(table, explorer.chosen_rows(table))
    controls = explorer.explorer_controls(table, bars=100)
    assert controls['first'].max == 150 and controls['first'].layout.display is None and len(rows) == 250


def test_a_click_a_filter_and_an_order_move_the_picture(table):
    box = explorer.explore(table)
    bars = next(w for w in walk(box) if 'aaai-lt-bars' in getattr(w, '_dom_classes', ()))
    seen = [bytes(find(box, 'Image').value)]
    def moved():
        seen.append(bytes(find(box, 'Image').value))
        assert seen[-1] != seen[-2] and seen[-1].startswith(b'\x89PNG')
    assert find(box, 'Select').value == 1  # dog has one more
    bars.children[1].click()
    moved()
    assert find(box, 'HTML').value.startswith('cat: 12 of 25 images')
    find(box, 'Text').value = 'width > 40'
    moved()
    assert find(box, 'HTML').value.startswith('cat: 1 of ')
    find(box, 'Select').value = 1
    moved()
    find(box, 'Text').value = 'wdth > 40'
    assert 'cannot be used' in find(box, 'HTML').value and 'width' in find(box, 'HTML').value and find(box, 'Image').value == seen[-1]
    find(box, 'Text').value = 'width < 0'  # nothing left
    assert '0 of 0 images' in find(box, 'HTML').value


def test_labels_that_look_like_html_are_shown_as_text(tmp_path):
    noise(tmp_path/'pets'/'<b>bold'/'1.png', 1)
    noise(tmp_path/'pets'/'plain'/'1.png', 2)
    box = explorer.explore(scan(read_folder(tmp_path/'pets'), progress=False))
    assert '&lt;b&gt;bold' in find(box, 'HTML').value


# -- several labels on an image

def test_classes_of_several_labels(zoo):
    rows = explorer.class_rows(zoo, explorer.chosen_rows(zoo, 'width > 40', 'val'))
    part = zoo.frame[(zoo.frame.split == 'val') & (zoo.frame.width > 40)]
    assert all(rows.images[c] == sum(c in sets for sets in part.label) for c in range(3))
    answers = explorer.answers_of(label_predictions(zoo, {}), zoo)
    judged = explorer.class_rows(zoo, explorer.chosen_rows(zoo), answers, 'lowest average precision')
    assert (judged.average_precision == 1).all() and (judged.errors == 0).all() and (judged.judged == (zoo.targets('val') == 1).sum(0)[judged.index]).all()


def test_unknown_labels_are_no_errors_and_no_suspects(zoo):
    first = zoo.with_frame(zoo.frame.assign(split='val'))  # the first image too, of whose cat nobody knows
    answers = explorer.answers_of(label_predictions(first, {0: {2: 0.99}}), first)
    assert explorer.class_rows(first, first.frame, answers).errors.sum() == 0 and not len(explorer.suspects(first, answers)) and len(explorer.class_lines(first, first.frame, 2, answers)) == 1


def test_several_labels_are_explored_and_settled(zoo, tmp_path):
    val, targets = zoo.split('val').path, zoo.targets('val')
    bat = 0.9 if targets[4, 1] == 0 else 0.1
    answers = explorer.answers_of(label_predictions(zoo, {4: {1: bat}, 7: {0: 0.97 if targets[7, 0] == 0 else 0.03}}), zoo)
    box = explorer.explore(zoo, answers)
    bars = next(w for w in walk(box) if 'aaai-lt-bars' in getattr(w, '_dom_classes', ()))
    before = bytes(find(box, 'Image').value)
    bars.children[1].click()
    assert bytes(find(box, 'Image').value) != before and 'average precision' in find(box, 'HTML').value
    find(box, 'Dropdown', 'order').value = 'most errors'
    assert {label for _, label in find(box, 'Select').options[:2]} == {0, 1}
    found, file = explorer.suspects(zoo, answers), tmp_path/'fixes.csv'
    assert list(found.path) == [val[7], val[4]] and found.reason.str.contains('97%|3%').iloc[0]
    suggested = {val[7]: targets[7] ^ [1, 0, 0], val[4]: targets[4] ^ [0, 1, 0]}
    panel = explorer.review(zoo, found, file)
    for path in found.path:
        if suggested[path].any(): assert find(panel, 'SelectMultiple').value == tuple(zoo.classes[c] for c in suggested[path].nonzero()[0])
        find(panel, 'SelectMultiple').value = tuple(zoo.classes[c] for c in suggested[path].nonzero()[0])  # an empty suggestion is not filled in
        find(panel, 'Button', 'relabel').click()
    assert 'All 2' in find(panel, 'HTML').value
    fixed = zoo.with_fixes(file).frame.set_index('path').label
    assert all(fixed[path] == tuple(suggested[path].nonzero()[0]) for path in found.path) and fixed.drop(list(found.path)).equals(zoo.frame.set_index('path').label.drop(list(found.path)))
    assert not len(explorer.undecided(found, file))


def test_nothing_is_there_is_a_decision_of_several_labels_only(zoo, table, tmp_path):
    path = zoo.frame.path[3]
    explorer.record(tmp_path/'fixes.csv', path, 'relabel', '', multilabel=True)
    assert zoo.with_fixes(tmp_path/'fixes.csv').frame.set_index('path').label[path] == ()
    with pytest.raises(DataError, match='is no decision'): explorer.record(tmp_path/'other.csv', 'cat/0.png', 'relabel', '')


# -- the report

def papermill(home, *words, **more):
    env = os.environ | {'AAAI_LT_HOME': str(home)} | more
    done = subprocess.run([sys.executable, '-m', 'papermill', str(ROOT/'nbs'/'analyse.ipynb'), str(home/'out.ipynb'), '--no-progress-bar', *words], cwd=home, env=env, capture_output=True, text=True, timeout=380)
    return done.returncode, done.stdout + done.stderr


def printed(home):
    cells = json.loads((home/'out.ipynb').read_text())['cells']
    return '\n'.join(''.join(o.get('text', [])) + ''.join(o.get('data', {}).get('text/plain', [])) for c in cells for o in c.get('outputs', []))


@pytest.mark.recipes
def test_the_report_of_a_run_with_corrections(home, pets):
    "Analyse shows a run's errors; what was decided is applied, what stays in doubt is listed; as in a session of Jupyter the widgets are made too."
    from aaai_lt.training.config import make_config
    from aaai_lt.training.loop import train
    train(make_config(name='mine', data=str(pets), epochs=1, input_size=32, model='repvgg_s0', val_fraction=0.25), say=lambda *_: None)
    (home/'fixes.csv').write_text('path,action,label\ncat/0.png,accept,\ndog/1.png,drop,\n')
    code, output = papermill(home, '-p', 'run', 'mine', '-p', 'fixes', 'fixes.csv', JPY_SESSION_NAME='a session')
    assert code == 0, output[-3000:]
    text = printed(home)
    assert re.search(r'dropped\s+left out\s+1', text) and '1 under several labels' in text and re.search(r'dog/copy.png\s+same bytes under', text)
    assert re.search(r'\d of \d right, \d+% \[', text) and re.search(r'(\d+) labels are in doubt, \d+ of them undecided; decisions go to .*fixes\.csv', text)
    widgets = [o for c in json.loads((home/'out.ipynb').read_text())['cells'] for o in c.get('outputs', []) if 'application/vnd.jupyter.widget-view+json' in o.get('data', {})]
    assert len(widgets) >= 2, 'the explorer and the panel'


@pytest.mark.parametrize('name, said', [('input_sise', "unknown parameter 'input_sise': did you mean 'input_size'"), ('lr', "unknown parameter 'lr'")])  # the second is a setting of a run, but not of this notebook
def test_an_unknown_parameter_stops_the_report_before_anything_is_read(name, said, home):
    code, output = papermill(home, '-p', name, '64')
    assert code != 0 and said in output and not (home/'data').exists()


# -- in a real browser

def find_browser():
    "(playwright, path of a browser or None for its own); the test is skipped, saying what to install, where there is none, or fails if AAAI_LT_BROWSER=required."
    playwright = pytest.importorskip('playwright.sync_api', reason='no playwright: pip install playwright, then playwright install --with-deps chromium (or apt-get install chromium)')
    named = os.environ.get('CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if named: return playwright, named
    with playwright.sync_playwright() as p:
        if not Path(p.chromium.executable_path).exists(): (pytest.fail if os.environ.get('AAAI_LT_BROWSER') == 'required' else pytest.skip)('no browser: apt-get install --no-install-recommends chromium, or playwright install --with-deps chromium')
    return playwright, None


class Lab:
    "JupyterLab over a folder, with settings, workspaces and runtime files of its own."
    def __init__(self, folder, home):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            self.port = free.getsockname()[1]
        self.token, self.log = secrets.token_hex(16), folder/'lab.log'
        settings = {'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False}, 'notebook-extension/tracker': {'windowingMode': 'defer', 'autoStartDefaultKernel': True}}
        for plugin, values in settings.items():
            file = folder/'settings'/'@jupyterlab'/f'{plugin}.jupyterlab-settings'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        own = {'JUPYTERLAB_SETTINGS_DIR': 'settings', 'JUPYTERLAB_WORKSPACES_DIR': 'workspaces', 'JUPYTER_RUNTIME_DIR': 'runtime', 'JUPYTER_CONFIG_DIR': 'config', 'IPYTHONDIR': 'ipython', 'MPLCONFIGDIR': 'matplotlib'}
        env = os.environ | {name: str(folder/place) for name, place in own.items()} | {'AAAI_LT_HOME': str(home), 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
        command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={self.port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={self.token}', f'--ServerApp.root_dir={folder/"work"}', '--allow-root']
        self.process = subprocess.Popen(command, env=env, stdout=open(self.log, 'w'), stderr=subprocess.STDOUT)
        deadline = time.time() + 90
        while True:
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{self.port}/api', timeout=2)
                return
            except OSError:
                assert self.process.poll() is None and time.time() < deadline, self.log.read_text()[-3000:]
                time.sleep(0.2)

    def url(self, notebook): return f'http://127.0.0.1:{self.port}/lab/tree/{notebook}?token={self.token}&reset'
    def close(self):
        self.process.terminate()
        try: self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def with_parameters(notebook, place, **values):
    "A copy of a run notebook in which somebody has typed other values into the parameters cell; its outputs are gone."
    nb = json.loads((ROOT/'nbs'/notebook).read_text())
    for cell in nb['cells']:
        if cell['cell_type'] == 'code': cell['outputs'] = []
        if 'parameters' in cell['metadata'].get('tags', []):
            text = ''.join(cell['source'])
            for name, value in values.items():
                text, times = re.subn(rf'^{name} = .*$', lambda _: f'{name} = {value!r}', text, flags=re.M)
                assert times == 1, name
            cell['source'] = text.splitlines(True)
    place.write_text(json.dumps(nb))


def run_all(page, lab, notebook):
    "Open a notebook and run all its cells, once its kernel is up."
    page.goto(lab.url(notebook))
    page.locator('.jp-Notebook .jp-Cell').first.wait_for()
    page.locator('#jp-main-statusbar').get_by_text(re.compile(r'\| Idle')).wait_for()
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()


SHOWN = '''image => { if (!image.complete || !image.naturalWidth) return '';
  const canvas = document.createElement('canvas'); canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  canvas.getContext('2d').drawImage(image, 0, 0); return canvas.toDataURL(); }'''


def settled(page, picture, old=''):
    "What a picture shows, once that differs from `old` and has stayed the same for a second. Its pixels are compared, since its address changes with every redraw."
    last, since = old, time.time()
    while time.time() - since < (60 if last == old else 1):
        now = picture.first.evaluate(SHOWN) if picture.count() else ''
        if now and now != last: last, since = now, time.time()
        page.wait_for_timeout(100)
    assert last != old, f'{picture} did not change'
    return last


def use_explorer(page, file):
    "Click a bar, choose from the list, filter, decide."
    box, panel = page.locator('.widget-box:has(> .aaai-lt-bars)'), page.locator('.aaai-lt-review')
    picture, suspect = box.locator('img.widget-image'), panel.locator('img.widget-image')
    picture.wait_for()
    first = settled(page, picture)
    box.locator('.aaai-lt-bars button').nth(1).click()
    second = settled(page, picture, first)
    box.locator('.widget-html').get_by_text(re.compile('cat: 12 of 25 images')).wait_for()
    box.locator('.widget-select select').select_option(index=0)
    third = settled(page, picture, second)
    query = box.get_by_placeholder(re.compile('a condition'))
    query.fill('width > 45')
    query.press('Enter')
    query.blur()
    settled(page, picture, third)
    panel.wait_for()
    before = settled(page, suspect)
    panel.get_by_role('button', name='drop').click()
    settled(page, suspect, before)
    assert [line.split(',')[1] for line in file.read_text().splitlines()] == ['action', 'drop']


LABELS = """
from aaai_lt.analysis.explorer import answers_of, explore, review, suspects
from aaai_lt.data.predictions import Predictions
from aaai_lt.data.scan import scan
from aaai_lt.data.table import read_csv
table = scan(read_csv({file!r}), progress=False)
shown = table.targets('val')
scores = 4.0 * (shown == 1) - 2
scores[3] = -scores[3] * 2
predictions = Predictions(scores.astype('float32'), table.split('val').path.to_numpy(object), table.classes, shown, {{'activation': 'sigmoid', 'split': 'val'}})
answers = answers_of(predictions, table)
display(explore(table, answers), review(table, suspects(table, answers), {fixes!r}))
"""


def widgets_notebook(place, code):
    "The sliders of the hardware notebook, by its own cells but without its tables, and a cell of other widgets: one page, one kernel."
    nb = json.loads((ROOT/'nbs'/'profile.ipynb').read_text())
    sources = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']
    chosen = [next(s for s in sources if part in s) for part in ('# Parameters', 'from aaai_lt.hardware.fit import', 'sliders(input_size=')]
    nb['cells'] = [{'cell_type': 'code', 'id': f'cell{i}', 'metadata': {}, 'execution_count': None, 'outputs': [], 'source': source} for i, source in enumerate([*chosen, code])]
    place.write_text(json.dumps(nb))


def settle_labels(page, table, file):
    "Click a class, then give an image another set of labels: choose two in the list."
    box, panel = page.locator('.widget-box:has(> .aaai-lt-bars)'), page.locator('.aaai-lt-review')
    picture = box.locator('img.widget-image')
    picture.wait_for()
    first = settled(page, picture)
    box.locator('.aaai-lt-bars button').nth(2).click()
    settled(page, picture, first)
    box.locator('.widget-html').get_by_text(re.compile('average precision')).wait_for()
    panel.locator('.widget-select-multiple select').select_option(['cat', 'ape'])
    panel.get_by_text(re.compile('^ape, cat|^cat, ape')).wait_for()
    panel.get_by_role('button', name='relabel').click()
    panel.get_by_text('relabel: written.').wait_for()
    fixed = table.with_fixes(file)
    changed = [(path, new) for path, new, old in zip(table.frame.path, fixed.frame.label, table.frame.label) if new != old]
    assert [new for _, new in changed] == [(0, 2)] and changed[0][0] == table.split('val').path[3]


def use_sliders(page):
    "Input size, width and blocks, each a step by the keyboard: the picture of cost and memory follows."
    picture = page.locator('.jupyter-widgets-output-area img, .widget-output img')
    page.locator('.widget-slider').first.wait_for()
    assert [text.strip() for text in page.locator('.widget-slider .widget-label').all_inner_texts()] == ['pixels', 'chip KiB', *(f'{what} {i}' for what in ('blocks', 'width') for i in range(1, 5))]
    shown = settled(page, picture)
    for name in ('pixels', 'width 4', 'blocks 3'):
        slider = page.locator('.widget-slider').filter(has=page.locator('.widget-label', has_text=re.compile(f'^{name}$')))
        before = slider.locator('.widget-readout').inner_text()
        slider.locator('.noUi-handle').press('ArrowRight')
        shown = settled(page, picture, shown)
        assert slider.locator('.widget-readout').inner_text() != before


def watch_training(page):
    "The plot of a run is drawn while the run goes on, and redrawn."
    live = page.locator('.jp-CodeCell', has_text='live_plot(run_name(config))').locator('.jp-RenderedImage img')
    live.first.wait_for()
    seen, until = set(), time.time() + 120
    while len(seen) < 3 and time.time() < until:
        seen.add(live.first.evaluate(SHOWN) if live.count() else '')
        page.wait_for_timeout(50)
    assert len(seen - {''}) >= 2, 'the plot was not redrawn while the run went on'
    page.locator('#jp-main-statusbar').get_by_text(re.compile(r'\| Idle')).wait_for()


@pytest.mark.timeout(900)  # a browser beside other work
def test_in_a_browser(tmp_path, home, pets, zoo):
    "JupyterLab in headless Chromium: analyse is run and used, several labels are settled, the hardware sliders are moved, and train draws its plot while it trains."
    playwright, executable = find_browser()
    folder = tmp_path/'lab'
    (folder/'work').mkdir(parents=True)
    with_parameters('analyse.ipynb', folder/'work'/'analyse.ipynb', data=str(pets), pixels=False)
    with_parameters('train.ipynb', folder/'work'/'train.ipynb', name='watched', model='test_resnet', input_size=32, epochs=8)
    widgets_notebook(folder/'work'/'widgets.ipynb', LABELS.format(file=str(zoo.root/'labels.csv'), fixes=str(home/'outputs'/'zoo-fixes.csv')))
    lab, errors = Lab(folder, home), []
    try:
        with playwright.sync_playwright() as p:
            browser = p.chromium.launch(executable_path=executable, headless=True, args='--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split())
            for notebook, use in (('analyse.ipynb', lambda page: use_explorer(page, home/'outputs'/'pets-fixes.csv')), ('widgets.ipynb', lambda page: (use_sliders(page), settle_labels(page, zoo, home/'outputs'/'zoo-fixes.csv'))), ('train.ipynb', watch_training)):
                page = browser.new_page(viewport={'width': 1300, 'height': 900})
                page.set_default_timeout(120_000)
                page.on('pageerror', lambda error: errors.append(str(error)))
                try:
                    run_all(page, lab, notebook)
                    use(page)
                    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0 and not errors, errors
                except BaseException:
                    page.screenshot(path=tmp_path/f'failed-{notebook}.png')
                    print(f'a picture of the page: {tmp_path}/failed-{notebook}.png', lab.log.read_text()[-1500:])
                    raise
                page.close()
            browser.close()
    finally: lab.close()
