"""Which rows a comparison needs: sizes within budgets, the search for learning rates, the best few."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from svft_diffusion.comparison.config import CompareConfig
from svft_diffusion.comparison.plan import Entry, Plan
from svft_diffusion.comparison.questions import MAIN, QUESTIONS, SECOND
from svft_diffusion.comparison.report import write_report
from svft_diffusion.comparison.rows import BROKEN, FAILED, MEASURED, Result, Row, Rows, code_version
from svft_diffusion.comparison.statistics import Line, lines_of, quality_by_effective_rank
from svft_diffusion.comparison.subjects import ComparedSubject

TWO = ["SVFT plain", "LoRA"]


def answer(plan: Plan, rows: Rows, quality: Callable[[Row], float | None], unscored: str = FAILED) -> None:
    """Results for everything that the plan asks for, until it asks for nothing more; ``unscored`` is the state of those
    without a score.
    """
    while missing := plan.missing(rows):
        for row in missing:
            score = quality(row)
            state = unscored if score is None else MEASURED
            numbers: dict[str, float | int | None] = {} if score is None else {"quality": score, "drift": 0.5}
            rows.keep(row, Result(state, numbers, 1.0, code_version(), "diverged" if score is None else None))


@pytest.fixture(scope="module")
def everybody() -> Plan:
    return Plan(CompareConfig())


def test_every_contender_takes_its_largest_size_within_the_budget(everybody: Plan) -> None:
    plan = everybody
    assert {one.name for one in plan.excluded if one.budget == MAIN} == set()
    sizes = {entry.name: entry.bytes for entry in plan.entries}
    assert {entry.name for entry in plan.entries} == {one.name for one in QUESTIONS["methods"].contenders}
    for entry in plan.entries:
        ladder = entry.contender.ladder
        if len(ladder) > 1:
            assert entry.bytes <= 232_000, entry.name
            place = ladder.index(entry.method)
            larger = plan._bytes(ladder[place + 1]) if place + 1 < len(ladder) else 232_001
            assert larger > 232_000, entry.name
    assert sizes["LoRA"] == sizes["LoHa"] == 4 * 57_600 and sizes["SVFT banded"] == 4 * 47_188
    assert sizes["SVFT random"] == 8 * 28_444  # its positions are stored, too
    assert sizes["textual inversion"] == 4 * 256 and sizes["full fine-tuning"] == 4 * 6_108_072


def test_methods_that_cannot_carry_a_kind_of_layer_are_listed_with_the_reason() -> None:
    plan = Plan(CompareConfig(targets="all", methods=["LoRA", "VeRA", "SVFT plain"]))
    reasons = {one.name: one.reason for one in plan.excluded if one.budget == MAIN}
    assert reasons.keys() == {"LoRA", "VeRA"} and [entry.name for entry in plan.entries] == ["SVFT plain"]
    assert "can't be put onto the unet" in reasons["LoRA"] and "GroupNorm" in reasons["LoRA"]
    assert "Conv2d" in reasons["VeRA"]


@pytest.mark.parametrize("name", sorted(QUESTIONS))
def test_names_in_a_question_are_distinct(name: str) -> None:
    names = [(one.name, one.budget) for one in QUESTIONS[name].contenders]
    assert len(set(names)) == len(names) >= 5


def test_both_sides_of_banded_or_diagonal_have_the_same_budget() -> None:
    plan = Plan(CompareConfig(question="banded-or-diagonal"))
    for budget, size in plan.budgets.items():
        for entry in plan.entries:
            if entry.budget == budget:
                assert 0.7 * size < entry.bytes <= 1.05 * size, (entry.name, entry.bytes, size)


def test_a_search_goes_on_beyond_an_edge_alike_in_both_directions(tmp_path: Path) -> None:
    plan = Plan(CompareConfig(methods=TWO, num_subjects=2, num_seeds=1, second_best=0))
    rows = Rows(tmp_path)
    plain, lora = plan.entries

    def quality(row: Row) -> float:
        best = 2.0 if row.method is plain.method else 1e-4  # out of reach: above 0.1 x 3, and below 0.01 x 0.3
        return 1 / (1 + abs(row.learning_rate - best))

    answer(plan, rows, quality)
    high, low = plan.search(plain, rows), plan.search(lora, rows)
    assert sorted(high.scores) == [0.03, 0.1, 0.3, 0.9, 2.7] and high.best == 2.7 and high.best_at_edge
    assert sorted(low.scores) == [0.0009, 0.003, 0.01, 0.03] or len(low.scores) == 5
    assert low.best == min(low.scores) and low.best_at_edge


def test_a_rate_that_diverges_on_one_subject_is_not_taken(tmp_path: Path) -> None:
    plan = Plan(CompareConfig(methods=["LoRA"], num_subjects=2, num_seeds=1, second_best=0))
    rows = Rows(tmp_path)
    answer(
        plan, rows, lambda row: None if row.learning_rate > 0.01 and row.subject.number == 101 else row.learning_rate
    )
    search = plan.search(plan.entries[0], rows)
    assert search.scores == {0.003: 0.003, 0.01: 0.01, 0.03: None} and search.best == 0.01 and not search.best_at_edge


def test_more_subjects_decide_between_the_best_rates(tmp_path: Path) -> None:
    plan = Plan(CompareConfig(methods=["LoRA"], num_subjects=1, num_seeds=1, second_best=0, lr_finalists=2))
    rows = Rows(tmp_path)

    def quality(row: Row) -> float:
        if row.subject.number < 102:  # chance: what is best there is not in the long run
            return {0.003: 0.1, 0.01: 0.6, 0.03: 0.5}[row.learning_rate]
        return {0.01: 0.2, 0.03: 0.8}[row.learning_rate]  # 0.003 comes in no finals

    answer(plan, rows, quality)
    search = plan.search(plan.entries[0], rows)
    assert search.scores == {0.003: 0.1, 0.01: 0.6, 0.03: 0.5}
    assert search.final_scores == pytest.approx({0.01: 0.2 * 4 / 6 + 0.6 / 3, 0.03: 0.8 * 4 / 6 + 0.5 / 3})
    assert search.best == 0.03 and len(search.rows) == 3 * 2 + 2 * 4
    assert len(plan.all_rows(rows)) == plan.number_of_rows() == 14 + 1


def test_without_finals_the_first_subjects_decide(tmp_path: Path) -> None:
    plan = Plan(CompareConfig(methods=["LoRA"], num_subjects=1, num_seeds=1, second_best=0, lr_finalists=1))
    rows = Rows(tmp_path)
    answer(plan, rows, lambda row: 1 - abs(row.learning_rate - 0.01))
    search = plan.search(plan.entries[0], rows)
    assert search.best == 0.01 and search.final_scores == {} and len(search.rows) == 6 == plan.number_of_rows() - 1


def test_rates_are_searched_on_other_subjects(tmp_path: Path) -> None:
    plan = Plan(CompareConfig(methods=TWO, num_subjects=3, num_seeds=2, second_best=0))
    rows = Rows(tmp_path)
    first = plan.missing(rows)
    assert {row.subject.number for row in first} == {100, 101} and len(first) == 2 * 3 * 2
    answer(plan, rows, lambda row: 0.5)
    compared = [row for row in plan.all_rows(rows).values() if row.subject.number < 100]
    assert {(row.subject.number, row.seed) for row in compared} == {(n, s) for n in range(3) for s in range(2)}


def test_the_best_few_that_can_grow_and_the_reference_go_on_with_the_second_budget(tmp_path: Path) -> None:
    methods = ["SVFT plain", "SVFT banded", "LoRA", "DoRA", "OFT"]
    plan = Plan(
        CompareConfig(methods=methods, num_subjects=2, num_seeds=1, second_best=1, lr_factors=[1.0], lr_extensions=0)
    )
    rows = Rows(tmp_path)
    order = {"SVFT plain": 0.9, "SVFT banded": 0.8, "LoRA": 0.1, "DoRA": 0.2, "OFT": 0.3}
    by_method = {json.dumps(entry.method.describe()): order[entry.name] for entry in plan.entries}
    answer(plan, rows, lambda row: by_method.get(json.dumps(row.method.describe()), 0.5))
    second: list[Entry] = [entry for entry in plan.settled(rows) if entry.budget == SECOND]
    assert [entry.name for entry in second] == ["SVFT banded", "LoRA"]  # SVFT plain has one size
    assert all(entry.bytes <= 116_000 for entry in second)


def of_three_subjects(
    folder: Path, ours: Callable[[Row, float], float | None], state: str = FAILED
) -> tuple[Line, Line, Path]:
    """SVFT plain and LoRA, which has 0.1, 0.5 and 0.9, and the report; ``state`` is that of rows without a score."""
    plan = Plan(
        CompareConfig(methods=TWO, num_subjects=3, num_seeds=2, second_best=0, lr_factors=[1.0], lr_extensions=0)
    )
    rows = Rows(folder)
    of_subject = [0.1, 0.5, 0.9]

    def quality(row: Row) -> float | None:
        usual = of_subject[row.subject.number]
        return usual if row.method is not plan.entries[0].method else ours(row, usual)

    answer(plan, rows, quality, state)
    plain, lora = lines_of(plan, rows)
    write_report(plan, rows, folder / "report")
    return plain, lora, folder / "report"


def test_differences_are_taken_subject_by_subject(tmp_path: Path) -> None:
    ours, lora, _ = of_three_subjects(tmp_path, lambda row, usual: usual + 0.1 + 0.02 * row.seed)
    gain = ours.against_reference["quality"]
    assert gain.subjects == 3 and gain.mean == pytest.approx(0.11)
    assert gain.low == pytest.approx(0.11) and gain.high == pytest.approx(0.11)  # the same for every subject
    assert lora.scores["quality"].mean == pytest.approx(0.5) and lora.scores["quality"].low == pytest.approx(0.1)


def test_a_training_that_diverges_on_a_subject_counts_there_as_a_missed_scene(tmp_path: Path) -> None:
    def quality(row: Row, usual: float) -> float | None:
        return None if row.subject.number == 0 or (row.subject.number, row.seed) == (1, 1) else usual

    ours, lora, folder = of_three_subjects(tmp_path, quality)
    assert ours.scores["quality"].subjects == 3
    assert ours.scores["quality"].mean == pytest.approx((0 + 0.5 / 2 + 0.9) / 3)
    assert ours.scores["quality"].mean < lora.scores["quality"].mean
    assert ours.against_reference["quality"].mean == pytest.approx((-0.1 - 0.25 + 0) / 3)
    assert ours.failed == ["diverged"] * 3 and ours.missing == 0
    assert ours.scores["drift"].subjects == 2 and ours.against_reference["drift"].subjects == 2  # of what was drawn
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "SVFT plain (main): 3 rows failed, such as: diverged" in text and "where training failed" in text


def test_a_row_that_broke_for_another_reason_leaves_its_subject_out(tmp_path: Path) -> None:
    ours, _, _ = of_three_subjects(tmp_path, lambda row, usual: None if row.subject.number == 0 else usual, BROKEN)
    assert ours.scores["quality"].subjects == 2 == ours.against_reference["quality"].subjects
    assert ours.scores["quality"].mean == pytest.approx(0.7)


def test_a_method_without_any_measured_row_has_no_place(tmp_path: Path) -> None:
    ours, lora, _ = of_three_subjects(tmp_path, lambda row, usual: None)
    assert "quality" not in ours.scores and ours.against_reference == {} and len(ours.failed) == 6
    assert lora.scores["quality"].mean == pytest.approx(0.5)


@pytest.mark.parametrize("name", QUESTIONS)
def test_everybody_is_compared_with_somebody_of_the_question_who_is_there_at_that_budget(name: str) -> None:
    contenders = {(contender.name, contender.budget) for contender in QUESTIONS[name].contenders}
    references = {one.against for one in QUESTIONS[name].contenders}
    for one in QUESTIONS[name].contenders:
        found = {(one.against, one.budget), (one.against, MAIN)} & contenders
        assert found or one.name in references, one.name  # with whom others are compared


def test_an_own_question_is_answered_pair_by_pair_and_by_effective_rank(tmp_path: Path) -> None:
    pairs = ["VectorFit with AVF", "VectorFit without AVF", "SVDiff with AVF", "SVDiff without AVF"]
    plan = Plan(
        CompareConfig(
            question="avf", methods=pairs, num_subjects=2, num_seeds=2, second_best=0, lr_factors=[1.0], lr_extensions=0
        )
    )
    rows, changes = Rows(tmp_path), [5.0, -1.0, 2.0, 9.0]
    places = {id(entry.method): place for place, entry in enumerate(plan.entries)}
    assert quality_by_effective_rank(plan, rows) is None  # nothing is measured yet
    for row in plan.missing(rows):
        place = places[id(row.method)]
        quality = 0.1 * place + 0.3 * row.subject.number
        numbers: dict[str, float | int | None] = {"quality": quality, "effective_rank_change": changes[place]}
        rows.keep(row, Result(MEASURED, numbers, 1.0, code_version(), None))
    lines = lines_of(plan, rows)
    assert [line.against for line in lines] == [pairs[1], "", pairs[3], ""]
    assert [line.against_reference["quality"].mean for line in lines[::2]] == pytest.approx([-0.1, -0.1])
    correlation = quality_by_effective_rank(plan, rows)
    assert correlation is not None and correlation.subjects == 2
    assert correlation.mean == pytest.approx(0.4)  # of the ranks 0 1 2 3 and 2 0 1 3
    write_report(plan, rows, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "(VectorFit without AVF)" in text
    assert "worse than SVDiff without AVF in quality, of ours: SVDiff with AVF" in text
    assert "growth of the effective rank, over the methods of a subject: +0.400 [+0.400, +0.400]" in text


def test_a_row_is_another_by_everything_that_it_follows_from(tmp_path: Path) -> None:
    plan = Plan(CompareConfig(methods=TWO))
    row = plan.missing(Rows(tmp_path))[0]
    effort = replace(row.effort, steps=7)
    others = [
        replace(row, effort=effort),
        replace(row, effort=replace(effort, targets="attention")),
        replace(row, learning_rate=2 * row.learning_rate),
        replace(row, seed=1),
        replace(row, subject=ComparedSubject(5)),
        replace(row, method=plan.entries[1].method),
    ]
    assert len({row.key, *(other.key for other in others)}) == 7
    assert replace(row).key == row.key and all(len(one.content) == len(row.content) for one in others)


def test_rows_of_another_code_count_only_where_it_is_said(tmp_path: Path) -> None:
    row = Plan(CompareConfig(methods=TWO)).missing(Rows(tmp_path))[0]
    Rows(tmp_path).keep(row, Result(MEASURED, {"quality": 0.5}, 1.0, "0123456789ab"))
    assert Rows(tmp_path).find(row) is None
    found = Rows(tmp_path, any_code=True).find(row)
    assert found is not None and found.numbers == {"quality": 0.5}
