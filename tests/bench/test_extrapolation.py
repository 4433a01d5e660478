"""The paper calculation, on numbers that can be checked by hand."""

import pytest

from scaling4d_bench.extrapolate import Measured, comparisons, extrapolate

MEASURED = Measured(
    core_s_per_video_s=0.2,
    clips_per_video_s=0.5,
    bytes_per_clip=100_000,
    tasks_per_video=2.0,
    tasks_per_s=400.0,
    dedupe_bytes_per_clip=168,
    comparisons_per_s=1e6,
    hash_bits=15,
    main_bytes_per_video=1000,
)


def test_rates_are_multiplied_up() -> None:
    found = extrapolate(MEASURED, videos=1_800_000, video_s=10, cores=(100,))
    assert {name: pytest.approx(value) for name, value in found.items()} == {
        "core-hours": 1000,  # 1.8e6 * 10 s * 0.2 / 3600
        "clips": 9e6,
        "storage, TB": 0.9,
        "hashes, GB": 0.288,
        "memory to find duplicates, GB": 1.8,
        "memory of the main process, GB": 1.8,
        "comparisons of hashes": 9e6**2 / 2 * 16 / 65536,
        "core-hours of comparing": 9e6**2 / 2 * 16 / 65536 / 1e6 / 3600,
        "scheduler: tasks/s it was seen to hand out": 400,
        "100 cores: days": 10 / 24,
        "100 cores: tasks/s": 100,  # 3.6e6 tasks in 36,000 s
    }


def test_comparisons_are_those_that_the_search_for_duplicates_states() -> None:
    assert comparisons(10**6, 15) == pytest.approx(1.2e8, rel=0.05)
    assert comparisons(10**6, 24) == pytest.approx(1.1e10, rel=0.1)
