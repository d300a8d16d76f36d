"""Everything a package index needs to know, read from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(root / 'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(root / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license_expression='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'].split(),
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    classifiers=[f'Programming Language :: Python :: {version}' for version in ['3', *cfg['pythons'].split()]],
    packages=find_packages(include=['resnet_rs*']),
    package_data={'resnet_rs': ['tables/*.csv']},
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={key.removesuffix('_requirements'): cfg[key].split() for key in cfg if key.endswith('_requirements')},
    entry_points={
        'papermill.engine': ['resnet_rs = resnet_rs.papermill:RunsEngine'],
        'nbdev': ['resnet_rs = resnet_rs._modidx:d'],
    },
    zip_safe=False,
)
