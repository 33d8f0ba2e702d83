"The ladder of a challenge: made once, goes on after any kill, remakes what depends on a change and nothing else, and never sees the truth."
import contextlib
import hashlib
import json
import os
import random
import shutil
import time

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from helpers import Child, content, image_folder

from aaai_lt.challenge.ladder import SETTINGS, climb, key_of, ladder_settings, over_seeds, read_parts, rung_table, stage, sweep_stages
from aaai_lt.core import ConfigError, DataError, StorageError, recipe
from aaai_lt.training.config import BUILTIN_SETTINGS

TINY = {'name': 't', 'data': 'digits', 'common': {'model': 'repvgg_s0', 'epochs': 1, 'warmup_epochs': 0.5, 'input_size': 16, 'store_size': 16, 'lr': 0.004, 'device': 'cpu'},
        'members': {'one': {}, 'two': {'loss': 'cross_entropy', 'adjust_tau': 1.0}}, 'clean': {'folds': 2, 'rules': ['disagreement']},
        'rounds': [{'part': 'a', 'rule': 'median'}, {'part': 'b', 'rule': 'quantile', 'threshold': 0.4}], 'tta': 'flip', 'soup': {'one': 1}, 'redistribute': {'method': 'winners_protected', 'least': 20, 'when': 'always'}, 'submission': 'accv'}
STAGES = ['train-one', 'train-two', 'clean', 'cleaned-one', 'cleaned-two', 'a1', 'a1-one', 'a1-two', 'b1', 'b1-one', 'b1-two', 'soup-one', 'blend', 'redistribute']


def quiet(text): pass
def changed(**changes): return {**TINY, **changes}
def climbed(settings, say=quiet): return climb(ladder_settings(**settings), say=say)
def submission(home): return {name: (home/'outputs'/'t'/f'submission.{name}').read_bytes() for name in ('csv', 'zip')}
def keys(home): return {name: key_of(home/'outputs'/f't-{name}') for name in STAGES}


def climb_and_exit(settings):
    climbed(json.loads(settings), print)
    return 0


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A ladder that nothing disturbed."
    home = tmp_path_factory.mktemp('whole')
    child = Child(home, climb_and_exit, json.dumps(TINY))
    assert child.wait() == 0, child.text()
    return home


@pytest.fixture
def copied(whole, home):
    "A copy of it, for a test that goes on from there."
    shutil.copytree(whole, home, dirs_exist_ok=True)
    return home


def test_every_stage_has_a_folder_and_the_submission_its_form(whole):
    assert all(keys(whole).values()) and not list((whole/'outputs').glob('.*'))
    rows = pd.read_csv(whole/'outputs'/'t'/'submission.csv', header=None, dtype=str)
    assert rows[1].str.fullmatch(r'000\d').all() and rows[0].is_unique and len(rows) == 356
    moved = json.loads((whole/'outputs'/'t-redistribute'/'stage.json').read_text())
    counts = rows[1].value_counts()
    assert moved['moved'] > 0 and len(counts) == 10 and counts.min() >= 20


def test_the_second_call_makes_nothing(copied):
    before, said = content(copied/'outputs'), []
    climbed(TINY, said.append)
    after = content(copied/'outputs')
    assert [line for line in said if not line.endswith('is done')] == [] and len(said) == len(STAGES)
    assert {name for name in after if after[name] != before.get(name)} <= {'t/submission.csv', 't/submission.zip', 't/lock'}
    assert {name: value[0] for name, value in after.items() if 'submission' in name} == {name: value[0] for name, value in before.items() if 'submission' in name}


