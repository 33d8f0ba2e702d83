"""What an ensemble costs when its members run together: at most their own compute and one decoding pass; beside timm's loader, one member after the other. Rows to results/ensemble.csv.

  python benchmarks/ensemble.py run-1 run-2 run-3 [--split val] [--rounds 3]"""
import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from common import machine, write_rows
from timm.data import create_loader
from torch.utils.data import Dataset

from aaai_lt.data.decode import decode
from aaai_lt.data.pixels import build_store
from aaai_lt.data.table import read_bytes
from aaai_lt.ensemble import inference
from aaai_lt.models.zoo import memory_format
from aaai_lt.training.evaluate import predict_images, run_data, run_model
from aaai_lt.training.run import load_run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('runs', nargs='+')
parser.add_argument('--split', default='val')
parser.add_argument('--rounds', type=int, default=3)
parser.add_argument('--workers', type=int, default=0)
args = parser.parse_args()

runs = [load_run(name) for name in args.runs]
data = run_data(runs[0], progress=False)
part = data.table.with_frame(data.table.split(args.split))  # only what is predicted is decoded
batch = 2 * runs[0].config.batch_size


class Files(Dataset):
    "A split's files, decoded each time they are asked for, as timm's loader wants them."
    transform = None
    def __len__(self): return len(part)
    def __getitem__(self, i):
        row = part.frame.iloc[i]
        return self.transform(decode(read_bytes(part.root, row.archive, row.path), runs[0].config.max_pixels)), int(row.label)


@torch.no_grad()
def with_timm():
    "One member after the other, each with timm's loader."
    for run in runs:
        model, size = run_model(run), run.data['input_size']
        layout = memory_format(model, 'cpu')
        model = model.to(memory_format=layout)
        loader = create_loader(Files(), (3, size, size), batch, is_training=False, use_prefetcher=False, interpolation='bicubic', mean=run.data['mean'], std=run.data['std'], num_workers=args.workers, crop_pct=1.0, crop_mode='squash', device=torch.device('cpu'))
        for images, _ in loader: model(images.contiguous(memory_format=layout))


def together(cold):
    "All members in one pass; from files, or from the store of an earlier pass."
    folder = Path(tempfile.mkdtemp()) if cold else warm
    def stored(table, size, how, most, _, *rest): return build_store(table, size, how, most, folder, *rest)
    with patch.object(inference, 'build_store', stored):
        base = inference.in_view(data_of(part), runs[0])
        views = {inference.view_of(run): base if inference.view_of(run) == inference.view_of(runs[0]) else inference.in_view(base, run) for run in runs}
        inference.predict_members(runs, args.split, device='cpu', views=views, batch_size=batch)
    if cold: shutil.rmtree(folder)


def data_of(table):
    "The data of the split alone."
    from dataclasses import replace
    return replace(data, table=table, splits={args.split: data.splits[args.split]})


def compute(run):
    "One member's own work: its weights read, decoded batches resized, normalised and answered."
    predict_images(run_model(run), data, data.splits[args.split], 'none', batch, 'cpu')


def decoding():
    folder = Path(tempfile.mkdtemp())
    for size, how in {inference.view_of(run)[:2] for run in runs}: build_store(part, size, how, runs[0].config.max_pixels, folder, progress=False)
    shutil.rmtree(folder)


def timed(work, *arguments):
    "Wall and user seconds; the system's time goes to page faults of the allocator, which depend on what ran before."
    wall, user = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    work(*arguments)
    return time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF).ru_utime - user


warm = Path(tempfile.mkdtemp())
together(False)  # fills the store, and warms all up
found = {}
for _ in range(args.rounds):  # all ways in turn, so that a slow minute hits all of them
    for kind, work, arguments in (('together, from files', together, (True,)), ('together, from the store', together, (False,)), ('one by one, timm', with_timm, ()), ('decoding', decoding, ()), *((f'compute of {run.name}', compute, (run,)) for run in runs)):
        found.setdefault(kind, []).append(timed(work, *arguments))
shutil.rmtree(warm)
best = {kind: np.min(times, 0) for kind, times in found.items()}
bound = sum(v for kind, v in best.items() if kind == 'decoding' or kind.startswith('compute'))
rows = [{'members': len(runs), 'data': data.table.name, 'split': args.split, 'images': len(part), 'kind': kind, 'seconds': wall, 'user_seconds': user, 'of_timm': user / best['one by one, timm'][1], 'of_bound': user / bound[1], 'rounds': args.rounds, 'workers': args.workers, 'threads': torch.get_num_threads(), 'machine': machine()}
        for kind, (wall, user) in [*best.items(), ('bound: compute and one decoding', bound)]]
table = write_rows('ensemble.csv', [{k: round(float(v), 4) if isinstance(v, (float, np.floating)) else v for k, v in row.items()} for row in rows], ['data', 'split', 'members', 'images', 'kind'])
print(table[['kind', 'images', 'seconds', 'user_seconds', 'of_timm', 'of_bound']].to_string(index=False))
