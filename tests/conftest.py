"""Shared by all tests: caches inside the project, one worker for each file, and a last line that counts."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / '.pytest_cache'
os.environ.setdefault('RESNET_RS_DATA', str(CACHE / 'resnet_rs-data'))  # the user's own caches stay untouched
os.environ.setdefault('RESNET_RS_CACHE', str(CACHE / 'resnet_rs-xla'))


@pytest.fixture(scope='session')
def root():
    "The project's root folder."
    return ROOT


def pytest_collection_modifyitems(items):
    "With several workers, tests of one file share one (and their fixtures); notebooks are independent."
    for item in items:
        if item.path.stem != 'test_notebooks': item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_unconfigure(config):
    "The closing line: N passed, N failed."
    reporter = config.pluginmanager.get_plugin('terminalreporter')
    if reporter is None or hasattr(config, 'workerinput') or config.option.collectonly: return
    count = {kind: len(reporter.stats.get(kind, [])) for kind in ('passed', 'failed', 'error', 'skipped')}
    skipped = f", {count['skipped']} skipped" if count['skipped'] else ''
    reporter.write_line(f"{count['passed']} passed, {count['failed'] + count['error']} failed{skipped}")