def check_killed(whole, home, seed):
    "SIGKILL when a random stage is in the making, a moment later; then the same call. Whether it came before the end."
    shutil.copytree(whole/'data', home/'data')
    draw = random.Random(seed)
    name, moment = draw.choice(STAGES[:-1]), draw.random() * 0.8
    child = Child(home, climb_and_exit, json.dumps(TINY))
    child.wait_for(lambda: list((home/'outputs').glob(f'*t-{name}*')) if (home/'outputs').exists() else False)
    time.sleep(moment)
    hit = child.kill() < 0
    last = Child(home, climb_and_exit, json.dumps(TINY))
    assert last.wait() == 0, last.text()
    assert submission(home) == submission(whole), f'killed {moment:.2f} s into {name}'
    assert keys(home) == keys(whole) and not list((home/'outputs').glob('.*.tmp')) and not list((home/'outputs').rglob('predictions/.*'))
    assert not list((home/'outputs').glob('*.old-*')), 'a kill is no change'
    return hit


def test_killed(whole, tmp_path):
    hits = 0
    for seed in range(3):
        (tmp_path/str(seed)).mkdir()
        hits += check_killed(whole, tmp_path/str(seed), seed)
    assert hits >= 2, 'most kills came too late: the test shows little'


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_often(whole, tmp_path):
    hits = 0
    for seed in range(100, 120):
        home = tmp_path/str(seed)
        home.mkdir()
        hits += check_killed(whole, home, seed)
        shutil.rmtree(home)
    assert hits >= 15


@pytest.mark.parametrize('change, remade', [
    ({'redistribute': {'method': 'winners_protected', 'least': 30, 'when': 'always'}}, ['redistribute']),
    ({'blend': 'learned'}, ['blend', 'redistribute']),
    ({'rounds': [TINY['rounds'][0], {'part': 'b', 'rule': 'quantile', 'threshold': 0.2}]}, ['b1', 'b1-one', 'b1-two', 'soup-one', 'blend', 'redistribute']),
    ({'clean': {}}, ['a1', 'a1-one', 'a1-two', 'b1', 'b1-one', 'b1-two', 'soup-one', 'blend', 'redistribute']),
])
def test_a_change_makes_again_what_depends_on_it(copied, whole, change, remade):
    climbed(changed(**change))
    assert [name for name, key in keys(copied).items() if key != keys(whole)[name]] == remade
    for name in remade: assert len(list((copied/'outputs').glob(f't-{name}.old-*'))) == 1, 'what was there is kept'
    assert submission(copied) != submission(whole) or 'blend' in change
    if 'redistribute' in change:
        climbed(TINY)
        assert submission(copied) == submission(whole)


def test_weights_that_were_changed_by_hand_are_noticed(copied, whole):
    "A stage is what its files are, not what its settings say: weights that the run has not noted are refused, and the answers of other weights are other answers."
    one, two = copied/'outputs'/'t-a1-two', copied/'outputs'/'t-b1-two'
    shutil.copyfile(one/'best.safetensors', two/'best.safetensors')
    with pytest.raises(StorageError, match='t-b1-two/best.safetensors is damaged'): climbed(TINY)
    shutil.copyfile(one/'summary.json', two/'summary.json')
    climbed(TINY)
    assert [name for name, key in keys(copied).items() if key != keys(whole)[name]] == ['blend', 'redistribute']


def truthless(home, source):
    "The digits as a challenge gives them: train and val with labels, two folders of images without."
    import zipfile
    rows = pd.read_csv(source/'labels.csv')
    with zipfile.ZipFile(source/'images.zip') as archive:
        for row in rows.itertuples():
            part = 'ab'[hashlib.sha256(row.path.encode()).digest()[0] % 2]
            file = home/f'test{part}'/f'{row.Index}.png' if row.split == 'test' else home/'labelled'/row.path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(archive.read(row.path))
    rows[rows.split != 'test'].to_csv(home/'labelled'/'labels.csv', index=False)


def test_no_stage_sees_the_truth(whole, home):
    "The same ladder with test images in folders of their own, whose labels nobody could know, says the same of each image."
    truthless(home, whole/'data'/'builtin'/'digits')
    settings = changed(data=str(home/'labelled'), parts={'a': str(home/'testa'), 'b': str(home/'testb')})
    ladder = climbed(settings | {'common': BUILTIN_SETTINGS['digits'] | TINY['common']})
    table = rung_table(ladder)
    assert not ladder.truth and 'test_accuracy' not in table and table.gain.notna().any()
    one, two = (pd.read_csv(place/'outputs'/'t-clean'/'fixes.csv')[['path', 'action']] for place in (whole, home))
    assert one.equals(two)
    a, b = (sorted(pd.read_csv(place/'outputs'/'t-a1'/'chosen.csv').score.round(5)) for place in (whole, home))
    assert np.allclose(a, b, atol=1e-4)


