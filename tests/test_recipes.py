"Every recipe that ships is read by the settings' check, and runs with quick=True; the mosaics at full length."
import pytest
from aaai_lt.challenge.ladder import ladder_settings
from aaai_lt.core import packaged, recipe
from aaai_lt.training.config import make_config

LADDERS = [name for name in packaged('recipes') if 'members' in recipe(name)]  # for challenge.ipynb; test_ladder.py runs them
RECIPES = [name for name in packaged('recipes') if name not in LADDERS]


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_is_valid(name): make_config(**recipe(name))


@pytest.mark.parametrize('name', LADDERS)
def test_ladder_is_valid(name):
    ladder_settings(**recipe(name) | {'data': 'digits'})
    ladder_settings(**recipe(name) | {'quick': True})


@pytest.mark.recipes
@pytest.mark.parametrize('name', RECIPES)
def test_quick_recipe(name, home):
    from test_train import papermill, report
    from conftest import ROOT
    code, output = papermill(home, 'train.ipynb', '-f', str(ROOT/'nbs'/'recipes'/f'{name}.yaml'), '-p', 'quick', 'True', '-p', 'name', 'q')
    assert code == 0, output[-3000:]
    assert 'quick run' in report(home)


@pytest.mark.recipes
def test_mosaics_reach_their_goal(home):
    "The recipe for several labels an image, in about a minute and a half of one core: 0.97 mAP on canvases of digits that training never saw."
    from aaai_lt.training.loop import train
    run = train(make_config(**recipe('digits_mosaic') | {'device': 'cpu', 'workers': 1}), say=lambda text: None)
    assert run.summary['val']['mAP'] >= 0.97 and run.summary['test']['mAP'] >= 0.97
