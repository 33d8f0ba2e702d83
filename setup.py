"Package metadata. All of it comes from settings.ini, which nbdev reads too: edit that, not this."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
facts = config['DEFAULT']


def words(key):
    return shlex.split(facts.get(key, ''), comments=True)


setup(
    name=facts['lib_name'], version=facts['version'], description=facts['description'],
    author=facts['author'], author_email=facts['author_email'], keywords=facts['keywords'].split(),
    classifiers=['Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    project_urls={'Repository': facts['git_url']}, license='Apache-2.0', python_requires=f">={facts['min_python']}",
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[facts['lib_path'], facts['lib_path'] + '.*']),
    # aaai_lt/tables and aaai_lt/recipes are links to data/tables and nbs/recipes: the wheel holds copies of what they point to
    package_data={facts['lib_path']: ['tables/*.csv', 'recipes/*.yaml']}, zip_safe=False,
    install_requires=words('requirements'),
    extras_require={key.removesuffix('_requirements'): words(key) for key in facts if key.endswith('_requirements')},
    entry_points={'console_scripts': words('console_scripts'), 'nbdev': [f"{facts['lib_path']}={facts['lib_path']}._modidx:d"]},
)
