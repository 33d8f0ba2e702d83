"Settings from people: cells that are executed again, paths spelled in several ways, texts from papermill, other words, and what cannot be trained."
import ast
import json
import shutil

import pytest
import torch
import yaml
from conftest import ROOT
from helpers import image_folder

from aaai_lt.core import ConfigError, nearest
from aaai_lt.training import loop
from aaai_lt.training.config import config_hash, make_config, notebook_settings, run_name, to_yaml
from aaai_lt.training.evaluate import run_data
from aaai_lt.training.run import Run, run_folder

CELL = '# Parameters\nepochs = 30  # times through the training images\nlr = 2e-3  # the rate\nseed = 0\n'
BARE = '# Parameters\nepochs = 30\nlr = 2e-3\nseed = 0'
SMALL = {'model': 'test_resnet', 'input_size': 32, 'batch_size': 16, 'epochs': 1, 'warmup_epochs': 0.0, 'augment': 'none', 'augment_options': {}, 'select': 'last', 'device': 'cpu'}


def quiet(text): pass
def asked(*cells, **values): return notebook_settings({'In': ['', *cells], 'epochs': 30, 'lr': 2e-3, 'seed': 0} | values)


# -- cells of parameters

@pytest.mark.parametrize('cell', [CELL, BARE])
def test_run_all_twice_asks_for_the_same(cell):
    "A built-in set's own values stay what they were the first time."
    once, twice = asked(cell), asked(cell, 'train()', cell)
    assert once == twice == {} and make_config(**twice) == make_config() and make_config(**twice).epochs == 60
    assert asked(cell, cell.replace('2e-3', '1e-3'), lr=1e-3) == {'lr': 1e-3}  # edited
    assert asked(cell.replace('2e-3', '1e-3'), cell) == {}  # and back


@pytest.mark.parametrize('cell', [CELL, BARE])
def test_what_papermill_gives_counts(cell):
    "Also what equals the default, and when all of its notebook is executed again; not when only the notebook's own cell was, which undoes it."
    given = '# Parameters\nepochs = 30\n'
    assert asked(cell, given) == asked(cell, given, cell, given) == {'epochs': 30}
    assert asked(cell, given, cell) == {}
    with pytest.raises(ConfigError, match="did you mean 'epochs'"): asked(cell, cell, '# Parameters\nepoch = 3')


def test_papermill_may_give_every_setting():
    "As with `-f outputs/mine/config.yaml`: all are given, and none is the notebook's own cell."
    assert asked(CELL, BARE) == {'epochs': 30, 'lr': 2e-3, 'seed': 0}


@pytest.mark.parametrize('notebook', ['train', 'analyse', 'evaluate', 'compare', 'ensemble', 'challenge', 'profile'])
def test_papermill_knows_every_parameter(notebook):
    "papermill reads a parameter's line by itself, and calls one unknown that it could not read (two `=` in a line are enough)."
    from papermill.inspection import inspect_notebook
    path = ROOT/'nbs'/f'{notebook}.ipynb'
    cell, = (''.join(c['source']) for c in json.loads(path.read_text())['cells'] if 'parameters' in c['metadata'].get('tags', ()))
    asked = [node.targets[0].id for node in ast.parse(cell).body]
    found = inspect_notebook(path)
    assert list(found) == asked and all(found[name]['help'] for name in asked)


def test_lines_that_come_and_go():
    longer = CELL + 'clip = 0.0\n'
    assert asked(CELL, longer, clip=1.0) == {'clip': 1.0} and asked(longer, CELL, clip=1.0) == {}


def test_a_slip_in_the_cell_is_forgotten():
    "What could not be executed asks for nothing."
    assert asked('# Parameters\nepochs = = 3  # times', CELL, lr=1e-3) == {'lr': 1e-3}


# -- paths

@pytest.fixture
def project(home, monkeypatch):
    "A home with a set, a link to it, and a folder of the user's to work in."
    image_folder(home/'sets'/'pets', {'cat': 12, 'dog': 12})
    (home/'link').symlink_to(home/'sets'/'pets')
    (home/'work').mkdir()
    monkeypatch.chdir(home/'work')
    return home


