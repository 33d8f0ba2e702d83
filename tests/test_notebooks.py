"Every library notebook runs from top to bottom, the longer ones with `make recipes` (`#| slow` and `#| gpu` cells only if --nb-flags names them), and all is in sync."
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_notebook

NOTEBOOKS = sorted(Path(p).resolve().relative_to(ROOT).as_posix() for p in nbglob(ROOT/'nbs'))
LIBRARY = [n for n in NOTEBOOKS if n.count('/') > 1 or n == 'nbs/core.ipynb']
LONG = [f'nbs/{name}.ipynb' for name in ('analysis/attention', 'analysis/comparison', 'analysis/explorer', 'analysis/gradcam', 'analysis/noise', 'challenge/ladder', 'ensemble/inference', 'ensemble/pseudo',
        'hardware/export', 'hardware/latency', 'hardware/memory', 'hardware/quantize', 'models/repopt', 'training/evaluate', 'training/folds', 'training/pretrain')]  # with the recipes: each took more than twenty seconds on a slow machine


def test_notebooks_are_found():
    assert {'nbs/index.ipynb', 'nbs/train.ipynb'} <= set(NOTEBOOKS) and {'nbs/training/loop.ipynb', *LONG} <= set(LIBRARY)


@pytest.mark.parametrize('notebook', [pytest.param(n, marks=pytest.mark.recipes if n in LONG else ()) for n in LIBRARY])
def test_notebook(notebook, request, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('AAAI_LT_HOME', str(ROOT))  # whatever a notebook that failed has left there
    ok, _ = run_notebook(ROOT/notebook, skip_flags=get_config().tst_flags.split(), force_flags=request.config.getoption('--nb-flags').split())
    assert ok, f'{notebook} failed; its traceback is in the captured stderr'


def test_notebooks_package_and_readme_are_in_sync():
    done = subprocess.run([ROOT/'tools'/'sync'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_parameters_of_the_run_notebook_are_the_settings():
    "Every field of Config, in its order, with its default: papermill then knows them all."
    import ast
    import dataclasses
    import json
    from aaai_lt.training.config import Config
    cells = json.loads((ROOT/'nbs'/'train.ipynb').read_text())['cells']
    cell = next(c for c in cells if 'parameters' in c['metadata'].get('tags', []))
    text = ''.join(cell['source'])
    assert text.startswith('# Parameters')
    assigned = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(text).body}
    assert list(assigned.items()) == list(dataclasses.asdict(Config()).items())