def test_truth_is_nowhere_in_the_stages(whole):
    "No file of a stage holds targets of a test image, and no run has a test split."
    for folder in (whole/'outputs').glob('t-*'):
        assert 'test' not in json.loads((folder/'data.json').read_text())['splits'] if (folder/'data.json').is_file() else True
        for part in (folder/'predictions').glob('*') if (folder/'predictions').is_dir() else ():
            if part.name.split('-')[0] in 'ab': assert not (part/'targets.npy').exists()


def test_parts(home):
    table, truth = read_parts(ladder_config(), {})
    halves = table.frame[table.frame.split.isin(['a', 'b'])]
    assert len(halves) == 719 and abs((halves.split == 'a').mean() - 0.5) < 0.05 and len(truth) == 719
    with pytest.raises(DataError, match='share images'): read_parts(ladder_config(), {'a': 'width > 0', 'b': 'width > 0'})
    with pytest.raises(DataError, match='neither a folder'): read_parts(ladder_config(), {'a': 'path/to/nothing'})
    with pytest.raises(DataError, match='holds no image'): read_parts(ladder_config(), {'a': 'width > 0', 'b': 'width < 0'})
    image_folder(home/'few', {'x': 4, 'y': 4})
    with pytest.raises(DataError, match='no test rows'): climbed(changed(data=str(home/'few')))


def ladder_config():
    from aaai_lt.challenge.ladder import config_of
    return config_of(ladder_settings(**TINY), 'one', 'train')


@pytest.mark.parametrize('wrong, says', [
    ({'rounds': [{'part': 'a', 'rule': 'median', 'treshold': 1}]}, "did you mean 'threshold'"), ({'members': {}}, 'one at least'), ({'members': {'a/b': {}}, 'soup': {}}, 'folder names'),
    ({'members': {'one': {'val_fraction': 0.2}, 'two': {}}}, 'put it into common'), ({'common': {'seed': 3}}, 'the ladder sets it'), ({'soup': {'three': 2}}, 'unknown'), ({'pretrain': {'one': {'pretrain': 'mae'}}}, 'pretrain: one'),
    ({'blend': 'powers'}, "did you mean 'power'"), ({'submission': 'acc'}, "did you mean 'accv'"), ({'seeds': [1, 1]}, 'different'), ({'redistribute': {'method': 'transports'}}, "did you mean 'transport'"), ({'clean': {'rule': 1}}, "did you mean 'rules'"),
    ({'sample': 'nowhere.csv'}, 'does not exist'), ({'rounds': [{'rule': 'value'}]}, 'round 1')])
def test_mistakes_are_found_before_anything_starts(home, wrong, says):
    with pytest.raises((ConfigError, FileNotFoundError), match=says): ladder_settings(**changed(**wrong))
    assert not list(home.iterdir())


def test_a_stage_is_whole_or_not_there(home):
    folder = home/'outputs'/'t-x'
    def fails(beside): (beside/'half').write_text(''); raise RuntimeError('power cut')
    with pytest.raises(RuntimeError): stage(folder, 'k', fails, quiet)
    assert not folder.exists()
    left = home/'outputs'/'.t-x.999999999.tmp'
    left.mkdir(), (home/'outputs'/f'.t-x.{os.getppid()}.tmp').mkdir()
    sweep_stages('t')
    assert not left.exists() and (home/'outputs'/f'.t-x.{os.getppid()}.tmp').exists(), 'a living process keeps what it is making'


def test_the_parameters_of_the_notebook_are_the_settings():
    import ast
    cells = json.loads((ROOT/'nbs'/'challenge.ipynb').read_text())['cells']
    text = ''.join(next(c for c in cells if 'parameters' in c['metadata'].get('tags', []))['source'])
    assert text.startswith('# Parameters')
    assert {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(text).body} == SETTINGS


