"Checkpoints under every fault that can be staged: death and failure at each file operation, damage at rest, missing state, files made by an enemy."
import errno
import hashlib
import json
import os
import random
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch

from aaai_lt import core
from aaai_lt.core import Disk, StorageError
from aaai_lt.training import checkpoint, loop
from aaai_lt.training.config import make_config
from aaai_lt.training.prepare import prepare

OLD, NEW = 20, 30  # the steps of the committed checkpoint and of the one that is being written


def tensors_of(step): return {f'model.{name}': torch.full((5, 3), float(step)) + i for i, name in enumerate(('weight', 'bias'))}
def values_of(step): return {'step': step, 'history': [{'epoch': 1, 'loss': 1 / step}]}
def save(folder, step, disk=None): return checkpoint.save_checkpoint(folder, step, tensors_of(step), values_of(step), disk=disk)


def check_holds(folder, steps, say=lambda text: None):
    "What is loaded is the whole of one of these steps."
    found = checkpoint.load_checkpoint(folder, say)
    assert found is not None, 'there is no checkpoint'
    step, tensors, values = found
    assert step in steps and values == values_of(step)
    assert tensors.keys() == tensors_of(step).keys() and all(torch.equal(t, tensors_of(step)[n]) for n, t in tensors.items())
    return step


def two_saved(folder):
    for step in (10, OLD): save(folder, step)
    return folder


def digest(folder): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


# -- a process that dies, and a disk that fails, at operation N

LAST = 12  # more operations than a save has: a write among them can be interrupted, the others are whole or not there

