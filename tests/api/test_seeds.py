"""Samples without a seed: no two engines, and no two starts of one, draw the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.conftest import client_of, running_engine


def sample_like_everybody(folder: Path, model: Path, *arguments: str) -> list[str]:
    """Samples of a new engine, asked for in the same order each time: so that only noise can tell engines apart."""
    folder.mkdir()
    with running_engine(folder, f"model={model}", "dtype=float32", "kv_cache_num_tokens=4096", *arguments) as engine:
        with client_of(engine) as client:
            answers = [client.completions.create(model="m", prompt="The sea", n=4, max_tokens=8) for _ in range(3)]
        return [choice.text for answer in answers for choice in answer.choices]


@pytest.mark.slow
def test_engines_without_a_seed_share_no_sample_and_with_one_all_of_them(tiny: Path, tmp_path: Path) -> None:
    free = [sample_like_everybody(tmp_path / f"free{run}", tiny) for run in range(2)]
    assert not {*free[0]} & {*free[1]}
    seeded = [sample_like_everybody(tmp_path / f"seeded{run}", tiny, "seed=7") for run in range(2)]
    assert seeded[0] == seeded[1]
    assert len({*seeded[0]}) == 12
