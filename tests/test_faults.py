"Runs that are killed, stopped, misled and started twice: what ends bit for bit as if nothing had happened, and what says so and stops."
import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import Child, check_same_run, content, image_folder, launched, launched_and_told, launched_slowly

from aaai_lt.core import ConfigError, DataError, DivergedError, Stopped, StorageError
from aaai_lt.ensemble.soup import member_files, read_member
from aaai_lt.hardware.export import shipped_model
from aaai_lt.training import checkpoint, launch, loop, run
from aaai_lt.training.config import make_config
from aaai_lt.training.evaluate import run_model
from aaai_lt.training.prepare import prepare
from aaai_lt.training.stages import weights_file

# A loss with state, a moving average, dropout and checkpoints in the middle of an epoch: 10 steps in each of 3 epochs.
SETTINGS = {'name': 'run', 'model': 'test_resnet', 'input_size': 32, 'batch_size': 32, 'epochs': 3, 'lr': 2e-3, 'warmup_epochs': 0.5, 'loss': 'eqlv2', 'head_options': {'dropout': 0.2}, 'ema': 0.5, 'save_every': 2, 'select': 'balanced_accuracy', 'device': 'cpu'}
COMMAND = [f'{name}={json.dumps(value)}' for name, value in SETTINGS.items()]
STEPS = 30


def quiet(text): pass
def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()  # pytest would draw the difference of megabytes for minutes
def train(stop=None, say=quiet, **changes): return loop.train(make_config(**SETTINGS | changes), stop=stop, say=say)
def after(steps): return lambda left=iter(range(steps)): next(left, None) in (steps - 1, None)
def newest(folder): return checkpoint.checkpoints(folder/'checkpoint')[0]


@pytest.fixture(scope='session')
def reference(tmp_path_factory):
    "The run that nothing disturbed."
    home = tmp_path_factory.mktemp('reference')
    child = Child(home, launched, *COMMAND)
    assert child.wait() == 0, child.text()
    return home/'outputs'/'run'


@pytest.fixture
def warm(home, reference):
    "A home of the test's own that has the decoded digits already."
    shutil.copytree(reference.parent.parent/'data', home/'data')
    return home


def changed_run(reference, home):
    "A copy of the finished run, for a test that must not spoil it for the others."
    shutil.copytree(reference, home/'outputs'/'run')
    return home/'outputs'/'run'


def test_the_reference_learns_and_chooses(reference):
    "Were its history flat, equality with it would show less."
    history = run.Run(reference).history
    assert history.val_balanced_accuracy.nunique() > 1 and history.train_loss.nunique() == 3 and newest(reference).name == f'step-{STEPS:08}'
    assert len(checkpoint.checkpoints(reference/'checkpoint')) == 2


# -- killed: the same command goes on

def check_killed(home, reference, seed, kills=1):
    "SIGKILL at random times once the run has its folder, then the same command to its end: bit for bit the undisturbed run. How many of the kills came before the end."
    shutil.copytree(reference.parent.parent/'data', home/'data')
    draw, folder, hits = random.Random(seed), home/'outputs'/'run', 0
    for _ in range(kills):
        child, wanted = Child(home, launched, *COMMAND), draw.randrange(STEPS - 6)
        child.wait_for(lambda: folder.exists() and (wanted < 2 or any(int(p.name[5:]) >= wanted for p in checkpoint.checkpoints(folder/'checkpoint'))))
        time.sleep(draw.random() * 0.1)  # in the middle of whatever comes next
        hits += child.kill() == -signal.SIGKILL
    last = Child(home, launched, *COMMAND)
    assert last.wait() == 0, last.text()
    check_same_run(folder, reference)
    assert run.Run(folder).history.epoch.tolist() == [1, 2, 3], 'a row for each epoch, none twice'
    assert not list((folder/'checkpoint').glob('*.tmp'))
    return hits


def test_killed(tmp_path, reference):
    hits = 0
    for seed, kills in ((0, 1), (1, 1), (2, 1), (3, 2)):
        (tmp_path/str(seed)).mkdir()
        hits += check_killed(tmp_path/str(seed), reference, seed, kills)
    assert hits >= 3, 'most kills came too late: the test shows little'


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize('first', range(100, 300, 10))
def test_killed_often(tmp_path, reference, first):
    hits = 0
    for seed in range(first, first + 10):
        home = tmp_path/str(seed)
        home.mkdir()
        hits += check_killed(home, reference, seed, kills=1 + seed % 2)
        shutil.rmtree(home)
    assert hits > 10, 'of 15 kills: most came too late'


