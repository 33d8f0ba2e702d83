"Two processes (gloo) share a run: the same gradients as one, one writer, and both stop together."
import socket

import numpy as np
import pytest
from helpers import Child, image_folder
from safetensors.numpy import load_file

from aaai_lt.training.run import Run

# A network without batch statistics and plain SGD: then two half batches are exactly one whole batch, but for rounding.
SETTINGS = ['model=convnext_atto', 'input_size=32', 'resize=squash', 'epochs=2', 'batch_size=8', 'lr=0.05', 'optimizer=sgd', 'warmup_epochs=0', 'weight_decay=0.0', 'device=cpu', 'workers=1']


def in_group(rank, world, port, words, main=None):
    "One process of a group, as torchrun and accelerate launch start it."
    import os

    from aaai_lt.training import launch
    os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(world), 'LOCAL_WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'ACCELERATE_USE_CPU': 'true'}
    return (main or launch.main)(words)


def together(home, *words, world=2, main=None):
    "Exit codes and outputs of a group."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    children = [Child(home, in_group, rank, world, port, list(words), main) for rank in range(world)]
    return [c.wait() for c in children], [c.text() for c in children]


@pytest.fixture
def images(home): return image_folder(home/'images', {'a': 13, 'b': 9, 'c': 5})


@pytest.mark.parametrize('loss', ['cross_entropy', 'eqlv2'])
def test_two_processes_train_as_one(home, images, loss):
    for name, world in (('one', 1), ('two', 2)):
        codes, texts = together(home, f'data={images}', f'loss={loss}', f'name={name}', 'val_fraction=0.3', *SETTINGS, world=world)
        assert codes == [0] * world, texts
    one, two = (Run(home/'outputs'/name) for name in ('one', 'two'))
    assert texts[0].count('finished:') == 1 and not texts[1].count('epoch')  # one of them speaks
    np.testing.assert_allclose(two.history.train_loss, one.history.train_loss, rtol=2e-3)
    np.testing.assert_allclose(two.history.val_loss, one.history.val_loss, rtol=2e-3)
    a, b = one.predictions('val'), two.predictions('val')
    assert list(a.ids) == list(b.ids)
    np.testing.assert_allclose(a.scores, b.scores, atol=2e-2)
    before, after = (load_file(run.folder/'best.safetensors') for run in (one, two))
    assert max(np.abs(before[k] - after[k]).max() for k in before if before[k].dtype.kind == 'f') < 2e-3


def test_two_processes_continue(home, images):
    settings = [f'data={images}', 'name=run', 'val_fraction=0.3', *SETTINGS]
    assert together(home, *settings)[0] == [0, 0]
    codes, texts = together(home, *settings)
    assert codes == [0, 0] and 'is finished' in texts[0]


def test_batch_too_small_for_the_processes(home, images):
    codes, texts = together(home, f'data={images}', 'val_fraction=0.3', *SETTINGS, 'batch_size=1')
    assert codes == [2, 2] and 'without an image' in texts[0], texts
