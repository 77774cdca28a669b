"""What a garbage collection looks at while a model is served."""

from __future__ import annotations

import gc

import pytest

from headwise.runtime.heap import frozen_heap


def test_what_existed_before_is_not_looked_at_until_the_end() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError), frozen_heap():
        assert gc.get_freeze_count() > before
        assert len(gc.get_objects()) < gc.get_freeze_count()
        raise ZeroDivisionError
    assert gc.get_freeze_count() == 0
