"""What the programs share of training on preferences: TRL's losses, and the reference."""

import pytest

from lorasmith.config.migrate import preference
from lorasmith.config.migrate.migration import Migration
from lorasmith.config.migrate.reading import Foreign


def migration(folder, method, values) -> Migration:
    made = Migration(Foreign(folder / "theirs.yaml", values), "Axolotl", {})
    preference.choose(made, method, "rl")
    return made


@pytest.mark.parametrize(
    ("method", "losses", "weights", "alpha", "is_refused"),
    [
        ("dpo", "sigmoid", None, None, False),
        ("dpo", ["sigmoid"], [1.0], None, False),
        ("dpo", ["sft", "sigmoid"], [0.5, 1], 0.5, False),
        ("dpo", ["sigmoid", "sft"], None, 1, False),
        ("dpo", ["sigmoid", "sft"], [1], None, True),
        ("dpo", ["sigmoid", "hinge"], [1, 1], None, True),
        ("dpo", ["sft"], None, None, True),
        ("dpo", ["sigmoid"], [0.5], None, True),
        ("kto", "kto", None, None, False),
        ("kto", "apo_zero_unpaired", None, None, True),
        ("orpo", "sigmoid", None, None, True),
    ],
)
def test_losses_of_trl(tmp_path, method, losses, weights, alpha, is_refused):
    done = migration(tmp_path, method, {"loss_type": losses, "loss_weights": weights})
    preference.trl_losses(done, "loss_type", "loss_weights")
    assert (done.value("preference.rpo_alpha"), bool(done.refusals)) == (alpha, is_refused)
    assert not done.left


@pytest.mark.parametrize(
    ("values", "refused", "told"),
    [
        ({}, [], []),
        ({"start": "old"}, [], ["adapters: not set"]),
        ({"start": "old", "adapters": "old", "model": "base"}, [], []),
        ({"start": "old", "adapters": "new"}, ["adapters"], []),
        ({"model": "other"}, ["model"], []),
    ],
)
def test_the_reference_is_the_model_at_the_start(tmp_path, values, refused, told):
    for method in ("dpo", "kto"):
        done = migration(tmp_path, method, {"base": "base", **values})
        preference.reference(done, "model", "adapters", "base", "start")
        assert [text.split(": ")[1] for text in done.refusals] == refused
        assert list(done.unmatched) == told
        assert not done.left.keys() & {"model", "adapters"}
    done = migration(tmp_path, "orpo", {"base": "base", **values})
    preference.reference(done, "model", "adapters", "base", "start")
    assert (done.refusals, done.unmatched) == ([], {})