class Saboteur(Disk):
    "Counts the operations; at the chosen one calls `strike`, before it, after it, or in the middle of a write."
    def __init__(self, at, when, strike): self.left, self.when, self.strike = at, when, strike

    def act(self, name, *arguments):
        self.left -= 1
        if self.left or (self.when == 'during' and name != 'write'):
            return getattr(Disk, name)(self, *arguments)
        if self.when == 'after': getattr(Disk, name)(self, *arguments)
        if self.when == 'during':
            path, data = arguments
            Path(path).write_bytes(data[:len(data) // 2])
        self.strike(arguments[0])

    def write(self, path, data): self.act('write', path, data)
    def rename(self, old, new): self.act('rename', old, new)
    def sync(self, folder): self.act('sync', folder)
    def mkdir(self, folder): self.act('mkdir', folder)
    def remove(self, folder): self.act('remove', folder)


def dies(action, disk):
    "Whether the action, in a forked child, came to its end before it died."
    child = os.fork()
    if child == 0:
        try: action(disk); os._exit(0)
        finally: os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 77), f'the child failed with {code}'
    return code == 77


def vanish(path): os._exit(77)


def check_death_in_save(tmp_path, when):
    "Wherever the process dies in a save, a whole checkpoint is there, and the next save clears away what was left."
    for at in range(1, 100):
        folder = two_saved(tmp_path/f'{when}-{at}')
        died = dies(lambda disk: save(folder, NEW, disk), Saboteur(at, when, vanish))
        committed = check_holds(folder, (OLD, NEW))
        assert died or committed == NEW
        save(folder, 40)
        assert check_holds(folder, (40,)) and sorted(p.name for p in folder.iterdir()) == [f'step-{committed:08}', 'step-00000040']
        if not died and when != 'during' or at > LAST: break
    assert at > 8, 'fewer operations than a save has: the seam is not used'


@pytest.mark.parametrize('when', ['before', 'after', 'during'])
def test_death_in_save(tmp_path, when): check_death_in_save(tmp_path, when)


def test_death_in_the_first_save(tmp_path):
    for at in range(1, 12):
        folder = tmp_path/f'run-{at}'/'checkpoint'
        folder.parent.mkdir()
        dies(lambda disk: save(folder, NEW, disk), Saboteur(at, 'before', vanish))
        if checkpoint.load_checkpoint(folder) is not None: check_holds(folder, (NEW,))
        save(folder, 40)
        assert check_holds(folder, (40,)) and not list(folder.glob('*.tmp'))


@pytest.mark.parametrize('when', ['before', 'after', 'during'])
def test_death_in_write_file(tmp_path, when):
    "best.safetensors, history.csv and their like: the old content or the new one."
    for at in range(1, 5):
        file = tmp_path/f'{when}-{at}.csv'
        core.write_file(file, 'old' * 1000)
        dies(lambda disk: core.write_file(file, 'new' * 1000, disk), Saboteur(at, when, vanish))
        assert file.read_text() in ('old' * 1000, 'new' * 1000)


def check_storage_error(tmp_path, code, when):
    "A disk that fails at operation N: an error with number and path, and the checkpoint before is untouched."
    def strike(path): raise OSError(code, os.strerror(code), str(path))
    for at in range(1, 100):
        folder = two_saved(tmp_path/f'{at}')
        before = digest(folder/f'step-{OLD:08}')
        try: save(folder, NEW, Saboteur(at, when, strike))
        except StorageError as error: assert error.errno == code and str(folder/f'step-{NEW:08}') in error.strerror and os.strerror(code) in error.strerror
        else:
            check_holds(folder, (NEW,))  # reported as saved, so it is
            if when != 'during' or at > LAST: break
        assert digest(folder/f'step-{OLD:08}') == before
        check_holds(folder, (OLD, NEW))
        save(folder, 40)  # there is room again
        assert check_holds(folder, (40,)) and not list(folder.glob('*.tmp'))
    assert at > 8


@pytest.mark.parametrize('code, when', [(errno.ENOSPC, 'before'), (errno.EACCES, 'before'), (errno.EIO, 'before'), (errno.EROFS, 'before'), (errno.ENOSPC, 'during')])
def test_storage_error(tmp_path, code, when): check_storage_error(tmp_path, code, when)


def test_file_size_limit(tmp_path):
    "A short write as the kernel makes it: half of the file fits."
    import resource
    import signal
    folder = two_saved(tmp_path/'checkpoint')
    def limited(disk):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try: save(folder, NEW)
        except StorageError as error: os._exit(77 if error.errno == errno.EFBIG else 1)
    assert dies(limited, None)
    check_holds(folder, (OLD,))


def test_a_write_that_lies_is_found_when_read(tmp_path):
    "A disk that drops half of a file and says nothing: the manifest knows."
    for at in (3, 4):  # the two files, before the manifest
        folder, said = two_saved(tmp_path/f'{at}'), []
        save(folder, NEW, Saboteur(at - 1, 'during', lambda path: None))
        check_holds(folder, (OLD,), said.append)
        assert any(f'step-{NEW:08}' in text for text in said)


def check_durable_order(tmp_path):
    "Data reach the disk before their name, the name before the save returns: what a power cut demands, and no test can stage."
    done = []
    class Witness(Disk):
        def write(self, path, data): super().write(path, data); done.append(('write', Path(path).name))
        def rename(self, old, new): super().rename(old, new); done.append(('rename', Path(new).name))
        def sync(self, folder): super().sync(folder); done.append(('sync', Path(folder).name))
    save(tmp_path/'checkpoint', NEW, Witness())
    committed = done.index(('rename', f'step-{NEW:08}'))
    assert done[committed - 2:committed] == [('write', 'MANIFEST.json'), ('sync', f'step-{NEW:08}.tmp')] and done[committed + 1] == ('sync', 'checkpoint')
    assert {name for kind, name in done[:committed] if kind == 'write'} == {*checkpoint.FILES, 'MANIFEST.json'}


def test_durable_order(tmp_path): check_durable_order(tmp_path)


# -- damage at rest

def refused(folder, *names):
    "The newest checkpoint is refused for one of these files, and the one before is loaded."
    said = []
    check_holds(folder, (OLD,), said.append)
    assert len(said) == 1 and f'step-{NEW:08}' in said[0] and any(name in said[0] for name in names), f'{said} should name {names}'


def check_damage(tmp_path, flips=200, cuts=50):
    "Flipped bytes, missing ends, zeros, lost files: never loaded, always said."
    random_damage, newest = random.Random(1), tmp_path/f'step-{NEW:08}'
    two_saved(tmp_path)
    save(tmp_path, NEW)
    shutil.rmtree(tmp_path/'step-00000010', ignore_errors=True)
    whole = {file: file.read_bytes() for file in sorted(newest.iterdir())}
    assert len(whole) == 3
    def attempt(file, data):
        file.write_bytes(data) if data is not None else file.unlink()
        try: refused(tmp_path, file.name, *(checkpoint.FILES if file.name == 'MANIFEST.json' else ()))  # a wrong sum in the manifest speaks against the file it is of
        finally: file.write_bytes(whole[file])
    for _ in range(flips):
        file, data = random_damage.choice([*whole.items()])
        at = random_damage.randrange(len(data))
        flipped = data[:at] + bytes([data[at] ^ random_damage.randrange(1, 256)]) + data[at + 1:]
        if file.name == 'MANIFEST.json' and same_manifest(flipped, data): continue  # another blank between the words
        attempt(file, flipped)
    for _ in range(cuts):
        file, data = random_damage.choice([*whole.items()])
        attempt(file, data[:random_damage.randrange(len(data))])
    for file, data in whole.items():
        attempt(file, bytes(len(data)))
        attempt(file, data + b'\0')
        attempt(file, None)
    check_holds(tmp_path, (NEW,))


def same_manifest(one, two):
    try: return json.loads(one) | {'version': 1} == json.loads(two)  # an older version number is read as well
    except ValueError: return False


def test_damage(tmp_path): check_damage(tmp_path)


def test_files_of_another_run(tmp_path):
    mine, other = two_saved(tmp_path/'mine'), tmp_path/'other'
    save(mine, NEW)
    checkpoint.save_checkpoint(other, NEW, {n: t + 1 for n, t in tensors_of(NEW).items()}, values_of(NEW) | {'history': []})
    for name in ('tensors.safetensors', 'state.json', 'MANIFEST.json'):
        file = mine/f'step-{NEW:08}'/name
        data = file.read_bytes()
        file.write_bytes((other/f'step-{NEW:08}'/name).read_bytes())
        refused(mine, 'tensors.safetensors', 'state.json')
        file.write_bytes(data)
    check_holds(mine, (NEW,))


def test_checkpoint_under_another_step(tmp_path):
    two_saved(tmp_path)
    shutil.copytree(tmp_path/f'step-{OLD:08}', tmp_path/f'step-{NEW:08}')
    refused(tmp_path, 'MANIFEST.json')


def test_both_damaged(tmp_path):
    two_saved(tmp_path)
    (tmp_path/'step-00000010'/'state.json').unlink()
    (tmp_path/f'step-{OLD:08}'/'tensors.safetensors').write_bytes(b'')
    with pytest.raises(StorageError, match='(?s)no checkpoint.*is whole.*tensors.safetensors.*state.json.*overwrite'): checkpoint.load_checkpoint(tmp_path)


def test_a_damaged_checkpoint_is_written_anew(tmp_path):
    "After going on from the one before, the same step is reached again: it must be whole then, not the damaged one."
    two_saved(tmp_path)
    (tmp_path/f'step-{OLD:08}'/'state.json').write_bytes(b'{}')
    check_holds(tmp_path, (10,))
    save(tmp_path, OLD)
    check_holds(tmp_path, (OLD,))


def check_saving_over_what_is_loaded(tmp_path):
    "What was loaded stays right while later saves remove its files; a committed step is never touched again."
    two_saved(tmp_path)
    (_, first, _), (_, second, _) = checkpoint.load_checkpoint(tmp_path), checkpoint.load_checkpoint(tmp_path)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path/f'step-{OLD:08}').iterdir()}
    save(tmp_path, OLD)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in before} == before
    first['model.weight'] += 1
    for step in (NEW, 40, 50): save(tmp_path, step)
    assert not (tmp_path/f'step-{OLD:08}').exists()
    assert torch.equal(second['model.weight'], tensors_of(OLD)['model.weight']) and torch.equal(first['model.weight'], second['model.weight'] + 1)
    check_holds(tmp_path, (50,))


