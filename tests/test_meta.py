"The tests can fail: a fault is put into the library, and the check that should find it must. (The checks pass without the fault: their own files run them.)"
from contextlib import contextmanager

import pytest
import test_augment
import test_checkpoint
import test_data
import test_faults
from PIL import ImageFile
from test_checkpoint import trained  # a fixture
from test_faults import command  # a fixture

from aaai_lt.core import Stopped, StorageError
from aaai_lt.data import augment, scan
from aaai_lt.training import checkpoint, launch, loop
from aaai_lt.training.config import Config, make_config


@contextmanager
def found():
    "The check inside fails, by one of its own assertions."
    with pytest.raises((AssertionError, pytest.fail.Exception)): yield


def test_unchecked_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'read_checked', lambda place, name, facts: (place/name).read_bytes())
    with found(): test_checkpoint.check_damage(tmp_path)


def test_old_checkpoints_removed_first(tmp_path, monkeypatch):
    save = checkpoint.save_checkpoint
    def eager(folder, *arguments, disk=None, **options):
        for old in checkpoint.checkpoints(folder): (disk or checkpoint.DISK).remove(old)
        return save(folder, *arguments, disk=disk, **options)
    monkeypatch.setattr(checkpoint, 'save_checkpoint', eager)
    with found(): test_checkpoint.check_death_in_save(tmp_path, 'after')


def test_swallowed_storage_error(tmp_path, monkeypatch):
    save = checkpoint.save_checkpoint
    def careless(folder, step, *arguments, **options):
        try: return save(folder, step, *arguments, **options)
        except StorageError: return folder/f'step-{step:08}'
    monkeypatch.setattr(checkpoint, 'save_checkpoint', careless)
    with found(): test_checkpoint.check_storage_error(tmp_path, 28, 'before')


def test_no_sync(tmp_path, monkeypatch):
    save = checkpoint.save_checkpoint
    def hasty(*arguments, disk, **options):
        disk.sync = lambda folder: None
        return save(*arguments, disk=disk, **options)
    monkeypatch.setattr(checkpoint, 'save_checkpoint', hasty)
    with found(): test_checkpoint.check_durable_order(tmp_path)


def forgetting(*names):
    "A restore that leaves these at their fresh values."
    restore = loop.restore
    def forgetful(trainer, say=print):
        fresh = {name: getattr(trainer, name) for name in names if name != 'ema'}
        there = restore(trainer, say)
        for name, value in fresh.items(): setattr(trainer, name, value)
        if 'ema' in names and there: trainer.ema.module.load_state_dict(trainer.plain.state_dict())
        return there
    return forgetful


@pytest.mark.parametrize('name', ['ema', 'totals'])
def test_forgotten_state(home, monkeypatch, name):
    monkeypatch.setattr(loop, 'restore', forgetting(name))
    with found(): test_faults.check_resumes(home, [3], epochs=2, batch_size=64)


def test_forgotten_seed_of_the_step(home, monkeypatch):
    "Dropout that goes on from wherever the process' generator stands."
    monkeypatch.setattr(loop.torch, 'manual_seed', lambda seed, real=loop.torch.manual_seed: real(seed) if seed == 0 else None)
    with found(): test_faults.check_resumes(home, [3], epochs=1, batch_size=64, warmup_epochs=0.0)


def test_forgotten_best(home, monkeypatch):
    monkeypatch.setattr(loop, 'restore', forgetting('best'))
    with found(): test_faults.check_best_is_kept(home, monkeypatch)


def test_same_order_in_every_epoch(monkeypatch):
    order = loop.epoch_order
    monkeypatch.setattr(loop, 'epoch_order', lambda labels, sampler, seed, epoch: order(labels, sampler, seed, 0))
    with found(): test_faults.check_order()


def test_same_draws_in_every_epoch(monkeypatch):
    draws = augment.draws
    monkeypatch.setattr(augment, 'draws', lambda seed, epoch, positions, count=24: draws(seed, 0, positions, count))
    with found(): test_augment.check_draws_vary()


def test_bad_images_let_through(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(scan, 'check_whole', lambda data, image: None)
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    with found(): test_data.check_faults(pack('tiny'), tmp_path)


@pytest.mark.parametrize('poison, what', [(test_faults.poison_loss, 'loss'), (test_faults.poison_gradient, 'gradient')])
def test_no_look_at_the_loss(home, monkeypatch, poison, what):
    monkeypatch.setattr(loop, 'check_finite', lambda *arguments: True)
    with found(): test_faults.check_diverged(test_faults.fresh_trainer(home), poison, what)


def test_no_lock(home, monkeypatch):
    @contextmanager
    def unlocked(folder, say=print): yield
    monkeypatch.setattr(loop, 'locked', unlocked)
    with found(): test_faults.check_training_locks(home)


def test_lock_that_holds_nobody_off(tmp_path, monkeypatch):
    monkeypatch.setattr('fcntl.flock', lambda file, how: None)
    with found(): test_faults.check_lock(tmp_path/'run')


def test_missing_state_accepted(trained, tmp_path, monkeypatch):
    "A restore that goes on with the fresh value of what a checkpoint lacks."
    monkeypatch.setattr(loop, 'check_same_run', lambda trainer, step, values: [values.setdefault(name, getattr(trainer, name)) for name in loop.COUNTERS])
    with found(): test_checkpoint.check_missing_value(trained, tmp_path, 'totals')


def test_unknown_setting_accepted(home, command, monkeypatch):
    monkeypatch.setattr(launch, 'make_config', lambda **settings: make_config(**{name: value for name, value in settings.items() if hasattr(Config, name)}))
    monkeypatch.setattr(loop, 'train', lambda *arguments, **options: None)  # which would take its time
    with found(): test_faults.check_refused(home, command, ['epoch=3'], 'unknown setting')


@pytest.mark.parametrize('fault', ['exit code 0', 'nothing saved'])
def test_stopped_in_the_wrong_way(home, command, monkeypatch, fault):
    if fault == 'exit code 0': monkeypatch.setattr(Stopped, 'exit_code', 0)
    else: monkeypatch.setattr(loop, 'save', lambda trainer, disk=None: None)
    with found(): test_faults.check_told_to_stop(home, command, monkeypatch)


def test_committed_step_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'is_whole', lambda place: False)
    with found(): test_checkpoint.check_saving_over_what_is_loaded(tmp_path)


def test_unchecked_weights(home, command, monkeypatch):
    "A run whose best weights are taken as they lie there."
    monkeypatch.setattr(loop, 'chosen_weights', lambda folder: folder/'best.safetensors')
    with found(): test_faults.check_weights_of_the_end(home, command, monkeypatch)