def test_a_place_is_one_place(project, monkeypatch):
    "However it is spelled, and from wherever: one hash, one name, one text in config.yaml."
    spelled = ['sets/pets', 'sets/pets/', './sets/pets', '../sets/pets', '../link', 'link', str(project/'sets'/'pets'), str(project/'link')]
    configs = [make_config(data=text, select='last') for text in spelled]
    monkeypatch.chdir(project/'sets')
    configs += [make_config(data=text, select='last') for text in ('pets', './pets', 'pets/')]
    assert len(set(map(config_hash, configs))) == len(set(map(run_name, configs))) == len(set(map(to_yaml, configs))) == 1
    assert yaml.safe_load(to_yaml(configs[0]))['data'] == 'sets/pets' and run_name(configs[0]).startswith('pets-')
    shutil.copytree(project/'sets'/'pets', project/'sets'/'others')
    assert config_hash(make_config(data='others', select='last')) != config_hash(configs[0])


def test_files_of_settings_are_places_too(project):
    for name in ('fixes', 'pseudo', 'pretrained', 'start', 'scales', 'teacher'):
        (project/'work'/'file.pth').write_bytes(b'')
        more = {'model': 'repopt_n1', 'optimizer': 'sgd'} if name == 'scales' else {}
        hashes = {config_hash(make_config(**more, **{name: text})) for text in ('file.pth', './file.pth', '../work/file.pth', str(project/'work'/'file.pth'))}
        assert len(hashes) == 1 and config_hash(make_config(**more, **{name: 'other.pth'})) not in hashes
    staged = {config_hash(make_config(data='sets/pets', stages=[{}, {'start': 'previous', 'pseudo': text}])) for text in ('file.pth', './file.pth')}
    assert len(staged) == 1


def test_a_run_by_name_or_folder(project):
    folder = project/'outputs'/'mine'
    folder.mkdir(parents=True)
    (folder/'config.yaml').write_text('{}')
    (project/'mine').mkdir()  # of the same name, and no run
    assert len({config_hash(make_config(teacher=text)) for text in ('mine', '../outputs/mine', 'outputs/mine', str(folder))}) == 1
    assert make_config(start='mine').start == 'mine' and make_config(start='previous').start == 'previous'


def test_a_folder_called_digits(project):
    "`./digits` is the folder, `digits` the built-in set; neither becomes the other on the way through config.yaml."
    image_folder(project/'digits', {'cat': 2, 'dog': 2})
    folder, builtin = make_config(data='./digits', select='last'), make_config(data='digits', select='last')
    again = make_config(**yaml.safe_load(to_yaml(folder)))
    assert again.data == folder.data == str(project/'digits') and config_hash(folder) != config_hash(builtin) and builtin.data == 'digits'


def test_the_same_run_from_another_folder(project, monkeypatch):
    "Finished is finished; and its data are found, in the project as it lies now."
    said = []
    run = loop.train(make_config(**SMALL, data='../sets/pets', name='mine'), say=quiet)
    monkeypatch.chdir(project)
    again = loop.train(make_config(**SMALL, data='sets/pets/', name='mine'), say=said.append)
    assert again.folder == run.folder and 'finished' in said[0]
    with pytest.raises(ConfigError, match="data: 'sets/pets' there, 'sets' asked for"): run_folder(make_config(**SMALL, data='sets', name='mine'))
    moved = project.parent/f'{project.name}-moved'
    shutil.copytree(project, moved, symlinks=True)
    shutil.rmtree(project/'sets')
    monkeypatch.setenv('AAAI_LT_HOME', str(moved))
    there = Run(moved/'outputs'/'mine')
    assert there.config.data == str(moved/'sets'/'pets') and len(run_data(there).splits['val']) == 2
    loop.train(make_config(**SMALL, data=str(moved/'sets'/'pets'), name='mine'), say=said.append)
    assert said[-1].startswith('mine is finished')