def test_saving_over_what_is_loaded(tmp_path): check_saving_over_what_is_loaded(tmp_path)


def test_two_are_kept(tmp_path):
    for step in range(1, 30): save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-00000028', 'step-00000029']


def test_shared_tensors(tmp_path):
    "Tied weights come back under both names."
    tied = torch.arange(4.)
    checkpoint.save_checkpoint(tmp_path, 1, {'model.a': tied, 'model.b': tied, 'model.c': tied[1:]}, {})
    _, tensors, _ = checkpoint.load_checkpoint(tmp_path)
    assert tensors['model.a'].tolist() == tensors['model.b'].tolist() == [0, 1, 2, 3] and tensors['model.c'].tolist() == [1, 2, 3]


# -- made by an enemy, or by the future

def forge(place, contents=None, **manifest):
    "A checkpoint folder whose manifest fits its files."
    place.mkdir(parents=True, exist_ok=True)
    for name, data in (contents or {}).items(): (place/name).write_bytes(data)
    facts = {name: {'bytes': (place/name).stat().st_size, 'sha256': hashlib.sha256((place/name).read_bytes()).hexdigest()} for name in checkpoint.FILES if (place/name).exists()}
    (place/'MANIFEST.json').write_text(json.dumps({'version': 1, 'step': int(place.name[5:]), 'files': facts} | manifest))
    return place


