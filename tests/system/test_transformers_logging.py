"""transformers is silent for a while, and as it was before afterwards."""

import pytest
from transformers.utils import logging

from lorasmith.system.transformers_logging import quiet_transformers


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("verbosity", [logging.INFO, logging.WARNING])
def test_settings_are_restored_even_after_an_error(bars, verbosity):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    logging.set_verbosity(verbosity)

    def fail() -> None:
        with quiet_transformers():
            assert logging.get_verbosity() == logging.ERROR
            assert not logging.is_progress_bar_enabled()
            raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError):
            fail()
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()
