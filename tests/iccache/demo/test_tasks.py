import pytest

from iccache.demo.tasks import FULL, QUICK, TASKS, Item, Sizes, Task, correct

tasks = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@tasks
@pytest.mark.parametrize("sizes", [QUICK, FULL], ids=["quick", "full"])
@pytest.mark.parametrize("seed", [1, 2024])
def test_the_slices_share_nothing(task: Task, sizes: Sizes, seed: int) -> None:
    split = task.split(sizes, seed)

    prompts = [item.prompt.lower() for part in split for item in part]
    assert [len(part) for part in split] == [sizes.warm_up, sizes.held_out, sizes.routed]
    assert len(set(prompts)) == len(prompts)


@tasks
def test_a_seed_always_gives_the_same_split(task: Task) -> None:
    assert task.split(QUICK, 7) == task.split(QUICK, 7)
    assert task.split(QUICK, 7) != task.split(QUICK, 8)


@tasks
def test_more_than_there_is_cannot_be_had(task: Task) -> None:
    with pytest.raises(ValueError, match="400 items"):
        task.split(Sizes(warm_up=200, held_out=200, routed=1))


@tasks
def test_the_answer_is_not_in_the_request(task: Task) -> None:
    """A plural like its singular is; a whole answer between word boundaries otherwise never."""
    told = [item for item in task.items() if f" {item.target.lower()} " in f" {item.prompt.lower()} "]

    assert len(told) <= 8


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("book_restaurant", True),
        (" Book_Restaurant.\n", True),
        ("book_restaurant get_weather", False),
        ("The intent is book_restaurant", False),
        ("", False),
    ],
)
def test_the_check_is_an_exact_match_but_for_case_space_and_a_full_stop(answer: str, right: bool) -> None:
    assert correct(answer, Item("Utterance: A table for two", "book_restaurant")) is right
