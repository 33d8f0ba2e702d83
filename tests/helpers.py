"What several test files use: child processes that can really be killed, little image sets, and the comparison of two runs."
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

# Importing torch and timm takes seconds, a fork of a process that has them milliseconds. The children are real processes.
CHILDREN = multiprocessing.get_context('forkserver')
CHILDREN.set_forkserver_preload(['aaai_lt.challenge.ladder', 'aaai_lt.training.launch', 'aaai_lt.training.loop', 'accelerate', 'timm.optim', 'timm.scheduler', 'timm.utils', 'sklearn.datasets', 'sklearn.model_selection'])


def in_child(output, home, cwd, function, arguments):
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1), os.dup2(handle, 2)
    os.environ['AAAI_LT_HOME'] = str(home)
    os.chdir(cwd or home)
    sys.exit(function(*arguments))


class Child:
    "A function that runs in a process of its own; what it returns is the exit code, what it prints is in `text()`."
    def __init__(self, home, function, *arguments, cwd=None):
        self.output = Path(home)/f'output-{time.monotonic_ns()}.txt'
        self.process = CHILDREN.Process(target=in_child, args=(self.output, home, cwd, function, arguments), daemon=True)
        self.process.start()

    @property
    def pid(self): return self.process.pid
    @property
    def alive(self): return self.process.is_alive()
    def text(self): return self.output.read_text() if self.output.exists() else ''

    def wait(self):
        "The exit code, negative for a signal."
        self.process.join()
        return self.process.exitcode

    def kill(self):
        self.process.kill()
        return self.wait()

    def wait_for(self, condition):
        "Until the condition holds or the child has ended."
        while self.alive and not condition(): time.sleep(0.01)


def launched(*words):
    "What `python -m aaai_lt.training.launch` does with these words."
    from aaai_lt.training.launch import main
    return main(list(words))


def launched_and_told(operation, place, *words):
    "The same, told twice to stop in the middle of a save, by an operation of the disk on that place."
    import signal
    from aaai_lt.core import Disk
    from aaai_lt.training import checkpoint
    class Told(Disk):
        def tell(self, path):
            if place in str(path): os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getpid(), signal.SIGTERM)
        def write(self, path, data):
            if operation == 'write': self.tell(path)
            super().write(path, data)
        def rename(self, old, new):
            if operation == 'rename': self.tell(new)
            super().rename(old, new)
    checkpoint.DISK = Told()
    return launched(*words)


def launched_slowly(seconds, *words):
    "The same, with so many seconds for each image that is decoded."
    from aaai_lt.data import pixels
    decode = pixels.to_square
    pixels.to_square = lambda *arguments: (time.sleep(seconds), decode(*arguments))[1]
    return launched(*words)


def noise(path, seed, size=(40, 30)):
    "An image that no other seed gives."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype='uint8')
    Image.fromarray(pixels).save(path, **({'quality': 90} if path.suffix == '.jpg' else {}))
    return path


def image_folder(folder, counts, size=(40, 30), suffix='.png'):
    "A folder for each class with so many different images: counts is {class name: images}."
    for c, (name, count) in enumerate(counts.items()):
        for i in range(count): noise(folder/name/f'{i:03}{suffix}', [c, i], size)
    return folder


def content(folder):
    "Every file under a folder, with its bytes: to show that nothing was touched."
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def timeless(values):
    "A checkpoint's values without the seconds, which no two runs share, and the hash of the settings, in which a stage names the one before it."
    return values | {'seconds': None, 'config': None, 'history': [{k: v for k, v in row.items() if k != 'seconds'} for row in values['history']]}


def check_same_run(one, two):
    "Two finished runs have the same weights, optimizer, metrics and predictions, bit for bit; only the seconds differ."
    import torch
    from aaai_lt.training.checkpoint import load_checkpoint
    from aaai_lt.training.run import Run
    one, two = Run(one), Run(two)
    assert one.finished and two.finished
    assert (one.folder/'best.safetensors').read_bytes() == (two.folder/'best.safetensors').read_bytes(), 'best.safetensors differ'
    assert one.history.drop(columns='seconds').equals(two.history.drop(columns='seconds')), 'history.csv differ'
    (step, tensors, values), (other_step, other_tensors, other_values) = (load_checkpoint(run.folder/'checkpoint') for run in (one, two))
    assert step == other_step and tensors.keys() == other_tensors.keys()
    different = [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])]
    assert not different, f'tensors of the last checkpoint differ: {different}'
    assert timeless(values) == timeless(other_values)
    for file in ('per_class.csv', 'data.json', 'problems.csv'): assert (one.folder/file).read_bytes() == (two.folder/file).read_bytes(), f'{file} differ'
    splits = sorted(p.name for p in (one.folder/'predictions').iterdir())
    assert splits == sorted(p.name for p in (two.folder/'predictions').iterdir()) and splits
    for split in splits:
        for file in ('scores.npy', 'items.csv', 'meta.json'): assert (one.folder/'predictions'/split/file).read_bytes() == (two.folder/'predictions'/split/file).read_bytes(), f'{split}/{file} differ'
