"What the benchmark scripts share: the machine in words, and rows that replace those of the same key."
import os
import platform
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).resolve().parent/'results'


def machine():
    "The machine in a few words, with the instructions that torch uses."
    import torch
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    names = [line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')] if Path('/proc/cpuinfo').exists() else []
    return f'{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores'


def write_rows(file, rows, key):
    "Put rows into results/<file>, in place of older ones with the same values in the columns `key`."
    path, new = RESULTS/file, pd.DataFrame(rows)
    if path.exists():
        old = pd.read_csv(path)
        stale = pd.MultiIndex.from_frame(old[key].astype(str)).isin(pd.MultiIndex.from_frame(new[key].astype(str)))
        new = pd.concat([old[~stale], new], ignore_index=True)
    RESULTS.mkdir(exist_ok=True)
    new.sort_values(key, kind='stable').to_csv(path, index=False)
    return new


# The traffic signs as they were trained before their boxes were used: pictures whole, RepVGG's branches. Rows that rest on these settings
# (accuracy.py gtsrb-whole, repopt.py accuracy, int8.py of their runs) keep them.
WHOLE_SIGNS = {'box': [], 'model': 'repvgg_m0', 'scales': '', 'input_size': 80, 'store_size': 80, 'epochs': 30, 'precision': 'bf16',
               'augment_options': {'scale': [0.7, 1.2], 'ratio': [0.85, 1.18], 'rotate': 10, 'shear': 8, 'hflip': 0, 'brightness': 0.5, 'contrast': 0.4, 'saturation': 0.3, 'erase': 0}}