WINNERS = ['challenge.ipynb', '-f', str(ROOT/'nbs'/'recipes'/'accv_climb.yaml'), '-p', 'quick', 'True', '-p', 'name', 'q']


def kill_kernel(home, stage):
    "The quick climb under papermill, whose kernel is killed when that stage begins: papermill's exit code and output."
    import psutil
    from test_train import papermill
    process = papermill(home, *WINNERS, wait=False)
    while process.poll() is None and not list((home/'outputs').glob(f'*{stage}*')): time.sleep(0.02)
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has ended by itself
            if 'ipykernel_launcher' in ' '.join(child.cmdline()): child.kill()
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


@pytest.mark.recipes
def test_the_climb_of_the_winners_quick_by_papermill(home):
    "Pre-training, four members, two rounds, soups, blend, redistribution; and again, which only reads."
    from test_train import papermill, report
    code, output = papermill(home, *WINNERS)
    assert code == 0, output[-3000:]
    first = (home/'outputs'/'q-quick'/'submission.csv').read_bytes()
    text = report(home)
    assert 'q-quick-pretrain-vit_ce' in text and '+ redistribution' in text and 'one seed' in text and len(first.splitlines()) == 356
    runs, said = {p.parent.name: p.read_bytes() for p in (home/'outputs').glob('*/stage.json')}, []
    climb(ladder_settings(**recipe('accv_climb') | {'quick': True, 'name': 'q'}), say=said.append)
    assert (home/'outputs'/'q-quick'/'submission.csv').read_bytes() == first and {p.parent.name: p.read_bytes() for p in (home/'outputs').glob('*/stage.json')} == runs
    assert said and not [line for line in said if line.startswith(('training', 'epoch'))]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_kernel_leaves_no_trace(tmp_path):
    "Killed in a round of pseudo-labels and continued: the submission of a climb that nobody killed, byte for byte."
    from test_train import papermill
    for name in ('killed', 'whole'): (tmp_path/name).mkdir()
    code, output = kill_kernel(tmp_path/'killed', 'q-quick-a1-')
    assert code == 138 and 'Kernel died' in output, output[-3000:]  # papermill's own code for a dead kernel
    assert not (tmp_path/'killed'/'outputs'/'q-quick'/'submission.csv').exists(), 'the kill came too late to show anything'
    for name in ('killed', 'whole'):
        code, output = papermill(tmp_path/name, *WINNERS)
        assert code == 0, output[-3000:]
    first, second = ((tmp_path/name/'outputs'/'q-quick'/'submission.csv').read_bytes() for name in ('killed', 'whole'))
    assert first == second


def test_over_seeds_is_the_rule_of_the_house():
    "Better: the paired mean is above twice its standard error. One seed never is."
    from aaai_lt.challenge.ladder import prefix_of
    def table(base, *gains):
        values = base + np.cumsum([0, *gains])
        return pd.DataFrame({'rung': ['trained', '+ x', '+ y', '+ z'], 'member': 'm', 'test_accuracy': values, 'gain': [np.nan, *gains], 'low': 0.0, 'high': 0.0})
    tables = {0: table(0.5, 0.02, 0.03, -0.02), 1: table(0.6, 0.021, -0.01, -0.02), 2: table(0.4, 0.019, 0.01, -0.021)}
    out = over_seeds(tables).set_index('rung')
    assert out.verdict.to_dict() == {'trained': '', '+ x': 'gain', '+ y': 'no gain shown', '+ z': 'loss'} and (out.seeds == 3).all()
    assert np.isclose(out.sd['trained'], 0.1) and np.isclose(out.error['+ y'], np.std([0.03, -0.01, 0.01], ddof=1) / 3 ** 0.5)
    assert over_seeds({0: tables[0]}).verdict.tolist() == ['', 'one seed', 'one seed', 'one seed']
    assert [prefix_of(SETTINGS | {'seeds': [3, 4]}, seed) for seed in (3, 4)] == ['ladder', 'ladder-seed4']
