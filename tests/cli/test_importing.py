"""Imports without garbage collection, whose objects are never searched again."""

import gc

import pytest

from lorasmith.cli.importing import importing


@pytest.fixture(autouse=True)
def _unfrozen():
    yield
    gc.unfreeze()


def test_collection_is_paused_inside_the_block_and_skips_its_objects_afterwards():
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        made = [[] for _i in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(made)


def test_an_import_that_fails_freezes_nothing():
    def load() -> None:
        with importing():
            raise ImportError

    before = gc.get_freeze_count()
    with pytest.raises(ImportError):
        load()
    assert gc.isenabled()
    assert gc.get_freeze_count() == before
