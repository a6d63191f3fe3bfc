"""The measures of an evaluation, each against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from svft_diffusion.evaluation import measures
from svft_diffusion.evaluation.intervals import bootstrap_interval
from svft_diffusion.evaluation.selection import best_of, pareto_front
from svft_diffusion.evaluation.tokens import without_token

# Cosines of the rows: (1, 0) and (3, 4)/5 have 0.6, (1, 0) and (0, 2)/2 have 0, (3, 4)/5 and (0, 1) have 0.8.
RIGHT, SLANTED, UP = [1.0, 0.0], [3.0, 4.0], [0.0, 2.0]


def test_subject_fidelity_is_the_mean_over_all_pairs() -> None:
    generated, real = torch.tensor([RIGHT, SLANTED]), torch.tensor([RIGHT, UP, SLANTED])
    assert measures.subject_fidelity(generated, real) == pytest.approx((1 + 0 + 0.6 + 0.6 + 0.8 + 1) / 6)


def test_cosines_are_neither_clamped_nor_scaled() -> None:
    assert measures.subject_fidelity(torch.tensor([RIGHT]), -torch.tensor([RIGHT])) == pytest.approx(-1)


def test_the_mean_of_pairs_leaves_out_each_picture_with_itself() -> None:
    assert measures.mean_of_pairs(torch.tensor([RIGHT, UP, SLANTED])) == pytest.approx((0 + 0.6 + 0.8) / 3)
    assert measures.mean_of_pairs(torch.tensor([RIGHT])) is None


def test_prompt_fidelity_compares_each_picture_with_its_own_prompt() -> None:
    pictures, prompts = torch.tensor([RIGHT, UP]), torch.tensor([SLANTED, SLANTED])
    assert measures.prompt_fidelity(pictures, prompts) == pytest.approx((0.6 + 0.8) / 2)


def test_diversity_is_the_mean_over_prompts_that_have_several_pictures() -> None:
    groups = [torch.tensor([RIGHT, UP]), torch.tensor([RIGHT, SLANTED]), torch.tensor([UP])]
    assert measures.diversity(groups) == pytest.approx(1 - (0 + 0.6) / 2)
    assert measures.diversity([torch.tensor([UP])]) is None


def test_drift_of_features_compares_picture_by_picture() -> None:
    drift = measures.feature_drift(torch.tensor([RIGHT, UP]), torch.tensor([SLANTED, UP]))
    assert drift == pytest.approx((0.4 + 0) / 2)


def test_drift_of_pixels_is_one_between_black_and_white() -> None:
    black, white = Image.new("RGB", (4, 6)), Image.new("RGB", (4, 6), "white")
    grey = Image.new("L", (4, 6), 51)
    assert measures.pixel_drift([black, grey], [white, black]) == pytest.approx((1 + 0.2) / 2)
    assert measures.pixel_drift([white], [white]) == 0


def test_equal_features_have_the_fidelity_one() -> None:
    features = torch.randn(1, 96, generator=torch.Generator().manual_seed(0)).expand(5, -1)
    assert measures.subject_fidelity(features[:2], features[2:]) == pytest.approx(1, abs=1e-12)
    assert measures.feature_drift(features[:2], features[2:4]) == pytest.approx(0, abs=1e-12)


def test_the_order_of_pictures_does_not_count() -> None:
    random = torch.Generator().manual_seed(1)
    generated, real = torch.randn(7, 12, generator=random), torch.randn(5, 12, generator=random)
    shuffled = measures.subject_fidelity(generated[torch.randperm(7, generator=random)], real.flip(0))
    assert shuffled == pytest.approx(measures.subject_fidelity(generated, real), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_features_of_any_precision_are_measured_in_double(dtype: torch.dtype) -> None:
    features = torch.tensor([[3.0, 4.0]], dtype=dtype)  # exact in all of them
    assert measures.subject_fidelity(features, torch.tensor([RIGHT], dtype=dtype)) == pytest.approx(0.6, abs=1e-12)


def test_an_interval_of_equal_subjects_is_a_point() -> None:
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_an_interval_of_two_subjects_reaches_from_one_to_the_other() -> None:
    # Both are drawn twice a quarter of the time each, which is more than 2.5 %.
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(7)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_interval(random.normal(0.3, 0.1, 30), draws=600, seed=trial)
        covered += low <= 0.3 <= high
    # 95 % less what percentile intervals of 30 values lack; 300 trials give or take 4 %.
    assert 0.88 <= covered / 300 <= 0.98


def test_intervals_are_those_of_subjects_whatever_number_of_pictures_stands_behind_them() -> None:
    few = bootstrap_interval([0.2, 0.4, 0.9])
    many_pictures = bootstrap_interval(np.repeat([0.2, 0.4, 0.9], 100))
    assert few[1] - few[0] > 5 * (many_pictures[1] - many_pictures[0])


def test_the_pareto_front_has_every_point_that_no_other_beats() -> None:
    points = [(0.1, 0.9), (0.5, 0.5), (0.4, 0.5), (0.9, 0.1), (0.5, 0.4), (0.5, 0.5)]
    assert pareto_front(points) == [0, 1, 3, 5]


def test_the_best_has_the_largest_product_and_of_equal_ones_it_is_the_first() -> None:
    assert best_of([(0.1, 0.9), (0.5, 0.5), (0.5, 0.5), (0.9, 0.2)]) == 1
    assert best_of([(-0.9, -0.9), (0.2, 0.3)]) == 1  # two negative scores make no good product
    assert best_of([(-0.2, 0.4), (-0.5, 0.3)]) == 0


@pytest.mark.parametrize(
    ("prompt", "trigger", "expected"),
    [
        ("a photo of sks dog", "sks", "a photo of a dog"),
        ("a sks dog in the jungle", "sks", "a dog in the jungle"),
        ("a sks owl", "sks", "an owl"),
        ("an sks dog", "sks", "a dog"),
        ("A sks owl", "sks", "An owl"),
        ("a red sks backpack", "sks", "a red backpack"),
        ("sks dog on the beach", "sks", "a dog on the beach"),
        ("my sks dog and a sks cat", "sks", "my dog and a cat"),
        ("a photo of <s0><s1> dog", "<s0><s1>", "a photo of a dog"),
        ("a photo of teal sks robot", "teal  sks", "a photo of a robot"),
        ("masks of sks, in blue", "sks", "masks of , in blue"),
        ("a photo of a dog", "", "a photo of a dog"),
        ("tasks and desks", "sks", "tasks and desks"),
    ],
)
def test_the_token_leaves_the_prompt_and_the_class_word_stays(prompt: str, trigger: str, expected: str) -> None:
    assert without_token(prompt, trigger) == expected


def test_taking_the_token_out_of_a_long_prompt_takes_no_time() -> None:
    assert math.isclose(len(without_token("sks dog " * 12_500, "sks")), 12_500 * 4, rel_tol=0.1)
