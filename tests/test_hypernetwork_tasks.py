"""Tasks for hypernetworks: reading, prompts, and splits without leaks."""

import gzip
import json
from pathlib import Path

import pytest

from moe_reduce.adapters.hypernetwork import splits, tasks
from moe_reduce.adapters.hypernetwork.leaks import leaks
from moe_reduce.core.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared"
INPUT = "the {0} cat of number {0} sat on mat {0} and looked at bird {0} in tree {0}"


def content(number, source=None, first=None, count=20, **changes):
    """A task of `count` instances, whose inputs are numbered from `first`."""
    first = 1000 * number if first is None else first
    return {
        "Source": [source or f"set_{number}"],
        "Categories": ["Counting"],
        "Definition": [f"Count the cats of {number}."],
        "Positive Examples": [{"input": "one cat", "output": "1"}, {"input": "two cats", "output": ["2", "two"]}],
        "Instances": [{"input": INPUT.format(first + i), "output": [str(i), "many"]} for i in range(count)],
    } | changes


def write(directory, contents, suffix=".json"):
    directory.mkdir(exist_ok=True)
    for name, value in contents.items():
        data = json.dumps(value).encode()
        (directory / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    return directory


def read(directory, contents, **arguments):
    return tasks.read_tasks(write(directory, contents), **arguments)


def refused(part, function, *arguments, **named):
    with pytest.raises(UserError, match=part) as caught:
        function(*arguments, **named)
    assert "\n" not in str(caught.value)


def test_tasks_are_read(tmp_path):
    write(tmp_path, {"task1_a": content(1)}, ".json.gz")
    write(tmp_path, {"task2_b": content(2)})
    write(tmp_path, {"task1_a.descriptions": {"descriptions": ["Say how many.", "Count the cats of 1."]}})
    (tmp_path / "task2_b.descriptions.yaml").write_text("descriptions:\n- How many?\n")
    wordings = tmp_path / "wordings.json"
    wordings.write_text(json.dumps({"task2_b": ["Number of cats"]}))
    one, two = tasks.read_tasks(tmp_path, wordings=wordings)
    assert (one.name, one.sources, one.categories) == ("task1_a", ("set_1",), ("Counting",))
    assert one.descriptions == ("Count the cats of 1.", "Say how many.")
    assert two.descriptions == ("Count the cats of 2.", "How many?", "Number of cats")
    assert one.examples[1] == tasks.Instance("two cats", ("2", "two"))
    assert one.instances[3] == tasks.Instance(INPUT.format(1003), ("3", "many"))
    (only,) = tasks.read_tasks(tmp_path, ["task2_b"], wordings, descriptions=2)
    assert only.descriptions == two.descriptions[:2]


def test_prompts_and_completions(tmp_path):
    (task,) = read(tmp_path, {"task1": content(1)})
    given = f"Input: {INPUT.format(1000)}\nOutput:"
    assert tasks.pairs(task)[0] == (given, " 0")
    assert tasks.pairs(task, "Count.", 2)[0] == (
        f"Count.\n\nInput: one cat\nOutput: 1\n\nInput: two cats\nOutput: 2\n\n{given}", " 0"
    )  # fmt: skip
    refused("has 2 positive examples, not 3", tasks.pairs, task, examples=3)


def test_instances_are_held_out(tmp_path):
    twice = content(1)
    twice["Instances"].append(twice["Instances"][0])
    (task,) = read(tmp_path, {"task1": twice})
    training, held_out = tasks.divided(task, 5)
    assert len(held_out.instances) == 5
    assert not {i.text for i in training.instances} & {i.text for i in held_out.instances}
    assert tasks.divided(task, 5) == (training, held_out)
    assert tasks.divided(task, 5, seed=1) != (training, held_out)
    refused("has 21 instances, too few to hold 21 out", tasks.divided, task, 21)


def test_damaged_tasks_are_refused(tmp_path):
    refused("holds no task", tasks.read_tasks, tmp_path)
    for name, changes, part in (
        ("task1", {"Instances": []}, r"task1\.json has no instances: remove the task"),
        ("task2", {"Definition": [" "]}, r"task2\.json has an empty Definition"),
        ("task3", {"Instances": [{"input": "x", "output": []}]}, "an instance has no output"),
        ("task4", {"Definition": 3}, "is no task of Super-NaturalInstructions"),
    ):
        refused(part, read, tmp_path / name, {name: content(1, **changes)})
    refused("holds list, not an object", read, tmp_path / "list", {"task5": []})
    write(tmp_path / "text", {})
    (tmp_path / "text" / "task7.json").write_text("{")
    refused(r"task7\.json is not JSON", tasks.read_tasks, tmp_path / "text")
    write(tmp_path / "yaml", {"task8": content(1)})
    (tmp_path / "yaml" / "task8.descriptions.yaml").write_text("a: [")
    refused(r"task8\.descriptions\.yaml is not YAML", tasks.read_tasks, tmp_path / "yaml")
    (tmp_path / "task6.json.gz").write_bytes(b"no gzip")
    refused(r"task6\.json\.gz cannot be read", tasks.read_tasks, tmp_path)
    refused("holds no task task9", tasks.read_tasks, tmp_path, ["task9"])


def test_leaks_are_found(tmp_path):
    found = read(
        tmp_path,
        {
            "task1": content(1),
            "task2": content(2),
            "task3": content(3, source="Set-1 (https://example.org)"),
            "task4": content(4, first=2010),  # half of the instances of task2
            "task5": content(5, Instances=[{"input": "yes or no", "output": "yes"}]),
            "task6": content(6, Instances=[{"input": "yes or no", "output": "no"}]),  # too short to tell
        },
    )
    assert [(leak.left, leak.right, leak.reason) for leak in leaks(found)] == [
        ("task1", "task3", "both have the source set1"),
        ("task2", "task4", "50% of the instances of one are nearly in the other"),
    ]
    refused(
        r"tasks task2 \(train\) and task4 \(unseen\) leak into each other: 50%",
        splits.given, found, {"train": ["task1", "task2", "task3"], "unseen": ["task4"]},
    )  # fmt: skip
    together = splits.given(found, {"train": ["task1", "task3"], "validation": ["task5"], "unseen": ["task2", "task4"]})
    splits.write(together, tmp_path / "splits.json")
    assert splits.read(tmp_path / "splits.json", found) == together
    refused("task task4 is in the split unseen, so it may not train", together.check_training, ["task1", "task4"])
    refused("names task task9, which is not among", splits.given, found, {"train": ["task9"]})
    refused("in the splits train and unseen", splits.given, found, {"train": ["task1"], "unseen": ["task1"]})
    refused("split train names no task", splits.given, found, {"unseen": ["task1"]})


def test_drawn_splits_have_no_leaks(tmp_path):
    contents = {f"task{i:02}": content(i) for i in range(8)}
    contents |= {f"task{i:02}": content(i, source="common") for i in range(8, 12)}
    found = read(tmp_path, contents)
    drawn = splits.drawn(found, validation=2, unseen=3)
    assert (len(drawn.train), len(drawn.validation), len(drawn.unseen)) == (7, 2, 3)
    assert {f"task{i:02}" for i in range(8, 12)} <= set(drawn.train)
    splits.check(drawn, found)
    assert splits.drawn(found, 2, 3) == drawn
    assert splits.drawn(found, 2, 3, seed=1) != drawn
    refused("12 tasks cannot give 9 unseen tasks", splits.drawn, found, 0, 9)


def test_the_tasks_of_the_data_set():
    directory = SHARED / "data" / "super-natural-instructions"
    if not directory.is_dir():
        pytest.skip("needs ../shared")
    names = ["task1314_country_abbreviation", "task1426_country_independence_year", "task875_emotion_classification"]
    found = tasks.read_tasks(directory, names)
    assert [len(task.descriptions) > 60 for task in found] == [False, False, True]
    (leak,) = leaks(found)  # both ask for facts about the same countries
    assert (leak.left, leak.right) == tuple(names[:2])