def test_nothing_half_written_stays(warm):
    "Killed while a file is written beside its place: the rest is swept, as a checkpoint's is."
    with pytest.raises(Stopped): train(stop=after(4))
    (warm/'outputs'/'run'/'.best.safetensors.999999999.tmp').write_bytes(b'half')
    train()
    assert not [p.name for p in (warm/'outputs'/'run').rglob('*.tmp')]


# -- told to stop

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal(warm, reference, number):
    "Saved at the step it was in, exit code 75, and the same command goes on."
    folder, child = warm/'outputs'/'run', Child(warm, launched, *COMMAND)
    child.wait_for(lambda: checkpoint.checkpoints(folder/'checkpoint'))
    os.kill(child.pid, number)
    assert child.wait() == 75 and 'Stopped: stopped at step' in child.text()
    step = int(child.text().split('stopped at step ')[1].split()[0])
    assert newest(folder).name == f'step-{step:08}' and step < STEPS
    again = Child(warm, launched, *COMMAND)
    assert again.wait() == 0 and f'continuing run at step {step}' in again.text()
    check_same_run(folder, reference)


def check_told_to_stop(home, command, monkeypatch):
    "SIGTERM in the fourth step of this process: that step is saved, and the exit code is 75."
    step = loop.train_step
    def told(trainer, window):
        step(trainer, window)
        if trainer.step == 4: os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop, 'train_step', told)
        code, said = command(*COMMAND, 'save_every=0', 'epochs=1')
    assert code == 75 and 'stopped at step 4 of 10, saved' in said
    assert [place.name for place in checkpoint.checkpoints(home/'outputs'/'run'/'checkpoint')] == ['step-00000004']


def test_told_to_stop(warm, command, monkeypatch): check_told_to_stop(warm, command, monkeypatch)


@pytest.mark.parametrize('operation', ['write', 'rename'])
def test_signal_during_a_save(warm, reference, operation):
    "Told twice while step 4 is being written: that checkpoint becomes whole, the exit code is 75, and the same command goes on."
    folder, child = warm/'outputs'/'run', Child(warm, launched_and_told, operation, 'step-00000004', *COMMAND)
    assert child.wait() == 75 and 'Stopped: stopped at step 5' in child.text(), child.text()
    assert [place.name for place in checkpoint.checkpoints(folder/'checkpoint')] == ['step-00000005', 'step-00000004']
    assert all(map(checkpoint.is_whole, checkpoint.checkpoints(folder/'checkpoint'))) and not list(folder.rglob('*.tmp'))
    train()
    check_same_run(folder, reference)


@pytest.mark.parametrize('signals', [1, 2])
def test_signal_before_the_first_step(home, signals):
    "While images are decoded, which would take half a minute: answered before that is done, with the half-built store cleared away."
    stores, child = home/'data'/'cache'/'pixels', Child(home, launched_slowly, 0.02, *COMMAND, 'workers=1')
    child.wait_for(lambda: list(stores.glob('*.tmp')))
    for _ in range(signals): os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 75 and 'Stopped: stopped before the first step' in child.text(), child.text()
    assert not list(stores.iterdir()) and not (home/'outputs').exists()


def test_said_before_it_takes_long(home):
    "What is read, and how large what is decoded will be; decoded only once. Without somebody to tell it nothing is printed."
    folder = image_folder(home/'set', {'x': 24, 'y': 16})
    config = make_config(data=str(folder), input_size=32)
    said = []
    for _ in range(2): prepare(config, False, said.append)
    assert said == [f'reading {folder}', 'decoding 40 images to 32 px (0.1 MB)', f'reading {folder}']


def test_nothing_is_said_unasked(home, capsys):
    prepare(make_config(data=str(image_folder(home/'set', {'x': 24, 'y': 16})), input_size=32), False)
    assert capsys.readouterr() == ('', '')


