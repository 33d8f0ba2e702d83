"The house stands on its floors: each room imports from rooms below it, and importing the package costs nothing."
import ast
import json
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = [{'core'}, {'data'}, {'losses', 'models'}, {'training'}, {'analysis', 'ensemble', 'hardware'}, {'challenge'}]
LIBRARY = ROOT/'aaai_lt'
MODULES = sorted(p for p in LIBRARY.rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))


def floor(room): return next((i for i, rooms in enumerate(FLOORS) if room in rooms), None)


def imported(file, source):
    "The modules of the package that a file imports anywhere, also inside functions: as paths without `aaai_lt`."
    package = file.relative_to(LIBRARY.parent).with_suffix('').parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names = [alias.name.split('.') for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*(package[:len(package) - node.level + 1] if node.level else ()), *(node.module or '').split('.')]
            base = [part for part in base if part]
            names = [base + [alias.name] for alias in node.names] if len(base) == 1 else [base]  # from aaai_lt import core
        else: continue
        yield from (name[1:] for name in names if name[0] == 'aaai_lt' and len(name) > 1)


def check_floors(file, source):
    room = file.relative_to(LIBRARY).parts[0].removesuffix('.py')
    assert floor(room) is not None, f'{file} is in no room of the house'
    for target in imported(file, source):
        there = floor(target[0])
        assert there is not None, f'{file.name} imports {".".join(target)}, which is no room: run notebooks are not imported'
        assert target[0] == room or there < floor(room), f'{file.name} ({room}) imports {".".join(target)}, which is not below it'


@pytest.mark.parametrize('file', MODULES, ids=lambda p: p.relative_to(LIBRARY).as_posix())
def test_floors(file): check_floors(file, file.read_text(encoding='utf-8'))


@pytest.mark.parametrize('room, source', [
    ('data', 'from ..training.config import Config'), ('data', 'from aaai_lt.models import zoo'), ('losses', 'def f():\n    from ..models.zoo import make_model'), ('core', 'import aaai_lt.data.table'),
    ('training', 'from ..analysis import counts'), ('hardware', 'import aaai_lt.ensemble.soup'), ('analysis', 'from aaai_lt import challenge'), ('training', 'from .. import train'), ('data', 'from ..analyse import table'),
])
def test_wrong_imports_are_seen(room, source):
    with pytest.raises(AssertionError, match='imports'): check_floors(LIBRARY/'core.py' if room == 'core' else LIBRARY/room/'some.py', source)


def test_right_imports_are_allowed():
    check_floors(LIBRARY/'training'/'some.py', 'import json\nfrom . import run\nfrom .config import Config\nfrom ..core import root\nfrom aaai_lt.models.zoo import make_model\nfrom aaai_lt import data')


def test_importing_costs_nothing():
    "`import aaai_lt` and its core bring none of the heavy packages, and say nothing."
    script = 'import sys, json, aaai_lt, aaai_lt.core; json.dump(sorted({name.partition(".")[0] for name in sys.modules}), sys.stderr)'
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == ''
    assert not {'torch', 'torchvision', 'timm', 'accelerate', 'pandas', 'numpy', 'matplotlib', 'seaborn', 'sklearn', 'PIL', 'yaml', 'IPython', 'onnx', 'onnxruntime'} & set(json.loads(done.stderr))
