"Shared by all tests: where the image packs lie, a home of its own for each test, and the slow marker."
import os
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # before torch is imported: equality bit for bit needs equal thread counts, here and in child processes

import pytest
from hypothesis import settings

settings.register_profile('steady', deadline=None, derandomize=True, max_examples=60, database=None)  # no clock, no luck, nothing left behind: the same examples every time
settings.load_profile('steady')

ROOT = Path(__file__).resolve().parent.parent
TEST_DATA = Path(os.environ.get('AAAI_LT_TEST_DATA', ROOT.parent/'shared'/'data')).resolve()


LONG = ('test_train.py', 'test_evaluate.py', 'test_compare.py', 'test_explorer.py')


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run all tests, also those marked slow: hundreds of kills, full-length runs')
    parser.addoption('--recipes', action='store_true', help='run every quick recipe and the other long tests that every change must pass, and nothing else')
    parser.addoption('--nb-flags', default='', help='nbdev test flags to run too, such as "slow gpu"')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    slow, recipes = config.getoption('--slow'), config.getoption('--recipes')
    chosen, left = [], []
    for item in items:
        fits = (slow or 'slow' not in item.keywords) and ('recipes' in item.keywords if recipes else slow or 'recipes' not in item.keywords)
        (chosen if fits else left).append(item)
    # Long files first, so that two workers end together; notebooks last, since they register their models over the package's in the worker's process.
    items[:] = sorted(chosen, key=lambda item: (item.path.name == 'test_notebooks.py', item.path.name not in LONG))
    config.hook.pytest_deselected(items=left)
    for item in items:  # a file's tests stay on one worker and share what they trained; notebooks, recipes and the long kills share nothing
        if item.path.name != 'test_notebooks.py' and not {'slow', 'recipes'} & set(item.keywords): item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A project root of the test's own, so that no test sees another's outputs or stores."
    monkeypatch.setenv('AAAI_LT_HOME', str(tmp_path))
    return tmp_path


@pytest.fixture(scope='session')
def pack():
    "A folder of the image packs; the test is skipped where they are not there."
    def find(name):
        if not (TEST_DATA/name).is_dir(): pytest.skip(f'the image pack {name} is not under {TEST_DATA} (set AAAI_LT_TEST_DATA)')
        return TEST_DATA/name
    return find