def safetensors(header, body=b''):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + body


def entry(start, end, shape=(2,)): return {'dtype': 'F32', 'shape': list(shape), 'data_offsets': [start, end]}


@pytest.mark.parametrize('data', [
    safetensors({'a': entry(0, 8), 'b': entry(4, 12)}, bytes(12)), safetensors({'a': entry(0, 8), 'b': entry(0, 8)}, bytes(8)), safetensors({'a': entry(8, 16)}, bytes(16)),
    safetensors({'a': entry(0, 8, (1000,))}, bytes(8)), safetensors({'a': entry(0, 1 << 40, (1 << 38,))}, bytes(8)), safetensors({'a': entry(-8, 0)}), safetensors(b'[' * 5000),
    safetensors(b'{}')[:4], b'', (200 << 20).to_bytes(8, 'little') + b'{}', b'\xff' * 64,
], ids=['overlapping', 'the same bytes twice', 'hole', 'shape beyond its bytes', 'terabyte', 'negative', 'nested', 'short', 'empty', 'header of 200 MB', 'ones'])
def test_hostile_tensors(tmp_path, data):
    "The manifest fits, the safetensors file does not hold water: refused, and no memory is taken for what it claims."
    two_saved(tmp_path)
    forge(tmp_path/f'step-{NEW:08}', {'tensors.safetensors': data, 'state.json': b'{}'})
    tracemalloc.start()
    refused(tmp_path, 'tensors.safetensors')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_long_header_is_not_read(tmp_path):
    "A header of 200 MB that is really there, in a sparse file."
    two_saved(tmp_path)
    file = forge(tmp_path/f'step-{NEW:08}', {'tensors.safetensors': (200 << 20).to_bytes(8, 'little'), 'state.json': b'{}'})/'tensors.safetensors'
    os.truncate(file, (200 << 20) + 8)
    facts = {'tensors.safetensors': {'bytes': file.stat().st_size, 'sha256': '0' * 64}, 'state.json': {'bytes': 2, 'sha256': hashlib.sha256(b'{}').hexdigest()}}
    forge(file.parent, files=facts)
    tracemalloc.start()
    refused(tmp_path, 'claims a header of 209715200 bytes')
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize('manifest', [
    {'files': {'../../canary': {'bytes': 2, 'sha256': hashlib.sha256(b'{}').hexdigest()}, 'state.json': {'bytes': 2, 'sha256': ''}}}, {'files': {'/etc/hostname': {'bytes': 1, 'sha256': ''}}},
    {'files': {}}, {'files': []}, {'files': None}, {'version': '1'}, {'version': None}, {'step': '../3'}, {'step': [30]}, {'step': 10 ** 400}, {'padding': 'x' * 20_000}, {'files': {name: [] for name in checkpoint.FILES}},
])
def test_hostile_manifest(tmp_path, manifest):
    two_saved(tmp_path/'checkpoint')
    (tmp_path/'canary').write_bytes(b'{}')
    forge(tmp_path/'checkpoint'/f'step-{NEW:08}', {'tensors.safetensors': safetensors({}), 'state.json': b'{}'}, **manifest)
    refused(tmp_path/'checkpoint', 'MANIFEST.json')


