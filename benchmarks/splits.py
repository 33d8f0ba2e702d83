"""How far validation is from training, class by class: one random split, the luckiest of 100 seeds (as the AICOSS winners chose), iterative stratification; rows to results/splits.csv.

  python benchmarks/splits.py path/to/mlrsnet-labels

The labels of MLRSNet: labels.npz with y_packed (109,161 images, 60 classes).
"""
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from common import machine, write_rows

from aaai_lt.data.split import search_seeds, share_difference, stratify


def main(folder, fraction=0.1, seeds=10):
    matrix = np.unpackbits(np.load(Path(folder)/'labels.npz')['y_packed'], axis=1, count=60)
    paths, began = [f'{i:06}' for i in range(len(matrix))], time.process_time()
    found, searched = search_seeds(matrix, fraction), time.process_time() - began
    points = np.stack([share_difference(matrix, stratify(matrix, paths, fraction, seed)) for seed in range(seeds)])
    stratified = pd.DataFrame({'mean': np.abs(points.mean(1)), 'deviation': points.std(1), 'largest': np.abs(points).max(1)}).sort_values('largest')
    by_width = found.sort_values('deviation')
    ways = {'random, widest of 100': by_width.iloc[-1], 'random, middle of 100': by_width.iloc[50], 'chosen of 100': found.iloc[0],
            f'stratified, worst of {seeds}': stratified.iloc[-1], f'stratified, middle of {seeds}': stratified.iloc[seeds // 2]}
    each = (time.process_time() - began - searched) / seeds
    rows = [{'way': way, **row[['mean', 'deviation', 'largest']].astype(float).round(5), 'seconds': round(each if 'strat' in way else searched, 2), 'machine': machine()} for way, row in ways.items()]
    print(write_rows('splits.csv', rows, ['way', 'machine']).to_string(index=False))


if __name__ == '__main__': main(*sys.argv[1:2])