def test_command_line_in_another_place(home, reference, tmp_path):
    "`python -m` in a fresh interpreter with other hashes, another working folder and its own stores: SIGTERM ends it with 75, and with the rest it is the same run."
    words = [sys.executable, '-m', 'aaai_lt.training.launch', *COMMAND, 'workers=2']
    elsewhere = tmp_path/'elsewhere'
    elsewhere.mkdir()
    settings = {'env': os.environ | {'PYTHONHASHSEED': '123', 'AAAI_LT_HOME': str(home)}, 'cwd': elsewhere, 'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    with subprocess.Popen(words, **settings) as process:
        while process.poll() is None and not checkpoint.checkpoints(home/'outputs'/'run'/'checkpoint'): time.sleep(0.01)
        process.terminate()
        said = process.communicate()[0]
    assert process.returncode == 75, said
    rest = Child(home, launched, *COMMAND)
    assert rest.wait() == 0, rest.text()
    check_same_run(home/'outputs'/'run', reference)


def check_resumes(home, stops, **changes):
    "Stopped in this process after so many steps, again and again: the same as not stopped."
    whole = train(**changes | {'name': 'whole'})
    for steps in stops:
        with pytest.raises(Stopped): train(stop=after(steps), **changes)
    stopped = train(**changes)
    check_same_run(stopped.folder, whole.folder)


@pytest.mark.parametrize('stops, changes', [  # also at the end of an epoch, and at the end of the run
    ([2, 1, 1, 4], {'sampler': 'class_balanced', 'accumulate': 3, 'loss': 'logit_adjustment', 'head': 'cosine', 'head_options': {}, 'ema': 0.0, 'save_every': 0}),
    ([3, 4], {'model': 'repvgg_n1', 'augment_options': {'mixup': 0.4, 'cutmix': 1.0, 'hflip': 0}, 'optimizer': 'sgd', 'lr': 0.05, 'schedule': 'linear', 'clip': 1.0, 'batch_size': 64, 'select': 'last'}),
], ids=['balanced accumulated cosine', 'repvgg mixed sgd'])
def test_resumes(home, stops, changes): check_resumes(home, stops, epochs=2, **changes)


def sequence(monkeypatch, stops=(), **changes):
    "The image ids in the order in which training met them, over all epochs."
    met, load = [], loop.load_batch
    with monkeypatch.context() as patch:
        patch.setattr(loop, 'load_batch', lambda trainer, split, indices: (met.extend(split.ids[indices]) if split is trainer.data.splits['train'] else None, load(trainer, split, indices))[1])
        for steps in stops:
            with pytest.raises(Stopped): train(stop=after(steps), **changes)
        train(**changes)
    return met


@pytest.mark.parametrize('sampler, accumulate', [('shuffle', 3), ('class_balanced', 1)])
def test_order_after_resume(warm, monkeypatch, sampler, accumulate):
    "The sequence, not the set; stopped after each of the first steps."
    changes = {'sampler': sampler, 'accumulate': accumulate, 'epochs': 2, 'batch_size': 64}
    whole = sequence(monkeypatch, name='whole', **changes)
    assert sequence(monkeypatch, stops=[1, 1, 1], **changes) == whole
    if sampler == 'shuffle': assert len(set(whole)) * 2 == len(whole) and whole[:len(whole) // 2] != whole[len(whole) // 2:]


def check_order():
    "Each image once an epoch; another order in each epoch and for each seed; balanced sampling meets every class equally often."
    labels = np.repeat([0, 1, 2], [89, 10, 4])
    for sampler in ('shuffle', 'class_balanced'):
        orders = [tuple(loop.epoch_order(labels, sampler, seed, epoch)) for seed in range(4) for epoch in range(4)]
        assert len(set(orders)) == 16
    assert sorted(loop.epoch_order(labels, 'shuffle', 0, 0)) == list(range(103))
    assert np.ptp(np.bincount(labels[loop.epoch_order(labels, 'class_balanced', 0, 0)])) <= 1


def test_order(): check_order()


# -- determinism

def test_workers_do_not_matter(home, reference):
    "Stores built by four threads, and by one for each core."
    child = Child(home, launched, *COMMAND, 'workers=4')
    assert child.wait() == 0, child.text()
    check_same_run(home/'outputs'/'run', reference)


def test_in_this_process_too(warm, reference):
    "What the tests below compare was trained here, not in a child."
    check_same_run(train().folder, reference)


def test_seeds_differ(warm, reference):
    other = train(name='other', seed=1, epochs=1, save_every=0)
    assert other.history.train_loss[0] != run.Run(reference).history.train_loss[0]
    assert (other.folder/'predictions'/'val'/'items.csv').read_bytes() == (reference/'predictions'/'val'/'items.csv').read_bytes()  # the split has a seed of its own


# -- the books after a resume

def check_best_is_kept(home, monkeypatch):
    "When every epoch after the resume is worse, the chosen weights are still those from before it."
    with pytest.raises(Stopped): train(stop=after(13), select='accuracy')
    folder = home/'outputs'/'run'
    before = digest(folder/'best.safetensors')
    with monkeypatch.context() as patch:
        patch.setitem(loop.KINDS, False, dataclasses.replace(loop.KINDS[False], summarise=lambda table, targets, logits: {'accuracy': 0.0, 'balanced_accuracy': 0.0, 'over': 10, 'classes': 10, 'images': 1, 'many': None, 'medium': None, 'few': None}))
        done = train(select='accuracy')
    assert digest(folder/'best.safetensors') == before and done.summary['best_epoch'] == 1
    lines = (folder/'history.csv').read_text().splitlines()
    assert len(lines) == 4 and sum(line.startswith('epoch') for line in lines) == 1


def test_best_is_kept(warm, monkeypatch): check_best_is_kept(warm, monkeypatch)


def test_schedule_and_average_continue(warm):
    "The learning rate of the next step and the average's step count are those of a run that did not stop."
    rates = []
    def watch(trainer_step=loop.train_step):
        def step(trainer, window): trainer_step(trainer, window); rates.append((trainer.step, trainer.optimizer.param_groups[0]['lr']))
        return step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'train_step', watch())
        train(name='whole')
        whole, rates = rates, []
        with pytest.raises(Stopped): train(stop=after(7))
        train()
    assert rates == whole and len({rate for _, rate in whole}) > 20


def test_finished_run_is_left_alone(home, reference):
    folder, said = changed_run(reference, home), []
    before = content(folder)
    train(say=said.append)
    assert content(folder) == before and len(said) == 1 and 'run is finished: test: balanced accuracy' in said[0]


def test_other_runs_are_left_alone(warm):
    train(name='other', epochs=1)
    before = content(warm/'outputs'/'other')
    train(epochs=1)
    assert content(warm/'outputs'/'other') == before


def test_other_settings_under_the_same_name(home, reference):
    folder = changed_run(reference, home)
    before = content(folder)
    with pytest.raises(ConfigError, match='epochs: 3 there, 5 asked for; lr: 0.002 there, 0.01 asked for.*overwrite=True'): train(epochs=5, lr=0.01)
    assert content(folder) == before
    train(workers=3)  # cannot change the result
    assert content(folder) == before


def test_overwrite_moves_aside(warm, reference):
    folder = changed_run(reference, warm)
    (folder/'lock').unlink()
    before = content(folder)
    train(epochs=1, overwrite=True)
    aside, = (warm/'outputs').glob('run.old-*')
    assert {name: value for name, value in content(aside).items() if name != 'lock'} == before and len(run.Run(warm/'outputs'/'run').history) == 1
    assert not run.Run(warm/'outputs'/'run').config.overwrite  # else the next command would move it away again


def test_changed_data(home):
    "An image that changed since the run began: an error, and the run's own account of its data stays."
    data = image_folder(home/'set', {'x': 40, 'y': 30})
    changes = {'data': str(data), 'epochs': 2, 'augment_options': {}}
    with pytest.raises(Stopped): train(stop=after(2), **changes)
    before = content(home/'outputs'/'run')
    shutil.copyfile(data/'x'/'000.png', data/'y'/'999.png')
    with pytest.raises(DataError, match='the data have changed since this run began'): train(**changes)
    changed = {name for name, value in content(home/'outputs'/'run').items() if before.get(name) != value} - {'lock'}
    assert not changed, f'{changed} were written over'


# -- the chosen weights

DAMAGE = {
    'flipped': lambda file: file.write_bytes((data := file.read_bytes())[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
    'cut': lambda file: file.write_bytes(file.read_bytes()[:-4]),
    'lost': lambda file: file.unlink(),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damaged_weights_are_not_used(home, reference, damage):
    "Whoever reads a finished run's weights: evaluation, export, a soup, another run that begins with them."
    folder = changed_run(reference, home)
    done = run.Run(folder)
    readers = [lambda: run_model(done), lambda: shipped_model(done), lambda: read_member(member_files([done])[0]), lambda: weights_file('run', 'start')]
    for read in readers: read()
    DAMAGE[damage](folder/'best.safetensors')
    for read in readers:
        with pytest.raises(StorageError, match='best.safetensors is (damaged|missing)'): read()


def check_weights_of_the_end(home, command, monkeypatch):
    "The summary is still to be written, and the weights of the first epoch, which was the best, are not what was written: no result is made of others."
    folder, kind = home/'outputs'/'run', loop.KINDS[False]
    values = iter([0.9, *[0.1] * 20])
    with monkeypatch.context() as patch:
        patch.setitem(loop.KINDS, False, dataclasses.replace(kind, summarise=lambda *arguments: kind.summarise(*arguments) | {'balanced_accuracy': next(values)}))
        assert train(epochs=2).summary['best_epoch'] == 1
    whole = (folder/'best.safetensors').read_bytes()
    for name, damage in DAMAGE.items():
        (folder/'summary.json').unlink(missing_ok=True)
        (folder/'best.safetensors').write_bytes(whole)
        damage(folder/'best.safetensors')
        code, said = command(*COMMAND, 'epochs=2')
        assert code == 5 and 'best.safetensors is ' + ('missing' if name == 'lost' else 'damaged') in said and not run.Run(folder).finished
    (folder/'best.safetensors').write_bytes(whole)
    assert command(*COMMAND, 'epochs=2')[0] == 0


def test_damaged_weights_do_not_finish_a_run(warm, command, monkeypatch): check_weights_of_the_end(warm, command, monkeypatch)


@pytest.mark.parametrize('damage', DAMAGE)
def test_weights_that_the_last_checkpoint_has_are_mended(warm, reference, damage):
    folder, said = changed_run(reference, warm), []
    assert run.Run(folder).summary['best_epoch'] == 3
    (folder/'summary.json').unlink()
    DAMAGE[damage](folder/'best.safetensors')
    train(say=said.append)
    assert any('written again from its checkpoint' in text for text in said)
    check_same_run(folder, reference)


def test_weights_of_older_versions(home, reference):
    "A run without the note in its summary has it with its predictions; without those it is taken as it is."
    folder = changed_run(reference, home)
    summary = json.loads((folder/'summary.json').read_text())
    summary.pop('weights_sha256')
    (folder/'summary.json').write_text(json.dumps(summary))
    run_model(run.Run(folder))
    DAMAGE['flipped'](folder/'best.safetensors')
    with pytest.raises(StorageError, match='is damaged'): run_model(run.Run(folder))
    shutil.rmtree(folder/'predictions')
    run_model(run.Run(folder))


@pytest.mark.parametrize('steps', [10, 20])
def test_death_between_checkpoint_and_weights(warm, reference, monkeypatch, steps):
    "Dead when the checkpoint of an epoch is there, and the weights that it chose are not: they are in it."
    def dead(path, data, write=loop.write_file):
        if path.name == 'best.safetensors' and newest(path.parent).name == f'step-{steps:08}': raise KeyboardInterrupt
        write(path, data)
    with monkeypatch.context() as patch:
        patch.setattr(loop, 'write_file', dead)
        with pytest.raises(KeyboardInterrupt): train()
    said = []
    train(say=said.append)
    assert any('written again from its checkpoint' in text for text in said)
    check_same_run(warm/'outputs'/'run', reference)


# -- two at once

def check_lock(folder):
    "Whoever comes second is refused, by the owner's name."
    folder.mkdir(parents=True, exist_ok=True)
    with run.locked(folder, quiet):
        before = content(folder)
        with pytest.raises(StorageError, match=f'in use by process {os.getpid()} on {socket.gethostname()}'), run.locked(folder, quiet): pass
        assert content(folder) == before
    with run.locked(folder, quiet): pass


def test_lock(tmp_path): check_lock(tmp_path/'run')


def check_training_locks(home):
    "Training does not start in a folder that somebody holds."
    (home/'outputs'/'run').mkdir(parents=True)
    with run.locked(home/'outputs'/'run', quiet), pytest.raises(StorageError, match=f'process {os.getpid()}'): train(epochs=1)


def test_training_locks(warm): check_training_locks(warm)


@pytest.mark.parametrize('overwrite', [False, True])
def test_two_processes_on_one_run(warm, reference, overwrite):
    "The second is refused by the first's process number, and touches nothing, whatever it was asked; the first ends undisturbed."
    folder, first = warm/'outputs'/'run', Child(warm, launched, *COMMAND)
    first.wait_for(lambda: checkpoint.checkpoints(folder/'checkpoint'))
    os.kill(first.pid, signal.SIGSTOP)
    try:
        before = content(folder)
        second = Child(warm, launched, *COMMAND, f'overwrite={overwrite}')
        assert second.wait() == 5 and f'in use by process {first.pid} on {socket.gethostname()}, since' in second.text(), second.text()
        assert content(folder) == before
    finally: os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0, first.text()
    check_same_run(folder, reference)


def test_stale_lock_is_taken_over(warm, reference):
    child = Child(warm, launched, *COMMAND)
    child.wait_for(lambda: checkpoint.checkpoints(warm/'outputs'/'run'/'checkpoint'))
    child.kill()
    said = []
    train(say=said.append)
    assert any(text.startswith(f'taking over the lock of process {child.pid} on') for text in said)
    check_same_run(warm/'outputs'/'run', reference)


def test_lock_of_another_machine(warm):
    "Whether that process still lives cannot be known from here."
    with pytest.raises(Stopped): train(stop=after(2))
    lock = warm/'outputs'/'run'/'lock'
    lock.write_text(json.dumps({'pid': 4711, 'host': 'elsewhere', 'start': '2026-01-01 00:00:00'}))
    before = content(warm/'outputs'/'run')
    with pytest.raises(StorageError, match='process 4711 on elsewhere.*another machine.*delete'): train()
    assert content(warm/'outputs'/'run') == before
    lock.unlink()
    train()


def test_clean_ends_release_the_lock(warm):
    "A run that stopped cleanly can be continued on another machine."
    with pytest.raises(Stopped): train(stop=after(2))
    assert not (warm/'outputs'/'run'/'lock').read_text()


# -- not a number

def fresh_trainer(home):
    "A run before its first step."
    config = make_config(**SETTINGS)
    (home/'run').mkdir()
    return loop.make_trainer(config, prepare(config, progress=False), home/'run')


@pytest.fixture
def trainer(warm): return fresh_trainer(warm)


def parameters(trainer): return [p.detach().clone() for p in [*trainer.plain.parameters(), *(trainer.ema.module.parameters() if trainer.ema else ())]]


def poison_loss(trainer): trainer.loss.register_forward_hook(lambda module, inputs, out: out * float('nan'))
def poison_gradient(trainer): next(trainer.plain.parameters()).register_hook(lambda gradient: gradient * float('inf'))


def check_diverged(trainer, poison, what):
    "It stops before the step: weights and average are those of the step before, and the images and layers are named."
    windows = loop.epoch_windows(loop.epoch_order(trainer.data.splits['train'].labels, 'shuffle', 0, 0), 32, 1)
    for window in windows[:3]: loop.train_step(trainer, window)
    before = parameters(trainer)
    poison(trainer)
    with pytest.raises(DivergedError, match=f'the {what} is not finite in epoch 1, step 4'): loop.train_step(trainer, windows[3])
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer))) and all(torch.isfinite(p).all() for p in before)
    dump = json.loads((trainer.folder/'diverged.json').read_text())
    assert dump['images'] == trainer.data.splits['train'].ids[windows[3][0][1]].tolist() and dump['epoch'] == 1 and dump['lr'] > 0
    if what == 'gradient': assert dump['layers'] == [next(iter(dict(trainer.plain.named_parameters())))]


def test_loss_is_not_finite(trainer): check_diverged(trainer, poison_loss, 'loss')
def test_gradient_is_not_finite(trainer): check_diverged(trainer, poison_gradient, 'gradient')


def test_statistics_are_not_finite(trainer):
    "Training does not see a batch normalisation's running statistics; validation does, and must not call what comes out a result."
    loop.train_step(trainer, loop.epoch_windows(np.arange(32), 32, 1)[0])
    for module in (trainer.plain, trainer.ema.module):
        next(m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_var.fill_(float('nan'))
    with pytest.raises(DivergedError): loop.finish_epoch(trainer)
    assert not (trainer.folder/'best.safetensors').exists()


def test_skipped_half_precision_steps(trainer, monkeypatch):
    "The fp16 scaler may leave out 20 steps in a row, not 21; a step that works starts the count anew. (Which the scaler leaves out is its own affair: here it is only there.)"
    monkeypatch.setattr(trainer.accelerator, 'scaler', object())
    window, sums = [(0, np.arange(4))], torch.ones(1, 3)
    def overflow(): return loop.check_finite(trainer, window, sums, torch.tensor(float('inf')))
    for _ in range(20): assert overflow()
    assert loop.check_finite(trainer, window, sums, torch.tensor(1.0))
    for _ in range(20): assert overflow()
    with pytest.raises(DivergedError): overflow()
    trainer.skipped = 0
    with pytest.raises(DivergedError): loop.check_finite(trainer, window, torch.full((1, 3), float('nan')), torch.tensor(1.0))


def test_divergence_keeps_the_last_epoch(warm, monkeypatch):
    "What was saved before stays, and the run is not called finished."
    losses = iter(range(1000))
    make = loop.make_loss
    def made(*arguments, **options):
        loss = make(*arguments, **options)
        loss.register_forward_hook(lambda module, inputs, out: out * float('nan') if module.training and next(losses) == 12 else out)
        return loss
    monkeypatch.setattr(loop, 'make_loss', made)
    with pytest.raises(DivergedError, match='epoch 2'): train()
    folder = warm/'outputs'/'run'
    assert newest(folder).name == 'step-00000012' and not run.Run(folder).finished and (folder/'best.safetensors').exists()


# -- exit codes of the command line

@pytest.fixture
def command(home, capsys):
    "`python -m aaai_lt.training.launch` in this process: (exit code, stderr)."
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    def call(*words):
        code = launch.main(list(words))
        return code, capsys.readouterr().err
    yield call
    for number, handler in handlers.items(): signal.signal(number, handler)


@pytest.mark.parametrize('words, message', [
    (['epoch=3'], "unknown setting 'epoch': did you mean 'epochs'"), (['epochs=three'], "epochs is 'three'"), (['epochs=2.5'], 'epochs is 2.5'), (['epochs=[3]'], 'epochs'), (['epochs=3', 'lr'], 'name=value'), (['gtsrbb'], 'gtsrbb'), (['=3'], 'unknown setting'),
    (['pretrained="False"'], "pretrained is 'False'"), (['quick="False"'], "quick is 'False'"), (['quick=1'], 'quick is 1'), (['seed=true'], 'seed is True'),
    (['lr=-0.1'], 'lr is -0.1'), (['lr=0'], 'above 0'), (['lr=.nan'], 'finite'), (['lr=.inf'], 'finite'), (['batch_size=0'], 'above 0'), (['ema=1'], 'below 1'), (['val_fraction=1.5'], 'below 1'),
    (['warmup_epochs=3', 'epochs=3'], 'leaves nothing'), (['model=repvgg_n9'], "did you mean 'repvgg_"), (['loss=eqlv3'], "did you mean 'eqlv2'"), (['head=cosin'], "did you mean 'cosine'"), (['augment=lite'], "did you mean 'light'"),
    (['optimizer=adamww'], "did you mean 'adamw"), (['precision=fp61'], "did you mean 'fp16'"), (['schedule=cos'], 'schedule'), (['select=auroc'], 'select'), (['loss=balanced_softmax', 'adjust_tau=1'], 'never both'), (['loss_options={smothing: 0.1}'], "did you mean 'smoothing'"),
    (['name=a/b'], 'without slashes'), (['name=..'], 'without slashes'), (['data='], 'data is not set'), (['store_size=16', 'input_size=32'], 'smaller than'), (['lr=!!python/object:os.system x'], 'cannot be read'),
    (['precision=fp16', 'device=cpu', 'epochs=1', 'model=test_resnet'], 'fp16'), (['lr={a: [}'], 'cannot be read'),
])
def test_exit_2(home, command, words, message): check_refused(home, command, words, message)


def check_refused(home, command, words, message):
    "One line that says what is wrong, exit code 2, and nothing is written."
    code, said = command(*words)
    assert code == 2 and said.startswith('ConfigError: ') and message in said and said.count('\n') == 1
    assert not (home/'outputs').exists()


def test_another_precision_in_the_same_process(home):
    "A notebook's second run may differ from the first in anything."
    short = {'epochs': 1, 'save_every': 0}
    train(name='full', **short)
    half = train(name='half', precision='bf16', **short)
    again = train(name='again', **short)
    full = run.Run(home/'outputs'/'full')
    assert again.history.train_loss[0] == full.history.train_loss[0] != half.history.train_loss[0]


def test_bf16_goes_on_as_it_was(home):
    short = {'precision': 'bf16', 'epochs': 1}
    whole = train(name='whole', **short)
    with pytest.raises(Stopped): train(**short, stop=after(4))
    check_same_run(train(**short).folder, whole.folder)


@pytest.mark.parametrize('precision, slow, said_so', [('bf16', True, True), ('bf16', False, False), ('fp32', True, False)])
def test_a_precision_without_kernels_is_said(home, monkeypatch, precision, slow, said_so):
    said = []
    monkeypatch.setattr(loop, 'slow_bf16', lambda device: slow)
    with pytest.raises(Stopped): train(say=said.append, stop=after(1), precision=precision, epochs=1)
    assert any("precision='fp32' may be many times as fast" in line for line in said) == said_so


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_exit_2_without_a_gpu(home, command):
    code, said = command('device=cuda', 'model=test_resnet')
    assert code == 2 and "device='auto'" in said and not (home/'outputs').exists()


def test_exit_3(home, command):
    for words, message in ((['data=nowhere'], 'nowhere'), (['data=digits', 'where=label < 0'], 'leaves no image'), (['data=digitz'], 'digitz')):
        code, said = command(*words)
        assert code == 3 and said.startswith('DataError: ') and message in said and said.count('\n') == 1
    data = image_folder(home/'set', {'x': 12, 'y': 11})
    (data/'x'/'000.png').write_bytes(b'')
    code, said = command(f'data={data}', 'bad_images=fail')
    assert code == 3 and 'x/000.png (empty file)' in said and not (home/'outputs').exists()


def test_bad_images_are_counted(home):
    "Under quarantine the class counts are those of what is left, and the run lists the rest."
    data = image_folder(home/'set', {'x': 22, 'y': 12})
    (data/'x'/'000.png').write_bytes(b'')
    (data/'y'/'001.png').write_bytes((data/'y'/'001.png').read_bytes()[:-30])
    done = train(data=str(data), epochs=1, augment_options={}, save_every=0)
    assert sum(done.data['class_counts']) + done.data['splits']['val'] == 32
    assert dict(zip(done.problems.path, done.problems.reason)) == {'x/000.png': 'empty file', 'y/001.png': 'damaged'}


def test_exit_4(warm, command):
    code, said = command(*COMMAND, 'lr=1e30', 'warmup_epochs=0')
    assert code == 4 and said.startswith('DivergedError: ') and 'diverged.json' in said and said.count('\n') == 1
    assert json.loads((warm/'outputs'/'run'/'diverged.json').read_text())['images']


@pytest.mark.parametrize('blocked', ['outputs', 'outputs/run', 'outputs/run/checkpoint', 'data'])
def test_exit_5(home, command, blocked):
    "A file stands where a folder is needed."
    (home/blocked).parent.mkdir(parents=True, exist_ok=True)
    (home/blocked).write_text('in the way')
    code, said = command(*COMMAND)
    assert code == 5 and said.startswith('StorageError: ') and blocked.split('/')[-1] in said and (home/blocked).read_text() == 'in the way'


def test_exit_5_when_the_disk_is_full(warm, command, monkeypatch):
    "The disk fills up in the second epoch: the run ends with the reason, and goes on when there is room."
    class Full(checkpoint.Disk):
        def write(self, path, data):
            if 'step-00000014' in str(path): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().write(path, data)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'DISK', Full())
        code, said = command(*COMMAND)
    assert code == 5 and 'step-00000014' in said and 'No space left on device' in said
    assert newest(warm/'outputs'/'run').name == 'step-00000012'
    code, said = command(*COMMAND)
    assert code == 0, said


def test_damaged_checkpoint_of_a_run(warm, reference):
    "The newest is damaged while the run rests: said, and gone on from the one before, to the same end."
    with pytest.raises(Stopped): train(stop=after(7))
    folder, said = warm/'outputs'/'run', []
    (newest(folder)/'state.json').write_bytes(b'{}')
    train(say=said.append)
    assert any('step-00000007: state.json' in text for text in said) and any('continuing run at step 6' in text for text in said)
    check_same_run(folder, reference)
    for place in checkpoint.checkpoints(folder/'checkpoint'): (place/'tensors.safetensors').unlink()
    (folder/'summary.json').unlink()
    with pytest.raises(StorageError, match='is whole'): train()  # never from fresh weights