@pytest.mark.parametrize('text', [b'[' * 9_900, b'null', b'"', b'\xff\xfe', b'{"version": 1' + b'0' * 5000 + b'}'], ids=['nested', 'null', 'open', 'not text', 'digits'])
def test_manifest_that_is_none(tmp_path, text):
    two_saved(tmp_path)
    forge(tmp_path/f'step-{NEW:08}', {'tensors.safetensors': safetensors({}), 'state.json': b'{}'})
    (tmp_path/f'step-{NEW:08}'/'MANIFEST.json').write_bytes(text)
    refused(tmp_path, 'MANIFEST.json')


@pytest.mark.parametrize('name', [*checkpoint.FILES, 'MANIFEST.json'])
def test_links_are_not_followed(tmp_path, name):
    outside = save(tmp_path/'outside', NEW)
    two_saved(tmp_path/'checkpoint')
    file = save(tmp_path/'checkpoint', NEW)/name
    file.unlink()
    file.symlink_to(outside/name)
    refused(tmp_path/'checkpoint', name)


def test_links_are_not_removed_through(tmp_path):
    "A link in the place of a half-written or an old checkpoint: what it points to is never deleted."
    for link in (f'step-{NEW:08}.tmp', 'step-00000001'):
        folder, outside = two_saved(tmp_path/link), tmp_path/f'outside-{link}'
        outside.mkdir()
        (outside/'precious').write_text('keep me')
        (folder/link).symlink_to(outside)
        try: save(folder, NEW)
        except StorageError: pass  # refusing is as good as going around
        assert (outside/'precious').read_text() == 'keep me'


def test_nothing_in_a_checkpoint_is_code(tmp_path):
    "A pickle under the name of the tensors does not run."
    import pickle
    from test_models import Canary
    two_saved(tmp_path)
    forge(tmp_path/f'step-{NEW:08}', {'tensors.safetensors': pickle.dumps(Canary(tmp_path/'canary')), 'state.json': b'{}'})
    refused(tmp_path, 'tensors.safetensors')
    assert not (tmp_path/'canary').exists()


def test_a_newer_version_is_refused(tmp_path):
    save(tmp_path, NEW)
    forge(tmp_path/f'step-{NEW:08}', version=checkpoint.CHECKPOINT_VERSION + 1)
    with pytest.raises(StorageError, match='newer version of aaai_lt: upgrade'): checkpoint.load_checkpoint(tmp_path)


# -- a checkpoint that is whole, but lacks some of the run's state

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "The data and a saved checkpoint of a run with everything: a loss with state, a moving average, momentum."
    home = tmp_path_factory.mktemp('trained')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('AAAI_LT_HOME', str(home))
        config = make_config(model='test_resnet', input_size=32, batch_size=64, epochs=2, ema=0.9, loss='eqlv2', device='cpu')
        data = prepare(config, progress=False)
    trainer = loop.make_trainer(config, data, home/'run')
    (home/'run').mkdir()
    stop = iter([False, True])
    with pytest.raises(loop.Stopped): loop.run_epoch(trainer, stop=lambda: next(stop), progress=False)
    return config, data, home/'run'


