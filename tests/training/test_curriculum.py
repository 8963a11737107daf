"""The course over lengths, without a model."""

from pikv_core.schema import TrainSettings
from pikv_core.training.curriculum import AVERAGE_MEMORY, Curriculum

SETTINGS = TrainSettings(
    curriculum=[16, 32, 64, 128],
    stage_steps=3,
    stage_accuracy=0.5,
    decay_steps=6,
    warmup_steps=4,
    max_steps=100,
    lr=1.0,
)


def course(curriculum, accuracy, steps=None):
    """Yield (step, length, lr) until the end, observing `accuracy(step)`."""
    step = 0
    while not curriculum.is_over(step) and step != steps:
        yield step, curriculum.length(step), curriculum.lr(step)
        curriculum.observe(step, accuracy(step))
        step += 1


def test_each_length_takes_its_least_steps_and_the_decay_goes_round_the_last_three():
    rows = list(course(Curriculum(SETTINGS, True), lambda step: 1.0))
    lengths = [length for _, length, _ in rows]
    assert lengths == [16] * 3 + [32] * 3 + [64] * 3 + [128] * 3 + [128, 64, 32, 128, 64, 32]


def test_the_rate_rises_linearly_stays_and_falls_linearly():
    rates = [lr for _, _, lr in course(Curriculum(SETTINGS, True), lambda step: 1.0)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[11] == rates[12] == 1.0
    assert all(abs(rates[12 + k] - (1 - k / 6)) < 1e-12 for k in range(6))


def test_a_stage_ends_when_the_moving_average_reaches_the_threshold():
    curriculum = Curriculum(SETTINGS, True)
    accuracies = [0.0] * 10 + [1.0] * 20
    average, expected = 0.0, None
    for step, accuracy in enumerate(accuracies):
        average = accuracy if step == 0 else AVERAGE_MEMORY * average + (1 - AVERAGE_MEMORY) * accuracy
        if average >= 0.5:
            expected = step
            break
    ended = next(step for step, accuracy in enumerate(accuracies) if curriculum.observe(step, accuracy) is not None)
    assert ended == expected
    assert curriculum.state.stages == [{"length": 16, "num_steps": ended + 1, "accuracy": average}]
    assert curriculum.length(ended + 1) == 32


def test_a_length_that_is_never_mastered_ends_in_a_decay_at_the_lengths_reached():
    curriculum = Curriculum(SETTINGS, True)
    rows = list(course(curriculum, lambda step: 1.0 if step < 3 else 0.0))
    assert len(rows) == SETTINGS.max_steps
    assert not curriculum.mastered
    assert [length for _, length, _ in rows[-6:]] == [32, 16, 32, 16, 32, 16]
    assert rows[-1][2] < 0.2


def test_without_answers_every_step_has_the_last_length_until_max_steps():
    rows = list(course(Curriculum(SETTINGS, False), lambda step: None))
    assert [length for _, length, _ in rows] == [128] * 100
    assert rows[93][2] == 1.0
    assert rows[-1][2] < 0.2


def test_a_restored_curriculum_goes_on_the_same_at_every_step():
    def accuracy(step):
        return (step * 7919 % 100) / 100

    whole = list(course(Curriculum(SETTINGS, True), accuracy))
    for cut in range(0, len(whole), 5):
        first = Curriculum(SETTINGS, True)
        list(course(first, accuracy, cut))
        second = Curriculum(SETTINGS, True)
        second.load_state_dict(first.state_dict())
        rest = []
        for step in range(cut, len(whole)):
            rest.append((step, second.length(step), second.lr(step)))
            second.observe(step, accuracy(step))
        assert rest == whole[cut:]
        assert second.is_over(len(whole))