# -- texts, other words, and what cannot be

def test_dicts_and_lists_as_papermill_gives_them():
    config = make_config(columns='{"label": "ClassId"}', loss='cross_entropy', loss_options='{smoothing: 0.1}', augment_options="{'hflip': 0}", box='[x1, y1, x2, y2]')
    assert (config.columns, config.loss_options, config.augment_options, config.box) == ({'label': 'ClassId'}, {'smoothing': 0.1}, {'hflip': 0}, ['x1', 'y1', 'x2', 'y2'])
    for text in ('ClassId', '', '[label]', '{label: [', '3'):
        with pytest.raises(ConfigError, match='^columns is .*(a dict such as|cannot be read)'): make_config(columns=text)
    with pytest.raises(ConfigError, match='^stages is .*a list such as'): make_config(stages='{a: b}')


@pytest.mark.parametrize('given, right', [({'device': 'gpu'}, 'cuda'), ({'loss': 'ce'}, 'cross_entropy'), ({'learning_rate': 1e-3}, 'lr'), ({'bs': 3}, 'batch_size'), ({'img_size': 3}, 'input_size'), ({'precision': 'float16'}, 'fp16')])
def test_other_words(given, right):
    with pytest.raises(ConfigError, match=f"did you mean '{right}'"): make_config(**given)


def test_other_words_are_of_use_only_where_they_exist(): assert nearest('gpu', ['one', 'two']) == 'there are: one, two'


@pytest.mark.parametrize('given, message', [
    ({'seed': 2 ** 63}, r'below 2 \*\* 63'), ({'seed': 1e30}, r'below 2 \*\* 63'), ({'split_seed': 2 ** 70}, r'below 2 \*\* 63'), ({'epochs': float('inf')}, 'epochs is inf'),
    ({'loss': 'seesaw', 'augment_options': {'mixup': 0.2}}, 'one class for each image'), ({'loss': 'seesaw', 'augment': 'none', 'augment_options': {'cutmix': 1.0}}, 'one class for each image'), ({'stages': [{}, {'loss': 'seesaw', 'augment_options': {'mixup': 0.2}}]}, 'stage 2.*one class for each image'),
])
def test_impossible_settings(given, message):
    with pytest.raises(ConfigError, match=message): make_config(**given)


def test_possible_settings():
    assert make_config(seed=2 ** 63 - 1).seed == 2 ** 63 - 1 and make_config(loss='seesaw').loss == 'seesaw' and make_config(loss='eqlv2', augment_options={'mixup': 0.2}).augment_options == {'mixup': 0.2}


@pytest.mark.parametrize('given, message', [({'pretrained': 'nope.pth'}, "pretrained: 'nope.pth' does not exist"), ({'start': 'nope.pth'}, "start: 'nope.pth'"), ({'start': 'nobody'}, "start: no run 'nobody'"), ({'start': 'previous'}, 'no stage before')])
def test_weights_that_are_not_there(home, given, message):
    "Found before the data are: nothing is decoded, nothing written."
    with pytest.raises(ConfigError, match=message): loop.train(make_config(**SMALL, data='nowhere', **given), say=quiet)
    assert not (home/'outputs').exists() and not (home/'data').exists()


def test_a_batch_of_one(home):
    "Where the last maps are a pixel wide there is nothing to normalise over; where they are not, or nothing is normalised over the batch, one image is enough."
    one = SMALL | {'data': str(image_folder(home/'set', {'cat': 12, 'dog': 12})), 'batch_size': 1, 'name': 'one'}
    with pytest.raises(ConfigError, match='batch_size=1 .*single image.*32 px'): loop.train(make_config(**one | {'model': 'repvgg_s0'}), say=quiet)
    assert not (home/'outputs').exists()
    loop.check_single(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)), 32, 1)
    with pytest.raises(ConfigError, match='single image'): loop.check_single(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 32), torch.nn.BatchNorm2d(4)), 32, 1)