def altered(trained, folder, change):
    "The checkpoint with tensors and values changed, its manifest fitting; and a fresh trainer that is to continue from it."
    config, data, run = trained
    shutil.copytree(run, folder)
    place, = (folder/'checkpoint').iterdir()
    _, tensors, values = checkpoint.read_checkpoint(place)
    change(tensors, values)
    forge(place, {'tensors.safetensors': checkpoint.tensor_bytes(tensors), 'state.json': json.dumps(values).encode()})
    return loop.make_trainer(config, data, folder)


def test_unaltered_state_is_restored(trained, tmp_path):
    trainer = altered(trained, tmp_path/'run', lambda tensors, values: None)
    assert loop.restore(trainer) and trainer.step == 2 and trainer.epoch == 0
    loop.save(trainer, disk=None)
    trainer.folder = tmp_path/'again'
    trainer.folder.mkdir()
    loop.save(trainer)
    (_, one, values), (_, two, other) = checkpoint.load_checkpoint(trained[2]/'checkpoint'), checkpoint.load_checkpoint(trainer.folder/'checkpoint')
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one) and values == other
    assert {n.split('.')[0] for n in one} == {'model', 'ema', 'loss', 'optimizer'}


VALUES = ('step', 'epoch', 'totals', 'history', 'best', 'seconds', 'skipped', 'optimizer', 'config', 'data', 'scaler')


def check_missing_value(trained, tmp_path, name):
    "A checkpoint that lacks a value of the run's state is not continued, and the error names it."
    trainer = altered(trained, tmp_path/'run', lambda tensors, values: values.pop(name))
    with pytest.raises(StorageError, match=name): loop.restore(trainer)


@pytest.mark.parametrize('name', VALUES)
def test_missing_value(trained, tmp_path, name): check_missing_value(trained, tmp_path, name)


def test_values_are_these(trained):
    "So that a field which comes later is not forgotten above."
    assert set(checkpoint.load_checkpoint(trained[2]/'checkpoint')[2]) == set(VALUES)


@pytest.mark.parametrize('prefix', ['model', 'ema', 'loss', 'optimizer'])
@pytest.mark.parametrize('which', ['all', 'first', 'last'])
def test_missing_tensors(trained, tmp_path, prefix, which):
    lost = []
    def drop(tensors, values):
        names = [n for n in sorted(tensors) if n.startswith(prefix + '.')]
        lost.extend(names if which == 'all' else [names[0 if which == 'first' else -1]])
        for name in lost: del tensors[name]
    trainer = altered(trained, tmp_path/'run', drop)
    with pytest.raises(StorageError, match=prefix) as error: loop.restore(trainer)
    assert which == 'all' or lost[0].removeprefix(prefix + '.') in error.value.strerror, f'{error.value.strerror} does not name {lost[0]}'


@pytest.mark.parametrize('prefix', ['model', 'ema', 'loss', 'optimizer'])
def test_tensor_of_another_shape(trained, tmp_path, prefix):
    def grow(tensors, values):
        name = max((n for n in tensors if n.startswith(prefix + '.')), key=lambda n: tensors[n].numel())
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    with pytest.raises(StorageError, match=prefix): loop.restore(altered(trained, tmp_path/'run', grow))


@pytest.mark.parametrize('change, named', [
    (lambda tensors, values: values['optimizer'].pop('groups'), 'optimizer'), (lambda tensors, values: values['optimizer'].pop('state'), 'optimizer'),
    (lambda tensors, values: values['optimizer']['groups'][0]['params'].pop(), 'optimizer'), (lambda tensors, values: values.update(step=999), 'step'),
    (lambda tensors, values: tensors.update({'model.surplus': torch.zeros(1)}), 'model'),
], ids=['groups', 'state', 'parameters', 'step', 'surplus'])
def test_altered_state(trained, tmp_path, change, named):
    with pytest.raises(StorageError, match=named): loop.restore(altered(trained, tmp_path/'run', change))


def test_state_of_other_data(trained, tmp_path):
    with pytest.raises(core.DataError, match='the data have changed'): loop.restore(altered(trained, tmp_path/'run', lambda tensors, values: values.update(data='0' * 16)))
