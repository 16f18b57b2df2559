import pytest

from tfprivacy_ft import accounting
from tfprivacy_ft.events import Event
from tfprivacy_ft.finetune import Full, Head, budget
from tfprivacy_ft.plan import PrivacyPlan

STAGES = (Head(batch_size=1000, epochs=10), Full(batch_size=100, epochs=2, noise_ratio=0.5))
RUN = {"num_examples": 1000, "target_epsilon": 2.0, "delta": 1e-5}


def test_all_stages_together_use_the_budget_and_no_more():
    first, second = budget.solve(STAGES, **RUN)
    assert second == pytest.approx(first / 2)
    together = [
        budget.event_of_mean(STAGES[0], first, num_examples=1000),
        Event.poisson(count=10, noise_multiplier=first, sampling_probability=1.0),
        Event.poisson(count=20, noise_multiplier=second, sampling_probability=0.1),
    ]
    assert 1.99 < accounting.epsilon(together, 1e-5) <= 2.0


def test_one_stage_is_the_plan_that_solve_gives():
    (noise,) = budget.solve(STAGES[1:], **RUN)
    solved = PrivacyPlan.solve(**RUN, batch_size=100, epochs=2)
    assert noise / 0.5 == pytest.approx(solved.noise_multiplier * 2, rel=1e-3)
    assert budget.plan(STAGES[1], noise, **RUN).steps == solved.steps


def test_protecting_a_person_with_several_examples_takes_more_noise():
    assert budget.solve(STAGES[:1], **RUN, examples_per_user=3)[0] > 2.9 * budget.solve(STAGES[:1], **RUN)[0]
