"""How long the analysis takes on a generated table of a million images in 1,000 classes, and on a million rows of 60 labels; rows to results/analysis.csv.

  python benchmarks/analysis.py [--rows 1000000] [--rounds 3]

Plots are timed with the drawing of their pixels. The pixel statistics are timed on a store in memory, and given as images a second."""
import argparse
import time
from pathlib import Path

import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from common import machine, write_rows

from aaai_lt.analysis import copies, counts, drift, explorer, labels, pixels, resolution
from aaai_lt.data.longtail import tail_counts
from aaai_lt.data.pixels import PixelStore
from aaai_lt.data.table import ImageTable


def make_table(rows, classes=1000):
    "A table as a scan leaves it: a Pareto tail, sizes around 150 pixels, splits by chance, one file in a hundred a copy."
    random = np.random.default_rng(0)
    share = tail_counts(rows, classes, 500, 'pareto').astype(float)
    short = np.exp(random.normal(5, 0.5, rows))
    content = np.where(random.random(rows) < 0.01, random.integers(0, rows, rows), np.arange(rows))
    frame = pd.DataFrame({'path': np.char.add('i', np.arange(rows).astype(str)).astype(object), 'archive': '', 'label': random.choice(classes, rows, p=share / share.sum()),
        'split': random.choice(['train', 'val', 'test'], rows, p=[0.8, 0.1, 0.1]), 'width': (short * random.choice([1, 1.5], rows)).astype(int), 'height': short.astype(int), 'sha1': np.char.mod('%040x', content).astype(object)})
    return ImageTable(frame, tuple(f'class {i}' for i in range(classes)), root=Path('.'))


def make_labels(rows, number=60):
    "Independent labels of falling prevalence."
    random = np.random.default_rng(0)
    return pd.DataFrame((random.random((rows, number), dtype='float32') < np.geomspace(0.6, 0.01, number, dtype='float32')).astype('int8'), columns=[f'label {i}' for i in range(number)])


def drawn(plot, *arguments):
    "A plot, with its pixels."
    result = plot(*arguments)
    getattr(result, 'figure', result).canvas.draw()
    plt.close('all')


def jobs(rows):
    "What is timed: name -> function."
    table, matrix = make_table(rows), make_labels(rows)
    frame, class_counts = table.frame, table.counts()
    by_split, images = drift.split_counts(frame.split, frame.label, table.classes)
    found, both = drift.drift_table(by_split, images), labels.cooccurrence(matrix)
    answers = pd.DataFrame({'path': frame.path, 'true': frame.label, 'said': frame.label.to_numpy()[::-1], 'p_true': 0.3, 'p_said': 0.6}).assign(correct=lambda a: a.true == a.said)
    return {
        'counts: describe, table, plot': lambda: (counts.describe_counts(table.counts()), counts.counts_table(class_counts, table.classes), drawn(counts.plot_counts, class_counts)),
        'resolution: figures': lambda: resolution.describe_resolution(frame.width, frame.height, 224),
        'resolution: density with margins': lambda: drawn(resolution.plot_resolution, frame.width, frame.height, 224),
        'resolution: shapes and enlarged share': lambda: (drawn(resolution.plot_aspect, frame.width, frame.height), drawn(resolution.plot_upsampled, frame.width, frame.height, 224)),
        'drift: counts, tests': lambda: drift.drift_table(*drift.split_counts(frame.split, frame.label, table.classes)),
        'drift: plot': lambda: drawn(drift.plot_drift, found, images),
        'copies: groups': lambda: copies.copy_groups(table),
        'copies: contradictions': lambda: copies.conflicting_copies(table),
        'labels: figures': lambda: labels.describe_labels(matrix),
        'labels: co-occurrence': lambda: labels.cooccurrence(matrix),
        'labels: correlation, plot': lambda: drawn(labels.plot_correlation, labels.correlation(both, rows)),
        'explorer: a filter and its classes': lambda: explorer.class_rows(table, explorer.chosen_rows(table, 'width > 100'), answers, 'lowest accuracy'),
    }


def pixel_rate(images=20_000, size=64):
    "Seconds for the statistics of so many images."
    store = PixelStore(Path('.'), np.random.default_rng(0).integers(0, 255, (images, size, size, 3), dtype='uint8'), {}, {})
    began = time.perf_counter()
    pixels.image_statistics(store, np.arange(images))
    return time.perf_counter() - began


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=1_000_000)
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    common, rows = {'rounds': args.rounds, 'threads': torch.get_num_threads(), 'machine': machine()}, []
    for name, job in jobs(args.rows).items():
        spent, cpu = [], []
        for _ in range(args.rounds):
            began, busy = time.perf_counter(), time.process_time()
            job()
            spent.append(time.perf_counter() - began), cpu.append(time.process_time() - busy)
        rows.append({'what': name, 'rows': args.rows, 'seconds': round(float(np.median(spent)), 2), 'cpu_seconds': round(float(np.median(cpu)), 2)} | common)
        print(f'{name}: {rows[-1]["seconds"]} s, {rows[-1]["cpu_seconds"]} s of CPU')
    spent = sorted(pixel_rate() for _ in range(args.rounds))[args.rounds // 2]
    rows.append({'what': 'pixels: statistics of images of 64 px', 'rows': 20_000, 'seconds': round(spent, 2), 'images_per_s': round(20_000 / spent)} | common)
    print(f'pixels: {20_000 / spent:,.0f} images/s of 64 px')
    write_rows('analysis.csv', rows, ['what', 'rows'])
