"""Training throughput in one process, interleaved, so that the ratios hold on a noisy machine; rows to results/throughput.csv.

  A      the training step on one batch of bytes that is in memory already, no augmentation
  B      A with the augmentation on the device
  C      the whole loop: its own order, batches from the pixel store, augmentation, checks (second epoch)
  C1     the first epoch: every file read, looked at and decoded, the store written, then the loop
  timm   timm's own pipeline (ImageFolder, its loader with two workers) before the same step

The augmentation is the same for B, C and timm: random resized crop, horizontal flip, colour jitter, of the same parameters.

  python benchmarks/throughput.py --data ../shared/data/gtsrb [--rounds 5]"""
import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import machine, write_rows

from aaai_lt.data.augment import augment_batch, draws, eval_batch
from aaai_lt.data.table import read_bytes, read_images
from aaai_lt.training.config import make_config
from aaai_lt.training.loop import epoch_order, epoch_windows, load_batch, make_trainer, train_step
from aaai_lt.training.prepare import prepare

SCALE, RATIO, JITTER = [0.35, 1.0], [0.75, 1.333], 0.4
AUGMENT = {'scale': SCALE, 'ratio': RATIO, 'hflip': 0.5, 'brightness': JITTER, 'contrast': JITTER, 'saturation': JITTER}
SETTINGS = {  # model, input size, batch, images
    'small': ('repvgg_n1', 64, 128, 4096),
    'middle': ('repvgg_a0', 112, 64, 1024),
}


def write_folder(data, folder, count):
    "A class-per-folder copy of the first images of every class, which both pipelines then read."
    table = read_images(data, "split == 'train'")
    frame = table.frame.groupby('label').head(-(-count // len(table.classes)) * 2).head(count)
    for row in frame.itertuples():
        path = folder/f'{row.label:03}'/Path(row.path).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_bytes(table.root, row.archive, row.path))
    return len(frame)


def step(trainer, images, labels):
    "Forward, loss, backward, optimizer."
    with trainer.accelerator.autocast(): loss = trainer.loss(trainer.model(images.contiguous(memory_format=trainer.layout)), labels)
    trainer.accelerator.backward(loss)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss.item()


def timm_batches(folder, size, batch):
    "timm's dataset and loader, without end."
    from timm.data import create_dataset, create_loader
    dataset = create_dataset('', root=str(folder), is_training=True)
    loader = create_loader(dataset, (3, size, size), batch, is_training=True, use_prefetcher=False, scale=SCALE, ratio=RATIO, hflip=0.5, color_jitter=JITTER,
                           auto_augment=None, re_prob=0.0, interpolation='bilinear', num_workers=2, persistent_workers=True, device=torch.device('cpu'))
    while True: yield from loader


def measure(name, data, rounds, steps):
    "Rates of one setting, a row for each kind and round."
    model, size, batch, count = SETTINGS[name]
    tmp = Path(tempfile.mkdtemp())
    os.environ['AAAI_LT_HOME'] = str(tmp/'home')
    count = write_folder(data, tmp/'images', count)
    config = make_config(data=str(tmp/'images'), model=model, input_size=size, batch_size=batch, augment='none', augment_options=AUGMENT, val_fraction=0.0, select='last', loss='cross_entropy', epochs=2)
    began = time.perf_counter()
    ready = prepare(config, progress=False)
    trainer = make_trainer(config, ready, tmp)
    trainer.model.train()
    windows = epoch_windows(epoch_order(ready.splits['train'].labels, 'shuffle', 0, 0), batch, 1)
    for window in windows: train_step(trainer, window)
    first_epoch = count / (time.perf_counter() - began)
    pixels, labels = load_batch(trainer, ready.splits['train'], windows[0][0][1])
    other, position = timm_batches(tmp/'images', size, batch), [0]

    def a(): step(trainer, eval_batch(pixels, size, trainer.mean, trainer.std), labels)
    def b():
        u = draws(0, position[0], np.arange(len(labels))).to(pixels.device)
        step(trainer, *augment_batch(pixels, labels, u, trainer.options, size, trainer.mean, trainer.std, len(ready.class_counts)))
    def c():
        trainer.step = position[0] % len(windows)  # the schedule stays inside the run
        train_step(trainer, windows[position[0] % len(windows)])
    def d():
        images, targets = next(other)
        step(trainer, images.to(pixels.device), targets.to(pixels.device))

    def seconds_of(run):
        began = time.perf_counter()
        run()
        position[0] += 1
        return time.perf_counter() - began

    kinds, rates = {'A': a, 'B': b, 'C': c, 'timm': d}, {}
    for kind in kinds.values(): kind(); kind()
    for round_ in range(rounds):
        turns = [{kind: seconds_of(kinds[kind]) for kind in 'ABC'} for _ in range(steps)]  # in turns, so that a machine that slows down slows all three
        for _ in range(6): d()  # the queue of timm's workers, filled while others were measured, must not count as its speed
        for turn in turns: turn['timm'] = seconds_of(d)
        for kind in kinds: rates.setdefault(kind, []).append(steps * batch / sum(turn[kind] for turn in turns))
        time.sleep(2)  # until the workers have filled their queue and rest
    rates['C1'] = [first_epoch]
    other.close()
    shutil.rmtree(tmp)
    common = {'setting': name, 'model': model, 'input_size': size, 'batch': batch, 'images': count, 'steps': steps, 'threads': torch.get_num_threads(), 'machine': machine()}
    rows = [{'setting': name, 'kind': kind, 'images_per_s': round(float(np.median(r)), 1), 'lowest': round(min(r), 1), 'highest': round(max(r), 1), 'rounds': len(r),
             'of_A': round(float(np.median(np.array(r) / (np.array(rates['A']) if len(r) == rounds else np.median(rates['A'])))), 3)} | common for kind, r in rates.items()]
    def ratio(x, y): return np.array(rates[x]) / np.array(rates[y])
    for x, y in (('B', 'A'), ('C', 'B'), ('C', 'timm'), ('timm', 'A')):
        r = ratio(x, y)
        print(f'{name}: {x}/{y} median {np.median(r):.3f} (of {len(r)} rounds: {r.min():.3f} to {r.max():.3f})')
    return rows


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, help='a folder of images, or a pack with labels.csv')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--settings', nargs='*', default=list(SETTINGS))
    args = parser.parse_args()
    rows = [row for name in args.settings for row in measure(name, args.data, args.rounds, {'small': 12, 'middle': 6}[name])]
    print(write_rows('throughput.csv', rows, ['setting', 'kind']).drop(columns='machine').to_string())
